"""Peers, through their public interface; used where they are installed, and never needed.

``arc-training`` is installed without its dependencies into a folder of its own, which ``PYTHONPATH`` then names:
``pip install --no-deps --target FOLDER arc-training==5.2.0.post1``; ``plarv-argus-sdk`` 1.1.5 likewise.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from typing import Any

from torch import Tensor

from benchmarks.guards.guard import Guard
from kalmanguard.models import Plant


def arc_version() -> str | None:
    """Version of the installed ``arc-training``, or ``None``."""
    if importlib.util.find_spec("arc") is None:
        return None
    import arc

    return str(arc.__version__)


def argus_version() -> str | None:
    """Version of the installed ``plarv-argus-sdk``, or ``None``."""
    if importlib.util.find_spec("plarv") is None:
        return None
    return importlib.metadata.version("plarv-argus-sdk")


class Arc(Guard):
    """ARC's ``Controller`` with its default configuration, called after ``backward()``; ``should_skip`` is honoured.

    An exception of its own ends the run, as it would end a user's; it counts as a halt.
    """

    def __init__(self, plant: Plant) -> None:
        super().__init__(plant)
        from arc import Controller, ControllerConfig

        self._controller: Any = Controller(
            plant.model, plant.optimizer, scheduler=plant.scheduler, config=ControllerConfig(verbose=False)
        )
        self._clips = 0
        self._crashed = False

    def admits(self, step: int, loss: Tensor) -> bool:
        try:
            action = self._controller.step(loss)
        except (ArithmeticError, ValueError, RuntimeError) as error:
            self.note(step, "halt", None, f"{type(error).__name__} inside ARC: {error}")
            self._crashed = True
            return False
        self._clips += bool(action.gradients_clipped)
        if action.unrecoverable:
            self.note(step, "suspicion", None, "unrecoverable")
        if action.rolled_back:
            self.note(step, "rollback", _restored(str(action.message)), str(action.message))
        elif action.should_skip:
            self.note(step, "veto", None, str(action.message))
        elif action.status.value != "healthy":
            self.note(step, "suspicion", None, str(action.message))
        return not action.should_skip

    def after(self, step: int, loss: Tensor) -> bool:
        return not self._crashed

    def close(self) -> dict[str, Any]:
        self._controller.close()
        return {"clips": self._clips}


def _restored(message: str) -> int | None:
    """Step that a rollback went back to; its snapshot is from before that step's own update."""
    found = re.search(r"to step (\d+)", message)
    return int(found[1]) - 1 if found else None


class Argus(Guard):
    """Argus's ``LocalDetector``, called once per step; it only reports, and its critical reports are suspicions.

    What its package decides beyond that needs its makers' server, and is left out.
    """

    def __init__(self, plant: Plant) -> None:
        super().__init__(plant)
        from plarv.local import LocalDetector

        self._detector: Any = LocalDetector(plant.model, plant.optimizer, silent=True).attach()

    def admits(self, step: int, loss: Tensor) -> bool:
        report = self._detector.step(loss=float(loss.detach()))
        if report.any_critical:
            self.note(step, "suspicion", None, str(report.summary()))
        return True

    def close(self) -> dict[str, Any]:
        self._detector.detach()
        return {}
