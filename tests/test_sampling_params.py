"""Sampling parameters: their ranges, their names, and the distributions that they make."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from gpt2_fast import _C, ParameterError, SamplingParams, reference
from gpt2_fast.reference import kept_by_filters
from tests.model_support import (
    TINY,
    SpreadSource,
    byte_tokenizer,
    facts,
    model_of,
    random_ids,
    tiny_model,
)

NAN, INF = math.nan, math.inf

OUT_OF_RANGE: list[tuple[str, Any]] = [
    *[
        ("temperature", v)
        for v in (b"1", -1, -1e-9, NAN, INF, -INF, 1.1e9, "1", None, True, [1], 1j)
    ],
    *[("top_p", v) for v in (-0.1, 1.0001, NAN, INF, "0.9", None, True, 2)],
    *[("min_p", v) for v in (-0.1, 1.0001, 2, NAN, INF, "0", None, False)],
    *[("top_k", v) for v in (-1, 2**31, 2**80, 1.0, NAN, "5", None, True)],
    *[("max_new_tokens", v) for v in (-1, 2**31 + 1, 2**64, 10.0, NAN, "5", None, True)],
    *[("n", v) for v in (0, -1, 65537, 10**6, 1.0, "2", None, True)],
    *[("seed", v) for v in (-1, 2**64, 1.0, "1", b"1", True, [1, -1], [1, None], [[1]], {1: 2})],
    *[("top_p_rule", v) for v in ("", "hf", None, 1, ["openai"])],
    *[("ignore_eos", v) for v in (None, 1, "yes")],
    *[("stop", v) for v in ("", [""], ["a", ""], 5, [5], b"a", b"", ["a", None], {"a": 1}, {"a"})],
    *[("stop", v) for v in (["a"] * 1025, "a" * 65537, ["ok", "a" * 10**6], ["a"] * 10**4)],
]


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE, ids=lambda value: repr(value)[:20])
def test_out_of_range(name: str, value: object) -> None:
    with pytest.raises(ParameterError, match=rf"^{name}\b.* (must|got)") as error:
        SamplingParams(**{name: value})
    assert len(str(error.value)) < 300
    with pytest.raises(ParameterError, match=rf"^{name}\b"):
        tiny_model().generate("a", **{name: value})
    with pytest.raises(ParameterError, match=rf"^{name}\b"):
        tiny_model().stream("a", **{name: value})


IN_RANGE: list[tuple[str, Any]] = [
    *[("temperature", v) for v in (0, -0.0, 1e-45, 5e-324, 1e9, 1, Fraction(1, 3), Decimal("0.7"))],
    *[("top_p", v) for v in (0, 1, 1e-45, 1 - 1e-12, np.float32(0.5))],
    *[("min_p", v) for v in (0, 1, 1e-45)],
    *[("top_k", v) for v in (0, 1, 50257, 2**31 - 1, np.int64(4))],
    *[("n", v) for v in (1, 3, np.int8(2))],
    *[("seed", v) for v in (0, 2**64 - 1, None, [5], (5,), np.array([5], np.uint64), np.uint64(5))],
    *[("stop", v) for v in (None, [], (), ("a", "b"), ["a"] * 1024, "a" * 65536)],
    *[("top_p_rule", v) for v in ("keep_crossing", "openai")],
]


@pytest.mark.parametrize(("name", "value"), IN_RANGE, ids=lambda value: repr(value)[:20])
def test_in_range(name: str, value: object) -> None:
    result = tiny_model().generate("a", max_new_tokens=2, **{name: value})
    for each in result if isinstance(result, list) else [result]:
        assert each.finish_reason in {"length", "eos", "stop"}


def test_numpy_scalars_without_dimensions() -> None:
    assert SamplingParams(seed=np.array(5)).seeds(2) == [5, 5]
    with pytest.raises(ParameterError, match="ignore_eos"):
        SamplingParams(ignore_eos=np.True_)  # type: ignore[arg-type]
    with pytest.raises(ParameterError, match="temperature"):
        SamplingParams(temperature=np.array([0.5]))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("temprature", "temperature"),
        ("max_tokens", "max_new_tokens"),
        ("max_new_token", "max_new_tokens"),
        ("topk", "top_k"),
        ("topp", "top_p"),
        ("stops", "stop"),
        ("seeds", "seed"),
        ("Temperature", "temperature"),
    ],
)
def test_a_misspelled_name_gets_a_suggestion(wrong: str, right: str) -> None:
    for ask in (tiny_model().generate, tiny_model().stream):
        with pytest.raises(
            ParameterError, match=f"unknown argument '{wrong}'; did you mean {right}"
        ):
            ask("a", **{wrong: 1})


def test_an_unknown_name_gets_the_list() -> None:
    with pytest.raises(ParameterError, match="unknown argument 'xyzzy'; known: max_new_tokens, te"):
        tiny_model().generate("a", xyzzy=1)


def test_one_seed_for_each_prompt() -> None:
    model = tiny_model()
    for seeds in ([], [1], [1, 2, 3]):
        with pytest.raises(ParameterError, match=f"seed .*{len(seeds)} seeds for 2 prompts"):
            model.generate(["a", "b"], seed=seeds)
    with pytest.raises(ParameterError, match=r"seed .*2 seeds for 1 prompts"):
        model.stream("a", seed=[1, 2])


def test_defaults_are_neutral() -> None:
    """Nothing is filtered unless asked: no hidden top_k of 50."""
    assert SamplingParams() == SamplingParams(
        max_new_tokens=100,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        top_p_rule="keep_crossing",
        seed=None,
        stop=None,
        n=1,
        ignore_eos=False,
    )
    model = tiny_model()
    plain = facts(model.generate("abc", seed=3, max_new_tokens=40))
    neutral = {"top_k": 257, "top_p": 1.0, "min_p": 0.0, "temperature": 1.0}
    assert facts(model.generate("abc", seed=3, max_new_tokens=40, **neutral)) == plain
    assert facts(model.generate("abc", seed=3, max_new_tokens=40, top_k=2**31 - 1)) == plain


@pytest.mark.parametrize(
    "same_as_greedy",
    [
        {"top_k": 1},
        {"top_p": 0.0},
        {"top_p": 1e-9},
        {"top_p": 0.0, "top_p_rule": "openai"},
        {"top_p": 1e-9, "top_p_rule": "openai"},
        {"min_p": 1.0},
        {"temperature": 1e-45},
        {"temperature": 1e-38},
        {"temperature": 1e-30},
        {"temperature": 1e-6},
        {"top_k": 1, "temperature": 1e9},
    ],
    ids=str,
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_greedy_by_other_means(same_as_greedy: dict[str, Any], precision: str) -> None:
    model = tiny_model(precision)
    for seed in range(3):
        prompt = random_ids(TINY, 4, seed)
        greedy = model.generate(prompt, temperature=0, seed=seed, max_new_tokens=40)
        other = model.generate(prompt, seed=seed, max_new_tokens=40, **same_as_greedy)
        assert facts(other) == facts(greedy)


def test_a_huge_temperature_is_uniform() -> None:
    """At 1e9 every token is as likely; logprobs are still those of the model."""
    draws = tiny_model(max_batch=256).generate(
        list(b"abc"), n=5000, seed=1, temperature=1e9, max_new_tokens=1
    )
    counts = np.bincount([draw.token_ids[0] for draw in draws], minlength=257)
    assert_distribution(counts, np.full(257, 1 / 257))
    logits = reference.torch.from_numpy(tiny_model().forward(list(b"abc"))[-1])
    wanted = logits.double().log_softmax(-1).numpy()
    for draw in draws[:100]:
        assert draw.logprobs[0] == pytest.approx(wanted[draw.token_ids[0]], abs=1e-5)


def chi_square_limit(freedom: int, sigmas: float = 4.0) -> float:
    """The value that chi-square exceeds with the probability of `sigmas` (3e-5 for 4).

    Source: Wilson and Hilferty 1931, "The distribution of chi-square".
    """
    spread = 2 / (9 * freedom)
    return freedom * (1 - spread + sigmas * spread**0.5) ** 3


def assert_distribution(counts: np.ndarray, probabilities: np.ndarray) -> None:
    """Pearson's test; categories too rare for it are taken together."""
    assert counts[probabilities == 0].sum() == 0
    expected = probabilities * counts.sum()
    common = expected >= 5
    observed, expected = (
        np.append(each[common], each[~common].sum()) for each in (counts, expected)
    )
    some = expected > 0
    observed, expected = observed[some], expected[some]
    if len(expected) == 1:
        return
    statistic = float(((observed - expected) ** 2 / expected).sum())
    assert statistic < chi_square_limit(len(expected) - 1), statistic


