"""Axes to draw on: the caller's, or those of a new figure that no window and no global state belongs to."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Okabe and Ito's palette, which people with any colour vision can tell apart.
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"


def axes_or_new(axes: Axes | None) -> Axes:
    """Return the axes given, or new ones; ``axes.figure.savefig(path)`` writes them.

    Examples
    --------
    >>> axes_or_new(None).lines
    <Axes.ArtistList of 0 lines>
    """
    if axes is not None:
        return axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    FigureCanvasAgg(figure)
    return figure.add_subplot()


def legend_label(name: str) -> str:
    r"""A name as a label that a legend shows as it is: no mathematics in it, and not hidden for its first letter.

    >>> legend_label("_cost in $")
    '\u200b_cost in \\$'
    """
    return ("\u200b" if name.startswith("_") else "") + name.replace("$", r"\$")


def legend_above(axes: Axes) -> None:
    """Name what is drawn above the axes, where no data lie."""
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        axes.legend(
            handles, labels, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=4, frameon=False, fontsize=8,
            borderaxespad=0.2, columnspacing=1.2, handlelength=1.6,
        )  # fmt: skip
