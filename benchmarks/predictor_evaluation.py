"""How good a failure predictor is on runs that it has not seen, step by step, run by run, and beside the engine."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score

from benchmarks.benchmark import Result
from benchmarks.predictor_corpus import Trace
from benchmarks.predictor_training import (
    Fitted,
    Flags,
    Floats,
    Run,
    firings,
    fit_with_threshold,
    folds_of,
    trained,
)
from kalmanguard.detectors.predictor import FailurePredictor
from kalmanguard.detectors.predictor_file import PredictorFile
from kalmanguard.engine import STATISTICS
from kalmanguard.records import Action, Decision, Level, Measurement, Mode

#: Bounds of the forecast probabilities between which the frequency of failures is compared with them.
BINS = (0.0, 0.01, 0.03, 0.1, 0.3, 0.6, 1.0)
_DRAWS = 5
_TIMED = 300


def evaluate(kind: str, horizon: int, split: str, folds: Iterable[tuple[str, list[Run], list[Run]]]) -> Result:
    """Train on one side of every fold, choose the threshold there, and measure on the other side."""
    measured, cases, binned = [], [], np.zeros((len(BINS) - 1, 3))
    for name, training, test in folds:
        fitted = fit_with_threshold(kind, training, horizon)
        scores = [fitted.log_odds(run.features) for run in test]
        sampled = [run.labels(horizon) for run in test]
        s = np.concatenate([one[sample] for one, (sample, _) in zip(scores, sampled, strict=True)])
        y = np.concatenate([ahead[sample] for sample, ahead in sampled])
        binned += _binned(s, y)
        measured.append({"name": name, "runs": len(test), **_steps(fitted, s, y)})
        cases += [_case(run, one, fitted, horizon) for run, one in zip(test, scores, strict=True)]
    return {
        "kind": kind,
        "horizon": horizon,
        "split": split,
        "folds": measured,
        "bins": binned.tolist(),
        "cases": cases,
    }


def _steps(fitted: Fitted, s: Floats, y: Flags) -> Result:
    """What one step's forecast is worth; accuracy and F1 as they would be if every second step had a failure ahead."""
    if not y.any() or y.all():
        return dict.fromkeys(("auroc", "average_precision", "prevalence", "brier", "accuracy", "f1"))
    p = 1.0 / (1.0 + np.exp(-s))
    even = s >= math.log(fitted.prevalence / (1.0 - fitted.prevalence))
    return {
        "auroc": float(roc_auc_score(y, s)),
        "average_precision": float(average_precision_score(y, s)),
        "prevalence": float(y.mean()),
        "brier": float(((p - y) ** 2).mean()),
        **_even(float(even[y].mean()), float(even[~y].mean())),
    }


def _even(hits: float, alarms: float) -> Result:
    return {"accuracy": (hits + 1.0 - alarms) / 2.0, "f1": 2.0 * hits / (hits + alarms + 1.0)}


def _binned(s: Floats, y: Flags) -> Floats:
    p = 1.0 / (1.0 + np.exp(-s))
    place = np.clip(np.digitize(p, BINS) - 1, 0, len(BINS) - 2)
    columns = (np.ones(len(p)), p, y.astype(float))
    return np.stack([np.bincount(place, column, len(BINS) - 1) for column in columns], axis=1)


def _case(run: Run, scores: Floats, fitted: Fitted, horizon: int) -> Result:
    """One test run: when the predictor fired and when the engine suspected and confirmed, in steps before failure."""
    at = max(run.case.at, 1)
    fired = firings(run, scores, fitted.threshold, horizon)
    suspicions = _repeated(run.suspected & run.usable, horizon)
    end = run.failure or len(run.usable) + 1

    def lead(steps: Sequence[int]) -> int | None:
        return next((end - step for step in steps if at <= step < end), None)

    return {
        "plant": run.case.plant,
        "fault": run.case.kind,
        "group": run.group,
        "healthy_steps": int(run.healthy.sum()),
        "false_alarms": sum(bool(run.healthy[step - 1]) for step in fired),
        "false_suspicions": sum(bool(run.healthy[step - 1]) for step in suspicions),
        "lead": lead(fired),
        "suspicion_lead": lead((np.flatnonzero(run.suspected) + 1).tolist()),
        "confirmation_lead": lead((np.flatnonzero(run.confirmed) + 1).tolist()),
    }


def _repeated(flags: Flags, horizon: int) -> list[int]:
    found: list[int] = []
    for step in (np.flatnonzero(flags) + 1).tolist():
        if not found or step - found[-1] >= horizon:
            found.append(step)
    return found


# --- as others report it ----------------------------------------------------------------------------------------------


def one_sample_a_run(kind: str, runs: Sequence[Run], horizon: int, *, before: bool) -> Result:
    """Classify runs by one step each, as published figures do: at the failure, or at a random step of those before it.

    Of a run without a failure it is a random step, from the fault on where there is one.
    """
    found = []
    for draw in range(_DRAWS):
        rng = np.random.default_rng([7, draw])
        rows: dict[int, Floats] = {}
        for run in runs:
            at = max(run.case.at, 1)
            last = run.failure or len(run.usable) + 1
            first = max(at, last - horizon) if run.failure else at
            choice = [step for step in range(first, last) if run.usable[step - 1]]
            if run.failure and not before:
                rows[id(run)] = run.features[run.failure - 1]
            elif choice:
                rows[id(run)] = run.features[int(rng.choice(choice)) - 1]
        for training, test in folds_of([run for run in runs if id(run) in rows], 5):
            x, y = _table(training, rows)
            weights = np.where(y, 0.5 / y.mean(), 0.5 / (1.0 - y.mean()))
            model = trained(kind, x, y, weights)
            x, y = _table(test, rows)
            positive = model.decision_function(x) > 0
            found.append(_even(float(positive[y].mean()), float(positive[~y].mean())))
    means = {key: float(np.mean([one[key] for one in found])) for key in ("accuracy", "f1")}
    return {"kind": kind, "before": before, "runs": len(rows), **means}


def _table(runs: Sequence[Run], rows: dict[int, Floats]) -> tuple[Floats, Flags]:
    return np.array([rows[id(run)] for run in runs]), np.array([run.failure is not None for run in runs])


def step_cost_us(file: PredictorFile, trace: Trace) -> float:
    """Least time of a step, in microseconds, over the beginning of a recorded run."""
    predictor = FailurePredictor(file, statistics=STATISTICS)
    steps = []
    for index, values in enumerate(trace.rows[:_TIMED, : len(STATISTICS)].tolist()):
        loss, rate, norm = (float(trace.column(name)[index]) for name in ("loss", "rate", "gradient_norm"))
        m = Measurement(step=index + 1, loss=loss, learning_rates=(rate,), gradient_norm=norm)
        decision = Decision(
            index + 1, Action.ACCEPT, Action.ACCEPT, Level.NOMINAL, Mode.WATCHING, "", statistics=tuple(values)
        )
        steps.append((m, decision))
    best = math.inf
    for _ in range(100):
        state: Any = predictor.init()
        started = time.perf_counter()
        for m, decision in steps:
            state, _forecast = predictor.step(state, m, decision)
        best = min(best, time.perf_counter() - started)
    return 1e6 * best / len(steps)
