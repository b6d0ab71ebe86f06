"""All cheap sensors of one step, gathered into one `Measurement`."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kalmanguard.records import OVERWRITE, Costs, Evidence, FloatArray, Measurement
from kalmanguard.sensors.buffers import BufferMemory
from kalmanguard.sensors.integrity import IntegritySensor
from kalmanguard.sensors.norm import total_norm
from kalmanguard.sensors.optimizer import OptimizerTap
from kalmanguard.sensors.sketch import Sketch

#: Times their own norm that the parameters move in one step only when they are overwritten: a weight whose highest
#: exponent bit flips does, a model whose weights are loaded or drawn anew does not.
_OVERWRITE = 10.0
#: Sketches whose time is taken: in a loop, where other work evicts them from the caches, they are slower than alone.
_TIMED = 4


class SensorSuite:
    """Sketch, buffers, gradient, learning rates and integrity of one step.

    Parameters
    ----------
    model
        The supervised model.
    tap
        The optimizer tap.
    size, seed
        Rows and key of the sketch.
    parts
        The trained parameters in groups that are sketched apart, of a model of which other processes hold more; by
        default all in one.
    total
        Elements of the whole model then.

    Attributes
    ----------
    stride
        Steps from one sketch to the next: a velocity then covers as many steps, and the steps between have none.
    sketched
        Position, velocity and rounding floor of each part, of the step that was measured last.

    Notes
    -----
    Cost: one pass over the parameters (sketch), one over the gradients (in the tap), about 40 us for small models.
    """

    def __init__(
        self,
        model: nn.Module,
        tap: OptimizerTap,
        *,
        size: int,
        seed: int,
        parts: Sequence[Sequence[tuple[str, Tensor]]] | None = None,
        total: int | None = None,
    ) -> None:
        trained = trained_parameters(model)
        whole = [trained] if parts is None else parts
        self._sketches = [Sketch(part, size=size, seed=seed, total=total) for part in whole]
        self._size = size
        self._tap = tap
        self.stride = 1
        self._turn = 0
        self._durations: list[float] = []
        self._integrity = IntegritySensor([p for _, p in trained if p.requires_grad])
        self._buffers = [b for b in model.buffers() if b.is_floating_point() and b.numel()]
        self.buffers = BufferMemory(model)
        self._positions: list[FloatArray] = []
        self._length = 0.0
        self.sketched: list[tuple[FloatArray, FloatArray | None, float]] = []
        self._tampered: tuple[str, ...] = ()
        # Half a unit in the last place, the error of one addition: of the coarsest dtype, the sketch's own included.
        dtypes = {torch.float32, *(p.dtype for _, p in trained if p.is_floating_point())}
        self._epsilon = max(torch.finfo(dtype).eps / 2 for dtype in dtypes)

    @property
    def tampered(self) -> bool:
        """Whether something else than the optimizer has changed the state that the step in work starts from."""
        return bool(self._tampered)

    def positions(self) -> list[FloatArray]:
        """Sketch the present parameters, part by part."""
        return [sketch() for sketch in self._sketches]

    def before_step(self) -> None:
        """Check integrity; called right before the first optimizer step since the last measurement."""
        self._tampered = self._integrity.check()

    def measure(
        self,
        step: int,
        loss: float | None,
        *,
        costs: Costs | None,
        objective: int,
        findings: tuple[Evidence, ...] = (),
    ) -> Measurement:
        """Measure the present state, after the optimizer's step."""
        self._turn += 1
        velocity, before = None, self._length
        if self._turn % self.stride == 0:
            velocity = self._moved()
        finite = math.isfinite(self._length)
        self._tap.read()
        tap, tampered = self._tap, self._tampered
        self._tampered = ()
        if finite and velocity is not None and float(np.dot(velocity, velocity)) > _OVERWRITE**2 * before > 0:
            tampered = (*tampered, OVERWRITE)
        if not finite or velocity is None:
            self.sketched = [(position, None, floor) for position, _, floor in self.sketched]
        self._integrity.remember(tap.optimizers)
        measurement = Measurement(
            step=step,
            loss=loss,
            learning_rates=tap.rates,
            lr_factor=tap.lr_factor,
            gradient_norm=tap.gradient_norm,
            velocity=velocity if finite else None,
            rounding_floor=self._epsilon * math.sqrt(self._length) if finite else 0.0,
            buffer_norm=self._buffer_norm(),
            veto=tap.veto,
            parameters_finite=finite,
            tampered=tampered,
            costs=costs,
            objective=objective,
            findings=findings,
        )
        tap.reset()
        return measurement

    def sketch_s(self) -> float:
        """Seconds that one sketch took between the training steps so far, the best of the first few."""
        return min(self._durations, default=0.0)

    def _moved(self) -> FloatArray | None:
        """Sketch the parameters; how far they have moved since they were sketched last, if they were."""
        timed = len(self._durations) < _TIMED
        started = time.perf_counter() if timed else 0.0
        before, self._positions = self._positions, self.positions()
        if timed:
            self._durations.append(time.perf_counter() - started)
        self._weigh()
        velocities = [now - then for now, then in zip(self._positions, before, strict=False)]
        if not velocities:
            return None if self._sketches else np.zeros(self._size)
        self.sketched = [(at, v, floor) for (at, _, floor), v in zip(self.sketched, velocities, strict=True)]
        return sum(velocities[1:], velocities[0])

    def _weigh(self) -> None:
        """Take the lengths of the present positions."""
        squares = [float(np.dot(position, position)) for position in self._positions]
        self._length = sum(squares)
        self.sketched = [
            (position, None, self._epsilon * math.sqrt(square))
            for position, square in zip(self._positions, squares, strict=True)
        ]

    def interrupt(self) -> None:
        """The parameters were set from outside the optimizer: the next velocity would be no update."""
        self._positions, self._turn = self.positions(), 0
        self._weigh()
        self._integrity.forget()
        self._tap.reset()

    @torch.no_grad()
    def _buffer_norm(self) -> float | None:
        return total_norm(self._buffers) if self._buffers else None


def loss_value(loss: Any) -> float | None:
    """The user's loss as a number; ``None`` stays ``None``."""
    if loss is None:
        return None
    if isinstance(loss, Tensor):
        return float(loss.detach()) if loss.numel() == 1 else float(loss.detach().float().mean())
    return float(loss)


def trained_parameters(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Names and parameters that are trained; all of them where none is."""
    named: list[tuple[str, Tensor]] = list(model.named_parameters())
    return [(name, p) for name, p in named if p.requires_grad] or named
