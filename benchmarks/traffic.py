"""Bytes a decode step must read and operations a prompt costs: what speed is divided by."""

from __future__ import annotations

from gpt2_fast import GPT2Config

ELEMENT_BYTES = {"fp32": 4, "bf16": 2}


def weight_bytes(config: GPT2Config, precision: str) -> int:
    """Bytes of parameters that one pass reads: all of them, each once.

    Matrices in `precision`, vectors in float32. Of the position table only a row is read, and of
    an untied token embedding too: neither is counted.
    """
    element = ELEMENT_BYTES[precision]
    skipped = {"wpe.weight"} if config.tie_word_embeddings else {"wpe.weight", "wte.weight"}
    total = 0
    for name, shape in config.tensor_shapes().items():
        if name not in skipped:
            total += shape[0] * (shape[1] * element if len(shape) == 2 else 4)
    return total


def cache_bytes(config: GPT2Config, precision: str, positions: float) -> float:
    """Bytes of keys and values that one token of one sequence reads at `positions` positions."""
    return 2 * config.n_layer * config.n_embd * ELEMENT_BYTES[precision] * positions


def decode_bytes(
    config: GPT2Config, precision: str, context: int, new: int, batch: int = 1
) -> float:
    """Mean bytes of one decode step while a text grows from `context` + 1 to `context` + `new`.

    The first of the `new` tokens comes out of the prompt's pass, so there are `new` - 1 steps; the
    step of token i (from 1) attends `context` + i positions.
    """
    positions = context + new / 2
    return weight_bytes(config, precision) + batch * cache_bytes(config, precision, positions)


def prefill_flops(config: GPT2Config, tokens: int) -> float:
    """Multiplications and additions of a prompt: products, causal attention, one row of logits."""
    c, i = config.n_embd, config.inner_size
    products = 2 * tokens * config.n_layer * (4 * c * c + 2 * c * i)
    attention = 2 * 2 * config.n_layer * c * tokens * (tokens + 1) / 2
    return products + attention + 2 * c * config.vocab_size
