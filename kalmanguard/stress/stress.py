"""The stress test: every kind of stress on copies of a model, within a time budget."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from kalmanguard.errors import ConfigurationError
from kalmanguard.sensors.trace import random_streams_kept
from kalmanguard.stress.bit_flips import bit_flips
from kalmanguard.stress.budget import Clock
from kalmanguard.stress.learning_rate import learning_rate
from kalmanguard.stress.outliers import outliers
from kalmanguard.stress.precision import precision
from kalmanguard.stress.records import Findings, Layer
from kalmanguard.stress.report import StressReport
from kalmanguard.stress.subject import Flyer, LossFn, Subject, materialised
from kalmanguard.stress.training import OutOfTimeError, train
from kalmanguard.stress.weight_noise import weight_noise

#: The kinds of stress, in the order in which they are measured.
KINDS = ("weight noise", "learning rate", "precision", "bit flips", "batch outliers")
_DEFAULT_RATE = 1e-3
_WARMUP_SHARE = 0.25


def stress(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFn | None = None,
    *,
    held_out: Iterable[Any] | None = None,
    optimizer: Optimizer | None = None,
    kinds: Sequence[str] = KINDS,
    seeds: int = 3,
    seed: int = 0,
    budget_s: float = 60.0,
    train_steps: int = 40,
    warmup_steps: int = 200,
    max_batches: int = 32,
    examples: int = 256,
) -> StressReport:
    """Perturb and probe a model, and score how much of what it has learned it keeps.

    Weight noise, multiples of the learning rate, precision, bit flips and outliers in the data, each at several levels.
    A model that is no better than a constant output is trained for a while first (a copy, with its own recipe).

    Parameters
    ----------
    model
        The model; only copies of it are changed or trained.
    batches
        A small sample of batches ``(inputs, target)``, dicts or tensors; at most ``max_batches`` are read. An iterator
        is advanced by as many.
    loss_fn
        ``loss_fn(output, target)``, a mean or one loss for each example; inferred as by `Probe` when ``None``.
    held_out
        Batches that the loss is measured on; by default the last third of ``batches``.
    optimizer
        SGD, AdamW or any other over the model's parameters, with its learning rates and state; by default AdamW at
        1e-3, which is said in the report.
    kinds
        Which stresses, of `KINDS`.
    seeds, seed
        How many repetitions, and the first seed.
    budget_s
        Seconds that it may take. What does not fit is left out and named. It is
        asked before every pass through the model, so the end is late by a few passes at most.
    train_steps
        Steps of the short trainings.
    warmup_steps
        Most steps of training before, for a model that has learned nothing yet; 0 for none.
    max_batches, examples
        Size of the sample: training batches, and held-out examples.

    Returns
    -------
    StressReport
        Score, curves, weak layers, critical points, recommendations.

    Raises
    ------
    ConfigurationError
        A number out of range, a sample that is too small, a loss that cannot be inferred, a model that cannot be
        copied, an optimizer that holds other parameters.

    Notes
    -----
    The model, the optimizer and all random streams of Python, NumPy and torch are bitwise as before. With the same seed
    and enough time the report is the same again. Guarantee: HEURISTIC. Cost: bounded by ``budget_s``.

    Examples
    --------
    >>> _ = torch.manual_seed(0)
    >>> x = torch.randn(256, 4)
    >>> data = [(part, (part[:, :1] > 0).long().squeeze(1)) for part in x.split(32)]
    >>> model = nn.Linear(4, 2)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    >>> report = stress(model, data, optimizer=optimizer, seeds=2, kinds=("weight noise", "precision"))
    >>> report.complete, 80 < report.score < 100
    (True, True)
    """
    _check(kinds=kinds, seeds=seeds, seed=seed, budget_s=budget_s, train_steps=train_steps, warmup_steps=warmup_steps)
    began = time.monotonic()
    clock = Clock(budget_s)
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise ConfigurationError("The model has no parameters; there is nothing to stress.")
    notes: list[str] = []
    with random_streams_kept(parameter.device):
        train_batches, held = materialised(
            list(islice(batches, max_batches)), None if held_out is None else list(held_out), parameter.device
        )
        start = _copied(model, optimizer, notes)
        subject = Subject(start, start.copy(), train_batches, held, loss_fn, examples)
        subject.measure()
        _warm_up(subject, warmup_steps, seed, clock, notes)
        chosen = list(range(seed, seed + seeds))
        found: dict[str, Findings] = {}
        for place, kind in enumerate(kinds):
            if clock.spent:
                found[kind] = Findings()
                continue
            found[kind] = _STRESSES[kind](train_steps)(subject, seeds=chosen, clock=clock.share(len(kinds) - place))
    return _report(subject, found, kinds, notes, seconds=time.monotonic() - began, budget_s=budget_s)


_STRESSES: dict[str, Callable[[int], Callable[..., Findings]]] = {
    "weight noise": lambda steps: weight_noise,
    "learning rate": lambda steps: partial(learning_rate, steps=steps),
    "precision": lambda steps: precision,
    "bit flips": lambda steps: bit_flips,
    "batch outliers": lambda steps: outliers,
}


def _check(
    *, kinds: Sequence[str], seeds: int, seed: int, budget_s: float, train_steps: int, warmup_steps: int
) -> None:
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds or len(set(kinds)) < len(kinds):
        raise ConfigurationError(f"kinds = {list(kinds)!r}: name each at most once, of {', '.join(KINDS)}.")
    if seeds < 1 or seed < 0:
        raise ConfigurationError(f"seeds = {seeds} must be at least 1, seed = {seed} at least 0.")
    if not (0 < budget_s < math.inf):
        raise ConfigurationError(f"budget_s = {budget_s}: give a positive number of seconds.")
    if train_steps < 1 or warmup_steps < 0:
        raise ConfigurationError(
            f"train_steps = {train_steps} must be at least 1 and warmup_steps = {warmup_steps} at least 0."
        )


def _copied(model: nn.Module, optimizer: Optimizer | None, notes: list[str]) -> Flyer:
    original: nn.Module = getattr(model, "_orig_mod", model)
    own = {id(p) for p in original.parameters()}
    if optimizer is not None and not all(id(p) in own for g in optimizer.param_groups for p in g["params"]):
        raise ConfigurationError(
            "The optimizer holds parameters that are not the model's; pass the model's own optimizer."
        )
    try:
        if optimizer is not None:
            return Flyer(original, optimizer).copy()
        flyer = Flyer(original, torch.optim.AdamW([p for p in original.parameters() if p.requires_grad], _DEFAULT_RATE))
        copied = flyer.copy()
    except (RuntimeError, TypeError, NotImplementedError, ValueError) as error:
        raise ConfigurationError(
            f"The model or its optimizer cannot be copied ({error}); a stress test works on copies only. Parameters "
            "must require gradients, and the model must support copy.deepcopy."
        ) from error
    notes.append(f"No optimizer was given: trainings use AdamW at a learning rate of {_DEFAULT_RATE:g}.")
    return copied


def _warm_up(subject: Subject, steps: int, seed: int, clock: Clock, notes: list[str]) -> None:
    """Train a copy of a model that has learned nothing yet."""
    if subject.learned or not steps:
        return
    part = Clock(_WARMUP_SHARE * clock.left_s)
    flyer = subject.start.copy()
    try:
        done = len(train(flyer, subject.batches, subject.loss_fn, steps=steps, seed=seed, clock=part))
    except OutOfTimeError as early:
        done = early.steps
        notes.append("The training before the test ended early: a quarter of the time was over.")
    subject.trained = flyer
    before = subject.loss
    subject.measure()
    notes.append(
        f"The model had learned nothing yet (held-out loss {before:.4g}): a copy was trained for {done} steps with its "
        "own optimizer first, and that copy is judged."
    )


def _report(
    subject: Subject, found: dict[str, Findings], kinds: Sequence[str], notes: list[str], *, seconds: float,
    budget_s: float,
) -> StressReport:  # fmt: skip
    curves = [findings.curve for findings in found.values() if findings.curve is not None]
    left_out = [text for findings in found.values() for text in findings.left_out]
    for kind, findings in found.items():
        if findings.curve is None:
            left_out.append(f"{kind}: the time did not suffice")
        elif len(findings.curve.retained) < findings.curve.seeds_wanted:
            left_out.append(f"{kind}: {len(findings.curve.retained)} of {findings.curve.seeds_wanted} seeds in time")
    model = subject.start.model
    size = sum(p.numel() for p in model.parameters())
    if not subject.learned:
        notes.append("On this sample the model is no better than a constant output: the score is 0 where it needs one.")
    return StressReport(
        model=f"{type(model).__name__} with {size:,} parameters, {type(subject.start.optimizer).__name__}",
        loss=subject.loss,
        uninformed=subject.uninformed,
        learned=subject.learned,
        curves=tuple(curves),
        layers=_layers(found),
        critical_points=tuple(point for findings in found.values() for point in findings.points),
        recommendations=tuple(advice for findings in found.values() for advice in findings.recommendations),
        left_out=tuple(left_out),
        notes=tuple(notes),
        seconds=seconds,
        budget_s=budget_s,
        kinds=tuple(kinds),
    )


def _layers(found: dict[str, Findings]) -> tuple[Layer, ...]:
    """Layers by their sensitivity to noise, with their flips."""
    flips = {layer.name: layer for layer in found.get("bit flips", Findings()).layers}
    noisy = found.get("weight noise", Findings()).layers
    merged = []
    for layer in noisy:
        struck = flips.get(layer.name)
        merged.append(
            layer if struck is None else replace(layer, flips=struck.flips, harmful_flips=struck.harmful_flips)
        )
    return tuple(merged)
