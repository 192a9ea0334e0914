"""Keys and values as 8-bit integers: against their definition in numpy, at the ends of their range,
damaged, in memory and as an option. That nothing but a row's own past decides about its bits is
tested with the other precisions in test_bits_contract.py."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import gpt2_fast
from gpt2_fast import _C, GPT2, GPT2Config, plan
from gpt2_fast import numpy_reference as reference
from gpt2_fast.cli import main
from gpt2_fast.engine_check import dequantized
from gpt2_fast.errors import ParameterError
from gpt2_fast.numpy_reference import Arithmetic
from gpt2_fast.sources import RandomSource
from tests.bits_support import ALL_ROWS, perturbed, run_alone

Array = npt.NDArray[Any]
Parameters = dict[str, Array]

each_isa = pytest.mark.parametrize("isa", _C.isas())

# Head sizes: one group of 64, a part of one, two and a half, less than a panel.
SHAPES = {
    "64": GPT2Config(n_layer=2, n_embd=128, n_head=2, n_ctx=96, vocab_size=131, eos_token_id=None),
    "20": GPT2Config(n_layer=2, n_embd=60, n_head=3, n_ctx=96, vocab_size=131, eos_token_id=None),
    "160": GPT2Config(n_layer=2, n_embd=320, n_head=2, n_ctx=96, vocab_size=67, eos_token_id=None),
    "5": GPT2Config(n_layer=1, n_embd=10, n_head=2, n_ctx=96, vocab_size=19, eos_token_id=None),
}
PUBLISHED_HEAD = SHAPES["64"]


def parameters_of(config: GPT2Config) -> Parameters:
    """Random ones whose keys have a channel far larger than the rest, as GPT-2's do."""
    parameters = dict(perturbed(RandomSource(config, 3)))
    parameters["h.0.attn.c_attn.bias"][config.n_embd + 1 :: config.head_size] *= 30
    return parameters


def engine_of(
    config: GPT2Config, precision: str, parameters: Parameters, isa: str = "", threads: int = 2
) -> _C.Engine:
    where = (isa or _C.isas()[-1], threads, 4, "cpu", 0, True)
    engine = _C.Engine(config.to_dict(), precision, *where)
    for name, array in parameters.items():
        engine.load(name, np.ascontiguousarray(array, np.float32), "F32")
    return engine


def tokens_for(config: GPT2Config, count: int) -> list[int]:
    ids: list[int] = np.random.default_rng(5).integers(0, config.vocab_size, count).tolist()
    return ids


ARITHMETIC = {
    "fp32": Arithmetic(np.float64, int8_cache=True),
    "bf16": Arithmetic(np.float64, bf16=True, int8_cache=True),
    "int8": Arithmetic(np.float64, bf16=True, group=64, int8_cache=True),
}


@pytest.mark.parametrize("precision", ARITHMETIC)
@each_isa
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_those_of_the_definition(shape: str, isa: str, precision: str) -> None:
    """In float32 what is left is its rounding. In bfloat16 and int8 rows are rounded on the way,
    and one that falls to the other side costs as much as the cache does."""
    config = SHAPES[shape]
    parameters, tokens = parameters_of(config), tokens_for(config, 83)
    stored = parameters | (dequantized(parameters, precision) if precision == "int8" else {})
    how = ARITHMETIC[precision]
    expected = reference.gpt2(how, config, stored, np.array(tokens))
    like_the_rest = reference.gpt2(replace(how, int8_cache=False), config, stored, np.array(tokens))

    logits = run_alone(engine_of(config, precision, parameters, isa), tokens)

    usual = np.sqrt(np.mean((expected - like_the_rest) ** 2))
    error = np.sqrt(np.mean((logits - expected) ** 2))
    assert 0 < error < (1e-3 if precision == "fp32" else 2.5) * usual


def one_layer(
    head_size: int, query: Array, key: Array, value: Array, scale: bool
) -> tuple[GPT2Config, Parameters]:
    """A model of one layer and two heads whose query, key and value are the same at every position
    (of the first head; zero of the second), and whose logits are the normalised output of
    attention."""
    width = 2 * head_size
    config = GPT2Config(
        n_layer=1, n_embd=width, n_head=2, n_ctx=96, vocab_size=width, eos_token_id=None,
        tie_word_embeddings=False, scale_attn_weights=scale,
    )  # fmt: skip
    parameters = {n: np.zeros(s, np.float32) for n, s in config.tensor_shapes().items()}
    for part, vector in enumerate((query, key, value)):
        parameters["h.0.attn.c_attn.bias"][part * width : part * width + head_size] = vector
    parameters["h.0.attn.c_proj.weight"][:] = np.eye(width)
    parameters["ln_f.weight"][:] = 1
    parameters["lm_head.weight"][:] = np.eye(width)
    return config, parameters


def normalised(value: Array, eps: float) -> Array:
    padded = np.r_[value, np.zeros_like(value)].astype(np.float64)
    centred = padded - padded.mean()
    out: Array = centred / np.sqrt((centred**2).mean() + eps)
    return out


