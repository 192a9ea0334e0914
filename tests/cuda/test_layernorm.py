"""layernorm on CUDA: accuracy far from 0 and with outliers, exact padding, one order of bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gpt2_fast import reference
from tests.accuracy import assert_as_accurate_as_torch

from .arrays import DTYPES, Array, array_of, normal, tensor_of, unwritten

WIDTHS = (768, 1024, 1280, 1600, 1, 7, 33, 100)
WIDE = 2182  # more than the registers of a warp hold, and no multiple of four
KINDS = ("normal", "offset", "outliers", "constant")
ROWS = 33
EPS = 1e-5

each_kind = pytest.mark.parametrize("kind", KINDS)
each_width = pytest.mark.parametrize("width", [*WIDTHS, WIDE])
each_half = pytest.mark.parametrize("half", ["bf16", "fp16"])
each_type = pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])


def rows_of(kind: str, width: int, rows: int = ROWS, seed: int = 0) -> Tensor:
    """Inputs that each break another shortcut."""
    x = normal(rows, width, seed=seed)
    if kind == "offset":  # mean >> spread: one pass over sums and squares cancels
        x += 1000
    if kind == "outliers":  # what GPT-2's residual looks like
        x[:, :: max(2, width // 3)] *= 3000
    if kind == "constant":  # variance 0: only eps stands under the root
        x[:] = x[:, :1] * 100
    return x


def parameters(width: int) -> tuple[Tensor, Tensor]:
    """Weight and bias that 16-bit types hold exactly."""
    weight, bias = normal(2, width, seed=7) * 0.5
    return (weight + 1).bfloat16().float(), bias.bfloat16().float()


def operand(simt: Any, x: Tensor, half: str, asked: Array | None = None) -> Array:
    """layernorm_rows of all rows or the asked; nothing but zeros and the rows may be written."""
    rows, width = (len(x) if asked is None else len(asked)), x.shape[1]
    stride = -(-width // 64) * 64
    residual = unwritten((len(x), stride), torch.float32)
    residual[:, :width] = x.numpy()
    weight, bias = unwritten((stride,), torch.float32), unwritten((stride,), torch.float32)
    weight[:width], bias[:width] = parameters(width)
    out = unwritten((rows + 1, stride), DTYPES[half])
    simt.layernorm_rows(residual, asked, weight, bias, EPS, out[:rows], width, half)
    assert (out[rows] == 0xFFFF).all()
    assert (out[:rows, width:] == 0).all()
    return out[:rows, :width]


def op(
    simt: Any, x: Tensor, delta: Tensor | None = None, *, offset: int = 0, eps: float = EPS
) -> tuple[Array, Array]:
    """op_layernorm: x as it was left, and the result; the value behind either must stay."""
    name = next(name for name, dtype in DTYPES.items() if dtype == x.dtype)
    weight, bias = (array_of(p, offset=offset) for p in parameters(x.shape[1]))
    memory = [unwritten((x.numel() + 1,), x.dtype, offset=offset) for _ in "xo"]
    left, out = (m[:-1].reshape(x.shape) for m in memory)
    left[...] = array_of(x)
    deltas = None if delta is None else array_of(delta, offset=offset)
    simt.op_layernorm(left, deltas, weight, bias, eps, out, name)
    assert all((m[-1:].view(np.uint8) == 0xFF).all() for m in memory)
    return left, out


def assert_accurate(out: Array, x: Tensor, dtype: torch.dtype, eps: float = EPS) -> None:
    """`out`, of `dtype`, against float64 and against torch's own norm of x."""
    weight, bias = parameters(x.shape[1])
    truth = reference.layernorm(x.double(), weight.double(), bias.double(), eps)
    if x.dtype != torch.float32:
        weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    theirs = reference.layernorm(x, weight, bias, eps).to(dtype)
    assert_as_accurate_as_torch(tensor_of(out, dtype), theirs, truth)


@each_half
@each_kind
@each_width
def test_operand_rows(simt: Any, schedule: str, width: int, kind: str, half: str) -> None:
    x = rows_of(kind, width)

    assert_accurate(operand(simt, x, half), x, DTYPES[half])


@each_half
@pytest.mark.parametrize("width", [768, 1600, 33, WIDE])
def test_a_row_does_not_see_its_company(simt: Any, schedule: str, width: int, half: str) -> None:
    x = rows_of("outliers", width)
    together = operand(simt, x, half)
    asked = np.array([32, 0, 7, 7, 31], np.int32)

    np.testing.assert_array_equal(operand(simt, x, half, asked), together[asked])
    for rows in (1, 2, 9):
        np.testing.assert_array_equal(operand(simt, x[-rows:], half), together[-rows:])


@each_half
@each_width
def test_op_and_operand_have_the_same_bits(simt: Any, schedule: str, width: int, half: str) -> None:
    x = rows_of("normal", width, 9)

    rounded = torch.from_numpy(op(simt, x)[1].copy()).to(DTYPES[half])

    np.testing.assert_array_equal(operand(simt, x, half), array_of(rounded))


@each_type
@each_kind
@each_width
def test_op(simt: Any, schedule: str, width: int, kind: str, name: str) -> None:
    for rows in (1, 2, 9):
        x = rows_of(kind, width, rows).to(DTYPES[name])

        left, out = op(simt, x)

        np.testing.assert_array_equal(left, array_of(x))
        assert_accurate(out, x, x.dtype)


@each_type
@each_width
def test_delta_is_added_and_rounded_first(simt: Any, schedule: str, width: int, name: str) -> None:
    x, delta = (rows_of("outliers", width, 9, seed).to(DTYPES[name]) for seed in (1, 2))
    h = x + delta

    left, out = op(simt, x, delta)

    np.testing.assert_array_equal(left, array_of(h))
    np.testing.assert_array_equal(out, op(simt, h)[1])


@each_type
@pytest.mark.parametrize("width", [768, 100, WIDE + 2])
def test_alignment_changes_no_bits(simt: Any, schedule: str, width: int, name: str) -> None:
    x, delta = (rows_of("offset", width, 9, seed).to(DTYPES[name]) for seed in (1, 2))

    for arguments in ([x], [x, delta]):
        aligned, shifted = op(simt, *arguments), op(simt, *arguments, offset=1)
        np.testing.assert_array_equal(aligned[0], shifted[0])
        np.testing.assert_array_equal(aligned[1], shifted[1])


@each_half
def test_a_nan_spoils_its_own_row_only(simt: Any, schedule: str, half: str) -> None:
    x = rows_of("normal", 100, 9)
    whole = operand(simt, x, half)
    x[3, 99], x[5, 0] = torch.nan, torch.inf

    out = operand(simt, x, half)

    good = [0, 1, 2, 4, 6, 7, 8]
    np.testing.assert_array_equal(out[good], whole[good])
    assert tensor_of(out[[3, 5]], DTYPES[half]).isnan().all()


def test_eps_counts(simt: Any, schedule: str) -> None:
    x = rows_of("normal", 100, 2)

    assert_accurate(op(simt, x, eps=0.5)[1], x, torch.float32, eps=0.5)


def test_nothing_to_do(simt: Any, schedule: str) -> None:
    assert op(simt, torch.empty(0, 48))[1].shape == (0, 48)
    assert operand(simt, torch.empty(0, 48), "bf16").shape == (0, 48)
