"""Engines in processes of their own that take turns: A B C A B C ...

Every round measures the machine's read bandwidth and then each engine once, so that what the
neighbours of this machine take is taken from all.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Timer
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from benchmarks import roofline
from benchmarks.peers import OURS
from benchmarks.peers.contract import Job, Prompts

if TYPE_CHECKING:
    from typing_extensions import Self

ROOT = Path(__file__).resolve().parent.parent
TUNING_TOKENS, TUNING_RUNS = 16, 2
HOPELESS = 3.0  # a setting this many times slower than another is not tried again
BUSY = 0.06  # share of the machine that others may take before a reader is warned
PATIENCE_SECONDS = 300.0  # for one generation: bfloat16 without its instructions can take hours
PAUSE_SECONDS = 0.2  # threads of the last engine stop spinning


class EngineError(RuntimeError):
    """An engine's process failed; the message has its name and its traceback."""


def environment(threads: int) -> dict[str, str]:
    """What an engine's process inherits: thread pools of the right size, and no network."""
    pinned = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    quiet = {"OPENBLAS_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    return os.environ | pinned | quiet


class Worker:
    """One engine's process."""

    def __init__(self, engine: str, job: Job) -> None:
        self.engine, self.job = engine, job
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker"],
            cwd=ROOT,
            env=environment(job.threads),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **command: Any) -> dict[str, Any]:
        """Send one command and wait for its answer.

        Raises:
            EngineError: the engine failed, took too long to generate, or its process ended.
        """
        source, target = _pipes(self.process)
        with patience(self.process, limited=command["do"] == "generate") as timer:
            try:
                target.write(json.dumps(command) + "\n")
                target.flush()
                line = source.readline()
            except BrokenPipeError:
                line = ""
        if not line and timer.ended:
            raise EngineError(f"{self.engine}: took longer than {PATIENCE_SECONDS:g} s, given up")
        if not line:
            raise EngineError(f"{self.engine}: its process ended, status {self.process.wait()}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise EngineError(f"{self.engine}: {reply['error']}")
        return reply

    def start(self, what: str) -> None:
        """`load` the engine, or `prepare` its files."""
        self.ask(do=what, engine=self.engine, job=self.job.as_json())

    def cpu_seconds(self) -> float:
        """Processor time its process has used, 0 where the system does not tell."""
        path = Path(f"/proc/{self.process.pid}/stat")
        if not path.exists():
            return 0.0
        fields = path.read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """End the process."""
        source, target = _pipes(self.process)
        try:
            target.close()
            self.process.wait(timeout=10)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        source.close()

    def __enter__(self) -> Self:
        """The worker itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close."""
        self.close()


@contextmanager
def patience(process: subprocess.Popen[str], *, limited: bool = True) -> Iterator[_Patience]:
    """Kill a process that takes longer than anybody would wait."""
    timer = _Patience(process)
    if limited:
        timer.start()
    try:
        yield timer
    finally:
        timer.cancel()


class _Patience(Timer):
    """Knows afterwards whether it had to kill."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        super().__init__(PATIENCE_SECONDS, self._kill)
        self.daemon = True
        self.process, self.ended = process, False

    def _kill(self) -> None:
        self.ended = True
        self.process.kill()


def _pipes(process: subprocess.Popen[str]) -> tuple[IO[str], IO[str]]:
    if process.stdout is None or process.stdin is None:
        raise RuntimeError("the worker has no pipes")
    return process.stdout, process.stdin


def prepare(engine: str, job: Job) -> None:
    """Convert the weights in a process of their own, whose memory is nobody's."""
    with Worker(engine, job) as worker:
        worker.start("prepare")


def loaded(engine: str, job: Job) -> Worker:
    """A worker with its engine ready."""
    worker = Worker(engine, job)
    try:
        worker.start("load")
    except BaseException:
        worker.close()
        raise
    return worker


def machine_busy_seconds() -> float:
    """Processor time used by everything on this machine, and by its neighbours at its cost."""
    path = Path("/proc/stat")
    if not path.exists():
        return 0.0
    user, nice, system, _, _, irq, softirq, steal = path.read_text().split()[1:9]
    busy = sum(int(ticks) for ticks in (user, nice, system, irq, softirq, steal))
    return busy / os.sysconf("SC_CLK_TCK")


@dataclass
class Result:
    """What one engine did in one case.

    Attributes:
        engine: who.
        setting, prompt_setting: its best for decoding and for reading the prompt.
        tuning: decode and prompt tokens/s of each setting tried.
        decode: tokens/s of each round, after the first token, all texts of the batch together.
        prompt: prompt tokens/s of each round, up to the first token.
        others: share of the machine that other processes took during each round.
        tokens: the greedy tokens of the first round.
        repeatable: whether every round gave these tokens.
    """

    engine: str
    setting: str
    prompt_setting: str
    tuning: dict[str, tuple[float, float]]
    decode: list[float] = field(default_factory=list)
    prompt: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)
    tokens: Prompts = field(default_factory=list)
    repeatable: bool = True


