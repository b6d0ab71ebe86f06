"""Snapshots on real training: exact, in place, never aliased.

Oracle: the run itself. What follows a restore must be bitwise what followed the capture, so every tolerance is zero.
"""

from __future__ import annotations

import copy
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler, swa_utils

from kalmanguard.errors import ConfigurationError, SnapshotError
from kalmanguard.snapshots.codec import decode, encode
from kalmanguard.snapshots.ring import Ring, free_host_bytes, slots_for
from kalmanguard.snapshots.state import TrainingState

OptimizerMaker = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


class Counting(torch.optim.Optimizer):
    """Keeps Python numbers, nested containers and group-wide state, as older and third-party optimizers do."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1e-2, "decay": lambda count: 1.0 / count})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["calls"] = group.get("calls", 0) + 1
            for p in group["params"]:
                state = self.state[p]
                state["count"] = state.get("count", 0) + 1
                state.setdefault("recent", []).append(p.grad.clone())
                del state["recent"][:-3]
                state["stats"] = {"peak": max(state.get("stats", {}).get("peak", 0.0), p.grad.abs().max().item())}
                p.sub_(sum(state["recent"]), alpha=group["lr"] * group["decay"](state["count"]))


OPTIMIZERS: dict[str, OptimizerMaker] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "Adam amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, centered=True, momentum=0.5),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=2, history_size=4),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=1e-2, t0=3),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "counting in Python": Counting,
}


class Run:
    """A small network with BatchNorm and dropout on random data: every kind of state matters for what comes next."""

    def __init__(self, make: OptimizerMaker = OPTIMIZERS["AdamW"], seed: int = 0) -> None:
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        self.model = nn.Sequential(
            nn.Linear(6, 16),
            nn.BatchNorm1d(16),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Linear(16, 8),
            nn.Tanh(),
            nn.Linear(8, 1),
        )
        self.optimizers = [make(list(self.model.parameters()))]
        self.state = TrainingState(self.model, optimizers=self.optimizers, schedulers=[])

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            x = torch.randn(8, 6) * (1 + 0.1 * random.random()) + 0.1 * float(np.random.randn())
            y = x.sum(1, keepdim=True).sin()

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                self.model.zero_grad()
                loss = (self.model(x) - y).square().mean()
                loss.backward()
                return loss

            for optimizer in self.optimizers:
                if isinstance(optimizer, torch.optim.LBFGS):
                    optimizer.step(closure)
                else:
                    closure()
                    optimizer.step()

    def bits(self) -> list[Tensor]:
        return [tensor.detach().clone() for tensor in [*self.model.parameters(), *self.model.buffers()]]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


# -- exactness ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fifty_steps_after_a_restore_are_bitwise_the_same_twice(name: str) -> None:
    run = Run(OPTIMIZERS[name])
    run.step(5)
    slot = run.state.capture()
    digest = run.state.digest()
    assert run.state.digest(slot) == digest
    run.step(50)
    first = run.bits()
    assert run.state.digest() != digest
    for _ in range(2):
        run.state.restore(slot)
        assert run.state.digest() == digest
        assert run.state.digest(slot) == digest
        run.step(50)
        assert same(run.bits(), first)
    assert run.state.digest(slot) == digest, "steps after a restore changed the slot"


def test_two_optimizers_are_restored_together() -> None:
    run = Run()
    run.optimizers[:] = [
        torch.optim.AdamW(run.model[0].parameters(), lr=1e-2),
        torch.optim.SGD(run.model[4].parameters(), lr=1e-2, momentum=0.9),
    ]
    run.step(4)
    slot = run.state.capture()
    run.step(50)
    expected = run.bits()
    run.state.restore(slot)
    run.step(50)
    assert same(run.bits(), expected)


def test_rollback_twice_in_a_row_gives_equal_digests() -> None:
    run = Run()
    run.step(3)
    slot = run.state.capture()
    run.step(7)
    run.state.restore(slot)
    first = run.state.digest()
    run.state.restore(slot)
    assert run.state.digest() == first == run.state.digest(slot)


def test_restoring_a_state_before_the_first_step_clears_the_moments() -> None:
    run = Run()
    slot = run.state.capture()
    run.step(3)
    expected = run.bits()
    assert run.optimizers[0].state
    run.state.restore(slot)
    assert not run.optimizers[0].state
    assert run.state.digest() == run.state.digest(slot)
    run.step(3)
    assert same(run.bits(), expected)


def test_state_that_vanished_is_recreated_without_aliasing() -> None:
    run = Run()
    run.step(3)
    slot = run.state.capture()
    digest = run.state.digest(slot)
    run.step(20)
    expected = run.bits()
    run.optimizers[0].state.clear()
    run.state.restore(slot)
    moments = next(iter(run.optimizers[0].state.values()))
    assert moments["step"].device.type == "cpu"
    assert moments["step"].dtype == torch.float32
    run.step(20)
    assert same(run.bits(), expected)
    assert run.state.digest(slot) == digest


def test_identity_and_address_survive_a_restore() -> None:
    run = Run()
    run.step(2)
    slot = run.state.capture()
    states = run.optimizers[0].state
    tensors = [*run.model.parameters(), *run.model.buffers(), *[v for s in states.values() for v in s.values()]]
    before = [(id(tensor), tensor.data_ptr()) for tensor in tensors]
    run.step(4)
    run.state.restore(slot)
    tensors = [*run.model.parameters(), *run.model.buffers(), *[v for s in states.values() for v in s.values()]]
    assert [(id(tensor), tensor.data_ptr()) for tensor in tensors] == before


def test_capturing_and_digesting_leave_no_trace() -> None:
    bare, observed = Run(seed=3), Run(seed=3)
    bare.step(20)
    expected = bare.bits()
    torch.manual_seed(0)
    observed = Run(seed=3)
    slot = None
    for _ in range(20):
        observed.step()
        slot = observed.state.capture(slot)
        observed.state.digest()
    assert same(observed.bits(), expected)


def test_a_slot_is_reused_in_place() -> None:
    run = Run()
    run.step(2)
    slot = run.state.capture()
    addresses = [buffer.data_ptr() for buffer in slot.static]
    run.step(2)
    digest = run.state.digest()
    assert run.state.capture(slot) is slot
    assert [buffer.data_ptr() for buffer in slot.static] == addresses
    assert run.state.digest(slot) == digest


@pytest.mark.parametrize("draw", [random.random, np.random.randn, lambda: torch.rand(()).item()])
def test_every_generator_is_rewound_or_left_alone(draw: Callable[[], float]) -> None:
    run = Run()
    draw()  # numpy keeps a second normal deviate pending, which only the full state holds
    slot = run.state.capture()
    expected = [draw() for _ in range(3)]
    run.state.capture()
    run.state.restore(slot)
    assert [draw() for _ in range(3)] == expected
    run.state.restore(slot, rng=False)
    assert [draw() for _ in range(3)] != expected
    assert run.state.digest(rng=False) == run.state.digest(slot, rng=False)
    assert run.state.digest() != run.state.digest(slot)


def test_numpy_deviates_used_up_between_captures_are_noticed() -> None:
    run = Run()
    np.random.randn()  # one pending
    first = run.state.capture()
    pending = np.random.randn()  # does not move the generator's words
    second = run.state.capture()
    following = np.random.randn()
    run.state.restore(first)
    assert np.random.randn() == pending
    run.state.restore(second)
    assert np.random.randn() == following
    run.state.restore(first)
    third = run.state.capture()  # the same words as in the second, but the deviate is pending again
    assert np.random.randn() == pending
    run.state.restore(third)
    assert np.random.randn() == pending


# -- what a model may hold ---------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 8)
        self.frozen = nn.Linear(8, 8)
        self.frozen.requires_grad_(False)
        self.head = nn.Linear(8, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.frozen(self.embed(tokens))))


def tied_run() -> tuple[Tied, torch.optim.Optimizer, TrainingState]:
    torch.manual_seed(1)
    model = Tied()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    return model, optimizer, TrainingState(model, optimizers=[optimizer], schedulers=[])


def tied_step(model: Tied, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    tokens = torch.randint(0, 40, (16,))
    nn.functional.cross_entropy(model(tokens), tokens).backward()
    optimizer.step()


def test_tied_and_frozen_parameters_are_kept_once() -> None:
    model, optimizer, state = tied_run()
    tied_step(model, optimizer)
    slot = state.capture()
    trained = 40 * 8 * 4
    # The weight, its two moments and step; the frozen bias (8 elements) is too small to be worth sharing.
    assert slot.nbytes == state.bytes_per_slot() == 3 * trained + 4 + 8 * 4
    assert state.base_bytes == 8 * 8 * 4
    other = state.capture()
    assert slot.layout.bases == other.layout.bases
    digest = state.digest(slot)
    tied_step(model, optimizer)
    with torch.no_grad():
        model.frozen.weight[3, 3] = 7.0  # a fault in a frozen weight is healed too
    state.restore(slot)
    assert state.digest() == digest
    assert model.head.weight is model.embed.weight


@pytest.mark.parametrize("through_data", [False, True])
def test_a_frozen_parameter_that_moves_is_captured_as_it_moves(through_data: bool) -> None:
    model, _, state = tied_run()
    slots, expected = [], []
    for step in range(8):
        if through_data:
            model.frozen.weight.data.mul_(0.9)  # invisible to the version counter, as target networks are updated
        else:
            with torch.no_grad():
                model.frozen.weight.mul_(0.9)
        expected.append(model.frozen.weight.clone())
        slots.append(state.capture())
        if step == 0:
            continue
        assert state.digest(slots[-1]) != state.digest(slots[-2])
    for slot, weight in zip(slots, expected, strict=True):
        state.restore(slot)
        assert torch.equal(model.frozen.weight, weight)
        assert state.digest() == state.digest(slot)
    assert state.base_bytes == 0, "a parameter that moves at every capture must stop being treated as frozen"


def test_restoring_does_not_make_a_frozen_parameter_look_moved() -> None:
    model, optimizer, state = tied_run()
    slot = state.capture()
    base = slot.layout.bases
    for _ in range(5):
        tied_step(model, optimizer)
        state.restore(slot)
        state.capture()
    assert state.capture().layout.bases == base


def test_unfreezing_is_noticed() -> None:
    model, optimizer, state = tied_run()
    slot = state.capture()
    model.frozen.requires_grad_(True)
    optimizer.add_param_group({"params": model.frozen.parameters()})
    tied_step(model, optimizer)
    later = state.capture()
    digest = state.digest(later)
    tied_step(model, optimizer)
    state.restore(later)
    assert state.digest() == digest == state.digest(later)
    state.restore(slot)
    assert state.digest(like=slot) == state.digest(slot)


class Assorted(nn.Module):
    """Parameters and buffers of every awkward kind."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.brief = nn.Parameter(torch.randn(5, 3, dtype=torch.bfloat16))
        self.scalar = nn.Parameter(torch.tensor(0.5))
        self.phase = nn.Parameter(torch.randn(4, dtype=torch.complex64))
        self.turned = nn.Parameter(torch.randn(4, 6).t())
        self.gapped = nn.Parameter(torch.randn(4, 6)[:, ::2])
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("positions", torch.arange(5).expand(3, 5), persistent=False)
        self.register_buffer("nothing", None)

    def forward(self) -> Tensor:
        terms = [self.brief.float(), self.scalar, self.phase.abs(), self.turned, self.gapped, self.conv.weight]
        return sum(((term - 1).square().mean() for term in terms), torch.zeros(()))


