"""The supervisor on real training: what it does by itself, what can be asked of it by hand, and how it fails.

Oracles: the training itself (digests of the whole state, bitwise), the journal read back by the verifier and by replay,
and the process that is killed. Small networks on scikit-learn's digits; every tolerance is zero unless it is named.
"""

from __future__ import annotations

import copy
import gc
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import optimizer as torch_hooks

from kalmanguard import statefile
from kalmanguard.actuators.actions import (
    Controls,
    Halt,
    HoldLearningRate,
    Notify,
    Recovery,
    RecoveryAction,
    Rollback,
    Veto,
)
from kalmanguard.certificate.verify import verify
from kalmanguard.errors import (
    BindError,
    ConfigurationError,
    JournalError,
    KalmanguardError,
    PauseIntervention,
    RollbackIntervention,
    SnapshotError,
    TrainingHalted,
    VetoIntervention,
)
from kalmanguard.faults import FaultInjector
from kalmanguard.journal.reader import JournalReader
from kalmanguard.journal.writer import BATCH
from kalmanguard.records import Action, Decision, Level, Mode
from kalmanguard.replay import replay
from kalmanguard.settings import Settings
from kalmanguard.supervisor import Supervisor

Hook = Callable[["Run", int], None]


@cache
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x, y = torch.from_numpy(pixels).float()[order] / 8.0 - 1.0, torch.from_numpy(labels).long()[order]
    return x[:1200], y[:1200], x[1200:], y[1200:]


def held_out() -> list[tuple[Tensor, Tensor]]:
    _, _, x, y = digits()
    return list(zip(x.split(128), y.split(128), strict=True))


class Run:
    """An MLP on digits, AdamW, batches that are a function of the step, and a supervisor."""

    def __init__(self, *, seed: int = 0, lr: float = 3e-3, **options: Any) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr)
        self.losses: list[float] = []
        self.count = 0
        chosen = options.pop("settings", None) or Settings(probe_examples=128, probe_every=5, snapshot_every=10)
        self.supervisor = Supervisor(self.model, held_out(), settings=chosen, **options)

    def batch(self, index: int) -> tuple[Tensor, Tensor]:
        x, y, _, _ = digits()
        chosen = torch.randint(0, len(x), (32,), generator=torch.Generator().manual_seed(index))
        return x[chosen], y[chosen]

    def step(self, before: Hook | None = None, after: Hook | None = None) -> Decision:
        self.count += 1
        x, y = self.batch(self.count)
        loss = F.cross_entropy(self.model(x), y)
        loss.backward()
        if before is not None:
            before(self, self.count)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if after is not None:
            after(self, self.count)
        self.losses.append(float(loss.detach()))
        return self.supervisor.update(loss)

    def go(self, steps: int, before: Hook | None = None, after: Hook | None = None) -> list[Decision]:
        return [self.step(before, after) for _ in range(steps)]

    def weights(self) -> list[bytes]:
        return [p.detach().numpy().tobytes() for p in self.model.parameters()]

    def state(self) -> str:
        """Digest of everything that decides how the training goes on, random streams included."""
        return self.supervisor._loop.actuator.state.digest(rng=True, schedule=True, data=False)

    def held_out_loss(self) -> float:
        _, _, x, y = digits()
        with torch.no_grad():
            return float(F.cross_entropy(self.model(x), y))


@pytest.fixture
def runs() -> Iterator[list[Run]]:
    made: list[Run] = []
    yield made
    for run in made:
        run.supervisor.close()


def nan_weight(run: Run, step: int) -> None:
    with torch.no_grad():
        run.model[0].weight[3, 5] = math.nan  # type: ignore[index]


def nan_gradient(run: Run, step: int) -> None:
    gradient = run.model[0].weight.grad
    assert isinstance(gradient, Tensor)
    gradient[3, 5] = math.nan


def ruin(run: Run) -> Decision:
    """Make a weight nan and go on until that is undone: parameters are sketched in every fourth step at least."""
    decision = run.step(after=nan_weight)
    for _ in range(3):
        if decision.rolled_back:
            break
        decision = run.step()
    assert decision.rolled_back
    assert all(torch.isfinite(p).all() for p in run.model.parameters())
    return decision


# -- one line in the loop ---------------------------------------------------------------------------------------------


def test_the_two_arguments_and_the_one_call_are_enough() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    supervisor = Supervisor(model, held_out())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y, _, _ = digits()
    levels = []
    for step in range(60):
        F.cross_entropy(model(x[step * 16 : step * 16 + 16]), y[step * 16 : step * 16 + 16]).backward()
        optimizer.step()
        optimizer.zero_grad()
        decision = supervisor.update()
        levels.append(decision.level)
    assert decision.step == supervisor.step == 60
    assert decision.action is decision.proposed is Action.ACCEPT
    assert decision.certificate == "HOLDS"
    assert decision.restored_step is None
    assert not decision.rolled_back
    assert levels[0] is Level.WARMUP
    assert levels[-1] is Level.NOMINAL
    statistics = supervisor.statistics()
    assert statistics["steps"] == 60
    assert statistics["progress"] > 0
    assert supervisor.recommended_clip_value() < math.inf  # gradients were seen without being passed
    assert supervisor.diagnose()["optimizers"] == [{"type": "SGD", "learning_rates": [0.1]}]
    supervisor.close()


def test_every_decision_has_a_reason_with_its_numbers(runs: list[Run]) -> None:
    run = Run()
    runs.append(run)
    decisions = run.go(60)
    assert [d.step for d in decisions] == list(range(1, 61))
    for decision in decisions:
        assert decision.reason.startswith(f"Step {decision.step} ")
        assert decision.reason.endswith(".")
    assert any("held-out loss" in d.reason and "bound" in d.reason for d in decisions)


def test_training_works_as_well_as_without(runs: list[Run]) -> None:
    run = Run()
    runs.append(run)
    run.go(200)
    assert run.held_out_loss() < 0.5
    assert run.supervisor.statistics()["rollbacks"] == 0
    assert run.supervisor.statistics()["errors"] == 0


def test_an_update_without_a_step_advances_nothing(runs: list[Run]) -> None:
    run = Run()
    runs.append(run)
    first = run.supervisor.update()
    assert first.step == 0
    assert "No optimizer step" in first.reason
    last = run.go(3)[-1]
    assert run.supervisor.update(1.0) is last
    assert run.supervisor.step == 3


def test_without_any_optimizer_the_first_update_says_what_to_do() -> None:
    supervisor = Supervisor(nn.Linear(64, 10), held_out())
    with pytest.raises(BindError, match="pass optimizer="):
        supervisor.update()
    supervisor.close()


def test_after_closing_there_are_no_hooks_and_no_updates() -> None:
    before = len(torch_hooks._global_optimizer_pre_hooks), len(torch_hooks._global_optimizer_post_hooks)
    run = Run()
    run.go(3)
    run.supervisor.close()
    run.supervisor.close()
    assert (len(torch_hooks._global_optimizer_pre_hooks), len(torch_hooks._global_optimizer_post_hooks)) == before
    with pytest.raises(ConfigurationError, match="closed"):
        run.supervisor.update()


