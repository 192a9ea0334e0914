"""A short run of the fuzzer; the long one is its command line."""

from __future__ import annotations

import time

import pytest

from gpt2_fast.checkpoints import openai_bundle, tensor_bundle
from gpt2_fast.errors import CheckpointError

from . import fuzz_openai_bundle
from .fuzz_openai_bundle import Finding, fuzz


def test_ten_seconds_of_damage() -> None:
    cases, readable = fuzz(10.0, 1, lambda _line: None)
    assert cases > 200
    assert 0 < readable < cases / 2  # the damage must reach the parsers, and must not be all


def test_the_fuzzer_finds_a_planted_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader without its bounds check on names."""

    def unchecked(key: bytes, where: str) -> str:
        return key.decode("utf-8")

    monkeypatch.setattr(tensor_bundle, "_tensor_name", unchecked)
    with pytest.raises(Finding, match="UnicodeDecodeError"):
        fuzz(20.0, 1, lambda _line: None)


def test_the_fuzzer_finds_a_planted_slowness(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(data: bytes, where: str) -> None:
        ends = time.process_time() + 0.04
        while time.process_time() < ends:
            pass
        raise CheckpointError(where)

    monkeypatch.setattr(openai_bundle, "parse_index", slow)
    monkeypatch.setattr(fuzz_openai_bundle, "SECONDS_ALLOWED", 0.02)
    with pytest.raises(Finding, match="took"):
        fuzz(20.0, 1, lambda _line: None)
