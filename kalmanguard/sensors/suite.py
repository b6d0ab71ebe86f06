"""All cheap sensors of one step, gathered into one `Measurement`."""

from __future__ import annotations

import math
import time
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

    Attributes
    ----------
    stride
        Steps from one sketch to the next: a velocity then covers as many steps, and the steps between have none.

    Notes
    -----
    Cost: one pass over the parameters (sketch), one over the gradients (in the tap), about 40 us for small models.
    """

    def __init__(self, model: nn.Module, tap: OptimizerTap, *, size: int, seed: int) -> None:
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._sketch = Sketch(trained or list(model.named_parameters()), size=size, seed=seed)
        self._tap = tap
        self.stride = 1
        self._turn = 0
        self._durations: list[float] = []
        self._integrity = IntegritySensor([p for _, p in trained])
        self._buffers = [b for b in model.buffers() if b.is_floating_point() and b.numel()]
        self.buffers = BufferMemory(model)
        self._position: FloatArray | None = None
        self._length = 0.0
        self._tampered: tuple[str, ...] = ()
        # Half a unit in the last place, the error of one addition: of the coarsest dtype, the sketch's own included.
        dtypes = {torch.float32, *(p.dtype for _, p in trained if _is_float(p))}
        self._epsilon = max(torch.finfo(dtype).eps / 2 for dtype in dtypes)

    @property
    def tampered(self) -> bool:
        """Whether something else than the optimizer has changed the state that the step in work starts from."""
        return bool(self._tampered)

    @property
    def position(self) -> FloatArray | None:
        """The latest sketch of the parameters, shape ``(k,)``."""
        return self._position

    def fingerprint(self) -> str:
        """The present parameters as a text that two processes can compare: equal where they are."""
        return self._sketch().tobytes().hex()

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
        if self._turn % self.stride == 0:
            position = self._sketch() if len(self._durations) >= _TIMED else self._timed_sketch()
            velocity = None if self._position is None else position - self._position
            self._position = position
            before, self._length = self._length, float(np.dot(position, position))
            length = self._length
        else:
            velocity, before, length = None, 0.0, self._length
        finite = math.isfinite(length)
        self._tap.read()
        tap, tampered = self._tap, self._tampered
        self._tampered = ()
        if finite and velocity is not None and float(np.dot(velocity, velocity)) > _OVERWRITE**2 * before > 0:
            tampered = (*tampered, OVERWRITE)
        self._integrity.remember(tap.optimizers)
        measurement = Measurement(
            step=step,
            loss=loss,
            learning_rates=tap.rates,
            lr_factor=tap.lr_factor,
            gradient_norm=tap.gradient_norm,
            velocity=velocity if finite else None,
            rounding_floor=self._epsilon * math.sqrt(length) if finite else 0.0,
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

    def _timed_sketch(self) -> FloatArray:
        started = time.perf_counter()
        position = self._sketch()
        self._durations.append(time.perf_counter() - started)
        return position

    def interrupt(self) -> None:
        """The parameters were set from outside the optimizer: the next velocity would be no update."""
        self._position, self._turn = self._sketch(), 0
        self._length = float(np.dot(self._position, self._position))
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


def _is_float(p: Tensor) -> bool:
    return p.is_floating_point()
