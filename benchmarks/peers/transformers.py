"""`GPT2LMHeadModel.generate` with its cache, eager."""

from __future__ import annotations

import time
from typing import Any

from benchmarks.peers.contract import (
    COMMON,
    Format,
    Job,
    Prompts,
    Run,
    absent,
    require,
    thread_settings,
    threads_of,
)
from benchmarks.peers.torch_loop import torch_dtype

LABEL = "transformers"
PACKAGES = ("transformers", "torch")
PRECISIONS = {"fp32": Format("fp32", 4, 4), "bf16": Format("bf16", 2, 2)}


def missing(precision: str) -> str | None:
    """See `contract.Peer`."""
    del precision
    return absent("torch", "transformers", "safetensors")


def prepare(job: Job) -> None:
    """Nothing: it reads the common weights."""
    del job


class _Clock:
    """A streamer: transformers hands it the prompt, then each token as it comes."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:  # noqa: ARG002
        """Note the time."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is held back."""


class Engine:
    """See the module."""

    def __init__(self, job: Job) -> None:
        import transformers as untyped

        transformers: Any = untyped
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.model = transformers.GPT2LMHeadModel.from_pretrained(
            job.folder / COMMON, dtype=torch_dtype(job.precision)
        ).eval()
        self.model.generation_config = transformers.GenerationConfig(
            do_sample=False, use_cache=True, eos_token_id=None, pad_token_id=0
        )
        self.settings = [
            f"{count}, {how}" for count in thread_settings(job.threads) for how in ("eager", "sdpa")
        ]

    def use(self, setting: str) -> None:
        """A number of threads and an attention."""
        import torch

        require(setting, self.settings)
        torch.set_num_threads(threads_of(setting))
        self.model.set_attn_implementation(setting.rsplit(maxsplit=1)[1])

    def generate(self, prompts: Prompts, new: int) -> Run:
        """See `contract.Engine`."""
        import torch

        ids = torch.tensor(prompts)
        clock = _Clock()
        start = time.perf_counter()
        with torch.inference_mode():
            out = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, streamer=clock
            )
        times = clock.times[1:]
        if len(times) != new:
            raise RuntimeError(f"transformers: wanted {new} tokens, got {len(times)}")
        tokens = out[:, ids.shape[1] :].tolist()
        return Run(tokens, times[0] - start, times[-1] - start)

    def logits(self, tokens: list[int]) -> list[float]:
        """See `contract.Engine`."""
        import torch

        with torch.inference_mode():
            row: list[float] = self.model(torch.tensor([tokens])).logits[0, -1].float().tolist()
        return row
