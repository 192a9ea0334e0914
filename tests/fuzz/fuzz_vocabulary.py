"""Fuzzer of vocabularies: vocab.json, merges.txt, added_tokens.json; encoder.json, vocab.bpe.

python tests/fuzz/fuzz_vocabulary.py --seconds 600
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from gpt2_fast.errors import TokenizerError
from gpt2_fast.tokenizer import Tokenizer
from tests.fuzz.harness import Target, main

NAMES = ["h", "u", "g", "s", "\u0120", "\u00c3", "\u00a9", "hu", "hug", "\u0120hug", "\u00c3\u00a9"]
MERGES = "h u\nhu g\n\u0120 hug\n\u00c3 \u00a9\n"
TEXT = "hugs hug\u00e9 <|endoftext|>"

DICTIONARY = [
    *[b'{"', b'"}', b"{}", b"[]", b"null", b"true", b"1e999", b"NaN", b'"', b",", b":", b"\\"],
    *[b"\\ud800", b"\\u0000", b"\xef\xbb\xbf", b"\xc0\x80", b"\xed\xa0\x80", b"\r\n", b"\r", b" "],
    *[b"#version: 0.2\n", b"hu g\n", b"h u\n", b"u g\n", b"h ug\n", b'"hu":', b"<|endoftext|>"],
    *[b"\xc4\xa0", b"\xe2\x80\xa8", b"\x0c", b"-0", b"0.", b"9" * 5000],
]


def open_vocabulary(folder: Path) -> None:
    """Read a folder, use every token, and read back what is written."""
    tokenizer = Tokenizer.from_folder(folder)
    if tokenizer is None:
        return
    tokens = [tokenizer.token_bytes(number) for number in range(tokenizer.vocab_size)]
    for special in (False, True):
        try:
            ids = tokenizer.encode(TEXT, allow_special=special)
        except TokenizerError:
            continue  # the vocabulary lacks a byte of it
        if tokenizer.decode(ids) != TEXT:
            raise AssertionError(f"{TEXT!r} came back as {tokenizer.decode(ids)!r}")
    tokenizer.save(folder)
    again = Tokenizer.from_folder(folder)
    if again is None or [again.token_bytes(number) for number in range(again.vocab_size)] != tokens:
        raise AssertionError("what was written is not what was read")


def seeds() -> list[dict[str, bytes]]:
    """The same small vocabulary as Hugging Face and as OpenAI name the files."""
    ids = {name: number for number, name in enumerate([*NAMES, "<|endoftext|>"])}
    text = json.dumps(ids, ensure_ascii=False).encode()
    merges = ("#version: 0.2\n" + MERGES).encode()
    added = json.dumps({"<|user|>": len(ids)}).encode()
    return [
        {"vocab.json": text, "merges.txt": merges, "added_tokens.json": added},
        {"encoder.json": json.dumps(ids).encode(), "vocab.bpe": merges},
    ]


def target() -> Target:
    """What to fuzz."""
    return Target(seeds(), open_vocabulary, DICTIONARY, refusal=TokenizerError)


if __name__ == "__main__":
    sys.exit(main(target()))
