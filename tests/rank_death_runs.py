"""What each rank of the tests of death runs: a real training in which one rank ends at an exact place, for good."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from kalmanguard import FaultInjector, Settings, Supervisor
from kalmanguard.actuators.actuator import Actuator
from kalmanguard.journal.writer import JournalWriter
from kalmanguard.loop import Loop
from kalmanguard.models import load_plant
from kalmanguard.snapshots import checkpoint, rotation
from kalmanguard.snapshots.copying import Copier
from kalmanguard.snapshots.restoring import Restoration

from .rank_runs import FIXED, digest

#: Step from which the rank is doomed, and step of the fault that is rolled back.
DOOMED, FAULT = 45, 47
#: Steps that a run takes in which nobody dies.
STEPS = 80
#: Whether this process dies when it comes to its place.
armed = False


def die(folder: Path, how: int = signal.SIGKILL) -> None:
    """End as a machine does that loses its power: nothing is flushed, closed or told."""
    (folder / "death.part").write_text(json.dumps({"pid": os.getpid(), "at": time.time()}))
    (folder / "death.part").rename(folder / "death")
    os.kill(os.getpid(), how)


def _then(owner: Any, name: str, folder: Path, *, before: bool = False, of: Callable[..., bool] | None = None) -> None:
    """Have the process die right after (or before) a call of ``owner.name``, once it is armed."""
    original = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        meant = armed and (of is None or of(*args))
        if meant and before:
            die(folder)
        result = original(*args, **kwargs)
        if meant:
            die(folder)
        return result

    setattr(owner, name, call)


def _in_capture(folder: Path) -> None:
    original = Copier.fill

    def fill(self: Copier, slot: Any, plan: Any, dynamic: Any) -> None:
        if armed:
            for (_, sources), targets in zip(plan.groups, slot.groups, strict=True):
                torch._foreach_copy_(targets[: len(targets) // 2], sources[: len(targets) // 2])
            die(folder)
        original(self, slot, plan, dynamic)

    Copier.fill = fill  # type: ignore[method-assign]


def _between_tensors(folder: Path) -> None:
    original = Restoration.commit

    def commit(self: Restoration) -> None:
        if armed:
            writes = list(self._writes.values())
            with torch.no_grad():
                for target, index in writes[: len(writes) // 2]:
                    target.copy_(self._image.tensors[index])
            die(folder)
        original(self)

    Restoration.commit = commit  # type: ignore[method-assign]


#: Where a rank dies, by name. Those of a checkpoint are reached by rank 0 alone, in the thread that writes.
PLACES: dict[str, Callable[[Path], None]] = {
    "capture": _in_capture,
    "intent": lambda f: _then(Loop, "_restored", f, before=True),
    "between tensors": _between_tensors,
    "restored": lambda f: _then(Actuator, "restore", f),
    "tensor file": lambda f: _then(checkpoint, "save_file", f),
    "manifest": lambda f: _then(checkpoint, "write_text", f),
    "rename": lambda f: _then(rotation.Rotation, "commit", f, before=True),
    "anchor": lambda f: _then(rotation, "replace_text", f, before=True),
    "record": lambda f: _then(rotation, "replace_text", f),
    "recorded": lambda f: _then(JournalWriter, "record", f, of=lambda _, kind, *__: kind == "durable"),
}


def _slow_disk(folder: Path) -> None:
    """A checkpoint takes until the other rank is dead, and a moment more."""
    original = checkpoint.save_file

    def save_file(*args: Any, **kwargs: Any) -> None:
        if armed:
            (folder / "writing").touch()
            deadline = time.monotonic() + 30.0
            while not (folder / "death").exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.5)
        original(*args, **kwargs)

    checkpoint.save_file = save_file  # type: ignore[assignment]


def _setting(folder: Path, settings: dict[str, Any]) -> Settings:
    return Settings(**{**FIXED, "checkpoint_share": 0.5, "rank_timeout_s": 10.0, **settings})


def doomed(
    rank: int, size: int, folder: Path, *, victim: int, place: str, doomed_at: int = DOOMED, **settings: Any
) -> dict[str, Any]:
    """Train until ``victim`` dies at ``place``; what the others were told, when, and all states that they had."""
    global armed  # noqa: PLW0603 - the patches of this process look at it
    plant = load_plant("mlp")(seed=0)
    torch.manual_seed(100 + rank)
    model = DistributedDataParallel(plant.model)
    fault = FaultInjector.parse((f"bit_flip@{FAULT}",) if place in _OF_ROLLBACK and rank == 0 else (), seed=0)
    if rank == victim and place in PLACES:
        PLACES[place](folder)
    armed = doomed_at == 0
    if place == "in flight" and rank == 0:
        _slow_disk(folder)
    states: dict[int, str] = {}
    try:
        with (
            Supervisor(
                model, plant.probe_loader, optimizer=plant.optimizer, loader=plant.loader,
                settings=_setting(folder, settings), run_dir=folder / "run",
            ) as supervisor,
            fault.attach(plant.model, plant.optimizer),
        ):  # fmt: skip
            states[0] = digest(plant.model)
            for step in range(1, STEPS + 1):
                if step == doomed_at and rank == 0:
                    # On a busy machine the thread that writes may be late: there is a checkpoint to go on from.
                    supervisor._loop.actuator.wait_for_checkpoint()
                armed = step >= doomed_at
                inputs, targets = next(plant.loader)
                part = slice(len(targets) * rank // size, len(targets) * (rank + 1) // size)
                loss = plant.loss_fn(model(inputs[part]), targets[part]).mean()
                if rank == victim and armed:
                    _end_by_itself(place, folder)
                loss.backward()
                plant.step()
                if rank == victim and armed and place == "stopped in the supervisor":
                    die(folder, signal.SIGSTOP)
                supervisor.update(loss)
                states[step] = digest(plant.model)
    except Exception as error:
        at = time.time()
        death = json.loads((folder / "death").read_text())
        if place.startswith("stopped") and rank != victim:
            os.kill(death["pid"], signal.SIGKILL)
        if place == "capture":
            # The survivors have captured this step's state before they were told, and rank 0 saves it as it ends.
            states.setdefault(step, digest(plant.model))
        told = {"error": type(error).__name__, "text": str(error), "cause": repr(error.__cause__)}
        return {**told, "waited_s": at - death["at"], "states": states}
    return {"error": None, "states": states}


_OF_ROLLBACK = ("intent", "between tensors", "restored")


def _end_by_itself(place: str, folder: Path) -> None:
    """Deaths that no patch is needed for."""
    if place == "in flight" and (folder / "writing").exists():
        die(folder)
    if place == "stopped in training":
        die(folder, signal.SIGSTOP)
    if place == "out of memory":
        die(folder, 0)  # no signal: its hour alone is noted
        raise torch.OutOfMemoryError("out of memory")


def resumed(
    rank: int, size: int, folder: Path, *, run_dir: Path, steps: int, how: str = "resume", **settings: Any
) -> dict[str, Any]:
    """Go on from what a killed run has left, in a process that knows nothing of it."""
    plant = load_plant("mlp")(seed=0)
    if how == "resume":
        for parameter in plant.model.parameters():
            torch.nn.init.constant_(parameter, 0.5)  # nothing of it may be left
    torch.manual_seed(100 + rank)
    model = DistributedDataParallel(plant.model)
    with getattr(Supervisor, how)(
        run_dir, model, plant.probe_loader, optimizer=plant.optimizer, loader=plant.loader,
        settings=_setting(folder, settings),
    ) as supervisor:  # fmt: skip
        states, position = [digest(plant.model)], plant.loader.position
        for _ in range(steps):
            inputs, targets = next(plant.loader)
            part = slice(len(targets) * rank // size, len(targets) * (rank + 1) // size)
            loss = plant.loss_fn(model(inputs[part]), targets[part]).mean()
            loss.backward()
            plant.step()
            supervisor.update(loss)
            states.append(digest(plant.model))
        errors = supervisor.statistics()["errors"]
    return {"from": supervisor.resumed_from, "position": position, "states": states, "errors": errors}
