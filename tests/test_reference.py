"""The definition of correct, against formulas written out, Random123's vectors and transformers."""

from __future__ import annotations

import ast
import math
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from gpt2_fast import reference
from gpt2_fast.config import GPT2Config
from gpt2_fast.errors import ParameterError
from gpt2_fast.reference import GPT2Reference, random_state

if TYPE_CHECKING:
    from torch import Tensor

# Two float64 evaluations of one formula differ by roundings only: thousands of them at 2e-16.
ROUNDINGS = 1e-12

SHAPES = {
    "plain": GPT2Config(n_layer=2, n_embd=48, n_head=4, n_ctx=32, vocab_size=101, eos_token_id=0),
    "odd-heads": GPT2Config(
        n_layer=3, n_embd=35, n_head=7, n_ctx=17, vocab_size=53, eos_token_id=None
    ),
    "n_inner": GPT2Config(
        n_layer=1, n_embd=24, n_head=3, n_ctx=9, vocab_size=40, n_inner=31, eos_token_id=0
    ),
    "inverse-layer": GPT2Config(
        n_layer=4,
        n_embd=32,
        n_head=2,
        n_ctx=20,
        vocab_size=64,
        scale_attn_by_inverse_layer_idx=True,
        eos_token_id=0,
    ),
    "unscaled": GPT2Config(
        n_layer=2,
        n_embd=32,
        n_head=2,
        n_ctx=20,
        vocab_size=64,
        scale_attn_weights=False,
        layer_norm_epsilon=0.1,
        eos_token_id=0,
    ),
    "untied": GPT2Config(
        n_layer=2,
        n_embd=32,
        n_head=4,
        n_ctx=20,
        vocab_size=77,
        tie_word_embeddings=False,
        eos_token_id=0,
    ),
}

