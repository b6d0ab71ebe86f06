"""The journal: exact round trips, a chain that any change breaks, and survival of what kills runs.

Oracles: the bits of every float (struct), SQLite's own view of the file, the digest of the file's bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from kalmanguard.errors import JournalError
from kalmanguard.journal import JournalReader, JournalWriter
from kalmanguard.journal.codec import HEAD, pack, unpack, unpack_statistics
from kalmanguard.journal.schema import APPLICATION_ID, GENESIS, SCHEMA_VERSION
from kalmanguard.journal.writer import BATCH, WAIT_S
from kalmanguard.records import (
    Action,
    Costs,
    Decision,
    Evidence,
    Guarantee,
    Level,
    Measurement,
    Mode,
    Orders,
    Outcome,
    ProbeReading,
)

# --- making records ---------------------------------------------------------------------------------------------------

#: Any 64 bits as a float: nan payloads, negative zero, infinities and denormals among them.
floats = st.integers(0, 2**64 - 1).map(lambda bits: struct.unpack("<d", struct.pack("<Q", bits))[0]) | st.sampled_from(
    [math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0, 5e-324, 1.5]
)
arrays = st.lists(floats, max_size=9).map(lambda values: np.array(values, dtype=np.float64))
steps = st.integers(0, 2**62)
texts = st.text(st.characters(), max_size=12)
maybe_text = st.none() | texts

outcomes = st.builds(
    Outcome,
    action=st.sampled_from(Action),
    restored_step=st.none() | steps,
    rung=st.integers(0, 9),
    digest_expected=maybe_text,
    digest_actual=maybe_text,
    manual=st.booleans(),
    error=maybe_text,
)
evidence = st.builds(
    Evidence, texts, floats, st.booleans(), st.sampled_from(Guarantee), texts, st.none() | floats, st.none() | floats
)
measurements = st.builds(
    Measurement,
    step=steps,
    loss=st.none() | floats,
    learning_rates=st.lists(floats, max_size=4).map(tuple),
    lr_factor=floats,
    gradient_norm=st.none() | floats,
    velocity=st.none() | arrays,
    rounding_floor=floats,
    buffer_norm=st.none() | floats,
    veto=st.sampled_from([None, "nonfinite", "explosion", "clipped"]) | texts,
    parameters_finite=st.booleans(),
    tampered=st.lists(texts, max_size=3).map(tuple),
    probe=st.none() | arrays.map(ProbeReading),
    outcome=st.none() | outcomes,
    costs=st.none() | st.builds(Costs, floats, floats, floats, st.integers(0, 1000)),
    objective=st.integers(0, 2**31),
    snapshot_failed=st.booleans(),
    braced=st.booleans(),
    findings=st.lists(evidence, max_size=2).map(tuple),
)
orders = st.builds(
    Orders,
    snapshot=st.booleans(),
    certified=st.booleans(),
    certify=st.lists(steps, max_size=3).map(tuple),
    evict=st.lists(steps, max_size=3).map(tuple),
    restore=st.none() | steps,
    rung=st.integers(0, 9),
    gate=floats,
    clip=st.booleans(),
    release=st.booleans(),
    adopt=st.booleans(),
    lasting=st.booleans(),
)
decisions = st.builds(
    Decision,
    step=steps,
    action=st.sampled_from(Action),
    proposed=st.sampled_from(Action),
    level=st.sampled_from(Level),
    mode=st.sampled_from(Mode),
    reason=texts,
    evidence=st.lists(evidence, max_size=3).map(tuple),
    restored_step=st.none() | steps,
    certificate=st.sampled_from(["HOLDS", "LAPSED"]) | texts,
    orders=orders,
    statistics=st.lists(floats, max_size=5).map(tuple),
)


def bits(value: object) -> object:
    """The value with every float replaced by its bits, so that == means equal bit for bit, types included."""
    if isinstance(value, float):
        return "float", struct.pack("<d", value)
    if isinstance(value, np.ndarray):
        return "array", str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, tuple):
        return tuple(bits(item) for item in value)
    if dataclasses.is_dataclass(value):
        return type(value), tuple(bits(getattr(value, field.name)) for field in dataclasses.fields(value))
    return type(value), value


def plain_step(step: int, **changes: Any) -> tuple[Measurement, Decision]:
    rng = np.random.default_rng(step)
    measurement = Measurement(step, loss=1.0 / step, learning_rates=(1e-3,), velocity=rng.normal(size=64), **changes)
    reason = f"Step {step} accepted: no innovation beyond its bound."
    return measurement, Decision(
        step, Action.ACCEPT, Action.ACCEPT, Level.NOMINAL, Mode.WATCHING, reason, statistics=tuple(rng.normal(size=14))
    )


def write_run(folder: Path, count: int = 5, *, close: bool = True) -> JournalWriter:
    journal = JournalWriter(folder)
    journal.write_header({"format": 1, "statistics": ["a"] * 14})
    for step in range(1, count + 1):
        journal.step(*plain_step(step))
    if close:
        journal.close({"steps": count})
    return journal


# --- codec ------------------------------------------------------------------------------------------------------------


@given(measurements, decisions)
def test_a_step_comes_back_bit_for_bit(measurement: Measurement, decision: Decision) -> None:
    got_measurement, got_decision = unpack(*pack(measurement, decision))
    assert bits(got_measurement) == bits(measurement)
    assert bits(got_decision) == bits(decision)


@given(measurements, decisions)
def test_packing_is_deterministic_and_its_own_inverse(measurement: Measurement, decision: Decision) -> None:
    packed = pack(measurement, decision)
    assert pack(*unpack(*packed)) == packed


def test_statistics_stand_at_the_end_of_the_blob() -> None:
    measurement, decision = plain_step(3)
    body, blob = pack(measurement, decision)
    np.testing.assert_array_equal(unpack_statistics(body, blob), decision.statistics)
    replaced = pack(measurement, decision, np.array([1.0, 2.0]).tobytes())
    assert unpack(*replaced)[1].statistics == (1.0, 2.0)
    assert replaced[1][:-16] == blob[: -8 * 14]


def test_arrays_of_other_layouts_are_kept_by_value() -> None:
    measurement, decision = plain_step(1)
    wide = np.arange(20, dtype=np.float64)
    for array in (wide[::2], wide[:10].astype(">f8"), wide[:10].astype(np.float32)):
        body, blob = pack(dataclasses.replace(measurement, velocity=array), decision)
        velocity = unpack(body, blob)[0].velocity
        assert velocity is not None
        assert velocity.dtype == np.float64
        np.testing.assert_array_equal(velocity, array)


@given(st.data())
def test_damaged_bytes_are_a_journal_error_or_another_step(data: st.DataObject) -> None:
    body, blob = pack(*plain_step(2))
    body = bytearray(body)
    for _ in range(data.draw(st.integers(1, 8))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(body)))
    for damaged in (bytes(body), bytes(body[:cut])):
        with suppress(JournalError):
            assert isinstance(unpack(damaged, blob)[0], Measurement)


def test_a_step_that_cannot_be_written_is_refused_whole() -> None:
    measurement, decision = plain_step(1)
    with pytest.raises(JournalError, match="Step 1 cannot be written"):
        pack(measurement, dataclasses.replace(decision, restored_step=2**70))
    with pytest.raises(JournalError, match="cannot be written"):
        pack(dataclasses.replace(measurement, loss="low"), decision)  # type: ignore[arg-type]
    with pytest.raises(JournalError, match="cannot be written"):
        pack(dataclasses.replace(measurement, loss=10**400), decision)


def test_a_newer_layout_is_refused() -> None:
    body, blob = pack(*plain_step(1))
    with pytest.raises(JournalError, match="layout version 2"):
        unpack(b"\x02" + body[1:], blob)
    assert len(body) > HEAD.size


# --- writing and reading ----------------------------------------------------------------------------------------------


def test_everything_written_is_read_back(tmp_path: Path) -> None:
    header = {"format": 1, "settings": {"modes": frozenset({"b", "a"}), "path": Path("x"), "n": np.int64(3)}}
    written = [plain_step(step, probe=ProbeReading(np.full(4, step, float))) for step in range(1, 600)]
    with JournalWriter(tmp_path / "run") as journal:
        journal.write_header(header)
        for index, step in enumerate(written):
            journal.step(*step)
            if index == 300:
                journal.record("intent", 301, {"restore": 250, "score": math.nan}, blob=b"\x00\xff")
                journal.sync()
        head_before = journal.head
        journal.close({"steps": 599})
    with JournalReader(tmp_path / "run") as reader:
        assert reader.header == {"format": 1, "settings": {"modes": ["a", "b"], "path": "x", "n": 3}}
        assert reader.complete
        assert [bits(pair) for pair in reader.steps()] == [bits(pair) for pair in written]
        (intent,) = reader.rows("intent")
        assert (intent.step, intent.blob, intent.data()["restore"]) == (301, b"\x00\xff", 250)
        assert math.isnan(intent.data()["score"])
        assert reader.check_chain() == len(reader) == len(list(reader.rows())) == 602
        assert reader.last.data() == {"rows": 602, "steps": 599}
        assert reader.head == journal.head != head_before
        assert [row.seq for row in reader.rows(start=600)] == [600, 601, 602]
        steps_and_statistics = list(reader.statistics())
        assert len(steps_and_statistics) == 599
        assert tuple(steps_and_statistics[4][1]) == written[4][1].statistics


def test_a_closed_journal_is_one_plain_file(tmp_path: Path) -> None:
    write_run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["journal.sqlite"]


def test_misuse_is_refused_in_a_sentence(tmp_path: Path) -> None:
    journal = JournalWriter(tmp_path)
    with pytest.raises(JournalError, match="header first"):
        journal.step(*plain_step(1))
    journal.write_header({"format": 1})
    with pytest.raises(JournalError, match="once, first"):
        journal.write_header({"format": 1})
    for kind in ("header", "step", "close", "two words", "", "naïve"):
        with pytest.raises(JournalError, match="not a kind"):
            journal.record(kind, 0, {})
    with pytest.raises(JournalError, match="cannot be written as JSON: object"):
        journal.record("note", 0, {"x": object()})
    assert journal.rows == 1
    journal.close()
    journal.close()
    with pytest.raises(JournalError, match="closed"):
        journal.record("note", 0, {})


def test_an_exception_in_the_run_leaves_the_journal_open_ended(tmp_path: Path) -> None:
    with suppress(ZeroDivisionError), JournalWriter(tmp_path) as journal:
        journal.write_header({"format": 1})
        raise ZeroDivisionError
    with JournalReader(tmp_path) as reader:
        assert not reader.complete
        assert reader.check_chain() == 1


def test_a_journal_without_a_folder_can_be_saved(tmp_path: Path) -> None:
    journal = JournalWriter(None)
    journal.write_header({"format": 1})
    for step in range(1, 400):
        journal.step(*plain_step(step))
    journal.sync()
    journal.save_copy(tmp_path / "copy")
    with JournalReader(tmp_path / "copy") as reader:
        assert reader.check_chain() == journal.rows == 400
        assert reader.head == journal.head
    assert [path.name for path in (tmp_path / "copy").iterdir()] == ["journal.sqlite"]
    with pytest.raises(JournalError, match="exists already"):
        journal.save_copy(tmp_path / "copy")
    journal.close()


def test_the_head_can_be_sealed(tmp_path: Path) -> None:
    journal = write_run(tmp_path / "run", close=False)
    journal.seal(tmp_path / "head.txt")
    assert (tmp_path / "head.txt").read_text() == f"{journal.head} 6\n"
    with pytest.raises(JournalError, match="cannot be written"):
        journal.seal(tmp_path / "missing" / "head.txt")
    journal.abandon()


def test_the_chain_is_the_documented_one(tmp_path: Path) -> None:
    """Recomputed here from the schema's description alone."""
    write_run(tmp_path)
    digest = GENESIS
    connection = sqlite3.connect(tmp_path / "journal.sqlite")
    for seq, kind, step, body, blob, stored in connection.execute("SELECT * FROM records ORDER BY seq"):
        raw = body.encode() if isinstance(body, str) else body
        text = digest + struct.pack("<qqIII", seq, step, len(kind), len(raw), len(blob)) + kind.encode() + raw + blob
        digest = hashlib.sha256(text).digest()
        assert digest == stored
    connection.close()


