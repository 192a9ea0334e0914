"""The index of a TensorFlow checkpoint (tensor bundle, version 2), read without TensorFlow.

An index is a table in LevelDB's format that maps tensor names to small protocol buffers saying
where in the data files each tensor lies:

    block*  metaindex block  index block  footer
    block  = entry*  restart offset (uint32)*  number of restarts (uint32)
    entry  = shared length, unshared length, value length (varints)  unshared key bytes  value
    after each block: compression type (1 byte), masked CRC-32C of block and type (4 bytes)
    footer = two handles (offset, size as varints), zero padding to 40 bytes, magic (8 bytes)

Values of the index block are handles of the data blocks. The entry with the empty name is the
bundle's header. All integers are little-endian. Nothing here allocates more than a small multiple
of the index file, and every field is checked before it is used.

Source: LevelDB, doc/table_format.md; tensorflow/core/protobuf/tensor_bundle.proto;
tensorflow/core/framework/tensor_shape.proto; protocol buffers, "Encoding".
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from gpt2_fast import _C
from gpt2_fast.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator

MAGIC = 0xDB4775248B80FB57
FOOTER_BYTES = 48
TRAILER_BYTES = 5

#: Limits of what is accepted: five times what the largest GPT-2 and its optimizer need (1,742
#: names, 0.1 MB), and little enough that the worst file takes less than a second.
MAX_INDEX_BYTES = 1 << 19
MAX_ENTRIES = 8192
MAX_NAME_BYTES = 512
MAX_VALUE_BYTES = 256
MAX_RANK = 8
MAX_SHARDS = 64

_MASK_DELTA = 0xA282EAD8
_LITTLE_ENDIAN = 0

#: tensorflow/core/framework/types.proto: number -> (name, bytes per element) of the plain types.
DTYPES = {
    1: ("DT_FLOAT", 4),
    2: ("DT_DOUBLE", 8),
    3: ("DT_INT32", 4),
    4: ("DT_UINT8", 1),
    5: ("DT_INT16", 2),
    6: ("DT_INT8", 1),
    9: ("DT_INT64", 8),
    10: ("DT_BOOL", 1),
    14: ("DT_BFLOAT16", 2),
    17: ("DT_UINT16", 2),
    19: ("DT_HALF", 2),
    22: ("DT_UINT32", 4),
    23: ("DT_UINT64", 8),
}


@dataclass(frozen=True)
class BundleEntry:
    """Where one tensor lies: bytes [offset, offset + size) of data file `shard`.

    Attributes:
        dtype: number of TensorFlow's DataType.
        shape: dimensions, outermost first.
        crc32c: checksum of the bytes, unmasked.
        partitioned: the tensor is stored in slices under other names; the place is meaningless.
    """

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    crc32c: int
    partitioned: bool

    @property
    def dtype_name(self) -> str:
        """TensorFlow's name of the element type."""
        return DTYPES[self.dtype][0] if self.dtype in DTYPES else f"data type {self.dtype}"


@dataclass(frozen=True)
class BundleIndex:
    """A whole index: the number of data files, and every tensor by name."""

    shards: int
    entries: dict[str, BundleEntry]


def unmask(masked: int) -> int:
    """The CRC-32C that LevelDB stored as `masked` (rotated right by 15 bits, plus a constant)."""
    rotated = (masked - _MASK_DELTA) & 0xFFFFFFFF
    return ((rotated >> 17) | (rotated << 15)) & 0xFFFFFFFF


def parse_index(data: bytes, where: str) -> BundleIndex:
    """Read a whole index file.

    Args:
        data: the file's bytes.
        where: its path, for messages.

    Raises:
        CheckpointError: anything about the file is not as the format says; names file and field.
    """
    entries: dict[str, BundleEntry] = {}
    shards = 0
    for number, (key, value) in enumerate(_table(data, where)):
        if number > MAX_ENTRIES:
            raise CheckpointError(f"{where}: more than {MAX_ENTRIES} tensors")
        if number == 0:
            if key:
                raise CheckpointError(
                    f"{where}: the first entry must be the header (empty name), got {key[:80]!r}"
                )
            shards = _parse_header(value, where)
            continue
        name = _tensor_name(key, where)
        entries[name] = _parse_entry(value, f"{where}, tensor {name[:80]!r}", shards)
    if not shards:
        raise CheckpointError(f"{where}: the table is empty, wanted a header and tensors")
    return BundleIndex(shards, entries)


def _tensor_name(key: bytes, where: str) -> str:
    try:
        name = key.decode("utf-8")
    except UnicodeDecodeError:
        raise CheckpointError(f"{where}: tensor name {key[:80]!r} is not UTF-8") from None
    if not name.isprintable():
        raise CheckpointError(f"{where}: tensor name {name[:80]!r} has unprintable characters")
    return name


