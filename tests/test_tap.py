"""The optimizer tap, integrity, and the sensors of one step together.

Oracles: a twin that never saw the vetoed step, torch's own gradient norm, and the state of the process before and
after. A veto is exact or it is none, so every tolerance is zero but that of norms (1e-6: sums in another order).
"""

from __future__ import annotations

import copy
import gc
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim import optimizer as torch_hooks
from torch.utils.checkpoint import checkpoint

from kalmanguard.errors import BindError
from kalmanguard.records import OVERWRITE
from kalmanguard.sensors.integrity import IntegritySensor
from kalmanguard.sensors.norm import total_norm
from kalmanguard.sensors.optimizer import OptimizerTap
from kalmanguard.sensors.suite import SensorSuite

MakeOptimizer = Callable[[list[nn.Parameter]], Optimizer]

OPTIMIZERS: dict[str, MakeOptimizer] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "SGD foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01, foreach=True),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "Adam foreach": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
    "Adam fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "AdamW amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True, weight_decay=0.1),
    "AdamW fused amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True, fused=True),
    "AdamW capturable rate": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01), weight_decay=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True, momentum=0.9, weight_decay=0.1),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, lr_decay=0.01, weight_decay=0.1),
    "Adagrad fused": lambda p: torch.optim.Adagrad(p, lr=0.1, fused=True),
    "Adadelta": torch.optim.Adadelta,
    "Adamax": torch.optim.Adamax,
    "NAdam": lambda p: torch.optim.NAdam(p, decoupled_weight_decay=True, weight_decay=0.1),
    "RAdam": torch.optim.RAdam,
    "Rprop": torch.optim.Rprop,
    "ASGD": lambda p: torch.optim.ASGD(p, t0=2),
    "Adafactor": torch.optim.Adafactor,
}


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


def gradients(model: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    model.zero_grad()
    model(torch.randn(6, 5)).square().mean().backward()


def state_of(model: nn.Module, optimizer: Optimizer) -> list[Any]:
    """Every bit of parameters and optimizer state, and the options."""
    found: list[Any] = [p.detach().numpy().tobytes() for p in model.parameters()]
    for group in optimizer.param_groups:
        found.append({k: float(v) if isinstance(v, Tensor) else v for k, v in group.items() if k != "params"})
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            found.append({k: v.numpy().tobytes() if isinstance(v, Tensor) else v for k, v in state.items()})
    return found


@pytest.fixture
def taps() -> Iterator[list[OptimizerTap]]:
    made: list[OptimizerTap] = []
    yield made
    for tap in made:
        tap.close()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_veto_is_exact(name: str, bad: float, taps: list[OptimizerTap]) -> None:
    model = network()
    twin = copy.deepcopy(model)
    parameters = list(model.parameters())
    optimizer, other = OPTIMIZERS[name](parameters), OPTIMIZERS[name](list(twin.parameters()))
    tap = OptimizerTap(parameters)
    taps.append(tap)
    for step in range(3):
        gradients(model, step)
        gradients(twin, step)
        optimizer.step()
        other.step()
        assert tap.veto is None
        tap.reset()
    before = state_of(model, optimizer)
    assert before == state_of(twin, other)
    gradients(model, 99)
    grads = [p.grad for p in parameters]
    assert grads[0] is not None
    grads[0][2, 3] = bad
    kept = [g.clone() for g in grads if g is not None]
    optimizer.step()
    assert tap.veto == "nonfinite"
    assert tap.steps == 1
    assert state_of(model, optimizer) == before
    for p, grad, value in zip(parameters, grads, kept, strict=True):
        assert p.grad is grad  # put back, the very same tensors
        torch.testing.assert_close(p.grad, value, rtol=0, atol=0, equal_nan=True)
    tap.reset()
    for step in range(3, 6):
        gradients(model, step)
        gradients(twin, step)
        optimizer.step()
        other.step()
        tap.reset()
    assert state_of(model, optimizer) == state_of(twin, other)


def test_observing_only_lets_everything_pass(taps: list[OptimizerTap]) -> None:
    model, twin = network(), network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tap = OptimizerTap(model.parameters(), protect=False)
    taps.append(tap)
    tap.gate, tap.clip = 1e-9, True
    gradients(model, 0)
    gradients(twin, 0)
    optimizer.step()
    assert tap.veto == "explosion"
    tap.close()
    torch.optim.SGD(twin.parameters(), lr=0.1).step()
    assert [p.tolist() for p in model.parameters()] == [p.tolist() for p in twin.parameters()]


def test_gradients_above_the_gate_are_dropped_or_clipped_to_it(taps: list[OptimizerTap]) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    tap = OptimizerTap(model.parameters())
    taps.append(tap)
    gradients(model, 0)
    norm = total_norm([p.grad for p in model.parameters() if p.grad is not None])
    before = [p.detach().clone() for p in model.parameters()]
    tap.gate = norm / 10
    optimizer.step()
    assert tap.veto == "explosion"
    assert tap.gradient_norm == pytest.approx(norm)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    tap.reset()
    tap.clip = True
    optimizer.step()
    assert tap.veto == "clipped"
    moved = math.sqrt(
        sum(float((p.detach() - b).square().sum()) for p, b in zip(model.parameters(), before, strict=True))
    )
    assert moved == pytest.approx(norm / 10, rel=1e-5)


def test_gradient_norm_and_rates_are_taken_without_being_passed(taps: list[OptimizerTap]) -> None:
    model = network()
    first, second = model[0].parameters(), model[2].parameters()
    optimizer = torch.optim.SGD([{"params": list(first), "lr": 0.3}, {"params": list(second)}], lr=0.1)
    tap = OptimizerTap(model.parameters())
    taps.append(tap)
    gradients(model, 0)
    expected = float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
    optimizer.step()
    assert tap.gradient_norm == pytest.approx(expected, rel=1e-6)
    assert tap.last_norm == pytest.approx(expected, rel=1e-6)
    assert tap.rates == (0.3, 0.1)
    assert tap.lr_factor == 1.0
    assert tap.optimizers == [optimizer]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64])