def test_every_dtype_and_memory_format_comes_back() -> None:
    torch.manual_seed(0)
    model = Assorted().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    state = TrainingState(model, optimizers=[optimizer], schedulers=[])

    def step() -> None:
        optimizer.zero_grad()
        model().backward()
        optimizer.step()
        model.flags.logical_not_()

    step()
    slot = state.capture()
    strides = {name: parameter.stride() for name, parameter in model.named_parameters()}
    digest = state.digest()
    step()
    expected = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer.state.clear()
    state.restore(slot)
    assert state.digest() == digest == state.digest(slot)
    assert {name: parameter.stride() for name, parameter in model.named_parameters()} == strides
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert optimizer.state[model.conv.weight]["momentum_buffer"].stride() == model.conv.weight.stride()
    step()
    assert same([parameter.detach() for parameter in model.parameters()], expected)
    text, tensors = encode(state.tree(slot))
    state.load_tree(decode(text, tensors))
    assert state.digest() == digest


def test_a_signed_zero_and_a_nan_payload_count() -> None:
    model = nn.Linear(2, 1, bias=False)
    state = TrainingState(model, optimizers=[], schedulers=[])
    with torch.no_grad():
        model.weight.zero_()
        plus = state.digest()
        model.weight.neg_()
    assert state.digest() != plus
    with torch.no_grad():
        model.weight.fill_(float("nan"))
    slot = state.capture()
    state.restore(slot)
    assert state.digest() == state.digest(slot)


