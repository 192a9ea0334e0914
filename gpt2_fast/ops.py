"""Every kernel as a torch op: `gpt2_fast.ops.layernorm(x, weight, bias)` and so on.

The same names and arguments as `gpt2_fast.reference`, over the native module: for CPU tensors of
float32 or bfloat16, and in a CUDA build for CUDA tensors of bfloat16 or float16 (and float32 where
nothing is multiplied: layernorm, add_layernorm, gelu, embed, sample). Results are allocated here;
only the op whose name ends in an underscore changes an argument. The ops are registered in the
namespace `torch.ops.gpt2_fast`, know their shapes under fake tensors, and so work under
`torch.compile(fullgraph=True)`. They have no backward.

On the CPU the instruction set and the number of threads are those of
`gpt2_fast._C.set_op_backend`; they never change a bit of a result. On CUDA an op runs on torch's
current stream, takes its scratch memory from torch, and waits for nothing. It therefore cannot look
at values: an id of `embed` that is out of range gives a row of NaN, parameters of `sample` that are
give -1 and NaN, and a length of `attention_decode` is taken as the nearest in range.

Every op raises `ParameterError` (a `ValueError`) that names the op, the argument, what was wanted
and what came. All tensors must be contiguous. Shapes are written as in `gpt2_fast.reference`.
"""

from __future__ import annotations

from inspect import signature
from typing import TYPE_CHECKING, Any

try:
    import torch
    from torch import Tensor
except ImportError as error:
    raise ImportError("gpt2_fast.ops needs PyTorch; install it with: pip install torch") from error

from . import _C, _op_shapes
from .errors import ParameterError

if TYPE_CHECKING:
    from collections.abc import Callable


def layernorm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Layer-normalise the last axis.

    out = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias, with the biased variance.

    Args:
        x: (..., C) a float type of its device (see the module), contiguous.
        weight, bias: (C,) float32.
        eps: added to the variance, in squared units of x. GPT-2 uses 1e-5.

    Returns:
        (..., C), dtype of `x`.

    Raises:
        ParameterError: a shape, dtype or device differs from the above.

    Source: Ba et al. 2016, arXiv:1607.06450, eq. 3-4.
    """
    out: Tensor = torch.ops.gpt2_fast.layernorm.default(x, weight, bias, eps)
    return out


def add_layernorm(
    residual: Tensor, delta: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """h = residual + delta, and its layer norm; changes no argument.

    Args, errors: as `add_layernorm_`.

    Returns:
        h and the layer norm of h, each (..., C) of the dtype of `residual`.
    """
    out: tuple[Tensor, Tensor] = torch.ops.gpt2_fast.add_layernorm.default(
        residual, delta, weight, bias, eps
    )
    return out


def add_layernorm_(
    residual: Tensor, delta: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> Tensor:
    """Add `delta` to `residual` in place, then layer-normalise the sum.

    h = residual + delta;  out = (h - mean(h)) / sqrt(var(h) + eps) * weight + bias
    over the last axis, with the biased variance.

    Args:
        residual: (..., C) a float type of its device (see the module), contiguous; holds h on
            return.
        delta: shape and dtype of `residual`.
        weight, bias: (C,) float32.
        eps: added to the variance, in squared units of h. GPT-2 uses 1e-5.

    Returns:
        (..., C), dtype of `residual`.

    Raises:
        ParameterError: a shape, dtype or device differs from the above.

    Source: Ba et al. 2016, arXiv:1607.06450, eq. 3-4.
    """
    out: Tensor = torch.ops.gpt2_fast.add_layernorm_.default(residual, delta, weight, bias, eps)
    return out


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form: x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3))).

    Args:
        x: any shape, a float type of its device (see the module), contiguous.

    Returns:
        Shape and dtype of `x`.

    Raises:
        ParameterError: a dtype or device differs from the above.

    Source: Hendrycks & Gimpel 2016, arXiv:1606.08415, section 2; openai/gpt-2, src/model.py.
    """
    out: Tensor = torch.ops.gpt2_fast.gelu.default(x)
    return out


