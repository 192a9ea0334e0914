"""What generation and scoring return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from typing_extensions import Self

FinishReason = Literal["length", "stop", "eos", "context", "numerical_error"]


@dataclass(frozen=True)
class Timings:
    """Wall-clock seconds of one sample, from the call to the end of its last token.

    Attributes:
        first_token: until its first token was drawn, waiting for other prompts included.
        total: until its last token was drawn.
        prompt_tokens, new_tokens: tokens read and tokens drawn.
    """

    first_token: float
    total: float
    prompt_tokens: int
    new_tokens: int

    @property
    def tokens_per_second(self) -> float:
        """Tokens drawn per second after the first one; 0 for fewer than two."""
        span = self.total - self.first_token
        return (self.new_tokens - 1) / span if self.new_tokens > 1 and span > 0 else 0.0


class Generation(str):
    """One generated text, without its prompt: a `str` that knows how it came about.

    Attributes:
        text: the text itself, as a plain `str`.
        token_ids: every token drawn, an end-of-text token and the tokens of a stop text included.
        logprobs: natural-log probability of each token under the model (temperature 1, no filter).
        finish_reason: "length" (max_new_tokens), "stop" (a stop text), "eos" (end-of-text token),
            "context" (no position left), "numerical_error" (logits were not finite).
        timings: wall-clock figures.
        seed: the seed that, with the same arguments, gives the same tokens again.
    """

    __slots__ = ("finish_reason", "logprobs", "seed", "text", "timings", "token_ids")

    text: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    timings: Timings
    seed: int

    def __new__(
        cls,
        text: str,
        *,
        token_ids: list[int],
        logprobs: list[float],
        finish_reason: FinishReason,
        timings: Timings,
        seed: int,
    ) -> Self:
        """See the class."""
        self = super().__new__(cls, text)
        self.text = text
        self.token_ids = token_ids
        self.logprobs = logprobs
        self.finish_reason = finish_reason
        self.timings = timings
        self.seed = seed
        return self

    def __getnewargs_ex__(self) -> tuple[tuple[str], dict[str, object]]:
        """Pickles and copies keep every attribute."""
        names = ("token_ids", "logprobs", "finish_reason", "timings", "seed")
        return (self.text,), {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Score:
    """Probabilities of a given text.

    Attributes:
        token_ids: the tokens scored.
        logprobs: natural-log probability of each token given those before it; the first is None,
            since nothing comes before it, unless the text was scored with `bos=True`.
        total: the sum of the known ones.
        tokens: the text of each token; a token that is part of a character shows U+FFFD, and an id
            that only pads the vocabulary shows nothing. Empty when the model has no tokenizer.
    """

    token_ids: list[int]
    logprobs: list[float | None]
    total: float
    tokens: list[str]


@dataclass(frozen=True)
class Plan:
    """Bytes a model takes, known before anything is allocated.

    Attributes:
        weights: packed parameters.
        cache: KV cache for `max_batch` sequences of full length; pages are committed by the system
            as they are used, so this is an upper bound.
        cache_block: 16 positions of one sequence, the unit of the cache.
        scratch: activations, logits and per-thread buffers.
    """

    weights: int
    cache: int
    cache_block: int
    scratch: int

    @property
    def total(self) -> int:
        """Sum of weights, cache and scratch."""
        return self.weights + self.cache + self.scratch
