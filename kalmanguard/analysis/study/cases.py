"""The cases whose truth is a theorem: heavy balls at their bound, probes thinned out, known oscillators."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from kalmanguard.analysis.study.detectors import FAMILIES, RULES, START, Readings, read, records
from kalmanguard.analysis.study.estimators import ESTIMATORS, oscillator
from kalmanguard.analysis.study.linear import System
from kalmanguard.records import FloatArray

#: Step from which the learning rate is another one, and steps over which it creeps there.
CHANGE, RAMP = 320, 256
#: Loss over the largest one between the first judgement and the change that counts as harm.
_HARM = 10.0

#: Plain data as JSON knows it.
Result = dict[str, Any]


class Case(Protocol):
    """One thing to be run; its ``repr`` says all of it, and is what its result is kept under."""

    def run(self) -> Result:
        """Run it."""


class Scenario(NamedTuple):
    """Learning rates as shares of the limit: before the change, after it, and whether it creeps or steps."""

    before: float
    after: float
    creeps: bool = False

    @property
    def crossing(self) -> int | None:
        """The step from which the system is unstable; ``None`` if it never is."""
        if self.after < 1.0:
            return None
        return CHANGE + (math.ceil(RAMP * (1.0 - self.before) / (self.after - self.before)) if self.creeps else 0)

    def shares(self, steps: int) -> FloatArray:
        """Shares of the limit, shape ``(steps,)``."""
        since = np.arange(steps) - CHANGE
        turned = np.clip(since / RAMP, 0.0, 1.0) if self.creeps else (since >= 0).astype(np.float64)
        return np.asarray(self.before + (self.after - self.before) * turned, dtype=np.float64)


#: What happens to the learning rate; the first five stay below the limit.
SCENARIOS = {
    "low": Scenario(0.1, 0.1),
    "half": Scenario(0.5, 0.5),
    "near": Scenario(0.9, 0.9),
    "raised": Scenario(0.3, 0.9),
    "crept": Scenario(0.3, 0.95, creeps=True),
    "just over": Scenario(0.5, 1.05),
    "far over": Scenario(0.5, 1.5),
    "creeping over": Scenario(0.5, 1.2, creeps=True),
}
SPECTRA = {
    "one mode": (1.0,),
    "power law": tuple(1.0 / i for i in range(1, 65)),
    "flat": (1.0,) * 64,
}
#: Gradient noise, and the power of the velocities over that of the noise they are read with.
NOISES = {"descent": (1e-6, math.inf), "gradient noise": (1.0, math.inf), "noisy reading": (1.0, 10.0)}
MOMENTA = (0.0, 0.5, 0.9, 0.99)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearCase:
    """One run of a `System` through a `Scenario`."""

    momentum: float
    spectrum: str
    noise: str
    scenario: str
    seed: int
    steps: int

    def run(self) -> Result:
        """Simulate, read and judge."""
        scenario = SCENARIOS[self.scenario]
        sigma, snr = NOISES[self.noise]
        system = System(curvatures=SPECTRA[self.spectrum], momentum=self.momentum, noise=sigma)
        run = system.simulate(scenario.shares(self.steps) * system.limit, seed=self.seed)
        power = system.velocity_power(scenario.before * system.limit) / (len(system.curvatures) * snr)
        reading = np.random.default_rng([self.seed, 1]).normal(size=run.velocities.shape) * math.sqrt(power)
        calm = float(run.losses[START:CHANGE].max())
        harmed = np.flatnonzero(run.losses[CHANGE:] > _HARM * calm)
        changed = scenario.before != scenario.after
        return summary(
            read(run.velocities + reading),
            steps=len(run.losses),
            change=CHANGE if changed else None,
            crossing=scenario.crossing,
            harm=CHANGE + int(harmed[0]) + 1 if harmed.size and changed else None,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SpacingCase:
    """One system read only every so many steps, as probes and thinned sketches do."""

    momentum: float
    share: float
    spacing: int
    seeds: int

    def run(self) -> Result:
        """What the last reading of each run says."""
        system = System(curvatures=SPECTRA["power law"], momentum=self.momentum, noise=1.0)
        found: dict[str, list[float]] = {family: [] for family in FAMILIES}
        for seed in range(self.seeds):
            steps = (START + 1) * self.spacing
            rates = np.full(steps, self.share * system.limit)
            velocities = system.simulate(rates, seed=seed).velocities
            readings = read(np.add.reduceat(velocities, np.arange(0, len(velocities), self.spacing))[:START])
            for family in FAMILIES:
                found[family].append(readings.values[family][-1])
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class EstimatorCase:
    """Every estimator on oscillators of one damping ratio, length and signal-to-noise ratio."""

    zeta: float
    frequency: float
    steps: int
    snr: float
    seeds: int

    def run(self) -> Result:
        """Estimates of the damping ratio and of the frequency, by estimator."""
        found: Result = {}
        for name, estimator in ESTIMATORS.items():
            estimates = [
                estimator(oscillator(self.zeta, self.frequency, steps=self.steps, snr=self.snr, seed=seed))
                for seed in range(self.seeds)
            ]
            found[name] = {"zeta": [z for z, _ in estimates], "frequency": [f for _, f in estimates]}
        return found


def summary(readings: Readings, *, steps: int, change: int | None, crossing: int | None, harm: int | None) -> Result:
    """What is kept of a run: when each family is more alarmed than ever, and how many windows each rule condemns.

    ``condemned`` counts windows before the change only, which are healthy ones in every run.
    """
    calm = [i for i, step in enumerate(readings.steps) if change is None or step <= change]
    return {
        "steps": steps,
        "change": change,
        "crossing": crossing,
        "harm": harm,
        "windows": len(calm),
        "condemned": {
            rule.name: sum(readings.values[rule.family][i] >= rule.threshold for i in calm) for rule in RULES
        },
        "records": {family: records(readings.steps, readings.values[family]) for family in FAMILIES},
    }


def linear_cases(
    *, seeds: Sequence[int], momenta: Sequence[float], spectra: Sequence[str], noises: Sequence[str], steps: int
) -> list[Case]:
    """All combinations; the stable ones run ``steps``, the others until well after the bound."""
    return [
        LinearCase(
            momentum=momentum, spectrum=spectrum, noise=noise, scenario=name, seed=seed,
            steps=steps if scenario.crossing is None else CHANGE + 2 * RAMP,
        )
        for momentum in momenta
        for spectrum in spectra
        for noise in noises
        for name, scenario in SCENARIOS.items()
        for seed in seeds
    ]  # fmt: skip
