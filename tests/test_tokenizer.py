"""The tokenizer against the published algorithm, on ordinary, odd and hostile input."""

from __future__ import annotations

import hashlib
import itertools
import pickle
import random
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import regex
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gpt2_fast.errors import ParameterError, TokenizerError
from gpt2_fast.tokenizer import Tokenizer
from gpt2_fast.tokenizer_engine import Engine
from gpt2_fast.tokenizer_files import Vocabulary
from tests.tokenizer_support import (
    ALL_CHARACTERS,
    BUILTIN,
    DATA,
    ODD_TEXT,
    STABLE,
    STABLE_TEXT,
    Reference,
    gpt2_merges,
    heap_merge,
    naive_merge,
    odd_strings,
)

# Bytes at every edge of UTF-8: ASCII, continuation, overlong, surrogate, too large, never valid.
EDGE_BYTES = bytes.fromhex("41 7f 80 90 9f a0 bf c0 c2 e0 e2 ed ef f0 f3 f4 f5 ff")


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    return Tokenizer.gpt2()


# --- The first short texts, which do without tiktoken

ASCII_TEXT = st.one_of(
    st.text(st.characters(max_codepoint=127), max_size=256),
    st.text(st.sampled_from("aeinorst 'sdlv\n\t1\x1c\x00"), max_size=256),
)


@settings(max_examples=200)
@given(ASCII_TEXT)
@example("a" * 256)
@example("don't  we'll\n\n 've\x1f \x0b x")
def test_short_texts_equal_the_reference(text: str) -> None:
    engine = Engine(Tokenizer.gpt2()._vocabulary)

    assert engine.encode(text) == Reference.gpt2().encode(text)

    assert "_tiktoken" not in vars(engine)
    assert engine._tiktoken.encode_ordinary(text) == engine.encode(text)


@pytest.mark.parametrize("text", ["a" * 257, "é", "x " * 200])
def test_other_texts_are_for_tiktoken(gpt2: Tokenizer, text: str) -> None:
    engine = Engine(gpt2._vocabulary)

    assert engine.encode(text) == Reference.gpt2().encode(text)

    assert "_tiktoken" in vars(engine)


def test_many_short_texts_are_for_tiktoken(gpt2: Tokenizer) -> None:
    engine = Engine(gpt2._vocabulary)
    texts = [f"line {i} of many" for i in range(200)]

    assert [engine.encode(text) for text in texts] == [gpt2.encode(text) for text in texts]

    assert "_tiktoken" in vars(engine)


# --- The vocabulary and the facts everybody quotes


def test_vocabulary_file_is_the_published_one() -> None:
    data = (DATA / "gpt2.tiktoken").read_bytes()
    assert len(data) == 835_554
    published = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
    assert hashlib.sha256(data).hexdigest() == published
    notice = (DATA / "NOTICE-gpt2-vocabulary.txt").read_text()
    assert "MIT License" in notice
    assert "OpenAI" in notice


def test_gpt2_with_two_merges_exchanged_is_another_vocabulary(tmp_path: Path) -> None:
    Tokenizer.gpt2().save(tmp_path)
    merges = tmp_path / "merges.txt"
    lines = merges.read_text("utf-8").split("\n")
    merges.write_text("\n".join([lines[0], lines[2], lines[1], *lines[3:]]), "utf-8")
    folder = Tokenizer.from_folder(tmp_path)
    assert folder is not None
    assert folder._vocabulary.merges is not None  # parsed: it was not taken for GPT-2's
    assert folder._vocabulary.merges[:2] == ((b" ", b"a"), (b" ", b"t"))


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("", []),
        ("Hello world", [15496, 995]),
        (" the", [262]),
        (" gazed", [50255]),
        ("I'LL", [40, 6, 3069]),  # contractions are lower case only, a quirk the models learned
        ("I'll", [40, 1183]),
        ("<|endoftext|>", [27, 91, 437, 1659, 5239, 91, 29]),
        (b"Hello world", [15496, 995]),
        (bytearray(b" the"), [262]),
    ],
)
def test_known_ids(gpt2: Tokenizer, text: str, ids: list[int]) -> None:
    assert gpt2.encode(text) == ids


