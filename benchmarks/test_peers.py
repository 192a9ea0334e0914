"""Every engine that is installed, on a model small enough to convert in a second."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from benchmarks import agreement, peers
from benchmarks.peers import contract
from benchmarks.peers.contract import Job, Shape
from benchmarks.turns import ROOT, Worker, loaded, prepare, random_prompts
from gpt2_fast import GPT2Config

SMALL = GPT2Config(n_layer=2, n_embd=64, n_head=2, n_ctx=64, vocab_size=512, eos_token_id=None)
#: Of logits, root mean square against float64, in units of theirs: what a precision may cost. A
#: matrix that is transposed or in the wrong place costs more than 1. llama.cpp looks its GELU up in
#: a table of float16.
ERROR = {"fp32": 2e-5, "bf16": 0.03, "int8": 0.2, "int4": 0.6}
ERROR_OF = {("llama_cpp", "fp32"): 2e-3}
#: Compiling takes half a minute; transformers takes seconds to import, and test_compare.py runs it.
SLOW = {"transformers", "transformers_compiled"}
PAIRS = [
    pytest.param(name, precision, marks=[pytest.mark.slow] * (name in SLOW))
    for name in peers.MODULES
    for precision in peers.find(name).PRECISIONS
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The common weights, and what the engines make of them."""
    made = tmp_path_factory.mktemp("peers")
    contract.common_weights(SMALL, made)
    return made


@contextmanager
def running(name: str, precision: str, folder: Path) -> Iterator[Worker]:
    """An engine with its first setting, or a skipped test."""
    reason = peers.missing(name, precision)
    if reason:
        pytest.skip(f"{name}: {reason}")
    job = Job(Shape.of(SMALL), precision, 1, 3, folder)
    prepare(name, job)
    with loaded(name, job) as worker:
        yield worker


def logits(worker: Worker) -> agreement.Logits:
    """Of the engine in that process."""
    return lambda tokens: worker.ask(do="logits", tokens=tokens)["logits"]


@pytest.fixture(scope="module")
def ours(folder: Path) -> Iterator[Worker]:
    """Ours in fp32."""
    with running(peers.OURS, "fp32", folder) as worker:
        worker.ask(do="use", setting=worker.ask(do="settings")["settings"][0])
        yield worker


@pytest.mark.parametrize(("name", "precision"), PAIRS)
def test_computes_the_same_model(name: str, precision: str, folder: Path, ours: Worker) -> None:
    """Each setting: logits near float64's, as many tokens as asked, and in fp32 ours.

    Or, of the tokens, float64 says that the choice was closer than the errors.
    """
    prompts = random_prompts(SMALL.vocab_size, 3, 9)
    truth = agreement.true_logits(SMALL, prompts[0])
    mine = ours.ask(do="generate", prompts=prompts, new=12)["tokens"]
    with running(name, precision, folder) as worker:
        for setting in worker.ask(do="settings")["settings"]:
            worker.ask(do="use", setting=setting)
            row = np.asarray(logits(worker)(prompts[0]))
            error = np.sqrt(np.mean((row - truth) ** 2) / np.mean(truth**2))
            assert error < ERROR_OF.get((name, precision), ERROR[precision]), setting
            run = worker.ask(do="generate", prompts=prompts, new=12)
            assert [len(tokens) for tokens in run["tokens"]] == [12] * 3
            assert 0 < run["first"] < run["total"]
            if precision == "fp32":
                both = mine, run["tokens"], logits(ours), logits(worker)
                words = agreement.explain(SMALL, prompts, *both)
                assert "the same 36 tokens" in words or "margin" in words
            # To the last position, and the prompt alone.
            for new in (SMALL.n_ctx - 8, 1):
                one = worker.ask(do="generate", prompts=prompts[:1], new=new)
                assert len(one["tokens"][0]) == new
        with pytest.raises(RuntimeError, match="setting must be one of"):
            worker.ask(do="use", setting="no such setting")


def test_modules_are_complete_and_light() -> None:
    """All have what `Peer` says, and finding them imports none of the libraries."""
    for name in peers.MODULES:
        peer = peers.find(name)
        assert peer.LABEL
        assert peer.PACKAGES
        assert set(peer.PRECISIONS) <= set(peers.PRECISIONS)
        assert all(stored.weight > 0 < stored.cached for stored in peer.PRECISIONS.values())
        assert callable(peer.Engine)
        assert callable(peer.prepare)
    heavy = "{'numpy', 'torch', 'transformers', 'ctranslate2', 'llama_cpp', 'onnxruntime', "
    heavy += "'openvino', 'gpt2_fast', 'importlib.metadata'}"
    code = "import sys; before = set(sys.modules); from benchmarks import peers; "
    code += "[peers.find(n) for n in peers.MODULES]; import benchmarks.peers.start; "
    code += f"sys.exit(str({heavy} & (set(sys.modules) - before) or ''))"
    made = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert made.stderr.strip() == ""


def test_refusals(tmp_path: Path) -> None:
    """Unknown names, precisions that an engine lacks, packages that are not there."""
    with pytest.raises(ValueError, match="engine must be one of gpt2_fast, torch"):
        peers.find("gpt3")
    assert peers.missing("torch_int8", "fp32") == "has no fp32; it has int8"
    reason = contract.absent("json", "no_such_module")
    assert reason == "not installed: no_such_module (pip install '.[peers]')"
    contract.common_weights(SMALL, tmp_path)
    other = GPT2Config(n_layer=1, n_embd=64, n_head=2, n_ctx=64, vocab_size=512, eos_token_id=None)
    with pytest.raises(ValueError, match="holds n_layer 2, wanted 1"):
        contract.common_weights(other, tmp_path)


def test_half_made_files_have_no_name(tmp_path: Path) -> None:
    """A conversion that fails is done again, one that succeeded is not."""
    target, calls = tmp_path / "deep" / "model", []

    def make(path: Path) -> None:
        calls.append(path)
        path.write_text("half")
        if len(calls) == 1:
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        contract.once(target, make)
    assert not target.exists()
    for _ in range(2):
        assert contract.once(target, make).read_text() == "half"
    assert len(calls) == 2


def test_jobs_travel(tmp_path: Path) -> None:
    """A job is the same in the worker's process."""
    job = Job(Shape.of(SMALL), "int8", 2, 8, tmp_path)
    assert Job.from_json(job.as_json()) == job
    assert job.shape.inner_size == 4 * 64
