"""GPT2Config: the published sizes, derived numbers, and every field out of range."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from gpt2_fast import _C, PUBLISHED, GPT2Config, ParameterError
from tests.model_support import SpreadSource, model_of


@pytest.mark.parametrize(
    ("name", "layers", "width", "heads", "parameters"),
    [
        ("124M", 12, 768, 12, 124_439_808),
        ("355M", 24, 1024, 16, 354_823_168),
        ("774M", 36, 1280, 20, 774_030_080),
        ("1558M", 48, 1600, 25, 1_557_611_200),
    ],
)
def test_published_sizes(name: str, layers: int, width: int, heads: int, parameters: int) -> None:
    config = PUBLISHED[name]
    assert (config.n_layer, config.n_embd, config.n_head) == (layers, width, heads)
    assert config.parameters == parameters
    assert config.head_size == 64
    assert (config.n_ctx, config.vocab_size, config.eos_token_id) == (1024, 50257, 50256)
    assert config.inner_size == 4 * width
    assert config.layer_norm_epsilon == 1e-5
    assert config.attention_scale(7) == 0.125


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False},
        {"n_inner": 7},
        {"n_layer": 1, "n_embd": 35, "n_head": 7, "n_ctx": 9, "vocab_size": 3, "eos_token_id": 2},
    ],
    ids=str,
)
def test_parameters_are_the_sum_of_the_shapes(changes: dict[str, Any]) -> None:
    config = GPT2Config(**{"n_layer": 3, **changes})
    assert config.parameters == sum(map(math.prod, config.tensor_shapes().values()))
    assert ("lm_head.weight" in config.tensor_shapes()) is not config.tie_word_embeddings


def test_attention_scale() -> None:
    shape = {"n_embd": 96, "n_head": 6}
    assert GPT2Config(**shape).attention_scale(3) == 0.25
    assert GPT2Config(**shape, scale_attn_weights=False).attention_scale(3) == 1.0
    by_layer = GPT2Config(**shape, scale_attn_by_inverse_layer_idx=True)
    assert [by_layer.attention_scale(i) for i in (0, 1, 3)] == [0.25, 0.125, 0.0625]
    both = dataclasses.replace(by_layer, scale_attn_weights=False)
    assert both.attention_scale(1) == 0.5


SIZES = ("n_layer", "n_embd", "n_head", "n_ctx", "vocab_size", "n_inner")
NO_SIZES: list[Any] = [0, -1, 1 << 40, 1.0, "1", True, math.nan, [1], np.int64(4)]


@pytest.mark.parametrize("value", NO_SIZES, ids=repr)
@pytest.mark.parametrize("name", SIZES)
def test_sizes_out_of_range(name: str, value: object) -> None:
    with pytest.raises(ParameterError, match=rf"{name} must be an integer in 1\.\.\d+, got"):
        GPT2Config(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", SIZES[:-1])
def test_sizes_must_be_given(name: str) -> None:
    with pytest.raises(ParameterError, match=f"{name} must be an integer"):
        GPT2Config(**{name: None})  # type: ignore[arg-type]
    assert GPT2Config(n_inner=None).inner_size == 3072


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_embd": 100, "n_head": 12}, "n_embd must be divisible by n_head, got .* 100.* 12"),
        ({"n_embd": 4, "n_head": 8}, "n_embd must be divisible by n_head"),
        ({"layer_norm_epsilon": 0}, r"layer_norm_epsilon must be a number in \(0, 1\), got 0"),
        ({"layer_norm_epsilon": -1e-5}, "layer_norm_epsilon"),
        ({"layer_norm_epsilon": 1}, "layer_norm_epsilon"),
        ({"layer_norm_epsilon": math.nan}, "layer_norm_epsilon"),
        ({"layer_norm_epsilon": math.inf}, "layer_norm_epsilon"),
        ({"layer_norm_epsilon": "1e-5"}, "layer_norm_epsilon"),
        ({"layer_norm_epsilon": True}, "layer_norm_epsilon"),
        ({"scale_attn_weights": 1}, "scale_attn_weights must be true or false, got 1"),
        ({"scale_attn_by_inverse_layer_idx": None}, "scale_attn_by_inverse_layer_idx must be"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false, got 'yes'"),
        ({"eos_token_id": 50257}, r"eos_token_id must be None or in 0\.\.50256, got 50257"),
        ({"eos_token_id": -1}, "eos_token_id"),
        ({"eos_token_id": 1.0}, "eos_token_id"),
        ({"eos_token_id": False}, "eos_token_id"),
        ({"vocab_size": 5}, r"eos_token_id must be None or in 0\.\.4, got 50256"),
    ],
    ids=str,
)
def test_fields_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        GPT2Config(**changes)


def test_a_config_is_a_value() -> None:
    config = GPT2Config(n_layer=2)
    assert config == GPT2Config(n_layer=2)
    assert hash(config) == hash(GPT2Config(n_layer=2))
    assert config != GPT2Config(n_layer=3)
    assert GPT2Config(**config.to_dict()) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.n_layer = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        GPT2Config(12)  # type: ignore[misc]


def test_an_epsilon_that_float32_has_not() -> None:
    """A number that is above 0 here and 0 in the kernels is refused, not divided by."""
    config = GPT2Config(
        n_layer=1, n_embd=8, n_head=1, n_ctx=4, vocab_size=9, eos_token_id=None,
        layer_norm_epsilon=1e-60,
    )  # fmt: skip
    with pytest.raises(ParameterError, match="layer_norm_epsilon must be in"):
        model_of(SpreadSource(config))


@pytest.mark.parametrize("name", ["n_layer", "n_embd", "n_head", "n_ctx", "vocab_size", "n_inner"])
def test_the_native_module_checks_again(name: str) -> None:
    for value in (0, -1, 1 << 40):
        fields = GPT2Config(n_inner=64).to_dict() | {name: value}
        with pytest.raises(ParameterError, match=name):
            _C.plan(fields, "fp32", 1, 1)
