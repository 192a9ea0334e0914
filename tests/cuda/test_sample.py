"""sample on CUDA: the tokens of the reference for any filter, hostile logits, the same bits alone
and in a batch, from logits and from the parts that ln_head leaves."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from gpt2_fast import reference
from tests.accuracy import assert_as_accurate_as_torch

from .arrays import Array, normal, unwritten

pytestmark = pytest.mark.usefixtures("schedule")  # every test in every order of threads

PART = 128  # logits of one HeadPart
SCHEDULES = ("forward_late", "reverse_early", "random_1", "random_2")
HELD = 197 * 256  # logits that a block holds in registers
ROUNDS = 31 + 8  # of one bisection
FILTERS: dict[str, dict[str, Any]] = {
    "none": {},
    "top_k": {"top_k": 40},
    "top_p": {"top_p": 0.9},
    "openai": {"top_p": 0.9, "openai_top_p": True},
    "min_p": {"min_p": 0.05},
    "all": {"top_k": 100, "top_p": 0.8, "min_p": 0.01, "temperature": 0.7},
    "hot": {"temperature": 5.0, "top_k": 3},
    "cold": {"temperature": 0.02},  # scores too large to be merged as they are
    "greedy": {"temperature": 0.0, "top_k": 5, "top_p": 0.5},
}
each_filter = pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)


class Drawn(NamedTuple):
    """What came of a row; `clear` if it is so however the last bits of float32 fall."""

    token: int
    logprob: float
    clear: bool = True


def expected(logits: Array, p: dict[str, Any]) -> Drawn:
    """One row, by the reference in float64."""
    row = logits.astype(np.float64)
    end = p.get("drawable", 0) or len(row)
    if not np.isfinite(row.max()) or not np.isfinite(row[:end].max()):
        return Drawn(-1, np.nan)
    temperature = p.get("temperature", 1.0)
    token, clear = int(np.argmax(row[:end])), True
    if "target" in p:
        token = p["target"]
    elif temperature >= 2.0**-126 and end > 1:
        z = (row[:end] - row[:end].max()) / temperature
        key = (p.get("seed", 0), p.get("position", 0), p.get("sample", 0))
        noise = reference.gumbel_noise(end, *key)
        top_p, found, gap = p.get("top_p", 1.0), [], np.inf
        for change in (1.0, 0.9999, 1.0001):
            changed = top_p * change if top_p < 1 else top_p
            kept = reference.kept_by_filters(
                z, p.get("top_k", 0), changed, p.get("min_p", 0.0) * change, "openai_top_p" in p
            )
            scores = np.where(kept, z + noise, -np.inf)
            found.append(int(np.argmax(scores)))
            second, first = np.sort(scores)[-2:]
            gap = min(gap, float(first - second)) if second > -np.inf else gap
        token, clear = found[0], len(set(found)) == 1 and not gap < 1e-4
    total = np.log(np.sum(np.exp(row - row.max())))
    return Drawn(token, float(row[token] - row.max() - total), clear)


def draw(
    simt: Any, logits: Array, rows: list[dict[str, Any]], parts: Array | None = None
) -> tuple[Array, Array, Array]:
    """Tokens, log-probabilities and the parts they come from; rows are padded with NaN."""
    R, V = logits.shape
    padded = unwritten((R, V + 7), torch.float32)
    padded[:, :V] = logits
    tokens, logprobs = np.full(R, 1 << 30, np.int32), np.full(R, 7.0, np.float32)
    made = unwritten((R, -(-V // PART), 4), torch.float32).view(np.uint32)
    simt.sample(padded, V, rows, tokens, logprobs, None if parts is not None else made, parts)
    assert ((tokens >= -1) & (tokens < V)).all()
    return tokens, logprobs, made if parts is None else parts


def logits_of(R: int, V: int, seed: int = 0) -> Array:
    """A few likely tokens and a long tail, as a language model has."""
    out: Array = (normal(R, V, seed=seed) * 3 - 30).numpy()
    return out


def keyed(R: int, **filters: Any) -> list[dict[str, Any]]:
    """The same filters for each row, another key."""
    return [{"seed": 77 - r, "sample": r % 3, "position": 5 * r, **filters} for r in range(R)]


def assert_as_expected(simt: Any, logits: Array, rows: list[dict[str, Any]]) -> None:
    """Tokens of the reference; log-probabilities as accurate as torch's."""
    truth = [expected(row, p) for row, p in zip(logits, rows, strict=True)]
    tokens, logprobs, _ = draw(simt, logits, rows)
    clear = np.array([t.clear for t in truth])
    assert clear.mean() > 0.8
    assert tokens[clear].tolist() == [t.token for t in truth if t.clear]
    assert (np.isnan(logprobs) == (tokens < 0)).all()
    fine = clear & (tokens >= 0) & np.isfinite([t.logprob for t in truth])
    if not fine.any():
        return
    own = torch.from_numpy(logits).log_softmax(-1)
    assert_as_accurate_as_torch(
        torch.from_numpy(logprobs[fine]),
        own[np.arange(len(own)), np.maximum(tokens, 0)][torch.from_numpy(fine)],
        torch.tensor([t.logprob for t, f in zip(truth, fine, strict=True) if f]).double(),
    )


