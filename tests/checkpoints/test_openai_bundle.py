"""OpenAI's layout: what is in it is what is read, and the rest of the layout's freedom."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_fast.checkpoints.folder import holds_bundle
from gpt2_fast.checkpoints.openai_bundle import open_bundle, verify_tensors
from gpt2_fast.checkpoints.tensor_bundle import parse_index
from gpt2_fast.config import PUBLISHED, GPT2Config
from gpt2_fast.errors import CheckpointError

from . import bundle_writer as bw

CONFIG = GPT2Config(n_layer=3, n_embd=12, n_head=3, n_ctx=10, vocab_size=31, eos_token_id=None)
SQUARE = "model/h1/attn/c_proj/w"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty model folder whose name needs care."""
    path = tmp_path / "моя модель [1]"
    path.mkdir()
    return path


def check_values(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    with open_bundle(folder) as checkpoint:
        assert checkpoint.format == "openai"
        for name, stored in (
            ("wte.weight", "model/wte"),
            ("wpe.weight", "model/wpe"),
            ("h.1.attn.c_attn.weight", "model/h1/attn/c_attn/w"),
            ("h.1.attn.c_proj.weight", "model/h1/attn/c_proj/w"),
            ("h.2.mlp.c_fc.weight", "model/h2/mlp/c_fc/w"),
            ("h.2.mlp.c_fc.bias", "model/h2/mlp/c_fc/b"),
            ("h.0.mlp.c_proj.weight", "model/h0/mlp/c_proj/w"),
            ("h.0.ln_1.weight", "model/h0/ln_1/g"),
            ("h.0.ln_2.bias", "model/h0/ln_2/b"),
            ("ln_f.weight", "model/ln_f/g"),
            ("ln_f.bias", "model/ln_f/b"),
        ):
            wanted = tensors[stored]
            wanted = wanted[0] if stored.endswith("/w") else wanted
            np.testing.assert_array_equal(checkpoint.tensors[name].array, wanted, err_msg=name)


def test_reads_what_was_written(folder: Path) -> None:
    tensors = bw.write_release(folder, CONFIG)
    check_values(folder, tensors)
    with open_bundle(folder) as checkpoint:
        assert checkpoint.config == CONFIG
        assert list(checkpoint.tensors) == list(CONFIG.tensor_shapes())
        seen = []
        verify_tensors(checkpoint, progress=seen.append)
        assert sum(seen) == 4 * CONFIG.parameters


def test_square_weights_are_in_by_out_and_not_turned(folder: Path) -> None:
    tensors = bw.write_release(folder, CONFIG)
    with open_bundle(folder) as checkpoint:
        found = checkpoint.tensors["h.1.attn.c_proj.weight"].array
    assert found[0, 5] == tensors[SQUARE][0, 0, 5]
    assert found[0, 5] != tensors[SQUARE][0, 5, 0]


def test_values_are_views_of_the_file(folder: Path) -> None:
    bw.write_release(folder, CONFIG)
    with open_bundle(folder) as checkpoint:
        array = checkpoint.tensors["wte.weight"].array
        assert not array.flags.owndata
        assert not array.flags.writeable


def test_unaligned_values_are_copied_right(folder: Path) -> None:
    tensors = bw.openai_tensors(CONFIG)
    odd = bw.Stored(bw.DT_STRING, (), b"abc")  # sorts first, so every offset is odd
    bw.write_release(folder, CONFIG, tensors={"_object_graph": odd} | tensors)
    with pytest.warns(UserWarning, match="1 tensors that GPT-2 does not have.*_object_graph"):
        check_values(folder, tensors)


@pytest.mark.parametrize(
    "options",
    [
        {"block_bytes": 64},
        {"block_bytes": 1},
        {"restart_interval": 1},
        {"restart_interval": 1000},
        {"shards": 3},
    ],
    ids=str,
)
def test_any_blocking_and_sharding(folder: Path, options: dict[str, int]) -> None:
    check_values(folder, bw.write_release(folder, CONFIG, **options))


def test_fine_tuning_run(folder: Path) -> None:
    """gpt-2-simple: another prefix, older checkpoints beside it, the optimizer's tensors."""
    tensors = bw.openai_tensors(CONFIG)
    stored = dict(tensors)
    for name, value in tensors.items():
        stored |= {f"{name}/Adam": value + 1, f"{name}/Adam_1": value + 2}
    stored |= {"global_step": np.array(1000, np.int64)}
    stored |= {f"beta{i}_power": np.array(0.5, np.float32) for i in (1, 2)}
    bw.write_bundle(folder, bw.openai_tensors(CONFIG, seed=9), prefix="model-500")
    bw.write_release(folder, CONFIG, tensors=stored, prefix="model-1000")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_values(folder, tensors)


@pytest.mark.parametrize(
    ("kind", "number", "exact"), [("float16", 19, False), ("float64", 2, True)], ids=str
)
def test_other_float_types(folder: Path, kind: str, number: int, exact: bool) -> None:
    assert bw.DT_NUMBERS[kind] == number
    tensors = bw.openai_tensors(CONFIG)
    other = {name: value.astype(kind) for name, value in tensors.items()}
    bw.write_release(folder, CONFIG, tensors=other)
    with open_bundle(folder) as checkpoint:
        view = checkpoint.tensors["wte.weight"]
        assert view.dtype == ("F32" if exact else "F16")
        np.testing.assert_array_equal(view.float32(), other["model/wte"].astype(np.float32))


def test_bfloat16(folder: Path) -> None:
    tensors = bw.openai_tensors(CONFIG)
    upper = {n: (v.view(np.uint32) >> 16).astype("<u2") for n, v in tensors.items()}
    stored = {n: bw.Stored(bw.DT_BFLOAT16, v.shape, v.tobytes()) for n, v in upper.items()}
    bw.write_release(folder, CONFIG, tensors=stored)
    with open_bundle(folder) as checkpoint:
        view = checkpoint.tensors["wte.weight"]
        assert view.dtype == "BF16"
        np.testing.assert_array_equal(view.array, upper["model/wte"])


def test_the_only_index_needs_no_checkpoint_file(folder: Path) -> None:
    tensors = bw.write_release(folder, CONFIG)
    (folder / "checkpoint").unlink()
    check_values(folder, tensors)
    bw.write_bundle(folder, tensors, prefix="second")
    with pytest.raises(CheckpointError, match=r"exactly one .*found 2"):
        open_bundle(folder)


def test_a_given_configuration_replaces_hparams(folder: Path) -> None:
    bw.write_release(folder, CONFIG)
    (folder / "hparams.json").unlink()
    with open_bundle(folder, CONFIG) as checkpoint:
        assert checkpoint.config == CONFIG
    with pytest.raises(CheckpointError, match=r"hparams\.json"):
        open_bundle(folder)


def test_end_of_text(folder: Path) -> None:
    config = GPT2Config(n_layer=1, n_embd=2, n_head=1, n_ctx=2, vocab_size=31, eos_token_id=7)
    bw.write_release(folder, config)
    (folder / "encoder.json").write_text(json.dumps({"a": 0, "<|endoftext|>": 7}))
    with open_bundle(folder) as checkpoint:
        assert checkpoint.config == config
    for wrong in ("31", "-1", "true", '"7"', "7.0"):
        (folder / "encoder.json").write_text(f'{{"<|endoftext|>": {wrong}}}')
        with pytest.raises(CheckpointError, match=r"<\|endoftext\|> must be an integer in 0\.\.30"):
            open_bundle(folder)


def test_released_vocabulary_ends_text_with_50256(folder: Path) -> None:
    config = GPT2Config(n_layer=1, n_embd=1, n_head=1, n_ctx=1)
    bw.write_release(folder, config, checksum=lambda _data: 0)
    with open_bundle(folder) as checkpoint:
        assert checkpoint.config.eos_token_id == 50256


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_indexes_fit_the_limits(name: str) -> None:
    """An index of the real tensor count, with Adam's, is read whole and quickly."""
    entries = [(b"", bw.header())]
    names = [
        f"model/h{layer}/{part}{slot}"
        for layer in range(PUBLISHED[name].n_layer)
        for part in ("attn/c_attn/b", "attn/c_attn/w", "mlp/c_fc/b", "mlp/c_proj/w")
        for slot in ("", "/Adam", "/Adam_1")
    ]
    entries += [(n.encode(), bw.entry(1, (3,), 0, 12, 0)) for n in sorted(names, key=str.encode)]
    index = parse_index(bw.table(entries, block_bytes=16384), "index")
    assert sorted(index.entries) == sorted(names)


@settings(max_examples=60, deadline=None)
@given(
    names=st.sets(
        st.text(st.characters(categories=("L", "N", "P")), min_size=1, max_size=40), max_size=30
    ),
    shape=st.lists(st.integers(0, 2**20), max_size=8),
    block_bytes=st.integers(1, 2000),
    restart_interval=st.integers(1, 20),
    offset=st.integers(0, 2**62),
)
def test_tables_come_back(
    names: set[str], shape: list[int], block_bytes: int, restart_interval: int, offset: int
) -> None:
    size = int(np.prod(shape, dtype=object)) * 4
    if size >= 2**62:
        shape, size = [], 4
    keys = sorted(name.encode() for name in names)
    crc = 0xFFFFFFFF ^ len(names)
    entries = [(b"", bw.header(3))]
    entries += [(key, bw.entry(1, shape, offset, size, crc, 2)) for key in keys]
    data = bw.table(entries, block_bytes=block_bytes, restart_interval=restart_interval)
    index = parse_index(data, "index")
    assert index.shards == 3
    assert [name.encode() for name in index.entries] == keys
    for found in index.entries.values():
        assert (found.shape, found.offset, found.size) == (tuple(shape), offset, size)
        assert (found.shard, found.crc32c, found.dtype_name) == (2, crc, "DT_FLOAT")


def test_holds_bundle(folder: Path) -> None:
    assert not holds_bundle(folder)
    assert not holds_bundle(folder / "missing")
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors.index.json").write_text("{}")
    assert not holds_bundle(folder)
    (folder / "hparams.json").write_text("{}")
    assert not holds_bundle(folder)
    bw.write_state(folder, "model.ckpt")
    assert holds_bundle(folder)
    (folder / "checkpoint").unlink()
    bw.write_bundle(folder, {})
    assert holds_bundle(folder)
    (folder / "model.ckpt.index").unlink()  # the data file alone says it as well
    assert holds_bundle(folder)
