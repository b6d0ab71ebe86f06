"""The fault injector: each fault does what it says at its step, and nothing else changes, bit for bit.

The oracle is the same run without faults: equal parameters before the fault, equal again where a fault is said to leave
no trace, and exact ratios where it says "times factor".
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import optimizer as optim_module

from kalmanguard.errors import ConfigurationError
from kalmanguard.faults import CATALOGUE, DataFault, FaultInjector, GarbageBatch, LabelNoise, parse_fault
from kalmanguard.faults.state import flip_bit
from kalmanguard.models import CNNPlant, MLPPlant, Plant

AT = 7
STEPS = 12


def parameters(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


def moments(optimizer: torch.optim.Optimizer, key: str) -> list[Tensor]:
    return [state[key].clone() for state in optimizer.state.values()]


def train(
    plant: Plant,
    steps: int = STEPS,
    *,
    batches: Any = None,
    before_step: Callable[[int], None] = lambda step: None,
    after_step: Callable[[int], None] = lambda step: None,
) -> list[Tensor]:
    """Train plainly; returns the parameters after each step."""
    torch.manual_seed(42)  # dropout's stream
    path = []
    source = iter(plant.loader if batches is None else batches)
    for step in range(1, steps + 1):
        plant.step_loss(next(source)).backward()
        before_step(step)
        plant.optimizer.step()
        plant.optimizer.zero_grad()
        if plant.scheduler is not None:
            plant.scheduler.step()
        path.append(parameters(plant.model))
        after_step(step)
    return path


def faulted(
    injector: FaultInjector, make: Callable[..., Plant] = MLPPlant, steps: int = STEPS, **options: Any
) -> tuple[Plant, list[Tensor]]:
    plant = make(seed=0, **options)
    with injector.attach(plant.model, plant.optimizer):
        return plant, train(plant, steps, batches=injector.batches(plant.loader))


def first_difference(one: list[Tensor], other: list[Tensor]) -> int | None:
    """The first step after which the parameters are not bitwise equal, nan being equal to nan."""
    for step, (a, b) in enumerate(zip(one, other, strict=True), start=1):
        if not torch.equal(a.view(torch.int32), b.view(torch.int32)):
            return step
    return None


def hooks(plant: Plant) -> list[int]:
    """How many hooks of every sort there are."""
    own = [plant.model._forward_pre_hooks, plant.optimizer._optimizer_step_pre_hooks]
    own += [plant.optimizer._optimizer_step_post_hooks]
    own += [optim_module._global_optimizer_pre_hooks, optim_module._global_optimizer_post_hooks]
    for p in plant.model.parameters():
        own += [p._backward_hooks or {}, p._post_accumulate_grad_hooks or {}]
    return [len(each) for each in own]


EVERY_FAULT: dict[str, Callable[[FaultInjector], FaultInjector]] = {
    "nan_gradient": lambda i: i.nan_gradient(),
    "inf_gradient": lambda i: i.inf_gradient(),
    "gradient_scale": lambda i: i.gradient_scale(1000),
    "lr_spike": lambda i: i.lr_spike(50),
    "lr_creep": lambda i: i.lr_creep(),
    "garbage_batch": lambda i: i.garbage_batch(),
    "label_noise": lambda i: i.label_noise(0.3),
    "bit_flip": lambda i: i.bit_flip(),
    "moments_zeroed": lambda i: i.moments_zeroed(),
    "moments_reset": lambda i: i.moments_reset(),
    "weight_scale": lambda i: i.weight_scale(1.5),
    "batchnorm_poison": lambda i: i.batchnorm_poison(100),
}


@pytest.mark.parametrize("kind", EVERY_FAULT)
def test_every_fault_acts_at_its_step_and_leaves_the_steps_before_untouched(kind: str) -> None:
    reference = CNNPlant(seed=0)
    unhooked = hooks(reference)
    clean = train(reference)
    injector = EVERY_FAULT[kind](FaultInjector(seed=1).at(AT))
    plant, path = faulted(injector, CNNPlant)
    # Poisoned statistics are not used in training: there the parameters never differ.
    assert first_difference(clean, path) == (None if kind == "batchnorm_poison" else AT)
    assert injector.log[0].step == AT
    assert {record.kind for record in injector.log} == {kind}
    assert f"step {AT}: {kind}" in injector.describe()
    assert hooks(plant) == unhooked


@pytest.mark.parametrize("kind", EVERY_FAULT)
def test_a_faulty_run_repeats_bit_for_bit(kind: str) -> None:
    injector = EVERY_FAULT[kind](FaultInjector(seed=1).at(AT))
    _, first = faulted(injector, CNNPlant)
    log = injector.log
    _, second = faulted(injector, CNNPlant)  # one injector, attached twice
    assert first_difference(first, second) is None
    assert repr(injector.log) == repr(log)  # repr, because nan is not equal to itself


def test_the_seed_decides_what_is_drawn_and_other_faults_do_not() -> None:
    def flipped(injector: FaultInjector) -> Any:
        faulted(injector)
        return next(record.details for record in injector.log if record.kind == "bit_flip")

    one = flipped(FaultInjector(seed=1).at(AT).bit_flip(bit=3))
    assert flipped(FaultInjector(seed=1).at(AT).bit_flip(bit=3).at(AT).garbage_batch()) == one
    assert flipped(FaultInjector(seed=2).at(AT).bit_flip(bit=3)) != one


def test_an_empty_injector_changes_nothing() -> None:
    _, path = faulted(FaultInjector(), CNNPlant)
    assert first_difference(train(CNNPlant(seed=0)), path) is None
    assert FaultInjector().describe() == "no faults"


def test_faults_leave_the_global_generator_where_the_clean_run_leaves_it() -> None:
    train(CNNPlant(seed=0))
    clean = torch.get_rng_state()
    injector = FaultInjector(seed=1)
    for add in EVERY_FAULT.values():
        add(injector.at(AT))
    faulted(injector, CNNPlant)
    assert torch.equal(torch.get_rng_state(), clean)


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "value"), [("nan_gradient", math.nan), ("inf_gradient", math.inf)])
def test_gradients_are_faulty_when_backward_returns(kind: str, value: float) -> None:
    plant = MLPPlant(seed=0)
    seen = {}

    def look(step: int) -> None:
        seen[step] = torch.cat([p.grad.flatten().clone() for p in plant.model.parameters() if p.grad is not None])

    injector = EVERY_FAULT[kind](FaultInjector().at(3))
    with injector.attach(plant.model, plant.optimizer):
        train(plant, 3, before_step=look)
    assert bool(torch.isfinite(torch.cat([seen[1], seen[2]])).all())
    assert torch.equal(seen[3].nan_to_num(1.0, 2.0), torch.full_like(seen[3], value).nan_to_num(1.0, 2.0))
    assert injector.log[0].details == {"parameters": 6, "discarded": False}


def test_match_picks_parameters_by_name() -> None:
    plant = MLPPlant(seed=0)
    injector = FaultInjector().at(1).nan_gradient(match=r"layers\.2\.")
    with injector.attach(plant.model, plant.optimizer):
        plant.step_loss(next(plant.loader)).backward()
    bad = [name for name, p in plant.model.named_parameters() if not bool(torch.isfinite(p.grad).all())]
    assert bad == ["layers.2.weight", "layers.2.bias"]


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("through_batches", [True, False])
def test_gradient_scale_multiplies_the_accumulated_gradient_once(parts: int, through_batches: bool) -> None:
    def gradients(injector: FaultInjector | None) -> list[Tensor]:
        plant = MLPPlant(seed=0, optimizer="sgd", lr=1e-9)  # next to no movement, so that steps stay comparable
        seen = []
        if injector is not None:
            injector.attach(plant.model, plant.optimizer)
        source = iter(injector.batches(plant.loader) if injector is not None and through_batches else plant.loader)
        for _ in range(4):
            for _ in range(parts):
                (plant.step_loss(next(source)) / parts).backward()
            seen.append(torch.cat([p.grad.flatten() for p in plant.model.parameters()]))
            plant.optimizer.step()
            plant.optimizer.zero_grad()
        if injector is not None:
            injector.detach()
        return seen

    clean = gradients(None)
    injector = FaultInjector().at(2).gradient_scale(1000, steps=2)
    bad = gradients(injector)
    assert torch.equal(bad[0], clean[0])
    for step, factor in ((1, 1000), (2, 1000), (3, 1)):  # rounding: 1000 (a + b) is 1000 a + 1000 b only nearly
        assert float((bad[step] - factor * clean[step]).norm()) < 1e-5 * factor * float(clean[step].norm())
    assert [record.step for record in injector.log] == [2, 3]


def test_nan_gradients_reach_the_users_own_clipping() -> None:
    plant = MLPPlant(seed=0)
    norms = []

    def clip(step: int) -> None:
        norms.append(float(nn.utils.clip_grad_norm_(plant.model.parameters(), 1.0)))

    with FaultInjector().at(2).nan_gradient(match="layers.0.bias").attach(plant.model, plant.optimizer):
        train(plant, 2, before_step=clip)
    assert math.isfinite(norms[0])
    assert math.isnan(norms[1])


def test_autograd_grad_on_the_side_does_not_use_the_fault_up() -> None:
    plant = MLPPlant(seed=0)
    injector = FaultInjector().at(1).nan_gradient()
    with injector.attach(plant.model, plant.optimizer):
        loss = plant.step_loss(next(plant.loader))
        torch.autograd.grad(loss, list(plant.model.parameters()), retain_graph=True)
        loss.backward()
        assert all(bool(p.grad.isnan().all()) for p in plant.model.parameters())


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("zero_first", [True, False])
def test_a_step_that_a_gradient_scaler_skips_is_tried_again_without_the_fault(
    set_to_none: bool, zero_first: bool
) -> None:
    plant = MLPPlant(seed=0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    injector = FaultInjector().at(3).inf_gradient()
    moved = []
    with injector.attach(plant.model, plant.optimizer):
        for batch in injector.batches(next(plant.loader) for _ in range(6)):
            before = parameters(plant.model)
            loss = plant.step_loss(batch)
            if zero_first:
                plant.optimizer.zero_grad(set_to_none=set_to_none)
            scaler.scale(loss).backward()
            scaler.step(plant.optimizer)
            scaler.update()
            if not zero_first:
                plant.optimizer.zero_grad(set_to_none=set_to_none)
            moved.append(not torch.equal(before, parameters(plant.model)))
    assert moved == [True, True, False, True, True, True]
    assert [(record.step, record.details["discarded"]) for record in injector.log] == [(3, True)]
    assert bool(torch.isfinite(parameters(plant.model)).all())


def test_a_vetoed_step_still_counts() -> None:
    plant = MLPPlant(seed=0)

    def veto(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        for p in plant.model.parameters():
            if p.grad is not None and not bool(torch.isfinite(p.grad).all()):
                p.grad = None

    handle = optim_module.register_optimizer_step_pre_hook(veto)  # before the injector: it must not matter
    injector = FaultInjector().at(3).nan_gradient().at(4).weight_scale(2.0)
    try:
        with injector.attach(plant.model, plant.optimizer):
            path = train(plant, 4)
    finally:
        handle.remove()
    assert torch.equal(path[1], path[2])
    assert [(record.step, record.kind) for record in injector.log] == [(3, "nan_gradient"), (4, "weight_scale")]


def test_gradients_made_by_hand_are_corrupted_at_the_optimizer() -> None:
    parameter = nn.Parameter(torch.ones(3))
    model = nn.ParameterList([parameter])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    injector = FaultInjector().at(2).gradient_scale(10)
    with injector.attach(model, optimizer):
        for _ in range(3):
            parameter.grad = torch.full((3,), 0.5)
            optimizer.step()
    assert parameter.tolist() == [1 - 0.5 - 5.0 - 0.5] * 3


def test_a_missing_gradient_is_reported() -> None:
    model = nn.ModuleList([nn.Linear(2, 1), nn.Linear(2, 1)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    injector = FaultInjector().at(1).nan_gradient(match=r"^1\.")
    with injector.attach(model, optimizer):
        injector.draw(torch.ones(1, 2))
        model[0](torch.ones(1, 2)).sum().backward()
        with pytest.warns(UserWarning, match="no effect at step 1: no matching parameter received a gradient"):
            optimizer.step()
    assert "missed" in injector.log[0].details


# --- learning rates ---------------------------------------------------------------------------------------------------


def rates_seen(plant: Plant, injector: FaultInjector | None, steps: int) -> tuple[list[float], list[float]]:
    """The learning rate inside each step, and the one after it."""
    inside: list[float] = []
    outside: list[float] = []
    plant.optimizer.register_step_pre_hook(lambda o, a, k: inside.append(float(o.param_groups[0]["lr"])))
    if injector is not None:
        injector.attach(plant.model, plant.optimizer)
    train(plant, steps, after_step=lambda step: outside.append(float(plant.optimizer.param_groups[0]["lr"])))
    if injector is not None:
        injector.detach()
    return inside, outside


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "none": lambda o: None,
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
    "exponential": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9),  # from the rate it finds in the group
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=20),  # the same
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_learning_rate_faults_compose_with_schedulers_and_leave_nothing_behind(schedule: str, as_tensor: bool) -> None:
    def plant() -> Plant:
        made = MLPPlant(seed=0)
        rate = torch.tensor(1e-3) if as_tensor else 1e-3
        made.optimizer = torch.optim.AdamW(made.model.parameters(), lr=rate, foreach=False)
        made.scheduler = SCHEDULES[schedule](made.optimizer)
        return made

    inside, outside = rates_seen(plant(), None, 10)
    injector = FaultInjector().at(3).lr_spike(50, steps=4).at(5).lr_creep(2.0, steps=3)
    bad_inside, bad_outside = rates_seen(plant(), injector, 10)
    assert bad_outside == outside
    factors = [1, 1, 50, 50, 50 * 2, 50 * 4, 8, 1, 1, 1]
    assert bad_inside == pytest.approx([rate * factor for rate, factor in zip(inside, factors, strict=True)], rel=1e-6)
    assert [r.details["factor"] for r in injector.log if r.kind == "lr_creep"] == [2.0, 4.0, 8.0]


def test_spiked_update_is_the_clean_update_times_the_factor() -> None:
    clean = train(MLPPlant(seed=0, optimizer="sgd", momentum=0.0))
    _, path = faulted(FaultInjector().at(AT).lr_spike(50, steps=1), optimizer="sgd", momentum=0.0)
    update, spiked = clean[AT - 1] - clean[AT - 2], path[AT - 1] - path[AT - 2]
    assert torch.allclose(spiked, 50 * update, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("where", ["global", "instance"])
def test_learning_rate_faults_nest_with_a_supervisor_that_cuts_the_rate(first: bool, where: str) -> None:
    plant = MLPPlant(seed=0)
    injector = FaultInjector().at(2).lr_spike(50, steps=2)
    saved: list[float] = []
    inside: list[float] = []

    def cut(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        saved.append(optimizer.param_groups[0]["lr"])
        optimizer.param_groups[0]["lr"] *= 0.1

    def put_back(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        inside.append(optimizer.param_groups[0]["lr"])
        optimizer.param_groups[0]["lr"] = saved.pop()

    def supervise() -> list[Any]:
        if where == "global":
            pre, post = optim_module.register_optimizer_step_pre_hook, optim_module.register_optimizer_step_post_hook
        else:
            pre, post = plant.optimizer.register_step_pre_hook, plant.optimizer.register_step_post_hook
        return [pre(cut), post(put_back)]

    handles = supervise() if first else []
    with injector.attach(plant.model, plant.optimizer):
        handles = handles or supervise()
        train(plant, 4, after_step=lambda step: inside.append(plant.optimizer.param_groups[0]["lr"]))
    for handle in handles:
        handle.remove()
    assert inside == pytest.approx([1e-4, 1e-3, 5e-3, 1e-3, 5e-3, 1e-3, 1e-4, 1e-3])
    assert inside[1::2] == [1e-3] * 4


def test_a_rate_left_behind_by_an_optimizer_that_raised_is_taken_off() -> None:
    plant = MLPPlant(seed=0)

    def fail(optimizer: object, args: object, kwargs: object) -> None:
        raise RuntimeError("out of memory")

    injector = FaultInjector().at(1).lr_spike(50).attach(plant.model, plant.optimizer)
    handle = plant.optimizer.register_step_pre_hook(fail)
    plant.step_loss(next(plant.loader)).backward()
    with pytest.raises(RuntimeError, match="memory"):
        plant.optimizer.step()
    handle.remove()
    injector.detach()
    assert plant.optimizer.param_groups[0]["lr"] == 1e-3


def test_creep_without_end_stays_finite() -> None:
    fault = parse_fault("lr_creep@1")[1]
    assert fault.factor_at(2) == pytest.approx(1.0609)
    assert math.isfinite(fault.factor_at(10**6))
    assert fault.duration is None


# --- training state ---------------------------------------------------------------------------------------------------


def test_state_faults_strike_between_steps_and_never_in_a_probe() -> None:
    plant = CNNPlant(seed=0)
    injector = FaultInjector().at(3).weight_scale(2.0).attach(plant.model, plant.optimizer)
    train(plant, 2)  # not through batches(): the forward pass is what begins a step
    before = parameters(plant.model)
    plant.held_out_loss()
    inputs, _ = next(plant.loader)
    with torch.no_grad():
        plant.model(inputs)  # in training mode, but no training
    plant.model.eval()
    plant.model(inputs)
    plant.model.train()
    assert torch.equal(parameters(plant.model), before)
    plant.model(inputs)
    assert torch.equal(parameters(plant.model), 2 * before)
    plant.model(inputs)  # a second forward pass of the same step
    assert torch.equal(parameters(plant.model), 2 * before)
    injector.detach()


def test_drawing_the_batch_begins_the_step() -> None:
    plant = MLPPlant(seed=0)
    injector = FaultInjector().at(2).weight_scale(2.0, match="layers.0").attach(plant.model, plant.optimizer)
    source = iter(injector.batches(plant.loader))
    plant.step_loss(next(source)).backward()
    plant.optimizer.step()
    before = {name: p.detach().clone() for name, p in plant.model.named_parameters()}
    next(source)
    for name, p in plant.model.named_parameters():
        assert torch.equal(p, before[name] * (2.0 if name.startswith("layers.0") else 1.0))
    injector.detach()


@pytest.mark.parametrize("which", ["first", "second", "both"])
def test_moments_zeroed_zeroes_those_and_keeps_the_rest(which: str) -> None:
    plant = MLPPlant(seed=0)
    injector = FaultInjector().at(4).moments_zeroed(which).attach(plant.model, plant.optimizer)  # type: ignore[arg-type]
    train(plant, 3)
    before = {key: moments(plant.optimizer, key) for key in ("exp_avg", "exp_avg_sq", "step")}
    injector.draw(next(plant.loader))
    after = {key: moments(plant.optimizer, key) for key in before}
    for key, struck in (("exp_avg", which != "second"), ("exp_avg_sq", which != "first"), ("step", False)):
        same = all(torch.equal(a, b) for a, b in zip(before[key], after[key], strict=True))
        assert same is not struck
        assert all(not bool(value.any()) for value in after[key]) is struck
    assert injector.log[0].details == {"tensors": 12 if which == "both" else 6}
    injector.detach()


def test_moments_reset_is_a_fresh_optimizer() -> None:
    plant = MLPPlant(seed=0)
    injector = FaultInjector().at(4).moments_reset().attach(plant.model, plant.optimizer)
    path = train(plant, 3)
    clone = copy.deepcopy(plant.model)
    batch = next(plant.loader)
    plant.step_loss(injector.draw(batch)).backward()
    plant.optimizer.step()
    injector.detach()
    fresh = torch.optim.AdamW(clone.parameters(), lr=1e-3, weight_decay=0.01)
    plant.loss_fn(clone(batch[0]), batch[1]).backward()
    fresh.step()
    assert torch.equal(parameters(clone), parameters(plant.model))
    assert not torch.equal(path[-1], parameters(plant.model))


def test_batchnorm_poison_scales_running_statistics_and_shows_in_evaluation_only() -> None:
    plant = CNNPlant(seed=0)
    injector = FaultInjector().at(21).batchnorm_poison(50).attach(plant.model, plant.optimizer)
    train(plant, 20)
    before = {name: b.clone() for name, b in plant.model.named_buffers()}
    healthy, weights = plant.held_out_loss(), parameters(plant.model)
    injector.draw(next(plant.loader))
    for name, buffer in plant.model.named_buffers():
        assert torch.equal(buffer, before[name] * (1 if name.endswith("num_batches_tracked") else 50))
    assert torch.equal(parameters(plant.model), weights)
    assert plant.held_out_loss() > 1.5 * healthy
    injector.detach()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_bit_flip_changes_one_bit_of_one_element(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4)).to(dtype)
    model[0].weight.data = model[0].weight.data.t().contiguous().t()  # not contiguous: still one element of this memory
    optimizer = torch.optim.AdamW(model.parameters())
    whole = torch.int64 if dtype is torch.float64 else torch.int32 if dtype is torch.float32 else torch.int16
    before = {name: p.detach().clone().view(whole) for name, p in model.named_parameters()}
    injector = FaultInjector(seed=3).at(1).bit_flip().attach(model, optimizer)
    injector.draw(torch.ones(1))
    injector.detach()
    details = injector.log[0].details
    top = 8 * dtype.itemsize - 2
    changed = {n: (p.detach().view(whole) ^ before[n]) for n, p in model.named_parameters()}
    places = {name: difference.nonzero().tolist() for name, difference in changed.items() if bool(difference.any())}
    assert places == {details["tensor"]: [details["index"]]}
    assert int(changed[str(details["tensor"])].sum()) == 1 << top
    assert details["bit"] == top
    value = dict(model.named_parameters())[str(details["tensor"])][tuple(details["index"])]  # type: ignore[call-overload]
    assert value.item() == details["after"]
    assert abs(float(details["after"])) > 100 * abs(float(details["before"]))  # type: ignore[arg-type]


@given(
    value=st.floats(allow_nan=False, allow_infinity=False, width=32),
    bit=st.integers(0, 31),
)
def test_flipping_twice_is_no_flip(value: float, bit: int) -> None:
    tensor = torch.tensor([[0.5, value]])
    before = tensor.clone().view(torch.int32)
    flip_bit(tensor, (0, 1), bit)
    difference = (tensor.view(torch.int32) ^ before).tolist()
    assert difference == [[0, (1 << bit) if bit < 31 else -(1 << 31)]]
    flip_bit(tensor, (0, 1), bit)
    assert torch.equal(tensor.view(torch.int32), before)


@pytest.mark.parametrize(("target", "key"), [("first_moment", "exp_avg"), ("second_moment", "exp_avg_sq")])
def test_bit_flip_in_a_moment(target: str, key: str) -> None:
    plant = MLPPlant(seed=0)
    injector = FaultInjector().at(3).bit_flip(target, match="layers.4.weight")  # type: ignore[arg-type]
    injector.attach(plant.model, plant.optimizer)
    train(plant, 2)
    before = {k: moments(plant.optimizer, k) for k in ("exp_avg", "exp_avg_sq")}
    weights = parameters(plant.model)
    injector.draw(next(plant.loader))
    injector.detach()
    changed = {
        k: sum(int((a != b).sum()) for a, b in zip(before[k], moments(plant.optimizer, k), strict=True)) for k in before
    }
    assert changed == {"exp_avg": 0, "exp_avg_sq": 0, key: 1}
    assert injector.log[0].details["tensor"] == f"layers.4.weight.{key}"
    assert torch.equal(parameters(plant.model), weights)


def test_moment_faults_after_a_rollback_to_the_start_are_reported_as_missed() -> None:
    plant = MLPPlant(seed=0)
    injector = FaultInjector().at(3).moments_zeroed().attach(plant.model, plant.optimizer)
    train(plant, 2)
    plant.optimizer.state.clear()  # what restoring the state before the first step does
    with pytest.warns(UserWarning, match=r"moments_zeroed\(which=second\) had no effect at step 3"):
        injector.draw(next(plant.loader))
    injector.detach()


def test_restoring_an_earlier_state_does_not_rewind_the_injector() -> None:
    plant = MLPPlant(seed=0)
    injector = FaultInjector().at(3).weight_scale(2.0).attach(plant.model, plant.optimizer)
    train(plant, 1)
    kept = copy.deepcopy(plant.model.state_dict())
    train(plant, 3)
    plant.model.load_state_dict(kept)
    train(plant, 4)
    injector.detach()
    assert [record.step for record in injector.log] == [3]


# --- data -------------------------------------------------------------------------------------------------------------


def test_garbage_batch_keeps_shape_dtype_range_and_labels_but_no_meaning() -> None:
    plant = MLPPlant(seed=0)
    inputs, targets = next(plant.loader)
    originals = inputs.clone(), targets.clone()
    injector = FaultInjector(seed=1).at(1).garbage_batch().attach(plant.model, plant.optimizer)
    noise, shuffled = injector.draw((inputs, targets))
    injector.detach()
    assert noise.shape == inputs.shape
    assert noise.dtype == inputs.dtype
    assert float(inputs.min()) <= float(noise.min()) < float(noise.max()) <= float(inputs.max())
    assert abs(float(torch.corrcoef(torch.stack([noise.flatten(), inputs.flatten()]))[0, 1])) < 4 / math.sqrt(64 * 64)
    assert torch.equal(shuffled.sort().values, targets.sort().values)
    assert not torch.equal(shuffled, targets)
    assert torch.equal(inputs, originals[0])  # the loader's own batch is not touched
    assert torch.equal(targets, originals[1])
    assert injector.log[0].details["inputs"] == inputs.numel()


def test_garbage_tokens_are_tokens_and_ignored_positions_stay_ignored() -> None:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(5, 50, (8, 32))
    garbage = GarbageBatch().corrupt_input(tokens, generator)
    assert garbage.dtype == tokens.dtype
    assert int(garbage.min()) >= int(tokens.min())
    assert int(garbage.max()) <= int(tokens.max())
    assert float((garbage == tokens).float().mean()) < 0.1
    labels = tokens.clone()
    labels[:, ::3] = -100
    for fault in (GarbageBatch(), LabelNoise(0.5)):
        changed = fault.corrupt_target(labels, (5, 49), generator)
        assert torch.equal(changed == -100, labels == -100)
        assert not torch.equal(changed, labels)
    assert GarbageBatch().corrupt_input(torch.tensor([True, False] * 50), generator).dtype is torch.bool


@pytest.mark.parametrize("fraction", [0.1, 0.3, 1.0])
def test_label_noise_makes_the_stated_fraction_wrong_and_lasts(fraction: float) -> None:
    plant = MLPPlant(seed=0)
    clean = [next(plant.loader) for _ in range(60)]
    injector = FaultInjector(seed=1).at(11).label_noise(fraction).attach(plant.model, plant.optimizer)
    wrong = []
    for batch, (inputs, targets) in zip(injector.batches(clean), clean, strict=True):
        plant.step_loss(batch).backward()
        plant.optimizer.step()
        assert batch[0] is inputs
        assert int(batch[1].min()) >= 0
        assert int(batch[1].max()) <= 9
        wrong.append(int((batch[1] != targets).sum()))
    injector.detach()
    assert sum(wrong[:10]) == 0
    n = 50 * 64
    assert abs(sum(wrong[10:]) / n - fraction) <= 4 * math.sqrt(fraction * (1 - fraction) / n)
    assert [record.details["targets"] for record in injector.log] == wrong[10:]


def test_real_valued_targets_are_exchanged_between_examples() -> None:
    values = torch.arange(20.0).view(10, 2)
    generator = torch.Generator().manual_seed(0)
    for fault in (GarbageBatch(), LabelNoise(0.9)):
        changed = fault.corrupt_target(values, (0, 0), generator)
        rows = {tuple(row) for row in values.tolist()}
        assert {tuple(row) for row in changed.tolist()} <= rows
        assert not torch.equal(changed, values)


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


class Encoding(OrderedDict[str, Tensor]):
    """A mapping of the user's own, as tokenizers yield them."""


