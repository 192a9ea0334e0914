"""An HTTP server on this machine with the layout of OpenAI's release, and its bad days."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.server
import json
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from gpt2_fast.checkpoints import openai_download
from gpt2_fast.config import GPT2Config

DATA = "model.ckpt.data-00000-of-00001"
FILES = {
    "checkpoint",
    "encoder.json",
    "hparams.json",
    DATA,
    "model.ckpt.index",
    "model.ckpt.meta",
    "vocab.bpe",
}

IN_ANOTHER_PROCESS = """
import json, sys
from gpt2_fast.checkpoints import openai_download
from gpt2_fast.config import GPT2Config
openai_download._SHA256 = json.loads(sys.argv[1])
openai_download.PUBLISHED = {"124M": GPT2Config(**json.loads(sys.argv[2]))}
print(openai_download.download("124M"))
"""


@dataclass
class Server:
    """What the server does, and what it was asked.

    Attributes:
        drop_after: bytes after which a connection is cut, one value per request of the data file;
            then no more. Negative: cut before the answer.
        statuses: answers to the first requests of the data file, instead of the file.
        ranges: whether Range is honoured.
        if_range: whether If-Range is.
        etag, md5: whether the headers are sent.
        damage: whether a bit of the data file is changed after its MD5 was taken.
        requests: (file, Range header) in order.
    """

    root: Path
    url: str = ""
    drop_after: list[int] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    ranges: bool = True
    if_range: bool = True
    etag: bool = True
    md5: bool = False
    damage: bool = False
    delay: float = 0.0
    requests: list[tuple[str, str | None]] = field(default_factory=list)

    def asked(self, name: str) -> list[str | None]:
        """The Range headers of the requests of one file."""
        return [ranges for asked, ranges in self.requests if asked == name]


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `plan.root` as the release's endpoint does."""

    plan: Server

    def log_message(self, *_args: object) -> None:
        """Keep the tests' output quiet."""

    def do_GET(self) -> None:
        plan = self.plan
        name = self.path.rsplit("/", 1)[-1]
        plan.requests.append((name, self.headers.get("Range")))
        file = plan.root / self.path.lstrip("/")
        time.sleep(plan.delay)
        if name == DATA and plan.statuses:
            self.send_response(plan.statuses.pop(0))
            for key, value in plan.headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if not file.is_file():
            self.send_error(404)
            return
        self.send_file(file.read_bytes(), name)

    def send_file(self, content: bytes, name: str) -> None:
        plan = self.plan
        tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = 0
        same = not plan.if_range or self.headers.get("If-Range") == tag
        if asked and plan.ranges and same:
            start = int(asked[1])
        if start >= len(content) > 0:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.end_headers()
            return
        cut = plan.drop_after.pop(0) if name == DATA and plan.drop_after else None
        if cut is not None and cut < 0:
            self.close_connection = True
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        if plan.etag:
            self.send_header("ETag", tag)
        if plan.md5:
            digest = base64.b64encode(hashlib.md5(content).digest()).decode()
            self.send_header("x-ms-blob-content-md5" if start else "Content-MD5", digest)
        self.end_headers()
        if plan.damage and name == DATA:
            content = content[:-1] + bytes([content[-1] ^ 1])
        with contextlib.suppress(ConnectionError):  # a client that was killed
            self.wfile.write(content[start:][:cut])
        self.close_connection = True


def start_download(config: GPT2Config) -> subprocess.Popen[bytes]:
    """Another process that downloads 124M, taken to have this shape."""
    sums, shape = json.dumps(openai_download._SHA256), json.dumps(config.to_dict())
    command = [sys.executable, "-c", IN_ANOTHER_PROCESS, sums, shape]
    return subprocess.Popen(command, cwd=Path(__file__).parents[2])
