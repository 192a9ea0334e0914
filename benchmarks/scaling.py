"""How our cost grows: `python -m benchmarks.scaling --out results`.

By context (1-1023), prompt length, batch (1-64) and threads for --model, by size for --models, each
against the limit of the machine in the same run: the longer of bytes at the read bandwidth and
operations at the peak arithmetic. Then the memory a process really takes, its cache filled, against
`plan()`. The folder gets scaling.json, scaling.md and, with matplotlib, PNG files. Exit code 1:
memory is not what was planned.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks import peaks, plots, roofline, traffic
from benchmarks.peers.contract import Job, Shape, common_weights
from benchmarks.scaling_report import as_markdown, draw
from benchmarks.turns import ROOT, environment, machine_busy_seconds, progress, spread
from gpt2_fast import _C, PUBLISHED, GPT2Config
from gpt2_fast.bench_engine import EngineRunner
from gpt2_fast.device import PRECISIONS, choose

SHORT = 32  # positions before the first step where the context is not what varies
#: Of memory: what Python allocates meanwhile, and pages of the plan that no step happens to touch.
SLACK_BYTES, SLACK_SHARE = 2 << 20, 0.01


@dataclass
class Point:
    """One measurement of a sweep.

    Attributes:
        x: what varies.
        moved, operations: of one step, or of the prompt.
        tokens: that it makes or reads.
        seconds: of each round.
    """

    x: float
    moved: float
    operations: float
    tokens: int
    seconds: list[float] = field(default_factory=list)


@dataclass
class Sweep:
    """One table.

    Attributes:
        name: what varies.
        model, precision: of what.
        limits: of the machine while it ran; for threads and sizes, of each point.
    """

    name: str
    model: str
    precision: str
    points: list[Point]
    limits: list[peaks.Limits]

    def as_json(self) -> dict[str, Any]:
        """Everything measured, with what it means."""
        rows = []
        for point, limits in zip(self.points, self.limits, strict=True):
            least = limits.seconds(self.precision, point.moved, point.operations)
            rows.append(
                {
                    **asdict(point),
                    "limits": limits.as_json(),
                    "ms": spread([s * 1e3 for s in point.seconds]),
                    "tokens_per_s": spread([point.tokens / s for s in point.seconds]),
                    "gbps": spread([point.moved / s / 1e9 for s in point.seconds]),
                    "gflops": spread([point.operations / s / 1e9 for s in point.seconds]),
                    "limit_ms": least * 1e3,
                    "of_limit": spread([least / s for s in point.seconds]),
                }
            )
        about = {"name": self.name, "model": self.model, "precision": self.precision}
        return {**about, "points": rows}


@contextmanager
def engine(config: GPT2Config, precision: str, threads: int, batch: int) -> Iterator[EngineRunner]:
    """Ours with random weights, closed at the end."""
    progress(f"loading {precision}, {threads} threads")
    device = choose("cpu", precision)
    made = EngineRunner(config, precision, device, threads=threads, max_batch=batch)
    try:
        yield made
    finally:
        made.close()


def decode_point(
    config: GPT2Config, precision: str, x: float, batch: int, position: int, steps: int
) -> tuple[Point, int]:
    """A point not yet measured, and the position it starts at: the last ones, near the end."""
    start = min(position, config.n_ctx - steps)
    attended = start + (steps + 1) / 2
    moved = traffic.weight_bytes(config, precision)
    moved += batch * traffic.cache_bytes(config, precision, attended)
    # decode_flops takes the middle of the steps of a text whose first token came from its prompt.
    operations = traffic.decode_flops(config, start, steps + 1, batch)
    return Point(x, moved, operations, batch), start


def time_steps(runner: EngineRunner, batch: int, start: int, steps: int) -> float:
    """Mean seconds of a step of that many texts from a position on."""
    runner.begin(batch, start)
    try:
        begin = time.perf_counter()
        runner.steps(steps)
        return (time.perf_counter() - begin) / steps
    finally:
        runner.end()


def time_prompt(runner: EngineRunner, length: int) -> float:
    """Seconds from a prompt to its first token."""
    begin = time.perf_counter()
    runner.begin(1, length - 1)
    try:
        runner.steps(1)
        return time.perf_counter() - begin
    finally:
        runner.end()


def _limits(options: argparse.Namespace, read: list[float]) -> peaks.Limits:
    """Of this moment, with the bandwidth of every round."""
    limits = peaks.measure(options.threads, options.mib)
    limits.read_gbps = spread(read)["median"]
    return limits


def by_context(
    options: argparse.Namespace, precision: str, runner: EngineRunner
) -> Iterator[Sweep]:
    """Decoding at every context and reading prompts of every length, in turns."""
    config = options.config
    wanted = [
        decode_point(config, precision, context, 1, context, options.steps)
        for context in options.contexts
    ]
    prompts = [
        Point(
            length,
            traffic.prefill_bytes(config, precision),
            traffic.prefill_flops(config, length),
            length,
        )
        for length in options.contexts
    ]
    read = []
    for number in range(options.rounds):
        progress(f"{precision}, context: round {number + 1} of {options.rounds}")
        read.append(roofline.peak_gbps(options.mib, 3, options.threads))
        for point, start in wanted:
            point.seconds.append(time_steps(runner, 1, start, options.steps))
        for point in prompts:
            point.seconds.append(time_prompt(runner, int(point.x)))
    limits = [_limits(options, read)] * len(prompts)
    yield Sweep("context", options.model, precision, [point for point, _ in wanted], limits)
    yield Sweep("prompt", options.model, precision, prompts, limits)


def by_batch(options: argparse.Namespace, precision: str, runner: EngineRunner) -> Sweep:
    """Texts decoded at the same time."""
    wanted = [
        decode_point(options.config, precision, batch, batch, SHORT, options.steps)
        for batch in options.batches
    ]
    read = []
    for number in range(options.rounds):
        progress(f"{precision}, batch: round {number + 1} of {options.rounds}")
        read.append(roofline.peak_gbps(options.mib, 3, options.threads))
        for point, start in wanted:
            point.seconds.append(time_steps(runner, int(point.x), start, options.steps))
    limits = [_limits(options, read)] * len(wanted)
    return Sweep("batch", options.model, precision, [point for point, _ in wanted], limits)


def _alone(
    options: argparse.Namespace, config: GPT2Config, precision: str, threads: int, x: float
) -> tuple[Point, peaks.Limits]:
    """A point with an engine of its own, and the limits of its threads."""
    point, start = decode_point(config, precision, x, 1, SHORT, options.steps)
    with engine(config, precision, threads, 1) as runner:
        time_steps(runner, 1, start, 2)
        limits = peaks.measure(threads, options.mib)
        for _ in range(options.rounds):
            point.seconds.append(time_steps(runner, 1, start, options.steps))
    return point, limits


def by_threads(options: argparse.Namespace, precision: str) -> Sweep:
    """1, 2, 4, ... and all threads."""
    counts = sorted({2**n for n in range(10) if 2**n < options.threads} | {options.threads})
    pairs = [_alone(options, options.config, precision, count, count) for count in counts]
    points, limits = (list(column) for column in zip(*pairs, strict=True))
    return Sweep("threads", options.model, precision, points, limits)


def by_size(options: argparse.Namespace, precision: str) -> Sweep:
    """Every model, one after the other."""
    pairs = []
    for name in options.models:
        config = shortened(PUBLISHED[name], options.layers)
        x = config.parameters / 1e6
        pairs.append(_alone(options, config, precision, options.threads, x))
    points, limits = (list(column) for column in zip(*pairs, strict=True))
    return Sweep("size", ", ".join(options.models), precision, points, limits)


def shortened(config: GPT2Config, layers: int) -> GPT2Config:
    """The first layers of a model, or all of it for 0."""
    return replace(config, n_layer=layers) if layers else config


def memory(options: argparse.Namespace, model: str, folder: Path) -> list[dict[str, Any]]:
    """What a process with a full cache takes, in every precision, alone and as a batch."""
    config = shortened(PUBLISHED[model], options.layers)
    common_weights(config, folder)
    rows = []
    for precision in options.precision:
        for batch in (1, 8):
            progress(f"memory: {model}, {precision}, batch {batch}")
            job = Job(Shape.of(config), precision, options.threads, batch, folder)
            command = [sys.executable, "-m", "benchmarks.memory", json.dumps(job.as_json())]
            out = subprocess.run(
                command,
                cwd=ROOT,
                env=environment(options.threads),
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            figures = json.loads(out)
            as_planned = fits(figures["plan"], figures["filled"])
            about = {"model": model, "precision": precision, "batch": batch}
            rows.append({**about, **figures, "as_planned": as_planned})
    return rows


def fits(planned: int, taken: int) -> bool:
    """Whether a process took what was planned."""
    return abs(taken - planned) <= SLACK_BYTES + SLACK_SHARE * planned


def _own_seconds() -> float:
    """Processor time of this process and of those it waited for."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything; what the JSON file holds."""
    sweeps: list[Sweep] = []
    busy, start = machine_busy_seconds() - _own_seconds(), time.perf_counter()
    for precision in options.precision:
        most = max(options.batches)
        with engine(options.config, precision, options.threads, most) as runner:
            sweeps += by_context(options, precision, runner)
            sweeps.append(by_batch(options, precision, runner))
        sweeps += [by_threads(options, precision), by_size(options, precision)]
    others = max(0.0, machine_busy_seconds() - _own_seconds() - busy)
    others /= (time.perf_counter() - start) * (os.cpu_count() or 1)
    rows = []
    for model in dict.fromkeys([options.model, *options.models]):
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=options.work)))
            rows += memory(options, model, folder)
    names = ("model", "layers", "rounds", "steps", "threads")
    return {
        "machine": roofline.machine(),
        "others": others,
        **{name: getattr(options, name) for name in names},
        "sweeps": [sweep.as_json() for sweep in sweeps],
        "memory": rows,
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read and check the command line."""
    offered = PRECISIONS["cpu"]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling", description="How our cost grows."
    )
    add = parser.add_argument
    add("--model", choices=PUBLISHED, default="124M", help="for contexts, batches and threads")
    add("--models", choices=PUBLISHED, nargs="+", default=list(PUBLISHED), help="for sizes")
    add("--layers", type=int, default=0, help="only the first N layers; 0: all")
    add("--precision", choices=offered, nargs="+", default=list(offered))
    add("--contexts", type=int, nargs="+", default=[1, 32, 128, 256, 512, 768, 1023])
    add("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    add("--steps", type=int, default=16, help="decode steps of one measurement")
    add("--rounds", type=int, default=5)
    add("--threads", type=int, default=_C.available_threads())
    add("--mib", type=int, default=roofline.MIN_MIB, help="buffer of the read bandwidth")
    add("--work", type=Path, help="folder for the weights of the memory figures")
    add("--out", type=Path, required=True, help="folder for the results")
    options = parser.parse_args(arguments)
    for name in ("steps", "rounds", "threads", "mib"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    most = min(PUBLISHED[name].n_layer for name in [options.model, *options.models])
    if not 0 <= options.layers <= most:
        parser.error(f"--layers must be in 0..{most}")
    options.config = shortened(PUBLISHED[options.model], options.layers)
    if not all(1 <= context < options.config.n_ctx for context in options.contexts):
        parser.error(f"--contexts must be in 1..{options.config.n_ctx - 1}")
    if min(options.batches) < 1 or options.steps >= options.config.n_ctx - SHORT:
        parser.error("--batches must be at least 1, and --steps fit the context")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write, print."""
    options = parse(arguments)
    result = measure(options)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "scaling.json").write_text(json.dumps(result, indent=1) + "\n")
    table = as_markdown(result)
    reason = plots.missing()
    if reason:
        table += f"\n{reason}.\n"
    else:
        names = [path.name for path in draw(result, options.out)]
        table += "\n" + "\n".join(f"![{name}]({name})" for name in names) + "\n"
    (options.out / "scaling.md").write_text(table)
    sys.stdout.write(table)
    return 0 if all(row["as_planned"] for row in result["memory"]) else 1


if __name__ == "__main__":
    sys.exit(main())
