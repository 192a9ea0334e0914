"""`gpt2-fast bench`: everything but the device itself."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from gpt2_fast import _C, PUBLISHED, GPT2Config, bench_ops, bench_torch
from gpt2_fast.bench import Bench, agree, decode, measure
from gpt2_fast.bench_bytes import stage_bytes, step_bytes
from gpt2_fast.bench_engine import EngineRunner
from gpt2_fast.bench_report import as_markdown, stage_table, stages_of
from gpt2_fast.cli import OK, USAGE, main
from gpt2_fast.device import PRECISIONS, Device
from gpt2_fast.errors import DeviceError, ParameterError
from tests.model_support import SpreadSource, write_folder

if TYPE_CHECKING:
    from pathlib import Path

    from gpt2_fast.bench_engine import Row

SMALL = GPT2Config(n_layer=2, n_embd=64, n_head=4, n_ctx=40, vocab_size=300, eos_token_id=0)
CPU = torch.device("cpu")


class FakeRunner:
    """Takes a known time for each step, on a clock of its own."""

    time = 0.0

    def __init__(self, name: str, seconds: float, precision: str = "bf16") -> None:
        self.name, self.precision, self.seconds = name, precision, seconds
        self.calls: list[Any] = []
        self.fails_at = 0

    def begin(self, batch: int, position: int) -> None:
        assert not self.calls or self.calls[-1][0] == "end"
        self.calls.append(("begin", batch, position))

    def steps(self, count: int) -> None:
        if self.fails_at and self.calls[-1][2] >= self.fails_at:
            raise RuntimeError("no room\nfor more")
        FakeRunner.time += self.seconds * count
        self.calls.append(("steps", count))

    def end(self) -> None:
        self.calls.append(("end",))

    def logits(self, tokens: list[int]) -> Row:
        return np.arange(len(tokens)) * (1.0 if self.name != "other" else -1.0)

    def close(self) -> None:
        pass


def run(runners: list[FakeRunner], bench: Bench) -> tuple[list[dict[str, Any]], dict[str, str]]:
    left_out: dict[str, str] = {}
    found = decode(runners, SMALL, bench, left_out, clock=lambda: FakeRunner.time)  # type: ignore[arg-type]
    return found, left_out


def test_rates_are_those_of_the_clock() -> None:
    ours, theirs = FakeRunner("gpt2_fast", 0.001), FakeRunner("torch", 0.004)
    found, left_out = run([ours, theirs], Bench(batches=(1, 8), positions=(1, 20), steps=4))
    assert left_out == {}
    assert len(found) == 2 * 2 * 2
    for entry in found:
        seconds = {"gpt2_fast": 0.001, "torch": 0.004}[entry["runner"]]
        assert entry["tokens_per_s"]["median"] == pytest.approx(entry["batch"] / seconds)
        assert entry["step_us"]["max"] == pytest.approx(seconds * 1e6)
        assert entry["gbps"]["min"] == pytest.approx(entry["bytes"] / seconds / 1e9)
    assert found[0]["first_is_faster_by"] is None
    assert found[1]["first_is_faster_by"]["median"] == pytest.approx(4)
    assert found[0]["bytes"] == step_bytes(SMALL, "bf16", 1 + 2.5, 1)


def test_runners_take_turns_and_the_first_turn_does_not_count() -> None:
    ours = FakeRunner("gpt2_fast", 0.001)
    theirs = FakeRunner("torch", 0.004)
    run([ours, theirs], Bench(batches=(2,), positions=(7,), steps=3, rounds=4))
    assert ours.calls == [("begin", 2, 7), ("steps", 3), ("end",)] * 5
    assert theirs.calls == ours.calls


def test_positions_end_with_the_context() -> None:
    ours = FakeRunner("gpt2_fast", 0.001)
    run([ours], Bench(batches=(1,), positions=(1, 30, 39, 1023), steps=16, rounds=1))
    starts = [call[2] for call in ours.calls if call[0] == "begin"]
    assert starts == [1, 1, 24, 24, 24, 24]  # 24 + 16 tokens fill the 40 positions
    tiny = replace(SMALL, n_ctx=2)
    assert decode([ours], tiny, Bench(steps=16, rounds=1), {})[0]["position"] == 1


def test_a_rival_that_fails_is_left_out_and_ours_is_not() -> None:
    ours, theirs = FakeRunner("gpt2_fast", 0.001), FakeRunner("torch", 0.004)
    theirs.fails_at = 20
    found, left_out = run([ours, theirs], Bench(batches=(1,), positions=(1, 20, 22), steps=4))
    assert left_out == {"torch, bf16": "RuntimeError: no room"}
    assert [entry["runner"] for entry in found] == ["gpt2_fast", "torch", "gpt2_fast", "gpt2_fast"]
    assert theirs.calls[-1] == ("end",)
    ours.fails_at = 1
    with pytest.raises(RuntimeError, match="no room"):
        run([ours], Bench())


def test_another_model_is_refused() -> None:
    same, other = FakeRunner("same", 1), FakeRunner("other", 1)
    assert agree([same, same], SMALL) == {"same, bf16": 0.0}  # type: ignore[list-item]
    with pytest.raises(DeviceError, match="other, bf16 computes something else than same, bf16"):
        agree([same, other], SMALL)  # type: ignore[list-item]


NAMES = [
    "embed_kernel<Bf16>",
    "product_kernel<1, 1, QkvEpilogue>",
    "attention_decode_kernel<Bf16, 64>",
    "product_kernel<1, 1, ResidualEpilogue>",
    "product_kernel<1, 1, GeluEpilogue>",
    "product_kernel<1, 1, ResidualEpilogue>",
    "gemm_kernel<Tile, QkvEpilogue>",
    "attention_prefill_kernel<Bf16, 64>",
    "gemm_kernel<Tile, ResidualEpilogue>",
    "gemm_kernel<Tile, GeluEpilogue>",
    "gemm_kernel<Tile, ResidualEpilogue>",
    "head_kernel<1, 1, true>",
    "parts_kernel",
    "at::native::something",
]
STAGES = ["ln_qkv", "attention", "attn_proj", "ln_fc_gelu", "mlp_proj"]


def test_kernels_are_told_apart() -> None:
    kernels = [(name, 10.0 * i, 10.0 * i + 8) for i, name in enumerate(NAMES)]
    found = stages_of(reversed(kernels))
    assert [s for s, _, _ in found] == ["embed", *STAGES, *STAGES, "ln_head", "sample", "other"]
    assert [own for _, own, _ in found] == [8.0] * len(NAMES)
    assert [since for _, _, since in found] == [8.0] + [10.0] * (len(NAMES) - 1)


def test_time_from_the_end_of_the_kernel_before_adds_up_where_they_overlap() -> None:
    kernels = [("QkvEpilogue", 0.0, 10.0), ("attention_", 4.0, 12.0), ("ResidualE", 5.0, 19.0)]
    assert [since for _, _, since in stages_of(kernels)] == [10.0, 2.0, 7.0]


def test_a_table_of_stages() -> None:
    kernels = [("QkvEpilogue", 10.0 * i, 10.0 * i + 5) for i in range(8)]
    (entry,) = stage_table(kernels, SMALL, "fp16", steps=4, positions=9.0, batch=2)
    known = stage_bytes(SMALL, "fp16", 9.0, 2)["ln_qkv"]
    assert entry["per_step"] == 2
    assert entry["own_us"] == 5
    assert entry["since_last_us"] == 10
    assert entry["step_us"] == (5 + 7 * 10) / 4
    assert entry["gbps"] == pytest.approx(known / 10e-6 / 1e9)


@pytest.mark.parametrize("config", PUBLISHED.values(), ids=PUBLISHED)
def test_bytes_of_a_step(config: GPT2Config) -> None:
    """What physics asks for: matrices and cache in their type, vectors in float32."""
    cached = 2 * config.n_layer * config.n_embd * 2 * 7 * 512
    for precision, bits in (("bf16", 16), ("int8", 8.25), ("int4", 4.5)):
        stages = stage_bytes(config, precision, 1, 1)
        vectors = 4 * (3 * config.n_embd) + 8 * config.n_embd
        assert stages["ln_qkv"] - vectors == 3 * config.n_embd**2 * bits / 8
        one, eight = (step_bytes(config, precision, 512, batch) for batch in (1, 8))
        assert eight - one == cached


@pytest.mark.parametrize("name", ["torch eager", "torch SDPA", "transformers"])
def test_rivals_compute_the_same_model(name: str) -> None:
    ours = EngineRunner(SMALL, "fp32", Device("cpu"), threads=1, max_batch=2)
    make = dict(bench_torch.rivals(SMALL, "fp32", CPU, 2))[name]
    rival = make()
    assert agree([ours, rival], SMALL)[f"{name}, fp32"] < 1e-5
    for runner in (ours, rival):  # in a batch too, and again
        for batch, start in ((2, 3), (1, 35), (2, 35)):
            runner.begin(batch, start)
            runner.steps(4)
            runner.end()
    assert np.abs(rival.logits([1, 2, 3]) - ours.logits([1, 2, 3])).max() < 1e-5
    rival.close()
    ours.close()
    with pytest.raises(RuntimeError, match="closed"):
        ours.logits([1])


def test_attention_under_a_mask_computes_the_same_model() -> None:
    """What torch.compile gets, here not compiled."""
    weights = bench_torch.state(SMALL, torch.float32, CPU)
    rows = []
    for whole in (False, True):
        runner = bench_torch.TorchRunner("torch SDPA", SMALL, "fp32", weights, 1)
        runner._compiled = whole
        runner._step = bench_torch.TorchModel(SMALL, weights, 1, fused=True, whole=whole)
        rows.append(runner.logits([5, 6, 7, 8]))
    np.testing.assert_allclose(rows[0], rows[1], atol=1e-5)


def test_every_op_passes_its_check() -> None:
    found = bench_ops.check_all(SMALL, CPU, ["bf16"])
    assert all(entry["passed"] for entry in found), found
    ops = {"layernorm", "add_layernorm", "gelu", "linear", "embed", "sample"}
    assert {entry["op"] for entry in found} == ops | {"attention_decode", "attention_prefill"}


def test_a_wrong_op_fails_its_check(monkeypatch: pytest.MonkeyPatch) -> None:
    right = bench_ops.ops.gelu
    for wrong in (lambda x: right(x) * 1.1, lambda x: right(x).float(), lambda x: right(x) / 0 * 0):
        monkeypatch.setattr(bench_ops.ops, "gelu", wrong)
        found = bench_ops.check_all(SMALL, CPU, ["bf16"])
        assert {entry["op"] for entry in found if not entry["passed"]} == {"gelu"}


def test_ops_are_timed_by_the_kernels_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_ops, "COLD_BYTES", 1 << 16)

    def kernels_of(function: Any) -> list[tuple[str, float, float]]:
        assert len(function()) == bench_ops.CALLS
        return [("b", 200.0, 280.0), ("a", 0.0, 100.0), ("c", 240.0, 300.0), ("d", 250.0, 260.0)]

    found = bench_ops.time_ops(SMALL, CPU, "bf16", kernels_of)
    assert {entry["gpt2_fast_us"] for entry in found} == {200 / bench_ops.CALLS}
    assert all(entry["bytes"] > 0 for entry in found)
    fc = next(entry for entry in found if entry["shape"] == "decode, fc")
    assert fc["bytes"] == 2 * (64 + 64 * 256 + 256) + 4 * 256


def small_bench(tmp_path: Path, **changes: Any) -> Bench:
    folder = write_folder(tmp_path / "model", SpreadSource(SMALL))
    how = {"device": "cpu", "batches": (1, 2), "positions": (1, 30), "steps": 2, "rounds": 2}
    return Bench(model=str(folder), **{**how, **changes})


def test_the_whole_of_it_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_C, "read_bandwidth", lambda *_: 1e10)
    result = measure(small_bench(tmp_path))
    assert len(result["decode"]) == 2 * 2 * len(PRECISIONS["cpu"])
    assert result["copy_gbps"] == 10
    assert json.loads(json.dumps(result))["case"]["config"]["n_embd"] == 64
    text = as_markdown(result)
    assert text.count("| gpt2_fast |") == 16
    assert "Left out" in text


def test_every_part_of_the_report_is_written() -> None:
    entry = {"op": "gelu", "shape": "decode", "precision": "bf16"}
    kernels = [(name, 10.0 * i, 10.0 * i + 8) for i, name in enumerate(NAMES)]
    table = stage_table(kernels, SMALL, "bf16", steps=1, positions=9.0, batch=1)
    found, _ = run([FakeRunner("gpt2_fast", 0.001)], Bench(batches=(1,), rounds=1))
    text = as_markdown(
        {
            "device": "a device",
            "software": "versions",
            "bandwidth_of": "copies",
            "copy_gbps": 3000.0,
            "case": {"model": "124M", "rounds": 1, "steps": 16},
            "decode": found,
            "stages": [{"precision": "bf16", "batch": 1, "position": 9, "table": table}],
            "ops": [entry | {"gpt2_fast_us": 2.0, "bytes": 4000}],
            "checks": [entry | {"passed": False, "error": 1.0, "bound": 0.5}],
            "left_out": {"transformers": "not installed"},
        }
    )
    assert "| gelu | decode | bf16 | 2.00 |  | 2 |" in text
    assert "| gelu | decode | bf16 | FAILED | 1.0e+00 | 5.0e-01 |" in text
    assert "- transformers: not installed" in text
    assert "| mlp_proj | 2 | 8.00 | 10.00 | 20.0 |" in text


def test_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_C, "read_bandwidth", lambda *_: 1e10)
    folder = write_folder(tmp_path / "model", SpreadSource(SMALL))
    words = ["bench", "-m", str(folder), "--device", "cpu", "--precision", "fp32,bf16", "--batch"]
    words += ["2", "--position", "1,9", "--steps", "2", "--rounds", "1", "--out", str(tmp_path)]
    assert main(words) == OK
    shown = capsys.readouterr().out
    assert (tmp_path / "bench.md").read_text() == shown
    assert main([*words, "--json"]) == OK
    written = json.loads((tmp_path / "bench.json").read_text())
    assert json.loads(capsys.readouterr().out).keys() == written.keys()
    assert [entry["position"] for entry in written["decode"]] == [1, 1, 9, 9]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "0"], "steps must be at least 1, got 0"),
        (["--batch", "0,1"], "batches must be at least 1 each"),
        (["--batch", "x"], "invalid _numbers value: 'x'"),
        (["--device", "cpu", "--precision", "int3"], "precision must be one of"),
        (["--device", "tpu"], "device must be one of auto, cpu, cuda"),
    ],
)
def test_wrong_words(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *words]) == USAGE
    assert message in capsys.readouterr().err


def test_measurements_of_nothing_are_refused() -> None:
    with pytest.raises(ParameterError, match="rounds must be at least 1, got 0"):
        Bench(rounds=0)
    with pytest.raises(ParameterError, match="positions must be at least 1 each"):
        Bench(positions=())
