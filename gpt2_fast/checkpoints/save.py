"""Writing a model as a folder that transformers, and this package, load.

Everything is first written and flushed beside its destination and then renamed into place, so an
interrupted write leaves the old files as they were.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

import numpy as np
import numpy.typing as npt

from gpt2_fast.errors import CheckpointError, ParameterError

from .folder import CONFIG_NAME, PREPARED_NAME, WEIGHTS_NAME
from .huggingface_config import config_fields

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from gpt2_fast.config import GPT2Config

_STAGING_PREFIX = ".gpt2_fast-saving-"
_ALIGNMENT = 8
# numpy type -> (name in a safetensors header, name in config.json). uint16 holds the bits of BF16.
_STORED = {
    np.dtype(np.float64): ("F64", "float64"),
    np.dtype(np.float32): ("F32", "float32"),
    np.dtype(np.float16): ("F16", "float16"),
    np.dtype(np.uint16): ("BF16", "bfloat16"),
}


class SavesVocabulary(Protocol):
    """A tokenizer that can write its own files."""

    def save(self, folder: Path) -> object:
        """Write `vocab.json` and `merges.txt`."""


def save_pretrained(
    folder: str | os.PathLike[str],
    config: GPT2Config,
    tensors: Iterable[tuple[str, npt.NDArray[Any]]],
    tokenizer: SavesVocabulary | None = None,
) -> None:
    """Write `config.json`, `model.safetensors` and the tokenizer's files into `folder`.

    Args:
        folder: made if it does not exist; other files in it are left alone.
        config: the model's shape.
        tensors: canonical name and values of every tensor of `config.tensor_shapes()`, in any
            order; taken one at a time, so a generator keeps one in memory. float32, float16,
            float64 and uint16 (the bits of bfloat16) are stored as they are.
        tokenizer: its `save` is called with the folder to write to; None writes no vocabulary.

    Each file is replaced in one step, `model.safetensors` last. Whatever interrupts the writing,
    every file in `folder` is whole, old or new; what an interrupted save left is removed by the
    next one. A prepared file in `folder` (`checkpoints.prepared`) is removed: it held the model
    that was there before.

    Raises:
        ParameterError: a tensor is missing, unknown, given twice, or of the wrong shape or type.
        CheckpointError: the folder cannot be written (permissions, space, a file in its place).
    """
    with replacing(Path(folder), WEIGHTS_NAME) as staging:
        stored_type = _write_weights(staging / WEIGHTS_NAME, config, tensors)
        write_description(staging, config_fields(config) | {"torch_dtype": stored_type}, tokenizer)
    # Made from the weights that were here before, and `from_pretrained` would take it first.
    (Path(folder) / PREPARED_NAME).unlink(missing_ok=True)


@contextmanager
def replacing(target: Path, last: str) -> Iterator[Path]:
    """A folder to write into; its files replace those of `target` once the body is done.

    They are flushed, then renamed one by one, the one called `last` at the end.

    Raises:
        CheckpointError: the folder cannot be written (permissions, space, a file in its place).
    """
    try:
        target.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target)
        with _staging(target) as staging:
            yield staging
            _commit(staging, target, last)
    except (OSError, UnicodeEncodeError, ValueError) as error:
        if isinstance(error, ParameterError | CheckpointError):
            raise
        raise CheckpointError(f"{target}: cannot be written: {error}") from error


def write_description(
    folder: Path, fields: Mapping[str, Any], tokenizer: SavesVocabulary | None
) -> None:
    """Write `config.json` of these fields and, if there is one, the tokenizer's files."""
    text = json.dumps(fields, indent=2) + "\n"
    (folder / CONFIG_NAME).write_text(text, encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save(folder)


def _write_weights(
    path: Path, config: GPT2Config, tensors: Iterable[tuple[str, npt.NDArray[Any]]]
) -> str:
    """Write the safetensors file; returns the embedding's type as `config.json` names it.

    Where the data begins must be known before the first byte of it is written, and the header is
    complete only after the last: room for the longest possible header is left and padded with
    spaces, as the format allows.
    """
    shapes = config.tensor_shapes()
    room = len(_header({name: ("BF16", shape, 1 << 62, 1 << 62) for name, shape in shapes.items()}))
    room += -(8 + room) % _ALIGNMENT
    placed: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
    # A tensor that would leave the next one misaligned waits for the end: the format has no gaps.
    waiting: list[tuple[str, npt.NDArray[Any]]] = []
    types: dict[str, str] = {}
    with path.open("wb") as file:
        file.seek(8 + room)
        for name, given in tensors:
            values = _checked(name, given, shapes, types)
            types[name] = _STORED[values.dtype][1]
            if values.nbytes % _ALIGNMENT:
                waiting.append((name, values.copy()))
            else:
                _append(file, 8 + room, placed, name, values)
        missing = [name for name in shapes if name not in types]
        if missing:
            raise ParameterError(f"tensors: {len(missing)} are missing: {', '.join(missing[:4])}")
        for name, values in sorted(waiting, key=lambda item: -item[1].itemsize):
            _append(file, 8 + room, placed, name, values)
        file.seek(0)
        file.write(room.to_bytes(8, "little") + _header(placed).ljust(room))
    return types["wte.weight"]


def _checked(
    name: str,
    given: npt.NDArray[Any],
    shapes: dict[str, tuple[int, ...]],
    seen: dict[str, str],
) -> npt.NDArray[Any]:
    if name not in shapes or name in seen:
        problem = "given twice" if name in seen else "no tensor of this model"
        raise ParameterError(f"tensors: {name} is {problem}")
    values = np.asarray(given)
    little = values.dtype.newbyteorder("<")
    if little not in _STORED:
        raise ParameterError(
            f"tensors: {name}: wanted float32, float16, float64 or uint16, got {values.dtype}"
        )
    if values.shape != shapes[name]:
        raise ParameterError(
            f"tensors: {name}: wanted shape {list(shapes[name])}, got {list(values.shape)}"
        )
    return np.ascontiguousarray(values, little)


def _append(
    file: BinaryIO,
    start: int,
    placed: dict[str, tuple[str, tuple[int, ...], int, int]],
    name: str,
    values: npt.NDArray[Any],
) -> None:
    begin = file.tell() - start
    file.write(values.data.cast("B"))
    stored = _STORED[values.dtype][0]
    placed[name] = (stored, values.shape, begin, begin + prod(values.shape) * values.itemsize)


def _header(placed: dict[str, tuple[str, tuple[int, ...], int, int]]) -> bytes:
    """The JSON header under transformers' names, where all but the head live in `transformer.`."""
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, (dtype, shape, begin, end) in placed.items():
        stored = name if name == "lm_head.weight" else "transformer." + name
        fields[stored] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    return json.dumps(fields, separators=(",", ":")).encode()


@contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """A folder inside `target`, locked while its owner lives and removed when it is done."""
    staging = Path(tempfile.mkdtemp(prefix=_STAGING_PREFIX, dir=target))
    descriptor = os.open(staging, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        os.close(descriptor)


def _remove_abandoned(target: Path) -> None:
    """Remove what killed processes left: their locks died with them."""
    for staging in target.glob(_STAGING_PREFIX + "*"):
        descriptor = os.open(staging, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue  # somebody is saving here now
        else:
            shutil.rmtree(staging, ignore_errors=True)
        finally:
            os.close(descriptor)


def _commit(staging: Path, target: Path, last: str) -> None:
    """Flush every staged file to the disk, then rename all of them into `target`."""
    names = sorted(path.name for path in staging.iterdir() if path.name != last)
    names.append(last)
    for name in names:
        _flush(staging / name)
    for name in names:
        (staging / name).replace(target / name)
    _flush(target)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
