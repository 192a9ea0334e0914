"""The whole engine on csrc/cuda: against transformers and float64, bit for bit in any company."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from gpt2_fast import _C, GPT2, PUBLISHED, GPT2Config, ParameterError
from gpt2_fast.sources import RandomSource
from tests.accuracy import assert_as_accurate_as_torch
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
from tests.model_support import (
    SpreadSource,
    model_of,
    random_ids,
    transformers_logits,
    write_folder,
)

pytestmark = pytest.mark.usefixtures("simt")

PRECISIONS = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.float16,
    "int4": torch.float16,
}
# Heads of 20, a width that is no multiple of 16, a vocabulary that fills no tile.
SMALL = GPT2Config(
    n_layer=2, n_embd=60, n_head=3, n_ctx=200, vocab_size=131, n_inner=100, eos_token_id=None
)


def shape(**changes: object) -> GPT2Config:
    fields = {"n_layer": 2, "n_embd": 48, "n_head": 3, "n_ctx": 40, "vocab_size": 101}
    return GPT2Config(**{**fields, "eos_token_id": 0, **changes})  # type: ignore[arg-type]


def few_heads(size: str) -> GPT2Config:
    """The number of heads of a published size, with heads of 8."""
    heads = PUBLISHED[size].n_head
    return shape(n_embd=8 * heads, n_head=heads)


SHAPES = {
    **{f"heads of {size}": few_heads(size) for size in PUBLISHED},
    "head size 64": shape(n_embd=128, n_head=2, n_ctx=70),
    "head size 80": shape(n_embd=160, n_head=2),
    "head size 128": shape(n_embd=128, n_head=1),
    "head size 5": shape(n_embd=35, n_head=7),
    "head size 1": shape(n_embd=12, n_head=12),
    "width 100": shape(n_embd=100, n_head=5),
    "width 1": shape(n_embd=1, n_head=1),
    "wider than a slice": shape(n_layer=1, n_embd=264, n_head=3, n_inner=520),
    "n_inner 1": shape(n_inner=1),
    "untied": shape(tie_word_embeddings=False),
    "unscaled, by layer": shape(scale_attn_weights=False, scale_attn_by_inverse_layer_idx=True),
    "epsilon 0.1": shape(layer_norm_epsilon=0.1),
    "vocabulary 1": shape(vocab_size=1, n_embd=16, n_head=1),
    "one position": shape(n_ctx=1),
}


def dequantised(source: SpreadSource, precision: str) -> SpreadSource:
    """The same parameters with every matrix as the quantised engine holds it."""
    changed: dict[str, npt.NDArray[Any]] = {}
    for name, size in source.config.tensor_shapes().items():
        if len(size) != 2 or name == "wpe.weight":
            continue
        if name == "wte.weight" and not source.config.tie_word_embeddings:
            continue
        by_input = name not in {"wte.weight", "lm_head.weight"}
        rows = source.array(name).T if by_input else source.array(name)
        q, scales = _C.quantize(np.ascontiguousarray(rows), precision)
        wide = (scales.astype(np.uint32) << 16).view(np.float32)
        group = q.shape[1] // scales.shape[1]
        matrix = (q * np.repeat(wide, group, axis=1))[:, : rows.shape[1]].astype(np.float32)
        changed[name] = np.ascontiguousarray(matrix.T) if by_input else matrix
    return SpreadSource(source.config, 2, spread=0.2, replace=changed)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", SHAPES)
def test_logits_are_as_accurate_as_torch(name: str, precision: str) -> None:
    config = SHAPES[name]
    source = SpreadSource(config, seed=2, spread=0.2)
    ids = random_ids(config, config.n_ctx)
    with model_of(source, precision=precision, device="cuda", max_batch=2) as model:
        assert model.isa == "cuda"
        ours = torch.from_numpy(model.forward(ids))
    same = dequantised(source, precision) if precision in {"int8", "int4"} else source
    theirs = transformers_logits(same, ids, PRECISIONS[precision]).float()
    truth = transformers_logits(same, ids, torch.float64)
    assert_as_accurate_as_torch(ours, theirs, truth)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("size", PUBLISHED)
def test_greedy_tokens_are_those_of_float64(size: str, precision: str) -> None:
    """One token after the other, wherever float64's best is clear of the error bound."""
    source = SpreadSource(few_heads(size), seed=2, spread=0.2)
    prompt = random_ids(source.config, 5)
    with model_of(source, precision=precision, device="cuda", max_batch=2) as model:
        drawn = model.generate(prompt, max_new_tokens=20, temperature=0, ignore_eos=True).token_ids
    assert assert_greedy(source, precision, prompt, drawn) >= 5


