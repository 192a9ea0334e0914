"""Vocabulary files: any vocabulary exactly, transformers agreeing, and every way to be wrong."""

from __future__ import annotations

import hashlib
import json
import os
import random
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gpt2_fast.errors import TokenizerError
from gpt2_fast.tokenizer import Tokenizer
from gpt2_fast.tokenizer_files import BYTE_TO_SYMBOL, MAX_FILE_BYTES, derive_merges, symbols
from tests.tokenizer_support import (
    BUILTIN,
    END_OF_TEXT,
    ODD,
    PUBLISHED,
    Reference,
    gpt2_merges,
    gpt2_ranks,
    heap_merge,
)

Merges = list[tuple[str, str]]
SMALL: Merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("a", "b"), ("ab", "ab")]


def vocabulary(merges: Merges, extra: tuple[str, ...] = (END_OF_TEXT,)) -> dict[str, int]:
    names = [*extra, *BYTE_TO_SYMBOL, *dict.fromkeys(left + right for left, right in merges)]
    return {name: i for i, name in enumerate(dict.fromkeys(names))}


def write(folder: Path, vocab: object, merges: Merges, added: object = None) -> Path:
    (folder / "vocab.json").write_text(json.dumps(vocab))
    lines = "".join(f"{left} {right}\n" for left, right in merges)
    (folder / "merges.txt").write_text("#version: 0.2\n" + lines, encoding="utf-8")
    if added is not None:
        (folder / "added_tokens.json").write_text(json.dumps(added))
    return folder


def load(folder: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer is not None
    return tokenizer


def refused(folder: Path, *words: str) -> None:
    start = time.process_time()
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.from_folder(folder)
    for word in words:
        assert word in str(caught.value)
    assert time.process_time() - start < 2


def assert_same(a: Tokenizer, b: Tokenizer) -> None:
    """The same vocabulary in every respect that can be seen."""
    assert a.vocab_size == b.vocab_size
    assert [a.token_bytes(i) for i in range(a.vocab_size)] == [
        b.token_bytes(i) for i in range(b.vocab_size)
    ]
    assert a.eot_token_id == b.eot_token_id
    for text in ("", END_OF_TEXT, "the abab [PAD]", *ODD):
        for allow in (False, True):
            assert a.encode(text, allow_special=allow) == b.encode(text, allow_special=allow)


# --- Reading


def test_byte_table_is_the_published_one() -> None:
    assert len(set(BYTE_TO_SYMBOL)) == 256
    assert symbols(b"\x00\n a\x7f\xa0\xad\xff") == "ĀĊĠaġłŃÿ"
    assert gpt2_ranks()[b"!"] == 0


def test_ids_need_not_follow_the_merges(tmp_path: Path) -> None:
    vocab = vocabulary(SMALL)
    numbers = random.Random(0).sample(range(len(vocab)), len(vocab))
    shuffled = dict(zip(vocab, numbers, strict=True))
    tokenizer = load(write(tmp_path, shuffled, SMALL))
    assert tokenizer.encode("the the") == [shuffled["the"], shuffled["Ġthe"]]
    assert tokenizer.encode("ababab") == [shuffled["abab"], shuffled["ab"]]
    assert tokenizer.eot_token_id == shuffled[END_OF_TEXT]
    assert tokenizer.decode(tokenizer.encode("".join(ODD))) == "".join(ODD)


def test_builtin_vocabulary_equals_the_reference() -> None:
    tokenizer = load(BUILTIN)
    assert (tokenizer.vocab_size, tokenizer.eot_token_id) == (4096, 0)
    reference = reference_of(BUILTIN)
    draw = random.Random(10)
    for _ in range(3000):
        text = "".join(draw.choices(ODD, k=draw.randint(1, 24)))
        assert tokenizer.encode(text) == reference.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    long = "qwertyuiop" * 400
    assert tokenizer.encode(long) == reference.encode(long)


def reference_of(folder: Path) -> Reference:
    """Ids by the published algorithm from the files of `folder`, read here."""
    byte_of = {symbol: byte for byte, symbol in enumerate(BYTE_TO_SYMBOL)}

    def raw(name: str) -> bytes:
        return bytes(byte_of[symbol] for symbol in name)

    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    rules = [line.split(" ") for line in lines[1:] if line]
    pairs = {(raw(left), raw(right)): i for i, (left, right) in enumerate(rules)}
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    ids = {raw(name): i for name, i in vocab.items() if set(name) <= byte_of.keys()}
    return Reference(pairs, ids)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.replace(b"\n", b"\r\n"),
        lambda data: b"\xef\xbb\xbf" + data,
        lambda data: data.removesuffix(b"\n"),
        lambda data: data + b"\n\r\n\n",
        lambda data: data.removeprefix(b"#version: 0.2\n"),
        lambda data: b"\xef\xbb\xbf" + data.replace(b"\n", b"\r\n").removesuffix(b"\r\n"),
    ],
    ids=["crlf", "bom", "no last newline", "empty lines at the end", "no version", "all"],
)
def test_tolerated_forms_of_merges(tmp_path: Path, change: Any) -> None:
    merges = [("#", "#"), *SMALL]
    write(tmp_path, vocabulary(merges), merges)
    plain = load(tmp_path)
    assert len(plain.encode("##")) == 1
    path = tmp_path / "merges.txt"
    path.write_bytes(change(path.read_bytes()))
    vocab = tmp_path / "vocab.json"
    vocab.write_bytes(b"\xef\xbb\xbf" + vocab.read_bytes() + b"\r\n")
    assert_same(load(tmp_path), plain)


