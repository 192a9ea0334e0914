"""attention_prefill: lengths around every block edge, odd heads, causality, rows as in decode."""

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

HEAD_SIZES = (5, 8, 16, 20, 64, 128, 256, 300)


def arguments(
    B: int, H: int, T: int, S: int, D: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, float]:
    """q, k, v, scale."""
    return (
        normal(B, H, T, D, dtype=dtype, seed=1),
        normal(B, H, S, D, dtype=dtype, seed=2),
        normal(B, H, S, D, dtype=dtype, seed=3),
        D**-0.5,
    )


@each_dtype
@pytest.mark.parametrize("T", [1, 2, 15, 16, 17, 63, 64, 65, 255, 256, 257])
def test_matches_float64(isa: str, T: int, dtype: torch.dtype) -> None:
    assert_parity("attention_prefill", *arguments(1, 4, T, T, 16, dtype))


@each_dtype
@pytest.mark.parametrize("D", HEAD_SIZES)
def test_head_sizes(isa: str, D: int, dtype: torch.dtype) -> None:
    for S in (1, 17, 65):
        assert_parity("attention_prefill", *arguments(4, 8, S, S, D, dtype))


@each_dtype
@pytest.mark.parametrize("S", [17, 64, 65, 255, 257, 1023, 1024])
def test_more_keys_than_queries(isa: str, S: int, dtype: torch.dtype) -> None:
    for T in (1, 7, 16):
        assert_parity("attention_prefill", *arguments(4, 4, T, S, 20, dtype))


@each_dtype
@pytest.mark.parametrize("T", [1023, 1024])
def test_whole_context(isa: str, T: int, dtype: torch.dtype) -> None:
    assert_parity("attention_prefill", *arguments(1, 1, T, T, 64, dtype))


@each_dtype
def test_a_context_of_thousands(isa: str, dtype: torch.dtype) -> None:
    """Whose scores take more scratch than the sums of any product."""
    assert_parity("attention_prefill", *arguments(1, 3, 7, 4100, 16, dtype))


@each_dtype
@pytest.mark.parametrize("spread", [0.0, 5.0, 30.0], ids=["all-equal", "peaked", "one-hot"])
def test_flat_and_peaked_scores(isa: str, spread: float, dtype: torch.dtype) -> None:
    q, k, v, scale = arguments(1, 2, 40, 90, 64, dtype)

    assert_parity("attention_prefill", (q * spread).to(dtype), k, v, scale)


