"""Our scaling figures as Markdown and as pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks import plots
from benchmarks.turns import BUSY, row, span

if TYPE_CHECKING:
    from pathlib import Path

#: Sweep -> what varies, and the axis of its picture.
AXES = {
    "context": ("context", "positions before the step"),
    "prompt": ("prompt", "tokens of the prompt"),
    "batch": ("batch", "texts at the same time"),
    "threads": ("threads", "threads"),
    "size": ("million parameters", "million parameters"),
}
COLUMNS = ("ms", "limit ms", "% of the limit", "tokens/s", "GB/s", "GFLOP/s")


def as_markdown(result: dict[str, Any]) -> str:
    """Every table, and what one must know to read them."""
    about = result["machine"]
    layers = f" First {result['layers']} layers only." if result["layers"] else ""
    where = (
        f"{about['cpu']}, {result['threads']} threads, {about['system']}. Random weights, greedy; "
        f"means of {result['steps']} steps, median (smallest-largest) of {result['rounds']} "
        "rounds. The limit is the longer of bytes at the read bandwidth and operations at the "
        f"peak arithmetic, both measured in the same run.{layers}"
    )
    lines = ["# gpt2_fast: how cost grows", "", where]
    if result["others"] > BUSY:
        busy = f"Other processes took {100 * result['others']:.0f} % of this machine meanwhile: "
        lines += ["", busy + "measure again when it is quiet."]
    for sweep in result["sweeps"]:
        lines += ["", f"## {sweep['model']}, {sweep['precision']}, by {sweep['name']}", ""]
        lines += _sweep(sweep)
    lines += ["", "## Memory against plan()", "", *_memory(result["memory"])]
    return "\n".join(lines) + "\n"


def _sweep(sweep: dict[str, Any]) -> list[str]:
    columns = (AXES[sweep["name"]][0], *COLUMNS)
    lines = [row(columns), row(["---"] * len(columns))]
    for point in sweep["points"]:
        share = {name: 100 * value for name, value in point["of_limit"].items()}
        cells = [
            f"{point['x']:g}",
            span(point["ms"], 2),
            f"{point['limit_ms']:.2f}",
            span(share, 0),
            span(point["tokens_per_s"], 1),
            span(point["gbps"], 1),
            span(point["gflops"], 1),
        ]
        lines.append(row(cells))
    limits = sweep["points"][-1]["limits"]
    arithmetic = "; ".join(f"{name} {rate:.0f}" for name, rate in limits["gops"].items())
    which = f"Limits of the last line: read {limits['read_gbps']:.1f} GB/s; "
    return [*lines, "", which + (f"GOP/s: {arithmetic}." if arithmetic else f"{limits['note']}.")]


def _memory(rows: list[dict[str, Any]]) -> list[str]:
    columns = ("model", "precision", "sequences", "plan MB", "taken MB", "difference MB", "equal")
    lines = [row(columns), row(["---"] * len(columns))]
    for one in rows:
        difference = one["filled"] - one["plan"]
        cells = [
            one["model"],
            one["precision"],
            str(one["batch"]),
            f"{one['plan'] / 1e6:.1f}",
            f"{one['filled'] / 1e6:.1f}",
            f"{difference / 1e6:+.1f}",
            "yes" if one["as_planned"] else "NO",
        ]
        lines.append(row(cells))
    about = (
        "Taken: anonymous memory of a process, which had loaded and closed a tiny model, from "
        "before this one until the caches of all its sequences were full and every token scored."
    )
    return [*lines, "", about]


def draw(result: dict[str, Any], folder: Path) -> list[Path]:
    """tokens/s by what varies, every precision a line, the limit of each dashed."""
    made = []
    for sweep in result["sweeps"]:
        name, axis = sweep["name"], AXES[sweep["name"]][1]
        points = [
            (
                p["x"],
                p["tokens_per_s"]["median"],
                p["tokens_per_s"]["min"],
                p["tokens_per_s"]["max"],
            )
            for p in sweep["points"]
        ]
        limit = [(p["x"], 1e3 * p["tokens"] / p["limit_ms"]) for p in sweep["points"]]
        title = f"gpt2_fast {sweep['model']}, {sweep['precision']}, {result['machine']['cpu']}"
        target = folder / f"scaling-{sweep['precision']}-{name}.png"
        log_x = name in {"batch", "threads"}
        series = {"gpt2_fast": points}
        made.append(plots.lines(target, title, axis, "tokens/s", series, limit=limit, log_x=log_x))
    return made