def test_a_forgotten_supervisor_goes_away() -> None:
    before = len(torch_hooks._global_optimizer_pre_hooks)
    run = Run()
    run.go(12)
    run.supervisor = None  # type: ignore[assignment]
    gc.collect()
    assert len(torch_hooks._global_optimizer_pre_hooks) == before
    weights = run.weights()
    x, y = run.batch(1)
    F.cross_entropy(run.model(x), y).backward()
    run.optimizer.step()
    assert run.weights() != weights


# -- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nan_gradient", "inf_gradient"])
def test_a_gradient_that_is_not_finite_is_vetoed_and_costs_nothing(kind: str, runs: list[Run]) -> None:
    run = Run()
    runs.append(run)
    injector = FaultInjector(seed=0)
    getattr(injector.at(73), kind)()
    with injector.attach(run.model, run.optimizer):
        run.go(72)
        before = run.weights(), copy.deepcopy(run.optimizer.state_dict())
        decision = run.step()
        assert decision.action is Action.VETO
        assert decision.level is Level.CONFIRMED
        assert "not finite" in decision.reason
        assert run.weights() == before[0]
        for key, state in run.optimizer.state_dict()["state"].items():
            for name, value in state.items():
                assert torch.equal(value, before[1]["state"][key][name])
        after = run.go(60)
    assert {d.action for d in after} == {Action.ACCEPT}
    assert run.supervisor.statistics()["vetoes"] == 1
    assert run.supervisor.statistics()["rollbacks"] == 0


@pytest.mark.parametrize(
    ("fault", "within"),
    [
        (lambda f: f.lr_spike(200, steps=5), 8),
        (lambda f: f.weight_scale(20.0), 2),
        (lambda f: f.bit_flip("parameter", match="0.weight"), 2),
    ],
)
def test_harm_is_rolled_back_and_the_run_ends_well(fault: Any, within: int, runs: list[Run]) -> None:
    run = Run()
    runs.append(run)
    injector = FaultInjector(seed=1)
    fault(injector.at(131))
    with injector.attach(run.model, run.optimizer):
        decisions = run.go(260)
    rolled = [d for d in decisions if d.action is Action.ROLLBACK]
    assert rolled
    assert 131 <= rolled[0].step <= 131 + within
    assert rolled[0].restored_step is not None
    assert rolled[0].restored_step < 131
    assert rolled[0].level is Level.CONFIRMED
    assert {d.action for d in decisions[-40:]} == {Action.ACCEPT}
    assert run.held_out_loss() < 0.5
    assert run.optimizer.param_groups[0]["lr"] == 3e-3


def test_an_exploding_gradient_does_no_lasting_harm(runs: list[Run]) -> None:
    run = Run()
    runs.append(run)
    with FaultInjector().at(131).gradient_scale(1e6, steps=2).attach(run.model, run.optimizer):
        decisions = run.go(200)
    assert [d.action for d in decisions[130:132]] == [Action.VETO] * 2
    assert "beyond the gate" in decisions[130].reason
    assert {d.action for d in decisions[132:]} == {Action.ACCEPT}


def test_in_observe_mode_the_same_faults_are_proposed_and_nothing_is_done() -> None:
    run = Run(settings=Settings(mode="observe", probe_examples=128, probe_every=5))
    injector = FaultInjector().at(73).nan_gradient().at(74).bit_flip("parameter", match="0.weight")
    weights: list[list[bytes]] = []
    with injector.attach(run.model, run.optimizer):
        decisions = run.go(90, after=lambda r, t: weights.append(r.weights()))
    assert {d.action for d in decisions} == {Action.ACCEPT}
    assert decisions[72].proposed is not Action.ACCEPT
    assert decisions[72].level is Level.CONFIRMED
    assert any(d.proposed in (Action.ROLLBACK, Action.HALT) for d in decisions[72:])
    assert not any(d.rolled_back for d in decisions)
    assert all(torch.isnan(p).any() for p in run.model.parameters())  # the damage is done, as it would have been
    run.supervisor.close()


def test_a_persistent_fault_halts_at_the_best_certified_state() -> None:
    settings = Settings(probe_examples=128, probe_every=5, snapshot_every=10, rollback_budget=4)
    run = Run(settings=settings)
    run.go(100)
    best = min((s for s in run.supervisor.statistics()["snapshots"] if s["certified"]), key=lambda s: s["level"])
    loss = run.held_out_loss()
    with pytest.raises(TrainingHalted) as halted:
        run.go(300, after=nan_weight)
    assert run.supervisor.statistics()["rollbacks"] <= 4 + 1  # the halt restores a state as well
    decision = halted.value.decision
    assert isinstance(decision, Decision)
    assert decision.action is Action.HALT
    assert decision.mode is Mode.HALTED
    assert decision.restored_step == best["step"]
    assert run.held_out_loss() < loss + 0.1
    assert all(torch.isfinite(p).all() for p in run.model.parameters())
    with pytest.raises(TrainingHalted):
        run.step()
    run.supervisor.close()


def test_gradients_that_are_never_finite_again_halt_the_run() -> None:
    """Liveness: dropping every step for ever is no way to train."""
    run = Run(settings=Settings(probe_examples=128, probe_every=5, snapshot_every=10, rollback_budget=3))
    with FaultInjector().at(81).nan_gradient(steps=None).attach(run.model, run.optimizer):
        run.go(80)
        with pytest.raises(TrainingHalted):
            run.go(300)
    run.supervisor.close()


def test_a_halt_can_be_returned_instead_of_raised() -> None:
    settings = Settings(probe_examples=128, probe_every=5, snapshot_every=10, rollback_budget=2, on_halt="return")
    run = Run(settings=settings)
    run.go(60)
    decisions = run.go(60, after=nan_weight)
    first = next(i for i, d in enumerate(decisions) if d.action is Action.HALT)
    assert {d.action for d in decisions[first:]} == {Action.HALT}
    assert run.supervisor.statistics()["mode"] == "HALTED"
    run.supervisor.close()


def test_with_nothing_left_to_restore_the_run_halts_and_says_so() -> None:
    run = Run()
    run.go(60)
    run.supervisor.new_objective()  # the ring is empty now
    with pytest.raises(TrainingHalted, match="no state is left"):
        run.go(4, after=nan_weight)
    run.supervisor.close()


def test_interventions_are_raised_on_request_after_they_were_carried_out() -> None:
    settings = Settings(probe_examples=128, probe_every=5, snapshot_every=10, raise_on={"veto", "rollback"})
    run = Run(settings=settings)
    with FaultInjector().at(73).nan_gradient().attach(run.model, run.optimizer):
        run.go(72)
        before = run.weights()
        with pytest.raises(VetoIntervention, match="not finite") as veto:
            run.step()
    assert run.weights() == before
    assert isinstance(veto.value.decision, Decision)
    assert veto.value.decision.action is Action.VETO
    run.go(20)
    with pytest.raises(RollbackIntervention, match="not finite") as rollback:
        run.go(3, after=lambda r, t: nan_weight(r, t) if t == 94 else None)
    assert isinstance(rollback.value.decision, Decision)
    assert rollback.value.decision.rolled_back
    assert all(torch.isfinite(p).all() for p in run.model.parameters())
    run.go(5)
    run.supervisor.close()


