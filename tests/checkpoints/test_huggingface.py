"""Hugging Face folders: names, heads, shapes, types and shards; faults 4, 5, 6, 11 and 15."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from gpt2_fast.checkpoints import open_checkpoint
from gpt2_fast.config import GPT2Config
from tests.checkpoints_support import (
    check_equal,
    config_json,
    hf_folder,
    random_state,
    refused,
    tiny_config,
)


@pytest.mark.parametrize(
    "prefix",
    ["", "transformer.", "_orig_mod.transformer.", "module.transformer.", "module._orig_mod."],
)
@pytest.mark.parametrize("tied", [True, False])
def test_every_key_variant_gives_the_same_model(prefix: str, tied: bool, tmp_path: Path) -> None:
    config = tiny_config(tie_word_embeddings=tied)
    state = random_state(config)
    check_equal(hf_folder(tmp_path, config, state, prefix=prefix), config, state)


@pytest.mark.parametrize(
    "changes",
    [
        {"n_inner": 20},
        {"n_head": 4, "n_embd": 20},
        {"n_layer": 1, "n_head": 1, "n_embd": 7, "vocab_size": 1, "n_ctx": 1},
        {"layer_norm_epsilon": 1e-6, "scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"eos_token_id": 3},
    ],
    ids=str,
)
def test_every_shape_is_read(changes: dict[str, Any], tmp_path: Path) -> None:
    config = tiny_config(**changes)
    state = random_state(config)
    hf_folder(tmp_path, config, state, **{k: v for k, v in changes.items() if k != "n_ctx"})
    check_equal(tmp_path, config, state)


def test_mask_buffers_are_ignored_and_attention_biases_are_not(tmp_path: Path) -> None:
    config = tiny_config()
    state = random_state(config)
    buffers = {
        "h.0.attn.bias": np.ones((1, 1, 7, 7), dtype=np.uint8),
        "h.1.attn.masked_bias": np.array(-1e4, dtype=np.float32),
        "h.1.attn.bias": np.ones((1, 1, 7, 7), dtype=np.bool_),
    }
    hf_folder(tmp_path, config, state | buffers)
    check_equal(tmp_path, config, state)


def test_unknown_tensors_are_named_in_a_warning(tmp_path: Path) -> None:
    config = tiny_config()
    extra = {"score.weight": np.zeros((2, 12), np.float32), "h.2.ln_1.bias": np.zeros(12)}
    hf_folder(tmp_path, config, random_state(config) | extra)
    with pytest.warns(UserWarning, match=r"2 tensors .*h\.2\.ln_1\.bias, transformer\.score"):
        open_checkpoint(tmp_path).close()


def test_the_same_tensor_under_two_names_is_refused(tmp_path: Path) -> None:
    config = tiny_config()
    state = random_state(config)
    hf_folder(tmp_path, config, state | {"module.wpe.weight": state["wpe.weight"]})
    refused(lambda: open_checkpoint(tmp_path), "are the same tensor, wpe.weight")


# The output head


def test_a_stored_head_equal_to_the_embedding_is_tied(tmp_path: Path) -> None:
    state = random_state(tiny_config())
    for tied in (True, False):
        config = tiny_config(tie_word_embeddings=tied)
        folder = tmp_path / str(tied)
        hf_folder(folder, config, state | {"lm_head.weight": state["wte.weight"]})
        check_equal(folder, tiny_config(), state)


@pytest.mark.parametrize("row", [0, 22])
def test_a_stored_head_that_differs_is_honoured(row: int, tmp_path: Path) -> None:
    untied = tiny_config(tie_word_embeddings=False)
    state = random_state(untied)
    state["lm_head.weight"] = state["wte.weight"].copy()
    state["lm_head.weight"][row, -1] += 1
    check_equal(hf_folder(tmp_path, tiny_config(), state), untied, state)


def test_a_head_of_several_megabytes_is_compared_to_its_last_row(tmp_path: Path) -> None:
    untied = tiny_config(vocab_size=100_000, tie_word_embeddings=False)
    state = random_state(untied)
    state["lm_head.weight"] = state["wte.weight"].copy()
    state["lm_head.weight"][-1, -1] += 1
    check_equal(hf_folder(tmp_path, tiny_config(vocab_size=100_000), state), untied, state)


def test_an_untied_head_that_is_missing_is_an_error(tmp_path: Path) -> None:
    hf_folder(tmp_path, tiny_config(), random_state(tiny_config()), tie_word_embeddings=False)
    refused(lambda: open_checkpoint(tmp_path), r"1 of 29 tensors are missing: lm_head\.weight")


def test_a_tied_model_may_keep_its_embedding_under_the_heads_name(tmp_path: Path) -> None:
    config = tiny_config()
    state = random_state(config)
    stored = dict(state)
    stored["lm_head.weight"] = stored.pop("wte.weight")
    check_equal(hf_folder(tmp_path, config, stored), config, state)


# The vocabulary


@pytest.mark.parametrize("tied", [True, False])
def test_rows_that_pad_the_vocabulary_are_out_of_reach(tied: bool, tmp_path: Path) -> None:
    config = tiny_config(tie_word_embeddings=tied)
    state = random_state(config)
    padded = dict(state)
    for name in ("wte.weight", "lm_head.weight"):
        if name in state:
            padded[name] = np.pad(state[name], ((0, 9), (0, 0)), constant_values=1e9)
    check_equal(hf_folder(tmp_path, config, padded), config, state)


def test_padding_of_only_one_of_two_equal_matrices_keeps_the_head_tied(tmp_path: Path) -> None:
    config = tiny_config()
    state = random_state(config)
    head = np.pad(state["wte.weight"], ((0, 2), (0, 0)))
    check_equal(hf_folder(tmp_path, config, state | {"lm_head.weight": head}), config, state)


# Shapes and types


@pytest.mark.parametrize(
    ("name", "shape", "match"),
    [
        ("wte.weight", (22, 12), r"wte\.weight: wanted shape \[23, 12\], found \[22, 12\]"),
        ("wte.weight", (12, 23), r"found \[12, 23\] \(transposed"),
        ("wte.weight", (276,), r"found \[276\]"),
        ("wte.weight", (), r"found \[\]"),
        ("wte.weight", (24,), r"found \[24\]"),
        ("wpe.weight", (6, 12), r"wpe\.weight: wanted shape \[7, 12\], found \[6, 12\]"),
        ("wpe.weight", (8, 12), r"found \[8, 12\]"),
        ("h.1.attn.c_attn.weight", (36, 12), r"c_attn\.weight: .* \(transposed"),
        ("h.0.attn.c_attn.bias", (35,), r"h\.0\.attn\.c_attn\.bias: wanted shape \[36\]"),
        ("h.0.mlp.c_fc.weight", (12, 47), r"c_fc\.weight: wanted shape \[12, 48\]"),
        ("ln_f.weight", (12, 1), r"ln_f\.weight: wanted shape \[12\], found \[12, 1\]"),
        ("lm_head.weight", (22, 12), r"lm_head\.weight: wanted shape \[23, 12\]"),
        ("lm_head.weight", (23, 13), r"lm_head\.weight: wanted shape \[23, 12\]"),
        ("lm_head.weight", (276,), r"lm_head\.weight: wanted shape \[23, 12\]"),
    ],
    ids=str,
)
def test_a_wrong_shape_is_named(
    name: str, shape: tuple[int, ...], match: str, tmp_path: Path
) -> None:
    config = tiny_config()
    state = random_state(config) | {name: np.ones(shape, np.float32)}
    refused(lambda: open_checkpoint(hf_folder(tmp_path, config, state)), match)


def test_missing_tensors_are_counted_and_named(tmp_path: Path) -> None:
    config = tiny_config()
    state = random_state(config)
    del state["h.1.mlp.c_proj.bias"], state["wte.weight"]
    hf_folder(tmp_path, config, state)
    refused(
        lambda: open_checkpoint(tmp_path),
        r"2 of 28 tensors are missing: wte\.weight, h\.1\.mlp\.c_proj\.bias",
    )


def test_types_may_be_mixed_and_keep_their_values(tmp_path: Path) -> None:
    config = tiny_config()
    state = random_state(config)
    for index, name in enumerate(state):
        kind = (np.float32, np.float16, np.float64)[index % 3]
        state[name] = state[name].astype(np.float16).astype(kind)
    with open_checkpoint(hf_folder(tmp_path, config, state)) as checkpoint:
        for name, view in checkpoint.tensors.items():
            np.testing.assert_array_equal(view.float32(), state[name].astype(np.float32))
            assert view.array.dtype == (np.float16 if view.dtype == "F16" else np.float32)


@pytest.mark.parametrize("kind", [np.int64, np.int8, np.bool_, np.uint16])
def test_integer_weights_are_refused(kind: type, tmp_path: Path) -> None:
    config = tiny_config()
    state = random_state(config) | {"h.0.ln_1.weight": np.ones(12, kind)}
    refused(lambda: open_checkpoint(hf_folder(tmp_path, config, state)), "ln_1.weight: .* found")


# Several files


def sharded(folder: Path, config: GPT2Config, state: dict[str, np.ndarray]) -> dict[str, Any]:
    """Split a model over three files; returns the index that was written."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_json(config)))
    names = [f"model-{part:05}-of-00003.safetensors" for part in (1, 2, 3)]
    parts: dict[str, dict[str, np.ndarray]] = {name: {} for name in names}
    for position, (name, values) in enumerate(state.items()):
        parts[names[position % 3]]["transformer." + name] = values
    for name, part in parts.items():
        save_file(part, folder / name, {"format": "pt"})
    table = {tensor: name for name, part in parts.items() for tensor in part}
    index = {"metadata": {"total_size": 1}, "weight_map": table}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


