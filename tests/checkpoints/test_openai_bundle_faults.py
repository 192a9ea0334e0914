"""Damaged, hostile and mistaken checkpoints of OpenAI's layout: one typed error each, soon."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gpt2_fast.checkpoints.openai_bundle import open_bundle
from gpt2_fast.errors import CheckpointError
from tests.checkpoints_support import refused

from . import bundle_writer as bw
from .openai_support import CONFIG, DATA, INDEX, WTE, flip, load, rebuilt, sound_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound model; each test damages it."""
    return sound_model(tmp_path)


# --- The `checkpoint` file ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "prefix",
    [
        "../../etc/passwd",
        "/etc/passwd",
        "../model.ckpt",
        "sub/model.ckpt",
        "..",
        ".",
        "",
        "C:model.ckpt",
        r"run1\model.ckpt",
        r"\\host\share\model.ckpt",
        "model\0.ckpt",
    ],
    ids=repr,
)
def test_state_leads_out_of_the_folder(folder: Path, prefix: str) -> None:
    outside = folder / "sub"  # files that would be read if the path were followed
    for place in (outside, folder.parent):
        bw.write_bundle(place, bw.openai_tensors(CONFIG))
    bw.write_state(folder, prefix)
    refused(
        lambda: load(folder),
        r"checkpoint: model_checkpoint_path must be the name of files in this folder",
    )


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "wanted a line model_checkpoint_path"),
        (b"\xff\xfe", "not UTF-8"),
        (b'model_checkpoint_path: "model.ckpt', "wanted a line"),
        (b'all_model_checkpoint_paths: "model.ckpt"', "wanted a line"),
        (b'model_checkpoint_path: "model-7"', r"model-7\.index: missing.*has model\.ckpt"),
        (b"x" * (2 << 20), "at most 1048576 bytes"),
    ],
    ids=["empty", "utf16", "unclosed", "other-field", "absent", "2MB"],
)
def test_state_is_malformed(folder: Path, content: bytes, match: str) -> None:
    (folder / "checkpoint").write_bytes(content)
    refused(lambda: load(folder), match)


# --- hparams.json -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"n_layer": None}, "n_layer must be an integer"),
        ({"n_layer": "2"}, "n_layer must be an integer"),
        ({"n_layer": 2.0}, "n_layer must be an integer"),
        ({"n_layer": True}, "n_layer must be an integer"),
        ({"n_layer": 10**6}, "n_layer must be an integer in"),
        ({"n_layer": 10**30}, "n_layer must be an integer in"),
        ({"n_layer": -1}, "n_layer must be an integer in"),
        ({"n_head": 0}, "n_head must be an integer in"),
        ({"n_head": 3}, "divisible"),
        ({"n_layer": 1}, "holds tensor model/h1/.*, but n_layer is 1"),
        ({"n_layer": 3}, "12 of .* tensors are missing: h.2.ln_1.weight"),
        ({"n_vocab": 19}, r"model/wte: wanted shape \[19, 8\], found \[20, 8\]"),
        ({"n_ctx": 7}, r"model/wpe: wanted shape \[7, 8\], found \[6, 8\]"),
        ({"n_embd": 4}, r"wanted shape \[20, 4\], found \[20, 8\]"),
    ],
    ids=str,
)
def test_hparams_disagree(folder: Path, change: dict[str, object], match: str) -> None:
    (folder / "hparams.json").write_text(json.dumps(bw.hparams(CONFIG) | change))
    refused(lambda: load(folder), rf"({'hparams'}|{'model'}).*{match}")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'{"n_layer": 1}', b"\xff", b'{"n_layer": NaN}', b"[" * 100000],
    ids=lambda content: content[:16].decode("latin-1"),
)
def test_hparams_are_malformed(folder: Path, content: bytes) -> None:
    (folder / "hparams.json").write_bytes(content)
    refused(lambda: load(folder), r"hparams\.json")


# --- Tensors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model/h0/attn/c_attn/w", (1, 24, 8)),  # transposed
        ("model/h0/attn/c_attn/w", (2, 8, 12)),
        ("model/h0/attn/c_attn/w", (2, 8, 24)),
        ("model/h0/attn/c_attn/b", (1, 24)),
        ("model/wte", (1, 20, 8)),
        ("model/ln_f/g", (2, 4)),
    ],
    ids=str,
)
def test_wrong_shape(folder: Path, name: str, shape: tuple[int, ...]) -> None:
    tensors = bw.openai_tensors(CONFIG)
    tensors[name] = np.resize(tensors[name], shape)
    bw.write_bundle(folder, tensors)
    refused(lambda: load(folder), f"tensor {name}: wanted shape")


