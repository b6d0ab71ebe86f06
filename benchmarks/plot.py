"""Figures, drawn from the raw result of a benchmark alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.benchmark import Result


def plot(result: Result, file: Path) -> None:
    """Draw the result of one of the `PLOTTED` benchmarks; the file's ending decides the format."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    PLOTTED[result["benchmark"]](figure.add_subplot(), result)
    # A figure that differs only where its data does can be kept under version control.
    figure.savefig(file, dpi=120, metadata={"Date": None} if file.suffix == ".svg" else None)


def _replica(axes: Axes, result: Result) -> None:
    for curve in result["curves"]:
        steps, losses = zip(*curve["truth"], strict=True)
        name = curve["guard"] if curve["faulty"] else "clean twin"
        style = "-" if curve["faulty"] else ":"
        axes.plot(steps, [math.nan if y is None else y for y in losses], style, label=name, linewidth=1)
    axes.axvspan(120, 129, alpha=0.15, color="black")
    axes.set(yscale="log", xlabel="step", ylabel="true loss (nats), seed 0")
    axes.legend(fontsize="small")


def _recovery(axes: Axes, result: Result) -> None:
    harms = {
        guard: math.fsum(case["guards"][guard]["lost_steps"] for case in result["cases"]) / len(result["cases"])
        for guard in result["guards"]
    }
    names = sorted(harms, key=lambda guard: -harms[guard])
    axes.barh(["no guard" if name == "none" else name for name in names], [harms[name] for name in names])
    axes.set(xlabel="harm per run: steps' worth of an untrained model")


_COLOURS = colormaps["tab20"]


def _organic(axes: Axes, result: Result) -> None:
    names = [name for name, harmful in result["harmful"].items() if harmful]
    guards = [guard for guard in result["guards"] if guard != "none"]
    width = 0.8 / max(len(guards), 1)
    for place, guard in enumerate(guards):
        values = []
        for name in names:
            cases = [c["area_over_bare"] for c in result["cases"] if c["name"] == name and c["guard"] == guard]
            values.append(math.fsum(cases) / len(cases))
        axes.bar([i + place * width for i in range(len(names))], values, width, label=guard, color=_COLOURS(place))
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks([i + 0.4 - width / 2 for i in range(len(names))], names, rotation=30, ha="right")
    axes.set(ylabel="mean true loss over the bare run's")
    axes.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1, 1))


#: How a benchmark is drawn, by its name.
PLOTTED: dict[str, Callable[[Axes, Result], None]] = {
    "replica": _replica,
    "recovery": _recovery,
    "organic": _organic,
}