def rates(reply: dict[str, Any], prompts: Prompts, new: int) -> tuple[float, float]:
    """Decode and prompt tokens/s of one run; one new token says nothing about decoding: 0."""
    batch, context = len(prompts), len(prompts[0])
    decode = batch * (new - 1) / (reply["total"] - reply["first"]) if new > 1 else 0.0
    return decode, batch * context / reply["first"]


def tune(worker: Worker, prompts: Prompts, new: int) -> Result:
    """Find the engine's best settings, of several runs with each."""
    tried: dict[str, tuple[float, float]] = {}
    new = min(new, TUNING_TOKENS)
    fastest = float("inf")
    for setting in worker.ask(do="settings")["settings"]:
        worker.ask(do="use", setting=setting)
        pairs = []
        for _ in range(TUNING_RUNS):
            run = worker.ask(do="generate", prompts=prompts, new=new)
            pairs.append(rates(run, prompts, new))
            if run["total"] > HOPELESS * fastest:
                break
            fastest = min(fastest, run["total"])
        tried[setting] = (max(decode for decode, _ in pairs), max(prompt for _, prompt in pairs))
    prompt_best = max(tried, key=lambda setting: tried[setting][1])
    best = max(tried, key=lambda setting: tried[setting][0]) if new > 1 else prompt_best
    return Result(worker.engine, best, prompt_best, tried)


def take_turn(worker: Worker, result: Result, prompts: Prompts, new: int) -> None:
    """One measured run, and one of the prompt alone where that wants another setting.

    Raises:
        EngineError: too few tokens, or ours were not those of an earlier round.
    """
    worker.ask(do="use", setting=result.setting)
    busy, own, start = machine_busy_seconds(), worker.cpu_seconds(), time.perf_counter()
    reply = worker.ask(do="generate", prompts=prompts, new=new)
    wall = time.perf_counter() - start
    other = machine_busy_seconds() - busy - (worker.cpu_seconds() - own)
    decode, prompt = rates(reply, prompts, new)
    if result.prompt_setting != result.setting:
        worker.ask(do="use", setting=result.prompt_setting)
        alone = worker.ask(do="generate", prompts=prompts, new=1)
        prompt = len(prompts) * len(prompts[0]) / alone["first"]
    result.decode.append(decode)
    result.prompt.append(prompt)
    result.others.append(max(0.0, other) / wall / (os.cpu_count() or 1))
    if [len(tokens) for tokens in reply["tokens"]] != [new] * len(prompts):
        raise EngineError(f"{result.engine}: wanted {new} tokens of each of {len(prompts)} texts")
    if not result.tokens:
        result.tokens = reply["tokens"]
    elif result.tokens != reply["tokens"]:
        result.repeatable = False
        if result.engine == OURS:
            raise EngineError(f"{OURS}: the same prompts gave other tokens in another round")


def play(
    workers: Sequence[Worker],
    prompts: Prompts,
    new: int,
    rounds: int,
    mib: int,
    threads: int,
    failed: dict[str, str] | None = None,
) -> tuple[list[Result], list[float]]:
    """Tune, then take turns.

    Args:
        workers: the engines.
        prompts, new: of equal length, and how many tokens to draw.
        rounds: how often.
        mib, threads: of the read bandwidth.
        failed: where given, an engine that fails leaves the game and its reason goes in here.

    Returns:
        Results of those that did not fail, in their order, and GB/s of each round.

    Raises:
        EngineError: an engine failed, and there is no `failed`.
    """
    playing: list[tuple[Worker, Result]] = []

    def attempt(worker: Worker, action: Callable[[], Result | None]) -> Result | None:
        try:
            return action()
        except EngineError as error:
            if failed is None:
                raise
            failed[worker.engine] = str(error)
            progress(f"{worker.engine} failed")
            return None

    for worker in workers:
        result = attempt(worker, partial(tune, worker, prompts, new))
        if result is not None:
            progress(f"{worker.engine}: best with {result.setting}")
            playing.append((worker, result))
    peaks = []
    for number in range(rounds):
        progress(f"round {number + 1} of {rounds}")
        peaks.append(roofline.peak_gbps(mib, 3, threads))
        for worker, result in playing:
            if failed is None or worker.engine not in failed:
                time.sleep(PAUSE_SECONDS)
                attempt(worker, partial(take_turn, worker, result, prompts, new))
    return [r for w, r in playing if failed is None or w.engine not in failed], peaks


def random_prompts(vocab_size: int, batch: int, context: int) -> Prompts:
    """Random token ids, the same for every engine."""
    ids = np.random.default_rng(1).integers(0, vocab_size, (batch, context))
    rows: Prompts = ids.tolist()
    return rows


def progress(text: str) -> None:
    """Say what is happening, to standard error."""
    sys.stderr.write(text + "\n")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest, largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def span(value: dict[str, float], digits: int) -> str:
    """A `spread` in words."""
    return f"{value['median']:.{digits}f} ({value['min']:.{digits}f}-{value['max']:.{digits}f})"


def row(cells: Sequence[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |"
