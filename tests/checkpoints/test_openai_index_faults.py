"""Damaged and hostile indexes of TensorFlow checkpoints: one typed error each, soon."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpt2_fast.checkpoints.openai_bundle import open_bundle
from gpt2_fast.errors import CheckpointError
from tests.checkpoints_support import refused

from . import bundle_writer as bw
from .openai_support import CONFIG, DATA, INDEX, WTE, entries, flip, load, rebuilt, sound_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound model; each test damages it."""
    return sound_model(tmp_path)


# --- The index: the table ------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 7, 47, 48])
def test_index_is_short(folder: Path, size: int) -> None:
    rebuilt(folder, (folder / INDEX).read_bytes()[:size])
    refused(lambda: load(folder), r"model\.ckpt\.index")


def test_index_is_cut_at_any_place(folder: Path) -> None:
    whole = (folder / INDEX).read_bytes()
    for size in range(0, len(whole), 97):
        rebuilt(folder, whole[:size])
        with pytest.raises(CheckpointError, match=r"model\.ckpt\.index"):
            load(folder)


def test_every_flipped_bit_of_a_small_index_is_found(tmp_path: Path) -> None:
    """But for the footer's padding and the metaindex, which nothing reads."""
    content = bw.table([(b"", bw.header()), (b"a", bw.entry(1, (1,), 0, 4, 5))])
    footer = len(content) - 48
    meta_block = footer - len(bw.sealed(bw.block([(b"a", b"12")], 1))) - 13
    quiet = {*range(meta_block, meta_block + 13), *range(footer, footer + 40)}
    for at in sorted(set(range(len(content))) - quiet):
        damaged = bytearray(content)
        damaged[at] ^= 0x10
        (tmp_path / INDEX).write_bytes(damaged)
        (tmp_path / DATA).write_bytes(bytes(4))
        with pytest.raises(CheckpointError, match="index"):
            open_bundle(tmp_path, CONFIG)


def test_wrong_magic(folder: Path) -> None:
    flip(folder / INDEX, -1)
    refused(lambda: load(folder), "magic number 0xda4775248b80fb57, wanted 0xdb4775248b80fb57")


def test_block_checksum(folder: Path) -> None:
    flip(folder / INDEX, 10)
    refused(
        lambda: load(folder), "block at 0: crc32c is 0x[0-9a-f]{8}, the file says 0x[0-9a-f]{8}"
    )


@pytest.mark.parametrize(("kind", "name"), [(1, "snappy"), (2, "type 2"), (255, "type 255")])
def test_compressed_block(folder: Path, kind: int, name: str) -> None:
    rebuilt(folder, bw.table(entries(), compression=kind))
    refused(lambda: load(folder), rf"block at 0: compressed \({name}\)")


def block_index(content: bytes, handle: bytes | None = None) -> bytes:
    """A table of one data block with this content, sealed rightly."""
    out = bw.sealed(content)
    index = bw.block([(b"z", handle or bw.varint(0) + bw.varint(len(content)))], 1)
    place = bw.varint(len(out)) + bw.varint(len(index))
    footer = (bw.varint(0) + bw.varint(0) + place).ljust(40, b"\0")
    return out + bw.sealed(index) + footer + bw.MAGIC.to_bytes(8, "little")


ONE = (1).to_bytes(4, "little")
RESTART = bytes(4) + ONE


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "0 restart points do not fit into 0 bytes"),
        (bytes(4), "0 restart points"),
        (b"\xff" * 4, "4294967295 restart points"),
        (RESTART, "the table is empty"),
        (b"\x80" * 11 + RESTART, "longer than 10 bytes"),
        (b"\xff" * 9 + b"\x7f" + RESTART, "exceeds 64 bits"),
        (b"\x80" + ONE, "restart points|inside a number"),
        (b"\x01\x00\x00" + RESTART, r"claims 1 \+ 0 name bytes"),
        (b"\x00\x05\x00" + RESTART, "0 value bytes at byte|claims 0"),
        (b"\x00\x00" + bw.varint(2**62) + RESTART, "4611686018427387904 value bytes"),
        (b"\x00" + bw.varint(2**63) + b"\x00" + RESTART, "claims"),
        (bw.block([(b"", bw.header()), (b"n" * 600, b"")]), "600 name bytes .*at most 512"),
        (bw.block([(b"", bw.header()), (b"n", b"v" * 257)]), "257 value bytes .*and 256"),
        (bw.block([(b"", bw.header()), (b"b", b""), (b"a", b"")], 1), "names must ascend"),
        (bw.block([(b"", bw.header()), (b"b", b""), (b"b", b"")], 1), "names must ascend"),
        (bw.block([(b"a", b"")]), "first entry must be the header"),
        (bw.block([(b"", bw.header()), (b"a\0b", b"")]), "unprintable characters"),
        (bw.block([(b"", bw.header()), (b"a\xff", b"")]), "is not UTF-8"),
    ],
    ids=range(18),
)
def test_block_is_malformed(folder: Path, content: bytes, match: str) -> None:
    rebuilt(folder, block_index(content))
    refused(lambda: load(folder), match)


@pytest.mark.parametrize(
    "handle",
    [
        bw.varint(2**63) + bw.varint(10),
        bw.varint(0) + bw.varint(2**64 - 1),
        bw.varint(0) + bw.varint(10**6),
        bw.varint(0),
        bw.varint(0) + bw.varint(8) + b"x",
    ],
    ids=["far", "huge", "beyond", "half", "trailing"],
)
def test_block_handle(folder: Path, handle: bytes) -> None:
    rebuilt(folder, block_index(bw.block(entries()), handle))
    refused(lambda: load(folder), r"outside the table|ends inside a number|out of order")


