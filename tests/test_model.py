"""Whole models: logits against transformers and float64, scoring, saving, memory, shared use."""

from __future__ import annotations

import gc
import math
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import Tensor

import gpt2_fast
from gpt2_fast import (
    _C,
    GPT2,
    PUBLISHED,
    CheckpointError,
    ContextOverflow,
    DeviceError,
    GPT2Config,
    ParameterError,
    TokenizerError,
    reference,
)
from gpt2_fast.reference import GPT2Reference
from tests.accuracy import assert_as_accurate_as_torch
from tests.model_support import (
    BUILTIN,
    TINY,
    SpreadSource,
    byte_tokenizer,
    facts,
    model_of,
    random_ids,
    state_of,
    tiny_model,
    transformers_logits,
    transformers_model,
    write_folder,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def few_layers(size: str) -> GPT2Config:
    """A published width with two layers and a short vocabulary."""
    full = PUBLISHED[size]
    return GPT2Config(
        n_layer=2, n_embd=full.n_embd, n_head=full.n_head, n_ctx=48, vocab_size=307, eos_token_id=0
    )


def shape(**changes: object) -> GPT2Config:
    """A small model that differs from an ordinary one in `changes`."""
    fields = {"n_layer": 2, "n_embd": 48, "n_head": 3, "n_ctx": 40, "vocab_size": 101}
    return GPT2Config(**{**fields, "eos_token_id": 0, **changes})  # type: ignore[arg-type]


ODD_SHAPES = {
    "head size 5": shape(n_embd=35, n_head=7),
    "head size 20": shape(n_embd=60, n_head=3),
    "head size 96": shape(n_embd=192, n_head=2),
    "head size 128": shape(n_embd=128, n_head=1),
    "head size 1": shape(n_embd=12, n_head=12),
    "width 100": shape(n_embd=100, n_head=5),
    "width 1": shape(n_embd=1, n_head=1),
    "11 heads": shape(n_embd=88, n_head=11),
    "n_inner 50": shape(n_inner=50),
    "n_inner 1": shape(n_inner=1),
    "untied": shape(tie_word_embeddings=False),
    "unscaled": shape(scale_attn_weights=False),
    "by layer": shape(n_layer=4, scale_attn_by_inverse_layer_idx=True),
    "unscaled, by layer": shape(scale_attn_weights=False, scale_attn_by_inverse_layer_idx=True),
    "epsilon 0.1": shape(layer_norm_epsilon=0.1),
    "n_ctx 37": shape(n_ctx=37),
    "vocabulary 1": shape(vocab_size=1, n_embd=16, n_head=1),
    "vocabulary 50257": shape(n_layer=1, vocab_size=50257),
    "one position": shape(n_ctx=1),
    "six layers": shape(n_layer=6),
}


def assert_logits_as_accurate_as_torch(source: SpreadSource, precision: str, length: int) -> None:
    """Ours and transformers' in one precision, both against float64 with unrounded weights."""
    ids = random_ids(source.config, length)
    with model_of(source, precision=precision) as model:
        ours = torch.from_numpy(model.forward(ids))
    theirs = transformers_logits(source, ids, PRECISIONS[precision]).float()
    truth = transformers_logits(source, ids, torch.float64)
    assert_as_accurate_as_torch(ours, theirs, truth)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("size", PUBLISHED)
def test_logits_at_published_widths(size: str, precision: str) -> None:
    source = SpreadSource(few_layers(size), seed=1, spread=0.02)
    assert_logits_as_accurate_as_torch(source, precision, 48)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ODD_SHAPES)
def test_logits_of_odd_shapes(name: str, precision: str) -> None:
    config = ODD_SHAPES[name]
    source = SpreadSource(config, seed=2, spread=0.2)
    assert_logits_as_accurate_as_torch(source, precision, config.n_ctx)


