"""Writes TensorFlow tensor bundles (version 2) from the published format, right and wrong ones.

Shares nothing with the reader, checksum included, so that an error in one is not repeated in the
other; tests/checkpoints/test_tensorflow.py compares both with TensorFlow itself.

Source: LevelDB, doc/table_format.md; tensorflow/core/protobuf/tensor_bundle.proto.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_fast.config import GPT2Config

MAGIC = 0xDB4775248B80FB57
DT_NUMBERS = {"float32": 1, "float64": 2, "int32": 3, "int64": 9, "float16": 19}
DT_STRING, DT_BFLOAT16 = 7, 14

_TABLE = []
for _byte in range(256):
    for _ in range(8):
        _byte = (_byte >> 1) ^ (0x82F63B78 if _byte & 1 else 0)
    _TABLE.append(_byte)


def crc32c(data: bytes) -> int:
    """CRC-32C, one byte at a time."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = (crc >> 8) ^ _TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def mask(crc: int) -> int:
    """LevelDB's masking of a stored checksum."""
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def varint(value: int) -> bytes:
    """Base-128 number, low groups first; negative ones as 64-bit two's complement."""
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def number_field(field: int, value: int) -> bytes:
    """A varint field; nothing when zero, as proto3 writes it."""
    return varint(field << 3) + varint(value) if value else b""


def bytes_field(field: int, value: bytes) -> bytes:
    """A length-delimited field."""
    return varint(field << 3 | 2) + varint(len(value)) + value


def header(shards: int = 1, endianness: int = 0, min_consumer: int = 0) -> bytes:
    """BundleHeaderProto of a producer of version 1."""
    version = number_field(1, 1) + number_field(2, min_consumer)
    return number_field(1, shards) + number_field(2, endianness) + bytes_field(3, version)


def shape_proto(shape: Iterable[int]) -> bytes:
    """TensorShapeProto."""
    return b"".join(bytes_field(2, number_field(1, size)) for size in shape)


def entry(
    dtype: int, shape: Iterable[int], offset: int, size: int, crc: int, shard: int = 0
) -> bytes:
    """BundleEntryProto; `crc` is the plain CRC-32C."""
    return (
        number_field(1, dtype)
        + bytes_field(2, shape_proto(shape))
        + number_field(3, shard)
        + number_field(4, offset)
        + number_field(5, size)
        + varint(6 << 3 | 5)
        + mask(crc).to_bytes(4, "little")
    )


def block(entries: Iterable[tuple[bytes, bytes]], restart_interval: int = 16) -> bytes:
    """A block without its trailer."""
    out, restarts, previous = bytearray(), [], b""
    for count, (key, value) in enumerate(entries):
        shared = 0
        if count % restart_interval == 0:
            restarts.append(len(out))
        else:
            while shared < min(len(key), len(previous)) and key[shared] == previous[shared]:
                shared += 1
        out += varint(shared) + varint(len(key) - shared) + varint(len(value))
        out += key[shared:] + value
        previous = key
    restarts = restarts or [0]
    tail = b"".join(at.to_bytes(4, "little") for at in [*restarts, len(restarts)])
    return bytes(out) + tail


def sealed(content: bytes, compression: int = 0) -> bytes:
    """A block with its trailer."""
    kind = bytes([compression])
    return content + kind + mask(crc32c(content + kind)).to_bytes(4, "little")


def table(
    entries: Iterable[tuple[bytes, bytes]],
    *,
    block_bytes: int = 4096,
    restart_interval: int = 16,
    compression: int = 0,
) -> bytes:
    """A whole LevelDB table; `entries` in the order they are to be stored."""
    out, index = bytearray(), []

    def flush(group: list[tuple[bytes, bytes]]) -> None:
        content = block(group, restart_interval)
        index.append((group[-1][0], varint(len(out)) + varint(len(content))))
        out.extend(sealed(content, compression))

    group: list[tuple[bytes, bytes]] = []
    size = 0
    for pair in entries:
        group.append(pair)
        size += len(pair[0]) + len(pair[1])
        if size >= block_bytes:
            flush(group)
            group, size = [], 0
    if group:
        flush(group)
    meta_content, index_content = block([]), block(index, 1)
    meta = varint(len(out)) + varint(len(meta_content))
    out += sealed(meta_content)
    handle = varint(len(out)) + varint(len(index_content))
    out += sealed(index_content)
    return bytes(out) + (meta + handle).ljust(40, b"\0") + MAGIC.to_bytes(8, "little")


