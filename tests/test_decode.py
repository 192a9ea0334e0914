"""Several passes in one call: the tokens and bits of as many single passes, and where they end."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from gpt2_fast import _C, GPT2, GPT2Config, ParameterError, ops
from tests.model_support import (
    TINY,
    SpreadSource,
    assert_all_free,
    drawing,
    facts,
    model_of,
    random_ids,
    scripted_model,
    tiny_model,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

LENGTHS = (1, 7, 15, 16, 33)  # of the sequences below


def engine_of(model: GPT2) -> _C.Engine:
    assert model._engine is not None
    return model._engine


@pytest.fixture
def begun() -> Iterator[tuple[_C.Engine, list[tuple[int, int, _C.Draw]]]]:
    """Sequences of several lengths with the last token of each not yet taken."""
    engine = engine_of(tiny_model())
    items = []
    for number, length in enumerate(LENGTHS):
        tokens = random_ids(TINY, length, number)
        sequence = engine.open()
        if length > 1:
            engine.step([(sequence, tokens[:-1], None)])
        items.append((sequence, tokens[-1], drawing(number)))
    yield engine, items
    for sequence, _, _ in items:
        engine.close(sequence)
    assert_all_free(tiny_model())


def bits(answers: list[list[tuple[int, float]]]) -> list[list[tuple[int, bytes]]]:
    return [
        [(token, np.float32(logprob).tobytes()) for token, logprob in drawn] for drawn in answers
    ]


def one_by_one(
    engine: _C.Engine, items: list[tuple[int, int, _C.Draw]], passes: int
) -> list[list[tuple[int, float]]]:
    """The same from copies of the sequences, a call for each pass."""
    copies = [(engine.fork(sequence), token, how) for sequence, token, how in items]
    tokens = [token for _, token, _ in copies]
    answers = []
    for _ in range(passes):
        step = [(copy, [t], how) for (copy, _, how), t in zip(copies, tokens, strict=True)]
        answers.append(engine.step(step))
        tokens = [token for token, _ in answers[-1]]
    for copy, _, _ in copies:
        engine.close(copy)
    return answers


@pytest.mark.parametrize("passes", [1, 2, 17, 31])
def test_many_passes_are_as_many_single_ones(begun: Any, passes: int) -> None:
    engine, items = begun
    wanted = one_by_one(engine, items, passes)
    assert bits(engine.decode(items, passes, -1)) == bits(wanted)
    assert [engine.length(sequence) for sequence, _, _ in items] == [
        length - 1 + passes for length in LENGTHS
    ]


@pytest.mark.parametrize("who", range(len(LENGTHS)))
def test_the_end_of_one_is_the_last_pass(begun: Any, who: int) -> None:
    engine, items = begun
    wanted = one_by_one(engine, items, 20)
    end = wanted[9][who][0]
    last = next(i for i, drawn in enumerate(wanted) if any(token == end for token, _ in drawn))
    assert bits(engine.decode(items, 20, end)) == bits(wanted[: last + 1])


def test_what_is_wrong_is_told(begun: Any) -> None:
    engine, items = begun
    with pytest.raises(ParameterError, match="sequence: 987654 is not open"):
        engine.decode([*items, (987654, 1, drawing(0))], 2, -1)
    with pytest.raises(ParameterError, match=r"tokens: 257 is outside 0\.\.256"):
        engine.decode([(items[0][0], 257, drawing(0))], 2, -1)
    with pytest.raises(ParameterError, match="holds 64 positions and 1 more do not fit"):
        engine.decode(items, 60, -1)
    assert engine.length(items[-1][0]) == 64  # the passes before it count


def test_an_interrupt_does_not_wait_for_all_passes() -> None:
    config = GPT2Config(
        n_layer=1, n_embd=8, n_head=1, n_ctx=100_000, vocab_size=257, eos_token_id=None
    )
    with model_of(SpreadSource(config)) as model:
        engine = engine_of(model)
        sequence = engine.open()
        start = time.perf_counter()
        answers = engine.decode([(sequence, 1, drawing(1))], 99_000, -1)
        took = time.perf_counter() - start
        assert engine.length(sequence) == len(answers) < 99_000
        assert took >= 0.05  # no sooner
        engine.close(sequence)


def test_who_waits_is_next() -> None:
    """While one thread makes many passes at a time, another makes one of its own after each."""
    config = GPT2Config(
        n_layer=2, n_embd=256, n_head=4, n_ctx=1024, vocab_size=8192, eos_token_id=None
    )
    with model_of(SpreadSource(config)) as model:
        engine = engine_of(model)
        busy, other = engine.open(), engine.open()
        ended = threading.Event()

        def keep_busy() -> None:
            while not ended.is_set() and engine.length(busy) < 900:
                engine.decode([(busy, 1, drawing(1))], 64, -1)

        thread = threading.Thread(target=keep_busy)
        thread.start()
        while engine.length(busy) == 0:
            time.sleep(0.001)
        before = engine.length(busy)
        for _ in range(40):
            engine.step([(other, [2], drawing(2))])
        passes = engine.length(busy) - before
        ended.set()
        thread.join()
        assert 20 <= passes <= 200  # of which 64 times 40 would have been due
        engine.close(busy)
        engine.close(other)


def test_numbers_that_end_are_the_last_pass() -> None:
    """Positions from 20 on have an embedding that is too large for any arithmetic."""
    positions = SpreadSource(TINY).array("wpe.weight").copy()
    positions[20:] = 3e38
    with model_of(SpreadSource(TINY, replace={"wpe.weight": positions})) as model:
        engine = engine_of(model)
        items = []
        for length in (3, 11):
            items.append((engine.open(), 5, drawing(length, drawable=256)))
            engine.step([(items[-1][0], random_ids(TINY, length - 1), None)])
        answers = engine.decode(items, 30, 256)  # an end that `drawable` leaves out
        assert len(answers) == 20 - 10 + 1  # of them the last takes position 20
        assert [token < 0 for token, _ in answers[-1]] == [False, True]
        assert all(token >= 0 for drawn in answers[:-1] for token, _ in drawn)
        for sequence, _, _ in items:
            engine.close(sequence)


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("most", [1, 2, 16, 17, 18, 40])
def test_generate_is_what_streams_say(n: int, most: int) -> None:
    """A stream makes one pass at a time; `generate` many, with ends of all kinds among them."""
    prompts = [random_ids(TINY, length, length) for length in (1, 5, 30, 47, 60, 64)]
    model = tiny_model()
    together = model.generate(prompts, seed=3, max_new_tokens=most, n=n)
    reasons = set()
    for prompt, found in zip(prompts, together, strict=True):
        samples = found if n > 1 else [found]
        reasons |= {one.finish_reason for one in samples}
        stream = model.stream(prompt, seed=3, max_new_tokens=most)
        list(stream)
        assert facts(stream.result) == facts(samples[0])
    assert reasons >= ({"length", "context"} if most > 1 else {"length"})
    assert_all_free(model)


def test_a_draw_is_that_of_its_position(begun: Any) -> None:
    """The bits of chance belong to the position a token is drawn for: that behind the last."""
    engine, items = begun
    drawn = one_by_one(engine, items, 1)[0]
    for number, ((sequence, token, _), (found, logprob)) in enumerate(
        zip(items, drawn, strict=True)
    ):
        copy = engine.fork(sequence)
        logits = engine.step([(copy, [token], "last")])[0][:, :257]
        engine.close(copy)
        ids, logprobs = ops.sample(
            torch.from_numpy(np.ascontiguousarray(logits)),
            temperature=torch.ones(1),
            top_k=torch.zeros(1, dtype=torch.int32),
            top_p=torch.ones(1),
            min_p=torch.zeros(1),
            openai_top_p=False,
            seeds=torch.tensor([number]),
            samples=torch.tensor([0]),
            positions=torch.tensor([LENGTHS[number]]),
        )
        assert (int(ids[0]), float(logprobs[0])) == (found, logprob)


def test_a_stream_hands_out_a_token_before_the_next_is_drawn() -> None:
    with scripted_model("abcdefghijklmnopqrstuvwxyz") as model:
        stream = model.stream("a", temperature=0.0, max_new_tokens=20)
        for number, letter in enumerate("abcdefghij", 1):
            assert next(stream) == letter
            assert engine_of(model).length(stream._batch.samples[0].sequence) == number
        stream.close()
