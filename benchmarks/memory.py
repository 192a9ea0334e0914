"""One process that fills a model's cache: `python -m benchmarks.memory JSON`, driven by scaling.py.

Prints what `plan()` promised and how much memory of its own (anonymous, not files) the process took
from before the model until the last position of every sequence was written.
"""

from __future__ import annotations

import json
import sys
import tempfile
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
    """Write every position of every sequence, all open at the same time, and use all scratch.

    Probabilities of every token are asked for, so that the largest pass has its logits too.
    """
    sequences = [engine.open() for _ in range(job.batch)]
    for sequence in sequences:
        for start in range(0, job.shape.n_ctx, engine.max_rows):
            rows = [0] * min(engine.max_rows, job.shape.n_ctx - start)
            engine.step([(sequence, rows, rows)])
    for sequence in sequences:
        engine.close(sequence)


def main(argument: str) -> None:
    """Import, measure, load, fill, measure."""
    from gpt2_fast import GPT2, GPT2Config

    job = Job.from_json(json.loads(argument))

    def load(folder: Path) -> GPT2:
        return GPT2.from_pretrained(
            folder,
            device="cpu",
            precision=job.precision,
            threads=job.threads,
            max_batch=job.batch,
        )

    # What is imported and allocated once, whatever the model, belongs to no plan.
    tiny = GPT2Config(n_layer=1, n_embd=8, n_head=1, n_ctx=8, vocab_size=8, eos_token_id=None)
    with tempfile.TemporaryDirectory() as folder:
        GPT2.from_config(tiny, device="cpu", precision=job.precision).save_pretrained(folder)
        with load(Path(folder)) as first:
            first.generate([0], max_new_tokens=1, temperature=0.0)
    before = own_bytes()
    model = load(job.folder / COMMON)
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