# -- recovery ladders of one's own ------------------------------------------------------------------------------------


class Note(RecoveryAction):
    """A user's own action."""

    def __init__(self, book: list[Any]) -> None:
        self.book = book

    def apply(self, controls: Controls) -> None:
        self.book.append((controls.decision.restored_step, [type(o).__name__ for o in controls.optimizers]))

    def describe(self) -> str:
        return "Note()"


class Breaks(RecoveryAction):
    def apply(self, controls: Controls) -> None:
        raise ValueError("this one is broken")


def test_a_ladder_of_ones_own_is_climbed() -> None:
    book: list[Any] = []
    told: list[Decision] = []
    ladder = Recovery(rungs=((HoldLearningRate(), Note(book)),), on_halt=(Notify(told.append),))
    run = Run(
        settings=Settings(probe_examples=128, probe_every=5, snapshot_every=10, rollback_budget=2, recovery=ladder)
    )
    run.go(60)
    with pytest.raises(TrainingHalted):
        run.go(60, after=nan_weight)
    assert 1 <= len(book) <= 2
    assert book[0][1] == ["AdamW"]
    assert book[0][0] is not None
    assert [d.action for d in told] == [Action.HALT]
    run.supervisor.close()


class Around(Rollback):
    """A rollback of one's own: looks at the state right before and right after."""

    def __init__(self, book: list[Any]) -> None:
        self.book = book

    def apply(self, controls: Controls) -> None:
        broken = not all(bool(p.isfinite().all()) for p in controls.model.parameters())
        super().apply(controls)
        super().apply(controls)  # the second call does nothing
        mended = all(bool(p.isfinite().all()) for p in controls.model.parameters())
        assert controls.restored
        assert controls.decision.restored_step is not None
        self.book.append((broken, mended))


def test_veto_rollback_and_halt_can_be_subclassed() -> None:
    book: list[Any] = []
    dropped: list[str] = []

    class Gentle(Halt):
        def apply(self, controls: Controls) -> None:
            dropped.append("halted")
            super().apply(controls)

    class Noted(Veto):
        def apply(self, controls: Controls) -> None:
            dropped.append(controls.decision.reason)
            super().apply(controls)

    ladder = Recovery(rungs=((Around(book), HoldLearningRate()),), on_halt=(Around(book), Gentle()), on_veto=(Noted(),))
    run = Run(
        settings=Settings(probe_examples=128, probe_every=5, snapshot_every=10, rollback_budget=2, recovery=ladder)
    )
    run.go(60)
    weights = [p.detach().clone() for p in run.model.parameters()]
    decision = run.step(before=nan_gradient)
    assert decision.action is Action.VETO
    assert dropped == [f"Step {decision.step}: the proposed update is dropped; its gradient norm is nan."]
    assert all(torch.equal(p, w) for p, w in zip(run.model.parameters(), weights, strict=True))
    with pytest.raises(TrainingHalted):
        run.go(60, after=nan_weight)
    assert dropped[1:] == ["halted"]
    assert len(book) >= 2
    assert all(broken and mended for broken, mended in book)
    assert run.supervisor.statistics()["rollbacks"] == len(book), "the second call of restore() does nothing"
    run.supervisor.close()


class Lazy(Rollback):
    def apply(self, controls: Controls) -> None:
        """Forget to call the base class."""


class Blind(Veto):
    def apply(self, controls: Controls) -> None:
        raise ValueError("this veto is broken")


def test_a_rollback_that_restores_nothing_is_said_and_a_veto_is_always_carried_out(tmp_path: Path) -> None:
    book: list[Any] = []
    ladder = Recovery(rungs=((Lazy(), Note(book)),), on_veto=(Blind(),))
    settings = Settings(probe_examples=128, probe_every=5, snapshot_every=10, recovery=ladder)
    run = Run(settings=settings, run_dir=tmp_path)
    run.go(60)
    weights = [p.detach().clone() for p in run.model.parameters()]
    with pytest.warns(UserWarning, match="this veto is broken"):
        assert run.step(before=nan_gradient).action is Action.VETO
    assert all(torch.equal(p, w) for p, w in zip(run.model.parameters(), weights, strict=True))
    assert not any(decision.rolled_back for decision in run.go(4, after=nan_weight))
    run.supervisor.close()
    with JournalReader(tmp_path) as reader:
        texts = [row.data()["text"] for row in reader.rows("error")]
    assert any("Lazy() has not called restore()" in text for text in texts)
    assert not book, "nothing acts on a state that was not restored"


class Forgetful(Halt):
    def apply(self, controls: Controls) -> None:
        """Forget to call the base class."""


def test_a_halt_is_always_carried_out() -> None:
    ladder = Recovery(rungs=((HoldLearningRate(),),), on_halt=(Forgetful(),))
    run = Run(settings=Settings(probe_every=5, snapshot_every=10, rollback_budget=1, recovery=ladder))
    run.go(60)
    with pytest.raises(TrainingHalted):
        run.go(60, after=nan_weight)
    actuator = run.supervisor._loop.actuator
    assert actuator._limit._releasing, "limits are on their way out"
    run.supervisor.close()


def test_a_fault_in_a_veto_still_drops_the_update() -> None:
    run = Run(
        settings=Settings(probe_every=5, snapshot_every=10, strict=True, recovery=Recovery(((),), on_veto=(Blind(),)))
    )
    run.go(40)
    weights = run.weights()
    with pytest.raises(KalmanguardError, match="this veto is broken"):
        run.step(before=nan_gradient)
    assert run.weights() == weights
    run.optimizer.zero_grad()
    run.go(3)
    assert all(bool(torch.isfinite(p).all()) for p in run.model.parameters())
    run.supervisor.close()


def test_an_action_that_fails_does_not_stop_the_others() -> None:
    book: list[Any] = []
    ladder = Recovery(rungs=((Breaks(), Note(book)),))
    run = Run(settings=Settings(probe_examples=128, probe_every=5, snapshot_every=10, recovery=ladder))
    run.go(60)
    with pytest.warns(UserWarning, match="this one is broken"):
        ruin(run)
    assert len(book) == 1
    run.supervisor.close()


def test_after_a_rollback_the_learning_rate_is_held_and_given_back(runs: list[Run]) -> None:
    run = Run(settings=Settings(probe_examples=128, probe_every=5, snapshot_every=10, recovery_steps=10))
    runs.append(run)
    run.go(80)
    for group in run.optimizer.param_groups:
        group["lr"] = 4e-3
    factors: list[float] = []

    def note(r: Run, _: int) -> None:
        factors.append(r.supervisor._loop.tap.lr_factor)

    ruin(run)
    run.go(120, after=note)
    assert run.optimizer.param_groups[0]["lr"] == 4e-3  # the user's value was never seen changed
    assert factors[0] == pytest.approx(3e-3 / 4e-3)
    assert factors[-1] == 1.0
    assert factors == sorted(factors)


