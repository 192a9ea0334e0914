"""Every kernel against numpy in float64, on every instruction set of this machine.

The rule (docs/numerics.md, with numpy in the place of torch): the largest error of a kernel may be
at most twice that of numpy in the same precision, plus one rounding, eps * max|truth|, with eps
2^-23 for float32 and 2^-7 for bfloat16. Besides, every instruction set and number of threads must
give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import _C
from . import numpy_reference as reference
from .bfloat16 import BFloat16Array, round_to_bfloat16
from .numpy_reference import TRUTH, Arithmetic, Array

_EPS = {"fp32": 2.0**-23, "bf16": 2.0**-7, "int8": 2.0**-7, "int4": 2.0**-7}
#: How each precision computes; of the quantised ones only whole models are checked.
_USUAL = {
    "fp32": Arithmetic(np.float32),
    "bf16": Arithmetic(np.float32, bf16=True),
    "int8": Arithmetic(np.float32, bf16=True, group=64),
    "int4": Arithmetic(np.float32, bf16=True, group=32),
}
_FACTOR = 2.0
_WIDTHS = (100, 768, 1600)
# temperature, top_k, top_p, min_p
_FILTERS = (
    (0.0, 0, 1.0, 0.0),
    (1.0, 0, 1.0, 0.0),
    (0.7, 8, 1.0, 0.0),
    (1.0, 0, 0.5, 0.0),
    (1.3, 0, 1.0, 0.2),
    (0.9, 20, 0.8, 0.05),
)


@dataclass(frozen=True)
class Case:
    """One call of one kernel.

    Attributes:
        op, precision: what is called.
        run: calls it on an instruction set with a number of threads; gives its outputs.
        expected: the same in the given arithmetic.
    """

    op: str
    precision: str
    run: Callable[[str, int], list[Array]]
    expected: Callable[[Arithmetic], list[Array]]


@dataclass
class Finding:
    """How one op in one precision did on one instruction set.

    Attributes:
        error, bound: of the case that came closest to its bound, or exceeded it most.
        same_bits: whether bits equal those of the first instruction set, at 1 thread and at all.
    """

    op: str
    precision: str
    isa: str
    error: float = 0.0
    bound: float = 0.0
    same_bits: bool = True
    within: bool = True
    cases: int = field(default=0)

    @property
    def passed(self) -> bool:
        """Whether the rule holds."""
        return self.within and self.same_bits


def check_kernels(cases: list[Case] | None = None) -> list[Finding]:
    """Run every case on every instruction set with one thread and with all.

    Args:
        cases: what to run; None is everything.

    Returns:
        One finding for each op, precision and instruction set.
    """
    chosen = list(all_cases()) if cases is None else cases
    threads = _C.available_threads()
    found: dict[tuple[str, str, str], Finding] = {}
    try:
        for case in chosen:
            truth, bounds = _truth_and_bounds(case)
            first: list[bytes] | None = None
            for isa in _C.isas():
                finding = found.setdefault(
                    (case.op, case.precision, isa), Finding(case.op, case.precision, isa)
                )
                for count in sorted({1, threads}):
                    out = case.run(isa, count)
                    bits = [part.tobytes() for part in out]
                    first = bits if first is None else first
                    finding.same_bits &= bits == first
                _judge(finding, out, truth, bounds)
    finally:
        _C.set_op_backend(_C.default_isa(), threads)
    return list(found.values())


def _truth_and_bounds(case: Case) -> tuple[list[Array], list[float]]:
    bf16 = case.precision == "bf16"
    truth = case.expected(TRUTH)
    usual = case.expected(_USUAL[case.precision])
    if bf16:
        usual = [round_to_bfloat16(part) for part in usual]
    eps = _EPS[case.precision]
    bounds = [
        _FACTOR * _distance(same, right) + eps * float(np.abs(right).max())
        for same, right in zip(usual, truth, strict=True)
    ]
    return truth, bounds


def _distance(one: Array, other: Array) -> float:
    return float(np.abs(one.astype(np.float64) - other).max())


def _judge(finding: Finding, out: list[Array], truth: list[Array], bounds: list[float]) -> None:
    finding.cases += 1
    for part, right, bound in zip(out, truth, bounds, strict=True):
        error = _distance(part, right)
        finding.within &= error <= bound  # a NaN is not
        if not error * finding.bound <= finding.error * bound or finding.bound == 0:
            finding.error, finding.bound = error, bound


def _on_backend(call: Callable[[], list[Array]]) -> Callable[[str, int], list[Array]]:
    def run(isa: str, threads: int) -> list[Array]:
        _C.set_op_backend(isa, threads)
        return call()

    return run


class _Data:
    """Inputs of one precision, the same on every machine, and room for outputs."""

    def __init__(self, precision: str) -> None:
        self.precision = precision
        self._random = np.random.Generator(np.random.PCG64(2019))

    def normal(self, *shape: int, std: float = 1.0, f32: bool = False) -> Array:
        """Float32 values, exact in the precision unless `f32`."""
        values = (self._random.standard_normal(shape) * std).astype(np.float32)
        return values if f32 or self.precision == "fp32" else round_to_bfloat16(values)

    def integers(self, below: int, count: int) -> Array:
        """`count` int64 below `below`."""
        return self._random.integers(below, size=count)

    def give(self, values: Array) -> Any:
        """`values` as the kernel takes them; a copy."""
        return values.copy() if self.precision == "fp32" else BFloat16Array.rounded(values)

    def case(self, op: str, shape: tuple[int, ...], call: Any, expected: Any) -> Case:
        """A case with one output that `call` writes into."""

        def run() -> list[Array]:
            out = self.give(np.full(shape, np.float32(7)))
            call(out)
            return [self.read(out)]

        return Case(op, self.precision, _on_backend(run), lambda how: [expected(how)])

    def read(self, out: Any) -> Array:
        """What a kernel wrote, in float32."""
        values: Array = out.float32() if isinstance(out, BFloat16Array) else out
        return values


def all_cases() -> Iterator[Case]:
    """Every op in every precision it has."""
    for precision in ("fp32", "bf16"):
        data = _Data(precision)
        for make in (_layernorm, _add_layernorm, _gelu, _embed, _linear, _attention):
            yield from make(data)
    yield from _sample(_Data("fp32"))
    from .engine_check import engine_cases

    yield from engine_cases()


def _layernorm(data: _Data) -> Iterator[Case]:
    for width in _WIDTHS:
        x = data.normal(5, width, std=3.0) + np.float32(0.5)
        x = x if data.precision == "fp32" else round_to_bfloat16(x)
        w, b = data.normal(width, f32=True), data.normal(width, f32=True)
        yield data.case(
            "layernorm",
            x.shape,
            lambda out, x=x, w=w, b=b: _C.layernorm(data.give(x), w, b, 1e-5, out),
            lambda how, x=x, w=w, b=b: reference.layernorm(how, x, w, b, 1e-5),
        )


def _add_layernorm(data: _Data) -> Iterator[Case]:
    for width in _WIDTHS:
        x, delta = data.normal(5, width, std=3.0), data.normal(5, width)
        w, b = data.normal(width, f32=True), data.normal(width, f32=True)

        def run(x: Array = x, delta: Array = delta, w: Array = w, b: Array = b) -> list[Array]:
            residual, out = data.give(x), data.give(np.zeros_like(x))
            _C.add_layernorm(residual, data.give(delta), w, b, 1e-5, out)
            return [data.read(residual), data.read(out)]

        def expected(
            how: Arithmetic, x: Array = x, delta: Array = delta, w: Array = w, b: Array = b
        ) -> list[Array]:
            total = data.give(x + delta)  # stored before it is normalised
            stored = data.read(total)
            exact = how.take(x) + how.take(delta)
            return [exact, reference.layernorm(how, stored, w, b, 1e-5)]

        yield Case("add_layernorm", data.precision, _on_backend(run), expected)


def _gelu(data: _Data) -> Iterator[Case]:
    for x in (data.normal(3, 1001, std=3.0), data.normal(4096, std=0.1)):
        yield data.case(
            "gelu",
            x.shape,
            lambda out, x=x: _C.gelu(data.give(x), out),
            lambda how, x=x: reference.gelu(how, x),
        )


def _embed(data: _Data) -> Iterator[Case]:
    for width in _WIDTHS:
        wte, wpe = data.normal(300, width), data.normal(64, width, std=0.1)
        tokens, places = data.integers(300, 20), data.integers(64, 20)
        yield data.case(
            "embed",
            (20, width),
            lambda out, a=wte, b=wpe, t=tokens, p=places: _C.embed(
                t, p, data.give(a), data.give(b), out
            ),
            lambda how, a=wte, b=wpe, t=tokens, p=places: how.take(a)[t] + how.take(b)[p],
        )


def _linear(data: _Data) -> Iterator[Case]:
    for rows, inputs, outputs, gelu in (
        (1, 768, 500, False),
        (7, 100, 33, True),
        (40, 1600, 64, True),
    ):
        x, w = data.normal(rows, inputs), data.normal(outputs, inputs, std=inputs**-0.5)
        bias, residual = data.normal(outputs, f32=True), data.normal(rows, outputs)

        def expected(
            how: Arithmetic,
            x: Array = x,
            w: Array = w,
            bias: Array = bias,
            residual: Array = residual,
            gelu: bool = gelu,
        ) -> Array:
            out = reference.linear(how, x, w, bias)
            return (reference.gelu(how, out) if gelu else out) + how.take(residual)

        yield data.case(
            "linear",
            (rows, outputs),
            lambda out, x=x, w=w, b=bias, r=residual, g=gelu: _C.linear(
                data.give(x), data.give(w), b, data.give(r), g, out
            ),
            expected,
        )


def _attention(data: _Data) -> Iterator[Case]:
    for heads, size, queries, keys in ((3, 64, 9, 200), (5, 80, 33, 33), (2, 20, 1, 1)):
        q, k, v = (data.normal(2, heads, n, size) for n in (queries, keys, keys))
        scale = size**-0.5
        yield data.case(
            "attention_prefill",
            q.shape,
            lambda out, q=q, k=k, v=v, s=scale: _C.attention_prefill(
                data.give(q), data.give(k), data.give(v), s, out
            ),
            lambda how, q=q, k=k, v=v, s=scale, n=keys: reference.attention(
                how, q, k, v, np.array([n, n]), s
            ),
        )
        lengths = np.array([keys, (keys + 1) // 2], np.int32)
        one = np.ascontiguousarray(q[:, :, 0])
        yield data.case(
            "attention_decode",
            one.shape,
            lambda out, q=one, k=k, v=v, n=lengths, s=scale: _C.attention_decode(
                data.give(q), data.give(k), data.give(v), n, s, out
            ),
            lambda how, q=one, k=k, v=v, n=lengths, s=scale: reference.attention(
                how, q[:, :, None], k, v, n, s
            )[:, :, 0],
        )


def _sample(data: _Data) -> Iterator[Case]:
    """Tokens must be those of the reference, log-probabilities as exact as numpy's.

    Logits are flat enough that a filter left out shows in the tokens; filters and seeds are such
    that no rounding decides between two tokens.
    """
    rows = 60
    filters = np.array([_FILTERS[row % len(_FILTERS)] for row in range(rows)])
    temperature, top_p, min_p = filters[:, [0, 2, 3]].T.astype(np.float32).copy()
    top_k = filters[:, 1].astype(np.int32)
    keys = [np.arange(rows) + first for first in (2**40, 3, 500)]  # seeds, samples, positions
    for V, openai_top_p in ((33, False), (33, True), (4096, False)):
        logits = data.normal(rows, V) - np.float32(30)
        given = (logits, temperature, top_k, top_p, min_p, openai_top_p, *keys)

        def run(given: Any = given) -> list[Array]:
            tokens, logprobs = np.empty(rows, np.int64), np.empty(rows, np.float32)
            arguments: list[Any] = [*given, tokens, logprobs]
            _C.sample(*arguments)
            return [tokens, logprobs]

        def expected(how: Arithmetic, given: Any = given) -> list[Array]:
            tokens = reference.sample(*given)
            return [tokens, reference.log_softmax(how, given[0])[np.arange(rows), tokens]]

        yield Case("sample", "fp32", _on_backend(run), expected)
