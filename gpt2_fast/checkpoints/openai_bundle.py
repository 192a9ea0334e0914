"""OpenAI's own model files, and what gpt-2-simple writes in the same layout; no TensorFlow.

    models/774M/      checkpoint  hparams.json  encoder.json  vocab.bpe
                      model.ckpt.index  model.ckpt.data-00000-of-00001  (model.ckpt.meta: not read)
    checkpoint/run1/  the same, with model-1000.index and so on; `checkpoint` says which

`hparams.json` gives the shape, the index says where each tensor lies (tensor_bundle.py), the data
file is raw little-endian values. A tensor is a view of the mapped data file; its checksum is
compared when it is first read. TensorFlow's `w` is [1, in, out], the [in, out] of the rest of this
package with a dimension of one before it, so no tensor is ever moved.

Source: openai/gpt-2, download_model.py and src/model.py; minimaxir/gpt-2-simple; TensorFlow,
tensorflow/core/util/tensor_bundle and python/training/checkpoint_state.proto.
"""

from __future__ import annotations

import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from gpt2_fast import _C
from gpt2_fast.config import GPT2Config
from gpt2_fast.errors import CheckpointError, ParameterError

from .base import Checkpoint, MappedFile, TensorView, read_bytes
from .strict_json import read_object
from .tensor_bundle import DTYPES, MAX_INDEX_BYTES, BundleEntry, BundleIndex, parse_index

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import numpy.typing as npt

_HPARAMS = {
    "n_vocab": "vocab_size",
    "n_ctx": "n_ctx",
    "n_embd": "n_embd",
    "n_head": "n_head",
    "n_layer": "n_layer",
}
_HPARAMS_BYTES = 1 << 20
_STATE_BYTES = 1 << 20
_VOCABULARY_BYTES = 64 << 20
_RELEASE_VOCABULARY = 50257

_STATE_PATH = re.compile(r'^\s*model_checkpoint_path\s*:\s*"([^"]*)"\s*$', re.MULTILINE)
_LAYER = re.compile(r"model/h(\d{1,9})/")
_TRAINING = re.compile(
    r"^(global_step|beta[12]_power(_\d+)?"
    r"|.*/(Adam|RMSProp|Momentum|Adagrad|Adadelta|Ftrl|ExponentialMovingAverage)(_\d+)?)$"
)

_STORED_TYPES = {"DT_FLOAT": "F32", "DT_DOUBLE": "F64", "DT_HALF": "F16", "DT_BFLOAT16": "BF16"}


class BundleTensorView(TensorView):
    """A tensor of a bundle; the first use of its values compares their CRC-32C with the index."""

    def __init__(
        self,
        name: str,
        stored_name: str,
        shape: tuple[int, ...],
        entry: BundleEntry,
        source: MappedFile,
    ) -> None:
        stored_type = _STORED_TYPES.get(entry.dtype_name, entry.dtype_name)
        super().__init__(name, stored_type, shape, source, entry.offset, stored_name=stored_name)
        self._entry = entry
        self._verified = False

    def verify(self) -> None:
        """Compare the checksum now, unless it was compared before.

        Raises:
            CheckpointError: the bytes are not those that were written.
        """
        if self._verified:
            return
        raw = self._source.array(np.dtype(np.uint8), self._entry.offset, self._entry.size)
        found = _C.crc32c(raw, 0)
        if found != self._entry.crc32c:
            raise CheckpointError(
                f"{self.path}: tensor {self.stored_name}: crc32c is {found:#010x}, the index says "
                f"{self._entry.crc32c:#010x}; the file is damaged or belongs to another index"
            )
        self._verified = True

    def first_rows(self, rows: int) -> TensorView:
        """The same tensor with only its first `rows` rows; the checksum of all rows is compared."""
        self.verify()
        return super().first_rows(rows)

    def _read(self, first: int, count: int) -> npt.NDArray[Any]:
        self.verify()
        return super()._read(first, count)


