"""What the study found, as rows: plain numbers that files, tables and figures are made from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kalmanguard.analysis.study.cases import (
    MOMENTA,
    SCENARIOS,
    Case,
    EstimatorCase,
    LinearCase,
    Result,
    SpacingCase,
)
from kalmanguard.analysis.study.curves import detection, false_alarms, first_alarm, threshold_at, thresholds
from kalmanguard.analysis.study.damping import REPORTED
from kalmanguard.analysis.study.detectors import DEVIATIONS, FAMILIES, RULES
from kalmanguard.analysis.study.linear import stationary_jerk_ratio
from kalmanguard.analysis.study.plants import EdgeCase, PlantCase

Row = dict[str, Any]
Results = Mapping[Case, Result]
#: Rates of false alarms, per 1,000 steps, at which families are compared.
LINEAR_RATE, PLANT_RATE = 0.1, 1.0
#: Sharpness over its edge below which a run has not reached the edge of stability, and from which it has.
BELOW_EDGE, AT_EDGE = 0.8, 0.9
_POINTS = 40


class Group:
    """The runs of one momentum or one recipe: stable ones and ones that become unstable, by kind of seed."""

    def __init__(self, name: str, runs: Sequence[tuple[Case, Result]]) -> None:
        self.name = name
        self._runs = runs

    def stable(self, *, design: bool = False) -> list[Result]:
        """Runs without harm by construction: linear ones below the bound, plants whose learning rate is as it was."""
        return [run for case, run in self._runs if _is_design(case) == design and _is_stable(case, run)]

    def unstable(self) -> list[Result]:
        """Reported runs that cross the bound; of plants those that are harmed."""
        return [run for case, run in self._runs if not _is_design(case) and _is_unstable(case, run)]

    def spared(self) -> list[Result]:
        """Reported plants that bear the higher learning rate."""
        return [
            run for case, run in self._runs
            if not _is_design(case) and not _is_stable(case, run) and not _is_unstable(case, run)
        ]  # fmt: skip


def linear_groups(results: Results) -> list[Group]:
    """All linear runs, then those of each momentum."""
    runs = [(case, run) for case, run in results.items() if isinstance(case, LinearCase)]
    found = [
        Group(f"momentum {momentum:g}", [(case, run) for case, run in runs if case.momentum == momentum])
        for momentum in MOMENTA
    ]
    return [Group("all", list(runs)), *(group for group in found if group.stable())]


def detail_groups(results: Results) -> list[Group]:
    """Linear runs by spectrum and momentum, and by scenario."""
    runs = [(case, run) for case, run in results.items() if isinstance(case, LinearCase)]
    names = [(f"{case.spectrum}, momentum {case.momentum:g}", case.scenario) for case, _ in runs]
    return [
        Group(name, [pair for pair, both in zip(runs, names, strict=True) if name in both])
        for name in sorted({name for both in names for name in both})
    ]


def plant_groups(results: Results) -> list[Group]:
    """All trained networks, then those of each recipe."""
    runs = [(case, run) for case, run in results.items() if isinstance(case, PlantCase)]
    names = dict.fromkeys(case.recipe for case, _ in runs)
    return [Group("all", list(runs)), *(Group(n, [(c, r) for c, r in runs if c.recipe == n]) for n in names)]


def curves(groups: Sequence[Group]) -> list[Row]:
    """False alarms and delays of every family over its thresholds, on reported seeds."""
    rows: list[Row] = []
    for group in groups:
        stable, unstable = group.stable(), group.unstable()
        for family in FAMILIES:
            name = {"group": group.name, "family": family}
            at = thresholds([*stable, *unstable], family, points=_POINTS)
            rows += [name | _point(stable, unstable, family, threshold) for threshold in at]
    return rows


def rules(groups: Sequence[Group]) -> list[Row]:
    """The same for every proposed threshold, with the share of healthy windows that it condemns."""
    rows = []
    for group in groups:
        stable, unstable, spared = group.stable(), group.unstable(), group.spared()
        windows = sum(run["windows"] for run in stable)
        for rule in RULES:
            condemned = sum(run["condemned"][rule.name] for run in stable)
            alarms = [first_alarm(run, rule.family, rule.threshold) for run in spared]
            rows.append(
                {"group": group.name, "rule": rule.name, "condemned": condemned / windows if windows else math.nan}
                | _point(stable, unstable, rule.family, rule.threshold)
                | {"spared": len(spared), "spared_alarmed": sum(at is not None for at in alarms)}
            )
    return rows


def matched(groups: Sequence[Group], *, per_1000: float) -> list[Row]:
    """Every family at the threshold that has the wanted rate of false alarms on all design runs, on reported ones."""
    rows: list[Row] = []
    for family in FAMILIES:
        threshold = threshold_at(groups[0].stable(design=True), family, per_1000=per_1000)
        points = [_point(group.stable(), group.unstable(), family, threshold) for group in groups]
        rows += [{"group": g.name, "family": family} | point for g, point in zip(groups, points, strict=True)]
    return rows


def estimators(results: Results) -> list[Row]:
    """Quantiles of the estimated damping ratio; ``missing`` is the share of series that gave none."""
    rows = []
    for case, result in results.items():
        if not isinstance(case, EstimatorCase):
            continue
        for name, estimates in result.items():
            zeta = np.array(estimates["zeta"], dtype=np.float64)
            known = zeta[np.isfinite(zeta)]
            low, median, high = np.quantile(known, (0.1, 0.5, 0.9)) if known.size else (math.nan,) * 3
            rows.append({
                "zeta": case.zeta, "steps": case.steps, "snr": case.snr, "estimator": name, "low": float(low),
                "median": float(median), "high": float(high), "bias": float(median) - case.zeta,
                "missing": 1.0 - known.size / zeta.size,
            })  # fmt: skip
    return rows


def spacings(results: Results) -> list[Row]:
    """What is seen of a system near its bound when it is read every so many steps: medians over seeds."""
    rows = []
    for case, result in results.items():
        if isinstance(case, SpacingCase):
            scores = np.array(result["pole, standard errors"])
            rows.append({
                "momentum": case.momentum, "share": case.share, "spacing": case.spacing,
                "jerk_ratio": float(np.median(result["jerk ratio"])),
                "cosine": -float(np.median(result["alternation"])),
                "modulus": float(np.median(result["pole, estimate"])) ** (1.0 / case.spacing),
                "zeta": -float(np.median(result["damping ratio, estimate"])),
                "runs": len(scores), "critical": int((scores >= DEVIATIONS).sum()),
            })  # fmt: skip
    return rows


def edges(results: Results) -> list[Row]:
    """Readings of full-batch training, each with the sharpness over its edge at that time."""
    rows = []
    for case, result in results.items():
        if isinstance(case, EdgeCase):
            at, ratio = np.array(result["sharpness"], dtype=np.float64).T
            for index, step in enumerate(result["steps"]):
                readings = {family: result["readings"][family][index] for family in FAMILIES}
                sharp = float(ratio[np.abs(at - step).argmin()])
                rows.append({"recipe": case.recipe, "seed": case.seed, "step": step, "sharpness": sharp} | readings)
    return rows


def runs(results: Results) -> list[Row]:
    """Every reported run of a trained network: when it was harmed, and the first alarm of every proposed threshold."""
    return [
        {"recipe": case.recipe, "factor": case.factor, "creeps": case.creeps, "seed": case.seed}
        | {"change": run["change"], "harm": run["harm"], "steps": run["steps"]}
        | {rule.name: first_alarm(run, rule.family, rule.threshold) for rule in RULES}
        for case, run in results.items()
        if isinstance(case, PlantCase) and not _is_design(case)
    ]


def ratios() -> list[Row]:
    """The closed form of the jerk ratio over learning rates up to the bound."""
    return [
        {"momentum": beta, "share": share, "ratio": stationary_jerk_ratio(share * 2.0 * (1.0 + beta), beta)}
        for beta in MOMENTA
        for share in np.linspace(0.0, 1.0, 201).tolist()
    ]


def _point(stable: Sequence[Result], unstable: Sequence[Result], family: str, threshold: float) -> Row:
    row: Row = {"threshold": threshold}
    if stable:
        rate = false_alarms(stable, family, threshold)
        row |= {"false_alarms": rate.alarms, "steps": rate.steps, "per_1000": rate.per_1000}
        row |= {"per_1000_low": rate.low, "per_1000_high": rate.high}
    found = detection(unstable, family, threshold)
    row |= {"unstable": len(unstable), "early": found.early.hits, "left": found.seen.of, "seen": found.seen.hits}
    row |= {"harmed": found.in_time.of, "in_time": found.in_time.hits, "in_time_low": found.in_time.low}
    row |= {"in_time_high": found.in_time.high, "delay": found.delay, "delay_90": found.delay_high}
    return row


def _is_design(case: Any) -> bool:
    return bool(case.seed < REPORTED)


def _is_stable(case: Any, run: Result) -> bool:
    return SCENARIOS[case.scenario].crossing is None if isinstance(case, LinearCase) else run["change"] is None


def _is_unstable(case: Any, run: Result) -> bool:
    return not _is_stable(case, run) and (isinstance(case, LinearCase) or run["harm"] is not None)
