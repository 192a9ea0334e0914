"""What a decode step reads, stage by stage: the bytes that speed is divided by."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import GPT2Config

#: Bytes of a weight; of a quantised one with its share of the scale.
WEIGHT = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "int8": 1 + 2 / 64, "int4": 0.5 + 2 / 32}
#: Bytes of a number in the cache.
CACHED = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 2, "int4": 2}


def stage_bytes(
    config: GPT2Config, precision: str, positions: float, batch: int
) -> dict[str, float]:
    """Bytes each stage of one layer reads (of the head: once a step).

    Weights and biases once, whatever the batch; keys and values of every sequence. Activations
    stay in the cache of the processor and are not counted.

    Args:
        config: the shape.
        precision: of the engine.
        positions: that each sequence attends to.
        batch: sequences.
    """
    c, inner, weight = config.n_embd, config.inner_size, WEIGHT[precision]
    return {
        "ln_qkv": 3 * c * (c * weight + 4) + 8 * c,
        "attention": 2.0 * c * CACHED[precision] * positions * batch,
        "attn_proj": c * (c * weight + 4),
        "ln_fc_gelu": inner * (c * weight + 4) + 8 * c,
        "mlp_proj": c * (inner * weight + 4),
        "ln_head": config.vocab_size * c * weight + 8 * c,
    }


def step_bytes(config: GPT2Config, precision: str, positions: float, batch: int) -> float:
    """Bytes one decode step reads."""
    stages = stage_bytes(config, precision, positions, batch)
    head = stages.pop("ln_head")
    return config.n_layer * sum(stages.values()) + head