@each_filter
@pytest.mark.parametrize("V", [5, 1000])
def test_matches_the_reference(simt: Any, schedule: str, V: int, filters: dict[str, Any]) -> None:
    assert_as_expected(simt, logits_of(8, V, seed=V), keyed(8, **filters))


@each_filter
@pytest.mark.parametrize("V", [1, 2, 100, 129])
def test_small_vocabularies(simt: Any, V: int, filters: dict[str, Any]) -> None:
    assert_as_expected(simt, logits_of(20, V, seed=V), keyed(20, **filters))


@each_filter
@pytest.mark.parametrize("V", [50257, HELD, HELD + 1])
def test_large_vocabularies(simt: Any, V: int, filters: dict[str, Any]) -> None:
    """Also where registers just hold the row, and where they do not."""
    logits = logits_of(4, V)
    logits[1, V - 1] = logits[1].max() + 2  # the very last token is likely
    logits[2] *= 0.05  # nearly flat: thousands are kept
    logits[2, -40:] += 3
    assert_as_expected(simt, logits, keyed(4, **filters))


def test_rows_alone_and_together(simt: Any, schedule: str) -> None:
    rows = [
        {**p, **filters} for p, filters in zip(keyed(len(FILTERS)), FILTERS.values(), strict=True)
    ]
    logits = logits_of(len(rows), 300)
    tokens, logprobs, parts = draw(simt, logits, rows)
    for r, p in enumerate(rows):
        token, logprob, part = draw(simt, logits[r : r + 1], [p])
        assert token[0] == tokens[r]
        assert logprob.tobytes() == logprobs[r : r + 1].tobytes()
        assert part.tobytes() == parts[r].tobytes()


def test_every_schedule_gives_the_same(simt: Any) -> None:
    """Sums too: nothing is added in the order in which threads happen to arrive."""
    logits = logits_of(3, 5000)
    logits[1] *= 0.02
    for filters in FILTERS.values():
        found = []
        for name in SCHEDULES:
            simt.set_schedule(name)
            found.append([x.tobytes() for x in draw(simt, logits, keyed(3, **filters))])
        assert found == [found[0]] * len(SCHEDULES)


@each_filter
def test_parts_made_elsewhere_give_the_same(simt: Any, filters: dict[str, Any]) -> None:
    logits, rows = logits_of(5, 777), keyed(5, **filters)
    tokens, logprobs, parts = draw(simt, logits, rows)
    again, logprobs_again, _ = draw(simt, logits, rows, parts)
    assert tokens.tolist() == again.tolist()
    assert logprobs.tobytes() == logprobs_again.tobytes()


def test_parts(simt: Any, schedule: str) -> None:
    """Best with the lowest id, highest and sum of each 128 logits, never of what lies behind V."""
    V = 300
    logits = logits_of(3, V)
    logits[1, :PART] = -np.inf
    logits[2, 130] = np.nan
    rows: list[dict[str, Any]] = [
        {"temperature": 0.0}, {"temperature": 0.5, "seed": 3}, {"target": 4},
    ]  # fmt: skip
    parts = draw(simt, logits, rows)[2]
    best, ids, highest, sums = (parts[..., i] for i in range(4))
    floats = [x.view(np.float32) for x in (best.copy(), highest.copy(), sums.copy())]
    for r in range(3):
        for part in range(3):
            mine = logits[r, part * PART : (part + 1) * PART].astype(np.float64)
            if r == 2 and part == 1:
                assert np.isnan(floats[1][r, part])
                continue
            assert floats[1][r, part] == mine.max()
            if mine.max() == -np.inf:
                assert ids[r, part] == 0xFFFFFFFF
                assert floats[2][r, part] == 0
                continue
            scores = mine / rows[r].get("temperature", 1.0) if r == 1 else mine
            if r == 1:
                noise = reference.gumbel_noise(V, 3, 0, 0)
                scores = scores + noise[part * PART : (part + 1) * PART]
            assert ids[r, part] == part * PART + np.argmax(scores)
            assert abs(floats[0][r, part] - scores.max()) < 1e-5
            assert abs(floats[2][r, part] / np.exp(mine - mine.max()).sum() - 1) < 1e-6