def test_logits_of_the_builtin_model() -> None:
    """Weights that were trained, with the outliers that training makes."""
    from transformers import GPT2LMHeadModel

    ids = random_ids(GPT2Config(vocab_size=4096, n_ctx=256, eos_token_id=0), 256)
    with GPT2.from_pretrained("builtin", precision="fp32") as model:
        ours = torch.from_numpy(model.forward(ids))
    with torch.no_grad():
        their = GPT2LMHeadModel.from_pretrained(BUILTIN, dtype=torch.float32)
        theirs = their(torch.tensor([ids])).logits[0]
        truth = their.double()(torch.tensor([ids])).logits[0]
    assert_as_accurate_as_torch(ours, theirs, truth)


@pytest.mark.parametrize("leave_out", ["h.1.attn.c_proj.bias", "h.0.ln_2.bias", "ln_f.weight"])
def test_the_rule_sees_a_parameter_left_out(leave_out: str) -> None:
    config = shape()
    neutral = np.full(
        config.tensor_shapes()[leave_out], float(leave_out.endswith("weight")), np.float32
    )
    ids = random_ids(config, 20)
    source = SpreadSource(config, spread=0.02)
    with model_of(SpreadSource(config, spread=0.02, replace={leave_out: neutral})) as model:
        ours = torch.from_numpy(model.forward(ids))
    with pytest.raises(AssertionError, match="ours"):
        assert_as_accurate_as_torch(
            ours,
            transformers_logits(source, ids, torch.float32),
            transformers_logits(source, ids, torch.float64),
        )


def layer_by_layer(source: SpreadSource, ids: list[int], dtype: torch.dtype) -> Tensor:
    """The reference's logits with one layer of parameters in memory at a time."""
    config = source.config

    def get(name: str) -> Tensor:
        tensor = torch.from_numpy(source.array(name)).to(dtype)
        return tensor.T.contiguous() if name.startswith("h.") and tensor.ndim == 2 else tensor

    def pair(prefix: str) -> tuple[Tensor, Tensor]:
        return get(prefix + ".weight"), get(prefix + ".bias")

    tokens, positions = torch.tensor(ids), torch.arange(len(ids))
    eps = config.layer_norm_epsilon
    x = reference.embed(tokens, positions, get("wte.weight"), get("wpe.weight"))
    for layer in range(config.n_layer):
        block = f"h.{layer}."
        h = reference.layernorm(x, *pair(block + "ln_1"), eps)
        qkv = reference.linear(h, *pair(block + "attn.c_attn"))
        qkv = qkv.reshape(1, len(ids), 3, config.n_head, config.head_size)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = reference.attention_prefill(q, k, v, config.attention_scale(layer))
        mixed = mixed.transpose(1, 2).reshape(len(ids), config.n_embd)
        x = reference.linear(mixed, *pair(block + "attn.c_proj"), residual=x)
        h = reference.layernorm(x, *pair(block + "ln_2"), eps)
        h = reference.linear(h, *pair(block + "mlp.c_fc"), gelu=True)
        x = reference.linear(h, *pair(block + "mlp.c_proj"), residual=x)
    head = "wte.weight" if config.tie_word_embeddings else "lm_head.weight"
    return reference.linear(reference.layernorm(x, *pair("ln_f"), eps), get(head))


def test_layer_by_layer_is_the_reference() -> None:
    """The truth of the slow test below is the truth of all others."""
    source = SpreadSource(shape(n_layer=3, tie_word_embeddings=False))
    ids = random_ids(source.config, 20)
    whole = GPT2Reference(source.config, state_of(source, torch.float64))(torch.tensor([ids]))[0]
    parts = layer_by_layer(source, ids, torch.float64)
    assert (whole - parts).abs().max() <= 1e-12 * whole.abs().max()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("size", ["124M", "774M"])
def test_logits_of_a_whole_model(size: str) -> None:
    source = SpreadSource(PUBLISHED[size], seed=3, spread=0.02)
    ids = random_ids(source.config, 24)
    with model_of(source) as model:
        ours = torch.from_numpy(model.forward(ids))
    theirs = layer_by_layer(source, ids, torch.float32)
    assert_as_accurate_as_torch(ours, theirs, layer_by_layer(source, ids, torch.float64))


