"""The cases that train real networks: learning rates raised in mid-run, healthy runs, and the edge of stability."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from kalmanguard.analysis.study.cases import CHANGE, RAMP, Result, summary
from kalmanguard.analysis.study.detectors import read
from kalmanguard.errors import ConfigurationError
from kalmanguard.records import FloatArray
from kalmanguard.sensors.curvature import sharpness
from kalmanguard.sensors.sketch import Sketch

#: Share of the progress of the held-out loss whose loss counts as harm, as in ``python -m benchmarks recovery``.
GIVE_BACK = 0.2
#: Plants with the options that make them differ from the registered ones.
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "mlp, AdamW": ("mlp", {}),
    "mlp, SGD 0.9": ("mlp", {"optimizer": "sgd"}),
    "mlp, SGD": ("mlp", {"optimizer": "sgd", "momentum": 0.0}),
    "chartransformer, AdamW": ("chartransformer", {"context": 32, "batch_size": 8}),
}
#: Full-batch recipes on half the squared error: the first stays below the edge of stability, the others reach it.
EDGES: dict[str, dict[str, Any]] = {
    "gradient descent at 0.05": {"optimizer": "sgd", "momentum": 0.0, "lr": 0.05},
    "gradient descent at 0.2": {"optimizer": "sgd", "momentum": 0.0, "lr": 0.2},
    "momentum 0.5": {"optimizer": "sgd", "momentum": 0.5, "lr": 0.2},
    "AdamW": {"optimizer": "adamw", "lr": 2e-3},
}
_FULL_BATCH, _SHARPNESS_EVERY = 1_000, 32
#: Steps between held-out losses: before the change, after it, and over so many steps just after it.
_CALMLY, _AFTERWARDS, _CLOSELY, _CLOSE = 40, 16, 4, 40


class Point(NamedTuple):
    """A step, counted from 1, and a number measured after it."""

    step: int
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PlantCase:
    """A plant whose learning rate is multiplied by ``factor``, at step `CHANGE` or creeping; by 1 when healthy."""

    recipe: str
    factor: float
    creeps: bool = False
    seed: int
    steps: int

    def run(self) -> Result:
        """Train, read and judge."""
        torch.set_num_threads(1)
        plant = _load(*RECIPES[self.recipe], seed=self.seed)
        velocities, truth = [], [Point(0, plant.held_out_loss())]
        for step, velocity in enumerate(_train(plant, self.rises()), 1):
            velocities.append(velocity)
            if step % self._measured_every(step) == 0:
                truth.append(Point(step, plant.held_out_loss()))
        change = CHANGE if self.factor != 1.0 else None
        if len(velocities) < self.steps:
            truth.append(Point(len(velocities) + 1, math.inf))
        found = read(np.array(velocities))
        harm = harmed_at(truth, since=change or 0)
        return summary(found, steps=len(velocities), change=change, crossing=change, harm=harm)

    def rises(self) -> FloatArray:
        """Learning rates as multiples of the recipe's, shape ``(steps,)``."""
        since = np.arange(self.steps) - CHANGE
        turned = np.clip(since / RAMP, 0.0, 1.0) if self.creeps else (since >= 0).astype(np.float64)
        return np.asarray(self.factor**turned, dtype=np.float64)

    def _measured_every(self, step: int) -> int:
        if self.factor == 1.0 or step <= CHANGE:
            return _CALMLY
        return _CLOSELY if step <= CHANGE + _CLOSE else _AFTERWARDS


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeCase:
    """Full-batch training of the plant ``mlp`` on half the squared error, with its sharpness."""

    recipe: str
    seed: int
    steps: int

    def run(self) -> Result:
        """Train; returns losses, sharpness over its edge, all readings, and cosines of thinned updates at the edge."""
        torch.set_num_threads(1)
        plant = _load("mlp", EDGES[self.recipe] | {"batch_size": _FULL_BATCH}, seed=self.seed)
        inputs, labels = next(plant.loader)
        whole = inputs, one_hot(labels, 10).float()
        sketch = Sketch(plant.model.named_parameters())
        positions, losses, edges = [sketch()], [], []
        for step in range(1, self.steps + 1):
            plant.optimizer.zero_grad()
            loss = _half_square(plant.model(whole[0]), whole[1])
            loss.backward()  # type: ignore[no-untyped-call]
            plant.optimizer.step()
            positions.append(sketch())
            losses.append(Point(step, float(loss.detach())))
            if step % _SHARPNESS_EVERY == 0:
                found = sharpness(plant.model, _half_square, whole, optimizer=plant.optimizer)
                edges.append(Point(step, math.nan if found.ratio is None else found.ratio))
        path = np.array(positions)
        readings = read(np.diff(path, axis=0))
        return {
            "steps": readings.steps,
            "readings": readings.values,
            "losses": losses[::_SHARPNESS_EVERY],
            "sharpness": edges,
            "cosines": [_cosine(np.diff(path[-256::spacing], axis=0)) for spacing in range(1, 9)],
        }


def harmed_at(truth: list[Point], *, since: int) -> int | None:
    """The first step from ``since`` on at which more than a fifth of the progress is given back, or the loss is lost.

    Examples
    --------
    >>> harmed_at([Point(0, 2.0), Point(10, 1.0), Point(20, 1.1), Point(30, 1.3)], since=0)
    30
    """
    start = best = truth[0].value
    for step, value in truth:
        if step >= since and not value - best <= GIVE_BACK * max(start - best, 0.0):
            return step
        best = min(best, value) if math.isfinite(value) else best
    return None


def _train(plant: Any, rises: FloatArray) -> Iterator[FloatArray]:
    """Updates per unit of learning rate, sketched; ends where they are not finite."""
    sketch = Sketch(plant.model.named_parameters())
    groups = plant.optimizer.param_groups
    usual = [float(group["lr"]) for group in groups]
    before = sketch()
    for rise in rises:
        for group, rate in zip(groups, usual, strict=True):
            group["lr"] = rate * float(rise)
        plant.train_step(next(plant.loader))
        now = sketch()
        if not np.isfinite(now).all():
            return
        yield (now - before) / (usual[0] * float(rise))
        before = now


def _half_square(output: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (output - target).square().sum(1).mean()


def _cosine(velocities: FloatArray) -> float:
    power = float((velocities**2).sum())
    return float((velocities[1:] * velocities[:-1]).sum()) / power if power > 0.0 else math.nan


def _load(name: str, options: dict[str, Any], *, seed: int) -> Any:
    found = {entry.name: entry for entry in entry_points(group="kalmanguard.plants")}
    if name not in found:
        raise ConfigurationError(
            f"The study trains the plant {name!r}, which is not registered: install the package (pip install -e .), "
            "since a bare copy of the sources registers none."
        )
    torch.manual_seed(seed)
    return found[name].load()(seed=seed, **options)
