"""The product stages on CUDA: accuracy in every precision, one order of bits, exact writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gpt2_fast import reference
from tests.accuracy import assert_as_accurate_as_torch

from .arrays import Array, array_of, normal, tensor_of, unwritten
from .packed import PRECISIONS, Packed, activations, pack

EPS = 1e-5
BATCHES = (1, 3, 8, 9, 17, 32, 33)  # both sides of every choice of kernel

each_precision = pytest.mark.parametrize("precision", PRECISIONS)


def padded(width: int) -> int:
    return -(-width // 64) * 64


def weight_of(outputs: int, inputs: int) -> Tensor:
    """Weights with outliers, which cost quantised ones their group and nobody else."""
    weight = normal(outputs, inputs, seed=3) * inputs**-0.5
    weight[:, 5 % inputs :: 97] *= 30
    return weight


def floats(values: Tensor, stride: int) -> Array:
    """Rows of a stride, NaN behind the values."""
    out = unwritten((*values.shape[:-1], stride), torch.float32)
    out[..., : values.shape[-1]] = values.numpy()
    return out


def operand(x: Tensor) -> Array:
    """Operand rows: zeros behind the values."""
    return array_of(torch.nn.functional.pad(x, (0, padded(x.shape[1]) - x.shape[1])))


@dataclass
class Norm:
    """A layer norm and what it is followed by."""

    linear: Packed
    bias: Tensor

    def __post_init__(self) -> None:
        width = self.linear.inputs
        self.weight, self.shift = normal(2, width, seed=7) * 0.5
        self.weight += 1

    def arguments(self) -> tuple[Any, ...]:
        """Parameters, eps, words and bias, as the stages take them."""
        stride = padded(self.linear.inputs)
        outputs = -(-self.linear.outputs // 16) * 16
        bias = np.zeros(outputs, np.float32)
        bias[: self.linear.outputs] = self.bias.numpy()
        return (
            floats(self.weight, stride), floats(self.shift, stride), EPS, self.linear.words, bias,
        )  # fmt: skip

    def truth(self, x: Tensor) -> Tensor:
        """In float64."""
        normed = reference.layernorm(x.double(), self.weight.double(), self.shift.double(), EPS)
        return normed @ self.linear.weight().T + self.bias.double()

    def torch(self, x: Tensor) -> Tensor:
        """As torch computes it in the dtype of the activations."""
        dtype = activations(self.linear.precision)
        normed = reference.layernorm(x, self.weight, self.shift, EPS).to(dtype)
        return reference.linear(normed, self.linear.weight().to(dtype), self.bias.to(dtype))


def norm_of(simt: Any, precision: str, outputs: int, inputs: int) -> Norm:
    packed = pack(simt, weight_of(outputs, inputs), precision)
    return Norm(packed, normal(outputs, seed=4))


def residual_of(rows: int, width: int, seed: int = 0) -> Tensor:
    """What GPT-2's residual looks like: outlier channels, and here a mean far from zero."""
    x = normal(rows, width, seed=seed)
    x[:, :: max(2, width // 3)] *= 300
    x[rows // 2 :] += 100
    return x


def ln_fc_gelu(simt: Any, norm: Norm, x: Tensor) -> Array:
    """The stage; the row behind the last and the elements behind a row must stay as they were."""
    rows, stride = len(x), padded(norm.linear.outputs)
    dtype = activations(norm.linear.precision)
    out = unwritten((rows + 1, stride), dtype)
    normed = unwritten((rows, padded(norm.linear.inputs)), dtype)
    simt.ln_fc_gelu(
        norm.linear.precision, floats(x, normed.shape[1]), *norm.arguments(), norm.linear.inputs,
        norm.linear.outputs, normed, out[:rows],
    )  # fmt: skip
    assert (out[rows:] == 0xFFFF).all()
    assert (out[:, norm.linear.outputs :] == 0xFFFF).all()
    return out[:rows, : norm.linear.outputs]


def linear_residual(simt: Any, packed: Packed, bias: Tensor, x: Tensor, residual: Tensor) -> Array:
    """The stage; the row behind the last and the elements behind a row must stay as they were."""
    rows, stride = len(x), padded(packed.outputs)
    out = unwritten((rows + 1, stride), torch.float32)
    out[:rows, : packed.outputs] = residual.numpy()
    biases = np.zeros(-(-packed.outputs // 16) * 16, np.float32)
    biases[: packed.outputs] = bias.numpy()
    simt.linear_residual(
        packed.precision, operand(x), packed.words, biases, packed.inputs, packed.outputs,
        out[:rows],
    )  # fmt: skip
    assert (out[rows:].view(np.uint32) == 0xFFFFFFFF).all()
    assert (out[:, packed.outputs :].view(np.uint32) == 0xFFFFFFFF).all()
    return out[:rows, : packed.outputs]


@each_precision
@pytest.mark.parametrize(
    ("inputs", "outputs", "rows"),
    [
        (768, 17, 3),
        (1024, 16, 1),
        (1280, 16, 2),
        (1600, 17, 8),
        (40, 50, 9),
        (72, 1, 1),
        (100, 17, 5),
    ],
)
def test_ln_fc_gelu(
    simt: Any, schedule: str, inputs: int, outputs: int, rows: int, precision: str
) -> None:
    norm, x = norm_of(simt, precision, outputs, inputs), residual_of(rows, inputs)

    out = ln_fc_gelu(simt, norm, x)

    truth, theirs = reference.gelu(norm.truth(x)), reference.gelu(norm.torch(x))
    assert_as_accurate_as_torch(tensor_of(out, theirs.dtype), theirs, truth)


@each_precision
@pytest.mark.parametrize(
    ("inputs", "outputs", "rows"),
    [
        (768, 17, 3),
        (3072, 16, 1),
        (6400, 17, 2),
        (6400, 9, 12),
        (40, 50, 8),
        (1, 1, 1),
        (100, 17, 32),
    ],
)
def test_linear_residual(
    simt: Any, schedule: str, inputs: int, outputs: int, rows: int, precision: str
) -> None:
    packed = pack(simt, weight_of(outputs, inputs), precision)
    bias, residual = normal(outputs, seed=4), residual_of(rows, outputs, seed=5)
    x = normal(rows, inputs, seed=6).to(activations(precision))

    out = linear_residual(simt, packed, bias, x, residual)

    # Sums, bias and residual are float32: nothing is rounded to 16 bits, so torch's float32 is
    # the measure.
    truth = residual.double() + x.double() @ packed.weight().T + bias.double()
    theirs = residual + reference.linear(x.float(), packed.weight().float(), bias)
    assert_as_accurate_as_torch(tensor_of(out, torch.float32), theirs, truth)


@each_precision
def test_a_row_does_not_see_its_company(simt: Any, schedule: str, precision: str) -> None:
    inputs, outputs = 584, 33  # three slices: two would add up either way; ragged in both
    norm, x = norm_of(simt, precision, outputs, inputs), residual_of(33, inputs)
    residual, wide = residual_of(33, outputs, seed=5), normal(33, inputs, seed=6)
    wide = wide.to(activations(precision))
    together = ln_fc_gelu(simt, norm, x)
    added = linear_residual(simt, norm.linear, norm.bias, wide, residual)

    for rows in BATCHES:
        some = [7 * r % 33 for r in reversed(range(rows))]
        np.testing.assert_array_equal(ln_fc_gelu(simt, norm, x[some]), together[some])
        out = linear_residual(simt, norm.linear, norm.bias, wide[some], residual[some])
        np.testing.assert_array_equal(out, added[some])


@each_precision
def test_a_row_does_not_see_a_broken_neighbour(simt: Any, precision: str) -> None:
    norm, x = norm_of(simt, precision, 17, 100), residual_of(33, 100)
    alone = {rows: ln_fc_gelu(simt, norm, x[:rows]) for rows in (3, 9, 33)}

    for rows, expected in alone.items():
        broken = x[:rows].clone()
        broken[1], broken[0, 7] = float("nan"), float("inf")
        np.testing.assert_array_equal(ln_fc_gelu(simt, norm, broken)[2:], expected[2:])


@pytest.mark.parametrize("precision", ["bf16", "int4"])
def test_rows_too_wide_for_shared_memory_have_the_same_bits(simt: Any, precision: str) -> None:
    norm, x = norm_of(simt, precision, 16, 2600), residual_of(8, 2600)

    together = ln_fc_gelu(simt, norm, x)  # normalised by a kernel of its own

    np.testing.assert_array_equal(ln_fc_gelu(simt, norm, x[3:5]), together[3:5])


@pytest.mark.parametrize("inputs", [8300, 32900])
def test_inputs_too_many_for_one_block_have_the_same_bits(simt: Any, inputs: int) -> None:
    packed, bias = pack(simt, weight_of(3, inputs), "int4"), normal(3, seed=4)
    x, residual = normal(9, inputs, seed=6).half(), residual_of(9, 3)

    together = linear_residual(simt, packed, bias, x, residual)

    np.testing.assert_array_equal(
        linear_residual(simt, packed, bias, x[:1], residual[:1]), together[:1]
    )
    theirs = residual + reference.linear(x.float(), packed.weight().float(), bias)
    truth = residual.double() + x.double() @ packed.weight().T + bias.double()
    assert_as_accurate_as_torch(tensor_of(together, torch.float32), theirs, truth)


@each_precision
@pytest.mark.parametrize("inputs", [72, 264])
def test_blocks_of_several_tiles_have_the_same_bits(
    simt: Any, schedule: str, inputs: int, precision: str
) -> None:
    """As many outputs as the larger sizes have: with 9 rows and more a block takes two tiles."""
    outputs = 256 * 16 + 1  # the last block has one tile, and that one output
    packed, bias = pack(simt, weight_of(outputs, inputs), precision), normal(outputs, seed=4)
    x = normal(12, inputs, seed=6).to(activations(precision))
    residual = residual_of(12, outputs, seed=5)
    before = simt.stats()["blocks"]

    together = linear_residual(simt, packed, bias, x, residual)

    assert simt.stats()["blocks"] - before == 129
    some = [11, 0, 8]
    alone = linear_residual(simt, packed, bias, x[some], residual[some])
    assert simt.stats()["blocks"] - before == 129 + 257
    np.testing.assert_array_equal(together[some], alone)
    truth = residual.double() + x.double() @ packed.weight().T + bias.double()
    theirs = residual + reference.linear(x.float(), packed.weight().float(), bias)
    assert_as_accurate_as_torch(tensor_of(together, torch.float32), theirs, truth)


@dataclass
class Cache:
    """Blocks of two layers, all 0xFF, and where rows go."""

    head_size: int
    heads: int
    positions: Array
    block_of_row: list[int]

    def __post_init__(self) -> None:
        self.padded = -(-self.head_size // 32) * 32
        page = 16 * self.padded  # words of keys and values
        self.blocks = unwritten((4, 2 * self.heads * page), torch.float32).view(np.uint32)

    def halves(self, layer: int) -> tuple[Array, Array]:
        """Keys and values of a layer as views, (block, head, position, padded head size)."""
        shape = (4, 2, self.heads, 2, 16 * self.padded)
        halves = self.blocks.view(np.uint16).reshape(shape)[:, layer]
        keys = halves[:, :, 0].reshape(4, self.heads, 16, self.padded)
        values = halves[:, :, 1].reshape(4, self.heads, 8, self.padded, 2)
        return keys, values.transpose(0, 1, 2, 4, 3).reshape(4, self.heads, 16, self.padded)


def ln_qkv(simt: Any, norm: Norm, x: Tensor, cache: Cache) -> tuple[Array, Array, Array]:
    """The stage on layer 1: query, key and value of every row, (rows, heads, head size).

    Nothing but these may be written.
    """
    rows, width = x.shape
    dtype = activations(norm.linear.precision)
    query = unwritten((rows + 1, cache.heads, cache.padded), dtype)
    normed = unwritten((rows, padded(width)), dtype)
    simt.ln_qkv(
        norm.linear.precision, floats(x, padded(width)), *norm.arguments(), width, normed,
        query[:rows], cache.head_size, cache.positions, cache.blocks, cache.block_of_row, 1,
    )  # fmt: skip
    assert (query[rows:] == 0xFFFF).all()
    assert (query[:, :, cache.head_size :] == 0xFFFF).all()
    assert all((half == 0xFFFF).all() for half in cache.halves(0))
    slots = (np.array(cache.block_of_row), slice(None), cache.positions % 16)
    found = []
    for half in cache.halves(1):
        found.append(half[slots][:, :, : cache.head_size].copy())
        rest, written = half.copy(), (*slots, slice(0, cache.head_size))
        rest[written] = 0xFFFF
        assert (rest == 0xFFFF).all()
    return query[:rows, :, : cache.head_size].copy(), found[0], found[1]


def cache_of(rows: int, head_size: int, heads: int, seed: int = 0) -> Cache:
    """Rows at distinct places: neighbours of one page, and pages far apart."""
    places = np.random.default_rng(seed).permutation(64)[:rows].astype(np.int32)
    return Cache(head_size, heads, places % 16 + 48, [int(p) // 16 for p in places])


@each_precision
@pytest.mark.parametrize(
    ("heads", "head_size", "rows"), [(2, 64, 1), (3, 20, 8), (2, 24, 33), (5, 1, 3), (1, 80, 9)]
)
def test_ln_qkv(
    simt: Any, schedule: str, heads: int, head_size: int, rows: int, precision: str
) -> None:
    width = heads * head_size
    norm, x = norm_of(simt, precision, 3 * width, width), residual_of(rows, width)

    found = ln_qkv(simt, norm, x, cache_of(rows, head_size, heads))

    theirs = norm.torch(x)
    out = np.stack(found, axis=1).reshape(rows, 3 * width)
    assert_as_accurate_as_torch(tensor_of(out, theirs.dtype), theirs, norm.truth(x))


@each_precision
def test_ln_qkv_does_not_see_company_or_place(simt: Any, schedule: str, precision: str) -> None:
    norm, x = norm_of(simt, precision, 3 * 72, 72), residual_of(33, 72)
    together = ln_qkv(simt, norm, x, cache_of(33, 24, 3))

    for rows in BATCHES:
        some = [7 * r % 33 for r in reversed(range(rows))]
        found = ln_qkv(simt, norm, x[some], cache_of(rows, 24, 3, seed=rows))
        for part, expected in zip(found, together, strict=True):
            np.testing.assert_array_equal(part, expected[some])
