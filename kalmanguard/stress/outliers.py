"""Outliers in the data: what a few bad batches do to the trained model, and whether clipping would help."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kalmanguard.faults import GarbageBatch, LabelNoise
from kalmanguard.faults.batch import map_batch, tensors
from kalmanguard.faults.fault import DataFault, seeded
from kalmanguard.stress.budget import Clock
from kalmanguard.stress.records import GIVE_BACK, CriticalPoint, Curve, Findings, Recommendation
from kalmanguard.stress.subject import Subject, share
from kalmanguard.stress.training import OutOfTimeError, train

#: Batches in a row that are bad.
BAD_STEPS = 3
#: Clipping that is tried, in medians of the norms of sound batches.
_CLIP = 2.0
_KEY = 0x0D7
Corruption = Callable[[Any, torch.Generator], Any]


def outliers(subject: Subject, *, seeds: Sequence[int], clock: Clock) -> Findings:
    """Train the trained copy on three bad batches in a row, each kind of them.

    Inputs scaled by 10 and by 100 (where they are real numbers), every target wrong, and garbage: random inputs with
    shuffled targets. Retained is measured against the same number of steps on sound batches, with the buffers from
    before: what the parameters have lost. Running statistics (BatchNorm) heal by themselves in further training, so
    what is lost with the poisoned ones is told as a critical point and is no part of the curve.

    Parameters
    ----------
    subject
        What is stressed; copies are trained.
    seeds
        Of the batches and of the corruption.
    clock
        Time that there is.

    Returns
    -------
    Findings
        The curve over the kinds; the worst of them; clipping as a recommendation where it was tried and helped.

    Notes
    -----
    Guarantee: HEURISTIC; it says what these batches do within three steps. Cost: some 20 training steps for each seed.
    """
    found = Findings()
    kinds = _kinds(subject)
    rows: list[tuple[float, ...]] = []
    sound: list[float] = []
    clipped: list[list[float]] = []
    poisoned: list[list[float]] = []
    try:
        for seed in seeds:
            control, _, norms = _after(subject, None, seed, clock)
            sound += norms
            row, with_clip, with_buffers = [], [], []
            for kind in kinds.values():
                loss, loss_poisoned, _ = _after(subject, kind, seed, clock)
                row.append(_retained(subject, loss, control))
                with_buffers.append(_retained(subject, loss_poisoned, control))
                if row[-1] < 1.0 - GIVE_BACK:
                    loss, _, _ = _after(subject, kind, seed, clock, clip=_CLIP * _median(sound))
                with_clip.append(_retained(subject, loss, control))
            rows.append(tuple(row))
            clipped.append(with_clip)
            poisoned.append(with_buffers)
    except OutOfTimeError:
        pass  # what is complete counts
    if not rows:
        return found
    found.curve = Curve("batch outliers", tuple(kinds), tuple(rows), len(seeds))
    if subject.learned:
        _judge(found, found.curve, clipped, poisoned, limit=_CLIP * _median(sound))
    return found


def _judge(
    found: Findings, curve: Curve, clipped: list[list[float]], poisoned: list[list[float]], *, limit: float
) -> None:
    """The worst kind and what helps against it; and the running statistics."""
    place = min(range(len(curve.levels)), key=lambda i: curve.means[i])
    kind, left = curve.levels[place], curve.means[place]
    fact = f"{BAD_STEPS} batches with {kind} leave {left:.0%} of the learned"
    found.points.append(CriticalPoint("worst outlier", left, f"{fact}, by what they do to the parameters."))
    if left < 1.0 - GIVE_BACK:
        with_clip = sum(row[place] for row in clipped) / len(clipped)
        # It has to win back half of what was lost.
        if with_clip > left + 0.5 * (1.0 - left):
            action = f"Clip the gradient's norm at {limit:.3g}, {_CLIP:g} times the median of sound batches."
            fact += f"; with that clipping {with_clip:.0%} (measured)."
        else:
            action = "Check the data before they are trained on, or let a supervisor in protect mode undo such steps."
            fact += f"; clipping does not help ({with_clip:.0%})."
        found.recommendations.append(Recommendation(action, fact))
    means = [sum(column) / len(column) for column in zip(*poisoned, strict=True)]
    worst = max(range(len(means)), key=lambda i: curve.means[i] - means[i])
    if curve.means[worst] - means[worst] > GIVE_BACK:
        fact = (
            f"{BAD_STEPS} batches with {curve.levels[worst]} leave {means[worst]:.0%} in evaluation; with "
            f"the running statistics from before them, {curve.means[worst]:.0%} of the learned is left."
        )
        found.points.append(CriticalPoint("running statistics", means[worst], fact))
        found.recommendations.append(
            Recommendation(
                "Keep outliers from the running statistics (BatchNorm): check inputs before the forward pass, and "
                "evaluate no sooner than they have healed.",
                fact,
            )
        )


def _retained(subject: Subject, loss: float, control: float) -> float:
    best = min(control, subject.loss) if math.isfinite(control) else subject.loss
    return share(loss, best=best, uninformed=subject.uninformed) if subject.learned else 0.0


def _after(
    subject: Subject, kind: Corruption | None, seed: int, clock: Clock, *, clip: float | None = None
) -> tuple[float, float, list[float]]:
    """Held-out loss after the bad steps, with the buffers from before and with those of now; gradient norms."""
    generator = seeded(_KEY, seed)
    order = torch.randperm(len(subject.batches), generator=generator).tolist()
    batches = [subject.batches[i] for i in (order * BAD_STEPS)[:BAD_STEPS]]
    if kind is not None:
        batches = [kind(batch, generator) for batch in batches]
    flyer = subject.trained.copy()
    norms = train(flyer, batches, subject.loss_fn, steps=BAD_STEPS, seed=seed, clock=clock, clip=clip)
    if math.isnan(norms[-1]):
        return math.nan, math.nan, norms
    poisoned = subject.probe(flyer.model).read().mean
    buffers = list(flyer.model.buffers())
    if not buffers:
        return poisoned, poisoned, norms
    for buffer, old in zip(buffers, subject.trained.model.buffers(), strict=True):
        buffer.copy_(old)
    return subject.probe(flyer.model).read().mean, poisoned, norms


def _kinds(subject: Subject) -> dict[str, Corruption]:
    inputs, targets = tensors(subject.batches[0])
    kinds: dict[str, Corruption] = {}
    if any(t.is_floating_point() for t in inputs):
        kinds |= {"inputs x 10": _scaled(10.0), "inputs x 100": _scaled(100.0)}
    if targets:
        labels = _labels(subject)
        kinds["wrong targets"] = _by(LabelNoise(1.0), labels)
        kinds["garbage"] = _by(GarbageBatch(), labels)
    else:
        kinds["garbage"] = _by(GarbageBatch(), (0, 0))
    return kinds


def _scaled(factor: float) -> Corruption:
    def corrupt(batch: Any, generator: torch.Generator) -> Any:
        del generator
        return map_batch(batch, inputs=lambda t: t * factor if t.is_floating_point() else t, targets=lambda t: t)

    return corrupt


def _by(fault: DataFault, labels: tuple[int, int]) -> Corruption:
    def corrupt(batch: Any, generator: torch.Generator) -> Any:
        return map_batch(
            batch,
            inputs=lambda t: fault.corrupt_input(t, generator),
            targets=lambda t: fault.corrupt_target(t, labels, generator),
        )

    return corrupt


def _labels(subject: Subject) -> tuple[int, int]:
    """Least and greatest class of the sample."""
    classes: list[Tensor] = [
        t[t >= 0] for batch in subject.batches for t in tensors(batch)[1] if not t.is_floating_point()
    ]
    known = torch.cat([t.reshape(-1) for t in classes]) if classes else torch.zeros(0)
    return (int(known.min()), int(known.max())) if known.numel() else (0, 0)


def _median(values: Sequence[float]) -> float:
    ordered = sorted(value for value in values if math.isfinite(value))
    return ordered[len(ordered) // 2] if ordered else 1.0
