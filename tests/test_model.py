"""forward, score and save_pretrained."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from gpt2_fast import (
    GPT2,
    ContextOverflow,
    GPT2Config,
    ParameterError,
    TokenizerError,
)
from tests.accuracy import assert_as_accurate_as_torch
from tests.model_support import (
    TINY,
    SpreadSource,
    byte_tokenizer,
    facts,
    model_of,
    random_ids,
    state_of,
    tiny_model,
    transformers_logits,
    write_folder,
)

if TYPE_CHECKING:
    pass

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def shape(**changes: object) -> GPT2Config:
    """A small model that differs from an ordinary one in `changes`."""
    fields = {"n_layer": 2, "n_embd": 48, "n_head": 3, "n_ctx": 40, "vocab_size": 101}
    return GPT2Config(**{**fields, "eos_token_id": 0, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("length", [1, 2, 255, 256, 257, 511, 512, 513, 700])
def test_forward_is_the_same_in_passes(length: int) -> None:
    """Row t depends on the tokens up to t only, bit for bit, whichever pass it comes in."""
    config = GPT2Config(n_layer=2, n_embd=24, n_head=3, n_ctx=700, vocab_size=50, eos_token_id=None)
    ids = random_ids(config, 700)
    with model_of(SpreadSource(config)) as model:
        whole = model.forward(ids)
        part = model.forward(ids[:length])
    assert part.dtype == np.float32
    assert part.shape == (length, 50)
    assert np.array_equal(part, whole[:length])


def test_forward_takes_one_sequence_or_several() -> None:
    model = tiny_model()
    one, other = random_ids(TINY, 5, 1), random_ids(TINY, 9, 2)
    alone = [model.forward(one), model.forward(other)]
    for given in ([one, other], (tuple(one), np.array(other)), [np.array(one, np.uint8), other]):
        several = model.forward(given)
        assert isinstance(several, list)
        assert all(np.array_equal(a, b) for a, b in zip(several, alone, strict=True))
    for row in (np.array(one), torch.tensor(one), tuple(one), np.array(one, np.int32)):
        assert np.array_equal(model.forward(row), alone[0])
    square = model.forward(np.array([one, one]))
    assert len(square) == 2
    assert np.array_equal(square[1], alone[0])
    assert model.forward([]) == []


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ("abc", "token_ids must be integers, got text"),
        (["abc"], "token_ids must be integers, got text"),
        ([[]], "token_ids 0 is empty"),
        ([[1], [257]], r"token_ids 1: .* 0\.\.256, got 257 at position 0"),
        ([1, -1], r"token_ids: .* 0\.\.256, got -1 at position 1"),
        ([1, 2.0], r"got 2.0 at position 1"),
        ([1, True], r"got True at position 1"),
        ([1, None], r"got None at position 1"),
        ([[1, [2]]], r"token_ids 0: .* got \[2\] at position 1"),
        ([2**70], "at position 0"),
        (5, "int"),
        (None, "NoneType"),
        (b"abc", "bytes"),
        ([b"abc"], "bytes"),
        ([1.5], "got 1.5 at position 0"),
        ({1: 2}, "dict"),
        ([None], "got None at position 0"),
        ([[1], 5], "int"),
        (np.array(5), "ndarray"),
        (np.array([1.5], np.float32), "got 1.5 at position 0"),
        (np.array([True]), "got True at position 0"),
        (np.zeros((1, 2, 3), np.int64), "token_ids 0: .* at position 0"),
    ],
)
def test_forward_refuses(ids: object, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        tiny_model().forward(ids)


def test_forward_refuses_what_does_not_fit() -> None:
    model = tiny_model()
    assert model.forward([1] * 64).shape == (64, 257)
    with pytest.raises(ContextOverflow, match=r"token_ids has 65 tokens; .* holds 64, 1 fewer"):
        model.forward([1] * 65)
    assert model._engine is not None
    assert model._engine.free_blocks == model._engine.blocks


def assert_logprobs(ours: object, logits: np.ndarray, ids: list[int]) -> None:
    """Natural logarithms of softmax(logits) at `ids`, as accurate as torch in float32."""
    rows = torch.from_numpy(logits)
    picked = torch.tensor(ids)[:, None]
    assert_as_accurate_as_torch(
        torch.tensor(ours),
        rows.log_softmax(-1).gather(1, picked)[:, 0],
        rows.double().log_softmax(-1).gather(1, picked)[:, 0],
    )


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("length", [2, 17, 64])
def test_score_is_the_log_softmax_of_forward(length: int, precision: str) -> None:
    model = tiny_model(precision)
    ids = random_ids(TINY, length)
    score = model.score(ids)
    assert score.token_ids == ids
    assert score.logprobs[0] is None
    assert_logprobs(score.logprobs[1:], model.forward(ids)[:-1], ids[1:])
    assert score.total == pytest.approx(math.fsum(score.logprobs[1:]), rel=1e-12)
    assert score.tokens == [byte_tokenizer().decode([token]) for token in ids]


def test_score_over_several_passes() -> None:
    config = GPT2Config(n_layer=1, n_embd=16, n_head=1, n_ctx=600, vocab_size=50, eos_token_id=3)
    ids = random_ids(config, 599)
    with model_of(SpreadSource(config)) as model:
        score = model.score(ids, bos=True)
        assert score.tokens == []  # there is no tokenizer
        assert len(score.logprobs) == 599
        assert_logprobs(score.logprobs, model.forward([3, *ids[:-1]]), ids)
        assert model.score(ids).logprobs[1:] != score.logprobs[1:]


def test_score_with_bos_gives_the_first_token_a_probability() -> None:
    model = tiny_model()
    score = model.score("hello", bos=True)
    assert score.token_ids == list(b"hello")
    assert score.tokens == list("hello")
    assert_logprobs(score.logprobs, model.forward([256, *b"hell"]), list(b"hello"))
    one = model.score("h")
    assert one.logprobs == [None]
    assert one.total == 0.0
    several = model.score(["h", list(b"hello")], bos=True)
    assert [each.token_ids for each in several] == [list(b"h"), list(b"hello")]
    assert several[1] == score


def test_score_shows_parts_of_characters() -> None:
    assert tiny_model().score("é").tokens == ["\ufffd", "\ufffd"]


def test_score_refuses() -> None:
    model = tiny_model()
    for empty in ("", [""], [[]]):
        with pytest.raises(ParameterError, match="empty"):
            model.score(empty)
    assert model.score([1] * 64, bos=False).total < 0
    assert model.score([1] * 63, bos=True).total < 0
    with pytest.raises(ContextOverflow, match=r"65 tokens; .* holds 64, 1 fewer"):
        model.score([1] * 65)
    with pytest.raises(ParameterError, match=r"text: .* got 257 at position 1"):
        model.score([1, 257])
    with (
        model_of(SpreadSource(shape(eos_token_id=None))) as model,
        pytest.raises(ParameterError, match="bos: this model has no end-of-text token"),
    ):
        model.score([1, 2], bos=True)


def test_score_of_ids_beyond_the_tokenizer() -> None:
    """A padded vocabulary has ids without a text; they still have a probability."""
    padded = GPT2Config(n_layer=1, n_embd=16, n_head=1, n_ctx=8, vocab_size=260, eos_token_id=256)
    with model_of(SpreadSource(padded), byte_tokenizer()) as model:
        score = model.score([65, 259, 66])
        assert_logprobs(score.logprobs[1:], model.forward([65, 259]), [259, 66])
    assert score.tokens == ["A", "", "B"]


def test_text_without_a_tokenizer() -> None:
    with model_of(SpreadSource(TINY)) as model:
        for ask in (model.generate, model.score, model.stream):
            with pytest.raises(TokenizerError, match="takes token ids, not text"):
                ask("text")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("tied", [True, False])
def test_saving_keeps_every_bit(tmp_path: Path, tied: bool, precision: str) -> None:
    config = GPT2Config(
        n_layer=2,
        n_embd=20,
        n_head=2,
        n_ctx=37,
        n_inner=33,
        vocab_size=257,
        tie_word_embeddings=tied,
        scale_attn_by_inverse_layer_idx=True,
        layer_norm_epsilon=3e-4,
        eos_token_id=256,
    )
    source = SpreadSource(config, seed=9)
    ids = random_ids(config, 37)
    with GPT2.from_pretrained(
        write_folder(tmp_path / "first", source, vocabulary=True), precision=precision
    ) as model:
        model.save_pretrained(tmp_path / "second")
        before = model.forward(ids)
        text = model.generate("ab", seed=1, max_new_tokens=20)
    with GPT2.from_pretrained(tmp_path / "second", precision=precision) as again:
        assert again.config == config
        assert np.array_equal(again.forward(ids), before)
        assert facts(again.generate("ab", seed=1, max_new_tokens=20)) == facts(text)
    with GPT2.from_pretrained(tmp_path / "second", precision="fp32") as full:
        exact = full.forward(ids)  # a bf16 model has saved its float32 source
    with model_of(source) as original:
        assert np.array_equal(original.forward(ids), exact)


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_loads_what_is_saved(tmp_path: Path, tied: bool) -> None:
    from transformers import GPT2LMHeadModel

    config = shape(tie_word_embeddings=tied, n_inner=50, scale_attn_weights=False, n_ctx=37)
    source = SpreadSource(config, seed=5)
    with model_of(source, precision="bf16") as model:
        model.save_pretrained(tmp_path)
    ids = random_ids(config, 37)
    with torch.no_grad():
        theirs = GPT2LMHeadModel.from_pretrained(tmp_path, dtype=torch.float32)
        logits = theirs(torch.tensor([ids])).logits[0]
    assert torch.equal(logits, transformers_logits(source, ids, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_parameters_stored_in_other_types(
    tmp_path: Path, dtype: torch.dtype, precision: str
) -> None:
    """Their values count, not their types: the same bits as the same values in float32."""
    from safetensors.torch import save_file

    source = SpreadSource(TINY)
    folder = write_folder(tmp_path, source)
    stored = {"transformer." + name: t for name, t in state_of(source, dtype).items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    rounded = {name: t.float().numpy() for name, t in state_of(source, dtype).items()}
    ids = random_ids(TINY, 40)
    with (
        GPT2.from_pretrained(folder, precision=precision) as model,
        model_of(SpreadSource(TINY, replace=rounded), precision=precision) as same,
    ):
        assert np.array_equal(model.forward(ids), same.forward(ids))


def test_which_tokenizer_a_folder_gets(tmp_path: Path) -> None:
    """Its own; else GPT-2's where the vocabulary holds it, padded or not; else none."""

    def tokenizer_size(name: str, vocab_size: int, *, own: bool) -> int | None:
        config = GPT2Config(
            n_layer=1, n_embd=4, n_head=1, n_ctx=8, vocab_size=vocab_size, eos_token_id=None
        )
        folder = write_folder(tmp_path / name, SpreadSource(config), vocabulary=own)
        with GPT2.from_pretrained(folder) as model:
            assert model.name == str(folder)
            if vocab_size == 50304:
                drawn = model.generate([[i] for i in range(16)], n=8, seed=1, temperature=1e9)
                assert max(max(one.token_ids) for each in drawn for one in each) < 50257
            return None if model.tokenizer is None else model.tokenizer.vocab_size

    assert tokenizer_size("own", 257, own=True) == 257
    assert tokenizer_size("own in a large one", 50257, own=True) == 257
    assert tokenizer_size("published", 50257, own=False) == 50257
    assert tokenizer_size("padded", 50304, own=False) == 50257
    assert tokenizer_size("too small", 50256, own=False) is None


def test_saving_into_the_folder_it_came_from(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", SpreadSource(TINY), vocabulary=True)
    with GPT2.from_pretrained(folder) as model:
        before = model.forward([1, 2, 3])
        model.save_pretrained(folder)
        model.save_pretrained(folder)
    with GPT2.from_pretrained(folder) as again:
        assert np.array_equal(again.forward([1, 2, 3]), before)