@pytest.mark.parametrize("precision", PRECISIONS)
def test_greedy_tokens_of_a_batch(precision: str) -> None:
    """Prompts of every kind of length at once, longer than one step: decode steps run beside chunks
    of prompts, and who is done makes room."""
    config, count = replace(few_heads("124M"), n_ctx=160), 16
    source = SpreadSource(config, seed=2, spread=0.2)
    prompts = [random_ids(config, 1 + 37 * i % 97) for i in range(count)]
    with model_of(source, precision=precision, device="cuda", max_batch=(count + 1) // 2) as model:
        drawn = model.generate(prompts, max_new_tokens=8, temperature=0, ignore_eos=True)
    checked = [
        assert_greedy(source, precision, prompt, each.token_ids)
        for prompt, each in zip(prompts, drawn, strict=True)
    ]
    assert sum(checked) >= 2 * count


def assert_greedy(source: Any, precision: str, prompt: list[int], drawn: list[int]) -> int:
    """How many tokens float64 had no doubt about; they are its own."""
    same = dequantised(source, precision) if precision in {"int8", "int4"} else source
    theirs = transformers_logits(same, prompt + drawn, PRECISIONS[precision]).double()
    truth = transformers_logits(same, prompt + drawn, torch.float64)
    rows = range(len(prompt) - 1, len(prompt) + len(drawn) - 1)
    error = float((theirs - truth).abs().max()) * 2 + 1e-3
    checked = 0
    for row, token in zip(rows, drawn, strict=True):
        best, second = truth[row].topk(2).values.tolist()
        assert truth[row][token] >= best - 2 * error
        if best - second > 2 * error:
            assert token == int(truth[row].argmax())
            checked += 1
    return checked


@lru_cache(maxsize=4)
def small_engine(precision: str) -> _C.Engine:
    engine = _C.Engine(SMALL.to_dict(), precision, "", 1, 17, "cuda", 0)
    for name, array in perturbed(RandomSource(SMALL, 1)):
        engine.load(name, array, "F32")
    return engine


@lru_cache(maxsize=256)
def truth(precision: str, tokens: tuple[int, ...]) -> Logits:
    """Alone, in one pass."""
    return run_alone(small_engine(precision), list(tokens))


@pytest.mark.parametrize("precision", PRECISIONS)
@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(guests=guest_lists(SMALL.vocab_size, 200, 16, 90))
def test_rows_do_not_depend_on_company(precision: str, guests: list[Guest], schedule: str) -> None:
    engine = small_engine(precision)
    free = engine.free_blocks

    run_together(engine, guests)

    for guest in guests:
        np.testing.assert_array_equal(
            np.concatenate(guest.parts).view(np.uint32),
            truth(precision, guest.tokens).view(np.uint32),
        )
    assert engine.free_blocks == free


def decode(engine: _C.Engine, prompts: list[tuple[int, ...]], steps: int, draw: Any) -> list[Any]:
    """Tokens and log-probabilities of several sequences that take turns of one token each."""
    sequences = [engine.open() for _ in prompts]
    answers = [
        [engine.step([(sequence, list(prompt), draw)])[0]]
        for sequence, prompt in zip(sequences, prompts, strict=True)
    ]
    for _ in range(steps):
        items = [(s, [each[-1][0]], draw) for s, each in zip(sequences, answers, strict=True)]
        for each, answer in zip(answers, engine.step(items), strict=True):
            each.append(answer)
    for sequence in sequences:
        engine.close(sequence)
    return answers


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "draw",
    [
        _C.Draw(0.0, 0, 1.0, 0.0, False, 0, 0, 0),
        _C.Draw(0.9, 0, 1.0, 0.0, False, 11, 0, 0),
        _C.Draw(0.8, 20, 0.9, 0.01, False, 12, 0, 0),
    ],
    ids=["greedy", "sampled", "filtered"],
)
def test_recorded_steps_equal_eager_ones(
    precision: str, draw: Any, monkeypatch: pytest.MonkeyPatch, schedule: str
) -> None:
    prompts = [some_tokens(seed, 3 + 30 * seed, SMALL.vocab_size) for seed in range(3)]
    recorded = small_engine(precision)
    together = decode(recorded, prompts, 6, draw)
    assert recorded.recordings >= 1
    alone = [decode(recorded, [prompt], 6, draw)[0] for prompt in prompts]
    monkeypatch.setenv("GPT2_FAST_CUDA_GRAPHS", "0")
    small_engine.cache_clear()
    try:
        eager = small_engine(precision)
        assert decode(eager, prompts, 6, draw) == together
        assert eager.recordings == 0
    finally:
        small_engine.cache_clear()
    assert alone == together


