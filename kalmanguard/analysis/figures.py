"""Pictures of a judged run: every function draws on the axes that it is given, or on new ones, and returns them."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kalmanguard.analysis.decimation import Curve
from kalmanguard.analysis.drawing import axes_or_new, legend_above, legend_label
from kalmanguard.analysis.judgement import Event, Judgement
from kalmanguard.records import Action

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which people with any colour vision can tell apart.
BLUE, ORANGE, GREEN, SKY, PINK, BLACK, RED = "#0072B2", "#E69F00", "#009E73", "#56B4E9", "#CC79A7", "#333333", "#D55E00"
SUSPECTED, CONFIRMED = ORANGE, "#7B3294"
_CHANNELS = {
    "z_loss": ("training loss", BLUE, "o"),
    "z_gradient": ("gradient norm", ORANGE, "s"),
    "z_gain": ("update per rate", GREEN, "^"),
    "z_buffers": ("buffers", SKY, "v"),
    "z_trajectory": ("trajectory", PINK, "D"),
}
#: Share of the height that a curve's outliers may take: what lies above is drawn at the edge.
_CEILING = 1.6
#: Events that are marked one by one; of more, evenly spaced ones.
_MARKED = 400


def plot_losses(judgement: Judgement, axes: Axes | None = None) -> Axes:
    """Training loss (least to greatest of every stretch, and its mean), held-out loss, its prediction and bound."""
    axes = axes_or_new(axes)
    curves = judgement.curves
    loss, probe = curves.get("loss"), curves.get("probe")
    shown = [curve for curve in (loss, probe if judgement.probes else None) if curve]
    _limits(axes, shown)
    if loss:
        axes.fill_between(loss.steps, loss.low, loss.high, color=SKY, alpha=0.35, linewidth=0, step="mid")
        axes.plot(loss.steps, loss.mean, color=BLUE, linewidth=1.1, label="training loss")
        _lost(axes, loss, "training loss")
    if probe and judgement.probes:
        marker = "o" if len(probe.steps) < 120 else ""
        axes.plot(
            probe.steps, probe.mean, color=BLACK, marker=marker, markersize=3, linewidth=1.0, label="held-out loss"
        )
        predicted, scale = curves.get("predicted"), curves.get("scale")
        if predicted and scale and len(predicted.steps) == len(scale.steps):
            low, high = (predicted.mean + side * 2.0 * scale.mean for side in (-1.0, 1.0))
            axes.fill_between(
                predicted.steps, low, high, color=GREEN, alpha=0.18, linewidth=0, label="predicted, 2 deviations"
            )
        _lost(axes, probe, "held-out loss")
    bound = curves.get("bound")
    if bound:
        axes.plot(bound.steps, bound.mean, color=RED, linestyle=(0, (4, 2)), linewidth=1.0, label="bound")
    axes.set_ylabel("loss")
    _events(axes, judgement.events)
    if shown or bound:
        legend_above(axes)
    return axes


def plot_gradient(judgement: Judgement, axes: Axes | None = None) -> Axes:
    """Gradient norm, least to greatest of every stretch, on a logarithmic scale; the learning rate beside it."""
    axes = axes_or_new(axes)
    curve = judgement.curves.get("gradient_norm")
    if curve and curve.finite:
        positive = curve.low > 0
        if positive.all():
            axes.set_yscale("log")
        axes.fill_between(curve.steps, curve.low, curve.high, color=ORANGE, alpha=0.4, linewidth=0, step="mid")
        axes.plot(curve.steps, curve.mean, color="#9C6500", linewidth=1.0, label="gradient norm")
        _lost(axes, curve, "gradient norm")
    axes.set_ylabel("gradient norm")
    rate = judgement.curves.get("learning_rate")
    if rate and rate.finite and float(rate.high.max()) > 0:
        beside = axes.twinx()
        beside.plot(rate.steps, rate.mean, color=BLACK, linewidth=0.8, linestyle=":", label="learning rate")
        beside.set_ylabel("learning rate", fontsize=8)
        beside.tick_params(labelsize=7)
        beside.spines["top"].set_visible(False)
    _events(axes, judgement.events)
    return axes


def plot_innovations(judgement: Judgement, axes: Axes | None = None) -> Axes:
    """Greatest innovation of every stretch, per channel, in standard deviations, and what counts as suspicious."""
    axes = axes_or_new(axes)
    axes.set_yscale("log")
    for name, (label, colour, marker) in _CHANNELS.items():
        curve = judgement.curves.get(name)
        if not curve or not curve.finite:
            continue
        size = np.maximum(np.abs(curve.high), np.abs(curve.low)) if name in ("z_gain", "z_buffers") else curve.high
        size = np.clip(size, 0.1, 1e6)
        axes.plot(curve.steps, size, color=colour, linewidth=0.5, alpha=0.6)
        high = size > 0.5 * judgement.settings.suspicion
        axes.plot(
            curve.steps[high], size[high], marker, color=colour, markersize=3, linestyle="none", label=label
        ) if high.any() else axes.plot([], [], marker, color=colour, markersize=3, linestyle="none", label=label)
    axes.axhline(judgement.settings.suspicion, color=RED, linewidth=0.9, linestyle=(0, (4, 2)))
    axes.set_ylim(bottom=0.3)
    axes.set_ylabel("innovation, deviations")
    _events(axes, judgement.events)
    legend_above(axes)
    return axes


def plot_give_back(judgement: Judgement, axes: Axes | None = None) -> Axes:
    """Share of the progress that is lost, at every held-out reading, and how much may be."""
    axes = axes_or_new(axes)
    curve = judgement.curves.get("give_back")
    if curve and curve.finite:
        top = max(1.0, 1.2 * judgement.settings.give_back)
        high = np.minimum(curve.high, top)
        axes.fill_between(curve.steps, 0, high, color=PINK, alpha=0.35, linewidth=0, step="mid")
        axes.plot(curve.steps, high, color="#8E3A6E", linewidth=0.9)
        axes.set_ylim(0, min(top, max(1.3 * judgement.settings.give_back, 1.1 * float(high.max()))))
    axes.axhline(judgement.settings.give_back, color=RED, linewidth=0.9, linestyle=(0, (4, 2)))
    axes.set_ylabel("progress lost, share")
    _events(axes, judgement.events)
    return axes


Panel = Callable[[Judgement, Any], Any]


def panels(judgement: Judgement) -> tuple[Panel, ...]:
    """What there is to draw of a run."""
    curves = judgement.curves
    wanted: list[Panel] = []
    if curves.get("loss") or (judgement.probes and curves.get("probe")):
        wanted.append(plot_losses)
    if curves.get("gradient_norm") or curves.get("learning_rate"):
        wanted.append(plot_gradient)
    if any(curves.get(name) for name in _CHANNELS):
        wanted.append(plot_innovations)
    if curves.get("give_back"):
        wanted.append(plot_give_back)
    return tuple(wanted)


def draw(judgement: Judgement) -> Figure:
    """All panels of a run, one above the other, with one axis of steps."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    wanted = panels(judgement)
    style: Any = {"font.size": 9.0, "axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "none"}
    with rc_context(style):
        heights = [1.6 if panel is plot_losses else 1.0 for panel in wanted] or [1.0]
        figure = Figure(figsize=(10, 0.9 + 1.55 * sum(heights)), layout="constrained")
        FigureCanvasAgg(figure)
        stack = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0]
        for panel, axes in zip(wanted, stack, strict=False):
            panel(judgement, axes)
        if judgement.last_step > judgement.first_step:
            stack[-1].set_xlim(judgement.first_step, judgement.last_step)
        stack[-1].set_xlabel("step")
    return figure