def test_a_sharded_model_is_read(tmp_path: Path) -> None:
    config = tiny_config()
    state = random_state(config)
    sharded(tmp_path, config, state)
    check_equal(tmp_path, config, state)


def test_shards_may_be_links_to_elsewhere(tmp_path: Path) -> None:
    config = tiny_config()
    state = random_state(config)
    sharded(tmp_path / "snapshot", config, state)
    (tmp_path / "blobs").mkdir()
    for path in (tmp_path / "snapshot").glob("*.safetensors"):
        path.rename(tmp_path / "blobs" / path.name)
        path.symlink_to(Path("..") / "blobs" / path.name)
    check_equal(tmp_path / "snapshot", config, state)


SHARD = "model-00002-of-00003.safetensors"


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "/etc/secret.safetensors",
        "a/b.safetensors",
        "..\\secret.safetensors",
        "..",
        "",
        "x" * 400 + ".safetensors",
        "a\0.safetensors",
        "pytorch_model.bin",
        7,
        None,
        [SHARD],
    ],
    ids=lambda name: repr(name)[:24],
)
def test_an_index_that_points_elsewhere_is_refused(name: object, tmp_path: Path) -> None:
    config = tiny_config()
    folder = tmp_path / "model"
    index = sharded(folder, config, random_state(config))
    shutil.copy(folder / SHARD, tmp_path / "secret.safetensors")
    first = next(iter(index["weight_map"]))
    index["weight_map"][first] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(lambda: open_checkpoint(folder), "wanted the plain name of a safetensors file")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    sharded(tmp_path, tiny_config(), random_state(tiny_config()))
    (tmp_path / SHARD).unlink()
    refused(lambda: open_checkpoint(tmp_path), f"names the shard {SHARD}, which does not exist")


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    state = random_state(tiny_config())
    sharded(tmp_path, tiny_config(), state)
    save_file(
        {"transformer.wte.weight": state["wte.weight"]},
        tmp_path / "model-00004-of-00003.safetensors",
    )
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    index["weight_map"]["other"] = "model-00004-of-00003.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(lambda: open_checkpoint(tmp_path), "wte.weight is in both")