def test_the_norm_of_other_dtypes(dtype: torch.dtype) -> None:
    made = [torch.randn(50, 20).to(dtype), torch.randn(7).to(dtype)]
    wide = torch.complex128 if dtype.is_complex else torch.float64
    expected = math.sqrt(sum(float(g.to(wide).abs().square().sum()) for g in made))
    assert total_norm(made) == pytest.approx(expected, rel=1e-3 if dtype is torch.float16 else 1e-4)


def test_the_norm_of_large_half_precision_gradients_does_not_overflow() -> None:
    assert total_norm([torch.full((100,), 3e4, dtype=torch.float16)]) == pytest.approx(3e5, rel=1e-3)


@pytest.mark.parametrize("value", [3e30, 1e-30])
@pytest.mark.parametrize("size", [(7,), (300, 300)])
def test_the_norm_of_gradients_whose_squares_leave_the_range_is_finite(value: float, size: tuple[int, ...]) -> None:
    made = [torch.full(size, value), torch.full((3,), value)]
    expected = value * math.sqrt(math.prod(size) + 3)
    assert total_norm(made) == pytest.approx(expected, rel=1e-6, abs=0)
    assert total_norm([*made, torch.full((2, 2), math.inf)]) == math.inf
    assert math.isnan(total_norm([*made, torch.full((2, 2), math.nan)]))


def test_the_norm_of_tensors_of_several_layouts_and_dtypes() -> None:
    torch.manual_seed(0)
    dense, transposed = torch.randn(40, 30), torch.randn(300, 200).t()
    double, half = torch.randn(9, dtype=torch.float64), torch.randn(5).bfloat16()
    sparse = torch.sparse_coo_tensor(torch.tensor([[0, 2, 0]]), torch.randn(3, 4), (5, 4), check_invariants=True)
    for made in ([dense, transposed], [dense, double], [half, dense], [sparse, dense], [half], [sparse]):
        expected = math.sqrt(sum(float(t.to_dense().double().square().sum()) for t in made))
        assert total_norm(made) == pytest.approx(expected, rel=1e-6)


def test_sparse_gradients_are_seen_and_vetoed(taps: list[OptimizerTap]) -> None:
    embedding = nn.Embedding(10, 4, sparse=True)
    optimizer = torch.optim.SparseAdam(list(embedding.parameters()), lr=0.1)
    tap = OptimizerTap(embedding.parameters())
    taps.append(tap)
    for value in (1.0, math.nan):
        optimizer.zero_grad()
        (embedding(torch.tensor([1, 1, 3])).sum() * value).backward()
        before = embedding.weight.detach().clone()
        tap.reset()
        optimizer.step()
    assert tap.veto == "nonfinite"
    assert torch.equal(embedding.weight, before)
    tap.reset()
    optimizer.zero_grad()
    embedding(torch.tensor([1, 1, 3])).sum().backward()
    optimizer.step()
    assert tap.gradient_norm == pytest.approx(math.sqrt(4 * 4 + 4))


