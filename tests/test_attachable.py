"""Sensors of one's own, attached to a supervisor: what they find is heard once, journaled, and never a rollback."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kalmanguard import Decision, Evidence, Forensics, Guarantee, Level, Supervisor
from kalmanguard.errors import ConfigurationError
from kalmanguard.models.mlp import MLPPlant
from kalmanguard.models.plant import Plant
from kalmanguard.replay import replay
from kalmanguard.sensors.forecast import FailureForecast

HEURISTIC = Guarantee.HEURISTIC


def train(plant: Plant, guard: Supervisor, steps: int) -> list[Decision]:
    decisions = []
    for _, batch in zip(range(steps), plant.loader, strict=False):
        loss = plant.step_loss(batch)
        loss.backward()
        plant.optimizer.step()
        plant.optimizer.zero_grad()
        decisions.append(guard.update(loss))
    return decisions


class Finds:
    """Fires at the steps that it is told."""

    def __init__(self, at: Callable[[int], bool]) -> None:
        self.at, self.asked, self.closed = at, 0, 0

    def sense(self, step: int) -> tuple[Evidence, ...]:
        self.asked += 1
        return (Evidence("finds", float(step), self.at(step), Guarantee.HEURISTIC, "something is odd"),)

    def close(self) -> None:
        self.closed += 1


def test_an_attached_sensor_is_heard_journaled_and_closed(tmp_path: Path) -> None:
    plant = MLPPlant(seed=0)
    sensor = Finds(lambda step: step == 70)
    with Supervisor(plant.model, plant.probe_loader, run_dir=tmp_path / "run", settings={"probe_every": 50}) as guard:
        guard.attach(sensor)
        guard.attach(sensor)  # once is enough
        decisions = train(plant, guard, 80)
    assert (sensor.asked, sensor.closed) == (80, 1)
    assert decisions[69].level is Level.SUSPECT
    assert [e.detector for e in decisions[69].evidence if e.fired] == ["Finds.finds"]
    assert all(d.level is not Level.SUSPECT for d in decisions[:69])
    assert replay(tmp_path / "run").identical


def test_a_sensor_that_never_stops_buys_few_probes_and_changes_nothing() -> None:
    quiet, loud = (MLPPlant(seed=0) for _ in range(2))
    runs = []
    for plant, sensor in ((quiet, Finds(lambda step: False)), (loud, Finds(lambda step: True))):
        with Supervisor(plant.model, plant.probe_loader, settings={"probe_every": 50}) as guard:
            guard.attach(sensor)
            train(plant, guard, 400)
            runs.append(guard.statistics())
    assert 1 <= runs[1]["suspicions"] <= 8
    assert runs[1]["probes"] - runs[0]["probes"] <= 40
    assert runs[1]["rollbacks"] == runs[1]["vetoes"] == 0
    for a, b in zip(quiet.model.parameters(), loud.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_forensics_at_a_supervisor_finds_what_is_wrong_and_is_told_of_a_rollback() -> None:
    plant = MLPPlant(seed=0)
    forensics = Forensics(plant.model, plant.optimizer)
    with Supervisor(plant.model, plant.probe_loader, settings={"probe_every": 20, "snapshot_every": 20}) as guard:
        guard.attach(forensics)
        healthy = train(plant, guard, 120)
        assert not [e for d in healthy for e in d.evidence if e.detector.startswith("Forensics")]
        guard.rollback()
        assert not [e for d in train(plant, guard, 40) for e in d.evidence if e.detector.startswith("Forensics")]
        with torch.no_grad():
            plant.model.layers[0].bias[:100].fill_(-100.0)
        found = {e.detector for d in train(plant, guard, 30) for e in d.evidence}
        assert any(name.startswith("Forensics.") for name in found)
    assert not plant.model.layers[0]._forward_hooks  # taken off with the supervisor


def test_the_failure_forecast_warns_in_the_next_step_and_starts_anew_after_a_rollback() -> None:
    plant, forecast = MLPPlant(seed=0), FailureForecast()
    with Supervisor(plant.model, plant.probe_loader, settings={"probe_every": 20, "snapshot_every": 20}) as guard:
        guard.attach(forecast)
        train(plant, guard, 45)
        assert forecast.latest is not None
        evidence = Evidence("foretold", 0.9, True, HEURISTIC, "soon")
        forecast.latest = forecast.latest._replace(fired=True, evidence=evidence)
        (decision,) = train(plant, guard, 1)
        assert [e.detector for e in decision.evidence if e.fired] == ["FailureForecast.foretold"]
        train(plant, guard, 60)
        assert 0.0 <= forecast.latest.probability <= 1.0
        guard.rollback()
        assert forecast.latest is None
        train(plant, guard, 1)
        assert math.isnan(forecast.latest.probability)


def test_a_sensor_that_raises_is_taken_off_and_training_goes_on() -> None:
    class Broken(Finds):
        def sense(self, step: int) -> tuple[Evidence, ...]:
            if step == 3:
                raise RuntimeError("no such layer")
            return super().sense(step)

    plant = MLPPlant(seed=0)
    sensor = Broken(lambda step: False)
    with Supervisor(plant.model, plant.probe_loader) as guard:
        guard.attach(sensor)
        with pytest.warns(UserWarning, match="Broken failed and is off: RuntimeError: no such layer"):
            train(plant, guard, 6)
        assert (sensor.asked, sensor.closed) == (2, 1)
        assert guard.step == 6
    with (
        Supervisor(plant.model, plant.probe_loader) as guard,
        pytest.raises(ConfigurationError, match=r"sense\(step\)"),
    ):
        guard.attach(object())  # type: ignore[arg-type]


@pytest.mark.parametrize("found", ["abc", ({"detector": "x"},), (Evidence("x", None, True, HEURISTIC, ""),)])  # type: ignore[arg-type]
def test_a_sensor_that_returns_no_evidence_is_taken_off(found: object, tmp_path: Path) -> None:
    class Odd(Finds):
        def sense(self, step: int) -> tuple[Evidence, ...]:
            return found  # type: ignore[return-value]

    plant = MLPPlant(seed=0)
    with Supervisor(plant.model, plant.probe_loader, run_dir=tmp_path / "run") as guard:
        guard.attach(Odd(lambda step: False))
        with pytest.warns(UserWarning, match="Odd failed and is off"):
            train(plant, guard, 5)
        assert guard.statistics()["errors"] == 1
    assert replay(tmp_path / "run").identical
    with pytest.raises(ConfigurationError, match="closed"):
        guard.attach(Finds(lambda step: False))


def test_changing_names_are_heard_no_more_often_than_one() -> None:
    class Renames(Finds):
        def sense(self, step: int) -> tuple[Evidence, ...]:
            return (Evidence(f"layer {step}", 1.0, True, HEURISTIC, "odd"),)

    plant = MLPPlant(seed=0)
    with Supervisor(plant.model, plant.probe_loader, settings={"probe_every": 50}) as guard:
        guard.attach(Renames(lambda step: True))
        train(plant, guard, 300)
        assert guard.statistics()["suspicions"] <= 6
        assert len(guard._loop.state.ledger.heard) == 1