def embed(tokens: Tensor, positions: Tensor, wte: Tensor, wpe: Tensor) -> Tensor:
    """wte[token] + wpe[position].

    Args:
        tokens, positions: (R,) int64, in 0 .. V - 1 and 0 .. n_ctx - 1.
        wte: (V, C) a float type of its device (see the module), contiguous.
        wpe: (n_ctx, C), dtype of `wte`.

    Returns:
        (R, C), dtype of `wte`.

    Raises:
        ParameterError: a shape, dtype or device differs from the above, or an id is out of range.
    """
    out: Tensor = torch.ops.gpt2_fast.embed.default(tokens, positions, wte, wpe)
    return out


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    gelu: bool = False,
) -> Tensor:
    """x W^T + bias, then GELU if asked, then + residual if given.

    A row of the result depends on that row of `x` alone, bit for bit.

    Args:
        x: (..., K) a float type of its device (see the module), contiguous.
        weight: (N, K), dtype of `x`: one row per output, as in torch's Linear.
        bias: (N,) float32, or None.
        residual: (..., N), dtype of `x`, or None.
        gelu: apply the tanh form of GELU to the sum.

    Returns:
        (..., N), dtype of `x`. Sums are float32 and rounded once, at the end.

    Raises:
        ParameterError: a shape, dtype or device differs from the above.
    """
    out: Tensor = torch.ops.gpt2_fast.linear.default(x, weight, bias, residual, gelu)
    return out


