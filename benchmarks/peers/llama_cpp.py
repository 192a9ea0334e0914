"""llama.cpp, through the C interface that llama-cpp-python exposes.

Compile llama-cpp-python on the machine that is measured (`pip install` does, from its sdist, for
the processor it finds). The low-level interface, because the high-level class knows one text at a
time and copies a row of logits for every token of a prompt.
"""

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

LABEL = "llama.cpp"
PACKAGES = ("llama-cpp-python", "gguf")
PRECISIONS = {
    "fp32": Format("F32", 4, 4),
    "bf16": Format("BF16", 2, 2),
    "int8": Format("Q8_0, an f16 scale per 32 inputs", 34 / 32, 2),
    "int4": Format("Q4_0, an f16 scale per 32 inputs; head too, or Q6_K", 18 / 32, 2),
}
#: File types of llama.h for each precision, by the word that a setting ends with. Of Q4_0 there
#: are two: all of it, and with the head in Q6_K, which is what its own tool makes.
_FILES: dict[str, dict[str, str | None]] = {
    "fp32": {"F32": None},
    "bf16": {"BF16": "LLAMA_FTYPE_MOSTLY_BF16"},
    "int8": {"Q8_0": "LLAMA_FTYPE_MOSTLY_Q8_0"},
    "int4": {"Q4_0": "LLAMA_FTYPE_MOSTLY_Q4_0", "Q4_0+Q6_K": "LLAMA_FTYPE_MOSTLY_Q4_0"},
}
_NAMES = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
_OUTSIDE = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm"}


def missing(precision: str) -> str | None:
    """See `contract.Peer`."""
    del precision
    return absent("llama_cpp", "gguf", "safetensors")


def _file(job: Job, kind: str) -> Path:
    return job.folder / "llama_cpp" / f"{kind}.gguf"


