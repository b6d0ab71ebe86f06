"""The loss around the present parameters, along random directions whose scale is that of the weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from kalmanguard.errors import ConfigurationError
from kalmanguard.records import FloatArray
from kalmanguard.sensors.curvature import surface_of
from kalmanguard.sensors.surface import LossSurface

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, slots=True, eq=False)
class Landscape:
    """Losses on a line or a plane through the present parameters.

    Attributes
    ----------
    offsets
        Distances along each direction, shape ``(points,)``; 1 moves every filter by its own norm.
    losses
        Shape ``(points,)`` or ``(points, points)``, the first index along the first direction; not finite where the
        loss is not.
    """

    offsets: FloatArray
    losses: FloatArray

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the slice with matplotlib: a curve, or filled contours.

        Parameters
        ----------
        ax
            Where to draw; a new figure's by default.

        Returns
        -------
        matplotlib.axes.Axes
            What was drawn on.
        """
        if ax is None:
            from matplotlib.figure import Figure

            ax = Figure().add_subplot()
        shown = np.where(np.isfinite(self.losses), self.losses, np.nan)
        if self.losses.ndim == 1:
            ax.plot(self.offsets, shown)
            ax.set_ylabel("loss")
        elif np.isnan(shown).all():
            raise ConfigurationError("No loss of this landscape is finite; choose a smaller span.")
        else:
            contours = ax.contourf(self.offsets, self.offsets, shown.T, levels=20)
            ax.figure.colorbar(contours, ax=ax, label="loss")
            ax.set_ylabel("second direction")
        ax.set_xlabel("filter-normalised distance")
        return ax


def loss_landscape(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    batch: Any,
    *,
    dimensions: int = 1,
    span: float = 1.0,
    points: int = 21,
    seed: int = 0,
    evaluation: bool = True,
) -> Landscape:
    """Evaluate the loss on a line or a plane through the present parameters.

    Parameters
    ----------
    model, loss_fn, evaluation
        As for `LossSurface`.
    batch
        One batch, or a list of several.
    dimensions
        1 or 2.
    span
        Largest distance on each side.
    points
        Points along each direction; odd, so that the present parameters are one of them.
    seed
        Of the directions; no global random stream is used.

    Raises
    ------
    ConfigurationError
        As `LossSurface`, or a number out of range.

    Notes
    -----
    Each direction is normal; every filter of it (a row of a matrix, an output channel of a convolution) is scaled to
    the norm of the filter that it moves, so that slices of different networks can be compared. Biases and other
    parameters of one dimension stay. Guarantee: the losses are EXACT; two random directions out of millions show
    neither the sharpest one nor the way that training takes (HEURISTIC). Cost: ``points`` forward passes, or their
    square.

    References
    ----------
    Li et al., "Visualizing the loss landscape of neural nets", NeurIPS 2018, section 4.

    Examples
    --------
    >>> model = nn.Linear(2, 1)
    >>> batch = (torch.eye(2), torch.zeros(2, 1))
    >>> slice_ = loss_landscape(model, nn.functional.mse_loss, batch, points=3)
    >>> slice_.offsets, slice_.losses.shape
    (array([-1.,  0.,  1.]), (3,))
    """
    if dimensions not in (1, 2):
        raise ConfigurationError(f"dimensions = {dimensions}: a slice has 1 or 2.")
    if points < 3 or points % 2 == 0 or not 0 < span < float("inf"):
        raise ConfigurationError(f"points = {points} must be odd and at least 3, span = {span} positive and finite.")
    surface = surface_of(model, loss_fn, batch, evaluation)
    generator = torch.Generator().manual_seed(seed)
    directions = [_direction(surface, generator) for _ in range(dimensions)]
    offsets = np.linspace(-span, span, points)
    offsets[points // 2] = 0.0
    if dimensions == 1:
        losses = [surface.value(float(a) * directions[0]) for a in offsets]
    else:
        losses = [surface.value(float(a) * directions[0] + float(b) * directions[1]) for a in offsets for b in offsets]
    return Landscape(offsets, np.array(losses).reshape((points,) * dimensions))


def _direction(surface: LossSurface, generator: torch.Generator) -> Tensor:
    """A random direction, filter-normalised; shape ``(size,)``."""
    parts = []
    for p in surface.parameters:
        if p.ndim < 2:
            parts.append(torch.zeros(p.numel(), dtype=surface.dtype, device=surface.device))
            continue
        filters = p.detach().to(surface.device, surface.dtype).flatten(1)
        noise = torch.randn(filters.shape, generator=generator, dtype=torch.float64).to(filters)
        # Of an empty or zero filter nothing moves.
        noise *= filters.norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True).clamp(min=1e-30)
        parts.append(noise.reshape(-1))
    return torch.cat(parts)
