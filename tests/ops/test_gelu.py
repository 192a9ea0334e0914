"""gelu: every range of its curve, the ends of the number line, equal bits, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gpt2_fast import ops

from .support import (
    assert_opcheck,
    assert_parity,
    assert_refused,
    assert_same_bits,
    assert_same_bits_everywhere,
    each_dtype,
    normal,
    spread_out,
)

# The rule measures the largest error, so each range that has another size of result stands alone.
RANGES = [(-20, -6), (-6, -3), (-3, -1), (-1, -0.1), (-0.1, 0.1), (0.1, 1), (1, 3), (3, 20)]


@each_dtype
@pytest.mark.parametrize(("low", "high"), RANGES)
def test_matches_float64(isa: str, low: float, high: float, dtype: torch.dtype) -> None:
    assert_parity("gelu", torch.linspace(low, high, 4099).to(dtype))


@each_dtype
def test_small_values_are_halved(isa: str, dtype: torch.dtype) -> None:
    smallest = torch.finfo(dtype).tiny
    x = torch.tensor([1e-10, -1e-20, 1e-30, -2 * smallest]).to(dtype)

    assert_same_bits(ops.gelu(x), x / 2)


@each_dtype
def test_denormals_are_zero(isa: str, dtype: torch.dtype) -> None:
    """Read and written: docs/numerics.md."""
    smallest = torch.finfo(dtype).tiny
    x = torch.tensor([smallest, -smallest, smallest / 2, -smallest / 4]).to(dtype)
    assert (x != 0).all()

    assert (ops.gelu(x) == 0).all()


@each_dtype
def test_ends_of_the_number_line(isa: str, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    x = torch.tensor([torch.inf, largest, 1e30, 50.0, -50.0, -1e30, -largest, 0.0]).to(dtype)

    out = ops.gelu(x)

    assert_same_bits(out[:4], x[:4])
    assert (out[4:] == 0).all()
    assert ops.gelu(torch.full((17,), torch.nan, dtype=dtype)).isnan().all()


@each_dtype
def test_minus_infinity_gives_no_false_number(isa: str, dtype: torch.dtype) -> None:
    """The formula says -inf * 0, the limit says 0."""
    out = ops.gelu(torch.full((17,), -torch.inf, dtype=dtype))

    assert (out.isnan() | (out == 0)).all()


def all_bfloat16() -> Tensor:
    """Every value bfloat16 has."""
    return torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.bfloat16)


def test_bfloat16_is_rounded_as_the_exact_value_is(isa: str) -> None:
    """Where the curve bends. An exponential good to 7e-6 (docs/numerics.md) may change the rounding
    of one value in 2^-9 / 7e-6 / 2, about 140, if all of its error arrives."""
    x = all_bfloat16()
    x = x[(x.abs() > 0.01) & (x.abs() < 8)]

    exact = x.double() * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (x + 0.044715 * x.double() ** 3))

    assert (ops.gelu(x) != exact.to(x.dtype)).sum() <= len(x) // 140


def test_bits_are_the_same_everywhere() -> None:
    x = all_bfloat16()

    assert_same_bits_everywhere(lambda: ops.gelu(x))
    assert_same_bits_everywhere(lambda: ops.gelu(x.float()))


@each_dtype
def test_a_value_does_not_see_its_place(isa: str, dtype: torch.dtype) -> None:
    x = normal(133, dtype=dtype) * 3

    together = ops.gelu(x)

    for count in (1, 2, 15, 16, 17, 31, 33, 132):
        assert_same_bits(ops.gelu(x[:count].clone()), together[:count])
        assert_same_bits(ops.gelu(x[-count:].clone()), together[-count:])
    assert_same_bits(ops.gelu(x.reshape(7, 19)).reshape(-1), together)
    assert ops.gelu(x[:0]).shape == (0,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.Tensor.half}, r"x must be float32 or bfloat16, got float16"),
        ({"x": torch.Tensor.long}, r"x must be float32 or bfloat16, got int64"),
        ({"x": spread_out}, r"x must be contiguous, got shape .* with strides \(96, 2\)"),
    ],
)
def test_refuses(changes: dict[str, Any], message: str) -> None:
    assert_refused("gelu", {"x": normal(3, 48)}, changes, message)


@each_dtype
def test_opcheck(dtype: torch.dtype) -> None:
    assert_opcheck("gelu", normal(3, 48, dtype=dtype))
