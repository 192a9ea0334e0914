"""Damaged, hostile and mistaken checkpoints of OpenAI's layout: one typed error each, soon."""

from __future__ import annotations

import contextlib
import json
import os
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from gpt2_fast.checkpoints.openai_bundle import open_bundle, verify_tensors
from gpt2_fast.config import GPT2Config
from gpt2_fast.errors import CheckpointError

from . import bundle_writer as bw

CONFIG = GPT2Config(n_layer=2, n_embd=8, n_head=2, n_ctx=6, vocab_size=20, eos_token_id=None)
DATA = "model.ckpt.data-00000-of-00001"
INDEX = "model.ckpt.index"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound model; each test damages it."""
    bw.write_release(tmp_path, CONFIG)
    with open_bundle(tmp_path) as checkpoint:
        verify_tensors(checkpoint)
    return tmp_path


@contextlib.contextmanager
def refused(match: str, megabytes: float | None = None) -> Iterator[None]:
    """CheckpointError with this message, within a second or within `megabytes` of Python's memory.

    Not both at once: measuring memory makes Python several times slower.
    """
    if megabytes is not None:
        tracemalloc.start()
    began = time.perf_counter()
    try:
        with pytest.raises(CheckpointError, match=match):
            yield
        took = time.perf_counter() - began
        if megabytes is None:
            assert took < 1.0
        else:
            assert tracemalloc.get_traced_memory()[1] < megabytes * 1e6
    finally:
        tracemalloc.stop()


def load(folder: Path) -> None:
    with open_bundle(folder) as checkpoint:
        verify_tensors(checkpoint)


def flip(path: Path, at: int, bits: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= bits
    path.write_bytes(data)


# --- The `checkpoint` file ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "prefix",
    [
        "../../etc/passwd",
        "/etc/passwd",
        "../model.ckpt",
        "sub/model.ckpt",
        "..",
        ".",
        "",
        "C:model.ckpt",
        r"run1\model.ckpt",
        r"\\host\share\model.ckpt",
        "model\0.ckpt",
    ],
    ids=repr,
)
def test_state_leads_out_of_the_folder(folder: Path, prefix: str) -> None:
    outside = folder / "sub"  # files that would be read if the path were followed
    for place in (outside, folder.parent):
        bw.write_bundle(place, bw.openai_tensors(CONFIG))
    bw.write_state(folder, prefix)
    with refused(r"checkpoint: model_checkpoint_path must be the name of files in this folder"):
        load(folder)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "wanted a line model_checkpoint_path"),
        (b"\xff\xfe", "not UTF-8"),
        (b'model_checkpoint_path: "model.ckpt', "wanted a line"),
        (b'all_model_checkpoint_paths: "model.ckpt"', "wanted a line"),
        (b'model_checkpoint_path: "model-7"', r"model-7\.index: missing.*has model\.ckpt"),
        (b"x" * (2 << 20), "at most 1048576 bytes"),
    ],
    ids=["empty", "utf16", "unclosed", "other-field", "absent", "2MB"],
)
def test_state_is_malformed(folder: Path, content: bytes, match: str) -> None:
    (folder / "checkpoint").write_bytes(content)
    with refused(match):
        load(folder)


# --- hparams.json -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"n_layer": None}, "n_layer must be an integer"),
        ({"n_layer": "2"}, "n_layer must be an integer"),
        ({"n_layer": 2.0}, "n_layer must be an integer"),
        ({"n_layer": True}, "n_layer must be an integer"),
        ({"n_layer": 10**6}, "n_layer must be an integer in"),
        ({"n_layer": 10**30}, "n_layer must be an integer in"),
        ({"n_layer": -1}, "n_layer must be an integer in"),
        ({"n_head": 0}, "n_head must be an integer in"),
        ({"n_head": 3}, "divisible"),
        ({"n_layer": 1}, "holds tensor model/h1/.*, but n_layer is 1"),
        ({"n_layer": 3}, "12 of .* tensors are missing: h.2.ln_1.weight"),
        ({"n_vocab": 19}, r"model/wte: wanted shape \[19, 8\], found \[20, 8\]"),
        ({"n_ctx": 7}, r"model/wpe: wanted shape \[7, 8\], found \[6, 8\]"),
        ({"n_embd": 4}, r"wanted shape \[20, 4\], found \[20, 8\]"),
    ],
    ids=str,
)
def test_hparams_disagree(folder: Path, change: dict[str, object], match: str) -> None:
    (folder / "hparams.json").write_text(json.dumps(bw.hparams(CONFIG) | change))
    with refused(rf"({'hparams'}|{'model'}).*{match}"):
        load(folder)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'{"n_layer": 1}', b"\xff", b'{"n_layer": NaN}', b"[" * 100000],
    ids=lambda content: content[:16].decode("latin-1"),
)
def test_hparams_are_malformed(folder: Path, content: bytes) -> None:
    (folder / "hparams.json").write_bytes(content)
    with refused(r"hparams\.json"):
        load(folder)


# --- The index: the table ------------------------------------------------------------------------


def rebuilt(folder: Path, content: bytes) -> None:
    (folder / INDEX).write_bytes(content)


def entries(**changes: bytes) -> list[tuple[bytes, bytes]]:
    """Header and one tensor, with parts of the header replaced."""
    return [(b"", changes.get("header", bw.header())), (b"model/wte", changes.get("value", b""))]


@pytest.mark.parametrize("size", [0, 1, 7, 47, 48])
def test_index_is_short(folder: Path, size: int) -> None:
    rebuilt(folder, (folder / INDEX).read_bytes()[:size])
    with refused(r"model\.ckpt\.index"):
        load(folder)


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
    with refused("magic number 0xda4775248b80fb57, wanted 0xdb4775248b80fb57"):
        load(folder)


def test_block_checksum(folder: Path) -> None:
    flip(folder / INDEX, 10)
    with refused("block at 0: crc32c is 0x[0-9a-f]{8}, the file says 0x[0-9a-f]{8}"):
        load(folder)


@pytest.mark.parametrize(("kind", "name"), [(1, "snappy"), (2, "type 2"), (255, "type 255")])
def test_compressed_block(folder: Path, kind: int, name: str) -> None:
    rebuilt(folder, bw.table(entries(), compression=kind))
    with refused(rf"block at 0: compressed \({name}\)"):
        load(folder)


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
    with refused(match, megabytes=2.0):
        load(folder)


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
    with refused(r"outside the table|ends inside a number|out of order"):
        load(folder)


def test_one_block_listed_many_times(folder: Path) -> None:
    """Work and memory must follow the file's size, not what the index block says."""
    content = bw.sealed(block := bw.block(entries()))
    handle = bw.varint(0) + bw.varint(len(block))
    index = bw.block([(f"{n:06}".encode(), handle) for n in range(20000)], 1)
    place = bw.varint(len(content)) + bw.varint(len(index))
    footer = (bw.varint(0) + bw.varint(0) + place).ljust(40, b"\0") + bw.MAGIC.to_bytes(8, "little")
    rebuilt(folder, content + bw.sealed(index) + footer)
    with refused("data blocks overlap"):
        load(folder)