def test_size_and_end_of_text(gpt2: Tokenizer) -> None:
    assert gpt2.vocab_size == 50257
    assert gpt2.eot_token_id == 50256
    assert gpt2.token_bytes(50256) == b"<|endoftext|>"
    assert repr(gpt2) == "Tokenizer(vocab_size=50257, eot_token_id=50256)"
    assert Tokenizer.gpt2() is gpt2


def test_every_token_encodes_to_itself(gpt2: Tokenizer) -> None:
    engine = gpt2._make_engine()
    wrong = [i for i in range(50256) if engine.encode_piece(gpt2.token_bytes(i)) != [i]]
    assert wrong == []


def test_special_text_is_plain_unless_allowed(gpt2: Tokenizer) -> None:
    text = "a<|endoftext|><|endoftext|>\n<|endoftext|"
    plain = gpt2.encode(text)
    assert 50256 not in plain
    assert gpt2.encode(text, allow_special=True) == [
        64,
        50256,
        50256,
        *gpt2.encode("\n<|endoftext|"),
    ]
    assert gpt2.encode(text.encode() + b"\xff", allow_special=True)[1:3] == [50256, 50256]
    assert gpt2.decode(plain) == gpt2.decode(gpt2.encode(text, allow_special=True)) == text


def test_decode_keeps_spaces_before_punctuation(gpt2: Tokenizer) -> None:
    text = " Hello , world ! do n't  \n"
    assert gpt2.decode(gpt2.encode(text)) == text


# --- Equality with the published algorithm


def test_the_two_references_agree() -> None:
    draw = random.Random(1)
    for alphabet in (b"a", b"ab", b" the", b"aeiourstn", bytes(range(256)), "字é\u0301".encode()):
        for _ in range(60):
            piece = bytes(draw.choices(alphabet, k=draw.randint(1, 90)))
            assert heap_merge(piece, gpt2_merges()) == naive_merge(piece, gpt2_merges())


def test_odd_strings_equal_the_reference(gpt2: Tokenizer) -> None:
    reference = Reference.gpt2()
    wrong = [s for s in odd_strings(20_000) if gpt2.encode(s) != reference.encode(s)]
    assert wrong == []


@settings(deadline=None, max_examples=300)
@given(st.one_of(STABLE_TEXT, ODD_TEXT))
def test_any_text_equals_the_reference(text: str) -> None:
    assert Tokenizer.gpt2().encode(text) == Reference.gpt2().encode(text)


def test_every_character_round_trips(gpt2: Tokenizer) -> None:
    assert gpt2.decode(gpt2.encode(ALL_CHARACTERS)) == ALL_CHARACTERS


@settings(deadline=None, max_examples=300)
@given(st.text())
@example("\0\U0010ffff\r\n\ufeff")
def test_text_round_trips(text: str) -> None:
    ids = Tokenizer.gpt2().encode(text)
    assert Tokenizer.gpt2().decode(ids) == text
    assert Tokenizer.gpt2().encode(text.encode()) == ids


def test_kinds_of_characters_are_those_of_unicode(gpt2: Tokenizer) -> None:
    """The engine tells letters, digits and spaces of every plane apart as `regex` does."""
    image = gpt2._make_engine()._image(ALL_CHARACTERS)
    assert image[:128] == ALL_CHARACTERS[:128]
    stable = set(STABLE)
    for pattern, letter in ((r"\p{L}", "A"), (r"\p{N}", "0"), (r"\s", "\t")):
        ours = {c for c, i in zip(ALL_CHARACTERS, image, strict=True) if i == letter and c > "\x7f"}
        theirs = {c for c in regex.findall(pattern, ALL_CHARACTERS) if c > "\x7f"}
        assert len(ours) > 15
        assert not (ours ^ theirs) & stable


# --- Bytes and surrogates


@settings(deadline=None, max_examples=300)
@given(
    st.one_of(st.binary(), st.lists(st.sampled_from(EDGE_BYTES), max_size=40).map(bytes)),
    st.booleans(),
)
def test_bytes_round_trip(data: bytes, allow_special: bool) -> None:
    gpt2 = Tokenizer.gpt2()
    assert gpt2.decode_bytes(gpt2.encode(data, allow_special=allow_special)) == data


