"""Fixtures of the kernel tests: each instruction set this machine can run, restored afterwards."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from gpt2_fast import _C

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(params=_C.isas())
def isa(request: pytest.FixtureRequest) -> str:
    """Run the test once on each instruction set, with two threads."""
    name: str = request.param
    _C.set_op_backend(name, 2)
    return name


@pytest.fixture(autouse=True)
def _default_backend() -> Iterator[None]:
    yield
    _C.set_op_backend(_C.default_isa(), _C.available_threads())
