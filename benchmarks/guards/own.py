"""Kalmanguard itself."""

from __future__ import annotations

import tempfile
from collections import Counter
from typing import Any

from torch import Tensor

from benchmarks.guards.guard import Guard
from benchmarks.plants import probe_loss
from kalmanguard import Forensics, Settings, Supervisor
from kalmanguard.journal import JournalReader
from kalmanguard.models import Plant
from kalmanguard.records import Action, Level, Mode
from kalmanguard.settings import DETECTORS


def variants() -> dict[str, dict[str, Any]]:
    """Settings of the ablation: with all that is on by default, without each of it, and with each of what is off."""
    usual = tuple(name for name, on in DETECTORS.items() if on)
    return {
        "all": {},
        **{f"without {name}": {"detectors": tuple(n for n in usual if n != name)} for name in usual},
        "probes alone": {"detectors": ()},
        "calibrated": {"calibration": "default"},
        **{
            f"with {name}": {"detectors": (*usual, name)} | ({"calibration": "default"} if name == "fusion" else {})
            for name, on in DETECTORS.items()
            if not on
        },
    }


class Kalmanguard(Guard):
    """The supervisor, with default settings and a run folder; a halt ends the run."""

    def __init__(self, plant: Plant, **changes: Any) -> None:
        super().__init__(plant)
        self._folder = tempfile.TemporaryDirectory()
        self._supervisor = Supervisor(
            plant.model,
            plant.probe_loader,
            optimizer=plant.optimizers,
            scheduler=plant.schedulers,
            loss_fn=probe_loss(plant),
            settings=Settings(on_halt="return", **changes),
            run_dir=self._folder.name,
        )
        self._mode = Mode.WATCHING
        self._warm_at: int | None = None

    def after(self, step: int, loss: Tensor) -> bool:
        decision = self._supervisor.update(loss)
        self._mode = decision.mode
        level = decision.level.value
        if self._warm_at is None and decision.level is Level.NOMINAL:
            self._warm_at = step
        if decision.action is not Action.ACCEPT:
            self.note(step, decision.action.value.lower(), decision.restored_step, decision.reason, level)
        elif decision.level in (Level.SUSPECT, Level.CONFIRMED):
            self.note(step, "suspicion", None, decision.reason, level)
        return decision.action is not Action.HALT

    def close(self) -> dict[str, Any]:
        statistics = self._supervisor.statistics()
        self._supervisor.close()
        with JournalReader(self._folder.name) as reader:
            vetoes = Counter(m.veto for m, _ in reader.steps() if m.veto is not None)
        self._folder.cleanup()
        return {
            "mode": self._mode.value,
            "warm_at": self._warm_at,
            "clips": vetoes["clipped"],
            **{key: statistics[key] for key in ("probes", "probe_every", "snapshot_every", "lapsed_probes", "errors")},
        }


class WithDynamics(Kalmanguard):
    """The same with the tests of the dynamics, which are off by default."""

    def __init__(self, plant: Plant) -> None:
        dynamics = ("lyapunov", "oscillation", "period-two", "damping", "regimes")
        super().__init__(plant, detectors=(*(name for name, on in DETECTORS.items() if on), *dynamics))


class WithForensics(Kalmanguard):
    """The same with `Forensics` attached, at its defaults."""

    def __init__(self, plant: Plant) -> None:
        super().__init__(plant)
        self._supervisor.attach(Forensics(plant.model))
