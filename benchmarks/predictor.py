"""The failure predictor: how early it tells, how often it is wrong, and what it adds to the engine's suspicions."""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy.stats import binomtest

from benchmarks.benchmark import Benchmark, Result
from benchmarks.markdown import number, table
from benchmarks.predictor_corpus import corpus, record_all
from benchmarks.predictor_evaluation import BINS, evaluate, one_sample_a_run, step_cost_us
from benchmarks.predictor_training import KINDS, RATE, Run, fit_with_threshold, folds_of, prepare, to_file
from kalmanguard.detectors.predictor_file import DEFAULT, PredictorFile
from kalmanguard.records import Guarantee

SEEDS = 4
HORIZONS = (20, 50)
#: Horizon of the predictors that are shipped.
SHIPPED = 50
FOLDS = "five folds"
PLANTS = "a plant left out"
#: What the peer ARC publishes of its own predictors: accuracy and F1 over 200 scenarios, five folds, at the failure.
_PUBLISHED = (("ARC, logistic regression (published)", 0.955, 0.953), ("ARC, MLP (published)", 0.975, 0.974))


class Predictor(Benchmark):
    """Train and test on observed runs; with ``--export``, train on all of them and write what is shipped."""

    name = "predictor"
    summary = "failure prediction: lead time, false alarms, other architectures, beside the engine's own suspicion"

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--plants", nargs="+", metavar="NAME", help="what is trained (all that are registered)")
        parser.add_argument(
            "--corpus", type=Path, metavar="FOLDER", help="keep the recorded runs there, and reuse them"
        )
        parser.add_argument(
            "--export", type=Path, metavar="FOLDER", help="write the shipped files and their card there"
        )

    def run(self, options: argparse.Namespace) -> Result:
        quick = options.quick
        plants = options.plants or (["mlp"] if quick else None)
        cases = corpus(seeds=options.seeds or (1 if quick else SEEDS), plants=plants, quick=quick)
        traces = [trace for trace in record_all(cases, options.corpus, options.processes) if trace is not None]
        impossible = len(cases) - len(traces)
        which = [] if options.seeds is None else ["--seeds", str(options.seeds)]
        which += [] if plants is None else ["--plants", *plants]
        prepared = [prepare(trace) for trace in traces]
        runs = [run for run in prepared if run is not None]
        with warnings.catch_warnings():
            # scikit-learn looks for the number of physical cores, which a container does not tell.
            warnings.filterwarnings("ignore", message="Could not find the number of physical cores")
            result = _measured(runs, (SHIPPED,) if quick else HORIZONS)
            trained_on = {
                "runs": len(runs),
                "failing": sum(run.failure is not None for run in runs),
                "steps": int(sum(run.usable.sum() for run in runs)),
                "healthy_steps": int(sum(run.healthy.sum() for run in runs)),
                "plants": ", ".join(sorted({run.case.plant for run in runs})),
                "command": shlex.join(
                    ["python", "-m", "benchmarks", "predictor", *which, "--export", "models/predictor"]
                ),
            }
            files = {
                kind: to_file(fit_with_threshold(kind, runs, SHIPPED), runs, SHIPPED, trained_on) for kind in KINDS
            }
        result |= {
            "dropped": len(traces) - len(runs),
            "impossible": impossible,
            "trained_on": trained_on,
            "groups": [[*key, count] for key, count in sorted(Counter((r.case.plant, r.group) for r in runs).items())],
            "cost_us": {kind: step_cost_us(file, traces[0]) for kind, file in files.items()},
            "strongest": _strongest(files["logistic"], runs),
        }
        if options.export is not None:
            _export(options.export, files, result)
        return result

    def markdown(self, result: Result) -> str:
        default = [e for e in result["evaluations"] if e["horizon"] == SHIPPED]
        trained_on = result["trained_on"]
        parts = [
            f"{trained_on['runs']} runs in observe mode ({trained_on['failing']} fail; {result['dropped']} more failed "
            f"before there was a forecast and are left out; {result['impossible']} were impossible, since the "
            f"optimizer lacks what the fault strikes), {trained_on['steps']:,} steps with a forecast, "
            f"{trained_on['healthy_steps']:,} of them healthy. A run *fails* at the first step at whose end its true "
            "loss has given back more than 20 % of the progress; a step is *positive* when that lies within the "
            "horizon. Steps from the failure on are left out, and so are steps before a fault whose horizon reaches "
            "the failure. Whole runs lie on one side of a split; the threshold is chosen on training runs alone, for "
            f"{RATE} false alarms per 1,000 healthy steps. Accuracy and F1 are those at even prevalence.",
            table(
                [
                    *("model, horizon, split", "AUROC", "average precision", "prevalence", "Brier", "accuracy", "F1"),
                    *("failing runs foretold", "false alarms per 1,000 healthy steps", "damaged but harmless, fired"),
                ],
                [_summary(e) for e in result["evaluations"]],
            ),
            "Left-out plants, one by one:",
            table(
                ["model, horizon, plant", "runs", "AUROC", "accuracy", "failing runs foretold", "false alarms"],
                [row for e in result["evaluations"] if e["split"] == PLANTS for row in _per_plant(e)],
            ),
            f"Lead over the failure in steps (horizon {SHIPPED}, {FOLDS}), median / least; *of*: how many of the "
            "failing runs were met before the failure at all. A lead beyond the horizon is an alarm that came too "
            "early by the label, in a run that did fail. *Suspected* and *confirmed*: the engine itself, on the same "
            "runs. The truth is measured at every 2nd step (8th on the transformer), so all leads may be that much too "
            "long.",
            *(_leads(e) for e in default if e["split"] == FOLDS),
            *(_added(e) for e in default),
            f"Forecast probability against the share of steps that did have a failure ahead (horizon {SHIPPED}, "
            f"{FOLDS}):",
            *(_reliability(e) for e in default if e["split"] == FOLDS),
            "One step a run, as published figures are made (mean of five draws, five folds, at even prevalence). The "
            "published ones are of another corpus, at the failure, and their folds were not grouped:",
            table(
                ["model", "sample", "runs", "accuracy", "F1"],
                [
                    *(
                        [
                            one["kind"],
                            "at random, before the failure" if one["before"] else "at the failure",
                            one["runs"],
                            f"{one['accuracy']:.3f}",
                            f"{one['f1']:.3f}",
                        ]
                        for one in result["one_sample"]
                    ),
                    *([name, "at the failure", 200, f"{a:.3f}", f"{f:.3f}"] for name, a, f in _PUBLISHED),
                ],
            ),
            "Cost a step: " + ", ".join(f"{kind} {number(us)} us" for kind, us in result["cost_us"].items()) + ".",
        ]
        return "\n\n".join(parts)