def next_to_nothing(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scores around the logarithm of the smallest normal float, and the outputs of heads that have
    one such score beside a zero and 1e30 and 0 as values."""
    scores = torch.arange(-92, -80, 0.5 if dtype == torch.bfloat16 else 1 / 64, dtype=dtype)
    k, v = torch.zeros(2, 1, len(scores), 2, 8, dtype=dtype)
    k[0, :, 1, 0], v[0, :, 1] = scores, 1e30
    q = torch.zeros(1, len(scores), 1, 8, dtype=dtype)
    q[..., 0] = 1
    return scores, ops.attention_prefill(q, k, v, 1.0)[0, :, 0]


@each_dtype
def test_weights_end_at_the_smallest_normal_float(isa: str, dtype: torch.dtype) -> None:
    scores, out = next_to_nothing(dtype)

    weights = scores.double().exp()
    weights[weights < torch.finfo(dtype).tiny] = 0  # denormals are zero
    assert 0 < weights.count_nonzero() < len(scores)
    expected = (weights * 1e30)[:, None].expand_as(out)
    tolerance = 1e-5 if dtype == torch.float32 else 2.0**-7
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=0)


@each_dtype
def test_small_weights_have_the_same_bits_everywhere(dtype: torch.dtype) -> None:
    assert_same_bits_everywhere(lambda: next_to_nothing(dtype)[1])


@each_dtype
@pytest.mark.parametrize("scale", [0.01, 1.0, 4.0])
def test_scale_counts(isa: str, scale: float, dtype: torch.dtype) -> None:
    q, k, v, _ = arguments(1, 2, 20, 20, 16, dtype)

    assert_parity("attention_prefill", q, k, v, scale)


@each_dtype
@pytest.mark.parametrize(("T", "S", "D"), [(1, 1, 5), (17, 17, 64), (33, 100, 20), (3, 300, 128)])
def test_bits_are_the_same_everywhere(T: int, S: int, D: int, dtype: torch.dtype) -> None:
    args = arguments(2, 3, T, S, D, dtype)

    assert_same_bits_everywhere(lambda: ops.attention_prefill(*args))


@each_dtype
@pytest.mark.parametrize(
    ("T", "S", "D"), [(1, 1, 8), (16, 16, 5), (65, 65, 64), (17, 257, 20), (130, 200, 16)]
)
def test_rows_have_the_bits_of_decode(isa: str, T: int, S: int, D: int, dtype: torch.dtype) -> None:
    q, k, v, scale = arguments(1, 2, T, S, D, dtype)
    lengths = torch.arange(S - T + 1, S + 1, dtype=torch.int32)
    keys, values = (x.expand(T, -1, -1, -1).contiguous() for x in (k, v))

    prefill = ops.attention_prefill(q, k, v, scale)
    decode = ops.attention_decode(q[0].transpose(0, 1).contiguous(), keys, values, lengths, scale)

    assert_same_bits(prefill[0].transpose(0, 1).contiguous(), decode)


@each_dtype
def test_chunks_have_the_bits_of_the_whole(isa: str, dtype: torch.dtype) -> None:
    q, k, v, scale = arguments(2, 2, 150, 150, 20, dtype)

    whole = ops.attention_prefill(q, k, v, scale)

    for first, last in [(0, 1), (0, 64), (1, 150), (63, 66), (100, 107), (149, 150)]:
        args = (x[:, :, begin:last].contiguous() for x, begin in ((q, first), (k, 0), (v, 0)))
        chunk = ops.attention_prefill(*args, scale)
        assert_same_bits(chunk, whole[:, :, first:last].contiguous())


@each_dtype
@pytest.mark.parametrize("first", [50, 51, 64, 65])  # even and odd: bfloat16 keeps pairs
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, 1e30])
def test_the_future_does_not_count(isa: str, poison: float, first: int, dtype: torch.dtype) -> None:
    q, k, v, scale = arguments(1, 2, 40, 70, 20, dtype)
    before = ops.attention_prefill(q, k, v, scale)
    for changed in (k, v):
        changed[:, :, first:] = poison

    after = ops.attention_prefill(q, k, v, scale)

    clean = first - 30  # query t sees 31 + t positions
    assert_same_bits(after[:, :, :clean].contiguous(), before[:, :, :clean].contiguous())


@each_dtype
def test_heads_and_sequences_do_not_see_each_other(isa: str, dtype: torch.dtype) -> None:
    q, k, v, scale = arguments(3, 3, 9, 30, 16, dtype)
    k[1, 1] = torch.nan

    together = ops.attention_prefill(q, k, v, scale)

    assert together[1, 1].isnan().all()
    for b in range(3):
        for h in range(3):
            part = (x[b : b + 1, h : h + 1].contiguous() for x in (q, k, v))
            assert_same_bits(ops.attention_prefill(*part, scale)[0, 0], together[b, h])


def test_nothing_to_do(isa: str) -> None:
    q, k, v, scale = arguments(2, 3, 4, 4, 8)

    assert ops.attention_prefill(q[:0], k[:0], v[:0], scale).shape == (0, 3, 4, 8)
    assert ops.attention_prefill(q[:, :, :0].clone(), k, v, scale).shape == (2, 3, 0, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.ones(2, 4, 8)}, r"q must have 4 dimensions, got shape \(2, 4, 8\)"),
        ({"k": torch.ones(2, 6, 8)}, r"k must have 4 dimensions, got shape \(2, 6, 8\)"),
        ({"k": torch.ones(2, 3, 6, 9)}, r"k must have shape \(2, 3, 6, 8\), got \(2, 3, 6, 9\)"),
        ({"k": torch.ones(2, 1, 6, 8)}, r"k must have shape \(2, 3, 6, 8\), got \(2, 1, 6, 8\)"),
        ({"v": torch.ones(2, 3, 5, 8)}, r"v must have shape \(2, 3, 6, 8\), got \(2, 3, 5, 8\)"),
        (
            {"k": torch.ones(2, 3, 3, 8), "v": torch.ones(2, 3, 3, 8)},
            r"k must have at least as many positions as q has queries, got 3 for 4",
        ),
        ({"q": torch.Tensor.half}, r"q must be float32 or bfloat16, got float16"),
        ({"k": torch.Tensor.bfloat16}, r"k must be float32 like q, got bfloat16"),
        ({"q": spread_out}, r"q must be contiguous, got shape .* with strides \(192, 64, 16, 2\)"),
        ({"v": lambda v: v.mT.contiguous().mT}, r"v must be contiguous, got"),
        ({"v": lambda v: v.to("meta")}, r"v must be on cpu, got meta"),
    ],
)
def test_refuses(changes: dict[str, Any], message: str) -> None:
    names = ("q", "k", "v", "scale")
    good = dict(zip(names, arguments(2, 3, 4, 6, 8), strict=True))

    assert_refused("attention_prefill", good, changes, message)


@each_dtype
def test_opcheck(dtype: torch.dtype) -> None:
    assert_opcheck("attention_prefill", *arguments(2, 3, 4, 6, 8, dtype))
