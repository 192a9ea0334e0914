"""The accuracy rule: a kernel may be at most twice as far from the truth as torch is."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_as_accurate_as_torch(
    out: Tensor, same_dtype: Tensor, truth: Tensor, factor: float = 2.0
) -> None:
    """Our worst error must stay within `factor` times torch's own, plus one rounding.

    Args:
        out: ours.
        same_dtype: torch's result in the dtype of `out`, from the same inputs.
        truth: the same in float64, from the same (already rounded) inputs; finite.
        factor: how many times torch's error is allowed. 2 everywhere; a larger one needs a
            sentence in docs/numerics.md.

    Raises:
        AssertionError: the rule is broken, or the three cannot be compared.
    """
    assert out.shape == same_dtype.shape == truth.shape, (out.shape, same_dtype.shape, truth.shape)
    assert out.dtype == same_dtype.dtype
    assert truth.dtype == torch.float64
    assert truth.numel() > 0
    assert torch.isfinite(truth).all()
    ours = float((out.double() - truth).abs().max())
    theirs = float((same_dtype.double() - truth).abs().max())
    floor = torch.finfo(out.dtype).eps * float(truth.abs().max())  # torch may be exact
    bound = factor * theirs + floor
    assert ours <= bound, f"ours {ours:.3e}, torch {theirs:.3e}, floor {floor:.3e}"  # NaN fails too
