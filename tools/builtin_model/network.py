"""The network that train.py trains: GPT-2 in torch, with dropout, and its names in checkpoints."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .export import deepened, read_weights


@dataclass(frozen=True)
class Shape:
    """Dimensions of the model: V ids, T positions, L layers of width C with H heads."""

    vocabulary: int = 4096
    positions: int = 512
    layers: int = 9
    width: int = 192
    heads: int = 6


def dropped(x: Tensor, dropout: float) -> Tensor:
    """x with elements set to zero with a probability of `dropout`, to the nearest 1/256.

    A random number of 64 bits decides on eight elements. F.dropout draws one for each, which takes
    a tenth of a step on two processors.
    """
    cut = round(256 * dropout)
    if not cut:
        return x
    drawn = torch.empty((x.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
    kept = drawn.view(torch.uint8)[: x.numel()].view(x.shape) >= cut
    return x * (kept * (256 / (256 - cut)))


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention (B, H, T, D); a block of queries meets only the keys up to its last one.

    There and back 16 ms a layer in bfloat16 where F.scaled_dot_product_attention took 38 (two
    processors of Zen 5, eight windows of 512); in float32 34 and 37.
    """
    (B, H, T, D), size = q.shape, 128
    q, k, v = (x.reshape(B * H, T, D) for x in (q * D**-0.5, k, v))
    future = q.new_full((size, size), -math.inf).triu(1)
    blocks = []
    for start in range(0, T, size):
        end = min(start + size, T)
        scores = q[:, start:end] @ k[:, :end].mT
        scores[:, :, start:] += future[: end - start, : end - start]
        blocks.append(scores.softmax(-1).to(v.dtype) @ v[:, :end])
    return torch.cat(blocks, 1).view(B, H, T, D)


class Block(nn.Module):
    """One transformer block, pre-LN; names and (in, out) matrices are those of the checkpoints."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        C, deep = shape.width, 0.02 / math.sqrt(2 * shape.layers)
        self.heads = shape.heads
        self.ln_1, self.ln_2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.c_attn = nn.Parameter(0.02 * torch.randn(C, 3 * C))
        self.c_attn_bias = nn.Parameter(torch.zeros(3 * C))
        self.attn_proj = nn.Parameter(deep * torch.randn(C, C))
        self.attn_proj_bias = nn.Parameter(torch.zeros(C))
        self.c_fc = nn.Parameter(0.02 * torch.randn(C, 4 * C))
        self.c_fc_bias = nn.Parameter(torch.zeros(4 * C))
        self.mlp_proj = nn.Parameter(deep * torch.randn(4 * C, C))
        self.mlp_proj_bias = nn.Parameter(torch.zeros(C))

    def forward(self, x: Tensor, dropout: float) -> Tensor:
        B, T, C = x.shape
        qkv = F.linear(self.ln_1(x), self.c_attn.T, self.c_attn_bias)
        q, k, v = qkv.view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        y = attention(q, k, v)
        y = F.linear(y.transpose(1, 2).reshape(B, T, C), self.attn_proj.T, self.attn_proj_bias)
        x = x + dropped(y, dropout)
        h = F.gelu(F.linear(self.ln_2(x), self.c_fc.T, self.c_fc_bias), approximate="tanh")
        return x + dropped(F.linear(h, self.mlp_proj.T, self.mlp_proj_bias), dropout)


class GPT2(nn.Module):
    """GPT-2 with a tied head."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.wte = nn.Parameter(0.02 * torch.randn(shape.vocabulary, shape.width))
        self.wpe = nn.Parameter(0.01 * torch.randn(shape.positions, shape.width))
        self.h = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.ln_f = nn.LayerNorm(shape.width)

    def logits(self, ids: Tensor, dropout: float = 0.0, word_dropout: float = 0.0) -> Tensor:
        """Logits (B, T, V) of ids (B, T), in float32.

        `word_dropout` is the probability that a token's whole embedding is zero (Gal and Ghahramani
        2016, arXiv:1512.05287, section 4.2, for each occurrence by itself).
        """
        x = F.embedding(ids, self.wte)
        if word_dropout:
            x = x * dropped(x.new_ones(*ids.shape, 1), word_dropout)
        x = dropped(x + self.wpe[: ids.shape[1]], dropout)
        for block in self.h:
            x = block(x, dropout)
        logits: Tensor = self.ln_f(x) @ self.wte.T
        return logits.float()

    def forward(
        self,
        ids: Tensor,
        targets: Tensor,
        dropout: float = 0.0,
        word_dropout: float = 0.0,
        taught: Tensor | None = None,
        share: float = 0.0,
    ) -> Tensor:
        """Mean loss in nats per token; ids and targets are (B, T).

        With `taught`, probabilities (B, T, V) of teachers, their part in the wanted distribution is
        `share` (Hinton et al. 2015, arXiv:1503.02531, section 2, at temperature 1).
        """
        logits = self.logits(ids, dropout, word_dropout).flatten(0, 1)
        loss: Tensor = F.cross_entropy(logits, targets.flatten())
        if taught is not None:
            loss = loss.lerp(F.cross_entropy(logits, taught.flatten(0, 1)), share)
        return loss


# Names in this file -> names in checkpoints.
RENAMED = {
    "c_attn": "attn.c_attn.weight",
    "c_attn_bias": "attn.c_attn.bias",
    "attn_proj": "attn.c_proj.weight",
    "attn_proj_bias": "attn.c_proj.bias",
    "c_fc": "mlp.c_fc.weight",
    "c_fc_bias": "mlp.c_fc.bias",
    "mlp_proj": "mlp.c_proj.weight",
    "mlp_proj_bias": "mlp.c_proj.bias",
    "wte": "wte.weight",
    "wpe": "wpe.weight",
}


def published_name(name: str) -> str:
    """The checkpoint's name of a parameter: h.0.c_fc is h.0.mlp.c_fc.weight there."""
    prefix, _, last = name.rpartition(".")
    last = RENAMED.get(last, last)
    return f"{prefix}.{last}" if prefix else last


def load_model(model: GPT2, folder: Path) -> None:
    """Start from the weights of an exported model of the same shape, or smaller.

    Layers that it lacks begin as ones that change nothing (`export.deepened`). Positions that it
    lacks begin as copies of the later half of those it has: a late position means "far from the
    beginning", which an early one does not.
    """
    held = deepened(read_weights(folder), len(model.h))
    known, wanted = len(held["wpe.weight"]), len(model.wpe)
    if known > wanted:
        raise ValueError(f"{folder} has {known} positions, wanted at most {wanted}")
    late = known // 2 + torch.arange(max(0, wanted - known)) % (known - known // 2)
    held["wpe.weight"] = torch.cat([held["wpe.weight"], held["wpe.weight"][late]])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            start = held.get(published_name(name))
            if start is None or start.shape != parameter.shape:
                found = "nothing" if start is None else tuple(start.shape)
                wants = f"{published_name(name)} {tuple(parameter.shape)}"
                raise ValueError(f"{folder}: wanted {wants}, found {found}")
            parameter.copy_(start)


def read_model(folder: Path) -> GPT2:
    """An exported model with its own shape."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    names = ("vocab_size", "n_positions", "n_layer", "n_embd", "n_head")
    model = GPT2(Shape(*(config[name] for name in names)))
    load_model(model, folder)
    return model