@pytest.mark.parametrize(
    "batch",
    [
        (torch.rand(8, 4), torch.arange(8)),
        [torch.rand(8, 4), torch.arange(8)],
        Pair(torch.rand(8, 4), torch.arange(8)),
        {"x": torch.rand(8, 4), "y": torch.arange(8), "attention_mask": torch.ones(8, 4), "name": "batch 7"},
        Encoding(input_ids=torch.arange(32).view(8, 4), labels=torch.arange(8)),
        ({"input_ids": torch.arange(32).view(8, 4), "token_mask": torch.ones(8)}, torch.arange(8)),
        torch.rand(8, 4),
    ],
    ids=["tuple", "list", "namedtuple", "dict", "own mapping", "nested", "tensor"],
)
def test_batches_of_any_usual_form_keep_it(batch: Any) -> None:
    original = copy.deepcopy(batch)
    model = nn.Linear(4, 2)
    injector = FaultInjector(seed=1).at(1).garbage_batch()
    with injector.attach(model, torch.optim.SGD(model.parameters(), lr=0.1)):
        (drawn,) = injector.batches([batch])
    assert type(drawn) is type(batch)
    assert repr(batch) == repr(original)

    def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
        items = (
            value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, tuple | list) else ()
        )
        for key, item in items:
            yield from leaves(item, f"{name}.{key}")
        if not isinstance(value, dict | tuple | list):
            yield name, value

    for (name, old), (_, new) in zip(leaves(batch), leaves(drawn), strict=True):
        if isinstance(old, Tensor):
            assert old.shape == new.shape
            assert torch.equal(old, new) is name.endswith("mask")
        else:
            assert old == new


