"""embed: exact sums, ids out of range, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gpt2_fast import ops, reference

from .support import (
    GPT2_WIDTHS,
    ODD_WIDTHS,
    assert_opcheck,
    assert_refused,
    assert_same_bits,
    assert_same_bits_everywhere,
    each_dtype,
    normal,
    spread_out,
)

VOCABULARY, CONTEXT = 503, 64


def arguments(rows: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """tokens, positions, wte, wpe; the last token and the last position are among them."""
    generator = torch.Generator().manual_seed(rows)
    tokens = torch.randint(VOCABULARY, (rows,), generator=generator)
    positions = torch.randint(CONTEXT, (rows,), generator=generator)
    if rows:
        tokens[-1], positions[-1] = VOCABULARY - 1, CONTEXT - 1
    return (
        tokens,
        positions,
        normal(VOCABULARY, width, dtype=dtype, seed=1),
        normal(CONTEXT, width, dtype=dtype, seed=2),
    )


@each_dtype
@pytest.mark.parametrize("width", GPT2_WIDTHS + ODD_WIDTHS)
def test_is_the_rounded_sum(isa: str, width: int, dtype: torch.dtype) -> None:
    for rows in (0, 1, 3, 17, 130):
        tokens, positions, wte, wpe = arguments(rows, width, dtype)

        out = ops.embed(tokens, positions, wte, wpe)

        exact = reference.embed(tokens, positions, wte.double(), wpe.double())
        assert_same_bits(out, exact.to(dtype))


@each_dtype
def test_bits_are_the_same_everywhere(dtype: torch.dtype) -> None:
    args = arguments(17, 769, dtype)

    assert_same_bits_everywhere(lambda: ops.embed(*args))


def at_one(value: int) -> Any:
    """Puts `value` at index 1."""

    def change(ids: Tensor) -> Tensor:
        return ids.index_fill(0, torch.tensor([1]), value)

    return change


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tokens", VOCABULARY),
        ("tokens", -1),
        ("tokens", 1 << 40),
        ("tokens", (1 << 32) + 1),
        ("positions", CONTEXT),
        ("positions", -1),
        ("positions", -(1 << 62)),
    ],
)
def test_refuses_ids_out_of_range(name: str, value: int) -> None:
    args = dict(
        zip(("tokens", "positions", "wte", "wpe"), arguments(3, 8, torch.float32), strict=True)
    )
    args[name] = at_one(value)(args[name])

    with pytest.raises(ValueError, match=rf"embed: {name} must be in .*, got {value}"):
        ops.embed(**args)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": torch.Tensor.int}, r"tokens must be int64, got int32"),
        ({"positions": torch.zeros(4).long()}, r"positions must have shape \(3\), got \(4\)"),
        (
            {"tokens": torch.zeros(1, 3).long()},
            r"tokens must have 1 dimensions, got shape \(1, 3\)",
        ),
        ({"wte": torch.ones(8)}, r"wte must have 2 dimensions, got shape \(8\)"),
        ({"wpe": torch.ones(64, 9)}, r"wpe must have shape \(64, 8\), got \(64, 9\)"),
        ({"wpe": torch.ones(64)}, r"wpe must have 2 dimensions, got shape \(64\)"),
        ({"wte": torch.Tensor.half}, r"wte must be float32 or bfloat16, got float16"),
        ({"wpe": torch.Tensor.bfloat16}, r"wpe must be float32 like wte, got bfloat16"),
        ({"wte": spread_out}, r"wte must be contiguous, got shape .* with strides \(16, 2\)"),
        ({"tokens": spread_out}, r"tokens must be contiguous, got shape .* with strides \(2\)"),
        ({"wpe": lambda w: w.to("meta")}, r"wpe must be on cpu, got meta"),
    ],
)
def test_refuses(changes: dict[str, Any], message: str) -> None:
    names = ("tokens", "positions", "wte", "wpe")
    good = dict(zip(names, arguments(3, 8, torch.float32), strict=True))

    assert_refused("embed", good, changes, message)


@each_dtype
def test_opcheck(dtype: torch.dtype) -> None:
    assert_opcheck("embed", *arguments(3, 8, dtype))
