"""What this machine can do at most, measured: the limits that speeds are divided by.

    python -m benchmarks.peaks

Reading: `roofline.py`. Arithmetic: the loops of peaks.cc, compiled here and now by $CXX, c++, g++
or clang++, because no library's product is a peak. They are for x86-64; without a compiler, or on
another processor, arithmetic limits are left out and the reason is kept.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import roofline

SOURCE = Path(__file__).with_name("peaks.cc")
SECONDS = 0.1
#: What multiplies numbers of a precision: the best of these kinds.
KINDS = {"fp32": ("fp32",), "bf16": ("bf16", "fp32"), "int8": ("int8",), "int4": ("int8",)}


@dataclass
class Limits:
    """Of this machine in this run.

    Attributes:
        threads: they are for.
        read_gbps: best read bandwidth, 1e9 bytes/s.
        gops: instruction set -> 1e9 operations/s on all threads; a multiplication and an addition
            are two.
        gops_one: the same on one thread.
        note: why there is no arithmetic, or nothing.
    """

    threads: int
    read_gbps: float
    gops: dict[str, float] = field(default_factory=dict)
    gops_one: dict[str, float] = field(default_factory=dict)
    note: str = ""

    def arithmetic(self, precision: str) -> float | None:
        """Operations/s for products of a precision, or None where they were not measured."""
        best = [rate for name, rate in self.gops.items() if name.split()[0] in KINDS[precision]]
        return max(best) * 1e9 if best else None

    def seconds(self, precision: str, moved: float, operations: float) -> float:
        """The least time for that many bytes and operations."""
        arithmetic = self.arithmetic(precision)
        computing = operations / arithmetic if arithmetic else 0.0
        return max(moved / (self.read_gbps * 1e9), computing)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def compiler() -> list[str] | None:
    """The C++ compiler of this machine, or None."""
    named = shlex.split(os.environ.get("CXX", ""))
    if named:
        return named if shutil.which(named[0]) else None
    found = [name for name in ("c++", "g++", "clang++") if shutil.which(name)]
    return found[:1] or None


def build(target: Path) -> str:
    """Compile the loops.

    Returns:
        Nothing, or why there are none.
    """
    if platform.machine() not in {"x86_64", "AMD64"}:
        return f"peaks.cc is for x86-64, this is {platform.machine()}"
    found = compiler()
    if found is None:
        return "no C++ compiler here: set CXX, or install g++"
    command = [*found, "-O2", "-std=c++17", "-pthread", str(SOURCE), "-o", str(target)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode:
        lines = made.stderr.strip().splitlines() or ["no message"]
        return f"{found[0]} could not compile peaks.cc: {lines[0]}"
    return ""


def rates(program: Path, threads: int, seconds: float = SECONDS) -> dict[str, float]:
    """Instruction set -> 1e9 operations/s; the best of three runs."""
    best: dict[str, float] = {}
    for _ in range(3):
        command = [str(program), str(threads), str(seconds)]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        for line in out.splitlines():
            name, rate = line.rsplit(maxsplit=1)
            best[name] = max(best.get(name, 0.0), float(rate))
    return best


def measure(threads: int, mib: int = roofline.MIN_MIB, seconds: float = SECONDS) -> Limits:
    """The limits of this machine on that many threads."""
    limits = Limits(threads, roofline.peak_gbps(mib, 5, threads))
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "peaks"
        limits.note = build(program)
        if not limits.note:
            limits.gops = rates(program, threads, seconds)
            limits.gops_one = rates(program, 1, seconds)
    return limits


def as_text(limits: Limits) -> str:
    """For people."""
    lines = [f"read {limits.read_gbps:.1f} GB/s on {limits.threads} threads"]
    lines += [
        f"{name:<20}{limits.gops_one[name]:8.1f} GOP/s on 1 thread, {rate:8.1f} on {limits.threads}"
        for name, rate in limits.gops.items()
    ]
    return "\n".join([*lines, limits.note] if limits.note else lines)


if __name__ == "__main__":
    print(as_text(measure(roofline.thread_settings()[-1])))
