"""From a model's name to a folder on this machine, downloading where that is needed.

Downloads from the Hugging Face Hub are huggingface_hub's, with its cache, resume and progress bar,
and obey its environment variables (HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN). It is imported
when a name has to be looked up there, not before.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from gpt2_fast.errors import CheckpointError, DownloadError, ParameterError

#: Short names -> repositories on the Hugging Face Hub.
ALIASES = {
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "distilgpt2": "distilbert/distilgpt2",
}
#: Names of OpenAI's own release, downloaded in its own layout.
OPENAI_NAMES = ("124M", "355M", "774M", "1558M")
#: Models in the wheel, in data/NAME: the one for first steps, and a quarter of it.
BUILTINS = ("builtin", "builtin-draft")

# What a model needs, at the top level of its repository; never a pickle.
_WANTED = ["config.json", "*.safetensors", "*.safetensors.index.json", "vocab.json", "merges.txt"]
_UNWANTED = ["*/*"]
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)


def resolve(
    name_or_path: str | os.PathLike[str], *, cache_dir: str | os.PathLike[str] | None = None
) -> Path:
    """The folder with the model that `name_or_path` means.

    Args:
        name_or_path: "builtin" or "builtin-draft", an existing folder, a short name (`gpt2`,
            `gpt2-medium`, `gpt2-large`, `gpt2-xl`, `distilgpt2`), `owner/name` on the Hugging Face
            Hub, or one of OpenAI's names (`124M`, `355M`, `774M`, `1558M`), in this order.
        cache_dir: where downloads are kept; None is the downloader's own default.

    Raises:
        ParameterError: it is neither a known name nor of the form `owner/name`.
        CheckpointError: it is written like a path, and no such folder exists.
        DownloadError: the model could not be fetched; says why and what can be done.
    """
    given: object = name_or_path
    if not isinstance(given, str | os.PathLike) or not str(given):
        raise ParameterError(f"name_or_path must be a name or a folder, got {given!r}")
    name = str(given)
    if name_or_path in BUILTINS:
        return Path(__file__).resolve().parent.parent / "data" / name
    path = Path(name).expanduser()
    cache = None if cache_dir is None else Path(cache_dir)
    if _exists(path, folder_only=name in ALIASES or name in OPENAI_NAMES):
        return path
    if isinstance(name_or_path, os.PathLike) or _looks_like_path(name):
        raise CheckpointError(f"{path}: no such file or folder")
    if name in OPENAI_NAMES:
        from . import openai_download

        return Path(openai_download.download(name, cache))
    repository = ALIASES.get(name, name)
    if not _REPOSITORY.fullmatch(repository):
        import difflib  # only for a name that is wrong

        known = [*BUILTINS, *ALIASES, *OPENAI_NAMES]
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ParameterError(
            f"name_or_path: no folder {name[:80]!r} exists, and it is neither owner/name nor one "
            f"of {', '.join(known)}.{hint}"
        )
    return _from_hub(repository, cache)


def _exists(path: Path, *, folder_only: bool) -> bool:
    """Whether there is something at `path`; a stray file does not hide a model's short name."""
    try:
        return path.is_dir() or (path.exists() and not folder_only)
    except (OSError, ValueError):  # a name that is too long, or has a NUL in it
        return False


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "~", "/")) or "\\" in name or name.count("/") > 1


def _from_hub(repository: str, cache_dir: Path | None) -> Path:
    import huggingface_hub

    try:
        found = huggingface_hub.snapshot_download(
            repository, cache_dir=cache_dir, allow_patterns=_WANTED, ignore_patterns=_UNWANTED
        )
    except Exception as error:
        raise DownloadError(f"{repository}: {_explain(error)}") from error
    folder = Path(found)
    if not any(folder.glob("*.safetensors")):
        raise DownloadError(
            f"{repository}: the repository has no safetensors files, the only weights that "
            "gpt2_fast downloads. If it holds a pickle (pytorch_model.bin), download and convert "
            "it yourself: opening that folder prints the command."
        )
    return folder


def _explain(error: Exception) -> str:
    """What went wrong and what to do about it, one cause at a time, the likeliest text first."""
    import huggingface_hub
    from huggingface_hub import errors

    host = huggingface_hub.constants.ENDPOINT
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    if isinstance(error, errors.GatedRepoError):
        return f"gated: accept its terms at {host}, then log in (`hf auth login`). {reason}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"no such repository at {host}, or a private one: check the name, or log in "
            f"(`hf auth login`, or HF_TOKEN). {reason}"
        )
    if isinstance(error, errors.LocalEntryNotFoundError):
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            return "not in the cache, and HF_HUB_OFFLINE is set: unset it to download."
        return (
            f"{host} cannot be reached, and the cache has no copy. Check the network, or set "
            f"HF_ENDPOINT to a mirror; model='builtin' works without. {reason}"
        )
    return f"download from {host} failed; running it again resumes it. {reason}"