# --- one writer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("close", [True, False])
def test_a_run_is_never_overwritten(tmp_path: Path, close: bool) -> None:
    journal = write_run(tmp_path, close=close)
    before = (tmp_path / "journal.sqlite").read_bytes()
    with pytest.raises(JournalError, match=r"holds a run of \d records; pass resume"):
        JournalWriter(tmp_path)
    assert (tmp_path / "journal.sqlite").read_bytes() == before
    journal.abandon()


@pytest.mark.parametrize("close", [True, False])
def test_resume_continues_the_chain(tmp_path: Path, close: bool) -> None:
    write_run(tmp_path, close=close).abandon()
    with JournalWriter.resume(tmp_path) as journal:
        journal.record("resume", 5, {"step": 5})
        journal.step(*plain_step(6))
    with JournalReader(tmp_path) as reader:
        assert reader.check_chain() == 6 + close + 3
        assert [measurement.step for measurement, _ in reader.steps()] == [1, 2, 3, 4, 5, 6]
        assert reader.complete


def test_resume_needs_a_sound_run(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="no journal at"):
        JournalWriter.resume(tmp_path)
    assert not list(tmp_path.iterdir())
    JournalWriter(tmp_path).close()
    with pytest.raises(JournalError, match="holds no run to resume"):
        JournalWriter.resume(tmp_path)
    write_run(tmp_path)
    connection = sqlite3.connect(tmp_path / "journal.sqlite")
    connection.execute("UPDATE records SET step = 99 WHERE kind = 'close'")
    connection.commit()
    connection.close()
    with pytest.raises(JournalError, match="does not follow from the one before"):
        JournalWriter.resume(tmp_path)


