"""Replay: every decision comes out of the journal's measurements again, bit for bit, wherever it is replayed.

Runs are real (the MLP on digits, with faults); what is changed in them is changed in the journal's own bytes.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kalmanguard import FaultInjector, Settings, Supervisor
from kalmanguard.engine import STATISTICS, Engine
from kalmanguard.errors import JournalError
from kalmanguard.journal.codec import HEAD, pack
from kalmanguard.journal.reader import JournalReader
from kalmanguard.journal.schema import FILE_NAME
from kalmanguard.journal.writer import JournalWriter
from kalmanguard.models import MLPPlant
from kalmanguard.records import Action, Level, Measurement, ProbeReading
from kalmanguard.replay import replay

FAULTS = ("lr_spike:50@61:steps=5", "nan_gradient@97", "gradient_scale:1000@113")


def train(folder: Path, *, steps: int, by_hand: Callable[[Supervisor], None] | None = None, **changes: object) -> None:
    """Train under supervision with every fault; ``by_hand`` is done after step 80."""
    plant = MLPPlant(seed=0)
    injector = FaultInjector.parse(FAULTS)
    settings = Settings(**{"on_halt": "return", "probe_every": 7, "snapshot_every": 13, **changes})
    with (
        injector.attach(plant.model, plant.optimizer),
        Supervisor(plant.model, plant.probe_loader, optimizer=plant.optimizer, settings=settings, run_dir=folder) as s,
    ):
        fly(plant, injector, s, range(1, steps + 1), by_hand)


def fly(
    plant: MLPPlant,
    injector: FaultInjector,
    supervisor: Supervisor,
    steps: range,
    by_hand: Callable[[Supervisor], None] | None = None,
) -> None:
    for step in steps:
        loss = plant.step_loss(injector.draw(next(plant.loader)))
        loss.backward()
        plant.optimizer.step()
        plant.optimizer.zero_grad()
        supervisor.update(loss)
        if step == 80 and by_hand is not None:
            by_hand(supervisor)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replay") / "run"
    train(folder, steps=140)
    return folder


@pytest.fixture
def copy(recorded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(recorded, tmp_path / "copy"))


def edit(folder: Path, seq: int, change: Callable[[bytearray, bytearray], None]) -> None:
    """Change a step's bytes, as someone would who wants to hide something."""
    connection = sqlite3.connect(folder / FILE_NAME)
    body, blob = connection.execute("SELECT body, blob FROM records WHERE seq = ?", (seq,)).fetchone()
    new_body, new_blob = bytearray(body), bytearray(blob)
    change(new_body, new_blob)
    connection.execute("UPDATE records SET body = ?, blob = ? WHERE seq = ?", (bytes(new_body), bytes(new_blob), seq))
    connection.commit()
    connection.close()


def step_record(folder: Path, wanted: Callable[[Measurement], bool]) -> int:
    with JournalReader(folder) as reader:
        pairs = zip(reader.rows("step"), reader.steps(), strict=True)
        return next(row.seq for row, (measurement, _) in pairs if wanted(measurement))


def test_a_run_with_faults_is_decided_again_bit_for_bit(recorded: Path) -> None:
    report = replay(recorded)
    with JournalReader(recorded) as reader:
        decisions = [decision for _, decision in reader.steps()]
    assert {Action.VETO, Action.ROLLBACK} <= {decision.action for decision in decisions}, "the faults must matter"
    assert report.identical
    assert report.decisions == len(decisions)
    assert report.first is None
    assert report.exit_code == 0
    assert report.recorded == report.replayed


@pytest.mark.parametrize("threads", ["1", "2"])
def test_another_process_decides_the_same_without_torch(recorded: Path, threads: str) -> None:
    code = (
        "import sys, json; sys.modules['torch'] = None\n"
        "from kalmanguard.replay import replay\n"
        "print(json.dumps(replay(sys.argv[1]).to_dict()))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(recorded)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env=os.environ | {"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads},
    )
    report = json.loads(done.stdout)
    assert report["identical"]
    assert report["decisions"] == replay(recorded).decisions


