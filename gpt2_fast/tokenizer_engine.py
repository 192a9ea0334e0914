"""Text to ranks: GPT-2's split and its byte-pair merges, by tiktoken, safe on any input.

GPT-2 cuts text into pieces by a regular expression and merges each piece on its own. tiktoken does
both, but its regex engine can overflow on long runs of one kind of character, and before 0.13 its
merging took time quadratic in the length of a piece. So text that may hold a piece of 512
characters or more is split here (`_ASCII_PIECE`), and long pieces are merged window by window
(`_merge_long`). Both give exactly what one call would give; docs/tokenizer.md says why. The first
short texts are split and merged here altogether (`_merge_short`): loading tiktoken takes longer
than a small model's first token, and most processes encode one prompt.

Source: Radford et al. 2019, section 2.2; the expression is the one published with GPT-2.
"""

from __future__ import annotations

import re
import sys
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import tiktoken

    from gpt2_fast.tokenizer_files import Vocabulary

# 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+ as published, with
# possessive runs: nothing that follows a run can make it shorter, so the pieces are the same.
_PIECE = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s+(?!\S)|\s"

# The same over an "image" of the text in which every letter, digit or space beyond ASCII is written
# as one of ASCII's (see `_image`). Python's `re` keeps no stack for runs, so length is no danger.
_ASCII_PIECE = re.compile(
    r"'(?:[sdmt]|ll|ve|re)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s", re.ASCII
)
_ONE_KIND = re.compile(r"[A-Za-z]+|[0-9]+|[^\sA-Za-z0-9]+|\s+", re.ASCII)
# Upper case, because a lower-case letter after an apostrophe could be a contraction.
_IMAGES = ((r"\p{L}", "A"), (r"\p{N}", "0"), (r"\s", "\t"))

# A space after a non-space is always the start of a piece, and what stands before it splits the
# same with or without it. `\S` of `re` is narrower than the engine's: that only loses places.
_SAFE_CUT = re.compile(r"(?<=\S)[ \n]")
_INVALID_BYTES = re.compile("([\udc80-\udcff]+)")  # as "surrogateescape" writes them

_CHUNK = 1 << 16  # characters per call: keeps Ctrl-C alive and the slow path local
_BLOCK = 256  # a run of 2 * _BLOCK characters fills at least one aligned block
_LONG = 2 * _BLOCK
_WINDOW = 128  # bytes of a long piece merged at a time
_OVERLAP = 8  # tokens merged again with the next window
_CACHED_PIECES = 4096
_SHORT = 256  # characters of a text that may do without tiktoken
_FIRST = 1024  # characters of all of them


