"""ONNX Runtime's processor provider, with its cache bound in place."""

from __future__ import annotations

import logging
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

LABEL = "ONNX Runtime"
PACKAGES = ("onnxruntime", "onnx")
PRECISIONS = {
    "fp32": Format("float32", 4, 4),
    "int8": Format("MatMulInteger, a scale per column, or MatMulNBits, a scale per 32", 1, 4),
    "int4": Format("MatMulNBits, a scale per 32 inputs", 0.5 + 4 / 32, 4),
}
_KINDS = {"fp32": ("float",), "int8": ("MatMulInteger", "MatMulNBits"), "int4": ("MatMulNBits",)}


def missing(precision: str) -> str | None:
    """See `contract.Peer`."""
    del precision
    return absent("onnxruntime", "onnx", "safetensors")


def _file(job: Job, precision: str, kind: str) -> Path:
    return job.folder / "onnx_runtime" / f"{precision}-{kind}" / "model.onnx"


def _save(model: Any, folder: Path) -> None:
    """With the weights beside it: a protobuf message ends at 2 GB."""
    import onnx

    folder.mkdir(exist_ok=True)
    onnx.save(
        model,
        str(folder / "model.onnx"),
        save_as_external_data=True,
        all_tensors_to_one_file=True,
        location="weights.bin",
    )


def _quantise(plain: Path, folder: Path, precision: str, kind: str) -> None:
    import onnx

    logging.getLogger("onnxruntime.quantization").setLevel(logging.WARNING)
    folder.mkdir()
    if kind == "MatMulInteger":
        from onnxruntime.quantization import QuantType, quantize_dynamic

        quantize_dynamic(
            str(plain),
            str(folder / "model.onnx"),
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=True,
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
        )
        return
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(
        onnx.load(str(plain)),
        bits=8 if precision == "int8" else 4,
        block_size=32,
        is_symmetric=True,
        accuracy_level=4,  # products of int8 inputs: its fastest
    )
    quantizer.process()
    _save(quantizer.model.model, folder)


def prepare(job: Job) -> None:
    """Write its models."""
    from benchmarks.peers import onnx_graph

    def write(target: Path) -> None:
        _save(onnx_graph.model(job.shape, read_weights(job.folder)), target)

    plain = once(_file(job, "fp32", "float").parent, write) / "model.onnx"
    for kind in _KINDS[job.precision]:

        def make(target: Path, kind: str = kind) -> None:
            _quantise(plain, target, job.precision, kind)

        once(_file(job, job.precision, kind).parent, make)


class Engine:
    """See the module."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.settings = [
            f"{count}, {kind}"
            for count in thread_settings(job.threads)
            for kind in _KINDS[job.precision]
        ]
        self.sessions: dict[str, Any] = {}
        self.session: Any = None
        self.caches: dict[int, dict[str, Any]] = {}
        self.rows: Any = None

    def use(self, setting: str) -> None:
        """A number of threads and a kind of product: a session of its own."""
        import onnxruntime

        require(setting, self.settings)
        if setting not in self.sessions:
            self.sessions.clear()
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads_of(setting)
            options.inter_op_num_threads = 1
            options.log_severity_level = 3
            name = _file(self.job, self.job.precision, setting.rsplit(maxsplit=1)[1])
            self.sessions[setting] = onnxruntime.InferenceSession(
                str(name), options, providers=["CPUExecutionProvider"]
            )
        self.session = self.sessions[setting]

    def _cache(self, batch: int) -> dict[str, Any]:
        """Keys and values of every layer for that many texts of full length."""
        import numpy as np
        import onnxruntime

        if batch not in self.caches:
            self.caches.clear()
            shape = self.job.shape
            sizes = (batch, shape.n_head, shape.n_ctx, shape.head_size)
            self.caches[batch] = {
                f"{layer}.{part}": onnxruntime.OrtValue.ortvalue_from_numpy(
                    np.zeros(sizes, np.float32)
                )
                for layer in range(shape.n_layer)
                for part in ("key", "value")
            }
        return self.caches[batch]

    def _bind(self, batch: int) -> Any:
        """New keys and values go where the old ones are."""
        import numpy as np
        import onnxruntime

        binding = self.session.io_binding()
        for name, value in self._cache(batch).items():
            binding.bind_ortvalue_input(f"past.{name}", value)
            binding.bind_ortvalue_output(f"present.{name}", value)
        rows = np.empty((batch, self.job.shape.vocab_size), np.float32)
        self.rows = onnxruntime.OrtValue.ortvalue_from_numpy(rows)
        binding.bind_ortvalue_output("logits", self.rows)
        return binding

    def _step(self, binding: Any, tokens: Any, past: int) -> Any:
        """(B, T) new tokens behind `past` cached ones -> (B, V) logits of the last."""
        import numpy as np

        batch, new = tokens.shape
        end = past + new
        places = np.broadcast_to(np.arange(past, end, dtype=np.int64), tokens.shape)
        binding.bind_cpu_input("input_ids", tokens)
        binding.bind_cpu_input("position_ids", np.ascontiguousarray(places))
        binding.bind_cpu_input("seqlens_k", np.full(batch, end - 1, np.int32))
        binding.bind_cpu_input("total_sequence_length", np.array(end, np.int32))
        self.session.run_with_iobinding(binding)
        return self.rows.numpy()

    def generate(self, prompts: Prompts, new: int) -> Run:
        """See `contract.Engine`."""
        import numpy as np

        ids = np.array(prompts, np.int64)
        binding = self._bind(len(prompts))
        start = time.perf_counter()
        drawn = [self._step(binding, ids, 0).argmax(-1)]
        first = time.perf_counter() - start
        for past in range(ids.shape[1], ids.shape[1] + new - 1):
            drawn.append(self._step(binding, drawn[-1][:, None], past).argmax(-1))
        total = time.perf_counter() - start
        return Run(np.stack(drawn, 1).tolist(), first, total)

    def logits(self, tokens: list[int]) -> list[float]:
        """See `contract.Engine`."""
        import numpy as np

        row: list[float] = self._step(self._bind(1), np.array([tokens], np.int64), 0)[0].tolist()
        return row