def test_a_sparse_gradient_above_the_gate_is_clipped(taps: list[OptimizerTap]) -> None:
    embedding = nn.Embedding(10, 4, sparse=True)
    optimizer = torch.optim.SGD(embedding.parameters(), lr=1.0)
    tap = OptimizerTap(embedding.parameters())
    taps.append(tap)
    tap.gate, tap.clip = 0.5, True
    before = embedding.weight.detach().clone()
    embedding(torch.tensor([1, 1, 3])).sum().backward()
    optimizer.step()
    assert tap.veto == "clipped"
    assert float((embedding.weight.detach() - before).norm()) == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.LBFGS])
def test_a_step_with_a_closure_is_dropped_when_its_gradients_are_shown(
    kind: type[Any], taps: list[OptimizerTap]
) -> None:
    """Momentum, step counters and the learning rate that recovery has cut are as after a step that was not taken."""

    class Halved:
        def before_step(self, optimizer: Any) -> None:
            optimizer.param_groups[0]["lr"] *= 0.5

        def after_step(self, optimizer: Any) -> None:
            optimizer.param_groups[0]["lr"] *= 2.0

    model = network()
    optimizer = kind(model.parameters(), lr=0.1)
    tap = OptimizerTap(model.parameters())
    taps.append(tap)
    tap.effects.append(Halved())
    x, factor = torch.randn(6, 5), 1.0

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = factor * model(x).square().mean()
        loss.backward()
        tap.gradients_ready(optimizer)
        return loss

    optimizer.step(closure)
    assert tap.veto is None
    assert tap.gradient_norm is not None
    assert tap.effective == (0.05,)
    before = [p.detach().clone() for p in model.parameters()]
    moments = copy.deepcopy(optimizer.state_dict()["state"])
    tap.reset()
    factor = math.inf
    optimizer.step(closure)
    assert tap.veto == "nonfinite"
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    if kind is torch.optim.AdamW:
        assert str(optimizer.state_dict()["state"]) == str(moments)
    assert all(p.grad is not None for p in model.parameters())


def test_gradients_shown_before_a_step_are_those_from_before_clipping(taps: list[OptimizerTap]) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tap = OptimizerTap(model.parameters())
    taps.append(tap)
    model(torch.randn(6, 5)).square().mean().backward()
    tap.gradients_ready(optimizer)
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3))
    optimizer.step()
    assert tap.gradient_norm == pytest.approx(norm, rel=1e-6)


@pytest.mark.parametrize("positional", [True, False])
def test_a_step_with_a_closure_is_watched_and_never_dropped(positional: bool, taps: list[OptimizerTap]) -> None:
    model = network()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    tap = OptimizerTap(model.parameters())
    taps.append(tap)
    x = torch.randn(6, 5)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model(x).square().mean()
        loss.backward()
        return loss

    before = float(closure().detach())
    tap.gate = 0.0  # a gradient of the step before must not decide
    optimizer.step(closure) if positional else optimizer.step(closure=closure)
    assert tap.veto is None
    assert tap.steps == 1
    assert tap.rates == (0.1,)
    assert float(closure().detach()) < before


def test_a_step_that_a_grad_scaler_skips_does_not_count(taps: list[OptimizerTap]) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tap = OptimizerTap(model.parameters())
    taps.append(tap)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = state_of(model, optimizer)
    for value, steps in ((math.inf, 0), (1.0, 1)):
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(4, 5)).sum() * value).backward()
        scaler.step(optimizer)
        scaler.update()
        assert tap.steps == steps
        assert (state_of(model, optimizer) == before) == (steps == 0)
    assert tap.veto is None
    optimizer.zero_grad()
    tap.reset()
    scaler.scale(model(torch.ones(4, 5)).sum()).backward()
    scaler.unscale_(optimizer)
    expected = float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
    scaler.step(optimizer)
    assert tap.gradient_norm == pytest.approx(expected, rel=1e-6)


