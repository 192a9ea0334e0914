"""GPT-2's tokenizer: byte-level byte-pair encoding, any vocabulary of its kind, no network.

Encoding loses nothing: `decode(encode(text)) == text` for every text, and the same for bytes.
Text is never read as a special token unless asked. Rules and sources: docs/tokenizer.md.
"""

from __future__ import annotations

import codecs
import operator
import re
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, SupportsIndex

from gpt2_fast.errors import ParameterError, TokenizerError
from gpt2_fast.tokenizer_files import (
    END_OF_TEXT,
    Vocabulary,
    read_gpt2,
    read_vocabulary,
    write_vocabulary,
)

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable

    from gpt2_fast.tokenizer_engine import Engine

_LOCK = Lock()  # guards what is made on first use: the shared GPT-2 tokenizer and the engines
_FILE_PAIRS = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))


class Tokenizer:
    """Text to token ids and back. Immutable, safe to share between threads.

    Made by `gpt2()`, `from_files()` or `from_folder()`. The engine (tiktoken) is imported by the
    first `encode`; decoding never needs it.
    """

    _gpt2: Tokenizer | None = None

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._tokens = vocabulary.tokens
        self._engine: Engine | None = None
        texts = sorted(vocabulary.added, key=len, reverse=True)  # the longest match wins
        self._added_pattern = re.compile(f"({'|'.join(map(re.escape, texts))})") if texts else None

    @classmethod
    def gpt2(cls) -> Tokenizer:
        """The tokenizer of all published GPT-2 models: 50,257 tokens, from this package."""
        with _LOCK:
            if Tokenizer._gpt2 is None:
                Tokenizer._gpt2 = Tokenizer(read_gpt2())
            return Tokenizer._gpt2

    @classmethod
    def from_files(
        cls,
        vocab_json: str | os.PathLike[str],
        merges_txt: str | os.PathLike[str],
        added_tokens_json: str | os.PathLike[str] | None = None,
    ) -> Tokenizer:
        """A tokenizer from vocab.json and merges.txt (OpenAI: encoder.json and vocab.bpe).

        Raises TokenizerError, with file and line or entry, for anything malformed.
        """
        added = Path(added_tokens_json) if added_tokens_json is not None else None
        return cls(read_vocabulary(Path(vocab_json), Path(merges_txt), added))

    @classmethod
    def from_folder(cls, path: str | os.PathLike[str]) -> Tokenizer | None:
        """The tokenizer of a model folder, None if it has no vocabulary files.

        Looks for vocab.json, merges.txt and perhaps added_tokens.json, then for encoder.json and
        vocab.bpe. Raises TokenizerError if one file of a pair is missing or a file is malformed.
        """
        folder = Path(path)
        half = ""
        for vocab, merges in _FILE_PAIRS:
            present = [name for name in (vocab, merges) if (folder / name).exists()]
            if len(present) == 2:
                added = folder / "added_tokens.json"
                use_added = vocab == "vocab.json" and added.exists()
                return cls.from_files(folder / vocab, folder / merges, added if use_added else None)
            if present:
                half = half or f"{folder}: has {present[0]}, but of {vocab} and {merges} both count"
        if half:
            raise TokenizerError(half)
        return None

    @property
    def vocab_size(self) -> int:
        """Number of tokens; ids are 0..vocab_size-1."""
        return len(self._tokens)

    @property
    def eot_token_id(self) -> int | None:
        """Id of `<|endoftext|>`, None if the vocabulary has no such token."""
        return self._vocabulary.added.get(END_OF_TEXT)

    def encode(self, text: str | bytes, *, allow_special: bool = False) -> list[int]:
        """Token ids of `text`.

        `<|endoftext|>` and other added tokens in `text` are plain text; with allow_special they
        become their one id. Bytes may be any bytes: stretches of valid UTF-8 are encoded each as
        text of its own, and each run of bytes between them as one piece.

        Raises ParameterError if `text` is neither str nor bytes, and TokenizerError if a str has a
        lone surrogate (it has no UTF-8) or the vocabulary lacks a byte of `text`.
        """
        valid, escaped = _as_text(text)
        if not allow_special or self._added_pattern is None:
            return self._encode_plain(valid, escaped=escaped)
        ids: list[int] = []
        for i, part in enumerate(self._added_pattern.split(valid)):
            if i % 2:
                ids.append(self._vocabulary.added[part])
            elif part:
                ids += self._encode_plain(part, escaped=escaped)
        return ids

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD as `bytes.decode` replaces them.

        Raises ParameterError, with the position, for anything but integers in 0..vocab_size-1.
        """
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[SupportsIndex]) -> bytes:
        """Bytes of `ids`, exactly. Raises ParameterError as `decode` does."""
        return b"".join(map(self._tokens.__getitem__, _checked_ids(ids, len(self._tokens))))

    def token_bytes(self, token_id: SupportsIndex) -> bytes:
        """Bytes of one token, which need not be whole characters. Raises ParameterError."""
        return self._tokens[_checked_id(token_id, len(self._tokens), "token_id")]

    def make_ready(self) -> None:
        """Make what the first `encode` would else make."""
        self._make_engine()

    def stream_decoder(self) -> StreamDecoder:
        """A decoder for ids that come one by one."""
        return StreamDecoder(self)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes vocab.json and merges.txt (and added_tokens.json if it was read) into `folder`.

        transformers' GPT2Tokenizer and `from_folder` load them with equal ids. Raises OSError.
        """
        write_vocabulary(Path(folder), self._vocabulary)

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, eot_token_id={self.eot_token_id})"

    def _encode_plain(self, text: str, *, escaped: bool) -> list[int]:
        engine = self._engine or self._make_engine()
        ranks = engine.encode_escaped(text) if escaped else engine.encode(text)
        rank_ids = self._vocabulary.rank_ids
        if rank_ids is None:
            return ranks
        ids = list(map(rank_ids.__getitem__, ranks))
        if -1 in ids:
            byte = engine.bytes_of(ranks[ids.index(-1)]).hex()
            raise TokenizerError(f"text: the vocabulary has no token for the byte 0x{byte}")
        return ids

    def _make_engine(self) -> Engine:
        from gpt2_fast.tokenizer_engine import Engine

        with _LOCK:
            if self._engine is None:
                self._engine = Engine(self._vocabulary)
            return self._engine


