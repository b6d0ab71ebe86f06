"""Recovery actions on live optimizers: what each does, for how long, and that it is taken off again exactly.

Oracles: closed forms of the optimizers' own steps (gradient descent moves by the learning rate times the gradient),
and a twin without the action. Learning rates that are put back are compared exactly.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from kalmanguard.actuators.actions import (
    ClipGradients,
    Controls,
    ElasticAnchor,
    Halt,
    HoldLearningRate,
    Notify,
    PerturbWeights,
    Recovery,
    RecoveryAction,
    ResetMoments,
    Rollback,
    SaveCheckpoint,
    ScaleLearningRate,
)
from kalmanguard.actuators.effects import LearningRateLimit
from kalmanguard.errors import ConfigurationError
from kalmanguard.records import Action, Decision, Level, Mode
from kalmanguard.sensors.optimizer import OptimizerTap

DECISION = Decision(
    7, Action.ROLLBACK, Action.ROLLBACK, Level.CONFIRMED, Mode.RECOVERING, "for a test", restored_step=3
)


class Workshop:
    """One weight vector whose gradient is all ones, an optimizer, and a tap with the one limit in force."""

    def __init__(self, make: Any = None, **changes: Any) -> None:
        self.weight = nn.Parameter(torch.zeros(4))
        self.model = nn.Module()
        self.model.weight = self.weight
        self.optimizer = torch.optim.SGD([self.weight], lr=1.0) if make is None else make([self.weight])
        self.tap = OptimizerTap([self.weight], [self.optimizer])
        self.limit = LearningRateLimit()
        self.tap.effects.append(self.limit)
        self.saved: list[str] = []
        options: dict[str, Any] = {
            "model": self.model,
            "optimizers": (self.optimizer,),
            "decision": DECISION,
            "restored_rates": ((0.25,),),
            "clip_value": math.inf,
            "hold_steps": 3,
            "learning_rate": self.limit,
            "tap": self.tap,
            "checkpoint": self.checkpoint,
        }
        self.controls = Controls(**{**options, **changes})

    def checkpoint(self) -> Path | None:
        self.saved.append("saved")
        return None

    def step(self, gradient: float = 1.0) -> float:
        """Take one step with equal gradients; the mean distance that it moved downhill."""
        before = self.weight.detach().clone()
        self.weight.grad = torch.full((4,), gradient)
        self.optimizer.step()
        return float((before - self.weight.detach()).mean())

    @property
    def rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])


@pytest.fixture
def shop() -> Iterator[Workshop]:
    made = Workshop()
    yield made
    made.tap.close()


# -- learning rates ---------------------------------------------------------------------------------------------------


def test_a_held_rate_is_never_above_the_restored_one(shop: Workshop) -> None:
    HoldLearningRate().apply(shop.controls)
    assert shop.step() == 0.25
    assert shop.rate == 1.0  # the user's own value is never seen changed
    shop.optimizer.param_groups[0]["lr"] = 0.125
    assert shop.step() == 0.125
    shop.optimizer.param_groups[0]["lr"] = 10.0
    assert shop.step() == 0.25
    assert shop.rate == 10.0


def test_a_scaled_rate_warms_up_again_over_twenty_steps(shop: Workshop) -> None:
    ScaleLearningRate(0.5).apply(shop.controls)
    assert [shop.step() for _ in range(3)] == [0.5] * 3
    assert shop.tap.lr_factor == 0.5
    shop.limit.release()
    moved = [shop.step() for _ in range(25)]
    assert moved == pytest.approx([0.5 ** (left / 20) for left in range(20, 0, -1)] + [1.0] * 5)
    assert not shop.limit.active
    assert shop.rate == 1.0


def test_scales_multiply_and_a_hold_is_on_top(shop: Workshop) -> None:
    ScaleLearningRate(0.5).apply(shop.controls)
    ScaleLearningRate(0.5).apply(shop.controls)
    assert shop.step() == 0.25
    HoldLearningRate().apply(shop.controls)
    shop.optimizer.param_groups[0]["lr"] = 4.0
    assert shop.step() == 0.25
    shop.limit.release()
    # The whole way back, cap included: from 1/16 of the user's rate.
    assert shop.step() == pytest.approx(0.25)
    assert shop.step() == pytest.approx(4.0 * (1 / 16) ** (19 / 20))


def test_a_new_cut_during_the_way_back_starts_from_where_it_was(shop: Workshop) -> None:
    ScaleLearningRate(0.5).apply(shop.controls)
    shop.step()
    shop.limit.release()
    for _ in range(10):
        shop.step()
    ScaleLearningRate(0.5).apply(shop.controls)
    assert shop.step() == pytest.approx(0.5 * 0.5 ** (10 / 20))
    shop.limit.release()
    for _ in range(20):
        shop.step()
    assert shop.step() == 1.0


def test_a_release_of_nothing_is_nothing(shop: Workshop) -> None:
    shop.limit.release()
    assert not shop.limit.active
    ScaleLearningRate(0.5).apply(shop.controls)
    shop.limit.release()  # before any step was taken at the lower rate
    assert shop.step() == 1.0


@pytest.mark.parametrize("make", [lambda o: lr_scheduler.LambdaLR(o, lambda t: 1.0 / (1 + t)), lr_scheduler.StepLR])
def test_schedulers_neither_undo_nor_compound_a_limit(shop: Workshop, make: Any) -> None:
    twin = Workshop()
    schedulers = [
        make(s.optimizer) if make is not lr_scheduler.StepLR else make(s.optimizer, step_size=2, gamma=0.5)
        for s in (shop, twin)
    ]
    ScaleLearningRate(0.25).apply(shop.controls)
    for _ in range(12):
        assert shop.step() == pytest.approx(0.25 * twin.step())
        for scheduler in schedulers:
            scheduler.step()
        assert shop.rate == twin.rate
    assert schedulers[0].get_last_lr() == schedulers[1].get_last_lr()
    twin.tap.close()


def test_a_cycle_of_momentum_and_a_plateau_see_the_users_rate() -> None:
    shop, twin = (Workshop(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)) for _ in range(2))
    cycles = [lr_scheduler.OneCycleLR(s.optimizer, max_lr=1.0, total_steps=20) for s in (shop, twin)]
    ScaleLearningRate(0.1).apply(shop.controls)
    for _ in range(15):
        shop.step()
        twin.step()
        for cycle in cycles:
            cycle.step()
        assert shop.optimizer.param_groups[0]["lr"] == twin.optimizer.param_groups[0]["lr"]
    for s in (shop, twin):
        s.tap.close()


def test_a_rate_that_is_a_tensor_is_kept_and_put_back() -> None:
    """A capturable or compiled optimizer reads its rate from a tensor: that very tensor must hold the user's value."""
    rate = torch.tensor(1.0)
    shop = Workshop(lambda p: torch.optim.SGD(p, lr=rate))
    ScaleLearningRate(0.5).apply(shop.controls)
    assert [shop.step() for _ in range(4)] == [0.5] * 4
    assert shop.optimizer.param_groups[0]["lr"] is rate
    assert float(rate) == 1.0
    shop.limit.release()
    for _ in range(20):
        shop.step()
    assert shop.step() == 1.0
    shop.tap.close()


