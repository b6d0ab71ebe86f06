"""Damping of chosen layers: a sketch of their own, whose jerk, acceleration and poles are watched."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import Optimizer

from kalmanguard.detectors.damping import Damping, damping
from kalmanguard.detectors.dynamics import Dynamics, DynamicsState
from kalmanguard.errors import ConfigurationError
from kalmanguard.records import Evidence, FloatArray
from kalmanguard.sensors.arguments import checked_count, whole_model
from kalmanguard.sensors.sketch import Sketch


class DampingMonitor:
    """Watch how the parameters of a model, of chosen layers, or of all layers one by one, move.

    Parameters
    ----------
    model
        The model that is trained.
    layers
        ``None`` for the whole model, a regular expression that is searched in the parameters' names, or the names of
        layers (modules).
    per_layer
        One result for each layer instead of one for all that are chosen.
    optimizer
        When given, updates are taken per unit of its learning rate, so that a schedule is no acceleration.
    size, seed
        Rows and key of the sketches.

    Raises
    ------
    ConfigurationError
        Nothing matches, or the expression is not one.

    Notes
    -----
    Call `step` once after every optimizer step, or hand it to `Supervisor.attach`. Every layer's jerk ratio is judged
    by its own past, and its poles by their confidence interval (`kalmanguard.detectors.damping`), never by the
    published thresholds, which most training exceeds. Guarantee: HEURISTIC. Cost: one sketch of the chosen parameters a
    step for each result.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> monitor = DampingMonitor(model, layers="2.weight")
    >>> monitor.step(), monitor.names
    ((), ('2.weight',))
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: str | Iterable[str] | None = None,
        per_layer: bool = False,
        optimizer: Optimizer | None = None,
        size: int = 64,
        seed: int = 0,
    ) -> None:
        checked_count("size", size, least=8)
        chosen = _chosen(whole_model(model), layers)
        groups: dict[str, list[tuple[str, nn.Parameter]]] = {}
        whole = layers if isinstance(layers, str) else "model" if layers is None else ", ".join(layers)
        for name, parameter in chosen:
            layer = (name.rpartition(".")[0] or name) if per_layer else whole
            groups.setdefault(layer, []).append((name, parameter))
        self._sketches = {layer: Sketch(members, size=size, seed=seed) for layer, members in groups.items()}
        self._positions: dict[str, FloatArray] = {}
        self._states = dict.fromkeys(groups, DynamicsState())
        self._dynamics = Dynamics(("damping",))
        self._optimizer = optimizer
        self._steps = 0

    @property
    def names(self) -> tuple[str, ...]:
        """What there is a result for."""
        return tuple(self._sketches)

    def step(self) -> tuple[Evidence, ...]:
        """Take in the update that the optimizer has just made; returns what is suspicious about it, mostly nothing."""
        return self.sense(self._steps + 1)

    def sense(self, step: int) -> tuple[Evidence, ...]:
        """As `step`, for a supervisor."""
        self._steps = step
        rate = 1.0
        if self._optimizer is not None:
            rate = max((float(group["lr"]) for group in self._optimizer.param_groups), default=1.0) or 1.0
        found: list[Evidence] = []
        for layer, sketch in self._sketches.items():
            position = sketch()
            velocity = position - self._positions[layer] if layer in self._positions else None
            self._positions[layer] = position
            if velocity is not None and not bool(torch.from_numpy(velocity).isfinite().all()):
                velocity = None
            self._states[layer], evidence = self._dynamics.step(self._states[layer], step, velocity, rate, None)
            found.extend(_named(item, layer) for item in evidence)
        return tuple(found)

    def result(self, layer: str | None = None) -> Damping:
        """What the last 128 steps say, for one of `names` (the first one by default).

        Raises
        ------
        ConfigurationError
            There is no such layer.
        """
        name = self.names[0] if layer is None else layer
        if name not in self._states:
            raise ConfigurationError(
                f"There is no layer {name!r} among those that are watched: {', '.join(self.names)}."
            )
        return damping(self._states[name].covariance.blocks)

    def results(self) -> dict[str, Damping]:
        """The result of every layer."""
        return {name: self.result(name) for name in self.names}

    def forget(self) -> None:
        """The parameters were set from outside: the next difference of positions is no update."""
        self._positions.clear()

    def close(self) -> None:
        """There is nothing to take off: no hook is set."""


def _chosen(model: nn.Module, layers: str | Iterable[str] | None) -> list[tuple[str, nn.Parameter]]:
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if layers is None:
        chosen = trained
    elif isinstance(layers, str):
        try:
            pattern = re.compile(layers)
        except re.error as error:
            raise ConfigurationError(f"layers = {layers!r} is no regular expression: {error}.") from None
        chosen = [(name, p) for name, p in trained if pattern.search(name)]
    else:
        wanted = tuple(layers)
        chosen = [(name, p) for name, p in trained if any(name == w or name.startswith(f"{w}.") for w in wanted)]
    if not chosen:
        names = ", ".join(name for name, _ in trained[:6])
        raise ConfigurationError(f"layers = {layers!r} matches no trained parameter; their names begin with {names}.")
    return chosen


def _named(evidence: Evidence, layer: str) -> Evidence:
    message = f"{layer}: {evidence.message}"
    return Evidence(f"damping of {layer}", evidence.statistic, evidence.fired, evidence.guarantee, message)