def _measured(runs: Sequence[Run], horizons: Sequence[int]) -> Result:
    evaluations = []
    plants = sorted({run.case.plant for run in runs})
    for horizon in horizons:
        for kind in KINDS:
            folds = [(str(n), *pair) for n, pair in enumerate(folds_of(runs, 5))]
            evaluations.append(evaluate(kind, horizon, FOLDS, folds))
            left_out = [
                (name, [r for r in runs if r.case.plant != name], [r for r in runs if r.case.plant == name])
                for name in plants
            ]
            if len(plants) > 1:
                evaluations.append(evaluate(kind, horizon, PLANTS, left_out))
    samples = [one_sample_a_run(kind, runs, SHIPPED, before=before) for kind in KINDS for before in (False, True)]
    return {"evaluations": evaluations, "one_sample": samples}


def _strongest(file: PredictorFile, runs: Sequence[Run]) -> list[Any]:
    """Coefficients times the spread of their features, largest first."""
    import numpy as np

    spread = np.concatenate([run.features[run.usable] for run in runs]).std(0)
    weights = np.array(file.coefficients) * spread
    order = np.argsort(-np.abs(weights))[:10]
    return [[file.features[i], float(weights[i])] for i in order]


# --- tables -----------------------------------------------------------------------------------------------------------