def test_buffers_that_came_went_or_grew_are_put_right() -> None:
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(2))
    model.register_buffer("cache", torch.arange(3.0))
    model.register_buffer("lazy", None)
    state = TrainingState(model, optimizers=[], schedulers=[])
    slot = state.capture()
    digest = state.digest(slot)
    model.cache = torch.arange(8.0)
    model.lazy = torch.ones(2)
    model.register_buffer("late", torch.ones(1))
    state.restore(slot)
    assert state.digest() == digest
    assert torch.equal(model.cache, torch.arange(3.0))
    assert model.lazy is None
    assert not hasattr(model, "late")
    model.cache.add_(1)
    assert state.digest(slot) == digest


def test_module_state_outside_tensors_is_kept() -> None:
    class Stateful(nn.Linear):
        calls = 0

        def get_extra_state(self) -> Any:
            return {"calls": self.calls}

        def set_extra_state(self, state: Any) -> None:
            self.calls = state["calls"]

    model = nn.Sequential(Stateful(2, 2))
    state = TrainingState(model, optimizers=[], schedulers=[])
    model[0].calls = 3
    slot = state.capture()
    model[0].calls = 9
    assert state.digest() != state.digest(slot)
    state.restore(slot)
    assert model[0].calls == 3


def test_a_compiled_model_is_the_original_one() -> None:
    model = nn.Linear(3, 2)
    plain = TrainingState(model, optimizers=[], schedulers=[])
    compiled = TrainingState(torch.compile(model, backend="eager"), optimizers=[], schedulers=[])  # type: ignore[arg-type]
    assert compiled.digest() == plain.digest()
    slot = plain.capture()
    nn.init.zeros_(model.weight)
    compiled.restore(slot)
    assert plain.digest() == plain.digest(slot)


