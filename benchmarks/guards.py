"""What watches a run: nothing, kalmanguard, gradient clipping, a z-score with rollback, or a peer."""

from __future__ import annotations

import copy
import math
import statistics
import tempfile
from collections import Counter, deque
from typing import Any

import torch
from torch import Tensor

from benchmarks.plants import probe_loss
from kalmanguard import Settings, Supervisor
from kalmanguard.journal import JournalReader
from kalmanguard.models import Plant
from kalmanguard.records import Action, Level, Mode

#: A guard's word or deed: step, kind (suspicion, veto, rollback, halt, clip), the step at whose end the restored state
#: was, and a plain sentence.
Event = dict[str, Any]


class Guard:
    """Watches one run; this one lets everything pass.

    The loop asks ``admits`` before the optimizer's step and calls ``after`` behind it.
    """

    def __init__(self, plant: Plant) -> None:
        self.plant = plant
        self.events: list[Event] = []

    def note(self, step: int, kind: str, restored: int | None = None, text: str = "") -> None:
        """Keep one event."""
        self.events.append({"step": step, "kind": kind, "restored": restored, "text": text})

    def admits(self, step: int, loss: Tensor) -> bool:
        """Judge the gradient; whether the optimizer shall step."""
        return True

    def after(self, step: int, loss: Tensor) -> bool:
        """Judge the step; whether training shall go on."""
        return True

    def close(self) -> dict[str, Any]:
        """End supervision, and say what there is to say about the whole run."""
        return {}


class Clipping(Guard):
    """The usual remedy: gradients clipped to norm 1."""

    def admits(self, step: int, loss: Tensor) -> bool:
        norm = float(torch.nn.utils.clip_grad_norm_(self.plant.model.parameters(), 1.0))
        if norm > 1.0:
            self.note(step, "clip")
        return True


class ZScore(Guard):
    """The ten lines that one writes oneself: roll back when loss or gradient norm lies six deviations out."""

    def __init__(self, plant: Plant) -> None:
        super().__init__(plant)
        self._seen: tuple[deque[float], ...] = (deque(maxlen=50), deque(maxlen=50))
        self._kept: deque[tuple[int, Any]] = deque(maxlen=2)

    def admits(self, step: int, loss: Tensor) -> bool:
        plant = self.plant
        gradients = [p.grad for p in plant.model.parameters() if p.grad is not None]
        now = (float(loss.detach()), float(torch.nn.utils.get_total_norm(gradients)))
        if self._kept and any(_is_outlier(v, seen) for v, seen in zip(now, self._seen, strict=True)):
            back, (weights, moments) = self._kept[0]
            plant.model.load_state_dict(weights)
            for optimizer, state in zip(plant.optimizers, moments, strict=True):
                optimizer.load_state_dict(copy.deepcopy(state))
            self.note(step, "rollback", back)
            return False
        for value, seen in zip(now, self._seen, strict=True):
            seen.append(value)
        if step % 20 == 0:
            kept = plant.model.state_dict(), [optimizer.state_dict() for optimizer in plant.optimizers]
            self._kept.append((step - 1, copy.deepcopy(kept)))
        return True


def _is_outlier(value: float, seen: deque[float]) -> bool:
    if not math.isfinite(value):
        return True
    return len(seen) == seen.maxlen and value > statistics.fmean(seen) + 6 * statistics.stdev(seen)


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
        if self._warm_at is None and decision.level is Level.NOMINAL:
            self._warm_at = step
        if decision.action is not Action.ACCEPT:
            self.note(step, decision.action.value.lower(), decision.restored_step, decision.reason)
        elif decision.level in (Level.SUSPECT, Level.CONFIRMED):
            self.note(step, "suspicion", None, decision.reason)
        return decision.action is not Action.HALT

    def close(self) -> dict[str, Any]:
        statistics_ = self._supervisor.statistics()
        self._supervisor.close()
        with JournalReader(self._folder.name) as reader:
            vetoes = Counter(m.veto for m, _ in reader.steps() if m.veto is not None)
        self._folder.cleanup()
        return {
            "mode": self._mode.value,
            "warm_at": self._warm_at,
            "clips": vetoes["clipped"],
            **{key: statistics_[key] for key in ("probes", "probe_every", "snapshot_every", "lapsed_probes", "errors")},
        }


def make_guard(name: str, plant: Plant) -> Guard:
    """Make a guard by the name that tables use."""
    if name == "ARC":
        from benchmarks.peers import Arc

        return Arc(plant)
    makers: dict[str, type[Guard]] = {
        "none": Guard,
        "kalmanguard": Kalmanguard,
        "clipping": Clipping,
        "z-score": ZScore,
    }
    return makers[name](plant)
