"""What an int8 KV cache is worth: `python -m benchmarks.kv_cache --model 124M --precision int8`.

One engine with the cache of its precision and one with an int8 cache, in one process, in turns:
decoding at a short and a long context, alone and as a batch, and a long prompt. A Markdown table
with medians, the range of all rounds, and the bytes of the cache. What it costs in quality:
`benchmarks.quantization`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.scaling import SHORT, shortened, time_prompt, time_steps
from benchmarks.turns import progress, row, span, spread
from gpt2_fast import _C, PUBLISHED, GPT2Config, plan
from gpt2_fast.bench_engine import EngineRunner
from gpt2_fast.device import PRECISIONS, choose

KINDS = (None, "int8")


@dataclass
class Case:
    """Milliseconds of every round, with the cache of the precision and with one of int8."""

    name: str
    usual: list[float] = field(default_factory=list)
    int8: list[float] = field(default_factory=list)


def measure(
    config: GPT2Config, precision: str, *, batch: int, rounds: int, steps: int, threads: int
) -> list[Case]:
    """Every case with both engines, in turns."""
    late = config.n_ctx - steps - 1
    device = choose("cpu", precision)
    runners = [
        EngineRunner(config, precision, device, threads=threads, max_batch=batch, kv_precision=kind)
        for kind in KINDS
    ]
    cases = {
        f"decode, context {SHORT}": lambda r: time_steps(r, 1, SHORT, steps),
        f"decode, context {late}": lambda r: time_steps(r, 1, late, steps),
        f"{batch} texts, context {SHORT}": lambda r: time_steps(r, batch, SHORT, steps),
        f"{batch} texts, context {late}": lambda r: time_steps(r, batch, late, steps),
        f"prompt of {late}": lambda r: time_prompt(r, late),
    }
    found = []
    for name, run in cases.items():
        progress(name)
        case = Case(name)
        for number in range(rounds + 1):
            for runner, times in zip(runners, (case.usual, case.int8), strict=True):
                seconds = run(runner)
                if number:  # the first turn touches memory for the first time
                    times.append(1e3 * seconds)
        found.append(case)
    for runner in runners:
        runner.close()
    return found


def as_markdown(cases: Sequence[Case], megabytes: Sequence[float]) -> str:
    """The table, and a line about memory."""
    lines = [row(["case", "usual cache, ms", "int8 cache, ms", "faster by"]), row(["---"] * 4)]
    for case in cases:
        ratios = spread([a / b for a, b in zip(case.usual, case.int8, strict=True)])
        shown = [span(spread(times), 2) for times in (case.usual, case.int8)]
        lines.append(row([case.name, *shown, f"{span(ratios, 2)} x"]))
    usual, narrow = megabytes
    return "\n".join(lines) + f"\n\nOne full context takes {usual:.1f} or {narrow:.1f} MB.\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--model", choices=PUBLISHED, default="124M")
    add("--layers", type=int, default=0, help="only the first N layers; 0: all")
    add("--precision", choices=PRECISIONS["cpu"], default="int8", help="of the weights (int8)")
    add("--batch", type=int, default=8, help="texts of the batch (8)")
    add("--rounds", type=int, default=5, help="(5)")
    add("--steps", type=int, default=8, help="decode steps of one measurement (8)")
    add("--threads", type=int, default=_C.available_threads())
    options = parser.parse_args(arguments)
    config = shortened(PUBLISHED[options.model], options.layers)
    kept = [
        plan(config, precision=options.precision, kv_precision=kind, max_batch=1).cache / 1e6
        for kind in KINDS
    ]
    found = measure(
        config,
        options.precision,
        batch=options.batch,
        rounds=options.rounds,
        steps=options.steps,
        threads=options.threads,
    )
    sys.stdout.write(as_markdown(found, kept))


if __name__ == "__main__":
    main()