# -- by hand ----------------------------------------------------------------------------------------------------------


def test_a_rollback_twice_gives_the_same_state_bit_for_bit(runs: list[Run]) -> None:
    run = Run()
    runs.append(run)
    run.go(40)
    run.supervisor.snapshot()
    kept = run.weights()
    run.go(7)
    assert run.weights() != kept
    digests = []
    for _ in range(2):
        decision = run.supervisor.rollback(40)
        assert decision.action is Action.ROLLBACK
        assert decision.restored_step == 40
        assert "by hand" in decision.reason
        assert run.weights() == kept
        digests.append(run.state())
        run.go(3)
    assert digests[0] == digests[1]
    newest = run.supervisor.rollback()
    assert newest.restored_step == 40
    assert run.supervisor.statistics()["rollbacks"] == 3


def test_what_follows_a_rollback_is_what_followed_the_snapshot(runs: list[Run]) -> None:
    run = Run()
    runs.append(run)
    run.go(40)
    run.supervisor.snapshot()
    run.go(10)
    after = run.weights()
    run.supervisor.rollback(40)
    run.count = 40
    decisions = run.go(10)
    assert run.weights() == after
    # The way back is nobody's update: no sensor takes it for one.
    assert not any(e.fired for d in decisions for e in d.evidence)


def test_a_rollback_to_what_is_not_there_lists_what_is(runs: list[Run]) -> None:
    run = Run()
    runs.append(run)
    run.go(30)
    held = run.supervisor._loop.actuator.ring.steps()
    with pytest.raises(SnapshotError, match="no snapshot of step 12345") as caught:
        run.supervisor.rollback(12345)
    for step in held:
        assert str(step) in str(caught.value)
    fresh = Supervisor(nn.Linear(64, 10), held_out())
    with pytest.raises(SnapshotError, match="no certified state"):
        fresh.rollback()
    fresh.close()


def test_a_snapshot_by_hand_never_collides_with_those_of_the_cadence(runs: list[Run]) -> None:
    run = Run()
    runs.append(run)
    run.supervisor.snapshot()
    for _ in range(12):
        run.go(10)
        run.supervisor.snapshot()
        run.supervisor.snapshot()
    ledger = {s["step"] for s in run.supervisor.statistics()["snapshots"]}
    assert ledger == set(run.supervisor._loop.actuator.ring.steps())
    assert run.supervisor.statistics()["errors"] == 0


def test_a_snapshot_by_hand_works_in_observe_mode_too() -> None:
    run = Run(settings=Settings(mode="observe", probe_examples=128, probe_every=5, snapshot_every=10))
    for _ in range(6):
        run.go(20)
        run.supervisor.snapshot()
    kept = run.weights()
    run.go(3)
    run.supervisor.rollback(120)
    assert run.weights() == kept
    run.supervisor.close()


@pytest.mark.parametrize("every", [1, 2, 3])
def test_ring_and_ledger_agree_whatever_the_cadence(every: int, runs: list[Run]) -> None:
    """Also when the sensors are fitted to the budget in the fifth step, and the engine starts anew there."""
    run = Run(settings=Settings(snapshot_every=every, probe_every=5, budget=1e-3))
    runs.append(run)
    for _ in range(30):
        run.go(5)
        ledger = {s["step"] for s in run.supervisor.statistics()["snapshots"]}
        assert ledger == set(run.supervisor._loop.actuator.ring.steps())


def test_paused_steps_are_not_supervised(runs: list[Run]) -> None:
    reasons: list[str] = []
    run = Run(settings=Settings(probe_examples=128, probe_every=5, on_pause=reasons.append))
    runs.append(run)
    run.go(40)
    with run.supervisor.pause("a coffee"):
        before = run.supervisor.step
        run.go(5, before=lambda r, t: r.model[0].weight.grad.fill_(math.nan) if t == 99 else None)
        with torch.no_grad():
            for p in run.model.parameters():
                p.mul_(1.01)
        assert run.supervisor.step == before
    assert reasons == ["a coffee"]
    decisions = run.go(20)
    assert decisions[0].step == before + 1
    # What happened to the weights meanwhile is nobody's fault.
    assert not any(e.detector == "integrity" for d in decisions for e in d.evidence)


def test_a_pause_can_be_raised() -> None:
    run = Run(settings=Settings(raise_on={"pause"}))
    run.go(3)
    with pytest.raises(PauseIntervention, match="lunch"):
        run.supervisor.pause("lunch")
    run.supervisor.unpause()
    assert run.go(1)[0].step == 4
    run.supervisor.close()


class Average:
    """Weights averaged by the user."""

    def __init__(self, model: nn.Module) -> None:
        self.values = {k: v.detach().clone() for k, v in model.named_parameters()}

    def update(self, model: nn.Module) -> None:
        for name, value in model.named_parameters():
            self.values[name].lerp_(value.detach(), 0.1)

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.values)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, value in state.items():
            self.values[name].copy_(value)


def test_averaged_weights_go_back_with_the_rest(runs: list[Run]) -> None:
    run = Run()
    runs.append(run)
    average = Average(run.model)
    run.supervisor.register("ema", average)

    def follow(r: Run, _: int) -> None:
        average.update(r.model)

    run.go(40, after=follow)
    run.supervisor.snapshot()
    kept = {k: v.clone() for k, v in average.values.items()}
    run.go(10, after=follow)
    assert not all(torch.equal(kept[k], v) for k, v in average.values.items())
    run.supervisor.rollback(40)
    assert all(torch.equal(kept[k], v) for k, v in average.values.items())


def test_what_cannot_be_registered_is_refused(runs: list[Run]) -> None:
    run = Run()
    runs.append(run)
    with pytest.raises(ConfigurationError, match=r"register\('a'\): a list has neither state_dict"):
        run.supervisor.register("a", [])
    run.supervisor.register("a", Average(run.model))
    with pytest.raises(ConfigurationError, match="that name is taken"):
        run.supervisor.register("a", Average(run.model))
    run.go(1)
    with pytest.raises(ConfigurationError, match="before the first step"):
        run.supervisor.register("b", Average(run.model))


def test_a_new_objective_is_not_harm(runs: list[Run]) -> None:
    """The targets are permuted: on the old objective that is a catastrophe, on a new one it is a start."""
    run = Run()
    runs.append(run)
    run.go(150)
    run.supervisor.new_objective()
    relabel = torch.randperm(10, generator=torch.Generator().manual_seed(3))
    probe = run.supervisor._loop.probe
    probe._batches = [(x, relabel[y]) for x, y in probe._batches]
    plain = run.batch
    run.batch = lambda index: (plain(index)[0], relabel[plain(index)[1]])  # type: ignore[method-assign]
    decisions = run.go(150)
    assert decisions[0].level is Level.WARMUP
    assert {d.action for d in decisions} == {Action.ACCEPT}
    assert decisions[-1].level is Level.NOMINAL
    assert verify_now(run)["C1"].status in {"HOLDS", "LAPSED"}


def verify_now(run: Run) -> Any:
    return run.supervisor.certificate()


