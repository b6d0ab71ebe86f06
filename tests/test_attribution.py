"""Attribution of a loss spike: the table of verdicts, and real plants with a hard batch, a broken weight, a bad sum.

Oracles: which fault was put in; bitwise comparison of everything that an evaluation could have left a trace in.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kalmanguard import Supervisor
from kalmanguard.detectors.attribution import AttributionResult, Cause, Certified, Usual, attribute
from kalmanguard.errors import ConfigurationError
from kalmanguard.journal.reader import JournalReader
from kalmanguard.models import Plant, load_plant
from kalmanguard.records import Action
from kalmanguard.sensors.reevaluation import BatchLoss, state_lent
from kalmanguard.settings import Settings
from kalmanguard.snapshots.state import TrainingState

USUAL = Usual(1.0, 0.1)


# -- the table --------------------------------------------------------------------------------------------------------


def verdict(reported: float | None, again: float, before: float, usual: Usual | None = USUAL) -> AttributionResult:
    return attribute(reported, usual, evaluate=lambda: again, certified=Certified(lambda: before, Usual(1.2, 0.1), 7))


@pytest.mark.parametrize(
    ("reported", "again", "before", "cause"),
    [
        (5.0, 5.0, 5.0, Cause.HARD_DATA),
        (5.0, 1.0, 5.0, Cause.HARD_DATA),  # its own step has taught it the batch
        (5.0, 5.0, 1.2, Cause.MODEL),
        (5.0, math.nan, 1.2, Cause.MODEL),
        (5.0, 1.0, 1.2, Cause.HARDWARE),
        (math.nan, 1.0, 1.2, Cause.HARDWARE),
        (math.inf, math.inf, 1.2, Cause.MODEL),
        (math.nan, math.nan, math.nan, Cause.HARD_DATA),
        (1.3, 1.3, 1.2, Cause.ABSTAIN),  # no spike
        (None, 1.0, 1.0, Cause.ABSTAIN),
        (1.5, 1.5, 1.5, Cause.ABSTAIN),  # within the noise of the certified state, but most of the height
        (5.0, 0.1, 0.1, Cause.ABSTAIN),  # not the loss of training
    ],
)
def test_verdicts(reported: float | None, again: float, before: float, cause: Cause) -> None:
    found = verdict(reported, again, before)
    assert found.cause is cause
    assert found.message.endswith(".")
    assert found.certified_step == 7
    if cause is not Cause.ABSTAIN:
        assert f"{again:.4g}" in found.message
        assert f"{before:.4g}" in found.message


def test_it_abstains_where_something_is_missing() -> None:
    assert "no certified state" in attribute(5.0, USUAL, evaluate=lambda: 1.0, certified=None).message
    assert "not known yet" in verdict(5.0, 1.0, 1.0, usual=None).message

    def fails() -> float:
        raise RuntimeError("out of memory")

    found = attribute(5.0, USUAL, evaluate=fails, certified=Certified(lambda: 1.0, USUAL))
    assert found.cause is Cause.ABSTAIN
    assert "out of memory" in found.message


def test_two_evaluations_that_differ_are_told_from_kernels_that_round_differently() -> None:
    values = iter([1.0, 1.0 + 1e-6, 1.0, 1.4])
    certified = Certified(lambda: 1.2, Usual(1.2, 0.1))
    assert "come out again" in attribute(5.0, USUAL, evaluate=lambda: next(values), certified=certified).message
    assert "two results" in attribute(5.0, USUAL, evaluate=lambda: next(values), certified=certified).message


def test_an_ordinary_case_costs_two_evaluations() -> None:
    calls = []
    certified = Certified(lambda: calls.append("certified") or 1.2, Usual(1.2, 0.1))
    attribute(5.0, USUAL, evaluate=lambda: calls.append("present") or 5.0, certified=certified)
    assert sorted(calls) == ["certified", "present"]


# -- without a trace --------------------------------------------------------------------------------------------------


class Restless(nn.Module):
    """Everything that may leave a trace: BatchNorm, dropout, tied and frozen weights, a buffer that is replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.second.bias.requires_grad_(False)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return self.drop(self.second(self.norm(self.first(x))))


