"""What the benchmarks share: the bandwidth of this run, threads, and the figures at the end.

`pytest benchmarks` measures; `pytest benchmarks --benchmark-disable` runs everything once, on small
models, for its assertions only.
"""

from __future__ import annotations

import os

# Before numpy loads its library: its threads would wait beside ours for every other second.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest

from benchmarks import roofline
from gpt2_fast import _C

ROWS = pytest.StashKey[list[tuple[str, dict[str, Any]]]]()


@pytest.fixture(scope="session")
def quick(pytestconfig: pytest.Config) -> bool:
    """Whether results are asserted only, and nothing is measured."""
    disabled = pytestconfig.getoption("benchmark_disable")
    return bool(disabled and not pytestconfig.getoption("benchmark_enable"))


@pytest.fixture(scope="session")
def peak_gbps(quick: bool) -> float:
    """Read bandwidth of this machine in GB/s, measured in this run."""
    return float("nan") if quick else roofline.peak_gbps()


@pytest.fixture(autouse=True)
def _threads() -> None:
    """Both sides on all threads, whatever the benchmark before wanted."""
    count = _C.available_threads()
    _C.set_op_backend(_C.default_isa(), count)
    if find_spec("torch") is not None:
        import torch

        torch.set_num_threads(count)


@pytest.fixture
def report(request: pytest.FixtureRequest, peak_gbps: float, quick: bool) -> Callable[..., None]:
    """Put figures into the benchmark's JSON and into the table at the end of the run.

    The function returned takes the `benchmark` fixture after it ran and, by keyword:
    seconds (default: the median), moved (bytes), flops, and any other figure as it is.
    """

    def put(
        benchmark: Any,
        *,
        seconds: float | None = None,
        moved: float = 0.0,
        flops: float = 0.0,
        **others: float,
    ) -> None:
        if quick:
            return
        took = benchmark.stats["median"] if seconds is None else seconds
        figures: dict[str, Any] = {name: round(value, 4) for name, value in others.items()}
        if moved:
            figures["GBps"] = round(moved / took / 1e9, 2)
            figures["of_bandwidth"] = round(moved / took / 1e9 / peak_gbps, 3)
        if flops:
            figures["GFLOPs"] = round(flops / took / 1e9, 1)
        benchmark.extra_info.update(figures, peak_GBps=round(peak_gbps, 2))
        rows = request.config.stash.setdefault(ROWS, [])
        rows.append((request.node.name, {"ms": round(took * 1e3, 4), **figures}))

    return put


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Print the figures that pytest-benchmark keeps for its JSON."""
    rows = config.stash.get(ROWS, [])
    if not rows:
        return
    terminalreporter.section("figures (GB = 1e9 bytes; of_bandwidth above 1: served by a cache)")
    width = max(len(name) for name, _ in rows)
    for name, figures in rows:
        cells = "  ".join(f"{key} {value:g}" for key, value in figures.items())
        terminalreporter.write_line(f"{name:<{width}}  {cells}")