@pytest.mark.parametrize("name", ["z_loss", "y_best", "drift_m"])
def test_a_tampered_statistic_is_found(copy: Path, name: str) -> None:
    seq = step_record(copy, lambda m: m.step == 70 and m.outcome is None)
    place = 8 * (STATISTICS.index(name) - len(STATISTICS))

    def nudge(body: bytearray, blob: bytearray) -> None:
        end = place + 8 or None
        (value,) = np.frombuffer(blob[place:end], "<f8")
        new = math.nextafter(value, math.inf) if math.isfinite(value) else 1.5
        blob[place:end] = np.float64(new).astype("<f8").tobytes()

    edit(copy, seq, nudge)
    report = replay(copy)
    assert report.exit_code == 1
    assert report.differing == 1
    assert report.differing_actions == 0
    assert report.first is not None
    assert (report.first.record, report.first.step, report.first.field) == (seq, 70, f"statistics.{name}")
    assert f"step 70 (record {seq}): statistics.{name} is" in str(report)


def test_a_hidden_veto_is_found(copy: Path) -> None:
    seq = step_record(copy, lambda m: m.veto == "nonfinite")

    def hide(body: bytearray, blob: bytearray) -> None:
        body[2] = body[3] = 0  # action and proposed: ACCEPT

    edit(copy, seq, hide)
    report = replay(copy)
    assert report.differing == report.differing_actions == 1
    assert report.first is not None
    assert (report.first.step, report.first.field) == (97, "proposed")
    assert (report.first.recorded, report.first.replayed) == ("ACCEPT", "VETO")


def test_a_changed_measurement_is_found(copy: Path) -> None:
    """A loss made harmless after the fact no longer leads to the decisions that were taken."""
    seq = step_record(copy, lambda m: m.step == 40)

    def soften(body: bytearray, blob: bytearray) -> None:
        at = HEAD.size - 6 * 8  # the first of the head's six float64 values
        body[at : at + 8] = np.float64(0.25).astype("<f8").tobytes()

    edit(copy, seq, soften)
    report = replay(copy)
    assert not report.identical
    assert report.first is not None
    assert report.first.step == 40


def lower_level(body: bytearray, blob: bytearray) -> None:
    assert body[4] == list(Level).index(Level.CONFIRMED)
    body[4] = list(Level).index(Level.NOMINAL)


def reword(body: bytearray, blob: bytearray) -> None:
    at = body.index(b"Step 97")
    body[at : at + 4] = b"STEP"


@pytest.mark.parametrize(("change", "field"), [(lower_level, "level"), (reword, "reason")])
def test_level_and_reason_are_compared(copy: Path, change: Callable[[bytearray, bytearray], None], field: str) -> None:
    edit(copy, step_record(copy, lambda m: m.veto == "nonfinite"), change)
    report = replay(copy)
    assert report.differing == 1
    assert report.first is not None
    assert report.first.field == field


def test_observe_mode_records_what_was_proposed_and_done(tmp_path: Path) -> None:
    train(tmp_path / "run", steps=120, mode="observe")
    with JournalReader(tmp_path / "run") as reader:
        decisions = [decision for _, decision in reader.steps()]
    proposed = {decision.proposed for decision in decisions}
    assert Action.ROLLBACK in proposed
    assert {d.action for d in decisions} == {Action.ACCEPT}
    report = replay(tmp_path / "run")
    assert report.identical
    assert report.recorded["ROLLBACK"] == sum(d.proposed is Action.ROLLBACK for d in decisions)


def test_in_observe_mode_a_recorded_rollback_is_a_contradiction(tmp_path: Path) -> None:
    train(tmp_path / "run", steps=70, mode="observe")
    with JournalReader(tmp_path / "run") as reader:
        rows = zip(reader.rows("step"), reader.steps(), strict=True)
        seq = next(row.seq for row, (_, d) in rows if d.proposed is Action.ROLLBACK)

    def pretend(body: bytearray, blob: bytearray) -> None:
        body[2] = body[3]  # action: what was proposed

    edit(tmp_path / "run", seq, pretend)
    report = replay(tmp_path / "run")
    assert report.first is not None
    assert (report.first.record, report.first.field) == (seq, "action")


def by_hand_reset(supervisor: Supervisor) -> None:
    supervisor.reset()


def by_hand_rollback(supervisor: Supervisor) -> None:
    supervisor.snapshot()
    supervisor.rollback()


def by_hand_objective(supervisor: Supervisor) -> None:
    supervisor.new_objective()


