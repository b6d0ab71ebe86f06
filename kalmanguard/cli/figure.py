"""The demonstration's figure: what happened to the three runs, and what the supervisor saw."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kalmanguard.cli.story import CHANNELS, CLEAN, FAULTED, SUPERVISED, Point, Span, Story

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_Array = NDArray[np.float64]

# Okabe and Ito's palette, which people with any colour vision can tell apart; the styles differ as well.
_STYLE: dict[str, dict[str, Any]] = {
    CLEAN: {"color": "#444444", "linestyle": (0, (4, 2)), "linewidth": 1.3, "zorder": 3},
    FAULTED: {"color": "#D55E00", "linestyle": "-", "linewidth": 1.4, "zorder": 2},
    SUPERVISED: {"color": "#0072B2", "linestyle": "-", "linewidth": 1.8, "zorder": 4},
}
_CHANNEL_STYLE = {
    "loss": ("#0072B2", "o"),
    "gradient": ("#E69F00", "s"),
    "gain": ("#009E73", "^"),
    "buffers": ("#56B4E9", "v"),
    "trajectory": ("#CC79A7", "D"),
    "held-out loss": ("#000000", "o"),
}
_SPAN: dict[str, Any] = {"color": "#E69F00", "alpha": 0.22, "linewidth": 0, "zorder": 0}
_ROLLBACK, _VETO = "#7B3294", "#B8860B"
#: Held-out losses above this many times the first one are drawn at the edge.
_CEILING = 1.35
#: Innovations, in units of their bounds, that are drawn; what lies above is drawn at the edge.
_LEAST, _MOST = 0.03, 50.0
#: Height of a line of small print, in points.
_LINE = 12.0


def draw(story: Story, path: Path) -> None:
    """Draw the story into a PNG file."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context({"font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "none"}):
        figure = Figure(figsize=(10, 6.4), dpi=160, layout="constrained")
        FigureCanvasAgg(figure)
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(1.7, 1))
        figure.suptitle(_title(story), x=0.01, ha="left", fontsize=12, fontweight="bold")
        _losses(upper, story)
        _innovations(lower, story)
        lower.set_xlabel("training step")
        lower.set_xlim(0, story.steps * 1.005)
        figure.savefig(path)


def _title(story: Story) -> str:
    rollbacks = sum(event.action == "ROLLBACK" for event in story.events)
    vetoes = sum(event.action == "VETO" for event in story.events)
    counts = [f"{n} {word}{'s' if n > 1 else ''}" for n, word in ((rollbacks, "rollback"), (vetoes, "veto")) if n]
    done = " and ".join(counts).replace("vetos", "vetoes") or "no intervention"
    faults = f"{len(story.spans)} fault{'s' if len(story.spans) != 1 else ''}"
    return f"{story.plant}: {faults}, {done}"


def _losses(axes: Axes, story: Story) -> None:
    first = next((y for _, y in story.curves[CLEAN] if math.isfinite(y)), 1.0)
    finite = [y for curve in story.curves.values() for _, y in curve if math.isfinite(y)]
    logarithmic = min(finite, default=0.0) > 0
    top = _CEILING * first if logarithmic else max(first, 1e-9) * _CEILING
    low = min((*finite, first))
    bottom = low * 0.93 if logarithmic else low - 0.05 * (top - low)
    if logarithmic:
        axes.set_yscale("log")
        _plain_ticks(axes, bottom, top)
    axes.set_ylim(bottom, top)
    axes.set_ylabel("held-out loss" + (", log scale" if logarithmic else ""))
    rows = _spans(axes, story, labelled=True)
    ends = []
    for name, curve in story.curves.items():
        x, y = np.array(curve, dtype=np.float64).T
        edge = top * 0.985 if logarithmic else top - 0.015 * (top - bottom)
        drawn = np.where(np.isfinite(y), np.minimum(y, edge), np.nan)
        axes.plot(x, drawn, label=_name(story, name), **_STYLE[name])
        if (y[np.isfinite(y)] > edge).any():
            _beyond(axes, name, x, y, edge)
        lost = np.flatnonzero(~np.isfinite(y))
        if lost.size and lost[-1] == len(y) - 1:
            _dead(axes, name, x, drawn)
        elif len(y):
            ends.append((name, float(drawn[-1]), float(y[-1])))
    _end_labels(axes, story, ends, bottom, top, logarithmic=logarithmic)
    _interventions(axes, story)
    axes.legend(
        loc="lower left", bbox_to_anchor=(0.0, 1.0), borderaxespad=(4 + _LINE * rows) / 9, borderpad=0, ncols=5,
        frameon=False, fontsize=9, handlelength=1.8, columnspacing=1.4,
    )  # fmt: skip


