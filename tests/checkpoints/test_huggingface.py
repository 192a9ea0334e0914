"""Hugging Face folders: faults 4, 5, 6, 11, 12, 14, 15 and 18 of the loader list."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from gpt2_fast import checkpoints
from gpt2_fast.checkpoints import open_checkpoint
from gpt2_fast.checkpoints.huggingface_config import read_config
from gpt2_fast.config import GPT2Config
from tests.checkpoints_support import config_json, hf_folder, random_state, refused, tiny_config


def check_equal(folder: Path, config: GPT2Config, state: dict[str, np.ndarray]) -> None:
    """Opening `folder` gives exactly `config` and `state`, without a warning."""
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.config == config
        assert checkpoint.format == "huggingface"
        assert list(checkpoint.tensors) == list(config.tensor_shapes())
        for name, view in checkpoint.tensors.items():
            assert view.name == name
            np.testing.assert_array_equal(view.array, state[name], strict=True)


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


# config.json

BAD_CONFIGS: dict[str, tuple[str | bytes | dict[str, Any], str]] = {
    "empty": ("", "not valid JSON"),
    "list": ("[]", "wanted a JSON object, found list"),
    "trailing comma": ('{"n_layer": 2,}', "not valid JSON"),
    "comment": ('{"n_layer": 2} // two', "not valid JSON"),
    "truncated": ('{"n_layer": 2', "not valid JSON"),
    "two objects": ("{}{}", "not valid JSON"),
    "UTF-16": ('{"n_layer": 2}'.encode("utf-16"), "byte order mark"),
    "UTF-16 without mark": ('{"n_layer": 2}'.encode("utf-16-le"), "not valid JSON"),
    "byte order mark": ('{"n_layer": 2}'.encode("utf-8-sig"), "byte order mark"),
    "Latin-1": ('{"ä": 2}'.encode("latin-1"), "not UTF-8"),
    "duplicate key": ('{"n_layer": 2, "n_layer": 3}', "'n_layer' appears twice"),
    "deep": ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested deeper"),
    "deep lists": ('{"a":' + "[" * 100 + "]" * 100 + "}", "nested deeper than 64"),
    "NaN": ('{"layer_norm_epsilon": NaN}', "NaN is not a JSON number"),
    "infinity": ('{"layer_norm_epsilon": -Infinity}', "-Infinity is not a JSON number"),
    "huge digits": ('{"n_layer": ' + "9" * 10_000 + "}", "config.json"),
    "large": ('{"a": "' + "x" * (1 << 20) + '"}', "wanted at most 1048576 bytes"),
    "other model": ({"model_type": "gpt_neo"}, "model_type: wanted 'gpt2', found 'gpt_neo'"),
    "model list": ({"model_type": ["gpt2"]}, "model_type: wanted 'gpt2'"),
    "no layers": ({"n_layer": None}, "n_layer: wanted an integer, found None"),
    "negative layers": ({"n_layer": -1}, r"n_layer must be an integer in 1\.\.1024, got -1"),
    "zero layers": ({"n_layer": 0}, "n_layer must be"),
    "a million layers": ({"n_layer": 10**6}, r"n_layer must be an integer in 1\.\.1024"),
    "2**64 layers": ({"n_layer": 2**64}, "at most 63 bits"),
    "zero heads": ({"n_head": 0}, "n_head must be"),
    "indivisible": ({"n_head": 5}, "n_embd must be divisible by n_head, got n_embd 12, n_head 5"),
    "string number": ({"n_embd": "12"}, "n_embd: wanted an integer, found '12'"),
    "float number": ({"n_embd": 12.0}, r"n_embd: wanted an integer, found 12\.0"),
    "bool number": ({"n_layer": True}, "n_layer: wanted an integer, found True"),
    "huge vocabulary": ({"vocab_size": 10**12}, "vocab_size must be"),
    "huge width": ({"n_embd": 10**9}, "n_embd must be"),
    "inner string": ({"n_inner": "48"}, "n_inner: wanted an integer"),
    "inner zero": ({"n_inner": 0}, "n_inner must be"),
    "no positions": ({"n_positions": 0}, "n_ctx must be"),
    "epsilon string": ({"layer_norm_epsilon": "1e-5"}, "layer_norm_epsilon: wanted a number"),
    "epsilon zero": ({"layer_norm_epsilon": 0}, "layer_norm_epsilon must be"),
    "epsilon list": ({"layer_norm_epsilon": [1e-5]}, "layer_norm_epsilon: wanted a number"),
    "tied by a number": ({"tie_word_embeddings": 1}, "tie_word_embeddings: wanted true or false"),
    "scale null": ({"scale_attn_weights": None}, "scale_attn_weights: wanted true or false"),
    "upcast string": ({"reorder_and_upcast_attn": "no"}, "reorder_and_upcast_attn: wanted true"),
    "erf gelu": (
        {"activation_function": "gelu"},
        "activation_function: wanted one of gelu_new, gelu_pytorch_tanh, gelu_fast, found 'gelu'",
    ),
    "relu": ({"activation_function": "relu"}, "activation_function"),
    "activation list": ({"activation_function": []}, "activation_function"),
    "eos negative": ({"eos_token_id": -1}, "eos_token_id: wanted null or a token id, found -1"),
    "eos list": ({"eos_token_id": [1]}, "eos_token_id: wanted an integer"),
    "two widths": ({"hidden_size": 13}, "n_embd is 12, but hidden_size is 13"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_malformed_config_is_refused(case: str, tmp_path: Path) -> None:
    content, match = BAD_CONFIGS[case]
    config = tiny_config()
    hf_folder(tmp_path, config, random_state(config))
    if isinstance(content, dict):
        content = json.dumps(config_json(config) | content)
    data = content.encode() if isinstance(content, str) else content
    (tmp_path / "config.json").write_bytes(data)
    message = refused(lambda: open_checkpoint(tmp_path), match, memory=(1 << 20) + 64 * len(data))
    assert str(tmp_path / "config.json") in message
    assert len(message) < 500


@pytest.mark.parametrize("field", ["n_layer", "n_embd", "n_head", "vocab_size", "n_positions"])
def test_a_config_without_a_size_is_refused(field: str, tmp_path: Path) -> None:
    fields = config_json(tiny_config())
    del fields[field]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    refused(lambda: read_config(tmp_path / "config.json"), f"{field} is missing")


def test_a_missing_config_is_named(tmp_path: Path) -> None:
    hf_folder(tmp_path, tiny_config(), random_state(tiny_config()))
    (tmp_path / "config.json").unlink()
    refused(lambda: open_checkpoint(tmp_path), r"config\.json: cannot be opened")


def test_a_given_config_replaces_the_files(tmp_path: Path) -> None:
    config = tiny_config(n_head=4)
    hf_folder(tmp_path, tiny_config(), random_state(config))
    with open_checkpoint(tmp_path, config) as checkpoint:
        assert checkpoint.config == config


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"activation_function": "gelu_pytorch_tanh"}, {}),
        ({"activation_function": "gelu_fast"}, {}),
        ({"reorder_and_upcast_attn": True}, {}),
        ({"n_ctx": 5}, {}),
        ({"some_future_field": {"nested": [1, None]}}, {}),
        ({"model_type": "gpt2", "hidden_size": 12}, {}),
        ({"layer_norm_epsilon": 1e-6}, {"layer_norm_epsilon": 1e-6}),
    ],
    ids=str,
)
def test_harmless_variants_of_the_config(
    changes: dict[str, Any], wanted: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config_json(tiny_config(), **changes)))
    assert read_config(path) == tiny_config(**wanted)


@pytest.mark.parametrize(
    ("old", "new"), [("n_positions", "n_ctx"), ("n_positions", "max_position_embeddings")]
)
def test_other_names_of_sizes(old: str, new: str, tmp_path: Path) -> None:
    fields = config_json(tiny_config())
    fields[new] = fields.pop(old)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert read_config(tmp_path / "config.json") == tiny_config()


def test_an_end_token_left_over_from_a_larger_vocabulary_counts_as_none(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config_json(tiny_config(), eos_token_id=50256)))
    with pytest.warns(UserWarning, match="eos_token_id 50256 lies outside the vocabulary of 23"):
        assert read_config(path).eos_token_id is None
    fields = config_json(tiny_config())
    del fields["eos_token_id"]
    path.write_text(json.dumps(fields))
    assert read_config(path).eos_token_id is None
    path.write_text(json.dumps(fields | {"vocab_size": 50257}))
    assert read_config(path).eos_token_id == 50256


def test_configs_are_read_as_transformers_reads_them(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"n_layer": 3, "n_embd": 24, "n_head": 2, "vocab_size": 60_000, "n_positions": 99}
    variants: list[dict[str, Any]] = [
        {},
        {"n_inner": 31, "layer_norm_epsilon": 2e-5},
        {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
        {"tie_word_embeddings": False, "eos_token_id": 7},
    ]
    for changes in variants:
        theirs = transformers.GPT2Config(**sizes, **changes)
        theirs.save_pretrained(tmp_path)
        ours = read_config(tmp_path / "config.json")
        assert ours.n_ctx == theirs.n_positions == 99
        for name in ours.to_dict():
            if name != "n_ctx":
                assert getattr(ours, name) == getattr(theirs, name), name


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


# Which format


def test_a_path_with_spaces_and_other_alphabets(tmp_path: Path) -> None:
    config = tiny_config()
    state = random_state(config)
    check_equal(hf_folder(tmp_path / "my modèle 模型 \\ 1", config, state), config, state)


@pytest.mark.parametrize("name", ["hparams.json", "checkpoint", "model-100.index"])
def test_openais_layout_goes_to_its_own_reader(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).touch()
    seen: list[Path] = []
    reader = SimpleNamespace(open_bundle=seen.append)
    monkeypatch.setitem(sys.modules, "gpt2_fast.checkpoints.openai_bundle", reader)
    monkeypatch.setattr(checkpoints, "openai_bundle", reader, raising=False)
    open_checkpoint(tmp_path)
    assert seen == [tmp_path]


def test_a_folder_without_a_model_says_what_it_holds(tmp_path: Path) -> None:
    refused(lambda: open_checkpoint(tmp_path), "no model here: .* found an empty folder")
    (tmp_path / "notes.txt").touch()
    refused(lambda: open_checkpoint(tmp_path), r"no model here: .* found notes\.txt")
    refused(lambda: open_checkpoint(tmp_path / "notes.txt"), "found a file; give the folder")
    refused(lambda: open_checkpoint(tmp_path / "gone"), "found nothing there")
    for impossible in ("x" * 300, "nul\0inside"):
        refused(lambda name=impossible: open_checkpoint(name), "cannot be read|nothing there")


# Pickles


def test_a_pickle_is_refused_and_the_printed_command_converts_it(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    config = tiny_config()
    state = random_state(config)
    folder = tmp_path / "it's a model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_json(config)))
    weights = {"transformer." + name: torch.from_numpy(v) for name, v in state.items()}
    weights["lm_head.weight"] = weights["transformer.wte.weight"]  # shares memory, as usual
    torch.save({"model": weights, "iteration": 5}, folder / "pytorch_model.bin")
    message = refused(lambda: open_checkpoint(folder), "a pickle, which can run any code")
    assert refused(lambda: open_checkpoint(folder / "pytorch_model.bin"), "a pickle") == message
    command = message.split("\n")[1].strip().replace("python ", f"{sys.executable} ", 1)
    subprocess.run(command, shell=True, check=True, cwd=tmp_path, timeout=120)
    check_equal(folder, config, state)


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt"])
def test_a_pickle_never_runs(suffix: str, tmp_path: Path) -> None:
    import pickle

    hit = tmp_path / "hit"
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / ("weights" + suffix)).write_bytes(pickle.dumps(Evil(hit)))
    refused(lambda: open_checkpoint(folder), "weights_only=True")
    assert not hit.exists()
    pickle.loads((folder / ("weights" + suffix)).read_bytes())
    assert hit.exists()  # so it would have


def test_a_binary_that_is_no_pickle_gets_no_conversion_command(tmp_path: Path) -> None:
    (tmp_path / "gpt2_124M.bin").write_bytes((20240326).to_bytes(4, "little") + bytes(1020))
    refused(lambda: open_checkpoint(tmp_path), r"no model here: .* found gpt2_124M\.bin")


def test_safetensors_beside_a_pickle_are_preferred(tmp_path: Path) -> None:
    config = tiny_config()
    state = random_state(config)
    hf_folder(tmp_path, config, state)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_equal(tmp_path, config, state)
