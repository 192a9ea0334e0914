"""sample: the tokens and log-probabilities of the reference, each filter, edges of parameters."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gpt2_fast import ops, reference
from tests.accuracy import assert_as_accurate_as_torch

from .support import (
    assert_opcheck,
    assert_refused,
    assert_same_bits,
    assert_same_bits_everywhere,
    normal,
    spread_out,
)

VOCABULARIES = (1, 2, 17, 1000, 50257)
FILTERS = {
    "none": {},
    "top_k": {"top_k": 40},
    "top_p": {"top_p": 0.9},
    "openai": {"top_p": 0.9, "openai_top_p": True},
    "min_p": {"min_p": 0.05},
    "all": {"top_k": 100, "top_p": 0.8, "min_p": 0.01, "temperature": 0.7},
    "hot": {"temperature": 5.0, "top_k": 3},
    "greedy": {"temperature": 0.0, "top_k": 5, "top_p": 0.5},
}


def arguments(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    openai_top_p: bool = False,
    seed: int = 1234,
    sample: int = 0,
    position: int = 0,
) -> dict[str, Any]:
    """All arguments; row r is drawn at `position` + r."""
    R = len(logits)
    return {
        "logits": logits,
        "temperature": torch.full((R,), temperature),
        "top_k": torch.full((R,), top_k, dtype=torch.int32),
        "top_p": torch.full((R,), top_p),
        "min_p": torch.full((R,), min_p),
        "openai_top_p": openai_top_p,
        "seeds": torch.full((R,), seed),
        "samples": torch.full((R,), sample),
        "positions": torch.arange(position, position + R),
    }


def logits_of(R: int, V: int, seed: int = 0) -> Tensor:
    """Logits with a few likely tokens and a long tail, as a language model has."""
    return normal(R, V, seed=seed) * 3 - 30


def draw(logits: Tensor, **options: Any) -> list[int]:
    """The tokens of `ops.sample`."""
    return ops.sample(**arguments(logits, **options))[0].tolist()


def decided(args: dict[str, Any]) -> Tensor:
    """Which rows give the same token however the last bits of float32 fall.

    A row is decided if its best score leads the second by more than the rounding of logits and
    noise, and neither changes when top_p and min_p move a little.
    """
    out = []
    for r, row in enumerate(args["logits"].double().numpy()):
        temperature = float(args["temperature"][r])
        if temperature == 0 or row.size == 1:
            out.append(True)
            continue
        k, p, m = int(args["top_k"][r]), float(args["top_p"][r]), float(args["min_p"][r])
        key = (int(args["seeds"][r]), int(args["positions"][r]), int(args["samples"][r]))
        noise = reference.gumbel_noise(row.size, *key)
        best, gaps = set(), []
        for change in (0.9999, 1.0, 1.0001):
            moved = (k, p * change if p < 1 else p, m * change, args["openai_top_p"])
            kept = reference.kept_by_filters(row / temperature, *moved)
            scores = np.where(kept, row / temperature + noise, -np.inf)
            second, first = np.argsort(scores)[-2:]
            best.add(int(first))
            gaps.append(scores[first] - scores[second])
        out.append(len(best) == 1 and min(gaps) > 1e-4)
    return torch.tensor(out)


@cache
def expected(V: int, filters: str) -> tuple[dict[str, Any], Tensor, Tensor, Tensor]:
    """Arguments, the tokens and log-probabilities of the reference, and which rows are decided."""
    args = arguments(logits_of(6 if V > 1000 else 40, V, seed=V), **FILTERS[filters])
    return args, *reference.sample(**args), decided(args)


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("V", VOCABULARIES)
def test_matches_the_reference(isa: str, V: int, filters: str) -> None:
    args, drawn, truth, clear = expected(V, filters)
    assert clear.float().mean() > 0.9

    tokens, logprobs = ops.sample(**args)

    assert torch.equal(tokens[clear], drawn[clear])
    same_dtype = args["logits"].log_softmax(-1).gather(1, drawn[:, None])[:, 0]
    assert_as_accurate_as_torch(logprobs[clear], same_dtype[clear], truth[clear])


def test_rows_have_their_own_parameters(isa: str) -> None:
    parts = [
        arguments(logits_of(1, 300, seed=r), seed=r, sample=r, position=7 * r, **filters)
        for r, filters in enumerate(FILTERS.values())
        if "openai_top_p" not in filters
    ]
    together = {
        name: torch.cat([part[name] for part in parts])
        if isinstance(parts[0][name], Tensor)
        else parts[0][name]
        for name in parts[0]
    }

    tokens, logprobs = ops.sample(**together)

    for r, part in enumerate(parts):
        token, logprob = ops.sample(**part)
        assert_same_bits(token, tokens[r : r + 1])
        assert_same_bits(logprob, logprobs[r : r + 1])


@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)
def test_bits_are_the_same_everywhere(filters: dict[str, Any]) -> None:
    args = arguments(logits_of(12, 5003), **filters)

    assert_same_bits_everywhere(lambda: ops.sample(**args)[0])
    assert_same_bits_everywhere(lambda: ops.sample(**args)[1])


def test_frequencies_are_the_softmax(isa: str) -> None:
    """Chi-squared over 8 tokens and 5,000 draws; 99.9th percentile of 7 degrees is 24.3."""
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0, 0.5, 0.5, -2.0, 1.5]]).repeat(5000, 1)

    counts = np.bincount(draw(logits), minlength=8)

    expected = logits[0].double().softmax(-1).numpy() * len(logits)
    assert ((counts - expected) ** 2 / expected).sum() < 24.3


KEYS = {
    "seed": (1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 40, (1 << 63) - 1, -1),
    "sample": (1, 1 << 31, (1 << 32) - 1),
    "position": (1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 40, -(1 << 40)),
}


@pytest.mark.parametrize(
    ("what", "value"), [(what, value) for what, values in KEYS.items() for value in values]
)
def test_every_bit_of_the_key_counts(isa: str, what: str, value: int) -> None:
    logits = torch.zeros(30, 1000)

    tokens = draw(logits, **{what: value})

    assert tokens == reference.sample(**arguments(logits, **{what: value}))[0].tolist()
    assert tokens != draw(logits, **{what: 0})


def test_noise_is_finite_at_the_ends_of_the_uniform(isa: str) -> None:
    """Seed 0 draws the largest word for (454, 48947) and the smallest for (51, 31646).

    Rounded to float32 the largest uniform number is 1 and its noise infinite, which would pick a
    token of any logit.
    """
    for position, token in [(454, 48947), (51, 31646)]:
        extreme = reference.gumbel_noise(50257, 0, position, 0)[token]
        for logit, wins in [(-30.0, False), (30.0, True)]:
            logits = torch.zeros(1, 50257)
            logits[0, token] = logit
            (drawn,) = draw(logits, seed=0, position=position)
            assert (drawn == token) is wins
        assert np.isfinite(extreme)
    logits = torch.full((1, 50257), -torch.inf)
    logits[0, 48947], logits[0, 48948] = 0.0, reference.gumbel_noise(50257, 0, 454, 0)[48947]
    rival = reference.gumbel_noise(50257, 0, 454, 0)[48948]
    for step, token in [(-1e-3, 48947), (1e-3, 48948)]:  # the noise is right, not only finite
        moved = logits.clone()
        moved[0, 48948] += step - rival
        assert draw(moved, seed=0, position=454) == [token]


def test_greedy_takes_the_first_of_equals(isa: str) -> None:
    for V in (5, 16, 33, 1000):
        logits = torch.zeros(3, V)
        logits[1, V // 2] = logits[1, V - 1] = 2.0
        logits[2] = -torch.arange(V) * 0.0  # minus zero equals zero

        assert draw(logits, temperature=0.0) == [0, V // 2, 0]


@pytest.mark.parametrize("openai_top_p", [False, True])
def test_filters_keep_what_they_say(isa: str, openai_top_p: bool) -> None:
    """Eight tokens of known probability, drawn so often that every kept one comes up."""
    p = torch.tensor([0.05, 0.4, 0.05, 0.2, 0.2, 0.05, 0.04, 0.01])
    logits = p.log().repeat(1000, 1)

    def seen(**filters: Any) -> set[int]:
        return set(draw(logits, openai_top_p=openai_top_p, **filters))

    everything = set(range(8))
    assert seen(top_k=1) == {1}
    assert seen(top_k=2) == seen(top_k=3) == {1, 3, 4}  # ties at the k-th are kept
    assert seen(top_k=4) == {0, 1, 2, 3, 4, 5}
    assert seen(top_k=8) == seen(top_k=50257) == seen(top_k=0) == everything
    assert seen(top_p=0.0) == seen(top_p=0.39) == {1}
    assert seen(top_p=0.45) == ({1} if openai_top_p else {1, 3, 4})
    assert seen(top_p=0.7) == {1, 3, 4}  # by a tie; by the crossing token and its tie
    assert seen(top_p=0.84) == ({1, 3, 4} if openai_top_p else everything - {6, 7})
    assert seen(top_p=1.0) == everything
    assert seen(min_p=0.51) == {1}
    assert seen(min_p=0.49) == {1, 3, 4}
    assert seen(min_p=0.09) == everything - {7}
    assert seen(min_p=1.0) == {1}
    # top_p is taken of what top_k left: 0.4 / 0.8 and 0.6 / 0.8 ...
    assert seen(top_k=3, top_p=0.49) == {1}
    # ... and min_p of what top_p left, relative to the likeliest
    assert seen(top_p=0.7, min_p=0.6) == {1}
    assert seen(temperature=1e-3) == {1}
    assert seen(temperature=2.0, min_p=0.72) == {1}  # sqrt(0.2 / 0.4) = 0.707
    assert seen(temperature=2.0, min_p=0.70) == {1, 3, 4}


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1e-6])
def test_tiny_temperatures_are_greedy(isa: str, temperature: float) -> None:
    logits = logits_of(20, 1000)

    for filters in ({}, {"top_k": 7}, {"top_p": 0.9}, {"min_p": 0.1}):
        assert draw(logits, temperature=temperature, **filters) == logits.argmax(-1).tolist()


def test_huge_temperature_is_uniform(isa: str) -> None:
    logits = logits_of(30, 1000)

    tokens = draw(logits, temperature=1e30)

    assert tokens == draw(torch.zeros(30, 1000))


@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.2}])
def test_banned_tokens_are_never_drawn(isa: str, filters: dict[str, Any]) -> None:
    logits = torch.full((500, 100), -torch.inf)
    logits[:, [3, 50, 99]] = torch.tensor([1.0, 0.0, 1.5])

    tokens, logprobs = ops.sample(**arguments(logits, temperature=3.0, **filters))

    assert set(tokens.tolist()) <= {3, 50, 99}
    assert_as_accurate_as_torch(
        logprobs,
        logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0],
        logits.double().log_softmax(-1).gather(1, tokens[:, None])[:, 0],
    )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_nan_is_reported_in_its_row(isa: str, temperature: float) -> None:
    for V in (3, 16, 1000):
        for place in {0, V // 2, V - 1}:
            logits = logits_of(3, V)
            healthy = draw(logits, temperature=temperature)
            logits[1, place] = torch.nan

            tokens, logprobs = ops.sample(**arguments(logits, temperature=temperature))

            assert tokens.tolist() == [healthy[0], -1, healthy[2]]
            assert logprobs.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("hopeless", [torch.inf, -torch.inf])
def test_a_row_needs_a_finite_best(isa: str, hopeless: float, temperature: float) -> None:
    logits = logits_of(3, 100)
    healthy = draw(logits, temperature=temperature)
    logits[1] = -torch.inf
    logits[1, 40] = hopeless

    tokens, logprobs = ops.sample(**arguments(logits, temperature=temperature))

    assert tokens.tolist() == [healthy[0], -1, healthy[2]]
    assert logprobs.isnan().tolist() == [False, True, False]


def test_logprobs_ignore_temperature_and_filters(isa: str) -> None:
    logits = logits_of(10, 1000)

    tokens, logprobs = ops.sample(**arguments(logits, temperature=0.3, top_k=5, top_p=0.5))

    truth = logits.double().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    same_dtype = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    assert_as_accurate_as_torch(logprobs, same_dtype, truth)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.5),
        ("temperature", torch.nan),
        ("temperature", torch.inf),
        ("top_k", -1),
        ("top_p", -0.1),
        ("top_p", 1.5),
        ("top_p", torch.nan),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("min_p", torch.nan),
    ],
)
def test_refuses_parameters_out_of_range(name: str, value: float) -> None:
    args = arguments(logits_of(3, 20))
    args[name][1] = value

    with pytest.raises(ValueError, match=rf"sample: {name} must be .*got"):
        ops.sample(**args)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": torch.ones(20)}, r"logits must have 2 dimensions, got shape \(20\)"),
        ({"logits": torch.Tensor.bfloat16}, r"logits must be float32, got bfloat16"),
        ({"logits": spread_out}, r"logits must be contiguous, got shape .* with strides \(40, 2\)"),
        ({"temperature": torch.ones(4)}, r"temperature must have shape \(3\), got \(4\)"),
        ({"temperature": torch.ones(())}, r"temperature must have shape \(3\), got \(\)"),
        ({"top_k": torch.Tensor.long}, r"top_k must be int32, got int64"),
        ({"top_p": torch.Tensor.double}, r"top_p must be float32, got "),
        ({"min_p": torch.ones(3, 1)}, r"min_p must have shape \(3\), got \(3, 1\)"),
        ({"seeds": torch.Tensor.int}, r"seeds must be int64, got int32"),
        ({"samples": torch.zeros(2).long()}, r"samples must have shape \(3\), got \(2\)"),
        (
            {"positions": spread_out},
            r"positions must be contiguous, got shape .* with strides \(2\)",
        ),
        ({"positions": lambda p: p.to("meta")}, r"positions must be on cpu, got meta"),
    ],
)
def test_refuses(changes: dict[str, Any], message: str) -> None:
    assert_refused("sample", arguments(logits_of(3, 20)), changes, message)


def test_opcheck() -> None:
    assert_opcheck("sample", *arguments(logits_of(3, 20), top_k=5, top_p=0.9).values())
