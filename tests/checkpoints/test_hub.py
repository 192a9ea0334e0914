"""Names to folders. Downloads run against a Hub of our own, each in a process of its own because
huggingface_hub reads its environment when it is imported."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from gpt2_fast import checkpoints
from gpt2_fast.checkpoints import open_checkpoint
from gpt2_fast.checkpoints.hub import ALIASES, resolve
from gpt2_fast.errors import CheckpointError, ParameterError
from tests.checkpoints_support import BUILTIN, hf_folder, random_state, tiny_config
from tests.hub_server import COMMIT, Hub, serving

if TYPE_CHECKING:
    from collections.abc import Iterator

CONFIG = tiny_config(vocab_size=2000)
STATE = random_state(CONFIG)
ROOT = Path(__file__).parents[2]

RESOLVE = """
import sys
from gpt2_fast.checkpoints.hub import resolve
from gpt2_fast.errors import DownloadError
try:
    print(resolve(sys.argv[1]))
except DownloadError as error:
    sys.exit(f"DownloadError: {error}")
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A Hub with GPT-2 under two names, among files that must not be downloaded."""
    folder = hf_folder(tmp_path / "served", CONFIG, STATE)
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    files |= {"vocab.json": b"{}", "merges.txt": b"#version: 0.2\n"}
    unwanted = {
        "pytorch_model.bin": b"\x80\x04.",
        "tf_model.h5": b"tf",
        "README.md": b"# GPT-2",
        "onnx/decoder.safetensors": b"onnx",
        "onnx/config.json": b"{}",
    }
    repositories = {
        "openai-community/gpt2": files | unwanted,
        "some.body/my-model_2": files,
        "some/pickle": {"config.json": files["config.json"], "pytorch_model.bin": b"\x80\x04."},
    }
    with serving(Hub(repositories)) as server:
        yield server


def fetch(
    name: str, cache: Path, endpoint: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Resolve `name` in a fresh process, with an empty home and nothing else from ours."""
    settings = {
        "PATH": os.environ["PATH"],
        "HOME": str(cache),
        "HF_HOME": str(cache / "hf"),
        "HF_ENDPOINT": endpoint,
        "NO_PROXY": "127.0.0.1",
        "HF_HUB_ETAG_TIMEOUT": "5",
        "HF_HUB_DOWNLOAD_TIMEOUT": "5",
    }
    return subprocess.run(
        [sys.executable, "-c", RESOLVE, name],
        env=settings | environment,
        capture_output=True,
        text=True,
        timeout=90,
        cwd=ROOT,
        check=False,
    )


