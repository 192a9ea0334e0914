"""JSON from files that nobody vouches for: UTF-8 only, no duplicate keys, no NaN, bounded depth."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NoReturn

from gpt2_fast.errors import CheckpointError

from .base import read_bytes

if TYPE_CHECKING:
    from pathlib import Path

_DEPTH = 64


def read_object(path: Path, limit: int) -> dict[str, Any]:
    """The JSON object that a file of at most `limit` bytes holds.

    Raises:
        CheckpointError: the file cannot be read or is not exactly one JSON object; the message
            names the file and what is wrong with it.
    """
    return parse_object(read_bytes(path, limit), path)


def parse_object(data: bytes, path: Path | str) -> dict[str, Any]:
    """As `read_object`, for bytes that came from `path`: a file, or a place within one in words."""
    if data.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise CheckpointError(f"{path}: wanted UTF-8 without a byte order mark, found one")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8: {error}") from error
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise CheckpointError(f"{path}: JSON nested deeper than {_DEPTH} levels") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: wanted a JSON object, found {type(value).__name__}")
    if _deeper_than(value, _DEPTH):
        raise CheckpointError(f"{path}: JSON nested deeper than {_DEPTH} levels")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {twice[:80]!r} appears twice")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _deeper_than(value: Any, depth: int) -> bool:
    level = [value]
    for _ in range(depth):
        level = [
            child
            for parent in level
            if isinstance(parent, dict | list)
            for child in (parent.values() if isinstance(parent, dict) else parent)
        ]
        if not level:
            return False
    return True
