"""The supervisor in loops of Accelerate: real training on scikit-learn's digits.

Oracles: the bare run, bit for bit; the uninterrupted run; `torch.nn.utils.get_total_norm` before clipping.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from kalmanguard.errors import ConfigurationError
from kalmanguard.faults import FaultInjector
from kalmanguard.journal.reader import JournalReader
from kalmanguard.models import load_plant
from kalmanguard.records import Action, Decision
from kalmanguard.replay import replay
from kalmanguard.settings import Settings

pytest.importorskip("accelerate")
from accelerate import Accelerator

from kalmanguard.integrations.accelerate import AccelerateGuard

FIXED: dict[str, Any] = {"probe_examples": 32, "fresh_examples": 64, "probe_every": 5, "snapshot_every": 10}


class Loop:
    """A run as people write it, with or without a guard."""

    def __init__(self, folder: Path, *, watched: bool = True, accumulation: int = 1, mode: str = "protect") -> None:
        torch.manual_seed(0)
        self.plant = load_plant("mlp")(seed=0)
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
        self.model, self.optimizer = self.accelerator.prepare(self.plant.model, self.plant.optimizer)
        self.folder, self.states, self.norms, self.losses = folder, [weights(self.plant.model)], [], [0.0]
        self.guard = None
        if watched:
            self.guard = AccelerateGuard(
                self.accelerator, self.model, self.plant.probe_loader, optimizer=self.optimizer,
                settings=Settings(**{**FIXED, "mode": mode}), run_dir=folder / "run",
            )  # fmt: skip

    def train(self, steps: int, *, clip: float = 0.3, save_at: int | None = None) -> None:
        taken = 0
        while taken < steps:
            inputs, targets = next(self.plant.loader)
            with self.accelerator.accumulate(self.model):
                loss = cross_entropy(self.model(inputs), targets)
                self.accelerator.backward(loss)
                self.losses[-1] += float(loss.detach()) / self.accelerator.gradient_accumulation_steps
                if self.accelerator.sync_gradients:
                    self.norms.append(float(nn.utils.get_total_norm([p.grad for p in self.model.parameters()])))
                    self.accelerator.clip_grad_norm_(self.model.parameters(), clip)
                    taken += 1
                self.optimizer.step()
                self.optimizer.zero_grad()
            if self.guard is not None:
                self.guard.update(loss)
            if self.accelerator.sync_gradients:
                self.losses.append(0.0)
                self.states.append(weights(self.plant.model))
                if taken == save_at:
                    self.accelerator.save_state(str(self.folder / "saved"))


def weights(model: nn.Module) -> bytes:
    return b"".join(v.detach().view(torch.uint8).numpy().tobytes() for v in model.state_dict().values())


@pytest.mark.parametrize(("mode", "accumulation"), [("observe", 1), ("protect", 3)])
def test_a_clean_run_is_the_bare_run_and_its_journal_holds_what_happened(
    mode: str, accumulation: int, tmp_path: Path
) -> None:
    bare = Loop(tmp_path, watched=False, accumulation=accumulation)
    bare.train(40)
    watched = Loop(tmp_path, accumulation=accumulation, mode=mode)
    assert watched.guard is not None
    with watched.guard as guard:
        watched.train(40)
    assert watched.states == bare.states
    assert guard.supervisor is not None
    assert guard.supervisor.statistics()["errors"] == 0
    assert len(guard.decisions) == guard.supervisor.step == 40
    assert "clip_grad_norm_" not in vars(watched.accelerator)
    with JournalReader(tmp_path / "run") as reader:
        steps = [m for m, _ in reader.steps() if m.gradient_norm is not None]
    assert [m.gradient_norm for m in steps] == pytest.approx(watched.norms, rel=1e-5)
    assert [m.loss for m in steps] == pytest.approx(watched.losses[:40], rel=1e-5)
    assert min(watched.norms) > 0.0
    assert max(watched.norms) > 0.3
    assert replay(tmp_path / "run").identical
    assert guard.certificate is not None
    assert not any(claim.status == "FAILED" for claim in guard.certificate.claims)


def test_faults_are_dropped_and_undone_bit_for_bit(tmp_path: Path) -> None:
    loop, injector = Loop(tmp_path), FaultInjector(seed=0)
    injector.at(45).nan_gradient()
    injector.at(61).bit_flip(match="0.weight")
    assert loop.guard is not None
    with injector.attach(loop.plant.model, loop.plant.optimizer), loop.guard as guard:
        loop.train(90)
    vetoed = [d.step for d in guard.decisions if d.action is Action.VETO]
    undone = [d for d in guard.decisions if d.rolled_back]
    assert vetoed == [45]
    assert loop.states[45] == loop.states[44]
    assert undone
    for decision in undone:
        assert decision.restored_step is not None
        assert loop.states[decision.step] == loop.states[decision.restored_step]


def essence(decision: Decision) -> tuple[Any, ...]:
    numbers = tuple(None if np.isnan(x) else x for i, x in enumerate(decision.statistics) if not 10 <= i < 14)
    return decision.step, decision.action, decision.level, decision.mode, decision.reason, numbers


def test_a_resumed_run_decides_as_the_one_that_was_not_interrupted(tmp_path: Path) -> None:
    whole = Loop(tmp_path)
    whole.train(80, save_at=50)
    again = Loop(tmp_path)
    again.plant.loader.load_state_dict({**again.plant.loader.state_dict()})
    for _ in range(50):
        next(again.plant.loader)
    again.accelerator.load_state(str(tmp_path / "saved"))
    again.train(30)
    assert whole.guard is not None
    assert again.guard is not None
    assert again.states[-1] == whole.states[-1]
    assert [essence(d) for d in again.guard.decisions] == [essence(d) for d in whole.guard.decisions[50:]]
    for loop in (whole, again):
        assert loop.guard is not None
        loop.guard.close()
    assert replay(tmp_path / "run-2").identical


def test_a_closed_guard_says_so(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    assert loop.guard is not None
    loop.guard.close()
    with pytest.raises(ConfigurationError, match="closed"):
        loop.guard.update(1.0)
