"""The bits contract where rows are divided: between lanes, and into those that are asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gpt2_fast import _C
from gpt2_fast.config import GPT2Config
from gpt2_fast.sources import RandomSource
from tests.bits_support import ALL_ROWS, perturbed, run_alone, some_tokens

PRECISIONS = ["fp32", "bf16", "int8", "int4", "bf16, int8 cache"]
VOCAB = 90
# Heads that fill panels, four of them or one; and heads that do not, of odd size.
SHAPES = {"wide": (128, 2), "narrow": (48, 3), "odd": (45, 3)}


def config_of(shape: str) -> GPT2Config:
    width, heads = SHAPES[shape]
    return GPT2Config(
        n_layer=2, n_embd=width, n_head=heads, n_ctx=512, vocab_size=VOCAB, eos_token_id=None
    )


def engine(config: GPT2Config, precision: str, threads: int, isa: str = "") -> _C.Engine:
    weights, _, cache = precision.partition(", ")
    where = (4, "cpu", 0, bool(cache))
    made = _C.Engine(config.to_dict(), weights, isa or _C.isas()[-1], threads, *where)
    for name, array in perturbed(RandomSource(config, 6)):
        made.load(name, array, "F32")
    return made


# (positions before, rows) of each sequence in one pass of 256 rows and less, where two lanes begin
# with rows 0 and 128: at the first or the second position of a pair, or between two sequences.
PASSES = [
    [(0, 256)],
    [(1, 255)],
    [(1, 256)],
    [(3, 193)],
    [(0, 127), (1, 129)],
    [(0, 128), (1, 128)],
    [(0, 125), (0, 131)],
    [(5, 120), (2, 80), (1, 50)],
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_lanes_that_have_rows_of_their_own(precision: str, shape: str) -> None:
    config = config_of(shape)
    alone = engine(config, precision, 1)
    texts = [list(some_tokens(seed, 300, VOCAB)) for seed in range(3)]
    truth = [run_alone(alone, text) for text in texts]
    isas = _C.isas() if shape == "wide" else _C.isas()[-1:]
    for isa in isas:
        several = engine(config, precision, 2, isa)
        for rows in PASSES:
            sequences = [several.open() for _ in rows]
            for sequence, text, (before, _) in zip(sequences, texts, rows, strict=False):
                if before:
                    several.step([(sequence, text[:before], None)])
            items: list[tuple[int, list[int], Any]] = [
                (sequence, text[before : before + count], ALL_ROWS)
                for sequence, text, (before, count) in zip(sequences, texts, rows, strict=False)
            ]
            found = several.step(items)
            items = [
                (sequence, text[before + count :][:20], ALL_ROWS)
                for sequence, text, (before, count) in zip(sequences, texts, rows, strict=False)
            ]
            later = several.step(items)  # what the pass left in the cache
            for sequence in sequences:
                several.close(sequence)
            for i, (before, count) in enumerate(rows):
                wanted = truth[i][before : before + count + 20].view(np.uint32)
                got = np.concatenate([found[i], later[i]]).view(np.uint32)
                np.testing.assert_array_equal(got, wanted, err_msg=f"{isa}, {rows}")


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_rows_do_not_depend_on_which_are_asked_for(precision: str, threads: int) -> None:
    config = config_of("narrow")
    rng = np.random.default_rng(3)
    texts = [list(some_tokens(seed, 300, VOCAB)) for seed in range(3)]
    alone, busy = engine(config, precision, 1), engine(config, precision, threads)
    logits = [run_alone(alone, text) for text in texts]
    logprobs = []
    for text in texts:
        sequence = alone.open()
        parts = [text[:150], text[150:299]]
        nexts = [text[1:151], text[151:300]]
        pairs = zip(parts, nexts, strict=True)
        logprobs.append(np.concatenate([alone.step([(sequence, *pair)])[0] for pair in pairs]))
        alone.close(sequence)

    sequences, fed = [busy.open() for _ in texts], [0, 0, 0]
    kinds = set()
    while min(fed) < 290:
        items: list[tuple[int, list[int], Any]] = []
        asked = []
        for i in rng.permutation(3).tolist():
            count = min(int(rng.integers(1, 60)), 299 - fed[i])
            if count == 0 or rng.random() < 0.2:
                continue
            kind = ("nothing", "last", "all", "targets")[rng.integers(4)]
            chosen = rng.random(count) < 0.1
            nexts = texts[i][fed[i] + 1 :][:count]
            want: Any = {
                "nothing": None,
                "targets": [t if yes else -1 for t, yes in zip(nexts, chosen, strict=True)],
            }.get(kind, kind)
            items.append((sequences[i], texts[i][fed[i] : fed[i] + count], want))
            asked.append((i, count, kind, chosen))
        for answer, (i, count, kind, chosen) in zip(busy.step(items), asked, strict=True):
            rows = slice(fed[i] if kind == "all" else fed[i] + count - 1, fed[i] + count)
            if kind in ("last", "all"):
                np.testing.assert_array_equal(answer, logits[i][rows])
            elif kind == "targets" and chosen.any():
                assert answer == logprobs[i][fed[i] : fed[i] + count][chosen].tolist()
            else:
                assert answer is None
            kinds.add((kind, kind == "targets" and bool(chosen.any())))
            fed[i] += count
    assert len(kinds) == 5
