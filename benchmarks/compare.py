"""Ours against eager torch and transformers, in turns: A B C A B C ...

    python -m benchmarks.compare --model 124M --precision fp32 --context 32 --new 64 --rounds 5

Each engine lives in a process of its own with the same random weights, prompts and number of greedy
tokens, and runs at the best of its settings (threads 1 and all; for transformers, eager and sdpa),
found first, for decoding and for reading the prompt each. Every round measures the machine's read
bandwidth and then each engine once, so that what the neighbours of this machine take is taken from
all. Bytes: weights once and the KV cache of each text, per step. In fp32 the tokens are compared:
where they part, float64 must say that the choice was closer than the errors of the two engines.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from benchmarks import agreement, roofline, traffic
from benchmarks.rivals import ENGINES, Prompts, random_prompts
from gpt2_fast import _C, PUBLISHED, GPT2Config

ROOT = Path(__file__).resolve().parent.parent
OURS = "gpt2_fast"
TUNING_TOKENS, TUNING_RUNS = 16, 2
PAUSE_SECONDS = 0.2  # threads of the last engine stop spinning


class Worker:
    """One engine's process."""

    def __init__(self, engine: str, options: argparse.Namespace) -> None:
        threads = str(options.threads)
        pinned = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), threads)
        self.engine = engine
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker"],
            cwd=ROOT,
            env=os.environ | pinned | {"OPENBLAS_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            self.ask(
                engine=engine,
                model=options.model,
                layers=options.layers,
                precision=options.precision,
                threads=options.threads,
                batch=options.batch,
            )
        except BaseException:
            self.close()
            raise

    def ask(self, **command: Any) -> dict[str, Any]:
        """Send one command and wait for its answer.

        Raises:
            RuntimeError: the engine failed, with its traceback, or its process ended.
        """
        source, target = _pipes(self.process)
        target.write(json.dumps(command) + "\n")
        target.flush()
        line = source.readline()
        if not line:
            raise RuntimeError(f"{self.engine}: its process ended, status {self.process.wait()}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise RuntimeError(f"{self.engine}: {reply['error']}")
        return reply

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
        target.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        source.close()


def _pipes(process: subprocess.Popen[str]) -> tuple[IO[str], IO[str]]:
    if process.stdout is None or process.stdin is None:
        raise RuntimeError("the worker has no pipes")
    return process.stdout, process.stdin


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
    """What one engine did.

    Attributes:
        engine: who.
        setting, prompt_setting: its best for decoding and for reading the prompt.
        tuning: decode and prompt tokens/s of each setting tried.
        decode: tokens/s of each round, after the first token, all texts of the batch together.
        prompt: prompt tokens/s of each round, up to the first token.
        others: share of the machine that other processes took during each round.
        tokens: the greedy tokens of the first round.
    """

    engine: str
    setting: str
    prompt_setting: str
    tuning: dict[str, tuple[float, float]]
    decode: list[float] = field(default_factory=list)
    prompt: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)
    tokens: Prompts = field(default_factory=list)


def rates(reply: dict[str, Any], prompts: Prompts, new: int) -> tuple[float, float]:
    """Decode and prompt tokens/s of one run."""
    batch, context = len(prompts), len(prompts[0])
    decode = batch * (new - 1) / (reply["total"] - reply["first"])
    return decode, batch * context / reply["first"]


def tune(worker: Worker, prompts: Prompts, new: int) -> Result:
    """Find the engine's best settings, of several runs with each."""
    tried: dict[str, tuple[float, float]] = {}
    new = min(new, TUNING_TOKENS)
    for setting in worker.ask(do="settings")["settings"]:
        worker.ask(do="use", setting=setting)
        runs = [worker.ask(do="generate", prompts=prompts, new=new) for _ in range(TUNING_RUNS)]
        pairs = [rates(run, prompts, new) for run in runs]
        tried[setting] = (max(decode for decode, _ in pairs), max(prompt for _, prompt in pairs))
    best = max(tried, key=lambda setting: tried[setting][0])
    return Result(worker.engine, best, max(tried, key=lambda s: tried[s][1]), tried)


