"""The failure predictor beside a live run: it reads what the engine said of each step, and warns in the next one."""

from __future__ import annotations

from pathlib import Path

from kalmanguard.detectors.predictor import FailurePredictor, Forecast
from kalmanguard.engine import STATISTICS
from kalmanguard.records import Decision, Evidence, Measurement


class FailureForecast:
    """A predictor as a sensor: ``supervisor.attach(FailureForecast())``.

    Parameters
    ----------
    name
        A shipped predictor, or the path of the file of one of yours
        (`kalmanguard.detectors.predictor_file.read_predictor`).

    Attributes
    ----------
    latest
        The forecast after the last step; ``None`` before the first.

    Raises
    ------
    ConfigurationError
        There is no such predictor.

    Notes
    -----
    Off unless attached: on plants that it was trained with it warns before the other detectors where nothing jumps (a
    rate that is too high from the start, or creeps); on an architecture that it has never seen it mostly repeats them,
    with five times the false alarms (``python -m benchmarks predictor``). Guarantee: HEURISTIC. After a rollback it
    starts anew, and abstains for 30 steps. Cost: 14 us a step.

    Examples
    --------
    >>> FailureForecast().latest is None
    True
    """

    def __init__(self, name: str | Path = "default") -> None:
        self._predictor = FailurePredictor.load(name, statistics=STATISTICS)
        self._state = self._predictor.init()
        self.latest: Forecast | None = None

    def observe(self, measurement: Measurement, decision: Decision) -> None:
        """Take in a step and what was decided about it."""
        self._state, self.latest = self._predictor.step(self._state, measurement, decision)

    def sense(self, step: int) -> tuple[Evidence, ...]:
        """The warning of the step before, if there was one."""
        evidence = None if self.latest is None else self.latest.evidence
        return () if evidence is None else (evidence,)

    def forget(self) -> None:
        """The state was set from outside: what led to the forecast is undone."""
        self._state, self.latest = self._predictor.init(), None

    def close(self) -> None:
        """There is nothing to take off."""