def _failing(cases: Sequence[Result]) -> list[Result]:
    return [case for case in cases if case["group"] not in ("healthy", "harmless")]


def _mean(evaluation: Result, key: str) -> str:
    known = [fold[key] for fold in evaluation["folds"] if fold[key] is not None]
    return f"{statistics.fmean(known):.3f}" if known else "–"


def _share(cases: Sequence[Result], key: str = "lead") -> str:
    return f"{sum(case[key] is not None for case in cases)} of {len(cases)}"


def _alarms(cases: Sequence[Result], key: str = "false_alarms") -> str:
    count, steps = sum(case[key] for case in cases), sum(case["healthy_steps"] for case in cases)
    if not steps:
        return "–"
    interval = binomtest(count, steps).proportion_ci(0.95, method="exact")
    low, high = (number(1_000 * bound, 2) for bound in (interval.low, interval.high))
    return f"{number(1_000 * count / steps, 2)} ({low} to {high})"


def _summary(e: Result) -> list[object]:
    keys = ("auroc", "average_precision", "prevalence", "brier", "accuracy", "f1")
    harmless = [case for case in e["cases"] if case["group"] == "harmless"]
    return [
        f"{e['kind']}, {e['horizon']}, {e['split']}", *(_mean(e, key) for key in keys), _share(_failing(e["cases"])),
        _alarms(e["cases"]), _share(harmless),
    ]  # fmt: skip


def _per_plant(e: Result) -> list[list[object]]:
    rows: list[list[object]] = []
    for fold in e["folds"]:
        cases = [case for case in e["cases"] if case["plant"] == fold["name"]]
        figures = ["–" if fold[key] is None else f"{fold[key]:.3f}" for key in ("auroc", "accuracy")]
        head = f"{e['kind']}, {e['horizon']}, {fold['name']}"
        rows.append([head, fold["runs"], *figures, _share(_failing(cases)), _alarms(cases)])
    return rows


def _leads(e: Result) -> str:
    groups: dict[tuple[str, str], list[Result]] = {}
    for case in _failing(e["cases"]):
        groups.setdefault((case["group"], case["fault"] or "none"), []).append(case)
    rows = []
    for (group, fault), cases in sorted(groups.items()):
        cells = [_lead(cases, key) for key in ("lead", "suspicion_lead", "confirmation_lead")]
        rows.append([f"{group}: {fault}" if fault != "none" else group, len(cases), *cells])
    return table([f"{e['kind']}: fault", "failing runs", "fired", "suspected", "confirmed"], rows)


def _lead(cases: Sequence[Result], key: str) -> str:
    known = sorted(case[key] for case in cases if case[key] is not None)
    return (
        f"{statistics.median(known):g} / {known[0]} ({len(known)} of {len(cases)})" if known else f"0 of {len(cases)}"
    )


def _added(e: Result) -> str:
    """What it adds to the suspicion that the engine has already."""
    cases = _failing(e["cases"])

    def ahead(key: str) -> list[int]:
        return [c["lead"] - (c[key] or 0) for c in cases if c["lead"] is not None and c["lead"] > (c[key] or 0)]

    only = [case for case in cases if case["lead"] is not None and case["suspicion_lead"] is None]
    missed = [case for case in cases if case["lead"] is None and case["suspicion_lead"] is not None]
    earlier, confirmed = ahead("suspicion_lead"), ahead("confirmation_lead")
    harmless = [case for case in e["cases"] if case["group"] == "harmless"]
    kinds = Counter(case["fault"] or case["group"] for case in only)
    named = "; ".join(f"{name}: {count}" for name, count in kinds.most_common(3))
    return (
        f"- {e['kind']}, {e['split']}: of {len(cases)} failing runs the predictor fires in {_share(cases)} before the "
        f"failure, the engine suspects in {_share(cases, 'suspicion_lead')} and confirms in "
        f"{_share(cases, 'confirmation_lead')}. The predictor is first in {len(earlier)}"
        + (f" (by {statistics.median(earlier):g} steps in the median)" if earlier else "")
        + f", alone in {len(only)}"
        + (f" ({named})" if named else "")
        + f", and silent in {len(missed)} that the engine suspects; it is ahead of the confirmation in "
        f"{len(confirmed)}. False alarms per 1,000 healthy steps: {_alarms(e['cases'])}; the engine's suspicions on "
        f"the same steps: {_alarms(e['cases'], 'false_suspicions')}. Of the damaged but harmless runs it fires in "
        f"{_share(harmless)}, the engine suspects in {_share(harmless, 'suspicion_lead')}."
    )