def test_a_fused_optimizer_under_a_grad_scaler_is_judged_by_the_unscaled_gradient(taps: list[OptimizerTap]) -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    tap = OptimizerTap(model.parameters())
    taps.append(tap)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x = torch.ones(4, 5)
    scaler.scale(model(x).sum()).backward()
    expected = total_norm([p.grad for p in model.parameters() if p.grad is not None]) / 1024
    scaler.step(optimizer)
    scaler.update()
    assert tap.gradient_norm == pytest.approx(expected, rel=1e-5)
    assert tap.veto is None
    before = state_of(model, optimizer)
    optimizer.zero_grad()
    tap.reset()
    scaler.scale(model(x).sum() * math.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert state_of(model, optimizer) == before
    assert scaler.get_scale() == 512.0
    for p in model.parameters():
        assert p.grad is not None


def test_gradient_checkpointing_fires_hooks_twice_and_counts_once(taps: list[OptimizerTap]) -> None:
    model, twin = network(), network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tap = OptimizerTap(model.parameters())
    taps.append(tap)
    x = torch.randn(6, 5)
    checkpoint(model, x, use_reentrant=False).square().mean().backward()
    twin(x).square().mean().backward()
    optimizer.step()
    assert tap.steps == 1
    assert tap.gradient_norm == pytest.approx(
        total_norm([p.grad for p in twin.parameters() if p.grad is not None]), rel=1e-6
    )


def test_two_optimizers_form_one_step_and_are_vetoed_apart(taps: list[OptimizerTap]) -> None:
    """A GAN: what is wrong with the discriminator's gradient does not cost the generator its step."""
    pair = nn.ModuleDict({"generator": network(0), "discriminator": network(1)})
    generator = torch.optim.Adam(pair["generator"].parameters(), lr=0.1)
    discriminator = torch.optim.SGD(pair["discriminator"].parameters(), lr=0.2, momentum=0.9)
    tap = OptimizerTap(pair.parameters())
    taps.append(tap)
    for part in pair.values():
        gradients(part, 0)
    norms = [total_norm([p.grad for p in part.parameters() if p.grad is not None]) for part in pair.values()]
    discriminator.step()
    generator.step()
    assert tap.steps == 2
    assert tap.rates == (0.2, 0.1)
    assert tap.gradient_norm == pytest.approx(math.hypot(*map(float, norms)), rel=1e-6)
    assert tap.optimizers == [discriminator, generator]
    tap.reset()
    for part in pair.values():
        gradients(part, 1)
    bad = next(pair["discriminator"].parameters())
    assert bad.grad is not None
    bad.grad[0, 0] = math.nan
    before = state_of(pair["discriminator"], discriminator), state_of(pair["generator"], generator)
    discriminator.step()
    generator.step()
    assert tap.veto == "nonfinite"
    assert state_of(pair["discriminator"], discriminator) == before[0]
    assert state_of(pair["generator"], generator) != before[1]
    assert tap.gradient_norm is not None
    assert math.isnan(tap.gradient_norm)


def test_foreign_optimizers_are_not_touched(taps: list[OptimizerTap]) -> None:
    model, other = network(0), network(1)
    tap = OptimizerTap(model.parameters())
    taps.append(tap)
    tap.gate = 0.0
    foreign = torch.optim.SGD(other.parameters(), lr=0.1)
    gradients(other, 0)
    before = [p.detach().clone() for p in other.parameters()]
    foreign.step()
    assert tap.steps == 0
    assert tap.optimizers == []
    assert not any(torch.equal(p, b) for p, b in zip(other.parameters(), before, strict=True))
    with pytest.raises(BindError, match="holds none of the model's parameters"):
        OptimizerTap(model.parameters(), [foreign])


def test_binding_finds_the_one_that_exists_or_says_what_to_do(taps: list[OptimizerTap]) -> None:
    model = network()
    tap = OptimizerTap(model.parameters())
    taps.append(tap)
    with pytest.raises(BindError, match="pass optimizer="):
        tap.bind()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tap.bind()
    assert tap.optimizers == [optimizer]


def counts() -> tuple[int, int]:
    return (
        len(torch_hooks._global_optimizer_pre_hooks),
        len(torch_hooks._global_optimizer_post_hooks),
    )


def test_hooks_are_removed_on_close_and_when_the_tap_is_forgotten() -> None:
    gc.collect()  # what other tests have forgotten goes now, and not in between
    before = counts()
    model = network()
    tap = OptimizerTap(model.parameters())
    assert counts() == (before[0] + 1, before[1] + 1)
    tap.close()
    tap.close()
    assert counts() == before
    tap = OptimizerTap(model.parameters())
    del tap
    gc.collect()
    assert counts() == before


def test_a_tap_that_dies_in_the_middle_of_a_step_does_not_break_that_step() -> None:
    """The garbage collector may find it there, while torch iterates over the very hooks that are to be removed."""
    gc.collect()
    before = counts()
    model, other = network(), network()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    forgotten = [OptimizerTap(model.parameters())]
    handles = [torch_hooks.register_optimizer_step_pre_hook(lambda *_: forgotten.clear())]
    handles.append(torch_hooks.register_optimizer_step_pre_hook(lambda *_: None))
    gradients(other, 0)
    optimizer.step()
    assert not forgotten
    assert counts() == (before[0] + 3, before[1] + 1)
    for handle in handles:
        handle.remove()
    OptimizerTap(model.parameters()).close()
    assert counts() == before


def test_hooks_of_others_are_left_alone() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    called: list[str] = []
    mine = optimizer.register_step_pre_hook(lambda *_: called.append("own"))
    everyone = torch_hooks.register_optimizer_step_pre_hook(lambda *_: called.append("global"))
    tap = OptimizerTap(model.parameters())
    tap.close()
    gradients(model, 0)
    optimizer.step()
    assert called == ["global", "own"]
    mine.remove()
    everyone.remove()


def test_a_paused_tap_sees_and_drops_nothing(taps: list[OptimizerTap]) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tap = OptimizerTap(model.parameters())
    taps.append(tap)
    tap.paused, tap.gate = True, 0.0
    before = [p.detach().clone() for p in model.parameters()]
    gradients(model, 0)
    optimizer.step()
    assert tap.steps == 0
    assert not any(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


# -- integrity --------------------------------------------------------------------------------------------------------


class Bench:
    """A network, AdamW and an integrity sensor, stepped as the suite does it."""

    def __init__(self, *, make: MakeOptimizer = OPTIMIZERS["AdamW amsgrad"]) -> None:
        self.model = network()
        self.parameters = list(self.model.parameters())
        self.optimizer = make(self.parameters)
        self.sensor = IntegritySensor(self.parameters)
        self.count = 0

    def step(self) -> tuple[str, ...]:
        self.count += 1
        gradients(self.model, self.count)
        found = self.sensor.check()
        self.optimizer.step()
        self.sensor.remember([self.optimizer])
        return found

    def run(self, steps: int) -> list[tuple[str, ...]]:
        return [self.step() for _ in range(steps)]


@pytest.mark.parametrize("name", [*OPTIMIZERS])
def test_ordinary_training_is_never_tampered_with(name: str) -> None:
    assert set(Bench(make=OPTIMIZERS[name]).run(40)) == {()}


def test_reading_saving_and_evaluating_is_no_tampering() -> None:
    bench = Bench()
    bench.run(3)
    for _ in range(20):
        copy.deepcopy(bench.model.state_dict())
        copy.deepcopy(bench.optimizer.state_dict())
        with torch.no_grad():
            bench.model(torch.randn(2, 5))
        bench.optimizer.zero_grad()
        assert bench.step() == ()


def test_an_edit_of_parameters_is_seen_at_the_next_step() -> None:
    bench = Bench()
    for which in range(4):
        bench.run(2)
        with torch.no_grad():
            bench.parameters[which].mul_(1.5)
        assert "parameters" in bench.step()
        assert bench.step() == ()


def test_a_silent_bit_is_seen_in_one_interval_of_the_cycle() -> None:
    bench, seen = Bench(), 0
    bench.run(4)
    assert bench.sensor.cycle_steps == 8 * 4
    for _ in range(bench.sensor.cycle_steps):
        bench.step()
        # Through memory that torch does not watch, and back again.
        bits = bench.parameters[2].detach().numpy().reshape(-1).view(np.int32)
        bits[5] ^= 1
        found = bench.sensor.check()
        assert found in {(), ("silent parameters",)}
        seen += bool(found)
        bits[5] ^= 1
        assert bench.sensor.check() == ()
    assert seen == 1


@pytest.mark.parametrize("edit", ["zeroed", "cleared", "replaced", "loaded"])
@pytest.mark.parametrize("steps", [14, 15])
def test_moments_that_are_reset_or_zeroed_are_seen_at_the_next_step(edit: str, steps: int) -> None:
    bench = Bench()
    bench.run(steps)
    saved = copy.deepcopy(bench.optimizer.state_dict())
    if edit == "zeroed":
        for state in bench.optimizer.state.values():
            state["exp_avg_sq"].zero_()
    elif edit == "cleared":
        bench.optimizer.state.clear()
    elif edit == "replaced":
        for state in bench.optimizer.state.values():
            state["exp_avg_sq"] = torch.zeros_like(state["exp_avg_sq"])
    else:
        bench.optimizer.load_state_dict(saved)
    found = bench.step()
    assert "moments" in found
    assert bench.step() == ()


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_second_moments_that_make_no_sense_are_seen_while_they_last(value: float) -> None:
    bench = Bench()
    bench.run(14)
    with torch.no_grad():
        # Poisoned without a trace: through memory that torch does not watch.
        for state in bench.optimizer.state.values():
            state["exp_avg_sq"].numpy().fill(value)
    assert any("moments" in found for found in bench.run(8))


def test_what_is_known_is_forgotten() -> None:
    bench = Bench()
    bench.run(6)
    with torch.no_grad():
        for p in bench.parameters:
            p.zero_()
    bench.optimizer.state.clear()
    bench.sensor.forget()
    assert bench.step() == ()


def test_a_model_without_trainable_parameters_is_no_error() -> None:
    sensor = IntegritySensor([])
    for _ in range(4):
        sensor.remember([])
        assert sensor.check() == ()


# -- all of one step --------------------------------------------------------------------------------------------------


class Suited:
    """A network, an optimizer, a tap and the suite, wired as the supervisor does it."""

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self.model, self.optimizer, self.count = model, optimizer, 0
        self.tap = OptimizerTap(model.parameters(), before_step=self.before_step)
        self.suite = SensorSuite(model, self.tap, size=16, seed=0)

    def before_step(self) -> None:
        self.suite.before_step()

    def step(self, loss: float | None = None) -> Any:
        self.count += 1
        gradients(self.model, self.count)
        self.optimizer.step()
        return self.suite.measure(self.count, loss, costs=None, objective=0)


def test_a_measurement_holds_what_happened_in_the_step(taps: list[OptimizerTap]) -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    flight = Suited(model, torch.optim.SGD(model.parameters(), lr=0.1))
    taps.append(flight.tap)
    first = flight.step(2.5)
    assert (first.step, first.loss, first.learning_rates, first.lr_factor) == (1, 2.5, (0.1,), 1.0)
    assert first.velocity is None
    before = torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()])
    second = flight.step(None)
    after = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    assert second.loss is None
    assert second.gradient_norm is not None
    assert second.gradient_norm > 0
    assert second.velocity is not None
    assert second.velocity.shape == (16,)
    # 16 buckets keep the norm of the update to about a third.
    assert 0.4 < float(np.linalg.norm(second.velocity)) / float((after - before).norm()) < 1.8
    buffers = [b for b in model.buffers() if b.is_floating_point()]
    assert second.buffer_norm == pytest.approx(math.sqrt(sum(float(b.square().sum()) for b in buffers)), rel=1e-6)
    assert 0 < second.rounding_floor < 1e-5
    assert second.parameters_finite
    assert second.tampered == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_updates_too_small_to_be_seen_lie_below_the_rounding_floor(
    dtype: torch.dtype, taps: list[OptimizerTap]
) -> None:
    """What the difference of two sketches shows of an update that rounds away is noise, and said to be."""
    torch.manual_seed(0)
    model = nn.Linear(256, 512, bias=False).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    flight = Suited(model, optimizer)
    taps.append(flight.tap)
    measured = None
    for step in range(2):
        model.weight.grad = torch.full_like(model.weight, 1e-11)
        optimizer.step()
        measured = flight.suite.measure(step + 1, None, costs=None, objective=0)
    assert measured is not None
    assert measured.velocity is not None
    assert float(np.linalg.norm(measured.velocity)) <= measured.rounding_floor


