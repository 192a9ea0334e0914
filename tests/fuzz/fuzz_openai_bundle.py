"""Mutation fuzzer of the reader of OpenAI's layout: `python tests/fuzz/fuzz_openai_bundle.py`.

Takes sound folders, damages files (bits, bytes, cuts, copies, splices of numbers that matter), half
of the time repairs the checksums so that the damage reaches the parsers, and opens the folder. Only
success or CheckpointError may come of it, in a second of processor time and a few megabytes. A
finding is printed with its seed, which alone reproduces it.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import sys
import tempfile
import time
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if __package__ in (None, ""):
    sys.path.insert(0, str(ROOT))

from gpt2_fast.checkpoints.openai_bundle import open_bundle, verify_tensors  # noqa: E402
from gpt2_fast.config import GPT2Config  # noqa: E402
from gpt2_fast.errors import CheckpointError  # noqa: E402
from tests.checkpoints import bundle_writer as bw  # noqa: E402

CONFIG = GPT2Config(n_layer=1, n_embd=4, n_head=2, n_ctx=3, vocab_size=9, eos_token_id=None)
SECONDS_ALLOWED = 1.0
BYTES_ALLOWED = 16 << 20

NUMBERS = [
    bw.varint(value)
    for value in (0, 1, 2, 127, 128, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1)
] + [b"\x80" * 10, b"\xff" * 9 + b"\x7f", b"\0" * 4, b"\xff" * 4, b"\xff" * 8]
WORDS = [
    b'"', b"{", b"}", b"[" * 2000, b":", b",", b"null", b"true", b"1e999", b"-1", b"9" * 400,
    b'"n_layer"', b"\\", b"../", b"/", b"\0", b"\xff\xfe", b"\n", b"model_checkpoint_path",
    b"model/h0/attn/c_attn/w", b"model/h99/ln_1/g", b"/Adam",
]  # fmt: skip


class Finding(Exception):
    """The reader did what it must not."""


def mutate(data: bytes, rng: random.Random) -> bytes:
    """A few random changes."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        at = rng.randrange(len(out) + 1)
        step = rng.randrange(7)
        if step == 0 and out:
            out[at % len(out)] ^= 1 << rng.randrange(8)
        elif step == 1 and out:
            out[at % len(out)] = rng.randrange(256)
        elif step == 2:
            del out[at : at + rng.choice((1, 2, 5, 64, 10**6))]
        elif step == 3:
            piece = out[at : at + rng.choice((1, 5, 48, 300))]
            to = rng.randrange(len(out) + 1)
            out[to:to] = piece * rng.choice((1, 1, 50))
        elif step in (4, 5):
            piece = rng.choice(NUMBERS)
            out[at : at + rng.choice((0, 1, len(piece)))] = piece
        else:
            out[at:at] = rng.choice(WORDS)
    return bytes(out[: 4 << 20])


def mutate_table(rng: random.Random) -> bytes:
    """An index with right checksums around damaged contents."""

    def some(data: bytes, odds: float) -> bytes:
        return mutate(data, rng) if rng.random() < odds else data

    pairs = [(b"", some(bw.header(), 0.2))]
    at = 0
    tensors = bw.openai_tensors(CONFIG)
    for name in sorted(tensors):
        value = tensors[name]
        entry = bw.entry(1, value.shape, at, value.nbytes, bw.crc32c(value.tobytes()))
        pairs.append((some(name.encode(), 0.03), some(entry, 0.05)))
        at += value.nbytes
    content = some(bw.block(pairs, rng.choice((1, 2, 16))), 0.5)
    out = bw.sealed(content, rng.choice((0,) * 20 + (1, 2)))
    handle = some(bw.varint(0) + bw.varint(len(content)), 0.2)
    index = some(bw.block([(b"z", handle)] * rng.choice((1, 1, 1, 2, 300)), 1), 0.2)
    place = some(bw.varint(len(out)) + bw.varint(len(index)), 0.1)
    footer = (bw.varint(0) + bw.varint(0) + place).ljust(40, b"\0")[:40]
    return out + bw.sealed(index) + footer + bw.MAGIC.to_bytes(8, "little")


def one_case(folder: Path, sound: dict[str, bytes], seed: int) -> bool:
    """Damage, open, judge; whether the folder was still readable.

    Raises:
        Finding: another error, too slow, or too much memory.
    """
    rng = random.Random(seed)
    files = dict(sound)
    if rng.random() < 0.5:
        files["model.ckpt.index"] = mutate_table(rng)
    for name in rng.sample(sorted(files), rng.choice((0, 1, 1, 2))):
        files[name] = mutate(files[name], rng)
    if files == sound:
        files["model.ckpt.index"] = mutate(sound["model.ckpt.index"], rng)
    for name, content in files.items():
        if (folder / name).read_bytes() != content:
            (folder / name).write_bytes(content)
    watch = seed % 8 == 0  # tracing is slow
    if watch:
        tracemalloc.start()
    began = time.process_time()
    try:
        with open_bundle(folder) as checkpoint:
            verify_tensors(checkpoint, threads=1)
            for view in checkpoint.tensors.values():
                view.float32()
        readable = True
    except CheckpointError:
        readable = False
    except Exception as error:
        raise Finding(f"seed {seed}: {type(error).__name__}: {error}") from error
    finally:
        took = time.process_time() - began
        peak = tracemalloc.get_traced_memory()[1] if watch else 0
        tracemalloc.stop()
    if took > SECONDS_ALLOWED and not watch:
        raise Finding(f"seed {seed}: took {took:.2f} s")
    if peak > BYTES_ALLOWED:
        raise Finding(f"seed {seed}: {peak} bytes of memory")
    return readable


def in_memory() -> str | None:
    """A folder that no disk is behind, where there is one: fifty times as many cases."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def fuzz(seconds: float, first_seed: int, tell: Callable[[str], None]) -> tuple[int, int]:
    """Run until the time is over; returns (cases, of them readable)."""
    cases = readable = 0
    ends = time.monotonic() + seconds
    with tempfile.TemporaryDirectory(dir=in_memory()) as name, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        folder = Path(name)
        bw.write_release(folder, CONFIG)
        (folder / "encoder.json").write_text('{"<|endoftext|>": 8, "a": 0}')
        sound = {path.name: path.read_bytes() for path in folder.iterdir()}
        while time.monotonic() < ends:
            readable += one_case(folder, sound, first_seed + cases)
            cases += 1
            if cases % 5000 == 0:
                tell(f"{cases} cases, {readable} readable")
    return cases, readable


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    try:
        cases, readable = fuzz(
            arguments.seconds, arguments.seed, lambda line: print(line, flush=True)
        )
    except Finding as finding:
        print(f"FOUND {finding}")
        return 1
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"no finding in {cases} cases, {readable} of them readable; peak RSS {peak} KB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