@pytest.mark.parametrize("what", ["storage", "optimizer state"])
def test_what_was_replaced_since_the_last_capture_is_noticed(what: str) -> None:
    run = Run()
    run.step(2)
    slot = run.state.capture()
    if what == "storage":
        run.model[0].weight.data = run.model[0].weight.data.clone() + 1
    else:
        run.optimizers[0].load_state_dict(copy.deepcopy(run.optimizers[0].state_dict()))
    run.step()
    run.state.capture(slot)
    moments = run.optimizers[0].state[run.model[0].weight]
    expected = [run.model[0].weight.detach().clone(), moments["exp_avg"].clone()]
    run.step()
    run.state.restore(slot)
    assert same([run.model[0].weight.detach(), moments["exp_avg"]], expected)


def test_another_shape_at_the_same_address_is_noticed() -> None:
    """What an allocator gives back may lie where the old memory lay."""
    model = nn.Linear(3, 3, bias=False)
    memory = torch.arange(9.0)
    model.weight.data = memory.view(3, 3)
    state = TrainingState(model, optimizers=[], schedulers=[])
    assert state.capture().nbytes == 36
    for other in (memory[:4].view(2, 2), memory.view(3, 3).t()):
        model.weight.data = other
        slot = state.capture()
        assert slot.nbytes == 4 * other.numel()
        assert state.digest(slot) == state.digest()
        assert torch.equal(slot.static[0], other)


def test_parameters_that_are_tied_or_untied_by_their_data_are_noticed() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    left, right = model[0].weight, model[1].weight
    right.data = left.data
    state = TrainingState(model, optimizers=[], schedulers=[])
    tied = state.capture()
    size = tied.nbytes
    right.data = left.data.clone() + 1
    digest = state.digest()
    untied = state.capture()
    assert untied.nbytes == size + 36
    nn.init.zeros_(left)
    nn.init.zeros_(right)
    state.restore(untied)
    assert state.digest() == digest == state.digest(untied)
    state.restore(tied)
    assert state.digest() == state.digest(tied)
    right.data = left.data
    with pytest.raises(SnapshotError, match="shares memory now that it did not share then"):
        state.restore(untied)
    right.data = torch.zeros(2, 2)
    assert state.capture().nbytes == size + 16


def test_gradients_belong_to_the_state_only_if_asked() -> None:
    for include in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        state = TrainingState(model, optimizers=[], schedulers=[], include_gradients=include)
        model(torch.ones(3)).backward()
        slot = state.capture()
        model(torch.ones(3)).backward()
        state.restore(slot)
        expected = 1.0 if include else 2.0
        assert model.weight.grad is not None
        assert torch.equal(model.weight.grad, torch.full((1, 3), expected))
        model.zero_grad(set_to_none=True)
        empty = state.capture()
        state.restore(slot)
        assert (model.weight.grad is not None) == include
        state.restore(empty)
        assert model.weight.grad is None


# -- schedules, scalers, extras, data ----------------------------------------------------------------------------------

SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5, 7]),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=60),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3, cycle_momentum=False),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], optimizer=o
    ),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=0.05),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_schedule_is_rewound_only_if_asked(name: str) -> None:
    run = Run()
    scheduler = SCHEDULERS[name](run.optimizers[0])
    state = TrainingState(run.model, optimizers=run.optimizers, schedulers=[scheduler])
    group = run.optimizers[0].param_groups[0]

    def step(count: int) -> list[float]:
        rates = []
        for _ in range(count):
            run.step()
            scheduler.step()
            rates.append(group["lr"])
        return rates

    step(2)
    slot = state.capture()
    now = (group["lr"], group["betas"])
    text, tensors = encode(state.tree(slot))
    rates = step(6)
    later = (group["lr"], group["betas"])
    assert later != now

    state.restore(slot)
    assert group["lr"] == later[0]
    assert (group["betas"] == later[1]) or name != "OneCycleLR"
    assert state.digest() == state.digest(slot)
    assert state.digest(schedule=True) != state.digest(slot, schedule=True)

    state.restore(slot, schedule=True)
    assert (group["lr"], group["betas"]) == now
    assert state.digest(schedule=True) == state.digest(slot, schedule=True)
    assert step(6) == rates
    state.load_tree(decode(text, tensors))
    assert state.digest(schedule=True) == state.digest(slot, schedule=True)
    assert step(6) == rates


def test_momentum_belongs_to_the_schedule_only_where_a_scheduler_cycles_it() -> None:
    run = Run()
    group = run.optimizers[0].param_groups[0]
    state = TrainingState(run.model, optimizers=run.optimizers, schedulers=[])
    slot = state.capture()
    before = group["betas"], group["weight_decay"]
    group.update(betas=(0.5, 0.5), weight_decay=0.3, lr=9.0)
    state.restore(slot)
    assert (group["betas"], group["weight_decay"]) == before
    assert group["lr"] == 9.0

    scheduler = lr_scheduler.OneCycleLR(run.optimizers[0], 0.1, total_steps=60)
    state = TrainingState(run.model, optimizers=run.optimizers, schedulers=[scheduler])
    slot = state.capture()
    group.update(betas=(0.5, 0.5), weight_decay=0.3)
    state.restore(slot)
    assert (group["betas"], group["weight_decay"]) == ((0.5, 0.5), before[1])