def test_a_velocity_is_not_measured_over_a_break(taps: list[OptimizerTap]) -> None:
    model = network()
    flight = Suited(model, torch.optim.SGD(model.parameters(), lr=0.1))
    taps.append(flight.tap)
    flight.step()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(100.0)
    flight.suite.interrupt()
    measured = flight.step()
    assert measured.tampered == ()
    assert measured.velocity is not None
    assert measured.gradient_norm is not None
    # The step of plain gradient descent, without the jump of a hundred per weight.
    ratio = float(np.linalg.norm(measured.velocity)) / (0.1 * measured.gradient_norm)
    assert 0.4 < ratio < 1.8


def test_a_parameter_that_is_not_finite_is_a_status_and_no_velocity(taps: list[OptimizerTap]) -> None:
    model = network()
    flight = Suited(model, torch.optim.SGD(model.parameters(), lr=0.1))
    taps.append(flight.tap)
    flight.step()
    with torch.no_grad():
        next(model.parameters())[0, 0] = math.nan
    model.zero_grad()
    flight.optimizer.step()
    flight.tap.steps = 1
    measured = flight.suite.measure(2, None, costs=None, objective=0)
    assert not measured.parameters_finite
    assert measured.velocity is None


@pytest.mark.parametrize(("factor", "seen"), [(-30.0, True), (-3.0, False)])
def test_weights_that_are_overwritten_in_a_step_are_seen(taps: list[OptimizerTap], factor: float, seen: bool) -> None:
    model = network()
    flight = Suited(model, torch.optim.SGD(model.parameters(), lr=0.1))
    taps.append(flight.tap)
    flight.step()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(factor)
    measured = flight.step()
    assert (OVERWRITE in measured.tampered) == seen
    assert "parameters" in measured.tampered


