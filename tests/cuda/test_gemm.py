"""gemm and linear on CUDA: decode's bits for every kind of weight, ragged edges, shared memory."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from gpt2_fast import reference
from tests.accuracy import assert_as_accurate_as_torch

from .arrays import DTYPES, Array, array_of, normal, tensor_of, unwritten

pytestmark = pytest.mark.usefixtures("schedule")  # every test in every order of threads

KINDS = ("bf16", "fp16", "int8", "int4")
# rows, K, N: each number that is an edge of a tile, a stage, a slice or a group.
SHAPES = (
    (33, 8, 130),
    (64, 40, 65),
    (65, 64, 17),
    (127, 100, 64),
    (128, 256, 1),
    (129, 264, 65),
    (34, 768, 64),
    (35, 1024, 72),
    (36, 1280, 66),
    (65, 1600, 130),
)
LINEAR_ROWS = (1, 2, 15, 16, 17, 33, 64, 65, 127, 128, 129)
EPILOGUES = ("none", "bias", "gelu", "residual", "gelu-residual")
NAN = 0xFFFF
UNTOUCHED = 7.0  # behind a residual: adding to a NaN would not show

each_kind = pytest.mark.parametrize("kind", KINDS)
each_half = pytest.mark.parametrize("half", ["bf16", "fp16"])


class Case(NamedTuple):
    """residual += x W + b."""

    kind: str
    x: Array  # (rows, stride)
    words: Array
    bias: Array  # (round_up(N, 16))
    residual: Array  # (rows, N)
    inputs: int

    @property
    def outputs(self) -> int:
        """N."""
        return int(self.residual.shape[1])

    def run(self, simt: Any, rows: slice | Array) -> Array:
        """Those rows, computed together; nothing behind them or behind N is written."""
        x, wanted = np.ascontiguousarray(self.x[rows]), self.residual[rows]
        memory = np.full((len(x) + 1, self.outputs + 3), UNTOUCHED, np.float32)
        out = memory[:-1]
        out[:, : self.outputs] = wanted
        simt.linear_residual(self.kind, x, self.words, self.bias, self.inputs, self.outputs, out)
        assert (memory[-1] == UNTOUCHED).all()
        assert (out[:, self.outputs :] == UNTOUCHED).all()
        return out[:, : self.outputs]


def rounded_up(value: int, unit: int) -> int:
    """The next multiple of `unit`."""
    return -(-value // unit) * unit


def case(simt: Any, kind: str, rows: int, inputs: int, outputs: int) -> Case:
    """Random inputs. The residual is small, so that it hides no bit of the sums."""
    half = DTYPES["bf16" if kind == "bf16" else "fp16"]
    x = unwritten((rows, rounded_up(inputs, 64)), half)
    x[:, :inputs] = array_of(normal(rows, inputs, seed=1).to(half))
    x[:, inputs:] = 0
    weight = normal(outputs, inputs, seed=2) * inputs**-0.5
    words = np.full(simt.linear_words(kind, inputs, outputs), 0xFFFFFFFF, np.uint32)
    assert simt.pack(kind, weight.to(half).float().numpy(), "fp32", True, words, 1) == -1
    bias = np.zeros(rounded_up(outputs, 16), np.float32)
    bias[:outputs] = normal(outputs, seed=3) * 0.01
    residual = (normal(rows, outputs, seed=4) * 0.01).numpy()
    return Case(kind, x, words, bias, residual, inputs)


def unpacked(case: Case) -> Tensor:
    """The weights (N, K) that the words mean, in float64, read as cuda/layout.h says."""
    padded, tiles = rounded_up(case.inputs, 64), rounded_up(case.outputs, 16) // 16
    data = case.words.view(np.uint8)
    if case.kind in ("bf16", "fp16"):  # tile, k / 32, h, g, t, e
        elements = case.words.view(np.uint16).reshape(tiles, padded // 32, 2, 8, 32)
        flat = elements.transpose(0, 2, 3, 1, 4).reshape(tiles * 16, padded)
        weight = tensor_of(np.ascontiguousarray(flat), DTYPES[case.kind]).double()
        return weight[: case.outputs, : case.inputs]
    if case.kind == "int8":  # tile, k / 32, g, t, e / 2, h, e % 2
        count = tiles * 16 * padded
        split = data[:count].reshape(tiles, padded // 32, 8, 4, 4, 2, 2).astype(np.int64) - 128
        whole, group = split.transpose(0, 5, 2, 1, 3, 4, 6), 64
    else:  # tile, k / 64, g, t, e / 2, then from nibbles e % 2, k / 32, h
        count = tiles * 16 * padded // 2
        words = data[:count].view(np.uint32).reshape(tiles, padded // 64, 8, 4, 4)
        nibbles = np.stack([words >> 4 * n & 15 for n in range(8)], -1).astype(np.int64) - 8
        split = nibbles.reshape(*words.shape, 2, 2, 2)
        whole, group = split.transpose(0, 7, 2, 1, 6, 3, 4, 5), 32
    scales = data[count:].view(np.uint16).reshape(tiles, padded // group, 16)
    floats = tensor_of(np.ascontiguousarray(scales.transpose(0, 2, 1)), torch.bfloat16).double()
    spread = floats.reshape(tiles * 16, -1).repeat_interleave(group, 1)
    weight = torch.from_numpy(whole.reshape(tiles * 16, padded).copy()).double() * spread
    return weight[: case.outputs, : case.inputs]


def assert_accurate(case: Case, out: Array) -> None:
    """`out` against float64 and against torch's float32, from the same weights."""
    half = DTYPES["bf16" if case.kind == "bf16" else "fp16"]
    x = tensor_of(np.ascontiguousarray(case.x[:, : case.inputs]), half).double()
    weight, bias = unpacked(case), torch.from_numpy(case.bias[: case.outputs]).double()
    residual = torch.from_numpy(case.residual).double()
    truth = residual + torch.nn.functional.linear(x, weight, bias)
    same = residual.float() + torch.nn.functional.linear(x.float(), weight.float(), bias.float())
    assert_as_accurate_as_torch(torch.from_numpy(out.copy()), same, truth)


