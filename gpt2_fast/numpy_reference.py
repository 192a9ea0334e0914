"""The kernels and the whole model in plain numpy, for `gpt2-fast doctor` where there is no torch.

Everything is computed in the arithmetic asked for: float64 is the truth, float32 shows what error
is usual. With `bf16`, what enters a product is first rounded to bfloat16, as the engine rounds it;
with `group`, what enters a product with weights is cut into groups of 8-bit integers (weights are
given as their integers times their scales); with `int8_cache`, so are queries, keys and values.
Independent of `reference.py`, which is the definition of correct; tests compare the two.

Shapes: B sequences, T new tokens, S cached tokens, R rows, C width, H heads, D head size,
V vocabulary, in memory order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from .bfloat16 import round_to_bfloat16
from .config import GPT2Config

Array: TypeAlias = "npt.NDArray[Any]"


@dataclass(frozen=True)
class Arithmetic:
    """How to compute: a type, whether operands of products are rounded to bfloat16, and how many
    elements of a row share a scale when it meets quantised weights (0: none are quantised), and
    whether keys and values are 8-bit integers.
    """

    dtype: type[np.floating[Any]]
    bf16: bool = False
    group: int = 0
    int8_cache: bool = False

    def take(self, values: Array) -> Array:
        """`values` in this type."""
        return values.astype(self.dtype)

    def operand(self, values: Array) -> Array:
        """`values` as they enter a product."""
        return self.take(round_to_bfloat16(values)) if self.bf16 else values

    def rows(self, values: Array) -> Array:
        """`values` (..., K) as they meet weights."""
        return quantized_rows(values, self.group) if self.group else self.operand(values)

    def weights(self, values: Array) -> Array:
        """Weights as they enter a product."""
        return values if self.group else self.operand(values)


def quantized_rows(values: Array, group: int, *, stored: bool = False) -> Array:
    """`values` (..., K) as integers of -127 ... 127 times a scale for each `group` along K.

    Scales that are `stored` are bfloat16, rounded up.
    """
    inputs = values.shape[-1]
    padding = [(0, 0)] * (values.ndim - 1) + [(0, -inputs % group)]
    groups = np.pad(values, padding).reshape(*values.shape[:-1], -1, group)
    most = np.abs(groups).max(-1, keepdims=True)
    scale = np.where(most > 0, most, 1) / values.dtype.type(127)
    if stored:
        bits = scale.astype(np.float32).view(np.uint32)
        scale = ((bits + np.uint32(0xFFFF)) & np.uint32(0xFFFF0000)).view(np.float32)
        scale = scale.astype(values.dtype)
    rounded: Array = np.rint(groups / scale) * scale
    return rounded.reshape(*values.shape[:-1], -1)[..., :inputs]


TRUTH = Arithmetic(np.float64)


def layernorm(how: Arithmetic, x: Array, weight: Array, bias: Array, eps: float) -> Array:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis (arXiv:1607.06450)."""
    x, weight, bias = map(how.take, (x, weight, bias))
    centred = x - x.mean(-1, keepdims=True)
    variance = (centred * centred).mean(-1, keepdims=True)
    return how.take(centred / np.sqrt(variance + how.dtype(eps)) * weight + bias)


def gelu(how: Arithmetic, x: Array) -> Array:
    """GELU in its tanh form (arXiv:1606.08415, section 2)."""
    x = how.take(x)
    root = how.dtype(np.sqrt(2 / np.pi))
    cubic = x + how.dtype(0.044715) * x * x * x
    return how.take(how.dtype(0.5) * x * (1 + np.tanh(root * cubic)))


def linear(how: Arithmetic, x: Array, weight: Array, bias: Array | None = None) -> Array:
    """x (..., K) times weight (N, K), plus bias (N)."""
    out: Array = how.rows(how.take(x)) @ how.weights(how.take(weight)).T
    return out if bias is None else out + how.take(bias)


def attention(how: Arithmetic, q: Array, k: Array, v: Array, lengths: Array, scale: float) -> Array:
    """softmax(q k^T scale) v for T queries of B sequences (arXiv:1706.03762, eq. 1).

    Args:
        how: the arithmetic.
        q: (B, H, T, D). Query t of sequence b sees keys 0 .. lengths[b] - T + t.
        k, v: (B, H, S, D).
        lengths: (B,).
        scale: multiplies q.k.

    Returns:
        (B, H, T, D).
    """
    q, k, v = (how.operand(how.take(x)) for x in (q, k, v))
    if how.int8_cache:
        q, k = quantized_rows(q, 64), quantized_rows(k, 64, stored=True)
        v = quantized_rows(v, v.shape[-1], stored=True)
    scores = q @ np.swapaxes(k, -1, -2) * how.dtype(scale)
    queries, keys = scores.shape[-2:]
    newest = lengths[:, None] - queries + np.arange(queries)
    seen = np.arange(keys) <= newest[:, :, None]
    scores = np.where(seen[:, None], scores, how.dtype(-np.inf))
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    total = weights.sum(-1, keepdims=True)
    weights = weights if how.int8_cache else how.operand(weights)
    return how.take(weights @ v / total)


