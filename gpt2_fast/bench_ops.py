"""Every torch op against float64 on one device, and its time beside torch's.

Imported only where torch is. Shapes are those of one layer of the model that is measured; what a
model reads from memory (weights, keys, values) comes from memory here too: calls go round copies
that together exceed any cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from . import ops, reference
from .bench_report import busy_time
from .bench_torch import DTYPES

if TYPE_CHECKING:
    from .bench_report import Kernel
    from .config import GPT2Config

COLD_BYTES = 256 << 20  # more than the last cache of any device
CALLS = 40


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    Attributes:
        op, shape: its name in `ops` and `reference`, and what the shape is of.
        args: its arguments; float matrices get the dtype under test, float vectors stay float32.
        peer: the best plain torch for the same arguments, or None.
        cold: numbers of the arguments that a model reads from memory.
    """

    op: str
    shape: str
    args: tuple[Any, ...]
    peer: Callable[..., Any] | None = None
    cold: tuple[int, ...] = ()

    def on(self, device: torch.device, dtype: torch.dtype) -> list[Any]:
        """The arguments there and in that dtype."""
        given = []
        for arg in self.args:
            moved = arg.to(device) if isinstance(arg, torch.Tensor) else arg
            if isinstance(moved, torch.Tensor) and moved.is_floating_point() and moved.ndim > 1:
                moved = moved.to(dtype)
            given.append(moved)
        return given


def _normal(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _vector(size: int, seed: int) -> torch.Tensor:
    """float32 that bfloat16 holds exactly, so that torch loses nothing when it narrows it."""
    return _normal(size, seed=seed).bfloat16().float()


def _torch_linear(x: Any, weight: Any, bias: Any, residual: Any, gelu: bool) -> Any:
    out = F.linear(x, weight, bias)
    out = F.gelu(out, approximate="tanh") if gelu else out
    return out if residual is None else out + residual


def _torch_norm(x: Any, weight: Any, bias: Any, eps: float = 1e-5) -> Any:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _torch_decode(q: Any, k: Any, v: Any, lengths: Any, scale: float) -> Any:
    del lengths  # all keys: what is timed has no shorter sequence
    return F.scaled_dot_product_attention(q.unsqueeze(2), k, v, scale=scale).squeeze(2)


def cases(config: GPT2Config, rows: int) -> list[Case]:
    """Every op but `sample`, for `rows` rows of a decode step and for one prompt."""
    c, inner, heads = config.n_embd, config.inner_size, config.n_head
    size, keys, scale = config.head_size, config.n_ctx, config.head_size**-0.5
    made = []
    for count, where in ((rows, "decode"), (min(512, keys), "prompt")):
        x, wide = _normal(count, c, seed=1), _normal(count, inner, seed=2)
        norm = (x, _vector(c, 3), _vector(c, 4))
        fc = (x, _normal(inner, c, seed=5, scale=0.02), _vector(inner, 6), None, True)
        proj = (wide, _normal(c, inner, seed=7, scale=0.02), _vector(c, 8), x, False)
        made += [
            Case("layernorm", where, norm, _torch_norm),
            Case("add_layernorm", where, (x, _normal(count, c, seed=9), *norm[1:])),
            Case("gelu", where, (wide,), lambda x: F.gelu(x, approximate="tanh")),
            Case("linear", f"{where}, fc", fc, _torch_linear, (1,)),
            Case("linear", f"{where}, projection", proj, _torch_linear, (1,)),
        ]
    k, v = (_normal(rows, heads, keys, size, seed=seed) for seed in (10, 11))
    lengths = torch.full((rows,), keys, dtype=torch.int32)
    decode = (_normal(rows, heads, size, seed=12), k, v, lengths, scale)
    made.append(Case("attention_decode", f"{keys} keys", decode, _torch_decode, (1, 2)))
    q, k, v = (_normal(1, heads, min(512, keys), size, seed=seed) for seed in (13, 14, 15))
    made.append(
        Case(
            "attention_prefill",
            "prompt",
            (q, k, v, scale),
            lambda q, k, v, scale: F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scale
            ),
        )
    )
    ids = torch.arange(rows, dtype=torch.int64)
    tables = (_normal(config.vocab_size, c, seed=16), _normal(keys, c, seed=17))
    return [
        *made,
        Case(
            "embed",
            "decode",
            (ids * 7 % config.vocab_size, ids % keys, *tables),
            lambda tokens, positions, wte, wpe: wte[tokens] + wpe[positions],
        ),
    ]


def _first(out: Any) -> list[torch.Tensor]:
    return list(out) if isinstance(out, tuple) else [out]


