"""gpt2_fast itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.peers.contract import (
    COMMON,
    Format,
    Job,
    Prompts,
    Run,
    once,
    require,
    thread_settings,
)

if TYPE_CHECKING:
    from pathlib import Path

LABEL = "gpt2_fast"
PACKAGES = ("gpt2_fast",)
PRECISIONS = {
    "fp32": Format("fp32", 4, 4),
    "bf16": Format("bf16", 2, 2),
    "int8": Format("8 bits, a bf16 scale per 64 inputs", 1 + 2 / 64, 2),
    "int4": Format("4 bits, a bf16 scale per 32 inputs", 0.5 + 2 / 32, 2),
}


def missing(precision: str) -> str | None:
    """A precision that this build has no processor kernels for."""
    from gpt2_fast.device import PRECISIONS as OFFERED

    offered = OFFERED["cpu"]
    return None if precision in offered else f"this build has {', '.join(offered)} on the CPU"


def _folder(job: Job) -> Path:
    return job.folder / "gpt2_fast" / job.precision


def prepare(job: Job) -> None:
    """Write the prepared file, as `gpt2-fast quantize` does."""
    from gpt2_fast import GPT2

    def make(target: Path) -> None:
        with GPT2.from_pretrained(job.folder / COMMON, precision=job.precision) as model:
            model.save_prepared(target)

    once(_folder(job), make)


class Engine:
    """`GPT2` from the prepared file."""

    def __init__(self, job: Job) -> None:
        from gpt2_fast import GPT2

        self.model = GPT2.from_pretrained(
            _folder(job),
            device="cpu",
            threads=job.threads,
            max_batch=job.batch,
        )
        self.settings = [f"{thread_settings(job.threads)[-1]}, {self.model.isa}"]

    def use(self, setting: str) -> None:
        """There is one setting."""
        require(setting, self.settings)

    def generate(self, prompts: Prompts, new: int) -> Run:
        """See `contract.Engine`."""
        out = self.model.generate(prompts, max_new_tokens=new, temperature=0.0, ignore_eos=True)
        first = max(one.timings.first_token for one in out)
        return Run([one.token_ids for one in out], first, max(one.timings.total for one in out))

    def logits(self, tokens: list[int]) -> list[float]:
        """See `contract.Engine`."""
        row: list[float] = self.model.forward(tokens)[-1].tolist()
        return row
