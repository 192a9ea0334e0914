"""End to end on random weights of 124M's shape, fp32 and bf16: decode, prefill, batch, cold start.

Every text is checked against one pass over prompt and text together: by the bits contract both give
the same logits, so the tokens (and, of short texts, the log-probabilities) must be equal to the
last bit.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import cold_start, traffic
from gpt2_fast import GPT2, PUBLISHED, Generation, GPT2Config, Tokenizer
from gpt2_fast.checkpoints.save import save_pretrained
from gpt2_fast.sources import RandomSource

ROOT = Path(__file__).resolve().parent.parent
ROUNDS, NEW, BATCH, SHORT = 5, 64, 8, 128
PRECISIONS = ["fp32", "bf16"]


@pytest.fixture(scope="module")
def config(quick: bool) -> GPT2Config:
    """124M; two of its layers when nothing is measured."""
    return replace(PUBLISHED["124M"], n_layer=2) if quick else PUBLISHED["124M"]


@pytest.fixture(scope="module", params=PRECISIONS)
def model(request: pytest.FixtureRequest, config: GPT2Config) -> Iterator[GPT2]:
    """One model at a time."""
    with GPT2.from_config(config, precision=request.param, max_batch=BATCH) as made:
        yield made


def random_prompt(length: int, seed: int = 0) -> list[int]:
    """Token ids."""
    ids = np.random.default_rng(seed).integers(0, PUBLISHED["124M"].vocab_size, length)
    return [int(token) for token in ids]


class Timed:
    """Greedy generation as pytest-benchmark calls it, keeping every round's results."""

    def __init__(self, model: GPT2, prompts: Sequence[list[int]], new: int) -> None:
        self.model, self.prompts, self.new = model, list(prompts), new
        self.rounds: list[list[Generation]] = []

    def __call__(self) -> list[Generation]:
        results: list[Generation] = self.model.generate(
            self.prompts, max_new_tokens=self.new, temperature=0.0, ignore_eos=True
        )
        self.rounds.append(results)
        return results

    def measured(self, quick: bool) -> list[list[Generation]]:
        """The rounds without the first, which warmed up."""
        return self.rounds if quick else self.rounds[1:]

    def step_seconds(self, quick: bool) -> float:
        """Median over rounds of the mean time of a decode step."""
        return statistics.median(
            (max(r.timings.total for r in results) - max(r.timings.first_token for r in results))
            / (self.new - 1)
            for results in self.measured(quick)
        )

    def prompt_seconds(self, quick: bool) -> float:
        """Median over rounds of the time to the first token of all prompts."""
        return statistics.median(
            max(r.timings.first_token for r in results) for results in self.measured(quick)
        )


def assert_greedy(model: GPT2, prompt: list[int], result: Generation, new: int) -> None:
    """The text is the argmax of one pass over all of it, with the same log-probabilities."""
    assert len(result.token_ids) == new
    tokens = prompt + result.token_ids
    logits = model.forward(tokens[:-1])[len(prompt) - 1 :]
    assert logits.argmax(-1).tolist() == result.token_ids
    if len(tokens) <= SHORT:  # logits of a thousand positions take a second, twice is too much
        assert model.score(tokens).logprobs[len(prompt) :] == result.logprobs


@pytest.mark.parametrize("context", [32, 896])
def bench_decode(
    benchmark: Any, report: Callable[..., None], quick: bool, model: GPT2, context: int
) -> None:
    """One text, one token after the other, from a prompt of `context` tokens."""
    benchmark.group = f"decode, context {context}"
    prompt, new = random_prompt(context), 4 if quick else NEW
    timed = Timed(model, [prompt], new)

    (result,) = benchmark.pedantic(timed, rounds=ROUNDS, warmup_rounds=1)

    assert_greedy(model, prompt, result, new)
    step = timed.step_seconds(quick)
    moved = traffic.decode_bytes(model.config, model.precision, context, new)
    report(benchmark, seconds=step, moved=moved, tokens_per_s=1 / step)


def bench_batch_decode(
    benchmark: Any, report: Callable[..., None], quick: bool, model: GPT2
) -> None:
    """Eight texts of 32-token prompts together."""
    benchmark.group = f"decode, batch {BATCH}, context 32"
    prompts, new = [random_prompt(32, seed) for seed in range(BATCH)], 4 if quick else NEW
    timed = Timed(model, prompts, new)

    results = benchmark.pedantic(timed, rounds=ROUNDS, warmup_rounds=1)

    for prompt, result in zip(prompts, results, strict=True):
        assert_greedy(model, prompt, result, new)
    step = timed.step_seconds(quick)
    moved = traffic.decode_bytes(model.config, model.precision, 32, new, BATCH)
    report(benchmark, seconds=step, moved=moved, tokens_per_s=BATCH / step)


@pytest.mark.parametrize("length", [512, 1023])
def bench_prefill(
    benchmark: Any, report: Callable[..., None], quick: bool, model: GPT2, length: int
) -> None:
    """A prompt of `length` tokens, up to the first token of the text."""
    benchmark.group = f"prefill {length}"
    prompt = random_prompt(length)
    timed = Timed(model, [prompt], 1)

    (result,) = benchmark.pedantic(timed, rounds=ROUNDS, warmup_rounds=1)

    assert_greedy(model, prompt, result, 1)
    seconds = timed.prompt_seconds(quick)
    flops = traffic.prefill_flops(model.config, length)
    report(benchmark, seconds=seconds, flops=flops, tokens_per_s=length / seconds)


@pytest.fixture(scope="module")
def folder(config: GPT2Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's weights on disk, in float32; the page cache is warm after writing."""
    path = tmp_path_factory.mktemp("cold_start") / "model"
    source = RandomSource(config, 0)
    save_pretrained(path, config, ((name, array) for name, _, array, _ in source.tensors()))
    return path


@pytest.mark.parametrize("precision", PRECISIONS)
def bench_cold_start(
    benchmark: Any,
    report: Callable[..., None],
    quick: bool,
    config: GPT2Config,
    folder: Path,
    precision: str,
) -> None:
    """A new process from its start to its first token, and the most memory it held."""
    benchmark.group = "cold start"
    seen: list[dict[str, Any]] = []
    command = [sys.executable, "-m", "benchmarks.cold_start", str(folder), precision]

    def start() -> None:
        begin = time.perf_counter()
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            first = int(process.stdout.readline())
            took = time.perf_counter() - begin
            rest = json.loads(process.stdout.readline())
        assert process.returncode == 0
        seen.append({"first": first, "first_s": took, **rest})

    benchmark.pedantic(start, rounds=ROUNDS, warmup_rounds=1)

    with GPT2.from_config(config, precision=precision) as model:
        prompt = Tokenizer.gpt2().encode(cold_start.PROMPT)
        expected = model.generate(
            prompt, max_new_tokens=cold_start.NEW_TOKENS, temperature=0.0, ignore_eos=True
        )
    for run in seen:
        assert run["tokens"] == expected.token_ids
        assert run["first"] == expected.token_ids[0]
        assert run["peak_rss"] > run["plan_weights"]  # or it is some other process's memory
    warm = seen if quick else seen[1:]
    report(
        benchmark,
        seconds=statistics.median(run["first_s"] for run in warm),
        import_and_load_s=statistics.median(run["load_s"] for run in warm),
        peak_rss_MB=max(run["peak_rss"] for run in warm) / 1e6,
    )