def check(case: Case, device: torch.device, precision: str) -> dict[str, Any]:
    """Run one op and hold it to the accuracy rule of docs/numerics.md.

    Returns:
        `error`, the largest distance from float64; `bound`, twice torch's own in the same dtype
        plus one rounding; and `passed`.
    """
    dtype = DTYPES[precision]
    given = case.on(device, dtype)
    doubled = [
        a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in given
    ]
    function = getattr(reference, case.op)
    worst: dict[str, Any] = {"error": 0.0, "bound": 0.0, "passed": True}
    parts = (getattr(ops, case.op)(*given), function(*given), function(*doubled))
    for ours, theirs, truth in zip(*map(_first, parts), strict=True):
        error = float((ours.double() - truth).abs().max())
        floor = torch.finfo(dtype).eps * float(truth.abs().max())
        bound = 2 * float((theirs.double() - truth).abs().max()) + floor
        passed = error <= bound and ours.dtype == dtype  # NaN fails too
        if not passed or error >= worst["error"]:
            worst = {"error": error, "bound": bound, "passed": passed and worst["passed"]}
    return {"op": case.op, "shape": case.shape, "precision": precision, **worst}


def check_sample(config: GPT2Config, device: torch.device) -> dict[str, Any]:
    """Tokens of `sample` are those of the definition; log-probabilities are as near as float32."""
    rows = 6
    logits = _normal(rows, config.vocab_size, seed=18, scale=3.0)
    ids = torch.arange(rows, dtype=torch.int64)
    given: tuple[Any, ...] = (
        logits,
        torch.tensor([0.0, 1.0, 0.8, 0.8, 1.0, 0.7]),
        torch.tensor([0, 0, 40, 0, 0, 5], dtype=torch.int32),
        torch.tensor([1.0, 1.0, 1.0, 0.9, 1.0, 0.95]),
        torch.tensor([0.0, 0.0, 0.0, 0.0, 0.02, 0.0]),
        False,
        ids,
        ids,
        ids,
    )
    truth, exact = reference.sample(*given)
    there: list[Any] = [a.to(device) if isinstance(a, torch.Tensor) else a for a in given]
    tokens, logprobs = (out.cpu() for out in ops.sample(*there))
    error = float((logprobs.double() - exact.double()).abs().max())
    bound = 2**-20 * float(logits.abs().max())
    return {
        "op": "sample",
        "shape": f"{rows} rows",
        "precision": "fp32",
        "error": error,
        "bound": bound,
        "passed": torch.equal(tokens, truth) and error <= bound,
    }


def check_all(config: GPT2Config, device: torch.device, precisions: list[str]) -> Any:
    """A finding of every op in every precision."""
    found = [check(case, device, p) for p in precisions for case in cases(config, 2)]
    return [*found, check_sample(config, device)]


def _nbytes(values: list[Any]) -> int:
    return sum(v.numel() * v.element_size() for v in values if isinstance(v, torch.Tensor))


def _narrowed(given: list[Any], dtype: torch.dtype) -> list[Any]:
    """The arguments as torch's functions want them: vectors in the dtype of the rest."""
    return [
        a.to(dtype) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in given
    ]


def _turns(case: Case, given: list[Any]) -> list[list[Any]]:
    """The arguments several times, those that are cold each time in other memory."""
    size = _nbytes([given[i] for i in case.cold])
    more = -(-COLD_BYTES // size) if size else 0
    copies = [
        [a.clone() if i in case.cold else a for i, a in enumerate(given)] for _ in range(more)
    ]
    return [given, *copies]


def time_ops(
    config: GPT2Config,
    device: torch.device,
    precision: str,
    kernels_of: Callable[[Callable[[], Any]], list[Kernel]],
) -> list[dict[str, Any]]:
    """Time on the device of each op and of torch's, per call.

    Args:
        config, device, precision: what of and where.
        kernels_of: runs a function and gives the kernels it ran.
    """
    found = []
    for case in cases(config, 1):
        given = case.on(device, DTYPES[precision])
        entry: dict[str, Any] = {"op": case.op, "shape": case.shape, "precision": precision}
        for name, function in (("gpt2_fast", getattr(ops, case.op)), ("torch", case.peer)):
            if function is None:
                continue
            mine = given if name == "gpt2_fast" else _narrowed(given, DTYPES[precision])
            function(*mine)  # loads it
            going = cycle(_turns(case, mine))
            kernels = kernels_of(lambda f=function, g=going: [f(*next(g)) for _ in range(CALLS)])  # type: ignore[misc]
            entry[f"{name}_us"] = busy_time(kernels) / CALLS
        read = [a for a in given if case.op != "embed" or not isinstance(a, torch.Tensor)]
        moved = _nbytes(read) + _nbytes(_first(getattr(ops, case.op)(*given)))
        entry["bytes"] = moved
        found.append(entry)
    return found
