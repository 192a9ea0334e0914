"""Models as things that are made, take memory, are shared, and go away."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

import gpt2_fast
from gpt2_fast import (
    _C,
    GPT2,
    PUBLISHED,
    CheckpointError,
    DeviceError,
    GPT2Config,
    ParameterError,
)
from tests.model_support import (
    TINY,
    SpreadSource,
    byte_tokenizer,
    facts,
    model_of,
    random_ids,
    tiny_model,
    write_folder,
)

if TYPE_CHECKING:
    pass

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["h.1.mlp.c_fc.weight", "wpe.weight", "ln_f.bias", "wte.weight"])
def test_weights_that_are_not_finite_are_refused(name: str, value: float) -> None:
    damaged = SpreadSource(TINY).array(name).copy()
    damaged.flat[37 % damaged.size] = value
    with pytest.raises(CheckpointError, match=rf"{name}.*element {37 % damaged.size} is"):
        model_of(SpreadSource(TINY, replace={name: damaged}))


def test_arguments_are_checked_before_anything_is_made() -> None:
    for wrong in ("int3", "FP32", "", None, ["fp32"], 16):
        with pytest.raises(ParameterError, match="must be one of fp32, bf16, int8, int4, got"):
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
