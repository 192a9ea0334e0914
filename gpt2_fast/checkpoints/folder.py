"""What lies in a model's folder, told by the names of its files."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
PREPARED_NAME = "gpt2_fast.safetensors"  # of this package (prepared.py): no parameters by name


def holds_weights(folder: Path) -> bool:
    """Whether `folder` has safetensors files in Hugging Face's layout, sharded or not."""
    return (folder / INDEX_NAME).exists() or bool(weight_files(folder))


def weight_files(folder: Path) -> list[str]:
    """Names of its safetensors files, but for a prepared one."""
    names = (path.name for path in folder.glob("*.safetensors"))
    return sorted(name for name in names if name != PREPARED_NAME)


def holds_bundle(folder: Path) -> bool:
    """Whether `folder` is laid out like OpenAI's release or a gpt-2-simple run."""
    if not folder.is_dir():
        return False
    if any(folder.glob("*.index")) or any(folder.glob("*.data-?????-of-?????")):
        return True
    return (folder / "hparams.json").is_file() and (folder / "checkpoint").is_file()


def holds_prepared(folder: Path) -> bool:
    """Whether `folder` has a prepared file, be it a good one or not."""
    return os.path.lexists(folder / PREPARED_NAME)


def holds_ordinary(folder: Path) -> bool:
    """Whether `folder` has the original weights of a model, in a format that can be opened."""
    return holds_weights(folder) or holds_bundle(folder)
