"""The terminal monitor: what it shows is what the journal says, live, in any terminal, and never in the run's way."""

from __future__ import annotations

import io
import json
import math
import os
import pty
import re
import select
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from kalmanguard.certificate.verify import verify
from kalmanguard.cli import runstate
from kalmanguard.cli import watch as watch_module
from kalmanguard.cli.app import app
from kalmanguard.cli.feed import Feed, Phase
from kalmanguard.cli.glimpse import glimpse
from kalmanguard.cli.health import HEALTH_STYLES, judge
from kalmanguard.cli.summary import summarise
from kalmanguard.cli.trace import Trace
from kalmanguard.cli.training import Lane, read_settings
from kalmanguard.cli.watch import Watch
from kalmanguard.journal import JournalReader, JournalWriter, Row
from kalmanguard.journal.codec import unpack
from kalmanguard.journal.schema import FILE_NAME
from kalmanguard.models import MLPPlant

RUNNER = CliRunner(env={"COLUMNS": "100", "TERM": "dumb"})
STEPS = 110


def call(*arguments: object) -> Any:
    return RUNNER.invoke(app, ["monitor", *map(str, arguments)])


def train(folder: Path, steps: int, *faults: str, **settings: Any) -> Path:
    chosen = read_settings("balanced", on_halt="return", **settings)
    with Lane("mlp", MLPPlant(seed=0), faults=faults, settings=chosen, run_dir=folder) as lane:
        for _ in range(steps):
            lane.advance()
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("monitor") / "run", STEPS, "lr_spike:50@61:steps=5", "nan_gradient@97")


@pytest.fixture
def run_copy(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "copy"))


def change(folder: Path, statement: str, *values: object) -> None:
    connection = sqlite3.connect(folder / FILE_NAME)
    connection.execute(statement, values)
    connection.commit()
    connection.close()


def started(*arguments: object, cwd: Path, **options: Any) -> subprocess.Popen[Any]:
    """The monitor in a process of its own, in which importing torch fails."""
    blocked = cwd / "blocked"
    blocked.mkdir(exist_ok=True)
    (blocked / "torch.py").write_text("raise ImportError('torch is not installed')\n")
    environment = dict(os.environ) | options.pop("env", {})
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(blocked), os.environ.get("PYTHONPATH"))))
    words = [sys.executable, "-W", "error", "-m", "kalmanguard", "monitor", *map(str, arguments)]
    return subprocess.Popen(words, cwd=cwd, env=environment, **options)


# --- what it says is what the journal says ----------------------------------------------------------------------------


def test_once_says_what_summary_and_verifier_say(trained: Path) -> None:
    result = call(trained, "--json")
    assert result.exit_code == 0, result.output
    (run,) = json.loads(result.stdout)["runs"]
    summary = summarise(trained)
    assert (run["phase"], run["health"], run["healthy"]) == ("closed", "HEALTHY", True)
    assert run["step"] == summary.steps == STEPS
    assert run["rollbacks"] == len(summary.rollbacks) >= 1
    assert run["vetoes"] == summary.actions["VETO"] >= 1
    assert [event["reason"] for event in run["events"]] == [event.reason for event in summary.events]
    assert run["probe"]["last"] == summary.probes[-1][1]
    assert run["probe"]["bound"] == summary.envelope["bound"]
    losses = [y for _, y in summary.losses if math.isfinite(y)]
    assert (run["loss"]["min"], run["loss"]["max"]) == (min(losses), max(losses))
    assert run["certificate"]["verified"] == verify(trained).to_dict()
    lost = summary.probes[-1][1] - summary.envelope["y_best"]
    progress = summary.envelope["y0"] - summary.envelope["y_best"]
    assert run["give_back_frac"] == pytest.approx(max(0.0, lost / progress))
    told = call(trained, "--once")
    assert told.exit_code == 0
    for words in (
        "HEALTHY",
        "bound",
        "1 rollback (R)",
        "1 veto (V)",
        "Step 97: the proposed update was dropped",
        "verified",
    ):
        assert words in told.stdout


