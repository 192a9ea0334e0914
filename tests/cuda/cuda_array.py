"""Arrays in host memory that say they are on CUDA device 0, as the simulated device's are."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

_CUDA = 2  # DLDeviceType
_CODES = {"f": 2, "i": 0, "u": 1}


class _Tensor(ctypes.Structure):
    """DLManagedTensor: dmlc/dlpack, include/dlpack/dlpack.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


class CudaArray:
    """A contiguous numpy array with the DLPack interface of a CUDA tensor.

    Args:
        array: uint16 stands for bfloat16 if `bf16`.
        bf16: whether it does.
        device: the number of the device.
    """

    def __init__(self, array: npt.NDArray[Any], *, bf16: bool = False, device: int = 0) -> None:
        self.array = np.ascontiguousarray(array)
        self._shape = (ctypes.c_int64 * self.array.ndim)(*self.array.shape)
        self._tensor = _Tensor(
            data=self.array.ctypes.data,
            device_type=_CUDA,
            device_id=device,
            ndim=self.array.ndim,
            code=4 if bf16 else _CODES[self.array.dtype.kind],
            bits=self.array.itemsize * 8,
            lanes=1,
            shape=self._shape,
        )

    def __dlpack__(self) -> object:
        """A capsule that borrows from this object."""
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = (
            ctypes.py_object,
            [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p],
        )
        return new(ctypes.addressof(self._tensor), b"dltensor", None)


def scratch(size: int) -> CudaArray:
    """Memory as an allocator leaves it: whatever was there before."""
    memory = np.full(size + 64, 0xFF, np.uint8)
    begin = -memory.ctypes.data % 64
    return CudaArray(memory[begin : begin + size])


#: What `cuda` is in a call of an op: the default stream, and memory.
ON_CUDA = (0, scratch)
