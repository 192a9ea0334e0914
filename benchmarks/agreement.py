"""Whether two engines that chose different tokens were both right."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from benchmarks.peers.contract import WEIGHT_SEED, Prompts
from gpt2_fast.sources import RandomSource

if TYPE_CHECKING:
    from gpt2_fast import GPT2Config

Logits = Callable[[list[int]], list[float]]
_Row = npt.NDArray[np.float64]
FLOAT32_EPS = 2.0**-23


def true_logits(config: GPT2Config, tokens: list[int]) -> _Row:
    """(V,) logits after `tokens`, computed in float64 by the reference model."""
    import torch

    from gpt2_fast.reference import GPT2Reference

    source = RandomSource(config, WEIGHT_SEED)
    state = {name: torch.from_numpy(a).double() for name, _, a, _ in source.tensors()}
    with torch.inference_mode():
        row: _Row = GPT2Reference(config, state).forward(torch.tensor([tokens]))[0, -1].numpy()
    return row


def judge(truth: _Row, ours: _Row, theirs: _Row, our_token: int, their_token: int) -> str:
    """Say why the tokens may differ.

    Raises:
        RuntimeError: the margin between the two tokens exceeds what both engines' errors can
            account for, or our error is more than twice theirs.
    """
    our_error = float(np.abs(ours - truth).max())
    their_error = float(np.abs(theirs - truth).max())
    margin = float(abs(truth[our_token] - truth[their_token]))
    numbers = f"margin {margin:.1e}, errors {our_error:.1e} (ours) and {their_error:.1e} (theirs)"
    if our_error > 2 * their_error + FLOAT32_EPS * float(np.abs(truth).max()):
        raise RuntimeError(f"our logits are less accurate than theirs: {numbers}")
    if margin > our_error + their_error:
        raise RuntimeError(
            f"tokens {our_token} (ours) and {their_token} (theirs) differ although the choice was "
            f"clear: {numbers}"
        )
    return numbers


def explain(
    config: GPT2Config,
    prompts: Prompts,
    ours: Prompts,
    theirs: Prompts,
    our_logits: Logits,
    their_logits: Logits,
) -> str:
    """Compare greedy tokens text by text, up to where they part.

    Returns:
        One line for people.

    Raises:
        RuntimeError: as in `judge`, or the numbers of tokens differ.
    """
    notes = []
    for number, (prompt, left, right) in enumerate(zip(prompts, ours, theirs, strict=True)):
        if len(left) != len(right):
            raise RuntimeError(f"text {number}: {len(left)} tokens (ours), {len(right)} (theirs)")
        parted = next((i for i, (a, b) in enumerate(zip(left, right, strict=True)) if a != b), None)
        if parted is None:
            continue
        seen = prompt + left[:parted]
        truth = true_logits(config, seen)
        numbers = judge(
            truth,
            np.asarray(our_logits(seen)),
            np.asarray(their_logits(seen)),
            left[parted],
            right[parted],
        )
        notes.append(f"text {number} parts at token {parted}, where float64 has {numbers}")
    count = sum(len(left) for left in ours)
    return "; ".join(notes) or f"the same {count} tokens"