def write_again(rows: list[Row], journal: JournalWriter) -> None:
    for row in rows:
        if row.kind == "step":
            assert isinstance(row.body, bytes)
            journal.step(*unpack(row.body, row.blob))
        elif row.kind == "header":
            journal.write_header(row.data())
        elif row.kind != "close":
            journal.record(row.kind, row.step, row.data(), row.blob)
    journal.flush()


class CountingFeed(Feed):
    taken = 0

    def _take(self, row: Row) -> None:
        self.taken += 1
        super()._take(row)


def test_every_row_is_read_once_while_another_writes(trained: Path, tmp_path: Path) -> None:
    with JournalReader(trained) as reader:
        rows = list(reader.rows())
    feed = CountingFeed(tmp_path / "again", "again")
    feed.poll()
    assert feed.phase is Phase.WAITING
    with JournalWriter(tmp_path / "again") as journal:
        for first in range(0, len(rows), 17):
            write_again(rows[first : first + 17], journal)
            feed.poll()
            assert (feed.phase, feed.run.records) == (Phase.RUNNING, journal.rows)
            feed.poll()  # nothing new, so nothing is read
    feed.poll()
    assert feed.phase is Phase.CLOSED
    assert feed.taken == feed.run.records == len(rows)
    whole = Feed(trained, "whole")
    whole.poll()
    for name in ("loss", "probe", "gradient", "rate"):
        np.testing.assert_array_equal(getattr(feed.run, name).highs(), getattr(whole.run, name).highs())
    assert (feed.run.events, feed.run.marks, feed.run.give_back) == (
        whole.run.events,
        whole.run.marks,
        whole.run.give_back,
    )
    assert not Path(f"{tmp_path / 'again' / FILE_NAME}-wal").exists(), "the reader must not keep the log from folding"


