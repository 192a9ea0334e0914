"""The ops behind gpt2_fast.ops on CUDA arrays: arguments, memory, values the host cannot see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gpt2_fast import _C, DeviceError, ParameterError, reference
from tests.accuracy import assert_as_accurate_as_torch
from tests.cuda.arrays import DTYPES, array_of, normal, tensor_of, unwritten
from tests.cuda.cuda_array import ON_CUDA, CudaArray, scratch

pytestmark = pytest.mark.usefixtures("simt")

HALVES = ["bf16", "fp16"]
FLOATS = ["fp32", "bf16", "fp16"]


def on_cuda(tensor: Tensor) -> CudaArray:
    array = array_of(tensor)
    if tensor.dtype == torch.float16:
        array = array.view(np.float16)
    return CudaArray(array, bf16=tensor.dtype == torch.bfloat16)


def empty(*shape: int, dtype: torch.dtype) -> CudaArray:
    array = unwritten(shape, dtype)
    if dtype == torch.float16:
        array = array.view(np.float16)
    return CudaArray(array, bf16=dtype == torch.bfloat16)


def back(array: CudaArray, dtype: torch.dtype) -> Tensor:
    kind = np.float32 if dtype == torch.float32 else np.uint16
    return tensor_of(array.array.view(kind), dtype)


def close(out: CudaArray, same: Tensor, truth: Tensor) -> None:
    assert_as_accurate_as_torch(back(out, same.dtype), same, truth)


@pytest.mark.parametrize("name", FLOATS)
def test_layernorm_and_add_layernorm(name: str) -> None:
    dtype = DTYPES[name]
    x, delta = normal(5, 100).to(dtype), normal(5, 100, seed=1).to(dtype)
    weight, bias = normal(100, seed=2), normal(100, seed=3)
    parameters = (on_cuda(weight), on_cuda(bias), 1e-5)

    out = empty(5, 100, dtype=dtype)
    _C.layernorm(on_cuda(x), *parameters, out, ON_CUDA)
    arguments = (weight.double(), bias.double(), 1e-5)
    close(out, reference.layernorm(x, weight, bias), reference.layernorm(x.double(), *arguments))

    residual = on_cuda(x)
    _C.add_layernorm(residual, on_cuda(delta), *parameters, out, ON_CUDA)
    h = x + delta
    assert torch.equal(back(residual, dtype), h)
    close(out, reference.layernorm(h, weight, bias), reference.layernorm(h.double(), *arguments))


@pytest.mark.parametrize("name", FLOATS)
def test_gelu(name: str) -> None:
    x = (3 * normal(7, 33)).to(DTYPES[name])
    out = empty(7, 33, dtype=x.dtype)
    _C.gelu(on_cuda(x), out, ON_CUDA)
    close(out, reference.gelu(x), reference.gelu(x.double()))


@pytest.mark.parametrize("name", FLOATS)
def test_embed_answers_ids_out_of_range_with_nan(name: str) -> None:
    dtype = DTYPES[name]
    wte, wpe = normal(9, 20).to(dtype), normal(6, 20, seed=1).to(dtype)
    tokens = np.array([3, 8, 9, -1, 2, 0], np.int64)
    positions = np.array([0, 5, 1, 1, 6, -2], np.int64)
    out = empty(6, 20, dtype=dtype)
    _C.embed(CudaArray(tokens), CudaArray(positions), on_cuda(wte), on_cuda(wpe), out, ON_CUDA)
    rows = back(out, dtype)
    assert torch.equal(rows[:2], wte[tokens[:2]] + wpe[positions[:2]])
    assert rows[2:].isnan().all()


@pytest.mark.parametrize("name", HALVES)
@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("inputs", [64, 100])
def test_linear(name: str, rows: int, inputs: int) -> None:
    dtype = DTYPES[name]
    x, weight = normal(rows, inputs).to(dtype), normal(50, inputs, seed=1).to(dtype)
    bias, residual = normal(50, seed=2), normal(rows, 50, seed=3).to(dtype)
    out = empty(rows, 50, dtype=dtype)
    _C.linear(on_cuda(x), on_cuda(weight), on_cuda(bias), on_cuda(residual), True, out, ON_CUDA)
    same = reference.linear(x, weight, bias, residual, gelu=True)
    wide = (x.double(), weight.double(), bias.double(), residual.double())
    close(out, same, reference.linear(*wide, gelu=True))
    _C.linear(on_cuda(x), on_cuda(weight), None, None, False, out, ON_CUDA)
    close(out, reference.linear(x, weight), reference.linear(x.double(), weight.double()))


@pytest.mark.parametrize("name", HALVES)
def test_attention(name: str) -> None:
    dtype = DTYPES[name]
    k, v = normal(2, 3, 70, 24, seed=1).to(dtype), normal(2, 3, 70, 24, seed=2).to(dtype)
    q = normal(2, 3, 20, 24).to(dtype)
    out = empty(2, 3, 20, 24, dtype=dtype)
    _C.attention_prefill(on_cuda(q), on_cuda(k), on_cuda(v), 0.2, out, ON_CUDA)
    truth = reference.attention_prefill(q.double(), k.double(), v.double(), 0.2)
    close(out, reference.attention_prefill(q, k, v, 0.2), truth)

    # A length out of range is the nearest in range.
    one, lengths = q[:, :, 0].contiguous(), np.array([33, 1000], np.int32)
    single = empty(2, 3, 24, dtype=dtype)
    arguments = (on_cuda(one), on_cuda(k), on_cuda(v))
    _C.attention_decode(*arguments, CudaArray(lengths), 0.2, single, ON_CUDA)
    known = torch.tensor([33, 70], dtype=torch.int32)
    truth = reference.attention_decode(one.double(), k.double(), v.double(), known, 0.2)
    close(single, reference.attention_decode(one, k, v, known, 0.2), truth)


@pytest.mark.parametrize("name", HALVES)
def test_attention_over_many_chunks(name: str) -> None:
    """More chunks than one block takes: blocks draw tickets, from memory that nobody cleared."""
    dtype = DTYPES[name]
    k, v = normal(2, 2, 600, 16, seed=1).to(dtype), normal(2, 2, 600, 16, seed=2).to(dtype)
    q, lengths = normal(2, 2, 16).to(dtype), torch.tensor([600, 311], dtype=torch.int32)
    out = empty(2, 2, 16, dtype=dtype)
    arguments = (on_cuda(q), on_cuda(k), on_cuda(v), CudaArray(lengths.numpy()), 0.3, out)
    _C.attention_decode(*arguments, ON_CUDA)
    truth = reference.attention_decode(q.double(), k.double(), v.double(), lengths, 0.3)
    close(out, reference.attention_decode(q, k, v, lengths, 0.3), truth)


def sample(logits: Tensor, columns: dict[str, Any], *, openai: bool = False) -> tuple[Any, Any]:
    rows = logits.shape[0]
    tokens, logprobs = np.full(rows, -7, np.int64), np.full(rows, np.nan, np.float32)
    arrays = [CudaArray(columns[name]) for name in ("temperature", "top_k", "top_p", "min_p")]
    keys = [CudaArray(columns[name]) for name in ("seeds", "samples", "positions")]
    out = CudaArray(tokens), CudaArray(logprobs)
    _C.sample(on_cuda(logits), *arrays, openai, *keys, *out, ON_CUDA)
    return out[0].array, out[1].array


def some_columns(rows: int) -> dict[str, Any]:
    rng = np.random.default_rng(5)
    return {
        "temperature": rng.choice([0.0, 0.7, 1.3], rows).astype(np.float32),
        "top_k": rng.choice([0, 3, 40], rows).astype(np.int32),
        "top_p": rng.choice([1.0, 0.8], rows).astype(np.float32),
        "min_p": rng.choice([0.0, 0.05], rows).astype(np.float32),
        "seeds": rng.integers(0, 1 << 60, rows),
        "samples": rng.integers(0, 5, rows),
        "positions": rng.integers(0, 1000, rows),
    }


@pytest.mark.parametrize("openai", [False, True])
def test_sample_draws_what_the_cpu_draws(openai: bool) -> None:
    logits, columns = 3 * normal(40, 301), some_columns(40)
    tokens, logprobs = sample(logits, columns, openai=openai)
    theirs, their_logprobs = np.zeros(40, np.int64), np.zeros(40, np.float32)
    arrays = [columns[name] for name in ("temperature", "top_k", "top_p", "min_p")]
    keys = [columns[name] for name in ("seeds", "samples", "positions")]
    _C.sample(logits.numpy(), *arrays, openai, *keys, theirs, their_logprobs)
    np.testing.assert_array_equal(tokens, theirs)
    # Sums of 301 terms in another order, and logarithms: some roundings of numbers up to 16.
    np.testing.assert_allclose(logprobs, their_logprobs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1.0),
        ("temperature", np.inf),
        ("temperature", np.nan),
        ("top_p", 1.5),
        ("top_p", np.nan),
        ("min_p", -0.1),
        ("top_k", -1),
    ],
)
def test_parameters_out_of_range_spoil_their_row_alone(name: str, value: float) -> None:
    logits, columns = 3 * normal(3, 50), some_columns(3)
    good_tokens, good_logprobs = sample(logits, columns)
    columns[name][1] = value
    tokens, logprobs = sample(logits, columns)
    assert tokens[1] == -1
    assert np.isnan(logprobs[1])
    np.testing.assert_array_equal(tokens[::2], good_tokens[::2])
    np.testing.assert_array_equal(logprobs[::2], good_logprobs[::2])


def calls() -> dict[str, Callable[[Any], list[CudaArray]]]:
    """Each op on fixed arguments; called with `cuda`, it gives its outputs, and what it reads."""
    half, floats = torch.float16, torch.float32
    x, w = normal(40, 100).half(), normal(24, 100, seed=1).half()
    gain, bias = on_cuda(normal(100, seed=2)), on_cuda(normal(100, seed=3))
    q, k = normal(2, 3, 20, 24).half(), normal(2, 3, 300, 24, seed=1).half()
    one, lengths = on_cuda(q[:, :, 0].contiguous()), CudaArray(np.array([300, 123], np.int32))
    ids = CudaArray(np.arange(20))
    columns = {name: CudaArray(values) for name, values in some_columns(40).items()}
    first = [columns[name] for name in ("temperature", "top_k", "top_p", "min_p")]
    keys = [columns[name] for name in ("seeds", "samples", "positions")]
    logits = on_cuda(3 * normal(40, 301))
    tensors = {name: on_cuda(t) for name, t in (("x", x), ("w", w), ("q", q), ("k", k))}

    def add_layernorm(cuda: Any) -> list[CudaArray]:
        h, out = on_cuda(x.clone()), empty(40, 100, dtype=half)
        _C.add_layernorm(h, tensors["x"], gain, bias, 1e-5, out, cuda)
        return [h, out]

    def draw(cuda: Any) -> list[CudaArray]:
        out = CudaArray(np.full(40, -7)), CudaArray(np.full(40, np.nan, np.float32))
        _C.sample(logits, *first, False, *keys, *out, cuda)
        return list(out)

    def into(*shape: int, dtype: torch.dtype = half) -> Callable[..., Any]:
        def call(op: Callable[..., None], *given: Any) -> Callable[[Any], list[CudaArray]]:
            def run(cuda: Any) -> list[CudaArray]:
                out = empty(*shape, dtype=dtype)
                op(*given, out, cuda)
                return [out]

            return run

        return call

    x_, w_, q_, k_ = (tensors[name] for name in "xwqk")
    return {
        "layernorm": into(40, 100)(_C.layernorm, x_, gain, bias, 1e-5),
        "add_layernorm": add_layernorm,
        "gelu": into(40, 100)(_C.gelu, x_),
        "embed": into(20, 100)(_C.embed, ids, ids, x_, x_),
        "linear": into(40, 24)(_C.linear, x_, w_, None, None, True),
        "attention_prefill": into(2, 3, 20, 24)(_C.attention_prefill, q_, k_, k_, 0.2),
        "attention_decode": into(2, 3, 24)(_C.attention_decode, one, k_, k_, lengths, 0.2),
        "sample": draw,
        "layernorm of floats": into(40, 301, dtype=floats)(
            _C.layernorm, logits, on_cuda(normal(301)), on_cuda(normal(301)), 1e-5
        ),
    }


@pytest.mark.parametrize("name", calls())
def test_everything_goes_to_the_stream_of_the_caller(simt: Any, name: str) -> None:
    """Where it runs when the stream does, and not before."""
    simt.set_schedule("forward_late")
    run = calls()[name]
    expected = [out.array.copy() for out in run(ON_CUDA)]
    kept: list[CudaArray] = []

    def keep(size: int) -> CudaArray:
        kept.append(scratch(size))
        return kept[-1]

    stream = simt.new_stream()
    outs = run((stream, keep))
    early = [out.array.tobytes() for out in outs]
    simt.finish_stream(stream)

    for out, wanted, before in zip(outs, expected, early, strict=True):
        assert out.array.tobytes() == wanted.tobytes()
        assert before != wanted.tobytes()


def test_what_is_refused() -> None:
    x, out = normal(4, 32), empty(4, 32, dtype=torch.float32)
    weight = on_cuda(normal(8, 32))
    with pytest.raises(
        ParameterError, match=r"^gelu: x must be on a CUDA device, got DLPack device type 1$"
    ):
        _C.gelu(x.numpy(), out, ON_CUDA)
    with pytest.raises(ParameterError, match=r"^gelu: out must be on the CPU, got DLPack device"):
        _C.gelu(x.numpy(), out)
    with pytest.raises(ParameterError, match=r"^gelu: x must be float32, float16 or bfloat16"):
        _C.gelu(CudaArray(np.arange(3)), out, ON_CUDA)
    with pytest.raises(ParameterError, match=r"^linear: x must be float16 or bfloat16 on CUDA"):
        _C.linear(on_cuda(x), weight, None, None, False, out, ON_CUDA)
    q = on_cuda(normal(1, 1, 2, 136).half())
    with pytest.raises(ParameterError, match=r"head size of at most 128 on CUDA, got 136"):
        _C.attention_prefill(q, q, q, 1.0, q, ON_CUDA)


def test_arguments_on_different_devices_are_refused() -> None:
    x, weight, vector = (normal(*shape).half() for shape in ((4, 32), (8, 32), (32,)))
    here = CudaArray(x.numpy())
    there = CudaArray(weight.numpy(), device=1)
    out = CudaArray(np.empty((4, 8), np.float16))
    with pytest.raises(ParameterError, match=r"^linear: weight must be on cuda:0, got cuda:1$"):
        _C.linear(here, there, None, None, False, out, ON_CUDA)
    with pytest.raises(ParameterError, match=r"^gelu: out must be on cuda:1, got cuda:0$"):
        _C.gelu(CudaArray(x.numpy(), device=1), here, ON_CUDA)
    bias = CudaArray(vector.float().numpy(), device=1)
    scale = CudaArray(vector.float().numpy())
    with pytest.raises(ParameterError, match=r"^layernorm: bias must be on cuda:0, got cuda:1$"):
        _C.layernorm(here, scale, bias, 1e-5, here, ON_CUDA)
    bias8 = CudaArray(np.zeros(8, np.float32), device=1)
    with pytest.raises(ParameterError, match=r"^linear: bias must be on cuda:0, got cuda:1$"):
        _C.linear(here, CudaArray(weight.numpy()), bias8, None, False, out, ON_CUDA)


def test_products_that_a_device_lacks_are_refused(simt: Any) -> None:
    simt.set_device(major=7, minor=5)
    x, weight = normal(4, 32), normal(8, 32)
    out = empty(4, 8, dtype=torch.bfloat16)
    message = r"device 'cuda:0': compute capability 7\.5 has no bfloat16 products; use float16"
    narrow = on_cuda(x.bfloat16()), on_cuda(weight.bfloat16())
    with pytest.raises(DeviceError, match="^linear: " + message):
        _C.linear(*narrow, None, None, False, out, ON_CUDA)
    q = on_cuda(normal(1, 1, 2, 32).bfloat16())
    with pytest.raises(DeviceError, match="^attention_prefill: " + message):
        _C.attention_prefill(q, q, q, 1.0, q, ON_CUDA)
    half = empty(4, 8, dtype=torch.float16)
    _C.linear(on_cuda(x.half()), on_cuda(weight.half()), None, None, False, half, ON_CUDA)
    simt.set_device()


def test_nothing_to_do() -> None:
    none = CudaArray(np.zeros((0, 16), np.float32))
    weight = on_cuda(normal(16))
    _C.layernorm(none, weight, weight, 1e-5, none, ON_CUDA)
    _C.gelu(none, none, ON_CUDA)
