"""The figures of the int8 cache, on one layer."""

from __future__ import annotations

import pytest

from benchmarks import kv_cache


def test_runs_end_to_end(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--layers", "1", "--rounds", "1", "--steps", "2", "--batch", "2", "--threads", "1"]
    kv_cache.main([*sizes, "--precision", "bf16"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:-2]] == [
        "decode, context 32",
        "decode, context 1021",
        "2 texts, context 32",
        "2 texts, context 1021",
        "prompt of 1021",
    ]
    assert lines[-1] == "One full context takes 3.1 or 1.6 MB."


def test_ratios_are_taken_within_a_round() -> None:
    case = kv_cache.Case("a", [2.0, 9.0, 4.0], [1.0, 3.0, 4.0])
    table = kv_cache.as_markdown([case], (2.0, 1.0))
    assert "| a | 4.00 (2.00-9.00) | 3.00 (1.00-4.00) | 2.00 (1.00-3.00) x |" in table