class StreamDecoder:
    """Text of ids that come one by one: only whole characters, nothing lost.

    The parts of `push` and `finish` together are `Tokenizer.decode` of all ids: a character whose
    bytes are spread over tokens comes with the last of them, invalid bytes as U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: SupportsIndex) -> str:
        """The characters that `token_id` completes, perhaps none. Raises ParameterError."""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        """What an unfinished character at the end decodes to; the decoder then starts anew."""
        return self._decoder.decode(b"", final=True)


def _as_text(text: str | bytes) -> tuple[str, bool]:
    """`text` as str, and whether it has bytes that are not UTF-8, escaped as U+DC80..U+DCFF."""
    if isinstance(text, str):
        try:
            if not text.isascii():
                text.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"text: lone surrogate U+{ord(text[error.start]):04X} at character {error.start}; "
                "wanted Unicode text, or bytes for anything else"
            ) from error
        return text, False
    if not isinstance(text, (bytes, bytearray)):
        raise ParameterError(f"text: wanted str or bytes, found {type(text).__name__}")
    try:
        return text.decode(), False
    except UnicodeDecodeError:
        return text.decode("utf-8", "surrogateescape"), True


def _checked_ids(ids: Iterable[SupportsIndex], size: int) -> list[int]:
    wanted = "wanted a flat sequence of integers"
    if isinstance(ids, (str, bytes, bytearray)):
        raise ParameterError(f"ids: {wanted}, found {type(ids).__name__}")
    if getattr(ids, "ndim", 1) != 1:
        raise ParameterError(f"ids: {wanted}, found an array of shape {getattr(ids, 'shape', '?')}")
    to_list = getattr(ids, "tolist", None)  # numpy and torch: one call instead of one object an id
    try:
        values = list(ids if to_list is None else to_list())
    except TypeError as error:
        raise ParameterError(f"ids: {wanted}, found {type(ids).__name__}") from error
    if set(map(type, values)) <= {int} and (not values or 0 <= min(values) <= max(values) < size):
        return values
    return [_checked_id(value, size, f"ids[{i}]") for i, value in enumerate(values)]


def _checked_id(value: SupportsIndex, size: int, name: str) -> int:
    # Booleans of every library have an index, and arrays of one element may.
    boolean = isinstance(value, bool) or "bool" in str(getattr(value, "dtype", ""))
    array = getattr(value, "shape", ()) != ()
    try:
        number = -1 if boolean or array else operator.index(value)
    except TypeError:
        number = -1
    if not 0 <= number < size:
        raise ParameterError(f"{name}: wanted an integer in 0..{size - 1}, found {value!r:.80}")
    return number
