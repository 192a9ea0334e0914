"""bfloat16 for numpy, which has none: rounding, and arrays that the native module takes."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

_CPU, _BFLOAT = 1, 4  # kDLCPU, kDLBfloat
_NAME = b"dltensor"  # a capsule keeps the pointer


class _Tensor(ctypes.Structure):
    """DLManagedTensor, flattened. Source: dmlc/dlpack, include/dlpack/dlpack.h, version 0.8."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.c_void_p),  # null: C order
        ("byte_offset", ctypes.c_uint64),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


class BFloat16Array:
    """An array of bfloat16 in C order.

    Attributes:
        bits: uint16, the upper halves of the float32 values.
    """

    def __init__(self, bits: npt.NDArray[np.uint16]) -> None:
        self.bits = np.ascontiguousarray(bits, np.uint16)

    @classmethod
    def rounded(cls, values: npt.NDArray[np.floating[Any]]) -> BFloat16Array:
        """The nearest bfloat16 to each value, ties to even; values must be finite."""
        words = np.ascontiguousarray(values, np.float32).view(np.uint32)
        return cls(((words + ((words >> 16) & 1) + 0x7FFF) >> 16).astype(np.uint16))

    def float32(self) -> npt.NDArray[np.float32]:
        """The same values."""
        return (self.bits.astype(np.uint32) << 16).view(np.float32)

    def __dlpack__(self, **_: Any) -> Any:
        """A capsule over this array's memory; it must not outlive the array."""
        shape = (ctypes.c_int64 * self.bits.ndim)(*self.bits.shape)
        tensor = _Tensor(
            data=self.bits.ctypes.data,
            device_type=_CPU,
            ndim=self.bits.ndim,
            code=_BFLOAT,
            bits=16,
            lanes=1,
            shape=shape,
        )
        self._exported = tensor, shape
        new = ctypes.pythonapi.PyCapsule_New
        new.argtypes, new.restype = (
            [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p],
            ctypes.py_object,
        )
        return new(ctypes.addressof(tensor), _NAME, None)

    def __dlpack_device__(self) -> tuple[int, int]:
        """The CPU."""
        return _CPU, 0


def round_to_bfloat16(values: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float32]:
    """Each value as the nearest bfloat16, in float32."""
    return BFloat16Array.rounded(values).float32()
