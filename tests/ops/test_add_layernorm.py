"""add_layernorm_ and its functional form: sum exact, norm accurate, nothing else changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gpt2_fast import ops, reference
from tests.accuracy import assert_as_accurate_as_torch

from .support import (
    GPT2_WIDTHS,
    ODD_WIDTHS,
    assert_opcheck,
    assert_refused,
    assert_same_bits,
    assert_same_bits_everywhere,
    doubles,
    each_dtype,
    normal,
    spread_out,
    vector,
)


def arguments(rows: int, width: int, offset: float, dtype: torch.dtype) -> list[Tensor]:
    """residual, delta, weight, bias."""
    return [
        (normal(rows, width, seed=1) * 3 + offset).to(dtype),
        normal(rows, width, dtype=dtype, seed=2),
        vector(width, mean=1.0, seed=3),
        vector(width, seed=4),
    ]


@each_dtype
@pytest.mark.parametrize("width", GPT2_WIDTHS + ODD_WIDTHS)
@pytest.mark.parametrize("offset", [0.0, 100.0], ids=["centred", "far-mean"])
def test_matches_float64(isa: str, width: int, offset: float, dtype: torch.dtype) -> None:
    for rows in (1, 3, 17):
        args = arguments(rows, width, offset, dtype)
        exact_sum, truth = reference.add_layernorm(*doubles(*args))
        torch_sum, same_dtype = reference.add_layernorm(*args)

        h, out = ops.add_layernorm(*args)

        assert_as_accurate_as_torch(out, same_dtype, truth)
        assert_same_bits(h, exact_sum.to(dtype))
        assert_same_bits(h, torch_sum)


@each_dtype
def test_in_place_is_the_functional_form(isa: str, dtype: torch.dtype) -> None:
    args = arguments(17, 100, 0.0, dtype)
    before = [a.clone() for a in args]
    h, out = ops.add_layernorm(*args)
    for after, earlier in zip(args, before, strict=True):
        assert_same_bits(after, earlier)

    in_place = ops.add_layernorm_(*args)

    assert_same_bits(args[0], h)
    assert_same_bits(in_place, out)
    for after, earlier in zip(args[1:], before[1:], strict=True):
        assert_same_bits(after, earlier)


@each_dtype
def test_adding_nothing_is_layernorm(isa: str, dtype: torch.dtype) -> None:
    residual, delta, weight, bias = arguments(17, 769, 0.0, dtype)

    out = ops.add_layernorm_(residual, torch.zeros_like(delta), weight, bias)

    assert_same_bits(out, ops.layernorm(residual, weight, bias))


@each_dtype
@pytest.mark.parametrize("width", [5, 769, 1600])
def test_bits_are_the_same_everywhere(width: int, dtype: torch.dtype) -> None:
    args = arguments(17, width, 10.0, dtype)

    assert_same_bits_everywhere(lambda: torch.cat(ops.add_layernorm(*args)))


def test_a_row_does_not_see_its_company(isa: str) -> None:
    residual, delta, weight, bias = arguments(17, 100, 0.0, torch.float32)
    delta[3] = torch.nan

    together = ops.add_layernorm(residual, delta, weight, bias)

    for r in range(17):
        alone = ops.add_layernorm(residual[r : r + 1], delta[r : r + 1], weight, bias)
        for ours, theirs in zip(alone, together, strict=True):
            assert_same_bits(ours, theirs[r : r + 1])


@pytest.mark.parametrize("op", ["add_layernorm", "add_layernorm_"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.ones(5)}, r"weight must have shape \(48\), got \(5\)"),
        ({"delta": torch.ones(2, 48)}, r"delta must have shape \(3, 48\), got \(2, 48\)"),
        ({"delta": torch.Tensor.bfloat16}, r"delta must be float32 like residual, got bfloat16"),
        ({"residual": torch.Tensor.half}, r"residual must be float32 or bfloat16, got float16"),
        (
            {"residual": spread_out},
            r"residual must be contiguous, got shape .* with strides \(96, 2\)",
        ),
        ({"delta": spread_out}, r"delta must be contiguous, got shape .* with strides \(96, 2\)"),
        ({"delta": lambda d: d.to("meta")}, r"delta must be on cpu, got meta"),
    ],
)
def test_refuses(op: str, changes: dict[str, Any], message: str) -> None:
    names = ("residual", "delta", "weight", "bias")
    good = dict(zip(names, arguments(3, 48, 0.0, torch.float32), strict=True))

    assert_refused(op, good, changes, message)


@each_dtype
@pytest.mark.parametrize("op", ["add_layernorm", "add_layernorm_"])
def test_opcheck(op: str, dtype: torch.dtype) -> None:
    assert_opcheck(op, *arguments(3, 48, 0.0, dtype), 1e-5)