def test_reset_forgets_and_goes_on(runs: list[Run]) -> None:
    run = Run()
    runs.append(run)
    run.go(80)
    run.supervisor.reset()
    assert run.supervisor.statistics()["snapshots"] == []
    assert run.supervisor.statistics()["warm"] is False
    decisions = run.go(80)
    assert decisions[0].step == 81
    assert {d.action for d in decisions} == {Action.ACCEPT}
    assert run.supervisor.statistics()["warm"] is True
    ruin(run)


def test_emergency_saves_everything_there_is(tmp_path: Path) -> None:
    run = Run(run_dir=tmp_path / "run")
    run.go(40)
    path = run.supervisor.emergency()
    assert path == tmp_path / "run" / "emergency.json"
    told = json.loads(path.read_text())
    assert told["statistics"]["steps"] == 40
    assert told["parameters_finite"] is True
    store = run.supervisor._loop.actuator.store
    assert store is not None
    assert 40 in store.checkpoints().values()
    run.supervisor.close()
    bare = Run()
    bare.go(3)
    assert bare.supervisor.emergency() is None
    bare.supervisor.close()


def test_a_diagnosis_has_everything_and_is_json(runs: list[Run]) -> None:
    run = Run()
    runs.append(run)
    run.go(30)
    diagnosis = run.supervisor.diagnose()
    assert set(diagnosis) >= {"statistics", "last_decision", "settings", "engine", "optimizers", "environment"}
    json.dumps(diagnosis, default=str)
    assert diagnosis["first_error"] is None
    assert diagnosis["snapshot_bytes"] > 0
    nan_weight(run, 0)
    assert run.supervisor.diagnose()["parameters_finite"] is False


def test_the_report_is_plain_text_about_this_run(runs: list[Run]) -> None:
    run = Run()
    runs.append(run)
    with FaultInjector().at(71).nan_gradient().attach(run.model, run.optimizer):
        run.go(90)
    ruin(run)
    text = run.supervisor.report()
    assert f"{run.count} supervised" in text
    assert "1 step dropped" in text
    assert "1 rollback" in text
    assert "not finite" in text


def test_clipping_is_recommended_above_what_is_usual(runs: list[Run]) -> None:
    run = Run()
    runs.append(run)
    assert run.supervisor.recommended_clip_value() == math.inf
    assert not run.supervisor.should_clip_gradients()
    norms: list[float] = []

    def note(r: Run, _: int) -> None:
        grads = [p.grad for p in r.model.parameters() if p.grad is not None]
        norms.append(float(torch.nn.utils.get_total_norm(grads)))

    run.go(100, before=note)
    value = run.supervisor.recommended_clip_value()
    assert max(norms[-50:]) * 0.5 < value < 10 * max(norms[-50:])

    def blow(r: Run, _: int) -> None:
        for p in r.model.parameters():
            assert p.grad is not None
            p.grad.mul_(2.0 * value / norms[-1])

    run.step(before=blow)
    assert run.supervisor.should_clip_gradients()


def test_a_saved_supervisor_goes_on_where_it_was(runs: list[Run]) -> None:
    run = Run()
    runs.append(run)
    run.go(60)
    saved = json.loads(json.dumps(run.supervisor.state_dict()))
    other = Run()
    runs.append(other)
    other.model.load_state_dict(run.model.state_dict())
    other.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    other.count = run.count
    other.supervisor.load_state_dict(saved)
    assert other.supervisor.step == 60
    assert other.supervisor.statistics()["best_probe"] == run.supervisor.statistics()["best_probe"]
    decisions = other.go(40)
    assert decisions[0].step == 61
    assert decisions[0].level is Level.NOMINAL
    assert other.supervisor.statistics()["errors"] == 0
    # The ring starts empty and is filled again.
    ruin(other)


def test_a_saved_state_that_does_not_fit_is_refused(runs: list[Run]) -> None:
    run = Run()
    runs.append(run)
    run.go(5)
    saved = run.supervisor.state_dict()
    with pytest.raises(ConfigurationError, match="format 7; this version reads format 3"):
        run.supervisor.load_state_dict({**saved, "format": 7})
    with pytest.raises(ConfigurationError, match="another probe set"):
        run.supervisor.load_state_dict({**saved, "probe": "0" * 64})
    with pytest.raises(ConfigurationError, match="saved state"):
        run.supervisor.load_state_dict({**saved, "engine": "[]"})
    assert run.supervisor.step == 5
    assert statefile.load(saved["engine"]).ledger.probes > 0


# -- faults of the guard itself ---------------------------------------------------------------------------------------


class Flaky:
    """A user's loss that fails from some call on."""

    def __init__(self) -> None:
        self.broken = False

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        if self.broken:
            raise RuntimeError("the loss has gone")
        return F.cross_entropy(output, target, reduction="none")


def test_a_sensor_that_raises_never_stops_training_and_is_warned_about_once(runs: list[Run]) -> None:
    flaky = Flaky()
    run = Run(loss_fn=flaky)
    runs.append(run)
    run.go(40)
    flaky.broken = True
    with pytest.warns(UserWarning, match="the loss has gone") as caught:
        decisions = run.go(30)
    assert len(caught) == 1
    assert [d.step for d in decisions] == list(range(41, 71))
    unsupervised = [d for d in decisions if "was not supervised" in d.reason]
    assert unsupervised
    assert unsupervised[0].certificate == "LAPSED"
    assert run.supervisor.statistics()["errors"] >= 1
    assert "the loss has gone" in run.supervisor.diagnose()["first_error"]
    flaky.broken = False
    again = run.go(30)
    assert again[-1].level is Level.NOMINAL
    assert run.held_out_loss() < 1.5


class Unreliable(Average):
    """A registered object whose state cannot always be had."""

    broken = False

    def state_dict(self) -> dict[str, Tensor]:
        if self.broken:
            raise RuntimeError("not now")
        return super().state_dict()


def test_a_snapshot_that_failed_is_not_counted_on(runs: list[Run]) -> None:
    run = Run()
    runs.append(run)
    unreliable = Unreliable(run.model)
    run.supervisor.register("unreliable", unreliable)
    run.go(60)
    unreliable.broken = True
    with pytest.warns(UserWarning, match="not now") as caught:
        run.go(24)
    assert len(caught) == 1
    unreliable.broken = False
    ledger = {s["step"] for s in run.supervisor.statistics()["snapshots"]}
    assert ledger == set(run.supervisor._loop.actuator.ring.steps())
    decision = ruin(run)
    assert decision.restored_step is not None
    assert decision.restored_step <= 60


class Reluctant(Average):
    """A registered object that refuses to be restored, once."""

    refuses = False

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if self.refuses:
            self.refuses = False
            raise RuntimeError("not this time")
        super().load_state_dict(state)


def test_a_rollback_that_failed_is_tried_again(runs: list[Run]) -> None:
    run = Run()
    runs.append(run)
    reluctant = Reluctant(run.model)
    run.supervisor.register("reluctant", reluctant)
    run.go(60)
    reluctant.refuses = True
    with pytest.warns(UserWarning, match="not this time"):
        decisions = [run.step(after=nan_weight), *run.go(20)]
    assert any(d.rolled_back for d in decisions)
    assert all(torch.isfinite(p).all() for p in run.model.parameters())


