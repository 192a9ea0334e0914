"""The device itself: `pytest -m gpu`. What the simulated device shows of the engine is shown again
here, and what it cannot: real sizes, many runs that must give the same bits, torch's CUDA tensors.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from gpt2_fast import _C, GPT2, PUBLISHED, bench_ops, ops
from gpt2_fast.bench_ops import Case
from gpt2_fast.cli import OK, main
from gpt2_fast.errors import DeviceError
from gpt2_fast.sources import RandomSource
from tests.bits_support import ALL_ROWS, perturbed, run_alone, some_tokens
from tests.cuda import test_engine as on_any_device

if TYPE_CHECKING:
    from pathlib import Path

GPT2_124M = PUBLISHED["124M"]
PRECISIONS = list(on_any_device.PRECISIONS)
NARROW = ["bf16", "fp16"]


def missing() -> str | None:
    """Why there is no device to test, or None."""
    if hasattr(_C, "simt"):
        return "this build simulates its devices"
    try:
        _C.cuda_devices()
    except DeviceError as error:
        return str(error)
    return None


REASON = missing()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=str(REASON))]
in_torch = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")


@pytest.fixture(autouse=True)
def _capable(request: pytest.FixtureRequest) -> None:
    """bf16 needs compute capability 8.0."""
    callspec = getattr(request.node, "callspec", None)
    precision = callspec.params.get("precision") if callspec else None
    if precision == "bf16" and _C.cuda_devices()[0]["capability"][0] < 8:
        # No such model can be made there; test_device.py checks that it is refused.
        pytest.skip("this device has no bf16")


# Ops on torch's CUDA tensors.


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def odd_cases() -> list[Case]:
    """Widths, rows and lengths that fill no tile, page or vector."""
    made = []
    for width in (1, 5, 48, 100, 769, 1024, 1280, 1600):
        x = normal(7, width, seed=width)
        norm = (normal(width, seed=1).bfloat16().float(), normal(width, seed=2).bfloat16().float())
        made += [
            Case("layernorm", f"width {width}", (x, *norm)),
            Case("add_layernorm", f"width {width}", (x, normal(7, width, seed=3), *norm)),
            Case("gelu", f"width {width}", (x,)),
        ]
    for rows, inputs, outputs in ((1, 1, 1), (3, 100, 37), (17, 769, 130), (65, 320, 257)):
        bias = normal(outputs, seed=4).bfloat16().float()
        residual = normal(rows, outputs, seed=5)
        for gelu, given in ((False, None), (True, None), (False, residual)):
            args = (normal(rows, inputs, seed=6), normal(outputs, inputs, seed=7), bias, given)
            name = f"{rows}x{inputs}x{outputs}, gelu {gelu}, residual {given is not None}"
            made.append(Case("linear", name, (*args, gelu)))
    for size, queries, keys in ((1, 1, 1), (5, 3, 20), (64, 65, 130), (80, 16, 64), (128, 33, 300)):
        q, k, v = (normal(2, 3, n, size, seed=n + size) for n in (queries, keys, keys))
        case = Case("attention_prefill", f"{queries} of {keys}, head {size}", (q, k, v, size**-0.5))
        lengths = torch.tensor([1, keys], dtype=torch.int32)
        decode = (q[:, :, 0].contiguous(), k, v, lengths, size**-0.5)
        made += [case, Case("attention_decode", f"{keys} keys, head {size}", decode)]
    return made


CASES = {f"{case.op}: {case.shape}": case for case in odd_cases()}


@in_torch
@pytest.mark.parametrize("precision", NARROW)
@pytest.mark.parametrize("name", CASES)
def test_an_op_is_as_accurate_as_torch(name: str, precision: str) -> None:
    found = bench_ops.check(CASES[name], torch.device("cuda"), precision)
    assert found["passed"], found


@in_torch
@pytest.mark.parametrize("precision", NARROW)
def test_ops_at_real_shapes_are_as_accurate_as_torch(precision: str) -> None:
    for rows in (1, 8, 16):
        for case in bench_ops.cases(GPT2_124M, rows):
            found = bench_ops.check(case, torch.device("cuda"), precision)
            assert found["passed"], found


@in_torch
def test_sample_draws_what_is_defined() -> None:
    found = bench_ops.check_sample(GPT2_124M, torch.device("cuda"))
    assert found["passed"], found


@in_torch
@pytest.mark.parametrize("precision", NARROW)
def test_a_row_of_linear_has_the_same_bits_in_every_batch(precision: str) -> None:
    dtype = bench_ops.DTYPES[precision]
    x, weight = (normal(*s, seed=s[0]).to("cuda", dtype) for s in ((300, 768), (2304, 768)))
    whole = ops.linear(x, weight)
    for rows in (1, 2, 8, 9, 16, 17, 64, 65, 129):
        assert torch.equal(ops.linear(x[:rows].contiguous(), weight), whole[:rows])


@in_torch
@pytest.mark.parametrize("precision", NARROW)
def test_attention_has_the_same_bits_in_decode_and_prefill(precision: str) -> None:
    dtype = bench_ops.DTYPES[precision]
    q, k, v = (normal(1, 12, n, 64, seed=n).to("cuda", dtype) for n in (200, 700, 700))
    whole = ops.attention_prefill(q, k, v, 0.125)
    for query in (0, 7, 63, 64, 199):
        lengths = torch.tensor([501 + query], dtype=torch.int32, device="cuda")
        alone = ops.attention_decode(q[:, :, query].contiguous(), k, v, lengths, 0.125)
        assert torch.equal(alone, whole[:, :, query])


@in_torch
def test_ops_run_on_the_current_stream() -> None:
    """Behind work that takes long, and without waiting for it."""
    stream = torch.cuda.Stream()
    x = torch.zeros(64, 768, device="cuda", dtype=torch.float16)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        x += 1
        out = ops.gelu(x)
        assert not stream.query()  # the op came back before the sleep ended
    stream.synchronize()
    assert torch.equal(out, torch.nn.functional.gelu(x, approximate="tanh"))


# The engine.


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", on_any_device.SHAPES)
def test_logits_are_as_accurate_as_torch(name: str, precision: str) -> None:
    on_any_device.test_logits_are_as_accurate_as_torch(name, precision)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rows_do_not_depend_on_company(precision: str) -> None:
    on_any_device.test_rows_do_not_depend_on_company(precision=precision, schedule="")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_recorded_steps_equal_eager_ones(
    precision: str, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = _C.Draw(temperature, 0, 1.0, 0.0, False, 11, 0, 0)
    on_any_device.test_recorded_steps_equal_eager_ones(precision, draw, monkeypatch, "")


def test_forks_pages_and_the_model_class() -> None:
    on_any_device.test_forked_sequences_equal_separate_ones()
    on_any_device.test_pages_that_were_used_before_do_not_matter()
    on_any_device.test_a_model_from_the_builtin_folder()


# Real sizes.


@lru_cache(maxsize=1)
def real_engine(precision: str) -> _C.Engine:
    engine = _C.Engine(GPT2_124M.to_dict(), precision, "", 1, 16, "cuda", 0)
    for name, array in perturbed(RandomSource(GPT2_124M, 1)):
        engine.load(name, array, "F32")
    return engine


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_whole_context_has_the_same_bits_in_chunks_and_in_company(precision: str) -> None:
    engine = real_engine(precision)
    tokens = list(some_tokens(1, 1024, GPT2_124M.vocab_size))
    truth = run_alone(engine, tokens)
    assert np.isfinite(truth).all()
    sequence, others = engine.open(), [engine.open() for _ in range(9)]
    parts, start = [], 0
    for size in (1, 1, 7, 55, 64, 1, 300, 1, 1, 593):
        items: list[Any] = [(sequence, tokens[start : start + size], ALL_ROWS)]
        items += [
            (other, tokens[start + n : start + n + 1], ALL_ROWS) for n, other in enumerate(others)
        ]
        parts.append(engine.step(items)[0])
        start += size
    for each in (sequence, *others):
        engine.close(each)
    np.testing.assert_array_equal(np.concatenate(parts).view(np.uint32), truth.view(np.uint32))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_hundred_runs_give_the_same_tokens(precision: str) -> None:
    """A race, or a wait too short in a recorded step, would show sooner or later."""
    engine = real_engine(precision)
    draw = _C.Draw(0.8, 0, 1.0, 0.0, False, 3, 0, 0)
    prompts = [some_tokens(seed, 40 + 60 * seed, GPT2_124M.vocab_size) for seed in range(16)]
    first = on_any_device.decode(engine, prompts, 8, draw)
    for _ in range(100):
        assert on_any_device.decode(engine, prompts, 8, draw) == first
    for prompt, expected in zip(prompts[::5], first[::5], strict=True):
        assert on_any_device.decode(engine, [prompt], 8, draw) == [expected]


@pytest.mark.parametrize("size", ["355M", "774M", "1558M"])
def test_larger_sizes_load_and_agree_with_themselves(size: str) -> None:
    config = PUBLISHED[size]
    with GPT2.from_config(config, device="cuda", precision="fp16", max_batch=2) as model:
        ids = list(some_tokens(2, 70, config.vocab_size))
        whole = model.forward(ids)
        assert np.isfinite(whole).all()
        np.testing.assert_array_equal(model.forward(ids[:33]), whole[:33])


@in_torch
@pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
def test_the_benchmark_runs(tmp_path: Path) -> None:
    words = ["bench", "--device", "cuda", "--batch", "1,2", "--position", "1,1023"]
    assert main([*words, "--steps", "4", "--rounds", "1", "--out", str(tmp_path)]) == OK
    text = (tmp_path / "bench.md").read_text()
    assert "Left out" not in text, text
    assert "mlp_proj" in text
    assert "torch.compile" in text