def test_names_of_openai_and_of_hugging_face(tmp_path: Path) -> None:
    assert Tokenizer.from_folder(tmp_path) is None
    assert Tokenizer.from_folder(tmp_path / "missing") is None
    write(tmp_path, vocabulary(SMALL), SMALL)
    plain = load(tmp_path)
    (tmp_path / "merges.txt").rename(tmp_path / "vocab.bpe")
    refused(tmp_path, "merges.txt")
    (tmp_path / "vocab.json").rename(tmp_path / "encoder.json")
    assert_same(load(tmp_path), plain)
    (tmp_path / "encoder.json").unlink()
    refused(tmp_path, "encoder.json")


def test_added_tokens(tmp_path: Path) -> None:
    """Tokens that no merge makes: plain text unless allowed, the longest first."""
    vocab = vocabulary(SMALL, (END_OF_TEXT, "[PAD]", "[PAD]x", "Ġfoo", "â", "▁bar"))
    size = len(vocab)
    tokenizer = load(write(tmp_path, vocab, SMALL, {"Ġliteral": size, "[PAD]": vocab["[PAD]"]}))
    text = f"[PAD]x[PAD]{END_OF_TEXT} foo▁barĠliteral"
    names = ("[PAD]x", "[PAD]", END_OF_TEXT, "Ġfoo", "▁bar")
    assert tokenizer.encode(text, allow_special=True) == [*(vocab[n] for n in names), size]
    assert not {*(vocab[n] for n in names), size} & set(tokenizer.encode(text))
    assert tokenizer.decode(tokenizer.encode(text, allow_special=True)) == text
    assert tokenizer.token_bytes(size) == "Ġliteral".encode()
    tokenizer.save(tmp_path / "again")
    assert_same(load(tmp_path / "again"), tokenizer)
    assert json.loads((tmp_path / "again" / "added_tokens.json").read_text()) == {"Ġliteral": size}


def test_missing_bytes_are_an_error_only_when_met(tmp_path: Path) -> None:
    names = [name for name in vocabulary(SMALL) if name not in "zÿ"]
    tokenizer = load(write(tmp_path, {name: i for i, name in enumerate(names)}, SMALL))
    assert tokenizer.decode(tokenizer.encode("the abab")) == "the abab"
    with pytest.raises(TokenizerError, match="no token for the byte 0x7a"):
        tokenizer.encode("crazy")
    with pytest.raises(TokenizerError, match="no token for the byte 0xff"):
        tokenizer.encode(b"\xff")


ALPHABET = "abc"
# acac is made by a merge that never happens (a cac) and by one that comes after (b acac).
AWKWARD = [("a", "a"), ("a", "c"), ("c", "ac"), ("a", "cac"), ("b", "acac"), ("ac", "ac")]