def test_two_optimizers_are_limited_and_released_each_on_its_own() -> None:
    shop = Workshop()
    weight = nn.Parameter(torch.zeros(4))
    other = torch.optim.SGD([weight], lr=0.01)
    tap = OptimizerTap([shop.weight, weight], [shop.optimizer, other])
    shop.tap.close()
    tap.effects.append(shop.limit)
    HoldLearningRate().apply(
        Workshop(
            optimizers=(shop.optimizer, other), restored_rates=((0.25,), (0.01,)), learning_rate=shop.limit, tap=tap
        ).controls
    )

    def both() -> tuple[float, float]:
        first = shop.step()
        before = weight.detach().clone()
        weight.grad = torch.ones(4)
        other.step()
        return first, float((before - weight.detach()).mean())

    assert both() == pytest.approx((0.25, 0.01))
    shop.limit.release()
    moved = [both() for _ in range(21)]
    assert [m[0] for m in moved] == pytest.approx([0.25 ** (left / 20) for left in range(20, -1, -1)])
    assert [m[1] for m in moved] == pytest.approx([0.01] * 21)
    assert not shop.limit.active
    tap.close()


def test_param_groups_are_held_each_at_its_own_rate() -> None:
    first, second = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([{"params": [first], "lr": 1.0}, {"params": [second], "lr": 0.5}])
    limit = LearningRateLimit()
    limit.hold(optimizer, (0.1, 10.0))
    limit.before_step(optimizer)
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.5]
    limit.after_step(optimizer)
    assert [g["lr"] for g in optimizer.param_groups] == [1.0, 0.5]


