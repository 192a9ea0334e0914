"""Kernels of csrc/cuda on the host: `simt` tests need the native module in its simt flavour.

`GPT2_FAST_NATIVE=build/simt/_C.so pytest tests/cuda` runs them (CONTRIBUTING.md says how it is
built); in any other run they are left out.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from gpt2_fast import _C

if TYPE_CHECKING:
    from collections.abc import Iterator

_ALL = "forward_late,reverse_early,random_1,random_2"
#: Orders in which the simulated device runs threads; GPT2_FAST_SCHEDULES chooses among them.
SCHEDULES = tuple(os.environ.get("GPT2_FAST_SCHEDULES", _ALL).split(","))
SIMT = getattr(_C, "simt", None)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what this build cannot run."""
    if SIMT is not None:
        return
    left_out = [item for item in items if "simt" in getattr(item, "fixturenames", ())]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture
def simt() -> Iterator[Any]:
    """The submodule of kernel-level hooks. Whatever a test finds, nothing may have raced."""
    assert SIMT is not None
    SIMT.set_schedule(SCHEDULES[0])
    SIMT.races()
    yield SIMT
    SIMT.set_schedule(SCHEDULES[0])
    assert SIMT.races() == []


@pytest.fixture(params=SCHEDULES)
def schedule(request: pytest.FixtureRequest, simt: Any) -> str:
    """The test in every order of threads, and with copies that land late and early."""
    simt.set_schedule(request.param)
    return str(request.param)
