"""Inputs, comparisons and refusals that the kernel tests share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from gpt2_fast import _C, ops, reference
from gpt2_fast.errors import ParameterError
from tests.accuracy import assert_as_accurate_as_torch

if TYPE_CHECKING:
    from collections.abc import Callable

GPT2_WIDTHS = (768, 1024, 1280, 1600)
ODD_WIDTHS = (1, 5, 48, 100, 769)
THREADS = (1, 2, 3)

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Standard normal values, rounded to `dtype`."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def vector(size: int, *, mean: float = 0.0, seed: int = 0) -> Tensor:
    """(size,) float32 that bfloat16 holds exactly, so that torch in bfloat16 loses nothing."""
    return (normal(size, seed=seed) * 0.5 + mean).bfloat16().float()


def spread_out(tensor: Tensor) -> Tensor:
    """The same values, not contiguous."""
    out = torch.stack([tensor, tensor], -1)[..., 0]
    assert not out.is_contiguous()
    return out


def without_data(tensor: Tensor) -> Tensor:
    """The same shape, strides and dtype on the meta device."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def doubles(*args: Any) -> list[Any]:
    """The arguments with every float tensor in float64."""
    return [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]


def assert_parity(op: str, *args: Any) -> Tensor:
    """Run one op three ways and hold it to the accuracy rule; gives its result."""
    truth = getattr(reference, op)(*doubles(*args))
    same_dtype = getattr(reference, op)(*args)
    out: Tensor = getattr(ops, op)(*args)
    assert_as_accurate_as_torch(out, same_dtype, truth)
    return out


def assert_same_bits(left: Tensor, right: Tensor) -> None:
    """Equal shape, dtype and bits; a NaN equals any NaN."""
    assert left.dtype == right.dtype
    assert left.shape == right.shape
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[left.element_size()]
    differ = (left.view(integer) != right.view(integer)) & ~(left.isnan() & right.isnan())
    assert not differ.any(), f"{int(differ.sum())} of {left.numel()} values differ"


def assert_same_bits_everywhere(run: Callable[[], Tensor]) -> None:
    """The result of `run` has the same bits on every instruction set and number of threads."""
    first: Tensor | None = None
    for isa in _C.isas():
        for threads in THREADS:
            _C.set_op_backend(isa, threads)
            out = run()
            first = out if first is None else first
            try:
                assert_same_bits(out, first)
            except AssertionError as error:
                raise AssertionError(f"{isa}, {threads} threads: {error}") from None


def assert_refused(op: str, good: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    """Both the kernel and the shape function refuse `good` with `changes`, in the same words.

    Args:
        op: name of the op.
        good: arguments that work.
        changes: what to replace in them. A callable gets the good value.
        message: pattern for what follows "op: ".
    """
    getattr(ops, op)(**good)  # or the refusal would prove nothing
    bad = dict(good)
    for name, change in changes.items():
        bad[name] = change(good[name]) if callable(change) else change
    pattern = f"^{op.rstrip('_')}: {message}"
    with pytest.raises(ParameterError, match=pattern):
        getattr(ops, op)(**bad)
    tensors = {name: value for name, value in bad.items() if isinstance(value, Tensor)}
    if all(value.device.type == "cpu" for value in tensors.values()):
        with pytest.raises(ParameterError, match=pattern):
            getattr(ops, op)(**bad | {name: without_data(value) for name, value in tensors.items()})


def assert_opcheck(op: str, *args: Any) -> None:
    """torch's own checks of schema, shape function and tracing, with fixed and with free shapes."""
    torch.library.opcheck(getattr(torch.ops.gpt2_fast, op).default, args)
