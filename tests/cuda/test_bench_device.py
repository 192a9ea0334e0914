"""`gpt2-fast bench --device cuda` on the simulated device: all but what torch does there."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from gpt2_fast import GPT2Config
from gpt2_fast.bench import Bench, measure
from gpt2_fast.bench_engine import EngineRunner
from gpt2_fast.cli import OK, main
from gpt2_fast.device import Device
from tests.model_support import SpreadSource, write_folder

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("simt")

TINY = GPT2Config(n_layer=1, n_embd=32, n_head=2, n_ctx=12, vocab_size=50, eos_token_id=0)
PRECISIONS = ["bf16", "fp16", "int8", "int4"]


def test_every_precision_and_no_graphs(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", SpreadSource(TINY))
    how: dict[str, Any] = {"batches": (1, 3), "positions": (1, 1023), "steps": 2, "rounds": 1}
    result = measure(Bench(model=str(folder), device="cuda", **how))
    runners = [("gpt2_fast", p) for p in PRECISIONS]
    runners.insert(1, ("gpt2_fast, no graphs", "bf16"))
    assert [(e["runner"], e["precision"]) for e in result["decode"]] == runners * 4
    assert [e["position"] for e in result["decode"][::5]] == [1, 11, 1, 11]
    assert result["agreement"]["gpt2_fast, no graphs, bf16"] == 0
    assert all(0 < share < 0.5 for name, share in result["agreement"].items() if "bf16" not in name)
    assert "finds no CUDA device" in result["left_out"]["torch: rivals, ops, stages, copies"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_folder(tmp_path / "model", SpreadSource(TINY))
    words = ["bench", "--device", "cuda", "-m", str(folder), "--precision", "int8", "--batch", "2"]
    assert main([*words, "--position", "3", "--steps", "2", "--rounds", "1", "--json"]) == OK
    result = json.loads(capsys.readouterr().out)
    assert [entry["precision"] for entry in result["decode"]] == ["int8", "int8"]
    assert result["copy_gbps"] is None


def test_graphs_are_left_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    for setting in ("0", None):
        if setting is None:
            monkeypatch.delenv("GPT2_FAST_CUDA_GRAPHS", raising=False)
        else:
            monkeypatch.setenv("GPT2_FAST_CUDA_GRAPHS", setting)
        for graphs in (True, False):
            runner = EngineRunner(
                TINY, "fp16", Device("cuda"), threads=1, max_batch=2, graphs=graphs
            )
            runner.begin(2, 1)
            runner.steps(4)
            runner.end()
            assert (runner._made.recordings > 0) == graphs