def by_hand_pause(supervisor: Supervisor) -> None:
    with supervisor.pause("a look around"):
        pass


@pytest.mark.parametrize("by_hand", [by_hand_reset, by_hand_rollback, by_hand_objective, by_hand_pause])
def test_what_is_done_by_hand_is_replayed(tmp_path: Path, by_hand: Callable[[Supervisor], None]) -> None:
    train(tmp_path / "run", steps=120, by_hand=by_hand)
    report = replay(tmp_path / "run")
    assert report.identical, str(report)
    assert report.decisions >= 120


def test_a_resumed_run_is_replayed_from_the_state_that_it_resumed_from(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(folder, steps=90)
    plant = MLPPlant(seed=0)
    injector = FaultInjector.parse(FAULTS)
    settings = Settings(on_halt="return", probe_every=7, snapshot_every=13)
    resumed = Supervisor.resume(folder, plant.model, plant.probe_loader, optimizer=plant.optimizer, settings=settings)
    with resumed as supervisor:
        first = supervisor.step + 1
        assert 1 < first <= 91
        with injector.attach(plant.model, plant.optimizer, first_step=first):
            fly(plant, injector, supervisor, range(first, 131))
    with JournalReader(folder) as reader:
        assert [row.kind for row in reader.rows("resume")] == ["resume"]
    report = replay(folder)
    assert report.identical, str(report)
    assert report.decisions >= 90 + (131 - first)


def test_a_journal_that_is_still_open_is_replayed_so_far(tmp_path: Path) -> None:
    plant = MLPPlant(seed=0)
    supervisor = Supervisor(plant.model, plant.probe_loader, optimizer=plant.optimizer, run_dir=tmp_path / "run")
    try:
        fly(plant, FaultInjector().attach(plant.model, plant.optimizer), supervisor, range(1, 11))
        supervisor._loop.journal.flush()
        report = replay(tmp_path / "run")
        assert report.identical
        assert report.decisions >= 11
    finally:
        supervisor.close()


# --- what if ----------------------------------------------------------------------------------------------------------


def test_a_what_if_with_the_same_settings_changes_nothing(recorded: Path) -> None:
    same = Settings(on_halt="return", probe_every=7, snapshot_every=13)
    report = replay(recorded, same)
    assert report.what_if
    assert report.identical
    assert report.unseen_probes == 0
    assert report.recorded == report.replayed


def test_a_what_if_says_what_other_settings_would_have_decided(recorded: Path) -> None:
    report = replay(recorded, Settings(probe_every=3, suspicion=1.5, give_back=0.01, warmup_steps=5))
    assert report.what_if
    assert report.differing > 0
    assert report.exit_code == 0
    assert report.replayed["SUSPECT"] > report.recorded.get("SUSPECT", 0)
    assert report.unseen_probes > 0
    assert {d.field for d in report.differences} <= {"proposed", "level"}
    assert any("would have taken" in note for note in report.notes)


# --- journals that no one can replay ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"format": 1, "statistics": []}, "holds no settings"),
        ({"format": 1, "statistics": [], "settings": {"warp": 9}}, "settings that this version does not have"),
    ],
)
def test_a_header_that_cannot_be_used_is_refused(tmp_path: Path, header: dict[str, object], message: str) -> None:
    with JournalWriter(tmp_path) as journal:
        journal.write_header(header)
    with pytest.raises(JournalError, match=message):
        replay(tmp_path)


def test_a_resume_without_its_state_is_refused(tmp_path: Path) -> None:
    with JournalWriter(tmp_path) as journal:
        journal.write_header({"format": 1, "statistics": [], "settings": Settings().model_dump(mode="json")})
        journal.record("resume", 5, {"step": 5})
    with pytest.raises(JournalError, match="without the state"):
        replay(tmp_path)


def test_no_journal_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="no journal"):
        replay(tmp_path)


# --- the fold alone ---------------------------------------------------------------------------------------------------