@st.composite
def any_merges(draw: st.DrawFn) -> Merges:
    """Merges nobody trained: dead ones, two for one token, in any order that names known parts."""
    known = list(ALPHABET)
    merges: dict[tuple[str, str], None] = {}
    for _ in range(draw(st.integers(0, 14))):
        left, right = draw(st.sampled_from(known)), draw(st.sampled_from(known))
        merges[left, right] = None
        known.append(left + right)
    return list(merges)


@settings(deadline=None, max_examples=150)
@given(any_merges(), st.lists(st.text(ALPHABET, min_size=1, max_size=40), min_size=1, max_size=12))
@example(AWKWARD, ["bacac"])
def test_any_merges_equal_the_reference(
    tmp_path_factory: pytest.TempPathFactory, merges: Merges, texts: list[str]
) -> None:
    """The engine merges by ranks of tokens; a file lists pairs. Both must come to the same."""
    folder = write(tmp_path_factory.mktemp("v"), vocabulary(merges), merges)
    tokenizer, reference = load(folder), reference_of(folder)
    for text in texts:
        piece = text.encode()
        wanted = [reference.ids[token] for token in heap_merge(piece, reference.pairs)]
        assert tokenizer.encode(text) == wanted
        assert tokenizer._make_engine()._merge_long(piece * 30) == [
            tokenizer._vocabulary.ranks[token] for token in heap_merge(piece * 30, reference.pairs)
        ]


@settings(deadline=None, max_examples=100)
@given(any_merges(), st.lists(st.text(ALPHABET, min_size=1, max_size=40), min_size=1, max_size=12))
@example(AWKWARD, ["bacac"])
def test_any_merges_equal_tokenizers(
    tmp_path_factory: pytest.TempPathFactory, merges: Merges, texts: list[str]
) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    vocab = vocabulary(merges)
    ours = load(write(tmp_path_factory.mktemp("v"), vocab, merges))
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    for text in texts:
        assert ours.encode(text) == theirs.encode(text).ids


def test_dead_merges_never_happen(tmp_path: Path) -> None:
    # xybc: bc comes first, so (xyb, c) never meets its parts and xy + bc is no pair of the list.
    merges = [("b", "c"), ("x", "y"), ("xy", "b"), ("xyb", "c")]
    vocab = vocabulary(merges)
    tokenizer = load(write(tmp_path, vocab, merges))
    assert tokenizer.encode("xybc") == [vocab["xy"], vocab["bc"]]
    assert tokenizer.encode("xybc", allow_special=True) == [vocab["xy"], vocab["bc"]]
    assert tokenizer.decode([vocab["xybc"]]) == "xybc"


# --- Writing, and what transformers makes of it


def test_gpt2_is_saved_as_openai_published_it(tmp_path: Path) -> None:
    Tokenizer.gpt2().save(tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    assert sorted(path.name for path in folder.iterdir()) == ["merges.txt", "vocab.json"]
    digests = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}
    assert digests == {
        "vocab.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
        "merges.txt": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    }
    assert_same(load(folder), Tokenizer.gpt2())
    assert load(folder)._vocabulary.rank_ids is None
    assert load(folder)._vocabulary.merges is None  # the table of the wheel, nothing was parsed


def test_gpt2_written_otherwise_is_parsed_and_is_the_same(tmp_path: Path) -> None:
    Tokenizer.gpt2().save(tmp_path)
    merges = tmp_path / "merges.txt"
    merges.write_bytes(merges.read_bytes().removeprefix(b"#version: 0.2\n"))
    parsed = load(tmp_path)
    assert parsed._vocabulary.merges == derive_merges(Tokenizer.gpt2()._vocabulary.ranks)
    assert_same(parsed, Tokenizer.gpt2())
    assert parsed._vocabulary.rank_ids is None


def test_gpt2_merges_follow_from_its_ranks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    merges = derive_merges(Tokenizer.gpt2()._vocabulary.ranks)
    assert list(merges) == list(gpt2_merges())
    Tokenizer.gpt2().save(tmp_path)
    known = load(tmp_path)
    monkeypatch.setattr("gpt2_fast.tokenizer_files.GPT2_MERGES", (0, 0))
    assert load(tmp_path)._vocabulary == known._vocabulary  # the check agrees: every merge is live


def test_ranks_that_no_merges_make() -> None:
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"abc": 256}
    with pytest.raises(TokenizerError, match="no merge makes the token 'abc'"):
        derive_merges(ranks)