def test_two_writers_cannot_fork_the_chain(tmp_path: Path) -> None:
    first = write_run(tmp_path, close=False)
    second = JournalWriter.resume(tmp_path)
    first.step(*plain_step(6))
    first.flush()
    with pytest.raises(JournalError, match="one writer"):
        second.record("note", 7, {})
    second.step(*plain_step(8))  # raised once; from then on it is silent
    assert second.failed
    second.close()
    first.step(*plain_step(7))
    first.close()
    with JournalReader(tmp_path) as reader:
        assert reader.check_chain() == 9
        assert [measurement.step for measurement, _ in reader.steps()] == [1, 2, 3, 4, 5, 6, 7]


def test_a_reader_follows_the_writer_and_never_blocks_it(tmp_path: Path) -> None:
    journal = write_run(tmp_path, count=1, close=False)
    journal.flush()
    with JournalReader(tmp_path) as reader:
        seen = 0
        rows = reader.rows()
        next(rows)
        for step in range(2, 1500):
            journal.step(*plain_step(step))
            if step % 300 == 0:
                journal.flush()
                assert len(reader) == step + 1
                assert reader.check_chain() == step + 1 > seen
                seen = step + 1
        # An iteration ends where the journal ended when it began.
        assert len(list(rows)) == 1
        assert not reader.complete
        journal.close()
        assert reader.complete
        assert reader.check_chain() == 1501