def test_strict_supervision_raises_what_went_wrong() -> None:
    flaky = Flaky()
    run = Run(loss_fn=flaky, settings=Settings(probe_examples=128, probe_every=5, strict=True))
    run.go(40)
    flaky.broken = True
    with pytest.raises(KalmanguardError, match="the loss has gone") as caught:
        run.go(10)
    assert isinstance(caught.value.__cause__, RuntimeError)
    run.supervisor.close()


def test_a_first_probe_that_fails_does_not_stop_the_first_step() -> None:
    flaky = Flaky()
    run = Run(loss_fn=flaky)
    flaky.broken = True
    with pytest.warns(UserWarning, match="the loss has gone"):
        run.step()
    flaky.broken = False
    run.go(60)
    assert run.supervisor.statistics()["probes"] > 3
    run.supervisor.close()


def test_callbacks_are_called_and_may_fail() -> None:
    seen: list[Decision] = []
    rolled: list[Decision] = []
    settings = Settings(probe_examples=128, probe_every=5, on_decision=seen.append, on_rollback=rolled.append)
    run = Run(settings=settings)
    decisions = run.go(60)
    assert seen == decisions
    assert rolled == []
    decision = ruin(run)
    assert rolled == [decision]
    run.supervisor.close()

    def fail(_: Decision) -> None:
        raise OSError("nobody listens")

    broken = Run(settings=Settings(on_decision=fail))
    with pytest.warns(UserWarning, match="nobody listens") as caught:
        broken.go(5)
    assert len(caught) == 1
    broken.supervisor.close()
    strict = Run(settings=Settings(on_decision=fail, strict=True))
    with pytest.raises(KalmanguardError, match="nobody listens"):
        strict.step()
    strict.supervisor.close()


def fill_the_disk(run: Run) -> None:
    """From now on SQLite says what it says on a full disk."""
    connection = run.supervisor._loop.journal._connection
    assert connection is not None
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count={pages}")


def test_a_full_disk_does_not_stop_training_or_rollback(tmp_path: Path) -> None:
    run = Run(run_dir=tmp_path / "run")
    run.go(40)
    fill_the_disk(run)
    with pytest.warns(UserWarning, match="disk is full") as caught:
        run.go(60)
    assert len(caught) == 1
    ruin(run)
    run.go(5)
    run.supervisor.close()
    with JournalReader(tmp_path / "run") as reader:
        assert not reader.complete
        assert reader.check_chain() > 40
    report = verify(tmp_path / "run")
    assert "INCOMPLETE" in str(report)


def test_a_full_disk_is_an_error_under_strict(tmp_path: Path) -> None:
    run = Run(run_dir=tmp_path / "run", settings=Settings(probe_examples=128, probe_every=5, strict=True))
    run.go(40)
    fill_the_disk(run)
    with pytest.raises(JournalError, match="disk is full"):
        run.go(200)
    run.supervisor.close()


# -- the record of a run ----------------------------------------------------------------------------------------------


def test_a_run_with_everything_in_it_replays_and_verifies(tmp_path: Path) -> None:
    run = Run(run_dir=tmp_path / "run")
    with FaultInjector().at(61).nan_gradient().at(90).lr_spike(200).attach(run.model, run.optimizer):
        run.go(150)
    run.supervisor.snapshot()
    run.go(5)
    run.supervisor.rollback()
    run.supervisor.new_objective()
    run.go(60)
    run.supervisor.close()
    with JournalReader(tmp_path / "run") as reader:
        assert reader.complete
        actions = {d.action for _, d in reader.steps()}
        assert actions >= {Action.ACCEPT, Action.VETO}
    replayed = replay(tmp_path / "run")
    assert replayed.decisions > 200
    assert replayed.identical, str(replayed)
    report = verify(tmp_path / "run")
    assert report["C1"].status == "HOLDS"
    assert report["C2"].status == "HOLDS"
    assert not any(claim.status == "FAILED" for claim in report.claims)


def test_asking_for_the_certificate_changes_nothing(runs: list[Run]) -> None:
    """It restores the reference to bet on it, and puts the present state back bit for bit."""
    run, twin = Run(), Run()
    runs += [run, twin]
    run.go(80)
    twin.go(80)
    before = run.state(), torch.get_rng_state().tolist()
    report = run.supervisor.certificate()
    assert (run.state(), torch.get_rng_state().tolist()) == before
    assert {claim.name for claim in report.claims} >= {"C1", "C2", "C3", "C4", "C5", "C6"}
    assert run.supervisor.statistics()["fresh_examples_left"] == 0
    run.go(40)
    twin.go(40)
    assert run.weights() == twin.weights()
    fresh = [(x[64:], y[64:]) for x, y in held_out()]
    assert run.supervisor.certificate(fresh).claims
    run.supervisor.close()
    with pytest.raises(JournalError, match="before close"):
        run.supervisor.certificate()


