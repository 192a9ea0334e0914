"""`gpt2-fast doctor`: it finds what is wrong, and its references are right."""

from __future__ import annotations

import json
import types
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from gpt2_fast import (
    _C,
    PUBLISHED,
    GPT2Config,
    cli,
    doctor,
    engine_check,
    kernel_check,
    numpy_reference,
    reference,
)
from gpt2_fast.bench_bytes import step_bytes
from gpt2_fast.bfloat16 import BFloat16Array, round_to_bfloat16
from gpt2_fast.device import PRECISIONS
from gpt2_fast.kernel_check import Case, check_kernels
from gpt2_fast.numpy_reference import TRUTH, Arithmetic

OPS = (
    "layernorm",
    "add_layernorm",
    "gelu",
    "embed",
    "linear",
    "attention_prefill",
    "attention_decode",
    "sample",
)


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return list(kernel_check.all_cases())


def of(cases: list[Case], op: str) -> list[Case]:
    chosen = [case for case in cases if case.op == op]
    assert chosen
    return chosen


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def close(ours: np.ndarray, theirs: torch.Tensor) -> None:
    """Both are float64: they differ by the order of some sums."""
    assert ours.dtype == np.float64
    scale = float(theirs.abs().max())
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=1e-13 * max(scale, 1.0))


# The whole report


def test_every_kernel_passes_here_and_the_report_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "_READ_BYTES", 1 << 22)
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] is True
    done = {(kernel["op"], kernel["precision"], kernel["isa"]) for kernel in report["kernels"]}
    wanted = {(op, "fp32", isa) for op in (*OPS, "whole model") for isa in _C.isas()}
    wanted |= {(op, "bf16", isa) for op, _, isa in wanted if op != "sample"}
    wanted |= {
        ("whole model", precision, isa) for precision in ("int8", "int4") for isa in _C.isas()
    }
    assert done == wanted
    for kernel in report["kernels"]:
        assert 0 < kernel["error"] <= kernel["bound"]
    assert report["read_bandwidth"] > 1e8
    assert len(report["predictions"]) == 16

    doctor.write_report(report)
    out = capsys.readouterr().out
    assert "every kernel passed" in out
    assert out.count("\tpass\t") == 2 * len(OPS) + 3
    assert "FAILED" not in out
    assert "1558M\tbf16\t" in out


def planted(name: str, fault: Callable[..., Any]) -> types.SimpleNamespace:
    """The native module with one op replaced by `fault(original, *arguments)`."""
    original = getattr(_C, name)
    copy = types.SimpleNamespace(**{key: getattr(_C, key) for key in dir(_C)})
    setattr(copy, name, lambda *arguments: fault(original, *arguments))
    return copy


def shift_keys(original: Any, q: Any, k: Any, v: Any, *rest: Any) -> None:
    """The mask is one key short."""
    lengths, scale, out = rest
    original(q, k, v, np.maximum(lengths - 1, 1).astype(np.int32), scale, out)


def bent_gelu(_: Any, x: Any, out: Any) -> None:
    """The other GELU, by the error function."""
    bf16 = isinstance(x, BFloat16Array)
    values = torch.from_numpy(x.float32() if bf16 else x)
    bent = torch.nn.functional.gelu(values).numpy()
    if bf16:
        out.bits[...] = BFloat16Array.rounded(bent).bits
    else:
        out[...] = bent


FAULTS: dict[str, tuple[str, Callable[..., Any]]] = {
    "eps left out": ("layernorm", lambda f, x, w, b, _, out: f(x, w, b, 1e-3, out)),
    "weight and bias swapped": (
        "add_layernorm",
        lambda f, r, d, w, b, eps, out: f(r, d, b, w, eps, out),
    ),
    "erf for tanh": ("gelu", bent_gelu),
    "position off by one": ("embed", lambda f, t, p, *a: f(t, np.maximum(p - 1, 0), *a)),
    "bias left out": ("linear", lambda f, x, w, _, r, g, out: f(x, w, None, r, g, out)),
    "scale of another width": (
        "attention_prefill",
        lambda f, q, k, v, s, out: f(q, k, v, s * 1.01, out),
    ),
    "a key left out": ("attention_decode", shift_keys),
    "temperature left out": ("sample", lambda f, *a: f(a[0], np.ones_like(a[1]), *a[2:])),
    "top_k left out": ("sample", lambda f, *a: f(*a[:2], np.zeros_like(a[2]), *a[3:])),
    "top_p left out": ("sample", lambda f, *a: f(*a[:3], np.ones_like(a[3]), *a[4:])),
    "min_p left out": ("sample", lambda f, *a: f(*a[:4], np.zeros_like(a[4]), *a[5:])),
    "the other top_p": ("sample", lambda f, *a: f(*a[:5], not a[5], *a[6:])),
    "another seed": ("sample", lambda f, *a: f(*a[:6], a[6] + 1, *a[7:])),
    "another sample": ("sample", lambda f, *a: f(*a[:7], a[7] + 1, *a[8:])),
    "another position": ("sample", lambda f, *a: f(*a[:8], a[8] + 1, *a[9:])),
}  # fmt: skip


