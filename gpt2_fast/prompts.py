"""What callers may pass as a prompt, turned into token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from operator import index
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

from .errors import ContextOverflow, ParameterError, TokenizerError

if TYPE_CHECKING:
    from .config import GPT2Config
    from .tokenizer import Tokenizer

#: Text or token ids.
Prompt: TypeAlias = "str | Sequence[int]"


def is_single(prompts: object) -> bool:
    """Whether `prompts` is one prompt: a text, or a sequence that starts with a token id.

    Raises:
        ParameterError: it is neither that nor a sequence of prompts.
    """
    if isinstance(prompts, str):
        return True
    if not _is_sequence(prompts):
        raise ParameterError(
            "prompts must be a text, a list of token ids, or a list of such prompts, got "
            f"{type(prompts).__name__}"
        )
    first = next(iter(prompts), "")  # nothing at all is a list of no prompts
    return not isinstance(first, str) and not _is_sized(first)  # a token id, perhaps a bad one


def _is_sized(value: object) -> bool:
    return hasattr(value, "__len__") and getattr(value, "shape", None) != ()


def _is_sequence(value: object) -> TypeGuard[Sequence[Any]]:
    no = (str, bytes, bytearray, Mapping, AbstractSet)
    return _is_sized(value) and not isinstance(value, no)


def token_ids(values: Any, vocab_size: int, name: str) -> list[int]:
    """Check ids one by one.

    Raises:
        ParameterError: naming the position of a value that is not an integer in range.
    """
    if not _is_sequence(values):
        raise ParameterError(f"{name} must be a list of token ids, got {type(values).__name__}")
    ids = values.tolist() if hasattr(values, "tolist") else values
    checked = []
    for position, value in enumerate(ids):
        try:
            token = None if isinstance(value, bool) else index(value)
        except TypeError:
            token = None
        if token is None or not 0 <= token < vocab_size:
            raise ParameterError(
                f"{name}: token ids must be integers in 0..{vocab_size - 1}, got {value!r} at "
                f"position {position}"
            )
        checked.append(token)
    return checked


def encode(prompt: Prompt, config: GPT2Config, tokenizer: Tokenizer | None, name: str) -> list[int]:
    """Token ids of one prompt, unchecked against the context.

    Raises:
        TokenizerError: a text was given to a model without a tokenizer.
        ParameterError: an id is out of range.
    """
    if not isinstance(prompt, str):
        return token_ids(prompt, config.vocab_size, name)
    if tokenizer is None:
        raise TokenizerError(
            f"{name}: this model has no tokenizer, so it takes token ids, not text"
        )
    return token_ids(tokenizer.encode(prompt), config.vocab_size, name)


def for_generation(
    prompt: Prompt, config: GPT2Config, tokenizer: Tokenizer | None, name: str
) -> list[int]:
    """Token ids to continue; nothing means the start of a document.

    Raises:
        ContextOverflow: the prompt is longer than the context.
        ParameterError: it is empty and the model has no end-of-text token to start from.
    """
    tokens = encode(prompt, config, tokenizer, name)
    if not tokens:
        if config.eos_token_id is None:
            raise ParameterError(f"{name} is empty, and this model has no token to start from")
        tokens = [config.eos_token_id]
    require_fit(len(tokens), config, name)
    return tokens


def require_fit(count: int, config: GPT2Config, name: str) -> None:
    """Raise ContextOverflow when `count` tokens are more than the context holds."""
    if count > config.n_ctx:
        raise ContextOverflow(
            f"{name} has {count} tokens; the context of this model holds {config.n_ctx}, "
            f"{count - config.n_ctx} fewer"
        )
