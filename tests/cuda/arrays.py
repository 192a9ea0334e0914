"""Tensors as the numpy arrays that simt's hooks take: 16-bit floats as uint16."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Array = npt.NDArray[Any]


def array_of(tensor: Tensor, *, offset: int = 0) -> Array:
    """A copy in memory of its own, `offset` elements behind an address aligned to 64 bytes."""
    array = unwritten(tuple(tensor.shape), tensor.dtype, offset=offset)
    array[...] = (
        tensor.numpy() if tensor.dtype == torch.float32 else tensor.view(torch.int16).numpy()
    ).view(array.dtype)
    return array


def unwritten(shape: tuple[int, ...], dtype: torch.dtype, *, offset: int = 0) -> Array:
    """An array of NaN, `offset` elements behind an address aligned to 64 bytes."""
    kind = np.float32 if dtype == torch.float32 else np.uint16
    count = int(np.prod(shape))
    size = np.dtype(kind).itemsize
    memory = np.full(count * size + offset * size + 64, 0xFF, np.uint8)
    begin = -memory.ctypes.data % 64 + offset * size
    return memory[begin : begin + count * size].view(kind).reshape(shape)


def tensor_of(array: Array, dtype: torch.dtype) -> Tensor:
    """What `array` holds, as a tensor of `dtype`."""
    if dtype == torch.float32:
        return torch.from_numpy(array.copy())
    return torch.from_numpy(array.view(np.int16).copy()).view(dtype)


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal values, float32."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