def synthetic(folder: Path, *, steps: int = 60) -> None:
    """A journal made by the engine alone: a loss that falls, a probe every fifth step."""
    rng = np.random.default_rng(0)
    settings = Settings(probe_every=5)
    engine, state = Engine(settings), Engine(settings).init()
    with JournalWriter(folder) as journal:
        journal.write_header(
            {"format": 1, "statistics": list(STATISTICS), "settings": settings.model_dump(mode="json")}
        )
        for step in range(1, steps + 1):
            level = 2.0 * math.exp(-step / 40) + 0.5
            measurement = Measurement(
                step=step,
                loss=level + 0.05 * rng.normal(),
                learning_rates=(0.1,),
                gradient_norm=math.exp(0.1 * rng.normal()),
                velocity=rng.normal(size=8),
            )
            if step % 5 == 0:
                probe = ProbeReading(level + 0.1 * rng.normal(size=16))
                measurement = Measurement(
                    **{f: getattr(measurement, f) for f in Measurement.__slots__} | {"probe": probe}
                )
            state, decision = engine.step(state, measurement)
            journal.step(measurement, decision)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    synthetic(folder)
    return folder


@given(step=st.integers(1, 60), place=st.integers(0, len(STATISTICS) - 1))
def test_no_statistic_can_be_changed_by_one_bit(plain: Path, step: int, place: int) -> None:
    """Of any step: the last bit of any statistic; nan, which has no value to change, becomes a number."""
    seq = step + 1
    connection = sqlite3.connect(plain / FILE_NAME)
    (before,) = connection.execute("SELECT blob FROM records WHERE seq = ?", (seq,)).fetchone()
    blob = bytearray(before)
    at = len(blob) - 8 * (len(STATISTICS) - place)
    (value,) = np.frombuffer(blob[at : at + 8], "<f8")
    if math.isnan(value):
        blob[at : at + 8] = bytes(8)
    else:
        blob[at] ^= 1
    try:
        connection.execute("UPDATE records SET blob = ? WHERE seq = ?", (bytes(blob), seq))
        connection.commit()
        report = replay(plain)
    finally:
        connection.execute("UPDATE records SET blob = ? WHERE seq = ?", (before, seq))
        connection.commit()
        connection.close()
    assert report.differing == 1
    assert report.first is not None
    assert (report.first.step, report.first.field) == (step, f"statistics.{STATISTICS[place]}")


def test_the_payload_of_a_nan_means_nothing(plain: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(plain, tmp_path / "copy"))

    def flip_sign(body: bytearray, blob: bytearray) -> None:
        values = np.frombuffer(blob[-8 * len(STATISTICS) :], "<f8")
        at = len(blob) - 8 * len(STATISTICS) + 8 * int(np.flatnonzero(np.isnan(values))[0])
        blob[at + 7] ^= 0x80

    edit(copy, 3, flip_sign)
    assert replay(copy).identical


def test_statistics_of_another_engine_are_named_as_such(tmp_path: Path) -> None:
    engine = Engine(Settings())
    with JournalWriter(tmp_path) as journal:
        journal.write_header({"format": 1, "statistics": ["y"], "settings": Settings().model_dump(mode="json")})
        measurement = Measurement(step=1, loss=1.0, learning_rates=(0.1,))
        decision = engine.step(engine.init(), measurement)[1]
        journal.step(measurement, decision, statistics=np.zeros(1).tobytes())
    report = replay(tmp_path)
    assert report.differing == 1
    assert any("another version" in note for note in report.notes)


def test_progress_reaches_the_last_record(recorded: Path) -> None:
    calls: list[tuple[int, int]] = []
    replay(recorded, progress=lambda done, total: calls.append((done, total)))
    with JournalReader(recorded) as reader:
        assert calls[-1] == (len(reader), len(reader))
    assert calls == sorted(calls)


def test_the_report_is_json(copy: Path) -> None:
    seq = step_record(copy, lambda m: m.step == 70 and m.outcome is None)

    def spoil(body: bytearray, blob: bytearray) -> None:
        blob[-8:] = np.array([np.inf], "<f8").tobytes()

    edit(copy, seq, spoil)
    data = json.loads(json.dumps(replay(copy).to_dict(), allow_nan=False))
    assert data["differences"][0]["recorded"] == "inf"
    assert data["exit_code"] == 1


def test_pack_is_what_is_compared(plain: Path) -> None:
    """The shortcut is sound: a decision that packs to the recorded bytes has the recorded fields."""
    with JournalReader(plain) as reader:
        for row, (measurement, decision) in zip(reader.rows("step"), reader.steps(), strict=True):
            assert pack(measurement, decision) == (row.body, row.blob)