def open_bundle(folder: Path, config: GPT2Config | None = None) -> Checkpoint:
    """Open the checkpoint that `folder` holds.

    Args:
        folder: see the head of this file.
        config: used instead of the folder's `hparams.json`.

    Raises:
        CheckpointError: a file is missing, malformed, truncated or unsafe, or the tensors are not
            those of `hparams.json`. Checksums of tensors are compared when they are read.
    """
    if config is None:
        config = read_hparams(folder)
    prefix = _bundle_prefix(folder)
    index_path = folder / f"{prefix}.index"
    index = parse_index(read_bytes(index_path, MAX_INDEX_BYTES), str(index_path))
    files: list[MappedFile] = []
    try:
        for shard in range(index.shards):
            name = f"{prefix}.data-{shard:05d}-of-{index.shards:05d}"
            files.append(MappedFile(folder / name))
        _check_extents(index, files, index_path)
        tensors = _views(index, config, files, index_path)
    except BaseException:
        for file in files:
            file.close()
        raise
    return Checkpoint(config, tensors, folder, "openai", files)


def verify_tensors(
    checkpoint: Checkpoint, *, threads: int = 2, progress: Callable[[int], None] | None = None
) -> None:
    """Compare the checksum of every tensor of a checkpoint opened here.

    Args:
        checkpoint: from `open_bundle`.
        threads: tensors read at the same time.
        progress: called in the calling thread with the bytes of each tensor that was compared.

    Raises:
        CheckpointError: a tensor is damaged; the message names it.
    """

    def check(view: TensorView) -> int:
        if isinstance(view, BundleTensorView):
            view.verify()
            view.release()
        return view.nbytes

    with ThreadPoolExecutor(max(1, threads)) as pool:
        for count in pool.map(check, checkpoint.tensors.values()):
            if progress is not None:
                progress(count)


def read_hparams(folder: Path) -> GPT2Config:
    """The shape in `folder`/hparams.json.

    Raises:
        CheckpointError: the file is missing or malformed, or a field is absent or out of range.
    """
    path = folder / "hparams.json"
    fields = read_object(path, _HPARAMS_BYTES)
    missing = [name for name in _HPARAMS if name not in fields]
    if missing:
        raise CheckpointError(f"{path}: fields are missing: {', '.join(missing)}")
    shape = {ours: fields[theirs] for theirs, ours in _HPARAMS.items()}
    try:
        # The end of text is known only once vocab_size has been found to be a number.
        config = GPT2Config(**shape, eos_token_id=None)
    except ParameterError as error:
        raise CheckpointError(f"{path}: {error} (n_vocab is vocab_size here)") from error
    return GPT2Config(**shape, eos_token_id=_end_of_text(folder, config.vocab_size))


def _end_of_text(folder: Path, vocab_size: int) -> int | None:
    """50256 for the released vocabulary, else what encoder.json says, else None."""
    if vocab_size == _RELEASE_VOCABULARY:
        return _RELEASE_VOCABULARY - 1
    path = folder / "encoder.json"
    if not path.is_file():
        return None
    token = read_object(path, _VOCABULARY_BYTES).get("<|endoftext|>")
    if token is None:
        return None
    if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
        raise CheckpointError(
            f"{path}: <|endoftext|> must be an integer in 0..{vocab_size - 1}, got {token!r}"
        )
    return token


