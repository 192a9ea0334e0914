"""Generation interrupted, abandoned, overflowing, forked: one request fails, nothing is lost."""

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

from gpt2_fast import GPT2, CapacityError, GPT2Config, ParameterError
from tests.model_support import (
    TINY,
    SpreadSource,
    assert_all_free,
    byte_tokenizer,
    facts,
    free,
    mixed_prompts,
    model_of,
    random_ids,
    tiny_model,
)

PRECISIONS = ("fp32", "bf16")


@pytest.fixture(autouse=True)
def _nothing_leaks() -> Any:
    yield
    for precision in PRECISIONS:
        assert_all_free(tiny_model(precision))


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
