"""The byte ledger: what every kernel of a step moves between memory and the processors.

A launch lists the bytes it loads and stores, each byte once. That is what DRAM has to deliver where
L2 holds the rest: what several blocks of a kernel read again (rows of the residual and of operands,
parameters of a norm, page tables: at most 130 KB a launch at decode) has just been written or read
and comes from L2, which has 4 MB on the smallest device (T4). Weights and pages are read again by
nobody. What one kernel stores and the next loads counts twice here, although L2 absorbs most of it.

Letters as in core/kernels.h. Formulas hold for every shape that csrc/cuda takes, up to 8 sequences
that each add one token (decode), and for products of up to 32 rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from gpt2_fast import GPT2Config

WEIGHT_BITS = {"bf16": 16, "fp16": 16, "int8": 8, "int4": 4}
GROUP = {"int8": 64, "int4": 32}  # inputs that share a bfloat16 scale

PAGE, CHUNK, PART = 16, 64, 128  # positions, keys, logits
BLOCK_CHUNKS = 4  # chunks of one block of attention_decode
NORMED_ROWS, SHARED_BYTES = 8, 64 << 10  # rows a product normalises itself, if these hold them


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel: bytes by what they are, each byte once."""

    kernel: str
    loads: Mapping[str, int]
    stores: Mapping[str, int] = field(default_factory=dict)

    @property
    def loaded(self) -> int:
        """Bytes loaded."""
        return sum(self.loads.values())

    @property
    def stored(self) -> int:
        """Bytes stored."""
        return sum(self.stores.values())