def svg(figure: Figure) -> str:
    """A figure as an ``<svg>`` element that can stand in a page; the same figure gives the same text."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "kalmanguard"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def sparkline(curve: Curve, *, width: int = 120, height: int = 24) -> str:
    """A curve's mean as a small ``<svg>`` element without axes."""
    finite = np.isfinite(curve.mean)
    if finite.sum() < 2:
        return ""
    x, y = curve.steps[finite], curve.mean[finite]
    low, high = float(y.min()), float(y.max())
    across = (x - x[0]) / max(float(x[-1] - x[0]), 1e-12) * (width - 2) + 1
    down = height - 2 - (y - low) / max(high - low, 1e-12) * (height - 4)
    keep = np.unique(np.linspace(0, len(x) - 1, min(len(x), width)).astype(int))
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(across[keep], down[keep], strict=True))
    return (
        f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img" aria-label="course of the '
        f'loss"><polyline points="{points}" fill="none" stroke="{BLUE}" stroke-width="1.2"/></svg>'
    )


def draw_series(axes: Axes, steps: Any, values: Any, label: str) -> None:
    """A whole series as a line that restarts break; what is not finite is marked at the upper edge."""
    steps, values = np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)
    finite = np.isfinite(values)
    x, y = steps.copy(), np.where(finite, values, np.nan)
    back = np.flatnonzero(np.diff(steps) < 0) + 1
    x, y = np.insert(x, back, np.nan), np.insert(y, back, np.nan)
    (line,) = axes.plot(x, y, linewidth=1.0, label=legend_label(label))
    if not finite.all():
        at = axes.get_xaxis_transform()
        axes.plot(steps[~finite], [0.98] * int((~finite).sum()), "x", color=line.get_color(), transform=at)


def _limits(axes: Axes, curves: Sequence[Curve]) -> None:
    """Show the range in which a run lives; one explosion must not flatten all the rest."""
    means = np.concatenate([curve.mean for curve in curves]) if curves else np.zeros(0)
    if not len(means):
        return
    low = min(float(curve.low.min()) for curve in curves if len(curve.low))
    first = max(curve.first for curve in curves if curve.finite)
    typical = float(np.quantile(means, 0.98))
    top = max(first, typical) if not low > 0 else max(first, typical) * 1.1
    if low > 0:
        axes.set_yscale("log") if top / low > 30 else None
        axes.set_ylim(low * 0.95, max(top, low * 1.2))
    else:
        axes.set_ylim(low - 0.05 * (top - low), top + _CEILING * 0.05 * (top - low) + 1e-12)


def _lost(axes: Axes, curve: Curve, what: str) -> None:
    if curve.lost:
        at = axes.get_xaxis_transform()
        label = f"{what} not finite"
        axes.plot(curve.lost, [0.98] * len(curve.lost), "x", color=RED, markersize=5, transform=at, label=label)


def _events(axes: Axes, events: Sequence[Event]) -> None:
    at = axes.get_xaxis_transform()
    done = [event.step for event in events if event.proposed != Action.ACCEPT]
    seen = [event.step for event in events if event.proposed == Action.ACCEPT]
    for steps, colour, height in ((seen, SUSPECTED, 0.05), (done, CONFIRMED, 1.0)):
        stride = max(1, math.ceil(len(steps) / _MARKED))
        axes.vlines(steps[::stride], 0, height, color=colour, linewidth=0.9, alpha=0.75, transform=at, zorder=1)