def test_an_evaluation_leaves_no_trace() -> None:
    model = Restless()
    optimizer = torch.optim.AdamW(model.parameters())
    x, y = torch.randn(8, 4), torch.randint(0, 4, (8,))
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    model.norm.eval()
    state = TrainingState(model, optimizers=[optimizer], schedulers=[], include_gradients=True)
    other = {n: 1 + torch.rand(p.shape).to(p) for n, p in [*model.named_parameters(), *model.named_buffers()]}
    digest, modes = state.digest(), [m.training for m in model.modules()]
    calls, versions = model.calls, [p._version for p in model.parameters()]
    kept = {name: value.clone() for name, value in other.items()}
    losses = BatchLoss(model)
    first = losses.mean([(x, y)])
    assert losses.mean([(x, y)], other) != first
    assert losses.mean([(x, y)]) == first
    assert state.digest() == digest
    assert [m.training for m in model.modules()] == modes
    assert model.calls is calls
    assert [p._version for p in model.parameters()] == versions
    assert all(torch.equal(other[name], value) for name, value in kept.items())


def test_what_was_lent_comes_back_when_the_evaluation_fails() -> None:
    model = nn.Linear(2, 2)
    before = {name: p.clone() for name, p in model.named_parameters()}
    lent = {name: p + 1 for name, p in before.items()}

    def fail() -> None:
        with state_lent(model, lent):
            assert torch.equal(model.weight, lent["weight"])
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_state_of_another_model_is_refused_before_anything_changes() -> None:
    model = nn.Linear(2, 2)
    before = model.weight.clone()
    with pytest.raises(ConfigurationError, match="bias"), state_lent(model, {"weight": torch.zeros(2, 2)}):
        pass
    assert torch.equal(model.weight, before)


def test_several_batches_count_by_their_examples() -> None:
    model = nn.Linear(2, 3)
    x, y = torch.randn(10, 2), torch.randint(0, 3, (10,))
    losses = BatchLoss(model)
    assert losses.mean([(x[:2], y[:2]), (x[2:], y[2:])]) == pytest.approx(losses.mean([(x, y)]), rel=1e-6)
    with pytest.raises(ConfigurationError, match="no batch"):
        losses.mean([])


# -- real plants ------------------------------------------------------------------------------------------------------

STEPS = {"mlp": 80, "cnn": 80, "chartransformer": 110}


def last_layer(plant: Plant) -> nn.Linear:
    return [m for m in plant.model.modules() if isinstance(m, nn.Linear)][-1]


