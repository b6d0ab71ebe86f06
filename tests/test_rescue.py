"""A run that dies of something else than training: what is certified is durable, and the exception says what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kalmanguard import Supervisor
from kalmanguard.certificate.verify import verify
from kalmanguard.models.mlp import MLPPlant

TOO_MUCH = 1 << 50  # bytes; no machine has them


def train(plant: MLPPlant, guard: Supervisor, steps: int, kept: dict[int, list[Tensor]]) -> None:
    for _ in range(steps):
        loss = plant.step_loss(next(plant.loader))
        loss.backward()
        plant.optimizer.step()
        plant.optimizer.zero_grad()
        guard.update(loss)
        kept[guard.step] = weights(plant)


def weights(plant: MLPPlant) -> list[Tensor]:
    return [p.detach().clone() for p in plant.model.parameters()]


def die(plant: MLPPlant, run_dir: Path | None, steps: int, how: Callable[[], object]) -> dict[int, list[Tensor]]:
    kept: dict[int, list[Tensor]] = {}
    settings = {"probe_every": 10, "snapshot_every": 10}
    with Supervisor(plant.model, plant.probe_loader, run_dir=run_dir, settings=settings) as guard:
        train(plant, guard, steps, kept)
        how()
    return kept


def test_running_out_of_memory_says_what_to_do_and_leaves_a_state_to_resume_from(tmp_path: Path) -> None:
    plant, run_dir = MLPPlant(seed=0), tmp_path / "run"
    with pytest.raises(RuntimeError, match="memory") as caught:
        die(plant, run_dir, 87, lambda: torch.empty(TOO_MUCH, dtype=torch.uint8))
    (note,) = caught.value.__notes__
    assert "after step 87. The state of step 80 is certified and intact" in note
    assert str(run_dir) in note
    assert "gradient accumulation" in note
    assert verify(run_dir).exit_code != 0  # INCOMPLETE: the run did not end by itself
    other, twin = MLPPlant(seed=1), MLPPlant(seed=0)
    kept: dict[int, list[Tensor]] = {}
    with Supervisor(twin.model, twin.probe_loader) as guard:
        train(twin, guard, 80, kept)
    with Supervisor.resume(run_dir, other.model, other.probe_loader, optimizer=other.optimizer) as back:
        assert all(torch.equal(a, b) for a, b in zip(weights(other), kept[80], strict=True))
        train(other, back, 5, kept)
        assert back.step == 92  # records go on counting where the run died


def test_any_other_death_keeps_the_state_too_and_adds_no_note(tmp_path: Path) -> None:
    plant = MLPPlant(seed=0)
    with pytest.raises(ZeroDivisionError) as caught:
        die(plant, tmp_path / "run", 55, lambda: 1 / 0)
    assert not getattr(caught.value, "__notes__", [])
    last = weights(plant)
    with Supervisor.resume(tmp_path / "run", plant.model, plant.probe_loader, optimizer=plant.optimizer):
        assert not torch.equal(weights(plant)[0], last[0])  # step 50


def test_without_a_run_folder_the_note_names_no_place() -> None:
    def fail() -> None:
        raise MemoryError

    with pytest.raises(MemoryError) as caught:
        die(MLPPlant(seed=0), None, 3, fail)
    (note,) = caught.value.__notes__
    assert "after step 3" in note
    assert "resume" not in note


def test_an_overwritten_weight_that_no_probe_sees_is_undone_although_the_step_was_dropped() -> None:
    """A feature that only the batch of step 90 has: its weight, made huge, shows in one gradient and in no probe."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(7, 1, generator=generator)

    def draw(count: int, rare: float) -> tuple[torch.Tensor, torch.Tensor]:
        known = torch.randn(count, 7, generator=generator)
        target = known @ truth + 0.1 * torch.randn(count, 1, generator=generator)
        return torch.cat([known, torch.full((count, 1), rare)], dim=1), target

    torch.manual_seed(0)
    model = torch.nn.Linear(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    # A budget that lets the sketch be taken at every step, however small the model.
    settings = {"probe_every": 5, "budget": 0.5}
    with Supervisor(
        model, [draw(128, 0.0)], optimizer=optimizer, loss_fn=torch.nn.functional.mse_loss, settings=settings
    ) as supervisor:
        for step in range(1, 101):
            inputs, target = draw(32, float(step == 90))
            if step == 90:
                with torch.no_grad():
                    model.weight[0, 7] = 1e15
            torch.nn.functional.mse_loss(model(inputs), target).backward()
            optimizer.step()
            optimizer.zero_grad()
            decision = supervisor.update()
            if step == 90:
                assert decision.rolled_back, decision.reason
                assert "in a step that was dropped" in decision.reason
    assert float(model.weight.detach().abs().max()) < 10.0