def test_what_is_read_of_an_uneventful_step_is_what_decoding_gives(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = Feed(trained, "run")
    quick.poll()
    counted = []
    monkeypatch.setattr(runstate, "glimpse", lambda body: counted.append(glimpse(body) is not None))
    slow = Feed(trained, "run")
    slow.poll()
    assert slow.run.step == STEPS
    assert 0.5 < sum(counted) / len(counted) < 1, "most steps are read quickly, and not all"
    for name in ("loss", "probe", "gradient", "rate"):
        np.testing.assert_array_equal(getattr(quick.run, name).highs(), getattr(slow.run, name).highs())
        setattr(quick.run, name, None)
        setattr(slow.run, name, None)
    quick.run.silent_s = slow.run.silent_s
    assert quick.run == slow.run


def test_a_long_journal_is_read_in_slices(trained: Path, tmp_path: Path) -> None:
    with JournalReader(trained) as reader:
        rows = list(reader.rows())
    with JournalWriter(tmp_path / "long") as journal:
        for _ in range(4):
            write_again([row for row in rows if row.kind == "step" or journal.rows == 0], journal)
    feed = Feed(tmp_path / "long", "long")
    feed.poll(0.0)
    assert feed.phase is Phase.READING
    assert feed.run.records == 256
    watch = Watch([tmp_path / "long"], silent_after_s=300)
    watch.poll(0.0)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(watch.picture(console))
    assert re.search(r"reading, \d+ % so far", console.export_text())
    while feed.phase is Phase.READING:
        feed.poll(0.0)
    assert (feed.phase, feed.run.records) == (Phase.CLOSED, feed.total)


def test_no_extreme_is_lost_however_long_the_run() -> None:
    trace, values = Trace(), {}
    for step in range(1, 20_001):
        values[step] = 1.0 + (step * 7919 % 101) / 100
    values[12_345], values[777], values[15_000] = 50.0, 0.01, math.nan
    for step, value in values.items():
        trace.add(step, value)
    assert (trace.low, trace.high, trace.not_finite) == (0.01, 50.0, 1)
    highs, lows = trace.highs(), trace.lows()
    assert len(highs) <= 512
    begin = 0
    for (end, high), (same, low) in zip(highs, lows, strict=True):
        stretch = [values[step] for step in range(begin + 1, int(end) + 1)]
        finite = [value for value in stretch if math.isfinite(value)]
        assert same == end
        assert low == min(finite)
        assert high == max(finite) if len(finite) == len(stretch) else math.isnan(high)
        begin = int(end)
    assert begin == 20_000


# --- health and exit codes --------------------------------------------------------------------------------------------


def test_a_halted_run_is_not_healthy(tmp_path: Path) -> None:
    folder = train(tmp_path / "run", 90, "nan_gradient@50:steps=none", rollback_budget=1, probe_every=5)
    result = call(folder, "--json")
    assert result.exit_code == 1, result.output
    assert json.loads(result.stdout)["runs"][0]["health"] == "HALTED"


def test_a_run_that_is_only_observed_and_diverges_is_not_healthy(tmp_path: Path) -> None:
    folder = train(tmp_path / "run", 80, "lr_spike:200@41:steps=none", mode="observe", probe_every=5)
    result = call(folder, "--once")
    assert result.exit_code == 1, result.output
    assert "observed only" in result.stdout
    assert "0 rollbacks" in result.stdout


def test_an_open_run_is_silent_once_nothing_was_written_for_long(run_copy: Path) -> None:
    change(run_copy, "DELETE FROM records WHERE kind = 'close'")
    assert call(run_copy, "--once").exit_code == 0
    long_ago = time.time() - 400
    os.utime(run_copy / FILE_NAME, (long_ago, long_ago))
    result = call(run_copy, "--once")
    assert result.exit_code == 1
    assert "SILENT" in result.stdout
    assert "6 min" in result.stdout
    assert call(run_copy, "--once", "--silent-after", 1000).exit_code == 0


def test_a_journal_that_contradicts_itself_is_not_healthy(run_copy: Path) -> None:
    change(run_copy, "UPDATE records SET body = ? WHERE kind = 'close'", '{"forged": true}')
    result = call(run_copy, "--once")
    assert result.exit_code == 1
    assert "contradicts itself" in result.stdout


def test_every_word_of_health_has_a_style(trained: Path) -> None:
    feed = Feed(trained, "run")
    feed.poll()
    assert judge(feed.run, silent_after_s=1).word in HEALTH_STYLES
    feed.run.action, feed.run.level = type(feed.run.action).ROLLBACK, type(feed.run.level).CONFIRMED
    assert judge(feed.run, silent_after_s=1)[:2] == ("RECOVERING", False)
    feed.run.action, feed.run.level = type(feed.run.action).ACCEPT, type(feed.run.level).SUSPECT
    assert judge(feed.run, silent_after_s=1)[:2] == ("SUSPICIOUS", True)
    feed.run.probe.add(STEPS, feed.run.bound + 1)
    assert judge(feed.run, silent_after_s=1)[:2] == ("OUTSIDE", False)
    feed.run.loss.add(STEPS, math.nan)
    assert judge(feed.run, silent_after_s=1)[:2] == ("FAILING", False)


@pytest.mark.parametrize("kind", ["missing", "junk", "foreign", "newer", "step"])
def test_what_cannot_be_read_is_one_clear_line_and_exit_code_2(kind: str, run_copy: Path) -> None:
    if kind == "missing":
        shutil.rmtree(run_copy)
    elif kind == "junk":
        (run_copy / FILE_NAME).write_bytes(b"no database at all" * 100)
    elif kind == "foreign":
        change(run_copy, "PRAGMA application_id = 7")
    elif kind == "newer":
        change(run_copy, "PRAGMA user_version = 99")
    else:
        change(run_copy, "UPDATE records SET body = ? WHERE kind = 'step' AND step = 40", b"\x01short")
    result = call(run_copy, "--once")
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.output
    as_json = json.loads(call(run_copy, "--json").stdout)
    assert as_json["exit_code"] == 2
    assert as_json["error"]
    if kind != "missing":  # one that is missing is waited for
        following = call(run_copy, "--interval", 0.1)
        assert following.exit_code == 2, "a damaged journal is no reason to wait for ever"


def test_a_run_that_vanishes_or_is_replaced(run_copy: Path, trained: Path) -> None:
    watch = Watch([run_copy], silent_after_s=300)
    watch.poll(math.inf)
    assert watch.exit_code == 0
    shutil.rmtree(run_copy)
    watch.poll(math.inf)
    assert watch.ended
    assert watch.exit_code == 2
    assert "vanished" in watch.feeds[0].trouble
    shutil.copytree(trained, run_copy)
    watch.poll(math.inf)
    assert watch.feeds[0].run.step == STEPS
    assert watch.feeds[0].run.rollbacks == 1, "what was known of the other run is forgotten"


def test_a_journal_cannot_steer_the_terminal(tmp_path: Path, trained: Path) -> None:
    with JournalReader(trained) as reader:
        rows = list(reader.rows())
    with JournalWriter(tmp_path / "evil") as journal:
        write_again(rows, journal)
        journal.record("error", STEPS, {"text": "\x1b[2J\x1b]0;owned\x07"})
    for arguments in (("--once",), ("--interval", "0.1")):
        result = call(tmp_path / "evil", *arguments)
        assert result.exit_code == 0, result.output
        assert "\x1b" not in result.stdout
        assert "\x07" not in result.stdout
    assert "owned" in call(tmp_path / "evil", "--once").stdout


# --- several runs -----------------------------------------------------------------------------------------------------


def test_several_runs_are_a_table_and_new_ones_are_found(trained: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(trained, runs / "one")
    watch = Watch([runs], silent_after_s=300)
    watch.poll(math.inf)
    assert [feed.path.name for feed in watch.feeds] == ["one"]
    shutil.copytree(trained, runs / "two")
    (runs / "bad").mkdir()
    (runs / "bad" / FILE_NAME).write_text("junk")
    watch.poll(math.inf)
    assert {feed.path.name for feed in watch.feeds} == {"one", "two", "bad"}
    assert watch.exit_code == 2
    result = call(runs, "--once")
    assert result.exit_code == 2
    assert "not an SQLite database" in result.stdout.replace("\n", " ")
    shutil.rmtree(runs)
    watch.poll(math.inf)
    assert watch.ended
    assert {feed.phase for feed in watch.feeds} <= {Phase.VANISHED, Phase.UNREADABLE}
    assert len(watch.feeds) == 3


def test_what_would_take_long_to_verify_is_left_to_the_verifier(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        shutil.copytree(trained, tmp_path / name)
    with JournalReader(trained) as reader:
        monkeypatch.setattr(watch_module, "_VERIFIED_RECORDS", len(reader))
    watch = Watch([tmp_path], silent_after_s=300)
    watch.poll(math.inf)
    watch.verify()
    assert [feed.run.verified is None for feed in watch.feeds] == [False, True]


def test_a_closed_run_that_is_resumed_goes_on(run_copy: Path) -> None:
    feed = CountingFeed(run_copy, "run")
    feed.poll()
    feed.poll()
    assert feed.phase is Phase.CLOSED
    assert feed.taken == feed.run.records, "a closed journal that did not change is not read again"
    with JournalWriter.resume(run_copy) as journal:
        journal.record("resume", STEPS, {})
        journal.flush()
        feed.poll()
        assert feed.phase is Phase.RUNNING
        assert feed.run.resumes == 1
    feed.poll()
    assert feed.phase is Phase.CLOSED


# --- terminals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "height"), [(40, 24), (80, 24), (110, 30), (200, 50), (30, 8)])
@pytest.mark.parametrize("several", [False, True])
def test_the_picture_fits_the_terminal(width: int, height: int, several: bool, trained: Path, tmp_path: Path) -> None:
    paths = [trained]
    if several:
        paths += [Path(shutil.copytree(trained, tmp_path / f"run-{index}")) for index in range(30)]
    watch = Watch(paths, silent_after_s=300)
    watch.poll(math.inf)
    console = Console(width=width, height=height, record=True, file=io.StringIO())
    console.print(watch.picture(console, height=height - 1))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= width
    assert "HEALTHY" in "\n".join(lines)
    if several:
        assert len(lines) <= height
        assert lines[-1].startswith("... ") or len(lines) == 32
    elif width >= 80:
        assert len(lines) <= height
        assert any("█" in line for line in lines)


def on_a_terminal(process: subprocess.Popen[Any], master: int, until: bytes, then: int | None) -> bytes:
    """What it writes until it ends; the signal ``then`` is sent once ``until`` was seen."""
    seen, deadline = b"", time.monotonic() + 60
    while time.monotonic() < deadline:
        if select.select([master], [], [], 0.1)[0]:
            try:
                seen += os.read(master, 65536)
            except OSError:
                break
        elif process.poll() is not None:
            break
        if then is not None and until in seen:
            process.send_signal(then)
            then = None
    process.wait(timeout=10)
    return seen


@pytest.mark.parametrize(
    ("number", "code", "environment"),
    [(signal.SIGINT, 130, {}), (signal.SIGTERM, 143, {"NO_COLOR": "1"}), (None, 0, {})],
)
def test_a_terminal_is_left_as_it_was_found(
    number: int | None, code: int, environment: dict[str, str], trained: Path, tmp_path: Path
) -> None:
    master, slave = pty.openpty()
    follow = () if number is None else ("--follow",)
    process = started(
        trained, *follow, cwd=tmp_path, stdin=slave, stdout=slave, stderr=slave,
        env={"TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"} | environment,
    )  # fmt: skip
    os.close(slave)
    try:
        seen = on_a_terminal(process, master, b"Ctrl-C", number)
    finally:
        process.kill()
        os.close(master)
    assert process.returncode == code, seen
    assert seen.count(b"\x1b[?1049h") == seen.count(b"\x1b[?1049l") == 1, "onto the alternate screen and back"
    assert seen.count(b"\x1b[?25l") == seen.count(b"\x1b[?25h") == 1, "the cursor is hidden and shown again"
    assert b"Traceback" not in seen
    assert b"HEALTHY" in seen.rpartition(b"\x1b[?1049l")[2], "the last picture stays"
    colours = re.search(rb"\x1b\[(?:\d+;)*3[0-7]m", seen)
    assert (colours is None) == ("NO_COLOR" in environment)


def test_a_dumb_terminal_gets_lines(trained: Path, tmp_path: Path) -> None:
    master, slave = pty.openpty()
    process = started(trained, cwd=tmp_path, stdin=slave, stdout=slave, stderr=slave, env={"TERM": "dumb"})
    os.close(slave)
    try:
        seen = on_a_terminal(process, master, b"", None)
    finally:
        process.kill()
        os.close(master)
    assert process.returncode == 0
    assert b"\x1b" not in seen
    assert seen.count(b"\n") == 1


def test_it_waits_for_a_run_follows_it_live_and_ends_with_it(tmp_path: Path) -> None:
    """In another process, without torch, while this one trains."""
    process = started("run", "--interval", 0.2, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        first = process.stdout.readline()
        train(tmp_path / "run", 200, "nan_gradient@40")
        rest, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "WAITING Waiting for a journal in run" in first
    assert (process.returncode, errors) == (0, "")
    lines = [line for line in rest.splitlines() if "WAITING" not in line]
    steps = [int(struck[1].replace(",", "")) for line in lines if (struck := re.search(r"step ([\d,]+)", line))]
    assert len(steps) == len(lines)
    assert steps == sorted(steps)
    assert steps[0] < steps[-1] == 200
    assert "closed" in lines[-1]
    assert "verified" in lines[-1]
    assert all(re.match(r"\d\d:\d\d:\d\d [A-Z-]+ run ", line) for line in lines)
    assert sum("Step 40: the proposed update was dropped" in line for line in lines) == 1, "an event is told once"


def test_it_starts_quickly_and_loads_nothing_heavy() -> None:
    code = (
        "import sys\nimport kalmanguard.cli.app\nimport kalmanguard.cli.watch\n"
        "heavy = {'torch', 'scipy', 'matplotlib', 'pandas', 'sklearn', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