def flip_once(layer: nn.Linear, *, wrong: int) -> None:
    """One wrong number in one forward pass: a high bit of one output."""

    def flip(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        handle.remove()
        output = output.clone()
        output.view(-1, output.shape[-1])[0, wrong] += 2.0**16
        return output

    handle = layer.register_forward_hook(flip)


def fly(name: str, fault: str, *, seed: int = 0, known: bool = True, **options: Any) -> tuple[Supervisor, Plant, Any]:
    torch.manual_seed(seed)
    plant = load_plant(name)(seed=seed)
    settings = Settings(**{"probe_examples": 64, "probe_every": 10, "snapshot_every": 10, **options})
    supervisor = Supervisor(plant.model, plant.probe_loader, optimizer=plant.optimizer, settings=settings)
    generator = torch.Generator().manual_seed(seed)
    batch: Any = None
    last = STEPS[name]
    for step in range(1, last + 1):
        x, y = next(plant.loader)
        if step == last and fault == "garbage":
            low, high = x.min(), x.max()
            noise = torch.rand(x.shape, generator=generator)
            x = low + (high - low) * noise if x.is_floating_point() else (noise * int(high)).long()
            y = y.flatten()[torch.randperm(y.numel(), generator=generator)].view(y.shape)
        if step == last and fault == "weight":
            with torch.no_grad():
                last_layer(plant).weight.neg_()
        if step == last and fault == "bit":
            flip_once(last_layer(plant), wrong=int(y.flatten()[0] + 1) % 10)
        batch = (x, y)
        loss = plant.step_loss(batch)
        plant.optimizer.zero_grad()
        loss.backward()
        plant.optimizer.step()
        supervisor.update(loss.detach(), batch=batch if known else None)
    return supervisor, plant, batch


@pytest.mark.parametrize("name", ["mlp", "cnn", pytest.param("chartransformer", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("fault", "cause"), [("garbage", Cause.HARD_DATA), ("weight", Cause.MODEL), ("bit", Cause.HARDWARE)]
)
def test_a_spike_is_put_down_to_its_cause_by_itself(name: str, fault: str, cause: Cause) -> None:
    supervisor, _, batch = fly(name, fault)
    with supervisor:
        assert supervisor._loop.attributor.result is not None  # before anybody asked
        found = supervisor.attribute()
        assert found.cause is cause, found.message
        assert found.step == STEPS[name]
        assert found.certified_step is not None
        assert found.certified_step < STEPS[name]
        assert supervisor.attribute(batch) is found
        notes = [text for step, text in supervisor._loop.events if step == STEPS[name]]
        assert found.message in notes


def test_a_healthy_run_is_never_attributed() -> None:
    supervisor, _, _ = fly("mlp", "none")
    with supervisor:
        assert supervisor._loop.attributor.result is None
        found = supervisor.attribute()
        assert found.cause is Cause.ABSTAIN
        assert "no spike" in found.message


def test_attribution_changes_nothing() -> None:
    """Dropout, BatchNorm and Adam after a hard batch: bitwise those of a run in which no batch was known."""
    runs = [fly("cnn", "garbage", known=known) for known in (True, False)]
    states = []
    for supervisor, plant, _ in runs:
        with supervisor:
            assert (supervisor._loop.attributor.result is not None) == (supervisor is runs[0][0])
            training = TrainingState(plant.model, optimizers=[plant.optimizer], schedulers=[])
            states.append((training.digest(rng=False), plant.model.training))
    assert states[0] == states[1]


def test_by_hand_without_a_batch_or_a_certified_state_it_says_what_is_missing() -> None:
    supervisor, _, batch = fly("mlp", "garbage", known=False)
    with supervisor:
        assert "update(loss, batch=...)" in supervisor.attribute().message
        assert supervisor.attribute(batch).cause is Cause.HARD_DATA
    supervisor, _, batch = fly("mlp", "garbage", mode="observe")
    with supervisor:
        assert "no certified state" in supervisor.attribute().message


def test_after_a_rollback_the_present_state_is_not_asked() -> None:
    supervisor, _, batch = fly("mlp", "weight", known=False)
    with supervisor:
        assert supervisor._loop.last is not None
        assert supervisor._loop.last.action is Action.ROLLBACK
        assert "was restored" in supervisor.attribute(batch).message


def test_a_batch_of_another_kind_abstains_in_a_sentence() -> None:
    supervisor, _, _ = fly("mlp", "garbage", known=False)
    with supervisor:
        found = supervisor.attribute("nonsense")
        assert found.cause is Cause.ABSTAIN
        assert "could not be evaluated" in found.message


def test_batches_are_remembered_by_iterating() -> None:
    plant = load_plant("mlp")(seed=0)
    with Supervisor(plant.model, plant.probe_loader, optimizer=plant.optimizer) as supervisor:
        seen = []
        for step, batch in enumerate(supervisor.batches(plant.loader), 1):
            seen.append(batch)
            loss = plant.step_loss(batch)
            loss.backward()
            if step % 2 == 0:  # accumulated over two batches
                plant.optimizer.step()
                plant.optimizer.zero_grad()
            supervisor.update(loss.detach())
            if step == 6:
                break
        held = supervisor._loop.attributor._batches
        assert len(held) == 2
        assert all(one is two for one, two in zip(held, seen[-2:], strict=True))


def test_the_verdict_stands_in_the_journal(tmp_path: Any) -> None:
    torch.manual_seed(0)
    plant = load_plant("mlp")(seed=0)
    settings = Settings(probe_examples=64, probe_every=10, snapshot_every=10)
    with Supervisor(
        plant.model, plant.probe_loader, optimizer=plant.optimizer, settings=settings, run_dir=tmp_path
    ) as s:
        for step in range(1, 81):
            x, y = next(plant.loader)
            if step == 80:
                x = 3.0 * torch.randn(x.shape)
            loss = plant.step_loss((x, y))
            plant.optimizer.zero_grad()
            loss.backward()
            plant.optimizer.step()
            s.update(loss.detach(), batch=(x, y))
    with JournalReader(tmp_path) as reader:
        notes = [row.data() for row in reader.rows() if row.kind == "note"]
    [note] = [note for note in notes if "cause" in note]
    assert note["cause"] == "HARD_DATA"
