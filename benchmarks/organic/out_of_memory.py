"""A memory spike: one batch that does not fit, in the middle of a supervised run."""

from __future__ import annotations

import copy
import tempfile
from typing import Any

import torch
from torch import Tensor

from benchmarks.benchmark import Result
from kalmanguard import Settings, Supervisor
from kalmanguard.errors import KalmanguardError
from kalmanguard.models.mlp import MLPPlant

_STEPS, _SPIKE = 160, 127
_TOO_MUCH = 1 << 50  # bytes; no machine has them


def rehearse(seed: int) -> Result:
    """Let the allocator fail in a forward pass, and see what is left of the run.

    What must hold: the allocator's own exception reaches the caller; state and count of steps are as before; training
    goes on with the next batch; a held state can then be restored bit for bit. What a user would like besides is a
    sentence that says what to do. A program that dies of it, inside the supervisor's ``with`` block, must leave a
    checkpoint that the run can be resumed from, and the exception must say so.
    """
    return {"seed": seed, **_caught(seed), **_died(seed)}


def _caught(seed: int) -> Result:
    plant, states = _plant(seed), {}
    result: Result = {"exception": None}
    with tempfile.TemporaryDirectory() as folder:
        supervisor = _supervise(plant, folder)
        for step in range(1, _STEPS + 1):
            before = _state(plant)
            try:
                loss = _loss(plant, spike=step == _SPIKE)
            except RuntimeError as error:
                result["exception"] = f"{type(error).__name__}: {error}"[:120]
                result["untouched"] = _same(before, _state(plant)) and supervisor.step == step - 1
                continue
            _advance(plant, loss)
            supervisor.update(loss)
            states[supervisor.step] = _state(plant)
        result["went_on"] = supervisor.step == _STEPS - 1
        back = supervisor.rollback().restored_step
        result["restored"] = back is not None and _same(states[back], _state(plant))
        result["errors"] = supervisor.statistics()["errors"]
        supervisor.close()
    return result


def _died(seed: int) -> Result:
    plant = _plant(seed)
    with tempfile.TemporaryDirectory() as folder:
        try:
            with _supervise(plant, folder) as supervisor:
                for step in range(1, _STEPS + 1):
                    loss = _loss(plant, spike=step == _SPIKE)
                    _advance(plant, loss)
                    supervisor.update(loss)
        except RuntimeError as error:
            passed, advice = "memory" in str(error), list(getattr(error, "__notes__", ()))
        else:
            passed, advice = False, []
        fresh = _plant(seed + 1)
        try:
            resumed = Supervisor.resume(f"{folder}/run", fresh.model, fresh.probe_loader, optimizer=fresh.optimizer)
        except KalmanguardError as error:
            return {"passed": passed, "advice": advice, "resumed_at": None, "why": str(error)}
        at = resumed.resumed_from
        resumed.close()
    return {"passed": passed, "advice": advice, "resumed_at": at, "why": ""}


def _plant(seed: int) -> MLPPlant:
    torch.manual_seed(seed)
    return MLPPlant(seed=seed)


def _supervise(plant: MLPPlant, folder: str) -> Supervisor:
    settings = Settings(on_halt="return")
    return Supervisor(
        plant.model, plant.probe_loader, optimizer=plant.optimizer, settings=settings, run_dir=f"{folder}/run"
    )


def _loss(plant: MLPPlant, *, spike: bool) -> Tensor:
    inputs, targets = next(plant.loader)
    if spike:
        inputs = inputs + torch.empty(_TOO_MUCH, dtype=torch.uint8)[0]
    return plant.step_loss((inputs, targets))


def _advance(plant: MLPPlant, loss: Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]
    plant.optimizer.step()
    plant.optimizer.zero_grad()


def _state(plant: MLPPlant) -> Any:
    return copy.deepcopy((plant.model.state_dict(), plant.optimizer.state_dict()["state"]))


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)