def test_names_that_share_almost_everything(folder: Path) -> None:
    """Prefix compression would turn half a megabyte into 40 MB of names."""
    first = b"a" * 509
    out = b"\0\0" + bw.varint(len(bw.header())) + bw.header()
    out += b"\0" + bw.varint(512) + b"\0" + first + b"   "
    last = [bytes([33 + n // 8836, 33 + n // 94 % 94, 33 + n % 94]) for n in range(70000)]
    out += b"".join(bw.varint(509) + b"\x03\0" + three for three in last)
    rebuilt(folder, block_index(out + RESTART))
    for limit in (None, 16.0):
        with refused("more than 8192 tensors", limit):
            load(folder)


@pytest.mark.parametrize(
    "value",
    [b"\x12\x02\x08\x01" * 63, bw.bytes_field(2, b"\x12\x00" * 8) + b"\x08\x01" * 119],
    ids=["shapes", "numbers"],
)
@pytest.mark.parametrize("megabytes", [None, 8.0], ids=["time", "memory"])
def test_the_most_work_that_fits_into_an_index(
    folder: Path, value: bytes, megabytes: float | None
) -> None:
    pairs = [(f"model/{n:04}/Adam".encode(), value) for n in range(1900)]
    rebuilt(folder, bw.table([(b"", bw.header()), *pairs], block_bytes=1 << 16))
    with refused("28 of 28 tensors are missing", megabytes):
        load(folder)


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
    with refused(match):
        load(folder)


WTE = 20 * 8 * 4


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
    with refused(match, megabytes=2.0):
        load(folder)


# --- Tensors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model/h0/attn/c_attn/w", (1, 24, 8)),  # transposed
        ("model/h0/attn/c_attn/w", (2, 8, 12)),
        ("model/h0/attn/c_attn/b", (1, 24)),
        ("model/wte", (1, 20, 8)),
        ("model/ln_f/g", (2, 4)),
    ],
    ids=str,
)
def test_wrong_shape(folder: Path, name: str, shape: tuple[int, ...]) -> None:
    tensors = bw.openai_tensors(CONFIG)
    tensors[name] = tensors[name].reshape(shape)
    bw.write_bundle(folder, tensors)
    with refused(f"tensor {name}: wanted shape"):
        load(folder)


@pytest.mark.parametrize("name", ["model/wte", "model/h1/mlp/c_proj/b", "model/ln_f/b"])
def test_missing_tensor(folder: Path, name: str) -> None:
    tensors = bw.openai_tensors(CONFIG)
    del tensors[name]
    bw.write_bundle(folder, tensors)
    with refused("1 of 28 tensors are missing"):
        load(folder)


def test_overlapping_tensors(folder: Path) -> None:
    rows = bw.entry(1, (20, 8), 0, WTE, 0)
    more = bw.entry(1, (6, 8), WTE - 4, 6 * 8 * 4, 0)
    names = [(b"", bw.header()), (b"model/wpe", more), (b"model/wte", rows)]
    rebuilt(folder, bw.table(names))
    with refused("model/wte and model/wpe overlap"):
        load(folder)


# --- The data file --------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", [1, 4, 1000])
def test_data_is_short(folder: Path, lost: int) -> None:
    data = (folder / DATA).read_bytes()
    (folder / DATA).write_bytes(data[:-lost])
    with refused(rf"{DATA}: {len(data) - lost} bytes, but the index places tensor .*cut off"):
        load(folder)


def test_data_is_missing(folder: Path) -> None:
    (folder / DATA).unlink()
    with refused(f"{DATA}: cannot be opened"):
        load(folder)


def test_data_is_empty(folder: Path) -> None:
    (folder / DATA).write_bytes(b"")
    with refused(f"{DATA}: the file is empty"):
        load(folder)


def test_any_damaged_value_is_found_and_named(folder: Path) -> None:
    data = (folder / DATA).read_bytes()
    for at in range(0, len(data), 331):
        damaged = bytearray(data)
        damaged[at] ^= 0x80
        (folder / DATA).write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"tensor model/.*: crc32c is 0x"):
            load(folder)