class Engine:
    """Merges text by the ranks of a vocabulary. Thread-safe; tiktoken releases the GIL.

    The vocabulary's `ranks` map bytes to a rank: all 256 single bytes, then merged tokens, a lower
    rank merging first. Each merged token must be what merging its own bytes ends in
    (`tokenizer_files` sees to it): only then do ranks alone decide the same merges as the pairs of
    a merges file.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._left = _FIRST

    @cached_property
    def _tiktoken(self) -> tiktoken.Encoding:
        import tiktoken

        self._left = 0
        return tiktoken.Encoding(
            "gpt2_fast",
            pat_str=_PIECE,
            mergeable_ranks=dict(self._vocabulary.ranks),
            special_tokens={},
        )

    @cached_property
    def _bytes(self) -> dict[int, bytes]:
        return {rank: token for token, rank in self._vocabulary.ranks.items()}

    @cached_property
    def _classes(self) -> list[tuple[tiktoken.Encoding, str]]:
        """What finds the characters of one kind, and the character that stands for them."""
        import tiktoken

        single = {bytes([i]): i for i in range(256)}
        return [
            (
                tiktoken.Encoding(
                    f"gpt2_fast {pattern}",
                    pat_str=pattern,
                    mergeable_ranks=single,
                    special_tokens={},
                ),
                image,
            )
            for pattern, image in _IMAGES
        ]

    def encode(self, text: str) -> list[int]:
        """Ranks of `text`, which must hold no surrogates. Linear in its length."""
        if len(text) <= min(_SHORT, self._left) and text.isascii():
            pieces = [piece.encode() for piece in _ASCII_PIECE.findall(text)]
            first = self._left == _FIRST
            self._left -= len(text)
            vocabulary = self._vocabulary
            table = vocabulary.ranks_within(pieces) if first else vocabulary.ranks
            return [rank for piece in pieces for rank in _merge_short(piece, table)]
        if len(text) < _LONG:
            return self._tiktoken.encode_ordinary(text)
        if len(text) <= _CHUNK:
            return self._encode_chunk(text)
        ranks: list[int] = []
        for chunk in _chunks(text):
            ranks += self._encode_chunk(chunk)
        return ranks

    def encode_escaped(self, text: str) -> list[int]:
        """Ranks of bytes that are not all UTF-8, as `decode("utf-8", "surrogateescape")` has them.

        Each stretch of valid text is encoded as a text of its own, each run of other bytes as one
        piece.
        """
        ranks: list[int] = []
        cache: dict[str, list[int]] = {}
        for i, part in enumerate(_INVALID_BYTES.split(text)):
            merged = cache.get(part)
            if merged is None:
                if i % 2:
                    merged = self.encode_piece(part.encode("utf-8", "surrogateescape"))
                else:
                    merged = self.encode(part)
                if len(cache) < _CACHED_PIECES and len(part) < 8:
                    cache[part] = merged
            ranks += merged
        return ranks

    def encode_piece(self, piece: bytes) -> list[int]:
        """Ranks of `piece` merged as one piece, whatever it holds. Linear in its length."""
        if len(piece) > _LONG:
            return self._merge_long(piece)
        return self._tiktoken._encode_single_piece(piece)  # noqa: SLF001 - the one way past the split

    def bytes_of(self, rank: int) -> bytes:
        """The bytes that have `rank`."""
        return self._bytes[rank]

    def _encode_chunk(self, text: str) -> list[int]:
        image = self._image_if_long_run(text)
        if image is None:
            return self._tiktoken.encode_ordinary(text)
        ranks: list[int] = []
        cache: dict[str, list[int]] = {}
        for match in _ASCII_PIECE.finditer(image):
            piece = text[match.start() : match.end()]
            merged = cache.get(piece)
            if merged is None:
                merged = self.encode_piece(piece.encode())
                if len(cache) < _CACHED_PIECES and len(piece) < _BLOCK:
                    cache[piece] = merged
            ranks += merged
        return ranks

    def _image_if_long_run(self, text: str) -> str | None:
        """The image of `text` if a piece in it may reach `_LONG` characters, else None."""
        image = text if text.isascii() else None
        for start in range(0, len(text) - _BLOCK + 1, _BLOCK):
            block = text[start : start + _BLOCK]
            if " " in block and not block.isspace():
                continue  # words and spaces: no run fills this block
            if image is None:
                image = self._image(text)
            if _ONE_KIND.fullmatch(image, start, start + _BLOCK):
                return image
        return None

    def _image(self, text: str) -> str:
        """`text` with letters, digits and spaces beyond ASCII replaced by "A", "0" and tab.

        tiktoken itself is asked what each character is, with an expression that matches one kind:
        it skips the rest. Other tables (`unicodedata`, `regex`) may be of another Unicode version,
        and then a text would split differently for being long.
        """
        beyond = "".join(c for c in set(text) if not c.isascii())
        table: dict[int, str] = {}
        for encoding, image in self._classes:
            kind = bytes(encoding.encode_ordinary(beyond)).decode()
            table.update(dict.fromkeys(map(ord, kind), image))
        return text.translate(table)

    def _merge_long(self, piece: bytes) -> list[int]:
        """Ranks of a long piece, from left to right, one window at a time.

        Tokens are the merge of their bytes exactly if each neighbouring pair is the merge of its
        own bytes. So if the last tokens are merged again together with the next window, and the
        first of them comes out unchanged, everything before it stands. If it changes (a chain of
        ever lower ranks to the right), more tokens are taken back.
        """
        merge = self._tiktoken._encode_single_piece  # noqa: SLF001 - as above
        ranks = merge(piece[:_WINDOW])
        for start in range(_WINDOW, len(piece), _WINDOW):
            window = piece[start : start + _WINDOW]
            overlap = _OVERLAP
            while True:
                tail = ranks[-overlap:]
                joined = merge(b"".join(map(self._bytes.__getitem__, tail)) + window)
                if joined[0] == tail[0] or overlap >= len(ranks):
                    break
                overlap *= 2
            ranks[-overlap:] = joined
        return ranks


def _merge_short(piece: bytes, ranks: Mapping[bytes, int]) -> list[int]:
    """Ranks of a piece of ASCII: the pair of lowest rank first, the leftmost of equals."""
    parts = [bytes([byte]) for byte in piece]
    none = sys.maxsize
    while len(parts) > 1:
        pairs = [ranks.get(left + right, none) for left, right in pairwise(parts)]
        best = min(pairs)
        if best == none:
            break
        at = pairs.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [ranks[part] for part in parts]


def _chunks(text: str) -> Iterator[str]:
    """`text` in parts of about `_CHUNK` characters whose pieces are the pieces of the whole."""
    start = 0
    while len(text) - start > _CHUNK:
        cut = _SAFE_CUT.search(text, start + _CHUNK)
        if cut is None:
            break
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]
