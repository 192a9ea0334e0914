"""The turns, and the whole comparison with engines whose times are made up, so sums are known."""

from __future__ import annotations

import json
import signal
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from benchmarks import agreement, peaks, peers, plots, roofline, turns, worker
from benchmarks.peers import __main__ as whole
from benchmarks.peers import run
from benchmarks.peers.cases import Case, cases, common_share, figures
from benchmarks.peers.contract import Format, Job, Prompts, Run, Shape
from benchmarks.turns import EngineError, Result
from gpt2_fast import PUBLISHED, GPT2Config

if TYPE_CHECKING:
    from typing_extensions import Self

CONFIG = replace(PUBLISHED["124M"], n_layer=1)


class Fake:
    """An engine that reads a token in 1 ms and draws one in `step` seconds; never waits.

    `log` has every run of every engine. A "slow" setting takes ten times as long.
    """

    log: list[tuple[str, str, int]] = []  # noqa: RUF012

    def __init__(self, name: str, step: float, tokens: int = 7, wrong: str = "") -> None:
        self.name, self.step, self.token, self.wrong = name, step, tokens, wrong
        self.settings = ["slow", "quick"]
        self.setting = ""

    def use(self, setting: str) -> None:
        """Take the setting."""
        self.setting = setting

    def generate(self, prompts: Prompts, new: int) -> Run:
        """Made-up times and tokens."""
        if self.wrong == "fails":
            raise OSError("out of paper")
        self.log.append((self.name, self.setting, new))
        factor = 10 if self.setting == "slow" else 1
        first = factor * 1e-3 * len(prompts[0])
        token = self.token + (len(self.log) if self.wrong == "changes" else 0)
        count = new - (self.wrong == "short")
        return Run([[token] * count] * len(prompts), first, first + factor * self.step * (new - 1))

    def logits(self, tokens: list[int]) -> list[float]:
        """One token is the likeliest."""
        del tokens
        row = np.zeros(16)
        row[self.token] = 1
        return row.tolist()


class FakeWorker:
    """A `turns.Worker` without a process."""

    def __init__(self, engine: str, job: Job | None = None, fake: Fake | None = None) -> None:
        self.engine, self.host = engine, worker.Host()
        self.host.engine = fake
        self.job = job

    def ask(self, **command: Any) -> dict[str, Any]:
        """As the process would answer."""
        try:
            return self.host.answer(command)
        except OSError as error:
            raise EngineError(f"{self.engine}: {error}") from None

    def cpu_seconds(self) -> float:
        """None."""
        return 0.0

    def close(self) -> None:
        """Nothing to end."""

    def __enter__(self) -> Self:
        """The worker."""
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing to end."""


@pytest.fixture(autouse=True)
def _still(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 10 GB/s and 100 GFLOP/s, where nobody pauses."""
    Fake.log.clear()
    limits = peaks.Limits(2, 10.0, {"fp32 x": 100.0, "int8 x": 400.0})
    monkeypatch.setattr(roofline, "peak_gbps", lambda *_: 10.0)
    monkeypatch.setattr(peaks, "measure", lambda *_: replace(limits))
    monkeypatch.setattr(turns, "PAUSE_SECONDS", 0)


def workers(*fakes: Fake) -> Any:
    """One worker each."""
    return [FakeWorker(fake.name, fake=fake) for fake in fakes]


def test_engines_take_turns() -> None:
    """After tuning A B A B, each with its best setting."""
    both = workers(Fake("A", 0.01), Fake("B", 0.02))
    results, read = turns.play(both, [[1, 2]], 5, 3, 1, 2)
    assert read == [10.0] * 3
    assert [entry[:2] for entry in Fake.log[-6:]] == [("A", "quick"), ("B", "quick")] * 3
    assert [result.setting for result in results] == ["quick", "quick"]
    assert results[0].decode == pytest.approx([100.0] * 3)
    assert results[1].decode == pytest.approx([50.0] * 3)
    assert results[0].prompt == pytest.approx([1000.0] * 3)


def test_a_hopeless_setting_is_tried_once() -> None:
    """After a setting ten times as fast; before it, it cannot be known."""
    fake = Fake("A", 0.01)
    fake.settings = ["quick", "slow"]
    (only,) = workers(fake)
    assert turns.tune(only, [[1]], 5).setting == "quick"
    assert [setting for _, setting, _ in Fake.log] == ["quick", "quick", "slow"]


def test_a_prompt_is_judged_by_its_own_speed() -> None:
    """With one new token there is nothing to decode, and no division by zero."""
    (only,) = workers(Fake("A", 0.01))
    result = turns.tune(only, [[1] * 8], 1)
    assert (result.setting, result.prompt_setting) == ("quick", "quick")
    assert result.tuning["quick"] == (0.0, pytest.approx(1000.0))


