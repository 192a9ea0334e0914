"""`gpt2-fast quantize`: a model written as the CPU engine holds it, so that loading is reading."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from . import terminal
from .checkpoints import open_checkpoint
from .checkpoints.folder import PREPARED_NAME, holds_ordinary, holds_prepared
from .checkpoints.hub import resolve
from .checkpoints.prepared import PreparedFile
from .errors import ParameterError
from .model import GPT2


def quantize(
    name: str, folder: Path, *, precision: str, threads: int | None, force: bool
) -> dict[str, Any]:
    """Prepare a model.

    Args:
        name: as in `GPT2.from_pretrained`.
        folder: where to write; made if it does not exist.
        precision: one of the CPU's.
        threads: as in `GPT2.from_pretrained`.
        force: replace a prepared file that is in `folder`.

    Returns:
        model, file, precision, bytes_before (the weights as stored), bytes_after, seconds.

    Raises:
        ParameterError: a value is out of its range, or `folder` has a prepared file already.
        Gpt2FastError: as `GPT2.from_pretrained` and `GPT2.save_prepared`.
    """
    target = folder / PREPARED_NAME
    if holds_prepared(folder) and not force:
        raise ParameterError(f"out: {target} exists; --force replaces it")
    start = time.perf_counter()
    source = resolve(name)
    with GPT2.from_pretrained(
        name, device="cpu", precision=precision, threads=threads, max_batch=1
    ) as model:
        before = _stored_bytes(source)
        model.save_prepared(folder)
        after = model.plan().weights
    return {
        "model": name,
        "file": str(target),
        "precision": precision,
        "bytes_before": before,
        "bytes_after": after,
        "seconds": time.perf_counter() - start,
    }


def summary(facts: dict[str, Any]) -> str:
    """The facts of `quantize` in a line."""
    before, after = terminal.size(facts["bytes_before"]), terminal.size(facts["bytes_after"])
    return (
        f"{facts['file']}: {facts['precision']}, {after} of weights, {before} before, "
        f"{facts['seconds']:.1f} s"
    )


def _stored_bytes(folder: Path) -> int:
    """Bytes of the weights in the files that a model was loaded from."""
    if not holds_ordinary(folder):
        file = PreparedFile(folder)
        file.close()
        return file.nbytes
    with open_checkpoint(folder) as checkpoint:
        return sum(view.nbytes for view in checkpoint.tensors.values())