@pytest.mark.parametrize("name", ["model/wte", "model/h1/mlp/c_proj/b", "model/ln_f/b"])
def test_missing_tensor(folder: Path, name: str) -> None:
    tensors = bw.openai_tensors(CONFIG)
    del tensors[name]
    bw.write_bundle(folder, tensors)
    refused(lambda: load(folder), "1 of 28 tensors are missing")


def test_overlapping_tensors(folder: Path) -> None:
    rows = bw.entry(1, (20, 8), 0, WTE, 0)
    more = bw.entry(1, (6, 8), WTE - 4, 6 * 8 * 4, 0)
    names = [(b"", bw.header()), (b"model/wpe", more), (b"model/wte", rows)]
    rebuilt(folder, bw.table(names))
    refused(lambda: load(folder), "model/wte and model/wpe overlap")


# --- The data file --------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", [1, 4, 1000])
def test_data_is_short(folder: Path, lost: int) -> None:
    data = (folder / DATA).read_bytes()
    (folder / DATA).write_bytes(data[:-lost])
    refused(
        lambda: load(folder),
        rf"{DATA}: {len(data) - lost} bytes, but the index places tensor .*cut off",
    )


def test_data_is_missing(folder: Path) -> None:
    (folder / DATA).unlink()
    refused(lambda: load(folder), f"{DATA}: cannot be opened")


def test_data_is_empty(folder: Path) -> None:
    (folder / DATA).write_bytes(b"")
    refused(lambda: load(folder), f"{DATA}: the file is empty")


def test_any_damaged_value_is_found_and_named(folder: Path) -> None:
    data = (folder / DATA).read_bytes()
    for at in range(0, len(data), 331):
        damaged = bytearray(data)
        damaged[at] ^= 0x80
        (folder / DATA).write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"tensor model/.*: crc32c is 0x"):
            load(folder)


def test_damage_is_found_when_the_tensor_is_read_and_not_before(folder: Path) -> None:
    flip(folder / DATA, -1, 0x40)  # the last name in order: model/wte
    with open_bundle(folder) as checkpoint:
        checkpoint.tensors["wpe.weight"].float32()
        for read in (
            lambda view: view.array,
            lambda view: view.rows(0, 1),
            lambda view: view.float32(),
            lambda view: view.first_rows(1),
        ):
            view = checkpoint.tensors["wte.weight"]
            refused(lambda read=read, view=view: read(view), f"{DATA}: tensor model/wte: crc32c")


def test_data_of_another_training_run(folder: Path) -> None:
    """Same shapes, so only the checksums tell."""
    other = bw.openai_tensors(CONFIG, seed=5)
    (folder / DATA).write_bytes(b"".join(other[n].tobytes() for n in sorted(other)))
    refused(lambda: load(folder), "crc32c is 0x")


def test_data_shrinks_or_changes_while_it_is_open(folder: Path) -> None:
    with open_bundle(folder) as checkpoint:
        os.truncate(folder / DATA, 100)
        refused(checkpoint.tensors["wte.weight"].float32, "changed while it was being read")


# --- Files that are no files ----------------------------------------------------------------------


def as_fifo(path: Path) -> None:
    os.mkfifo(path)


def as_loop(path: Path) -> None:
    path.symlink_to(path.name)


def as_endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [Path.mkdir, as_fifo, as_loop, as_endless])
@pytest.mark.parametrize("name", [INDEX, DATA, "hparams.json", "checkpoint"])
def test_not_a_file(folder: Path, name: str, make: Callable[[Path], None]) -> None:
    (folder / name).unlink()
    make(folder / name)
    refused(lambda: load(folder), f"{name}: ")


@pytest.mark.parametrize("name", [INDEX, "hparams.json", "checkpoint"])
def test_a_terabyte_of_nothing(folder: Path, name: str) -> None:
    try:
        os.truncate(folder / name, 1 << 40)
    except OSError as error:  # some file systems end files at 4 GB: no such input can be made
        pytest.skip(f"no sparse files here: {error}")
    refused(lambda: load(folder), f"{name}: wanted at most")


def test_values_not_a_number_are_left_to_the_engine(folder: Path) -> None:
    tensors = bw.openai_tensors(CONFIG)
    tensors["model/ln_f/g"][3] = np.nan
    bw.write_bundle(folder, tensors)
    with open_bundle(folder) as checkpoint:
        assert np.isnan(checkpoint.tensors["ln_f.weight"].array[3])
