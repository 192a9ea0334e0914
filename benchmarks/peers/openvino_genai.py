"""OpenVINO GenAI's `LLMPipeline`, with paged and with plain attention."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from benchmarks.peers.contract import (
    Format,
    Job,
    Prompts,
    Run,
    absent,
    once,
    read_weights,
    require,
    thread_settings,
    threads_of,
)

LABEL = "OpenVINO GenAI"
PACKAGES = ("openvino-genai", "openvino", "nncf")
_CPUINFO = Path("/proc/cpuinfo")
#: Where the processor has no bf16 arithmetic, paged attention takes float32 alone.
_BF16 = _CPUINFO.exists() and "_bf16" in _CPUINFO.read_text()
_WIDTH = 2 if _BF16 else 4
PRECISIONS = {
    "fp32": Format("f32", 4, 4),
    "bf16": Format("f16 weights, " + ("bf16" if _BF16 else "f32") + " arithmetic", 2, _WIDTH),
    "int8": Format("INT8_ASYM, an f16 scale per row", 1, _WIDTH),
    "int4": Format("INT4_SYM, an f16 scale per 32; head too, or int8", 0.5 + 2 / 32, _WIDTH),
}
_KINDS = {"fp32": ("f32",), "bf16": ("f16",), "int8": ("int8",), "int4": ("int4", "int4+int8")}


def missing(precision: str) -> str | None:
    """See `contract.Peer`."""
    quantiser = ("nncf",) if precision.startswith("int") else ()
    return absent("openvino", "openvino_genai", "safetensors", *quantiser)


def _folder(job: Job, kind: str) -> Path:
    return job.folder / "openvino_genai" / kind


def _compress(model: Any, kind: str) -> Any:
    import nncf

    if kind == "int8":
        return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM)
    return nncf.compress_weights(
        model,
        mode=nncf.CompressWeightsMode.INT4_SYM,
        group_size=32,
        all_layers=kind == "int4",
        ratio=1.0,
    )


def prepare(job: Job) -> None:
    """Write its model folders."""

    def make(target: Path, kind: str) -> None:
        import openvino as ov

        from benchmarks.peers import openvino_graph

        model = openvino_graph.model(job.shape, read_weights(job.folder))
        if kind.startswith("int"):
            model = _compress(model, kind)
        target.mkdir()
        name = target / "openvino_model.xml"
        ov.save_model(model, name, compress_to_fp16=kind != "f32")
        (target / "config.json").write_text(json.dumps({"model_type": "gpt2"}))

    for kind in _KINDS[job.precision]:
        once(_folder(job, kind), lambda target, kind=kind: make(target, kind))  # type: ignore[misc]


class Engine:
    """See the module."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.settings = [
            f"{count}, {attention} attention, {kind}"
            for count in thread_settings(job.threads)
            for attention in ("paged", "plain")
            for kind in _KINDS[job.precision]
        ]
        self.pipelines: dict[str, Any] = {}
        self.setting = ""

    def _properties(self) -> dict[str, Any]:
        """Of the device. The cache is no lighter than ours; left alone it would have 8 bits."""
        wide = "bf16" if _BF16 and self.job.precision != "fp32" else "f32"
        return {
            "INFERENCE_NUM_THREADS": threads_of(self.setting),
            "INFERENCE_PRECISION_HINT": wide,
            "KV_CACHE_PRECISION": wide,
            "PERFORMANCE_HINT": "LATENCY",
        }

    def use(self, setting: str) -> None:
        """A number of threads, an attention and a model: a pipeline of its own."""
        import openvino_genai as genai

        require(setting, self.settings)
        self.setting = setting
        if setting in self.pipelines:
            return
        self.pipelines.clear()
        config = self._properties()
        config["ATTENTION_BACKEND"] = "PA" if "paged" in setting else "SDPA"
        if "paged" in setting:
            scheduler = genai.SchedulerConfig()
            # Or a prompt that was seen before would not be computed again.
            scheduler.enable_prefix_caching = False
            scheduler.max_num_batched_tokens = self.job.shape.n_ctx * self.job.batch
            config["scheduler_config"] = scheduler
        folder = _folder(self.job, setting.rsplit(maxsplit=1)[1])
        self.pipelines[setting] = genai.LLMPipeline(folder, "CPU", config)

    def generate(self, prompts: Prompts, new: int) -> Run:
        """See `contract.Engine`."""
        import numpy as np
        import openvino as ov
        import openvino_genai as genai

        config = genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = new
        config.ignore_eos, config.do_sample = True, False
        config.set_eos_token_id(self.job.shape.vocab_size - 1)  # ignored, but it must be one
        ids = np.array(prompts, np.int64)
        given = genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids)))
        start = time.perf_counter()
        out = self.pipelines[self.setting].generate(given, config)
        total = time.perf_counter() - start
        first = out.perf_metrics.get_ttft().mean / 1e3
        return Run([list(tokens) for tokens in out.tokens], first, total)

    def logits(self, tokens: list[int]) -> list[float]:
        """Of the same file, by OpenVINO itself: the pipeline keeps them to itself."""
        import numpy as np
        import openvino as ov

        name = _folder(self.job, self.setting.rsplit(maxsplit=1)[1]) / "openvino_model.xml"
        compiled = ov.Core().compile_model(name, "CPU", self._properties())
        ids = np.array([tokens], np.int64)
        given = {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "position_ids": np.arange(ids.size)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        row: list[float] = compiled(given)["logits"][0, -1].tolist()
        return row