def test_frozen_parameters_are_neither_sketched_nor_watched(taps: list[OptimizerTap]) -> None:
    model = network()
    for p in model[0].parameters():
        p.requires_grad_(False)
    flight = Suited(model, torch.optim.SGD(model[2].parameters(), lr=0.1))
    taps.append(flight.tap)
    flight.step()
    with torch.no_grad():
        model[0].weight.add_(1.0)
    measured = flight.step()
    assert measured.tampered == ()
    assert measured.velocity is not None
    assert float(np.linalg.norm(measured.velocity)) < 1.0


def test_nothing_is_warned_about() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = network()
        flight = Suited(model, torch.optim.AdamW(model.parameters(), lr=0.1))
        for _ in range(3):
            flight.step(1.0)
        flight.tap.close()


# -- skipping by a flag on the device ---------------------------------------------------------------------------------

FUSED: dict[str, MakeOptimizer] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "Adam amsgrad": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True, fused=True),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, fused=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, fused=True),
}


@pytest.mark.parametrize("name", FUSED)
def test_a_fused_optimizer_skips_by_a_flag_and_is_otherwise_left_alone(name: str, taps: list[OptimizerTap]) -> None:
    model, twin = network(), network()
    optimizer, plain = FUSED[name](model.parameters()), FUSED[name](twin.parameters())
    tap = OptimizerTap(model.parameters(), by_flag=True)
    taps.append(tap)
    for seed, gate, spoil in (
        (0, math.inf, 1.0),
        (1, math.inf, 1.0),
        (2, math.inf, math.nan),
        (3, 1e-3, 1.0),
        (4, 1e9, 1),
    ):
        tap.reset()
        tap.gate = gate
        gradients(model, seed)
        gradients(twin, seed)
        before = state_of(model, optimizer)
        given = [p.grad for p in model.parameters()]
        given[0].mul_(spoil)  # type: ignore[union-attr]
        norm = total_norm([g for g in given if g is not None])
        optimizer.step()
        assert not hasattr(optimizer, "found_inf")
        skipped = not norm <= gate or math.isnan(norm)
        # A first step that makes buffers must write them, so it is read before; Adagrad has them from the start.
        assert len(tap._unread) == (seed > 0 or name == "Adagrad")
        if skipped:
            assert state_of(model, optimizer) == before
        else:
            plain.step()
            assert state_of(model, optimizer) == state_of(twin, plain)
        assert all(p.grad is g for p, g in zip(model.parameters(), given, strict=True))
        assert tap.veto is None
        tap.read()
        assert tap.veto == ("nonfinite" if math.isnan(norm) else "explosion" if skipped else None)
        assert tap.gradient_norm == pytest.approx(norm, rel=1e-6, nan_ok=True)
        assert tap.steps == 1


