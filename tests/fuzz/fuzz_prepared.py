"""Fuzzer of prepared folders: `gpt2_fast.safetensors` and the `config.json` beside it.

python tests/fuzz/fuzz_prepared.py --seconds 600
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from gpt2_fast import _C
from gpt2_fast.checkpoints.prepared import PRECISIONS, PreparedFile, save_prepared
from gpt2_fast.config import GPT2Config
from gpt2_fast.sources import RandomSource
from tests.fuzz.harness import Choices, Files, Target, main

CONFIG = GPT2Config(n_layer=1, n_embd=8, n_head=2, n_ctx=3, vocab_size=5, eos_token_id=1)
NAME = "gpt2_fast.safetensors"
MOST_WEIGHTS = 1 << 20  # of the shapes that damage makes, those that are worth loading


def open_model(folder: Path) -> None:
    """Open and load a folder; the engine must then hold what the file does."""
    file = PreparedFile(folder)
    try:
        if file.nbytes > MOST_WEIGHTS:
            return
        engine = _C.Engine(file.config.to_dict(), file.precision, "scalar", 1, 1)
        file.load_into(engine)
        if not (folder / NAME).read_bytes().endswith(engine.packed().tobytes()):
            raise AssertionError("other bytes were loaded than the file holds")
    finally:
        file.close()


def mend(files: Files, choices: Choices) -> None:
    """Make the header length fit again, three times of four: else little gets past it."""
    data = files.get(NAME)
    if data is not None and len(data) > 8 and choices.below(4):
        end = data.rfind(b"}}", 0, 8192) + 2
        data[:8] = max(end - 8, 0).to_bytes(8, "little")


def seeds() -> list[dict[str, bytes]]:
    """The same small model in every precision."""
    return [_folder(precision) for precision in PRECISIONS]


def _folder(precision: str) -> dict[str, bytes]:
    engine = _C.Engine(CONFIG.to_dict(), precision, "scalar", 1, 1)
    for name, dtype, array, _ in RandomSource(CONFIG, 0).tensors():
        engine.load(name, array, dtype)
    with tempfile.TemporaryDirectory() as folder:
        save_prepared(Path(folder), CONFIG, precision, engine.packed(), None)
        files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    # Without the spaces that align the data, so that a header whose length was mended ends there.
    length = int.from_bytes(files[NAME][:8], "little")
    header, data = files[NAME][8 : 8 + length].rstrip(b" "), files[NAME][8 + length :]
    files[NAME] = len(header).to_bytes(8, "little") + header + data
    return files


DICTIONARY = [
    *[b'{"', b'"}', b"{}", b"[]", b"null", b"true", b"1e999", b"NaN", b'"', b",", b":", b"\\"],
    *[b'"format":"', b'"layout":"cpu-', b'"precision":"', b"fp32", b"bf16", b"int8", b"int4"],
    *[b'"piece":"', b'"crc32c":"', b"00000000 ", b"1048576", b"4096", b'"weights":{', b'"U8"'],
    *[b'\\"n_layer\\": ', b'\\"n_embd\\": ', b'\\"n_inner\\": null', b"\\ud800", b"\\u0000"],
    *[json.dumps(name).encode() for name in CONFIG.to_dict()],
]


def target() -> Target:
    """What to fuzz."""
    return Target(seeds(), open_model, DICTIONARY, mend)


if __name__ == "__main__":
    sys.exit(main(target()))
