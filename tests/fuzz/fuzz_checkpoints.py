"""Fuzzer of Hugging Face folders: safetensors files, one or several, and their JSON files.

python tests/fuzz/fuzz_checkpoints.py --seconds 600
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from gpt2_fast.checkpoints import open_checkpoint
from gpt2_fast.checkpoints.save import save_pretrained
from gpt2_fast.config import GPT2Config
from tests.fuzz.harness import Choices, Files, Target, main


def open_model(folder: Path) -> None:
    """Open a folder and read every tensor; what is accepted must be what the reference accepts."""
    with open_checkpoint(folder) as checkpoint:
        for view in checkpoint.tensors.values():
            if view.float32().shape != checkpoint.config.tensor_shapes()[view.name]:
                raise AssertionError(f"{view.name} has shape {view.shape}")
            view.release()
        for path in {view.path for view in checkpoint.tensors.values()}:
            safetensors.deserialize(path.read_bytes())  # type: ignore[no-untyped-call]


def set_header_length(files: Files, choices: Choices) -> None:
    """Make the header length fit again, three times of four: else little gets past it."""
    for name, data in files.items():
        if name.endswith(".safetensors") and len(data) > 8 and choices.below(4):
            end = data.rfind(b"}}", 0, 8192) + 2
            data[:8] = max(end - 8, 0).to_bytes(8, "little")


def seeds() -> list[dict[str, bytes]]:
    """A tied model, an untied one in half precision, and one in two shards."""
    small: dict[str, Any] = {"n_layer": 1, "n_embd": 4, "n_head": 2, "n_ctx": 3, "vocab_size": 5}
    tied = GPT2Config(**small, eos_token_id=1)
    untied = GPT2Config(**small, eos_token_id=None, tie_word_embeddings=False)
    one = _folder(tied, np.float32)
    return [one, _folder(untied, np.float16), _sharded(one)]


def _folder(config: GPT2Config, kind: type) -> dict[str, bytes]:
    values = np.random.default_rng(0)
    tensors: list[tuple[str, Any]] = [
        (name, values.normal(size=shape).astype(kind))
        for name, shape in config.tensor_shapes().items()
    ]
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(folder, config, tensors)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def _sharded(whole: dict[str, bytes]) -> dict[str, bytes]:
    names = ["a.safetensors", "b.safetensors"]
    parts: list[dict[str, dict[str, object]]] = [{}, {}]
    datas = [bytearray(), bytearray()]
    table = {}
    stored = safetensors.deserialize(whole["model.safetensors"])  # type: ignore[no-untyped-call]
    for index, (name, info) in enumerate(stored):
        data = datas[index % 2]
        begin = len(data)
        data += info["data"]
        fields = {"dtype": info["dtype"], "shape": info["shape"]}
        parts[index % 2][name] = fields | {"data_offsets": [begin, len(data)]}
        table[name] = names[index % 2]
    files = {"config.json": whole["config.json"]}
    files["model.safetensors.index.json"] = json.dumps({"weight_map": table}).encode()
    for name, part, data in zip(names, parts, datas, strict=True):
        header = json.dumps(part).encode()
        files[name] = len(header).to_bytes(8, "little") + header + bytes(data)
    return files


DICTIONARY = [
    *[b'{"', b'"}', b"{}", b"[]", b"null", b"true", b"1e999", b"NaN", b'"', b",", b":", b"\\"],
    *[b'"shape":[', b'"dtype":"', b'"data_offsets":[', b'"__metadata__":{', b"F32", b"BF16"],
    *[b"I64", b"F64", b"transformer.", b"lm_head.weight", b"wte.weight", b"h.0.attn.bias"],
    *[b"\\ud800", b"\\u0000", b"\xef\xbb\xbf", b"\xc0\x80", b"n_layer", b"n_embd", b"vocab_size"],
    *[b"model_type", b"weight_map", b"../a.safetensors", b"b.safetensors", b"null,", b"-0", b"0."],
]


def target() -> Target:
    """What to fuzz."""
    return Target(seeds(), open_model, DICTIONARY, set_header_length)


if __name__ == "__main__":
    sys.exit(main(target()))