def gpt2(
    how: Arithmetic, config: GPT2Config, parameters: Mapping[str, Array], tokens: Array
) -> Array:
    """Logits (T, V) of one sequence. Source: openai/gpt-2, src/model.py.

    Args:
        how: the arithmetic.
        config: the shape.
        parameters: canonical names to arrays, linear weights [in, out].
        tokens: (T,).
    """
    p = {name: how.take(array) for name, array in parameters.items()}
    eps = config.layer_norm_epsilon
    rows = len(tokens)
    x = p["wte.weight"][tokens] + p["wpe.weight"][:rows]

    def norm(name: str) -> Array:
        return layernorm(how, x, p[f"{name}.weight"], p[f"{name}.bias"], eps)

    def project(values: Array, name: str) -> Array:
        return linear(how, values, p[f"{name}.weight"].T, p[f"{name}.bias"])

    for layer in range(config.n_layer):
        h = f"h.{layer}."
        qkv = project(norm(h + "ln_1"), h + "attn.c_attn")
        heads = qkv.reshape(rows, 3, config.n_head, config.head_size).transpose(1, 2, 0, 3)
        q, k, v = heads[:, None]
        scale = config.attention_scale(layer)
        mixed = attention(how, q, k, v, np.array([rows]), scale)[0].transpose(1, 0, 2)
        # What stages hand on is rounded, whatever the product then makes of it.
        x = x + project(how.operand(mixed.reshape(rows, -1)), h + "attn.c_proj")
        inner = gelu(how, project(norm(h + "ln_2"), h + "mlp.c_fc"))
        x = x + project(how.operand(inner), h + "mlp.c_proj")
    return linear(how, norm("ln_f"), p.get("lm_head.weight", p["wte.weight"]))


def gumbel_noise(vocab_size: int, seed: int, position: int, sample: int) -> Array:
    """(V,) Gumbel noise from Philox4x32-10, as `reference.gumbel_noise` defines it.

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    low = np.uint64(0xFFFFFFFF)
    block = np.arange(-(-vocab_size // 4), dtype=np.uint64)
    words = [block, *(np.full_like(block, part & 0xFFFFFFFF) for part in (position, sample))]
    words.append(np.full_like(block, (position >> 32) & 0xFFFFFFFF))
    key = [np.uint64(seed & 0xFFFFFFFF), np.uint64((seed >> 32) & 0xFFFFFFFF)]
    for _ in range(10):
        first, second = words[0] * np.uint64(0xD2511F53), words[2] * np.uint64(0xCD9E8D57)
        words = [
            (second >> np.uint64(32)) ^ words[1] ^ key[0],
            second & low,
            (first >> np.uint64(32)) ^ words[3] ^ key[1],
            first & low,
        ]
        key = [(key[0] + np.uint64(0x9E3779B9)) & low, (key[1] + np.uint64(0xBB67AE85)) & low]
    bits = np.stack(words, -1).reshape(-1)[:vocab_size] >> np.uint64(8)
    noise: Array = -np.log(-np.log((bits.astype(np.float64) + 0.5) * 2.0**-24))
    return noise


def kept_by_filters(z: Array, top_k: int, top_p: float, min_p: float, *, openai: bool) -> Array:
    """(V,) booleans: what of z is left by top_k, then top_p, then min_p; see `reference.py`."""
    kept: Array = np.ones(z.size, np.bool_)
    if 0 < top_k < z.size:
        kept = z >= np.sort(z)[-top_k]
    if top_p < 1:
        order = np.sort(z[kept])[::-1]
        mass = np.cumsum(np.exp(order - order[0]))
        share = mass / mass[-1]
        last = max(np.sum(share <= top_p) - 1, 0) if openai else np.searchsorted(share, top_p)
        kept &= z >= order[last]
    kept &= z >= z.max() + (np.log(min_p) if min_p > 0 else -np.inf)
    return kept


def sample(
    logits: Array,
    temperature: Array,
    top_k: Array,
    top_p: Array,
    min_p: Array,
    openai_top_p: bool,
    seeds: Array,
    samples: Array,
    positions: Array,
) -> Array:
    """(R,) tokens: argmax of logit / temperature + noise over what is kept; see `reference.py`."""
    tokens = []
    for r, row in enumerate(logits.astype(np.float64)):
        if temperature[r] == 0:
            tokens.append(np.argmax(row))
            continue
        z = row / float(temperature[r])
        filters = int(top_k[r]), float(top_p[r]), float(min_p[r])
        noise = gumbel_noise(z.size, int(seeds[r]), int(positions[r]), int(samples[r]))
        kept = kept_by_filters(z, *filters, openai=openai_top_p)
        tokens.append(np.argmax(np.where(kept, z + noise, -np.inf)))
    return np.array(tokens, np.int64)


def log_softmax(how: Arithmetic, logits: Array) -> Array:
    """Natural-log probabilities over the last axis."""
    z = how.take(logits)
    z = z - z.max(-1, keepdims=True)
    return how.take(z - np.log(np.exp(z).sum(-1, keepdims=True)))
