"""Samples, labels and fitting for the failure predictor, and the way from scikit-learn to the shipped file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks.predictor_corpus import HOT, Case, Trace
from benchmarks.recovery import HARM
from kalmanguard.detectors.predictor_file import PredictorFile
from kalmanguard.engine import STATISTICS
from kalmanguard.estimators.features import FEATURES, FeatureBank, FeatureState
from kalmanguard.records import Level, Measurement

KINDS = ("logistic", "boosting")
#: False alarms per 1,000 healthy steps that thresholds are chosen for.
RATE = 0.1
_READY = 30  # steps before which the predictor abstains
_THIN = 8  # of the steps without a failure ahead, every eighth is trained on: neighbours tell the same
_INNER_FOLDS = 3

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """A recorded run as the predictor sees it; arrays have one entry per step from 1.

    ``failure`` is the first step, once the predictor is ready, at whose end the true loss has given back more than
    `HARM`. ``usable`` are the steps with a forecast, before that. ``healthy`` are those of them when nothing was wrong.
    ``suspected`` and ``confirmed`` say what the engine itself made of each step.
    """

    case: Case
    features: Floats
    usable: Flags
    healthy: Flags
    failure: int | None
    suspected: Flags
    confirmed: Flags

    @property
    def group(self) -> str:
        """What became of it."""
        if self.failure is None:
            return "harmless" if self.case.kind else "healthy"
        if not self.case.kind:
            return "undamaged, yet failing"
        return "sudden" if self.case.sudden else "from the start" if self.case.kind == HOT else "developing"

    def labels(self, horizon: int) -> tuple[Flags, Flags]:
        """Which steps are samples, and which of those have a failure within the next ``horizon`` steps.

        Steps before the fault whose horizon reaches the failure are no samples: its cause does not exist yet.
        """
        steps = np.arange(1, len(self.usable) + 1)
        ahead = np.zeros(len(steps), bool) if self.failure is None else steps >= self.failure - horizon
        return self.usable & ~(ahead & (steps < self.case.at)), ahead & self.usable


def prepare(trace: Trace) -> Run | None:
    """Make a run of a trace; ``None`` where it fails before there is any forecast."""
    case, steps = trace.case, len(trace.rows)
    ready = (trace.column("level_code") != list(Level).index(Level.WARMUP)) & (np.arange(1, steps + 1) >= _READY)
    lost, best = np.zeros(steps), trace.start
    for index, y in enumerate(trace.column("truth").tolist()):
        best = min(best, y) if y == y else best
        if y > best:
            lost[index] = (y - best) / (trace.start - best) if trace.start > best else math.inf
    failing = np.flatnonzero((lost > HARM) & (np.cumsum(ready) > 0))
    failure = int(failing[0]) + 1 if len(failing) else None
    usable = ready & (np.arange(1, steps + 1) < (failure or steps + 1))
    if not usable.any():
        return None
    at = case.at or (1 if failure is not None else steps + 1)
    # A damaged run whose recipe is sound is healthy until the fault.
    healthy = usable & (np.arange(1, steps + 1) < at)
    suspects = [list(Level).index(level) for level in (Level.SUSPECT, Level.CONFIRMED)]
    return Run(
        case=case, features=_features(trace), usable=usable, healthy=healthy, failure=failure,
        suspected=np.isin(trace.column("level_code"), suspects), confirmed=trace.column("proposed_code") > 0,
    )  # fmt: skip


def _features(trace: Trace) -> Floats:
    bank, state, rows = FeatureBank(STATISTICS), FeatureState(), []
    losses, rates, norms = (trace.column(name).tolist() for name in ("loss", "rate", "gradient_norm"))
    for step, values in enumerate(trace.rows[:, : len(STATISTICS)].tolist()):
        m = Measurement(
            step=step + 1, loss=losses[step], learning_rates=(rates[step],), gradient_norm=norms[step]
        )  # fmt: skip
        state = bank.step(state, m, values)
        rows.append(state.features)
    return np.array(rows)


# --- fitting ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Fitted:
    """A classifier of scikit-learn, the share of failures it was trained with, and its threshold in log odds."""

    kind: str
    model: Any
    prevalence: float
    threshold: float = math.nan

    def log_odds(self, features: Floats) -> Floats:
        """Log odds of every row."""
        return np.asarray(self.model.decision_function(features), dtype=np.float64)


def fit(kind: str, runs: Sequence[Run], horizon: int) -> Fitted:
    """Train on all samples of some runs, without a threshold."""
    rows, labels = [], []
    for run in runs:
        sample, ahead = run.labels(horizon)
        kept = sample & (ahead | (np.arange(len(sample)) % _THIN == 0))
        rows.append(run.features[kept])
        labels.append(ahead[kept])
    x, y = np.concatenate(rows), np.concatenate(labels)
    weights = np.where(y, 1.0, _THIN)
    return Fitted(kind, trained(kind, x, y, weights), float(np.average(y, weights=weights)))


def trained(kind: str, x: Floats, y: Flags, weights: Floats) -> Any:
    """Fit scikit-learn's classifier of that kind."""
    if kind == "logistic":
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1_000))
        return model.fit(x, y, logisticregression__sample_weight=weights)
    model = HistGradientBoostingClassifier(
        max_iter=50,
        max_leaf_nodes=8,
        max_bins=64,
        min_samples_leaf=min(50, 1 + len(x) // 20),
        l2_regularization=10.0,
        early_stopping=False,
        random_state=0,
    )
    return model.fit(x, y, sample_weight=weights)


def fit_with_threshold(kind: str, runs: Sequence[Run], horizon: int) -> Fitted:
    """Train, and choose the threshold on the same runs: on scores of classifiers that did not see the run scored."""
    scores: dict[int, Floats] = {}
    strata = [f"{run.case.plant} {run.group}" for run in runs]
    for inner, outer in _grouped_folds(strata, _INNER_FOLDS):
        fitted = fit(kind, [runs[i] for i in inner], horizon)
        scores |= {int(i): fitted.log_odds(runs[i].features) for i in outer}
    whole = fit(kind, runs, horizon)
    threshold = choose_threshold(runs, [scores[i] for i in range(len(runs))], horizon)
    return Fitted(kind, whole.model, whole.prevalence, threshold)


def _grouped_folds(strata: Sequence[str], folds: int) -> list[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """Whole runs on one side each; runs of a kind are dealt out evenly, in an order that depends on nothing."""
    order = np.argsort(np.array(strata), kind="stable")
    fold = np.empty(len(strata), int)
    fold[order] = np.arange(len(strata)) % folds
    return [(np.flatnonzero(fold != k), np.flatnonzero(fold == k)) for k in range(folds)]


def folds_of(runs: Sequence[Run], folds: int) -> list[tuple[list[Run], list[Run]]]:
    """Training and test runs per fold."""
    strata = [f"{run.case.plant} {run.group}" for run in runs]
    return [([runs[i] for i in a], [runs[i] for i in b]) for a, b in _grouped_folds(strata, folds)]


def firings(run: Run, scores: Floats, threshold: float, horizon: int) -> list[int]:
    """Steps at which a predictor fires before the failure: at the threshold, and not again within the horizon."""
    found: list[int] = []
    for index in np.flatnonzero(run.usable & (scores >= threshold)).tolist():
        if not found or index + 1 - found[-1] >= horizon:
            found.append(index + 1)
    return found


def choose_threshold(runs: Sequence[Run], scores: Sequence[Floats], horizon: int) -> float:
    """Find the lowest threshold with at most `RATE` firings per 1,000 healthy steps."""
    allowed = RATE * sum(int(run.healthy.sum()) for run in runs) / 1_000
    candidates = np.unique(np.concatenate([s[run.healthy] for run, s in zip(runs, scores, strict=True)]))
    low, high = 0, len(candidates)  # above all healthy scores nothing fires on them
    while low < high:
        middle = (low + high) // 2
        if false_alarms(runs, scores, float(candidates[middle]), horizon) <= allowed:
            high = middle
        else:
            low = middle + 1
    return float(candidates[low]) if low < len(candidates) else float(np.nextafter(candidates[-1], math.inf))


def false_alarms(runs: Sequence[Run], scores: Sequence[Floats], threshold: float, horizon: int) -> int:
    """Count firings on healthy steps."""
    return sum(
        int(run.healthy[step - 1])
        for run, s in zip(runs, scores, strict=True)
        for step in firings(run, s, threshold, horizon)
    )


# --- the file ---------------------------------------------------------------------------------------------------------


def to_file(fitted: Fitted, runs: Sequence[Run], horizon: int, trained_on: dict[str, Any]) -> PredictorFile:
    """Write a fitted classifier down as plain numbers."""
    content: dict[str, Any] = {
        "features": list(FEATURES),
        "horizon": horizon,
        "harm": HARM,
        "threshold": 1.0 / (1.0 + math.exp(-fitted.threshold)),
        "false_alarms_per_1000": RATE,
        "typical": np.concatenate([run.features[run.healthy] for run in runs]).mean(0).tolist(),
        "trained_on": trained_on,
    }
    model = fitted.model
    if fitted.kind == "logistic":
        scaler, regression = model[0], model[-1]
        weights = regression.coef_[0] / scaler.scale_
        intercept = float(regression.intercept_[0] - weights @ scaler.mean_)
        return PredictorFile(kind="logistic", intercept=intercept, coefficients=weights.tolist(), **content)
    trees = [[_node(node) for node in predictors[0].nodes] for predictors in model._predictors]
    return PredictorFile(kind="trees", intercept=float(np.ravel(model._baseline_prediction)[0]), trees=trees, **content)


def _node(node: Any) -> tuple[int, float, int, int, float]:
    if node["is_leaf"]:
        return -1, 0.0, 0, 0, float(node["value"])
    return int(node["feature_idx"]), float(node["num_threshold"]), int(node["left"]), int(node["right"]), 0.0