def test_a_gradient_is_scaled_down_on_its_device(taps: list[OptimizerTap]) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=1e-30, fused=True)
    tap = OptimizerTap(model.parameters(), by_flag=True)
    taps.append(tap)
    gradients(model, 0)
    optimizer.step()
    tap.reset()
    tap.clip, tap.gate = True, 0.05
    gradients(model, 1)
    norm = total_norm([p.grad for p in model.parameters() if p.grad is not None])
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    moved = total_norm([p.detach() - b for p, b in zip(model.parameters(), before, strict=True)])
    assert norm > 0.1
    assert moved == pytest.approx(0.05, rel=1e-4)
    tap.read()
    assert (tap.veto, tap.gradient_norm) == ("clipped", pytest.approx(norm, rel=1e-6))


@pytest.mark.parametrize("by_flag", [False, True])
@pytest.mark.parametrize(
    ("told", "gate", "clip", "verdict", "moved"),
    [
        (3.0, math.inf, False, None, 0.01),  # measured as it was, applied as it is
        (3.0, 2.0, False, "explosion", 0.0),
        (3.0, 2.0, True, "clipped", 0.01),  # it is below the gate as it is, so nothing is left to scale
        (3.0, 0.005, True, "clipped", 0.005),
        (math.inf, math.inf, False, "nonfinite", 0.0),
        (math.nan, math.inf, False, "nonfinite", 0.0),
        (0.001, math.inf, False, None, 0.01),  # it has grown since: then it is what it is
    ],
)
def test_a_clipped_gradient_is_judged_by_what_it_was(
    told: float, gate: float, clip: bool, verdict: str | None, moved: float, by_flag: bool, taps: list[OptimizerTap]
) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=1e-30, fused=True)
    tap = OptimizerTap(model.parameters(), by_flag=by_flag)
    taps.append(tap)
    gradients(model, 0)
    optimizer.step()
    tap.reset()
    gradients(model, 1)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    before = [p.detach().clone() for p in model.parameters()]
    tap.gate, tap.clip, tap.clipped_from = gate, clip, torch.tensor(told)
    optimizer.step()
    tap.read()
    assert tap.veto == verdict
    assert tap.gradient_norm == pytest.approx(max(told, 0.01), rel=1e-4, nan_ok=True)
    after = total_norm([p.detach() - b for p, b in zip(model.parameters(), before, strict=True)])
    assert after == pytest.approx(moved, rel=1e-3)
    # It was said of that one step.
    tap.reset()
    tap.gate = math.inf
    optimizer.step()
    tap.read()
    assert tap.gradient_norm == pytest.approx(min(0.01, gate) if clip else 0.01, rel=1e-3)


