"""Vocabulary files: the GPT-2 table of the wheel, and vocab.json with merges.txt, read and written.

vocab.json (OpenAI: encoder.json) is an object from token to id. A token is written with one
character per byte: printable Latin-1 characters stand for themselves, the other 68 bytes for
U+0100 onwards in byte order. merges.txt (vocab.bpe) has a merge a line, two tokens with a space
between, the first merging first, after an optional line `#version: ...`. added_tokens.json maps
literal text to further ids. A byte order mark, CRLF and a missing last newline are accepted.

Every fault is a `TokenizerError` that names the file and the line or entry. Nothing over 64 MB
is read. Source: OpenAI's gpt-2 release (src/encoder.py) describes the format.
"""

from __future__ import annotations

import binascii
import io
import json
import os
import stat
import sys
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, compress, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from gpt2_fast._C import read_tokens
from gpt2_fast.errors import TokenizerError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

MAX_FILE_BYTES = 64 << 20
END_OF_TEXT = "<|endoftext|>"
# Size and CRC-32 of files and texts that are known byte for byte. Against damage and for telling
# GPT-2's files from others that is enough; importing hashlib would delay the first token.
GPT2_TABLE = (835_554, 0xB23BC7C5)  # the wheel's gpt2.tiktoken
# OpenAI's encoder.json and vocab.bpe; vocab.json and merges.txt on the hub are the same.
GPT2_FILES = ((1_042_301, 0x6E35860C), (456_318, 0xCF4B72C4))
GPT2_MERGES = (456_304, 0x379EA84B)  # "left right\n" a merge: vocab.bpe without its first line

# Checking merges takes time in the square of a token's length; GPT-2's squares sum to 2.5 million.
MAX_SQUARED_LENGTHS = 1 << 27

Pair = tuple[bytes, bytes]


def _byte_symbols() -> tuple[str, ...]:
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    shifted = iter(range(0x100, 0x200))
    return tuple(chr(byte if byte in printable else next(shifted)) for byte in range(256))


BYTE_TO_SYMBOL = _byte_symbols()
SYMBOL_TO_BYTE = {symbol: byte for byte, symbol in enumerate(BYTE_TO_SYMBOL)}


@dataclass(frozen=True)
class Vocabulary:
    """A checked vocabulary of V tokens.

    tokens    (V) the bytes of each id
    stored_names, stored_ranks   `names` and `ranks` where they do not follow from the rest
    rank_ids  id of each rank, -1 where there is none; None: rank and id are the same
    merges    every merge in order, None: as `ranks` implies (see `derive_merges`)
    added     text to id, for tokens that no merge makes
    literal   ids that came from added_tokens.json
    """

    tokens: tuple[bytes, ...]
    stored_names: tuple[str, ...] | None
    stored_ranks: Mapping[bytes, int] | None
    rank_ids: tuple[int, ...] | None
    merges: tuple[Pair, ...] | None
    added: Mapping[str, int]
    literal: frozenset[int]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """(V) the name of each id, as vocab.json or added_tokens.json writes it."""
        if self.stored_names is not None:
            return self.stored_names
        texts = {number: text for text, number in self.added.items()}
        return tuple(texts.get(i) or symbols(token) for i, token in enumerate(self.tokens))

    @cached_property
    def ranks(self) -> Mapping[bytes, int]:
        """Bytes to rank, for `tokenizer_engine.Engine`: 256 bytes, then what merges make."""
        if self.stored_ranks is not None:
            return self.stored_ranks
        added = self.added.values()
        return {token: i for i, token in enumerate(self.tokens) if i not in added}

    def ranks_within(self, pieces: Iterable[bytes]) -> Mapping[bytes, int]:
        """`ranks` of the tokens that `pieces` contain: all that merging these can ask for.

        Much less work than `ranks` where these were not needed before.
        """
        if self.stored_ranks is not None:
            return self.stored_ranks
        parts = {
            piece[start:end]
            for piece in pieces
            for start, end in combinations(range(len(piece) + 1), 2)
        }
        wanted = compress(enumerate(self.tokens), map(parts.__contains__, self.tokens))
        added = self.added.values()
        return {token: i for i, token in wanted if i not in added}


