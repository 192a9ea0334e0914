"""device="cuda": what is missing is said, what fails is typed, and nothing is lost by it."""

from __future__ import annotations

import gc
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from gpt2_fast import (
    _C,
    CapacityError,
    DeviceError,
    GPT2Config,
    Gpt2FastError,
    ParameterError,
    plan,
)
from gpt2_fast.device import choose
from tests.model_support import SpreadSource, model_of

if TYPE_CHECKING:
    from collections.abc import Iterator

NO_DRIVER, NO_DEVICE, OUT_OF_MEMORY, LAUNCH_FAILED = 35, 100, 2, 719
CONFIG = GPT2Config(n_layer=1, n_embd=32, n_head=2, n_ctx=40, vocab_size=101, eos_token_id=None)


@pytest.fixture(autouse=True)
def ordinary_device(simt: Any) -> Iterator[None]:
    simt.set_device()
    simt.forget_failures()
    yield
    simt.set_device()
    simt.forget_failures()


def make(**how: Any) -> Any:
    how = {"device": "cuda", "precision": "fp16", "max_batch": 2, **how}
    return model_of(SpreadSource(CONFIG, spread=0.2), **how)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"missing": NO_DRIVER}, r"device 'cuda' is not available: no NVIDIA driver answers"),
        ({"missing": NO_DEVICE}, r"device 'cuda' is not available: the NVIDIA driver sees no GPU"),
        ({"count": 0}, r"device 'cuda' is not available: the NVIDIA driver sees no GPU"),
    ],
)
def test_what_is_missing_is_said_and_auto_takes_the_cpu(
    simt: Any, facts: dict[str, int], message: str
) -> None:
    simt.set_device(**facts)
    with pytest.raises(DeviceError, match=message):
        make()
    with pytest.raises(DeviceError, match=message):
        _C.cuda_devices()
    assert str(choose("auto", "bf16")) == "cpu"
    with pytest.raises(
        ParameterError, match=r"of fp32, bf16, int8, int4, got 'fp16' on cpu.*device 'cuda' is"
    ):
        choose("auto", "fp16")
    assert str(choose("auto", "int8")) == "cpu"


def test_devices_are_described() -> None:
    (device,) = _C.cuda_devices()
    assert device["index"] == 0
    assert device["capability"] == (9, 0)
    assert device["memory_bytes"] == 8 << 30
    assert device["multiprocessors"] > 0
    assert device["name"]


def test_device_names(simt: Any) -> None:
    simt.set_device(count=2)
    assert str(choose("auto", "bf16")) == "cuda:0"
    assert str(choose("auto", "fp32")) == "cpu"
    assert str(choose("cuda:1", "int4")) == "cuda:1"
    with make(device="cuda:1") as model:
        assert model.device == "cuda:1"
    with pytest.raises(DeviceError, match=r"'cuda:2': this machine has 2 CUDA devices"):
        make(device="cuda:2")
    for name in ("gpu", "cpu:0", "cuda:", "cuda:x", "auto:1", "", None, 0):
        with pytest.raises(
            ParameterError, match="device must be one of auto, cpu, cuda, cuda:NUMBER"
        ):
            make(device=name)
    with pytest.raises(ParameterError, match=r"one of bf16, fp16, int8, int4, got 'fp32' on cuda"):
        make(precision="fp32")
    with pytest.raises(ParameterError, match=r"one of fp32, bf16, int8, int4, got 'fp16' on cpu"):
        make(device="cpu")


def test_an_int8_cache_is_for_the_cpu() -> None:
    with make(device="auto", precision="bf16", kv_precision="int8") as model:
        assert model.device == "cpu"
    with pytest.raises(ParameterError, match="kv_precision must be None on cuda, got 'int8'"):
        make(kv_precision="int8")
    how = CONFIG.to_dict(), "fp16", "", 1, 1, "cuda", 0, True
    with pytest.raises(ParameterError, match="kv_precision must be None on CUDA, got 'int8'"):
        _C.Engine(*how)


def test_what_a_device_cannot_compute_is_refused_at_once(simt: Any) -> None:
    simt.set_device(major=7, minor=5)
    with pytest.raises(DeviceError, match=r"7\.5 has no bfloat16 products; use precision 'fp16'"):
        make(precision="bf16")
    with pytest.warns(UserWarning, match=r"7\.5.*running on the CPU"):
        assert str(choose("auto", "bf16")) == "cpu"
    assert str(choose("auto", "fp16")) == "cuda:0"
    with make() as model:
        assert len(model.generate([1, 2], max_new_tokens=3).token_ids) == 3
    simt.set_device(major=7, minor=0)
    with pytest.raises(DeviceError, match=r"7\.0; the kernels need 7\.5 or newer"):
        make()


def test_a_head_that_no_kernel_takes() -> None:
    wide = GPT2Config(n_layer=1, n_embd=136, n_head=1, n_ctx=8, vocab_size=7, eos_token_id=None)
    with pytest.raises(ParameterError, match=r"head size \(n_embd / n_head\) must be at most 128"):
        model_of(SpreadSource(wide), device="cuda", precision="fp16")


