"""Logits of whole models, and greedy tokens, against transformers and float64."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import Tensor

from gpt2_fast import (
    GPT2,
    PUBLISHED,
    GPT2Config,
    reference,
)
from gpt2_fast.reference import GPT2Reference
from tests.accuracy import assert_as_accurate_as_torch
from tests.model_support import (
    BUILTIN,
    TINY,
    SpreadSource,
    model_of,
    random_ids,
    state_of,
    tiny_model,
    transformers_logits,
    transformers_model,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def few_layers(size: str) -> GPT2Config:
    """A published width with two layers and a short vocabulary."""
    full = PUBLISHED[size]
    return GPT2Config(
        n_layer=2, n_embd=full.n_embd, n_head=full.n_head, n_ctx=48, vocab_size=307, eos_token_id=0
    )


def shape(**changes: object) -> GPT2Config:
    """A small model that differs from an ordinary one in `changes`."""
    fields = {"n_layer": 2, "n_embd": 48, "n_head": 3, "n_ctx": 40, "vocab_size": 101}
    return GPT2Config(**{**fields, "eos_token_id": 0, **changes})  # type: ignore[arg-type]


ODD_SHAPES = {
    "head size 5": shape(n_embd=35, n_head=7),
    "head size 20": shape(n_embd=60, n_head=3),
    "head size 96": shape(n_embd=192, n_head=2),
    "head size 128": shape(n_embd=128, n_head=1),
    "head size 1": shape(n_embd=12, n_head=12),
    "width 100": shape(n_embd=100, n_head=5),
    "width 1": shape(n_embd=1, n_head=1),
    "11 heads": shape(n_embd=88, n_head=11),
    "n_inner 50": shape(n_inner=50),
    "n_inner 1": shape(n_inner=1),
    "untied": shape(tie_word_embeddings=False),
    "unscaled": shape(scale_attn_weights=False),
    "by layer": shape(n_layer=4, scale_attn_by_inverse_layer_idx=True),
    "unscaled, by layer": shape(scale_attn_weights=False, scale_attn_by_inverse_layer_idx=True),
    "epsilon 0.1": shape(layer_norm_epsilon=0.1),
    "n_ctx 37": shape(n_ctx=37),
    "vocabulary 1": shape(vocab_size=1, n_embd=16, n_head=1),
    "vocabulary 50257": shape(n_layer=1, vocab_size=50257),
    "one position": shape(n_ctx=1),
    "six layers": shape(n_layer=6),
}


def assert_logits_as_accurate_as_torch(source: SpreadSource, precision: str, length: int) -> None:
    """Ours and transformers' in one precision, both against float64 with unrounded weights."""
    ids = random_ids(source.config, length)
    with model_of(source, precision=precision) as model:
        ours = torch.from_numpy(model.forward(ids))
    theirs = transformers_logits(source, ids, PRECISIONS[precision]).float()
    truth = transformers_logits(source, ids, torch.float64)
    assert_as_accurate_as_torch(ours, theirs, truth)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("size", PUBLISHED)
def test_logits_at_published_widths(size: str, precision: str) -> None:
    source = SpreadSource(few_layers(size), seed=1, spread=0.02)
    assert_logits_as_accurate_as_torch(source, precision, 48)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ODD_SHAPES)
def test_logits_of_odd_shapes(name: str, precision: str) -> None:
    config = ODD_SHAPES[name]
    source = SpreadSource(config, seed=2, spread=0.2)
    assert_logits_as_accurate_as_torch(source, precision, config.n_ctx)


def test_logits_of_the_builtin_model() -> None:
    """Weights that were trained, with the outliers that training makes."""
    from transformers import GPT2LMHeadModel

    ids = random_ids(GPT2Config(vocab_size=4096, n_ctx=256, eos_token_id=0), 256)
    with GPT2.from_pretrained("builtin", precision="fp32") as model:
        ours = torch.from_numpy(model.forward(ids))
    with torch.no_grad():
        their = GPT2LMHeadModel.from_pretrained(BUILTIN, dtype=torch.float32)
        theirs = their(torch.tensor([ids])).logits[0]
        truth = their.double()(torch.tensor([ids])).logits[0]
    assert_as_accurate_as_torch(ours, theirs, truth)


@pytest.mark.parametrize("leave_out", ["h.1.attn.c_proj.bias", "h.0.ln_2.bias", "ln_f.weight"])
def test_the_rule_sees_a_parameter_left_out(leave_out: str) -> None:
    config = shape()
    neutral = np.full(
        config.tensor_shapes()[leave_out], float(leave_out.endswith("weight")), np.float32
    )
    ids = random_ids(config, 20)
    source = SpreadSource(config, spread=0.02)
    with model_of(SpreadSource(config, spread=0.02, replace={leave_out: neutral})) as model:
        ours = torch.from_numpy(model.forward(ids))
    with pytest.raises(AssertionError, match="ours"):
        assert_as_accurate_as_torch(
            ours,
            transformers_logits(source, ids, torch.float32),
            transformers_logits(source, ids, torch.float64),
        )