def _bundle_prefix(folder: Path) -> str:
    """The part of the file names before `.index`: what `checkpoint` says, else the only one."""
    found = sorted(path.name.removesuffix(".index") for path in folder.glob("*.index"))
    state = folder / "checkpoint"
    if not state.exists() and not state.is_symlink():
        if len(found) == 1:
            return found[0]
        raise CheckpointError(
            f"{folder}: wanted a file `checkpoint`, or exactly one *.index file, found "
            f"{len(found)} (a TensorFlow checkpoint is *.index and *.data-00000-of-00001)"
        )
    try:
        text = read_bytes(state, _STATE_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{state}: not UTF-8: {error}") from error
    match = _STATE_PATH.search(text)
    if match is None:
        raise CheckpointError(f'{state}: wanted a line model_checkpoint_path: "...", found none')
    prefix = match.group(1)
    if not prefix.isprintable() or prefix in ("", ".", "..") or set(prefix) & set('/\\:"'):
        raise CheckpointError(
            f"{state}: model_checkpoint_path must be the name of files in this folder, such as "
            f"model-1000, got {prefix[:200]!r}; put the name there without its folder"
        )
    if prefix not in found:
        raise CheckpointError(
            f"{folder / (prefix + '.index')}: missing, though `checkpoint` names it; this folder "
            f"has {', '.join(found[:4]) or 'no *.index file'}"
        )
    return prefix


def _check_extents(index: BundleIndex, files: list[MappedFile], index_path: Path) -> None:
    """Every tensor lies inside its data file, and no two share a byte."""
    placed = sorted(
        (entry.shard, entry.offset, entry.size, name)
        for name, entry in index.entries.items()
        if not entry.partitioned
    )
    last_shard, end, last_name = -1, 0, ""
    for shard, offset, size, name in placed:
        if offset + size > files[shard].size:
            raise CheckpointError(
                f"{files[shard].path}: {files[shard].size} bytes, but the index places tensor "
                f"{name} at {offset}..{offset + size}; the file is cut off or belongs to "
                "another index"
            )
        if shard == last_shard and offset < end and size:
            raise CheckpointError(f"{index_path}: tensors {last_name} and {name} overlap")
        if size:
            last_shard, end, last_name = shard, offset + size, name


def _stored_names(config: GPT2Config) -> dict[str, str]:
    """Canonical name -> name in the bundle, e.g. h.0.ln_1.weight -> model/h0/ln_1/g."""
    names = {}
    for name in config.tensor_shapes():
        *parts, kind = name.split(".")
        if parts[0] == "h":
            parts[:2] = [f"h{parts[1]}"]
        if parts[0] in ("wte", "wpe"):
            leaf = []
        elif parts[-1].startswith("ln_"):
            leaf = ["g" if kind == "weight" else "b"]
        else:
            leaf = ["w" if kind == "weight" else "b"]
        names[name] = "/".join(["model", *parts, *leaf])
    return names


def _views(
    index: BundleIndex, config: GPT2Config, files: list[MappedFile], index_path: Path
) -> dict[str, TensorView]:
    """The tensors that `config` names; what only training needs is left out."""
    stored_names = _stored_names(config)
    _check_extra(index, set(stored_names.values()), config, index_path)
    tensors: dict[str, TensorView] = {}
    for name, stored_name in stored_names.items():
        entry = index.entries.get(stored_name)
        if entry is None:
            continue  # Checkpoint lists all that are missing
        if entry.partitioned:
            raise CheckpointError(
                f"{index_path}: tensor {stored_name} is stored in slices; only whole ones are read"
            )
        shape = entry.shape
        if stored_name.endswith("/w") and len(shape) == 3 and shape[0] == 1:
            shape = shape[1:]
        if entry.dtype not in DTYPES:
            raise CheckpointError(
                f"{index_path}: tensor {stored_name}: wanted numbers, found {entry.dtype_name}"
            )
        tensors[name] = BundleTensorView(name, stored_name, shape, entry, files[entry.shard])
    return tensors


def _check_extra(
    index: BundleIndex, wanted: set[str], config: GPT2Config, index_path: Path
) -> None:
    """Refuse layers beyond the configuration; warn of names that neither GPT-2 nor Adam uses."""
    unknown = []
    for name in index.entries:
        if name in wanted or _TRAINING.match(name):
            continue
        layer = _LAYER.match(name)
        if layer is not None and int(layer.group(1)) >= config.n_layer:
            raise CheckpointError(
                f"{index_path}: holds tensor {name}, but n_layer is {config.n_layer}"
            )
        unknown.append(name)
    if unknown:
        shown = ", ".join(unknown[:4]) + (" ..." if len(unknown) > 4 else "")
        warnings.warn(
            f"{index_path}: {len(unknown)} tensors that GPT-2 does not have are ignored: {shown}",
            stacklevel=4,
        )