def test_saving_replaces_whole_files(tmp_path: Path) -> None:
    small = load(write(tmp_path, vocabulary(SMALL), SMALL))
    (tmp_path / "added_tokens.json").write_text('{"stale": 9999}')
    small.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merges.txt", "vocab.json"]
    assert_same(load(tmp_path), small)
    assert (tmp_path / "vocab.json").stat().st_mode & 0o777 == 0o644


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = load(write(tmp_path, vocabulary(SMALL), SMALL))
    before = (tmp_path / "vocab.json").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        small.save(tmp_path)
    assert (tmp_path / "vocab.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merges.txt", "vocab.json"]


@pytest.fixture(scope="module", params=["gpt2", "builtin", "added"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A saved vocabulary as we load it and as transformers does."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "gpt2":
        Tokenizer.gpt2().save(folder)
    elif request.param == "builtin":
        load(BUILTIN).save(folder)
    else:
        write(folder, (v := vocabulary(SMALL)), SMALL, {"[PAD]": len(v), "▁x": len(v) + 1})
        load(folder).save(folder)
    return load(folder), transformers.GPT2TokenizerFast.from_pretrained(folder)


def test_transformers_gives_equal_ids(both: Any) -> None:
    """20,000 odd strings; transformers reads special text as special, so we are allowed to."""
    ours, theirs = both
    draw = random.Random(11)
    texts = ["".join(draw.choices(ODD, k=draw.randint(1, 24))) for _ in range(20_000)]
    wanted = theirs(texts)["input_ids"]
    wrong = [
        text
        for text, ids in zip(texts, wanted, strict=True)
        if ours.encode(text, allow_special=True) != ids
    ]
    assert wrong == []
    assert len(theirs) == ours.vocab_size
    for text, ids in zip(texts[:500], wanted, strict=False):
        assert theirs.decode(ids, clean_up_tokenization_spaces=False) == ours.decode(ids) == text


# --- Everything that can be wrong with the files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path, vocabulary(SMALL), SMALL)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["JSON"]),
        (b"{", ["JSON"]),
        (b'{"a": 0,}', ["JSON"]),
        (b"[]", ["an object", "list"]),
        (b"5", ["an object", "int"]),
        (b"null", ["an object"]),
        (b"{}", ["no tokens"]),
        (b'{"a": 0, "b": 1, "a": 2}', ["'a'", "twice"]),
        (b'{"a": "0"}', ["'a'", "'0'", "integer"]),
        (b'{"a": 0.0}', ["'a'", "0.0", "integer"]),
        (b'{"a": true}', ["'a'", "True", "integer"]),
        (b'{"a": null}', ["'a'", "None", "integer"]),
        (b'{"a": NaN}', ["'a'", "nan", "integer"]),
        (b'{"a": {"b": 0}}', ["'a'", "integer"]),
        (b'{"a": -1}', ["'a'", "-1"]),
        (b'{"a": 0, "b": 2}', ["'b'", "id 2", "id 1 is missing"]),
        (b'{"a": 0, "b": 0}', ["'a'", "'b'", "same id 0"]),
        (b'{"a": 1' + b"0" * 9000 + b"}", []),
        (b'{"": 0}', ["empty"]),
        (b'{"\\ud800": 0}', ["Unicode"]),
        (b'{"a\xff": 0}', ["UTF-8", "byte 3"]),
        ('{"a": 0}'.encode("utf-16"), ["UTF-8"]),
        (b"[" * 200_000, []),
        (b'{"a":' * 200_000, []),
        (b'{"a": 0} {"b": 1}', ["JSON"]),
    ],
)
def test_malformed_vocabularies(folder: Path, content: bytes, words: list[str]) -> None:
    (folder / "vocab.json").write_bytes(content)
    refused(folder, "vocab.json", *words)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("t h\nt h\n", ["merge 2", "merge 1"]),
        ("t h e\n", ["merge 1", "two tokens"]),
        ("th\n", ["merge 1", "two tokens"]),
        (" h\n", ["merge 1", "two tokens"]),
        ("t \n", ["merge 1", "two tokens"]),
        ("t  h\n", ["merge 1", "two tokens"]),
        ("t\th\n", ["merge 1", "two tokens"]),
        ("t h\n\nth e\n", ["merge 2", "two tokens"]),
        ("th e\nt h\n", ["merge 1", "'th'", "earlier merge"]),
        ("t ▁\n", ["merge 1", "'▁'"]),
        ("q q\n", ["merge 1", "'qq'", "vocab.json"]),
        ("t h\n#version: 0.2\n", ["merge 2"]),
        ("t h\r\rth e\n", ["merge 1"]),
        ("t h\x85th e\n", ["merge 1"]),
        ("<|endoftext|> t\n", ["merge 1", END_OF_TEXT]),
    ],
)
def test_malformed_merges(folder: Path, lines: str, words: list[str]) -> None:
    (folder / "merges.txt").write_bytes(("#version: 0.2\n" + lines).encode())
    refused(folder, "merges.txt", *words)