def layer_by_layer(source: SpreadSource, ids: list[int], dtype: torch.dtype) -> Tensor:
    """The reference's logits with one layer of parameters in memory at a time."""
    config = source.config

    def get(name: str) -> Tensor:
        tensor = torch.from_numpy(source.array(name)).to(dtype)
        return tensor.T.contiguous() if name.startswith("h.") and tensor.ndim == 2 else tensor

    def pair(prefix: str) -> tuple[Tensor, Tensor]:
        return get(prefix + ".weight"), get(prefix + ".bias")

    tokens, positions = torch.tensor(ids), torch.arange(len(ids))
    eps = config.layer_norm_epsilon
    x = reference.embed(tokens, positions, get("wte.weight"), get("wpe.weight"))
    for layer in range(config.n_layer):
        block = f"h.{layer}."
        h = reference.layernorm(x, *pair(block + "ln_1"), eps)
        qkv = reference.linear(h, *pair(block + "attn.c_attn"))
        qkv = qkv.reshape(1, len(ids), 3, config.n_head, config.head_size)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = reference.attention_prefill(q, k, v, config.attention_scale(layer))
        mixed = mixed.transpose(1, 2).reshape(len(ids), config.n_embd)
        x = reference.linear(mixed, *pair(block + "attn.c_proj"), residual=x)
        h = reference.layernorm(x, *pair(block + "ln_2"), eps)
        h = reference.linear(h, *pair(block + "mlp.c_fc"), gelu=True)
        x = reference.linear(h, *pair(block + "mlp.c_proj"), residual=x)
    head = "wte.weight" if config.tie_word_embeddings else "lm_head.weight"
    return reference.linear(reference.layernorm(x, *pair("ln_f"), eps), get(head))


def test_layer_by_layer_is_the_reference() -> None:
    """The truth of the slow test below is the truth of all others."""
    source = SpreadSource(shape(n_layer=3, tie_word_embeddings=False))
    ids = random_ids(source.config, 20)
    whole = GPT2Reference(source.config, state_of(source, torch.float64))(torch.tensor([ids]))[0]
    parts = layer_by_layer(source, ids, torch.float64)
    assert (whole - parts).abs().max() <= 1e-12 * whole.abs().max()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("size", ["124M", "774M"])
def test_logits_of_a_whole_model(size: str) -> None:
    source = SpreadSource(PUBLISHED[size], seed=3, spread=0.02)
    ids = random_ids(source.config, 24)
    with model_of(source) as model:
        ours = torch.from_numpy(model.forward(ids))
    theirs = layer_by_layer(source, ids, torch.float32)
    assert_as_accurate_as_torch(ours, theirs, layer_by_layer(source, ids, torch.float64))


@pytest.fixture
def _one_torch_thread() -> Iterator[None]:
    """Many small products: a second thread costs more than it gives on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_one_torch_thread")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_greedy_tokens_are_those_of_transformers(precision: str) -> None:
    """Over 256 tokens, wherever the margin in float64 exceeds what rounding can move."""
    config = GPT2Config(n_layer=2, n_ctx=288, vocab_size=1009, eos_token_id=None)
    source = SpreadSource(config, seed=4, spread=0.05)
    prompt, dtype = random_ids(config, 8), PRECISIONS[precision]
    with model_of(source, precision=precision) as model:
        ours = model.generate(prompt, temperature=0, max_new_tokens=256).token_ids
        logits = torch.from_numpy(model.forward(prompt + ours[:-1]))[len(prompt) - 1 :]
    theirs = transformers_model(source, dtype).generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=256,
        do_sample=False,
        pad_token_id=0,
    )[0, len(prompt) :]

    assert len(ours) == len(theirs) == 256
    truth = transformers_logits(source, prompt + ours[:-1], torch.float64)[len(prompt) - 1 :]
    same_dtype = transformers_logits(source, prompt + ours[:-1], dtype)[len(prompt) - 1 :]
    error = max(float((each.double() - truth).abs().max()) for each in (logits, same_dtype))
    best, second = truth.topk(2).values.T
    sure = best - second > 2 * error
    assert sure.sum() > (240 if precision == "fp32" else 100)  # else nothing was compared
    assert torch.equal(torch.tensor(ours)[sure], truth.argmax(-1)[sure])
    differ = (torch.tensor(ours) != theirs).nonzero()
    assert len(differ) == 0 or not sure[differ[0]]  # after the first the texts are different


@pytest.mark.parametrize("precision", PRECISIONS)
def test_greedy_tokens_are_the_argmax_of_our_logits(precision: str) -> None:
    model = tiny_model(precision)
    prompt = random_ids(TINY, 5)
    new = model.generate(prompt, temperature=0, max_new_tokens=50, ignore_eos=True).token_ids
    logits = model.forward(prompt + new[:-1])[len(prompt) - 1 :]
    assert new == logits.argmax(-1).tolist()
