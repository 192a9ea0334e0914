"""One small model in OpenAI's layout, and ways to damage it."""

from __future__ import annotations

from pathlib import Path

from gpt2_fast.checkpoints.openai_bundle import open_bundle, verify_tensors
from gpt2_fast.config import GPT2Config

from . import bundle_writer as bw

CONFIG = GPT2Config(n_layer=2, n_embd=8, n_head=2, n_ctx=6, vocab_size=20, eos_token_id=None)
DATA = "model.ckpt.data-00000-of-00001"
INDEX = "model.ckpt.index"
WTE = CONFIG.vocab_size * CONFIG.n_embd * 4


def sound_model(folder: Path) -> Path:
    """Write the model to `folder` and see that it is right."""
    bw.write_release(folder, CONFIG)
    load(folder)
    return folder


def load(folder: Path) -> None:
    """Open the model and compare every checksum."""
    with open_bundle(folder) as checkpoint:
        verify_tensors(checkpoint)


def flip(path: Path, at: int, bits: int = 1) -> None:
    """Change bits of one byte of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= bits
    path.write_bytes(data)


def rebuilt(folder: Path, content: bytes) -> None:
    (folder / INDEX).write_bytes(content)


def entries(**changes: bytes) -> list[tuple[bytes, bytes]]:
    """Header and one tensor, with parts of the header replaced."""
    return [(b"", changes.get("header", bw.header())), (b"model/wte", changes.get("value", b""))]