@pytest.fixture
def _one_torch_thread() -> Iterator[None]:
    """Many small products: a second thread costs more than it gives on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_one_torch_thread")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_greedy_tokens_are_those_of_transformers(precision: str) -> None:
    """Over 256 tokens, wherever the margin in float64 exceeds what rounding can move."""
    config = GPT2Config(n_layer=2, n_ctx=288, vocab_size=1009, eos_token_id=None)
    source = SpreadSource(config, seed=4, spread=0.05)
    prompt, dtype = random_ids(config, 8), PRECISIONS[precision]
    with model_of(source, precision=precision) as model:
        ours = model.generate(prompt, temperature=0, max_new_tokens=256).token_ids
        logits = torch.from_numpy(model.forward(prompt + ours[:-1]))[len(prompt) - 1 :]
    theirs = transformers_model(source, dtype).generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=256,
        do_sample=False,
        pad_token_id=0,
    )[0, len(prompt) :]

    assert len(ours) == len(theirs) == 256
    truth = transformers_logits(source, prompt + ours[:-1], torch.float64)[len(prompt) - 1 :]
    same_dtype = transformers_logits(source, prompt + ours[:-1], dtype)[len(prompt) - 1 :]
    error = max(float((each.double() - truth).abs().max()) for each in (logits, same_dtype))
    best, second = truth.topk(2).values.T
    sure = best - second > 2 * error
    assert sure.sum() > (240 if precision == "fp32" else 100)  # else nothing was compared
    assert torch.equal(torch.tensor(ours)[sure], truth.argmax(-1)[sure])
    differ = (torch.tensor(ours) != theirs).nonzero()
    assert len(differ) == 0 or not sure[differ[0]]  # after the first the texts are different


@pytest.mark.parametrize("precision", PRECISIONS)
def test_greedy_tokens_are_the_argmax_of_our_logits(precision: str) -> None:
    model = tiny_model(precision)
    prompt = random_ids(TINY, 5)
    new = model.generate(prompt, temperature=0, max_new_tokens=50, ignore_eos=True).token_ids
    logits = model.forward(prompt + new[:-1])[len(prompt) - 1 :]
    assert new == logits.argmax(-1).tolist()


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


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return torch.log_softmax(torch.from_numpy(logits).double(), -1).numpy()


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


def test_saving_into_the_folder_it_came_from(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", SpreadSource(TINY), vocabulary=True)
    with GPT2.from_pretrained(folder) as model:
        before = model.forward([1, 2, 3])
        model.save_pretrained(folder)
        model.save_pretrained(folder)
    with GPT2.from_pretrained(folder) as again:
        assert np.array_equal(again.forward([1, 2, 3]), before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["h.1.mlp.c_fc.weight", "wpe.weight", "ln_f.bias", "wte.weight"])
def test_weights_that_are_not_finite_are_refused(name: str, value: float) -> None:
    damaged = SpreadSource(TINY).array(name).copy()
    damaged.flat[37 % damaged.size] = value
    with pytest.raises(CheckpointError, match=rf"{name}.*element {37 % damaged.size} is"):
        model_of(SpreadSource(TINY, replace={name: damaged}))


def test_arguments_are_checked_before_anything_is_made() -> None:
    for wrong in ("int8", "FP32", "", None, ["fp32"], 16):
        with pytest.raises(ParameterError, match="precision must be one of fp32, bf16, got"):
            GPT2.from_config(TINY, precision=wrong)  # type: ignore[arg-type]
        with pytest.raises(ParameterError, match="precision"):
            gpt2_fast.plan(TINY, precision=wrong)  # type: ignore[arg-type]
    for wrong in (0, -1, 1025, 1.0, True, "2"):
        with pytest.raises(ParameterError, match=r"threads must be an integer in 1\.\.1024"):
            GPT2.from_config(TINY, threads=wrong)  # type: ignore[arg-type]
    for wrong in (0, -1, 65537, 2.0, None):
        with pytest.raises(ParameterError, match=r"max_batch must be an integer in 1\.\.65536"):
            GPT2.from_config(TINY, max_batch=wrong)  # type: ignore[arg-type]
    for wrong in ("gpu", "CPU", "", None, 0):
        with pytest.raises(ParameterError, match="device must be one of auto, cpu, cuda"):
            GPT2.from_config(TINY, device=wrong)  # type: ignore[arg-type]
    for wrong in (-1, 1.5, "1", None):
        with pytest.raises(ParameterError, match="weight_seed must be an integer"):
            GPT2.from_config(TINY, weight_seed=wrong)  # type: ignore[arg-type]


@pytest.mark.skipif(bool(_C.build_info()["cuda"]), reason="this build has CUDA")
def test_cuda_without_cuda_says_why() -> None:
    with pytest.raises(DeviceError, match="device 'cuda' is not available: CPU build"):
        GPT2.from_config(TINY, device="cuda")
    with pytest.raises(DeviceError, match="device 'cuda' is not available"):
        GPT2.from_pretrained("builtin", device="cuda")


def test_a_model_that_no_machine_can_hold_is_refused_at_once() -> None:
    huge = GPT2Config(n_layer=1024, n_embd=65536, n_head=4096, vocab_size=1 << 24)
    assert gpt2_fast.plan(huge, precision="fp32").total > 1 << 46
    with pytest.raises(gpt2_fast.CapacityError, match="available"):
        GPT2.from_config(huge)


def test_from_config_is_the_published_initialisation() -> None:
    with GPT2.from_config(TINY, weight_seed=1) as one, GPT2.from_config(TINY, weight_seed=2) as two:
        with GPT2.from_config(TINY, weight_seed=1) as again:
            assert np.array_equal(one.forward([1, 2]), again.forward([1, 2]))
        assert not np.array_equal(one.forward([1, 2]), two.forward([1, 2]))
        arrays = {name: array for name, _, array, _ in one._source.tensors()}
    assert set(arrays) == set(TINY.tensor_shapes())
    assert np.std(arrays["wte.weight"]) == pytest.approx(0.02, rel=0.05)
    assert np.std(arrays["wpe.weight"]) == pytest.approx(0.01, rel=0.05)
    assert np.all(arrays["h.0.ln_1.weight"] == 1)
    assert not arrays["h.0.mlp.c_fc.bias"].any()


def test_the_plan_is_known_before_and_does_not_change() -> None:
    before = gpt2_fast.plan(TINY, precision="bf16", threads=2, max_batch=3)
    assert before.total == before.weights + before.cache + before.scratch
    assert before.cache == 3 * 4 * before.cache_block  # 64 positions are 4 blocks
    with GPT2.from_config(TINY, precision="bf16", threads=2, max_batch=3) as model:
        assert model.plan() == before
        model.generate([[1]] * 5, max_new_tokens=64)
        assert model.plan() == before
        assert model._engine is not None
        assert model._engine.blocks == 12
    assert model.plan() == before


def test_the_plan_of_published_sizes() -> None:
    """Weights are the parameters, 4 or 2 bytes each, and at most a little padding."""
    for name, config in PUBLISHED.items():
        for precision, size in (("fp32", 4), ("bf16", 2)):
            plan = gpt2_fast.plan(config, precision=precision, threads=1, max_batch=1)
            exact = config.parameters * size
            assert exact <= plan.weights < exact * 1.01, name
            keys_and_values = 2 * config.n_layer * config.n_ctx * config.n_embd * size
            assert plan.cache == keys_and_values, name


MEASURE = """
import gc, sys
from gpt2_fast import GPT2
def rss():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
with GPT2.from_pretrained(sys.argv[1], threads=1, max_batch=1) as tiny:
    tiny.generate([[1, 2]], max_new_tokens=3, seed=0)  # everything imported, pools started
