"""Generation: seeds, independence of company, samples, streams."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest

from gpt2_fast import GPT2, GPT2Config, ParameterError, SamplingParams
from gpt2_fast.generation import Batch
from tests.accuracy import assert_as_accurate_as_torch
from tests.model_support import (
    BUILTIN,
    TINY,
    SpreadSource,
    assert_all_free,
    byte_tokenizer,
    facts,
    free,
    mixed_prompts,
    model_of,
    random_ids,
    scripted_model,
    tiny_model,
)

PRECISIONS = ("fp32", "bf16")


@pytest.fixture(autouse=True)
def _nothing_leaks() -> Any:
    yield
    for precision in PRECISIONS:
        assert_all_free(tiny_model(precision))


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
