"""Fuzzer of OpenAI's layout: hparams.json, `checkpoint`, an index with checksums, and data files.

python tests/fuzz/fuzz_openai_bundle.py --seconds 600
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from gpt2_fast import _C
from gpt2_fast.checkpoints.openai_bundle import open_bundle, verify_tensors
from gpt2_fast.config import GPT2Config
from tests.checkpoints import bundle_writer as bw
from tests.fuzz.harness import Choices, Files, Target, damaged_part, main

CONFIG = GPT2Config(n_layer=1, n_embd=4, n_head=2, n_ctx=3, vocab_size=9, eos_token_id=None)

NUMBERS = [
    bw.varint(value)
    for value in (0, 1, 2, 127, 128, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1)
] + [b"\x80" * 10, b"\xff" * 9 + b"\x7f", b"\0" * 4, b"\xff" * 8]
DICTIONARY = [
    *NUMBERS,
    *[b'"', b"{", b"}", b":", b",", b"null", b"true", b"1e999", b"9" * 400, b'"n_layer"', b"\\"],
    *[b"/", b"\xff\xfe", b"model_checkpoint_path", b"model-1000", b"model/h0/attn/c_attn/w"],
    *[b"model/h99/ln_1/g", b"/Adam", b"global_step", b"<|endoftext|>"],
]


def open_release(folder: Path) -> None:
    """Open a folder, compare every checksum and read every tensor.

    Not by `open_checkpoint`, which would turn a ValueError of the reader into a refusal.
    """
    with open_bundle(folder) as checkpoint:
        verify_tensors(checkpoint, threads=1)
        for view in checkpoint.tensors.values():
            if view.float32().shape != checkpoint.config.tensor_shapes()[view.name]:
                raise AssertionError(f"{view.name} has shape {view.shape}")


def _trained() -> dict[str, Any]:
    """What a training run leaves: other types, and tensors that only training needs."""
    tensors: dict[str, Any] = {}
    for name, value in bw.openai_tensors(CONFIG, seed=1).items():
        tensors[name] = value.astype(np.float64 if name.endswith("/b") else np.float16)
        tensors[f"{name}/Adam"] = value
    tensors["beta1_power"] = np.float32(0.9).reshape(())
    tensors["global_step"] = np.int64(1000).reshape(())
    return tensors


#: Name of an index -> the tensors and the number of data files it tells of.
_BUNDLES = {"model.ckpt": (bw.openai_tensors(CONFIG), 1), "model-1000": (_trained(), 2)}
_ENTRIES = {
    f"{prefix}.index": bw.bundle_entries(tensors, shards=shards)[0]
    for prefix, (tensors, shards) in _BUNDLES.items()
}


def seeds() -> list[dict[str, bytes]]:
    """A release in one file, and a training run in two whose index has many blocks."""
    return [_folder("model.ckpt"), _folder("model-1000", block_bytes=300, restart_interval=3)]


def _folder(prefix: str, **table_options: int) -> dict[str, bytes]:
    tensors, shards = _BUNDLES[prefix]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bw.write_release(
            folder, CONFIG, tensors=tensors, prefix=prefix, shards=shards, **table_options
        )
        (folder / "encoder.json").write_text('{"<|endoftext|>": 8, "a": 0}')
        return {path.name: path.read_bytes() for path in folder.iterdir()}


def repair_index(files: Files, choices: Choices) -> None:
    """Half of the time, put in an index damaged in its parts, with right checksums around them.

    Otherwise, half of the time, make the checksums of the damaged index right again.
    """
    way = choices.below(4)
    for name, data in files.items():
        if name in _ENTRIES and way in (1, 3):
            data[:] = _damaged_table(_ENTRIES[name], choices)
        elif name.endswith(".index") and way == 2:
            _seal_again(data)


def _damaged_table(entries: list[tuple[bytes, bytes]], choices: Choices) -> bytes:
    def some(part: bytes, one_in: int) -> bytes:
        # 0, which is what a used up stream of choices gives, leaves a part alone.
        if choices.below(one_in) != 1:
            return part
        # Cut, so that a hundred parts that grew are not hundreds of megabytes in the fuzzer itself.
        return damaged_part(part, DICTIONARY, choices)[: len(part) + 4096]

    pairs = [(b"", some(entries[0][1], 6))]
    pairs += [(some(name, 60), some(entry, 30)) for name, entry in entries[1:]]
    content = some(bw.block(pairs, (1, 2, 16)[choices.below(3)]), 3)
    compression = 1 + choices.below(2) if choices.below(20) == 1 else 0
    handle = some(bw.varint(0) + bw.varint(len(content)), 6)
    blocks = 2 + 298 * choices.below(2) if choices.below(5) == 1 else 1
    index = some(bw.block([(b"z", handle)] * blocks, 1), 6)
    out = _sealed(content, compression)
    place = some(bw.varint(len(out)) + bw.varint(len(index)), 10)
    footer = (bw.varint(0) + bw.varint(0) + place).ljust(40, b"\0")[:40]
    return out + _sealed(index) + footer + bw.MAGIC.to_bytes(8, "little")


def _sealed(content: bytes, compression: int = 0) -> bytes:
    """A block with its trailer; with the native checksum, the writer's own takes milliseconds."""
    checked = content + bytes([compression])
    return checked + bw.mask(_C.crc32c(checked, 0)).to_bytes(4, "little")


def _seal_again(data: bytearray) -> None:
    """Right checksums for the blocks that the footer and the index block still lead to."""
    body = len(data) - 48
    numbers = _varints(bytes(data[body:-8])) if body > 0 else []
    if len(numbers) < 4 or sum(numbers[2:4]) + 5 > body:
        return
    offset, size = numbers[2:4]
    for start, length in (*_handles(bytes(data[offset : offset + size])), (offset, size)):
        end = start + length
        if end + 5 <= body:
            data[start : end + 5] = _sealed(bytes(data[start:end]), data[end])


def _handles(block: bytes) -> list[tuple[int, int]]:
    """Places of blocks, as far as the entries of an index block can be followed."""
    found: list[tuple[int, int]] = []
    while len(found) < 64:
        lengths = _varints(block)[:3]
        at = sum(len(bw.varint(number)) for number in lengths) + sum(lengths[1:2])
        handle = _varints(block[at : at + sum(lengths[2:])])
        if len(handle) < 2:
            break
        found.append((handle[0], handle[1]))
        block = block[at + lengths[2] :]
    return found


def _varints(data: bytes) -> list[int]:
    """The numbers that `data` starts with, up to four."""
    numbers, value, shift = [], 0, 0
    for byte in data[:40]:
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            numbers.append(value)
            value = shift = 0
    return numbers[:4]


def target() -> Target:
    """What to fuzz."""
    return Target(seeds(), open_release, DICTIONARY, repair_index)


if __name__ == "__main__":
    sys.exit(main(target()))
