"""GPT-2's tokenizer a second and third time, to compare with. Shares no code with the package.

`naive_merge` is the published algorithm (Radford et al. 2019, section 2.2; Sennrich et al. 2016):
merge every occurrence of the pair that was learned first, until no pair is left. `heap_merge` does
the same in n log n, for long pieces. Text is cut by the published expression with `regex`.
"""

from __future__ import annotations

import base64
import heapq
import random
import unicodedata
from functools import cache
from itertools import pairwise
from pathlib import Path

import regex
from hypothesis import strategies as st

import gpt2_fast.tokenizer

DATA = Path(gpt2_fast.tokenizer.__file__).with_name("data")
BUILTIN = DATA / "builtin"
PUBLISHED = regex.compile(
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
)
LONG_PIECE = 64  # from here on the heap: the naive way takes quadratic time

# Pieces of text that go wrong in tokenizers: contractions in either case and with other
# apostrophes, every kind of space, control characters, marks, scripts without spaces, joined
# emoji, digits of other scripts, the last code point, and text that looks special.
_ODD_LINES = (
    "'s|'t|'re|'ve|'m|'ll|'d|'S|'RE|'Ll|''|'|’s|´t",
    " |  |   |    |\t|\n|\r|\r\n|\n\n|\v|\f|\x1c|\x1d|\x1e|\x1f|\x85|\xa0|\u1680",
    "\u2000|\u2003|\u200a|\u200b|\u200d|\u2028|\u2029|\u202f|\u205f|\u3000|\ufeff",
    "\0|\x01|\x7f|\x80|\xad|\ufffd|\uffff|\U0001ffff|\U0010ffff|\ue000",
    "e\u0301|\u0301|\u0300\u0301\u0302|\u20e3|क्षि|ไทย|한국어|각|中文字|日本語|𠀀𠀁|شالوم|עברית",
    "👩\u200d👩\u200d👧\u200d👦|🏳\ufe0f\u200d🌈|👍🏽|🇩🇪|é|ß|ﬁ|İ|ŉ|Ａ|１２|٣٤|Ⅷ|½|²|〇|一|𝟙",
    "_|-|--|...|^^|##|$%|=>|//|\\|<|endoftext|>|[PAD]|http://a.b",
    "the|The|THE|a|I|don't|I'LL|we've|x1y2|2019|1,000.5",
)
END_OF_TEXT = "<|endoftext|>"
ODD = (END_OF_TEXT, *(part for line in _ODD_LINES for part in line.split("|")))


ALL_CHARACTERS = "".join(chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000)
# Characters whose kind every Unicode table of our time agrees on: assigned by 2002, or never.
STABLE = [c for c in ALL_CHARACTERS if unicodedata.ucd_3_2_0.category(c) != "Cn"] + [
    *("\ufdd0", "\ufffe", "\uffff", "\U0001fffe", "\U0010ffff")
]
ODD_TEXT = st.lists(st.sampled_from(ODD), max_size=30).map("".join)
STABLE_TEXT = st.text(st.sampled_from(STABLE), max_size=60)


def odd_strings(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices(ODD, k=draw.randint(1, 24))) for _ in range(count)]


@cache
def gpt2_ranks() -> dict[bytes, int]:
    """Bytes to rank, read from the data file here."""
    lines = (DATA / "gpt2.tiktoken").read_text().split("\n")
    pairs = (line.split(" ") for line in lines if line)
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


@cache
def gpt2_merges() -> dict[tuple[bytes, bytes], int]:
    """Pairs to rank: each token split as merging by lower ranks alone leaves it."""
    pairs: dict[tuple[bytes, bytes], int] = {}
    for token, rank in sorted(gpt2_ranks().items(), key=lambda item: item[1]):
        if len(token) > 1:
            left, right = naive_merge(token, pairs)
            pairs[left, right] = rank
    return pairs


def naive_merge(piece: bytes, pairs: dict[tuple[bytes, bytes], int]) -> list[bytes]:
    """Quadratic, and as plain as the paper: all occurrences of the best pair, left to right."""
    word = [bytes([byte]) for byte in piece]
    while len(word) > 1:
        neighbours = set(pairwise(word)) & pairs.keys()
        if not neighbours:
            break
        left, right = min(neighbours, key=pairs.__getitem__)
        merged: list[bytes] = []
        i = 0
        while i < len(word):
            if word[i : i + 2] == [left, right]:
                merged.append(left + right)
                i += 2
            else:
                merged.append(word[i])
                i += 1
        word = merged
    return word


def heap_merge(piece: bytes, pairs: dict[tuple[bytes, bytes], int]) -> list[bytes]:
    """The same by a heap of (rank, position) over a linked list."""
    size = len(piece)
    part: list[bytes | None] = [piece[i : i + 1] for i in range(size)]
    following = list(range(1, size + 1))
    before = list(range(-1, size - 1))
    heap = [
        (pairs[part[i], part[i + 1]], i, part[i], part[i + 1])
        for i in range(size - 1)
        if (part[i], part[i + 1]) in pairs
    ]
    heapq.heapify(heap)
    while heap:
        _, i, left, right = heapq.heappop(heap)
        j = following[i]
        if part[i] != left or j >= size or part[j] != right:
            continue  # one of the two is gone or has grown
        joined = left + right
        part[i], part[j] = joined, None
        k = following[i] = following[j]
        if k < size:
            before[k] = i
            if (joined, part[k]) in pairs:
                heapq.heappush(heap, (pairs[joined, part[k]], i, joined, part[k]))
        h = before[i]
        if h >= 0 and (part[h], joined) in pairs:
            heapq.heappush(heap, (pairs[part[h], joined], h, part[h], joined))
    return [token for token in part if token is not None]


class Reference:
    """Text to ids by `regex` and the merges above."""

    def __init__(self, pairs: dict[tuple[bytes, bytes], int], ids: dict[bytes, int]) -> None:
        self.pairs = pairs
        self.ids = ids
        self._known: dict[str, list[int]] = {}

    @classmethod
    @cache
    def gpt2(cls) -> Reference:
        return cls(gpt2_merges(), gpt2_ranks())

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in PUBLISHED.findall(text):
            if piece not in self._known:
                self._known[piece] = self.piece(piece.encode())
            ids += self._known[piece]
        return ids

    def piece(self, piece: bytes) -> list[int]:
        merge = naive_merge if len(piece) < LONG_PIECE else heap_merge
        return [self.ids[token] for token in merge(piece, self.pairs)]
