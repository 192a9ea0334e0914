"""What the engine takes of a machine, and the state it leaves behind."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from gpt2_fast import _C, GPT2, DeviceError, GPT2Config, ParameterError

TINY = GPT2Config(
    n_layer=2, n_embd=32, n_head=2, n_ctx=64, vocab_size=99, eos_token_id=None
)  # fmt: skip
FE_TONEAREST, FE_UPWARD = 0, 0x800 if os.uname().machine == "x86_64" else 0x400000


def logits(threads: int = 2) -> np.ndarray:
    with GPT2.from_config(TINY, threads=threads) as model:
        return model.forward(list(range(40)))


def in_subprocess(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **environment},
        timeout=120,
    )
    return done.stdout.strip()


def test_threads_follow_the_affinity_mask() -> None:
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))});"
        "from gpt2_fast import _C; print(_C.available_threads(), _C.cpu_budget()[0])"
    )
    assert in_subprocess(code, GPT2_FAST_THREADS="") == "1 1"


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000"}, 0.5),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000"}, 0),
        # The limit of an outer group counts as well.
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/b/cpu.max": "400000 100000",
                "sys/fs/cgroup/a/cpu.max": "150000 100000",
            },
            1.5,
        ),
        (
            {
                "proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/y\n",
                "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "20000",
                "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000",
            },
            0.2,
        ),
        (
            {
                "proc/self/cgroup": "5:cpu,cpuacct:/x\n",
                "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000",
            },
            0,
        ),
        ({"proc/self/cgroup": "garbage\n", "sys/fs/cgroup/cpu.max": "x y"}, 0),
        ({}, 0),
    ],
)
def test_threads_follow_the_container_quota(
    tmp_path: Path, files: dict[str, str], quota: float
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    cores, found, threads = _C.cpu_budget(str(tmp_path))

    assert found == pytest.approx(quota)
    assert threads == (cores if quota == 0 else max(1, min(cores, int(np.ceil(quota)))))


def test_memory_follows_the_container_limit(tmp_path: Path) -> None:
    for name, text in {
        "proc/self/cgroup": "0::/a\n",
        "proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 8000 kB\n",
        "sys/fs/cgroup/a/memory.max": "5000000",
        "sys/fs/cgroup/a/memory.current": "1000000",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert _C.available_memory(str(tmp_path)) == 4_000_000
    (tmp_path / "sys/fs/cgroup/a/memory.max").write_text("max")
    assert _C.available_memory(str(tmp_path)) == 8000 * 1024


def test_environment_sets_threads_and_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPT2_FAST_THREADS", "3")
    monkeypatch.setenv("GPT2_FAST_ISA", "scalar")
    with GPT2.from_config(TINY) as model:
        assert (model.threads, model.isa) == (3, "scalar")


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5", "1025", "3x"])
def test_bad_thread_count_is_named(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("GPT2_FAST_THREADS", value)
    with pytest.raises(ParameterError, match=rf"GPT2_FAST_THREADS .* got '{value}'"):
        GPT2.from_config(TINY)


def test_unknown_instruction_set_lists_the_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPT2_FAST_ISA", "mmx")
    with pytest.raises(DeviceError, match="'mmx' is not available here; this machine runs scalar"):
        GPT2.from_config(TINY)


def test_results_do_not_depend_on_the_callers_rounding_mode() -> None:
    libm = ctypes.CDLL("libm.so.6")
    with GPT2.from_config(TINY, threads=2) as model:
        expected = model.forward(list(range(40)))
        assert libm.fesetround(FE_UPWARD) == 0
        try:
            found = model.forward(list(range(40)))
            kept = libm.fegetround()
        finally:
            libm.fesetround(FE_TONEAREST)
    assert kept == FE_UPWARD, "the caller's rounding mode was not restored"
    np.testing.assert_array_equal(found, expected)


def test_denormals_of_the_caller_survive() -> None:
    logits()
    tiny = np.float32(1e-40)
    assert tiny * np.float32(1) == tiny > 0


def test_flushing_in_the_caller_changes_nothing() -> None:
    torch = pytest.importorskip("torch")
    expected = logits()
    torch.set_flush_denormal(True)
    try:
        found = logits()
        flushed = torch.tensor([1e-40]) * 1
    finally:
        torch.set_flush_denormal(False)
    np.testing.assert_array_equal(found, expected)
    assert flushed.item() == 0, "the caller's own state was not restored"


def test_more_threads_than_work() -> None:
    np.testing.assert_array_equal(logits(threads=64), logits(threads=1))


def test_too_large_a_model_is_refused_before_it_is_allocated() -> None:
    huge = GPT2Config(n_layer=1024, n_embd=16384, n_head=128)
    code = "CapacityError"
    with pytest.raises(MemoryError, match=r"weights take .* only .* are available") as caught:
        GPT2.from_config(huge)
    assert type(caught.value).__name__ == code


def test_engines_work_beside_each_other() -> None:
    expected = logits()
    found: list[np.ndarray] = []
    workers = [threading.Thread(target=lambda: found.append(logits())) for _ in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 6
    for each in found:
        np.testing.assert_array_equal(each, expected)


def test_a_forked_child_starts_threads_of_its_own() -> None:
    code = """
import os, warnings
from gpt2_fast import GPT2, GPT2Config
warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads at a fork
config = GPT2Config(n_layer=2, n_embd=32, n_head=2, n_ctx=64, vocab_size=99, eos_token_id=None)
model = GPT2.from_config(config, threads=2)
expected = model.forward([1, 2, 3])
child = os.fork()
if child == 0:
    os._exit(0 if (model.forward([1, 2, 3]) == expected).all() else 1)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(status, (model.forward([1, 2, 3]) == expected).all())
"""
    assert in_subprocess(code) == "0 True"
