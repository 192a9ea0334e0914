"""From drawn tokens to text: complete characters only, cut exactly before a stop text."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .tokenizer import Tokenizer


class TextBuilder:
    """The text of one sample while it grows.

    `push` and `finish` return what may be shown at once: text that no stop text can take back.
    Joined, the pieces are `text`.
    """

    def __init__(self, tokenizer: Tokenizer | None, stops: list[str]) -> None:
        self._decoder = None if tokenizer is None else tokenizer.stream_decoder()
        self._stops = stops
        self._pending = ""  # decoded, but may still turn out to begin a stop text
        self._shown: list[str] = []
        self.stopped = False

    @property
    def text(self) -> str:
        """Everything shown so far."""
        return "".join(self._shown)

    def push(self, token_id: int) -> str:
        """Add one token; sets `stopped` when a stop text is complete."""
        return "" if self._decoder is None else self._add(self._decoder.push(token_id), last=False)

    def finish(self) -> str:
        """The rest, once no token follows."""
        if self._decoder is None or self.stopped:
            return ""
        return self._add(self._decoder.finish(), last=True)

    def _add(self, decoded: str, *, last: bool) -> str:
        text = self._pending + decoded
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            shown, self._pending = text[: min(found)], ""
        else:
            keep = 0 if last else self._held_back(text)
            shown, self._pending = text[: len(text) - keep], text[len(text) - keep :]
        self._shown.append(shown)
        return shown

    def _held_back(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop text."""
        return max((_overlap(text, stop) for stop in self._stops), default=0)


def _overlap(text: str, stop: str) -> int:
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
