"""Runs side by side: where they end, how soon they get there, how rough the way is."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from kalmanguard.analysis.analysis import Analysis
from kalmanguard.analysis.drawing import axes_or_new, legend_above, legend_label
from kalmanguard.errors import ConfigurationError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from kalmanguard.analysis.decimation import Curve

#: Batches that the end of a run is cut into, for a standard error of its mean that allows for memory.
_BATCHES = 10
#: Share of the values at the end that a final level is the mean of.
_END_FRAC = 0.05
_NORMAL_95 = 1.96


class Final(NamedTuple):
    """Mean of the last values, and its standard error; nan for one value, where none is known."""

    mean: float
    error: float


class Row(NamedTuple):
    """One run: its final level, its best value, the step at which it reached the target, and how rough it was.

    ``difference`` is the final level minus that of the first run, over the magnitude of that one, with the bounds of
    its 95 % interval; nan for the first run itself and where no error is known.
    """

    name: str
    health: str
    rows: int
    final: Final
    best: float
    best_step: float
    reached: float | None
    suspected_per_1000: float
    confirmed: int
    give_back: float
    difference: tuple[float, float, float]


@dataclass(frozen=True, eq=False)
class Comparison:
    """Several runs.

    Attributes
    ----------
    channel
        What is compared: ``probe`` where every run has held-out losses, else ``loss``.
    target
        The loss that every run reaches: the worst of their best values.
    rows
        One for each run, in the order in which they were given.
    """

    channel: str
    target: float
    rows: tuple[Row, ...]
    analyses: tuple[Analysis, ...]

    @property
    def label(self) -> str:
        """What is compared, in words."""
        return "held-out loss" if self.channel == "probe" else "training loss"

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw the curves on one set of axes."""
        axes = axes_or_new(axes)
        for run in self.analyses:
            curve = run.judgement.curves[self.channel]
            axes.plot(curve.steps, curve.mean, linewidth=1.1, label=legend_label(run.name))
        axes.axhline(self.target, color="#333333", linewidth=0.8, linestyle=":")
        axes.set_xlabel("step")
        axes.set_ylabel(self.label)
        legend_above(axes)
        return axes

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {
            "channel": self.channel,
            "target": self.target,
            "runs": [row._asdict() | {"final": row.final._asdict()} for row in self.rows],
        }

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Headings and cells of a table for people."""
        head = ["run", "health", f"final {self.label}", "against the first", "best", f"steps to {self.target:.4g}"]
        head += ["suspicious per 1,000", "confirmed", "progress lost"]
        return head, [_cells(row) for row in self.rows]

    def __str__(self) -> str:
        head, rows = self.cells()
        table = [head, *rows]
        widths = [max(len(line[i]) for line in table) for i in range(len(head))]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in table)

    def _repr_html_(self) -> str:
        head, rows = self.cells()
        top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
        body = "".join(f"<tr>{''.join(f'<td>{html.escape(c)}</td>' for c in row)}</tr>" for row in rows)
        return f"<table><tr>{top}</tr>{body}</table>"


def compare(analyses: Sequence[Analysis]) -> Comparison:
    """Put runs side by side.

    The final level is the mean of the last 5 % of the values, or of the last twenty where these are fewer; its standard
    error is that of ten batch means, which allows for memory between neighbouring values. Difference intervals take the
    two runs to be independent.

    Raises
    ------
    ConfigurationError
        There are fewer than two runs, or they have no loss in common.

    Notes
    -----
    Guarantee: ASYMPTOTIC (batches longer than the memory, a level that no longer moves); one run each says nothing of
    what another seed would give.

    Examples
    --------
    >>> import numpy as np
    >>> from kalmanguard.analysis import Trajectory, analyze
    >>> rng, n = np.random.default_rng(0), np.arange(2000)
    >>> runs = [
    ...     analyze(Trajectory.from_arrays(loss=level + np.exp(-n / 300) + 0.05 * rng.normal(size=2000)))
    ...     for level in (1.0, 1.1)
    ... ]
    >>> comparison = compare(runs)
    >>> low, high = comparison.rows[1].difference[1:]
    >>> 0.05 < low < 0.1 < high < 0.15
    True
    """
    if len(analyses) < 2:
        raise ConfigurationError(f"{len(analyses)} run: a comparison needs two or more.")
    channel = "probe" if all(run.judgement.probes for run in analyses) else "loss"
    curves = [run.judgement.curves.get(channel) for run in analyses]
    bare = [run.name for run, curve in zip(analyses, curves, strict=True) if curve is None or not curve.finite]
    if bare:
        raise ConfigurationError(f"{', '.join(bare)}: there is no loss to compare by.")
    known = [curve for curve in curves if curve is not None]
    target = max(curve.best for curve in known)
    first = _final(known[0])
    return Comparison(
        channel,
        target,
        tuple(_row(run, curve, target, first) for run, curve in zip(analyses, known, strict=True)),
        tuple(analyses),
    )


def _row(run: Analysis, curve: Curve, target: float, first: Final) -> Row:
    j, final = run.judgement, _final(curve)
    below = np.flatnonzero(curve.low <= target)
    return Row(
        run.name, run.verdict.health.value, j.rows, final, curve.best, curve.best_step,
        float(curve.steps[below[0]]) if below.size else None, 1_000.0 * j.suspected / max(1, j.rows), j.confirmed,
        j.give_back, _difference(final, first),
    )  # fmt: skip


def _final(curve: Curve) -> Final:
    # Every bucket but the last holds equally many values, so their means weigh the same.
    n = max(1, min(len(curve.mean), max(2 * _BATCHES, round(_END_FRAC * len(curve.mean)))))
    end = curve.mean[-n:]
    if n < 2 * _BATCHES:
        return Final(float(end[-1]), math.nan)
    batches = np.array([batch.mean() for batch in np.array_split(end, _BATCHES)])
    return Final(float(end.mean()), float(batches.std(ddof=1)) / math.sqrt(_BATCHES))


def _difference(final: Final, first: Final) -> tuple[float, float, float]:
    if final is first or not abs(first.mean) > 0.0 or final == first:
        return math.nan, math.nan, math.nan
    ratio = (final.mean - first.mean) / abs(first.mean)
    error = math.hypot(final.error, first.error * final.mean / first.mean) / abs(first.mean)
    return ratio, ratio - _NORMAL_95 * error, ratio + _NORMAL_95 * error


def _cells(row: Row) -> list[str]:
    value, low, high = row.difference
    difference = "–" if math.isnan(value) else f"{100 * value:+.3g} %"
    if not math.isnan(low):
        difference += f" ({100 * low:+.3g} to {100 * high:+.3g})"
    error = "" if math.isnan(row.final.error) else f" ± {row.final.error:.2g}"
    return [
        row.name, row.health, f"{row.final.mean:.4g}{error}", difference, f"{row.best:.4g} at {row.best_step:,.0f}",
        "–" if row.reached is None else f"{row.reached:,.0f}", f"{row.suspected_per_1000:.2f}", f"{row.confirmed:,}",
        "–" if math.isnan(row.give_back) else "all" if row.give_back >= 1.0 else f"{100 * row.give_back:.1f} %",
    ]  # fmt: skip