def take_turn(worker: Worker, result: Result, prompts: Prompts, new: int) -> None:
    """One measured run, and one of the prompt alone where that wants another setting."""
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
    if not result.tokens:
        result.tokens = reply["tokens"]
    elif result.tokens != reply["tokens"]:
        raise RuntimeError(f"{result.engine}: the same prompts gave other tokens in another round")


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Run everything; the result is what the JSON file holds."""
    config = PUBLISHED[options.model]
    if options.layers:
        config = replace(config, n_layer=options.layers)
    prompts = random_prompts(config, options.batch, options.context)
    workers: list[Worker] = []
    peaks: list[float] = []
    try:
        for engine in options.engines:
            progress(f"loading {engine}")
            workers.append(Worker(engine, options))
        results = []
        for worker in workers:
            results.append(tune(worker, prompts, options.new))
            progress(f"{worker.engine}: best with {results[-1].setting}")
        for number in range(options.rounds):
            progress(f"round {number + 1} of {options.rounds}")
            peaks.append(roofline.peak_gbps(options.mib, 3, options.threads))
            for worker, result in zip(workers, results, strict=True):
                time.sleep(PAUSE_SECONDS)
                take_turn(worker, result, prompts, options.new)
        agreements = {}
        if options.precision == "fp32":
            for worker, result in zip(workers[1:], results[1:], strict=True):
                agreements[worker.engine] = agreement.explain(
                    config,
                    prompts,
                    results[0].tokens,
                    result.tokens,
                    lambda tokens: workers[0].ask(do="logits", tokens=tokens)["logits"],
                    lambda tokens, w=worker: w.ask(do="logits", tokens=tokens)["logits"],  # type: ignore[misc]
                )
    finally:
        for worker in workers:
            worker.close()
    return summary(options, config, results, peaks, agreements)


def progress(text: str) -> None:
    """Say what is happening, to standard error."""
    sys.stderr.write(text + "\n")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest, largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summary(
    options: argparse.Namespace,
    config: GPT2Config,
    results: list[Result],
    peaks: list[float],
    agreements: dict[str, str],
) -> dict[str, Any]:
    """Medians, bytes and ratios."""
    context, new, batch = options.context, options.new, options.batch
    moved = traffic.decode_bytes(config, options.precision, context, new, batch)
    ours = results[0].decode
    engines = []
    for result in results:
        gbps = [rate / batch * moved / 1e9 for rate in result.decode]
        engines.append(
            asdict(result)
            | {
                "decode_tokens_per_s": spread(result.decode),
                "prompt_tokens_per_s": spread(result.prompt),
                "gbps": spread(gbps),
                "of_bandwidth": spread([g / p for g, p in zip(gbps, peaks, strict=True)]),
                "ours_is_faster_by": spread(
                    [a / b for a, b in zip(ours, result.decode, strict=True)]
                ),
                "agreement": agreements.get(result.engine),
            }
        )
    names = ("model", "layers", "precision", "context", "new", "batch", "rounds", "threads")
    return {
        "machine": roofline.machine(),
        "case": {name: getattr(options, name) for name in names},
        "step_bytes": moved,
        "read_gbps": spread(peaks) | {"rounds": peaks},
        "engines": engines,
    }


def as_markdown(result: dict[str, Any]) -> str:
    """The table, and what one must know to read it."""
    about, case, peak = result["machine"], result["case"], result["read_gbps"]
    layers = f", first {case['layers']} layers" if case["layers"] else ""
    versions = ", ".join(f"{n} {about[n]}" for n in (OURS, "torch", "transformers") if n in about)
    about_case = (
        f"GPT-2 {case['model']}{layers}, {case['precision']}, batch {case['batch']}, context "
        f"{case['context']}, {case['new']} new tokens, greedy, random weights; median (min-max) of "
        f"{case['rounds']} interleaved rounds. {about['cpu']}, {case['threads']} threads; read "
        f"bandwidth in the same run {_span(peak, 1)} GB/s; {result['step_bytes'] / 1e6:.1f} MB a "
        f"step (weights + KV). {versions}."
    )
    columns = [
        "engine",
        "best setting",
        "decode tokens/s",
        "GB/s",
        "% of bandwidth",
        "prompt tokens/s",
        "gpt2_fast is faster by",
    ]
    lines = [about_case, "", _row(columns), _row(["---"] * len(columns))]
    for engine in result["engines"]:
        share = {name: 100 * value for name, value in engine["of_bandwidth"].items()}
        faster = "" if engine["engine"] == OURS else _span(engine["ours_is_faster_by"], 2) + "x"
        elsewhere = ""
        if engine["prompt_setting"] != engine["setting"]:
            elsewhere = f" with {engine['prompt_setting']}"
        cells = [
            engine["engine"],
            engine["setting"],
            _span(engine["decode_tokens_per_s"], 1),
            _span(engine["gbps"], 1),
            _span(share, 0),
            _span(engine["prompt_tokens_per_s"], 0) + elsewhere,
            faster,
        ]
        lines.append(_row(cells))
    lines.append("")
    for engine in result["engines"]:
        if engine["agreement"]:
            lines.append(f"- {engine['engine']}: {engine['agreement']}")
        others = max(engine["others"])
        if others > 0.06:
            lines.append(
                f"- {engine['engine']}: other processes took up to {100 * others:.0f} % of this "
                "machine during a run; measure again when it is quiet"
            )
    return "\n".join(lines).rstrip() + "\n"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _span(value: dict[str, float], digits: int) -> str:
    return f"{value['median']:.{digits}f} ({value['min']:.{digits}f}-{value['max']:.{digits}f})"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(description="Interleaved comparison with other engines.")
    parser.add_argument("--model", choices=PUBLISHED, default="124M")
    parser.add_argument("--layers", type=int, default=0, help="only the first N layers; 0: all")
    parser.add_argument("--precision", choices=traffic.ELEMENT_BYTES, default="fp32")
    parser.add_argument("--context", type=int, default=32, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens to generate")
    parser.add_argument("--batch", type=int, default=1, help="texts at the same time")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=_C.available_threads())
    parser.add_argument(
        "--mib",
        type=int,
        default=roofline.MIN_MIB,
        help="bandwidth buffer; below 512 a cache may answer",
    )
    rivals = [name for name in ENGINES if name != OURS]
    parser.add_argument("--rivals", nargs="*", choices=rivals, default=rivals)
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--markdown", type=Path, help="write the table to this file too")
    options = parser.parse_args(arguments)
    for name in ("context", "batch", "rounds", "threads", "mib"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    room = PUBLISHED[options.model].n_ctx + 1
    if options.new < 2 or options.context + options.new > room:
        parser.error(f"--new must be at least 2, and --context + --new at most {room}")
    if not 0 <= options.layers <= PUBLISHED[options.model].n_layer:
        parser.error(f"--layers must be in 0..{PUBLISHED[options.model].n_layer}")
    options.engines = [OURS, *options.rivals]
    return options


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Compare, write, print."""
    options = parse(arguments)
    result = compare(options)
    table = as_markdown(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    if options.markdown:
        options.markdown.write_text(table)
    sys.stdout.write(table)
    return result


if __name__ == "__main__":
    main()
