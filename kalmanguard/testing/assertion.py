"""The assertion: short trainings under an observing supervisor, and what must hold for each of them."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kalmanguard.errors import ConfigurationError
from kalmanguard.records import Action, Decision, FloatArray, Level
from kalmanguard.sensors.trace import random_streams_kept
from kalmanguard.stress.records import GIVE_BACK
from kalmanguard.testing.instability import InstabilityError, of_decision
from kalmanguard.testing.trial import Trial

_SURE = 3.0  # standard errors of the paired difference
_FEWEST = 20
_LEAST_BEFORE, _BEFORE = 10, 50  # steps that a gradient norm is held against


@dataclass(frozen=True, slots=True)
class StabilityResult:
    """What the runs of a stable training were like, in the order of the seeds.

    Attributes
    ----------
    first, last
        Mean held-out loss before and after.
    largest_gradient
        Largest gradient norm, in medians of the steps before it.
    suspicions
        Steps that were suspicious, and turned out to be none.
    """

    first: tuple[float, ...]
    last: tuple[float, ...]
    largest_gradient: tuple[float, ...]
    suspicions: tuple[int, ...]


@dataclass(slots=True)
class _Run:
    """How one run went."""

    trial: Trial
    first: FloatArray
    last: FloatArray
    digest: str


def assert_stable(
    train_fn: Callable[[Trial], object],
    *,
    steps: int = 200,
    seeds: int = 3,
    seed: int = 0,
    improvement: float | None = 0.01,
    gradient_ratio: float = 100.0,
    reproducible: bool = False,
    faults: Sequence[str] = (),
) -> StabilityResult:
    """Run a short training under an observing supervisor and assert that it is stable.

    For each seed: no failure is confirmed; the held-out loss falls by more than its own noise; no gradient is far
    beyond the others. If asked for: the same seed gives the same parameters, and a supervisor in protect mode brings
    the run through each of the ``faults``.

    Parameters
    ----------
    train_fn
        ``train_fn(trial)`` makes a model and trains it: it calls ``trial.supervise(model, held_out, optimizer=...)``,
        takes ``trial.steps`` steps (``for batch in trial.batches(loader)`` counts them) and calls ``update(loss)`` of
        the supervisor after each. `standard_loop` makes one of a factory.
    steps, seeds, seed
        Length of a run, how many there are, and the first seed.
    improvement
        Least share of the first held-out loss that must be gained; the gain must also be above three standard errors of
        its paired difference over the examples. ``None`` for no such demand.
    gradient_ratio
        Largest gradient norm allowed, in medians of the 50 steps before it; ``math.inf`` for no bound.
    reproducible
        Whether the first seed is run twice and must end bit for bit the same.
    faults
        In the notation of `parse_fault`, such as ``"lr_spike:50@100"``. For each, the first seed is run in protect
        mode with the fault; at least 80 % of what the undisturbed run gains must be gained.

    Returns
    -------
    StabilityResult
        Figures of the runs.

    Raises
    ------
    InstabilityError
        An `AssertionError` with the step, the evidence and what to look at.
    ConfigurationError
        A number out of range; a training function that is not supervised, or takes fewer steps.

    Notes
    -----
    Random streams of Python, NumPy and torch are as before afterwards. Probes come every ``steps / 40`` steps and not
    as time permits, so that the outcome does not depend on the machine's load. Guarantee: HEURISTIC; a confirmed
    failure is the supervisor's (see its guarantees), and a training that is stable here may fail later. Cost:
    ``seeds`` runs, one more if ``reproducible``, and one for each fault.
    """
    __tracebackhide__ = True
    _check(steps=steps, seeds=seeds, seed=seed, gradient_ratio=gradient_ratio, improvement=improvement)
    runs = []
    for number in range(seed, seed + seeds):
        run = _run(train_fn, number, steps)
        _assert_no_failure(run)
        if improvement is not None:
            _assert_improvement(run, improvement)
        _assert_gradients(run, gradient_ratio)
        runs.append(run)
    if reproducible:
        _assert_same(runs[0], _run(train_fn, seed, steps))
    for fault in faults:
        _assert_recovery(runs[0], _run(train_fn, seed, steps, fault=fault), fault)
    return StabilityResult(
        tuple(float(run.first.mean()) for run in runs),
        tuple(float(run.last.mean()) for run in runs),
        tuple(_ratio(run.trial.gradient_norms)[0] for run in runs),
        tuple(sum(d.level is Level.SUSPECT for d in run.trial.decisions) for run in runs),
    )


def _check(*, steps: int, seeds: int, seed: int, gradient_ratio: float, improvement: float | None) -> None:
    if steps < _FEWEST:
        raise ConfigurationError(f"steps = {steps}: give at least {_FEWEST}, of which a fifth is warm-up.")
    if seeds < 1 or seed < 0:
        raise ConfigurationError(f"seeds = {seeds} must be at least 1, seed = {seed} at least 0.")
    if not gradient_ratio > 1:
        raise ConfigurationError(f"gradient_ratio = {gradient_ratio} must be above 1; math.inf is no bound.")
    if improvement is not None and not 0 <= improvement < 1:
        raise ConfigurationError(f"improvement = {improvement} is a share in [0, 1), or None for no demand.")


def _run(train_fn: Callable[[Trial], object], seed: int, steps: int, *, fault: str | None = None) -> _Run:
    cuda = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with random_streams_kept(torch.device("cpu")), torch.random.fork_rng(cuda):
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        for device in cuda:
            torch.cuda.default_generators[device].manual_seed(seed)
        faults = () if fault is None else (fault,)
        with Trial(seed=seed, steps=steps, faults=faults, mode="observe" if fault is None else "protect") as trial:
            train_fn(trial)
            if not trial.supervised or trial.first is None:
                raise ConfigurationError("The training function never called trial.supervise(model, held_out, ...).")
            taken = len({decision.step for decision in trial.decisions})
            if not trial.halted and fault is None and taken < steps:
                raise ConfigurationError(
                    f"The supervisor saw {taken} steps, {steps} are wanted: loop over trial.batches(loader), and call "
                    "supervisor.update(loss) after every step."
                )
            return _Run(trial, trial.first, trial.last(), trial.digest())


def _assert_no_failure(run: _Run) -> None:
    __tracebackhide__ = True
    for decision in run.trial.decisions:
        if _failed(decision):
            raise of_decision(run.trial.seed, decision)


def _failed(decision: Decision) -> bool:
    return decision.level is Level.CONFIRMED or decision.proposed is not Action.ACCEPT


def _assert_improvement(run: _Run, least_frac: float) -> None:
    __tracebackhide__ = True
    gained = run.first - run.last
    mean, error = float(gained.mean()), float(gained.std(ddof=1)) / math.sqrt(len(gained))
    least = max(_SURE * error, least_frac * abs(float(run.first.mean())))
    if not mean > least:
        raise InstabilityError(
            run.trial.seed,
            None,
            f"the held-out loss goes from {run.first.mean():.4g} to {run.last.mean():.4g} in {run.trial.steps} steps; "
            f"the gain of {mean:.3g} is not above {least:.3g}, which is the larger of {_SURE:g} standard errors and "
            f"{least_frac:.0%} of the first loss.",
            "the learning rate, the number of steps, and whether the optimizer holds the model's parameters",
        )


def _ratio(norms: Sequence[float]) -> tuple[float, int]:
    """The largest norm in medians of the steps before it, and its step from 1.

    Not of the whole run: where training converges, the first gradients are large against those at the end.
    """
    found = (1.0, 1)
    for i in range(_LEAST_BEFORE, len(norms)):
        median = statistics.median(norms[max(0, i - _BEFORE) : i])
        ratio = norms[i] / median if median > 0 else 1.0
        if not ratio <= found[0]:
            found = ratio, i + 1
    return found


def _assert_gradients(run: _Run, bound: float) -> None:
    __tracebackhide__ = True
    ratio, step = _ratio(run.trial.gradient_norms)
    if not ratio <= bound:
        raise InstabilityError(
            run.trial.seed,
            step,
            f"the gradient's norm is {ratio:.4g} times the median of the steps before; {bound:g} is allowed.",
            "the batch of this step, warm-up of the learning rate, normalisation, and clipping of gradients",
        )


def _assert_same(run: _Run, again: _Run) -> None:
    __tracebackhide__ = True
    if run.digest == again.digest:
        return
    pairs = zip(run.trial.gradient_norms, again.trial.gradient_norms, strict=False)
    step = next((i for i, (a, b) in enumerate(pairs, 1) if a != b), None)
    raise InstabilityError(
        run.trial.seed,
        step,
        "two runs with the same seed part here; their parameters differ at the end.",
        "random numbers that are drawn from a source of their own, the order of the data, loader workers, and "
        "torch.use_deterministic_algorithms",
    )


def _assert_recovery(clean: _Run, run: _Run, fault: str) -> None:
    __tracebackhide__ = True
    trial = run.trial
    if not trial.faults_done:
        raise ConfigurationError(
            f"The fault {fault!r} never acted in {trial.steps} steps: choose an earlier step; for faults in the data "
            "loop over trial.batches(loader)."
        )
    start, clean_end, end = (float(x.mean()) for x in (clean.first, clean.last, run.last))
    kept = (start - end) / (start - clean_end) if start > clean_end else math.nan
    halted = next((d for d in trial.decisions if d.action is Action.HALT), None)
    if halted is not None:
        raise of_decision(trial.seed, halted)
    if not kept >= 1.0 - GIVE_BACK:
        seen = next((d for d in trial.decisions if _failed(d)), None)
        told = f"first seen at step {seen.step:,}: {seen.reason}" if seen is not None else "the supervisor saw nothing."
        raise InstabilityError(
            trial.seed,
            seen.step if seen is not None else None,
            f"after {fault} the held-out loss ends at {end:.4g}, without it at {clean_end:.4g}: {kept:.0%} of the gain "
            f"is left, {1 - GIVE_BACK:.0%} are wanted; {told}",
            "the settings of the supervisor, and how many steps there are for recovery after the fault",
        )