def _mark(data: bytes) -> tuple[int, int]:
    """Size and CRC-32."""
    return len(data), binascii.crc32(data)


def read_gpt2() -> Vocabulary:
    """The vocabulary of GPT-2 from the wheel: 50,256 ranks and `<|endoftext|>`, id 50256."""
    path = Path(__file__).with_name("data") / "gpt2.tiktoken"
    data = _read_bytes(path, path.name)
    if _mark(data) != GPT2_TABLE:
        raise TokenizerError(f"{path}: the file is damaged: its size or CRC-32 is not GPT-2's")
    tokens = read_tokens(data)
    return Vocabulary(
        tokens=(*tokens, END_OF_TEXT.encode()),
        stored_names=None,
        stored_ranks=None,
        rank_ids=None,
        merges=None,
        added={END_OF_TEXT: len(tokens)},
        literal=frozenset(),
    )


def read_vocabulary(vocab: Path, merges: Path, added: Path | None = None) -> Vocabulary:
    """Reads and checks vocab.json, merges.txt and, where given, added_tokens.json.

    Ids must be 0..V-1, each once, over vocab.json and added_tokens.json together. A merge joins
    two tokens that are single bytes or made by earlier merges, and makes a token of vocab.json.
    A token that no merge makes is an added token; a missing single byte is accepted here.

    Files that are GPT-2's byte for byte become the table of the wheel: 0.1 s instead of 0.7 s.
    """
    if added is None and all(
        _mark(_read_bytes(path, path.name)) == known
        for path, known in zip((vocab, merges), GPT2_FILES, strict=True)
    ):
        return read_gpt2()
    ids = _read_ids(vocab)
    plain = ids.copy()  # added_tokens.json holds texts: "\u0120" there is that letter, not a space
    literal = _add_ids(ids, vocab.name, added) if added is not None else set()
    names = _names_by_id(ids, vocab.name)
    pairs = _parse_merges(_merge_lines(merges), plain, merges.name, vocab.name)
    tokens = tuple(name.encode() if name in literal else _token_bytes(name) for name in names)
    single = sorted(
        ((plain.get(symbol, len(names)), byte) for byte, symbol in enumerate(BYTE_TO_SYMBOL))
    )
    ranks = {bytes([byte]): rank for rank, (_, byte) in enumerate(single)}
    rank_ids = [number if number < len(names) else -1 for number, _ in single]
    rank_ids += [plain[symbols(left) + symbols(right)] for left, right in pairs]
    made = {number for number in rank_ids if number >= 0}
    if _mark(_merge_text(pairs).encode()) == GPT2_MERGES:
        ranks.update((left + right, 256 + i) for i, (left, right) in enumerate(pairs))
    else:
        squares = sum((len(left) + len(right)) ** 2 for left, right in pairs)
        if squares > MAX_SQUARED_LENGTHS:
            raise TokenizerError(
                f"{merges.name}: tokens too long: the squares of their lengths sum to {squares}, "
                f"at most {MAX_SQUARED_LENGTHS} are read"
            )
        _add_live_merges(ranks, pairs)
    return Vocabulary(
        tokens=tokens,
        stored_names=names,
        stored_ranks=ranks,
        rank_ids=None if rank_ids == list(range(len(rank_ids))) else tuple(rank_ids),
        merges=pairs,
        added=_added_texts(tokens, made),
        literal=frozenset(ids[name] for name in literal),
    )