def test_a_zero_rate_stays_zero(shop: Workshop) -> None:
    shop.optimizer.param_groups[0]["lr"] = 0.0
    ScaleLearningRate(0.5).apply(shop.controls)
    HoldLearningRate().apply(shop.controls)
    assert shop.step() == 0.0
    shop.limit.release()
    assert shop.rate == 0.0


# -- gradients, weights, moments --------------------------------------------------------------------------------------


def test_gradients_are_clipped_for_as_long_as_the_recovery_lasts() -> None:
    shop = Workshop(clip_value=1.0)
    ClipGradients().apply(shop.controls)
    moved = [shop.step(100.0) for _ in range(5)]
    assert moved[:3] == pytest.approx([0.5] * 3, rel=1e-4)  # four equal gradients of total norm 1
    assert moved[3:] == [100.0] * 2
    assert Workshop(clip_value=1.0).step(0.1) == pytest.approx(0.1)
    shop.tap.close()


def test_without_a_known_value_nothing_is_clipped(shop: Workshop) -> None:
    ClipGradients().apply(shop.controls)
    assert shop.tap.effects == [shop.limit]


def test_weights_are_perturbed_relative_to_their_size_from_a_stream_of_their_own() -> None:
    model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40))
    with torch.no_grad():
        model[1].weight.mul_(100.0)
    model[0].bias.requires_grad_(False)
    before = copy.deepcopy(model)
    state = torch.get_rng_state()
    shop = Workshop(model=model)
    PerturbWeights(0.01).apply(shop.controls)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model[0].bias, before[0].bias)
    for layer, old in ((model[0], before[0]), (model[1], before[1])):
        moved = (layer.weight - old.weight).detach().square().mean().sqrt()
        assert float(moved / old.weight.detach().square().mean().sqrt()) == pytest.approx(0.01, rel=0.1)
    shop.tap.close()


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
        lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
        lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.5, centered=True),
        lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.5),
        lambda p: torch.optim.Adagrad(p, lr=0.1, fused=True),
        torch.optim.Adadelta,
        torch.optim.Adamax,
        torch.optim.NAdam,
        torch.optim.RAdam,
        torch.optim.Rprop,
        torch.optim.ASGD,
        torch.optim.Adafactor,
    ],
)
def test_reset_moments_are_those_of_a_new_optimizer(make: Any) -> None:
    """Whatever the optimizer, the steps after a reset are those of one that was made at that moment."""
    shop = Workshop(make)
    for gradient in (1.0, 3.0, -2.0):
        shop.step(gradient)
    ResetMoments().apply(shop.controls)
    fresh = Workshop(make)
    with torch.no_grad():
        fresh.weight.copy_(shop.weight)
    for gradient in (1.0, -0.5, 2.0):
        shop.step(gradient)
        fresh.step(gradient)
    assert torch.equal(shop.weight, fresh.weight)
    shop.tap.close()
    fresh.tap.close()


def test_an_anchor_pulls_back_and_lets_go() -> None:
    shop = Workshop(lambda p: torch.optim.SGD(p, lr=0.1))
    with torch.no_grad():
        shop.weight.fill_(1.0)
    ElasticAnchor(2.0).apply(shop.controls)
    with torch.no_grad():
        shop.weight.fill_(3.0)
    # g = 2 (theta - theta*), with no gradient of its own
    assert shop.step(0.0) == pytest.approx(0.1 * 2.0 * (3.0 - 1.0))
    for _ in range(2):
        shop.step(0.0)
    assert shop.step(0.0) == 0.0
    shop.tap.close()


def test_an_anchor_weighs_by_the_second_moments() -> None:
    shop = Workshop(lambda p: torch.optim.Adam(p, lr=0.1))
    for _ in range(3):
        shop.step()
    shop.optimizer.state[shop.weight]["exp_avg_sq"].copy_(torch.tensor([3.0, 1.0, 0.0, 0.0]))
    ElasticAnchor(1.0).apply(shop.controls)
    anchor = shop.tap.effects[-1]
    with torch.no_grad():
        shop.weight.add_(1.0)
    shop.weight.grad = torch.zeros(4)
    anchor.before_step(shop.optimizer)
    assert isinstance(shop.weight.grad, Tensor)
    assert shop.weight.grad.tolist() == pytest.approx([3.0, 1.0, 0.0, 0.0])
    shop.tap.close()