def test_malformed_added_tokens(folder: Path) -> None:
    size = len(vocabulary(SMALL))
    for content, words in (
        ("[]", ["added_tokens.json", "object"]),
        (f'{{"[PAD]": {size + 1}}}', ["[PAD]", f"id {size} is missing"]),
        ('{"[PAD]": 3}', ["[PAD]", "same id 3"]),
        (f'{{"{END_OF_TEXT}": 3}}', ["added_tokens.json", END_OF_TEXT, "id 3", "gives it 0"]),
    ):
        (folder / "added_tokens.json").write_text(content)
        refused(folder, *words)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_files_that_are_no_files(folder: Path, name: str) -> None:
    path = folder / name
    with path.open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    refused(folder, name, str(MAX_FILE_BYTES))
    path.unlink()
    os.mkfifo(path)
    refused(folder, name, "regular file")
    path.unlink()
    path.symlink_to("/dev/zero")
    refused(folder, name, "regular file")
    path.unlink()
    path.mkdir()
    refused(folder, name)
    path.rmdir()
    path.write_bytes(b"\xff\xfe")
    refused(folder, name, "UTF-8")
    path.unlink()
    with pytest.raises(TokenizerError, match=name):
        Tokenizer.from_files(folder / "vocab.json", folder / "merges.txt")
    with pytest.raises(TokenizerError, match="cannot read"):
        Tokenizer.from_files(folder / "a\0b", folder / "merges.txt")


def test_many_lines_are_refused_early(folder: Path) -> None:
    (folder / "merges.txt").write_bytes(b"t h\n" * 10_000_000)
    refused(folder, "merge 2")


def test_tokens_of_megabytes_are_refused(folder: Path) -> None:
    merges = [("a" * (1 << i), "a" * (1 << i)) for i in range(20)]
    write(folder, vocabulary(merges), merges)
    refused(folder, "merges.txt", "too long")


def test_damaged_package_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "gpt2.tiktoken").write_bytes(b"IQ== 0\n")
    monkeypatch.setattr("gpt2_fast.tokenizer_files.__file__", str(tmp_path / "module.py"))
    monkeypatch.setattr(Tokenizer, "_gpt2", None)
    with pytest.raises(TokenizerError, match=r"gpt2\.tiktoken.*damaged"):
        Tokenizer.gpt2()


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_any_damage_is_a_typed_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Flip, drop or insert bytes: a working tokenizer or a TokenizerError, nothing else."""
    folder = write(tmp_path_factory.mktemp("d"), vocabulary(SMALL), SMALL, {"[PAD]": 262})
    path = folder / data.draw(st.sampled_from(["vocab.json", "merges.txt", "added_tokens.json"]))
    content = path.read_bytes()
    start = data.draw(st.integers(0, len(content)))
    end = data.draw(st.integers(start, min(len(content), start + 8)))
    path.write_bytes(content[:start] + data.draw(st.binary(max_size=6)) + content[end:])
    tokenizer = None
    with suppress(TokenizerError):
        tokenizer = load(folder)
    if tokenizer is not None:
        with suppress(TokenizerError):  # a byte of the text may have lost its token
            ids = tokenizer.encode("the abab [PAD]", allow_special=data.draw(st.booleans()))
            assert tokenizer.decode(ids) == "the abab [PAD]"


def test_pieces_of_the_published_expression() -> None:
    """The reference itself, on what the expression is known for."""
    assert PUBLISHED.findall("I'll  go\n\n  x's 12a") == [
        *["I", "'ll", " ", " go", "\n\n ", " x", "'s", " 12", "a"]
    ]