@each_isa
@pytest.mark.parametrize("scale", [1.0, 0.125, 3.0 * 2**-20, 2.0**50])
def test_every_integer_comes_back(scale: float, isa: str) -> None:
    """Values that are multiples of a scale, the largest 127 times it, are held exactly."""
    integers = np.random.default_rng(0).permutation(np.r_[127, -127, np.arange(-31, 31)])
    value, ones = (integers * scale).astype(np.float32), np.ones(64, np.float32)
    config, parameters = one_layer(64, ones, ones, value, scale=True)
    logits = run_alone(engine_of(config, "fp32", parameters, isa), [1, 2, 3])
    expected = normalised(value, config.layer_norm_epsilon)
    np.testing.assert_allclose(logits, np.tile(expected, (3, 1)), rtol=2e-5, atol=1e-6)


@each_isa
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_of_a_score(sign: int, isa: str) -> None:
    """Integers that are all 127 or -127, over two whole groups and a part of one: all scores are
    the same, 160, and so every position counts as much as another."""
    query = np.resize([1.0, sign], 160).astype(np.float32)
    value = np.resize(np.arange(128), 160).astype(np.float32)
    config, parameters = one_layer(160, query, query, value, scale=False)
    # Token 5's key is the other way round: its score is -160, and it does not count.
    parameters["wte.weight"][5, :] = 1e4 * np.resize([1.0, -1.0], 320)
    parameters["h.0.ln_1.weight"][:] = 1
    parameters["h.0.attn.c_attn.weight"][0, 320:480] = -2 * query
    logits = run_alone(engine_of(config, "fp32", parameters, isa), [1, 2, 5, 3])
    expected = normalised(value, config.layer_norm_epsilon)
    np.testing.assert_allclose(logits[[0, 1, 3]], np.tile(expected, (3, 1)), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("precision", ARITHMETIC)
@each_isa
def test_what_is_not_finite_stays_in_its_sequence(isa: str, precision: str) -> None:
    config = replace(PUBLISHED_HEAD, tie_word_embeddings=False)
    parameters = parameters_of(config)
    parameters["wte.weight"][7] = 3e38  # the layer norm's sums overflow
    engine = engine_of(config, precision, parameters, isa)
    good, bad = tokens_for(config, 20), [1, 2, 7, 3, 4]
    good = [8 if token == 7 else token for token in good]
    alone = run_alone(engine, good)
    assert np.isfinite(alone).all()

    first, second = engine.open(), engine.open()
    beside, spoilt = engine.step([(first, good, ALL_ROWS), (second, bad, ALL_ROWS)])
    engine.close(second)
    engine.close(first)

    np.testing.assert_array_equal(beside, alone)
    assert np.isfinite(spoilt[:2]).all()
    assert np.isnan(spoilt[2:]).all()  # every later row sees that key
    # The blocks that held it serve the next one.
    np.testing.assert_array_equal(run_alone(engine, good), alone)


@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_of_the_cache(shape: str) -> None:
    """A position's key takes whole groups of 64 and a scale each, its value whole sixteens and one
    scale."""
    config = SHAPES[shape]
    size = config.head_size
    groups, panels = -(-size // 64), -(-size // 16)
    position = 66 * groups + 16 * panels + 2
    blocks = -(-config.n_ctx // 16)
    found = plan(config, precision="int8", kv_precision="int8", max_batch=3, threads=1)
    assert found.cache_block == 16 * position * config.n_head * config.n_layer
    assert found.cache == 3 * blocks * found.cache_block
    assert found.weights == plan(config, precision="int8", max_batch=3, threads=1).weights


def test_half_the_cache_of_the_published_sizes() -> None:
    for config in gpt2_fast.PUBLISHED.values():
        usual = plan(config, precision="bf16").cache
        assert plan(config, precision="bf16", kv_precision="int8").cache == usual * 132 // 256


def test_the_option_reaches_the_engine(capsys: pytest.CaptureFixture[str]) -> None:
    ids = list(range(40, 140))
    with GPT2.from_pretrained("builtin", precision="fp32", device="cpu") as usual:
        exact = usual.forward(ids)
        assert usual.kv_precision is None
    with GPT2.from_pretrained(
        "builtin", precision="fp32", kv_precision="int8", device="cpu"
    ) as model:
        assert model.kv_precision == "int8"
        assert model.plan() == plan(model.config, precision="fp32", kv_precision="int8")
        error = np.abs(model.forward(ids) - exact).max()
        assert 0 < error < 0.05 * exact.std()
        text = str(model.generate("It was", max_new_tokens=12, temperature=0.7, seed=3))
    options = ["--precision", "fp32", "--kv-precision", "int8", "--device", "cpu"]
    sampling = ["--max-new-tokens", "12", "--temperature", "0.7", "--seed", "3"]
    assert main(["generate", "It was", *options, *sampling]) == 0
    assert text in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["int4", "bf16", "", 8, []])
def test_another_precision_is_refused(wrong: Any) -> None:
    config = SHAPES["5"]
    for make in (GPT2.from_config, plan):
        with pytest.raises(
            ParameterError, match=re.escape(f"kv_precision must be None or 'int8', got {wrong!r}")
        ):
            make(config, kv_precision=wrong)


def test_cuda_is_refused() -> None:
    with pytest.raises(ParameterError, match="kv_precision must be None on cuda, got 'int8'"):
        plan(SHAPES["5"], kv_precision="int8", device="cuda")
