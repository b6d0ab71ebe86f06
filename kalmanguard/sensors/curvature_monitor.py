"""Sharpness on a cadence: has the curvature risen beyond what the learning rate can bear?"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from kalmanguard.errors import ConfigurationError
from kalmanguard.records import Evidence, Guarantee
from kalmanguard.sensors.curvature import StepScale, extreme_eigenvalues, require_known
from kalmanguard.sensors.surface import LossSurface

#: Readings that are compared with, and fewest of them.
_MEMORY, _FEWEST = 20, 3
#: Least share of its parameter's root mean square that an entry of Adam's denominator counts as.
_FLOOR_FRAC = 0.01
#: Failures in a row after which it gives up.
_FAILURES = 3


class CurvatureMonitor:
    """Measure the preconditioned sharpness every so many steps; suspect it far beyond the edge of stability.

    Fires when ``ratio = lambda_max(eta P^-1 H) / edge`` (see `Sharpness`) exceeds ``slack`` *and* ``rise`` times the
    median of its own last 20 readings.

    Parameters
    ----------
    model, loss_fn, batches
        As for `LossSurface`: a few fixed batches of training data, together as large as can be afforded.
    optimizer
        SGD, Adam or AdamW: the one that trains the model.
    every
        Steps from one reading to the next.
    iterations
        Most Hessian-vector products a reading.
    slack
        Ratio up to which nothing is said. Training at the edge of stability hovers around 1.
    rise
        Factor over the median of the last readings up to which nothing is said.
    seed
        Of the first vector.

    Raises
    ------
    ConfigurationError
        As `LossSurface`; an optimizer of another kind, or a number out of range.

    Attributes
    ----------
    history
        The last ratios.
    readings
        Readings taken.
    reading_s
        Seconds that the latest reading took; ``reading_s / every`` is the cost per step.
    error
        Why a reading failed; after three failures in a row none is taken any more.

    Notes
    -----
    Guarantee: HEURISTIC. Assumes that the batches' Hessian is like that of the training loss; a small batch lies above
    it, which the comparison with its own history forgives. It is blind to a model that is beyond the edge from the
    first reading on, to one that breaks in fewer steps than ``every``, and to faults without curvature.
    Leaves no trace (`LossSurface`); attaches no hook. Cost: ``iterations`` Hessian-vector products over the batches
    every ``every`` steps.

    Examples
    --------
    >>> import torch
    >>> model, x = nn.Linear(2, 1, bias=False), torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> batches = [(x, torch.zeros(2, 1))]
    >>> monitor = CurvatureMonitor(model, nn.functional.mse_loss, batches, optimizer=optimizer, every=1)
    >>> [monitor.sense(step) for step in (1, 2, 3)]
    [(), (), ()]
    >>> optimizer.param_groups[0]["lr"] = 2.0
    >>> [evidence.message for evidence in monitor.sense(4)]
    ['sharpness is 4 times what the learning rate can bear, 20 times what it was']
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        batches: Sequence[Any],
        *,
        optimizer: Optimizer,
        every: int = 500,
        iterations: int = 10,
        slack: float = 2.0,
        rise: float = 3.0,
        seed: int = 0,
    ) -> None:
        if every < 1 or iterations < 1:
            raise ConfigurationError(f"every = {every} and iterations = {iterations} must be at least 1.")
        if not (slack >= 1 and rise >= 1):
            raise ConfigurationError(
                f"slack = {slack} and rise = {rise} must be at least 1, where healthy training is."
            )
        require_known(optimizer)
        self._surface: LossSurface | None = LossSurface(model, loss_fn, batches)
        self._optimizer, self._every, self._iterations = optimizer, every, iterations
        self._slack, self._rise, self._seed = slack, rise, seed
        self._failures = 0
        self.history: deque[float] = deque(maxlen=_MEMORY)
        self.readings = 0
        self.reading_s = 0.0
        self.error: str | None = None

    def sense(self, step: int) -> tuple[Evidence, ...]:
        """Take a reading when one is due; never raises."""
        if self._surface is None or step % self._every:
            return ()
        started = time.perf_counter()
        try:
            ratio = self._ratio(self._surface)
        except Exception as fault:
            self.error = f"step {step}: {type(fault).__name__}: {fault}"
            self._failures += 1
            if self._failures >= _FAILURES:
                self.close()
            return ()
        finally:
            self.reading_s = time.perf_counter() - started
        self._failures = 0
        # Not finite: others tell that sooner. Not positive: a saddle, or no step taken yet.
        if ratio is None or not (math.isfinite(ratio) and ratio > 0):
            return ()
        usual = median(self.history) if len(self.history) >= _FEWEST else math.inf
        self.history.append(ratio)
        self.readings += 1
        if not (ratio > self._slack and ratio > self._rise * usual):
            return ()
        message = (
            f"sharpness is {ratio:.3g} times what the learning rate can bear, {ratio / usual:.3g} times what it was"
        )
        return (Evidence("curvature", ratio, True, Guarantee.HEURISTIC, message),)

    def close(self) -> None:
        """Let go of model and batches; harmless when repeated."""
        self._surface = None

    def _ratio(self, surface: LossSurface) -> float | None:
        step = StepScale.of(surface, self._optimizer, floor_frac=_FLOOR_FRAC)
        if step is None:
            return None
        scale, decay = (None, None) if step.uniform else (step.scale, step.decay)
        found = extreme_eigenvalues(surface, iterations=self._iterations, seed=self._seed, scale=scale, decay=decay)
        effective = step.rate * (found.highest + step.weight_decay) if step.uniform else found.highest
        return effective / step.edge