def assert_same_bits(ours: Array, theirs: Array) -> None:
    """Not one value differs, not even in the sign of a zero."""
    different = np.argwhere(ours.view(np.uint32) != theirs.view(np.uint32))
    assert len(different) == 0, f"{len(different)} differ, first {different[0]}"


@each_kind
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums(simt: Any, kind: str, shape: tuple[int, int, int]) -> None:
    one = case(simt, kind, *shape)
    out = one.run(simt, slice(None))

    assert_accurate(one, out)
    few = np.array([0, 1, 17, 31, 32, shape[0] - 1])
    assert_same_bits(out[few], one.run(simt, few))  # product.cuh, 8 tokens
    assert_same_bits(out[5:25], one.run(simt, slice(5, 25)))  # and 32


@each_kind
def test_every_schedule(simt: Any, schedule: str, kind: str) -> None:
    one = case(simt, kind, 66, 584, 70)
    out = one.run(simt, slice(None))

    assert_accurate(one, out)
    assert_same_bits(out[60:66], one.run(simt, slice(60, 66)))


# The simulated device has 16 processors: 128 x 128 tiles where there are 16 of them.
@each_kind
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(129, 328, 900), (97, 584, 1930)])
def test_large_tiles(simt: Any, kind: str, rows: int, inputs: int, outputs: int) -> None:
    one = case(simt, kind, rows, inputs, outputs)
    before = simt.stats()["blocks"]
    out = one.run(simt, slice(None))
    assert simt.stats()["blocks"] - before == 16

    assert_accurate(one, out)
    for few in (slice(0, 8), slice(rows - 7, rows)):
        assert_same_bits(out[few], one.run(simt, few))


@each_kind
@pytest.mark.parametrize("outputs", [65, 1930])  # small tiles, large tiles
def test_rows_do_not_see_each_other(simt: Any, kind: str, outputs: int) -> None:
    one = case(simt, kind, 40, 136, outputs)
    out = one.run(simt, slice(None))
    others = np.arange(40)[::-1].copy()
    assert_same_bits(out[others], one.run(simt, others))

    x = one.x.copy()
    x[1::2, :136] = 0x7C00 if kind != "bf16" else 0x7F80  # infinities
    mixed = one._replace(x=x).run(simt, slice(None))
    assert_same_bits(out[::2], mixed[::2])
    assert not np.isfinite(mixed[1::2]).any()


# ---- linear ----------------------------------------------------------------------------------


def arguments(
    epilogue: str, rows: int, K: int, N: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, bool]:
    """x, weight, bias, residual, gelu."""
    return (
        normal(rows, K, seed=K).to(dtype),
        (normal(N, K, seed=N) * K**-0.5).to(dtype),
        None if epilogue == "none" else normal(N, seed=1).to(dtype).float(),
        normal(rows, N, seed=2).to(dtype) if "residual" in epilogue else None,
        "gelu" in epilogue,
    )


def linear(simt: Any, half: str, *args: Any, offset: int = 0) -> Tensor:
    """The op, on tensors `offset` elements behind an aligned address."""
    x, weight, *_, gelu = args
    arrays = [None if a is None else array_of(a, offset=offset) for a in args[:4]]
    memory = unwritten((x.shape[0] * weight.shape[0] + 1,), x.dtype, offset=offset)
    out = memory[:-1].reshape(x.shape[0], weight.shape[0])
    simt.linear(half, *arrays, gelu, out)
    assert memory[-1] == NAN
    return tensor_of(out, x.dtype)


