"""Every kernel at decode and prefill shapes of 124M, against torch, at 1 and at all threads each.

Both sides allocate their result, as torch's functions do. What a model reads from memory (weights,
keys, values) is read from memory here too: calls go round copies that together exceed any cache.
Activations stay in the cache, as in a model.

The ops `linear` and `attention_*` take plain tensors and bring them into the engine's layout on
every call; the engine does that once. Its speed is what bench_generate.py measures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import cycle
from typing import Any

import numpy as np
import pytest

from benchmarks.op_cases import Arrays, Case, V, normal, op_cases
from benchmarks.roofline import thread_settings
from gpt2_fast import _C

COLD_BYTES = 256 << 20  # several times the cache of one processor's share
HAS_TORCH = find_spec("torch") is not None
IMPLS = [
    f"{name}-{threads}"
    for name in ("gpt2_fast", "torch")
    for threads in thread_settings()
    if name == "gpt2_fast" or HAS_TORCH
]
DTYPES = ["fp32", "bf16"] if HAS_TORCH else ["fp32"]  # numpy has no bfloat16
OWN_TYPE = ("weight", "bias")  # float32 vectors whatever the rest is

pytestmark = pytest.mark.benchmark(min_rounds=5, max_time=0.4)


def prepare(inputs: Arrays, dtype: str, as_torch: bool) -> Arrays:
    """The inputs in `dtype`, as numpy arrays or torch tensors; vectors stay float32."""
    if not as_torch:
        return inputs
    import torch

    tensors: Arrays = {name: torch.from_numpy(value) for name, value in inputs.items()}
    if "bias" in tensors:  # what torch's linear wants
        tensors["narrow_bias"] = tensors["bias"]
    if dtype == "bf16":
        for name, value in tensors.items():
            vector = value.ndim == 1 and name in OWN_TYPE
            if value.is_floating_point() and not vector:
                tensors[name] = value.bfloat16()
    return tensors


def doubled(arrays: Arrays) -> Arrays:
    """The same values, floats as float64, in numpy."""
    out = {}
    for name, value in arrays.items():
        if isinstance(value, np.ndarray):
            out[name] = value.astype(np.float64) if value.dtype.kind == "f" else value
        else:
            out[name] = (value.double() if value.is_floating_point() else value).numpy()
    return out


def set_threads(impl: str) -> str:
    """Set the implementation's number of threads; returns its name."""
    name, threads = impl.split("-")
    if name == "gpt2_fast":
        _C.set_op_backend(_C.default_isa(), int(threads))
    else:
        import torch

        torch.set_num_threads(int(threads))
    return name


def runner(case: Case, impl: str) -> Callable[[Arrays], Any]:
    """A function that allocates the result, computes it and returns it."""
    if set_threads(impl) == "torch":
        return case.torch

    def run(a: Arrays) -> Any:
        like = next(iter(a[n] for n in ("x", "q", "wte") if n in a))
        empty = np.empty if isinstance(like, np.ndarray) else like.new_empty
        out = empty(case.out, dtype=like.dtype)
        case.ours(a, out)
        return out

    return run


def copied(arrays: Arrays, names: tuple[str, ...] | None = None) -> Arrays:
    """The arrays, those in `names` (default: all) in memory of their own."""
    out = dict(arrays)
    for name in arrays if names is None else names:
        value = arrays[name]
        out[name] = value.copy() if isinstance(value, np.ndarray) else value.clone()
    return out


