"""Decisions in experiment trackers. Oracle: what is read back, by `Trajectory.load` and by TensorBoard itself."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from kalmanguard import Settings, Supervisor
from kalmanguard.errors import ConfigurationError
from kalmanguard.integrations.session import Session
from kalmanguard.integrations.tracking import Log, TensorBoardLog, TrackerLog, scalars
from kalmanguard.models import load_plant
from kalmanguard.records import Action, Decision, Level, Mode


def decision(step: int, level: Level = Level.NOMINAL, action: Action = Action.ACCEPT) -> Decision:
    return Decision(step, action, action, level, Mode.WATCHING, f"step {step}")


class Run:
    def __init__(self, *, broken: bool = False) -> None:
        self.told: list[dict[str, Any]] = []
        self.broken = broken

    def log(self, numbers: dict[str, Any]) -> None:
        if self.broken:
            raise OSError("no connection")
        self.told.append(numbers)


def test_a_real_run_is_read_back(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    plant = load_plant("mlp")(seed=0)
    torch.manual_seed(0)
    decisions = []
    with (
        Supervisor(plant.model, plant.probe_loader, settings=Settings(probe_every=5)) as supervisor,
        TensorBoardLog(tmp_path) as log,
    ):
        for _ in range(60):
            decisions.append(supervisor.update(plant.train_step(next(plant.loader))))
            log.add(decisions[-1])
            log.add(decisions[-1])  # no news
        log.add(decision(61, Level.SUSPECT))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    found = {scalar.step: scalar.value for scalar in events.Scalars("kalmanguard/held_out_loss")}
    expected = {d.step: d.statistics[0] for d in decisions if d.statistics and not math.isnan(d.statistics[0])}
    assert found == pytest.approx(expected, rel=1e-6)
    assert [s.step for s in events.Scalars("kalmanguard/level")] == list(range(1, 62))
    text = events.Tensors("kalmanguard/events")
    assert [(t.step, t.tensor_proto.string_val[0]) for t in text] == [(61, b"step 61")]


def test_nominal_decisions_are_thinned_out_and_others_are_not() -> None:
    run = Run()
    log = TrackerLog(run, every=10)
    for step in range(1, 31):
        log.add(decision(step, Level.SUSPECT if step == 14 else Level.NOMINAL))
    assert [told["kalmanguard/step"] for told in run.told] == [10, 14, 24]
    assert [told.get("kalmanguard/event") for told in run.told] == [None, "step 14", None]


def test_a_tracker_that_fails_is_warned_about_once_and_stops_nothing() -> None:
    log = TrackerLog(Run(broken=True), every=1)
    with pytest.warns(UserWarning, match="no connection"):
        log.add(decision(1))
    log.add(decision(2))
    log.close()


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"no log\(\)"):
        TrackerLog(object())
    with pytest.raises(ConfigurationError, match="every = 0"):
        TrackerLog(Run(), every=0)
    with pytest.raises(ConfigurationError, match="logs hold a str"):
        Session(Settings(), loss_fn=None, keep=1, logs=["runs"])  # type: ignore[list-item]
    assert isinstance(TrackerLog(Run()), Log)
    assert set(scalars(decision(1))) == {"kalmanguard/level", "kalmanguard/action"}


@pytest.mark.filterwarnings("ignore")
def test_weights_and_biases_offline(tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb")
    run = wandb.init(mode="offline", dir=str(tmp_path), project="kalmanguard")
    log = TrackerLog(run, every=1)
    for step in range(1, 6):
        log.add(decision(step))
    log.close()
    assert run.summary["kalmanguard/step"] == 5
    run.finish()