def test_one_block_listed_many_times(folder: Path) -> None:
    """Work and memory must follow the file's size, not what the index block says."""
    content = bw.sealed(block := bw.block(entries()))
    handle = bw.varint(0) + bw.varint(len(block))
    index = bw.block([(f"{n:06}".encode(), handle) for n in range(20000)], 1)
    place = bw.varint(len(content)) + bw.varint(len(index))
    footer = (bw.varint(0) + bw.varint(0) + place).ljust(40, b"\0") + bw.MAGIC.to_bytes(8, "little")
    rebuilt(folder, content + bw.sealed(index) + footer)
    refused(lambda: load(folder), "data blocks overlap")


def test_names_that_share_almost_everything(folder: Path) -> None:
    """Prefix compression would turn half a megabyte into 40 MB of names."""
    first = b"a" * 509
    out = b"\0\0" + bw.varint(len(bw.header())) + bw.header()
    out += b"\0" + bw.varint(512) + b"\0" + first + b"   "
    last = [bytes([33 + n // 8836, 33 + n // 94 % 94, 33 + n % 94]) for n in range(70000)]
    out += b"".join(bw.varint(509) + b"\x03\0" + three for three in last)
    rebuilt(folder, block_index(out + RESTART))
    refused(lambda: load(folder), "more than 8192 tensors", memory=16 << 20)


@pytest.mark.parametrize(
    "value",
    [b"\x12\x02\x08\x01" * 63, bw.bytes_field(2, b"\x12\x00" * 8) + b"\x08\x01" * 119],
    ids=["shapes", "numbers"],
)
def test_the_most_work_that_fits_into_an_index(folder: Path, value: bytes) -> None:
    pairs = [(f"model/{n:04}/Adam".encode(), value) for n in range(1900)]
    rebuilt(folder, bw.table([(b"", bw.header()), *pairs], block_bytes=1 << 16))
    refused(lambda: load(folder), "28 of 28 tensors are missing", memory=8 << 20)


# --- The index: its messages ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "match"),
    [
        (bw.header(endianness=1), "endianness is 1"),
        (bw.header(shards=0), "num_shards must be in 1..64, got 0"),
        (bw.header(shards=-1), "num_shards must be in 1..64, got -1"),
        (bw.header(shards=2**31), "num_shards must be in 1..64"),
        (bw.header(shards=2), "data-00000-of-00002: cannot be opened"),
        (bw.header(min_consumer=2), "reader of version 2"),
        (b"", "num_shards"),
        (b"\x08" + b"\x80" * 10 + b"\x01", "longer than 10 bytes"),
        (b"\x0a\x7f", "field 1 claims 127 bytes"),
        (b"\x0a\x00", "num_shards must be a number"),
        (b"\x18\x01", "version must be a message"),
        (b"\x0b", "wire type 3"),
        (b"\x00\x00", "field number 0"),
        (b"\x0d\x01", "claims 4 bytes"),
    ],
    ids=range(14),
)
def test_header_is_malformed(folder: Path, header: bytes, match: str) -> None:
    rebuilt(folder, bw.table(entries(header=header)))
    refused(lambda: load(folder), match)


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (bw.entry(1, (20, 8), 0, WTE - 1, 0), "640 bytes, the index says 639"),
        (bw.entry(1, (20, 8), 0, WTE, 0, shard=1), "data file 1 of 1"),
        (bw.entry(1, (20, 8), 0, WTE, 0, shard=-1), "data file -1 of 1"),
        (bw.entry(1, (20, 8), -4, WTE, 0), "offset -4"),
        (bw.entry(1, (20, 8), 2**63 - 1, WTE, 0), "places tensor model/wte"),
        (bw.entry(1, (20, 8), 0, -WTE, 0), "size -640"),
        (bw.entry(1, (2**32, 2**32), 0, 0, 0), "73786976294838206464 bytes, the index says 0"),
        (bw.entry(1, (-20, -8), 0, WTE, 0), "none negative"),
        (bw.entry(1, (1,) * 9, 0, 4, 0), "at most 8 dimensions"),
        (bw.entry(3, (20, 8), 0, WTE, 0), "found DT_INT32"),
        (bw.entry(7, (20, 8), 0, WTE, 0), "wanted numbers, found data type 7"),
        (bw.entry(99, (20, 8), 0, WTE, 0), "data type 99"),
        (bw.entry(101, (20, 8), 0, WTE, 0), "data type 101"),
        (bw.entry(1, (20, 8), 0, WTE, 0) + bw.bytes_field(7, b""), "stored in slices"),
        (bw.number_field(1, 1) + bw.bytes_field(2, b"\x18\x01"), "unknown rank"),
        (bw.bytes_field(2, b"\x12\x7f"), "field 2 claims 127 bytes"),
        (bw.number_field(2, 5), "shape must be a message"),
        (bw.number_field(6, 2**40), "crc32c must fit 32 bits"),
    ],
    ids=range(18),
)
def test_entry_is_malformed(folder: Path, value: bytes, match: str) -> None:
    rebuilt(folder, bw.table(entries(value=value)))
    refused(lambda: load(folder), match)