# --- LevelDB table ------------------------------------------------------------------------------


def _table(data: bytes, where: str) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values in order; keys strictly ascend."""
    if len(data) < FOOTER_BYTES:
        raise CheckpointError(
            f"{where}: {len(data)} bytes, wanted at least the {FOOTER_BYTES} of a table's footer"
        )
    magic = int.from_bytes(data[-8:], "little")
    if magic != MAGIC:
        raise CheckpointError(f"{where}: magic number {magic:#018x}, wanted {MAGIC:#018x}")
    footer = data[-FOOTER_BYTES:-8]
    _, at = _handle(footer, 0, f"{where}, footer")
    (offset, size), _ = _handle(footer, at, f"{where}, footer")
    body = len(data) - FOOTER_BYTES
    previous: bytes | None = None
    end = 0
    for _, value in _block(data, offset, size, body, f"{where}, index block"):
        (offset, size), used = _handle(value, 0, f"{where}, index block")
        if used != len(value) or offset < end:
            raise CheckpointError(f"{where}, index block: data blocks overlap or are out of order")
        end = offset + size + TRAILER_BYTES
        for key, entry in _block(data, offset, size, body, f"{where}, block at {offset}"):
            if previous is not None and key <= previous:
                raise CheckpointError(
                    f"{where}: names must ascend, {key[:80]!r} follows {previous[:80]!r}"
                )
            previous = key
            yield key, entry


def _handle(data: bytes, at: int, where: str) -> tuple[tuple[int, int], int]:
    offset, at = _varint(data, at, where)
    size, at = _varint(data, at, where)
    return (offset, size), at


def _block(
    data: bytes, offset: int, size: int, limit: int, where: str
) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of one block, after its checksum; `limit` is where the footer begins."""
    if offset + size + TRAILER_BYTES > limit:
        raise CheckpointError(
            f"{where}: bytes {offset}..{offset + size + TRAILER_BYTES} lie outside the table, "
            f"which has {limit}"
        )
    trailer = data[offset + size : offset + size + TRAILER_BYTES]
    checked = memoryview(data)[offset : offset + size + 1]
    stored, found = unmask(int.from_bytes(trailer[1:], "little")), _C.crc32c(checked, 0)
    if stored != found:
        raise CheckpointError(f"{where}: crc32c is {found:#010x}, the file says {stored:#010x}")
    if trailer[0] != 0:
        kind = "snappy" if trailer[0] == 1 else f"type {trailer[0]}"
        raise CheckpointError(
            f"{where}: compressed ({kind}); TensorFlow writes uncompressed indexes, "
            "and only those are read"
        )
    return _block_entries(data[offset : offset + size], where)


def _block_entries(block: bytes, where: str) -> Iterator[tuple[bytes, bytes]]:
    size = len(block)
    restarts = int.from_bytes(block[-4:], "little") if size >= 4 else 0
    end = size - 4 * (restarts + 1)
    if restarts == 0 or end < 0:
        raise CheckpointError(f"{where}: {restarts} restart points do not fit into {size} bytes")
    at = 0
    key = b""
    while at < end:
        shared, at = _varint(block, at, where)
        unshared, at = _varint(block, at, where)
        length, at = _varint(block, at, where)
        if shared > len(key) or at + unshared + length > end:
            raise CheckpointError(
                f"{where}: an entry claims {shared} + {unshared} name bytes and {length} value "
                f"bytes at byte {at} of {end}, after a name of {len(key)}"
            )
        if shared + unshared > MAX_NAME_BYTES or length > MAX_VALUE_BYTES:
            raise CheckpointError(
                f"{where}: an entry of {shared + unshared} name bytes and {length} value bytes at "
                f"byte {at}, wanted at most {MAX_NAME_BYTES} and {MAX_VALUE_BYTES}"
            )
        key = key[:shared] + block[at : at + unshared]
        at += unshared
        yield key, block[at : at + length]
        at += length


# --- Protocol buffers ---------------------------------------------------------------------------


def _varint(data: bytes, at: int, where: str) -> tuple[int, int]:
    """An unsigned varint of at most 64 bits at `at`, and the position after it."""
    if at < len(data) and data[at] < 0x80:  # most are one byte
        return data[at], at + 1
    value = 0
    for count in range(10):
        if at + count >= len(data):
            raise CheckpointError(f"{where}: ends inside a number at byte {at}")
        byte = data[at + count]
        value |= (byte & 0x7F) << (7 * count)
        if byte < 0x80:
            if value >> 64:
                raise CheckpointError(f"{where}: a number at byte {at} exceeds 64 bits")
            return value, at + count + 1
    raise CheckpointError(f"{where}: a number at byte {at} is longer than 10 bytes")


def _signed(value: int) -> int:
    """int64 as protocol buffers store it: two's complement in a varint."""
    return value - (1 << 64) if value >> 63 else value


