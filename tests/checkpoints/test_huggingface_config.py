"""`config.json`: fault 14 of the loader list, and agreement with transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gpt2_fast.checkpoints import open_checkpoint
from gpt2_fast.checkpoints.huggingface_config import read_config
from tests.checkpoints_support import (
    config_json,
    hf_folder,
    random_state,
    refused,
    tiny_config,
)

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
    "indivisible": (
        {"n_head": 5},
        "n_embd must be divisible by n_head, got n_embd 12 and n_head 5",
    ),
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