def _write_float(job: Job, target: Path) -> None:
    """The model in float32, without a vocabulary."""
    from gguf import GGUFWriter

    shape = job.shape
    writer: Any = GGUFWriter(target, "gpt2")
    writer.add_context_length(shape.n_ctx)
    writer.add_embedding_length(shape.n_embd)
    writer.add_feed_forward_length(shape.inner_size)
    writer.add_block_count(shape.n_layer)
    writer.add_head_count(shape.n_head)
    writer.add_layer_norm_eps(shape.layer_norm_epsilon)
    writer.add_vocab_size(shape.vocab_size)
    writer.add_tokenizer_model("none")
    for name, array in read_weights(job.folder).items():
        stem, _, ending = name.rpartition(".")
        if stem.startswith("h."):
            _, number, part = stem.split(".", 2)
            stem = f"blk.{number}.{_NAMES[part]}"
            stored = array.T.copy() if array.ndim == 2 else array
        else:
            stem, stored = _OUTSIDE[stem], array
        writer.add_tensor(f"{stem}.{ending}", stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def prepare(job: Job) -> None:
    """Write its files."""
    import llama_cpp

    plain = once(_file(job, "F32"), lambda target: _write_float(job, target))
    for kind, file_type in _FILES[job.precision].items():
        if file_type is None:
            continue
        parameters: Any = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype = getattr(llama_cpp, file_type)
        parameters.pure = kind == "Q4_0"
        parameters.nthread = job.threads

        def make(target: Path, parameters: Any = parameters) -> None:
            names = str(plain).encode(), str(target).encode()
            if llama_cpp.llama_model_quantize(*names, parameters):
                raise RuntimeError(f"llama.cpp could not write {target}")

        once(_file(job, kind), make)


class Engine:
    """See the module."""

    def __init__(self, job: Job) -> None:
        import llama_cpp

        self.api: Any = llama_cpp
        self.job = job
        self.silent = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self.silent, None)
        llama_cpp.llama_backend_init()
        self.settings = [
            f"{count}, flash attention {flash}, {kind}"
            for count in thread_settings(job.threads)
            for flash in ("on", "off")
            for kind in _FILES[job.precision]
        ]
        self.setting, self.kind = "", ""
        self.model: Any = None
        self.context: Any = None
        self.texts = 0
        self.batch = llama_cpp.llama_batch_init(max(job.shape.n_ctx, job.batch), 0, 1)

    def use(self, setting: str) -> None:
        """A number of threads, fused attention or not, and a file."""
        require(setting, self.settings)
        kind = setting.rsplit(maxsplit=1)[1]
        if setting == self.setting:
            return
        self._close_context()
        self.setting = setting
        if kind != self.kind:
            if self.model:
                self.api.llama_model_free(self.model)
            parameters = self.api.llama_model_default_params()
            name = str(_file(self.job, kind)).encode()
            self.model, self.kind = self.api.llama_model_load_from_file(name, parameters), kind
            if not self.model:
                raise RuntimeError(f"llama.cpp cannot load {_file(self.job, kind)}")

    def _close_context(self) -> None:
        if self.context:
            self.api.llama_free(self.context)
        self.context, self.texts = None, 0

    def _open_context(self, texts: int) -> None:
        """Room for that many texts; kept until another number comes."""
        if texts == self.texts:
            self.api.llama_memory_clear(self.api.llama_get_memory(self.context), 0)
            return
        self._close_context()
        parameters = self.api.llama_context_default_params()
        n_ctx = self.job.shape.n_ctx
        parameters.n_ctx = n_ctx * texts
        parameters.n_seq_max = texts
        parameters.n_batch = parameters.n_ubatch = n_ctx
        parameters.n_threads = parameters.n_threads_batch = threads_of(self.setting)
        parameters.flash_attn_type = 1 if "flash attention on" in self.setting else 0
        if self.job.precision == "fp32":
            parameters.type_k = parameters.type_v = 0  # GGML_TYPE_F32
        self.context = self.api.llama_init_from_model(self.model, parameters)
        if not self.context:
            raise RuntimeError(f"llama.cpp cannot make a context with {self.setting}")
        self.texts = texts

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> None:
        """One pass over (token, position, text, whether its logits are wanted)."""
        batch = self.batch
        batch.n_tokens = len(rows)
        for index, (token, position, text, wanted) in enumerate(rows):
            batch.token[index] = token
            batch.pos[index] = position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = text
            batch.logits[index] = wanted
        status = self.api.llama_decode(self.context, batch)
        if status:
            raise RuntimeError(f"llama_decode gave {status}")

    def _row(self, index: int) -> Any:
        import numpy as np

        pointer = self.api.llama_get_logits_ith(self.context, index)
        return np.ctypeslib.as_array(pointer, shape=(self.job.shape.vocab_size,))

    def _read(self, prompts: Prompts) -> list[int]:
        """Read whole texts, as many at a time as a pass holds; the likeliest token of each."""
        drawn: list[int] = []
        last = len(prompts[0]) - 1
        at_once = max(1, self.job.shape.n_ctx // (last + 1))
        for first in range(0, len(prompts), at_once):
            some = prompts[first : first + at_once]
            self._decode(
                [
                    (token, position, first + text, position == last)
                    for text, prompt in enumerate(some)
                    for position, token in enumerate(prompt)
                ]
            )
            drawn += [
                int(self._row(text * (last + 1) + last).argmax()) for text in range(len(some))
            ]
        return drawn

    def generate(self, prompts: Prompts, new: int) -> Run:
        """See `contract.Engine`."""
        self._open_context(len(prompts))
        start = time.perf_counter()
        drawn = [self._read(prompts)]
        first = time.perf_counter() - start
        for past in range(len(prompts[0]), len(prompts[0]) + new - 1):
            self._decode([(token, past, text, True) for text, token in enumerate(drawn[-1])])
            drawn.append([int(self._row(text).argmax()) for text in range(len(prompts))])
        total = time.perf_counter() - start
        return Run([list(tokens) for tokens in zip(*drawn, strict=True)], first, total)

    def logits(self, tokens: list[int]) -> list[float]:
        """See `contract.Engine`."""
        self._open_context(1)
        self._read([tokens])
        row: list[float] = self._row(len(tokens) - 1).tolist()
        return row