def _beyond(axes: Axes, name: str, x: _Array, y: _Array, edge: float) -> None:
    """Mark what lies above the axes, and say how high it went."""
    beyond = np.flatnonzero(np.isfinite(y) & (y > edge))
    colour = _STYLE[name]["color"]
    highest = beyond[np.argmax(y[beyond])]
    axes.plot(x[highest], edge, "^", color=colour, markersize=6, zorder=5)
    axes.annotate(
        f"{y[highest]:.3g}", (x[highest], edge), xytext=(6, 1), textcoords="offset points", va="top", color=colour,
        fontsize=8.5,
    )  # fmt: skip


def _dead(axes: Axes, name: str, x: _Array, drawn: _Array) -> None:
    alive = np.flatnonzero(np.isfinite(drawn))
    if not alive.size:
        return
    last = alive[-1]
    colour = _STYLE[name]["color"]
    axes.plot(x[last], drawn[last], "X", color=colour, markersize=9, markeredgecolor="white", zorder=6)
    axes.annotate(
        f"not finite from step {x[min(last + 1, len(x) - 1)]:,.0f} on",
        (x[last], drawn[last]), xytext=(9, 0), textcoords="offset points", va="center", color=colour, fontsize=9,
    )  # fmt: skip


def _end_labels(
    axes: Axes, story: Story, ends: list[tuple[str, float, float]], bottom: float, top: float, *, logarithmic: bool
) -> None:
    """Write the last value of each curve beside its end, pushed apart where they would overlap."""

    def height(y: float) -> float:
        if logarithmic:
            return math.log(y / bottom) / math.log(top / bottom)
        return (y - bottom) / (top - bottom)

    at = -1.0
    for name, drawn, value in sorted(ends, key=lambda end: end[1]):
        at = max(height(drawn), at + 0.055)
        text = f"{value:.2f}" if abs(value) >= 1 else f"{value:.2g}"
        axes.annotate(
            text, (1.0, at), xycoords="axes fraction", xytext=(4, 0), textcoords="offset points", va="center",
            color=_STYLE[name]["color"], fontsize=9, fontweight="bold" if name == SUPERVISED else "normal",
            annotation_clip=False,
        )  # fmt: skip


def _interventions(axes: Axes, story: Story) -> None:
    curve = dict(story.curves.get(SUPERVISED, ()))
    for action, marker, colour, text in (
        ("ROLLBACK", "v", _ROLLBACK, "rollback"),
        ("VETO", "D", _VETO, "step dropped (veto)"),
        ("HALT", "s", "#000000", "halt"),
    ):
        steps = [event.step for event in story.events if event.action == action]
        points = [(step, _nearest(curve, step)) for step in steps]
        if points:
            x, y = zip(*points, strict=True)
            size = 9 if action == "ROLLBACK" else 7
            axes.plot(
                x, y, marker, color=colour, markersize=size, markeredgecolor="white", linestyle="none", zorder=7,
                label=text,
            )  # fmt: skip


def _nearest(curve: dict[float, float], step: int) -> float:
    finite = [(abs(at - step), y) for at, y in curve.items() if math.isfinite(y)]
    return min(finite)[1] if finite else math.nan