def test_uneventful_steps_wait_for_each_other_but_not_for_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr("kalmanguard.journal.writer.time.monotonic", lambda: clock[0])
    journal = JournalWriter(tmp_path)
    journal.write_header({"format": 1})
    with JournalReader(tmp_path) as reader:
        journal.step(*plain_step(1))
        assert len(reader) == 2, "the first of a loop that may be slow"
        journal.step(*plain_step(2))
        journal.step(*plain_step(3))
        assert (len(reader), journal.rows) == (2, 4)
        measurement, decision = plain_step(4)
        journal.step(measurement, dataclasses.replace(decision, level=Level.SUSPECT))
        assert len(reader) == journal.rows == 5
        journal.step(*plain_step(5))
        assert len(reader) == 5
        for step in range(6, 9):
            clock[0] += WAIT_S
            journal.step(*plain_step(step))
            assert len(reader) == journal.rows == step + 1, "a slow loop keeps nothing back"
        journal.step(*plain_step(9))
        journal.record("note", 9, {})
        assert len(reader) == 11
        for step in range(10, 10 + BATCH):
            assert len(reader) == 11
            journal.step(*plain_step(step))
        assert len(reader) == 11 + BATCH
        journal.step(*plain_step(10 + BATCH))
        assert journal.head == list(reader.rows())[-1].digest.hex()
        journal.step(*plain_step(11 + BATCH))
        journal.abandon()
        assert reader.check_chain() == 13 + BATCH


def test_the_closing_record_counts_the_steps_that_waited(tmp_path: Path) -> None:
    journal = JournalWriter(tmp_path)
    journal.write_header({"format": 1})
    for step in range(1, 6):
        journal.step(*plain_step(step))
    journal.close()
    with JournalReader(tmp_path) as reader:
        last = list(reader.rows())[-1]
        assert (last.kind, last.step, last.data()["rows"]) == ("close", 5, 7) == ("close", 5, len(reader))


