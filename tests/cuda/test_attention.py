"""attention on CUDA: ragged batches in shuffled pages, edges of tiles and chunks, same bits."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from gpt2_fast import reference
from tests.accuracy import assert_as_accurate_as_torch

from .arrays import DTYPES, Array, array_of, normal, tensor_of, unwritten

PAGE = 16
WAYS = ("decode", "prefill")
TICKETS = 16384

each_type = pytest.mark.parametrize("name", ["bf16", "fp16"])
each_way = pytest.mark.parametrize("way", WAYS)


class Prompt(NamedTuple):
    """A sequence: q (H, rows, D) of its last positions, k and v (H, length, D) of all."""

    q: Tensor
    k: Tensor
    v: Tensor

    def rows(self, first: int, last: int) -> Prompt:
        """The same, cut off behind row `last` and without queries before `first`."""
        start = self.k.shape[1] - self.q.shape[1]
        return Prompt(self.q[:, first:last], self.k[:, : start + last], self.v[:, : start + last])

    def expected(self, scale: float) -> tuple[Tensor, Tensor]:
        """What torch makes of it in its own dtype, and the truth."""
        q, k, v = (x.double() for x in self)
        own = reference.attention_prefill(self.q, self.k, self.v, scale)
        return own, reference.attention_prefill(q, k, v, scale)


def prompt(
    heads: int, length: int, rows: int, size: int, name: str = "fp16", *, seed: int = 0
) -> Prompt:
    q, k, v = (
        normal(heads, n, size, seed=3 * seed + i).to(DTYPES[name])
        for i, n in enumerate((rows, length, length))
    )
    return Prompt(q, k, v)


def padded(size: int) -> int:
    return -(-size // 32) * 32


def scratch(heads: int, size: int, context: int) -> Array:
    """Tickets at zero, then what nobody has written."""
    floats = TICKETS + 64 * heads * -(-context // 64) * (padded(size) + 2)
    out = unwritten((floats,), torch.float32)
    out[:TICKETS] = 0
    return out


def fill_blocks(prompts: list[Prompt], layer: int, layers: int) -> tuple[Array, list[list[int]]]:
    """Pages (blocks, words) of `layer`, NaN wherever no position is, and the block table."""
    heads, _, size = prompts[0].q.shape
    width = padded(size)
    counts = [-(-p.k.shape[1] // PAGE) for p in prompts]
    order = np.random.default_rng(len(prompts)).permutation(sum(counts) + 3).tolist()
    blocks = unwritten((len(order), layers * heads * 16 * width), torch.float32).view(np.uint32)
    pages = blocks.view(np.uint16).reshape(len(order), layers, heads, 2, 16 * width)
    tables = [[order.pop() for _ in range(count)] for count in counts]
    for p, table in zip(prompts, tables, strict=True):
        key, value = array_of(p.k), array_of(p.v)
        for position in range(p.k.shape[1]):
            block = pages[table[position // PAGE], layer]
            at = position % PAGE
            keys = block[:, 0].reshape(heads, PAGE, width)
            values = block[:, 1].reshape(heads, PAGE // 2, width, 2)
            keys[:, at] = values[:, at // 2, :, at % 2] = 0
            keys[:, at, :size] = key[:, position]
            values[:, at // 2, :size, at % 2] = value[:, position]
    return blocks, tables


def attend(
    simt: Any,
    prompts: list[Prompt],
    way: str = "",
    *,
    scale: float | None = None,
    context: int = 0,
    memory: Array | None = None,
) -> list[Tensor]:
    """The stage over layer 1 of 2: (H, rows, D) for each prompt."""
    heads, _, size = prompts[0].q.shape
    dtype = prompts[0].q.dtype
    name = next(name for name, known in DTYPES.items() if known == dtype)
    blocks, tables = fill_blocks(prompts, 1, 2)
    counts = [p.q.shape[1] for p in prompts]
    query = np.zeros((sum(counts), heads, padded(size)), np.uint16)
    query[:, :, :size] = np.concatenate([array_of(p.q.transpose(0, 1)) for p in prompts])
    stride = -(-heads * size // 64) * 64
    out = unwritten((sum(counts), stride), dtype)
    starts = [p.k.shape[1] - p.q.shape[1] for p in prompts]
    context = context or max(p.k.shape[1] for p in prompts)
    memory = scratch(heads, size, context) if memory is None else memory
    scale = size**-0.5 if scale is None else scale
    simt.attention(
        way, name, query, out, size, blocks, tables, counts, starts, 1, scale, memory, context
    )
    assert (out[:, heads * size :] == 0xFFFF).all()
    assert not memory[:TICKETS].any()
    rows = tensor_of(out[:, : heads * size], dtype).reshape(-1, heads, size).transpose(0, 1)
    return list(rows.split(counts, dim=1))


def assert_accurate(simt: Any, prompts: list[Prompt], way: str, scale: float) -> None:
    for p, out in zip(prompts, attend(simt, prompts, way, scale=scale), strict=True):
        assert_as_accurate_as_torch(out.contiguous(), *p.expected(scale))


def assert_same_bits(left: Tensor, right: Tensor) -> None:
    assert left.dtype == right.dtype
    assert left.shape == right.shape
    differ = left.contiguous().view(torch.int16) != right.contiguous().view(torch.int16)
    differ &= ~(left.isnan() & right.isnan())
    assert not differ.any(), f"{int(differ.sum())} of {left.numel()} values differ"


@each_type
@each_way
@pytest.mark.parametrize("length", [1, 63, 64, 65, 255, 257, 1023, 1024])
def test_lengths(simt: Any, schedule: str, length: int, way: str, name: str) -> None:
    rows = min(length, 2)
    assert_accurate(simt, [prompt(2, length, rows, 64, name)], way, 0.125)


@each_way
@pytest.mark.parametrize("length", [15, 16, 17, 47, 62, 63, 64, 65, 127, 128, 129, 255, 319])
def test_one_query(simt: Any, schedule: str, length: int, way: str) -> None:
    """What lies in the last page behind the only query is NaN, and weighs nothing."""
    assert_accurate(simt, [prompt(2, length, 1, 32)], way, 32**-0.5)


@each_type
@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129])
def test_whole_prompts(simt: Any, schedule: str, rows: int, name: str) -> None:
    assert_accurate(simt, [prompt(2, rows, rows, 64, name)], "prefill", 0.125)


@pytest.mark.parametrize("rows", [1, 2, 7, 15, 16])
@pytest.mark.parametrize("length", [16, 64, 70, 128, 300])
def test_few_queries(simt: Any, schedule: str, length: int, rows: int) -> None:
    assert_accurate(simt, [prompt(2, length, rows, 32)], "decode", 32**-0.5)


@each_type
@each_way
@pytest.mark.parametrize("size", [1, 5, 8, 16, 20, 24, 40, 64, 80, 96, 100, 128])
def test_head_sizes(simt: Any, schedule: str, size: int, way: str, name: str) -> None:
    assert_accurate(simt, [prompt(5, 83, 5, size, name)], way, size**-0.5)


@each_way
def test_many_heads(simt: Any, schedule: str, way: str) -> None:
    assert_accurate(simt, [prompt(25, 70, 3, 64)], way, 0.125)


RAGGED = [(1, 1), (5, 5), (64, 1), (65, 2), (17, 16), (300, 7), (256, 16), (257, 1), (90, 9)]


@each_type
@pytest.mark.parametrize("way", ["decode", "prefill", ""])
def test_ragged_batches(simt: Any, schedule: str, way: str, name: str) -> None:
    batch = [prompt(3, n, rows, 40, name, seed=i) for i, (n, rows) in enumerate(RAGGED)]

    assert_accurate(simt, batch, way, 40**-0.5)


@pytest.mark.parametrize("count", [33, 70])
def test_more_sequences_than_a_warp_has_lanes(simt: Any, schedule: str, count: int) -> None:
    batch = [prompt(1, 1 + i % 7, 1 + i % 3 % (1 + i % 7), 8, seed=i) for i in range(count - 1)]
    batch.insert(count // 2, prompt(1, 130, 70, 8, seed=count))

    assert_accurate(simt, batch, "", 8**-0.5)


@each_type
@each_way
@pytest.mark.parametrize("spread", [0.0, 5.0, 30.0, 300.0])
def test_flat_peaked_and_large_scores(
    simt: Any, schedule: str, spread: float, way: str, name: str
) -> None:
    p = prompt(8, 150, 6, 64, name)

    assert_accurate(simt, [p._replace(q=(p.q * spread).to(p.q.dtype))], way, 0.125)


@each_way
@pytest.mark.parametrize("scale", [0.01, 1.0, 4.0, 0.0, -0.5])
def test_scale_counts(simt: Any, schedule: str, scale: float, way: str) -> None:
    assert_accurate(simt, [prompt(4, 90, 4, 16)], way, scale)


@each_way
@pytest.mark.parametrize("hidden", [(0, 64), (64, 128), (0, 128), (128, 200)])
def test_scores_of_minus_infinity(
    simt: Any, schedule: str, hidden: tuple[int, int], way: str
) -> None:
    """A chunk of which the query sees nothing counts nothing; all of them together are NaN."""
    p = prompt(2, 200, 1, 32)
    p.q[:] = p.q.abs()
    first, last = hidden
    p.k[:, first:last] = -torch.inf
    p.k[1] = -torch.inf

    out = attend(simt, [p], way)[0]

    left = [torch.cat([x[:1, :first], x[:1, last:]], 1) for x in (p.k, p.v)]
    own, truth = Prompt(p.q[:1], *left).expected(32**-0.5)
    assert_as_accurate_as_torch(out[:1].contiguous(), own, truth)
    assert out[1].isnan().all()


@each_type
@each_way
def test_one_key_gives_its_value(simt: Any, schedule: str, way: str, name: str) -> None:
    p = prompt(3, 1, 1, 20, name)

    assert_same_bits(attend(simt, [p], way)[0], p.v)


@each_type
@pytest.mark.parametrize(("length", "rows", "size"), [(70, 70, 64), (200, 40, 24), (330, 150, 8)])
def test_bits_do_not_depend_on_the_company(
    simt: Any, schedule: str, length: int, rows: int, size: int, name: str
) -> None:
    """Whole, in parts, row by row, alone, in a batch, by decode or prefill."""
    p, other = prompt(2, length, rows, size, name), prompt(2, 77, 3, size, name, seed=1)
    whole = attend(simt, [p], "prefill")[0]

    for first, last in [(0, 1), (0, 17), (1, rows), (rows // 3, rows // 2), (rows - 1, rows)]:
        part = attend(simt, [other, p.rows(first, last), other], "prefill")[1]
        assert_same_bits(part, whole[:, first:last])
    for first in range(0, rows, 11):
        last = min(rows, first + 1 + first % 16)
        part = attend(simt, [other, p.rows(first, last)], "decode", context=512)[1]
        assert_same_bits(part, whole[:, first:last])


@each_type
@each_way
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf, 6e4])
def test_the_future_does_not_count(
    simt: Any, schedule: str, poison: float, way: str, name: str
) -> None:
    p = prompt(2, 70, 16, 64, name)
    before = attend(simt, [p], way)[0]
    for changed in (p.k, p.v):
        changed[:, 61:] = poison

    after = attend(simt, [p], way)[0]

    assert_same_bits(after[:, :7], before[:, :7])
    assert after[:, 7:].isnan().any() or poison == 6e4


@each_way
def test_a_zero_has_one_sign(simt: Any, schedule: str, way: str) -> None:
    """A chunk too small to count leaves -0; that a later row sees another chunk makes no odds."""
    p = prompt(1, 136, 16, 8, "bf16")
    p.q[:] = 1.0
    p.k[:] = 0.0
    p.k[:, 64:] = -24.0  # weighs 2^-98
    p.v[:, :64] = 0.0
    p.v[:, 64:] = -1e-30

    out = attend(simt, [p], way)[0]

    assert_same_bits(out, torch.zeros_like(out))


@each_way
def test_values_that_are_not_finite_are_seen(simt: Any, schedule: str, way: str) -> None:
    p = prompt(1, 90, 9, 32)
    p.v[:, 84, 3] = torch.inf
    p.v[:, 85, 9] = torch.nan

    out = attend(simt, [p], way)[0][0]

    assert (out[:3].isfinite()).all()
    assert (out[3:, 3] == torch.inf).all()
    assert out[4:, 9].isnan().all()
    assert out[3, 9].isfinite()
    others = [d for d in range(32) if d not in (3, 9)]
    own, truth = p._replace(v=p.v.nan_to_num(0, 0)).expected(32**-0.5)
    assert_as_accurate_as_torch(out[:, others].contiguous(), own[0][:, others], truth[0][:, others])


@each_way
def test_a_nan_stays_in_its_head_and_sequence(simt: Any, schedule: str, way: str) -> None:
    batch = [prompt(3, 66, 4, 32, seed=i) for i in range(3)]
    clean = attend(simt, batch, way)
    batch[1].k[1, 3] = torch.nan

    out = attend(simt, batch, way)

    assert out[1][1].isnan().all()
    out[1][1] = clean[1][1]
    for left, right in zip(out, clean, strict=True):
        assert_same_bits(left, right)


def test_tickets_serve_the_next_launch(simt: Any, schedule: str) -> None:
    memory = scratch(3, 32, 2048)
    batch = [prompt(3, 700, 2, 32), prompt(3, 20, 1, 32, seed=1), prompt(3, 1500, 1, 32, seed=2)]
    first = attend(simt, batch, "decode", context=2048, memory=memory)

    for _ in range(2):
        again = attend(simt, batch, "decode", context=2048, memory=memory)
        for left, right in zip(first, again, strict=True):
            assert_same_bits(left, right)
    for p, out in zip(batch, first, strict=True):
        assert_same_bits(attend(simt, [p], "prefill")[0], out)


def dense(
    simt: Any, q: Tensor, k: Tensor, v: Tensor, lengths: list[int] | None = None, *, offset: int = 0
) -> Tensor:
    """dense_attention; what stands around its result must stay."""
    batch, heads, rows, size = q.shape
    name = next(name for name, known in DTYPES.items() if known == q.dtype)
    words = simt.dense_attention_words(batch, heads, rows, k.shape[2], size)
    pages = unwritten((words + 1,), torch.float32).view(np.uint32)
    memory = scratch(heads, size, k.shape[2])
    out = unwritten((q.numel() + 1,), q.dtype, offset=offset)
    count = None if lengths is None else np.array(lengths, np.int32)
    arrays = [array_of(x, offset=offset) for x in (q, k, v)]
    simt.dense_attention(name, *arrays, count, out[:-1], size**-0.5, pages, memory)
    assert out[-1] == 0xFFFF
    assert pages[-1] == 0xFFFFFFFF
    assert not memory[:TICKETS].any()
    return tensor_of(out[:-1].reshape(q.shape), q.dtype)


def dense_inputs(
    batch: int, heads: int, rows: int, keys: int, size: int, name: str = "fp16"
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (
        normal(batch, heads, n, size, seed=i).to(DTYPES[name])
        for i, n in enumerate((rows, keys, keys))
    )
    return q, k, v


@each_type
@pytest.mark.parametrize(
    ("batch", "heads", "rows", "keys", "size"),
    [
        (2, 3, 1, 1, 8),
        (1, 2, 70, 70, 64),
        (2, 2, 17, 200, 20),
        (3, 4, 5, 33, 96),
        (2, 40, 2, 20, 5),
    ],
)
def test_dense_prefill(
    simt: Any, schedule: str, batch: int, heads: int, rows: int, keys: int, size: int, name: str
) -> None:
    q, k, v = dense_inputs(batch, heads, rows, keys, size, name)

    out = dense(simt, q, k, v)

    own = reference.attention_prefill(q, k, v, size**-0.5)
    truth = reference.attention_prefill(q.double(), k.double(), v.double(), size**-0.5)
    assert_as_accurate_as_torch(out, own, truth)
    assert_same_bits(dense(simt, q, k, v, offset=1), out)


@each_type
@pytest.mark.parametrize(("heads", "size"), [(2, 64), (3, 20), (1, 128)])
def test_dense_decode(simt: Any, schedule: str, heads: int, size: int, name: str) -> None:
    lengths = [1, 16, 63, 64, 65, 257, 300]
    q, k, v = dense_inputs(len(lengths), heads, 1, 300, size, name)
    for b, length in enumerate(lengths):
        k[b, :, length:] = v[b, :, length:] = torch.nan

    out = dense(simt, q, k, v, lengths)

    for b, length in enumerate(lengths):
        one = Prompt(q[b], k[b, :, :length], v[b, :, :length])
        assert_as_accurate_as_torch(out[b], *one.expected(size**-0.5))
        assert_same_bits(dense(simt, one.q[None], one.k[None], one.v[None])[0], out[b])


def test_dense_decode_of_more_sequences_than_decode_takes(simt: Any, schedule: str) -> None:
    lengths = [1 + i % 70 for i in range(66)]
    q, k, v = dense_inputs(66, 2, 1, 70, 8)

    out = dense(simt, q, k, v, lengths)

    assert_same_bits(dense(simt, q[:60], k[:60], v[:60], lengths[:60]), out[:60])


@pytest.mark.parametrize("length", [0, -1, 21, 1 << 30])
def test_dense_lengths_out_of_range_do_no_harm(simt: Any, schedule: str, length: int) -> None:
    q, k, v = dense_inputs(2, 1, 1, 20, 8)

    out = dense(simt, q, k, v, [5, length])

    assert_same_bits(out, dense(simt, q, k, v, [5, min(max(length, 1), 20)]))


def test_nothing_to_do(simt: Any, schedule: str) -> None:
    q, k, v = dense_inputs(1, 2, 1, 4, 8)

    assert dense(simt, q[:0], k[:0], v[:0]).shape == (0, 2, 1, 8)
    assert dense(simt, q[:, :, :0], k, v).shape == (1, 2, 0, 8)


@pytest.mark.slow
def test_more_heads_than_tickets(simt: Any, schedule: str) -> None:
    p = prompt(TICKETS + 1, 2, 1, 8)

    assert_accurate(simt, [p], "", 8**-0.5)


def test_refuses_large_heads(simt: Any) -> None:
    with pytest.raises(Exception, match="head size must be at most 128 on CUDA, got 136"):
        attend(simt, [prompt(1, 4, 1, 136)])
