"""compare.py end to end on one layer, and the judgement it makes where tokens differ."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import agreement, compare, roofline, traffic
from benchmarks.peers.contract import Job, Shape
from benchmarks.turns import EngineError, loaded, random_prompts
from gpt2_fast import PUBLISHED, GPT2Config

needs_rivals = pytest.mark.skipif(
    find_spec("torch") is None or find_spec("transformers") is None,
    reason="torch and transformers are not installed",
)
TINY = ["--layers", "1", "--context", "5", "--new", "6", "--rounds", "2", "--mib", "1"]


@needs_rivals
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_runs_end_to_end(
    precision: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both files are written, and every engine made as many tokens as asked."""
    table, data = tmp_path / "table.md", tmp_path / "data.json"
    rivals = ["torch", "transformers"] if precision == "fp32" else ["torch"]
    files = ["--json", str(data), "--markdown", str(table)]
    compare.main([*TINY, "--batch", "2", "--precision", precision, "--rivals", *rivals, *files])

    assert capsys.readouterr().out == table.read_text()
    result = json.loads(data.read_text())
    assert [e["engine"] for e in result["engines"]] == ["gpt2_fast", *rivals]
    for engine in result["engines"]:
        assert [len(tokens) for tokens in engine["tokens"]] == [6, 6]
        assert len(engine["decode"]) == 2
        assert all(rate > 0 for rate in engine["decode"])
        assert engine["engine"] in table.read_text()
    compared = [bool(engine["agreement"]) for engine in result["engines"][1:]]
    assert compared == [precision == "fp32"] * len(rivals)


def test_a_failing_engine_is_named(tmp_path: Path) -> None:
    """What went wrong in the worker's process comes back as an error here."""
    job = Job(Shape.of(PUBLISHED["124M"]), "fp32", 1, 1, tmp_path)
    with pytest.raises(EngineError, match=rf"gpt2_fast: (?s:.*){re.escape(str(tmp_path))}"):
        loaded("gpt2_fast", job)


def test_refuses_bad_sizes() -> None:
    """More tokens than the context holds, or none to measure."""
    for wrong in (["--context", "1000", "--new", "26"], ["--new", "1"], ["--rounds", "0"]):
        with pytest.raises(SystemExit):
            compare.parse(wrong)
    with pytest.raises(SystemExit):
        roofline.main(["--mib", "64"])


def test_judgement() -> None:
    """A close choice may differ; a clear one may not, nor may ours be worse than theirs."""
    truth = np.array([1.0, 1.0 + 1e-6, 0.5])
    off = np.array([1e-6, -1e-6, 0.0])
    assert "margin" in agreement.judge(truth, truth + off, truth - off, 0, 1)
    with pytest.raises(RuntimeError, match="although the choice was clear"):
        agreement.judge(truth, truth + off, truth - off, 0, 2)
    with pytest.raises(RuntimeError, match="less accurate"):
        agreement.judge(truth, truth + 100 * off, truth - off, 0, 1)


@needs_rivals
def test_a_wrong_token_is_found() -> None:
    """An engine whose token is not the likeliest is caught by float64."""
    config = replace(PUBLISHED["124M"], n_layer=1, vocab_size=64, eos_token_id=None)
    prompts = random_prompts(config.vocab_size, 1, 4)
    row = agreement.true_logits(config, prompts[0])
    best, worst = int(row.argmax()), int(row.argmin())

    def logits(tokens: list[int]) -> Any:
        assert tokens == prompts[0]
        return row.astype(np.float32).tolist()

    same = agreement.explain(config, prompts, [[best]], [[best]], logits, logits)
    assert same == "the same 1 tokens"
    with pytest.raises(RuntimeError, match="although the choice was clear"):
        agreement.explain(config, prompts, [[worst]], [[best]], logits, logits)


def test_traffic_counts() -> None:
    """Against counts made by hand for a model small enough to do so."""
    config = GPT2Config(
        n_layer=1, n_embd=4, n_head=1, n_ctx=8, vocab_size=10, n_inner=6, eos_token_id=None
    )
    matrices = 10 * 4 + 4 * 12 + 4 * 4 + 4 * 6 + 6 * 4
    vectors = 4 * 4 + 12 + 4 + 6 + 4 + 2 * 4
    assert traffic.weight_bytes(config, "fp32") == 4 * (matrices + vectors)
    assert traffic.weight_bytes(config, "bf16") == 2 * matrices + 4 * vectors
    untied = replace(config, tie_word_embeddings=False)
    assert traffic.weight_bytes(untied, "fp32") == traffic.weight_bytes(config, "fp32")
    # three tokens after five: the first from the prompt, then steps over 6 and 7 positions
    steps = [traffic.cache_bytes(config, "fp32", 6), traffic.cache_bytes(config, "fp32", 7)]
    assert steps == [2 * 4 * 4 * 6, 2 * 4 * 4 * 7]
    mean = traffic.decode_bytes(config, "fp32", 5, 3) - traffic.weight_bytes(config, "fp32")
    assert mean == sum(steps) / 2