def _innovations(axes: Axes, story: Story) -> None:
    _spans(axes, story, labelled=False)
    shares = [abs(z) for points in story.innovations.values() for _, z in points if math.isfinite(z)]
    top = min(max((*shares, 1.6)) * 2.5, _MOST)
    axes.set_yscale("log")
    axes.set_ylim(_LEAST, top)
    _plain_ticks(axes, _LEAST, top)
    axes.set_ylabel("innovation / bound")
    axes.axhline(1.0, color="#000000", linewidth=1, linestyle=(0, (6, 3)), zorder=3)
    for channel in CHANNELS:
        points = story.innovations.get(channel, [])
        if points:
            _channel(axes, channel, points, edge=top / 1.35)
    lost = [step for step, share in story.innovations.get("loss", []) if not math.isfinite(share)]
    if lost:
        axes.plot(
            lost, [top / 1.35] * len(lost), "X", color="#000000", markersize=7, markeredgecolor="white",
            linestyle="none", zorder=6, label="loss not finite",
        )  # fmt: skip
    for event in story.interventions:
        colour = _VETO if event.action == "VETO" else _ROLLBACK
        axes.axvline(event.step, color=colour, linewidth=1, linestyle=":", zorder=1)
    axes.legend(
        loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=8, frameon=False, fontsize=9, handletextpad=0.2,
        columnspacing=1.2, borderaxespad=0.3, borderpad=0,
    )  # fmt: skip


def _channel(axes: Axes, channel: str, points: list[Point], *, edge: float) -> None:
    """Every innovation as a dot, those beyond the bound as markers; the rare readings of the probe as circles."""
    x, share = np.array(points, dtype=np.float64).T
    size = np.abs(share) if channel != "held-out loss" else share
    colour, marker = _CHANNEL_STYLE[channel]
    rare = channel == "held-out loss"
    beyond = size > 1
    look: dict[str, Any] = {"color": colour, "linestyle": "none", "markersize": 6.5}
    look |= {"markerfacecolor": "white", "markeredgewidth": 1.4} if rare else {"markeredgecolor": "white"}
    small = {"markersize": 3.5, "markerfacecolor": "white"} if rare else {"markersize": 2.2, "alpha": 0.55}
    axes.plot(x[~beyond], size[~beyond], marker if rare else ".", color=colour, linestyle="none", zorder=2, **small)
    axes.plot(x[beyond], np.minimum(size[beyond], edge), marker, zorder=6, **look)
    axes.plot([], [], marker, **{**look, "markersize": 5}, label=channel)


def _spans(axes: Axes, story: Story, *, labelled: bool) -> int:
    """Shade the faults; returns the rows of labels above the axes."""
    least = 0.004 * story.steps  # else a fault of one step could not be seen
    taken: list[float] = []
    for span in sorted(story.spans, key=lambda span: span.first):
        right = max(span.last, span.first + least)
        axes.axvspan(span.first - 0.5, right, **_SPAN)
        if labelled:
            _span_label(axes, story, span, taken)
    return len(taken)


def _span_label(axes: Axes, story: Story, span: Span, taken: list[float]) -> None:
    """Write what the fault is above the axes, one row higher where the last label would be in the way."""
    width = 0.0082 * len(span.label) * story.steps
    row = next((row for row, end in enumerate(taken) if end <= span.first), len(taken))
    taken[row : row + 1] = [span.first + width]
    axes.annotate(
        span.label, (span.first, 1.0), xycoords=("data", "axes fraction"), xytext=(0, 3 + _LINE * row),
        textcoords="offset points", fontsize=9, ha="left", va="bottom", color="#8A5A00", annotation_clip=False,
    )  # fmt: skip


def _plain_ticks(axes: Axes, low: float, high: float) -> None:
    """Ticks at 1, 2, 3, 5 times powers of ten, as plain numbers, over a range of any size."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    decades = math.log10(high / low)
    steps = (1.0,) if decades > 2.5 else (1.0, 3.0) if decades > 1.5 else (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    ticks = [step * 10.0**power for power in range(first, last + 1) for step in steps]
    ticks = [tick for tick in ticks if low <= tick <= high]
    axes.yaxis.set_major_locator(FixedLocator(ticks[:: max(1, math.ceil(len(ticks) / 8))]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _name(story: Story, name: str) -> str:
    ratio = next((outcome.ratio for outcome in story.outcomes if outcome.name == name), math.nan)
    text = {CLEAN: "clean", FAULTED: "faulted", SUPERVISED: "faulted, supervised"}[name]
    if name == CLEAN or not math.isfinite(ratio):
        return text
    return f"{text} ({f'{ratio:.2f}' if ratio < 10 else f'{ratio:.3g}'} × clean)"
