"""Where a model runs: the CPU, or a CUDA device of a CUDA build."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass

from . import _C
from .errors import DeviceError, ParameterError

#: Precisions of each kind of device.
PRECISIONS = {"cpu": ("fp32", "bf16", "int8", "int4"), "cuda": ("bf16", "fp16", "int8", "int4")}

_NAME = re.compile(r"(auto|cpu|cuda)(?::([0-9]{1,4}))?\Z")


@dataclass(frozen=True)
class Device:
    """A device of this machine.

    Attributes:
        kind: "cpu" or "cuda".
        index: its number among the CUDA devices that CUDA_VISIBLE_DEVICES leaves.
    """

    kind: str
    index: int = 0

    def __str__(self) -> str:
        """As `GPT2.from_pretrained` takes it."""
        return self.kind if self.kind == "cpu" else f"{self.kind}:{self.index}"


def choose(device: str, precision: str) -> Device:
    """The device a name means for a precision.

    Args:
        device: "cpu", "cuda", "cuda:1", or "auto": CUDA where this build has its kernels, a device
            answers and it computes in `precision`, else the CPU.
        precision: "fp32", "bf16", "int8" and "int4" on the CPU; "bf16", "fp16", "int8" and "int4"
            on CUDA.

    Raises:
        ParameterError: no such device name or precision, or one that is not for the other.
        DeviceError: "cuda" was asked for and the build, the driver or the device is missing.
    """
    found = _NAME.match(str(device))
    if found is None or (found[2] is not None and found[1] != "cuda"):
        raise ParameterError(f"device must be one of auto, cpu, cuda, cuda:NUMBER, got {device!r}")
    if precision not in PRECISIONS["cpu"] + PRECISIONS["cuda"]:
        here, there = ", ".join(PRECISIONS["cpu"]), ", ".join(PRECISIONS["cuda"])
        raise ParameterError(
            f"precision must be one of {here}, got {precision!r}; on cuda one of {there}"
        )
    kind = found[1]
    if kind == "auto":
        return _automatic(precision)
    if precision not in PRECISIONS[kind]:
        allowed = ", ".join(PRECISIONS[kind])
        raise ParameterError(f"precision must be one of {allowed}, got {precision!r} on {kind}")
    if kind == "cuda":
        _C.cuda_devices()  # says what is missing
    return Device(kind, int(found[2] or 0))


def with_cache(device: str, kv_precision: str | None) -> str:
    """`device`, where "auto" means the CPU for a cache that no other device has."""
    return "cpu" if kv_precision is not None and device == "auto" else device


def int8_cache(kv_precision: str | None, kind: str) -> bool:
    """Whether keys and values are 8-bit integers, on a device of this kind.

    Raises:
        ParameterError: it is neither None nor "int8", or "int8" on CUDA.
    """
    if kv_precision not in (None, "int8"):
        raise ParameterError(f"kv_precision must be None or 'int8', got {kv_precision!r}")
    if kv_precision is not None and kind != "cpu":
        raise ParameterError(f"kv_precision must be None on {kind}, got {kv_precision!r}")
    return kv_precision is not None


def _automatic(precision: str) -> Device:
    """CUDA where it can do it, else the CPU; a device that is left out is mentioned."""
    if precision not in PRECISIONS["cuda"]:
        return Device("cpu")
    try:
        devices = _C.cuda_devices()
    except DeviceError as error:
        if precision in PRECISIONS["cpu"]:
            return Device("cpu")
        allowed = ", ".join(PRECISIONS["cpu"])
        raise ParameterError(
            f"precision must be one of {allowed}, got {precision!r} on cpu. {error}"
        ) from error
    major, minor = devices[0]["capability"]
    least = (8, 0) if precision == "bf16" else (7, 5)
    if (major, minor) >= least:
        return Device("cuda")
    reason = (
        f"{devices[0]['name']} has compute capability {major}.{minor}, {precision!r} needs "
        f"{least[0]}.{least[1]}"
    )
    if precision not in PRECISIONS["cpu"]:
        raise DeviceError(f"device 'cuda': {reason}")
    warnings.warn(
        f"{reason}: running on the CPU. Use precision='fp16' to run on the GPU, or device='cpu' to "
        "silence this.",
        stacklevel=3,
    )
    return Device("cpu")