def test_targets_can_be_named() -> None:
    model = nn.Linear(4, 2)
    batch = (torch.rand(8, 4), torch.arange(8), torch.ones(8))
    injector = FaultInjector(seed=1).at(1).label_noise(1.0)
    with injector.attach(model, torch.optim.SGD(model.parameters(), lr=0.1)):
        (drawn,) = injector.batches([batch], targets=1)
        assert not bool((drawn[1] == batch[1]).any())
        assert drawn[2] is batch[2]
        with pytest.raises(ConfigurationError, match="without index 3"):
            injector.draw(batch, targets=3)
        with pytest.raises(ConfigurationError, match="no key 'z'; its keys are x"):
            injector.draw({"x": batch[0]}, targets="z")
        with pytest.raises(ConfigurationError, match="has no targets"):
            injector.draw(batch[0])
        with pytest.raises(ConfigurationError, match="of type str is not understood"):
            injector.draw("text")


def test_accumulated_batches_of_a_step_are_all_faulty_and_all_different() -> None:
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = (torch.rand(8, 4), torch.arange(8))
    injector = FaultInjector(seed=1).at(2).garbage_batch()
    drawn = []
    with injector.attach(model, optimizer):
        source = iter(injector.batches([batch] * 9))
        for _ in range(3):
            drawn += [next(source)[0] for _ in range(3)]
            optimizer.step()
    assert [torch.equal(x, batch[0]) for x in drawn] == [True] * 3 + [False] * 3 + [True] * 3
    assert not torch.equal(drawn[3], drawn[4])
    assert [record.step for record in injector.log] == [2, 2, 2]


