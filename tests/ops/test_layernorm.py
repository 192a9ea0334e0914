"""layernorm: accuracy far from 0 and with outlier channels, equal bits, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gpt2_fast import ops
from gpt2_fast.errors import ParameterError

from .support import (
    GPT2_WIDTHS,
    ODD_WIDTHS,
    assert_opcheck,
    assert_parity,
    assert_refused,
    assert_same_bits,
    assert_same_bits_everywhere,
    each_dtype,
    normal,
    spread_out,
    vector,
)

KINDS = ("centred", "far-mean", "outliers", "constant", "tiny")


def rows_of(kind: str, rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Inputs that each break another shortcut."""
    x = normal(rows, width, seed=width)
    if kind == "far-mean":  # one pass over sums and squares cancels
        x = x + 100
    elif kind == "outliers":  # what GPT-2's residual stream looks like
        x[:, :: max(1, width // 3)] *= 3000
    elif kind == "constant":  # variance 0: only eps stands under the root
        x = x[:, :1].expand(rows, width)
    elif kind == "tiny":
        x = x * 1e-18
    return x.to(dtype).contiguous()


def parameters(width: int) -> tuple[Tensor, Tensor]:
    """Weight and bias."""
    return vector(width, mean=1.0, seed=1), vector(width, seed=2)


@each_dtype
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", GPT2_WIDTHS + ODD_WIDTHS)
def test_matches_float64(isa: str, width: int, kind: str, dtype: torch.dtype) -> None:
    for rows in (1, 3, 17):  # one token; fewer than a vector; a ragged last block
        assert_parity("layernorm", rows_of(kind, rows, width, dtype), *parameters(width), 1e-5)


@each_dtype
@pytest.mark.parametrize("width", [5, 769, 1600])
@pytest.mark.parametrize("kind", KINDS)
def test_bits_are_the_same_everywhere(width: int, kind: str, dtype: torch.dtype) -> None:
    x = rows_of(kind, 17, width, dtype)

    assert_same_bits_everywhere(lambda: ops.layernorm(x, *parameters(width)))


def test_a_row_does_not_see_its_company(isa: str) -> None:
    x = rows_of("centred", 17, 100, torch.float32)
    x[3] = torch.nan
    x[5, 7] = torch.inf

    together = ops.layernorm(x, *parameters(100))

    assert together[[3, 5]].isnan().all()
    for r in range(17):
        assert_same_bits(together[r : r + 1], ops.layernorm(x[r : r + 1], *parameters(100)))


def test_eps_counts(isa: str) -> None:
    assert_parity("layernorm", normal(3, 48), *parameters(48), 0.5)


def test_keeps_any_leading_shape(isa: str) -> None:
    x = normal(2, 3, 4, 48)

    out = ops.layernorm(x, *parameters(48))

    assert out.shape == x.shape
    assert_same_bits(out.reshape(24, 48), ops.layernorm(x.reshape(24, 48), *parameters(48)))
    assert_same_bits(out[0, 0, 0], ops.layernorm(x[0, 0, 0].clone(), *parameters(48)))
    assert ops.layernorm(x[:0], *parameters(48)).shape == (0, 3, 4, 48)


def test_takes_parameters_of_a_module(isa: str) -> None:
    module = torch.nn.LayerNorm(48)
    x = normal(3, 48)

    with torch.no_grad():
        out = ops.layernorm(x, module.weight, module.bias, module.eps)

    assert_same_bits(out, ops.layernorm(x, module.weight.data, module.bias.data, module.eps))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.ones(5)}, r"weight must have shape \(48\), got \(5\)"),
        ({"bias": torch.ones(1, 48)}, r"bias must have shape \(48\), got \(1, 48\)"),
        ({"x": torch.tensor(1.0)}, r"x must have at least 1 dimensions, got shape \(\)"),
        ({"x": torch.Tensor.half}, r"x must be float32 or bfloat16, got float16"),
        ({"weight": torch.Tensor.bfloat16}, r"weight must be float32, got bfloat16"),
        ({"x": spread_out}, r"x must be contiguous, got shape .* with strides \(96, 2\)"),
        ({"bias": spread_out}, r"bias must be contiguous, got shape .* with strides \(2\)"),
        ({"x": lambda x: x.to("meta")}, r"weight must be on meta, got cpu"),
        ({"weight": lambda x: x.to("meta")}, r"weight must be on cpu, got meta"),
    ],
)
def test_refuses(changes: dict[str, Any], message: str) -> None:
    weight, bias = parameters(48)

    assert_refused(
        "layernorm", {"x": normal(3, 48), "weight": weight, "bias": bias}, changes, message
    )


def test_refuses_what_has_no_kernel() -> None:
    weight, bias = parameters(48)

    with pytest.raises(
        ParameterError, match=r"^layernorm: x must be strided on cpu( or cuda)?, got sparse_coo"
    ):
        ops.layernorm(normal(3, 48).to_sparse(), weight, bias)


@each_dtype
def test_opcheck(dtype: torch.dtype) -> None:
    assert_opcheck("layernorm", normal(3, 48, dtype=dtype), *parameters(48), 1e-5)
