"""OpenAI's release of GPT-2, fetched in the layout it was published in.

    <endpoint>/models/<name>/<file>  ->  <cache>/models/<name>/<file>

`GPT2_FAST_OPENAI_ENDPOINT` names a mirror, `GPT2_FAST_CACHE` the cache folder (else
~/.cache/gpt2_fast), `GPT2_FAST_OFFLINE` or `HF_HUB_OFFLINE` forbid the network. What was downloaded
is checked before it counts: the vocabulary against known SHA-256 sums, the shape against the
published one, the index and every tensor against the CRC-32C the index holds, and each file against
the Content-MD5 that the server sends.

Source: openai/gpt-2, download_model.py.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2_fast.config import PUBLISHED
from gpt2_fast.errors import CheckpointError, DownloadError, ParameterError

from .base import read_bytes
from .http_file import fetch
from .openai_bundle import open_bundle, read_hparams, verify_tensors
from .strict_json import read_object
from .tensor_bundle import MAX_INDEX_BYTES, parse_index

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gpt2_fast.config import GPT2Config

ENDPOINT = "https://openaipublic.blob.core.windows.net/gpt-2"

_DATA = "model.ckpt.data-00000-of-00001"
_INDEX = "model.ckpt.index"

#: The published files, small ones first, and the most bytes each may have (the data file: four for
#: each parameter).
_LIMITS = {
    "encoder.json": 64 << 20,
    "vocab.bpe": 64 << 20,
    "hparams.json": 1 << 20,
    "checkpoint": 1 << 20,
    _INDEX: MAX_INDEX_BYTES,
    "model.ckpt.meta": 256 << 20,
    _DATA: 0,
}

#: The same for all four models. Source: the sums that tiktoken pins for its "gpt2" encoding.
_SHA256 = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}

_STATE = b'model_checkpoint_path: "model.ckpt"'
_COMPLETE = ".complete.json"
_LOCK_POLL_SECONDS = 0.1


def download(name: str, cache_dir: str | Path | None = None) -> Path:
    """The folder of one of OpenAI's models, downloaded unless it is there already.

    Args:
        name: "124M", "355M", "774M" or "1558M".
        cache_dir: used instead of the folder that the environment names.

    Returns:
        A folder for `open_bundle`; every byte in it was checked when it came.

    Raises:
        ParameterError: another name.
        DownloadError: no network, a file is missing or damaged, or the disk is full. What came so
            far stays, and the next call continues there.
    """
    if name not in PUBLISHED:
        raise ParameterError(f"name must be one of {', '.join(PUBLISHED)}, got {name!r}")
    folder = _cache_root(cache_dir) / "models" / name
    if _is_complete(folder):
        return folder
    if _offline():
        raise DownloadError(
            f"{name} is not in {folder}, and GPT2_FAST_OFFLINE or HF_HUB_OFFLINE forbids the "
            "network; unset it, or copy the folder there"
        )
    endpoint = os.environ.get("GPT2_FAST_OPENAI_ENDPOINT", "").strip() or ENDPOINT
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder.parent / f".{name}.lock"):
            if not _is_complete(folder):  # another process may have been here first
                _download(f"{endpoint.rstrip('/')}/models/{name}", folder, PUBLISHED[name])
    except DownloadError:
        raise
    except OSError as error:
        raise DownloadError(f"{folder}: cannot be written: {error}") from error
    return folder


def _download(base: str, folder: Path, config: GPT2Config) -> None:
    data_bytes = 4 * config.parameters
    with _progress(folder.name) as progress:
        for name, limit in _LIMITS.items():
            path = folder / name
            if path.is_file() and not _fault(path, config):
                continue  # from an earlier call that was interrupted
            limit = limit or data_bytes + (1 << 20)  # noqa: PLW2901
            fetch(f"{base}/{name}", path, limit=limit, progress=progress(name))
            fault = _fault(path, config)
            if fault:
                path.unlink()
                raise DownloadError(f"{base}/{name}: damaged or not this model: {fault}; removed")
        _verify(folder, progress("checking"), data_bytes)
    sizes = {name: (folder / name).stat().st_size for name in _LIMITS}
    temporary = folder / f"{_COMPLETE}.part"
    temporary.write_text(json.dumps(sizes), encoding="ascii")
    temporary.replace(folder / _COMPLETE)


def _fault(path: Path, config: GPT2Config) -> str:
    """What is wrong with a small file, or nothing."""
    name = path.name
    try:
        if name in _SHA256:
            found = hashlib.sha256(read_bytes(path, _LIMITS[name])).hexdigest()
            return "" if found == _SHA256[name] else f"SHA-256 is {found}, wanted {_SHA256[name]}"
        if name == "hparams.json":
            found_config = read_hparams(path.parent)
            if found_config != config:
                return (
                    f"wanted the published shape {config.to_dict()}, found {found_config.to_dict()}"
                )
        elif name == "checkpoint":
            if _STATE not in read_bytes(path, _LIMITS[name]):
                return f"wanted a line {_STATE.decode()}"
        elif name == _INDEX:
            parse_index(read_bytes(path, MAX_INDEX_BYTES), str(path))
    except CheckpointError as error:
        return str(error)
    return ""


def _verify(folder: Path, progress: Callable[[int, int | None], None], total: int) -> None:
    """Every tensor; a data file that fails is removed, so that it is fetched again."""
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    try:
        with open_bundle(folder) as checkpoint:
            verify_tensors(checkpoint, progress=advance)
    except CheckpointError as error:
        (folder / _DATA).unlink(missing_ok=True)
        raise DownloadError(
            f"{folder}: damaged on the way: {error}; removed, the next call fetches it again"
        ) from error


def _is_complete(folder: Path) -> bool:
    """Whether an earlier call checked this folder and its files still have their sizes."""
    try:
        sizes = read_object(folder / _COMPLETE, 1 << 16)
        return all((folder / name).stat().st_size == sizes.get(name) for name in _LIMITS)
    except (CheckpointError, OSError):
        return False


def _cache_root(cache_dir: str | Path | None) -> Path:
    chosen = cache_dir or os.environ.get("GPT2_FAST_CACHE", "").strip() or "~/.cache/gpt2_fast"
    try:
        return Path(chosen).expanduser()
    except RuntimeError as error:  # no home folder
        raise DownloadError(f"{chosen}: {error}; set GPT2_FAST_CACHE") from error


def _offline() -> bool:
    names = ("GPT2_FAST_OFFLINE", "HF_HUB_OFFLINE")
    return any(
        os.environ.get(name, "").strip().upper() in {"1", "ON", "YES", "TRUE"} for name in names
    )


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold `path` against other processes; the system lets go of it when a process dies."""
    with path.open("a+b") as stream:
        while not _try_lock(stream.fileno()):
            time.sleep(_LOCK_POLL_SECONDS)
        yield


def _try_lock(descriptor: int) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


@contextlib.contextmanager
def _progress(title: str) -> Iterator[Callable[[str], Callable[[int, int | None], None]]]:
    """Something that makes a bar per file; bars that nobody sees where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield lambda _name: lambda _done, _total: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns: tuple[Any, ...] = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:

        def start(name: str) -> Callable[[int, int | None], None]:
            task = bars.add_task(f"{title} {name}", total=None)
            return lambda done, total: bars.update(task, completed=done, total=total)

        yield start
