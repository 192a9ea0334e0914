"""`gpt2-fast doctor`: does every kernel compute right here, and how fast can this machine be?"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from . import terminal
from .bench_bytes import step_bytes
from .config import PUBLISHED
from .device import PRECISIONS

if TYPE_CHECKING:
    from .kernel_check import Case

_READ_BYTES = 512 << 20  # more than the caches of common processors hold
_READ_REPEATS = 8
_CONTEXT = 512  # tokens a predicted decode step attends to


def examine(cases: list[Case] | None = None) -> dict[str, Any]:
    """Check kernels, measure reading, predict speed.

    Args:
        cases: kernel calls to check; None is every one.

    Returns:
        What `gpt2-fast doctor --json` writes: `build`, `kernels` (one entry per op, precision and
        instruction set), `passed`, `read_bandwidth` in bytes per second, and `predictions`.
    """
    from . import _C
    from .info import build_facts
    from .kernel_check import check_kernels

    build = build_facts()
    findings = check_kernels(cases)
    memory = _C.available_memory()
    bytes_read = max(1 << 20, min(_READ_BYTES, memory // 4))
    bandwidth = _C.read_bandwidth(bytes_read, _C.available_threads(), _READ_REPEATS)
    return {
        "passed": all(finding.passed for finding in findings),
        "build": build,
        "kernels": [{**asdict(finding), "passed": finding.passed} for finding in findings],
        "read_bandwidth": bandwidth,
        "bytes_read": bytes_read,
        "predictions": predictions(bandwidth, memory),
    }


def predictions(bandwidth: float, memory: int) -> list[dict[str, Any]]:
    """Tokens a second at batch 1 that reading alone allows, and whether the model fits.

    Args:
        bandwidth: bytes a second.
        memory: bytes that are free.
    """
    from .model import plan

    found = []
    for name, config in PUBLISHED.items():
        for precision in PRECISIONS["cpu"]:
            needed = plan(config, precision=precision, max_batch=1).total
            read = step_bytes(config, precision, _CONTEXT, 1)
            found.append(
                {
                    "model": name,
                    "precision": precision,
                    "context": _CONTEXT,
                    "bytes_per_token": read,
                    "tokens_per_second": bandwidth / read,
                    "memory": needed,
                    "fits": needed <= memory,
                }
            )
    return found


def write_report(report: dict[str, Any]) -> None:
    """Write a report of `examine` for people."""
    build = report["build"]
    terminal.line("Largest error of each kernel against numpy in float64, and the bound:")
    terminal.table(["kernel", "precision", "result", "error", "bound"], _rows(report), left=3)
    isas = " ".join(build["isas"])
    bits = all(kernel["same_bits"] for kernel in report["kernels"])
    speed = f"{report['read_bandwidth'] / 1e9:.1f} GB/s with {build['threads']} threads"
    terminal.pairs(
        [
            ("instruction sets", f"{isas}; in use: {build['isa']}"),
            ("bits", f"{'the same' if bits else 'DIFFERENT'} on each of them and for 1 thread"),
            ("memory reads", f"{speed} ({terminal.size(report['bytes_read'])}, best of several)"),
            ("memory available", terminal.size(build["memory_available"])),
        ]
    )
    terminal.line(f"\nWhat reading allows at most, batch 1, {_CONTEXT} tokens of context:")
    terminal.table(
        ["model", "precision", "fits", "memory", "read per token", "tokens/s"],
        [
            [
                each["model"],
                each["precision"],
                "yes" if each["fits"] else "no",
                terminal.size(each["memory"]),
                terminal.size(each["bytes_per_token"]),
                f"{each['tokens_per_second']:.1f}",
            ]
            for each in report["predictions"]
        ],
        left=3,
    )
    failed = sum(not kernel["passed"] for kernel in report["kernels"])
    terminal.line("every kernel passed" if report["passed"] else f"{failed} checks FAILED")


def _rows(report: dict[str, Any]) -> list[list[str]]:
    """A row for each kernel and precision: its worst instruction set."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for kernel in report["kernels"]:
        groups.setdefault((kernel["op"], kernel["precision"]), []).append(kernel)
    rows = []
    for (op, precision), group in groups.items():
        worst = max(group, key=_excess)
        failing = [kernel["isa"] for kernel in group if not kernel["passed"]]
        result = f"FAILED on {' '.join(failing)}" if failing else "pass"
        rows.append([op, precision, result, f"{worst['error']:.1e}", f"{worst['bound']:.1e}"])
    return rows


def _excess(kernel: dict[str, Any]) -> float:
    error, bound = kernel["error"], kernel["bound"]
    if not error <= bound:  # NaN too
        return float("inf")
    return float(error / bound) if bound else 0.0