def test_a_run_that_dies_of_an_exception_reads_incomplete(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Supervisor(nn.Linear(64, 10), held_out(), run_dir=tmp_path / "run"):
        _ = 1 / 0
    with JournalReader(tmp_path / "run") as reader:
        assert not reader.complete
    run = Run(run_dir=tmp_path / "other", settings=Settings(raise_on={"veto"}))
    with (
        pytest.raises(VetoIntervention),
        run.supervisor,
        FaultInjector().at(3).nan_gradient().attach(run.model, run.optimizer),
    ):
        run.go(5)
    with JournalReader(tmp_path / "other") as reader:
        assert reader.complete  # the user asked for that exception


def test_a_folder_that_holds_a_run_is_refused(tmp_path: Path) -> None:
    first = Run(run_dir=tmp_path / "run")
    first.go(3)
    first.supervisor.close()
    before = len(torch_hooks._global_optimizer_pre_hooks)
    held = (tmp_path / "run" / "journal.sqlite").read_bytes()
    with pytest.raises(JournalError, match=r"holds a run of \d+ records; pass resume"):
        Run(run_dir=tmp_path / "run")
    assert (tmp_path / "run" / "journal.sqlite").read_bytes() == held
    assert len(torch_hooks._global_optimizer_pre_hooks) == before


CHILD = """
import sys
sys.path.insert(0, {folder!r})
import torch
torch.set_num_threads(1)
from {module} import Run
from kalmanguard.settings import Settings
settings = Settings(probe_examples=128, probe_every=5, snapshot_every=10, checkpoint_share=0.5)
run = Run(run_dir={run_dir!r}, settings=settings)
while True:
    run.step()
    if run.count == 50:  # on a busy machine the thread that writes may be late
        run.supervisor._loop.actuator.store.flush()
    print(run.count, flush=True)
"""


@pytest.mark.parametrize("kill_at", [60, 97])
def test_a_killed_run_leaves_a_journal_that_verifies_and_a_checkpoint_that_resumes(
    kill_at: int, tmp_path: Path
) -> None:
    here = Path(__file__)
    code = CHILD.format(folder=str(here.parent), module=here.stem, run_dir=str(tmp_path / "run"))
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert child.stdout is not None
    for line in child.stdout:
        if int(line) >= kill_at:
            child.send_signal(signal.SIGKILL)
            break
    child.wait()
    child.stdout.close()
    with JournalReader(tmp_path / "run") as reader:
        assert not reader.complete
        assert reader.check_chain() == len(reader)
        assert reader.last.step > kill_at - BATCH
    report = verify(tmp_path / "run")
    assert "INCOMPLETE" in str(report)
    assert not any(claim.status == "FAILED" for claim in report.claims)
    assert replay(tmp_path / "run").identical

    torch.manual_seed(99)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    run = Run.__new__(Run)
    run.model, run.optimizer, run.losses = model, optimizer, []
    run.supervisor = Supervisor.resume(
        tmp_path / "run",
        model,
        held_out(),
        optimizer=optimizer,
        settings=Settings(probe_examples=128, probe_every=5, snapshot_every=10, checkpoint_share=0.5),
    )
    run.count = run.supervisor.step
    assert 0 < run.count <= kill_at + 1
    assert run.held_out_loss() < 2.2  # trained weights, not the new ones
    decisions = run.go(60)
    assert decisions[0].step == run.count - 59
    assert decisions[-1].level is Level.NOMINAL
    ruin(run)
    run.supervisor.close()
    with JournalReader(tmp_path / "run") as reader:
        assert reader.complete
    assert not any(claim.status == "FAILED" for claim in verify(tmp_path / "run").claims)
    assert replay(tmp_path / "run").identical


@pytest.mark.parametrize(("last_line", "complete"), [("pass", True), ("1 / 0", False)])
def test_a_program_that_ends_without_close_leaves_a_journal_that_says_how(
    last_line: str, complete: bool, tmp_path: Path
) -> None:
    here = Path(__file__)
    code = CHILD.format(folder=str(here.parent), module=here.stem, run_dir=str(tmp_path / "run"))
    code = code.replace("while True:", "for _ in range(40):") + last_line
    child = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert (child.returncode == 0) == complete
    assert ("ZeroDivisionError" in child.stderr) != complete
    with JournalReader(tmp_path / "run") as reader:
        assert reader.complete == complete
        assert reader.check_chain() > 40


def test_a_resumed_run_is_the_run_that_was_not_interrupted(tmp_path: Path) -> None:
    """Close after a checkpoint, resume in new objects: weights, moments and random streams continue bit for bit."""
    settings = Settings(probe_examples=128, probe_every=5, snapshot_every=10)
    whole = Run(settings=settings)
    whole.go(90)
    part = Run(settings=settings, run_dir=tmp_path / "run")
    part.go(60)
    part.supervisor.close()
    again = Run.__new__(Run)
    torch.manual_seed(5)
    again.model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    again.optimizer = torch.optim.AdamW(again.model.parameters(), lr=3e-3)
    again.losses = []
    again.supervisor = Supervisor.resume(
        tmp_path / "run", again.model, held_out(), optimizer=again.optimizer, settings=settings
    )
    again.count = again.supervisor.step
    again.go(90 - again.count)
    assert again.weights() == whole.weights()
    for run in (whole, again):
        run.supervisor.close()


def test_resuming_what_is_not_there_is_refused(tmp_path: Path) -> None:
    model = nn.Linear(64, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(JournalError, match="no journal"):
        Supervisor.resume(tmp_path / "nowhere", model, held_out(), optimizer=optimizer)
    assert not (tmp_path / "nowhere").exists()


# -- saving -----------------------------------------------------------------------------------------------------------


def test_a_model_is_saved_as_safetensors_or_in_its_own_way(tmp_path: Path, runs: list[Run]) -> None:
    from safetensors.torch import load_file

    run = Run()
    runs.append(run)
    run.go(3)
    folder = run.supervisor.save(tmp_path / "plain")
    loaded = load_file(folder / "model.safetensors")
    assert torch.equal(loaded["0.weight"], run.model[0].weight)  # type: ignore[index]

    class Pretrained(nn.Linear):
        def save_pretrained(self, folder: Path) -> None:
            (Path(folder) / "model.txt").write_text("weights")

    class Tokenizer:
        def save_pretrained(self, folder: Path) -> None:
            (Path(folder) / "tokenizer.txt").write_text("words")

    supervisor = Supervisor(Pretrained(64, 10), held_out())
    supervisor.register("tokenizer", Tokenizer())
    folder = supervisor.save(tmp_path / "own")
    assert sorted(p.name for p in folder.iterdir()) == ["model.txt", "tokenizer.txt"]
    supervisor.close()


def test_no_warning_and_no_thread_is_left_behind() -> None:
    import threading

    before = threading.active_count()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = Run()
        run.go(60)
        run.supervisor.close()
        del run
        gc.collect()
    assert threading.active_count() <= before


# -- bracing ----------------------------------------------------------------------------------------------------------


def spike(at: int, factor: float, *, steps: int = 1) -> Hook:
    """Multiply the learning rate for some steps, right before they are applied."""

    def hook(run: Run, step: int) -> None:
        if step == at:
            run.optimizer.param_groups[0]["lr"] *= factor
        if step == at + steps:
            run.optimizer.param_groups[0]["lr"] /= factor

    return hook


def test_a_learning_rate_spike_is_undone_without_a_step_lost(runs: list[Run], tmp_path: Path) -> None:
    """Step 87 lies between two snapshots; the state that comes back is the one that step 86 has left."""
    run = Run(run_dir=tmp_path / "run", settings=Settings(probe_examples=128, probe_every=20, snapshot_every=25))
    runs.append(run)
    run.go(86)
    before = run.weights()
    assert 86 not in run.supervisor._loop.actuator.ring.steps()
    decision = run.go(1, spike(87, 300.0))[0]
    assert (decision.action, decision.restored_step) == (Action.ROLLBACK, 86)
    assert run.weights() == before
    run.go(1)
    run.supervisor.close()
    with JournalReader(tmp_path / "run") as reader:
        last = list(reader.steps())[-1][0]
    assert (last.step, last.learning_rates) == (88, pytest.approx((0.9,)))
    assert last.lr_factor == pytest.approx(1 / 300)  # held at the rate of step 86, not at what the spike has set
    assert replay(tmp_path / "run").identical
    assert verify(tmp_path / "run").exit_code == 0


def test_bracing_changes_nothing_in_a_healthy_run(runs: list[Run], tmp_path: Path) -> None:
    """A larger gradient than any before is captured in front of, and then forgotten."""
    bare, run = Run(run_dir=None), Run(run_dir=tmp_path / "run")
    runs += [bare, run]
    ring = run.supervisor._loop.actuator.ring
    braced: list[int] = []

    def larger(run: Run, step: int) -> None:
        if step in (120, 155):
            for p in run.model.parameters():
                assert p.grad is not None
                p.grad.mul_(4.0)

    def see(run: Run, step: int) -> None:
        if run is not bare and ring.braced == step - 1:
            braced.append(step)

    bare.supervisor.close()
    for step in range(1, 201):
        x, y = bare.batch(step)
        F.cross_entropy(bare.model(x), y).backward()
        larger(bare, step)
        bare.optimizer.step()
        bare.optimizer.zero_grad()
    run.go(200, larger, see)
    assert {120, 155} <= set(braced)
    assert run.weights() == bare.weights()
    run.supervisor.close()
    with JournalReader(tmp_path / "run") as reader:
        assert [m.step for m, _ in reader.steps() if m.braced] == braced


@pytest.mark.parametrize("edited", [False, True])
def test_a_state_that_was_edited_is_not_braced(runs: list[Run], monkeypatch: pytest.MonkeyPatch, edited: bool) -> None:
    run = Run()
    runs.append(run)
    run.go(103)
    actuator, braced = run.supervisor._loop.actuator, []
    monkeypatch.setattr(actuator.ring, "brace", braced.append)

    def larger(run: Run, step: int) -> None:
        for p in run.model.parameters():
            assert p.grad is not None
            p.grad.mul_(4.0)

    if edited:
        with torch.no_grad():
            run.model[0].weight.mul_(1.01)
    x, y = run.batch(104)
    F.cross_entropy(run.model(x), y).backward()
    larger(run, 104)
    run.optimizer.step()
    assert braced == ([] if edited else [103])


def test_there_is_no_bracing_without_the_memory_for_it(runs: list[Run]) -> None:
    run = Run(settings=Settings(probe_examples=128, probe_every=5, snapshot_every=10, snapshot_bytes=150_000))
    runs.append(run)
    run.go(80)
    loop = run.supervisor._loop
    assert loop.state.ledger.capacity == 5
    assert not loop.actuator.braces
    assert loop.tap.brace_norm == loop.tap.brace_rate == math.inf


def test_a_braced_state_is_forgotten_when_the_run_is_rolled_back_by_hand(runs: list[Run]) -> None:
    """The state in front of the step was given up, so the next step does not start from it."""
    run = Run()
    runs.append(run)
    run.go(103)
    loop = run.supervisor._loop
    x, y = run.batch(104)
    F.cross_entropy(run.model(x), y).backward()
    for p in run.model.parameters():
        assert p.grad is not None
        p.grad.mul_(4.0)
    run.optimizer.step()
    assert loop.actuator.ring.braced == 103
    run.supervisor.rollback(loop.actuator.ring.steps()[-1])
    run.optimizer.zero_grad()
    decisions = run.go(20)
    assert loop.actuator.ring.braced is None
    assert {d.orders.adopt for d in decisions} == {False}
    assert run.supervisor.statistics()["errors"] == 0


def test_a_fused_optimizer_is_protected_without_reading_its_gradients_first(runs: list[Run]) -> None:
    """What an accelerator does, forced on the CPU: the flag skips the step, and the veto is told afterwards."""
    run = Run()
    runs.append(run)
    run.optimizer = torch.optim.AdamW(run.model.parameters(), lr=3e-3, fused=True)
    tap = run.supervisor._loop.tap
    tap._by_flag = True
    run.go(60)

    def poison(run: Run, step: int) -> None:
        first = next(run.model.parameters())
        assert first.grad is not None
        first.grad[0, 0] = math.nan

    before = run.weights()
    decision = run.go(1, poison)[0]
    assert (decision.action, decision.level) == (Action.VETO, Level.CONFIRMED)
    assert run.weights() == before
    assert {d.action for d in run.go(20)} == {Action.ACCEPT}
    assert run.weights() != before
    assert run.supervisor.statistics()["vetoes"] == 1


def test_a_braced_state_has_the_buffers_of_the_step_before(runs: list[Run], tmp_path: Path) -> None:
    """BatchNorm has seen the batch of step 87 when the state is captured; what comes back has not."""
    run = Run(run_dir=tmp_path / "run", settings=Settings(probe_examples=128, probe_every=20, snapshot_every=25))
    runs.append(run)
    run.supervisor.close()
    torch.manual_seed(0)
    run.model = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))
    run.optimizer = torch.optim.AdamW(run.model.parameters(), lr=3e-3)
    chosen = Settings(probe_examples=128, probe_every=20, snapshot_every=25)
    run.supervisor = Supervisor(run.model, held_out(), settings=chosen)
    run.go(86)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    x, y = run.batch(87)
    F.cross_entropy(run.model(x * 40.0), y).backward()
    run.optimizer.param_groups[0]["lr"] *= 1000.0
    seen = {name: value.clone() for name, value in run.model.named_buffers()}
    run.optimizer.step()
    assert all(torch.equal(seen[name], value) for name, value in run.model.named_buffers())
    run.count += 1
    decision = run.supervisor.update(30.0)
    assert (decision.action, decision.restored_step) == (Action.ROLLBACK, 86)
    after = run.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert after["1.num_batches_tracked"] == 86


