"""The wheel's vocabulary file: base64 and ranks, read natively, against Python's base64."""

from __future__ import annotations

import base64
from functools import cache

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gpt2_fast import _C
from gpt2_fast.errors import ParameterError
from gpt2_fast.tokenizer import Tokenizer
from gpt2_fast.tokenizer_engine import Engine
from gpt2_fast.tokenizer_files import Vocabulary, read_gpt2
from tests.tokenizer_support import DATA


def lines_of(tokens: list[bytes]) -> bytes:
    return b"".join(b"%b %d\n" % (base64.b64encode(t), i) for i, t in enumerate(tokens))


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=30))
@example([bytes(range(256)), b"\0", b"\xff\xff", b"\0\0\0"])
def test_tokens_come_back(tokens: list[bytes]) -> None:
    assert _C.read_tokens(lines_of(tokens)) == tuple(tokens)


def test_the_wheels_file() -> None:
    data = (DATA / "gpt2.tiktoken").read_bytes()
    assert _C.read_tokens(data) == tuple(map(base64.b64decode, data.split()[::2]))


@pytest.mark.parametrize(
    "line",
    [
        b"",  # a line, but an empty one
        b"YQ==",
        b"YQ== ",
        b"YQ== 2",
        b"YQ== 3",
        b"YQ== -1",
        b"YQ== 1x",
        b"YQ==  1",
        b"YQ== 1 ",
        b"YQ== 1\r",
        b"YQ== 99999999999999999999",
        b" 1",
        b"YQ= 1",
        b"YQ 1",
        b"Y=== 1",
        b"==== 1",
        b"YQ==YQ== 1",
        b"Y*== 1",
        b"*Q== 1",
        b"YWJ* 1",
        b"YW*j 1",
        b"YW*= 1",
        b"YWI-YWI= 1",
        b"YQ\xc3\xa9= 1",
        b"\xff 1",
        b"A" * 79 + "é 1".encode(),
    ],
)
def test_a_malformed_line_is_named(line: bytes) -> None:
    text = b"YWI= 0\n" + line + b"\nYWJj 2\n"
    with pytest.raises(ParameterError, match="line 2: wanted base64, a space and 1, got '"):
        _C.read_tokens(text)


def test_a_last_line_that_is_cut_off() -> None:
    with pytest.raises(ParameterError, match="line 2: wanted base64, a space and 1, got 'YQ== 1'"):
        _C.read_tokens(b"YWI= 0\nYQ== 1")


@cache
def read_once() -> Vocabulary:
    return read_gpt2()


PIECES = st.lists(st.text(st.sampled_from(" aehirnst'lv\n0A"), min_size=1, max_size=12), max_size=6)


@given(PIECES)
def test_ranks_within_pieces(pieces: list[str]) -> None:
    vocabulary = read_once()
    encoded = [piece.encode() for piece in pieces]
    wanted = {
        token: rank
        for token, rank in Tokenizer.gpt2()._vocabulary.ranks.items()
        if any(token in piece for piece in encoded)
    }
    assert vocabulary.ranks_within(encoded) == wanted


def test_the_end_of_text_has_no_rank() -> None:
    assert b"<|endoftext|>" not in read_gpt2().ranks_within([b"<|endoftext|>"])


def test_the_first_text_alone_does_without_all_ranks() -> None:
    vocabulary = read_gpt2()
    engine = Engine(vocabulary)
    assert engine.encode("Hello world") == [15496, 995]
    assert "ranks" not in vars(vocabulary)
    assert engine.encode(" the") == [262]
    assert "ranks" in vars(vocabulary)