def test_a_learning_rate_in_a_tensor_is_left_or_written_in_place() -> None:
    run = Run(lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01), foreach=False))
    rate = run.optimizers[0].param_groups[0]["lr"]
    run.step(2)
    slot = run.state.capture()
    rate.fill_(0.5)
    run.state.restore(slot)
    assert rate.item() == 0.5
    run.state.restore(slot, schedule=True)
    assert run.optimizers[0].param_groups[0]["lr"] is rate
    assert rate.item() == pytest.approx(0.01)


def test_options_added_later_are_removed_and_functions_stay() -> None:
    run = Run(OPTIMIZERS["counting in Python"])
    group = run.optimizers[0].param_groups[0]
    slot = run.state.capture()
    run.step(2)
    assert group["calls"] == 2
    run.state.restore(slot)
    assert "calls" not in group
    assert callable(group["decay"])


def test_a_scheduler_that_holds_an_object_is_refused_only_when_rewound() -> None:
    run = Run()
    scheduler = lr_scheduler.StepLR(run.optimizers[0], 2)
    scheduler.inner = object()  # type: ignore[attr-defined]
    state = TrainingState(run.model, optimizers=run.optimizers, schedulers=[scheduler])
    slot = state.capture()
    state.restore(slot)
    assert state.digest() == state.digest(slot)
    with pytest.raises(SnapshotError, match=r"schedulers\.0\.inner is an object"):
        state.restore(slot, schedule=True)
    with pytest.raises(SnapshotError, match="inner is an object"):
        state.digest(slot, schedule=True)


def test_the_gradient_scaler_is_restored() -> None:
    run = Run()
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)
    state = TrainingState(run.model, optimizers=run.optimizers, schedulers=[], scaler=scaler)

    def step(bad: bool = False) -> None:
        run.optimizers[0].zero_grad()
        loss = run.model(torch.randn(8, 6)).square().mean() * (float("inf") if bad else 1.0)
        scaler.scale(loss).backward()
        scaler.step(run.optimizers[0])
        scaler.update()

    step()
    slot = state.capture()
    before = scaler.state_dict()
    for bad in (False, False, True):
        step(bad)
    assert scaler.state_dict() != before
    state.restore(slot)
    assert scaler.state_dict() == before
    assert state.digest() == state.digest(slot)
    off = TrainingState(run.model, optimizers=[], schedulers=[], scaler=torch.amp.GradScaler("cpu", enabled=False))
    off.restore(off.capture())


def test_moving_averages_registered_as_extras_are_restored_in_place() -> None:
    run = Run()
    average = swa_utils.AveragedModel(run.model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True)
    state = TrainingState(run.model, optimizers=run.optimizers, schedulers=[], extras={"ema": average})
    for _ in range(3):
        run.step()
        average.update_parameters(run.model)
    slot = state.capture()
    digest = state.digest(slot)
    weight = next(average.parameters())
    address, value = weight.data_ptr(), weight.detach().clone()
    run.step()
    average.update_parameters(run.model)
    assert state.digest() != digest
    state.restore(slot)
    assert state.digest() == digest
    assert (next(average.parameters()).data_ptr(), int(average.n_averaged)) == (address, 3)
    assert torch.equal(weight, value)


class Keeper:
    """An extra that hands out and keeps its very tensors, the worst that a ``load_state_dict`` may do."""

    def __init__(self) -> None:
        self.values = {"mean": torch.zeros(3), "seen": 0, "history": [1.5], "table": np.zeros(2)}

    def state_dict(self) -> dict[str, Any]:
        return self.values

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.values = state_dict


def test_extras_never_alias_the_slot() -> None:
    extras: dict[str, object] = {}
    state = TrainingState(nn.Linear(2, 2), optimizers=[], schedulers=[], extras=extras)
    early = state.capture()
    keeper = extras["keeper"] = Keeper()
    slot = state.capture()
    digest = state.digest(slot)
    for _ in range(2):
        keeper.values["mean"].add_(1)  # type: ignore[attr-defined]
        keeper.values["history"].append(2.5)  # type: ignore[attr-defined]
        keeper.values["table"] += 1  # type: ignore[operator]
        assert state.digest(slot) == digest != state.digest()
        state.restore(slot)
        assert state.digest() == digest
    state.restore(early)
    assert state.digest(like=early) == state.digest(early)
    extras.clear()
    with pytest.raises(SnapshotError, match=r"extras\.keeper was captured but is no longer registered"):
        state.restore(slot)


