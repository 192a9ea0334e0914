"""Bytes a decode step must read and operations it costs: what speed is divided by."""

from __future__ import annotations

from gpt2_fast import GPT2Config

#: Bytes of a matrix element; of a quantised one with its share of the bfloat16 scale that its
#: group of inputs shares.
ELEMENT_BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "int4": 0.5}
GROUP = {"int8": 64, "int4": 32}
SCALE_BYTES = 2
#: Bytes of a number in the cache of keys and values.
CACHED_BYTES = {"fp32": 4, "bf16": 2, "int8": 2, "int4": 2}


def matrix_bytes(inputs: int, outputs: int, precision: str) -> float:
    """Of one weight matrix, a group cut short by its end having a scale too."""
    group = GROUP.get(precision)
    scales = SCALE_BYTES * -(-inputs // group) if group else 0
    return outputs * (inputs * ELEMENT_BYTES[precision] + scales)


def _matrices(config: GPT2Config) -> list[tuple[int, int]]:
    """(inputs, outputs) of every matrix that one pass reads: the head too, no table of rows.

    Of the position table only a row is read, and of an untied token embedding too.
    """
    found = [(config.n_embd, config.vocab_size)]
    for name, shape in config.tensor_shapes().items():
        if name.startswith("h.") and len(shape) == 2:
            found.append((shape[0], shape[1]))
    return found


def _vectors(config: GPT2Config) -> int:
    """Biases and norms: float32 in every precision."""
    return sum(shape[0] for shape in config.tensor_shapes().values() if len(shape) == 1)


def weight_bytes(config: GPT2Config, precision: str, element: float | None = None) -> float:
    """Bytes of parameters that one pass reads: all of them, each once.

    Args:
        config: the shape.
        precision: ours, for the matrices; vectors are float32.
        element: bytes of a matrix element in another engine's format, its scales included.
    """
    matrices = _matrices(config)
    if element is None:
        total = sum(matrix_bytes(*sizes, precision) for sizes in matrices)
    else:
        total = sum(inputs * outputs * element for inputs, outputs in matrices)
    return total + 4 * _vectors(config)


def cache_bytes(
    config: GPT2Config, precision: str, positions: float, cached: float | None = None
) -> float:
    """Bytes of keys and values that one token of one sequence reads at `positions` positions."""
    number = CACHED_BYTES[precision] if cached is None else cached
    return 2 * config.n_layer * config.n_embd * number * positions


def decode_bytes(
    config: GPT2Config,
    precision: str,
    context: int,
    new: int,
    batch: int = 1,
    element: float | None = None,
    cached: float | None = None,
) -> float:
    """Mean bytes of one decode step while a text grows from `context` + 1 to `context` + `new`.

    The first of the `new` tokens comes out of the prompt's pass, so there are `new` - 1 steps; the
    step of token i (from 1) attends `context` + i positions. `element` and `cached` are bytes of
    another engine's weights and cache.
    """
    weights = weight_bytes(config, precision, element)
    return weights + batch * cache_bytes(config, precision, context + new / 2, cached)


def decode_flops(config: GPT2Config, context: int, new: int, batch: int = 1) -> float:
    """Mean multiplications and additions of one decode step, over the steps of `decode_bytes`."""
    products = 2.0 * sum(inputs * outputs for inputs, outputs in _matrices(config))
    attention = 2 * 2 * config.n_layer * config.n_embd * (context + new / 2)
    return batch * (products + attention)


def prefill_bytes(config: GPT2Config, precision: str, element: float | None = None) -> float:
    """Bytes a prompt must read: every parameter once; its keys and values stay in caches."""
    return weight_bytes(config, precision, element)


def prefill_flops(config: GPT2Config, tokens: int) -> float:
    """Multiplications and additions that a prompt needs up to its first token.

    Products and causal attention of every token in all layers but the last; there keys and values
    of every token, all else of one; one row of logits.
    """
    c, i, layers = config.n_embd, config.inner_size, config.n_layer
    of_row = 4 * c * c + 2 * c * i
    kept = 2 * c * c  # keys and values
    products = tokens * ((layers - 1) * of_row + kept) + of_row - kept
    attended = (layers - 1) * tokens * (tokens + 1) / 2 + tokens
    return 2 * products + 2 * 2 * c * attended + 2 * c * config.vocab_size
