"""Small models on disk, made with the safetensors package and not with what is under test."""

from __future__ import annotations

import json
import re
import struct
import time
import tracemalloc
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from gpt2_fast.checkpoints import open_checkpoint
from gpt2_fast.config import GPT2Config
from gpt2_fast.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

BUILTIN = Path(__file__).parent.parent / "gpt2_fast" / "data" / "builtin"


def tiny_config(**changes: Any) -> GPT2Config:
    """A model of a few kilobytes whose sizes all differ."""
    sizes = {"n_layer": 2, "n_embd": 12, "n_head": 3, "n_ctx": 7, "vocab_size": 23}
    return GPT2Config(**{**sizes, "eos_token_id": None, **changes})


def random_state(config: GPT2Config, seed: int = 0) -> dict[str, np.ndarray]:
    """Canonical name -> float32 values, a different one for every element."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal(size=shape).astype(np.float32)
        for name, shape in config.tensor_shapes().items()
    }


def config_json(config: GPT2Config, **changes: Any) -> dict[str, Any]:
    """`config.json` as transformers would write it, spelled out here on purpose."""
    fields = {
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.n_ctx,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": config.n_inner,
        "activation_function": "gelu_new",
        "tie_word_embeddings": config.tie_word_embeddings,
        "eos_token_id": config.eos_token_id,
    }
    return fields | changes


def hf_folder(
    folder: Path,
    config: GPT2Config,
    state: Mapping[str, np.ndarray],
    *,
    prefix: str = "transformer.",
    **changes: Any,
) -> Path:
    """A Hugging Face folder; `lm_head.*` keeps its name, everything else gets `prefix`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_json(config, **changes)))
    named = {
        name if name.startswith("lm_head") else prefix + name: np.asarray(values, order="C")
        for name, values in state.items()
    }
    save_file(named, folder / "model.safetensors", {"format": "pt"})
    return folder


def check_equal(folder: Path, config: GPT2Config, state: Mapping[str, np.ndarray]) -> None:
    """Opening `folder` gives exactly `config` and `state`, without a warning."""
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.config == config
        assert checkpoint.format == "huggingface"
        assert list(checkpoint.tensors) == list(config.tensor_shapes())
        for name, view in checkpoint.tensors.items():
            assert view.name == name
            np.testing.assert_array_equal(view.array, state[name], strict=True)


def raw_safetensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with any header (bytes are taken as they are) and any claimed length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def refused(action: Callable[[], object], match: str, *, memory: int | None = 4 << 20) -> str:
    """Check that `action` raises CheckpointError soon and cheaply; returns the message.

    It must take less than two seconds of processor time, and at most `memory` bytes from Python and
    numpy (None: not measured). Afterwards the process must still be able to open a good model.
    """
    start = time.process_time()
    with pytest.raises(CheckpointError) as caught:
        action()
    elapsed = time.process_time() - start
    message = str(caught.value)
    assert re.search(match, message), message
    assert elapsed < 2, f"{elapsed:.2f} s until: {message}"
    if memory is not None:
        peak = _peak_memory(action)
        assert peak < memory, f"{peak} bytes allocated until: {message}"
    with open_checkpoint(BUILTIN) as good:
        assert good.tensors["ln_f.bias"].float32().shape == (good.config.n_embd,)
    return message


def _peak_memory(action: Callable[[], object]) -> int:
    """Bytes that Python and numpy hold at most while `action` runs into its CheckpointError.

    Tracing makes everything several times slower, so this is not the run that is timed.
    """
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError):
            action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
