"""Noise on the weights, relative to them: of all layers at several levels, and of each layer alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kalmanguard.errors import ConfigurationError
from kalmanguard.faults.fault import matching, seeded
from kalmanguard.sensors.importance import fisher_importance
from kalmanguard.stress.budget import Clock
from kalmanguard.stress.records import (
    GIVE_BACK,
    CriticalPoint,
    Curve,
    Findings,
    Layer,
    Recommendation,
    crossing,
    standard_error,
)
from kalmanguard.stress.subject import Subject

LEVELS = (0.01, 0.03, 0.1, 0.3, 1.0)
#: Noise by which layers are compared: half as large as the weights.
_LAYER_LEVEL = 0.5
_KEY = 0x4E01
_WEAK, _STRONG = 0.5, 0.1


def weight_noise(subject: Subject, *, seeds: Sequence[int], clock: Clock) -> Findings:
    """Add normal noise to the weights and measure what is left of what the model has learned.

    The noise of a filter (a row of a matrix, an output channel of a convolution) has a standard deviation of ``level``
    times the root mean square of that filter; of a parameter of one dimension, of the whole parameter. So a model and
    the same one with rescaled weights are treated alike.

    Parameters
    ----------
    subject
        What is stressed; its trained copy is perturbed and put back, bit for bit.
    seeds
        Of the noise.
    clock
        Time that there is.

    Returns
    -------
    Findings
        The curve over `LEVELS`, layers by their sensitivity, and the noise at which 20 % of the learned is lost.

    Notes
    -----
    Guarantee: HEURISTIC; random directions are not the worst ones. Cost: a held-out pass for each level, layer and
    seed.
    """
    found = Findings()
    model = subject.trained.model
    probe = subject.probe(model)
    rows: list[tuple[float, ...]] = []
    for seed in seeds:
        row: list[float] = []
        for place, level in enumerate(LEVELS):
            if clock.spent:
                break
            with perturbed(matching(model, None), level, seeded(_KEY, seed, place)):
                row.append(subject.retained(probe.read().mean))
        if len(row) < len(LEVELS):
            break
        rows.append(tuple(row))
    if rows:
        found.curve = Curve("weight noise", tuple(f"{level:g}" for level in LEVELS), tuple(rows), len(seeds))
        found.points.append(_critical(found.curve))
    _by_layer(subject, seeds=seeds, clock=clock, found=found)
    return found


def _critical(curve: Curve) -> CriticalPoint:
    at = crossing(list(LEVELS), list(curve.means), 1.0 - GIVE_BACK)
    name = "critical weight noise"
    if at is None:
        return CriticalPoint(
            name, None, f"Noise as large as the weights costs less than {GIVE_BACK:.0%} of the learned."
        )
    return CriticalPoint(name, at, f"Noise of {at:.2g} times the weights costs {GIVE_BACK:.0%} of what was learned.")


def _by_layer(subject: Subject, *, seeds: Sequence[int], clock: Clock, found: Findings) -> None:
    model = subject.trained.model
    layers = by_layer(model)
    if clock.spent:
        found.left_out.append("weight noise in single layers")
        return
    probe = subject.probe(model)
    lost: dict[str, list[float]] = defaultdict(list)
    for seed in seeds:
        for place, (name, parameters) in enumerate(layers.items()):
            if clock.spent:
                break
            with perturbed(parameters, _LAYER_LEVEL, seeded(_KEY, seed, place, 1)):
                lost[name].append(1.0 - subject.retained(probe.read().mean))
    importance = _importance(subject) if not clock.spent else {}
    for name, values in lost.items():
        size = sum(p.numel() for _, p in layers[name])
        mean = sum(values) / len(values)
        found.layers.append(Layer(name, size, mean, standard_error(values), importance=importance.get(name)))
    found.layers.sort(key=lambda layer: -layer.lost)
    if missing := len(layers) - len(lost):
        found.left_out.append(f"weight noise in single layers: {missing} of {len(layers)} layers")
    if not subject.learned or len(found.layers) < 2:
        return
    weakest, rest = found.layers[0], [layer.lost for layer in found.layers[1:]]
    if weakest.lost > _WEAK and sorted(rest)[len(rest) // 2] < _STRONG:
        found.recommendations.append(
            Recommendation(
                f"Protect {weakest.name or 'the parameters of the model itself'}: leave it out of quantisation and "
                "pruning, and watch it in training (Forensics).",
                f"Noise of {_LAYER_LEVEL:g} times its weights costs {weakest.lost:.0%} of the learned; in half of the "
                f"other layers less than {_STRONG:.0%}.",
            )
        )


def _importance(subject: Subject) -> dict[str, float]:
    if subject.loss_fn is None:
        return {}
    try:
        return fisher_importance(subject.trained.model, subject.loss_fn, subject.batches[:4]).per_layer()
    except (ConfigurationError, RuntimeError):  # an operation without the derivatives that it needs
        return {}


def by_layer(model: nn.Module) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Floating-point parameters by the module that owns them."""
    layers: dict[str, list[tuple[str, nn.Parameter]]] = defaultdict(list)
    for name, parameter in matching(model, None):
        layers[name.rpartition(".")[0]].append((name, parameter))
    return dict(layers)


@contextmanager
def perturbed(
    parameters: Sequence[tuple[str, nn.Parameter]], level: float, generator: torch.Generator
) -> Iterator[None]:
    """Add the noise inside; afterwards the parameters are bitwise as before."""
    before = [p.detach().clone() for _, p in parameters]
    try:
        with torch.no_grad():
            for _, p in parameters:
                p.add_(level * _noise(p, generator))
        yield
    finally:
        with torch.no_grad():
            for (_, p), old in zip(parameters, before, strict=True):
                p.copy_(old)


def _noise(parameter: Tensor, generator: torch.Generator) -> Tensor:
    values = parameter.detach().float()
    rows = values.flatten(1) if values.ndim > 1 else values.reshape(1, -1)
    scale = rows.square().mean(1, keepdim=True).sqrt()
    noise = torch.randn(rows.shape, generator=generator).to(rows) * scale
    return noise.reshape(parameter.shape).to(parameter.dtype)
