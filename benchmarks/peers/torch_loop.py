"""GPT-2 in eager torch as one would write it for speed."""

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

LABEL = "torch, eager loop"
PACKAGES = ("torch",)
PRECISIONS = {"fp32": Format("fp32", 4, 4), "bf16": Format("bf16", 2, 2)}


def missing(precision: str) -> str | None:
    """See `contract.Peer`."""
    del precision
    return absent("torch", "safetensors")


def prepare(job: Job) -> None:
    """Nothing: it reads the common weights."""
    del job


def torch_dtype(precision: str) -> Any:
    """torch's name of a precision."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]


def torch_weights(job: Job, dtype: Any) -> dict[str, Any]:
    """Name -> tensor of every parameter; linear weights are (inputs, outputs)."""
    from safetensors.torch import load_file

    state = load_file(job.folder / COMMON / "model.safetensors")
    return {name.removeprefix("transformer."): value.to(dtype) for name, value in state.items()}


class Engine:
    """A cache of full size made once, weights as (outputs, inputs), torch's fused attention,
    in-place residuals.
    """

    def __init__(self, job: Job) -> None:
        import torch

        self.shape, self.dtype = job.shape, torch_dtype(job.precision)
        self.w = torch_weights(job, self.dtype)
        for name, value in self.w.items():
            if name.startswith("h.") and value.ndim == 2:
                self.w[name] = value.T.contiguous()
        shape = job.shape
        sizes = (shape.n_layer, 2, job.batch, shape.n_head, shape.n_ctx, shape.head_size)
        self.cache = torch.zeros(sizes, dtype=self.dtype)
        self.settings = thread_settings(job.threads)

    def use(self, setting: str) -> None:
        """A number of threads."""
        import torch

        require(setting, self.settings)
        torch.set_num_threads(threads_of(setting))

    def _norm(self, x: Any, name: str) -> Any:
        import torch.nn.functional as F

        w, eps = self.w, self.shape.layer_norm_epsilon
        return F.layer_norm(x, x.shape[-1:], w[name + ".weight"], w[name + ".bias"], eps)

    def _linear(self, x: Any, name: str) -> Any:
        import torch.nn.functional as F

        return F.linear(x, self.w[name + ".weight"], self.w[name + ".bias"])

    def _head(self, x: Any) -> Any:
        import torch.nn.functional as F

        return F.linear(x, self.w["wte.weight"])

    def _step(self, tokens: Any, past: int) -> Any:
        """(B, T) new tokens behind `past` cached ones -> (B, V) logits of the last."""
        import torch.nn.functional as F

        shape = self.shape
        batch, new = tokens.shape
        end = past + new
        x = F.embedding(tokens, self.w["wte.weight"]) + self.w["wpe.weight"][past:end]
        for layer in range(shape.n_layer):
            block = f"h.{layer}."
            qkv = self._linear(self._norm(x, block + "ln_1"), block + "attn.c_attn")
            q, k, v = qkv.view(batch, new, 3, shape.n_head, shape.head_size).permute(2, 0, 3, 1, 4)
            keys = self.cache[layer, 0, :batch, :, :end]
            values = self.cache[layer, 1, :batch, :, :end]
            keys[:, :, past:] = k
            values[:, :, past:] = v
            mixed = F.scaled_dot_product_attention(q, keys, values, is_causal=past == 0)
            mixed = mixed.transpose(1, 2).reshape(batch, new, shape.n_embd)
            x += self._linear(mixed, block + "attn.c_proj")
            inner = self._linear(self._norm(x, block + "ln_2"), block + "mlp.c_fc")
            x += self._linear(F.gelu(inner, approximate="tanh"), block + "mlp.c_proj")
        return self._head(self._norm(x[:, -1], "ln_f"))

    def generate(self, prompts: Prompts, new: int) -> Run:
        """See `contract.Engine`."""
        import torch

        start = time.perf_counter()
        with torch.inference_mode():
            length = len(prompts[0])
            token = self._step(torch.tensor(prompts), 0).argmax(-1, keepdim=True)
            drawn = [token]
            first = time.perf_counter() - start
            for past in range(length, length + new - 1):
                token = self._step(token, past).argmax(-1, keepdim=True)
                drawn.append(token)
            tokens = torch.cat(drawn, 1).tolist()
        return Run(tokens, first, time.perf_counter() - start)

    def logits(self, tokens: list[int]) -> list[float]:
        """See `contract.Engine`."""
        import torch

        with torch.inference_mode():
            row: list[float] = self._step(torch.tensor([tokens]), 0)[0].float().tolist()
        return row