gc.collect()
before = rss()
model = GPT2.from_pretrained(sys.argv[2], precision=sys.argv[3], threads=2, max_batch=4)
model.generate([[1] * 128] * 8, max_new_tokens=128, seed=0, top_p=0.9)
print(rss() - before, model.plan().total)
model.close()
del model
gc.collect()
print(rss() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_memory_is_what_the_plan_says(tmp_path: Path, precision: str) -> None:
    """Resident memory after loading and full use is the plan's, and goes back on close."""
    small = 8 << 20  # the interpreter's own growth
    config = GPT2Config(n_layer=4, n_embd=512, n_head=8, n_ctx=256, vocab_size=8000, eos_token_id=0)
    tiny = write_folder(tmp_path / "tiny", SpreadSource(TINY))
    folder = write_folder(tmp_path / "model", SpreadSource(config, spread=0.02))
    command = [sys.executable, "-c", MEASURE, str(tiny), str(folder), precision]
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    used, planned, left = map(int, out.split())
    assert 0.7 * planned < used < planned + small
    assert left < small


def test_loading_and_dropping_models_does_not_grow(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, SpreadSource(TINY), vocabulary=True)

    def use() -> None:
        with GPT2.from_pretrained(folder, threads=2) as model:
            model.generate("a", max_new_tokens=3, seed=1)

    def resident() -> int:
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    for _ in range(10):
        use()
    before, files = resident(), len(list(Path("/proc/self/fd").iterdir()))
    threads = len(list(Path("/proc/self/task").iterdir()))
    for _ in range(100):
        use()
    assert resident() - before < 4 << 20
    assert len(list(Path("/proc/self/fd").iterdir())) == files
    assert len(list(Path("/proc/self/task").iterdir())) == threads


def test_closing() -> None:
    source = SpreadSource(TINY)
    with model_of(source, byte_tokenizer()) as model:
        assert "2 threads" in repr(model) or "threads" in repr(model)
        assert model.threads >= 1
        assert model.isa in _C.isas()
        engine = weakref.ref(model._engine) if hasattr(model._engine, "__weakref__") else None
    assert source.closed
    assert engine is None or engine() is None
    assert "closed" in repr(model)
    model.close()
    model.close()
    for use in (
        lambda: model.generate("a"),
        lambda: model.stream("a"),
        lambda: model.forward([1]),
        lambda: model.score("ab"),
        lambda: model.save_pretrained("unused"),
        lambda: model.threads,
        lambda: model.isa,
    ):
        with pytest.raises(ParameterError, match=r"this model .* is closed"):
            use()
    assert not Path("unused").exists()


def test_a_failed_load_closes_the_files(tmp_path: Path) -> None:
    damaged = SpreadSource(TINY).array("ln_f.bias")
    damaged[0] = np.nan
    folder = write_folder(tmp_path, SpreadSource(TINY, replace={"ln_f.bias": damaged}))
    files = len(list(Path("/proc/self/fd").iterdir()))
    maps = Path("/proc/self/maps").read_text().count(str(folder))
    with pytest.raises(CheckpointError, match=r"ln_f\.bias.*element 0 is"):
        GPT2.from_pretrained(folder)
    assert len(list(Path("/proc/self/fd").iterdir())) == files
    assert Path("/proc/self/maps").read_text().count(str(folder)) == maps


def test_many_threads_share_one_model() -> None:
    model = tiny_model()
    prompts = [random_ids(TINY, 1 + 3 * i, i) for i in range(8)]
    alone = [facts(model.generate(p, seed=i, max_new_tokens=30)) for i, p in enumerate(prompts)]
    logits = [model.forward(p) for p in prompts]
    wrong: list[object] = []

    def work(i: int) -> None:
        try:
            for _ in range(4):
                if facts(model.generate(prompts[i], seed=i, max_new_tokens=30)) != alone[i]:
                    wrong.append(("generate", i))
                if not np.array_equal(model.forward(prompts[i]), logits[i]):
                    wrong.append(("forward", i))
        except Exception as error:  # noqa: BLE001
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert model._engine is not None
    assert model._engine.free_blocks == model._engine.blocks
