"""What torch.compile asks of the ops about CUDA tensors, on a machine without a GPU: shapes, types
and devices of tensors that hold nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from gpt2_fast import ParameterError, ops

HALVES = [torch.float16, torch.bfloat16]
FLOATS = [*HALVES, torch.float32]


@pytest.fixture(autouse=True)
def nothing_is_real() -> Iterator[None]:
    with FakeTensorMode():
        yield


def on(device: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, device=device, dtype=dtype)


def facts(tensor: Tensor) -> tuple[str, tuple[int, ...], torch.dtype]:
    return str(tensor.device), tuple(tensor.shape), tensor.dtype


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_norms_gelu_and_embed(device: str, dtype: torch.dtype) -> None:
    x, vector = on(device, 3, 4, 32, dtype=dtype), on(device, 32)
    assert facts(ops.layernorm(x, vector, vector, 1e-5)) == (device, (3, 4, 32), dtype)
    both = ops.add_layernorm(x, x.clone(), vector, vector, 1e-5)
    assert [facts(each) for each in both] == [facts(x)] * 2
    assert facts(ops.gelu(x)) == facts(x)
    ids = on(device, 7, dtype=torch.int64)
    table = on(device, 50, 32, dtype=dtype)
    assert facts(ops.embed(ids, ids, table, table)) == (device, (7, 32), dtype)


@pytest.mark.parametrize("dtype", HALVES)
def test_products(dtype: torch.dtype) -> None:
    x, weight = on("cuda:0", 3, 4, 32, dtype=dtype), on("cuda:0", 8, 32, dtype=dtype)
    assert facts(ops.linear(x, weight)) == ("cuda:0", (3, 4, 8), dtype)
    q, k = on("cuda:0", 2, 3, 5, 16, dtype=dtype), on("cuda:0", 2, 3, 9, 16, dtype=dtype)
    assert facts(ops.attention_prefill(q, k, k, 0.25)) == facts(q)
    lengths = on("cuda:0", 2, dtype=torch.int32)
    one = on("cuda:0", 2, 3, 16, dtype=dtype)
    assert facts(ops.attention_decode(one, k, k, lengths, 0.25)) == facts(one)


def test_sample() -> None:
    def column(dtype: torch.dtype) -> Tensor:
        return on("cuda:0", 6, dtype=dtype)

    logits = on("cuda:0", 6, 301)
    floats, ids = column(torch.float32), column(torch.int64)
    tokens, logprobs = ops.sample(
        logits, floats, column(torch.int32), floats, floats, False, ids, ids, ids
    )
    assert facts(tokens) == ("cuda:0", (6,), torch.int64)
    assert facts(logprobs) == ("cuda:0", (6,), torch.float32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, w: ops.linear(x.float(), w.float()), "x must be float16 or bfloat16, got"),
        (lambda x, w: ops.linear(x, w.cpu()), "weight must be on cuda:0, got cpu"),
        (lambda x, w: ops.linear(x, w.to("cuda:1")), "weight must be on cuda:0, got cuda:1"),
    ],
)
def test_what_is_refused(call: Callable[[Any, Any], Any], message: str) -> None:
    x = on("cuda:0", 4, 32, dtype=torch.float16)
    weight = on("cuda:0", 8, 32, dtype=torch.float16)
    with pytest.raises(ParameterError, match=f"^linear: {message}"):
        call(x, weight)
