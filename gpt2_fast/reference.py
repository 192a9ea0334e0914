"""GPT-2 in plain torch: the definition of correct.

One function per kernel, with the names and arguments of `gpt2_fast.ops`. In float64 these are the
truth that every kernel is measured against; in float32 and bfloat16 they are torch's own way of
doing the same work, whose error sets the bound (docs/numerics.md). Nothing here knows the native
module.

Shapes: B sequences, T new tokens, S cached tokens, R rows, C width, H heads, D head size,
V vocabulary, I inner width, always in memory order. Vectors (biases, layer norm weights) may be of
a wider dtype than the matrices.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import ParameterError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import ModuleType

    from .config import GPT2Config

_Float64 = npt.NDArray[np.float64]
_Bool = npt.NDArray[np.bool_]

# Philox4x32 multipliers and key increments (Salmon et al. 2011, section 3.3 and table 2).
_PHILOX_M0, _PHILOX_M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_PHILOX_W0, _PHILOX_W1 = 0x9E3779B9, 0xBB67AE85
_PHILOX_ROUNDS = 10
_WORD = np.uint64(0xFFFFFFFF)

_SMALLEST_TEMPERATURE = 2.0**-126  # kernels take float32 below it for 0


def layernorm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Normalise the last axis: (x - mean) / sqrt(var + eps) * weight + bias, biased variance.

    Args:
        x: (..., C), any float dtype.
        weight, bias: (C,).
        eps: added to the variance, in squared units of x.

    Returns:
        (..., C), dtype of `x`.

    Source: Ba et al. 2016, arXiv:1607.06450, eq. 3-4.
    """
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def add_layernorm(
    residual: Tensor, delta: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """h = residual + delta, and layernorm(h).

    Args:
        residual, delta: (..., C) of one float dtype.
        weight, bias, eps: as in `layernorm`.

    Returns:
        h, rounded to the dtype of `residual`, and the layer norm of that h.
    """
    h = residual + delta
    return h, layernorm(h, weight, bias, eps)


def add_layernorm_(
    residual: Tensor, delta: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> Tensor:
    """`add_layernorm` in place: `residual` holds h on return; the layer norm is the result."""
    return layernorm(residual.add_(delta), weight, bias, eps)


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form: x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3))).

    Source: Hendrycks & Gimpel 2016, arXiv:1606.08415, section 2; openai/gpt-2, src/model.py.
    """
    return F.gelu(x, approximate="tanh")


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    gelu: bool = False,
) -> Tensor:
    """x W^T + bias, then GELU if asked, then + residual if given.

    Args:
        x: (..., K), any float dtype.
        weight: (N, K), dtype of `x`: one row per output, as in torch's Linear.
        bias: (N,) or None.
        residual: (..., N), dtype of `x`, or None.
        gelu: apply the tanh form of GELU to the sum.

    Returns:
        (..., N), dtype of `x`.
    """
    out = F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    if gelu:
        out = F.gelu(out, approximate="tanh")
    return out if residual is None else out + residual


def attention_prefill(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(q k^T * scale) v for T new queries, causal, aligned to the end of the S keys.

    Args:
        q: (B, H, T, D). Query t sees the keys 0 .. S - T + t.
        k, v: (B, H, S, D) with S >= T, dtype of `q`.
        scale: multiplies q.k before the softmax.

    Returns:
        (B, H, T, D), dtype of `q`.

    Raises:
        ParameterError: S < T, so that the first query would see nothing.

    Source: Vaswani et al. 2017, arXiv:1706.03762, eq. 1.
    """
    new, cached = q.shape[-2], k.shape[-2]
    if cached < new:
        raise ParameterError(
            f"attention_prefill: k must have at least as many positions as q, got {cached}, {new}"
        )
    if cached == new:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    seen = torch.ones(new, cached, dtype=torch.bool, device=q.device).tril(cached - new)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)


