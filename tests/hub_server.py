"""A Hugging Face Hub on 127.0.0.1: the part of its interface that huggingface_hub downloads with.

    GET  /api/models/{repository}/revision/main        the commit and the names of the files
    GET  /api/models/{repository}/tree/{commit}        the files with their sizes and hashes
    HEAD /{repository}/resolve/{commit}/{file}         ETag, X-Repo-Commit, Content-Length
    GET  /{repository}/resolve/{commit}/{file}         the same with the bytes, or a Range of them

Source: the requests that huggingface_hub makes, `hf_api.py` and `file_download.py`.
"""

from __future__ import annotations

import hashlib
import json
import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What is served, what goes wrong, and what was asked.

    Attributes:
        repositories: owner/name -> file name -> bytes.
        refusals: owner/name -> (status, X-Error-Code) of every answer about it.
        dropped: file name -> number of downloads that break off in the middle.
        truncated: files that end early although the server claims to have sent everything.
        requests: (method, path, Range header) in the order they came.
        url: its address, once it runs.
    """

    repositories: dict[str, dict[str, bytes]]
    refusals: dict[str, tuple[int, str]] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    truncated: set[str] = field(default_factory=set)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    url: str = ""

    def downloads(self, name: str) -> list[str | None]:
        """The Range headers of the downloads of one file."""
        return [
            wanted for method, path, wanted in self.requests if method == "GET" and name in path
        ]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        """Keep the test's output clean."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        self.hub.requests.append((self.command, self.path, self.headers["Range"]))
        path = self.path.partition("?")[0]
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/[^/]+", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        repository = (api or file or re.fullmatch("(.*)", path))[1]
        if repository in self.hub.refusals:
            status, code = self.hub.refusals[repository]
            return self._send(status, b"{}", {"X-Error-Code": code})
        files = self.hub.repositories.get(repository)
        if files is None:
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if api is not None:
            listing = _info(repository, files) if api[2] == "revision" else _tree(files)
            headers = {"Content-Type": "application/json"}
            return self._send(200, json.dumps(listing).encode(), headers)
        if file is None or file[2] not in files:
            return self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        return self._send_file(file[2], files[file[2]])

    def _send_file(self, name: str, data: bytes) -> None:
        digest = hashlib.sha256(data).hexdigest()
        headers = {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        status, body = 200, data
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
        if wanted is not None and self.command == "GET":
            first = int(wanted[1])
            status, body = 206, data[first:]
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        if self.command == "GET" and name in self.hub.truncated:
            body = body[: len(body) // 2]
        drops = self.command == "GET" and self.hub.dropped.get(name, 0) > 0
        if drops:
            self.hub.dropped[name] -= 1
        self._send(status, body, headers, cut=len(body) // 2 if drops else None)

    def _send(
        self, status: int, body: bytes, headers: dict[str, str], cut: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body if cut is None else body[:cut])
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True


def _info(repository: str, files: dict[str, bytes]) -> dict[str, Any]:
    return {
        "_id": "0" * 24,
        "id": repository,
        "modelId": repository,
        "sha": COMMIT,
        "private": False,
        "gated": False,
        "disabled": False,
        "tags": [],
        "siblings": [{"rfilename": name} for name in files],
    }


def _tree(files: dict[str, bytes]) -> list[dict[str, Any]]:
    return [
        {
            "type": "file",
            "path": name,
            "size": len(data),
            "oid": hashlib.sha1(data, usedforsecurity=False).hexdigest(),
        }
        for name, data in files.items()
    ]


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Run `hub` on a free port of 127.0.0.1 until the block ends."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