def test_frequencies_are_the_softmax(simt: Any) -> None:
    """Chi-squared over 8 tokens and 4,000 draws; 99.9th percentile of 7 degrees is 24.3."""
    row = np.array([0.0, 1.0, 2.0, -1.0, 0.5, 0.5, -2.0, 1.5], np.float32)
    rows = [{"seed": 99, "position": r} for r in range(4000)]
    counts = np.bincount(draw(simt, np.tile(row, (4000, 1)), rows)[0], minlength=8)
    wanted = torch.from_numpy(row).double().softmax(-1).numpy() * 4000
    assert ((counts - wanted) ** 2 / wanted).sum() < 24.3


KEPT: list[tuple[set[int], dict[str, Any]]] = [
    ({1}, {"top_k": 1}),
    ({1, 3, 4}, {"top_k": 2}),  # ties at the k-th are kept
    ({0, 1, 2, 3, 4, 5}, {"top_k": 4}),
    (set(range(8)), {"top_k": 8}),
    (set(range(8)), {"top_k": 50257}),
    ({1}, {"top_p": 0.0}),
    ({1}, {"top_p": 0.39}),
    ({1, 3, 4}, {"top_p": 0.45}),
    ({1}, {"top_p": 0.45, "openai_top_p": True}),
    ({1, 3, 4}, {"top_p": 0.7, "openai_top_p": True}),
    (set(range(8)) - {6, 7}, {"top_p": 0.84}),
    ({1, 3, 4}, {"top_p": 0.84, "openai_top_p": True}),
    ({1}, {"top_p": 0.39, "openai_top_p": True}),
    ({1, 3, 4}, {"min_p": 0.49}),
    (set(range(8)) - {7}, {"min_p": 0.09}),
    ({1}, {"min_p": 1.0}),
    ({1}, {"top_k": 3, "top_p": 0.49}),  # 0.4 / 0.8: top_p is taken of what top_k left
    ({1}, {"top_p": 0.7, "min_p": 0.6}),
    ({1}, {"temperature": 2.0, "min_p": 0.72}),  # sqrt(0.2 / 0.4) = 0.707
    ({1, 3, 4}, {"temperature": 2.0, "min_p": 0.70}),
    ({1, 3, 4, 0, 2, 5, 6}, {"drawable": 7, "top_k": 7}),
    ({1, 3, 4}, {"drawable": 5, "top_p": 0.88}),  # 0.8 of 0.9
]


@pytest.mark.parametrize(("kept", "filters"), KEPT, ids=[str(filters) for _, filters in KEPT])
def test_filters_keep_what_they_say(simt: Any, kept: set[int], filters: dict[str, Any]) -> None:
    """Each token gets one draw in which its noise makes it the best by far, if it is kept."""
    p = np.array([0.05, 0.4, 0.05, 0.2, 0.2, 0.05, 0.04, 0.01])
    temperature = filters.get("temperature", 1.0)
    rows: list[dict[str, Any]] = []
    for token in range(8):
        for position in range(100_000):
            scores = np.log(p) / temperature + reference.gumbel_noise(8, 1, position, 0)
            if scores[token] > np.delete(scores, token).max() + 0.1:
                rows.append({"seed": 1, "position": position, **filters})
                break
    drawn = draw(simt, np.tile(np.log(p).astype(np.float32), (8, 1)), rows)[0]
    assert {token for token in range(8) if drawn[token] == token} == kept
    assert set(drawn.tolist()) <= kept