DRAWS = 20_000
LOGITS = np.array(
    [2.0, 1.5, 1.5, 1.2, 0.9, 0.5, 0.5, 0.5, 0.0, -0.3, -0.7, -1, -1.5, -2, -3, -5, -8.0, -20.0],
    np.float32,
)
FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 2},  # ties at the second: three are kept
    {"top_k": 5},
    {"top_k": 17},
    {"top_p": 0.05},
    {"top_p": 0.5},
    {"top_p": 0.9},
    {"top_p": 0.999},
    {"top_p": 0.5, "openai_top_p": True},
    {"top_p": 0.9, "openai_top_p": True},
    {"top_p": 0.05, "openai_top_p": True},
    {"min_p": 0.1},
    {"min_p": 0.5},
    {"temperature": 0.7, "top_k": 8, "top_p": 0.8, "min_p": 0.05},
    {"temperature": 1.5, "top_k": 10, "top_p": 0.7, "min_p": 0.2, "openai_top_p": True},
]


def exact_distribution(logits: np.ndarray, how: dict[str, Any]) -> np.ndarray:
    """Temperature, then the reference's filters, then softmax, in float64."""
    z = logits.astype(np.float64) / how.get("temperature", 1.0)
    kept = kept_by_filters(
        z,
        how.get("top_k", 0),
        how.get("top_p", 1.0),
        how.get("min_p", 0.0),
        how.get("openai_top_p", False),
    )
    weights = np.where(kept, np.exp(z - z.max()), 0)
    return np.asarray(weights / weights.sum())