@pytest.mark.parametrize("replaced", [False, True])
def test_there_is_no_bracing_when_the_buffers_of_the_step_before_are_not_known(replaced: bool) -> None:
    from kalmanguard.sensors.buffers import BufferMemory

    model = nn.Sequential(nn.BatchNorm1d(3))
    memory = BufferMemory(model)
    model(torch.randn(4, 3))
    with memory.as_remembered() as known:
        assert not known
    memory.remember()
    model(torch.randn(4, 3))
    mean = model[0].running_mean.clone()
    if replaced:
        model[0].running_mean = model[0].running_mean.clone()
    with memory.as_remembered() as known:
        assert known is not replaced
        assert torch.equal(model[0].running_mean, mean) is replaced
    assert torch.equal(model[0].running_mean, mean)


def test_a_braced_state_is_forgotten_over_a_pause(runs: list[Run]) -> None:
    run = Run()
    runs.append(run)
    run.go(103)
    loop = run.supervisor._loop
    loop.actuator.ring.braced = 103
    with run.supervisor.pause():
        for step in range(104, 110):
            x, y = run.batch(step)
            F.cross_entropy(run.model(x), y).backward()
            run.optimizer.step()
            run.optimizer.zero_grad()
    assert loop.actuator.ring.braced is None
    assert not run.go(1)[0].orders.adopt


def test_steps_of_another_model_are_no_part_of_this_ones(runs: list[Run]) -> None:
    run = Run()
    runs.append(run)
    run.go(5)
    other = torch.nn.Linear(2, 1)
    foreign = torch.optim.SGD(other.parameters(), lr=0.1)
    timings = run.supervisor._loop.timings

    def train_other() -> None:
        time.sleep(0.02)
        foreign.step()

    for _ in range(3):
        began = time.perf_counter()
        train_other()
        run.go(1)
        assert timings.steps_s[-1] <= time.perf_counter() - began - 0.02
    run.go(1, after=lambda run, step: train_other())
    assert timings.steps_s[-1] >= 0.02  # its own update lay before the other's, so nothing tells the two apart


def test_a_reset_begins_a_new_warm_up(runs: list[Run]) -> None:
    run = Run()
    runs.append(run)
    run.go(200)
    run.supervisor.reset()
    levels = [d.level for d in run.go(60)]
    warmup = run.supervisor.settings.warmup_steps
    assert set(levels[: warmup - 1]) == {Level.WARMUP}