def test_greedy_takes_the_first_of_equals(simt: Any, schedule: str) -> None:
    """Equals in one lane, in two lanes, warps and parts."""
    for V in (3, 140, 5000):
        logits = np.zeros((4, V), np.float32)
        logits[1, V // 2 :] = 2.0
        logits[2] = -np.arange(V, dtype=np.float32) * 0.0  # minus zero equals zero
        logits[3, [V - 2, V - 1]] = 1.0
        for rows in (keyed(4, temperature=0.0), keyed(4, temperature=1e-40)):
            assert draw(simt, logits, rows)[0].tolist() == [0, V // 2, 0, V - 2]


def test_noise_at_the_ends_of_the_uniform(simt: Any) -> None:
    """Seed 0 draws the largest word for (454, 48947) and the smallest for (51, 31646)."""
    logits = np.zeros((4, 50257), np.float32)
    rows = [{"seed": 0, "position": position} for position in (454, 454, 51, 51)]
    for r, token in enumerate([48947, 48947, 31646, 31646]):
        logits[r, token] = 30.0 if r % 2 else -30.0
    drawn = draw(simt, logits, rows)[0]
    assert [drawn[0] == 48947, drawn[1], drawn[2] == 31646, drawn[3]] == [
        False, 48947, False, 31646,
    ]  # fmt: skip
    logits = np.full((2, 50257), -np.inf, np.float32)
    noise = reference.gumbel_noise(50257, 0, 454, 0)
    for r, step in enumerate([-1e-3, 1e-3]):  # it is right, not only finite
        logits[r, 48947], logits[r, 48948] = 0.0, noise[48947] - noise[48948] + step
    assert draw(simt, logits, rows[:2])[0].tolist() == [48947, 48948]


def test_keys_of_64_bits(simt: Any) -> None:
    """Every bit of seed, sample and position reaches the noise."""
    rows = [
        {"seed": (1 << 63) + 5, "sample": (1 << 32) - 1, "position": -(1 << 40)},
        {"seed": 1 << 32}, {"seed": 1 << 31}, {"sample": 1 << 31}, {"position": 1 << 32},
        {"position": 1 << 31}, {"position": (1 << 63) - 1},
    ]  # fmt: skip
    assert_as_expected(simt, np.zeros((len(rows), 999), np.float32), rows)


HOSTILE: dict[str, Array] = {
    "equal": np.full(2500, -3.25, np.float32),
    "two values": np.where(np.arange(2500) == 1777, 0.0, -20.0).astype(np.float32),
    "all but one": np.where(np.arange(2500) == 2222, -7.0, -np.inf).astype(np.float32),
    "denormal": (np.arange(2500) * np.float32(1e-44)).astype(np.float32),
    "huge": np.linspace(-3e38, 3e38, 2500, dtype=np.float32)[::-1].copy(),
    "beyond": np.where(np.arange(2500) % 7 == 3, 3e38, -3e38).astype(np.float32),
    "neighbours": (np.float32(1) + np.arange(2500) % 50 * np.float32(2.0**-23)).astype(np.float32),
    "nan": np.where(np.arange(2500) == 1300, np.nan, 1.0).astype(np.float32),
    "last nan": np.where(np.arange(2500) == 2499, np.nan, -np.inf).astype(np.float32),
    "infinite": np.where(np.arange(2500) == 40, np.inf, 1.0).astype(np.float32),
    "nothing": np.full(2500, -np.inf, np.float32),
}
HARSH: list[dict[str, Any]] = [
    {}, {"temperature": 0.0}, {"temperature": 1e-40}, {"temperature": 1e-30},
    {"temperature": 1.2e-38, "top_p": 0.5}, {"temperature": 1e30},
    {"temperature": 1e30, "top_k": 1}, {"temperature": 1e30, "top_p": 0.5},
    {"temperature": 3e38, "min_p": 0.5}, {"top_k": 1}, {"top_k": 2499}, {"top_k": 2500},
    {"top_p": 1e-30}, {"top_p": 1e-45, "openai_top_p": True}, {"top_p": 0.0},
    {"top_p": 0.99999994}, {"min_p": 1.0}, {"min_p": 1e-45},
    {"top_k": 3, "top_p": 0.5, "min_p": 0.9},
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_logits(simt: Any, name: str) -> None:
    """Whatever the filters: an id that may be drawn, or -1 exactly where there is none, after a
    bounded number of rounds; neighbours in the batch see nothing of it."""
    rows = [{"seed": 3, "position": r, **p} for r, p in enumerate(HARSH)]
    logits = np.tile(HOSTILE[name], (len(rows), 1))
    calm = logits_of(1, 2500)
    barriers = simt.stats()["barriers"]
    tokens, logprobs, _ = draw(simt, np.concatenate([logits, calm]), [*rows, {"top_k": 5}])
    assert simt.stats()["barriers"] - barriers < len(rows) * (2 * ROUNDS + 30)
    assert tokens[-1] == draw(simt, calm, [{"top_k": 5}])[0]
    top = HOSTILE[name].max()
    if not np.isfinite(top):
        assert (tokens[:-1] == -1).all()
        assert np.isnan(logprobs[:-1]).all()
        return
    assert (tokens[:-1] >= 0).all()
    assert not np.isnan(logprobs).any()
    assert (HOSTILE[name][tokens[:-1]] > -np.inf).all()
    for r, p in enumerate(rows):
        if name == "denormal" and p.get("temperature", 1.0) > 1e29:
            continue  # even the distances between them are rounded to 0
        known = expected(logits[r], p)
        if known.clear:
            assert HOSTILE[name][tokens[r]] == HOSTILE[name][known.token], (p, tokens[r], known)
        if p.get("temperature", 1.0) < 1e-38 or p.get("top_k") == 1:
            assert HOSTILE[name][tokens[r]] == top, p


@pytest.mark.parametrize("filters", [{}, {"top_p": 0.999}], ids=["none", "top_p"])
def test_a_wide_row_of_one_value(simt: Any, filters: dict[str, Any]) -> None:
    """More equals than the list of candidates holds, in registers and from memory."""
    for V in (6000, HELD + 300):
        logits = np.full((2, V), 0.5, np.float32)
        logits[1, ::3] -= 5.0
        assert_as_expected(simt, logits, keyed(2, **filters))


def test_tokens_exactly_at_a_bound_of_the_search(simt: Any) -> None:
    """Distances in bits of which the search looks at 1/2 first, where 800 tokens are."""
    counts = {0.0: 1, 0.375: 1400, 0.5: 800, 0.75: 900, 1.0: 900}
    row = np.concatenate([np.full(n, -bits, np.float32) for bits, n in counts.items()])
    row = np.random.default_rng(1).permutation(row)
    temperature = float(np.float32(1.44269504))  # log2(e): a logit is its distance in bits
    for k in (2201, 2202, 3102):
        assert_as_expected(simt, np.tile(row, (12, 1)), keyed(12, temperature=temperature, top_k=k))


def test_the_second_search_does_not_see_the_list_of_the_first(simt: Any) -> None:
    """Token 3 stands in the fourth place of the list of all; of the three that are left, none."""
    p = np.array([0.1, 0.3, 0.05, 0.25, 0.2, 0.05, 0.04, 0.01])
    rows = [{"seed": r, "top_k": 3, "top_p": 0.8} for r in range(60)]  # all three: 0.55 < 0.6
    drawn = draw(simt, np.tile(np.log(p).astype(np.float32), (60, 1)), rows)[0]
    assert set(drawn.tolist()) == {1, 3, 4}


def test_targets(simt: Any) -> None:
    """Nothing is drawn; the log-probability is that of the model, whatever else is asked."""
    logits = logits_of(40, 1000)
    rows = [{"target": 13 * r, "temperature": r % 3, "top_k": r % 2} for r in range(40)]
    tokens = draw(simt, logits, rows)[0]
    assert tokens.tolist() == [13 * r for r in range(40)]
    assert_as_expected(simt, logits, rows)
    logits[1, 999], logits[2] = np.nan, -np.inf
    assert draw(simt, logits, rows)[0][:3].tolist() == [0, -1, -1]


def test_ids_that_may_not_be_drawn(simt: Any, schedule: str) -> None:
    """They count in the log-probability and may be the likeliest, and are never given."""
    logits = logits_of(6, 400)
    logits[:, 300:] += 20
    logits[3, 310] = np.nan
    logits[4, :300] = -np.inf
    filters: list[dict[str, Any]] = [
        {}, {"temperature": 0.0}, {"top_k": 5}, {}, {}, {"top_p": 0.5},
    ]  # fmt: skip
    rows = [{**p, "drawable": 300, **f} for p, f in zip(keyed(6), filters, strict=True)]
    tokens = draw(simt, logits, rows)[0]
    assert (tokens < 300).all()
    assert tokens[[3, 4]].tolist() == [-1, -1]
    assert_as_expected(simt, logits, rows)
    # hidden by more than a float32 exponential spans
    logits[:, 300:] += 200
    far = draw(simt, logits, rows)
    assert far[0].tolist() == tokens.tolist()