def test_an_interrupt_loses_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> bytes:
        raise KeyboardInterrupt

    journal = JournalWriter(tmp_path)
    journal.write_header({"format": 1})
    journal.step(*plain_step(1))
    with monkeypatch.context() as patch:
        patch.setattr("kalmanguard.journal.writer.chained", interrupted)
        for step in range(2, 4):
            journal.step(*plain_step(step))
        with pytest.raises(KeyboardInterrupt):
            journal.flush()
    journal.step(*plain_step(4))
    journal.close()
    with JournalReader(tmp_path) as reader:
        assert [m.step for m, _ in reader.steps()] == [1, 2, 3, 4]
        assert reader.complete


def test_a_forked_child_writes_nothing(tmp_path: Path) -> None:
    journal = JournalWriter(tmp_path)
    journal.write_header({"format": 1})
    for step in range(1, 4):
        journal.step(*plain_step(step))
    journal._process += 1  # as it looks from a child
    journal.flush()
    journal._process -= 1
    with JournalReader(tmp_path) as reader:
        assert len(reader) == 2


# --- what kills runs --------------------------------------------------------------------------------------------------

WRITER = """
import sys, numpy as np
from kalmanguard.journal import JournalWriter
from kalmanguard.records import *
journal = JournalWriter(sys.argv[1])
journal.write_header({"format": 1, "statistics": [], "settings": {}})
velocity = np.arange(64.0)
step = 0
while True:
    step += 1
    probe = ProbeReading(np.full(256, step, float)) if step % 7 == 0 else None
    journal.step(
        Measurement(step, loss=1.0, velocity=velocity, probe=probe),
        Decision(
            step, Action.ACCEPT, Action.ACCEPT, Level.NOMINAL if step % 25 else Level.SUSPECT, Mode.WATCHING, "fine"
        ),
    )
    if step % 40 == 0:
        journal.sync()
    sys.stdout.buffer.write(step.to_bytes(8, "little"))
    sys.stdout.buffer.flush()
"""


def test_kill_9_loses_uneventful_steps_of_the_last_moment_only(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for attempt in range(4):
        folder = tmp_path / f"run{attempt}"
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(folder)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.read(8)  # the first step is written: from here on, any moment will do
        deadline = time.perf_counter() + rng.uniform(0.0, 0.25)
        reported = (1).to_bytes(8, "little")
        while time.perf_counter() < deadline:
            reported = process.stdout.read(8)
        process.send_signal(signal.SIGKILL)
        reported += process.stdout.read()
        process.stdout.close()
        process.wait()
        with JournalReader(folder) as reader:
            rows = reader.check_chain()
            assert not reader.complete
            assert [m.step for m, _ in reader.steps()] == list(range(1, rows))
            last = int.from_bytes(reported[-8:], "little")
            assert rows - 1 >= max(last - last % 25, last - last % 40), "a suspicion or a sync was lost"
            assert rows - 1 > last - BATCH
        with JournalWriter.resume(folder) as journal:
            journal.step(*plain_step(rows))
        with JournalReader(folder) as reader:
            assert reader.check_chain() == rows + 2


FULL_DISK = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
import numpy as np
from kalmanguard.errors import JournalError
from kalmanguard.journal import JournalWriter
from kalmanguard.records import *
journal = JournalWriter(sys.argv[1])
journal.write_header({"format": 1})
raised = 0
for step in range(1, 500):
    try:
        journal.step(
            Measurement(step, velocity=np.arange(64.0)),
            Decision(step, Action.ACCEPT, Action.ACCEPT, Level.NOMINAL, Mode.WATCHING, "fine"),
        )
        journal.flush()
    except JournalError as error:
        raised += 1
        message, rows = str(error), journal.rows
assert raised == 1 and journal.failed == message and journal.rows == rows
journal.record("note", 0, {}); journal.sync(); journal.close()
print(rows, message)
"""


def test_a_full_disk_is_said_once_and_leaves_whole_rows(tmp_path: Path) -> None:
    """A limit on the file's size stands in for the full disk: the write itself fails, in the kernel."""
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    rows, _, message = done.stdout.partition(" ")
    assert "cannot be written" in message
    assert "full" in message
    with JournalReader(tmp_path) as reader:
        assert reader.check_chain() == int(rows) > 10
        assert not reader.complete


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file" / "run", Path("/proc/kalmanguard")):
        with pytest.raises(JournalError, match="cannot be opened for writing"):
            JournalWriter(folder)


READ_ONLY = """
import os, sys
from kalmanguard.errors import JournalError
from kalmanguard.journal import JournalReader, JournalWriter
if os.getuid() == 0:  # root may write anywhere: become nobody
    os.setgid(65534), os.setuid(65534)
assert not os.access(sys.argv[1], os.W_OK)
with JournalReader(sys.argv[1]) as reader:
    assert reader.check_chain() == 7 and reader.complete
try:
    JournalWriter.resume(sys.argv[1])
except JournalError as error:
    print(error)
"""


def test_a_closed_journal_is_readable_in_a_read_only_folder() -> None:
    folder = Path(tempfile.mkdtemp())
    try:
        write_run(folder)
        folder.chmod(0o555)
        (folder / "journal.sqlite").chmod(0o444)
        done = subprocess.run(
            [sys.executable, "-c", READ_ONLY, str(folder)], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "cannot be opened for writing" in done.stdout
        assert "read-only" in done.stdout
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder)


# --- files that are no journal ----------------------------------------------------------------------------------------


def foreign(kind: str, file: Path) -> None:
    if kind == "text":
        file.write_text("step,loss\n" * 500)
    elif kind == "database":
        connection = sqlite3.connect(file)
        connection.execute("CREATE TABLE records (seq INTEGER PRIMARY KEY, kind TEXT)")
        connection.commit()
        connection.close()
    elif kind == "newer":
        write_run(file.parent)
        connection = sqlite3.connect(file)
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
        connection.commit()
        connection.close()


@pytest.mark.parametrize(
    ("kind", "message"),
    [("text", "not an SQLite database"), ("database", "of another program"), ("newer", "newer kalmanguard")],
)
def test_what_is_no_journal_is_refused_and_left_alone(tmp_path: Path, kind: str, message: str) -> None:
    file = tmp_path / "journal.sqlite"
    foreign(kind, file)
    before = file.read_bytes()
    for attempt in (JournalReader, JournalWriter, JournalWriter.resume):
        with pytest.raises(JournalError, match=message):
            attempt(tmp_path)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_missing_and_empty_journals_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="no journal at"):
        JournalReader(tmp_path)
    JournalWriter(tmp_path).close()
    with pytest.raises(JournalError, match="holds no record yet"):
        JournalReader(tmp_path)
    # A run that died before its header may start again.
    write_run(tmp_path)
    connection = sqlite3.connect(tmp_path / "journal.sqlite")
    assert connection.execute("PRAGMA application_id").fetchone() == (APPLICATION_ID,)
    connection.close()