def test_data_faults_without_batches_are_refused_at_the_first_step() -> None:
    plant = MLPPlant(seed=0)
    injector = FaultInjector().at(500).garbage_batch()
    assert injector.needs_batches
    with (
        injector.attach(plant.model, plant.optimizer),
        pytest.raises(ConfigurationError, match=r"for batch in injector\.batches\(loader\)"),
    ):
        plant.step_loss(next(plant.loader))


def test_batches_are_as_long_and_as_repeatable_as_the_loader() -> None:
    model = nn.Linear(4, 2)
    data = torch.utils.data.TensorDataset(torch.rand(10, 4), torch.arange(10))
    injector = FaultInjector()
    loader = injector.batches(torch.utils.data.DataLoader(data, batch_size=4))
    with injector.attach(model, torch.optim.SGD(model.parameters(), lr=0.1)):
        assert len(loader) == 3
        assert sum(1 for _ in loader) == sum(1 for _ in loader) == 3


# --- attaching --------------------------------------------------------------------------------------------------------


def test_detaching_in_the_middle_of_a_faulty_step_removes_everything() -> None:
    plant = MLPPlant(seed=0)
    before = hooks(plant)
    injector = FaultInjector().at(1).nan_gradient().lr_spike(50)

    def loop() -> None:
        with injector.attach(plant.model, plant.optimizer):
            plant.step_loss(injector.draw(next(plant.loader)))
            assert sum(hooks(plant)) == sum(before) + 3 + 2 * 6  # three for the run, two per parameter for this step
            raise KeyError("a bug in the loop")

    with pytest.raises(KeyError):
        loop()
    assert hooks(plant) == before
    injector.detach()  # again, without harm
    assert hooks(plant) == before