def test_invalid_bytes_split_text_as_documented(gpt2: Tokenizer) -> None:
    """Valid stretches as texts of their own, each run of other bytes as one piece."""
    data = b"Hello  \xe2\x80 the\xff\xffx"
    pieces = [b"\xe2\x80", b"\xff\xff"]
    raw = [[gpt2_id(token) for token in naive_merge(piece, gpt2_merges())] for piece in pieces]
    parts = [gpt2.encode("Hello  "), raw[0], gpt2.encode(" the"), raw[1], gpt2.encode("x")]
    assert gpt2.encode(data) == list(itertools.chain(*parts))
    assert len(raw[0]) == 1  # a cut-off quotation mark, two bytes, is one token: they were merged


def gpt2_id(token: bytes) -> int:
    return Reference.gpt2().ids[token]


@pytest.mark.parametrize("text", ["\ud800", "ok\udfff", "\ude00\ud83d", "x" * 70_000 + "\udc80"])
def test_lone_surrogates_are_refused(gpt2: Tokenizer, text: str) -> None:
    position = next(i for i, c in enumerate(text) if "\ud800" <= c <= "\udfff")
    with pytest.raises(
        TokenizerError, match=rf"surrogate U\+[0-9A-F]{{4}} at character {position}"
    ):
        gpt2.encode(text)


@pytest.mark.parametrize("text", [None, 5, ["a"], memoryview(b"a")])
def test_other_types_are_refused(gpt2: Tokenizer, text: object) -> None:
    with pytest.raises(ParameterError, match="text: wanted str or bytes"):
        gpt2.encode(text)  # type: ignore[arg-type]


# --- Ids


@pytest.mark.parametrize(
    "ids",
    [
        [15496, 995],
        (15496, 995),
        iter([15496, 995]),
        np.array([15496, 995]),
        np.array([15496, 995], dtype=np.uint16),
        [np.int64(15496), np.int32(995)],
        [np.array(15496), 995],
    ],
)
def test_integers_of_any_kind(gpt2: Tokenizer, ids: list[int]) -> None:
    assert gpt2.decode(ids) == "Hello world"


class OneElementArray:
    """Like torch's: an index, although it is no scalar."""

    shape = (1,)

    def __index__(self) -> int:
        return 1


@pytest.mark.parametrize(
    "bad",
    [
        OneElementArray(),
        -1,
        50257,
        2**31,
        2**63,
        -(2**70),
        1.0,
        float("nan"),
        True,
        False,
        None,
        "1",
        b"1",
        [],
        [1],
        {},
        1j,
        np.float32(1),
        np.bool_(True),
        np.array([1]),
        np.array([[1]]),
        np.int64(-1),
    ],
    ids=lambda bad: f"{type(bad).__name__} {bad if isinstance(bad, (int, float)) else ''}",
)
def test_bad_ids_are_named_with_their_place(gpt2: Tokenizer, bad: object) -> None:
    with pytest.raises(ParameterError, match=r"ids\[2\]: wanted an integer in 0\.\.50256, found "):
        gpt2.decode([1, 2, bad, 3])  # type: ignore[list-item]
    with pytest.raises(ParameterError, match=r"token_id: wanted an integer in 0\.\.50256, found "):
        gpt2.token_bytes(bad)  # type: ignore[arg-type]
    with pytest.raises(ParameterError, match="token_id: "):
        gpt2.stream_decoder().push(bad)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "bad", [np.array([True]), np.array([1.0]), np.array([-1]), np.array([70000]), [[1, 2], [3]]]
)
def test_bad_id_arrays(gpt2: Tokenizer, bad: np.ndarray) -> None:
    with pytest.raises(ParameterError, match=r"ids\[0\]"):
        gpt2.decode(bad)