def in_turn(case: Case, arrays: Arrays, quick: bool) -> Iterator[Arrays]:
    """The arrays again and again, their cold ones each time from other memory."""
    if quick or not case.cold:
        return cycle([arrays])
    size = sum(arrays[name].nbytes for name in case.cold)
    more = max(1, -(-COLD_BYTES // size))
    return cycle([arrays, *(copied(arrays, case.cold) for _ in range(more))])


def worst(out: Any, truth: Any) -> float:
    """The largest distance from the truth."""
    values = out if isinstance(out, np.ndarray) else out.double().numpy()
    assert values.shape == truth.shape
    return float(np.abs(values - truth).max())


def assert_accurate(case: Case, out: Any, arrays: Arrays, dtype: str) -> None:
    """At most twice as far from float64 as torch (without it: numpy) in this dtype, plus one
    rounding; and torch itself must have computed the same thing.
    """
    truth = case.truth(doubled(arrays))
    peer = case.torch(copied(arrays)) if HAS_TORCH and dtype == "bf16" else None
    if peer is None:
        plain = {n: x if isinstance(x, np.ndarray) else x.numpy() for n, x in arrays.items()}
        peer = case.truth(plain)
    largest = float(np.abs(truth).max())
    theirs = worst(peer, truth)
    assert theirs <= 2**-5 * largest, f"the comparison computes something else: {theirs:.2e}"
    rounding = (2**-23 if dtype == "fp32" else 2**-7) * largest
    ours = worst(out, truth)
    assert ours <= 2 * theirs + rounding, f"{ours:.2e}, peer {theirs:.2e}, rounding {rounding:.2e}"


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", op_cases(), ids=lambda case: case.name)
def bench_op(
    benchmark: Any, report: Callable[..., None], quick: bool, case: Case, dtype: str, impl: str
) -> None:
    """One kernel, one shape, one dtype, one implementation."""
    benchmark.group = f"{case.name} {dtype}"
    as_torch = impl.startswith("torch") or dtype == "bf16"
    arrays = prepare(case.inputs(), dtype, as_torch)
    run = runner(case, impl)
    turns = in_turn(case, copied(arrays) if case.in_place else arrays, quick)

    out = benchmark(lambda: run(next(turns)))

    if case.in_place:  # what was timed has changed its input many times
        assert np.isfinite(worst(out, np.zeros(case.out)))
        out = run(copied(arrays))
    assert_accurate(case, out, arrays, dtype)
    moved = case.moved({n: x for n, x in arrays.items() if n != "narrow_bias"})
    report(benchmark, moved=moved + out.nbytes, flops=case.flops)


OPENAI_TOP_P = False
SAMPLING = {  # temperature, top_k, top_p
    "greedy": (0.0, 0, 1.0),
    "plain": (1.0, 0, 1.0),
    "filtered": (0.8, 40, 0.95),
}


def our_sample(logits: Any, temperature: float, top_k: int, top_p: float) -> tuple[Any, Any]:
    """Tokens and log-probabilities by our kernel."""
    rows = len(logits)
    tokens, logprobs = np.empty(rows, np.int64), np.empty(rows, np.float32)
    numbers = np.arange(rows, dtype=np.int64)
    _C.sample(
        logits,
        np.full(rows, temperature, np.float32),
        np.full(rows, top_k, np.int32),
        np.full(rows, top_p, np.float32),
        np.zeros(rows, np.float32),
        OPENAI_TOP_P,
        numbers,
        numbers,
        numbers,
        tokens,
        logprobs,
    )
    return tokens, logprobs


def torch_sample(logits: Any, temperature: float, top_k: int, top_p: float) -> tuple[Any, Any]:
    """The same by torch: sorted only among the top_k; its own random numbers."""
    import torch

    logprobs = torch.log_softmax(logits, -1)
    if temperature == 0:
        tokens = logits.argmax(-1, keepdim=True)
    elif top_k == 0:
        tokens = torch.multinomial(torch.softmax(logits / temperature, -1), 1)
    else:
        values, ids = (logits / temperature).topk(top_k)
        mass = torch.softmax(values, -1)
        mass = mass * (mass.cumsum(-1) - mass < top_p)
        tokens = ids.gather(-1, torch.multinomial(mass, 1))
    return tokens[:, 0], logprobs.gather(-1, tokens)[:, 0]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("kind", SAMPLING)
def bench_sample(
    benchmark: Any, report: Callable[..., None], kind: str, rows: int, impl: str
) -> None:
    """One token for each of `rows` rows of logits, from float32 logits as the engine makes them."""
    benchmark.group = f"sample-{kind} {rows} rows"
    logits = 3 * normal(rows, V, seed=5)
    temperature, top_k, top_p = SAMPLING[kind]
    given, sample = logits, our_sample
    if set_threads(impl) == "torch":
        import torch

        given, sample = torch.from_numpy(logits), torch_sample

    tokens, logprobs = (np.asarray(x) for x in benchmark(sample, given, temperature, top_k, top_p))

    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(-1, keepdims=True))
    ranks = (logits > logits[np.arange(rows), tokens][:, None]).sum(-1)  # 0: the likeliest
    assert (ranks < {"greedy": 1, "plain": V, "filtered": top_k}[kind]).all()
    truth = wide[np.arange(rows), tokens]
    # logit - (max + log of a sum): each step rounds a number of at most largest logit + log V.
    # torch's own sum is further away where it has AVX2 only: 1.2e-5, which is 7 of these steps.
    largest = np.abs(logits).max() + np.log(V)
    steps = 4 if sample is our_sample else 12
    assert (np.abs(logprobs - truth) <= steps * 2**-24 * largest).all()
    report(benchmark, moved=logits.nbytes)
