"""What the records call durable is on disk, and a restart takes it up; in one process, on a small network and digits.

Oracles: the checkpoint's own files and digests, the verifier, and what the journal of the first process has said.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kalmanguard import Supervisor
from kalmanguard.certificate.verify import FAILED, HOLDS, INCOMPLETE, NOT_CLAIMED, verify
from kalmanguard.cli.summary import summarise
from kalmanguard.errors import JournalError, SnapshotError
from kalmanguard.journal import JournalReader, JournalWriter
from kalmanguard.journal.database import holds_run
from kalmanguard.models import load_plant
from kalmanguard.replay import replay
from kalmanguard.snapshots.disk import ANCHOR, CheckpointStore

SETTINGS: dict[str, Any] = {
    "probe_examples": 64, "fresh_examples": 32, "probe_every": 5, "snapshot_every": 10, "checkpoint_share": 0.5,
}  # fmt: skip


def restarted(folder: Path, steps: int, **settings: Any) -> Supervisor:
    """A script that is started again: it makes everything anew, and trains until ``steps``; not closed."""
    plant = load_plant("mlp")(seed=0)
    torch.manual_seed(3)
    supervisor = Supervisor.resume_or_start(
        folder, plant.model, plant.probe_loader, optimizer=plant.optimizer, loader=plant.loader,
        settings={**SETTINGS, **settings},
    )  # fmt: skip
    while supervisor.step < steps:
        supervisor.update(plant.train_step(next(plant.loader)))
    return supervisor


def durable(folder: Path) -> list[dict[str, Any]]:
    with JournalReader(folder) as reader:
        return [row.data() for row in reader.rows("durable")]


def test_a_script_that_is_started_again_goes_on_by_itself(tmp_path: Path) -> None:
    first = restarted(tmp_path / "run", 40)
    assert first.resumed_from is None
    first.close()
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    last = durable(tmp_path / "run")[-1]["state"]
    second = restarted(tmp_path / "run", 60)
    assert second.resumed_from == last == 40
    second.close()
    step, _, _ = store.load_last_clean()
    said = durable(tmp_path / "run")
    assert (said[-1]["state"], said[-1]["manifest_sha256"]) == (step, store.last_clean_digest())
    report = verify(tmp_path / "run")
    assert report["durable"].status == HOLDS
    assert "found again by a resume: 1;" in report["durable"].text
    assert report.exit_code == 0
    assert replay(tmp_path / "run").identical


def test_a_run_that_dies_right_after_a_resume_is_resumed_from_the_same_state(tmp_path: Path) -> None:
    """The state that it stood at then is kept under the step that it is of."""
    first = restarted(tmp_path, 40)
    at_40 = [parameter.detach().clone() for parameter in first.model.parameters()]
    first.close()
    second = restarted(tmp_path, 43)
    assert second._loop.actuator.ring.steps() == (40,)
    assert second._loop.actuator.wait_for_checkpoint()
    second._abandon()
    assert {record["state"] for record in durable(tmp_path)[-2:]} == {40}
    third = restarted(tmp_path, 0)
    assert (third.resumed_from, third.step) == (40, 40)
    for mine, kept in zip(third.model.parameters(), at_40, strict=True):
        assert torch.equal(mine, kept)
    third.close()


def test_a_run_that_died_before_its_first_checkpoint_begins_anew(tmp_path: Path) -> None:
    """Its journal goes on, so both beginnings stand in it."""
    run = tmp_path / "run"
    restarted(run, 3, mode="observe")._abandon()  # it observes: nothing is certified, nothing kept
    assert not CheckpointStore(run / "checkpoints").holds_clean
    plant = load_plant("mlp")(seed=0)
    with pytest.raises(SnapshotError, match="anchor of the last clean checkpoint is missing"):
        Supervisor.resume(run, plant.model, plant.probe_loader, optimizer=plant.optimizer, settings=SETTINGS)
    again = restarted(run, 30)
    assert again.resumed_from is None
    assert again.step == 30
    whole = restarted(tmp_path / "whole", 30)
    for mine, other in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, other)
    again.close()
    whole.close()
    with JournalReader(run) as reader:
        assert [m.step for m, _ in reader.steps() if m.learning_rates] == [1, 2, 3, *range(1, 31)]
    assert summarise(run).marks == ["step 0: begun anew, for no checkpoint had been written"]
    assert verify(run).exit_code == 0
    assert replay(run).identical


def test_progress_is_never_given_up_silently(tmp_path: Path) -> None:
    restarted(tmp_path, 20).close()
    (tmp_path / "checkpoints" / ANCHOR).rename(tmp_path / "elsewhere")
    with pytest.raises(SnapshotError, match="anchor of the last clean checkpoint is missing"):
        restarted(tmp_path, 30)
    (tmp_path / "elsewhere").rename(tmp_path / "checkpoints" / ANCHOR)
    for tensors in (tmp_path / "checkpoints").glob("slot-*/tensors.safetensors"):
        tensors.write_bytes(tensors.read_bytes()[:-1])
    with pytest.raises(SnapshotError, match="truncated"):
        restarted(tmp_path, 30)
    (tmp_path / "journal.sqlite").write_bytes(b"no journal" * 100)
    with pytest.raises(JournalError):
        restarted(tmp_path, 30)


def test_whether_a_folder_holds_a_run(tmp_path: Path) -> None:
    assert not holds_run(tmp_path)
    (tmp_path / "journal.sqlite").touch()
    assert not holds_run(tmp_path)
    with JournalWriter(tmp_path) as journal:
        assert not holds_run(tmp_path)
        journal.write_header({"format": 1})
        assert holds_run(tmp_path)
    assert holds_run(tmp_path / "journal.sqlite")


def test_what_could_not_be_written_is_told_and_not_called_durable(tmp_path: Path) -> None:
    supervisor = restarted(tmp_path, 25)
    assert supervisor._loop.actuator.wait_for_checkpoint()
    before = durable(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.warns(UserWarning, match="a checkpoint was not written, or not recorded: FileNotFoundError"):
        supervisor.close()
    assert supervisor.statistics()["errors"] == 1
    assert durable(tmp_path) == before
    with JournalReader(tmp_path) as reader:
        assert [row.kind for row in reader.rows()][-1] == "close"


def test_a_run_that_runs_out_of_memory_promises_what_is_on_disk(tmp_path: Path) -> None:
    def runs_out(folder: Path, *, disk: bool) -> None:
        with restarted(folder, 25) as supervisor:
            supervisor._loop.actuator.wait_for_checkpoint()
            if not disk:
                shutil.rmtree(folder / "checkpoints")
            raise torch.OutOfMemoryError("out of memory")

    def dies(folder: Path, *, disk: bool) -> str:
        with pytest.raises(torch.OutOfMemoryError) as caught:
            runs_out(folder, disk=disk)
        return " ".join(caught.value.__notes__)

    assert "Supervisor.resume continues from it" in dies(tmp_path / "good", disk=True)
    step = durable(tmp_path / "good")[-1]["state"]
    assert f"The state of step {step} is certified" in dies(tmp_path / "again", disk=True)
    with pytest.warns(UserWarning, match="a checkpoint was not written"):
        note = dies(tmp_path / "full", disk=False)
    assert "Supervisor.resume continues" not in note
    assert verify(tmp_path / "full")["run"].status == INCOMPLETE


def test_fresh_examples_are_used_once_in_all_lives_of_a_run(tmp_path: Path) -> None:
    first = restarted(tmp_path, 40)
    first._loop.actuator.wait_for_checkpoint()
    first.certificate()  # bets, after the last checkpoint was written
    assert first.statistics()["fresh_examples_left"] == 0
    first._abandon()
    second = restarted(tmp_path, 60)
    assert second.statistics()["fresh_examples_left"] == 0
    second.certificate()
    more = [(torch.randn(8, 64), torch.zeros(8, dtype=torch.long))]
    second.certificate(more)
    second.close()
    with JournalReader(tmp_path) as reader:
        bets = [row.data() for row in reader.rows("fresh")]
    assert [bet["index"] for bet in bets] == [1, 2]
    assert bets[1]["first"] == 32
    assert verify(tmp_path)["C3"].status != FAILED


# -- the verifier ------------------------------------------------------------------------------------------------------

HEADER: dict[str, Any] = {
    "format": 1, "statistics": [], "certificate": {}, "probe": {},
    "settings": {"give_back": 0.2, "standard_errors": 3.0, "floor_frac": 0.0, "run_length": 1e4, "rollback_budget": 3},
}  # fmt: skip


def test_the_verifier_says_what_was_recorded_as_durable(tmp_path: Path) -> None:
    with JournalWriter(tmp_path) as journal:
        journal.write_header(HEADER)
    assert verify(tmp_path)["durable"].status == NOT_CLAIMED
    with JournalWriter.resume(tmp_path) as journal:
        journal.record("durable", 12, {"state": 10, "clean": True, "manifest_sha256": "ab" * 32})
        journal.record("durable", 14, {"state": 14, "clean": False, "manifest_sha256": "cd" * 32})
    claim = verify(tmp_path)["durable"]
    assert claim.status == HOLDS
    assert (
        "Recorded: 1, of them found again by a resume: 0; the last is the state of step 10, manifest abab" in claim.text
    )
    with JournalWriter.resume(tmp_path) as journal:
        journal.record("durable", 14, {"state": 15, "clean": True, "manifest_sha256": "ef" * 32})
    claim = verify(tmp_path)["durable"]
    assert (claim.status, claim.steps) == (FAILED, (14,))


@pytest.mark.parametrize("resume", [False, True])
def test_a_rollback_that_death_has_cut_off_is_void_after_a_resume_alone(resume: bool, tmp_path: Path) -> None:
    from kalmanguard.records import Action, Decision, Level, Measurement, Mode

    rollback = Decision(5, Action.ROLLBACK, Action.ROLLBACK, Level.CONFIRMED, Mode.RECOVERING, "down")
    with JournalWriter(tmp_path) as journal:
        journal.write_header(HEADER)
        journal.step(Measurement(step=5, learning_rates=(0.1,), velocity=np.zeros(2)), rollback)
        journal.record("intent", 5, {"action": "ROLLBACK", "restore": 3})
        if resume:
            journal.record("resume", 3, {"step": 3})
    claim = verify(tmp_path)["C2"]
    assert claim.status == (NOT_CLAIMED if resume else "LAPSED")
    assert ("which a resume has made void: 1" in claim.text) == resume
    assert ("Rollbacks without an outcome: 1" in claim.text) != resume


def test_registered_objects_come_back_with_a_resumed_run(tmp_path: Path) -> None:
    def made() -> tuple[torch.nn.Module, torch.optim.Optimizer, torch.optim.swa_utils.AveragedModel]:
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 1)
        average = torch.optim.swa_utils.AveragedModel(model)
        return model, torch.optim.SGD(model.parameters(), lr=0.05), average

    inputs = torch.randn(64, 4)
    held_out = [(inputs, inputs.sum(1, keepdim=True))]
    model, optimizer, average = made()
    with Supervisor(
        model, held_out, optimizer=optimizer, extras={"average": average}, run_dir=tmp_path / "run"
    ) as supervisor:
        for _ in range(30):
            torch.nn.functional.mse_loss(model(inputs), inputs.sum(1, keepdim=True)).backward()
            optimizer.step()
            optimizer.zero_grad()
            average.update_parameters(model)
            supervisor.update()
        supervisor.snapshot()
    kept = {name: value.clone() for name, value in average.state_dict().items()}
    model, optimizer, average = made()
    with pytest.raises(SnapshotError, match="no longer registered"):
        Supervisor.resume(tmp_path / "run", model, held_out, optimizer=optimizer)
    with Supervisor.resume(tmp_path / "run", model, held_out, optimizer=optimizer, extras={"average": average}):
        for name, value in average.state_dict().items():
            assert torch.equal(value, kept[name]), name
