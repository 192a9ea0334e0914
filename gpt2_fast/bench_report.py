"""What `gpt2-fast bench` makes of its measurements: shares, stages, and the text for people."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from .bench_bytes import stage_bytes

if TYPE_CHECKING:
    from .config import GPT2Config

#: Name, start and end in microseconds of one kernel on the device.
Kernel: TypeAlias = "tuple[str, float, float]"

#: What a kernel's name holds, to the stage it is.
_STAGES = {
    "QkvEpilogue": "ln_qkv",
    "GeluEpilogue": "ln_fc_gelu",
    "ResidualEpilogue": "attn_proj",
    "attention_": "attention",
    "head_kernel": "ln_head",
    "parts_kernel": "sample",
    "sample_kernel": "sample",
    "embed_kernel": "embed",
}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest, largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def busy_time(kernels: Iterable[Kernel]) -> float:
    """Microseconds in which at least one kernel ran: they may overlap (programmatic launch)."""
    total, until = 0.0, float("-inf")
    for _, start, stop in sorted(kernels, key=lambda kernel: kernel[1]):
        total += max(0.0, stop - max(start, until))
        until = max(until, stop)
    return total


def stages_of(kernels: Iterable[Kernel]) -> list[tuple[str, float, float]]:
    """Stage of each kernel, its own microseconds, and those from the end of the one before it.

    The latter add up to the whole, also where a kernel starts before the one before it ends
    (programmatic launch); gaps count for the kernel behind them.
    """
    found: list[tuple[str, float, float]] = []
    before: float | None = None
    mixed = True  # of the two products with a residual, the one behind attention
    for name, start, stop in sorted(kernels, key=lambda kernel: kernel[2]):
        stage = next((s for part, s in _STAGES.items() if part in name), "other")
        if stage == "attention":
            mixed = True
        elif stage == "attn_proj" and not mixed:
            stage = "mlp_proj"
        elif stage == "attn_proj":
            mixed = False
        found.append((stage, stop - start, stop - (start if before is None else before)))
        before = stop
    return found


def stage_table(
    kernels: Iterable[Kernel],
    config: GPT2Config,
    precision: str,
    *,
    steps: int,
    positions: float,
    batch: int,
) -> list[dict[str, Any]]:
    """One entry per stage of a decode step: how often, how long, how many bytes a second."""
    known = stage_bytes(config, precision, positions, batch)
    groups: dict[str, list[tuple[float, float]]] = {}
    for stage, own, since in stages_of(kernels):
        groups.setdefault(stage, []).append((own, since))
    table = []
    for stage, times in groups.items():
        since = statistics.median(each for _, each in times)
        moved = known.get(stage)
        table.append(
            {
                "stage": stage,
                "per_step": len(times) / steps,
                "own_us": statistics.median(own for own, _ in times),
                "since_last_us": since,
                "step_us": sum(each for _, each in times) / steps,
                "bytes": moved,
                "gbps": moved / since / 1e3 if moved and since > 0 else None,
            }
        )
    return table


def as_markdown(result: dict[str, Any]) -> str:
    """The whole report."""
    parts = [_heading(result), _decode(result), _stages(result), _ops(result), _checks(result)]
    left_out = [f"- {name}: {why}" for name, why in result["left_out"].items()]
    if left_out:
        parts.append("## Left out\n\n" + "\n".join(left_out))
    return "\n\n".join(part for part in parts if part) + "\n"


def _heading(result: dict[str, Any]) -> str:
    case, copied = result["case"], result["copy_gbps"]
    bandwidth = "unknown" if copied is None else f"{copied:.0f} GB/s"
    return (
        f"# gpt2-fast bench: {case['model']} on {result['device']}\n\n"
        f"Random weights, greedy; {result['bandwidth_of']}: {bandwidth}. Tokens/s are all "
        f"sequences together, median (min-max) of {case['rounds']} interleaved rounds of "
        f"{case['steps']} steps; a step ends with its tokens on the host. {result['software']}."
    )


def _decode(result: dict[str, Any]) -> str:
    rows = [
        [
            str(entry["batch"]),
            str(entry["position"]),
            entry["runner"],
            entry["precision"],
            _span(entry["tokens_per_s"], 1),
            f"{entry['step_us']['median']:.1f}",
            f"{entry['gbps']['median']:.1f}",
            _percent(entry["gbps"]["median"], result["copy_gbps"]),
            "" if entry["first_is_faster_by"] is None else _span(entry["first_is_faster_by"], 2),
        ]
        for entry in result["decode"]
    ]
    columns = ["batch", "position", "engine", "precision", "tokens/s", "us/step", "GB/s"]
    return "## Decoding\n\n" + _table([*columns, "% of bandwidth", "the first is faster by"], rows)


def _stages(result: dict[str, Any]) -> str:
    parts = []
    for profile in result["stages"]:
        rows = [
            [
                entry["stage"],
                f"{entry['per_step']:g}",
                f"{entry['own_us']:.2f}",
                f"{entry['since_last_us']:.2f}",
                f"{entry['step_us']:.1f}",
                "" if entry["bytes"] is None else f"{entry['bytes'] / 1e6:.2f}",
                "" if entry["gbps"] is None else f"{entry['gbps']:.0f}",
                _percent(entry["gbps"], result["copy_gbps"]),
            ]
            for entry in profile["table"]
        ]
        columns = ["stage", "per step", "own us", "us since the one before", "us a step", "MB"]
        parts.append(
            f"### {profile['precision']}, batch {profile['batch']}, position "
            f"{profile['position']}\n\n" + _table([*columns, "GB/s", "% of bandwidth"], rows)
        )
    return "## Stages of a decode step\n\n" + "\n\n".join(parts) if parts else ""


def _ops(result: dict[str, Any]) -> str:
    rows = [
        [
            entry["op"],
            entry["shape"],
            entry["precision"],
            f"{entry['gpt2_fast_us']:.2f}",
            f"{entry['torch_us']:.2f}" if "torch_us" in entry else "",
            _rate(entry["bytes"], entry["gpt2_fast_us"]),
        ]
        for entry in result["ops"]
    ]
    columns = ["op", "shape", "precision", "gpt2_fast us", "torch us", "GB/s"]
    return "## Ops, time on the device\n\n" + _table(columns, rows) if rows else ""


def _checks(result: dict[str, Any]) -> str:
    rows = [
        [
            entry["op"],
            entry["shape"],
            entry["precision"],
            "pass" if entry["passed"] else "FAILED",
            f"{entry['error']:.1e}",
            f"{entry['bound']:.1e}",
        ]
        for entry in result["checks"]
    ]
    columns = ["op", "shape", "precision", "result", "error", "bound"]
    return "## Ops against float64\n\n" + _table(columns, rows) if rows else ""


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _span(value: dict[str, float], digits: int) -> str:
    return f"{value['median']:.{digits}f} ({value['min']:.{digits}f}-{value['max']:.{digits}f})"


def _percent(rate: float | None, whole: float | None) -> str:
    return "" if rate is None or not whole or math.isnan(whole) else f"{100 * rate / whole:.0f}"


def _rate(moved: float, microseconds: float) -> str:
    return "" if microseconds <= 0 else f"{moved / microseconds / 1e3:.0f}"