def test_memory_that_is_not_there(simt: Any) -> None:
    wanted = plan(CONFIG, precision="fp16", max_batch=2, device="cuda")
    simt.set_device(memory=wanted.total // 2)
    with pytest.raises(CapacityError, match=rf"device memory: weights take {wanted.weights} bytes"):
        make()
    simt.set_device()
    before = simt.stats()["device_bytes"]
    for skip in range(3):
        simt.fail_next("cudaMalloc", OUT_OF_MEMORY, skip)
        with pytest.raises(CapacityError, match=r"bytes of memory on device 0 \(cudaMalloc\)"):
            make()
        simt.forget_failures()
    gc.collect()
    assert simt.stats()["device_bytes"] == before


def test_memory_is_what_the_plan_says(simt: Any) -> None:
    gc.collect()
    before = simt.stats()["device_bytes"]
    with make() as model:
        assert simt.stats()["device_bytes"] - before == model.plan().total
    gc.collect()
    assert simt.stats()["device_bytes"] == before


@pytest.mark.parametrize(
    "call",
    [
        "cudaSetDevice",
        "cudaGetDevice",
        "cudaStreamCreateWithFlags",
        "cudaMallocHost",
        "cudaMemsetAsync",
        "cudaMemcpyAsync",
        "cudaStreamSynchronize",
        "cudaMemGetInfo",
        "cudaDeviceGetAttribute",
    ],
)
def test_a_call_that_fails_while_loading_is_named(simt: Any, call: str) -> None:
    gc.collect()
    before = simt.stats()["device_bytes"]
    simt.set_device(count=2)
    simt.fail_next(call, LAUNCH_FAILED)
    with pytest.raises(DeviceError, match=call):
        make(device="cuda:1")  # not the one that the thread works on: that one needs no call
    simt.forget_failures()
    gc.collect()
    assert simt.stats()["device_bytes"] == before
    with make() as model:
        assert len(model.generate([1], max_new_tokens=2).token_ids) == 2


@pytest.mark.parametrize(
    "call",
    [
        "cudaMemcpyAsync",
        "cudaLaunchKernelExC",
        "cudaStreamSynchronize",
        "cudaStreamBeginCapture",
        "cudaStreamEndCapture",
        "cudaGraphInstantiate",
        "cudaGraphLaunch",
    ],
)
def test_a_step_that_fails_can_be_taken_again(simt: Any, call: str) -> None:
    with make() as model:
        expected = model.generate([5, 6, 7], max_new_tokens=8, seed=3)
    draw = _C.Draw(1.0, 0, 1.0, 0.0, False, 3, 0, 0)
    with make() as model:
        engine = model._running()
        sequence = engine.open()
        drawn = [engine.step([(sequence, [5, 6, 7], draw)])[0][0]]
        drawn.append(engine.step([(sequence, [drawn[-1]], draw)])[0][0])
        failed = False
        while len(drawn) < 8:
            length = engine.length(sequence)
            if not failed and call != "cudaLaunchKernelExC":
                simt.fail_next(call, LAUNCH_FAILED)
            elif not failed:
                simt.fail_next(call, LAUNCH_FAILED, 3)
            try:
                drawn.append(engine.step([(sequence, [drawn[-1]], draw)])[0][0])
            except DeviceError as error:
                assert "719" in str(error) or "LaunchFailure" in str(error)  # noqa: PT017
                assert engine.length(sequence) == length
                failed = True
            simt.forget_failures()
        assert failed
    assert drawn == expected.token_ids


def test_the_caller_keeps_its_device(simt: Any) -> None:
    simt.set_device(count=3)
    with make(device="cuda:2") as model:
        model.generate([1, 2, 3], max_new_tokens=3)
        assert simt.current_device() == 0


def test_engines_and_threads_side_by_side() -> None:
    """Each engine has its stream; threads that share one take turns."""
    with make(max_batch=8) as one, make(max_batch=8) as other:
        prompts = [[i, i + 1, 2 * i] for i in range(1, 5)]
        alone = [one.generate(prompt, max_new_tokens=6, seed=9).token_ids for prompt in prompts]
        results: dict[tuple[int, int], list[int]] = {}
        errors: list[Gpt2FastError] = []

        def work(number: int, model: Any, prompt: int) -> None:
            try:
                generation = model.generate(prompts[prompt], max_new_tokens=6, seed=9)
                results[number, prompt] = generation.token_ids
            except Gpt2FastError as error:
                errors.append(error)

        threads = [
            threading.Thread(target=work, args=(number, model, prompt))
            for number, model in enumerate((one, other))
            for prompt in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert errors == []
    assert results == {(n, p): alone[p] for n in range(2) for p in range(4)}


def test_logits_go_to_the_caller_only_when_they_are_there(schedule: str) -> None:
    with make() as model:
        first = model.forward(list(range(30)))
        assert np.isfinite(first).all()
        np.testing.assert_array_equal(first[:7], model.forward(list(range(7))))