def test_gradient_hooks_exist_during_the_faulty_step_only() -> None:
    plant = MLPPlant(seed=0)
    before = sum(hooks(plant))
    counts: list[int] = []
    with FaultInjector().at(2).nan_gradient().attach(plant.model, plant.optimizer):
        train(plant, 3, before_step=lambda step: counts.append(sum(hooks(plant)) - before))
    assert counts == [3, 15, 3]


def test_other_models_and_optimizers_are_left_alone() -> None:
    plant, other = MLPPlant(seed=0), MLPPlant(seed=0)
    clean = train(MLPPlant(seed=0), 4)
    injector = FaultInjector().at(2).nan_gradient().lr_spike(50).weight_scale(3)
    with injector.attach(plant.model, plant.optimizer):
        assert first_difference(train(other, 4), clean) is None
        assert injector.log == ()
        copied = copy.deepcopy(plant.model)  # averaged weights bring the hooks along
        optimizer = torch.optim.AdamW(copied.parameters(), lr=1e-3)
        for _ in range(3):
            copied(next(plant.loader)[0]).sum().backward()
            optimizer.step()
        assert injector.log == ()


def test_a_resumed_run_goes_on_counting() -> None:
    plant = MLPPlant(seed=0)
    injector = FaultInjector().at(100).weight_scale(2.0).at(102).weight_scale(0.5).at(99).lr_creep(1.5)
    with injector.attach(plant.model, plant.optimizer, first_step=101):
        train(plant, 2)
    done = [(record.step, record.kind, record.details["factor"]) for record in injector.log]
    assert done == [
        (101, "lr_creep", pytest.approx(1.5**3)),
        (102, "weight_scale", 0.5),
        (102, "lr_creep", pytest.approx(1.5**4)),
    ]


