"""The report of a stress test: the score with its definition, and everything that it rests on."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass
from typing import Any

from kalmanguard.stress.records import CriticalPoint, Curve, Layer, Recommendation, standard_error

#: What the score is, in the words that go with it everywhere.
DEFINITION = (
    "Score: 100 times the mean, over the kinds of stress, of the share of what the model has learned that is left, "
    "averaged over the levels of each kind. Learned is the held-out loss of the best constant output minus the model's "
    "own. 100: nothing at these levels costs anything; 0: nothing is left at any of them, or nothing was learned. "
    "It rises with every one of these shares. It compares models on one data set; it is no probability of failure, "
    "says nothing of worst cases, of inputs made to mislead or of longer training, and does not rate accuracy."
)


@dataclass(frozen=True, slots=True)
class StressReport:
    """What `stress` has found.

    Attributes
    ----------
    model
        One line about the model.
    loss, uninformed
        Held-out loss of the judged state, and that of the best constant output.
    learned
        Their difference where it is clear; 0 if there was nothing to lose.
    curves
        Retained shares for each kind of stress.
    layers
        From the most sensitive to the least.
    critical_points, recommendations
        Each tied to a measurement.
    left_out
        What was not measured, and why.
    notes
        What was assumed.
    seconds, budget_s
        Time used, and the time that there was.
    """

    model: str
    loss: float
    uninformed: float
    learned: float
    curves: tuple[Curve, ...]
    layers: tuple[Layer, ...]
    critical_points: tuple[CriticalPoint, ...]
    recommendations: tuple[Recommendation, ...]
    left_out: tuple[str, ...]
    notes: tuple[str, ...]
    seconds: float
    budget_s: float
    kinds: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Whether every kind of stress was measured, so that the score can be compared."""
        return {curve.kind for curve in self.curves} == set(self.kinds)

    @property
    def scores(self) -> tuple[float, ...]:
        """The score of each seed for which every curve is complete."""
        if not self.curves:
            return ()
        seeds = min(len(curve.retained) for curve in self.curves)
        return tuple(100.0 * statistics.fmean(curve.scores[i] for curve in self.curves) for i in range(seeds))

    @property
    def score(self) -> float | None:
        """See `DEFINITION`; ``None`` if nothing could be measured."""
        return statistics.fmean(self.scores) if self.scores else None

    @property
    def standard_error(self) -> float | None:
        """Of the score over the seeds of the stresses (not of the training that made the model)."""
        return standard_error(self.scores)

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of the score by Student's t over the seeds, cut to 0 and 100; ``None`` with one seed.

        ASYMPTOTIC: the shares are not normal, and few seeds make it wide.
        """
        if self.score is None or self.standard_error is None:
            return None
        from scipy.stats import t

        half = float(t.ppf(0.975, len(self.scores) - 1)) * self.standard_error
        return max(0.0, self.score - half), min(100.0, self.score + half)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON knows it; numbers that are not finite are ``None``."""
        return {
            "model": self.model,
            "score": self.score,
            "standard_error": self.standard_error,
            "interval": self.interval,
            "complete": self.complete,
            "definition": DEFINITION,
            "loss": _finite(self.loss),
            "uninformed_loss": _finite(self.uninformed),
            "learned": self.learned,
            "stresses": [
                {
                    "kind": curve.kind,
                    "score": 100.0 * curve.score,
                    "standard_error": None if curve.standard_error is None else 100.0 * curve.standard_error,
                    "levels": list(curve.levels),
                    "retained": list(curve.means),
                    "seeds": len(curve.retained),
                    "seeds_wanted": curve.seeds_wanted,
                }
                for curve in self.curves
            ],
            "weak_layers": [asdict(layer) for layer in self.layers],
            "critical_points": [{**asdict(point), "value": _finite(point.value)} for point in self.critical_points],
            "recommendations": [asdict(advice) for advice in self.recommendations],
            "left_out": list(self.left_out),
            "notes": list(self.notes),
            "seconds": self.seconds,
            "budget_s": self.budget_s,
        }

    def summary(self) -> str:
        """One line: the score with its interval, and the weakest kind of stress."""
        if self.score is None:
            return "No stability score: the time did not suffice for any stress."
        text = f"Stability score {self.score:.0f} of 100"
        if self.interval is not None:
            text += f" ({self.interval[0]:.0f} to {self.interval[1]:.0f}, {len(self.scores)} seeds)"
        if not self.complete:
            text += ", of a part of the stresses only"
        if not self.learned:
            return f"{text}: the model is no better than a constant output, so there is nothing that it could keep."
        weakest = min(self.curves, key=lambda curve: curve.score)
        return f"{text}; weakest under {weakest.kind} ({100 * weakest.score:.0f})."


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