def _fields(message: bytes, where: str) -> Iterator[tuple[int, int | bytes]]:
    """Field numbers and values of one message: bytes where length-delimited, else an integer."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at, where)
        number, kind = tag >> 3, tag & 7
        if number == 0:
            raise CheckpointError(f"{where}: field number 0 at byte {at}")
        value: int | bytes
        if kind == 0:
            value, at = _varint(message, at, where)
        elif kind in (1, 2, 5):
            length = {1: 8, 5: 4}.get(kind, 0)
            if kind == 2:
                length, at = _varint(message, at, where)
            if at + length > len(message):
                raise CheckpointError(
                    f"{where}: field {number} claims {length} bytes at byte {at} of {len(message)}"
                )
            raw = message[at : at + length]
            value = raw if kind == 2 else int.from_bytes(raw, "little")
            at += length
        else:
            raise CheckpointError(f"{where}: field {number} has wire type {kind}")
        yield number, value


def _integer(value: int | bytes, field: str, where: str) -> int:
    if isinstance(value, bytes):
        raise CheckpointError(f"{where}: {field} must be a number, got {len(value)} bytes")
    return _signed(value)


def _message(value: int | bytes, field: str, where: str) -> bytes:
    if isinstance(value, int):
        raise CheckpointError(f"{where}: {field} must be a message, got the number {value}")
    return value


def _parse_header(value: bytes, where: str) -> int:
    """BundleHeaderProto -> the number of data files."""
    where = f"{where}, header"
    shards, endianness, min_consumer = 0, _LITTLE_ENDIAN, 0
    for number, field in _fields(value, where):
        if number == 1:
            shards = _integer(field, "num_shards", where)
        elif number == 2:
            endianness = _integer(field, "endianness", where)
        elif number == 3:
            for inner, version in _fields(_message(field, "version", where), where):
                if inner == 2:
                    min_consumer = _integer(version, "version.min_consumer", where)
    if not 1 <= shards <= MAX_SHARDS:
        raise CheckpointError(f"{where}: num_shards must be in 1..{MAX_SHARDS}, got {shards}")
    if endianness != _LITTLE_ENDIAN:
        raise CheckpointError(
            f"{where}: endianness is {endianness} (1 is big-endian), only 0, little, is read"
        )
    if min_consumer > 1:
        raise CheckpointError(
            f"{where}: needs a reader of version {min_consumer}, this one reads version 1"
        )
    return shards


def _parse_shape(value: bytes, where: str) -> tuple[int, ...]:
    """TensorShapeProto -> dimensions."""
    shape: list[int] = []
    for number, field in _fields(value, where):
        if number == 2:
            size = 0
            for inner, part in _fields(_message(field, "shape.dim", where), where):
                if inner == 1:
                    size = _integer(part, "shape.dim.size", where)
            shape.append(size)
        elif number == 3 and _integer(field, "shape.unknown_rank", where):
            raise CheckpointError(f"{where}: shape has an unknown rank")
    if len(shape) > MAX_RANK or any(size < 0 for size in shape):
        raise CheckpointError(
            f"{where}: shape must have at most {MAX_RANK} dimensions, none negative, "
            f"got {shape[: MAX_RANK + 1]}"
        )
    return tuple(shape)


def _parse_entry(value: bytes, where: str, shards: int) -> BundleEntry:
    """BundleEntryProto, checked for agreement of dtype, shape and size."""
    numbers = {1: 0, 3: 0, 4: 0, 5: 0, 6: 0}
    names = {1: "dtype", 3: "shard_id", 4: "offset", 5: "size", 6: "crc32c"}
    shape: tuple[int, ...] = ()
    partitioned = False
    for number, field in _fields(value, where):
        if number in numbers:
            numbers[number] = _integer(field, names[number], where)
        elif number == 2:
            shape = _parse_shape(_message(field, "shape", where), where)
        elif number == 7:
            partitioned = True
    dtype, shard, offset, size, masked = (numbers[n] for n in (1, 3, 4, 5, 6))
    if not 0 <= masked < 1 << 32:
        raise CheckpointError(f"{where}: crc32c must fit 32 bits, got {masked}")
    if not partitioned:
        if not 0 <= shard < shards or offset < 0 or size < 0:
            raise CheckpointError(
                f"{where}: data file {shard} of {shards}, offset {offset}, size {size}"
            )
        if dtype in DTYPES and prod(shape) * DTYPES[dtype][1] != size:
            raise CheckpointError(
                f"{where}: {DTYPES[dtype][0]} of shape {shape} is "
                f"{prod(shape) * DTYPES[dtype][1]} bytes, the index says {size}"
            )
    return BundleEntry(dtype, shape, shard, offset, size, unmask(masked), partitioned)
