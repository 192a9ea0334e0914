"""`GPT2LMHeadModel` with a static cache, its decode step compiled by `torch.compile`.

Its own `generate` compiles on accelerators only, so the loop is here: eager over the prompt, then
one compiled step a token.
"""

from __future__ import annotations

import inspect
import time
from typing import Any

from benchmarks.peers import transformers as eager
from benchmarks.peers.contract import Job, Prompts, Run, absent

LABEL = "transformers, compiled"
PACKAGES = eager.PACKAGES
PRECISIONS = eager.PRECISIONS


def missing(precision: str) -> str | None:
    """See `contract.Peer`."""
    del precision
    return absent("torch", "transformers", "safetensors")


def prepare(job: Job) -> None:
    """Nothing: it reads the common weights."""
    del job


class Engine(eager.Engine):
    """See the module."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.length = job.shape.n_ctx
        self.settings = [setting for setting in self.settings if setting.endswith("sdpa")]
        self.step: Any = None
        self.caches: dict[int, Any] = {}
        self.compiled: set[int] = set()
        # It was renamed; the old name is to go.
        parameters = inspect.signature(self.model.forward).parameters
        self.cache_name = "cache" if "cache" in parameters else "past_key_values"

    def generate(self, prompts: Prompts, new: int) -> Run:
        """See `contract.Engine`. The first steps for a batch compile, outside the time."""
        import torch
        from transformers import StaticCache

        ids = torch.tensor(prompts)
        batch = len(ids)
        if batch not in self.caches:
            self.caches[batch] = StaticCache(config=self.model.config, max_cache_len=self.length)
        if new > 1 and batch not in self.compiled:
            self.step = self.step or torch.compile(self.model.forward, dynamic=False)
            self._static(ids[:, :1], 3)
            self.compiled.add(batch)
        return self._static(ids, new)

    def _static(self, ids: Any, new: int) -> Run:
        import torch

        cache, length = self.caches[len(ids)], ids.shape[1]
        cache.reset()
        start = time.perf_counter()
        # no_grad, not inference_mode: the cache must stay an ordinary tensor between calls.
        with torch.no_grad():
            out = self.model(ids, use_cache=True, logits_to_keep=1, **{self.cache_name: cache})
            token = out.logits[:, -1:].argmax(-1)
            drawn, first = [token], time.perf_counter() - start
            for past in range(length, length + new - 1):
                position = torch.tensor([[past]])
                out = self.step(token, position_ids=position, **{self.cache_name: cache})
                token = out.logits[:, -1:].argmax(-1)
                drawn.append(token)
            tokens = torch.cat(drawn, 1).tolist()
        return Run(tokens, first, time.perf_counter() - start)