@dataclass
class Stored:
    """A tensor as bytes, for types that numpy has no name for."""

    dtype: int
    shape: tuple[int, ...]
    raw: bytes


def stored(value: np.ndarray[Any, Any] | Stored) -> Stored:
    """The bytes of an array, little-endian."""
    if isinstance(value, Stored):
        return value
    return Stored(DT_NUMBERS[value.dtype.name], value.shape, value.tobytes())


def write_bundle(
    folder: Path,
    tensors: Mapping[str, np.ndarray[Any, Any] | Stored],
    *,
    prefix: str = "model.ckpt",
    shards: int = 1,
    checksum: Callable[[bytes], int] = crc32c,
    **table_options: int,
) -> None:
    """Write `prefix`.index and the data files."""
    entries, data = bundle_entries(tensors, shards=shards, checksum=checksum)
    folder.mkdir(parents=True, exist_ok=True)
    for shard, content in enumerate(data):
        (folder / f"{prefix}.data-{shard:05d}-of-{shards:05d}").write_bytes(content)
    (folder / f"{prefix}.index").write_bytes(table(entries, **table_options))


def bundle_entries(
    tensors: Mapping[str, np.ndarray[Any, Any] | Stored],
    *,
    shards: int = 1,
    checksum: Callable[[bytes], int] = crc32c,
) -> tuple[list[tuple[bytes, bytes]], list[bytearray]]:
    """What an index holds, and the data files; tensors go round-robin over `shards`."""
    data = [bytearray() for _ in range(shards)]
    entries = [(b"", header(shards))]
    for number, name in enumerate(sorted(tensors, key=str.encode)):
        value, shard = stored(tensors[name]), number % shards
        place = len(data[shard]), len(value.raw), checksum(value.raw)
        entries.append((name.encode(), entry(value.dtype, value.shape, *place, shard)))
        data[shard] += value.raw
    return entries, data


def openai_tensors(config: GPT2Config, seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    """Random values under the names and in the shapes of openai/gpt-2, src/model.py."""
    rng = np.random.default_rng(seed)
    c, i = config.n_embd, config.inner_size
    shapes: dict[str, tuple[int, ...]] = {
        "model/wte": (config.vocab_size, c),
        "model/wpe": (config.n_ctx, c),
        "model/ln_f/g": (c,),
        "model/ln_f/b": (c,),
    }
    for layer in range(config.n_layer):
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"model/h{layer}/{norm}/{leaf}": (c,) for leaf in "gb"}
        for name, wide in (
            ("attn/c_attn", (c, 3 * c)),
            ("attn/c_proj", (c, c)),
            ("mlp/c_fc", (c, i)),
            ("mlp/c_proj", (i, c)),
        ):
            shapes[f"model/h{layer}/{name}/w"] = (1, *wide)
            shapes[f"model/h{layer}/{name}/b"] = wide[1:]
    return {name: rng.standard_normal(s, dtype=np.float32) for name, s in shapes.items()}


def hparams(config: GPT2Config) -> dict[str, int]:
    """What hparams.json holds."""
    return {
        "n_vocab": config.vocab_size,
        "n_ctx": config.n_ctx,
        "n_embd": config.n_embd,
        "n_head": config.n_head,
        "n_layer": config.n_layer,
    }


def write_state(folder: Path, prefix: str) -> None:
    """The `checkpoint` text file."""
    (folder / "checkpoint").write_text(
        f'model_checkpoint_path: "{prefix}"\nall_model_checkpoint_paths: "{prefix}"\n'
    )


def write_release(
    folder: Path,
    config: GPT2Config,
    *,
    tensors: Mapping[str, np.ndarray[Any, Any] | Stored] | None = None,
    prefix: str = "model.ckpt",
    **options: Any,
) -> Mapping[str, np.ndarray[Any, Any] | Stored]:
    """A folder in the layout of OpenAI's release; returns the tensors as stored."""
    tensors = openai_tensors(config) if tensors is None else tensors
    write_bundle(folder, tensors, prefix=prefix, **options)
    write_state(folder, prefix)
    (folder / "hparams.json").write_text(json.dumps(hparams(config)))
    return tensors
