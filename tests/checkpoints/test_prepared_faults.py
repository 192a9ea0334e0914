"""Prepared files that are damaged, or lie: one error that names the file and what is wrong."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpt2_fast import _C, GPT2
from gpt2_fast.checkpoints import prepared
from gpt2_fast.checkpoints.prepared import PreparedFile
from gpt2_fast.errors import CheckpointError, ParameterError
from tests.model_support import TINY, SpreadSource, byte_tokenizer, model_of

NAME = prepared.PREPARED_NAME
IDS = [1, 200, 3, 256]
PIECE = 4096  # so that TINY, of some 140 KB, has many

Header = dict[str, Any]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """TINY in fp32, with a checksum every 4 KB."""
    monkeypatch.setattr(prepared, "_PIECE", PIECE)
    with model_of(SpreadSource(TINY), byte_tokenizer(), device="cpu") as model:
        model.save_prepared(tmp_path)
    return tmp_path


def engine(threads: int = 1) -> _C.Engine:
    return _C.Engine(TINY.to_dict(), "fp32", _C.default_isa(), threads, 1)


def parts(path: Path) -> tuple[Header, bytes]:
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def put(path: Path, header: Header | bytes, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def refused(folder: Path, match: str) -> str:
    """Loading raises a CheckpointError that names the file, and says `match`."""
    with pytest.raises(CheckpointError) as caught:
        GPT2.from_pretrained(folder)
    message = str(caught.value)
    assert NAME in message
    assert re.search(match, message), message
    return message


def meta(**changes: str | None) -> Callable[[Header], None]:
    """Texts of the metadata to set, or with None to remove."""

    def change(header: Header) -> None:
        for name, value in changes.items():
            if value is None:
                del header["__metadata__"][name]
            else:
                header["__metadata__"][name] = value

    return change


def shape(**changes: Any) -> Callable[[Header], None]:
    """Fields of the configuration to set."""
    return meta(config=json.dumps(TINY.to_dict() | changes))


def tensor(**changes: Any) -> Callable[[Header], None]:
    return lambda header: header["weights"].update(changes)


def sums(change: Callable[[list[str]], list[str]]) -> Callable[[Header], None]:
    def apply(header: Header) -> None:
        words = header["__metadata__"]["crc32c"].split(" ")
        header["__metadata__"]["crc32c"] = " ".join(change(words))

    return apply


def renamed(header: Header) -> None:
    header["weight"] = header.pop("weights")


def second(header: Header) -> None:
    end = header["weights"]["data_offsets"][1]
    header["more"] = {"dtype": "U8", "shape": [0], "data_offsets": [end, end]}


LIES: dict[str, tuple[Callable[[Header], Any], str]] = {
    "no metadata": (lambda h: h.pop("__metadata__"), "__metadata__: format is missing"),
    **{
        f"no {name}": (meta(**{name: None}), f"__metadata__: {name} is missing")
        for name in ("format", "layout", "precision", "config", "piece", "crc32c")
    },
    "format": (meta(format="pt"), "format: wanted 'gpt2_fast', found 'pt'"),
    "layout": (meta(layout="cpu-2"), "layout: wanted 'cpu-1' .*newer one.*, found 'cpu-2'"),
    "long layout": (meta(layout="x" * 999), r"found 'x{56}\.\.\.$"),
    "precision": (meta(precision="fp16"), "precision: wanted one of fp32, .*, found 'fp16'"),
    "other precision": (meta(precision="int8"), r"wanted U8 \[\d+\], .* int8, found U8 \[\d+\]"),
    "config: no JSON": (meta(config="{"), "__metadata__, config: not valid JSON"),
    "config: list": (meta(config="[]"), "config: wanted a JSON object, found list"),
    "config: deep": (meta(config="[" * 20000), "config: JSON nested deeper"),
    "config: twice": (meta(config='{"n_layer": 1, "n_layer": 1}'), "'n_layer' appears twice"),
    "config: NaN": (meta(config='{"n_layer": NaN}'), "NaN is not a JSON number"),
    "config: empty": (meta(config="{}"), "config: 'eos_token_id' is missing"),
    "config: unknown": (shape(extra=1), "config: 'extra' is unknown"),
    "config: text": (shape(n_layer="2"), "config: n_layer must be an integer in 1"),
    "config: zero": (shape(n_head=0), "config: n_head must be an integer"),
    "config: huge": (shape(n_layer=1 << 60), "config: n_layer must be an integer"),
    "config: other size": (shape(n_layer=3), "n_layer: wanted 2, found 3"),
    "config: same size": (shape(n_head=4), "n_head: wanted 3, found 4"),
    "config: eps": (shape(layer_norm_epsilon=1e-6), "layer_norm_epsilon: wanted 1e-05"),
    **{
        f"piece {text!r}": (meta(piece=text), "piece: wanted a number in 4096..1073741824")
        for text in (
            "",
            "0",
            "-1",
            "4095",
            "1073741825",
            "1e6",
            " 4096",
            "4096\n",
            "9" * 30,
            "٤٠٩٦",
        )
    },
    "other piece": (meta(piece="8192"), r"wanted \d+ checksums, one for each 8192"),
    "no sums": (meta(crc32c=""), "checksum 0: wanted eight hexadecimal digits, found ''"),
    "one less": (sums(lambda w: w[:-1]), r"wanted (\d+) checksums, .* found \d+$"),
    "one more": (sums(lambda w: [*w, w[0]]), r"wanted (\d+) checksums, .* found \d+$"),
    "short sum": (sums(lambda w: [w[0], w[1][:7], *w[2:]]), "checksum 1: wanted eight"),
    "capitals": (sums(lambda w: ["ABCDEF01", *w[1:]]), "checksum 0: .* found 'ABCDEF01'"),
    "no digits": (sums(lambda w: ["0x123456", *w[1:]]), "checksum 0: .* found '0x123456'"),
    "two spaces": (sums(lambda w: [w[0], "", *w[1:]]), "checksum 1: .* found ''"),
    "wrong sum": (sums(lambda w: [*w[:5], "00000000", *w[6:]]), "piece 5, .* checksum 00000000"),
    "sums swapped": (sums(lambda w: [w[1], w[0], *w[2:]]), "damaged: piece 0, "),
    "name": (renamed, "wanted one tensor, 'weights', found weight"),
    "second": (second, "wanted one tensor, 'weights', found .*more"),
    "signed": (tensor(dtype="I8"), r"wanted U8 \[\d+\], .* found I8"),
    "dtype": (tensor(dtype="F4"), "unknown element type"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies(lie: str, folder: Path) -> None:
    header, data = parts(folder / NAME)
    change, match = LIES[lie]
    change(header)
    put(folder / NAME, header, data)
    refused(folder, match)


def test_sizes_that_are_not_those_of_the_shape(folder: Path) -> None:
    header, data = parts(folder / NAME)
    for size in (len(data) - 64, len(data) + 64, 0):
        header["weights"] |= {"shape": [size], "data_offsets": [0, size]}
        put(folder / NAME, header, data[:size].ljust(size, b"\0"))
        refused(folder, rf"wanted U8 \[{len(data)}\], .* found U8 \[{size}\]")
    header["weights"] |= {"shape": [1, len(data)], "data_offsets": [0, len(data)]}
    put(folder / NAME, header, data)
    refused(folder, r"found U8 \[1, \d+\]")


def test_config_json_must_be_there_and_say_the_same(folder: Path) -> None:
    path = folder / "config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | {"n_head": 4}))
    refused(folder, "n_head: wanted 4, found 3")
    path.unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be opened"):
        GPT2.from_pretrained(folder)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_flipped_bit_is_found_wherever_it_lies(folder: Path, threads: int) -> None:
    path = folder / NAME
    good = path.read_bytes()
    start = 8 + int.from_bytes(good[:8], "little")
    size = len(good) - start
    for at in (0, 1, PIECE - 1, PIECE, size // 2, size - size % PIECE - 1, size - 1):
        bad = bytearray(good)
        bad[start + at] ^= 1 << (at % 8)
        path.write_bytes(bad)
        with pytest.raises(CheckpointError) as caught:
            GPT2.from_pretrained(folder, threads=threads)
        assert f"{path}: damaged: piece {at // PIECE}, bytes " in str(caught.value)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("pieces", [(6, 9, 12), (0, 4, 8, 12)], ids=["behind", "at once"])
def test_of_several_faults_the_first_is_named(
    pieces: tuple[int, ...], threads: int, tmp_path: Path
) -> None:
    with GPT2.from_pretrained("builtin", precision="fp32", device="cpu") as model:
        model.save_prepared(tmp_path)  # three stretches of 4 MB and a rest
        config = model.config.to_dict()
    data = bytearray((tmp_path / NAME).read_bytes())
    for piece in pieces:  # the second set: every lane meets one first, at the same time
        data[(piece << 20) + 5000] ^= 4
    (tmp_path / NAME).write_bytes(data)
    file = PreparedFile(tmp_path)
    one = _C.Engine(config, "fp32", _C.default_isa(), threads, 1)
    for _ in range(20):
        with pytest.raises(CheckpointError, match=rf"damaged: piece {pieces[0]}, bytes"):
            file.load_into(one)
    file.close()


def test_every_byte_of_the_header_counts_or_changes_nothing(folder: Path) -> None:
    path = folder / NAME
    good = path.read_bytes()
    with GPT2.from_pretrained(folder) as model:
        wanted = model.forward(IDS).tobytes()
    loaded = 0
    length = 8 + int.from_bytes(good[:8], "little")
    for at in range(length):
        bad = bytearray(good)
        bad[at] ^= (1, 2, 16, 128)[at % 4]
        path.write_bytes(bad)
        try:
            file = PreparedFile(folder)
        except CheckpointError:
            continue
        one = engine()
        try:
            file.load_into(one)
        except CheckpointError:
            continue
        finally:
            file.close()
        loaded += 1
        (answer,) = one.step([(one.open(), IDS, "all")])
        assert answer.tobytes() == wanted, at
    assert loaded < length // 20  # a name of nothing, a space


def test_a_file_that_was_cut_off_or_grew(folder: Path) -> None:
    path = folder / NAME
    good = path.read_bytes()
    start = 8 + int.from_bytes(good[:8], "little")
    for size in (0, 1, 7, 8, 9, start - 1, start, start + 1, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:size])
        refused(folder, "empty|header length|header claims|the tensors end at byte")
    path.write_bytes(good + b"\0")
    refused(folder, "the tensors end at byte")


def test_a_file_that_is_cut_off_while_it_is_open(folder: Path) -> None:
    path = folder / NAME
    file = PreparedFile(folder)
    with path.open("rb") as stream:
        whole, half = path.stat().st_size, path.stat().st_size // 2
        os.truncate(path, half)
        one = engine()
        with pytest.raises(CheckpointError, match=r"changed while it was being read"):
            file.load_into(one)
        # Between that look and the end of reading: the native reader meets the end itself.
        words = [0] * len(file._checksums)
        with pytest.raises(CheckpointError, match=r"damaged: piece 0|file ends at"):
            one.load_packed(stream.fileno(), file._offset, file.nbytes, PIECE, words)
        start = whole - file.nbytes
        with pytest.raises(CheckpointError, match=rf"the file ends at byte {half}$"):
            one.load_packed(stream.fileno(), start, file.nbytes, PIECE, file._checksums)
        assert len(one.missing()) == len(TINY.tensor_shapes())
        with pytest.raises(ParameterError, match="were not loaded"):
            one.packed()
    file.close()
    with pytest.raises(CheckpointError, match="closed"):
        file.load_into(one)


def test_what_the_engine_refuses(folder: Path) -> None:
    file = PreparedFile(folder)
    one = engine(threads=2)
    good = (file._stored.file.descriptor(), file._offset, file.nbytes, PIECE, file._checksums)
    with pytest.raises(CheckpointError, match=rf"wanted {file.nbytes} bytes .*, got 64"):
        one.load_packed(good[0], good[1], 64, *good[3:])
    with pytest.raises(CheckpointError, match=r"wanted \d+ checksums, .* got 1"):
        one.load_packed(*good[:4], [0])
    for piece in (0, -1):
        with pytest.raises(ParameterError, match=f"piece must be at least 1, got {piece}"):
            one.load_packed(*good[:3], piece, good[4])
    with pytest.raises(CheckpointError, match=r"cannot be read at byte .*: Bad file descriptor"):
        one.load_packed(-1, *good[1:])
    with pytest.raises(CheckpointError, match="cannot be read at byte -5: Invalid argument"):
        one.load_packed(good[0], -5, *good[2:])
    directory = os.open(folder, os.O_RDONLY)
    with pytest.raises(CheckpointError, match=r"cannot be read at byte .*: Is a directory"):
        one.load_packed(directory, *good[1:])
    os.close(directory)
    assert one.missing()
    one.load_packed(*good)  # nothing of that has harmed it
    assert not one.missing()
    with model_of(SpreadSource(TINY), device="cpu") as model:
        (answer,) = one.step([(one.open(), IDS, "all")])
        assert answer.tobytes() == model.forward(IDS).tobytes()
    file.close()


def test_no_step_before_every_parameter_is_there(folder: Path) -> None:
    """One parameter twice is not two, and a file that was refused leaves none."""
    one = engine()
    item = (one.open(), IDS, "all")
    tensors = [(name, array, kind) for name, kind, array, _ in SpreadSource(TINY).tensors()]
    for tensor in (*tensors[:-1], tensors[0]):
        one.load(*tensor)
    with pytest.raises(CheckpointError, match=f"1 parameters .* among them {tensors[-1][0]}"):
        one.step([item])
    one.load(*tensors[-1])
    (wanted,) = one.step([item])

    file = PreparedFile(folder)
    good = (file._stored.file.descriptor(), file._offset, file.nbytes, PIECE, file._checksums)
    with pytest.raises(CheckpointError, match="damaged: piece 0"):
        one.load_packed(*good[:4], [word ^ 1 for word in good[4]])
    one.close(item[0])
    item = (one.open(), IDS, "all")
    with pytest.raises(CheckpointError, match=f"{len(tensors)} parameters were not loaded"):
        one.step([item])
    one.load_packed(*good)
    (answer,) = one.step([item])
    assert answer.tobytes() == wanted.tobytes()
    file.close()


@pytest.mark.parametrize("kind", ["folder", "fifo", "broken link", "forbidden"])
def test_what_is_no_file(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / NAME
    if kind == "forbidden":
        real = os.open

        def forbid(name: Any, *rest: Any, **options: Any) -> int:
            if Path(name) == path:
                raise PermissionError(13, "Permission denied", str(path))
            return real(name, *rest, **options)

        monkeypatch.setattr(os, "open", forbid)
    else:
        path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "broken link":
        path.symlink_to(folder / "gone")
    refused(folder, "regular file|cannot be opened")
