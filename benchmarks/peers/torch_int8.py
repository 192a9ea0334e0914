"""The eager loop with torch's dynamically quantised linear layers, head included.

`quantize_dynamic`: int8 weights with one scale a matrix, activations quantised at run time with one
scale a tensor, packed for oneDNN or FBGEMM. Embedding, norms, attention and cache are float32.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

from benchmarks.peers import torch_loop
from benchmarks.peers.contract import Format, Job, absent, require, threads_of

LABEL = "torch, int8 loop"
PACKAGES = ("torch",)
PRECISIONS = {"int8": Format("quantize_dynamic, a scale per matrix", 1, 4)}


def missing(precision: str) -> str | None:
    """See `contract.Peer`."""
    del precision
    reason = absent("torch", "safetensors")
    if reason is None and not _backends():
        reason = "this build of torch has no quantised matrix product"
    return reason


def prepare(job: Job) -> None:
    """Nothing: it quantises when it loads."""
    del job


def _backends() -> list[str]:
    import torch

    offered: list[str] = torch.backends.quantized.supported_engines
    found: list[str] = [name for name in ("x86", "onednn") if name in offered]
    return found or [name for name in ("qnnpack",) if name in offered]


class Engine(torch_loop.Engine):
    """See the module."""

    def __init__(self, job: Job) -> None:
        super().__init__(replace(job, precision="fp32"))
        self.names = [name for name, value in self.w.items() if self._is_product(name, value)]
        # What one backend packs, another cannot multiply.
        self.packed: dict[str, dict[str, Any]] = {}
        self.settings = [f"{count}, {name}" for name in _backends() for count in self.settings]
        self.plain = {name: self.w.pop(name) for name in self.names}
        self.plain["wte.weight"] = self.w["wte.weight"]
        self.backend = ""

    @staticmethod
    def _is_product(name: str, value: Any) -> bool:
        return name.startswith("h.") and value.ndim == 2

    def use(self, setting: str) -> None:
        """A number of threads and a backend."""
        import torch

        require(setting, self.settings)
        torch.set_num_threads(threads_of(setting))
        self.backend = setting.rsplit(maxsplit=1)[1]
        torch.backends.quantized.engine = self.backend
        if self.backend not in self.packed:
            self.packed[self.backend] = {
                name: self._quantised(weight, self.w.get(name.replace("weight", "bias")))
                for name, weight in self.plain.items()
            }

    @staticmethod
    def _quantised(weight: Any, bias: Any) -> Any:
        import torch

        with torch.device("meta"):
            linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        linear.weight = torch.nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            linear.bias = torch.nn.Parameter(bias, requires_grad=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.ao is to move, not to change
            quantised = torch.ao.quantization.quantize_dynamic(
                torch.nn.Sequential(linear), {torch.nn.Linear}, dtype=torch.qint8
            )
        return quantised[0]

    def _linear(self, x: Any, name: str) -> Any:
        return self.packed[self.backend][name + ".weight"](x)

    def _head(self, x: Any) -> Any:
        return self.packed[self.backend]["wte.weight"](x)
