"""Group quantisation: held to its own definition in numpy, to error bounds, and to what it costs a
trained model."""

from __future__ import annotations

import math
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2_fast import _C, GPT2
from gpt2_fast.errors import ParameterError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gpt2_fast.sources import Source, Tensor

Array = npt.NDArray[Any]

GROUP = {"int8": 64, "int4": 32}
RANGE = {"int8": (-127, 127), "int4": (-8, 7)}
DIVISORS = np.arange(7, 9.25, 0.25)
each_precision = pytest.mark.parametrize("precision", GROUP)

# Jane Austen, "Persuasion", chapter 24: of the end that the built-in model was not trained on.
HELD_OUT = """\
Who can be in doubt of what followed?  When any two young people take it into their heads to \
marry, they are pretty sure by perseverance to carry their point, be they ever so poor, or ever so \
imprudent, or ever so little likely to be necessary to each other's ultimate comfort. This may be \
bad morality to conclude with, but I believe it to be truth; and if such parties succeed, how \
should a Captain Wentworth and an Anne Elliot, with the advantage of maturity of mind, \
consciousness of right, and one independent fortune between them, fail of bearing down every \
opposition?  They might in fact, have borne down a great deal more than they met with, for there \
was little to distress them beyond the want of graciousness and warmth.  Sir Walter made no \
objection, and Elizabeth did nothing worse than look cold and unconcerned."""