@pytest.mark.parametrize(("op", "fault"), FAULTS.values(), ids=FAULTS.keys())
def test_planted_faults_are_found(
    op: str, fault: Callable[..., Any], cases: list[Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_check, "_C", planted(op, fault))
    found = check_kernels(of(cases, op))
    # In bf16 a wrong eps or a scale 1 % off is less than the rounding of the inputs.
    assert all(not finding.within for finding in found if finding.precision == "fp32")
    assert len(found) >= len(_C.isas())


def test_a_wrong_last_layer_of_the_engine_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    load = engine_check._builtin

    def bent() -> tuple[GPT2Config, dict[str, np.ndarray]]:
        config, stored = load()
        return replace(config, layer_norm_epsilon=1e-3), stored

    whole = [case for case in engine_check.engine_cases() if case.precision == "fp32"]
    monkeypatch.setattr(engine_check, "_builtin", bent)
    other = [case for case in engine_check.engine_cases() if case.precision == "fp32"]
    mixed = replace(whole[0], run=other[0].run)
    assert not any(finding.within for finding in check_kernels([mixed]))


def spoilt(case: Case, spoil: Callable[[str, int, list[np.ndarray]], None]) -> Case:
    def run(isa: str, threads: int) -> list[np.ndarray]:
        out = case.run(isa, threads)
        spoil(isa, threads, out)
        return out

    return replace(case, run=run)


def test_one_bit_on_one_instruction_set_is_found(cases: list[Case]) -> None:
    last = _C.isas()[-1]

    def flip(isa: str, threads: int, out: list[np.ndarray]) -> None:
        if isa == last and threads == _C.available_threads():
            out[0].view(np.uint32).reshape(-1)[3] ^= 1

    found = check_kernels([spoilt(of(cases, "linear")[0], flip)])
    if len(_C.isas()) == 1 and _C.available_threads() == 1:
        pytest.skip("one instruction set and one thread: nothing to compare")
    assert [finding.isa for finding in found if not finding.same_bits] == [last]
    assert all(finding.within for finding in found)
    assert not all(finding.passed for finding in found)


def test_nan_is_a_failure_and_shown(
    cases: list[Case], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def poison(isa: str, threads: int, out: list[np.ndarray]) -> None:
        out[0].reshape(-1)[0] = np.nan

    monkeypatch.setattr(doctor, "_READ_BYTES", 1 << 20)
    broken = [spoilt(case, poison) for case in of(cases, "gelu")]
    monkeypatch.setattr(kernel_check, "all_cases", lambda: iter(broken))

    assert cli.main(["doctor"]) == 1

    out = capsys.readouterr().out
    assert out.count(f"FAILED on {' '.join(_C.isas())}\tnan\t") == 2
    assert out.endswith(f"{2 * len(_C.isas())} checks FAILED\n")
    assert cli.main(["doctor", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] is False
    assert report["kernels"][0]["error"] is None


def test_operations_run_as_before_afterwards(
    cases: list[Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    copy = planted("set_op_backend", lambda f, *a: (calls.append(a), f(*a)))
    monkeypatch.setattr(kernel_check, "_C", copy)

    def fail(*_: Any) -> None:
        raise OSError("planted")

    with pytest.raises(OSError, match="planted"):
        check_kernels([spoilt(of(cases, "gelu")[0], fail)])
    assert calls[-1] == (_C.default_isa(), _C.available_threads())


# Predictions


def test_bytes_per_token_are_weights_and_cache() -> None:
    config = PUBLISHED["124M"]
    vectors = 12 * 13 * 768 + 2 * 768
    matrices, cache = 12 * 12 * 768 * 768 + 50257 * 768, 2 * 12 * 768 * 512
    read = vectors + matrices + cache
    assert step_bytes(config, "fp32", 512, 1) == 4 * read
    assert step_bytes(config, "bf16", 512, 1) == 4 * vectors + 2 * (matrices + cache)
    assert step_bytes(config, "int8", 512, 1) == 4 * vectors + matrices * 33 / 32 + 2 * cache
    assert step_bytes(config, "int4", 512, 1) == 4 * vectors + matrices * 9 / 16 + 2 * cache
    untied = replace(config, tie_word_embeddings=False)  # its token embedding is not read whole
    assert step_bytes(untied, "fp32", 512, 1) == 4 * read


def test_predictions() -> None:
    found = doctor.predictions(1e11, 2_000_000_000)
    speeds = {(each["model"], each["precision"]): each["tokens_per_second"] for each in found}
    assert speeds["124M", "bf16"] == pytest.approx(2 * speeds["124M", "fp32"], rel=2e-3)
    assert speeds["124M", "bf16"] == pytest.approx(1e11 / 266.2e6, rel=2e-3)
    fitting = {(each["model"], each["precision"]) for each in found if each["fits"]}
    every = {(name, precision) for name in PUBLISHED for precision in PRECISIONS["cpu"]}
    assert every - fitting == {("774M", "fp32"), ("1558M", "fp32"), ("1558M", "bf16")}


# The references


def test_references_are_the_definition_of_correct() -> None:
    x, w, b = normal(4, 50), normal(50, seed=1), normal(50, seed=2)
    tx, tw, tb = map(torch.from_numpy, (x, w, b))
    close(numpy_reference.layernorm(TRUTH, x, w, b, 1e-5), reference.layernorm(tx, tw, tb, 1e-5))
    close(numpy_reference.gelu(TRUTH, x), reference.gelu(tx))
    matrix = normal(7, 50, seed=3)
    close(
        numpy_reference.linear(TRUTH, x, matrix, b[:7]),
        reference.linear(tx, torch.from_numpy(matrix), tb[:7]),
    )
    q, k, v = normal(2, 3, 4, 8), normal(2, 3, 9, 8, seed=4), normal(2, 3, 9, 8, seed=5)
    tq, tk, tv = map(torch.from_numpy, (q, k, v))
    nine = np.array([9, 9])
    close(
        numpy_reference.attention(TRUTH, q, k, v, nine, 0.3),
        reference.attention_prefill(tq, tk, tv, 0.3),
    )
    ragged = np.array([2, 7])
    close(
        numpy_reference.attention(TRUTH, q[:, :, :1], k, v, ragged, 0.3)[:, :, 0],
        reference.attention_decode(tq[:, :, 0], tk, tv, torch.from_numpy(ragged), 0.3),
    )
    close(numpy_reference.log_softmax(TRUTH, x), tx.log_softmax(-1))


@pytest.mark.parametrize("key", [(0, 0, 0), (2**40 + 3, 2**33 + 1, 7), (2**63 - 1, 5, 2**31)])
def test_noise_is_the_definition(key: tuple[int, int, int]) -> None:
    for vocab in (1, 33, 4096):
        ours = numpy_reference.gumbel_noise(vocab, *key)
        np.testing.assert_array_equal(ours, reference.gumbel_noise(vocab, *key))


def test_filters_are_the_definition() -> None:
    z = np.round(normal(200, seed=6) * 2, 1)  # with ties
    for k, p, m in [(0, 1.0, 0.0), (10, 1.0, 0.0), (0, 0.7, 0.0), (50, 0.8, 0.1), (0, 0.0, 0.0)]:
        for openai in (False, True):
            kept = numpy_reference.kept_by_filters(z, k, p, m, openai=openai)
            np.testing.assert_array_equal(kept, reference.kept_by_filters(z, k, p, m, openai))


@pytest.mark.parametrize("tied", [True, False])
def test_the_model_is_the_definition(tied: bool) -> None:
    config = GPT2Config(
        n_layer=2,
        n_embd=24,
        n_head=3,
        n_ctx=16,
        vocab_size=50,
        n_inner=40,
        eos_token_id=None,
        scale_attn_by_inverse_layer_idx=True,
        tie_word_embeddings=tied,
    )
    shapes = config.tensor_shapes().items()
    parameters = {name: normal(*shape, seed=n) / 5 for n, (name, shape) in enumerate(shapes)}
    state = {name: torch.from_numpy(array) for name, array in parameters.items()}
    tokens = np.arange(16) * 3
    ours = numpy_reference.gpt2(TRUTH, config, parameters, tokens)
    close(ours, reference.GPT2Reference(config, state).forward(torch.from_numpy(tokens)[None])[0])


def test_bfloat16_is_torchs() -> None:
    values = (normal(1000) * 10.0 ** np.arange(-20, 20).repeat(25)).astype(np.float32)
    ties = (np.arange(1000, dtype=np.uint32) + 0x3F800000 >> 4 << 15).view(np.float32)
    for given in (values, ties, np.float32([0.0, -0.0, 1e-45, -3e38])):
        wanted = torch.from_numpy(given).bfloat16()
        np.testing.assert_array_equal(round_to_bfloat16(given), wanted.float().numpy())
        bits = BFloat16Array.rounded(given).bits
        np.testing.assert_array_equal(bits, wanted.view(torch.uint16).numpy())


def test_the_native_module_reads_bfloat16_arrays_in_place() -> None:
    x = normal(5, 33).astype(np.float32)
    ours = BFloat16Array(np.zeros((5, 33), np.uint16))
    theirs = torch.zeros(5, 33, dtype=torch.bfloat16)
    _C.gelu(BFloat16Array.rounded(x), ours)
    _C.gelu(torch.from_numpy(x).bfloat16(), theirs)
    assert ours.bits.any()
    np.testing.assert_array_equal(ours.bits, theirs.view(torch.uint16).numpy())


def test_rounding_of_operands_is_what_arithmetic_asks() -> None:
    x, w = normal(3, 64).astype(np.float32), normal(5, 64, seed=1).astype(np.float32)
    plain = numpy_reference.linear(Arithmetic(np.float32), x, w)
    rounded = numpy_reference.linear(Arithmetic(np.float32, bf16=True), x, w)
    wanted = round_to_bfloat16(x) @ round_to_bfloat16(w).T
    np.testing.assert_array_equal(rounded, wanted)
    assert np.abs(plain - rounded).max() > 1e-3
