"""The readable model over the torch ops: accuracy at the four real widths, and torch.compile."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gpt2_fast import ops
from gpt2_fast.config import PUBLISHED, GPT2Config
from gpt2_fast.reference import GPT2Reference, random_state
from tests.accuracy import assert_as_accurate_as_torch

from .support import assert_same_bits, assert_same_bits_everywhere, each_dtype

SMALL = GPT2Config(n_layer=2, n_embd=40, n_head=5, n_ctx=32, vocab_size=101, eos_token_id=0)


def few_layers(size: str) -> GPT2Config:
    """A published width with one layer (two of the smaller ones) and a short vocabulary."""
    full = PUBLISHED[size]
    layers = 2 if full.n_embd <= 1024 else 1
    return GPT2Config(
        n_layer=layers,
        n_embd=full.n_embd,
        n_head=full.n_head,
        n_ctx=64,
        vocab_size=307,
        eos_token_id=0,
    )


def tokens_of(config: GPT2Config, batch: int, length: int) -> Tensor:
    """Random token ids."""
    generator = torch.Generator().manual_seed(length)
    return torch.randint(config.vocab_size, (batch, length), generator=generator)


@each_dtype
@pytest.mark.parametrize("size", PUBLISHED)
def test_published_widths(size: str, dtype: torch.dtype) -> None:
    config = few_layers(size)
    state = random_state(config, seed=5, dtype=dtype)
    ids = tokens_of(config, 2, 19)

    out = GPT2Reference(config, state, ops)(ids)

    truth = GPT2Reference(config, {name: t.double() for name, t in state.items()})(ids)
    assert_as_accurate_as_torch(out, GPT2Reference(config, state)(ids), truth)


@each_dtype
def test_bits_are_the_same_everywhere(dtype: torch.dtype) -> None:
    model = GPT2Reference(SMALL, random_state(SMALL, seed=5, dtype=dtype), ops)
    ids = tokens_of(SMALL, 2, 30)

    assert_same_bits_everywhere(lambda: model(ids))


@each_dtype
def test_a_sequence_does_not_see_its_company_or_its_future(dtype: torch.dtype) -> None:
    model = GPT2Reference(SMALL, random_state(SMALL, seed=5, dtype=dtype), ops)
    ids = tokens_of(SMALL, 5, 30)

    together = model(ids)

    for b, length in enumerate([30, 1, 17, 16, 29]):
        assert_same_bits(model(ids[b : b + 1, :length]), together[b : b + 1, :length].contiguous())


@each_dtype
def test_compiles_as_one_graph(dtype: torch.dtype) -> None:
    model = GPT2Reference(SMALL, random_state(SMALL, seed=5, dtype=dtype), ops)
    compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager", dynamic=True)

    for length in (7, 12):
        ids = tokens_of(SMALL, 2, length)
        assert_same_bits(compiled(ids), model(ids))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # inductor's own
def test_compiles_with_inductor() -> None:
    model = GPT2Reference(SMALL, random_state(SMALL, seed=5), ops)
    ids = tokens_of(SMALL, 2, 12)

    assert_same_bits(torch.compile(model.forward, fullgraph=True)(ids), model(ids))


def test_compiled_in_place_add_changes_its_argument() -> None:
    residual, delta, weight = torch.randn(3, 48), torch.randn(3, 48), torch.ones(48)

    def step(residual: Tensor) -> tuple[Tensor, Tensor]:
        out = ops.add_layernorm_(residual, delta, weight, weight)
        return out, residual * 2

    expected = residual.clone()
    results = step(expected)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(residual)

    assert_same_bits(residual, expected)
    for ours, theirs in zip(compiled, results, strict=True):
        assert_same_bits(ours, theirs)
