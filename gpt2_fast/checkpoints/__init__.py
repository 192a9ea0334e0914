"""Model files on disk: which format a folder holds, and how to read it without running it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from gpt2_fast.errors import CheckpointError

from .base import Checkpoint, MappedFile, TensorView, read_bytes
from .folder import INDEX_NAME, PREPARED_NAME, WEIGHTS_NAME, holds_bundle, holds_weights

if TYPE_CHECKING:
    import os

    from gpt2_fast.config import GPT2Config

__all__ = ["Checkpoint", "MappedFile", "TensorView", "open_checkpoint"]

_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
# weights_only=True makes torch rebuild tensors and nothing else; clone() parts tensors that share
# memory, which safetensors refuses to store. Training loops nest the weights under a name.
_CONVERT = (
    "import sys, torch, safetensors.torch as s; w = {}; "
    "[w.update(d.get('model', d.get('state_dict', d))) for d in "
    "(torch.load(f, map_location='cpu', weights_only=True) for f in sys.argv[2:])]; "
    "s.save_file({k: v.clone().contiguous() for k, v in w.items()}, sys.argv[1], {'format': 'pt'})"
)


def open_checkpoint(path: str | os.PathLike[str], config: GPT2Config | None = None) -> Checkpoint:
    """Open the model in a folder; which format it has is told by the files present.

    Args:
        path: a folder in Hugging Face's layout (`config.json`, safetensors) or in OpenAI's
            (`hparams.json`, a TensorFlow checkpoint).
        config: the model's shape, where the folder's own description is missing or wrong.

    Raises:
        CheckpointError: there is no model, it is damaged or does not fit its configuration, or it
            is a pickle, which can run any code: the message has the command that converts it.
    """
    folder = Path(path)
    try:
        return _open(folder, config)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{folder}: cannot be read: {error}") from error


def _open(folder: Path, config: GPT2Config | None) -> Checkpoint:
    names = _names_in(folder)
    if holds_weights(folder):
        from . import huggingface

        return huggingface.open_folder(folder, config)
    if holds_bundle(folder) or {"hparams.json", "checkpoint"} & set(names):
        from . import openai_bundle

        return openai_bundle.open_bundle(folder, config)
    if PREPARED_NAME in names:
        raise CheckpointError(
            f"{folder}: only a prepared model here ({PREPARED_NAME}), which has no "
            "parameters by name: GPT2.from_pretrained loads it as it is"
        )
    pickles = [folder / name for name in names if _is_pickle(folder / name)]
    if pickles:
        raise CheckpointError(_pickle_refusal(pickles))
    raise CheckpointError(
        f"{folder}: no model here: wanted {WEIGHTS_NAME}, {INDEX_NAME} or "
        f"OpenAI's hparams.json; found {', '.join(names[:6]) or 'an empty folder'}"
    )


def _names_in(folder: Path) -> list[str]:
    if folder.is_dir():
        return sorted(path.name for path in folder.iterdir())
    if _is_pickle(folder):
        raise CheckpointError(_pickle_refusal([folder]))
    found = "a file; give the folder it lies in" if folder.exists() else "nothing there"
    raise CheckpointError(f"{folder}: wanted a folder with a model in it, found {found}")


def _is_pickle(path: Path) -> bool:
    """Whether torch would unpickle it: judged by its name, and by its first bytes if readable."""
    if path.suffix.lower() not in _PICKLE_SUFFIXES:
        return False
    try:
        head = read_bytes(path, limit=1 << 62, count=4)
    except CheckpointError:
        return False
    return head.startswith((b"PK\x03\x04", b"\x80"))


def _pickle_refusal(pickles: list[Path]) -> str:
    folder = pickles[0].parent
    arguments = [str(folder / "model.safetensors"), *map(str, pickles)]
    command = shlex.join(["python", "-c", _CONVERT, *arguments])
    return (
        f"{pickles[0]}: a pickle, which can run any code when it is read, so gpt2_fast reads none. "
        f"Convert it without running what is in it (needs torch and safetensors):\n  {command}"
    )