def draw(logits: np.ndarray, how: dict[str, Any], **keys: np.ndarray) -> np.ndarray:
    """DRAWS tokens from one row of logits; seeds, samples or positions count up."""
    fixed = np.zeros(DRAWS, np.int64)
    out = np.empty(DRAWS, np.int64)
    _C.sample(
        np.tile(logits, (DRAWS, 1)),
        np.full(DRAWS, how.get("temperature", 1.0), np.float32),
        np.full(DRAWS, how.get("top_k", 0), np.int32),
        np.full(DRAWS, how.get("top_p", 1.0), np.float32),
        np.full(DRAWS, how.get("min_p", 0.0), np.float32),
        how.get("openai_top_p", False),
        keys.get("seeds", fixed),
        keys.get("samples", fixed),
        keys.get("positions", fixed),
        out,
        np.empty(DRAWS, np.float32),
    )
    return out


@pytest.mark.parametrize("how", FILTERS, ids=str)
def test_draws_follow_the_distribution(how: dict[str, Any]) -> None:
    tokens = draw(LOGITS, how, seeds=np.arange(DRAWS) * 7919 + 13)
    assert_distribution(np.bincount(tokens, minlength=len(LOGITS)), exact_distribution(LOGITS, how))


@pytest.mark.parametrize("key", ["seeds", "samples", "positions"])
def test_every_key_gives_fresh_draws(key: str) -> None:
    """Neighbouring seeds, samples and positions are as good as unrelated ones."""
    tokens = draw(LOGITS, {}, **{key: np.arange(DRAWS)})
    exact = exact_distribution(LOGITS, {})
    assert_distribution(np.bincount(tokens, minlength=len(LOGITS)), exact)
    pairs = tokens[:-1] * len(LOGITS) + tokens[1:]
    assert_distribution(
        np.bincount(pairs[::2], minlength=len(LOGITS) ** 2), np.outer(exact, exact).ravel()
    )


