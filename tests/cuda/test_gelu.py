"""gelu on CUDA: every range of its curve, every 16-bit value, ragged ends."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gpt2_fast import reference
from tests.accuracy import assert_as_accurate_as_torch

from .arrays import DTYPES, Array, array_of, normal, tensor_of, unwritten

# The rule measures the largest error, so each range that has another size of result stands alone.
RANGES = [(-20, -6), (-6, -3), (-3, -1), (-1, -0.1), (-0.1, 0.1), (0.1, 1), (1, 3), (3, 20)]

each_type = pytest.mark.parametrize("name", list(DTYPES))


def gelu(simt: Any, x: Tensor, *, offset: int = 0) -> Array:
    """op_gelu; the value behind the last must stay."""
    name = next(name for name, dtype in DTYPES.items() if dtype == x.dtype)
    out = unwritten((x.numel() + 1,), x.dtype, offset=offset)
    simt.op_gelu(array_of(x, offset=offset), out[:-1], name)
    assert (out[-1:].view(np.uint8) == 0xFF).all()
    return out[:-1]


@each_type
@pytest.mark.parametrize(("low", "high"), RANGES)
def test_matches_float64(simt: Any, schedule: str, low: float, high: float, name: str) -> None:
    x = torch.linspace(low, high, 4099).to(DTYPES[name])

    out = tensor_of(gelu(simt, x), x.dtype)

    assert_as_accurate_as_torch(out, reference.gelu(x), reference.gelu(x.double()))


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_every_16_bit_value(simt: Any, schedule: str, name: str) -> None:
    """Within a step of the type, down to 5e-38: there exp overflows and the result is 0."""
    x = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(DTYPES[name])
    out, wide = tensor_of(gelu(simt, x), x.dtype).double(), x.double()
    finite = x.isfinite()
    # The reference's 1 + tanh cancels below -6, even in float64; this is the same number.
    truth = wide * torch.sigmoid((8 / torch.pi) ** 0.5 * (wide + 0.044715 * wide**3))

    error = (out - truth).abs()[finite]

    kind = torch.finfo(x.dtype)
    assert (error <= kind.eps * (truth.abs()[finite] + kind.tiny) + 5e-38).all()
    assert out[x.isnan()].isnan().all()
    assert out[x == torch.inf].isinf().all()
    assert not out[x == -torch.inf].nan_to_num(0).any()  # the formula says NaN, the limit 0


@each_type
def test_a_value_does_not_see_its_place(simt: Any, schedule: str, name: str) -> None:
    x = (normal(2133) * 3).to(DTYPES[name])
    together = gelu(simt, x)

    np.testing.assert_array_equal(gelu(simt, x, offset=1), together)
    for count in (1, 3, 4, 5, 7, 8, 9, 1023, 1024, 1025):
        np.testing.assert_array_equal(gelu(simt, x[:count]), together[:count])
        np.testing.assert_array_equal(gelu(simt, x[-count:], offset=1), together[-count:])


@each_type
def test_in_place(simt: Any, schedule: str, name: str) -> None:
    x = normal(1033).to(DTYPES[name])
    memory = array_of(x)

    simt.op_gelu(memory, memory, name)

    np.testing.assert_array_equal(memory, gelu(simt, x))


def test_nothing_to_do(simt: Any, schedule: str) -> None:
    assert gelu(simt, torch.empty(0)).size == 0
