"""attention_decode: ragged lengths around block edges, odd heads, nothing read behind the end."""

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
LENGTHS = (1, 15, 16, 17, 63, 64, 65, 255, 256, 257, 1023, 1024)


def arguments(
    lengths: tuple[int, ...], H: int, S: int, D: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """q, k, v, lengths, scale."""
    B = len(lengths)
    return (
        normal(B, H, D, dtype=dtype, seed=1),
        normal(B, H, S, D, dtype=dtype, seed=2),
        normal(B, H, S, D, dtype=dtype, seed=3),
        torch.tensor(lengths, dtype=torch.int32),
        D**-0.5,
    )


@each_dtype
@pytest.mark.parametrize("length", LENGTHS)
def test_matches_float64(isa: str, length: int, dtype: torch.dtype) -> None:
    assert_parity("attention_decode", *arguments((length,) * 4, 4, length, 64, dtype))


@each_dtype
@pytest.mark.parametrize("D", HEAD_SIZES)
def test_head_sizes(isa: str, D: int, dtype: torch.dtype) -> None:
    assert_parity("attention_decode", *arguments((1, 17, 64, 80), 16, 80, D, dtype))


@each_dtype
def test_ragged_lengths(isa: str, dtype: torch.dtype) -> None:
    assert_parity("attention_decode", *arguments(LENGTHS, 2, 1024, 20, dtype))


@each_dtype
@pytest.mark.parametrize("spread", [0.0, 5.0, 30.0], ids=["all-equal", "peaked", "one-hot"])
def test_flat_and_peaked_scores(isa: str, spread: float, dtype: torch.dtype) -> None:
    q, k, v, lengths, scale = arguments((90, 33, 64, 70), 8, 90, 64, dtype)

    assert_parity("attention_decode", (q * spread).to(dtype), k, v, lengths, scale)


@each_dtype
def test_one_key_gives_its_value(isa: str, dtype: torch.dtype) -> None:
    q, k, v, lengths, scale = arguments((1, 1, 1), 2, 40, 20, dtype)

    assert_same_bits(ops.attention_decode(q, k, v, lengths, scale), v[:, :, 0].contiguous())


@each_dtype
@pytest.mark.parametrize(("S", "D"), [(1, 5), (65, 64), (300, 128), (1024, 20)])
def test_bits_are_the_same_everywhere(S: int, D: int, dtype: torch.dtype) -> None:
    args = arguments((1, S // 2 + 1, S), 3, S, D, dtype)

    assert_same_bits_everywhere(lambda: ops.attention_decode(*args))


@each_dtype
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, 1e30])
def test_nothing_behind_the_end_counts(isa: str, poison: float, dtype: torch.dtype) -> None:
    q, k, v, lengths, scale = arguments((1, 16, 37, 64), 2, 80, 20, dtype)
    before = ops.attention_decode(q, k, v, lengths, scale)
    for changed in (k, v):
        for b, length in enumerate(lengths.tolist()):
            changed[b, :, length:] = poison

    assert_same_bits(ops.attention_decode(q, k, v, lengths, scale), before)


@each_dtype
def test_sequences_do_not_see_each_other(isa: str, dtype: torch.dtype) -> None:
    q, k, v, lengths, scale = arguments((3, 64, 17, 1, 70), 3, 70, 16, dtype)
    k[1] = torch.nan

    together = ops.attention_decode(q, k, v, lengths, scale)

    assert together[1].isnan().all()
    for b, length in enumerate(lengths.tolist()):
        one = slice(b, b + 1)
        alone = ops.attention_decode(q[one], k[one], v[one], lengths[one], scale)
        assert_same_bits(alone, together[one])
        short = (x[one, :, :length].contiguous() for x in (k, v))  # nor the room behind the end
        assert_same_bits(ops.attention_decode(q[one], *short, lengths[one], scale), together[one])


def test_nothing_to_do(isa: str) -> None:
    q, k, v, lengths, scale = arguments((1, 2), 3, 4, 8)

    assert ops.attention_decode(q[:0], k[:0], v[:0], lengths[:0], scale).shape == (0, 3, 8)


@pytest.mark.parametrize("length", [0, -1, 7, 1 << 30])
def test_refuses_lengths_out_of_range(length: int) -> None:
    q, k, v, lengths, scale = arguments((1, 2), 3, 6, 8)
    lengths[1] = length

    with pytest.raises(ValueError, match=rf"attention_decode: lengths must be in .*, got {length}"):
        ops.attention_decode(q, k, v, lengths, scale)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.ones(2, 3, 1, 8)}, r"q must have 3 dimensions, got shape \(2, 3, 1, 8\)"),
        ({"k": torch.ones(2, 6, 8)}, r"k must have 4 dimensions, got shape \(2, 6, 8\)"),
        ({"k": torch.ones(2, 3, 6, 9)}, r"k must have shape \(2, 3, 6, 8\), got \(2, 3, 6, 9\)"),
        ({"v": torch.ones(2, 3, 5, 8)}, r"v must have shape \(2, 3, 6, 8\), got \(2, 3, 5, 8\)"),
        ({"lengths": torch.ones(3).int()}, r"lengths must have shape \(2\), got \(3\)"),
        ({"lengths": torch.Tensor.long}, r"lengths must be int32, got int64"),
        ({"q": torch.Tensor.half}, r"q must be float32 or bfloat16, got float16"),
        ({"v": torch.Tensor.bfloat16}, r"v must be float32 like q, got bfloat16"),
        ({"k": spread_out}, r"k must be contiguous, got shape .* with strides \(288, 96, 16, 2\)"),
        ({"lengths": spread_out}, r"lengths must be contiguous, got shape .* with strides \(2\)"),
        ({"lengths": lambda n: n.to("meta")}, r"lengths must be on cpu, got meta"),
    ],
)
def test_refuses(changes: dict[str, Any], message: str) -> None:
    names = ("q", "k", "v", "lengths", "scale")
    good = dict(zip(names, arguments((1, 2), 3, 6, 8), strict=True))

    assert_refused("attention_decode", good, changes, message)


@each_dtype
def test_opcheck(dtype: torch.dtype) -> None:
    assert_opcheck("attention_decode", *arguments((1, 6), 3, 6, 8, dtype))