def write_vocabulary(folder: Path, vocabulary: Vocabulary) -> None:
    """Writes vocab.json, merges.txt and, where there are any, added_tokens.json into `folder`.

    Each file is written beside its place and renamed, so a reader finds the old one or the new
    one. An added_tokens.json that does not belong to this vocabulary is removed. For GPT-2 the two
    are OpenAI's encoder.json and vocab.bpe, byte for byte. Raises OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    merges = vocabulary.merges
    if merges is None:
        merges = derive_merges(vocabulary.ranks)
    plain: dict[str, int] = {}
    literal: dict[str, int] = {}
    for number, name in enumerate(vocabulary.names):
        (literal if number in vocabulary.literal else plain)[name] = number
    _replace(folder / "vocab.json", json.dumps(plain))
    _replace(folder / "merges.txt", "#version: 0.2\n" + _merge_text(merges))
    if literal:
        _replace(folder / "added_tokens.json", json.dumps(literal))
    else:
        (folder / "added_tokens.json").unlink(missing_ok=True)


def symbols(token: bytes) -> str:
    """`token` as vocab.json and merges.txt write it, one character a byte."""
    return "".join(map(BYTE_TO_SYMBOL.__getitem__, token))


def _merge_text(merges: Iterable[Pair]) -> str:
    return "".join(f"{symbols(left)} {symbols(right)}\n" for left, right in merges)


def derive_merges(ranks: Mapping[bytes, int]) -> tuple[Pair, ...]:
    """The merges, in order, that `ranks` implies: what each token's bytes are one merge before it.

    Raises TokenizerError for a token that merging its bytes never makes.
    """
    pairs: dict[Pair, int] = {}
    for token in sorted(ranks, key=ranks.__getitem__):
        if len(token) > 1:
            parts, _ = _merge(token, pairs)
            if len(parts) != 2:
                raise TokenizerError(f"no merge makes the token {symbols(token)!r}")
            pairs[parts[0], parts[1]] = ranks[token]
    return tuple(pairs)


def _add_live_merges(ranks: dict[bytes, int], pairs: Iterable[Pair]) -> None:
    """Adds to `ranks` the tokens that merging makes; merge i has rank 256 + i.

    A merge is live if it is the last one when its token's bytes are merged. Merges of a trained
    vocabulary all are. Others never happen in any text: a token in a text is merged from its bytes
    alone, as if they stood alone. With the others left out, "any two neighbours whose bytes
    together have a rank" (the engine's rule) and "any pair in the list" are the same.
    """
    by_pair = {pair: rank for rank, pair in enumerate(pairs, start=256)}
    for token in {left + right for left, right in by_pair}:
        parts, last = _merge(token, by_pair)
        if len(parts) == 1:
            ranks[token] = last


def _merge(token: bytes, pairs: Mapping[Pair, int]) -> tuple[list[bytes], int]:
    """`token` merged from single bytes, and the rank of the last merge (-1 if there was none).

    The pair of lowest rank first, the leftmost of equals.
    """
    none = sys.maxsize
    last = -1
    parts = [token[i : i + 1] for i in range(len(token))]
    ranks = [pairs.get(pair, none) for pair in pairwise(parts)]
    while ranks and (best := min(ranks)) != none:
        at = ranks.index(best)
        last = best
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
        del ranks[at]
        if at > 0:
            ranks[at - 1] = pairs.get((parts[at - 1], parts[at]), none)
        if at < len(ranks):
            ranks[at] = pairs.get((parts[at], parts[at + 1]), none)
    return parts, last


def _read_ids(path: Path) -> dict[str, int]:
    """The object of token names and ids in `path`."""
    text = _read_text(path)

    def unique(items: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(items)
        if len(found) != len(items):
            counts = Counter(name for name, _ in items)
            raise TokenizerError(f"{path.name}: {counts.most_common(1)[0][0]!r} is there twice")
        return found

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except RecursionError as error:
        raise TokenizerError(f"{path.name}: nested too deeply, wanted one flat object") from error
    except TokenizerError:
        raise
    except ValueError as error:
        raise TokenizerError(f"{path.name}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path.name}: wanted an object, found {type(value).__name__}")
    for name, number in value.items():
        if type(number) is not int:
            raise TokenizerError(f"{path.name}: {name!r} has id {number!r:.40}, wanted an integer")
        if not name or any("\ud800" <= c <= "\udfff" for c in name):
            raise TokenizerError(f"{path.name}: {name!r} (id {number}) is empty or not Unicode")
    return value


def _add_ids(ids: dict[str, int], label: str, added: Path) -> set[str]:
    """Adds the entries of added_tokens.json to `ids`; the names that were not there before."""
    new: set[str] = set()
    for name, number in _read_ids(added).items():
        if name not in ids:
            new.add(name)
            ids[name] = number
        elif ids[name] != number:
            raise TokenizerError(
                f"{added.name}: {name!r} has id {number}, but {label} gives it {ids[name]}"
            )
    return new


def _names_by_id(ids: Mapping[str, int], label: str) -> tuple[str, ...]:
    if not ids:
        raise TokenizerError(f"{label}: no tokens")
    names: list[str | None] = [None] * len(ids)
    for name, number in ids.items():
        if not 0 <= number < len(ids):
            missing = min(set(range(len(ids))) - set(ids.values()))
            raise TokenizerError(
                f"{label}: {name!r} has id {number}, wanted 0..{len(ids) - 1} for {len(ids)} "
                f"tokens; id {missing} is missing"
            )
        other = names[number]
        if other is not None:
            raise TokenizerError(f"{label}: {other!r} and {name!r} have the same id {number}")
        names[number] = name
    return tuple(name for name in names if name is not None)


def _merge_lines(path: Path) -> Iterator[str]:
    """The lines of merges.txt without version line, CR and empty lines at the end, lazily."""
    empty = 0
    # Only LF ends a line here, which is neither what splitlines() does nor what open() does.
    for number, raw in enumerate(io.StringIO(_read_text(path), newline="\n")):
        line = raw.removesuffix("\n").removesuffix("\r")
        if number == 0 and line.startswith("#version"):
            continue
        if line:
            yield from [""] * empty
            yield line
        empty = 0 if line else empty + 1


def _parse_merges(
    lines: Iterable[str], ids: Mapping[str, int], label: str, vocab_label: str
) -> tuple[Pair, ...]:
    """The pairs of bytes of merges.txt; each part must be known by the time it is merged."""
    known = set(BYTE_TO_SYMBOL) & ids.keys()
    seen: dict[str, int] = {}
    pairs: list[Pair] = []
    for number, line in enumerate(lines, start=1):
        where = f"{label}: merge {number} ({line!r:.80})"
        left, space, right = line.partition(" ")
        if not left or not space or not right or " " in right:
            raise TokenizerError(f"{where}: wanted two tokens with one space between")
        for part in (left, right):
            if part not in known:
                raise TokenizerError(f"{where}: {part!r} is no byte and made by no earlier merge")
        if seen.setdefault(line, number) != number:
            raise TokenizerError(f"{where}: the same as merge {seen[line]}")
        if left + right not in ids:
            raise TokenizerError(f"{where}: {left + right!r} is not in {vocab_label}")
        known.add(left + right)
        pairs.append((_token_bytes(left), _token_bytes(right)))
    return tuple(pairs)


def _token_bytes(name: str) -> bytes:
    """The bytes of a name: by the byte table, or as UTF-8 if a character is not in the table."""
    try:
        return bytes(map(SYMBOL_TO_BYTE.__getitem__, name))
    except KeyError:
        return name.encode()


def _added_texts(tokens: Iterable[bytes], made: set[int]) -> dict[str, int]:
    """Texts of the tokens that are neither a byte nor made by a merge."""
    added: dict[str, int] = {}
    for number, token in enumerate(tokens):
        if number not in made:
            try:
                added.setdefault(token.decode(), number)
            except UnicodeDecodeError:
                continue  # no text has these bytes: the token can be decoded, not encoded
    return added


def _read_text(path: Path) -> str:
    data = _read_bytes(path, path.name)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path.name}: not UTF-8 at byte {error.start}") from error


def _read_bytes(path: Path, label: str) -> bytes:
    """The file's bytes. Refuses what is not a regular file (a pipe would block) or is too big."""
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        with open(handle, "rb") as file:  # noqa: PTH123 - of a descriptor
            status = os.fstat(handle)
            regular = stat.S_ISREG(status.st_mode)
            # read() takes the memory it is allowed to fill beforehand, so no more than needed.
            data = file.read(min(status.st_size, MAX_FILE_BYTES) + 1) if regular else b""
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{label}: cannot read {path}: {error}") from error
    if not regular:
        raise TokenizerError(f"{label}: {path} is not a regular file")
    if len(data) > MAX_FILE_BYTES:
        raise TokenizerError(f"{label}: over {MAX_FILE_BYTES} bytes, which no vocabulary needs")
    return data


def _replace(path: Path, text: str) -> None:
    """Writes `text` to `path` through a temporary file in the same folder."""
    import tempfile

    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    temporary = Path(name)
    try:
        with open(handle, "w", encoding="utf-8", newline="\n") as file:  # noqa: PTH123
            file.write(text)
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
