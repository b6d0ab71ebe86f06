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
_KEY = 0x0D7
Corruption = Callable[[Any, torch.Generator], Any]


def outliers(subject: Subject, *, seeds: Sequence[int], clock: Clock) -> Findings:
    """Train the trained copy on three bad batches in a row, each kind of them.

    Inputs scaled by 10 and by 100 (where they are real numbers), every target wrong, and garbage: random inputs with
    shuffled targets. Retained is measured against the same number of steps on sound batches.

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
    helped: list[list[tuple[float, float]]] = []
    try:
        for seed in seeds:
            control, norms = _after(subject, None, seed, clock)
            sound += norms
            row, remedies = [], []
            limit = 2.0 * _median(sound)
            for kind in kinds.values():
                left, _ = _after(subject, kind, seed, clock)
                row.append(_retained(subject, left, control))
                if row[-1] < 1.0 - GIVE_BACK:
                    left, _ = _after(subject, kind, seed, clock, clip=limit)
                    kept, _ = _after(subject, kind, seed, clock, buffers_kept=True)
                    remedies.append((_retained(subject, left, control), _retained(subject, kept, control)))
                else:
                    remedies.append((row[-1], row[-1]))
            rows.append(tuple(row))
            helped.append(remedies)
    except OutOfTimeError:
        pass  # what is complete counts
    if not rows:
        return found
    found.curve = Curve("batch outliers", tuple(kinds), tuple(rows), len(seeds))
    means = dict(zip(kinds, found.curve.means, strict=True))
    worst = min(means, key=lambda name: means[name])
    found.points.append(
        CriticalPoint(
            "worst outlier",
            means[worst],
            f"After {BAD_STEPS} batches with {worst}, {means[worst]:.0%} of what was learned is left.",
        )
    )
    if subject.learned and means[worst] < 1.0 - GIVE_BACK:
        place = list(kinds).index(worst)
        clip, kept = (sum(row[place][which] for row in helped) / len(helped) for which in (0, 1))
        found.recommendations.append(_advice(worst, means[worst], clip, kept, 2.0 * _median(sound)))
    return found


def _advice(kind: str, left: float, with_clip: float, with_buffers: float, limit: float) -> Recommendation:
    """What helped where it was tried: it has to win back half of what was lost."""
    enough = left + 0.5 * (1.0 - left)
    if with_buffers > max(enough, with_clip):
        return Recommendation(
            "Keep outliers from the running statistics (BatchNorm): check inputs before the forward pass, or roll back "
            "after such a batch.",
            f"{BAD_STEPS} batches with {kind} leave {left:.0%} of the learned; with the buffers from before them "
            f"{with_buffers:.0%} (measured).",
        )
    if with_clip > enough:
        return Recommendation(
            f"Clip the gradient's norm at {limit:.3g}, twice the median of sound batches.",
            f"{BAD_STEPS} batches with {kind} leave {left:.0%} of the learned; with that clipping {with_clip:.0%} "
            "(measured).",
        )
    return Recommendation(
        "Check the data before they are trained on, or let a supervisor in protect mode undo such steps.",
        f"{BAD_STEPS} batches with {kind} leave {left:.0%} of the learned; clipping does not help ({with_clip:.0%}).",
    )


def _retained(subject: Subject, loss: float, control: float) -> float:
    best = min(control, subject.loss) if math.isfinite(control) else subject.loss
    return share(loss, best=best, uninformed=subject.uninformed) if subject.learned else 0.0


def _after(
    subject: Subject,
    kind: Corruption | None,
    seed: int,
    clock: Clock,
    *,
    clip: float | None = None,
    buffers_kept: bool = False,
) -> tuple[float, list[float]]:
    """Held-out loss after the bad steps, and the gradient norms in them."""
    generator = seeded(_KEY, seed)
    order = torch.randperm(len(subject.batches), generator=generator).tolist()
    batches = [subject.batches[i] for i in (order * BAD_STEPS)[:BAD_STEPS]]
    if kind is not None:
        batches = [kind(batch, generator) for batch in batches]
    flyer = subject.trained.copy()
    norms = train(flyer, batches, subject.loss_fn, steps=BAD_STEPS, seed=seed, clock=clock, clip=clip)
    if buffers_kept:
        for buffer, old in zip(flyer.model.buffers(), subject.trained.model.buffers(), strict=True):
            buffer.copy_(old)
    loss = math.nan if math.isnan(norms[-1]) else subject.probe(flyer.model).read().mean
    return loss, norms


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
