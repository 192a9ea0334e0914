"""Stop texts: cut exactly, and streaming never shows what a stop text takes back."""

from __future__ import annotations

import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gpt2_fast import Tokenizer
from gpt2_fast.stopping import TextBuilder
from tests.model_support import byte_tokenizer, scripted_model

# Few letters, so that stops overlap with the text and with each other; characters of 2-4 bytes.
TEXTS = st.text(alphabet="aab é😀\n", max_size=24)
STOPS = st.lists(st.text(alphabet="aab é😀\n", min_size=1, max_size=5), max_size=4)


def decoded(data: bytes) -> str:
    """Whole characters only: what a reader of the stream can know so far."""
    import codecs

    return codecs.getincrementaldecoder("utf-8")("replace").decode(data)


def expected(tokens: list[bytes], stops: list[str]) -> tuple[str, bool, int]:
    """Text, whether a stop ended it, tokens used: by the definition, all from the start each time.

    After each token, the whole text so far is searched; it ends before the first stop text in it.
    """
    for used in range(1, len(tokens) + 1):
        text = decoded(b"".join(tokens[:used]))
        if found := [at for stop in stops if (at := text.find(stop)) >= 0]:
            return text[: min(found)], True, used
    text = b"".join(tokens).decode("utf-8", "replace")
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    return text[: min(found)] if found else text, bool(found), len(tokens)


def run(tokens: list[int], stops: list[str], tokenizer: Tokenizer) -> tuple[TextBuilder, list[str]]:
    builder = TextBuilder(tokenizer, stops)
    pieces = []
    for token in tokens:
        pieces.append(builder.push(token))
        if builder.stopped:
            break
    pieces.append(builder.finish())
    return builder, pieces


def assert_as_defined(tokens: list[int], stops: list[str], tokenizer: Tokenizer) -> None:
    parts = [tokenizer.token_bytes(token) for token in tokens]
    text, stopped, used = expected(parts, stops)
    builder, pieces = run(tokens, stops, tokenizer)
    assert (builder.text, builder.stopped) == (text, stopped)
    assert "".join(pieces) == text
    assert not any(stop in text for stop in stops)
    assert len(pieces) == used + 1 or not stopped

    # Shown as early as can be: held back is only what some stop text could still take back.
    shown = ""
    for count, piece in enumerate(pieces[:-1], start=1):
        shown += piece
        if count < used or not stopped:
            seen = decoded(b"".join(parts[:count]))
            held = seen[len(shown) :]
            assert seen.startswith(shown)
            assert held == "" or any(stop.startswith(held) for stop in stops)
            longer = [seen[i:] for i in range(len(shown))]
            assert not any(stop.startswith(end) for stop in stops for end in longer)


@settings(max_examples=400, deadline=None)
@given(text=TEXTS, stops=STOPS)
@example(text="aaab", stops=["aab"])
@example(text="abab", stops=["abb", "ba"])
@example(text="ab", stops=["ab"])
@example(text="é", stops=["é"])
@example(text="aaa", stops=["aaaa"])
def test_byte_by_byte(text: str, stops: list[str]) -> None:
    assert_as_defined(list(text.encode()), stops, byte_tokenizer())


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=16), stops=st.lists(st.sampled_from(["\ufffd", "a", "é"])))
def test_bytes_that_are_no_text(data: bytes, stops: list[str]) -> None:
    """A stop may be the character that stands for what is no character."""
    assert_as_defined(list(data), stops, byte_tokenizer())


@settings(max_examples=300, deadline=None)
@given(data=st.data(), text=TEXTS, stops=STOPS)
def test_any_cut_into_tokens(data: st.DataObject, text: str, stops: list[str]) -> None:
    """Tokens of GPT-2's vocabulary, however the text is cut into pieces before it is encoded."""
    tokenizer = Tokenizer.gpt2()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    tokens = [token for piece in pieces for token in tokenizer.encode(piece)]
    assert_as_defined(tokens, stops, tokenizer)


def test_without_a_tokenizer_there_is_no_text() -> None:
    builder = TextBuilder(None, [])
    assert builder.push(5) == builder.finish() == builder.text == ""


@pytest.mark.timeout(60)
def test_hostile_stops_cost_little() -> None:
    """1,024 stops of 1,000 characters that all nearly match: still quick."""
    stops = ["a" * 999 + chr(0x4E00 + i) for i in range(1024)]
    tokens = list(b"a" * 300)
    start = time.perf_counter()
    builder, _ = run(tokens, stops, byte_tokenizer())
    assert builder.text == "a" * 300
    assert time.perf_counter() - start < 20