def attention_decode(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """Attention of one query per sequence over that sequence's own number of keys.

    Args:
        q: (B, H, D), the newest position of each sequence.
        k, v: (B, H, S, D), dtype of `q`; positions from `lengths` on are never read.
        lengths: (B,) integers in 1 .. S. Sequence b sees the keys 0 .. lengths[b] - 1.
        scale: multiplies q.k before the softmax.

    Returns:
        (B, H, D), dtype of `q`.

    Raises:
        ParameterError: a length outside 1 .. S.
    """
    out = torch.empty_like(q)
    for b, length in enumerate(lengths.tolist()):
        if not 1 <= length <= k.shape[-2]:
            raise ParameterError(
                f"attention_decode: lengths must be in 1..{k.shape[-2]}, got {length} at {b}"
            )
        query = q[b : b + 1, :, None]
        keys, values = (cache[b : b + 1, :, :length] for cache in (k, v))
        out[b] = F.scaled_dot_product_attention(query, keys, values, scale=scale)[0, :, 0]
    return out


def embed(tokens: Tensor, positions: Tensor, wte: Tensor, wpe: Tensor) -> Tensor:
    """wte[token] + wpe[position].

    Args:
        tokens, positions: (R,) int64.
        wte: (V, C).
        wpe: (n_ctx, C), dtype of `wte`.

    Returns:
        (R, C), dtype of `wte`.
    """
    return F.embedding(tokens, wte) + F.embedding(positions, wpe)


def philox4x32(counter: npt.NDArray[np.uint32], key: tuple[int, int]) -> npt.NDArray[np.uint32]:
    """Philox4x32-10: four random words from each 128-bit counter and one 64-bit key.

    Args:
        counter: (..., 4) words, least significant first.
        key: two words, least significant first.

    Returns:
        (..., 4) words.

    Source: Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    c0, c1, c2, c3 = (counter[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = key
    for _ in range(_PHILOX_ROUNDS):
        left, right = c0 * _PHILOX_M0, c2 * _PHILOX_M1
        c0, c2 = (right >> 32) ^ c1 ^ np.uint64(k0), (left >> 32) ^ c3 ^ np.uint64(k1)
        c1, c3 = right & _WORD, left & _WORD
        k0, k1 = (k0 + _PHILOX_W0) & 0xFFFFFFFF, (k1 + _PHILOX_W1) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def gumbel_noise(vocab_size: int, seed: int, position: int, sample: int) -> _Float64:
    """The standard Gumbel noise that the sampler adds, one value per token id.

    Word id % 4 of the Philox block with key = seed and counter = (id // 4, low word of position,
    sample, high word of position) becomes u = ((word >> 8) + 0.5) / 2^24, strictly inside (0, 1),
    and -log(-log(u)).

    Args:
        vocab_size: V.
        seed, position: any 64-bit integers.
        sample: which continuation of the same prompt; the low 32 bits count.

    Returns:
        (V,) float64.
    """
    blocks = np.zeros((-(-vocab_size // 4), 4), np.uint32)
    blocks[:, 0] = np.arange(len(blocks), dtype=np.uint32)
    blocks[:, 1] = position & 0xFFFFFFFF
    blocks[:, 2] = sample & 0xFFFFFFFF
    blocks[:, 3] = (position >> 32) & 0xFFFFFFFF
    words = philox4x32(blocks, (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)).reshape(-1)
    uniform = ((words[:vocab_size] >> np.uint32(8)).astype(np.float64) + 0.5) * 2.0**-24
    noise: _Float64 = -np.log(-np.log(uniform))
    return noise


def _top_k_kept(z: _Float64, top_k: int) -> _Bool:
    if not 0 < top_k < z.size:
        return np.ones(z.size, np.bool_)
    likely: _Bool = z >= np.partition(z, z.size - top_k)[z.size - top_k]
    return likely


def _top_p_kept(z: _Float64, kept: _Bool, top_p: float, openai: bool) -> _Bool:
    if top_p >= 1.0:
        return kept
    ordered = np.sort(z[kept])[::-1]
    mass = np.cumsum(np.exp(ordered - ordered[0]))
    mass /= mass[-1]
    last = max(0, int(np.sum(mass <= top_p)) - 1) if openai else int(np.argmax(mass >= top_p))
    likely: _Bool = z >= ordered[last]
    return kept & likely


def kept_by_filters(
    z: _Float64, top_k: int, top_p: float, min_p: float, openai_top_p: bool
) -> _Bool:
    """Which tokens survive top_k, then top_p, then min_p; the likeliest always does.

    Args:
        z: (V,) logits divided by the temperature.
        top_k: keep all z at least as large as the k-th largest; 0 is off.
        top_p: of what is left, keep by probability in descending order. The smallest set whose mass
            reaches top_p, or, if `openai_top_p`, the tokens whose inclusive cumulative mass does
            not exceed top_p and at least one. Ties with the last one kept stay. 1 is off.
        min_p: keep p >= min_p * max(p); 0 is off.
        openai_top_p: see top_p.

    Returns:
        (V,) booleans.

    Source: top_k and `openai_top_p`: openai/gpt-2, src/sample.py. top_p: Holtzman et al. 2019,
    arXiv:1904.09751, eq. 2. min_p: Nguyen et al. 2024, arXiv:2407.01082.
    """
    kept = _top_p_kept(z, _top_k_kept(z, top_k), top_p, openai_top_p)
    likely: _Bool = np.exp(z - z.max()) >= min_p
    return kept & likely


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

    Args:
        logits: (R, V), any float dtype; computed in float64.
        temperature: (R,) >= 0; below the smallest normal float32 (1.2e-38) takes the largest logit.
        top_k, top_p, min_p: (R,), see `kept_by_filters`.
        openai_top_p: the rule of top_p, for all rows.
        seeds, samples, positions: (R,) integers, see `gumbel_noise`.

    Returns:
        tokens (R,) int64, and logprobs (R,) float64: log softmax of the logits themselves at the
        token, without temperature or filters. Equal scores: the lowest id. A row with a NaN or
        without a finite largest logit: -1 and NaN.

    Source: the Gumbel-max trick, Maddison et al. 2014, arXiv:1411.0030.
    """
    tokens = torch.empty(len(logits), dtype=torch.int64)
    logprobs = torch.empty(len(logits), dtype=torch.float64)
    for r, row in enumerate(logits.double().cpu().numpy()):
        token = _sample_row(
            row,
            float(temperature[r]),
            (int(top_k[r]), float(top_p[r]), float(min_p[r]), openai_top_p),
            (int(seeds[r]), int(positions[r]), int(samples[r])),
        )
        tokens[r] = token
        logprobs[r] = float("nan")
        if token >= 0:
            highest = row.max()
            logprobs[r] = row[token] - highest - np.log(np.sum(np.exp(row - highest)))
    return tokens.to(logits.device), logprobs.to(logits.device)


def _sample_row(
    logits: _Float64,
    temperature: float,
    filters: tuple[int, float, float, bool],
    key: tuple[int, int, int],
) -> int:
    if not np.isfinite(logits.max()):  # a NaN is the maximum of its row
        return -1
    if temperature < _SMALLEST_TEMPERATURE:
        return int(np.argmax(logits))
    z = logits / temperature
    scores = np.where(kept_by_filters(z, *filters), z + gumbel_noise(z.size, *key), -np.inf)
    return int(np.argmax(scores))


class GPT2Reference:
    """GPT-2 over one op module, without a cache: the readable model.

    Args:
        config: the shape.
        state: tensors by canonical name (`GPT2Config.tensor_shapes`), linear weights [in, out], all
            of one float dtype, in which the model computes. For bfloat16 and float16 the vectors
            are widened to float32, which is what the kernels take.
        ops: the module that has the kernels: `gpt2_fast.reference` (the default) or
            `gpt2_fast.ops`.

    Raises:
        ParameterError: a tensor is missing, unknown, or of another shape or dtype.
    """

    def __init__(
        self, config: GPT2Config, state: Mapping[str, Tensor], ops: ModuleType | None = None
    ) -> None:
        self.config = config
        self.ops: Any = _THIS if ops is None else ops
        self.parameters = _arrange(config, state)

    def forward(self, token_ids: Tensor) -> Tensor:
        """Logits of every position.

        Args:
            token_ids: (B, T) int64, T at most n_ctx.

        Returns:
            (B, T, V), dtype of the state.

        Raises:
            ParameterError: T exceeds n_ctx.
        """
        ops, config, p = self.ops, self.config, self.parameters
        batch, new = token_ids.shape
        if new > config.n_ctx:
            raise ParameterError(
                f"token_ids must have at most n_ctx = {config.n_ctx} positions, got {new}"
            )
        eps = config.layer_norm_epsilon
        positions = torch.arange(new, device=token_ids.device).repeat(batch)
        x = ops.embed(token_ids.reshape(-1), positions, p["wte.weight"], p["wpe.weight"])
        h = ops.layernorm(x, *self._pair("h.0.ln_1"), eps)
        for layer in range(config.n_layer):
            block = f"h.{layer}."
            mixed = self._attention(h, layer, batch)
            x = ops.linear(mixed, *self._pair(block + "attn.c_proj"), residual=x)
            h = ops.layernorm(x, *self._pair(block + "ln_2"), eps)
            h = ops.linear(h, *self._pair(block + "mlp.c_fc"), gelu=True)
            delta = ops.linear(h, *self._pair(block + "mlp.c_proj"))
            norm = f"h.{layer + 1}.ln_1" if layer + 1 < config.n_layer else "ln_f"
            h = ops.add_layernorm_(x, delta, *self._pair(norm), eps)
        head = p.get("lm_head.weight", p["wte.weight"])
        logits: Tensor = ops.linear(h, head)
        return logits.reshape(batch, new, config.vocab_size)

    __call__ = forward

    def _pair(self, prefix: str) -> tuple[Tensor, Tensor]:
        return self.parameters[prefix + ".weight"], self.parameters[prefix + ".bias"]

    def _attention(self, h: Tensor, layer: int, batch: int) -> Tensor:
        """(R, C) normalised rows -> (R, C) mixed values, before the projection."""
        config = self.config
        qkv = self.ops.linear(h, *self._pair(f"h.{layer}.attn.c_attn"))
        qkv = qkv.reshape(batch, -1, 3, config.n_head, config.head_size)
        q, k, v = (part.contiguous() for part in qkv.permute(2, 0, 3, 1, 4))
        out = self.ops.attention_prefill(q, k, v, config.attention_scale(layer))
        rows: Tensor = out.transpose(1, 2).reshape(-1, config.n_embd)
        return rows


def _arrange(config: GPT2Config, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Check every tensor; turn linear weights to (N, K) and widen short vectors."""
    shapes = config.tensor_shapes()
    if unknown := sorted(state.keys() - shapes.keys()):
        raise ParameterError(f"state must hold only this config's tensors, got {unknown[0]} too")
    parameters = {}
    for name, shape in shapes.items():
        if name not in state:
            raise ParameterError(f"state must hold {name}, got {len(state)} tensors without it")
        tensor, dtype = state[name], state["wte.weight"].dtype
        if tuple(tensor.shape) != shape:
            raise ParameterError(
                f"state[{name!r}] must have shape {shape}, got {tuple(tensor.shape)}"
            )
        if tensor.dtype != dtype or not dtype.is_floating_point:
            raise ParameterError(
                f"state[{name!r}] must have the float dtype of wte.weight, {dtype}, "
                f"got {tensor.dtype}"
            )
        if tensor.ndim == 1:
            tensor = tensor.to(torch.promote_types(dtype, torch.float32))
        elif name.startswith("h."):
            tensor = tensor.T.contiguous()
        parameters[name] = tensor
    return parameters


def random_state(
    config: GPT2Config, seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Random parameters of the right shapes and of GPT-2's initial spread.

    Matrices have standard deviation 0.02, projections into the residual stream 0.02 / sqrt(2 L).
    Unlike at GPT-2's start, biases are not 0 and layer norm weights not 1 (both spread by 0.02), so
    that leaving one out is seen.

    Args:
        config: the shape.
        seed: of torch's generator; the same seed gives the same values, rounded to `dtype`.
        dtype: of every tensor.

    Returns:
        Tensors by canonical name, linear weights [in, out].

    Source: Radford et al. 2019, section 2.3; openai/gpt-2, src/model.py.
    """
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in config.tensor_shapes().items():
        spread = 0.02
        if name.endswith("c_proj.weight"):
            spread /= (2 * config.n_layer) ** 0.5
        values = torch.randn(shape, generator=generator) * spread
        if "ln_" in name and name.endswith("weight"):
            values += 1
        state[name] = values.to(dtype)
    return state


_THIS = sys.modules[__name__]