def test_a_checkpoint_is_asked_for_and_someone_is_told(shop: Workshop) -> None:
    SaveCheckpoint().apply(shop.controls)
    assert shop.saved == ["saved"]
    told: list[Decision] = []
    Notify(told.append).apply(shop.controls)
    assert told == [DECISION]


# -- the ladder -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["conservative", "balanced", "aggressive"])
def test_presets_have_three_rungs_that_cut_harder_and_harder(name: str) -> None:
    ladder = Recovery.preset(name)
    assert len(ladder.rungs) == 3
    factors = [next((a.factor for a in rung if isinstance(a, ScaleLearningRate)), 1.0) for rung in ladder.rungs]
    assert factors[0] > factors[1] > factors[2]
    assert any(isinstance(a, ResetMoments) for a in ladder.rungs[2])
    assert ladder.actions(17) == ladder.rungs[-1]
    described = ladder.describe()
    assert described["rungs"][0] == ["Rollback()", "HoldLearningRate()"]  # type: ignore[index]
    assert described["on_halt"] == ["Rollback()", "SaveCheckpoint()", "Halt()"]
    assert described["on_veto"] == ["Veto()"]


def test_a_rung_of_ones_own_describes_itself() -> None:
    class Beep(RecoveryAction):
        def __init__(self, times: int) -> None:
            self.times = times

        def apply(self, controls: Controls) -> None:
            raise NotImplementedError

    ladder = Recovery(rungs=((Beep(3), ScaleLearningRate(0.5)),), on_halt=(Notify(print),))
    assert ladder.describe() == {
        "rungs": [["Rollback()", "Beep(times=3)", "ScaleLearningRate(factor=0.5)"]],
        "on_halt": ["Rollback()", "Notify()", "Halt()"],
        "on_veto": ["Veto()"],
    }
    with pytest.raises(TypeError, match="abstract"):
        RecoveryAction()  # type: ignore[abstract]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ScaleLearningRate(0.0), r"factor = 0\.0 must lie in \(0, 1\]"),
        (lambda: ScaleLearningRate(1.5), r"factor = 1\.5 must lie in \(0, 1\]"),
        (lambda: ScaleLearningRate(math.nan), "factor = nan"),
        (lambda: PerturbWeights(0.0), r"scale = 0\.0 must be positive"),
        (lambda: ElasticAnchor(-1.0), r"strength = -1\.0 must be positive"),
        (lambda: Notify("me"), "send = 'me' must be a function"),  # type: ignore[arg-type]
        (lambda: Recovery(rungs=()), "at least one rung"),
        (lambda: Recovery(rungs=((HoldLearningRate(), Rollback()),)), r"rung 0 has Rollback\(\) at the wrong place"),
        (lambda: Recovery(rungs=((),), on_halt=(Rollback(), Rollback())), r"on_halt has Rollback\(\) at the wrong"),
        (lambda: Recovery(rungs=((Halt(),),)), r"rung 0 has Halt\(\) at the wrong place"),
        (lambda: Recovery(rungs=((),), on_halt=(Halt(), SaveCheckpoint())), r"on_halt has Halt\(\) at the wrong place"),
        (lambda: Recovery(rungs=((),), on_veto=(Rollback(),)), r"on_veto has Rollback\(\) at the wrong place"),
    ],
)
def test_bad_arguments_are_refused_with_the_bound(make: Any, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        make()


def test_a_cut_that_lasts_is_what_every_later_release_goes_back_to() -> None:
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    limit = LearningRateLimit()

    def rates(steps: int) -> list[float]:
        seen = []
        for _ in range(steps):
            limit.before_step(optimizer)
            seen.append(optimizer.param_groups[0]["lr"])
            limit.after_step(optimizer)
            assert optimizer.param_groups[0]["lr"] == 1.0
        return seen

    limit.scale(0.3)
    assert rates(3) == [0.3] * 3
    limit.release()
    assert rates(30)[-1] == 1.0
    limit.scale(0.1)
    assert rates(2) == [0.1] * 2
    limit.release(lasting=True)  # 0.1 has worked, 1 had not
    assert rates(30) == pytest.approx([0.1] * 30)
    limit.hold(optimizer, (0.02,))
    assert rates(2) == [0.02] * 2
    limit.release()
    ramp = rates(30)
    assert ramp == sorted(ramp)
    assert ramp[-1] == pytest.approx(0.1)
    assert limit.ceiling == pytest.approx(0.1)
