"""linear: every epilogue, ragged K, N and rows, rows that do not see their company."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gpt2_fast import ops, reference
from tests.accuracy import assert_as_accurate_as_torch

from .support import (
    assert_opcheck,
    assert_parity,
    assert_refused,
    assert_same_bits,
    assert_same_bits_everywhere,
    doubles,
    each_dtype,
    normal,
    spread_out,
    vector,
)

EPILOGUES = ("none", "bias", "gelu", "residual", "gelu-residual")


def arguments(
    epilogue: str, rows: int, K: int, N: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, bool]:
    """x, weight, bias, residual, gelu."""
    return (
        normal(rows, K, dtype=dtype, seed=K),
        (normal(N, K, seed=N) * K**-0.5).to(dtype),
        None if epilogue == "none" else vector(N, seed=1),
        normal(rows, N, dtype=dtype, seed=2) if "residual" in epilogue else None,
        "gelu" in epilogue,
    )


def assert_linear_parity(epilogue: str, rows: int, K: int, N: int, dtype: torch.dtype) -> None:
    """The accuracy rule over one call with all rows, and over calls with 1, 7 and the others."""
    x, weight, bias, residual, gelu = args = arguments(epilogue, rows, K, N, dtype)
    truth = reference.linear(*doubles(*args))
    same_dtype = reference.linear(*args)
    parts = [
        ops.linear(x[part], weight, bias, None if residual is None else residual[part], gelu)
        for part in (slice(0, 1), slice(1, 8), slice(8, rows))
    ]

    assert_as_accurate_as_torch(torch.cat(parts), same_dtype, truth)
    assert_same_bits(ops.linear(*args), torch.cat(parts))


# The largest error of few values is luck, and torch's may be 0: a sample has at least 1000 outputs.
@each_dtype
@pytest.mark.parametrize(
    ("N", "epilogue"),
    [(65, epilogue) for epilogue in EPILOGUES] + [(N, "bias") for N in (1, 15, 16, 17, 63, 64)],
)
def test_matches_float64(isa: str, N: int, epilogue: str, dtype: torch.dtype) -> None:
    for K in (1, 2, 255, 256, 257):
        assert_linear_parity(epilogue, max(17, -(-1000 // N)), K, N, dtype)


@each_dtype
@pytest.mark.parametrize("rows", range(1, 18))
def test_every_number_of_rows(isa: str, rows: int, dtype: torch.dtype) -> None:
    assert_parity("linear", *arguments("gelu-residual", rows, 100, 1000, dtype))


@each_dtype
@pytest.mark.parametrize(("K", "N"), [(768, 2304), (3072, 65), (6400, 64), (1600, 769)])
def test_gpt2_sizes(isa: str, K: int, N: int, dtype: torch.dtype) -> None:
    assert_linear_parity("bias", 17, K, N, dtype)


@each_dtype
@pytest.mark.parametrize(("K", "N"), [(1, 1), (257, 65), (3072, 100), (6400, 16)])
@pytest.mark.parametrize("epilogue", ["none", "gelu-residual"])
def test_bits_are_the_same_everywhere(epilogue: str, K: int, N: int, dtype: torch.dtype) -> None:
    args = arguments(epilogue, 17, K, N, dtype)

    assert_same_bits_everywhere(lambda: ops.linear(*args))


@each_dtype
@pytest.mark.parametrize(("K", "N"), [(257, 65), (768, 48), (3072, 17)])
def test_a_row_does_not_see_its_company(isa: str, K: int, N: int, dtype: torch.dtype) -> None:
    x, weight, bias, residual, gelu = arguments("gelu-residual", 17, K, N, dtype)
    assert residual is not None
    x[4] = torch.nan
    x[9, 0] = torch.inf

    together = ops.linear(x, weight, bias, residual, gelu)

    assert together[4].isnan().all()
    for company in (1, 2, 3, 5, 6, 8, 16):
        for first in range(0, 17 - company + 1, company):
            rows = slice(first, first + company)
            part = ops.linear(x[rows], weight, bias, residual[rows], gelu)
            assert_same_bits(part, together[rows])


@each_dtype
def test_an_output_does_not_see_its_neighbours(isa: str, dtype: torch.dtype) -> None:
    x, weight, bias, _, _ = arguments("bias", 5, 300, 131, dtype)
    assert bias is not None

    together = ops.linear(x, weight, bias)

    for first, last in [(0, 1), (1, 18), (16, 80), (130, 131)]:
        part = ops.linear(x, weight[first:last], bias[first:last])
        assert_same_bits(part, together[:, first:last].contiguous())


@each_dtype
def test_many_rows(isa: str, dtype: torch.dtype) -> None:
    """More rows than any tile or block of them holds."""
    x, weight, bias, _, _ = arguments("bias", 600, 64, 33, dtype)

    together = assert_parity("linear", x, weight, bias)

    for r in (0, 255, 256, 511, 512, 599):
        assert_same_bits(ops.linear(x[r : r + 1], weight, bias), together[r : r + 1])


def test_keeps_any_leading_shape(isa: str) -> None:
    x, weight, bias, residual, _ = arguments("residual", 24, 48, 20, torch.float32)
    assert residual is not None

    out = ops.linear(x.reshape(2, 3, 4, 48), weight, bias, residual.reshape(2, 3, 4, 20))

    assert out.shape == (2, 3, 4, 20)
    assert_same_bits(out.reshape(24, 20), ops.linear(x, weight, bias, residual))
    assert_same_bits(out[0, 0, 0], ops.linear(x[0], weight, bias, residual[0]))
    assert ops.linear(x[:0], weight, bias).shape == (0, 20)


def test_arguments_stay_as_they_were(isa: str) -> None:
    args = arguments("gelu-residual", 5, 48, 20, torch.float32)
    before = [a.clone() if isinstance(a, Tensor) else a for a in args]

    ops.linear(*args)

    for after, earlier in zip(args[:4], before[:4], strict=True):
        assert isinstance(after, Tensor)
        assert isinstance(earlier, Tensor)
        assert_same_bits(after, earlier)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.ones(20, 5)}, r"weight must have shape \(20, 48\), got \(20, 5\)"),
        ({"weight": torch.ones(48)}, r"weight must have 2 dimensions, got shape \(48\)"),
        ({"weight": torch.tensor(1.0)}, r"weight must have 2 dimensions, got shape \(\)"),
        ({"x": torch.tensor(1.0)}, r"x must have at least 1 dimensions, got shape \(\)"),
        ({"bias": torch.ones(48)}, r"bias must have shape \(20\), got \(48\)"),
        ({"residual": torch.ones(3, 48)}, r"residual must have shape \(3, 20\), got \(3, 48\)"),
        ({"residual": torch.ones(20)}, r"residual must have shape \(3, 20\), got \(20\)"),
        ({"x": torch.Tensor.half}, r"x must be float32 or bfloat16, got float16"),
        ({"weight": torch.Tensor.bfloat16}, r"weight must be float32 like x, got bfloat16"),
        ({"bias": torch.Tensor.bfloat16}, r"bias must be float32, got bfloat16"),
        ({"residual": torch.Tensor.bfloat16}, r"residual must be float32 like x, got bfloat16"),
        ({"x": spread_out}, r"x must be contiguous, got shape .* with strides \(96, 2\)"),
        (
            {"weight": lambda w: w.T.contiguous().T},
            r"weight must be contiguous, got shape .* with strides",
        ),
        ({"weight": lambda w: w.to("meta")}, r"weight must be on cpu, got meta"),
        ({"residual": lambda w: w.to("meta")}, r"residual must be on cpu, got meta"),
    ],
)
def test_refuses(changes: dict[str, Any], message: str) -> None:
    names = ("x", "weight", "bias", "residual", "gelu")
    args = arguments("residual", 3, 48, 20, torch.float32)

    assert_refused("linear", dict(zip(names, args, strict=True)), changes, message)


@each_dtype
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_opcheck(epilogue: str, dtype: torch.dtype) -> None:
    assert_opcheck("linear", *arguments(epilogue, 3, 48, 20, dtype))