def test_what_cannot_be_kept_is_named_with_its_path() -> None:
    keeper = Keeper()
    keeper.values["nested"] = [{"fn": print}]
    state = TrainingState(nn.Linear(2, 2), optimizers=[], schedulers=[], extras={"ema": keeper})
    with pytest.raises(SnapshotError, match=r"extras\.ema\.nested\.0\.fn is a builtin_function"):
        state.capture()
    state = TrainingState(nn.Linear(2, 2), optimizers=[], schedulers=[], extras={"number": 3})
    with pytest.raises(SnapshotError, match=r"extras\.number is an int without state_dict"):
        state.capture()


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (torch.ones(3).to_sparse(), "model.value is a sparse_coo tensor"),
        (torch.ones(3, device="meta"), "model.value is on the meta device"),
    ],
)
def test_tensors_that_cannot_be_copied_exactly_are_refused(value: Tensor, sentence: str) -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("value", value)
    with pytest.raises(SnapshotError, match=sentence):
        TrainingState(model, optimizers=[], schedulers=[]).capture()
    with pytest.raises(SnapshotError, match="has no shape yet"):
        TrainingState(nn.LazyLinear(2), optimizers=[], schedulers=[]).capture()


class Cursor:
    """A loader with a position, which draws from the global generator when it is rewound, as torch's do."""

    def __init__(self) -> None:
        self.position = 0

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        torch.rand(3)
        self.position = state_dict["position"]


def test_the_data_cursor_is_rewound_if_asked_and_the_random_state_last() -> None:
    loader = Cursor()
    model = nn.Linear(2, 2)
    state = TrainingState(model, optimizers=[], schedulers=[], loader=loader)
    loader.position = 4
    slot = state.capture()
    expected = torch.rand(2)
    loader.position = 9
    state.restore(slot)
    assert loader.position == 9
    assert state.digest() == state.digest(slot)
    assert state.digest(data=True) != state.digest(slot, data=True)
    state.restore(slot, data=True)
    assert loader.position == 4
    assert state.digest(data=True) == state.digest(slot, data=True)
    assert torch.equal(torch.rand(2), expected)
    bare = TrainingState(model, optimizers=[], schedulers=[], loader=[1, 2])
    with pytest.raises(SnapshotError, match="cursor cannot be rewound"):
        bare.restore(bare.capture(), data=True)


def test_moments_can_be_reset() -> None:
    run = Run()
    run.step(3)
    slot = run.state.capture()
    run.step(2)
    run.state.restore(slot, reset_moments=True)
    assert not run.optimizers[0].state
    assert run.state.digest(moments=False) == run.state.digest(slot, moments=False)
    assert run.state.digest() != run.state.digest(slot)
    run.step()


def test_an_optimizer_that_was_bound_later_loses_its_state() -> None:
    run = Run()
    late = torch.optim.SGD(run.model.parameters(), lr=0.01, momentum=0.9)
    run.step(2)
    slot = run.state.capture()
    run.optimizers.append(late)
    run.step(2)
    assert late.state
    run.state.restore(slot)
    assert not late.state
    assert run.state.digest(like=slot) == run.state.digest(slot)
    run.optimizers.clear()
    with pytest.raises(SnapshotError, match="1 optimizers were captured but 0 are here"):
        run.state.restore(slot)


# -- refusals leave everything as it was -------------------------------------------------------------------------------


def test_a_changed_model_is_refused_before_anything_is_written() -> None:
    run = Run()
    run.step(2)
    slot = run.state.capture()
    run.step(1)
    weight = run.model[0].weight
    run.model[6] = nn.Linear(8, 2)
    before = run.state.digest()
    with pytest.raises(SnapshotError, match=r"model\.6\.weight is float32 \(2, 8\) now but was float32 \(1, 8\)"):
        run.state.restore(slot)
    assert run.state.digest() == before
    run.model.append(nn.Linear(2, 2))
    with pytest.raises(SnapshotError, match=r"7\.bias, 7\.weight exist on one side only"):
        run.state.restore(slot)
    assert run.model[0].weight is weight


def test_an_extra_that_fails_leaves_the_model_alone() -> None:
    class Broken(Keeper):
        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            raise ValueError("out of order")

    model = nn.Linear(2, 2)
    state = TrainingState(model, optimizers=[], schedulers=[], extras={"broken": Broken()})
    slot = state.capture()
    nn.init.ones_(model.weight)
    with pytest.raises(SnapshotError, match=r"extras\.broken did not take .* out of order"):
        state.restore(slot)
    assert bool((model.weight == 1).all())


def test_a_capture_that_fails_leaves_no_torn_slot() -> None:
    keeper = Keeper()
    state = TrainingState(nn.Linear(2, 2), optimizers=[], schedulers=[], extras={"keeper": keeper})
    slot = state.capture()
    keeper.values["bad"] = object()
    with pytest.raises(SnapshotError, match=r"extras\.keeper\.bad"):
        state.capture(slot)
    with pytest.raises(SnapshotError, match="no complete state"):
        state.restore(slot)
    del keeper.values["bad"]
    state.restore(state.capture(slot))


