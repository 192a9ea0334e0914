"""What bench_ops.py runs: every kernel at the shapes of GPT-2 124M, with bytes and the truth.

A case gives random float32 inputs; ours, through `_C`, for numpy arrays or torch tensors; the best
way torch has to do the same work; and the formula in numpy, which is the truth in float64 and a
stand-in for torch in float32. Shapes: B sequences, T new tokens, S cached, R rows, C width, H
heads, D head size, I inner width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from gpt2_fast import _C

Arrays = dict[str, Any]
C, H, D, I, V, N_CTX, EPS = 768, 12, 64, 3072, 50257, 1024, 1e-5  # noqa: E741
SCALE = D**-0.5
PREFILL = 512


@dataclass(frozen=True)
class Case:
    """One kernel at one shape.

    Attributes:
        op, shape: its name and what the shape is of.
        inputs: makes float32 (or integer) arrays by name.
        ours: runs the kernel; the last argument is the output, or None.
        torch: the same for torch tensors.
        truth: the same in numpy, in the type of its inputs.
        out: which input has the output's shape, and that shape.
        moved: inputs read once; the output is written once on top.
        cold: inputs that in a model come from memory, not from a cache: weights, keys, values.
        flops: operations, where they and not the bytes may be the limit.
        in_place: `ours` and `torch` change an input.
    """

    op: str
    shape: str
    inputs: Callable[[], Arrays]
    ours: Callable[[Arrays, Any], None]
    torch: Callable[[Arrays], Any]
    truth: Callable[[Arrays], Any]
    out: tuple[int, ...]
    moved: Callable[[Arrays], int] = lambda a: sum(x.nbytes for x in a.values())
    cold: tuple[str, ...] = ()
    flops: float = 0.0
    in_place: bool = False

    @property
    def name(self) -> str:
        """For test ids."""
        return f"{self.op}-{self.shape}"


def normal(*shape: int, seed: int = 0) -> Any:
    """Standard normal float32."""
    return np.random.Generator(np.random.SFC64(seed)).standard_normal(shape, dtype=np.float32)


def vector(size: int, seed: int = 0) -> Any:
    """(size,) float32 that bfloat16 holds exactly: biases lose nothing when torch narrows them."""
    bits = normal(size, seed=seed).view(np.uint32) & np.uint32(0xFFFF0000)
    return bits.view(np.float32)


@cache
def embedding() -> Any:
    """(V, C), made once: it takes 154 MB."""
    return normal(V, C, seed=9)


# Layer norm.


def _norm_inputs(rows: int) -> Arrays:
    return {"x": normal(rows, C), "weight": vector(C, 1), "bias": vector(C, 2)}


def _norm(x: Any, weight: Any, bias: Any) -> Any:
    centred = x - x.mean(-1, keepdims=True)
    variance = (centred * centred).mean(-1, keepdims=True)
    return centred / np.sqrt(variance + EPS) * weight + bias


def _torch_norm(a: Arrays) -> Any:
    import torch.nn.functional as F

    return F.layer_norm(a["x"], (C,), a["weight"], a["bias"], EPS)


def _torch_add_norm(a: Arrays) -> Any:
    a["x"].add_(a["delta"])
    return _torch_norm(a)


def _norms(rows: int, shape: str) -> list[Case]:
    return [
        Case(
            "layernorm",
            shape,
            lambda: _norm_inputs(rows),
            lambda a, out: _C.layernorm(a["x"], a["weight"], a["bias"], EPS, out),
            _torch_norm,
            lambda a: _norm(a["x"], a["weight"], a["bias"]),
            (rows, C),
        ),
        Case(
            "add_layernorm",
            shape,
            lambda: _norm_inputs(rows) | {"delta": normal(rows, C, seed=3)},
            lambda a, out: _C.add_layernorm(a["x"], a["delta"], a["weight"], a["bias"], EPS, out),
            _torch_add_norm,
            lambda a: _norm(a["x"] + a["delta"], a["weight"], a["bias"]),
            (rows, C),
            # the residual is read and written
            moved=lambda a: sum(x.nbytes for x in a.values()) + a["x"].nbytes,
            in_place=True,
        ),
    ]


# Products.


def _gelu(x: Any) -> Any:
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _torch_gelu(x: Any) -> Any:
    import torch.nn.functional as F

    return F.gelu(x, approximate="tanh")


def _torch_linear(a: Arrays, gelu: bool) -> Any:
    import torch.nn.functional as F

    out = F.linear(a["x"], a["weight"], a.get("narrow_bias"))
    if gelu:
        out = F.gelu(out, approximate="tanh")
    return out.add_(a["residual"]) if "residual" in a else out


def _linear(a: Arrays, gelu: bool) -> Any:
    out = a["x"] @ a["weight"].T
    if "bias" in a:
        out = out + a["bias"]
    if gelu:
        out = _gelu(out)
    return out + a["residual"] if "residual" in a else out


def _product(
    name: str,
    rows: int,
    inputs: int,
    outputs: int,
    extra: Callable[[], Arrays] = dict,
    *,
    gelu: bool = False,
) -> Case:
    def weight() -> Any:
        return embedding() if outputs == V else 0.02 * normal(outputs, inputs, seed=1)

    return Case(
        "linear",
        name,
        lambda: {"x": normal(rows, inputs), "weight": weight()} | extra(),
        lambda a, out: _C.linear(a["x"], a["weight"], a.get("bias"), a.get("residual"), gelu, out),
        lambda a: _torch_linear(a, gelu),
        lambda a: _linear(a, gelu),
        (rows, outputs),
        cold=("weight",),
        flops=2.0 * rows * inputs * outputs,
    )


def _products(rows: int, shape: str) -> list[Case]:
    return [
        Case(
            "gelu",
            shape,
            lambda: {"x": normal(rows, I)},
            lambda a, out: _C.gelu(a["x"], out),
            lambda a: _torch_gelu(a["x"]),
            lambda a: _gelu(a["x"]),
            (rows, I),
        ),
        _product(f"fc_{shape}", rows, C, I, lambda: {"bias": vector(I, 2)}, gelu=True),
        _product(
            f"proj_{shape}",
            rows,
            I,
            C,
            lambda: {"bias": vector(C, 2), "residual": normal(rows, C, seed=3)},
        ),
    ]


# Attention.


def _softmax(scores: Any) -> Any:
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def _causal(a: Arrays) -> Any:
    scores = a["q"] @ a["k"].swapaxes(-1, -2) * a["q"].dtype.type(SCALE)
    hidden = np.triu(np.ones((PREFILL, PREFILL), np.bool_), 1)
    return _softmax(np.where(hidden, a["q"].dtype.type(-np.inf), scores)) @ a["v"]


def _torch_causal(a: Arrays) -> Any:
    import torch.nn.functional as F

    return F.scaled_dot_product_attention(a["q"], a["k"], a["v"], is_causal=True, scale=SCALE)


def _prefill_inputs() -> Arrays:
    return {name: normal(1, H, PREFILL, D, seed=n) for n, name in enumerate("qkv")}


def _one_query(a: Arrays) -> Any:
    scores = np.einsum("bhd,bhsd->bhs", a["q"], a["k"]) * a["q"].dtype.type(SCALE)
    return np.einsum("bhs,bhsd->bhd", _softmax(scores), a["v"])


def _torch_one_query(a: Arrays) -> Any:
    import torch.nn.functional as F

    q = a["q"][:, :, None]
    return F.scaled_dot_product_attention(q, a["k"], a["v"], scale=SCALE)[:, :, 0]


def _decode_inputs(batch: int, cached: int) -> Arrays:
    return {
        "q": normal(batch, H, D),
        "k": normal(batch, H, cached, D, seed=1),
        "v": normal(batch, H, cached, D, seed=2),
        "lengths": np.full(batch, cached, np.int32),  # equal: torch needs no mask and no loop
    }


def _attention_decode(batch: int, cached: int) -> Case:
    return Case(
        "attention_decode",
        f"batch{batch}_context{cached}",
        lambda: _decode_inputs(batch, cached),
        lambda a, out: _C.attention_decode(a["q"], a["k"], a["v"], a["lengths"], SCALE, out),
        _torch_one_query,
        _one_query,
        (batch, H, D),
        cold=("k", "v"),
    )


def _attention_prefill() -> Case:
    return Case(
        "attention_prefill",
        "prefill",
        _prefill_inputs,
        lambda a, out: _C.attention_prefill(a["q"], a["k"], a["v"], SCALE, out),
        _torch_causal,
        _causal,
        (1, H, PREFILL, D),
        flops=2.0 * 2 * H * D * PREFILL * (PREFILL + 1) / 2,
    )


# Embedding.


def _embed_inputs(rows: int) -> Arrays:
    table = normal(4096, C, seed=5)  # the rows asked are the same each time: its size is no matter
    ids = np.random.default_rng(4).integers(0, len(table), rows, dtype=np.int64)
    positions = np.arange(rows, dtype=np.int64) + (N_CTX // 2 - 1)
    return {"tokens": ids, "positions": positions, "wte": table, "wpe": normal(N_CTX, C)}


def _torch_embed(a: Arrays) -> Any:
    import torch.nn.functional as F

    return F.embedding(a["tokens"], a["wte"]).add_(F.embedding(a["positions"], a["wpe"]))


def _embed(rows: int, shape: str) -> Case:
    return Case(
        "embed",
        shape,
        lambda: _embed_inputs(rows),
        lambda a, out: _C.embed(a["tokens"], a["positions"], a["wte"], a["wpe"], out),
        _torch_embed,
        lambda a: a["wte"][a["tokens"]] + a["wpe"][a["positions"]],
        (rows, C),
        moved=lambda a: 2 * rows * (C * a["wte"].itemsize + 8),
    )


def op_cases() -> list[Case]:
    """Every kernel but `sample`, at decode and prefill shapes."""
    cases: list[Case] = []
    for rows, shape in ((1, "decode"), (PREFILL, "prefill")):
        cases += [*_norms(rows, shape), *_products(rows, shape), _embed(rows, shape)]
    cases.append(_product("head_decode", 1, C, V))
    cases += [_attention_decode(1, 32), _attention_decode(1, 896), _attention_decode(8, 896)]
    cases.append(_attention_prefill())
    return sorted(cases, key=lambda case: case.name)