def test_closures_run_inside_the_faulty_step() -> None:
    model = nn.Linear(3, 1)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=2)
    inputs = torch.rand(16, 3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (model(inputs) ** 2).mean()
        loss.backward()
        return loss

    injector = FaultInjector().at(2).nan_gradient()
    with injector.attach(model, optimizer):
        optimizer.step(closure)
        assert bool(torch.isfinite(parameters(model)).all())
        optimizer.step(closure)
    assert [record.step for record in injector.log] == [2]
    assert not bool(torch.isfinite(parameters(model)).all())


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (lambda: FaultInjector(seed=-1), "seed = -1"),
        (lambda: FaultInjector().nan_gradient(), r"say when, as in FaultInjector\(\).at\(500\).nan_gradient"),
        (lambda: FaultInjector().at(0), r"at\(0\)"),
        (lambda: FaultInjector().at(-3), r"at\(-3\)"),
        (lambda: FaultInjector().at(2.5), r"at\(2.5\)"),
        (lambda: FaultInjector().at(True), r"at\(True\)"),
        (lambda: FaultInjector().at(1).gradient_scale(0), "factor = 0"),
        (lambda: FaultInjector().at(1).gradient_scale(math.nan), "factor = nan"),
        (lambda: FaultInjector().at(1).lr_spike(-2), "factor = -2"),
        (lambda: FaultInjector().at(1).lr_spike(2, steps=0), "steps = 0"),
        (lambda: FaultInjector().at(1).lr_creep(0), "rate = 0"),
        (lambda: FaultInjector().at(1).label_noise(0), "fraction = 0"),
        (lambda: FaultInjector().at(1).label_noise(1.5), "fraction = 1.5"),
        (lambda: FaultInjector().at(1).weight_scale(math.inf), "factor = inf"),
        (lambda: FaultInjector().at(1).batchnorm_poison(0), "factor = 0"),
        (lambda: FaultInjector().at(1).bit_flip("weights"), "target = 'weights'"),
        (lambda: FaultInjector().at(1).bit_flip(bit=64), "bit = 64"),
        (lambda: FaultInjector().at(1).moments_zeroed("third"), "which = 'third'"),
        (lambda: FaultInjector().at(1).nan_gradient(match="("), "not a regular expression"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(schedule: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        schedule()


@pytest.mark.parametrize(
    ("options", "add", "message"),
    [
        ({}, lambda i: i.batchnorm_poison(2), "MLP has no BatchNorm"),
        ({}, lambda i: i.weight_scale(2, match="encoder"), "no parameter whose name matches 'encoder'"),
        ({}, lambda i: i.nan_gradient(match="encoder"), "no trainable parameter"),
        ({}, lambda i: i.bit_flip(bit=40), "bit = 40: layers.0.weight is torch.float32"),
        ({"optimizer": "sgd"}, lambda i: i.moments_zeroed(), "SGD as configured keeps no second moments"),
        ({"optimizer": "sgd", "momentum": 0.0}, lambda i: i.moments_reset(), "keeps no moments"),
        ({"optimizer": "sgd", "momentum": 0.0}, lambda i: i.bit_flip("first_moment"), "keeps no first moments"),
    ],
)
def test_faults_that_cannot_act_are_refused_when_attaching(
    options: dict[str, Any], add: Callable[[FaultInjector], FaultInjector], message: str
) -> None:
    plant = MLPPlant(seed=0, **options)
    before = hooks(plant)
    injector = add(FaultInjector().at(5))
    with pytest.raises(ConfigurationError, match=message):
        injector.attach(plant.model, plant.optimizer)
    assert hooks(plant) == before


def test_moments_before_the_first_step_are_refused() -> None:
    plant = MLPPlant(seed=0)
    with pytest.raises(ConfigurationError, match="before its first step the optimizer has no moments"):
        FaultInjector().at(1).moments_zeroed().attach(plant.model, plant.optimizer)
    train(plant, 1)
    FaultInjector().at(1).moments_zeroed().attach(plant.model, plant.optimizer).detach()  # now it has


def test_optimizers_differ_in_what_they_keep() -> None:
    model = nn.Linear(2, 2)
    adagrad = torch.optim.Adagrad(model.parameters())
    with pytest.raises(ConfigurationError, match="Adagrad makes its state at construction"):
        FaultInjector().at(5).moments_reset().attach(model, adagrad)
    FaultInjector().at(1).moments_zeroed().attach(model, adagrad).detach()
    rmsprop = torch.optim.RMSprop(model.parameters())
    FaultInjector().at(5).moments_zeroed().attach(model, rmsprop).detach()
    with pytest.raises(ConfigurationError, match="no first moments"):
        FaultInjector().at(5).moments_zeroed("first").attach(model, rmsprop)
    with pytest.raises(ConfigurationError, match="LBFGS as configured keeps no moments"):
        FaultInjector().at(5).moments_reset().attach(model, torch.optim.LBFGS(model.parameters()))


def test_an_optimizer_of_another_model_is_refused() -> None:
    plant, other = MLPPlant(seed=0), MLPPlant(seed=0)
    with pytest.raises(ConfigurationError, match="holds none of the model's matching parameters"):
        FaultInjector().at(1).nan_gradient().attach(plant.model, other.optimizer)


def test_order_of_use_is_checked() -> None:
    plant = MLPPlant(seed=0)
    injector = FaultInjector().at(1).weight_scale(2.0)
    with pytest.raises(ConfigurationError, match="Attach the injector"):
        next(iter(injector.batches(plant.loader)))
    with pytest.raises(ConfigurationError, match="first_step = 0"):
        injector.attach(plant.model, plant.optimizer, first_step=0)
    with injector.attach(plant.model, plant.optimizer):
        with pytest.raises(ConfigurationError, match="attached already"):
            injector.attach(plant.model, plant.optimizer)
        with pytest.raises(ConfigurationError, match="schedule faults before"):
            injector.at(9).nan_gradient()


# --- catalogue and notation -------------------------------------------------------------------------------------------


def test_every_kind_has_a_method_and_a_place_in_the_catalogue() -> None:
    assert list(CATALOGUE) == list(EVERY_FAULT)
    for kind, add in EVERY_FAULT.items():
        (entry,) = add(FaultInjector().at(9)).schedule
        assert entry.at == 9
        assert type(entry.fault) is CATALOGUE[kind]
        assert callable(getattr(FaultInjector, kind))
        assert CATALOGUE[kind].__doc__


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("nan_gradient@700", lambda i: i.at(700).nan_gradient()),
        ("nan_gradient:none@3", lambda i: i.at(3).nan_gradient(steps=None)),
        ("inf_gradient@7:match=head", lambda i: i.at(7).inf_gradient(match="head")),
        ("gradient_scale:1e3@7:steps=2", lambda i: i.at(7).gradient_scale(1000.0, steps=2)),
        ("lr_spike:50@500:steps=5", lambda i: i.at(500).lr_spike(50.0, steps=5)),
        ("lr_creep@7", lambda i: i.at(7).lr_creep()),
        ("lr_creep:1.1@7:steps=none", lambda i: i.at(7).lr_creep(1.1)),
        ("garbage_batch@7:steps=3", lambda i: i.at(7).garbage_batch(steps=3)),
        ("label_noise:0.3@200", lambda i: i.at(200).label_noise(0.3)),
        ("bit_flip@7:bit=12", lambda i: i.at(7).bit_flip(bit=12)),
        ("bit_flip:second_moment@7:match=^layers", lambda i: i.at(7).bit_flip("second_moment", match="^layers")),
        ("moments_zeroed:both@7", lambda i: i.at(7).moments_zeroed("both")),
        ("moments_reset@7", lambda i: i.at(7).moments_reset()),
        ("weight_scale:1.5@7:match=0.weight", lambda i: i.at(7).weight_scale(1.5, match="0.weight")),
        ("batchnorm_poison:100@7", lambda i: i.at(7).batchnorm_poison(100.0)),
    ],
)
def test_notation_means_the_same_as_the_methods(text: str, same: Callable[[FaultInjector], FaultInjector]) -> None:
    parsed = FaultInjector.parse([text], seed=5)
    assert parsed.schedule == same(FaultInjector(seed=5)).schedule
    assert parsed.seed == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("meteor@5", "no fault 'meteor'; the kinds are nan_gradient"),
        ("nan_gradient", r"write KIND\[:VALUE\]@STEP"),
        ("nan_gradient@soon", r"write KIND\[:VALUE\]@STEP"),
        ("nan_gradient@0", r"at\(0\)"),
        ("lr_spike@5", "lr_spike needs its factor"),
        ("lr_spike:fast@5", "factor = 'fast' is not a number"),
        ("lr_spike:50@5:steps=2.5", "steps = '2.5' is not a whole number"),
        ("lr_spike:50@5:length=3", "'length=3' is not NAME=VALUE"),
        ("lr_spike:50@5:steps", "'steps' is not NAME=VALUE"),
        ("lr_spike:50@5:factor=3", "factor is given twice"),
        ("moments_reset:3@5", "takes no value"),
        ("lr_spike:-1@5", "factor = -1.0"),
        ("weight_scale:none@5", "factor = 'none' is not a number"),
    ],
)
def test_notation_errors_say_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        FaultInjector.parse([text])


def test_a_fault_of_the_users_own_kind() -> None:
    class Blackout(DataFault):
        """All inputs are zero."""

        kind = "blackout"
        needs_targets = False
        steps = 2

        def corrupt_input(self, values: Tensor, generator: torch.Generator) -> Tensor:
            return torch.zeros_like(values)

        def corrupt_target(self, values: Tensor, labels: tuple[int, int], generator: torch.Generator) -> Tensor:
            return values

    injector = FaultInjector().at(3).add(Blackout())
    clean = train(MLPPlant(seed=0))
    _, path = faulted(injector)
    assert first_difference(clean, path) == 3
    assert [record.step for record in injector.log] == [3, 4]
    assert injector.describe() == "step 3: blackout()"
