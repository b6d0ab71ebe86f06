"""Learning rates: short trainings at multiples of the user's rate, and the multiple at which training fails."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kalmanguard.errors import ConfigurationError
from kalmanguard.sensors.curvature import sharpness
from kalmanguard.stress.budget import Clock
from kalmanguard.stress.records import CriticalPoint, Curve, Findings, Recommendation
from kalmanguard.stress.subject import Subject, share
from kalmanguard.stress.training import OutOfTimeError, train

MULTIPLES = (1.0, 3.0, 10.0, 30.0, 100.0)
#: A training has failed that keeps less than this share of what the best one has.
_FAILED = 0.5
_BISECTIONS = 4
_NEAR, _BATCHES = 10.0, 4


def learning_rate(subject: Subject, *, seeds: Sequence[int], clock: Clock, steps: int) -> Findings:
    """Train copies from the given state at multiples of the user's learning rate.

    Retained is where the held-out loss ends between a constant output (0) and the least loss that the given state or
    any of these trainings has (1).

    Parameters
    ----------
    subject
        What is stressed; training begins from the state that was given.
    seeds
        Of the order of the batches and of dropout.
    clock
        Time that there is.
    steps
        Length of a training.

    Returns
    -------
    Findings
        The curve over `MULTIPLES`; the critical multiple by bisection; how near the rate is to the edge of stability.

    Notes
    -----
    Guarantee: HEURISTIC. What fails within so few steps fails; what lasts them may fail later. Rates are constant:
    a schedule of the user's does not take part. Cost: ``steps`` training steps for each multiple, seed and bisection.
    """
    found = Findings()
    losses: list[list[float]] = []
    for seed in seeds:
        try:
            losses.append([_end(subject, m, seed=seed, steps=steps, clock=clock) for m in MULTIPLES])
        except OutOfTimeError:
            break
    if not losses:
        return found
    given = subject.probe(subject.start.model).read().mean
    best = min((loss for loss in (given, *(x for row in losses for x in row)) if math.isfinite(loss)), default=math.nan)
    clear = subject.learned or subject.uninformed - best > 0.02 * abs(subject.uninformed)
    rows = [[share(x, best=best, uninformed=subject.uninformed) if clear else 0.0 for x in row] for row in losses]
    curve = Curve("learning rate", tuple(f"x{m:g}" for m in MULTIPLES), tuple(map(tuple, rows)), len(seeds))
    found.curve = curve
    _bisect(subject, best, curve, seed=seeds[0], steps=steps, clock=clock, found=found)
    if not clock.spent:
        _edge(subject, found)
    return found


def _end(subject: Subject, multiple: float, *, seed: int, steps: int, clock: Clock) -> float:
    flyer = subject.start.copy()
    norms = train(flyer, subject.batches, subject.loss_fn, steps=steps, seed=seed, clock=clock, factor=multiple)
    return math.nan if math.isnan(norms[-1]) else subject.probe(flyer.model).read().mean


def _bisect(
    subject: Subject, best: float, curve: Curve, *, seed: int, steps: int, clock: Clock, found: Findings
) -> None:
    """The critical multiple, for the first seed, between the last sound multiple and the first that fails for good."""
    sound = [value >= _FAILED for value in curve.retained[0]]
    rates = ", ".join(f"{float(group['lr']):g}" for group in subject.start.optimizer.param_groups[:3])
    name = "critical learning rate"
    if not any(sound):
        found.points.append(
            CriticalPoint(name, 1.0, f"Training does not work at the given rate ({rates}), nor at any multiple of it.")
        )
        found.recommendations.append(
            Recommendation(
                "Lower the learning rate, or look at the model (normalisation, residual connections, initialisation).",
                f"Within {steps} steps no rate from x1 to x{MULTIPLES[-1]:g} learns.",
            )
        )
        return
    last = max(i for i, ok in enumerate(sound) if ok)
    if last == len(sound) - 1:
        found.points.append(
            CriticalPoint(name, None, f"Training still works at {MULTIPLES[-1]:g} times the given rate ({rates}).")
        )
        return
    low, high = MULTIPLES[last], MULTIPLES[last + 1]
    try:
        for _ in range(_BISECTIONS):
            middle = math.sqrt(low * high)
            loss = _end(subject, middle, seed=seed, steps=steps, clock=clock)
            if share(loss, best=best, uninformed=subject.uninformed) >= _FAILED:
                low = middle
            else:
                high = middle
    except OutOfTimeError:
        found.left_out.append(f"learning rate: the critical multiple is known only to lie in {low:.3g} to {high:.3g}")
    critical = math.sqrt(low * high)
    found.points.append(
        CriticalPoint(
            name,
            critical,
            f"Training over {steps} steps fails from about {critical:.3g} times the given rate ({rates}) on.",
        )
    )
    if critical < _NEAR:
        found.recommendations.append(
            Recommendation(
                "Lower the learning rate or lengthen its warm-up; put the run under a supervisor in protect mode.",
                f"Training fails at {critical:.3g} times the given rate: less than a factor of {_NEAR:g} is left.",
            )
        )


def _edge(subject: Subject, found: Findings) -> None:
    """How near the trained state is to the edge of stability."""
    if subject.loss_fn is None:
        return
    trained = subject.trained
    try:
        sharp = sharpness(
            trained.model, subject.loss_fn, subject.batches[:_BATCHES], optimizer=trained.optimizer, iterations=12
        )
    except (ConfigurationError, RuntimeError):  # another optimizer, or an operation without a second derivative
        return
    if sharp.ratio is not None:
        found.points.append(
            CriticalPoint(
                "edge of stability",
                sharp.ratio,
                f"The learning rate is at {sharp.ratio:.2g} of the edge of stability (sharpness {sharp.value:.3g}).",
            )
        )