def test_the_test_of_distributions_sees_a_shift() -> None:
    """Three per cent more on one token are found in as many draws."""
    wrong = LOGITS.copy()
    wrong[0] += 0.15
    tokens = draw(wrong, {}, seeds=np.arange(DRAWS) * 7919 + 13)
    counts = np.bincount(tokens, minlength=len(LOGITS))
    with pytest.raises(AssertionError):
        assert_distribution(counts, exact_distribution(LOGITS, {}))
    with pytest.raises(AssertionError):
        assert_distribution(counts, exact_distribution(wrong, {"top_k": 14}))


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"temperature": 0.8, "top_k": 20},
        {"top_p": 0.6},
        {"top_p": 0.6, "top_p_rule": "openai"},
        {"min_p": 0.3},
    ],
    ids=str,
)
def test_generated_tokens_follow_the_distribution(how: dict[str, Any]) -> None:
    """The same through the engine: its own logits, its own keys, many samples of one prompt."""
    model = tiny_model(max_batch=256)
    prompt = list(b"once")
    samples = model.generate(prompt, n=3000, seed=11, max_new_tokens=1, **how)
    counts = np.bincount([each.token_ids[0] for each in samples], minlength=257)
    native = {key: value for key, value in how.items() if key != "top_p_rule"}
    native["openai_top_p"] = how.get("top_p_rule") == "openai"
    exact = exact_distribution(model.forward(prompt)[-1], native)
    assert 1 < (exact > 0).sum() < 257 or not how
    assert_distribution(counts, exact)


def test_drawn_tokens_are_the_argmax_of_logits_and_noise() -> None:
    """seed, sample and position key the noise as docs say, checked with the reference's Philox."""
    model = tiny_model()
    prompt = random_ids(TINY, 6)
    seed = 2**63 + 12345
    for number, result in enumerate(model.generate(prompt, n=3, seed=seed, max_new_tokens=20)):
        ids = prompt + result.token_ids
        logits = model.forward(ids[:-1])[len(prompt) - 1 :].astype(np.float64)
        for t, token in enumerate(result.token_ids):
            noise = reference.gumbel_noise(257, seed, len(prompt) + t, number)
            scores = logits[t] + noise
            assert scores.max() - scores[token] < 1e-4  # float32 against float64
        clear = [np.diff(np.sort(row)[-2:])[0] for row in logits]
        assert min(clear) >= 0
        assert result.token_ids == [
            int((row + reference.gumbel_noise(257, seed, len(prompt) + t, number)).argmax())
            for t, row in enumerate(logits)
        ]


def test_ids_that_pad_the_vocabulary_are_never_drawn() -> None:
    """The tokenizer has 257 ids, the model 300, and the padding would be likelier than the rest."""
    from gpt2_fast import GPT2Config

    config = GPT2Config(
        n_layer=1, n_embd=16, n_head=1, n_ctx=32, vocab_size=300, eos_token_id=256,
        tie_word_embeddings=False,
    )  # fmt: skip
    head = SpreadSource(config).array("lm_head.weight").copy()
    head[257:] *= 20
    source = SpreadSource(config, replace={"lm_head.weight": head})
    with model_of(source, byte_tokenizer(), max_batch=64) as model:
        assert (model.forward([[i] for i in range(64)])[0].argmax(-1) >= 257).any()
        for how in ({}, {"temperature": 0}, {"temperature": 50.0}, {"top_k": 3}, {"top_p": 0.5},
                    {"top_p": 0.0}, {"min_p": 0.9}, {"top_k": 1}, {"top_k": 290}):  # fmt: skip
            for result in model.generate(
                [[i] for i in range(40)], seed=2, max_new_tokens=8, ignore_eos=True, **how
            ):
                assert len(result.token_ids) == 8
                assert max(result.token_ids) < 257
                assert result.finish_reason == "length"
        # A token's probability is the model's own, padding included, as forward gives it.
        result = model.generate([7], temperature=0, max_new_tokens=1)
        row = reference.torch.from_numpy(model.forward([7])[-1]).double().log_softmax(-1)
        assert result.logprobs[0] == pytest.approx(float(row[result.token_ids[0]]), abs=1e-5)
    with model_of(source) as model:  # without a tokenizer every id may be drawn
        drawn = model.generate([[i] for i in range(40)], seed=2, max_new_tokens=8)
        assert max(max(each.token_ids) for each in drawn) >= 257
