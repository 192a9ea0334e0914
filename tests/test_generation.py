"""Generation: seeds, independence of company, streams, failures of one request, interruption."""

from __future__ import annotations

import gc
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from typing import Any

import numpy as np
import pytest

from gpt2_fast import GPT2, CapacityError, GPT2Config, ParameterError, SamplingParams
from gpt2_fast.generation import Batch
from tests.accuracy import assert_as_accurate_as_torch
from tests.model_support import (
    BUILTIN,
    TINY,
    SpreadSource,
    byte_tokenizer,
    facts,
    model_of,
    random_ids,
    scripted_model,
    tiny_model,
)

PRECISIONS = ("fp32", "bf16")


def free(model: GPT2) -> int:
    """Blocks of the cache that nobody holds."""
    assert model._engine is not None
    return model._engine.free_blocks


def assert_all_free(model: GPT2) -> None:
    assert model._engine is not None
    assert model._engine.free_blocks == model._engine.blocks
    # And every sequence: as many as there are can be opened.
    opened = [model._engine.open() for _ in range(model._engine.blocks // 4)]
    for sequence in opened:
        model._engine.close(sequence)


@pytest.fixture(autouse=True)
def _nothing_leaks() -> Any:
    yield
    for precision in PRECISIONS:
        assert_all_free(tiny_model(precision))


def mixed_prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Prompts of 1 .. 64 tokens; short, page-sized and full ones among them."""
    rng = np.random.default_rng(seed)
    lengths = [1, 2, 15, 16, 17, 32, 63, 64, *rng.integers(1, 65, size=count)][:count]
    return [random_ids(TINY, int(length), seed * 1000 + i) for i, length in enumerate(lengths)]


SETTINGS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.0},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    {"temperature": 1.3, "top_p": 0.7, "top_p_rule": "openai", "stop": ["a", "\x00", "é"]},
]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("how", SETTINGS, ids=str)
def test_a_prompt_does_not_see_its_company(how: dict[str, Any], precision: str) -> None:
    """Sixteen at once, in any order, in batches of any size: the same tokens and bits."""
    prompts, seeds = mixed_prompts(16), list(range(100, 116))
    model = tiny_model(precision)
    alone = [
        facts(model.generate(prompt, seed=seed, max_new_tokens=40, **how))
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    assert len({each[1] for each in alone}) == 16
    assert len({each[3] for each in alone}) >= 2  # they leave at different times

    orders = [list(range(16)), list(range(15, -1, -1)), random.Random(3).sample(range(16), 16)]
    for max_batch in (1, 2, 16):
        for order in orders:
            together = tiny_model(precision, max_batch).generate(
                [prompts[i] for i in order],
                seed=[seeds[i] for i in order],
                max_new_tokens=40,
                **how,
            )
            assert [facts(each) for each in together] == [alone[i] for i in order]


@pytest.mark.parametrize("threads", [1, 3, 5])
def test_threads_do_not_change_a_bit(threads: int) -> None:
    prompts = mixed_prompts(6, seed=2)
    wanted = [facts(each) for each in tiny_model().generate(prompts, seed=1, max_new_tokens=20)]
    other = tiny_model(threads=threads).generate(prompts, seed=1, max_new_tokens=20)
    assert [facts(each) for each in other] == wanted


def test_more_prompts_than_rows_of_a_pass() -> None:
    """Three hundred prompts, up to 256 rows in a pass: everyone gets a turn."""
    prompts = mixed_prompts(300, seed=4)
    wide, narrow = tiny_model(max_batch=300), tiny_model(max_batch=7)
    one = [facts(each) for each in wide.generate(prompts, seed=range(300), max_new_tokens=5)]
    two = [facts(each) for each in narrow.generate(prompts, seed=range(300), max_new_tokens=5)]
    assert one == two
    assert_all_free(wide)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("length", [1, 2, 16, 17, 33, 64])
def test_samples_share_a_prompt_and_nothing_else(length: int, precision: str) -> None:
    """n samples, with more of them than run at once, are those of every smaller n."""
    prompt = random_ids(TINY, length, length)
    wanted = tiny_model(precision).generate(prompt, n=20, seed=9, max_new_tokens=30)
    assert len({tuple(each.token_ids) for each in wanted}) >= (19 if length < 60 else 2)
    for max_batch in (1, 2, 16):
        model = tiny_model(precision, max_batch)
        for n in (1, 2, 3, 17):
            several = model.generate(prompt, n=n, seed=9, max_new_tokens=30)
            each = several if n > 1 else [several]
            assert [facts(one) for one in each] == [facts(one) for one in wanted[:n]]


def test_samples_of_several_prompts() -> None:
    prompts = mixed_prompts(5, seed=6)
    alone = [
        [facts(one) for one in tiny_model().generate(prompt, n=4, seed=i, max_new_tokens=12)]
        for i, prompt in enumerate(prompts)
    ]
    for max_batch in (1, 2, 3, 5, 16):
        together = tiny_model(max_batch=max_batch).generate(
            prompts, n=4, seed=range(5), max_new_tokens=12
        )
        assert [[facts(one) for one in each] for each in together] == alone


def test_samples_read_their_prompt_once() -> None:
    """Siblings share pages: sixteen samples of a long prompt fit where two long texts would."""
    model = tiny_model()
    prompt = random_ids(TINY, 49)  # 3 whole blocks and one position
    lowest = model._engine.blocks  # type: ignore[union-attr]
    batch = Batch(
        model._engine,  # type: ignore[arg-type]
        [prompt],
        SamplingParams(n=16, seed=1, max_new_tokens=10),
        tokenizer=byte_tokenizer(),
        n_ctx=64,
        eos=None,
    )
    for _ in batch.run():
        lowest = min(lowest, free(model))
    assert model._engine.blocks - lowest == 3 + 16  # type: ignore[union-attr]


def test_seeds() -> None:
    model = tiny_model()
    first = model.generate("abc", seed=1, max_new_tokens=30)
    assert facts(model.generate("abc", seed=1, max_new_tokens=30)) == facts(first)
    assert model.generate("abc", seed=2, max_new_tokens=30).token_ids != first.token_ids
    assert first.seed == 1
    # One int for all prompts: equal prompts draw equal texts; one per prompt: they do not.
    same = model.generate(["abc"] * 3, seed=1, max_new_tokens=30)
    assert [facts(each) for each in same] == [facts(first)] * 3
    other = model.generate(["abc"] * 3, seed=[1, 2, 2**64 - 1], max_new_tokens=30)
    assert facts(other[0]) == facts(first)
    assert len({tuple(each.token_ids) for each in other}) == 3
    assert [each.seed for each in other] == [1, 2, 2**64 - 1]
    assert facts(model.generate("abc", seed=2**64 - 1, max_new_tokens=30)) == facts(other[2])
    # Seeds that differ in one half only, high or low.
    high = model.generate("abc", seed=1 + (1 << 32), max_new_tokens=30)
    assert high.token_ids != first.token_ids


def test_without_a_seed_one_is_drawn_and_named() -> None:
    model = tiny_model()
    one, two = model.generate(["abc", "abc"], max_new_tokens=30)
    assert one.seed != two.seed
    assert one.token_ids != two.token_ids
    assert facts(model.generate("abc", seed=one.seed, max_new_tokens=30)) == facts(one)
    three = model.generate("abc", n=2, max_new_tokens=30)
    assert three[0].seed == three[1].seed
    again = model.generate("abc", n=2, seed=three[0].seed, max_new_tokens=30)
    assert [facts(each) for each in again] == [facts(each) for each in three]


def test_greedy_needs_no_seed() -> None:
    model = tiny_model()
    texts = [model.generate("abc", temperature=0, max_new_tokens=30) for _ in range(3)]
    assert len({tuple(each.token_ids) for each in texts}) == 1
    assert len({tuple(each.token_ids) for each in model.generate("a", n=3, temperature=0)}) == 1


def test_a_longer_run_begins_like_a_shorter_one() -> None:
    model = tiny_model()
    long = model.generate("abc", seed=1, max_new_tokens=40, ignore_eos=True)
    for count in (1, 2, 17, 39):
        short = model.generate("abc", seed=1, max_new_tokens=count, ignore_eos=True)
        assert short.token_ids == long.token_ids[:count]
        assert short.logprobs == long.logprobs[:count]


def test_a_text_continued_by_hand_is_the_same_text() -> None:
    """Noise is keyed by position: drawn tokens given back as a prompt change nothing after them."""
    model = tiny_model()
    prompt = random_ids(TINY, 10)
    whole = model.generate(prompt, seed=1, max_new_tokens=40, ignore_eos=True)
    for cut in (1, 6, 20):
        rest = model.generate(
            prompt + whole.token_ids[:cut], seed=1, max_new_tokens=40 - cut, ignore_eos=True
        )
        assert rest.token_ids == whole.token_ids[cut:]
        assert rest.logprobs == whole.logprobs[cut:]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("how", SETTINGS, ids=str)
def test_logprobs_are_the_log_softmax_of_forward(how: dict[str, Any], precision: str) -> None:
    """Of the model's own distribution, whatever was asked of the draw."""
    import torch

    model = tiny_model(precision)
    prompt = random_ids(TINY, 9)
    result = model.generate(prompt, seed=3, max_new_tokens=30, **how)
    logits = torch.from_numpy(model.forward(prompt + result.token_ids[:-1])[len(prompt) - 1 :])
    picked = torch.tensor(result.token_ids)[:, None]
    assert_as_accurate_as_torch(
        torch.tensor(result.logprobs),
        logits.log_softmax(-1).gather(1, picked)[:, 0],
        logits.double().log_softmax(-1).gather(1, picked)[:, 0],
    )
    assert result.logprobs == model.score(prompt + result.token_ids).logprobs[len(prompt) :]


def test_timings() -> None:
    start = time.perf_counter()
    results = tiny_model().generate(["a", "bcd"], n=2, seed=1, max_new_tokens=10, ignore_eos=True)
    passed = time.perf_counter() - start
    for prompt, per_prompt in zip(["a", "bcd"], results, strict=True):
        for each in per_prompt:
            assert 0 < each.timings.first_token < each.timings.total < passed
            assert each.timings.prompt_tokens == len(prompt)
            assert each.timings.new_tokens == 10
            assert each.timings.tokens_per_second > 0


@pytest.mark.parametrize("how", SETTINGS, ids=str)
def test_pieces_of_a_stream_are_the_text(how: dict[str, Any]) -> None:
    model = tiny_model()
    for seed in range(8):
        whole = model.generate("abc", seed=seed, max_new_tokens=50, **how)
        assert "".join(model.stream("abc", seed=seed, max_new_tokens=50, **how)) == whole


def test_a_stream_comes_as_it_is_drawn() -> None:
    with scripted_model("one two three") as model:
        stream = model.stream("x", temperature=0, max_new_tokens=13)
        blocks = model._engine.blocks  # type: ignore[union-attr]
        assert free(model) == blocks  # nothing runs before it is asked
        assert next(stream) == "o"
        assert free(model) < blocks
        assert next(stream) == "n"
        assert "".join(stream) == "e two three"
        assert list(stream) == []
        assert free(model) == blocks


def test_streams_and_calls_take_turns() -> None:
    model = tiny_model()
    wanted = [model.generate("abc", seed=seed, max_new_tokens=40) for seed in range(4)]
    streams = [model.stream("abc", seed=seed, max_new_tokens=40) for seed in range(4)]
    texts = [""] * 4
    while any(streams):
        for i, stream in enumerate(streams):
            if stream is not None:
                piece = next(stream, None)
                if piece is None:
                    streams[i] = None  # type: ignore[call-overload]
                else:
                    texts[i] += piece
        assert facts(model.generate("abc", seed=1, max_new_tokens=5))[1] == (
            tuple(wanted[1].token_ids[:5])
        )
    assert texts == wanted


def test_a_stream_knows_its_result() -> None:
    model = tiny_model()
    wanted = model.generate("abc", seed=1, max_new_tokens=20)
    stream = model.stream("abc", seed=1, max_new_tokens=20)
    for ask in (lambda: None, lambda: next(stream)):
        ask()
        with pytest.raises(ParameterError, match="result: this stream was not read to its end"):
            _ = stream.result  # type: ignore[attr-defined]
    list(stream)
    assert facts(stream.result) == facts(wanted)  # type: ignore[attr-defined]
    left = model.stream("abc", seed=1, max_new_tokens=20)
    next(left)
    left.close()  # type: ignore[attr-defined]
    assert list(left) == []
    with pytest.raises(ParameterError, match="result: this stream was not read to its end"):
        _ = left.result  # type: ignore[attr-defined]


def test_who_draws_does_not_wait_for_who_reads() -> None:
    """A short prompt gets a token in every pass, while long ones are read beside it."""
    config = GPT2Config(n_layer=1, n_embd=16, n_head=1, n_ctx=700, vocab_size=257, eos_token_id=256)
    long, short = random_ids(config, 650), [65]
    with model_of(SpreadSource(config), byte_tokenizer()) as model:
        batch = Batch(
            model._engine,  # type: ignore[arg-type]
            [long, long, long, short],
            SamplingParams(seed=1, max_new_tokens=40, ignore_eos=True),
            tokenizer=byte_tokenizer(),
            n_ctx=700,
            eos=None,
        )
        drawn = [sample.drawn for sample in batch.samples]
        for _ in batch.run():
            if len(drawn[3]) < 8 and any(drawn[:3]):
                break  # 1,950 prompt tokens take eight passes, and the first long prompt three
        assert len(drawn[3]) >= 3
        assert not any(drawn[1:3])


def test_leaving_a_stream_early_frees_its_sequence() -> None:
    model = tiny_model()
    for leave in ("break", "close", "del", "throw", "never started"):
        stream = model.stream("abc", seed=1, max_new_tokens=50)
        if leave == "break":
            for _ in stream:
                break
            del stream
        elif leave == "close":
            next(stream)
            stream.close()  # type: ignore[attr-defined]
            assert next(stream, None) is None
        elif leave == "throw":
            next(stream)
            with pytest.raises(KeyError):
                stream.throw(KeyError("mine"))  # type: ignore[attr-defined]
        elif leave == "del":
            next(stream)
            del stream
        gc.collect()
        assert_all_free(model)


def test_a_failure_in_the_middle_frees_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    from gpt2_fast.stopping import TextBuilder

    model = tiny_model()
    push = TextBuilder.push
    calls = 0

    def failing(self: TextBuilder, token: int) -> str:
        nonlocal calls
        calls += 1
        if calls == 50:
            raise KeyError("planted")
        return push(self, token)

    monkeypatch.setattr(TextBuilder, "push", failing)
    with pytest.raises(KeyError, match="planted"):
        model.generate(["a", "b", "c"], n=3, seed=1, max_new_tokens=30)
    assert_all_free(model)
    monkeypatch.undo()
    assert len(model.generate("a", n=3, seed=1, max_new_tokens=3)) == 3


def test_interrupts_at_any_point_free_everything() -> None:
    """An exception after every line of the loop in turn, as a signal handler would raise it."""
    import gpt2_fast.generation as loop

    class Interrupt(BaseException):
        pass

    model = tiny_model()
    how = {"seed": 1, "max_new_tokens": 3, "n": 2}
    wanted = [[facts(one) for one in each] for each in model.generate(["ab", "c"], **how)]
    seen = 0
    reached = 0

    def trace(at: int) -> Any:
        def local(frame: Any, event: str, arg: object) -> Any:
            nonlocal seen, reached
            if event == "line":
                seen += 1
                if seen == at:
                    reached = frame.f_lineno
                    raise Interrupt
            return local

        def enter(frame: Any, event: str, arg: object) -> Any:
            inside = frame.f_code.co_filename == loop.__file__
            return local if inside and frame.f_code.co_name != "<lambda>" else None

        return enter

    at = 0
    previous = sys.gettrace()
    while True:
        at, seen = at + 1, 0
        sys.settrace(trace(at))
        try:
            model.generate(["ab", "c"], **how)
        except Interrupt:
            pass
        else:
            break
        finally:
            sys.settrace(previous)
        assert free(model) == model._engine.blocks, reached  # type: ignore[union-attr]
    assert at > 100
    assert_all_free(model)
    assert [[facts(one) for one in each] for each in model.generate(["ab", "c"], **how)] == wanted


def test_two_hundred_cancelled_streams_leak_nothing() -> None:
    model = tiny_model()
    rng = random.Random(5)
    wanted = facts(model.generate("abc", seed=7, max_new_tokens=20))
    alive: list[Any] = []
    for i in range(200):
        stream = model.stream(random_ids(TINY, rng.randrange(1, 50), i), max_new_tokens=60)
        for _ in range(rng.randrange(4)):
            next(stream, None)
        alive.append(stream)
        if len(alive) > 10:
            alive.pop(rng.randrange(len(alive))).close()
        if i % 40 == 0:
            assert facts(model.generate("abc", seed=7, max_new_tokens=20)) == wanted
    for stream in alive:
        stream.close()
    assert_all_free(model)


def test_when_all_sequences_are_taken() -> None:
    """A stream that is not read holds its sequence: another call fails and harms nothing."""
    model = tiny_model(max_batch=1)
    wanted = facts(model.generate("abc", seed=1, max_new_tokens=20))
    stream = model.stream("abc", seed=1, max_new_tokens=20)
    first = next(stream)
    for ask in (
        lambda: model.generate("x", max_new_tokens=2),
        lambda: model.forward([1, 2]),
        lambda: model.score([1, 2]),
        lambda: next(model.stream("x")),
    ):
        with pytest.raises(CapacityError, match="all 1 are in use"):
            ask()
    assert first + "".join(stream) == wanted[0]
    assert facts(model.generate("abc", seed=1, max_new_tokens=20)) == wanted
    assert_all_free(model)


def overflowing(position: int, precision: str, **how: Any) -> GPT2:
    """Finite parameters that overflow at one position: its embedding is the largest there is."""
    wpe = SpreadSource(TINY).array("wpe.weight").copy()
    wpe[position] = 3e38
    source = SpreadSource(TINY, replace={"wpe.weight": wpe})
    return model_of(source, byte_tokenizer(), precision=precision, threads=2, **how)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_numbers_that_overflow_end_their_own_request_only(precision: str) -> None:
    prompts = [random_ids(TINY, length, length) for length in (1, 5, 20, 21, 40, 64, 12)]
    healthy = tiny_model(precision)
    with overflowing(20, precision, max_batch=4) as model:
        for _ in range(2):  # a second time, on pages where the first left what is not a number
            results = model.generate(
                prompts, seed=range(7), max_new_tokens=60, ignore_eos=True, n=2
            )
            for i, (prompt, per_prompt) in enumerate(zip(prompts, results, strict=True)):
                wanted = healthy.generate(prompt, seed=i, n=2, max_new_tokens=60, ignore_eos=True)
                for one, other in zip(per_prompt, wanted, strict=True):
                    # Tokens up to position 20 are drawn from positions before it.
                    count = max(0, 21 - len(prompt))
                    assert one.finish_reason == "numerical_error"
                    assert one.token_ids == other.token_ids[:count]
                    assert one.logprobs == other.logprobs[:count]
            short = model.generate(
                [prompts[1], prompts[6]] * 8, seed=3, max_new_tokens=8, ignore_eos=True
            )
            for i, one in enumerate(short):
                wanted = healthy.generate(
                    prompts[1 if i % 2 == 0 else 6], seed=3, max_new_tokens=8, ignore_eos=True
                )
                assert facts(one) == facts(wanted)
        assert_all_free(model)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rows_before_an_overflow_do_not_see_it(precision: str) -> None:
    ids = random_ids(TINY, 30)
    with overflowing(20, precision) as model:
        logits = model.forward(ids)
    assert not np.isfinite(logits[20:]).any()
    assert np.array_equal(logits[:20], tiny_model(precision).forward(ids)[:20])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_numerical_error_in_company(precision: str) -> None:
    """Healthy and failing requests in the same passes."""
    healthy = tiny_model(precision)
    prompts = mixed_prompts(16, seed=8)
    with overflowing(30, precision) as model:
        results = model.generate(prompts, seed=range(16), max_new_tokens=12, ignore_eos=True)
    wanted = healthy.generate(prompts, seed=range(16), max_new_tokens=12, ignore_eos=True)
    reasons = set()
    for prompt, one, other in zip(prompts, results, wanted, strict=True):
        reasons.add(one.finish_reason)
        if len(prompt) + 12 <= 31:
            assert facts(one) == facts(other)
        else:
            assert one.finish_reason == "numerical_error"
            assert one.token_ids == other.token_ids[: max(0, 31 - len(prompt))]
    assert reasons == {"numerical_error", "length"}


def test_stop_texts_need_a_tokenizer() -> None:
    with model_of(SpreadSource(TINY)) as model:
        with pytest.raises(ParameterError, match="stop: this model has no tokenizer"):
            model.generate([1], stop="a")
        result = model.generate([1], seed=1, max_new_tokens=5, stop=[], ignore_eos=True)
        assert (str(result), len(result.token_ids)) == ("", 5)
        assert list(model.stream([1], seed=1, max_new_tokens=5)) == []
        assert_all_free(model)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_forked_child_generates(threads: int) -> None:
    model = tiny_model(threads=threads)
    wanted = facts(model.generate(["abc", "d"], seed=1, max_new_tokens=20)[0])
    stream = model.stream("abc", seed=1, max_new_tokens=20)
    begun = next(stream)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: fork with threads
        child = os.fork()
    if child == 0:  # no assertion must leave: the child is a copy of the whole test run
        code = 1
        try:
            same = facts(model.generate(["abc", "d"], seed=1, max_new_tokens=20)[0]) == wanted
            code = 0 if same and begun + "".join(stream) == wanted[0] else 2
        finally:
            os._exit(code)
    deadline = time.monotonic() + 60
    while (status := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    if status == (0, 0):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the child hangs")
    assert os.waitstatus_to_exitcode(status[1]) == 0
    assert begun + "".join(stream) == wanted[0]
    assert facts(model.generate(["abc", "d"], seed=1, max_new_tokens=20)[0]) == wanted


def test_ctrl_c_stops_within_a_step() -> None:
    """The signal comes while a pass runs; the call ends after it, and the model is usable."""
    config = GPT2Config(
        n_layer=4, n_embd=256, n_head=4, n_ctx=1024, vocab_size=257, eos_token_id=None
    )
    with model_of(SpreadSource(config, spread=0.02), byte_tokenizer(), threads=2) as model:
        wanted = facts(model.generate("abc", seed=1, max_new_tokens=5))
        start = time.perf_counter()
        model.forward([1] * 256)
        step = time.perf_counter() - start
        for use in (
            lambda: model.generate("abc", seed=1, max_new_tokens=900),
            lambda: list(model.stream("abc", seed=1, max_new_tokens=900)),
            lambda: [model.forward([1] * 1024) for _ in range(100)],
            lambda: [model.score([1] * 1024) for _ in range(100)],
        ):
            sent = 0.0

            def interrupt() -> None:
                nonlocal sent
                sent = time.perf_counter()
                os.kill(os.getpid(), signal.SIGINT)

            timer = threading.Timer(0.1, interrupt)
            timer.start()
            with pytest.raises(KeyboardInterrupt):
                use()
            late = time.perf_counter() - sent
            timer.join()
            assert late < 5 * step + 1.0  # generous: the machine may be busy
            assert free(model) == model._engine.blocks  # type: ignore[union-attr]
        assert facts(model.generate("abc", seed=1, max_new_tokens=5)) == wanted


def run_script(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("end", ["", "sys.exit(3)", "raise SystemExit(3)", "1 / 0", "os._exit(3)"])
def test_the_interpreter_ends_with_an_unfinished_stream(end: str) -> None:
    done = run_script(f"""
        import os, sys, gpt2_fast
        stream = gpt2_fast.generate("Once", seed=1, max_new_tokens=200, stream=True, threads=2)
        keep = [stream, next(stream)]
        sys.stdout.write("begun")
        sys.stdout.flush()
        {end}
    """)
    assert done.stdout == "begun"
    assert done.returncode == {"": 0, "1 / 0": 1}.get(end, 3)
    assert done.stderr == "" or end == "1 / 0"


def test_the_interpreter_ends_while_threads_generate() -> None:
    done = run_script("""
        import threading, time, gpt2_fast
        model = gpt2_fast.GPT2.from_pretrained("builtin", threads=2)
        def work():
            while True:
                model.generate("Once", seed=1, max_new_tokens=200)
        for _ in range(4):
            threading.Thread(target=work, daemon=True).start()
        time.sleep(0.5)
        print("end")
    """)
    assert (done.stdout, done.returncode) == ("end\n", 0), done.stderr


def test_the_builtin_model_in_every_precision_and_batch() -> None:
    """Real text through a real vocabulary, where tokens are parts of words."""
    prompts = ["Once upon a time", "The", "", "In 1984, ", "  \n\n", "été 😀"]
    for precision in PRECISIONS:
        with GPT2.from_pretrained(BUILTIN, precision=precision) as model:
            together = model.generate(prompts, seed=4, max_new_tokens=25, n=2)
            for prompt, per_prompt in zip(prompts, together, strict=True):
                one = model.generate(prompt, seed=4, max_new_tokens=25)
                assert facts(per_prompt[0]) == facts(one)
                assert "".join(model.stream(prompt, seed=4, max_new_tokens=25)) == one
                assert model.tokenizer is not None
                eos = one.token_ids[-1:] == [model.config.eos_token_id]
                assert one == model.tokenizer.decode(one.token_ids[:-1] if eos else one.token_ids)
