"""The whole engine against numpy in float64: logits of the built-in model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from . import _C
from . import numpy_reference as reference
from .bfloat16 import round_to_bfloat16
from .config import GPT2Config
from .device import PRECISIONS
from .kernel_check import Case
from .numpy_reference import Arithmetic, Array

_TOKENS, _READ_AT_ONCE = 24, 19


def engine_cases() -> Iterator[Case]:
    """A forward pass in each precision: in one pass, and again token by token at the end.

    Outputs are the logits of the one pass, and how many of the others differ in any bit.
    """
    config, stored = _builtin()
    tokens = np.random.Generator(np.random.PCG64(2019)).integers(config.vocab_size, size=_TOKENS)
    for precision in PRECISIONS["cpu"]:
        parameters = stored
        if precision != "fp32":  # vectors stay in float32, as in the engine
            parameters = {n: round_to_bfloat16(a) if a.ndim == 2 else a for n, a in stored.items()}
        if precision.startswith("int"):
            parameters |= dequantized(stored, precision)

        def run(isa: str, threads: int, precision: str = precision) -> list[Array]:
            engine = _C.Engine(config.to_dict(), precision, isa, threads, 2)
            for name, array in stored.items():
                engine.load(name, array, "F32")
            once = _logits(engine, tokens, [_TOKENS])
            pieces = _logits(engine, tokens, [_READ_AT_ONCE] + [1] * (_TOKENS - _READ_AT_ONCE))
            differing = np.sum(once.view(np.uint32) != pieces.view(np.uint32))
            return [once, np.array([differing])]

        def expected(how: Arithmetic, parameters: dict[str, Array] = parameters) -> list[Array]:
            return [reference.gpt2(how, config, parameters, tokens), np.zeros(1)]

        yield Case("whole model", precision, run, expected)


def dequantized(parameters: Mapping[str, Array], precision: str) -> dict[str, Array]:
    """The matrices that the engine quantises, as what their integers and scales stand for."""
    out = {}
    for name, array in parameters.items():
        if array.ndim != 2 or name == "wpe.weight":
            continue
        by_outputs = name in {"wte.weight", "lm_head.weight"}
        if name == "wte.weight" and "lm_head.weight" in parameters:
            continue
        weights = np.ascontiguousarray(array if by_outputs else array.T, np.float32)
        q, bits = _C.quantize(weights, precision)
        scales = (bits.astype(np.uint32) << 16).view(np.float32)
        groups = q.reshape(*scales.shape, -1) * scales[:, :, None]
        back = groups.reshape(len(weights), -1)[:, : weights.shape[1]]
        out[name] = back if by_outputs else back.T
    return out


def _builtin() -> tuple[GPT2Config, dict[str, Array]]:
    from .checkpoints import open_checkpoint
    from .checkpoints.hub import resolve

    with open_checkpoint(resolve("builtin")) as checkpoint:
        return checkpoint.config, {n: view.float32() for n, view in checkpoint.tensors.items()}


def _logits(engine: _C.Engine, tokens: Array, counts: list[int]) -> Array:
    """Logits of all tokens, fed in passes of `counts` tokens."""
    sequence = engine.open()
    parts, start = [], 0
    for count in counts:
        chunk = tokens[start : start + count].tolist()
        parts += engine.step([(sequence, chunk, "all")])
        start += count
    engine.close(sequence)
    return np.concatenate(parts)
