"""Long input: linear time, no stack, and the same ids as in one simple pass."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gpt2_fast.tokenizer import Tokenizer
from gpt2_fast.tokenizer_engine import _ASCII_PIECE, Engine, _chunks
from gpt2_fast.tokenizer_files import Vocabulary
from tests.tokenizer_support import (
    ODD,
    ODD_TEXT,
    PUBLISHED,
    STABLE_TEXT,
    Reference,
    naive_merge,
    odd_strings,
)

MIB = 1_000_000


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    return Tokenizer.gpt2()


RUNS = {
    "hat": "^" * MIB,
    "a": "a" * MIB,
    "spaces": " " * MIB,
    "spaces then a word": " " * MIB + "x",
    "newlines": "\n" * MIB,
    "ab": "ab" * (MIB // 2),
    "marks": "e" + "\u0301" * (MIB // 2),
    "digits": "0123456789" * (MIB // 10),
    "wide spaces then a word": "\u3000\u2028" * (MIB // 6) + "x",
    "letters": "".join(random.Random(2).choices("etaoinshrdluETAOIN", k=MIB)),
    "signs": "".join(random.Random(3).choices("!#$%&()*+-./:=?@[]^_{}|~", k=MIB)),
    "cjk": "".join(random.Random(4).choices("的一是不了人我在有他这中大来上国字漢", k=MIB // 3)),
    "astral": "𠀀𝟙😀" * (MIB // 12),
    "mixed": "".join(random.Random(5).choices("a1 \n^'", k=MIB)),
    "many runs": ("x" * 511 + " " + "=" * 600 + "\n") * (MIB // 1113),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_megabyte_of_anything_takes_under_two_seconds(gpt2: Tokenizer, name: str) -> None:
    text = RUNS[name]
    gpt2.encode("warm")
    start = time.process_time()
    ids = gpt2.encode(text)
    seconds = time.process_time() - start
    assert gpt2.decode(ids) == text
    assert seconds < 2, f"{name}: {seconds:.2f} s"


@pytest.mark.parametrize("name", RUNS)
def test_long_runs_equal_the_reference(gpt2: Tokenizer, name: str) -> None:
    text = RUNS[name][-100_000:]
    assert gpt2.encode(text) == Reference.gpt2().encode(text)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_megabyte_of_anything_equals_the_reference(gpt2: Tokenizer, name: str) -> None:
    assert gpt2.encode(RUNS[name]) == Reference.gpt2().encode(RUNS[name])


@pytest.mark.parametrize(
    "data",
    [
        random.Random(6).randbytes(MIB),
        b"\xff" * MIB,
        b"\xf0\x9f" * (MIB // 2),
        b"a\x80" * (MIB // 2),
    ],
    ids=["random", "ff", "cut emoji", "alternating"],
)
def test_a_megabyte_of_invalid_bytes(gpt2: Tokenizer, data: bytes) -> None:
    gpt2.encode("warm")
    start = time.process_time()
    ids = gpt2.encode(data)
    seconds = time.process_time() - start
    assert gpt2.decode_bytes(ids) == data
    assert seconds < 2, f"{seconds:.2f} s"


class Spy:
    """tiktoken, noting the longest piece it is given: older versions hang or die on long ones."""

    def __init__(self, encoding: Any) -> None:
        self.encoding = encoding
        self.longest = 0

    def encode_ordinary(self, text: str) -> list[int]:
        self.longest = max(self.longest, *map(len, PUBLISHED.findall(text)), 0)
        return self.encoding.encode_ordinary(text)

    def _encode_single_piece(self, piece: bytes) -> list[int]:
        self.longest = max(self.longest, len(piece))
        return self.encoding._encode_single_piece(piece)


def test_tiktoken_never_meets_a_long_piece(gpt2: Tokenizer) -> None:
    engine = Engine(gpt2._vocabulary)
    engine._tiktoken = spy = Spy(engine._tiktoken)
    for text in RUNS.values():
        part = text[-20_000:]
        assert engine.encode(part) == gpt2.encode(part)
        assert engine.encode_piece(part.encode()) == gpt2._make_engine().encode_piece(part.encode())
    assert 100 < spy.longest < 2 * 512


RUN_LENGTHS = st.sampled_from([1, 2, 250, 256, 257, 510, 511, 512, 513, 767, 768, 1100])
RUN = st.builds(
    lambda unit, length: (unit * length)[:length],
    st.sampled_from(["a", "ab", "Z", "^", "=-", " ", "\n", " \n", "\t", "7", "字", "é", "\u0301"]),
    RUN_LENGTHS,
)
LONG_TEXT = st.lists(st.one_of(RUN, st.sampled_from(ODD)), max_size=12).map("".join)


@settings(deadline=None, max_examples=150)
@given(LONG_TEXT)
def test_runs_around_the_limits_equal_the_reference(text: str) -> None:
    assert Tokenizer.gpt2().encode(text) == Reference.gpt2().encode(text)


@settings(deadline=None, max_examples=150)
@given(st.text(st.sampled_from("aeinorst"), min_size=1, max_size=2000), st.integers(1, 5))
@example("abcdefghijklmnopqrstuvwxyz" * 40, 1)
def test_long_pieces_equal_the_reference(text: str, repeats: int) -> None:
    piece = text.encode() * repeats
    engine = Tokenizer.gpt2()._make_engine()
    assert engine._merge_long(piece) == Reference.gpt2().piece(piece)


def test_chunks_split_like_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpt2_fast.tokenizer_engine._CHUNK", 4)
    cut = 0
    for text in odd_strings(3000, seed=7):
        chunks = list(_chunks(text))
        assert "".join(chunks) == text
        assert [p for c in chunks for p in PUBLISHED.findall(c)] == PUBLISHED.findall(text)
        cut += len(chunks) > 1
    assert cut > 500


@settings(deadline=None, max_examples=500)
@given(st.one_of(STABLE_TEXT, ODD_TEXT))
@example("  \x1c\x1f  \x85\x85x")  # re and str.isspace() take U+001C..1F for spaces, GPT-2 does not
@example("'é'é 's 'S\u3000'll\u2028 x\n")
def test_long_texts_are_cut_like_short_ones(text: str) -> None:
    """The split over the image, which only long runs meet, piece by piece."""
    image = Tokenizer.gpt2()._make_engine()._image(text)
    pieces = [text[match.start() : match.end()] for match in _ASCII_PIECE.finditer(image)]
    assert pieces == PUBLISHED.findall(text)


def test_a_chain_that_changes_far_to_the_left(gpt2: Tokenizer) -> None:
    """Ranks that fall to the right: one more byte at the end pairs every byte before anew."""
    chain = bytes(range(0x21, 0x7F))
    single = {bytes([byte]): byte for byte in range(256)}
    pairs = {(chain[i : i + 1], chain[i + 1 : i + 2]): 1000 - i for i in range(len(chain) - 1)}
    ranks = single | {left + right: rank for (left, right), rank in pairs.items()}
    engine = Engine(
        Vocabulary(
            tokens=tuple(ranks),
            stored_names=None,
            stored_ranks=ranks,
            rank_ids=None,
            merges=None,
            added={},
            literal=frozenset(),
        )
    )
    for offset in range(30, 130, 7):
        for length in (60, 61, 93, 94):
            piece = b"\0" * offset + chain[:length] + b"\0" + chain * 3
            wanted = [ranks[token] for token in naive_merge(piece, pairs)]
            assert engine._merge_long(piece) == wanted


def test_whole_megabyte_of_prose_like_text(gpt2: Tokenizer) -> None:
    text = " ".join(odd_strings(12_000, seed=8))
    assert len(text) > 5 * (1 << 16)
    assert gpt2.encode(text) == Reference.gpt2().encode(text)
