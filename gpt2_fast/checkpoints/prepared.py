"""Prepared models: the weights as the CPU engine holds them, packed and perhaps quantised.

`gpt2_fast.safetensors` is a safetensors file with one tensor, `weights`, of bytes: the memory of
the engine. Its order is the same for every instruction set and has a name, LAYOUT. The rest is in
`__metadata__`: `format`, `layout`, `precision`, `config` (JSON of the shape), `piece` (bytes that
one checksum covers) and `crc32c` (a checksum of each piece, eight hexadecimal digits, separated by
spaces). Beside it lie `config.json` and the vocabulary, as in every other folder.

The bytes begin at a multiple of a page, so that a large file can be mapped while it is loaded;
csrc/engine/packed_file.h says how. Where they begin elsewhere, they are read.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, NoReturn

from gpt2_fast import _C
from gpt2_fast.config import GPT2Config
from gpt2_fast.errors import CheckpointError, ParameterError

from .folder import CONFIG_NAME, PREPARED_NAME, holds_ordinary
from .huggingface_config import config_fields, read_config
from .safetensors_file import SafetensorsFile
from .strict_json import parse_object

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    import numpy.typing as npt

    from .save import SavesVocabulary

FORMAT = "gpt2_fast"
#: Name of the order of bytes in `Weights::lay_out`. Another order gets another name, so that no
#: file is read as what it is not; tests/checkpoints/test_prepared.py notices a change.
LAYOUT = "cpu-1"
PRECISIONS = ("fp32", "bf16", "int8", "int4")

_TENSOR = "weights"
_ALIGNMENT = 4096  # a page; where the system has larger ones, the weights are read
_PIECE = 1 << 20  # stays in a core's second cache until it has been checked
_LEAST_PIECE, _MOST_PIECE = 1 << 12, 1 << 30
_CHECKSUM = re.compile(r"[0-9a-f]{8}")
_DECIMAL = re.compile(r"[1-9][0-9]{0,18}")


class PreparedFile:
    """An open prepared file whose every field has been checked, but for the weights themselves.

    Attributes:
        path: the file.
        config: the model's shape.
        precision: "fp32", "bf16", "int8" or "int4".
        layout: name of the order of bytes.
        nbytes: bytes of packed weights.

    Raises:
        CheckpointError: the file or the folder's `config.json` cannot be read, a field is wrong, or
            the two describe different models. Names file and field, what was wanted and what came.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / PREPARED_NAME
        self._stored = SafetensorsFile(self.path)
        try:
            if self._field("format") != FORMAT:
                self._fail("format", repr(FORMAT))
            self.layout = self._layout()
            self.precision = self._precision()
            self.config = self._config(folder / CONFIG_NAME)
            self._offset, self.nbytes = self._extent()
            self._piece, self._checksums = self._sums()
        except BaseException:
            self.close()
            raise

    def load_into(self, engine: _C.Engine) -> None:
        """Read the weights into an engine of this shape and precision, checking every piece.

        Raises:
            CheckpointError: the file changed since it was opened, cannot be read, or is damaged.
        """
        descriptor = self._stored.file.descriptor()
        try:
            engine.load_packed(descriptor, self._offset, self.nbytes, self._piece, self._checksums)
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}: {error}") from error

    def close(self) -> None:
        """Let go of the file; what was loaded stays."""
        self._stored.file.close()

    def _field(self, name: str) -> str:
        if name not in self._stored.metadata:
            raise CheckpointError(f"{self.path}: __metadata__: {name} is missing")
        return self._stored.metadata[name]

    def _fail(self, name: str, wanted: str) -> NoReturn:
        text = repr(self._field(name))
        found = text if len(text) <= 60 else text[:57] + "..."
        raise CheckpointError(f"{self.path}: __metadata__, {name}: wanted {wanted}, found {found}")

    def _layout(self) -> str:
        layout = self._field("layout")
        if layout != LAYOUT:
            hint = "the file was written by another version of gpt2_fast, perhaps a newer one"
            self._fail("layout", f"{LAYOUT!r} ({hint}; `gpt2-fast quantize` makes it again)")
        return layout

    def _precision(self) -> str:
        precision = self._field("precision")
        if precision not in PRECISIONS:
            self._fail("precision", f"one of {', '.join(PRECISIONS)}")
        return precision

    def _config(self, beside: Path) -> GPT2Config:
        where = f"{self.path}: __metadata__, config"
        fields = parse_object(self._field("config").encode(), where)
        names = set(GPT2Config().to_dict())
        if set(fields) != names:
            odd = min(set(fields) ^ names)
            state = "is missing" if odd in names else "is unknown"
            raise CheckpointError(f"{where}: {odd[:40]!r} {state}")
        try:
            config = GPT2Config(**fields)
        except ParameterError as error:
            raise CheckpointError(f"{where}: {error}") from error
        described = read_config(beside)
        if config != described:
            raise CheckpointError(
                f"{where}: not that of {beside}: {_difference(described, config)}"
            )
        return config

    def _extent(self) -> tuple[int, int]:
        """Where the weights lie in the file: offset and bytes."""
        entries = self._stored.entries
        if list(entries) != [_TENSOR]:
            found = ", ".join(name[:40] for name in list(entries)[:4]) or "none"
            raise CheckpointError(f"{self.path}: wanted one tensor, {_TENSOR!r}, found {found}")
        entry = entries[_TENSOR]
        wanted = packed_bytes(self.config, self.precision, f"{self.path}: __metadata__, config")
        if entry.dtype != "U8" or entry.shape != (wanted,):
            raise CheckpointError(
                f"{self.path}: tensor {_TENSOR}: wanted U8 [{wanted}], the size of this shape in "
                f"{self.precision}, found {entry.dtype} {list(entry.shape)}"
            )
        return entry.begin, wanted

    def _sums(self) -> tuple[int, list[int]]:
        """Bytes of a piece, and the checksum of each."""
        digits = self._field("piece")
        piece = int(digits) if _DECIMAL.fullmatch(digits) else 0
        if not _LEAST_PIECE <= piece <= _MOST_PIECE:
            self._fail("piece", f"a number in {_LEAST_PIECE}..{_MOST_PIECE}")
        words = self._field("crc32c").split(" ")
        where = f"{self.path}: __metadata__, crc32c"
        for index, word in enumerate(words):
            if not _CHECKSUM.fullmatch(word):
                raise CheckpointError(
                    f"{where}: checksum {index}: wanted eight hexadecimal digits, "
                    f"found {word[:20]!r}"
                )
        wanted = -(-self.nbytes // piece)
        if len(words) != wanted:
            raise CheckpointError(
                f"{where}: wanted {wanted} checksums, one for each {piece} of {self.nbytes} bytes, "
                f"found {len(words)}"
            )
        return piece, [int(word, 16) for word in words]


def packed_bytes(config: GPT2Config, precision: str, where: str) -> int:
    """Bytes of packed weights on the CPU; CheckpointError if the engine refuses the shape."""
    try:
        return _C.plan(config.to_dict(), precision, 1, 1)["weights"]
    except ParameterError as error:
        raise CheckpointError(f"{where}: {error}") from error


def save_prepared(
    folder: Path,
    config: GPT2Config,
    precision: str,
    packed: npt.NDArray[np.uint8],
    tokenizer: SavesVocabulary | None,
) -> None:
    """Write the prepared file, `config.json` and the tokenizer's files into `folder`.

    Args:
        folder: made if it does not exist. An ordinary model in it stays, and so does a
            `config.json` that says the same.
        config, precision: of the model.
        packed: uint8 (N,), what `Engine.packed` gave.
        tokenizer: its files are written if it is not None.

    Files already there are replaced only once the new ones are complete, the prepared file last.

    Raises:
        ParameterError: the folder holds the weights of a model of another shape.
        CheckpointError: the folder cannot be written, or a model in it is damaged.
    """
    from .save import replacing, write_description  # what loading has no need of

    described = _description_in(folder, config)
    with replacing(folder, PREPARED_NAME) as staging:
        _write(staging / PREPARED_NAME, config, precision, packed)
        write_description(staging, config_fields(config), tokenizer)
        if described:
            (staging / CONFIG_NAME).unlink()


def _description_in(folder: Path, config: GPT2Config) -> bool:
    """Whether `folder` already has a `config.json` that says `config`."""
    if holds_ordinary(folder):
        from . import open_checkpoint

        with open_checkpoint(folder) as checkpoint:
            if checkpoint.config != config:
                raise ParameterError(
                    f"{folder}: holds another model: {_difference(config, checkpoint.config)}; "
                    "choose another folder"
                )
    try:
        return read_config(folder / CONFIG_NAME) == config
    except CheckpointError:
        return False  # none, or one that is replaced


def _write(path: Path, config: GPT2Config, precision: str, packed: npt.NDArray[np.uint8]) -> None:
    pieces = (packed[start : start + _PIECE] for start in range(0, packed.size, _PIECE))
    fields: dict[str, Any] = {
        "__metadata__": {
            "format": FORMAT,
            "layout": LAYOUT,
            "precision": precision,
            "config": json.dumps(config.to_dict()),
            "piece": str(_PIECE),
            "crc32c": " ".join(f"{_C.crc32c(piece):08x}" for piece in pieces),
        },
        _TENSOR: {"dtype": "U8", "shape": [packed.size], "data_offsets": [0, packed.size]},
    }
    header = json.dumps(fields, separators=(",", ":")).encode()
    header += b" " * (-(8 + len(header)) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.write(packed.data)


def _difference(wanted: GPT2Config, found: GPT2Config) -> str:
    """The first field in which two shapes differ, and both values."""
    left, right = wanted.to_dict(), found.to_dict()
    name = next(name for name in left if left[name] != right[name])
    return f"{name}: wanted {left[name]!r}, found {right[name]!r}"