@pytest.mark.parametrize("bad", [5, None, "12", b"12", np.array(5), np.zeros((1, 2), int), 1.5])
def test_ids_must_be_a_flat_sequence(gpt2: Tokenizer, bad: object) -> None:
    with pytest.raises(ParameterError, match="ids: wanted a flat sequence of integers"):
        gpt2.decode_bytes(bad)  # type: ignore[arg-type]


def test_no_ids(gpt2: Tokenizer) -> None:
    assert gpt2.decode([]) == ""
    assert gpt2.decode_bytes(np.array([], dtype=np.int64)) == b""


# --- Streaming


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    decoder = tokenizer.stream_decoder()
    return [*(decoder.push(i) for i in ids), decoder.finish()]


def byte_ids() -> dict[int, int]:
    """Id of each single byte: with them any split of any bytes can be streamed."""
    return {byte: gpt2_id(bytes([byte])) for byte in range(256)}


def test_stream_equals_decode_for_every_short_byte_string(gpt2: Tokenizer) -> None:
    ids = byte_ids()
    for length in (1, 2, 3, 4):
        for data in itertools.product(EDGE_BYTES if length < 4 else EDGE_BYTES[::2], repeat=length):
            tokens = [ids[byte] for byte in data]
            assert "".join(streamed(gpt2, tokens)) == bytes(data).decode("utf-8", "replace")


@settings(deadline=None, max_examples=300)
@given(st.lists(st.one_of(st.integers(0, 50256), st.integers(94, 255)), max_size=40))
def test_stream_equals_decode_for_any_ids(ids: list[int]) -> None:
    gpt2 = Tokenizer.gpt2()
    parts = streamed(gpt2, ids)
    assert "".join(parts) == gpt2.decode(ids) == gpt2.decode_bytes(ids).decode("utf-8", "replace")


def test_stream_holds_back_unfinished_characters(gpt2: Tokenizer) -> None:
    ids = [byte_ids()[byte] for byte in "é👍x".encode()]
    assert streamed(gpt2, ids) == ["", "é", "", "", "", "👍", "x", ""]
    decoder = gpt2.stream_decoder()
    assert [decoder.push(i) for i in ids[:1]] == [""]
    assert decoder.finish() == "\ufffd"
    assert [decoder.push(i) for i in ids[:2]] == ["", "é"]  # and starts anew
    assert decoder.finish() == ""


# --- Sharing


def test_a_hundred_threads_get_the_same_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Engine] = []

    def make(vocabulary: Vocabulary) -> Engine:
        made.append(Engine(vocabulary))
        return made[-1]

    tokenizer = Tokenizer.from_folder(BUILTIN)  # fresh: the engine is made by the race
    assert tokenizer is not None
    texts = [*odd_strings(60, seed=9), "^" * 5000, " " * 3000 + "x", "字" * 2000]
    other = Tokenizer.from_folder(BUILTIN)
    assert other is not None
    wanted = [other.encode(text) for text in texts]
    monkeypatch.setattr("gpt2_fast.tokenizer_engine.Engine", make)
    results: list[list[list[int]]] = []
    barrier = threading.Barrier(100)

    def work() -> None:
        barrier.wait()
        results.append([tokenizer.encode(text) for text in texts])

    threads = [threading.Thread(target=work) for _ in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 100
    assert len(made) == 1
    assert all(result == wanted for result in results)


def test_pickles_before_and_after_use(gpt2: Tokenizer) -> None:
    ids = gpt2.encode("Hello world")
    assert pickle.loads(pickle.dumps(gpt2)).encode("Hello world") == ids
    fresh = Tokenizer(gpt2._vocabulary)
    assert pickle.loads(pickle.dumps(fresh)).encode("Hello world") == ids


def test_decoding_and_a_short_prompt_import_no_library() -> None:
    code = (
        "import sys; from gpt2_fast.tokenizer import Tokenizer; t = Tokenizer.gpt2();"
        "assert t.decode([15496, 995]) == 'Hello world';"
        "assert t.encode('Hello world') == [15496, 995];"
        "found = {'tiktoken', 'regex', 'requests', 'numpy'} & set(sys.modules);"
        "assert not found, found;"
        "t.encode('x' * 300); assert 'tiktoken' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=DATA.parent.parent)