def closed_port() -> str:
    """An address at which nobody answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def check_fetched(result: subprocess.CompletedProcess[str]) -> Path:
    assert result.returncode == 0, result.stderr
    folder = Path(result.stdout.strip())
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.config == CONFIG
        for name, view in checkpoint.tensors.items():
            np.testing.assert_array_equal(view.array, STATE[name])
    return folder


def check_failed(result: subprocess.CompletedProcess[str], *wanted: str) -> None:
    assert result.returncode == 1, result.stdout + result.stderr
    message = result.stderr[result.stderr.index("DownloadError: ") :]
    assert "Traceback" not in result.stderr
    for text in wanted:
        assert text in message


def test_a_short_name_is_downloaded_once_and_only_what_is_needed(hub: Hub, tmp_path: Path) -> None:
    folder = check_fetched(fetch("gpt2", tmp_path / "cache", hub.url))
    assert folder.name == COMMIT
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) == [
        "config.json",
        "merges.txt",
        "model.safetensors",
        "vocab.json",
    ]
    again = check_fetched(fetch("gpt2", tmp_path / "cache", hub.url))
    assert again == folder
    assert len(hub.downloads("model.safetensors")) == 1


def test_any_owner_and_name(hub: Hub, tmp_path: Path) -> None:
    check_fetched(fetch("some.body/my-model_2", tmp_path / "cache", hub.url))


def test_a_dropped_connection_is_resumed_where_it_broke(hub: Hub, tmp_path: Path) -> None:
    # Padding makes the file larger than the pieces in which the downloader keeps what arrives.
    padded = np.pad(STATE["wte.weight"], ((0, 500_000), (0, 0)))
    folder = hf_folder(tmp_path / "large", CONFIG, STATE | {"wte.weight": padded})
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub.repositories["openai-community/gpt2"] = files
    hub.dropped["model.safetensors"] = 1
    check_fetched(fetch("gpt2", tmp_path / "cache", hub.url))
    first, second = hub.downloads("model.safetensors")
    assert first is None
    assert second is not None
    assert 0 < int(second.removeprefix("bytes=").removesuffix("-")) < 12_500_000


@pytest.mark.parametrize("fault", ["truncated", "dropped"])
def test_a_damaged_download_is_a_typed_error_and_made_good_later(
    fault: str, hub: Hub, tmp_path: Path
) -> None:
    if fault == "truncated":
        hub.truncated.add("model.safetensors")
    else:
        hub.dropped["model.safetensors"] = 1000
    failed = fetch("gpt2", tmp_path / "cache", hub.url)
    check_failed(failed, "openai-community/gpt2", "running it again resumes it", hub.url)
    hub.truncated.clear()
    hub.dropped.clear()
    check_fetched(fetch("gpt2", tmp_path / "cache", hub.url))


def test_a_repository_that_does_not_exist(hub: Hub, tmp_path: Path) -> None:
    failed = fetch("no/such", tmp_path / "cache", hub.url)
    check_failed(failed, "no/such: no such repository at", "check the name")


@pytest.mark.parametrize(
    ("status", "code", "wanted"),
    [
        (403, "GatedRepo", "gated: accept its terms"),
        (401, "GatedRepo", "gated: accept its terms"),
        (401, "RepoNotFound", "no such repository"),
        (500, "", "cannot be reached"),
    ],
    ids=["gated", "gated without login", "private", "server error"],
)
def test_answers_that_refuse(status: int, code: str, wanted: str, hub: Hub, tmp_path: Path) -> None:
    hub.refusals["openai-community/gpt2"] = (status, code)
    check_failed(fetch("gpt2", tmp_path / "cache", hub.url), wanted)


def test_no_network(tmp_path: Path) -> None:
    address = closed_port()
    check_failed(
        fetch("gpt2", tmp_path, address), f"{address} cannot be reached", "model='builtin'"
    )


def test_no_network_but_a_copy_in_the_cache(hub: Hub, tmp_path: Path) -> None:
    folder = check_fetched(fetch("gpt2", tmp_path / "cache", hub.url))
    assert check_fetched(fetch("gpt2", tmp_path / "cache", closed_port())) == folder


def test_offline_mode_uses_the_cache_and_asks_nobody(hub: Hub, tmp_path: Path) -> None:
    empty = fetch("gpt2", tmp_path / "cache", hub.url, HF_HUB_OFFLINE="1")
    check_failed(empty, "not in the cache, and HF_HUB_OFFLINE is set")
    assert not hub.requests
    folder = check_fetched(fetch("gpt2", tmp_path / "cache", hub.url))
    hub.requests.clear()
    assert check_fetched(fetch("gpt2", tmp_path / "cache", hub.url, HF_HUB_OFFLINE="1")) == folder
    assert not hub.requests


def test_a_repository_of_pickles_downloads_none(hub: Hub, tmp_path: Path) -> None:
    failed = fetch("some/pickle", tmp_path / "cache", hub.url)
    check_failed(failed, "some/pickle: the repository has no safetensors files")
    assert not hub.downloads("pytorch_model.bin")


# Names that need no network


def test_builtin_is_the_model_in_the_package() -> None:
    assert resolve("builtin") == BUILTIN.resolve()
    open_checkpoint(resolve("builtin")).close()


def test_an_existing_folder_comes_before_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("gpt2", "124M", "owner/name", "./x"):
        Path(name).mkdir(parents=True)
        assert resolve(name) == Path(name)
        assert resolve(Path(name)) == Path(name)
    assert resolve(str(tmp_path)) == tmp_path


def test_a_file_is_left_to_the_reader_to_explain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model.pt").touch()
    assert resolve("model.pt") == Path("model.pt")


def test_a_stray_file_does_not_hide_a_short_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    downloader = SimpleNamespace(download=lambda name, _cache: tmp_path / name)
    monkeypatch.setitem(sys.modules, "gpt2_fast.checkpoints.openai_download", downloader)
    monkeypatch.setattr(checkpoints, "openai_download", downloader, raising=False)
    monkeypatch.chdir(tmp_path)
    Path("124M").touch()
    assert resolve("124M") == tmp_path / "124M"


def test_the_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/model") == tmp_path / "model"


@pytest.mark.parametrize(
    "name", ["./gpt2", "/gone/gpt2", "../gpt2", "~/gone", "a/b/c", "C:\\models\\gpt2", Path("gone")]
)
def test_a_path_that_does_not_exist(
    name: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no such file or folder"):
        resolve(name)


@pytest.mark.parametrize("name", ["gpt-2", "117M", "x" * 300, "nul\0inside", "a b/c", "owner/"])
def test_a_name_that_nobody_knows(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ParameterError, match="owner/name nor one of builtin, builtin-draft, gpt2,"):
        resolve(name)


def test_a_near_miss_is_suggested() -> None:
    with pytest.raises(ParameterError, match="Did you mean 'distilgpt2'"):
        resolve("distillgpt2")


@pytest.mark.parametrize("name", ["", None, 7, b"gpt2", ["gpt2"]])
def test_something_that_is_no_name(name: Any) -> None:
    with pytest.raises(ParameterError, match="must be a name or a folder"):
        resolve(name)


@pytest.mark.parametrize("name", ["124M", "355M", "774M", "1558M"])
def test_openais_names_go_to_openais_downloader(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, Path | None]] = []

    def download(name: str, cache_dir: Path | None) -> Path:
        seen.append((name, cache_dir))
        return tmp_path

    downloader = SimpleNamespace(download=download)
    monkeypatch.setitem(sys.modules, "gpt2_fast.checkpoints.openai_download", downloader)
    monkeypatch.setattr(checkpoints, "openai_download", downloader, raising=False)
    monkeypatch.chdir(tmp_path)
    assert resolve(name, cache_dir="somewhere") == tmp_path
    assert seen == [(name, Path("somewhere"))]


def test_short_names_mean_the_published_repositories() -> None:
    assert ALIASES == {
        "gpt2": "openai-community/gpt2",
        "gpt2-medium": "openai-community/gpt2-medium",
        "gpt2-large": "openai-community/gpt2-large",
        "gpt2-xl": "openai-community/gpt2-xl",
        "distilgpt2": "distilbert/distilgpt2",
    }


def test_the_hub_library_is_not_imported_before_it_is_needed() -> None:
    code = (
        "import sys, gpt2_fast.checkpoints.hub as hub; hub.resolve('builtin'); "
        "sys.exit('huggingface_hub' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