each_shape = pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES.keys())


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal float64 values."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens_of(config: GPT2Config, batch: int, length: int) -> Tensor:
    """Random token ids; the last id is among them."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(config.vocab_size, (batch, length), generator=generator)
    ids[0, 0] = config.vocab_size - 1
    return ids


def assert_equal_but_for_rounding(ours: Tensor, theirs: Tensor | np.ndarray[Any, Any]) -> None:
    """Equal shape, and equal within the roundings of float64 at the size of the largest value."""
    theirs = torch.as_tensor(theirs)
    assert ours.dtype == theirs.dtype == torch.float64
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= ROUNDINGS * theirs.abs().max()


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_the_published_words(
    counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]
) -> None:
    """Known-answer vectors of Random123 (kat_vectors, philox4x32 with 10 rounds)."""
    assert tuple(reference.philox4x32(np.array(counter, np.uint32), key).tolist()) == words


def test_noise_follows_its_definition() -> None:
    seed, position, sample, token = 0x0123456789ABCDEF, (5 << 32) + 9, 3, 4 * 17 + 2
    counter = np.array([17, 9, 3, 5], np.uint32)
    word = int(reference.philox4x32(counter, (0x89ABCDEF, 0x01234567))[2])

    noise = reference.gumbel_noise(100, seed, position, sample)

    assert noise.shape == (100,)
    expected = -math.log(-math.log(((word >> 8) + 0.5) / 2**24))
    assert noise[token] == pytest.approx(expected, rel=1e-14)
    assert (noise[:70] == reference.gumbel_noise(70, seed, position, sample)).all()


def test_noise_is_gumbel() -> None:
    """Kolmogorov-Smirnov distance over 200,000 values; 1.95 / sqrt(n) is passed once in 1000."""
    noise = np.sort(np.concatenate([reference.gumbel_noise(50_000, 7, p, 0) for p in range(4)]))

    distance = np.abs(np.exp(-np.exp(-noise)) - (np.arange(noise.size) + 0.5) / noise.size).max()

    assert distance < 1.95 / math.sqrt(noise.size)


def test_layernorm_is_its_formula() -> None:
    x, weight, bias = normal(7, 33, seed=1) * 5 + 3, normal(33, seed=2), normal(33, seed=3)
    a = x.numpy()
    spread = np.sqrt(a.var(-1, keepdims=True) + 0.01)
    expected = (a - a.mean(-1, keepdims=True)) / spread * weight.numpy() + bias.numpy()

    assert_equal_but_for_rounding(reference.layernorm(x, weight, bias, 0.01), expected)
    h, out = reference.add_layernorm(x, x, weight, bias, 0.01)
    assert torch.equal(h, 2 * x)
    assert_equal_but_for_rounding(out, reference.layernorm(2 * x, weight, bias, 0.01))
    assert torch.equal(reference.add_layernorm_(x, x.clone(), weight, bias, 0.01), out)
    assert torch.equal(x, h)


def gelu_formula(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The tanh form."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def test_gelu_is_its_formula() -> None:
    x = torch.linspace(-8, 8, 401, dtype=torch.float64)

    assert_equal_but_for_rounding(reference.gelu(x), gelu_formula(x.numpy()))


def test_linear_is_its_formula() -> None:
    x, weight = normal(2, 5, 7, seed=1), normal(9, 7, seed=2)
    bias, residual = normal(9, seed=3), normal(2, 5, 9, seed=4)
    product = np.einsum("btk,nk->btn", x.numpy(), weight.numpy())
    biased = product + bias.numpy()

    assert_equal_but_for_rounding(reference.linear(x, weight), product)
    assert_equal_but_for_rounding(reference.linear(x, weight, bias), biased)
    assert_equal_but_for_rounding(
        reference.linear(x, weight, bias, residual), biased + residual.numpy()
    )
    assert_equal_but_for_rounding(
        reference.linear(x, weight, bias, residual, gelu=True),
        gelu_formula(biased) + residual.numpy(),
    )


@pytest.mark.parametrize(("new", "cached"), [(1, 1), (6, 6), (1, 9), (4, 9), (8, 9)])
def test_attention_is_its_formula(new: int, cached: int) -> None:
    q, k, v = normal(2, 3, new, 5, seed=1), normal(2, 3, cached, 5, seed=2), normal(2, 3, cached, 5)
    expected = np.zeros(q.shape)
    for b in range(2):
        for h in range(3):
            for t in range(new):
                seen = cached - new + t + 1
                weights = np.exp(0.3 * k[b, h, :seen].numpy() @ q[b, h, t].numpy())
                expected[b, h, t] = weights / weights.sum() @ v[b, h, :seen].numpy()

    assert_equal_but_for_rounding(reference.attention_prefill(q, k, v, 0.3), expected)

    lengths = torch.tensor([cached, max(1, cached - 2)], dtype=torch.int32)
    out = reference.attention_decode(q[:, :, -1], k, v, lengths, 0.3)
    assert_equal_but_for_rounding(out[0], expected[0, :, -1])
    if new > 2:
        out = reference.attention_decode(q[:, :, -3], k, v, lengths, 0.3)
        assert_equal_but_for_rounding(out[1], expected[1, :, -3])


def test_attention_refuses_what_has_no_answer() -> None:
    x = normal(1, 1, 4, 8)
    with pytest.raises(ParameterError, match="attention_prefill: k must"):
        reference.attention_prefill(x, x[:, :, :3], x[:, :, :3], 1.0)
    for length in (0, 5, -1):
        with pytest.raises(ParameterError, match=f"lengths must be in 1..4, got {length}"):
            reference.attention_decode(x[:, :, 0], x, x, torch.tensor([length]), 1.0)


def test_embed_is_its_formula() -> None:
    wte, wpe = normal(11, 5, seed=1), normal(4, 5, seed=2)

    out = reference.embed(torch.tensor([10, 0, 3]), torch.tensor([3, 0, 3]), wte, wpe)

    assert torch.equal(out, torch.stack([wte[10] + wpe[3], wte[0] + wpe[0], wte[3] + wpe[3]]))


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        ((0, 1.0, 0.0, False), [0, 1, 2, 3, 4]),
        ((1, 1.0, 0.0, False), [1]),
        ((2, 1.0, 0.0, False), [1, 2, 3]),  # a tie at the k-th
        ((4, 1.0, 0.0, False), [0, 1, 2, 3]),
        ((9, 1.0, 0.0, False), [0, 1, 2, 3, 4]),
        ((0, 0.0, 0.0, False), [1]),
        ((0, 0.45, 0.0, False), [1, 2, 3]),  # the crossing one and its tie
        ((0, 0.75, 0.0, False), [1, 2, 3]),
        ((0, 0.85, 0.0, False), [0, 1, 2, 3]),
        ((0, 0.0, 0.0, True), [1]),  # never none
        ((0, 0.45, 0.0, True), [1]),
        ((0, 0.59, 0.0, True), [1]),
        ((0, 0.61, 0.0, True), [1, 2, 3]),  # the tie, though 0.8 exceeds 0.61
        ((0, 0.85, 0.0, True), [1, 2, 3]),
        ((0, 1.0, 0.49, False), [1, 2, 3]),
        ((0, 1.0, 0.51, False), [1]),
        ((0, 1.0, 1.0, False), [1]),
        ((3, 0.49, 0.0, False), [1]),  # top_p of what top_k left: 0.4 / 0.8
        ((0, 0.75, 0.51, False), [1]),
    ],
)
def test_filters_keep(filters: tuple[int, float, float, bool], kept: list[int]) -> None:
    z = np.log([0.15, 0.4, 0.2, 0.2, 0.05])

    assert np.flatnonzero(reference.kept_by_filters(z, *filters)).tolist() == kept


def test_sample_draws_from_the_softmax() -> None:
    """Chi-squared over 5 tokens and 4,000 draws; 99.9th percentile of 4 degrees is 18.5."""
    p = np.array([0.15, 0.4, 0.2, 0.2, 0.05])
    R = 4000
    rows = torch.full((R,), 1.0)
    none, positions = torch.zeros(R, dtype=torch.int64), torch.arange(R)

    tokens, logprobs = reference.sample(
        torch.tensor(np.log(p)).expand(R, 5) + 3,
        rows,
        none,
        rows,
        none,
        False,
        none,
        none,
        positions,
    )

    counts = np.bincount(tokens.numpy(), minlength=5)
    assert ((counts - R * p) ** 2 / (R * p)).sum() < 18.5
    assert_equal_but_for_rounding(logprobs, np.log(p)[tokens.numpy()])


def test_sample_greedy_ties_and_nan() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0], [0.0, torch.nan, 1.0], [-0.0, 0.0, -1.0]])
    zero, one = torch.zeros(3), torch.ones(3)
    ids = torch.zeros(3, dtype=torch.int64)

    for temperature, drawn in ((zero, {0: 1, 2: 0}), (one * 1e-45, {0: 1, 2: 0}), (one, {})):
        tokens, logprobs = reference.sample(
            logits, temperature, ids, one, zero, False, ids, ids, ids
        )
        assert tokens[1] == -1
        assert logprobs.isnan().tolist() == [False, True, False]
        assert all(tokens[row] == token for row, token in drawn.items())


@pytest.mark.parametrize("hopeless", [torch.inf, -torch.inf])
def test_sample_needs_a_finite_best(hopeless: float) -> None:
    logits = torch.zeros(2, 5)
    logits[0] = -torch.inf
    logits[0, 2] = hopeless
    one, ids = torch.ones(2), torch.zeros(2, dtype=torch.int64)

    tokens, logprobs = reference.sample(logits, one, ids, one, 0 * one, False, ids, ids, ids)

    assert tokens[0] == -1
    assert tokens[1] >= 0
    assert logprobs.isnan().tolist() == [True, False]


@each_shape
def test_matches_transformers(config: GPT2Config) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_layer=config.n_layer,
            n_embd=config.n_embd,
            n_head=config.n_head,
            n_positions=config.n_ctx,
            vocab_size=config.vocab_size,
            n_inner=config.n_inner,
            layer_norm_epsilon=config.layer_norm_epsilon,
            scale_attn_weights=config.scale_attn_weights,
            scale_attn_by_inverse_layer_idx=config.scale_attn_by_inverse_layer_idx,
            tie_word_embeddings=config.tie_word_embeddings,
            bos_token_id=0,
            eos_token_id=0,
            attn_implementation="eager",
        )
    )
    state = random_state(config, seed=1, dtype=torch.float64)
    renamed = {
        name if name == "lm_head.weight" else f"transformer.{name}": tensor
        for name, tensor in state.items()
    }
    renamed.setdefault("lm_head.weight", state["wte.weight"])
    theirs = theirs.double().eval()
    theirs.load_state_dict(renamed)
    ids = tokens_of(config, 2, config.n_ctx)

    ours = GPT2Reference(config, state).forward(ids)

    with torch.no_grad():
        assert_equal_but_for_rounding(ours, theirs(ids).logits)


@each_shape
def test_every_parameter_counts(config: GPT2Config) -> None:
    """Changing any one tensor changes the logits: none is forgotten."""
    state = random_state(config, seed=1, dtype=torch.float64)
    ids = tokens_of(config, 1, config.n_ctx)
    before = GPT2Reference(config, state)(ids)

    for name, tensor in state.items():
        after = GPT2Reference(config, {**state, name: tensor.flip(0) + 0.01})(ids)
        assert not torch.equal(after, before), name


def test_random_state_is_reproducible_and_not_plain() -> None:
    config = SHAPES["untied"]
    state, again = random_state(config, 3), random_state(config, 3)

    assert {name: tuple(t.shape) for name, t in state.items()} == config.tensor_shapes()
    assert all(torch.equal(tensor, again[name]) for name, tensor in state.items())
    assert not torch.equal(state["wte.weight"], random_state(config, 4)["wte.weight"])
    assert all((tensor != 0).all() for tensor in state.values())
    assert torch.equal(
        random_state(config, 3, torch.bfloat16)["wte.weight"], state["wte.weight"].bfloat16()
    )


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("h.0.ln_1.bias", None, r"state must hold h\.0\.ln_1\.bias"),
        ("h.2.ln_1.bias", torch.ones(48), r"state must hold only .* got h\.2\.ln_1\.bias too"),
        ("lm_head.weight", torch.ones(101, 48), r"got lm_head\.weight too"),
        (
            "h.1.attn.c_attn.weight",
            torch.ones(144, 48),
            r"h\.1\.attn\.c_attn\.weight'\] must have shape \(48, 144\), got \(144, 48\)",
        ),
        ("wpe.weight", torch.ones(32, 48).half(), r"wpe\.weight'\] must have the float dtype"),
    ],
)
def test_refuses_a_state_that_does_not_fit(name: str, tensor: Tensor | None, message: str) -> None:
    config = SHAPES["plain"]
    state = random_state(config)
    if tensor is None:
        del state[name]
    else:
        state[name] = tensor

    with pytest.raises(ParameterError, match=message):
        GPT2Reference(config, state)


def test_refuses_more_positions_than_the_model_has() -> None:
    config = SHAPES["n_inner"]
    model = GPT2Reference(config, random_state(config))

    with pytest.raises(ParameterError, match=r"at most n_ctx = 9 positions, got 10"):
        model(torch.zeros(1, 10, dtype=torch.int64))


def test_knows_nothing_of_the_native_module() -> None:
    tree = ast.parse(Path(str(reference.__file__)).read_text(encoding="utf-8"))
    imported = {
        name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in [getattr(node, "module", None), *(alias.name for alias in node.names)]
    }

    assert "config" in imported
    assert imported.isdisjoint({"_C", "ops", "gpt2_fast", "gpt2_fast._C", "gpt2_fast.ops"})


def test_the_package_does_not_import_torch() -> None:
    code = "import sys, gpt2_fast; sys.exit('torch' in sys.modules)"
    folder = Path(str(reference.__file__)).parents[1]

    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=folder)