def test_forked_sequences_equal_separate_ones() -> None:
    engine = small_engine("fp16")
    prefix = some_tokens(1, 37, SMALL.vocab_size)
    tails = [some_tokens(s, 60, SMALL.vocab_size) for s in (2, 3, 4)]
    parent = engine.open()
    engine.step([(parent, list(prefix), None)])
    children = [engine.fork(parent) for _ in tails]
    answers = engine.step(
        [(child, list(tail), ALL_ROWS) for child, tail in zip(children, tails, strict=True)]
    )
    again = engine.step([(parent, list(tails[0]), ALL_ROWS)])[0]
    for sequence in [parent, *children]:
        engine.close(sequence)
    for tail, logits in zip(tails, answers, strict=True):
        np.testing.assert_array_equal(logits, truth("fp16", prefix + tail)[len(prefix) :])
    np.testing.assert_array_equal(again, answers[0])


def test_pages_that_were_used_before_do_not_matter() -> None:
    with model_of(SpreadSource(shape()), precision="fp16", device="cuda", max_batch=1) as model:
        before = model.forward([3, 4, 5])
        engine = model._running()
        for _ in range(3):
            sequence = engine.open()
            engine.step([(sequence, list(range(38)), None)])
            engine.close(sequence)
        np.testing.assert_array_equal(model.forward([3, 4, 5]), before)


def test_score_and_generate_through_the_model() -> None:
    source = SpreadSource(shape(), seed=3, spread=0.2)
    with (
        model_of(source, precision="bf16", device="cuda", max_batch=4) as cuda,
        model_of(source, precision="fp32", device="cpu") as cpu,
    ):
        ids = random_ids(source.config, 30)
        np.testing.assert_allclose(
            cuda.score(ids).logprobs[1:], cpu.score(ids).logprobs[1:], atol=0.1
        )
        results = cuda.generate([ids[:4], ids[4:9]], max_new_tokens=6, seed=4, n=3)
        alone = cuda.generate(ids[4:9], max_new_tokens=6, seed=4, n=3)
        assert [each.token_ids for each in results[1]] == [each.token_ids for each in alone]
        assert cuda.plan().total > 0
        assert repr(cuda).endswith("bf16, cuda:0>")


def test_a_model_from_the_builtin_folder() -> None:
    with GPT2.from_pretrained("builtin", device="cuda", precision="fp16", max_batch=1) as model:
        text = model.generate("Once upon a time", max_new_tokens=3, temperature=0)
    with GPT2.from_pretrained("builtin", device="cpu", precision="fp32") as model:
        assert model.generate("Once upon a time", max_new_tokens=3, temperature=0) == text


def test_packed_weights_are_for_the_cpu(tmp_path: Path) -> None:
    with model_of(SpreadSource(SMALL), precision="int8", device="cuda") as model:
        with pytest.raises(ParameterError, match="packed: packed weights are for the CPU"):
            model.save_prepared(tmp_path)
        assert model._engine is not None
        with pytest.raises(ParameterError, match="load_packed: packed weights are for the CPU"):
            model._engine.load_packed(0, 0, 0, 4096, [])
    assert not list(tmp_path.iterdir())


def test_a_device_takes_the_weights_that_lie_beside_the_prepared_ones(tmp_path: Path) -> None:
    write_folder(tmp_path, SpreadSource(SMALL))
    with model_of(SpreadSource(SMALL), precision="int8", device="cuda") as model:
        wanted = model.forward([1, 2, 3]).tobytes()
    with GPT2.from_pretrained(tmp_path, precision="int8", device="cpu") as model:
        model.save_prepared(tmp_path)
        on_cpu = model.forward([1, 2, 3]).tobytes()
    for device, kind in (("cuda", "cuda:0"), ("auto", "cuda:0"), ("cpu", "cpu")):
        with GPT2.from_pretrained(tmp_path, device=device) as model:
            assert (model.device, model.precision) == (kind, "int8")
            given = model.forward([1, 2, 3]).tobytes()
            assert given == (on_cpu if kind == "cpu" else wanted)
    (tmp_path / "model.safetensors").unlink()
    with GPT2.from_pretrained(tmp_path, device="auto") as model:
        assert model.device == "cpu"
    with pytest.raises(ParameterError, match="a prepared file, which is for the CPU"):
        GPT2.from_pretrained(tmp_path, device="cuda")
