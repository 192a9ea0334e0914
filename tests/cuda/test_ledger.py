"""The byte ledger against physics, and against what the kernels do on the simulated device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from gpt2_fast import _C, PUBLISHED, GPT2Config
from tests.model_support import SpreadSource, drawing

from . import ledger
from .arrays import Array, array_of, normal, unwritten
from .packed import PRECISIONS, pack

# Above physics for one sequence: activations and, beyond 256 keys, partial attention, which stay in
# L2. They are the same in every precision, so they weigh more where weights are small.
BOUND = {"bf16": 1.008, "fp16": 1.008, "int8": 1.013, "int4": 1.02}

SHAPES = {
    "heads of 20, a ragged inner width": GPT2Config(
        n_layer=2, n_embd=60, n_head=3, n_ctx=300, vocab_size=203, n_inner=100, eos_token_id=None
    ),
    "slices, untied": GPT2Config(
        n_layer=1,
        n_embd=264,
        n_head=3,
        n_ctx=300,
        vocab_size=203,
        eos_token_id=None,
        tie_word_embeddings=False,
    ),
}
# Positions of each sequence: alone in its first page, at the ends of pages and chunks, and with the
# chunks of one block (256 keys) and more. Nine rows no longer fit one tile of tokens.
STEPS = [(0,), (15,), (63,), (64,), (255,), (256,), (299,), (3, 70, 280), tuple(range(5, 14))]
FEW_STEPS = [(0,), (17, 40), tuple(range(9))]  # for the larger shape


@pytest.mark.parametrize("size", PUBLISHED)
@pytest.mark.parametrize("precision", BOUND)
def test_a_step_moves_what_physics_asks_for(precision: str, size: str) -> None:
    config = PUBLISHED[size]
    for position in range(1, config.n_ctx):
        moved = ledger.step_bytes(config, precision, [position])

        least = ledger.minimum_bytes(config, precision, [position])
        assert least <= moved <= BOUND[precision] * least, (position, moved / least)


def test_the_minimum_of_124m() -> None:
    """12 L C^2 + V C weights, a scale for each 64 or 32 of them; 36,864 bytes a position."""
    weights = 12 * 12 * 768**2 + 50257 * 768
    vectors = 4 * (12 * 13 * 768 + 2 * 768)

    def least(precision: str, positions: list[int]) -> int:
        return ledger.minimum_bytes(PUBLISHED["124M"], precision, positions)

    assert least("bf16", []) == least("fp16", []) == 2 * weights + vectors
    assert least("int8", []) == weights + weights // 64 * 2 + vectors
    assert least("int4", []) == weights // 2 + weights // 32 * 2 + vectors
    assert least("bf16", [9, 0]) - least("bf16", []) == 36864 * (10 + 1)


@pytest.fixture
def counting(simt: Any) -> Iterator[Any]:
    """simt, with nothing counted yet."""
    # Counting goes through every load and store, which only that build sees; .ci/run runs it.
    if not simt.has_race_checker:
        pytest.skip("only the build with the race checker (build/simt/race) counts traffic")
    simt.track_nothing()
    simt.traffic()
    yield simt
    simt.track_nothing()
    simt.traffic()


def tokens_of(count: int, row: int) -> list[int]:
    """Different last tokens in different tiles of the head, so that they share no words."""
    return [(17 * (row + i)) % 200 for i in range(count)]


def engine_of(config: GPT2Config, precision: str) -> _C.Engine:
    engine = _C.Engine(config.to_dict(), precision, _C.default_isa(), 1, 9, "cuda", 0)
    for name, dtype, array, _ in SpreadSource(config).tensors():
        engine.load(name, array, dtype)
    return engine


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", SHAPES)
def test_kernels_move_what_they_declare(counting: Any, name: str, precision: str) -> None:
    config = SHAPES[name]
    engine = engine_of(config, precision)
    for positions in STEPS if config.n_embd < 256 else FEW_STEPS:
        sequences = [engine.open() for _ in positions]
        for sequence, position in zip(sequences, positions, strict=True):
            if position > 0:
                engine.step([(sequence, tokens_of(position, 0), None)])
        counting.traffic()

        engine.step(
            [(s, tokens_of(1, row), drawing(temperature=0.0)) for row, s in enumerate(sequences)]
        )

        counted = counting.traffic()
        declared = ledger.decode_step(config, precision, positions)
        assert [one["kernel"] for one in counted] == [one.kernel for one in declared]
        for found, said in zip(counted, declared, strict=True):
            loads = {said.loaded}
            if said.kernel == "attention_decode":
                loads.add(said.loaded + ledger.SEQUENCE_PADDING * len(positions))
            assert found["loaded_once"] in loads, (positions, said)
            assert found["stored_once"] == said.stored, (positions, said)
        for sequence in sequences:
            engine.close(sequence)


def loaded(simt: Any, array: Array, run: Any) -> tuple[int, int]:
    """Bytes of `array` that run() loads: all, and each once."""
    simt.track(array)
    simt.traffic()
    run()
    launches = simt.traffic()
    simt.track_nothing()
    assert sum(launch["stored"] for launch in launches) == 0
    return (
        sum(launch["loaded"] for launch in launches),
        sum(launch["loaded_once"] for launch in launches),
    )


@pytest.mark.parametrize("rows", [1, 8, 9, 32])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_weight_is_read_once(counting: Any, precision: str, rows: int) -> None:
    simt, inputs, outputs = counting, 330, 149
    words = pack(simt, normal(outputs, inputs), precision).words
    bias, norm = np.zeros(160, np.float32), unwritten((2, 384), torch.float32)
    norm[:, :inputs] = normal(2, inputs).numpy()
    residual, sums = array_of(normal(rows, 384)), array_of(normal(rows, 192))
    operand, logits = array_of(normal(rows, 384).half()), array_of(normal(rows, 192))
    out = unwritten((rows, 192), torch.float16)
    asked = np.arange(rows, dtype=np.int32)
    stages = [
        lambda: simt.linear_residual(precision, operand, words, bias, inputs, outputs, sums),
        lambda: simt.ln_fc_gelu(
            precision, residual, *norm, 1e-5, words, bias, inputs, outputs, operand, out
        ),
        lambda: simt.ln_head(
            precision, residual, asked, *norm, 1e-5, words, inputs, outputs, operand, logits,
            None, None,
        ),
    ]  # fmt: skip
    for stage in stages:
        assert loaded(simt, words, stage) == (words.nbytes, words.nbytes)
    assert words.nbytes == ledger.packed_bytes(precision, inputs, outputs)


@pytest.mark.parametrize("position", [0, 100, 300])
def test_every_cached_position_is_read_once(counting: Any, position: int) -> None:
    heads, size = 2, 64
    pages = -(-(position + 1) // 16)
    block_words = heads * 16 * size  # one layer
    blocks = array_of(normal(pages, block_words)).view(np.uint32)
    blocks &= 0x3FFF3FFF  # finite as pairs of float16
    query, out = array_of(normal(1, heads, size).half()), array_of(normal(1, heads * size).half())
    scratch = np.zeros(counting.attention_scratch_floats(heads, size, 320), np.float32)

    def attend() -> None:
        counting.attention(
            "decode", "fp16", query, out, size, blocks, [list(range(pages))], [1], [position], 0,
            0.125, scratch, 320,
        )  # fmt: skip

    keys, values = position + 1, -(-(position + 1) // 2) * 2  # a word holds two values
    wanted = heads * size * 2 * (keys + values)
    assert loaded(counting, blocks, attend) == (wanted, wanted)
