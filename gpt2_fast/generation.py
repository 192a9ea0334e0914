"""The generation loop: continuous batching of prompts and samples over one engine.

Every pass through the model takes one token of each sample that is being drawn and fills the rest
of its rows with prompt tokens. No row is padding, and no row's result depends on its company.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from . import _C
from .errors import CapacityError, ParameterError
from .results import FinishReason, Generation, Timings
from .stopping import TextBuilder

if TYPE_CHECKING:
    from .sampling import SamplingParams
    from .tokenizer import Tokenizer

_PASSES = 16  # between two looks of Python at what was drawn


@dataclass
class _Sample:
    """One text in the making: sample `number` of prompt `prompt`."""

    prompt: int
    number: int
    tokens: list[int]  # of the prompt
    draw: _C.Draw
    seed: int
    text: TextBuilder
    sequence: int = -1
    fed: int = 0  # prompt tokens in the cache
    drawn: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    reason: FinishReason | None = None
    first_token: float = 0.0
    total: float = 0.0

    @property
    def drawing(self) -> bool:
        """Whether the next pass takes its last token and draws another."""
        return bool(self.drawn) or self.fed + 1 == len(self.tokens)

    def next_tokens(self, room: int) -> list[int]:
        """Tokens for the next pass, at most `room`."""
        if self.drawn:
            return self.drawn[-1:]
        return self.tokens[self.fed : self.fed + room]

    def result(self) -> Generation:
        """The finished text."""
        return Generation(
            self.text.text,
            token_ids=self.drawn,
            logprobs=self.logprobs,
            finish_reason=self.reason or "length",
            timings=Timings(self.first_token, self.total, len(self.tokens), len(self.drawn)),
            seed=self.seed,
        )


class Batch:
    """Prompts, each with its samples, run to their ends.

    Args:
        engine: the model; up to its `max_sequences` samples run at the same time.
        prompts: token ids of each prompt, each of 1 .. n_ctx tokens.
        params: how to draw.
        tokenizer: turns tokens into text; None leaves texts empty.
        n_ctx: positions of the model.
        eos: the token that ends a text, or None.

    Raises:
        ParameterError: stop texts without a tokenizer, or seeds for another number of prompts.
    """

    def __init__(
        self,
        engine: _C.Engine,
        prompts: list[list[int]],
        params: SamplingParams,
        *,
        tokenizer: Tokenizer | None,
        n_ctx: int,
        eos: int | None,
    ) -> None:
        if tokenizer is None and params.stop:
            raise ParameterError("stop: this model has no tokenizer, so it has no text to search")
        self._engine = engine
        self._params = params
        self._n_ctx = n_ctx
        self._eos = None if params.ignore_eos else eos
        drawable = 0 if tokenizer is None else tokenizer.vocab_size
        seeds = params.seeds(len(prompts))
        self.samples = [
            _Sample(
                prompt,
                number,
                tokens,
                self._draw(seeds[prompt], number, drawable),
                seeds[prompt],
                TextBuilder(tokenizer, params.stops()),
            )
            for prompt, tokens in enumerate(prompts)
            for number in range(params.n)
        ]
        self._waiting = deque(self.samples)
        self._active: list[_Sample] = []

    def results(self) -> list[list[Generation]]:
        """Samples of each prompt, in order, after `run` has ended."""
        n = self._params.n
        done = [sample.result() for sample in self.samples]
        return [done[i : i + n] for i in range(0, len(done), n)]

    def run(self, *, promptly: bool = True) -> Generator[tuple[int, int, str], None, None]:
        """Run to the end, yielding (prompt, sample, text) whenever a text grows.

        Closing the iterator, or an exception in it, stops the work and frees the cache.

        Args:
            promptly: yield what a pass has drawn before the next begins. Otherwise several passes
                follow each other without a word of Python between them.
        """
        self._start = time.perf_counter()
        # A stop text ends a sample as soon as it is there, which only its text tells.
        self._most_passes = 1 if promptly or self._params.stop else _PASSES
        try:
            if self._params.max_new_tokens == 0:
                for sample in self._waiting:
                    sample.reason = "length"
                self._waiting.clear()
            while self._waiting or self._active:
                self._admit()
                drawing = all(sample.drawn for sample in self._active)
                yield from self._decode() if drawing else self._pass()
        finally:
            for sample in self.samples:
                with suppress(ParameterError):  # interrupted just after it was closed
                    self._close(sample)
            self._active.clear()

    def _close(self, sample: _Sample) -> None:
        if sample.sequence >= 0:
            self._engine.close(sample.sequence)
            sample.sequence = -1

    def _draw(self, seed: int, number: int, drawable: int) -> _C.Draw:
        p = self._params
        return _C.Draw(
            temperature=p.temperature,
            top_k=p.top_k,
            top_p=p.top_p,
            min_p=p.min_p,
            openai_top_p=p.top_p_rule == "openai",
            seed=seed,
            sample=number,
            drawable=drawable,
        )

    def _admit(self) -> None:
        """Open sequences for waiting samples; siblings of a prompt that is read share its pages."""
        while self._waiting and len(self._active) < self._engine.max_rows:
            sample = self._waiting[0]
            sibling = self._sibling(sample)
            if sibling is not None and not sibling.drawing:
                return  # its prompt is being read: wait and share it
            try:
                if sibling is not None and not sibling.drawn:
                    sample.sequence = self._engine.fork(sibling.sequence)
                    sample.fed = sibling.fed
                else:
                    sample.sequence = self._engine.open()
            except CapacityError:
                if not self._active:
                    raise  # nothing of ours will ever make room
                return
            self._active.append(self._waiting.popleft())

    def _sibling(self, sample: _Sample) -> _Sample | None:
        """The active sample of the same prompt that has drawn least."""
        siblings = [s for s in self._active if s.prompt == sample.prompt]
        return min(siblings, key=lambda s: len(s.drawn), default=None)

    def _pass(self) -> Iterator[tuple[int, int, str]]:
        items: list[tuple[int, list[int], object]] = []
        taken: list[_Sample] = []
        room = self._engine.max_rows
        for sample in sorted(self._active, key=lambda s: not s.drawing):  # drawing ones first
            if room == 0:
                break
            # With siblings waiting, a prompt is read up to its last token, then shared.
            shared = self._params.n > 1 and not sample.drawing
            left = len(sample.tokens) - sample.fed - (1 if shared else 0)
            tokens = sample.next_tokens(min(room, left) if not sample.drawn else 1)
            last = bool(sample.drawn) or sample.fed + len(tokens) == len(sample.tokens)
            items.append((sample.sequence, tokens, sample.draw if last else None))
            taken.append(sample)
            room -= len(tokens)
        answers = self._engine.step(items)
        now = time.perf_counter() - self._start
        for sample, (_, tokens, _), answer in zip(taken, items, answers, strict=True):
            if not sample.drawn:
                sample.fed += len(tokens)
            if answer is not None:
                text = self._accept(sample, answer, now)
                if text:
                    yield sample.prompt, sample.number, text

    def _decode(self) -> Iterator[tuple[int, int, str]]:
        """Passes in which every sample draws; a sample ends with the last of them only."""
        taken = list(self._active)
        passes = min(self._most_passes, *(self._left(sample) for sample in taken))
        items = [(sample.sequence, sample.drawn[-1], sample.draw) for sample in taken]
        answers = self._engine.decode(items, passes, -1 if self._eos is None else self._eos)
        now = time.perf_counter() - self._start
        for drawn in answers:
            for sample, answer in zip(taken, drawn, strict=True):
                text = self._accept(sample, answer, now)
                if text:
                    yield sample.prompt, sample.number, text

    def _left(self, sample: _Sample) -> int:
        """Tokens that may still be drawn."""
        room = self._n_ctx + 1 - len(sample.tokens)
        return min(self._params.max_new_tokens, room) - len(sample.drawn)

    def _accept(self, sample: _Sample, answer: tuple[int, float], now: float) -> str:
        """Take a drawn token; close the sample when it was the last."""
        token, logprob = answer
        sample.total = now
        if not sample.drawn:
            sample.first_token = now
        text = ""
        if token < 0:
            sample.reason = "numerical_error"
        else:
            sample.drawn.append(token)
            sample.logprobs.append(logprob)
            if token == self._eos:
                sample.reason = "eos"
            else:
                text = sample.text.push(token)
                sample.reason = self._reason(sample)
        if sample.reason is not None:
            text += sample.text.finish()
            if sample.text.stopped:  # the end may complete one: its last bytes became U+FFFD
                sample.reason = "stop"
            self._close(sample)
            self._active.remove(sample)
        return text

    def _reason(self, sample: _Sample) -> FinishReason | None:
        if sample.text.stopped:
            return "stop"
        if len(sample.drawn) >= self._params.max_new_tokens:
            return "length"
        return "context" if self._left(sample) == 0 else None


class TextStream(Generator[str, None, None]):
    """The text of one prompt, in pieces, as soon as no stop text can take them back.

    A generator: leaving it unfinished is fine, and `close`, or losing the last reference, stops the
    work and frees the cache.
    """

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self._pieces = batch.run()
        self._ended = False

    def send(self, value: None) -> str:
        """The next piece."""
        try:
            return self._pieces.send(value)[2]
        except StopIteration:
            self._ended = True
            raise

    def throw(self, *error: Any) -> str:
        """Raise an exception where the work is; it stops."""
        return self._pieces.throw(*error)[2]

    def close(self) -> None:
        """Stop the work and free the cache. Closing twice is harmless."""
        self._pieces.close()

    @property
    def result(self) -> Generation:
        """The whole text with its tokens, probabilities and reason to end.

        Raises:
            ParameterError: the stream was not read to its end.
        """
        if not self._ended or any(sample.reason is None for sample in self._batch.samples):
            raise ParameterError("result: this stream was not read to its end")
        return self._batch.results()[0][0]