def test_failing_engines_leave() -> None:
    """The others go on; without a place for reasons, it is an error."""
    failed: dict[str, str] = {}
    fakes = [Fake("A", 0.01), Fake("B", 0.01, wrong="fails"), Fake("C", 0.01, wrong="short")]
    results, _ = turns.play(workers(*fakes), [[1]], 3, 2, 1, 2, failed)
    assert [result.engine for result in results] == ["A"]
    assert failed["B"] == "B: out of paper"
    assert "wanted 3 tokens" in failed["C"]
    with pytest.raises(EngineError, match="out of paper"):
        turns.play(workers(*fakes), [[1]], 3, 2, 1, 2)


def test_nobody_waits_for_ever(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An engine that does not answer is killed, and the error says so."""
    monkeypatch.setattr(turns, "PATIENCE_SECONDS", 0.2)
    job = Job(Shape.of(CONFIG), "fp32", 1, 1, tmp_path)
    with turns.Worker("sleepy", job) as sleepy:
        sleepy.process.send_signal(signal.SIGSTOP)
        with pytest.raises(EngineError, match=r"sleepy: took longer than 0\.2 s, given up"):
            sleepy.ask(do="generate", prompts=[[1]], new=1)
        with pytest.raises(EngineError, match="its process ended"):
            sleepy.ask(do="settings")


def test_changing_tokens() -> None:
    """Noted of a rival; of ours it is an error."""
    (result,), _ = turns.play(workers(Fake("A", 0.01, wrong="changes")), [[1]], 3, 2, 1, 2)
    assert not result.repeatable
    with pytest.raises(EngineError, match="other tokens in another round"):
        turns.play(workers(Fake(peers.OURS, 0.01, wrong="changes")), [[1]], 3, 2, 1, 2)


def test_cases() -> None:
    """A context at its end gets fewer tokens; one without room is refused."""
    made = cases([32, 1000], [1023], [8], 64, 1024)
    wanted = [Case(32, 64), Case(1000, 25), Case(1023, 1), Case(32, 64, 8)]
    assert made == wanted
    assert [case.name for case in made][2:] == ["prompt of 1023", "decode, context 32, batch 8"]
    for wrong in (([1024], [], []), ([], [1025], [])):
        with pytest.raises(ValueError, match="leaves no room in 1024 positions"):
            cases(*wrong, 64, 1024)


def test_figures() -> None:
    """Bytes by hand: 10 ms a step, at 10 GB/s."""
    result = Result(peers.OURS, "quick", "quick", {}, decode=[100.0], prompt=[1.0], others=[0.0])
    limits = peaks.Limits(2, 10.0, {"fp32 x": 100.0})
    one = figures(CONFIG, Case(32, 65), "fp32", result, limits, [10.0])
    matrices = 768 * (50257 + 12 * 768)
    vectors = 4 * 768 + (3 * 768 + 768 + 4 * 768 + 768) + 2 * 768
    cache = 2 * 768 * 4 * (32 + 32.5)
    assert one["bytes"] == 4 * (matrices + vectors) + cache
    assert one["gbps"]["median"] == pytest.approx(one["bytes"] / 0.01 / 1e9)
    assert one["of_bandwidth"]["median"] == pytest.approx(one["bytes"] / 1e8)
    operations = 2 * matrices + 4 * 768 * (32 + 32.5)
    assert one["operations"] == operations
    assert one["of_arithmetic"]["median"] == pytest.approx(operations / 1e9)
    assert one["of_limit"] == pytest.approx(one["of_bandwidth"])  # the longer of the two
    rival = figures(
        CONFIG, Case(32, 65), "int8", replace(result, engine="torch_int8"), limits, [10]
    )
    assert rival["bytes"] == matrices + 4 * vectors + cache
    assert rival["of_arithmetic"] is None  # no int8 arithmetic was measured


def test_common_tokens() -> None:
    """Counted up to each text's first difference."""
    assert common_share([[1, 2, 3], [4, 5, 6]], [[1, 9, 3], [4, 5, 6]]) == 4 / 6


def _register(monkeypatch: pytest.MonkeyPatch, name: str, fake: Fake, reason: str = "") -> None:
    module: Any = ModuleType(f"benchmarks.peers.fake_{name}")
    module.LABEL, module.PACKAGES = f"Fake {name}", ("numpy",)
    module.PRECISIONS = {"fp32": Format("made up", 4, 4)}
    module.Engine = lambda _: fake
    module.missing = lambda _: reason or None
    module.prepare = lambda _: None
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(peers.MODULES, name, f"fake_{name}")


@pytest.fixture
def _fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours and three rivals: one half as fast, one that fails, one that is not installed."""
    _register(monkeypatch, peers.OURS, Fake(peers.OURS, 0.01))
    _register(monkeypatch, "half", Fake("half", 0.02))
    _register(monkeypatch, "broken", Fake("broken", 0.02, wrong="fails"))
    _register(monkeypatch, "absent", Fake("absent", 0.02), "not installed: it")

    def loaded(engine: str, job: Job) -> Any:
        made = FakeWorker(engine, job)
        made.ask(do="load", engine=engine, job=job.as_json())
        return made

    begun = {"first_token_s": 0.5, "load_s": 0.25, "rss_short": 1e8, "rss_full": 2e8}
    monkeypatch.setattr(run, "loaded", loaded)
    monkeypatch.setattr(run, "prepare", lambda *_: None)
    monkeypatch.setattr(run, "common_weights", lambda *_: None)
    monkeypatch.setattr(run, "start", lambda *_: begun)
    row = np.zeros(16)
    row[7] = 1
    monkeypatch.setattr(agreement, "true_logits", lambda *_: row)


def _whole(monkeypatch: pytest.MonkeyPatch, out: Path) -> tuple[int, dict[str, Any], str]:
    monkeypatch.setattr(plots, "missing", lambda: "no plots today")
    rivals = [name for name in peers.MODULES if name in {"half", "broken", "absent", "liar"}]
    sizes = ["--contexts", "32", "--prompts", "512", "--batches", "8", "--rounds", "3"]
    status = whole.main(
        ["--precision", "fp32", *sizes, "--rivals", *rivals, "--out", str(out), "--work", str(out)]
    )
    return status, json.loads((out / "peers.json").read_text()), (out / "peers.md").read_text()


@pytest.mark.usefixtures("_fakes")
def test_the_whole_comparison(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files, ratios, reasons; what is drawn is tested in test_scaling.py."""
    status, result, table = _whole(monkeypatch, tmp_path)
    assert status == 0
    assert capsys.readouterr().out == table
    (one,) = result["precisions"]
    assert one["left_out"] == {"absent": "not installed: it"}
    assert [case["name"] for case in one["cases"]] == [
        "decode, context 32",
        "prompt of 512",
        "decode, context 32, batch 8",
    ]
    for case in one["cases"]:
        mine, half = case["engines"]
        assert case["failed"] == {"broken": "broken: out of paper"}
        wanted = 1 if case["new"] == 1 else 2
        assert half["ours_is_faster_by"]["median"] == pytest.approx(wanted)
        assert mine["ours_is_faster_by"] is None
        assert half["agreement"] == f"the same {case['new'] * case['batch']} tokens"
        assert half["same_tokens"] == 1
    assert one["logit_errors"] == {peers.OURS: 0, "half": 0}
    assert one["starts"]["half"]["first_token_s"]["median"] == 0.5
    for text in ("Fake half", "2.00 (2.00-2.00)x", "absent: not installed: it", "no plots today"):
        assert text in table


@pytest.mark.usefixtures("_fakes")
def test_a_wrong_token_fails_the_comparison(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rival with another token although float64 has no doubt: exit code 1, and it is named."""
    liar = Fake("liar", 0.01, tokens=3)
    liar.logits = lambda _: Fake("", 0).logits([])  # type: ignore[method-assign]
    _register(monkeypatch, "liar", liar)
    status, _, table = _whole(monkeypatch, tmp_path)
    assert status == 1
    assert "Fake liar DISAGREES" in table
    assert "Fake liar, decode, context 32: " in capsys.readouterr().err


def test_a_real_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ours in processes of its own, cold start and memory included."""
    small = GPT2Config(
        n_layer=2, n_embd=256, n_head=4, n_ctx=64, vocab_size=4096, eos_token_id=None
    )
    monkeypatch.setattr(whole, "PUBLISHED", {"124M": small})
    sizes = ["--contexts", "5", "--prompts", "9", "--batches", "2", "--new", "4", "--rounds", "1"]
    wanted = ["--layers", "1", "--precision", "bf16", "--rivals", "--mib", "1", "--threads", "1"]
    assert whole.main([*wanted, *sizes, "--out", str(tmp_path)]) == 0
    (one,) = json.loads((tmp_path / "peers.json").read_text())["precisions"]
    assert [len(case["engines"]) for case in one["cases"]] == [1, 1, 1]
    assert one["logit_errors"][peers.OURS] < 0.02
    begun = one["starts"][peers.OURS]
    assert 0 < begun["load_s"]["median"] < begun["first_token_s"]["median"]
    assert 2e6 < begun["rss_short"]["median"] <= begun["rss_full"]["median"]


def test_bad_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each is named."""
    for wrong, named in (
        (["--rounds", "0"], "--rounds"),
        (["--contexts", "1024"], "leaves no room"),
        (["--batches", "0"], "--batches"),
        (["--layers", "13"], "--layers"),
        (["--new", "1"], "--new"),
        (["--rivals", "gpt3"], "--rivals"),
    ):
        with pytest.raises(SystemExit):
            whole.parse([*wrong, "--out", str(tmp_path)])
        assert named in capsys.readouterr().err


def test_limits_travel() -> None:
    """The JSON has every figure of the limits."""
    limits = peaks.Limits(2, 10.0, {"bf16 x": 50.0, "fp32 x": 40.0}, note="")
    assert limits.as_json() == asdict(limits)
    assert limits.arithmetic("bf16") == 50e9
    assert limits.arithmetic("int4") is None
    assert limits.seconds("fp32", 1e9, 8e9) == 0.2
    assert limits.seconds("int4", 1e9, 8e9) == 0.1
