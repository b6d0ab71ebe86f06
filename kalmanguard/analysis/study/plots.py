"""Figures of the study, from its rows alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kalmanguard.analysis.study.detectors import FAMILIES
from kalmanguard.analysis.study.tables import Row
from kalmanguard.detectors.damping import DRIFT, SNAP

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which people with any colour vision can tell apart; markers differ as well.
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#E69F00", "#56B4E9", "#CC79A7", "#8C564B", "#000000")
_MARKERS = "osD^vP*X"
_LOOKS = dict(zip(FAMILIES, zip(_COLOURS, _MARKERS, strict=True), strict=True))
#: Delays above this are drawn at the edge, with those that are infinite; rates below the other one as well.
_LATEST, _RAREST = 150.0, 0.01


def draw(path: Path, size: tuple[float, float], fill: Callable[[Figure], None]) -> None:
    """Draw a figure into a PNG file."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=size, dpi=110, layout="constrained")
        FigureCanvasAgg(figure)
        fill(figure)
        figure.savefig(path)


def ratio(figure: Figure, rows: Sequence[Row]) -> None:
    """The jerk ratio of one mode against its learning rate."""
    axes = figure.subplots()
    for momentum, colour in zip(dict.fromkeys(row["momentum"] for row in rows), _COLOURS, strict=False):
        points = [(row["share"], row["ratio"]) for row in rows if row["momentum"] == momentum]
        axes.plot(*zip(*points, strict=True), color=colour, label=f"momentum {momentum:g}")
    for level, text in ((DRIFT, "0.707, “drift”"), (SNAP, "1.414, “snap”")):
        axes.axhline(level, color="#444444", linewidth=1, linestyle=(0, (5, 3)))
        axes.annotate(text, (1.0, level), xytext=(-4, 3), textcoords="offset points", ha="right", color="#444444")
    axes.set(xlabel="learning rate, as a share of the limit 2 (1 + β) / λ", ylabel="jerk / acceleration", ylim=(0, 2.1))
    axes.set_xlim(0, 1)
    axes.legend(frameon=False, loc="lower right")


def delays(figure: Figure, rows: Sequence[Row], groups: Sequence[str]) -> None:
    """Median delay against the rate of false alarms, a panel for each group."""
    for axes, group in zip(_panels(figure, len(groups)), groups, strict=True):
        _curves(axes, [row for row in rows if row["group"] == group], lambda row: min(row["delay"], _LATEST))
        axes.set(title=group, ylim=(-25, _LATEST * 1.05), ylabel="median delay, steps")
        axes.set_yticks([0, 50, 100, _LATEST], ["0", "50", "100", f"{_LATEST:g}+"])
    _legend(figure)


def warnings_in_time(figure: Figure, rows: Sequence[Row], groups: Sequence[str]) -> None:
    """Share of harmed runs that were warned in time against the rate of false alarms, a panel for each group."""
    for axes, group in zip(_panels(figure, len(groups)), groups, strict=True):
        chosen = [row for row in rows if row["group"] == group]
        # An alarm before the change warns of nothing: such runs count as missed.
        _curves(axes, chosen, lambda row: row["in_time"] / row["unstable"] if row["unstable"] else math.nan)
        axes.set(title=group, ylim=(-0.03, 1.03), ylabel="warned no later than harm")
    _legend(figure)


def estimators(figure: Figure, rows: Sequence[Row]) -> None:
    """Median and 10 to 90 % range of the estimated damping ratio by signal-to-noise ratio."""
    names = list(dict.fromkeys(row["estimator"] for row in rows))
    zetas = list(dict.fromkeys(row["zeta"] for row in rows))
    panels = figure.subplots(1, len(zetas), sharey=True, squeeze=False)[0]
    for axes, zeta in zip(panels, zetas, strict=True):
        chosen = [row for row in rows if row["zeta"] == zeta]
        snrs = list(dict.fromkeys(row["snr"] for row in chosen))
        axes.axhline(zeta, color="#444444", linewidth=1, linestyle=(0, (5, 3)))
        for place, (name, colour, marker) in enumerate(zip(names, _COLOURS, _MARKERS, strict=False)):
            mine = {row["snr"]: row for row in chosen if row["estimator"] == name}
            x = [snrs.index(snr) + 0.18 * (place - (len(names) - 1) / 2) for snr in mine]
            low, y, high = ([row[key] for row in mine.values()] for key in ("low", "median", "high"))
            bars = [[m - b for m, b in zip(y, low, strict=True)], [b - m for m, b in zip(y, high, strict=True)]]
            axes.errorbar(x, y, bars, fmt=marker, color=colour, markersize=5, linewidth=1.2, label=name)
        axes.set_xticks(range(len(snrs)), ["∞" if math.isinf(snr) else f"{snr:g}" for snr in snrs])
        axes.set(title=f"true ζ = {zeta:g}", xlabel="signal-to-noise ratio (power)")
    panels[0].set_ylabel("estimated ζ")
    panels[0].legend(frameon=False, loc="lower left", fontsize=8)


def edge(figure: Figure, rows: Sequence[Row]) -> None:
    """What full-batch training shows on its way to the edge of stability and there."""
    shown: tuple[tuple[str, Callable[[Row], float], float], ...] = (
        ("sharpness / edge", lambda row: row["sharpness"], 1.0),
        ("|z|, estimate", lambda row: row["pole, estimate"], 1.0),
        ("mean cosine", lambda row: -row["alternation"], -0.5),
        ("jerk / acceleration", lambda row: row["jerk ratio"], SNAP),
    )
    recipes = list(dict.fromkeys(row["recipe"] for row in rows))
    panels = figure.subplots(len(shown), len(recipes), sharex=True, sharey="row", squeeze=False)
    for column, recipe in enumerate(recipes):
        mine = [row for row in rows if row["recipe"] == recipe]
        for axes, (name, of, level) in zip(panels[:, column], shown, strict=True):
            for seed, colour in zip(dict.fromkeys(row["seed"] for row in mine), cycle(_COLOURS)):
                points = [(row["step"], of(row)) for row in mine if row["seed"] == seed]
                axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.1)
            axes.axhline(level, color="#444444", linewidth=1, linestyle=(0, (5, 3)))
            if column == 0:
                axes.set_ylabel(name)
        panels[1, column].set_ylim(0.85, 1.05)
        panels[0, column].set_title(recipe)
        panels[-1, column].set_xlabel("step")


def _panels(figure: Figure, count: int) -> list[Axes]:
    columns = min(count, 2) if count != 5 else 3
    panels = figure.subplots(math.ceil(count / columns), columns, sharex=True, sharey=True, squeeze=False).ravel()
    for spare in panels[count:]:
        spare.set_axis_off()
    return list(panels[:count])


def _curves(axes: Axes, rows: Sequence[Row], of: Callable[[Row], float]) -> None:
    for family, (colour, marker) in _LOOKS.items():
        # In the order of their thresholds; where most runs were alarmed before anything happened, a delay says nothing.
        points = [
            (max(row["per_1000"], _RAREST), of(row))
            for row in rows
            if row["family"] == family and "per_1000" in row and 2 * row["early"] <= row["unstable"]
        ]
        points = [(x, y) for x, y in points if not math.isnan(y)]
        if points:
            look: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1.1, "alpha": 0.85}
            axes.plot(*zip(*points, strict=True), **look)
    axes.set_xscale("log")
    axes.set_xlabel("false alarms per 1,000 steps")


def _legend(figure: Figure) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=c, marker=m, markersize=5, label=family) for family, (c, m) in _LOOKS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