def _reliability(e: Result) -> str:
    rows = []
    for low, high, (count, expected, failed) in zip(BINS, BINS[1:], e["bins"], strict=False):
        if count:
            rows.append([f"{low:g} to {high:g}", f"{count:,.0f}", number(expected / count), number(failed / count)])
    return table([f"{e['kind']}: forecast", "steps", "mean forecast", "share with a failure ahead"], rows)


# --- what is shipped --------------------------------------------------------------------------------------------------


def _export(folder: Path, files: dict[str, PredictorFile], result: Result) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for kind, file in files.items():
        (folder / f"{kind}.json").write_text(file.dump(), encoding="utf-8")
    (folder / "CARD.md").write_text(_card(files, result), encoding="utf-8")


def _card(files: dict[str, PredictorFile], result: Result) -> str:
    about = result["trained_on"]
    strongest = table(["feature", "weight per standard deviation"], [[n, f"{w:+.2f}"] for n, w in result["strongest"]])
    thresholds = ", ".join(f"{kind} {number(file.threshold)}" for kind, file in files.items())
    digests = "\n".join(f"- `{kind}.json`: `{json.loads(file.dump())['digest']}`" for kind, file in files.items())
    groups = table(["plant, what became of the run", "runs"], [[f"{p}, {g}", n] for p, g, n in result["groups"]])
    return f"""# Failure predictor

`boosting.json` and `logistic.json` (`"default"` stands for {DEFAULT}): the probability that a training run gives back
more than 20 % of its progress within the next {SHIPPED} steps, from what the engine sees of every step. JSON with a
digest, loaded by `kalmanguard.detectors.predictor.FailurePredictor.load("default", statistics=STATISTICS)`; nothing
is unpickled.

Made by `{about["command"]}`. Guarantee: {Guarantee.HEURISTIC.value}. SHA-256 of the contents:

{digests}

## Training data

{about["runs"]} runs of the plants {about["plants"]} in observe mode, {about["failing"]} of them failing;
{about["steps"]:,} steps with a forecast, {about["healthy_steps"]:,} of them healthy. The faults are those of
`benchmarks/predictor_corpus.py`.

{groups}

Thresholds for {RATE} false alarms per 1,000 healthy steps, chosen on forecasts of classifiers that had not seen the
run: {thresholds}. The probabilities are those of this corpus, in which most runs are damaged: in ordinary training
failures are rarer, and the probabilities too high.

Strongest weights of the logistic predictor:

{strongest}

## Measured

{Predictor().markdown(result)}

## Limits

- It has no guarantee. Rates and probabilities hold for runs like those above: small networks, hundreds of steps.
- What has no cause yet cannot be foreseen: sudden faults (a flipped bit, a gradient that is not finite, one bad update)
  do their harm in the step in which they come, or within a few.
- On an architecture that was not trained on it is worse, as *a plant left out* shows; the rate of false alarms does not
  carry over either.
- It was trained with the training loss passed to the supervisor, and with probes every 11 to 41 steps.
- Failure is what the held-out loss shows. Overfitting that gives back a fifth of the progress is one as well.
"""
