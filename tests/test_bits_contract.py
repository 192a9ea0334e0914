"""The bits contract: a row's logits and tokens depend on its own tokens, parameters and seed, the
weights and the precision, and on nothing else. Compared bit for bit."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_fast import _C
from gpt2_fast.config import PUBLISHED, GPT2Config
from gpt2_fast.model import GPT2
from gpt2_fast.sources import RandomSource
from tests.bits_support import (
    ALL_ROWS,
    Guest,
    Logits,
    guest_lists,
    perturbed,
    run_alone,
    run_together,
    some_tokens,
)

# Of the weights, and of a cache that is not like the rest.
PRECISIONS = ["fp32", "bf16", "int8", "int4", "fp32, int8 cache", "int8, int8 cache"]
# Odd on purpose: heads of 20, a width that is no multiple of 16, a vocabulary that fills no panel.
SMALL = GPT2Config(
    n_layer=2, n_embd=60, n_head=3, n_ctx=1024, vocab_size=131, n_inner=100, eos_token_id=None
)


def tokens_of(seed: int, length: int) -> tuple[int, ...]:
    return some_tokens(seed, length, SMALL.vocab_size)


@lru_cache(maxsize=1)
def small_weights() -> list[tuple[str, npt.NDArray[np.float32]]]:
    return perturbed(RandomSource(SMALL, 1))


def made(config: GPT2Config, precision: str, isa: str, threads: int, sequences: int) -> _C.Engine:
    weights, _, cache = precision.partition(", ")
    where = (sequences, "cpu", 0, bool(cache))
    return _C.Engine(config.to_dict(), weights, isa, threads, *where)


@lru_cache(maxsize=32)
def small_engine(precision: str, isa: str, threads: int) -> _C.Engine:
    engine = made(SMALL, precision, isa, threads, 17)
    for name, array in small_weights():
        engine.load(name, array, "F32")
    return engine


@lru_cache(maxsize=256)
def truth(precision: str, tokens: tuple[int, ...]) -> Logits:
    """One thread, the machine's best instruction set, alone."""
    return run_alone(small_engine(precision, _C.isas()[-1], 1), list(tokens))


@pytest.mark.parametrize("precision", PRECISIONS)
@given(
    guests=guest_lists(SMALL.vocab_size, 1024, 16, 300),
    isa=st.sampled_from([name for name in _C.isas() if name != "scalar"] or ["scalar"]),
    threads=st.integers(1, 4),
)
def test_rows_do_not_depend_on_company(
    precision: str, guests: list[Guest], isa: str, threads: int
) -> None:
    engine = small_engine(precision, isa, threads)
    free = engine.free_blocks

    run_together(engine, guests)

    for guest in guests:
        np.testing.assert_array_equal(
            np.concatenate(guest.parts).view(np.uint32),
            truth(precision, guest.tokens).view(np.uint32),
        )
    assert engine.free_blocks == free


@pytest.mark.parametrize("precision", PRECISIONS)
@settings(max_examples=8)
@given(seed=st.integers(0, 50), length=st.integers(1, 130), threads=st.integers(1, 3))
def test_scalar_gives_the_same_bits(precision: str, seed: int, length: int, threads: int) -> None:
    tokens = tokens_of(seed, length)
    scalar = run_alone(small_engine(precision, "scalar", threads), list(tokens))
    np.testing.assert_array_equal(scalar.view(np.uint32), truth(precision, tokens).view(np.uint32))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_widths_on_every_instruction_set(precision: str, name: str) -> None:
    shape = PUBLISHED[name]
    config = GPT2Config(
        n_layer=1, n_embd=shape.n_embd, n_head=shape.n_head, n_ctx=64, vocab_size=500,
        eos_token_id=None,
    )  # fmt: skip
    weights = perturbed(RandomSource(config, 3))
    tokens = np.random.default_rng(1).integers(0, 500, 22).tolist()
    seen = []
    for isa in _C.isas():
        engine = made(config, precision, isa, 2, 2)
        for parameter, array in weights:
            engine.load(parameter, array, "F32")
        # A chunk, then single tokens: wide and narrow tiles of every kernel.
        sequence = engine.open()
        head = engine.step([(sequence, tokens[:17], ALL_ROWS)])[0]
        tail = [engine.step([(sequence, [token], ALL_ROWS)])[0] for token in tokens[17:]]
        seen.append(np.concatenate([head, *tail]))
    for logits in seen[1:]:
        np.testing.assert_array_equal(logits.view(np.uint32), seen[0].view(np.uint32))


@pytest.mark.parametrize("isa", _C.isas())
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_small_number_of_rows_together(precision: str, isa: str) -> None:
    """Products take them in tiles of other shapes, and matrices in several blocks of inputs."""
    config = GPT2Config(
        n_layer=1, n_embd=320, n_head=5, n_ctx=512, vocab_size=100, n_inner=600, eos_token_id=None
    )
    engine = made(config, precision, isa, 1, 2)
    for parameter, array in perturbed(RandomSource(config, 4)):
        engine.load(parameter, array, "F32")
    tokens = list(some_tokens(5, sum(range(31)), 100))
    one, many = engine.open(), engine.open()

    alone = [engine.step([(one, [token], ALL_ROWS)])[0] for token in tokens]
    together = [
        engine.step([(many, tokens[rows * (rows - 1) // 2 :][:rows], ALL_ROWS)])[0]
        for rows in range(1, 31)
    ]

    np.testing.assert_array_equal(
        np.concatenate(together).view(np.uint32), np.concatenate(alone).view(np.uint32)
    )


@pytest.mark.parametrize("precision", ["bf16", "int8, int8 cache"])
def test_forked_sequences_equal_separate_ones(precision: str) -> None:
    engine = small_engine(precision, _C.isas()[-1], 2)
    prefix, tails = tokens_of(1, 37), [tokens_of(s, 60) for s in (2, 3, 4)]
    parent = engine.open()
    engine.step([(parent, list(prefix), None)])
    children = [engine.fork(parent) for _ in tails]
    answers = engine.step(
        [(child, list(tail), ALL_ROWS) for child, tail in zip(children, tails, strict=True)]
    )
    parent_again = engine.step([(parent, list(tails[0]), ALL_ROWS)])[0]
    for sequence in [parent, *children]:
        engine.close(sequence)

    for tail, logits in zip(tails, answers, strict=True):
        np.testing.assert_array_equal(logits, truth(precision, prefix + tail)[len(prefix) :])
    np.testing.assert_array_equal(parent_again, answers[0])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_generate_is_the_same_everywhere(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, _, cache = precision.partition(", ")
    prompt = "It was a truth"
    others = [f"Number {i}, {'and so on ' * (i % 4)}" for i in range(15)]
    sampling = {"max_new_tokens": 12, "temperature": 0.9, "top_p": 0.95, "seed": 11}
    seen = []
    for isa in _C.isas():
        monkeypatch.setenv("GPT2_FAST_ISA", isa)
        for threads in (1, 2):
            with GPT2.from_pretrained(
                "builtin",
                device="cpu",
                precision=weights,
                kv_precision=cache.removesuffix(" cache") or None,
                threads=threads,
            ) as model:
                assert model.isa == isa
                assert model.threads == threads
                alone = model.generate(prompt, **sampling)
                batch = model.generate([*others[:7], prompt, *others[7:]], **sampling)[7]
            seen += [(alone.token_ids, alone.logprobs), (batch.token_ids, batch.logprobs)]
    assert all(each == seen[0] for each in seen)