def assert_linear(simt: Any, half: str, *args: Any, offset: int = 0) -> Tensor:
    """The accuracy rule, and the result."""
    out = linear(simt, half, *args, offset=offset)
    doubles: list[Any] = [a.double() if isinstance(a, Tensor) else a for a in args]
    assert_as_accurate_as_torch(out, reference.linear(*args), reference.linear(*doubles))
    return out


@each_half
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear(simt: Any, half: str, epilogue: str, shape: tuple[int, int, int]) -> None:
    _, K, N = shape
    assert_linear(simt, half, *arguments(epilogue, max(33, 1000 // N), K, N, DTYPES[half]))


@pytest.mark.parametrize("rows", LINEAR_ROWS)
def test_linear_rows(simt: Any, rows: int) -> None:
    x, *others = arguments("bias", 129, 72, 65, torch.bfloat16)
    whole = linear(simt, "bf16", x, *others)
    part = linear(simt, "bf16", x[:rows], *others)
    assert torch.equal(part.view(torch.int16), whole[:rows].view(torch.int16))


@each_half
@pytest.mark.parametrize(("K", "offset"), [(1, 0), (7, 0), (63, 0), (65, 0), (257, 0), (64, 1)])
def test_linear_without_whole_units(
    simt: Any, schedule: str, half: str, K: int, offset: int
) -> None:
    args = arguments("gelu-residual", 35, K, 33, DTYPES[half])
    assert_linear(simt, half, *args, offset=offset)


@each_half
def test_linear_has_the_bits_of_the_engine(simt: Any, half: str) -> None:
    """Row-major weights, packed ones, and padded ones give the same sums."""
    one = case(simt, half, 40, 776, 70)
    zero = one._replace(
        bias=np.zeros_like(one.bias), residual=np.full_like(one.residual, -0.0)
    )  # -0 + x is x
    sums = torch.from_numpy(zero.run(simt, slice(None)).copy()).to(DTYPES[half])
    x = tensor_of(np.ascontiguousarray(one.x[:, :776]), DTYPES[half])
    args = (x, unpacked(one).to(DTYPES[half]), None, None, False)
    for offset in (0, 3):
        assert torch.equal(linear(simt, half, *args, offset=offset), sums)


def test_linear_large_tiles(simt: Any) -> None:
    args = arguments("gelu-residual", 40, 136, 1930, torch.float16)
    before = simt.stats()["blocks"]
    out = assert_linear(simt, "fp16", *args)
    assert simt.stats()["blocks"] - before == 16
    x, weight, bias, residual, gelu = args
    part = linear(simt, "fp16", x[8:], weight, bias, residual[8:], gelu)  # type: ignore[index]
    assert torch.equal(part, out[8:])


# ---- shared memory ---------------------------------------------------------------------------


def conflicts(addresses: list[int], width: int) -> int:
    """Turns beyond the first that shared memory takes, for the worst group served together.

    32 banks of 4 bytes; 16-byte accesses are served 8 lanes at a time, 4-byte ones 32.
    """
    together = 128 // width
    worst = 0
    for first in range(0, 32, together):
        words = {a // 4 + w for a in addresses[first : first + together] for w in range(width // 4)}
        banks = np.bincount([word % 32 for word in words], minlength=32)
        worst = max(worst, int(banks.max()) - 1)
    return worst


@pytest.mark.parametrize("tile", ["small", "large"])
def test_shared_memory_has_no_bank_conflicts(simt: Any, tile: str) -> None:
    accesses = simt.gemm_accesses(tile)
    for name, width in (("written", 16), ("read", 16), ("sums_written", 4), ("sums_read", 4)):
        assert max(conflicts(warp, width) for warp in accesses[name]) == 0, name


@pytest.mark.parametrize("tile", ["small", "large"])
def test_shared_memory_is_used_once(simt: Any, tile: str) -> None:
    """Each unit of a stage has a place of its own, and so has each sum."""
    accesses = simt.gemm_accesses(tile)
    for name, count, size in (
        ("written", accesses["rows"] * 8, 16),
        ("read", accesses["rows"] * 8, 16),
        ("sums_written", accesses["rows"] * accesses["outputs"], 4),
        ("sums_read", accesses["rows"] * accesses["outputs"], 4),
    ):
        used = np.array(accesses[name]).ravel()
        assert len(set(used.tolist())) == len(used) == count, name
        assert used.min() == 0, name
        limit = accesses["rows"] * 128 if size == 16 else accesses["sum_bytes"]
        assert used.max() <= limit - size, name