SAID = "Hello, wörld 😀! The end. The end."


@pytest.mark.parametrize(
    ("stop", "text", "reason"),
    [
        (None, SAID + "???", "length"),
        ([], SAID + "???", "length"),
        ("!", "Hello, wörld 😀", "stop"),
        ("H", "", "stop"),
        ("Hello", "", "stop"),
        (SAID, "", "stop"),
        (SAID + "????", SAID + "???", "length"),
        ("😀", "Hello, wörld ", "stop"),
        ("ö", "Hello, w", "stop"),
        ("rld 😀!", "Hello, wö", "stop"),
        ("The end. The", "Hello, wörld 😀! ", "stop"),
        ("The end. Then", SAID + "???", "length"),
        ("end. The end.", "Hello, wörld 😀! The ", "stop"),
        (["zzz", "ld", "wörld"], "Hello, ", "stop"),  # the token that ends "ld" ends "wörld" too
        (["wörld!", "ö"], "Hello, w", "stop"),
        (["lo", "l"], "He", "stop"),
        ("\ufffd", SAID + "???", "length"),
        ("x", SAID + "???", "length"),  # the prompt is not searched
    ],
)
def test_generation_stops(stop: str | list[str] | None, text: str, reason: str) -> None:
    count = len(SAID.encode()) + 3
    with scripted_model(SAID) as model:
        result = model.generate("x", temperature=0, stop=stop, max_new_tokens=count)
        pieces = list(model.stream("x", temperature=0, stop=stop, max_new_tokens=count))
    assert (str(result), result.finish_reason) == (text, reason)
    assert result.text == text
    assert "".join(pieces) == text
    assert "" not in pieces
    assert bytes(result.token_ids) == (SAID + "???").encode()[: len(result.token_ids)]
    assert len(result.logprobs) == len(result.token_ids)
    if reason == "stop":  # the last token completed the stop text, and no other was drawn
        assert not any(
            each in bytes(result.token_ids[:-1]).decode("utf-8", "ignore")
            for each in ([stop] if isinstance(stop, str) else stop or [])
        )


def test_a_stop_that_the_end_completes() -> None:
    """What the last bytes stand for is known only when nothing follows; it can be a stop text."""
    with scripted_model(b"ab\xf0\x9f") as model:
        result = model.generate("x", temperature=0, stop="\ufffd", max_new_tokens=4)
        whole = model.generate("x", temperature=0, max_new_tokens=4)
        later = model.generate("x", temperature=0, stop="\ufffd", max_new_tokens=5)
    assert (result.text, result.finish_reason) == ("ab", "stop")
    assert (whole.text, whole.finish_reason) == ("ab\ufffd", "length")
    assert (later.text, later.finish_reason, len(later.token_ids)) == ("ab", "stop", 5)


def test_text_held_back_is_shown_at_the_end() -> None:
    """A stop text that never came complete does not swallow its beginning."""
    with scripted_model("one two") as model:
        for count, text in ((5, "one t"), (7, "one two")):
            pieces = list(model.stream("x", temperature=0, stop="two!", max_new_tokens=count))
            assert "".join(pieces) == text
            assert pieces[:4] == ["o", "n", "e", " "]


def test_a_stop_wins_over_the_length() -> None:
    with scripted_model("abc") as model:
        assert (
            model.generate("x", temperature=0, stop="c", max_new_tokens=3).finish_reason == "stop"
        )
        assert (
            model.generate("x", temperature=0, stop="c", max_new_tokens=2).finish_reason == "length"
        )


def test_end_of_text() -> None:
    """The token ends the text and is counted, but is not shown; ignored, it is text."""
    with scripted_model([*b"ab", 256, *b"cd"]) as model:
        result = model.generate("x", temperature=0, max_new_tokens=5)
        assert (result.text, result.finish_reason) == ("ab", "eos")
        assert result.token_ids == [*b"ab", 256]
        assert len(result.logprobs) == 3
        assert list(model.stream("x", temperature=0, max_new_tokens=5)) == ["a", "b"]
        further = model.generate("x", temperature=0, max_new_tokens=5, ignore_eos=True)
        assert (further.text, further.finish_reason) == ("ab<|endoftext|>cd", "length")
        held = model.generate("x", temperature=0, max_new_tokens=5, stop="bc")
        assert (held.text, held.finish_reason) == ("ab", "eos")
        last = model.generate("x", temperature=0, max_new_tokens=3)
        assert last.finish_reason == "eos"
        stop = model.generate("x", temperature=0, ignore_eos=True, stop="<|end", max_new_tokens=5)
        assert (stop.text, stop.finish_reason) == ("ab", "stop")