def test_bad_arguments_are_refused_at_construction() -> None:
    with pytest.raises(ConfigurationError, match="device = 'gpu'"):
        TrainingState(nn.Linear(1, 1), optimizers=[], schedulers=[], device="gpu")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="spill"):
        TrainingState(nn.Linear(1, 1), optimizers=[], schedulers=[], device="same", spill=Path("."))


# -- resuming elsewhere ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["AdamW", "LBFGS", "SGD momentum", "counting in Python"])
def test_a_tree_resumes_in_fresh_objects(name: str) -> None:
    run = Run(OPTIMIZERS[name], seed=5)
    run.step(6)
    text, tensors = encode(run.state.tree())
    digest = run.state.digest()
    run.step(20)
    fresh = Run(OPTIMIZERS[name], seed=6)
    fresh.state.load_tree(decode(text, tensors))
    assert fresh.state.digest() == digest
    fresh.step(20)
    assert same(fresh.bits(), run.bits())
    with pytest.raises(SnapshotError, match="not a training state"):
        fresh.state.load_tree({"modules": {}})
    with pytest.raises(SnapshotError, match="random state"):
        fresh.state.load_tree({**decode(text, tensors), "random": {"torch_cpu": 1}})


def test_tied_parameters_stay_tied_through_a_tree() -> None:
    model, optimizer, state = tied_run()
    tied_step(model, optimizer)
    text, tensors = encode(state.tree())
    assert sum(tensor.shape == (40, 8) for tensor in tensors.values()) == 3
    fresh, _, other = tied_run()
    nn.init.zeros_(fresh.embed.weight)
    other.load_tree(decode(text, tensors))
    assert other.digest() == state.digest()


# -- ring --------------------------------------------------------------------------------------------------------------


def test_the_ring_keeps_certifies_restores_and_evicts() -> None:
    before = set(threading.enumerate())
    run = Run()
    with Ring(run.state, slots=3) as ring:
        digests = {}
        for step in (1, 2, 3):
            run.step()
            ring.capture(step)
            digests[step] = run.state.digest()
        size = ring.nbytes
        with pytest.raises(SnapshotError, match="full"):
            ring.capture(4)
        with pytest.raises(SnapshotError, match="already holds step 2"):
            ring.capture(2)
        ring.certify(2)
        ring.certify(3)
        ring.certify(3)
        assert ring.certified() == (2, 3)
        assert ring.digest(2) == digests[2]
        run.step(2)
        ring.restore(3)
        assert ring.verify(3) == (digests[3], digests[3])
        assert ring.digest(1) == digests[1]
        ring.evict(1)
        run.step()
        ring.capture(6)
        assert ring.steps() == (2, 3, 6)
        assert ring.nbytes == size, "an evicted slot's buffers must be used again"
        for step in (3, 2, 3):
            ring.restore(step)
            assert run.state.digest() == digests[step]
        with pytest.raises(SnapshotError, match="does not hold step 1; it holds 2, 3, 6"):
            ring.restore(1)
    assert ring.steps() == ()
    assert not {t for t in threading.enumerate() if t.name == "kalmanguard-digest"} - before


def test_slots_are_never_reused_while_they_are_digested() -> None:
    """Eviction and recapture race with the digest thread; every digest must still be the one at capture."""
    torch.manual_seed(0)
    model = nn.Linear(400, 400)
    state = TrainingState(model, optimizers=[], schedulers=[])
    with Ring(state, slots=2) as ring:
        wrong = []
        for step in range(1, 25):
            nn.init.uniform_(model.weight)
            expected = state.digest()
            if step > 2:
                ring.evict(step - 2)
            ring.capture(step)
            ring.certify(step)
            if step % 3 == 0:
                time.sleep(0.001)
            if step % 4 == 0 and ring.digest(step) != expected:
                wrong.append(step)
            nn.init.uniform_(model.bias)
        assert wrong == []


class SlowDigests:
    """A training state whose digests take until the gate opens."""

    def __init__(self, state: TrainingState) -> None:
        self.inner = state
        self.started, self.gate = threading.Event(), threading.Event()

    def section_digests(self, slot: Any) -> Any:
        self.started.set()
        assert self.gate.wait(10)
        return self.inner.section_digests(slot)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


@pytest.mark.parametrize("use", [Ring.evict, Ring.restore, Ring.digest])
def test_whoever_needs_a_slot_waits_for_its_digest(use: Callable[[Ring, int], object]) -> None:
    state = SlowDigests(TrainingState(nn.Linear(2, 2), optimizers=[], schedulers=[]))
    with Ring(state, slots=2) as ring:  # type: ignore[arg-type]
        ring.capture(1)
        ring.certify(1)
        assert state.started.wait(10)
        ring.capture(2)  # another slot is free to use
        waiting = threading.Thread(target=use, args=(ring, 1))
        waiting.start()
        waiting.join(0.05)
        assert waiting.is_alive()
        state.gate.set()
        waiting.join(10)
        assert not waiting.is_alive()


