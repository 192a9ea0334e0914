"""int8 and int4 on the CPU: every product against its definition in numpy, damaged and extreme
input, and what the whole of it costs a trained model."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from gpt2_fast import _C, GPT2, GPT2Config, plan
from gpt2_fast import numpy_reference as reference
from gpt2_fast.bfloat16 import round_to_bfloat16
from gpt2_fast.engine_check import dequantized
from gpt2_fast.errors import CheckpointError
from gpt2_fast.numpy_reference import Arithmetic
from gpt2_fast.sources import RandomSource
from tests.bits_support import ALL_ROWS, perturbed, run_alone
from tests.test_quantize import HELD_OUT, bits_per_byte

Array = npt.NDArray[Any]
Parameters = dict[str, Array]

GROUP = {"int8": 64, "int4": 32}
each_precision = pytest.mark.parametrize("precision", GROUP)
each_isa = pytest.mark.parametrize("isa", _C.isas())

SHAPES = {
    "a head of 64": GPT2Config(
        n_layer=2, n_embd=128, n_head=2, n_ctx=64, vocab_size=300, eos_token_id=None
    ),
    # Heads of 20, an inner width that ends in the middle of every unit, part of a panel of tokens.
    "ragged": GPT2Config(
        n_layer=2, n_embd=60, n_head=3, n_ctx=64, vocab_size=131, n_inner=100, eos_token_id=None
    ),
    "less than one group": GPT2Config(
        n_layer=1, n_embd=10, n_head=2, n_ctx=32, vocab_size=19, n_inner=7, eos_token_id=None
    ),
    "untied": GPT2Config(
        n_layer=1, n_embd=96, n_head=4, n_ctx=32, vocab_size=67, tie_word_embeddings=False,
        eos_token_id=None,
    ),
}  # fmt: skip


def parameters_of(config: GPT2Config, seed: int = 3) -> Parameters:
    return dict(perturbed(RandomSource(config, seed)))


def engine_with(
    config: GPT2Config, precision: str, parameters: Parameters, isa: str = "", threads: int = 1
) -> _C.Engine:
    engine = _C.Engine(config.to_dict(), precision, isa or _C.isas()[-1], threads, 4)
    for name, array in parameters.items():
        engine.load(name, np.ascontiguousarray(array, np.float32), "F32")
    return engine


def as_stored(parameters: Parameters, precision: str) -> Parameters:
    rounded = {n: round_to_bfloat16(a) if a.ndim == 2 else a for n, a in parameters.items()}
    return rounded | dequantized(parameters, precision)


def tokens_for(config: GPT2Config, count: int) -> Array:
    return np.random.default_rng(5).integers(0, config.vocab_size, count)


@each_precision
@each_isa
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_those_of_the_definition(shape: str, isa: str, precision: str) -> None:
    """The model with the stored weights and rows rounded to groups, in float64. What is left is
    float32's rounding, and an integer here and there that falls to the other side of a half."""
    config, parameters = SHAPES[shape], parameters_of(SHAPES[shape])
    tokens = tokens_for(config, 29)
    stored = as_stored(parameters, precision)
    exact = Arithmetic(np.float64, bf16=True, group=GROUP[precision])
    expected = reference.gpt2(exact, config, stored, tokens)
    unrounded = reference.gpt2(reference.TRUTH, config, stored, tokens)

    logits = run_alone(engine_with(config, precision, parameters, isa), tokens.tolist())

    usual = np.sqrt(np.mean((expected - unrounded) ** 2))
    error = np.sqrt(np.mean((logits - expected) ** 2))
    assert 0 < error < 0.5 * usual


def worst_case(config: GPT2Config, sign: int) -> Parameters:
    """Rows and weights at the ends of their ranges, all of one sign or alternating."""
    parameters = {n: np.zeros(s, np.float32) for n, s in config.tensor_shapes().items()}
    alternating = np.resize([1.0, float(sign)], config.n_embd).astype(np.float32)
    for name, array in parameters.items():
        if array.ndim == 2 and name.startswith("h."):
            array[:] = np.resize([1.0, float(sign)], array.shape[0])[:, None]
    parameters["wte.weight"][:] = alternating
    for name in ("h.0.ln_1", "h.0.ln_2", "ln_f"):
        parameters[name + ".bias"][:] = alternating
    return parameters


