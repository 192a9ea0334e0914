"""Pictures of the results, as PNG files; matplotlib comes with the extra `peers`."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

#: (x, median, smallest, largest) of every point of a line.
Line = list[tuple[float, float, float, float]]


def missing() -> str | None:
    """Why there are no pictures, or None."""
    if find_spec("matplotlib") is None:
        return "no plots: matplotlib is not installed (pip install '.[peers]')"
    return None


def _figure(title: str, x: str, y: str) -> tuple[Any, Any]:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(visible=True, alpha=0.3)
    return figure, axes


def _save(figure: Any, target: Path) -> Path:
    from matplotlib import pyplot as plt

    figure.savefig(target, dpi=120)
    plt.close(figure)
    return target


def lines(
    target: Path,
    title: str,
    x: str,
    y: str,
    series: Mapping[str, Line],
    *,
    limit: Sequence[tuple[float, float]] = (),
    log_x: bool = False,
) -> Path:
    """One line a series with the range of its rounds; `limit` is drawn dashed."""
    figure, axes = _figure(title, x, y)
    for name, points in series.items():
        xs, middle, low, high = (list(column) for column in zip(*sorted(points), strict=True))
        below = [m - a for m, a in zip(middle, low, strict=True)]
        above = [b - m for m, b in zip(middle, high, strict=True)]
        axes.errorbar(xs, middle, yerr=[below, above], marker="o", capsize=3, label=name)
    if limit:
        xs, ys = (list(column) for column in zip(*sorted(limit), strict=True))
        axes.plot(xs, ys, linestyle="--", color="black", label="limit of this machine")
    if log_x:
        axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")
    return _save(figure, target)


def roofline(
    target: Path,
    title: str,
    read_gbps: float,
    gops: Mapping[str, float],
    points: Mapping[str, Sequence[tuple[float, float]]],
) -> Path:
    """Operations a second against operations per byte read, under the limits of the machine."""
    figure, axes = _figure(title, "operations per byte read", "10^9 operations/s")
    every = [x for line in points.values() for x, _ in line] or [1.0]
    left, right = min(every) / 2, max([*every, *(rate / read_gbps for rate in gops.values())]) * 2
    top = max(gops.values(), default=read_gbps * right)
    knee = min(right, top / read_gbps)
    axes.plot([left, knee], [left * read_gbps, knee * read_gbps], color="black")
    for name, rate in gops.items():
        axes.plot([min(right, rate / read_gbps), right], [rate, rate], color="grey", linewidth=1)
        axes.annotate(name, (right, rate), fontsize="x-small", ha="right", va="bottom")
    for name, line in points.items():
        axes.scatter([x for x, _ in line], [y for _, y in line], label=name, s=24)
    axes.set(xscale="log", yscale="log")
    axes.legend(fontsize="small")
    return _save(figure, target)