def test_a_failed_capture_gives_the_slot_back() -> None:
    keeper = Keeper()
    state = TrainingState(nn.Linear(2, 2), optimizers=[], schedulers=[], extras={"keeper": keeper})
    with Ring(state, slots=1) as ring:
        ring.capture(1)
        ring.evict(1)
        keeper.values["bad"] = object()
        with pytest.raises(SnapshotError):
            ring.capture(2)
        assert ring.steps() == ()
        del keeper.values["bad"]
        ring.capture(2)
        ring.restore(2)
    with pytest.raises(ConfigurationError, match="slots = 0"):
        Ring(state, slots=0)


def test_slots_spill_to_nameless_files(tmp_path: Path) -> None:
    run = Run()
    run.step(2)
    state = TrainingState(run.model, optimizers=run.optimizers, schedulers=[], spill=tmp_path)
    slot = state.capture()
    assert list(tmp_path.iterdir()) == []
    run.step(5)
    expected = run.bits()
    state.restore(slot)
    assert state.digest() == state.digest(slot)
    run.step(5)
    assert same(run.bits(), expected)
    gone = TrainingState(run.model, optimizers=[], schedulers=[], spill=tmp_path / "missing")
    with pytest.raises(SnapshotError, match="could not be allocated"):
        gone.capture()


def test_free_memory_heeds_control_groups(tmp_path: Path) -> None:
    def write(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    write("proc/meminfo", "MemTotal: 9000 kB\nMemAvailable:    8000 kB\n")
    assert free_host_bytes(tmp_path) == 8000 * 1024
    write("proc/self/cgroup", "0::/job/part\n")
    write("sys/fs/cgroup/job/memory.max", "5000\n")  # the parent's limit binds
    write("sys/fs/cgroup/job/memory.current", "3000\n")
    write("sys/fs/cgroup/job/memory.stat", "anon 1\ninactive_file 500\n")
    write("sys/fs/cgroup/job/part/memory.max", "max\n")
    write("sys/fs/cgroup/job/part/memory.current", "3000\n")
    assert free_host_bytes(tmp_path) == 5000 - (3000 - 500)
    write("proc/self/cgroup", "4:cpu,memory:/old\n")
    write("sys/fs/cgroup/memory/old/memory.limit_in_bytes", "900\n")
    write("sys/fs/cgroup/memory/old/memory.usage_in_bytes", "1000\n")
    assert free_host_bytes(tmp_path) == 0
    assert 0 < free_host_bytes() < 1 << 50


def test_the_number_of_slots_follows_the_budget() -> None:
    assert slots_for(100, 750) == 7
    assert slots_for(1, 10**9, most=12) == 12
    assert slots_for(100, 50, spills=True) == 2
    assert slots_for(1, None) >= 2
    with pytest.raises(SnapshotError, match=r"of 100 bytes need 200 bytes, but the budget is 150 bytes"):
        slots_for(100, 150)
    with pytest.raises(SnapshotError, match="a quarter of the"):
        slots_for(1 << 60, None)


# -- accelerator -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["host", "same"])
def test_cuda_states_are_copied_beside_the_computation_and_come_back(device: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256), nn.Dropout(0.1), nn.Linear(256, 256)).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    state = TrainingState(model, optimizers=[optimizer], schedulers=[], device=device)

    def step(count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            model(torch.randn(64, 256, device="cuda")).square().mean().backward()
            optimizer.step()

    step(3)
    digest = state.digest()
    slot = state.capture()
    assert slot.static[0].is_pinned() if device == "host" else slot.static[0].is_cuda
    step(20)
    expected = [parameter.detach().clone() for parameter in model.parameters()]
    for _ in range(2):
        state.restore(slot)
        assert state.digest() == digest == state.digest(slot)
        step(20)
        assert same([parameter.detach() for parameter in model.parameters()], expected)


def test_a_braced_state_enters_the_ring_or_is_overwritten() -> None:
    model = nn.Linear(4, 3)
    state = TrainingState(model, optimizers=[], schedulers=[])
    with Ring(state, slots=3) as ring:
        ring.capture(1)
        ring.brace(4)
        digest = state.digest()
        _ = nn.init.ones_(model.weight)
        assert ring.steps() == (1,)
        with pytest.raises(SnapshotError, match="The state before step 6 was not captured"):
            ring.adopt(5)
        ring.adopt(4)
        assert ring.steps() == (1, 4)
        with pytest.raises(SnapshotError, match="The state before step 5 was not captured"):
            ring.adopt(4)
        ring.restore(4)
        assert state.digest() == digest
        held = ring.nbytes
        ring.brace(5)
        ring.brace(6)
        assert ring.nbytes == held + ring.slot(1).nbytes
        ring.evict(1)
        ring.adopt(6)
        ring.brace(7)
        assert ring.nbytes == held + ring.slot(4).nbytes
