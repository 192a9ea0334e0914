"""What each torch op requires of its arguments, and the shapes of its results.

These run in place of the kernels when tensors have no data: under fake tensors, on the meta device
and while `torch.compile` traces. The native module makes the same checks on real tensors, and
both raise `ParameterError` in the same words. Names, arguments and shapes are those of
`gpt2_fast.ops`, letters as in `gpt2_fast.reference`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .errors import ParameterError

if TYPE_CHECKING:
    from collections.abc import Sequence


class _Checks:
    """Names the op in the messages, and holds every tensor to one device.

    Attributes:
        floats: the types of values there.
        factors: the types of what is multiplied there.
    """

    def __init__(self, op: str, device: torch.device) -> None:
        self.op, self.device = op, device
        cuda = device.type == "cuda"
        halves: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16)
        self.floats = (torch.float32, *(halves if cuda else halves[1:]))
        self.factors = halves if cuda else self.floats

    def tensor(
        self,
        name: str,
        tensor: Tensor,
        shape: Sequence[int] | None,
        dtypes: Sequence[torch.dtype] = (torch.float32,),
        like: str = "",
    ) -> None:
        """Require a shape (None: any), one of some dtypes, the device, and contiguity."""
        if tensor.device != self.device:
            self.fail(name, f"be on {self.device}", str(tensor.device))
        if not tensor.is_contiguous():
            strides = _show(tensor.stride())
            self.fail(name, "be contiguous", f"shape {_show(tensor.shape)} with strides {strides}")
        if tensor.dtype not in dtypes:
            wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            suffix = f" like {like}" if like else ""
            self.fail(name, f"be {wanted}{suffix}", str(tensor.dtype).removeprefix("torch."))
        if shape is not None and tuple(tensor.shape) != tuple(shape):
            self.fail(name, f"have shape {_show(shape)}", _show(tensor.shape))

    def rank(self, name: str, tensor: Tensor, rank: int) -> None:
        """Require so many axes."""
        if tensor.ndim != rank:
            self.fail(name, f"have {rank} dimensions", f"shape {_show(tensor.shape)}")

    def rows(self, name: str, tensor: Tensor, dtypes: Sequence[torch.dtype]) -> None:
        """Require rows of any number of axes."""
        self.tensor(name, tensor, None, dtypes)
        if tensor.ndim == 0:
            self.fail(name, "have at least 1 dimensions", "shape ()")

    def fail(self, name: str, wanted: str, got: str) -> None:
        """Raise the error."""
        raise ParameterError(f"{self.op}: {name} must {wanted}, got {got}")


def _show(shape: Sequence[object]) -> str:
    return "(" + ", ".join(str(size) for size in shape) + ")"


def _check_layernorm(op: str, name: str, x: Tensor, weight: Tensor, bias: Tensor) -> _Checks:
    check = _Checks(op, x.device)
    check.rows(name, x, check.floats)
    check.tensor("weight", weight, x.shape[-1:])
    check.tensor("bias", bias, x.shape[-1:])
    return check


def layernorm(x: Tensor, weight: Tensor, bias: Tensor, _eps: float) -> Tensor:
    _check_layernorm("layernorm", "x", x, weight, bias)
    return x.new_empty(x.shape)


def add_layernorm(
    residual: Tensor, delta: Tensor, weight: Tensor, bias: Tensor, _eps: float
) -> tuple[Tensor, Tensor]:
    check = _check_layernorm("add_layernorm", "residual", residual, weight, bias)
    check.tensor("delta", delta, residual.shape, (residual.dtype,), like="residual")
    return residual.new_empty(residual.shape), residual.new_empty(residual.shape)


def add_layernorm_(
    residual: Tensor, delta: Tensor, weight: Tensor, bias: Tensor, _eps: float
) -> Tensor:
    check = _check_layernorm("add_layernorm", "residual", residual, weight, bias)
    check.tensor("delta", delta, residual.shape, (residual.dtype,), like="residual")
    return residual.new_empty(residual.shape)


def gelu(x: Tensor) -> Tensor:
    check = _Checks("gelu", x.device)
    check.tensor("x", x, None, check.floats)
    return x.new_empty(x.shape)


def embed(tokens: Tensor, positions: Tensor, wte: Tensor, wpe: Tensor) -> Tensor:
    check = _Checks("embed", wte.device)
    check.rank("tokens", tokens, 1)
    check.tensor("tokens", tokens, None, (torch.int64,))
    check.tensor("positions", positions, tokens.shape, (torch.int64,))
    check.rank("wte", wte, 2)
    check.tensor("wte", wte, None, check.floats)
    check.rank("wpe", wpe, 2)
    check.tensor("wpe", wpe, (wpe.shape[0], wte.shape[1]), (wte.dtype,), like="wte")
    return wte.new_empty((tokens.shape[0], wte.shape[1]))


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, _gelu: bool
) -> Tensor:
    check = _Checks("linear", x.device)
    check.rows("x", x, check.factors)
    check.rank("weight", weight, 2)
    outputs = weight.shape[0]
    check.tensor("weight", weight, (outputs, x.shape[-1]), (x.dtype,), like="x")
    shape = (*x.shape[:-1], outputs)
    if bias is not None:
        check.tensor("bias", bias, (outputs,))
    if residual is not None:
        check.tensor("residual", residual, shape, (x.dtype,), like="x")
    return x.new_empty(shape)


def attention_prefill(q: Tensor, k: Tensor, v: Tensor, _scale: float) -> Tensor:
    check = _Checks("attention_prefill", q.device)
    check.rank("q", q, 4)
    check.tensor("q", q, None, check.factors)
    check.rank("k", k, 4)
    check.tensor("k", k, (*q.shape[:2], k.shape[2], q.shape[3]), (q.dtype,), like="q")
    check.tensor("v", v, k.shape, (q.dtype,), like="q")
    if k.shape[2] < q.shape[2]:
        wanted = "have at least as many positions as q has queries"
        check.fail("k", wanted, f"{k.shape[2]} for {q.shape[2]}")
    return q.new_empty(q.shape)


def attention_decode(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, _scale: float) -> Tensor:
    check = _Checks("attention_decode", q.device)
    check.rank("q", q, 3)
    check.tensor("q", q, None, check.factors)
    check.rank("k", k, 4)
    check.tensor("k", k, (*q.shape[:2], k.shape[2], q.shape[2]), (q.dtype,), like="q")
    check.tensor("v", v, k.shape, (q.dtype,), like="q")
    check.tensor("lengths", lengths, q.shape[:1], (torch.int32,))
    return q.new_empty(q.shape)


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    _openai_top_p: bool,
    seeds: Tensor,
    samples: Tensor,
    positions: Tensor,
) -> tuple[Tensor, Tensor]:
    check = _Checks("sample", logits.device)
    check.rank("logits", logits, 2)
    check.tensor("logits", logits, None)
    rows = logits.shape[:1]
    check.tensor("temperature", temperature, rows)
    check.tensor("top_k", top_k, rows, (torch.int32,))
    check.tensor("top_p", top_p, rows)
    check.tensor("min_p", min_p, rows)
    for name, tensor in (("seeds", seeds), ("samples", samples), ("positions", positions)):
        check.tensor(name, tensor, rows, (torch.int64,))
    return seeds.new_empty(rows), logits.new_empty(rows)
