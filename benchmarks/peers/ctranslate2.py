"""CTranslate2's `Generator`."""

from __future__ import annotations

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

LABEL = "CTranslate2"
PACKAGES = ("ctranslate2",)
PRECISIONS = {
    "fp32": Format("float32", 4, 4),
    "bf16": Format("bfloat16", 2, 2),
    "int8": Format("int8, a scale per row", 1, 4),
}
_TYPES = {"fp32": "float32", "bf16": "bfloat16", "int8": "int8"}


def missing(precision: str) -> str | None:
    """A package, or a type that it has no processor kernels for."""
    reason = absent("ctranslate2", "safetensors")
    if reason is None:
        import ctranslate2

        offered = ctranslate2.get_supported_compute_types("cpu")
        if _TYPES[precision] not in offered:
            reason = f"offers {', '.join(sorted(offered))} on this processor"
    return reason


def _folder(job: Job) -> Path:
    return job.folder / "ctranslate2" / job.precision


def _word(token: int) -> str:
    """Its texts are lists of words: one for each id."""
    return f"t{token}"


def _specification(job: Job) -> Any:
    """The model in its own terms: as its converter of transformers' GPT-2 does it."""
    from ctranslate2.specs import common_spec, transformer_spec

    shape, w = job.shape, read_weights(job.folder)
    spec: Any = transformer_spec.TransformerDecoderModelSpec.from_config(
        shape.n_layer, shape.n_head, pre_norm=True, activation=common_spec.Activation.GELUTanh
    )

    def norm(target: Any, name: str) -> None:
        target.gamma, target.beta = w[name + ".weight"], w[name + ".bias"]

    def linear(target: Any, name: str) -> None:
        target.weight, target.bias = w[name + ".weight"].T.copy(), w[name + ".bias"]

    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = w["wte.weight"]
    decoder.position_encodings.encodings = w["wpe.weight"]
    decoder.projection.weight = w["wte.weight"]
    norm(decoder.layer_norm, "ln_f")
    for number, layer in enumerate(decoder.layer):
        block = f"h.{number}."
        norm(layer.self_attention.layer_norm, block + "ln_1")
        linear(layer.self_attention.linear[0], block + "attn.c_attn")
        linear(layer.self_attention.linear[1], block + "attn.c_proj")
        norm(layer.ffn.layer_norm, block + "ln_2")
        linear(layer.ffn.linear_0, block + "mlp.c_fc")
        linear(layer.ffn.linear_1, block + "mlp.c_proj")
    spec.register_vocabulary([_word(token) for token in range(shape.vocab_size)])
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = _word(0)
    return spec


def prepare(job: Job) -> None:
    """Write its model folder."""

    def make(target: Path) -> None:
        spec = _specification(job)
        spec.validate()
        spec.optimize(quantization=_TYPES[job.precision])
        target.mkdir()
        spec.save(str(target))

    once(_folder(job), make)


class Engine:
    """See the module."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.settings = thread_settings(job.threads)
        self.generators: dict[str, Any] = {}
        self.now: Any = None

    def use(self, setting: str) -> None:
        """A number of threads: a generator of its own."""
        import ctranslate2

        require(setting, self.settings)
        if setting not in self.generators:
            self.generators.clear()
            self.generators[setting] = ctranslate2.Generator(
                str(_folder(self.job)),
                device="cpu",
                compute_type=_TYPES[self.job.precision],
                inter_threads=1,
                intra_threads=threads_of(setting),
            )
        self.now = self.generators[setting]

    def generate(self, prompts: Prompts, new: int) -> Run:
        """See `contract.Engine`."""
        words = [[_word(token) for token in prompt] for prompt in prompts]
        times: list[float] = []

        def note(result: Any) -> bool:
            if result.step == len(times) and result.batch_id == len(prompts) - 1:
                times.append(time.perf_counter())
            return False

        start = time.perf_counter()
        out = self.now.generate_batch(
            words,
            max_length=new,
            min_length=new,
            end_token=[],
            include_prompt_in_result=False,
            beam_size=1,
            callback=note,
        )
        total = time.perf_counter() - start
        tokens = [one.sequences_ids[0] for one in out]
        return Run(tokens, (times[0] - start) if times else total, total)

    def logits(self, tokens: list[int]) -> list[float]:
        """See `contract.Engine`."""
        import numpy as np

        rows = np.asarray(self.now.forward_batch([tokens]))
        row: list[float] = rows[0, -1].astype(np.float32).tolist()
        return row
