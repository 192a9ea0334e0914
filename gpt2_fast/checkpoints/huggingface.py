"""Folders in Hugging Face's layout: `config.json` and one or many safetensors files.

Names are brought to one form: wrappers' prefixes go (`transformer.`, `module.`, `_orig_mod.`), mask
buffers that old versions stored are dropped, a stored output head that equals the token embedding
counts as tied, and rows that pad the vocabulary are left out of sight.

Source of names and orientation: transformers, modeling_gpt2.py (Conv1D weights are [in, out]).
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from typing import TYPE_CHECKING

from gpt2_fast.errors import CheckpointError

from .base import Checkpoint, TensorView, widen
from .folder import CONFIG_NAME, INDEX_NAME, WEIGHTS_NAME, weight_files
from .huggingface_config import read_config
from .safetensors_file import SafetensorsFile
from .strict_json import read_object

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from gpt2_fast.config import GPT2Config

_INDEX_LIMIT = 4 << 20
_MAX_SHARDS = 256
_PREFIXES = ("_orig_mod.", "module.", "transformer.")
# Constant masks of old versions. `attn.c_attn.bias` is a weight and does not match.
_MASK_BUFFER = re.compile(r"h\.[0-9]+\.(attn|crossattention)\.(bias|masked_bias)")
# The two matrices with one row per token; files may hold more rows than the vocabulary has tokens.
_EMBEDDING = "wte.weight"
_HEAD = "lm_head.weight"
_COMPARED_BYTES = 4 << 20


def open_folder(folder: Path, config: GPT2Config | None = None) -> Checkpoint:
    """Open a Hugging Face folder; `config` replaces its `config.json`.

    Raises:
        CheckpointError: a file is missing, malformed or does not fit the configuration.
    """
    if config is None:
        config = read_config(folder / CONFIG_NAME)
    opened: list[SafetensorsFile] = []
    try:
        stored = _read_shards(folder, opened)
        views = _canonical(stored, config, folder)
        config = _settle_head(config, views)
        views = {name: _without_padding(view, config) for name, view in views.items()}
        files = [shard.file for shard in opened]
        return Checkpoint(config, views, folder, "huggingface", files)
    except BaseException:
        for shard in opened:
            shard.file.close()
        raise


def _read_shards(folder: Path, opened: list[SafetensorsFile]) -> dict[str, SafetensorsFile]:
    """Stored tensor name -> the open file that holds it; the files are also added to `opened`."""
    promised: dict[str, str] = {}
    if (folder / WEIGHTS_NAME).exists():
        names = [WEIGHTS_NAME]
    elif (folder / INDEX_NAME).exists():
        promised = _read_index(folder / INDEX_NAME)
        names = sorted(set(promised.values()))
    else:
        names = weight_files(folder)
        if len(names) != 1:
            raise CheckpointError(
                f"{folder}: wanted {WEIGHTS_NAME}, {INDEX_NAME} or a single safetensors file, "
                f"found {len(names)}: {', '.join(names[:4])}"
            )
    if len(names) > _MAX_SHARDS:
        raise CheckpointError(f"{folder}: wanted at most {_MAX_SHARDS} shards, found {len(names)}")
    holders: dict[str, SafetensorsFile] = {}
    for name in names:
        shard = SafetensorsFile(folder / name)
        opened.append(shard)
        for tensor in shard.entries:
            if tensor in holders:
                raise CheckpointError(
                    f"{folder}: tensor {tensor} is in both {holders[tensor].file.path.name} "
                    f"and {name}"
                )
            holders[tensor] = shard
    for tensor, name in promised.items():
        if tensor not in holders or holders[tensor].file.path.name != name:
            raise CheckpointError(
                f"{folder / INDEX_NAME}: tensor {tensor} should be in {name}, but is not"
            )
    return holders


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name -> shard name, each a plain name of an existing file beside the index."""
    table = read_object(path, _INDEX_LIMIT).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise CheckpointError(f"{path}: weight_map: wanted an object of tensor and file names")
    for tensor, name in table.items():
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]{1,200}\.safetensors", name):
            raise CheckpointError(
                f"{path}: weight_map, {tensor[:80]!r}: wanted the plain name of a safetensors "
                f"file in the same folder, found {str(name)[:80]!r}"
            )
    for name in sorted(set(table.values())):
        if not (path.parent / name).exists():
            raise CheckpointError(f"{path}: names the shard {name}, which does not exist")
    return table


