"""How fast this machine reads memory: the limit that every decode step is measured against.

    python benchmarks/roofline.py [--mib 1024] [--threads 1 2] [--repeats 9] [--json FILE]

`read` is `gpt2_fast._C.read_bandwidth`: each thread sums its own contiguous part of one buffer, the
way the engine reads weights. The buffer is far larger than any cache. The copies are a cross-check
by other people's code: they count bytes read plus bytes written; what a processor reads in order to
write a cache line is not counted, so they stay below `read`.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_fast import _C

MIB = 1 << 20
MIN_MIB = 512  # below it the cache of a large server still answers


def thread_settings(most: int | None = None) -> list[int]:
    """1 and all threads: the two settings worth trying for anything bound by memory."""
    return sorted({1, most or _C.available_threads()})


def read_gbps(mib: int, threads: Sequence[int], repeats: int) -> dict[int, float]:
    """Best of `repeats` reads of a buffer of `mib` MiB, in GB/s, for each number of threads."""
    return {count: _C.read_bandwidth(mib * MIB, count, repeats) / 1e9 for count in threads}


def peak_gbps(mib: int = MIN_MIB, repeats: int = 5, threads: int | None = None) -> float:
    """Best read bandwidth in GB/s over 1 and `threads` threads (default: all there are)."""
    return max(read_gbps(mib, thread_settings(threads), repeats).values())


def _best_gbps(copy: Callable[[], object], moved: int, repeats: int) -> float:
    best = float("inf")
    for _ in range(repeats + 1):  # the first touches the destination's pages
        start = time.perf_counter()
        copy()
        best = min(best, time.perf_counter() - start)
    return moved / best / 1e9


def copy_gbps(mib: int, threads: Sequence[int], repeats: int) -> dict[str, float]:
    """Read plus written GB/s of numpy's copy (one thread) and torch's, where it is installed."""
    tile = np.random.default_rng(0).standard_normal(4 * MIB, dtype=np.float32)  # 16 MiB
    source = np.tile(tile, max(1, mib // 16))
    target = np.empty_like(source)
    moved = 2 * source.nbytes
    rates = {"numpy, 1 thread": _best_gbps(lambda: np.copyto(target, source), moved, repeats)}
    if find_spec("torch") is not None:
        import torch

        before = torch.get_num_threads()
        ours, theirs = torch.from_numpy(target), torch.from_numpy(source)
        for count in threads:
            torch.set_num_threads(count)
            name = f"torch, {count} thread{'s' * (count > 1)}"
            rates[name] = _best_gbps(lambda: ours.copy_(theirs), moved, repeats)
        torch.set_num_threads(before)
    return rates


def machine() -> dict[str, Any]:
    """What a reader needs to know about where numbers come from."""
    build = _C.build_info()
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip()
            for line in cpuinfo.read_text().splitlines()
            if line.startswith("model name")
        ]
        model = names[0] if names else model
    versions = {}
    for package in ("numpy", "torch", "transformers"):
        if find_spec(package) is not None:
            versions[package] = metadata.version(package)
    return {
        "cpu": model,
        "threads": _C.available_threads(),
        "isa": _C.default_isa(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "gpt2_fast": build["version"],
        "compiler": build["compiler"],
        "build_type": build["build_type"],
        **versions,
    }


def measure(mib: int, threads: Sequence[int], repeats: int) -> dict[str, Any]:
    """Everything this script reports, in GB/s (1e9 bytes)."""
    read = read_gbps(mib, threads, repeats)
    return {
        "machine": machine(),
        "buffer_mib": mib,
        "read_gbps": {str(count): round(rate, 2) for count, rate in read.items()},
        "peak_gbps": round(max(read.values()), 2),
        "copy_gbps": {
            name: round(r, 2) for name, r in copy_gbps(mib // 2, threads, repeats).items()
        },
    }


def as_text(result: dict[str, Any]) -> str:
    """The result for people."""
    about = result["machine"]
    lines = [f"{about['cpu']}, {about['threads']} threads, {result['buffer_mib']} MiB"]
    for count, rate in result["read_gbps"].items():
        label = f"read, {count} thread{'s' * (count != '1')}"
        lines.append(f"{label:<24}{rate:8.1f} GB/s")
    for name, rate in result["copy_gbps"].items():
        lines.append(f"{'copy, ' + name:<24}{rate:8.1f} GB/s read + written")
    lines.append(f"{'peak':<24}{result['peak_gbps']:8.1f} GB/s")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Read bandwidth of this machine.")
    parser.add_argument("--mib", type=int, default=1024, help="buffer size, at least 512")
    parser.add_argument("--threads", type=int, nargs="+", default=thread_settings())
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    options = parser.parse_args(arguments)
    if options.mib < MIN_MIB:
        parser.error(f"--mib must be at least {MIN_MIB}, got {options.mib}")
    if options.repeats < 1 or min(options.threads) < 1:
        parser.error("--repeats and --threads must be at least 1")
    result = measure(options.mib, options.threads, options.repeats)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    print(as_text(result))


if __name__ == "__main__":
    main()