@pytest.mark.parametrize("change", ["moved", "invented"])
def test_an_index_that_disagrees_with_its_shards_is_refused(change: str, tmp_path: Path) -> None:
    index = sharded(tmp_path, tiny_config(), random_state(tiny_config()))
    tensor = "transformer.wte.weight" if change == "moved" else "transformer.invented"
    index["weight_map"][tensor] = SHARD
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(lambda: open_checkpoint(tmp_path), f"{tensor} should be in {SHARD}, but is not")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({}, "weight_map: wanted an object"),
        ({"weight_map": {}}, "weight_map: wanted an object"),
        ({"weight_map": [SHARD]}, "weight_map: wanted an object"),
        ({"weight_map": {f"t{i}": f"{i}.safetensors" for i in range(300)}}, "does not exist"),
    ],
    ids=["missing", "empty", "list", "many"],
)
def test_a_malformed_index_is_refused(content: dict[str, Any], match: str, tmp_path: Path) -> None:
    sharded(tmp_path, tiny_config(), random_state(tiny_config()))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(content))
    refused(lambda: open_checkpoint(tmp_path), match)


def test_more_shards_than_any_gpt2_needs_are_refused(tmp_path: Path) -> None:
    sharded(tmp_path, tiny_config(), random_state(tiny_config()))
    table = {f"t{i}": f"{i}.safetensors" for i in range(300)}
    for name in table.values():
        (tmp_path / name).touch()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    refused(lambda: open_checkpoint(tmp_path), "wanted at most 256 shards, found 300")


def test_several_files_without_an_index_are_refused(tmp_path: Path) -> None:
    sharded(tmp_path, tiny_config(), random_state(tiny_config()))
    (tmp_path / "model.safetensors.index.json").unlink()
    refused(lambda: open_checkpoint(tmp_path), "or a single safetensors file, found 3")


def test_a_single_file_of_any_name_is_read(tmp_path: Path) -> None:
    config = tiny_config()
    state = random_state(config)
    hf_folder(tmp_path, config, state)
    (tmp_path / "model.safetensors").rename(tmp_path / "fine-tuned.safetensors")
    check_equal(tmp_path, config, state)
