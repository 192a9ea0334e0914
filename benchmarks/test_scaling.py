"""Our scaling figures on one layer, the limits they are divided by, and the pictures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import peaks, plots, scaling, traffic
from gpt2_fast import PUBLISHED, GPT2Config, bench_bytes

TINY = ["--layers", "1", "--models", "124M", "--steps", "2", "--rounds", "1", "--mib", "1"]
SMALL = GPT2Config(n_layer=2, n_embd=512, n_head=8, vocab_size=4096, eos_token_id=None)


def test_runs_end_to_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every sweep has its points, and a full cache takes the memory that was planned."""
    limits = peaks.Limits(2, 10.0, {"fp32 x": 100.0})
    monkeypatch.setattr(peaks, "measure", lambda *_: replace(limits))
    monkeypatch.setattr(scaling, "PUBLISHED", {"124M": SMALL})
    sizes = ["--contexts", "1", "1023", "--batches", "1", "3", "--threads", "2"]
    status = scaling.main([*TINY, *sizes, "--precision", "bf16", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "scaling.json").read_text())
    assert status == 0, result["memory"]
    assert capsys.readouterr().out == (tmp_path / "scaling.md").read_text()
    assert {sweep["name"]: [p["x"] for p in sweep["points"]] for sweep in result["sweeps"]} == {
        "context": [1, 1023],
        "prompt": [1, 1023],
        "batch": [1, 3],
        "threads": [1, 2],
        "size": [pytest.approx(replace(SMALL, n_layer=1).parameters / 1e6)],
    }
    for sweep in result["sweeps"]:
        for point in sweep["points"]:
            assert point["ms"]["median"] > 0
            assert point["limit_ms"] > 0
    alone, together = result["memory"]
    assert together["filled"] - alone["filled"] > 0.9 * 7 * alone["plan_cache"]
    if plots.missing() is None:
        assert len(list(tmp_path.glob("scaling-bf16-*.png"))) == 5


def test_memory_that_was_not_planned_is_found() -> None:
    """2 % too much of a gigabyte, or too little."""
    assert scaling.fits(1_000_000_000, 1_005_000_000)
    assert not scaling.fits(1_000_000_000, 1_020_000_000)
    assert not scaling.fits(1_000_000_000, 980_000_000)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
def test_bytes_of_a_step(precision: str) -> None:
    """As `gpt2-fast bench` counts them, which was written apart from this."""
    config = PUBLISHED["124M"]
    point, start = scaling.decode_point(config, precision, 3, 3, 100, 15)
    assert start == 100
    assert point.moved == bench_bytes.step_bytes(config, precision, 108, 3)
    late, start = scaling.decode_point(config, precision, 1023, 1, 1023, 16)
    assert start == 1008
    assert late.moved == bench_bytes.step_bytes(config, precision, 1008 + 8.5, 1)


def test_quantised_bytes() -> None:
    """By hand, with groups that the end of a row cuts short."""
    config = GPT2Config(
        n_layer=1, n_embd=96, n_head=1, n_ctx=8, vocab_size=10, n_inner=6, eos_token_id=None
    )
    # (inputs, outputs): head, c_attn, c_proj, c_fc, mlp.c_proj
    sizes = [(96, 10), (96, 288), (96, 96), (96, 6), (6, 96)]
    vectors = 4 * 96 + 288 + 96 + 6 + 96 + 2 * 96
    scales8 = {96: 2, 6: 1}
    int8 = sum(outputs * (inputs + 2 * scales8[inputs]) for inputs, outputs in sizes)
    assert traffic.weight_bytes(config, "int8") == int8 + 4 * vectors
    scales4 = {96: 3, 6: 1}
    int4 = sum(outputs * (inputs / 2 + 2 * scales4[inputs]) for inputs, outputs in sizes)
    assert traffic.weight_bytes(config, "int4") == int4 + 4 * vectors
    assert traffic.cache_bytes(config, "int8", 5) == 2 * 96 * 2 * 5
    assert (
        traffic.weight_bytes(config, "int8", 0.5) == sum(a * b / 2 for a, b in sizes) + 4 * vectors
    )


def test_operations_of_a_prompt() -> None:
    """Counted one product and one attended position after the other."""
    config = GPT2Config(
        n_layer=3, n_embd=8, n_head=2, n_ctx=32, vocab_size=11, n_inner=20, eos_token_id=None
    )
    for tokens in (1, 2, 7):
        count = 2 * 8 * 11
        for layer in range(3):
            for token in range(tokens):
                count += 2 * 8 * 16  # key and value
                if layer < 2 or token == tokens - 1:
                    count += 2 * 8 * (8 + 8 + 20 + 20)  # query, attention's output, MLP
                    count += (token + 1) * 2 * (8 + 8)  # scores, and sums of values
        assert traffic.prefill_flops(config, tokens) == count


def test_arithmetic_is_measured_or_explained(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Rates of what this processor has; without a compiler, why there are none."""
    limits = peaks.measure(1, 1, 0.005)
    if limits.note:
        assert not limits.gops
    else:
        assert set(limits.gops) == set(limits.gops_one)
        assert all(0.1 < rate < 1e5 for rate in limits.gops.values())
        assert limits.arithmetic("fp32")
    assert peaks.as_text(limits).startswith("read ")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no C++ compiler" in peaks.measure(1, 1, 0.005).note
    monkeypatch.setenv("CXX", "false")
    assert peaks.build(tmp_path / "peaks").startswith(
        ("false could not compile peaks.cc", "peaks.cc is for x86-64")
    )


def test_pictures(tmp_path: Path) -> None:
    """Lines and a roofline are files that begin as PNG does."""
    reason = plots.missing()
    if reason:
        pytest.skip(reason)
    series = {"ours": [(1, 10.0, 9.0, 11.0), (8, 40.0, 39.0, 41.0)]}
    limit = [(1, 12.0), (8, 50.0)]
    made = [
        plots.lines(tmp_path / "a.png", "t", "x", "y", series, limit=limit, log_x=True),
        plots.roofline(tmp_path / "b.png", "t", 30.0, {"fp32": 200.0}, {"ours": [(0.5, 12.0)]}),
        plots.roofline(tmp_path / "c.png", "t", 30.0, {}, {"ours": [(0.5, 12.0)]}),
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in made)


def test_bad_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each is named."""
    for wrong, named in (
        (["--contexts", "1024"], "--contexts"),
        (["--batches", "0"], "--batches"),
        (["--steps", "0"], "--steps"),
        (["--layers", "13"], "--layers"),
        (["--precision", "fp31"], "--precision"),
    ):
        with pytest.raises(SystemExit):
            scaling.parse([*wrong, "--out", str(tmp_path)])
        assert named in capsys.readouterr().err
