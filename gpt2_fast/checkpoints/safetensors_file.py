"""Reader of the safetensors format: eight bytes of header length, a JSON header, the raw data.

The header is read by a parser that knows its schema, so its nesting is bounded, every number is a
plain non-negative integer, and time and memory stay in proportion to the file whatever it holds.
It accepts no file that the reference implementation rejects, and is stricter in places where the
format is vague (duplicate names, unknown fields).

Source of the format: huggingface/safetensors, README.md section "Format", and its Rust reader.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, NoReturn, cast

from gpt2_fast.errors import CheckpointError

from .base import MappedFile

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

#: Element type in the header -> bytes per element. Types smaller than a byte hold no GPT-2.
ITEM_SIZES: Mapping[str, int] = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
}

# The deepest GPT2Config has 1024 layers of at most 22 tensors, each described in about 120 bytes.
_MAX_HEADER = 16 << 20
_MAX_ENTRIES = 24 << 10
_MAX_RANK = 8
_MAX_NAME = 256

# One match a token, spaces before it included: the time of a large header is the number of matches.
_SPACE = r"[ \t\r\n]*"
_END = re.compile(_SPACE + r"\Z")
_MARKS = {mark: re.compile(_SPACE + re.escape(mark)) for mark in "{}[]:,"}
_INTEGER = re.compile(_SPACE + r"(0|[1-9][0-9]{0,18})(?![0-9.eE])")
_PLAIN_STRING = re.compile(_SPACE + r'"([^"\\\x00-\x1f]*)"')
_QUOTE = re.compile(_SPACE + '"')
_STRING = json.JSONDecoder()


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: element type, shape, and its bytes begin..end-1 in the whole file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsFile:
    """An open safetensors file whose header has been checked against its length.

    Attributes:
        file: the mapped file; close it when done.
        entries: stored name -> Entry, in the order of the data, which they cover without overlap.
        metadata: the texts of `__metadata__`, empty if there are none.

    Raises:
        CheckpointError: the file is not readable or not a well-formed safetensors file. Names the
            file, and the tensor and field at fault.
    """

    def __init__(self, path: Path) -> None:
        self.file = MappedFile(path)
        self.metadata: Mapping[str, str] = {}
        try:
            self.entries: Mapping[str, Entry] = self._read_entries()
        except BaseException:
            self.file.close()
            raise

    def _read_entries(self) -> dict[str, Entry]:
        path, size = self.file.path, self.file.size
        if size < 8:
            raise CheckpointError(f"{path}: wanted 8 bytes of header length, the file has {size}")
        length = int.from_bytes(self.file.read(0, 8), "little")
        if length > size - 8:
            raise CheckpointError(
                f"{path}: the header claims {length} bytes, only {size - 8} follow"
            )
        if length > _MAX_HEADER:
            raise CheckpointError(
                f"{path}: the header claims {length} bytes, no GPT-2 needs more than {_MAX_HEADER}"
            )
        data = self.file.read(8, length)
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{path}: the header is not UTF-8: {error}") from error
        parser = _HeaderParser(text, path, 8 + length)
        entries = parser.parse()
        self.metadata = parser.metadata
        entries.sort(key=lambda item: (item[1].begin, item[1].end))
        _check_layout(entries, path, 8 + length, size)
        return dict(entries)


def _check_layout(entries: list[tuple[str, Entry]], path: Path, start: int, size: int) -> None:
    """Entries, sorted by where they begin, must fill start..size-1 with no hole and no overlap."""
    position = start
    for name, entry in entries:
        wanted = prod(entry.shape) * ITEM_SIZES[entry.dtype]
        if entry.end - entry.begin != wanted:
            raise CheckpointError(
                f"{path}: tensor {name}: data_offsets span {entry.end - entry.begin} bytes, "
                f"{entry.dtype} {list(entry.shape)} takes {wanted}"
            )
        if entry.begin != position:
            kind = "leaves a hole before" if entry.begin > position else "overlaps"
            raise CheckpointError(
                f"{path}: tensor {name}: data_offsets begin at {entry.begin - start}, which {kind} "
                f"byte {position - start}"
            )
        position = entry.end
    if position != size:
        raise CheckpointError(
            f"{path}: the tensors end at byte {position} of the file, which has {size} bytes"
        )


class _HeaderParser:
    """Descent over {name: {dtype, shape, data_offsets}, "__metadata__": {key: text}}."""

    def __init__(self, text: str, path: Path, data_start: int) -> None:
        self._text = text
        self._path = path
        self._data_start = data_start
        self._at = 0
        self.metadata: dict[str, str] = {}

    def parse(self) -> list[tuple[str, Entry]]:
        """Every tensor of the header, in the header's order."""
        if not self._text.startswith("{"):
            self._fail("wanted '{' as its first byte")
        entries: list[tuple[str, Entry]] = []
        for name in self._keys("the header"):
            if name == "__metadata__":
                for key in self._keys(name):
                    self.metadata[key] = self._string(f"{name}, {key}")
            else:
                entries.append((name, self._entry(name)))
        if _END.match(self._text, self._at) is None:
            self._fail("wanted nothing after the closing brace")
        return entries

    def _entry(self, name: str) -> Entry:
        dtype: str | None = None
        shape: list[int] | None = None
        offsets: list[int] | None = None
        for field in self._keys(f"tensor {name}"):
            where = f"tensor {name}, {field}"
            if field == "dtype":
                dtype = self._string(where)
                if dtype not in ITEM_SIZES:
                    self._fail(f"{where}: unknown element type {dtype[:20]!r}")
            elif field == "shape":
                shape = self._integers(where, _MAX_RANK)
            elif field == "data_offsets":
                offsets = self._integers(where, 2)
            else:
                self._fail(f"tensor {name}: unknown field {field[:40]!r}")
        if dtype is None or shape is None or offsets is None:
            self._fail(f"tensor {name}: wanted dtype, shape and data_offsets")
        if len(offsets) != 2 or offsets[0] > offsets[1]:
            self._fail(f"tensor {name}, data_offsets: wanted [begin, end], found {offsets}")
        return Entry(
            dtype, tuple(shape), self._data_start + offsets[0], self._data_start + offsets[1]
        )

    def _keys(self, where: str) -> Iterator[str]:
        """The keys of an object; whoever iterates reads the value before asking for the next."""
        self._expect("{", where)
        if self._take("}"):
            return
        seen: set[str] = set()
        while True:
            key = self._string(where)
            if len(key) > _MAX_NAME or not key.isprintable():
                self._fail(f"{where}: a name is too long or not printable: {key[:40]!r}")
            if key in seen:
                self._fail(f"{where}: {key} appears twice")
            if len(seen) == _MAX_ENTRIES:
                self._fail(f"{where}: more than {_MAX_ENTRIES} names")
            seen.add(key)
            self._expect(":", f"{where}, {key}")
            yield key
            if self._take("}"):
                return
            self._expect(",", where)

    def _integers(self, where: str, limit: int) -> list[int]:
        values: list[int] = []
        self._expect("[", where)
        if self._take("]"):
            return values
        while True:
            match = _INTEGER.match(self._text, self._at)
            if match is None:
                self._fail(f"{where}: wanted a non-negative integer of at most 19 digits")
            self._at = match.end()
            values.append(int(match.group(1)))
            if self._take("]"):
                return values
            if len(values) == limit:
                self._fail(f"{where}: wanted at most {limit} numbers")
            self._expect(",", where)

    def _string(self, where: str) -> str:
        plain = _PLAIN_STRING.match(self._text, self._at)
        if plain is not None:
            self._at = plain.end()
            return plain.group(1)
        quote = _QUOTE.match(self._text, self._at)
        if quote is None:
            self._fail(f"{where}: wanted a string")
        try:
            value, self._at = _STRING.raw_decode(self._text, quote.end() - 1)
            value.encode("utf-8")
        except ValueError as error:  # includes a lone surrogate, which JSON can spell
            self._fail(f"{where}: {error}")
        return cast("str", value)

    def _take(self, mark: str) -> bool:
        """Whether `mark` comes next; if so it is consumed."""
        match = _MARKS[mark].match(self._text, self._at)
        if match is None:
            return False
        self._at = match.end()
        return True

    def _expect(self, mark: str, where: str) -> None:
        if not self._take(mark):
            self._fail(f"{where}: wanted {mark!r}")

    def _fail(self, reason: str) -> NoReturn:
        raise CheckpointError(f"{self._path}: header, character {self._at}: {reason}")