def test_an_empty_file_becomes_a_journal(tmp_path: Path) -> None:
    (tmp_path / "journal.sqlite").touch()
    write_run(tmp_path)
    with JournalReader(tmp_path) as reader:
        assert reader.check_chain() == 7


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damage_anywhere_in_the_file_is_noticed_or_harmless(tmp_path: Path, data: st.DataObject) -> None:
    original = tmp_path / "original" / "journal.sqlite"
    if not original.exists():
        write_run(original.parent, count=30)
    with JournalReader(original) as reader:
        rows = list(reader.rows())
    damaged = bytearray(original.read_bytes())
    at = data.draw(st.integers(0, len(damaged) - 1))
    length = data.draw(st.sampled_from([1, 1, 1, 64, 4096]))
    for index in range(at, min(at + length, len(damaged))):
        damaged[index] ^= data.draw(st.integers(1, 255)) if length == 1 else 0xA5
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    (folder / "journal.sqlite").write_bytes(damaged)
    try:
        with JournalReader(folder) as reader:
            reader.check_chain()
            got = list(reader.rows())
    except JournalError:
        return
    # A chain that still holds up to a lost tail is what only a published head can show.
    assert got == rows[: len(got)]
    assume(got)


def test_timing_of_the_hot_path(tmp_path: Path) -> None:
    """Printed, not asserted: machines differ. `benchmarks/journal.py` measures properly."""
    journal = JournalWriter(tmp_path)
    journal.write_header({"format": 1})
    pairs = [plain_step(step) for step in range(1, 2001)]
    started = time.perf_counter()
    for pair in pairs:
        pack(*pair)
    packed = time.perf_counter()
    for pair in pairs:
        journal.step(*pair)
    written = time.perf_counter()
    print(f"\npack {(packed - started) / 2e-3:.2f} us, row {(written - packed) / 2e-3:.1f} us")
    assert journal.rows == 2001
    journal.close()
    assert os.path.getsize(tmp_path / "journal.sqlite") < 2001 * 1500