def bfloat16(bits: Array) -> Array:
    """The values of bfloat16 bits, as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(values: Array, *, up: bool = False) -> Array:
    """float32 rounded to the nearest bfloat16, ties to even, or up; as float32."""
    bits = values.astype(np.float32).view(np.uint32)
    bits = bits + (0xFFFF if up else 0x7FFF + (bits >> 16 & 1))
    return (bits & np.uint32(0xFFFF0000)).view(np.float32)


def quotients(groups: Array, scales: Array, precision: str) -> Array:
    """q of (G, group) for (G, 1) scales that are not 0."""
    with np.errstate(under="ignore"):
        return np.clip(np.rint(groups / scales), *RANGE[precision])


def squared_error(groups: Array, scales: Array) -> Array:
    """(G,) sums in float64 over groups of int4."""
    wide = groups.astype(np.float64)
    return ((wide - quotients(groups, scales, "int4") * scales.astype(np.float64)) ** 2).sum(1)


def grouped(weights: Array, precision: str) -> Array:
    """(N, K) as (G, group), padded with zeros as the definition says."""
    outputs, inputs = weights.shape
    padded = np.zeros((outputs, -(-inputs // 64) * 64), np.float32)
    padded[:, :inputs] = weights
    return padded.reshape(-1, GROUP[precision])


def quantized(weights: Array, precision: str) -> tuple[Array, Array, Array]:
    """Groups (G, group), their q, their scales (G, 1) as float32."""
    q, bits = _C.quantize(np.ascontiguousarray(weights, np.float32), precision)
    groups = grouped(weights, precision)
    assert q.dtype == np.int8
    assert bits.dtype == np.uint16
    assert q.shape == (len(weights), groups.size // len(weights))
    assert bits.shape == (len(weights), q.shape[1] // GROUP[precision])
    return groups, q.reshape(groups.shape), bfloat16(bits).reshape(-1, 1)


def assert_as_defined(weights: Array, precision: str) -> None:
    """Every group is what the header of csrc/engine/quantize.h says."""
    groups, q, scales = quantized(weights, precision)
    most = np.abs(groups).max(1, keepdims=True)
    zero = (most < np.float32(2.0**-100))[:, 0]
    assert not q[zero].any()
    assert not scales[zero].any()
    groups, q, scales, most = (x[~zero] for x in (groups, q, scales, most))
    assert (q == quotients(groups, scales, precision)).all()
    assert (q >= RANGE[precision][0]).all()
    assert (q <= RANGE[precision][1]).all()
    if precision == "int8":
        assert (scales == to_bfloat16(most / np.float32(127), up=True)).all()
        # each quotient is rounded once before it is rounded to an integer
        slack = 1 + 128 * 2.0**-23
        assert (np.abs(groups - q * scales.astype(np.float64)) <= scales / 2 * slack).all()
        return
    with np.errstate(over="ignore"):
        unit = 2.0 ** -np.floor(np.log2(most.astype(np.float64)))
        errors = np.array(
            [
                squared_error(groups * unit, to_bfloat16(sign * most / np.float32(d)) * unit)
                for d in DIVISORS
                for sign in (1, -1)
            ]
        )
    allowed = [sign * to_bfloat16(most / np.float32(d)) for d in DIVISORS for sign in (1, -1)]
    assert np.any([scales == each for each in allowed], axis=0).all()
    ours = squared_error(groups * unit, scales * unit)
    assert (ours <= errors.min(0, initial=np.inf) * (1 + 1e-5) + 1e-14).all()
    assert (ours <= errors[0] * (1 + 1e-5) + 1e-14).all()  # largest / 7, the plain way


def random_weights(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def awkward(kind: str) -> Array:
    """(8, 256) weights of a kind that breaks careless code."""
    rng = np.random.default_rng(3)
    w = random_weights(8, 256, seed=3)
    if kind == "outliers":
        w[rng.random(w.shape) < 0.02] *= 1000
    elif kind == "denormal":
        w = w * np.float32(1e-39)
    elif kind == "around the smallest group":
        w = w * np.float32(2.0) ** rng.integers(-108, -92, (8, 1)).astype(np.float32)
    elif kind == "huge":
        w = w / np.abs(w).max() * np.finfo(np.float32).max
    elif kind == "dust beside one":
        w = w * np.float32(1e-30)
        w[:, ::40] = 1
    elif kind == "one sign":
        w = np.abs(w)
    elif kind == "constant":
        w = np.full_like(w, -0.37)
    elif kind == "zeros":
        w[:4] = 0
        w[4:, 32:96] = -0.0
    elif kind == "ties":
        w = rng.integers(-16, 15, w.shape).astype(np.float32) / 2
        w[:, ::32] = 7
    return w


KINDS = [
    "outliers",
    "denormal",
    "around the smallest group",
    "huge",
    "dust beside one",
    "one sign",
    "constant",
    "zeros",
    "ties",
]


@each_precision
@pytest.mark.parametrize("kind", KINDS)
def test_awkward_weights_are_quantised_as_defined(kind: str, precision: str) -> None:
    assert_as_defined(awkward(kind), precision)


@each_precision
@pytest.mark.parametrize("inputs", [1, 31, 32, 33, 63, 64, 65, 96, 100, 768])
def test_inputs_are_padded_with_zeros_to_a_multiple_of_64(inputs: int, precision: str) -> None:
    weights = random_weights(5, inputs, seed=inputs)
    assert_as_defined(weights, precision)
    q, scales = _C.quantize(weights, precision)
    assert not q[:, inputs:].any()
    used = -(-inputs // GROUP[precision])
    assert scales[:, :used].all()
    assert not scales[:, used:].any()


@each_precision
@given(st.integers(0, 2**32), st.floats(-30, 30), st.sampled_from([1, 2, 4]))
def test_random_weights_are_quantised_as_defined(
    precision: str, seed: int, exponent: float, power: int
) -> None:
    weights = random_weights(4, 192, seed=seed) ** power
    assert_as_defined((weights * 2.0**exponent).astype(np.float32), precision)


@each_precision
def test_a_group_depends_on_itself_alone(precision: str) -> None:
    weights = random_weights(6, 256)
    q, scales = _C.quantize(weights, precision)
    size = GROUP[precision]
    for n, start in ((0, 0), (3, 64), (5, 256 - size)):
        alone, scale = _C.quantize(np.copy(weights[n : n + 1, start : start + size]), precision)
        assert (alone[0, :size] == q[n, start : start + size]).all()
        assert scale[0, 0] == scales[n, start // size]


@each_precision
def test_a_power_of_two_moves_the_scale_only(precision: str) -> None:
    weights = random_weights(4, 128)
    q, scales = _C.quantize(weights, precision)
    for power in (-96, -30, 1, 100):
        other_q, other = _C.quantize(weights * np.float32(2.0**power), precision)
        assert (other_q == q).all()
        assert (bfloat16(other) == bfloat16(scales) * np.float32(2.0**power)).all()


def test_the_free_end_of_int4_goes_to_the_largest() -> None:
    """-8 has no counterpart, so the scale takes the sign that gives it to the largest weight."""
    group = np.tile(np.arange(-8, 8, dtype=np.float32), 2)[None]
    for sign in (1, -1):
        _, q, scales = quantized(group * sign, "int4")
        assert scales[0, 0] == sign
        assert q.min() == -8


@each_precision
def test_ties_go_to_the_even_integer(precision: str) -> None:
    low, high = RANGE[precision]
    group = np.zeros((1, 64), np.float32)
    group[:, ::2] = np.resize([low, high, low + 1, high - 1, 2, -3, 5], 32)
    group[0, 1::32] = group[0, 9::32] = [0.5, 3.5]
    group[0, 3::32] = group[0, 11::32] = [-1.5, -2.5]
    q, scales = _C.quantize(group, precision)
    assert (bfloat16(scales) == 1).all()
    assert (q == np.rint(group)).all()
    assert q[0, [1, 33, 3, 35]].tolist() == [0, 4, -2, -2]


@pytest.mark.parametrize(("precision", "crc"), [("int8", 0x4B2D0F6D), ("int4", 0x693B912A)])
def test_every_machine_gives_the_same_bits(precision: str, crc: int) -> None:
    """Of weights that are made of integers alone, and so the same everywhere."""
    state = np.arange(64 * 320, dtype=np.uint32) * np.uint32(2654435761)
    state ^= state >> np.uint32(15)
    mixed = (state * np.uint32(2246822519)).astype(np.int64) - 2**31
    weights = (mixed.astype(np.float32) / np.float32(2.0**31)).reshape(64, 320)
    weights *= weights * weights
    q, scales = _C.quantize(weights, precision)
    assert zlib.crc32(scales.tobytes(), zlib.crc32(q.tobytes())) == crc


def test_int4_beats_the_plain_scale() -> None:
    """The search has to earn its time: a quarter less error than largest / 7 on normal weights."""
    groups, q, scales = quantized(random_weights(64, 1024), "int4")
    most = np.abs(groups).max(1, keepdims=True)
    plain = squared_error(groups, to_bfloat16(most / np.float32(7))).sum()
    assert squared_error(groups, scales).sum() < 0.75 * plain
    assert (q == -8).any()


@pytest.mark.parametrize(
    ("weights", "precision", "message"),
    [
        (np.zeros((2, 3), np.float64), "int8", "weights must be float32"),
        (np.zeros(3, np.float32), "int8", "weights must have 2 dimensions"),
        (np.zeros((2, 3), np.float32), "fp16", "precision must be int8 or int4, got 'fp16'"),
        (np.array([[1, np.nan]], np.float32), "int4", "weights must be finite, got nan at 1"),
        (np.array([[np.inf, 1]], np.float32), "int8", "weights must be finite, got inf at 0"),
    ],
)
def test_bad_weights_are_refused(weights: Array, precision: str, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        _C.quantize(weights, precision)


class Dequantized:
    """A source whose matrices went through quantisation and back; positions stay as they are."""

    def __init__(self, source: Source, precision: str) -> None:
        self.config = source.config
        self._source, self._precision = source, precision

    def tensors(self) -> Iterator[Tensor]:
        for name, dtype, array, release in self._source.tensors():
            if array.ndim == 1 or name == "wpe.weight":
                yield name, dtype, array, release
                continue
            weights = np.asarray(array, np.float32)  # [in, out], but token embeddings [V, C]
            weights = weights if name == "wte.weight" else weights.T
            _, q, scales = quantized(weights, self._precision)
            back = (q * scales).reshape(len(weights), -1)[:, : weights.shape[1]]
            yield (
                name,
                "F32",
                np.ascontiguousarray(back if name == "wte.weight" else back.T),
                release,
            )

    def close(self) -> None:
        pass


def bits_per_byte(model: GPT2, text: str) -> float:
    return float(-model.score(text, bos=True).total / math.log(2) / len(text.encode()))


@pytest.mark.parametrize(("precision", "cost"), [("int8", 0.005), ("int4", 0.03)])
def test_the_trained_model_hardly_loses(precision: str, cost: float) -> None:
    """Over all 200 kB that it was not trained on: int8 0.013 %, int4 0.61 %."""
    with GPT2.from_pretrained("builtin", precision="fp32", max_batch=1) as exact:
        source = Dequantized(exact._source, precision)
        with GPT2(source, exact.tokenizer, name="q", precision="fp32", max_batch=1) as model:
            ratio = bits_per_byte(model, HELD_OUT) / bits_per_byte(exact, HELD_OUT)
    assert 1 - cost / 4 < ratio < 1 + cost
    assert ratio != 1