@each_precision
@each_isa
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_are_exact(sign: int, isa: str, precision: str) -> None:
    """Every product of integers is 127 * 127 (8 * 127): pairs of them fill 16 bits."""
    config = GPT2Config(
        n_layer=1, n_embd=256, n_head=2, n_ctx=8, vocab_size=40, n_inner=64, eos_token_id=None
    )
    logits = run_alone(engine_with(config, precision, worst_case(config, sign), isa), [1, 2])
    np.testing.assert_allclose(logits, config.n_embd, rtol=1e-2 if precision == "int8" else 0.1)


@each_precision
@each_isa
def test_rows_that_are_not_finite_give_nan_and_spoil_nobody(isa: str, precision: str) -> None:
    config = SHAPES["a head of 64"]
    parameters = parameters_of(config)
    parameters["wte.weight"][7] = 3e38  # the layer norm's sums overflow
    engine = engine_with(config, precision, parameters, isa)
    with np.errstate(over="ignore"):
        engine.load("wte.weight", parameters["wte.weight"], "F32")
    alone = run_alone(engine, [1, 2, 3])
    good, bad = engine.open(), engine.open()
    together, spoilt = engine.step([(good, [1, 2, 3], ALL_ROWS), (bad, [7], ALL_ROWS)])
    np.testing.assert_array_equal(together, alone)
    assert np.isnan(spoilt).all()


@each_precision
@each_isa
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("unit", [0, 37, 99])
def test_one_number_that_is_not_finite_is_seen(
    isa: str, precision: str, unit: int, sign: int
) -> None:
    """A lane of its own in a group, the first group or one at the end of the row."""
    config = SHAPES["ragged"]
    parameters = parameters_of(config)
    # The sum overflows: GELU makes infinity of plus infinity, NaN of minus infinity.
    parameters["h.0.ln_2.bias"][:] = 5
    parameters["h.0.mlp.c_fc.weight"][:, unit] = sign * 3e38
    engine = engine_with(config, precision, parameters, isa)

    assert np.isnan(run_alone(engine, tokens_for(config, 5).tolist())).all()


@each_precision
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_must_be_finite(value: float, precision: str) -> None:
    config = SHAPES["ragged"]
    parameters = parameters_of(config)
    parameters["h.1.mlp.c_fc.weight"][59, 99] = value
    message = rf"tensor 'h.1.mlp.c_fc.weight': element {59 * 100 + 99} is "
    with pytest.raises(CheckpointError, match=message):
        engine_with(config, precision, parameters)


@pytest.mark.parametrize(("precision", "bits"), [("int8", 8.25), ("int4", 4.5)])
def test_weights_take_their_bits(precision: str, bits: float) -> None:
    """And float32 vectors, and the position table in 16 bits."""
    config = GPT2Config()
    matrices = sum(math.prod(s) for n, s in config.tensor_shapes().items() if len(s) == 2)
    matrices -= config.n_ctx * config.n_embd
    vectors = sum(s[0] for s in config.tensor_shapes().values() if len(s) == 1)
    wanted = matrices * bits / 8 + vectors * 4 + config.n_ctx * config.n_embd * 2
    assert plan(config, precision=precision).weights == pytest.approx(wanted, rel=0.004)


@pytest.mark.parametrize(("precision", "cost"), [("int8", 0.005), ("int4", 0.03)])
def test_the_trained_model_hardly_loses(precision: str, cost: float) -> None:
    """With activations quantised too."""
    with GPT2.from_pretrained("builtin", precision="fp32", device="cpu", max_batch=1) as exact:
        before = bits_per_byte(exact, HELD_OUT)
    with GPT2.from_pretrained("builtin", precision=precision, device="cpu", max_batch=1) as model:
        ratio = bits_per_byte(model, HELD_OUT) / before
    assert 1 - cost / 4 < ratio < 1 + cost
    assert ratio != 1