def attention_prefill(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(q k^T * scale) v for T new queries, causal, aligned to the end of the S keys.

    Args:
        q: (B, H, T, D) a float type of its device (see the module), contiguous. Query t sees the
            keys 0 .. S - T + t.
        k, v: (B, H, S, D) with S >= T, dtype of `q`.
        scale: multiplies q.k before the softmax.

    Returns:
        (B, H, T, D), dtype of `q`; each row has the bits that `attention_decode` gives it.

    Raises:
        ParameterError: a shape, dtype or device differs from the above.

    Source: Vaswani et al. 2017, arXiv:1706.03762, eq. 1.
    """
    out: Tensor = torch.ops.gpt2_fast.attention_prefill.default(q, k, v, scale)
    return out


def attention_decode(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """Attention of one query per sequence over that sequence's own number of keys.

    Args:
        q: (B, H, D) a float type of its device (see the module), contiguous.
        k, v: (B, H, S, D), dtype of `q`; positions from `lengths` on do not matter.
        lengths: (B,) int32 in 1 .. S. Sequence b sees the keys 0 .. lengths[b] - 1.
        scale: multiplies q.k before the softmax.

    Returns:
        (B, H, D), dtype of `q`.

    Raises:
        ParameterError: a shape, dtype or device differs from the above, or a length is out of
            range.

    Source: Vaswani et al. 2017, arXiv:1706.03762, eq. 1.
    """
    out: Tensor = torch.ops.gpt2_fast.attention_decode.default(q, k, v, lengths, scale)
    return out


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    openai_top_p: bool,
    seeds: Tensor,
    samples: Tensor,
    positions: Tensor,
) -> tuple[Tensor, Tensor]:
    """Draw one token per row: argmax of logit / temperature + Gumbel noise over what is kept.

    The noise depends on (seed, sample, position, token id) and nothing else; filters run in the
    order top_k, top_p, min_p. The exact rules are those of `gpt2_fast.reference.sample`.

    Args:
        logits: (R, V) float32, contiguous.
        temperature: (R,) float32 >= 0; 0 takes the largest logit.
        top_k: (R,) int32 >= 0; 0 is off.
        top_p, min_p: (R,) float32 in 0 .. 1; 1 and 0 are off.
        openai_top_p: drop the token that crosses top_p, as OpenAI's release does, for all rows.
        seeds, samples, positions: (R,) int64.

    Returns:
        tokens (R,) int64, and logprobs (R,) float32: log softmax of the logits themselves at the
        token. A row with a NaN: -1 and NaN.

    Raises:
        ParameterError: a shape, dtype or device differs from the above.

    Source: the Gumbel-max trick, Maddison et al. 2014, arXiv:1411.0030.
    """
    out: tuple[Tensor, Tensor] = torch.ops.gpt2_fast.sample.default(
        logits, temperature, top_k, top_p, min_p, openai_top_p, seeds, samples, positions
    )
    return out


# The ops themselves: allocate, call.


def _stream(tensor: Tensor) -> tuple[int, Callable[[int], Tensor]] | None:
    """Where an op on this tensor's device runs: None, or a CUDA stream and memory in its order."""
    if not tensor.is_cuda:
        return None
    stream = torch.cuda.current_stream(tensor.device).cuda_stream
    return stream, lambda size: tensor.new_empty(size, dtype=torch.uint8)


def _layernorm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    out = x.new_empty(x.shape)
    _C.layernorm(x, weight, bias, eps, out, _stream(x))
    return out


def _add_layernorm(
    residual: Tensor, delta: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    h, out = _op_shapes.add_layernorm(residual, delta, weight, bias, eps)
    h.copy_(residual)
    _C.add_layernorm(h, delta, weight, bias, eps, out, _stream(h))
    return h, out


def _add_layernorm_(
    residual: Tensor, delta: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    out = residual.new_empty(residual.shape)
    _C.add_layernorm(residual, delta, weight, bias, eps, out, _stream(residual))
    return out


def _gelu(x: Tensor) -> Tensor:
    out = x.new_empty(x.shape)
    _C.gelu(x, out, _stream(x))
    return out


def _embed(tokens: Tensor, positions: Tensor, wte: Tensor, wpe: Tensor) -> Tensor:
    out = wte.new_empty((*tokens.shape, *wte.shape[-1:]))
    _C.embed(tokens, positions, wte, wpe, out, _stream(wte))
    return out


def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, gelu: bool
) -> Tensor:
    out = x.new_empty((*x.shape[:-1], *weight.shape[:1]))
    _C.linear(x, weight, bias, residual, gelu, out, _stream(x))
    return out


def _attention_prefill(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    out = q.new_empty(q.shape)
    _C.attention_prefill(q, k, v, scale, out, _stream(q))
    return out


def _attention_decode(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float) -> Tensor:
    out = q.new_empty(q.shape)
    _C.attention_decode(q, k, v, lengths, scale, out, _stream(q))
    return out


def _sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    openai_top_p: bool,
    seeds: Tensor,
    samples: Tensor,
    positions: Tensor,
) -> tuple[Tensor, Tensor]:
    tokens, logprobs = seeds.new_empty(logits.shape[:1]), logits.new_empty(logits.shape[:1])
    _C.sample(
        logits,
        temperature,
        top_k,
        top_p,
        min_p,
        openai_top_p,
        seeds,
        samples,
        positions,
        tokens,
        logprobs,
        _stream(logits),
    )
    return tokens, logprobs


_LAYERNORM = "Tensor weight, Tensor bias, float eps"
_FILTERS = "Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, bool openai_top_p"
_KEYS = "Tensor seeds, Tensor samples, Tensor positions"
_OPS: tuple[tuple[str, Callable[..., Any], Callable[..., Any]], ...] = (
    (f"layernorm(Tensor x, {_LAYERNORM}) -> Tensor", _layernorm, _op_shapes.layernorm),
    (
        f"add_layernorm(Tensor residual, Tensor delta, {_LAYERNORM}) -> (Tensor, Tensor)",
        _add_layernorm,
        _op_shapes.add_layernorm,
    ),
    (
        f"add_layernorm_(Tensor(a!) residual, Tensor delta, {_LAYERNORM}) -> Tensor",
        _add_layernorm_,
        _op_shapes.add_layernorm_,
    ),
    ("gelu(Tensor x) -> Tensor", _gelu, _op_shapes.gelu),
    (
        "embed(Tensor tokens, Tensor positions, Tensor wte, Tensor wpe) -> Tensor",
        _embed,
        _op_shapes.embed,
    ),
    (
        "linear(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, bool gelu) -> Tensor",
        _linear,
        _op_shapes.linear,
    ),
    (
        "attention_prefill(Tensor q, Tensor k, Tensor v, float scale) -> Tensor",
        _attention_prefill,
        _op_shapes.attention_prefill,
    ),
    (
        "attention_decode(Tensor q, Tensor k, Tensor v, Tensor lengths, float scale) -> Tensor",
        _attention_decode,
        _op_shapes.attention_decode,
    ),
    (
        f"sample(Tensor logits, {_FILTERS}, {_KEYS}) -> (Tensor, Tensor)",
        _sample,
        _op_shapes.sample,
    ),
)


def _refusal(op: str, names: tuple[str, ...]) -> Callable[..., Any]:
    """What runs where no kernel is: on other devices than CPU and CUDA, and for sparse tensors."""

    def refuse(*args: object) -> None:
        devices = "cpu or cuda" if _C.build_info()["cuda"] else "cpu"
        tensors = [(n, a) for n, a in zip(names, args, strict=True) if isinstance(a, Tensor)]
        for name, tensor in tensors:
            if tensor.device.type not in {"cpu", "cuda"} or tensor.layout != torch.strided:
                layout = str(tensor.layout).removeprefix("torch.")
                raise ParameterError(
                    f"{op}: {name} must be strided on {devices}, got {layout} on {tensor.device}"
                )
        raise ParameterError(f"{op}: {tensors[0][0]} must be a plain tensor on {devices}")

    return refuse


def _register() -> torch.library.Library:
    """Define every op; the library object keeps them alive."""
    # `Library.define` and not `custom_op`: 1.9 us against 8.8 us for each call.
    library = torch.library.Library("gpt2_fast", "DEF")
    for schema, kernel, shapes in _OPS:
        op = library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(op, kernel, "CPU")
        library.impl(op, kernel, "CUDA")
        names = tuple(signature(kernel).parameters)
        library.impl(op, _refusal(op, names), "CompositeExplicitAutograd")
        torch.library.register_fake(f"gpt2_fast::{op}", shapes, lib=library)
    return library


_LIBRARY = _register()