def up(value: int, unit: int) -> int:
    """`value` rounded up to whole units."""
    return -(-value // unit) * unit


def scale_bytes(precision: str, inputs: int, outputs: int) -> int:
    """Scales of a matrix of this size."""
    return outputs * inputs // GROUP[precision] * 2 if precision in GROUP else 0


def packed_bytes(precision: str, inputs: int, outputs: int) -> int:
    """A matrix in the order of cuda/layout.h, with its scales and its padding."""
    k, n = up(inputs, 64), up(outputs, 16)
    return k * n * WEIGHT_BITS[precision] // 8 + scale_bytes(precision, k, n)


def head_width(config: GPT2Config) -> int:
    """Dp."""
    return up(config.head_size, 32)


def embed(config: GPT2Config, precision: str, rows: int) -> list[Launch]:
    """Rows of different tokens and positions, out of a tied head (or rows of 16 bits)."""
    stride = up(config.n_embd, 64)
    table = 2 * stride
    if config.tie_word_embeddings:  # words of int8 and int4 hold two outputs each
        table = min(16, 2 * WEIGHT_BITS[precision]) * stride // 8
        table += scale_bytes(precision, stride, 1)
    loads = {"ids": 8 * rows, "wte": table * rows, "wpe": 2 * stride * rows}
    return [Launch("embed", loads, {"residual": 4 * stride * rows})]


def normalises_itself(rows: int, inputs: int, sums: int) -> bool:
    """Whether a product's blocks hold `rows` of the residual, the norm and `sums` bytes."""
    floats, operand = 4 * up(inputs, 4), 2 * up(inputs, 64) + 64
    return rows <= NORMED_ROWS and (2 + rows) * floats + rows * operand + sums <= SHARED_BYTES


def normed(
    config: GPT2Config, rows: int, sums: int, asked: int = 0
) -> tuple[list[Launch], dict[str, int]]:
    """The launch of layernorm_rows, if it goes before, and what the product loads for its rows."""
    width, stride = config.n_embd, up(config.n_embd, 64)
    if normalises_itself(rows, width, sums):
        floats = 4 * up(width, 4)
        return [], {"norm": 2 * floats, "residual": floats * rows, "asked": asked}
    loads = {"norm": 8 * width, "residual": 4 * width * rows, "asked": asked}
    return (
        [Launch("layernorm_rows", loads, {"operand": 2 * stride * rows})],
        {"operand": 2 * stride * rows},
    )


def unit_sums(inputs: int) -> int:
    """Bytes of one tile's sums in shared memory: one for every slice of 256 inputs."""
    return -(-up(inputs, 64) // 256) * 512


def ln_qkv(config: GPT2Config, precision: str, rows: int) -> list[Launch]:
    """Query rows, and keys and values appended to their pages."""
    width = config.n_embd
    before, loads = normed(config, rows, unit_sums(width))
    loads |= {"weights": packed_bytes(precision, width, 3 * width), "bias": 12 * width}
    loads |= {"positions": 4 * rows, "blocks": 8 * rows}
    stores = {"query": 2 * width * rows, "appended": 4 * width * rows}
    return [*before, Launch("ln_qkv", loads, stores)]


SEQUENCE_BYTES, SEQUENCE_PADDING = 20, 4  # a compiler may copy the whole struct, padding and all


def attention_decode(config: GPT2Config, lengths: Sequence[int]) -> list[Launch]:
    """One query each for sequences of `lengths` positions, its own among them."""
    heads, size = config.n_head, head_width(config)
    pages = sum(-(-length // PAGE) for length in lengths)
    split = [n for n in (-(-length // CHUNK) for length in lengths) if n > BLOCK_CHUNKS]
    partials = heads * 4 * (size + 2) * sum(split)
    loads = {"sequences": SEQUENCE_BYTES * len(lengths), "tables": 8 * pages}
    # A word of values holds two positions.
    cached = sum(2 * length + 2 * up(length, 2) for length in lengths)
    loads |= {"query": 2 * size * heads * len(lengths), "pages": size * heads * cached}
    stores = {"out": 2 * config.n_embd * len(lengths)}
    stores |= {"partials": partials, "tickets": 4 * heads * len(split)}
    return [Launch("attention_decode", loads | {"partials": partials}, stores)]


def linear_residual(config: GPT2Config, precision: str, rows: int, inputs: int) -> list[Launch]:
    """The projection of attention (C inputs) or of the MLP (I)."""
    width = config.n_embd
    loads = {"weights": packed_bytes(precision, inputs, width), "bias": 4 * width}
    loads |= {"operand": 2 * up(inputs, 64) * rows, "residual": 4 * width * rows}
    return [Launch("linear_residual", loads, {"residual": 4 * width * rows})]


def ln_fc_gelu(config: GPT2Config, precision: str, rows: int) -> list[Launch]:
    """The MLP's first half."""
    width, inner = config.n_embd, config.inner_size
    before, loads = normed(config, rows, unit_sums(width))
    loads |= {"weights": packed_bytes(precision, width, inner), "bias": 4 * inner}
    return [*before, Launch("ln_fc_gelu", loads, {"out": 2 * inner * rows})]


def ln_head(config: GPT2Config, precision: str, rows: int) -> list[Launch]:
    """Logits and parts of `rows` rows that draw greedily."""
    width, vocab = config.n_embd, config.vocab_size
    before, loads = normed(config, rows, NORMED_ROWS * (PART + 4) * 4, asked=4 * rows)
    loads |= {"weights": packed_bytes(precision, width, vocab), "draws": DRAW_BYTES * rows}
    stores = {"logits": 4 * vocab * rows, "parts": 16 * -(-vocab // PART) * rows}
    return [*before, Launch("ln_head", loads, stores)]


DRAW_BYTES = 12  # temperature and drawable: all a greedy draw looks at
CHOICE_BYTES = 28  # with top_k, top_p, min_p and target


def sample(config: GPT2Config, rows: int) -> list[Launch]:
    """Greedy tokens out of the parts, and their log-probabilities."""
    loads = {"parts": 16 * -(-config.vocab_size // PART) * rows, "draws": CHOICE_BYTES * rows}
    loads |= {"logits": 4 * rows}
    return [Launch("sample", loads, {"tokens": 4 * rows, "logprobs": 4 * rows})]


def decode_step(config: GPT2Config, precision: str, positions: Sequence[int]) -> list[Launch]:
    """Every launch of a step in which sequences of `positions` positions each add one token.

    Tokens and positions are taken to differ: sequences that share them load a little less.
    """
    rows, lengths = len(positions), [position + 1 for position in positions]
    launches = embed(config, precision, rows)
    for _ in range(config.n_layer):
        launches += ln_qkv(config, precision, rows)
        launches += attention_decode(config, lengths)
        launches += linear_residual(config, precision, rows, config.n_embd)
        launches += ln_fc_gelu(config, precision, rows)
        launches += linear_residual(config, precision, rows, config.inner_size)
    return launches + ln_head(config, precision, rows) + sample(config, rows)


def step_bytes(config: GPT2Config, precision: str, positions: Sequence[int]) -> int:
    """Bytes of a decode step, loads and stores of all launches."""
    return sum(
        launch.loaded + launch.stored for launch in decode_step(config, precision, positions)
    )


def minimum_bytes(config: GPT2Config, precision: str, positions: Sequence[int]) -> int:
    """What physics asks for: every parameter once, the cached keys and values, the new ones.

    12 L C^2 + V C weights (for an inner width of 4 C) and their scales; biases and norms in
    float32; 4 L C bytes a position.
    """
    width, inner = config.n_embd, config.inner_size
    matrices = [(width, 3 * width), (width, width), (width, inner), (inner, width)]
    matrices = matrices * config.n_layer + [(width, config.vocab_size)]
    weights = sum(
        n * k * WEIGHT_BITS[precision] // 8 + scale_bytes(precision, n, k) for n, k in matrices
    )
    vectors = sum(shape[0] for shape in config.tensor_shapes().values() if len(shape) == 1)
    cached = sum(positions) + len(positions)  # read, and appended
    return weights + 4 * vectors + 4 * width * config.n_layer * cached
