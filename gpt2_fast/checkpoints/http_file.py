"""One file over HTTP: resumed where it stopped, checked, and put in its place only when whole.

While a file is on its way it is `name.part`, with the server's validator (ETag or date of change)
in `name.part.tag`. A later attempt, in this process or another, asks for the rest only if the
server still has the same version (RFC 9110, section 13.1.5, If-Range); else it starts again.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from typing import IO, TYPE_CHECKING
from urllib.parse import urlsplit

from gpt2_fast.errors import DownloadError

if TYPE_CHECKING:
    from collections.abc import Callable
    from email.message import Message
    from pathlib import Path

    #: Called with (bytes there so far, bytes in all or None).
    Progress = Callable[[int, int | None], None]

#: Seconds to wait after the first failure; doubled for each one after it.
BACKOFF_SECONDS = 0.5
#: Attempts in a row that bring no byte further before giving up.
ATTEMPTS = 5

_TIMEOUT_SECONDS = 30.0
_LONGEST_WAIT_SECONDS = 20.0
_CHUNK_BYTES = 1 << 18
_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})
_CONTENT_RANGE = re.compile(r"^bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)$")


class _Dropped(Exception):
    """This attempt failed in a way that another may not."""

    def __init__(self, reason: str, *, wait: float | None = None, connected: bool = True) -> None:
        super().__init__(reason)
        self.wait = wait
        self.connected = connected


class _SameSchemeRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http and https, never from https to http, never to other schemes."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        allowed = ("https",) if urlsplit(req.full_url).scheme == "https" else ("http", "https")
        if urlsplit(newurl).scheme not in allowed:
            raise DownloadError(f"{req.full_url}: refused a redirect to {newurl}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def fetch(url: str, target: Path, *, limit: int, progress: Progress | None = None) -> None:
    """Download `url` to `target`, continuing an earlier attempt if there is one.

    Args:
        url: http or https.
        target: the file; its folder exists. Replaced in one step when all bytes are there.
        limit: most bytes that are accepted.
        progress: called after every piece.

    Raises:
        DownloadError: no network, no such file, cut off again and again, larger than `limit`, not
            the bytes of the server's Content-MD5, or the disk is full or not writable.
    """
    transfer = _Transfer(url, target, limit, progress)
    failures = 0
    while True:
        before = transfer.furthest
        try:
            transfer.attempt()
            break
        except _Dropped as drop:
            if not drop.connected and not transfer.connected:
                raise DownloadError(f"{url}: cannot be reached: {drop}") from drop
            failures = 1 if transfer.furthest > before else failures + 1
            if failures >= ATTEMPTS:
                raise DownloadError(
                    f"{url}: gave up after {failures} attempts without progress, with "
                    f"{transfer.furthest} bytes of {transfer.total or 'an unknown number'}: {drop}"
                ) from drop
            wait = BACKOFF_SECONDS * 2 ** (failures - 1) if drop.wait is None else drop.wait
            time.sleep(min(wait, _LONGEST_WAIT_SECONDS))
    transfer.finish()


class _Transfer:
    """The attempts to get one file."""

    def __init__(self, url: str, target: Path, limit: int, progress: Progress | None) -> None:
        if urlsplit(url).scheme not in ("http", "https"):
            raise DownloadError(f"{url}: wanted an http or https address")
        self.url = url
        self.target = target
        self.limit = limit
        self.progress = progress
        self.part = target.with_name(target.name + ".part")
        self.tag = target.with_name(target.name + ".part.tag")
        self.opener = urllib.request.build_opener(_SameSchemeRedirects)
        self.connected = False
        self.furthest = 0
        self.total: int | None = None
        self.md5: str | None = None

    def attempt(self) -> None:
        """One request; returns when every byte is in the part file."""
        have, tag = self._state()
        headers = {"User-Agent": "gpt2_fast", "Accept-Encoding": "identity"}
        if have:
            headers |= {"Range": f"bytes={have}-", "If-Range": tag}
        request = urllib.request.Request(self.url, headers=headers)  # noqa: S310 - checked above
        try:
            response = self.opener.open(request, timeout=_TIMEOUT_SECONDS)
        except urllib.error.HTTPError as error:
            with error:
                self.connected = True
                if self._nothing_left(error, have):
                    return
                self._refused(error)
        except (OSError, http.client.HTTPException, ValueError) as error:
            if isinstance(error, DownloadError):
                raise
            reason = getattr(error, "reason", error)
            hung_up = isinstance(error, ConnectionResetError)  # somebody is there, and busy
            raise _Dropped(str(reason) or repr(reason), connected=hung_up) from error
        with response:
            self.connected = True
            start = self._start(response, have, tag)
            self._reserve(start)
            self._receive(response, start)

    def finish(self) -> None:
        """Check the whole file and give it its name."""
        if self.md5 is not None:
            digest = hashlib.md5(usedforsecurity=False)
            with self.part.open("rb") as stream:
                while chunk := stream.read(1 << 20):
                    digest.update(chunk)
            found = base64.b64encode(digest.digest()).decode("ascii")
            if found != self.md5:
                self._discard()
                raise DownloadError(
                    f"{self.url}: damaged on the way: MD5 is {found}, the server says {self.md5}"
                )
        try:
            self.part.replace(self.target)
            self.tag.unlink(missing_ok=True)
        except OSError as error:
            raise DownloadError(f"{self.target}: cannot be written: {error}") from error

    def _state(self) -> tuple[int, str]:
        """Bytes that can be continued, and the validator they belong to."""
        try:
            tag = self.tag.read_text(encoding="latin-1")
            have = self.part.stat().st_size
        except OSError:
            return 0, ""
        return (have, tag) if tag.isprintable() and tag else (0, "")

    def _discard(self) -> None:
        with contextlib.suppress(OSError):
            self.part.unlink(missing_ok=True)
            self.tag.unlink(missing_ok=True)

    def _nothing_left(self, error: urllib.error.HTTPError, have: int) -> bool:
        """Whether the server refused the range because the part is the whole file already."""
        if error.code != 416 or error.headers.get("Content-Range", "") != f"bytes */{have}":
            return False
        self.total = self.furthest = have
        return True

    def _refused(self, error: urllib.error.HTTPError) -> None:
        if error.code in _AGAIN:
            wait = error.headers.get("Retry-After", "")
            seconds = float(wait) if wait.isdecimal() else None
            raise _Dropped(f"HTTP {error.code} {error.reason}", wait=seconds) from error
        if error.code == 416:  # the part is not a beginning of what the server has now
            self._discard()
            raise _Dropped("the server has no bytes beyond those already here") from error
        what = "no such file" if error.code in (404, 410) else "refused"
        raise DownloadError(f"{self.url}: {what}: HTTP {error.code} {error.reason}") from error

    def _start(self, response: http.client.HTTPResponse, have: int, tag: str) -> int:
        """Where this answer's bytes belong; also notes the size and the checksum it announces."""
        headers = response.headers
        now = _validator(headers)
        start = 0
        if response.status == 206:
            match = _CONTENT_RANGE.match(headers.get("Content-Range", ""))
            if match is None or int(match[1]) != have or (now and now != tag):
                self._discard()
                raise _Dropped("the server continued at another place or in another version")
            start = have
            self.total = int(match[2]) + 1 if match[3] == "*" else int(match[3])
            self.md5 = headers.get("x-ms-blob-content-md5", self.md5)
        else:
            length = headers.get("Content-Length", "")
            self.total = int(length) if length.isdecimal() else None
            self.md5 = headers.get("Content-MD5", headers.get("x-ms-blob-content-md5"))
        if self.total is not None and self.total > self.limit:
            raise DownloadError(
                f"{self.url}: {self.total} bytes, wanted at most {self.limit}; not this model"
            )
        try:
            if start == 0:
                self._discard()
                if now:
                    self.tag.write_text(now, encoding="latin-1")
        except OSError as error:
            raise DownloadError(f"{self.tag}: cannot be written: {error}") from error
        return start

    def _reserve(self, start: int) -> None:
        if self.total is None:
            return
        free = shutil.disk_usage(self.target.parent).free
        if self.total - start > free:
            raise DownloadError(
                f"{self.target}: needs {self.total - start} more bytes, the disk has {free} free"
            )

    def _receive(self, response: http.client.HTTPResponse, start: int) -> None:
        here = start
        try:
            with self.part.open("r+b" if start else "wb") as stream:
                stream.seek(start)
                while chunk := _read(response):
                    here += len(chunk)
                    if here > self.limit:
                        raise DownloadError(f"{self.url}: more than {self.limit} bytes")
                    stream.write(chunk)
                    self.furthest = max(self.furthest, here)
                    if self.progress is not None:
                        self.progress(here, self.total)
                stream.truncate(here)
                stream.flush()
                os.fsync(stream.fileno())
        except DownloadError:
            self._discard()
            raise
        except OSError as error:
            raise DownloadError(
                f"{self.part}: cannot be written after {here} bytes: {error}"
            ) from error
        if self.total is not None and here < self.total:
            raise _Dropped(f"the connection closed after {here} of {self.total} bytes")
        if self.total is not None and here > self.total:
            self._discard()
            raise _Dropped(f"{here} bytes came, {self.total} were announced")


def _read(response: http.client.HTTPResponse) -> bytes:
    """The next piece; a network failure is told apart from one of the disk."""
    try:
        return response.read1(_CHUNK_BYTES)
    except (OSError, http.client.HTTPException) as error:
        raise _Dropped(f"the connection failed: {error!r}") from error


def _validator(headers: Message) -> str:
    """What If-Range may carry: a strong ETag, else the date of change, else nothing."""
    tag: str = headers.get("ETag", "")
    if tag and not tag.startswith("W/"):
        return tag
    return str(headers.get("Last-Modified", ""))
