"""Downloads of OpenAI's release, from a server on this machine that has the published layout."""

from __future__ import annotations

import errno
import hashlib
import http.client
import http.server
import io
import json
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpt2_fast.checkpoints import http_file, openai_download
from gpt2_fast.checkpoints.openai_bundle import open_bundle, verify_tensors
from gpt2_fast.checkpoints.openai_download import download
from gpt2_fast.config import GPT2Config
from gpt2_fast.errors import DownloadError, ParameterError

from . import bundle_writer as bw
from .release_server import DATA, FILES, Handler, Server, start_download

CONFIG = GPT2Config(n_layer=2, n_embd=16, n_head=2, n_ctx=8, vocab_size=40, eos_token_id=None)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A small model at .../models/124M/, with sums and shape to match."""
    root = tmp_path / "server"
    folder = root / "models" / "124M"
    bw.write_release(folder, CONFIG)
    (folder / "model.ckpt.meta").write_bytes(b"graph")
    (folder / "encoder.json").write_text('{"a": 0}')
    (folder / "vocab.bpe").write_text("#version: 0.2\n")
    sums = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in ("encoder.json", "vocab.bpe")
    }
    plan = Server(root)
    handler = type("Bound", (Handler,), {"plan": plan})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as daemon:
        thread = threading.Thread(target=daemon.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        plan.url = f"http://127.0.0.1:{daemon.server_address[1]}"
        monkeypatch.setenv("GPT2_FAST_OPENAI_ENDPOINT", plan.url + "/")
        monkeypatch.setenv("GPT2_FAST_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        for name in ("GPT2_FAST_OFFLINE", "HF_HUB_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(openai_download, "_SHA256", sums)
        monkeypatch.setattr(openai_download, "PUBLISHED", {"124M": CONFIG})
        monkeypatch.setattr(http_file, "BACKOFF_SECONDS", 0.001)
        yield plan
        daemon.shutdown()
        thread.join()


@pytest.fixture
def remote(server: Server) -> Path:
    """The folder that the server serves."""
    return server.root / "models" / "124M"


@pytest.fixture
def cached(tmp_path: Path) -> Path:
    """Where the model will be."""
    return tmp_path / "cache" / "models" / "124M"


def check_whole(folder: Path, remote: Path) -> None:
    assert {path.name for path in folder.iterdir()} == FILES | {".complete.json"}
    for name in FILES:
        assert (folder / name).read_bytes() == (remote / name).read_bytes(), name
    with open_bundle(folder) as checkpoint:
        verify_tensors(checkpoint)


def test_downloads_the_seven_files(server: Server, remote: Path, cached: Path) -> None:
    assert download("124M") == cached
    check_whole(cached, remote)
    assert {name for name, _ in server.requests} == FILES


def test_a_second_call_asks_nothing(server: Server, remote: Path, cached: Path) -> None:
    download("124M")
    server.requests.clear()
    assert download("124M") == cached
    assert server.requests == []


def test_the_cache_can_be_chosen(server: Server, remote: Path, tmp_path: Path) -> None:
    folder = download("124M", tmp_path / "сюда сюда")
    assert folder == tmp_path / "сюда сюда" / "models" / "124M"
    check_whole(folder, remote)


def test_a_file_changed_in_the_cache_is_fetched_again(
    server: Server, remote: Path, cached: Path
) -> None:
    download("124M")
    server.requests.clear()
    (cached / "vocab.bpe").write_text("shortened")
    download("124M")
    check_whole(cached, remote)
    assert [name for name, _ in server.requests] == ["vocab.bpe"]


@pytest.mark.parametrize("name", ["gpt2", "117M", "", "../124M", "124m"])
def test_other_names(server: Server, name: str) -> None:
    with pytest.raises(ParameterError, match="name must be one of 124M"):
        download(name)
    assert server.requests == []


# --- Connections that break -----------------------------------------------------------------------


def test_a_dropped_connection_continues_where_it_broke(
    server: Server, remote: Path, cached: Path
) -> None:
    server.drop_after = [5000, 3000, 100]
    download("124M")
    check_whole(cached, remote)
    assert server.asked(DATA) == [None, "bytes=5000-", "bytes=8000-", "bytes=8100-"]


def test_attempts_that_bring_something_are_not_counted(
    server: Server, remote: Path, cached: Path
) -> None:
    server.drop_after = [100] * (3 * http_file.ATTEMPTS)
    download("124M")
    check_whole(cached, remote)


def test_a_connection_closed_without_an_answer(server: Server, remote: Path, cached: Path) -> None:
    server.drop_after = [-1, 500, -1]
    download("124M")
    check_whole(cached, remote)


def test_a_server_without_ranges_starts_again(server: Server, remote: Path, cached: Path) -> None:
    server.ranges = False
    server.drop_after = [5000]
    download("124M")
    check_whole(cached, remote)


def test_a_server_without_etags_starts_again(server: Server, remote: Path, cached: Path) -> None:
    server.etag = False
    server.drop_after = [5000]
    download("124M")
    check_whole(cached, remote)
    assert server.asked(DATA) == [None, None]


def test_a_file_that_is_cut_off_every_time(server: Server, cached: Path) -> None:
    server.ranges = False
    server.drop_after = [5000] * 50
    with pytest.raises(DownloadError, match=rf"{DATA}: gave up after 5 attempts .*with 5000 bytes"):
        download("124M")
    assert not (cached / DATA).exists()
    assert not (cached / ".complete.json").exists()


def test_the_next_call_continues(server: Server, remote: Path, cached: Path) -> None:
    server.drop_after = [5000, *[0] * 4]
    with pytest.raises(DownloadError, match="gave up"):
        download("124M")
    server.requests.clear()
    download("124M")
    check_whole(cached, remote)
    assert server.requests == [(DATA, "bytes=5000-")]


@pytest.mark.parametrize("if_range", [True, False])
def test_another_version_on_the_server_is_not_appended(
    server: Server, remote: Path, cached: Path, if_range: bool
) -> None:
    server.if_range = if_range
    server.drop_after = [5000, *[0] * 4]
    with pytest.raises(DownloadError):
        download("124M")
    bw.write_release(remote, CONFIG, tensors=bw.openai_tensors(CONFIG, seed=3))
    (cached / "model.ckpt.index").unlink()
    download("124M")
    check_whole(cached, remote)


def test_a_part_that_is_whole_already(server: Server, remote: Path, cached: Path) -> None:
    """Stopped between the last byte and the renaming."""
    server.drop_after = [5000, *[0] * 4]
    with pytest.raises(DownloadError):
        download("124M")
    (cached / f"{DATA}.part").write_bytes((remote / DATA).read_bytes())
    server.requests.clear()
    download("124M")
    check_whole(cached, remote)
    assert len(server.requests) == 1


def test_a_part_that_is_too_long(server: Server, remote: Path, cached: Path) -> None:
    server.drop_after = [5000, *[0] * 4]
    with pytest.raises(DownloadError):
        download("124M")
    (cached / f"{DATA}.part").write_bytes(bytes(10**6))
    download("124M")
    check_whole(cached, remote)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(
    server: Server, remote: Path, cached: Path, status: int
) -> None:
    server.statuses = [status] * 3
    server.headers = {"Retry-After": "0"}
    download("124M")
    check_whole(cached, remote)
    assert len(server.asked(DATA)) == 4


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_is_final(server: Server, status: int) -> None:
    server.statuses = [status]
    with pytest.raises(DownloadError, match=f"{DATA}: refused: HTTP {status}"):
        download("124M")
    assert len(server.asked(DATA)) == 1


@pytest.mark.parametrize("name", sorted(FILES))
def test_no_such_file(server: Server, remote: Path, name: str) -> None:
    (remote / name).unlink()
    with pytest.raises(DownloadError, match=f"{re.escape(name)}: no such file: HTTP 404"):
        download("124M")
    assert len(server.asked(name)) == 1


def test_nobody_listens(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: refused
        port = taken.getsockname()[1]
        monkeypatch.setenv("GPT2_FAST_OPENAI_ENDPOINT", f"http://127.0.0.1:{port}")
        began = time.perf_counter()
        with pytest.raises(DownloadError, match=rf"127\.0\.0\.1:{port}/.*cannot be reached"):
            download("124M")
        assert time.perf_counter() - began < 2


def test_no_such_host(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_args: object, **_keywords: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setenv("GPT2_FAST_OPENAI_ENDPOINT", "http://mirror.invalid")
    with pytest.raises(DownloadError, match=r"cannot be reached: .*not known"):
        download("124M")


def test_a_server_that_never_answers(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_file, "_TIMEOUT_SECONDS", 0.1)
    server.delay = 0.4
    with pytest.raises(DownloadError, match=r"cannot be reached: .*timed out"):
        download("124M")


@pytest.mark.parametrize("endpoint", ["file:///etc", "ftp://127.0.0.1", "mirror", "http://"])
def test_endpoints_that_are_none(
    server: Server, monkeypatch: pytest.MonkeyPatch, endpoint: str
) -> None:
    monkeypatch.setenv("GPT2_FAST_OPENAI_ENDPOINT", endpoint)
    with pytest.raises(DownloadError, match=r"wanted an http|cannot be reached"):
        download("124M")


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/x"])
def test_redirects_to_other_schemes(server: Server, target: str) -> None:
    server.statuses = [302]
    server.headers = {"Location": target}
    with pytest.raises(DownloadError, match=r"refused.*[Rr]edirect"):
        download("124M")


def test_redirects_from_https_to_http() -> None:
    request = urllib.request.Request("https://a.invalid/x")
    handler = http_file._SameSchemeRedirects()
    headers = http.client.HTTPMessage()
    with pytest.raises(DownloadError, match="refused a redirect to http:"):
        handler.redirect_request(request, io.BytesIO(), 302, "", headers, "http://a.invalid/x")
    kept = handler.redirect_request(request, io.BytesIO(), 302, "", headers, "https://b.invalid/x")
    assert kept is not None
    assert kept.full_url == "https://b.invalid/x"


def test_redirects_within_http(server: Server, remote: Path, cached: Path) -> None:
    server.statuses = [302]
    server.headers = {"Location": f"{server.url}/models/124M/{DATA}"}
    download("124M")
    check_whole(cached, remote)


def test_offline(
    server: Server, remote: Path, cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GPT2_FAST_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "1")
        with pytest.raises(DownloadError, match="forbids the network"):
            download("124M")
        monkeypatch.delenv(name)
    assert server.requests == []
    download("124M")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert download("124M") == cached


# --- Bytes that are wrong -------------------------------------------------------------------------


def test_a_damaged_tensor(server: Server, remote: Path, cached: Path) -> None:
    good = (remote / DATA).read_bytes()
    (remote / DATA).write_bytes(good[:-3] + bytes([good[-3] ^ 4]) + good[-2:])
    with pytest.raises(DownloadError, match=r"damaged on the way: .*tensor model/wte: crc32c"):
        download("124M")
    assert not (cached / DATA).exists()
    (remote / DATA).write_bytes(good)
    server.requests.clear()
    download("124M")  # the next call repairs it
    check_whole(cached, remote)
    assert server.requests == [(DATA, None)]


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("encoder.json", b'{"a": 1}', "SHA-256 is [0-9a-f]{64}, wanted [0-9a-f]{64}"),
        ("vocab.bpe", b"#version: 0.3\n", "SHA-256"),
        ("vocab.bpe", b"", "SHA-256"),
        ("hparams.json", b"<html>Log in to this network</html>", "not valid JSON"),
        ("hparams.json", json.dumps(bw.hparams(GPT2Config())).encode(), "wanted the published"),
        ("checkpoint", b'model_checkpoint_path: "/etc/passwd"', "wanted a line"),
        ("model.ckpt.index", b"\0" * 100, "magic number"),
        (DATA, b"short", "cut off"),
        (DATA, b"", "the file is empty"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_file_of_something_else(
    server: Server, remote: Path, cached: Path, name: str, content: bytes, match: str
) -> None:
    good = (remote / name).read_bytes()
    (remote / name).write_bytes(content)
    with pytest.raises(DownloadError, match=match):
        download("124M")
    assert not (cached / name).exists()
    (remote / name).write_bytes(good)
    download("124M")
    check_whole(cached, remote)


@pytest.mark.parametrize("drops", [[], [5000]], ids=["at-once", "resumed"])
def test_the_servers_md5(server: Server, remote: Path, cached: Path, drops: list[int]) -> None:
    server.md5 = server.damage = True
    server.drop_after = list(drops)
    with pytest.raises(DownloadError, match=r"damaged on the way: MD5 is .*, the server says"):
        download("124M")
    assert not list(cached.glob(f"{DATA}*"))
    server.damage = False
    server.drop_after = list(drops)
    download("124M")
    check_whole(cached, remote)


def test_a_file_that_is_too_large(server: Server, remote: Path) -> None:
    with (remote / DATA).open("ab") as stream:
        stream.truncate(4 * CONFIG.parameters + (1 << 20) + 1)
    with pytest.raises(DownloadError, match=r"bytes, wanted at most \d+; not this model"):
        download("124M")


# --- This machine ---------------------------------------------------------------------------------


def test_too_little_space_is_told_before(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(DownloadError, match=r"needs \d+ more bytes, the disk has 100 free"):
        download("124M")


def test_a_disk_that_fills_up(
    server: Server, remote: Path, cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", full)
        with pytest.raises(DownloadError, match=r"cannot be written after .*No space left"):
            download("124M")
    download("124M")
    check_whole(cached, remote)


def test_a_cache_that_is_a_file(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DownloadError, match="cannot be written"):
        download("124M", tmp_path / "file")


def test_a_name_too_long_for_the_disk(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="cannot be written"):
        download("124M", tmp_path / ("x" * 300))


def test_two_processes_download_once(server: Server, remote: Path, cached: Path) -> None:
    server.delay = 0.05
    pair = [start_download(CONFIG) for _ in range(2)]
    assert [process.wait(30) for process in pair] == [0, 0]
    assert sorted(name for name, _ in server.requests) == sorted(FILES)
    check_whole(cached, remote)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_killed_at_any_moment(server: Server, remote: Path, cached: Path) -> None:
    """A process that dies leaves no lock and nothing that passes for a whole file."""
    server.delay = 0.05
    for wanted in (1, 4, 7):
        process = start_download(CONFIG)
        while len(server.requests) < wanted and process.poll() is None:
            time.sleep(0.005)
        process.kill()
        process.wait(30)
        for name in FILES:
            if (cached / name).exists():
                assert (cached / name).read_bytes() == (remote / name).read_bytes()
        server.requests.clear()
    download("124M")
    check_whole(cached, remote)


def test_a_bar_for_people_and_silence_for_pipes(
    server: Server,
    cached: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    download("124M")
    assert capsys.readouterr() == ("", "")
    shutil.rmtree(cached)

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    download("124M")
    assert DATA in screen.getvalue()
    assert "124M" in screen.getvalue()


def test_known_sums_are_those_of_the_vocabulary() -> None:
    """tiktoken pins the same two; ours must not drift from them."""
    import inspect

    openai_public = pytest.importorskip("tiktoken_ext.openai_public")
    source = inspect.getsource(openai_public.gpt2)
    assert all(wanted in source for wanted in openai_download._SHA256.values())
