"""A short run of the fuzzer of vocabularies, what it has found, and proof that it finds faults."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from gpt2_fast import tokenizer_files
from gpt2_fast.errors import TokenizerError
from gpt2_fast.tokenizer import Tokenizer
from tests.fuzz import fuzz_vocabulary
from tests.fuzz.fuzz_support import findings, short_run


def test_ten_seconds_find_nothing(tmp_path: Path) -> None:
    short_run(fuzz_vocabulary, tmp_path)


def unchecked_text(path: Path) -> str:
    """Files may be in any encoding."""
    return path.read_text(encoding="utf-8-sig")


def unchecked_names(ids: dict[str, int], label: str) -> tuple[str, ...]:
    """Ids may be any numbers."""
    return tuple(sorted(ids, key=ids.__getitem__))


def unchecked_merges(merges: Any, ids: dict[str, int], label: str, vocab_label: str) -> Any:
    """Merges may be of any tokens."""
    pairs = (line.partition(" ")[::2] for line in merges)
    return tuple((left.encode("latin-1"), right.encode("latin-1")) for left, right in pairs)


@pytest.mark.parametrize(
    ("name", "fault", "wanted"),
    [
        ("_read_text", unchecked_text, "UnicodeDecodeError"),
        ("_names_by_id", unchecked_names, "Error: "),
        ("_parse_merges", unchecked_merges, "Error: "),
    ],
)
def test_a_planted_fault_is_found(
    name: str,
    fault: Any,
    wanted: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    target = fuzz_vocabulary.target()
    monkeypatch.setattr(tokenizer_files, name, fault)
    assert findings(target, tmp_path) == 1
    assert wanted in capsys.readouterr().err


def folder_with(tmp_path: Path, **changes: object) -> Path:
    files = dict(fuzz_vocabulary.seeds()[0])
    files |= {f"{name}.json": json.dumps(value).encode() for name, value in changes.items()}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def test_an_added_token_is_no_byte(tmp_path: Path) -> None:
    """Found by the fuzzer: a space was encoded as the added token that is the letter U+0120."""
    names = [name for name in fuzz_vocabulary.NAMES if not name.startswith("\u0120")]
    (tmp_path / "merges.txt").write_text("h u\n")
    (tmp_path / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"\u0120": len(names)}))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer is not None
    assert tokenizer.encode("\u0120", allow_special=True) == [len(names)]
    with pytest.raises(TokenizerError, match="0x20"):
        tokenizer.encode(" ")


def test_an_added_token_is_made_by_no_merge(tmp_path: Path) -> None:
    """Found by the fuzzer: merged text came back as the letters of the token's name."""
    names = [name for name in fuzz_vocabulary.NAMES if name != "\u0120hug"]
    ids = {name: number for number, name in enumerate(names)}
    folder = folder_with(tmp_path, vocab=ids, added_tokens={"\u0120hug": len(ids)})
    with pytest.raises(TokenizerError, match=r"merge 3 .* is not in vocab\.json"):
        Tokenizer.from_folder(folder)


def test_small_files_take_little_memory(tmp_path: Path) -> None:
    """Found by the fuzzer: 64 MB for every file, whatever its size."""
    folder = folder_with(tmp_path)
    tracemalloc.start()
    try:
        Tokenizer.from_folder(folder)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
