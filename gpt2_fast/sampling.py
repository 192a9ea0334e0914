"""What a caller may ask of generation, checked once."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, fields
from operator import index
from typing import Any, Literal, get_args

from .errors import ParameterError

TopPRule = Literal["keep_crossing", "openai"]

_MAX_N = 65536
_MAX_STOPS = 1024
_MAX_STOP_LENGTH = 65536
_NO_NUMBER = (bool, str, bytes, bytearray)  # though float() takes them


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn. The defaults are neutral: the model's own distribution.

    Filters apply in this order: temperature, top_k, top_p, min_p. The token is then
    argmax(logit / temperature + Gumbel noise), with noise that depends on the seed, the number of
    the sample and the position only (Maddison et al. 2014, arXiv:1411.0030).

    Attributes:
        max_new_tokens: most tokens to draw; fewer where the text ends or the context is full.
        temperature: divides the logits; 0 takes the most probable token (lowest id of equals).
        top_k: keep the k most probable tokens and those tied with the last; 0 keeps all.
        top_p: keep the most probable tokens that together reach this probability.
        min_p: keep tokens at least this fraction as probable as the most probable one.
        top_p_rule: "keep_crossing" keeps the token that crosses top_p (Holtzman et al. 2020, and
            every current engine); "openai" drops it, as openai/gpt-2 does, but never the first.
        seed: one integer in 0 .. 2**64 - 1, or one per prompt; None draws one at random, which the
            result names.
        stop: text, or texts, that end the generation and are cut off.
        n: samples for each prompt; sample i is keyed by (seed, i).
        ignore_eos: go on after the end-of-text token.

    Raises:
        ParameterError: a value is outside its range or of the wrong kind.
    """

    max_new_tokens: int = 100
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    top_p_rule: TopPRule = "keep_crossing"
    seed: int | Sequence[int] | None = None
    stop: str | Sequence[str] | None = None
    n: int = 1
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        set_field = object.__setattr__  # the dataclass is frozen; values are normalised once, here
        set_field(self, "max_new_tokens", integer("max_new_tokens", self.max_new_tokens, 0, 2**31))
        set_field(self, "top_k", integer("top_k", self.top_k, 0, 2**31 - 1))
        set_field(self, "n", integer("n", self.n, 1, _MAX_N))
        set_field(self, "temperature", _number("temperature", self.temperature, 0.0, 1e9))
        set_field(self, "top_p", _number("top_p", self.top_p, 0.0, 1.0))
        set_field(self, "min_p", _number("min_p", self.min_p, 0.0, 1.0))
        if self.top_p_rule not in get_args(TopPRule):
            raise ParameterError(
                f"top_p_rule must be one of {', '.join(get_args(TopPRule))}, "
                f"got {self.top_p_rule!r}"
            )
        if not isinstance(self.ignore_eos, bool):
            raise ParameterError(f"ignore_eos must be True or False, got {self.ignore_eos!r}")
        set_field(self, "stop", _stops(self.stop))
        set_field(self, "seed", _seeds(self.seed))

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> SamplingParams:
        """From keyword arguments; an unknown name is an error that suggests the nearest one."""
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                import difflib

                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}"
                raise ParameterError(f"unknown argument {name!r}{hint}")
        return cls(**given)

    def stops(self) -> list[str]:
        """The stop texts as a list."""
        return list(self.stop or [])

    def seeds(self, prompts: int) -> list[int]:
        """One seed for each of `prompts` prompts."""
        if self.seed is None:
            return [int.from_bytes(os.urandom(8), "little") for _ in range(prompts)]
        if isinstance(self.seed, int):
            return [self.seed] * prompts
        if len(self.seed) != prompts:
            raise ParameterError(
                f"seed must be one integer or one for each prompt, got {len(self.seed)} seeds for "
                f"{prompts} prompts"
            )
        return list(self.seed)


def integer(name: str, value: object, least: int, most: int) -> int:
    try:
        number = index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or not least <= number <= most:
        raise ParameterError(f"{name} must be an integer in {least}..{most}, got {value!r:.80}")
    return number


def _seeds(value: Any) -> int | list[int] | None:
    if value is None:
        return None
    if _is_list(value):
        return [integer("seed", each, 0, 2**64 - 1) for each in value]
    return integer("seed", value, 0, 2**64 - 1)


def _is_list(value: object) -> bool:
    """Sized and in an order, text and arrays without dimensions excepted."""
    sized = hasattr(value, "__len__") and getattr(value, "shape", None) != ()
    return sized and not isinstance(value, str | bytes | Mapping | AbstractSet)


def _number(name: str, value: Any, least: float, most: float) -> float:
    try:
        number = math.nan if isinstance(value, _NO_NUMBER) or _is_list(value) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not least <= number <= most:  # false for NaN as well
        raise ParameterError(f"{name} must be a number in [{least:g}, {most:g}], got {value!r:.80}")
    return number


def _stops(value: Any) -> list[str]:
    if value is None:
        return []
    stops = [value] if isinstance(value, str) else value
    if not _is_list(stops) or not all(isinstance(stop, str) for stop in stops):
        raise ParameterError(f"stop must be a text or a list of texts, got {value!r:.80}")
    if len(stops) > _MAX_STOPS:
        raise ParameterError(f"stop must hold at most {_MAX_STOPS} texts, got {len(stops)}")
    for number, stop in enumerate(stops):
        if not 1 <= len(stop) <= _MAX_STOP_LENGTH:
            raise ParameterError(
                f"stop: text {number} must have 1..{_MAX_STOP_LENGTH} characters, got {len(stop)}"
            )
    return list(stops)
