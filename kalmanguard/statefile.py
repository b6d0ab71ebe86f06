"""Engine states as JSON text and back: plain numbers only, exact to the last bit, nothing that could run code."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from kalmanguard import engine
from kalmanguard.control import cadence, ladder, ledger, retention
from kalmanguard.detectors import drift, dynamics, excursion, fusion, tail
from kalmanguard.errors import ConfigurationError
from kalmanguard.estimators import autocovariance, bank, noise, probe, regimes, statespace, trajectory, trend, wander
from kalmanguard.records import Innovation, Mode

_TYPES: dict[str, Any] = {
    cls.__name__: cls
    for cls in (
        engine.EngineState, bank.Estimators, ledger.Ledger, ledger.Episode, ledger.Heard, cadence.Cadence,
        ladder.LadderState, retention.Slot, drift.DriftState, excursion.ExcursionState, tail.TailState, Innovation,
        fusion.FusionState, dynamics.DynamicsState, autocovariance.AutocovarianceState, autocovariance.Moments,
        regimes.RegimeState, noise.Scale, probe.ProbeState, statespace.Gaussian, statespace.Covariance,
        trajectory.TrajectoryState, trend.TrendState, wander.Wander,
    )
}  # fmt: skip


def dump(state: engine.EngineState) -> str:
    """Write an engine state as JSON text."""
    return json.dumps(_encode(state), separators=(",", ":"))


def load(text: str) -> engine.EngineState:
    """Read what `dump` wrote.

    Raises
    ------
    ConfigurationError
        The text is no engine state of this version.
    """
    try:
        state = _decode(json.loads(text))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigurationError(f"The supervisor's saved state cannot be read: {error}.") from None
    if not isinstance(state, engine.EngineState):
        raise ConfigurationError(f"The supervisor's saved state holds a {type(state).__name__}, not an engine state.")
    return state


def _encode(value: Any) -> Any:
    if isinstance(value, Mode):
        return {"mode": value.value}
    if isinstance(value, np.ndarray):
        return {"array": value.tolist()}
    if isinstance(value, tuple):
        items = [_encode(v) for v in value]
        return {"type": type(value).__name__, "fields": items} if hasattr(value, "_fields") else items
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{type(value).__name__} does not belong in an engine state")


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_decode(v) for v in value)
    if isinstance(value, dict):
        if "array" in value:
            return np.array(value["array"], dtype=np.float64)
        if "mode" in value:
            return Mode(value["mode"])
        return _TYPES[value["type"]](*(_decode(v) for v in value["fields"]))
    return value
