"""One process that fills a model's cache: `python -m benchmarks.memory JSON`, driven by scaling.py.

Prints what `plan()` promised and how much memory of its own (anonymous, not files) the process took
from before the model until the last position of every sequence was written.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.peers.contract import COMMON, Job


def own_bytes() -> int:
    """Memory of this process that no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon")


def fill(engine: Any, job: Job) -> None:
    """Write every position of every sequence, all open at the same time; then logits of each."""
    sequences = [engine.open() for _ in range(job.batch)]
    last = job.shape.n_ctx - 1
    for sequence in sequences:
        for start in range(0, last, engine.max_rows):
            engine.step([(sequence, [0] * min(engine.max_rows, last - start), None)])
    engine.step([(sequence, [0], "all") for sequence in sequences])
    for sequence in sequences:
        engine.close(sequence)


def main(argument: str) -> None:
    """Import, measure, load, fill, measure."""
    from gpt2_fast import GPT2

    job = Job.from_json(json.loads(argument))
    before = own_bytes()
    model = GPT2.from_pretrained(
        job.folder / COMMON,
        device="cpu",
        precision=job.precision,
        threads=job.threads,
        max_batch=job.batch,
    )
    loaded = own_bytes()
    fill(model._running(), job)
    plan = model.plan()
    figures = {
        "plan": plan.total,
        "plan_weights": plan.weights,
        "plan_cache": plan.cache,
        "plan_scratch": plan.scratch,
        "loaded": loaded - before,
        "filled": own_bytes() - before,
    }
    sys.stdout.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