class Acting:
    active = True

    def before_step(self, optimizer: Optimizer) -> None: ...

    def after_step(self, optimizer: Optimizer) -> None: ...


@pytest.mark.parametrize("why", ["on_veto", "effect", "observe", "not fused", "scaler"])
def test_the_gradient_is_read_before_the_step_where_a_flag_will_not_do(why: str, taps: list[OptimizerTap]) -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=why != "not fused")
    on_veto = (lambda drop: drop()) if why == "on_veto" else None
    tap = OptimizerTap(model.parameters(), protect=why != "observe", on_veto=on_veto, by_flag=True)
    taps.append(tap)
    if why == "effect":
        tap.effects.append(Acting())
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, enabled=why == "scaler")
    for _ in range(2):
        tap.reset()
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(4, 5)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert tap._unread == []
        assert tap.gradient_norm is not None


def test_a_flag_is_taken_away_when_the_step_fails(taps: list[OptimizerTap]) -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    tap = OptimizerTap(model.parameters(), by_flag=True)
    taps.append(tap)
    gradients(model, 0)
    optimizer.step()
    gradients(model, 1)
    optimizer.param_groups[0]["betas"] = None  # the step raises after its pre-hooks
    with pytest.raises(TypeError):
        optimizer.step()
    assert hasattr(optimizer, "found_inf")
    optimizer.param_groups[0]["betas"] = (0.9, 0.999)
    tap.reset()
    optimizer.step()
    assert not hasattr(optimizer, "found_inf")
    tap.read()
    assert tap.veto is None


def test_a_flag_does_not_outlive_the_tap() -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    tap = OptimizerTap(model.parameters(), by_flag=True)
    gradients(model, 0)
    optimizer.step()
    gradients(model, 1)
    optimizer.param_groups[0]["betas"] = None
    with pytest.raises(TypeError):
        optimizer.step()
    optimizer.param_groups[0]["betas"] = (0.9, 0.999)
    tap.close()
    assert not hasattr(optimizer, "found_inf")


def test_an_optimizer_that_is_no_longer_fused_is_not_flagged(taps: list[OptimizerTap]) -> None:
    """Loading the state of a plain AdamW switches ``fused`` off in the groups only."""
    model = network()
    plain = torch.optim.AdamW(model.parameters(), lr=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for each in (plain, optimizer):
        gradients(model, 0)
        each.step()
    optimizer.load_state_dict(plain.state_dict())
    tap = OptimizerTap(model.parameters(), by_flag=True)
    taps.append(tap)
    gradients(model, 1)
    optimizer.step()
    assert tap._unread == []
    assert tap.steps == 1


def test_the_rates_of_the_step_before_are_kept_per_optimizer(taps: list[OptimizerTap]) -> None:
    pair = nn.ModuleDict({"a": network(0), "b": network(1)})
    a = torch.optim.SGD(pair["a"].parameters(), lr=1e-3)
    b = torch.optim.SGD(pair["b"].parameters(), lr=5e-2)
    tap = OptimizerTap(pair.parameters(), [a, b])
    taps.append(tap)
    for optimizer in (b, a):
        optimizer.step()
    tap.reset()
    assert tap.last_rates == {id(a): (1e-3,), id(b): (5e-2,)}