def test_damage_is_found_when_the_tensor_is_read_and_not_before(folder: Path) -> None:
    flip(folder / DATA, -1, 0x40)  # the last name in order: model/wte
    with open_bundle(folder) as checkpoint:
        checkpoint.tensors["wpe.weight"].float32()
        for read in (
            lambda view: view.array,
            lambda view: view.rows(0, 1),
            lambda view: view.float32(),
            lambda view: view.first_rows(1),
        ):
            with refused(f"{DATA}: tensor model/wte: crc32c"):
                read(checkpoint.tensors["wte.weight"])


def test_data_of_another_training_run(folder: Path) -> None:
    """Same shapes, so only the checksums tell."""
    other = bw.openai_tensors(CONFIG, seed=5)
    (folder / DATA).write_bytes(b"".join(other[n].tobytes() for n in sorted(other)))
    with refused("crc32c is 0x"):
        load(folder)


def test_data_shrinks_or_changes_while_it_is_open(folder: Path) -> None:
    with open_bundle(folder) as checkpoint:
        os.truncate(folder / DATA, 100)
        with refused("changed while it was being read"):
            checkpoint.tensors["wte.weight"].float32()


# --- Files that are no files ----------------------------------------------------------------------


def as_fifo(path: Path) -> None:
    os.mkfifo(path)


def as_loop(path: Path) -> None:
    path.symlink_to(path.name)


def as_endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [Path.mkdir, as_fifo, as_loop, as_endless])
@pytest.mark.parametrize("name", [INDEX, DATA, "hparams.json", "checkpoint"])
def test_not_a_file(folder: Path, name: str, make: Callable[[Path], None]) -> None:
    if not hasattr(os, "mkfifo"):
        pytest.skip("needs FIFOs")
    (folder / name).unlink()
    make(folder / name)
    with refused(f"{name}: "):
        load(folder)


@pytest.mark.parametrize("name", [INDEX, "hparams.json", "checkpoint"])
def test_a_terabyte_of_nothing(folder: Path, name: str) -> None:
    try:
        os.truncate(folder / name, 1 << 40)
    except OSError as error:
        pytest.skip(f"no sparse files here: {error}")
    with refused(f"{name}: wanted at most"):
        load(folder)


def test_values_not_a_number_are_left_to_the_engine(folder: Path) -> None:
    tensors = bw.openai_tensors(CONFIG)
    tensors["model/ln_f/g"][3] = np.nan
    bw.write_bundle(folder, tensors)
    with open_bundle(folder) as checkpoint:
        assert np.isnan(checkpoint.tensors["ln_f.weight"].array[3])
