"""Recorded curves of real pretraining runs through the engine: nearly all that it says about them is a false alarm."""

from __future__ import annotations

import argparse
import csv
import gzip
import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from scipy.stats import binomtest

from benchmarks.benchmark import Benchmark, Result
from benchmarks.markdown import number, table
from kalmanguard import Action, Engine, Level, Measurement, ProbeReading, Settings

#: Train and validation loss of one run, by step.
Curves = tuple[dict[int, float], dict[int, float]]
_KINDS = ("train and validation loss", "train loss only", "validation loss only")


class RealCurves(Benchmark):
    """Suspicions and confirmations over a collection of runs."""

    name = "real_curves"
    summary = "recorded curves of real pretraining runs: suspicions and confirmations (needs --data DIR)"

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--data", type=Path, metavar="DIR", help="folder with train_loss.csv.gz and val_loss.csv.gz"
        )

    def run(self, options: argparse.Namespace) -> Result:
        if options.data is None:
            raise SystemExit("real_curves: name the folder of the curves with --data DIR.")
        train = _read(options.data / "train_loss.csv.gz", "train_loss")
        validation = _read(options.data / "val_loss.csv.gz", "val_loss")
        runs = []
        names = sorted(train) + sorted(set(validation) - set(train))
        for name in names[:10] if options.quick else names:
            curves = train.get(name, {}), validation.get(name, {})
            kind = _KINDS[0 if all(curves) else 1 if curves[0] else 2]
            runs.append({"run": name, "kind": kind, **follow(curves)})
        return {"runs": runs}

    def markdown(self, result: Result) -> str:
        rows = []
        for kind in _KINDS:
            runs = [run for run in result["runs"] if run["kind"] == kind]
            if not runs:
                continue
            steps, suspicions = (sum(run[key] for run in runs) for key in ("decisions", "suspicions"))
            rows.append([
                kind, len(runs), f"{steps:,}", f"{sum(run['probes'] for run in runs):,}", suspicions,
                _rate(suspicions, steps), sum(run["episodes"] for run in runs), sum(run["alarmed"] for run in runs),
                sum(run["confirmations"] for run in runs), number(max(run["give_back"] for run in runs), 2),
            ])  # fmt: skip
        detectors = Counter[str]()
        for run in result["runs"]:
            detectors.update(run["detectors"])
        named = ", ".join(f"{name} {count}" for name, count in detectors.most_common()) or "none"
        return "\n\n".join([
            "Each measurement is one decision. *Episodes*: suspicions with fewer than 20 steps between them count "
            "once. *Confirmed*: proposed rollbacks or halts. *Give-back*: the largest share of its progress that a "
            "run's validation loss loses.",
            table(
                [
                    *("runs with", "runs", "decisions", "probes", "suspicions", "per 1,000 decisions (95 % interval)"),
                    *("episodes", "runs with one", "confirmed", "give-back"),
                ],
                rows,
            ),
            f"Evidence behind the suspicions: {named}.",
        ])  # fmt: skip


def follow(curves: Curves) -> Result:
    """Feed one run's curves to a fresh engine, in its default settings, and count what it says."""
    engine = Engine(Settings())
    state = engine.init()
    suspicions, confirmations, steps = [], [], []
    detectors = Counter[str]()
    for measurement in _measurements(curves):
        state, decision = engine.step(state, measurement)
        steps.append(measurement.step)
        if decision.proposed is not Action.ACCEPT:
            confirmations.append(measurement.step)
        elif decision.level is Level.SUSPECT:
            suspicions.append(measurement.step)
            detectors.update(item.detector for item in decision.evidence if item.fired)
    values = list(curves[1].values())
    best, most = math.inf, 0.0
    for value in values:
        best = min(best, value)
        most = max(most, (value - best) / (values[0] - best) if values[0] > best else 0.0)
    return {
        "decisions": len(steps),
        "probes": len(values),
        "suspicions": len(suspicions),
        "episodes": sum(later - earlier >= 20 for earlier, later in zip([-20, *suspicions], suspicions, strict=False)),
        "alarmed": bool(suspicions or confirmations),
        "confirmations": len(confirmations),
        "give_back": most,
        "detectors": dict(detectors),
        "suspicious_steps": suspicions[:50],
        "confirmed_steps": confirmations[:50],
    }


def _measurements(curves: Curves) -> Iterator[Measurement]:
    train, validation = curves
    for step in sorted({*train, *validation}):
        loss = train.get(step)
        value = validation.get(step)
        # The logs hold one number per validation, so there is nothing to pair: two equal examples.
        yield Measurement(step=step, loss=loss, probe=None if value is None else ProbeReading(np.full(2, value)))


def _read(path: Path, column: str) -> dict[str, dict[int, float]]:
    runs: dict[str, dict[int, float]] = defaultdict(dict)
    try:
        with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                runs[row["run"]][int(row["step"])] = float(row[column])
    except OSError as error:
        raise SystemExit(f"real_curves: {path} cannot be read: {error.strerror}.") from None
    return runs


def _rate(count: int, steps: int) -> str:
    interval = binomtest(count, steps).proportion_ci(0.95, method="exact")
    low, high = (number(1_000 * bound, 2) for bound in (interval.low, interval.high))
    return f"{number(1_000 * count / steps, 2)} ({low} to {high})"
