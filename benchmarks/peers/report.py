"""The comparison as Markdown and as pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks import plots
from benchmarks.peers import OURS, find
from benchmarks.turns import BUSY, row, span

if TYPE_CHECKING:
    from pathlib import Path

PROTOCOL = (
    "Random weights, the same prompts and token counts for all, greedy, each engine in a process "
    "of its own at the best of its settings. Bytes and operations are those of an engine's own "
    "format; the limit is the longer of bytes at the read bandwidth and operations at the peak "
    "arithmetic, both measured in the same run."
)
COLUMNS = (
    "engine",
    "best setting",
    "tokens/s",
    "GB/s",
    "% of read bandwidth",
    "GFLOP/s",
    "% of peak arithmetic",
    "% of the limit",
    "gpt2_fast is faster by",
    "same tokens",
)


def as_markdown(result: dict[str, Any]) -> str:
    """Every table, and what one must know to read them."""
    about = result["machine"]
    layers = f", first {result['layers']} layers" if result["layers"] else ""
    where = (
        f"{about['cpu']}, {result['threads']} threads, {about['system']}; "
        f"median (smallest-largest) of {result['rounds']} interleaved rounds. {PROTOCOL}"
    )
    lines = [f"# GPT-2 {result['model']}{layers}: gpt2_fast and other engines", "", where]
    for one in result["precisions"]:
        lines += ["", f"## {one['precision']}", ""]
        lines += _formats(one)
        for case in one["cases"]:
            lines += ["", f"### {one['precision']}, {case['name']}", "", *_case(case)]
        lines += _starts(one)
        if one["left_out"]:
            lines += ["", "Left out:", ""]
            lines += [f"- {name}: {reason}" for name, reason in one["left_out"].items()]
    return "\n".join(lines) + "\n"


def _formats(one: dict[str, Any]) -> list[str]:
    lines = [row(("engine", "version", "weights", "logit error")), row(["---"] * 4)]
    for engine, versions in one["versions"].items():
        peer = find(engine)
        error = one["logit_errors"].get(engine)
        named = ", ".join(f"{name} {version}" for name, version in versions.items())
        cells = [peer.LABEL, named, peer.PRECISIONS[one["precision"]].what]
        lines.append(row([*cells, "" if error is None else f"{error:.1e}"]))
    return lines


def _limits(case: dict[str, Any]) -> str:
    limits = case["limits"]
    read = f"Limits in this case: read {limits['read_gbps']:.1f} GB/s"
    arithmetic = "; ".join(f"{name} {rate:.0f}" for name, rate in limits["gops"].items())
    return f"{read}; GOP/s: {arithmetic}." if arithmetic else f"{read}; {limits['note']}."


def _percent(value: dict[str, float] | None) -> str:
    return span({name: 100 * v for name, v in value.items()}, 0) if value else "-"


def _case(case: dict[str, Any]) -> list[str]:
    lines = [_limits(case), "", row(COLUMNS), row(["---"] * len(COLUMNS))]
    for one in sorted(case["engines"], key=lambda e: -e["tokens_per_s"]["median"]):
        name = f"**{one['label']}**" if one["engine"] == OURS else one["label"]
        faster, same = one["ours_is_faster_by"], one["same_tokens"]
        cells = [
            name,
            one["setting"],
            span(one["tokens_per_s"], 1),
            span(one["gbps"], 1),
            _percent(one["of_bandwidth"]),
            span(one["gflops"], 1),
            _percent(one["of_arithmetic"]),
            _percent(one["of_limit"]),
            span(faster, 2) + "x" if faster else "",
            "" if same is None else f"{100 * same:.0f} %",
        ]
        lines.append(row(cells))
    notes = _notes(case)
    return [*lines, "", *notes] if notes else lines


def _notes(case: dict[str, Any]) -> list[str]:
    """What else a reader must know, one line for each kind."""
    engines = case["engines"]
    notes = [f"- {engine} failed: {reason}" for engine, reason in case["failed"].items()]
    notes += [
        f"- {one['label']} DISAGREES: {one['disagrees']}" for one in engines if "disagrees" in one
    ]
    agreeing: dict[str, list[str]] = {}
    for one in engines:
        if "agreement" in one:
            agreeing.setdefault(one["agreement"], []).append(one["label"])
    notes += [f"- {', '.join(labels)}: {words}" for words, labels in agreeing.items()]
    changing = [one["label"] for one in engines if not one["repeatable"]]
    if changing:
        notes.append(f"- other tokens in another round: {', '.join(changing)}")
    others = max((one["others"] for one in engines), default=0.0)
    if others > BUSY:
        notes.append(
            f"- other processes took up to {100 * others:.0f} % of this machine during a run: "
            "measure again when it is quiet"
        )
    return notes


def _starts(one: dict[str, Any]) -> list[str]:
    if not one["starts"]:
        return []
    columns = (
        "engine",
        "first token s",
        "of it loading s",
        "peak MB, short",
        "peak MB, full context",
    )
    title = f"### {one['precision']}, cold start and memory"
    lines = ["", title, "", row(columns), row(["---"] * len(columns))]
    for engine, figures in one["starts"].items():
        memory = [
            span({k: v / 1e6 for k, v in figures[name].items()}, 0)
            for name in ("rss_short", "rss_full")
        ]
        times = [span(figures[name], 2) for name in ("first_token_s", "load_s")]
        lines.append(row([find(engine).LABEL, *times, *memory]))
    return lines


def draw(result: dict[str, Any], folder: Path) -> list[Path]:
    """tokens/s by context and by batch, and the roofline, of each precision."""
    made = []
    for one in result["precisions"]:
        stem = f"{result['model']}-{one['precision']}"
        title = f"GPT-2 {result['model']}, {one['precision']}, {result['machine']['cpu']}"
        decoding = [case for case in one["cases"] if case["new"] > 1]
        single = [case for case in decoding if case["batch"] == 1]
        short = min((case["context"] for case in decoding), default=0)
        together = [case for case in decoding if case["context"] == short]
        prompts = [case for case in one["cases"] if case["new"] == 1]
        for name, x, cases, key in (
            ("context", "positions before the first token", single, "context"),
            ("batch", "texts at the same time", together, "batch"),
            ("prompt", "tokens of the prompt", prompts, "context"),
        ):
            series = _series(cases, key)
            if series:
                target = folder / f"{stem}-{name}.png"
                made.append(plots.lines(target, title, x, "tokens/s", series))
        points = _points(one["cases"])
        if points:
            limits = one["cases"][0]["limits"]
            target = folder / f"{stem}-roofline.png"
            made.append(plots.roofline(target, title, limits["read_gbps"], limits["gops"], points))
    return made


def _series(cases: list[dict[str, Any]], key: str) -> dict[str, plots.Line]:
    series: dict[str, plots.Line] = {}
    for case in cases:
        for one in case["engines"]:
            rate = one["tokens_per_s"]
            point = (case[key], rate["median"], rate["min"], rate["max"])
            series.setdefault(one["label"], []).append(point)
    return series


def _points(cases: list[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    points: dict[str, list[tuple[float, float]]] = {}
    for case in cases:
        for one in case["engines"]:
            point = (one["operations"] / one["bytes"], one["gflops"]["median"])
            points.setdefault(one["label"], []).append(point)
    return points


def disagreements(result: dict[str, Any]) -> list[str]:
    """Engines whose fp32 tokens cannot both be right, in words."""
    return [
        f"{one['label']}, {case['name']}: {one['disagrees']}"
        for precision in result["precisions"]
        for case in precision["cases"]
        for one in case["engines"]
        if "disagrees" in one
    ]
