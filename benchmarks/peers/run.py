"""The whole comparison in one precision: every engine, every case, cold start and memory."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import agreement, peaks, peers
from benchmarks.peers import OURS
from benchmarks.peers.cases import Case, compared, figures
from benchmarks.peers.contract import Job, Shape, common_weights
from benchmarks.turns import (
    ROOT,
    EngineError,
    Worker,
    environment,
    loaded,
    patience,
    play,
    prepare,
    progress,
    random_prompts,
    spread,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from gpt2_fast import GPT2Config


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        config: the shape.
        engines: names; those that cannot run are left out with their reasons.
        cases: what each does.
        rounds: turns of each.
        threads: the most an engine may use.
        mib: buffer of the read bandwidth.
        folder: for the engines' files.
    """

    config: GPT2Config
    engines: Sequence[str]
    cases: Sequence[Case]
    rounds: int
    threads: int
    mib: int
    folder: Path


def compare(plan: Plan, precision: str) -> dict[str, Any]:
    """Measure everything in one precision; what the JSON file holds of it."""
    left_out: dict[str, str] = {}
    batch = max((case.batch for case in plan.cases), default=1)
    shape = Shape.of(plan.config)
    job = Job(shape, precision, plan.threads, batch, plan.folder)
    able = _ready(plan, job, left_out)
    settings: dict[str, str] = {}
    with ExitStack() as stack:
        workers: list[Worker] = []
        for engine in able:
            progress(f"{precision}: loading {engine}")
            try:
                workers.append(stack.enter_context(loaded(engine, job)))
            except EngineError as error:
                left_out[engine] = last_line(str(error))
        measured = [_case(plan, case, precision, workers, settings) for case in plan.cases]
        accuracy = _accuracy(plan.config, workers, settings)
    starts = _starts(plan, job, settings, left_out)
    return {
        "precision": precision,
        "cases": measured,
        "starts": starts,
        "logit_errors": accuracy,
        "left_out": left_out,
        "versions": {engine: peers.versions(engine) for engine in able},
    }


def _ready(plan: Plan, job: Job, left_out: dict[str, str]) -> list[str]:
    """The engines that can run, their files made."""
    able = []
    common_weights(plan.config, plan.folder)
    for engine in plan.engines:
        reason = peers.missing(engine, job.precision)
        if reason is None:
            progress(f"{job.precision}: preparing {engine}")
            try:
                prepare(engine, job)
            except EngineError as error:
                reason = last_line(str(error))
        if reason is None:
            able.append(engine)
        else:
            left_out[engine] = reason
            progress(f"{engine} is left out: {reason}")
    return able


def last_line(text: str) -> str:
    """What a traceback ends with."""
    return text.strip().splitlines()[-1]


def _case(
    plan: Plan, case: Case, precision: str, workers: list[Worker], settings: dict[str, str]
) -> dict[str, Any]:
    """One case; an engine's best setting of its first decoding goes into `settings`."""
    progress(f"{precision}: {case.name}")
    failed: dict[str, str] = {}
    prompts = random_prompts(plan.config.vocab_size, case.batch, case.context)
    limits = peaks.measure(plan.threads, plan.mib)
    results, read = play(workers, prompts, case.new, plan.rounds, plan.mib, plan.threads, failed)
    limits.read_gbps = spread(read)["median"]
    engines = [figures(plan.config, case, precision, one, limits, read) for one in results]
    for one in results:
        settings.setdefault(one.engine, one.setting)
    compared(engines)
    if precision == "fp32":
        _agree(plan.config, prompts, engines, {worker.engine: worker for worker in workers})
    return {
        "name": case.name,
        **asdict(case),
        "limits": limits.as_json(),
        "read_gbps": read,
        "engines": engines,
        "failed": {engine: last_line(error) for engine, error in failed.items()},
    }


def _logits(worker: Worker) -> agreement.Logits:
    return lambda tokens: worker.ask(do="logits", tokens=tokens)["logits"]


def _agree(
    config: GPT2Config,
    prompts: list[list[int]],
    engines: list[dict[str, Any]],
    workers: dict[str, Worker],
) -> None:
    """Say of each rival whether its tokens are ours, or why they may differ; or that they may not.

    An engine of this name under `disagrees` chose a token that it cannot have computed rightly, or
    we did.
    """
    ours = next((one for one in engines if one["engine"] == OURS), None)
    for one in engines:
        if ours is None or one is ours:
            continue
        logits = [_logits(workers[engine]) for engine in (OURS, one["engine"])]
        try:
            one["agreement"] = agreement.explain(
                config, prompts, ours["tokens"], one["tokens"], *logits
            )
        except RuntimeError as error:
            one["disagrees"] = last_line(str(error))


def _accuracy(
    config: GPT2Config, workers: list[Worker], settings: dict[str, str]
) -> dict[str, float]:
    """Root mean square error of each engine's logits against float64, in units of theirs."""
    prompt = random_prompts(config.vocab_size, 1, 32)[0]
    truth = agreement.true_logits(config, prompt)
    errors = {}
    for worker in workers:
        if worker.engine in settings:
            worker.ask(do="use", setting=settings[worker.engine])
            row = np.asarray(_logits(worker)(prompt), np.float64)
            errors[worker.engine] = float(np.sqrt(np.mean((row - truth) ** 2) / np.mean(truth**2)))
    return errors


def _starts(
    plan: Plan, job: Job, settings: dict[str, str], left_out: dict[str, str]
) -> dict[str, dict[str, Any]]:
    """Every engine from nothing to its first token, in turns; the first turn does not count."""
    seen: dict[str, list[dict[str, float]]] = {engine: [] for engine in settings}
    for number in range(plan.rounds + 1):
        progress(f"{job.precision}: cold start {number} of {plan.rounds}")
        for engine in list(seen):
            try:
                figures_of = start(engine, replace(job, batch=1), settings[engine])
            except EngineError as error:
                left_out[f"{engine}, cold start"] = last_line(str(error))
                del seen[engine]
                continue
            if number:
                seen[engine].append(figures_of)
    return {
        engine: {name: spread([run[name] for run in runs]) for name in runs[0]}
        for engine, runs in seen.items()
        if runs
    }


def start(engine: str, job: Job, setting: str, context: int = 32) -> dict[str, float]:
    """One new process: seconds until its first token, and what it says of itself.

    Raises:
        EngineError: it failed; the end of what it wrote is in the message.
    """
    asked = {
        "engine": engine,
        "job": job.as_json(),
        "setting": setting,
        "context": min(context, job.shape.n_ctx - 16),
        "prompt": random_prompts(job.shape.vocab_size, 1, job.shape.n_ctx)[0],
    }
    command = [sys.executable, "-m", "benchmarks.peers.start", json.dumps(asked)]
    begin = time.perf_counter()
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(job.threads),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        if process.stdout is None:
            raise RuntimeError("the process has no pipe")
        with patience(process) as timer:
            token = process.stdout.readline()
            took = time.perf_counter() - begin
            rest = process.stdout.readline()
    if timer.ended:
        raise EngineError(f"{engine}: took longer than {timer.interval:g} s, given up")
    if process.returncode or not token or not rest:
        raise EngineError(f"{engine}: its process ended early, status {process.returncode}")
    figures_of: dict[str, float] = json.loads(rest)
    return {"first_token_s": took, **figures_of}
