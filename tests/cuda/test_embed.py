"""embed on CUDA: exact sums out of rows and out of every packed order, ids out of range."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from .arrays import DTYPES, Array, array_of, normal, tensor_of, unwritten

WIDTHS = (768, 1024, 1280, 1600, 1, 7, 33, 100)
VOCABULARY, CONTEXT = 83, 19  # no whole number of tiles
GROUP = {"int8": 64, "int4": 32}

each_width = pytest.mark.parametrize("width", WIDTHS)
each_rows = pytest.mark.parametrize("rows", [1, 9])
each_type = pytest.mark.parametrize("name", list(DTYPES))


def padded(width: int) -> int:
    """Row stride, and K as a packed matrix holds it."""
    return -(-width // 64) * 64


def ids(rows: int) -> tuple[Array, Array]:
    """Tokens and positions, the last of each among them."""
    random = np.random.default_rng(rows)
    tokens, positions = random.integers(VOCABULARY, size=rows), random.integers(CONTEXT, size=rows)
    tokens[-1], positions[0] = VOCABULARY - 1, CONTEXT - 1
    return tokens, positions


def with_stride(values: Tensor) -> Array:
    """Rows of a 16-bit type with NaN behind them."""
    out = torch.full((len(values), padded(values.shape[1])), torch.nan, dtype=values.dtype)
    out[:, : values.shape[1]] = values
    return array_of(out)


def packed(elements: Array) -> Array:
    """(V, K) as [tile][k / 32][half h][g][t][8] of cuda/layout.h, outputs padded with zeros."""
    outputs, inputs = elements.shape
    whole = np.zeros((-(-outputs // 16) * 16, inputs), elements.dtype)
    whole[:outputs] = elements
    blocks = whole.reshape(-1, 2, 8, inputs // 32, 4, 8)  # tile, h, g, block, t, e
    return blocks.transpose(0, 3, 1, 2, 4, 5)


def quantised(width: int, precision: str) -> tuple[Array, Tensor]:
    """A random head in int8 or int4 as the words of cuda/layout.h, and its values."""
    random = np.random.default_rng(width)
    inputs, group = padded(width), GROUP[precision]
    limit = 127 if precision == "int8" else 7
    q = random.integers(-limit, limit + 1, (VOCABULARY, inputs))
    q[:, width:] = 0
    scales = torch.from_numpy(random.uniform(0.001, 0.1, (VOCABULARY, inputs // group))).bfloat16()
    values = torch.from_numpy(q).float() * scales.float().repeat_interleave(group, 1)
    order = packed(q)  # tile, block, h, g, t, e
    if precision == "int8":  # [tile][block][g][t] byte 4 (e / 2) + 2 h + e % 2
        pairs = order.reshape(*order.shape[:5], 4, 2).transpose(0, 1, 3, 4, 5, 2, 6)
        weights = (pairs + 128).astype(np.uint8).reshape(-1).view(np.uint32)
    else:  # [tile][k / 64][g][t] word e / 2, bits 4 (2 (block % 2) + h) + 16 (e % 2)
        fields = order.reshape(-1, inputs // 64, 2, 2, 8, 4, 4, 2)  # ..., b, h, g, t, e / 2, e % 2
        nibbles = (fields + 8).astype(np.uint64).transpose(0, 1, 4, 5, 6, 2, 3, 7)
        b, h, e = np.ix_(range(2), range(2), range(2))
        words = (nibbles << (4 * (2 * b + h) + 16 * e).astype(np.uint64)).sum((-3, -2, -1))
        weights = words.astype(np.uint32).reshape(-1)
    rows = np.zeros((-(-VOCABULARY // 16) * 16, inputs // group), np.uint16)
    rows[:VOCABULARY] = array_of(scales)
    behind = rows.reshape(-1, 16, inputs // group).transpose(0, 2, 1).reshape(-1).view(np.uint32)
    words_all = unwritten((weights.size + behind.size,), torch.float32).view(np.uint32)
    words_all[:] = np.concatenate([weights, behind])
    return words_all, values[:, :width]


def embed(
    simt: Any, tokens: Array, positions: Array, table: Array, wpe: Tensor, precision: str
) -> Array:
    """The residual rows; zeros behind them, and nothing behind the last."""
    rows, width = len(tokens), wpe.shape[1]
    residual = unwritten((rows + 1, padded(width)), torch.float32)
    simt.embed(
        tokens.astype(np.int32),
        positions.astype(np.int32),
        table,
        VOCABULARY,
        with_stride(wpe),
        residual[:rows],
        width,
        precision,
    )
    assert np.isnan(residual[rows]).all()
    assert (residual[:rows, width:] == 0).all()
    return residual[:rows, :width]


def wanted(wte: Tensor, wpe: Tensor, tokens: Array, positions: Array) -> Array:
    """The sum in float32, rounded once."""
    total: Array = (wte.double()[tokens] + wpe.double()[positions]).float().numpy()
    return total


@each_rows
@each_width
@pytest.mark.parametrize("precision", ["bf16", "fp16", "int8", "int4"])
def test_rows_table(simt: Any, schedule: str, precision: str, width: int, rows: int) -> None:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    wte, wpe = normal(VOCABULARY, width).to(dtype), normal(CONTEXT, width, seed=1).to(dtype)

    out = embed(simt, *ids(rows), with_stride(wte), wpe, precision)

    np.testing.assert_array_equal(out, wanted(wte, wpe, *ids(rows)))


@each_rows
@each_width
@pytest.mark.parametrize("precision", ["bf16", "fp16", "int8", "int4"])
def test_packed_head(simt: Any, schedule: str, precision: str, width: int, rows: int) -> None:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    wpe = normal(CONTEXT, width, seed=1).to(dtype)
    if precision in GROUP:
        words, wte = quantised(width, precision)
    else:
        wte = normal(VOCABULARY, width).to(dtype)
        words = array_of(torch.from_numpy(packed(with_stride(wte)).copy()).view(dtype).reshape(-1))
        words = words.view(np.uint32)

    out = embed(simt, *ids(rows), words, wpe, precision)

    np.testing.assert_array_equal(out, wanted(wte, wpe, *ids(rows)))


@each_type
@each_width
def test_op(simt: Any, schedule: str, width: int, name: str) -> None:
    dtype = DTYPES[name]
    wte, wpe = normal(VOCABULARY, width).to(dtype), normal(CONTEXT, width, seed=1).to(dtype)
    for rows, offset in ((1, 0), (9, 1), (33, 0)):
        tokens, positions = ids(rows)
        out = unwritten((rows + 1, width), dtype, offset=offset)

        simt.op_embed(
            tokens,
            positions,
            array_of(wte, offset=offset),
            array_of(wpe, offset=offset),
            out[:rows],
            name,
        )

        assert (out[rows].view(np.uint8) == 0xFF).all()
        exact = (wte.double()[tokens] + wpe.double()[positions]).to(dtype)
        np.testing.assert_array_equal(out[:rows], array_of(exact))


@each_type
def test_op_answers_ids_out_of_range_with_nan(simt: Any, schedule: str, name: str) -> None:
    dtype, width = DTYPES[name], 33
    wte, wpe = normal(VOCABULARY, width).to(dtype), normal(CONTEXT, width, seed=1).to(dtype)
    strange = [-1, 1 << 40, (1 << 32) + 1, -(1 << 62)]
    tokens = np.array([5, *strange, VOCABULARY, 7, 7, 7, 7, 7, 5], np.int64)
    positions = np.array([2, 1, 1, 1, 1, 1, *strange, CONTEXT, 2], np.int64)
    out = array_of(torch.zeros(len(tokens), width, dtype=dtype))

    simt.op_embed(tokens, positions, array_of(wte), array_of(wpe), out, name)

    result = tensor_of(out, dtype)
    assert result[1:-1].isnan().all()
    exact = (wte.double()[5] + wpe.double()[2]).to(dtype)
    assert (result[[0, -1]] == exact).all()


def test_nothing_to_do(simt: Any, schedule: str) -> None:
    nobody = np.zeros(0, np.int64)
    wpe = normal(CONTEXT, 48).half()

    assert embed(simt, nobody, nobody, with_stride(wpe), wpe, "fp16").shape == (0, 48)
