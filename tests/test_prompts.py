"""What may be a prompt, and what comes back in which shape."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import pytest
import torch

from gpt2_fast import ContextOverflow, Generation, GPT2Config, ParameterError, TokenizerError
from tests.model_support import (
    TINY,
    SpreadSource,
    byte_tokenizer,
    facts,
    model_of,
    random_ids,
    tiny_model,
)

HOW = {"max_new_tokens": 6, "seed": 5, "ignore_eos": True}


def shape_of(results: Any) -> Any:
    """Lists as lists, generations as 0."""
    return [shape_of(each) for each in results] if isinstance(results, list) else 0


@pytest.mark.parametrize(
    ("prompts", "n", "shape"),
    [
        ("ab", 1, 0),
        ("", 1, 0),
        ([97, 98], 1, 0),
        ((97, 98), 1, 0),
        (["ab"], 1, [0]),
        (["ab", "c", ""], 1, [0, 0, 0]),
        ([[97, 98]], 1, [0]),
        ([[97, 98], [99]], 1, [0, 0]),
        (("ab", "c"), 1, [0, 0]),
        (["ab", [99]], 1, [0, 0]),
        ([[99], "ab", (97,), np.array([98])], 1, [0, 0, 0, 0]),
        ([], 1, []),
        ((), 1, []),
        ([[]], 1, [0]),
        ("ab", 3, [0, 0, 0]),
        ([97], 2, [0, 0]),
        (["ab", "c"], 3, [[0, 0, 0], [0, 0, 0]]),
        (["ab"], 2, [[0, 0]]),
        ([], 2, []),
        (np.array([97, 98]), 1, 0),
        (np.array([[97, 98], [99, 100]]), 1, [0, 0]),
        (torch.tensor([97, 98]), 1, 0),
        (torch.tensor([[97], [98]]), 1, [0, 0]),
        ([np.int64(97), 98], 1, 0),
        ([torch.tensor(97), 98], 1, 0),
        ([np.array(97)], 1, 0),
        (deque([97, 98]), 1, 0),
        (range(97, 100), 1, 0),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_shape_in_shape_out(prompts: Any, n: int, shape: Any) -> None:
    results = tiny_model().generate(prompts, n=n, **HOW)
    assert shape_of(results) == shape
    assert isinstance(results, Generation if shape == 0 else list)


def test_kinds_of_one_prompt_are_the_same_prompt() -> None:
    """Text, lists, arrays and tensors of its ids."""
    model = tiny_model()
    wanted = facts(model.generate("hé", **HOW))
    ids = list("hé".encode())
    for prompt in (
        ids,
        tuple(ids),
        deque(ids),
        np.array(ids),
        np.array(ids, np.uint8),
        np.array([0, *ids, 0])[1:-1],
        np.array(ids)[::-1][::-1],
        torch.tensor(ids),
        [np.int32(each) for each in ids],
        model.generate("hé", **HOW).__class__(
            "hé", token_ids=[], logprobs=[], finish_reason="eos", timings=None, seed=0
        ),
    ):
        assert facts(model.generate(prompt, **HOW)) == wanted
        assert facts(model.generate([prompt], **HOW)[0]) == wanted
        assert "".join(model.stream(prompt, **HOW)) == wanted[0]


def test_an_empty_prompt_starts_a_document() -> None:
    model = tiny_model()
    wanted = facts(model.generate([256], **HOW))
    assert facts(model.generate("", **HOW)) == wanted
    assert facts(model.generate([""], **HOW)[0]) == wanted
    assert facts(model.generate([[]], **HOW)[0]) == wanted
    assert "".join(model.stream("", **HOW)) == "".join(model.stream([], **HOW)) == wanted[0]


def test_an_empty_prompt_without_an_end_of_text_token() -> None:
    config = GPT2Config(n_layer=1, n_embd=8, n_head=1, n_ctx=8, vocab_size=257, eos_token_id=None)
    with model_of(SpreadSource(config), byte_tokenizer()) as model:
        with pytest.raises(ParameterError, match="prompt is empty, and this model has no token"):
            model.generate("")
        with pytest.raises(ParameterError, match="prompt 1 is empty"):
            model.generate(["a", ""])
        with pytest.raises(ParameterError, match="prompt is empty"):
            model.stream("")
        assert model.generate("a", max_new_tokens=5, seed=1).finish_reason == "length"


def test_end_of_text_in_a_prompt_is_plain_text() -> None:
    model = tiny_model()
    text = "a<|endoftext|>b"
    assert model.score(text).token_ids == list(text.encode())
    assert facts(model.generate(text, **HOW)) == facts(model.generate(list(text.encode()), **HOW))
    assert facts(model.generate([97, 256, 98], **HOW)) != facts(model.generate(text, **HOW))


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (5, "prompts must be a text, .* got int"),
        (None, "prompts must be a text, .* got NoneType"),
        (b"abc", "prompts must be a text, .* got bytes"),
        (bytearray(b"abc"), "got bytearray"),
        ({"a": 1}, "got dict"),
        ({1, 2}, "got set"),
        (1.5, "got float"),
        (iter(["a"]), "got list_iterator"),
        (np.array(5), "got ndarray"),
        ({1: 2}.keys(), "got dict_keys"),
        ([b"abc"], "prompt 0 must be a list of token ids, got bytes"),
        (["a", b"abc"], "prompt 1 must be a list of token ids, got bytes"),
        (["a", 5], "prompt 1 must be a list of token ids, got int"),
        ([[1], None], "prompt 1 must be a list of token ids, got NoneType"),
        ([{1: 2}], "prompt 0 must be a list of token ids, got dict"),
        ([None], "prompt: .* got None at position 0"),
        ([97, "a"], "prompt: .* got 'a' at position 1"),
        ([["a"]], "prompt 0: .* got 'a' at position 0"),
        ([1.0], r"prompt: .* got 1\.0 at position 0"),
        ([True], "got True at position 0"),
        ([1, -1], r"in 0\.\.256, got -1 at position 1"),
        ([257], "got 257 at position 0"),
        ([1 << 31], "got 2147483648 at position 0"),
        ([[1, 2], [3, 257]], "prompt 1: .* got 257 at position 1"),
        (np.array([1.0, 2.0]), "got 1.0 at position 0"),
        (np.array([1.0], np.float16), "got 1.0 at position 0"),
        (np.array([True]), "got True at position 0"),
        (np.array([[[1]]]), r"prompt 0: .* got \[1\] at position 0"),
        (torch.tensor([1.5]), "got 1.5 at position 0"),
        (np.array(["a", 5], object), "prompt 1 must be a list of token ids, got int"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_refused(prompts: Any, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        tiny_model().generate(prompts)
    with pytest.raises(ParameterError):
        tiny_model().stream(prompts)
    with pytest.raises(ParameterError):
        tiny_model().score(prompts)


def test_a_text_that_has_no_utf8() -> None:
    with pytest.raises(TokenizerError, match="lone surrogate"):
        tiny_model().generate("a\ud800")


@pytest.mark.parametrize("prompts", [["a"], [[1]], ["a", "b"], np.array([[1, 2]])])
def test_a_stream_takes_one_prompt(prompts: Any) -> None:
    with pytest.raises(ParameterError, match="prompt must be one text or one list of token ids"):
        tiny_model().stream(prompts)
    with pytest.raises(ParameterError, match="n must be 1 to stream, got 2"):
        tiny_model().stream("a", n=2)


def test_a_prompt_that_does_not_fit() -> None:
    """The numbers are named, and nothing of the batch runs."""
    model = tiny_model()
    for length in (65, 66, 10**5):
        with pytest.raises(
            ContextOverflow, match=rf"prompt has {length} tokens; .* holds 64, {length - 64} fewer"
        ):
            model.generate("a" * length)
    with pytest.raises(ContextOverflow, match="prompt 1 has 65 tokens"):
        model.generate(["a", "a" * 65])
    with pytest.raises(ContextOverflow, match="prompt has 65 tokens"):
        model.stream([1] * 65)
    assert model._engine is not None
    assert model._engine.free_blocks == model._engine.blocks


@pytest.mark.parametrize("length", [1, 16, 62, 63, 64])
def test_the_context_is_used_to_the_last_position(length: int) -> None:
    """64 positions: the last token drawn needs none, for nothing is predicted from it."""
    model = tiny_model()
    prompt = random_ids(TINY, length)
    result = model.generate(prompt, seed=1, max_new_tokens=1000, ignore_eos=True)
    assert len(result.token_ids) == 65 - length
    assert result.finish_reason == "context"
    exact = model.generate(prompt, seed=1, max_new_tokens=65 - length, ignore_eos=True)
    assert exact.token_ids == result.token_ids
    assert exact.finish_reason == "length"
    if length < 64:
        fewer = model.generate(prompt, seed=1, max_new_tokens=64 - length, ignore_eos=True)
        assert fewer.token_ids == result.token_ids[:-1]
        assert fewer.finish_reason == "length"
    logits = model.forward(prompt + result.token_ids[:-1])
    greedy = model.generate(prompt, temperature=0, max_new_tokens=1)
    assert greedy.token_ids[0] == int(logits[length - 1].argmax())


def test_a_context_of_one_position() -> None:
    config = GPT2Config(n_layer=1, n_embd=8, n_head=1, n_ctx=1, vocab_size=20, eos_token_id=None)
    with model_of(SpreadSource(config)) as model:
        result = model.generate([3], seed=1)
        assert (len(result.token_ids), result.finish_reason) == (1, "context")
        with pytest.raises(ContextOverflow, match=r"prompt has 2 tokens; .* holds 1, 1 fewer"):
            model.generate([3, 4])


def test_no_tokens_wanted() -> None:
    model = tiny_model()
    result = model.generate("abc", max_new_tokens=0)
    assert (str(result), result.token_ids, result.logprobs) == ("", [], [])
    assert result.finish_reason == "length"
    assert result.timings.new_tokens == 0
    assert [len(each) for each in model.generate(["a", "b"], n=2, max_new_tokens=0)] == [2, 2]
    assert list(model.stream("abc", max_new_tokens=0)) == []
    one = model.generate("abc", max_new_tokens=1, seed=1, ignore_eos=True)
    assert len(one.token_ids) == 1
    assert one.token_ids == model.generate("abc", seed=1, ignore_eos=True).token_ids[:1]


def test_a_vocabulary_larger_than_the_model() -> None:
    """Ids that the text has and the model has not are named."""
    small = GPT2Config(n_layer=1, n_embd=8, n_head=1, n_ctx=8, vocab_size=128, eos_token_id=None)
    with model_of(SpreadSource(small), byte_tokenizer()) as model:
        assert len(model.generate("ab", max_new_tokens=5, seed=1).token_ids) == 5
        with pytest.raises(ParameterError, match=r"in 0\.\.127, got 195 at position 1"):
            model.generate("aé")