def _canonical(
    stored: dict[str, SafetensorsFile], config: GPT2Config, folder: Path
) -> dict[str, TensorView]:
    """Views of the tensors that this model can use, by canonical name; warns about the others."""
    wanted = set(config.tensor_shapes()) | {_HEAD}
    views: dict[str, TensorView] = {}
    unknown: list[str] = []
    for name, shard in stored.items():
        short = _short_name(name)
        if _MASK_BUFFER.fullmatch(short):
            continue
        if short not in wanted:
            unknown.append(name)
            continue
        if short in views:
            raise CheckpointError(
                f"{folder}: {views[short].stored_name} and {name} are the same tensor, {short}"
            )
        entry = shard.entries[name]
        views[short] = TensorView(
            short, entry.dtype, entry.shape, shard.file, entry.begin, stored_name=name
        )
    if unknown:
        _warn_unknown(unknown, folder)
    return views


def _short_name(name: str) -> str:
    while True:
        for prefix in _PREFIXES:
            if name.startswith(prefix):
                name = name[len(prefix) :]
                break
        else:
            return name


def _warn_unknown(names: Iterable[str], folder: Path) -> None:
    ordered = sorted(names)
    shown = ", ".join(ordered[:8]) + (" ..." if len(ordered) > 8 else "")
    warnings.warn(
        f"{folder}: ignoring {len(ordered)} tensors that this GPT-2 has no place for: {shown}",
        stacklevel=2,
    )


def _settle_head(config: GPT2Config, views: dict[str, TensorView]) -> GPT2Config:
    """Decide by what is stored whether the output head is tied; drops a head that equals wte."""
    head, embedding = views.get(_HEAD), views.get(_EMBEDDING)
    if head is not None and embedding is None and config.tie_word_embeddings:
        # Writers that keep one of two names for shared memory may keep the head's.
        views[_EMBEDDING] = views.pop(_HEAD).renamed(_EMBEDDING)
        return config
    if head is None or embedding is None:
        return config  # what is missing is reported with everything else that is
    rows = config.vocab_size
    for view in (embedding, head):
        wanted = [rows, config.n_embd]
        if len(view.shape) != 2 or view.shape[0] < rows or view.shape[1] != config.n_embd:
            raise CheckpointError(
                f"{view.path}: tensor {view.stored_name}: wanted shape {wanted}, "
                f"found {list(view.shape)}"
            )
    tied = _same_rows(head, embedding, rows)
    if tied:
        del views[_HEAD]
    return dataclasses.replace(config, tie_word_embeddings=tied)


def _same_rows(one: TensorView, other: TensorView, rows: int) -> bool:
    step = max(1, _COMPARED_BYTES // (4 * one.shape[1]))
    try:
        for first in range(0, rows, step):
            last = min(rows, first + step)
            left, right = widen(one.rows(first, last)), widen(other.rows(first, last))
            if left.tobytes() != right.tobytes():
                return False
        return True
    finally:
        one.release()
        other.release()


def _without_padding(view: TensorView, config: GPT2Config) -> TensorView:
    """Rows beyond the vocabulary exist to make a size round; no token may ever come from them."""
    if view.name not in (_EMBEDDING, _HEAD) or len(view.shape) != 2:
        return view
    return view.first_rows(config.vocab_size) if view.shape[0] > config.vocab_size else view
