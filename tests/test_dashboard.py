"""The dashboard: what it reads of a journal, what its server answers, and what it refuses.

Oracles: brute force over the rows for buckets and stretches, `kalmanguard.journal.codec.unpack` for columns, the bytes
and names of the run folder for read-only.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kalmanguard import Supervisor
from kalmanguard.dashboard.buckets import Buckets
from kalmanguard.dashboard.columns import AT, Decoder
from kalmanguard.dashboard.course import Course
from kalmanguard.dashboard.events import KEPT_OTHERS, EventLog, shown
from kalmanguard.dashboard.events import Event as Happening
from kalmanguard.dashboard.findings import KEPT, FindingLog
from kalmanguard.dashboard.library import journals
from kalmanguard.dashboard.standing import Word, standing
from kalmanguard.errors import ConfigurationError
from kalmanguard.journal import JournalReader, JournalWriter
from kalmanguard.records import Evidence, Guarantee

from .dashboard_runs import HEADER, loss_of, step_of, suspicion, write

server = pytest.importorskip("kalmanguard.dashboard.server")
ROOT = Path(__file__).parent.parent


# --- what is read -----------------------------------------------------------------------------------------------------


@given(
    steps=st.lists(st.integers(1, 400), min_size=1, max_size=120),
    chunk=st.integers(1, 40),
    points=st.integers(1, 60),
    data=st.data(),
)
@settings(max_examples=120, deadline=None)
def test_buckets_keep_least_and_greatest(steps: list[int], chunk: int, points: int, data: Any) -> None:
    value = st.floats(-1e6, 1e6) | st.just(math.nan)
    values = np.array(data.draw(st.lists(value, min_size=len(steps), max_size=len(steps))))[:, None]
    at = np.array(steps, dtype=np.int64)
    buckets = Buckets(1, most=16, start=0)
    for begin in range(0, len(steps), chunk):
        part = slice(begin, begin + chunk)
        buckets.add(at[part], np.arange(len(at))[part] + 1, values[part])
    low, high = sorted(data.draw(st.tuples(st.integers(0, 400), st.integers(0, 400))))
    found = buckets.stretch(low, high, points)
    for step, least, greatest in zip(found.steps.tolist(), found.low[:, 0], found.high[:, 0], strict=True):
        inside = values[(at >= step) & (at < step + found.width), 0]
        inside = inside[~np.isnan(inside)]
        expected = (inside.min(), inside.max()) if len(inside) else (math.nan, math.nan)
        np.testing.assert_array_equal((least, greatest), expected)
    covered = {int(step) for step in at if low <= step <= high}
    assert all(any(step <= s < step + found.width for step in found.steps.tolist()) for s in covered)
    assert len(found.steps) <= points + 1


def test_columns_are_what_the_codec_says(tmp_path: Path) -> None:
    write(tmp_path, 300)
    with JournalReader(tmp_path) as reader:
        rows = list(reader.rows("step"))
        table = Decoder(reader.statistic_names).decode(rows)
        pairs = list(reader.steps())
        names = reader.statistic_names
    for index, (m, d) in enumerate(pairs):
        statistics = dict(zip(names, d.statistics, strict=True))
        row = dict(zip(AT, table.values[index].tolist(), strict=True))
        assert (table.steps[index], row["loss"], row["gradient_norm"]) == (m.step, m.loss, m.gradient_norm)
        assert row["learning_rate"] == m.learning_rates[0] * m.lr_factor
        assert m.velocity is not None
        assert row["update_norm"] == pytest.approx(np.linalg.norm(m.velocity))
        assert (row["y"] == statistics["y"]) if m.probe else math.isnan(row["y"])
        if m.probe:
            assert row["give_back"] == pytest.approx((row["y"] - row["y_best"]) / (4.0 - row["y_best"]))
            assert row["predicted_high"] - row["predicted_low"] == pytest.approx(0.4)
    # Velocities without memory: jerk over acceleration is sqrt(3).
    assert table.values[-1, AT["damping"]] == pytest.approx(math.sqrt(3.0), rel=0.1)


def test_losses_that_are_not_finite_are_marked(tmp_path: Path) -> None:
    with JournalWriter(tmp_path) as journal:
        journal.write_header(HEADER)
        rng = np.random.default_rng(0)
        for step in range(1, 41):
            m, d = step_of(step, rng)
            if step == 33:
                object.__setattr__(m, "loss", math.inf)
            journal.step(m, d)
    course = Course(tmp_path / "journal.sqlite")
    course.refresh()
    stretch = course.stretch(1, 40, 100)
    assert stretch.steps[stretch.high[:, AT["lost"]] == 1.0].tolist() == [33]
    assert np.isnan(stretch.high[32, AT["loss"]])


def test_a_close_look_at_a_long_run_is_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kalmanguard.dashboard.course.BUCKETS", 256)
    write(tmp_path, 6_000)
    course = Course(tmp_path / "journal.sqlite")
    while course.refresh():
        pass
    whole = course.stretch(1, 6_000, 100)
    assert len(whole.steps) <= 101
    assert whole.high[:, AT["loss"]].max() == max(loss_of(step) for step in range(1, 6_001))
    close = course.stretch(1_900, 2_099, 200)
    assert close.width == 1
    assert close.steps.tolist() == list(range(1_900, 2_100))
    assert close.high[:, AT["loss"]].tolist() == [loss_of(step) for step in range(1_900, 2_100)]
    assert close.low[-1, AT["damping"]] == pytest.approx(math.sqrt(3.0), rel=0.15)


def test_only_new_rows_are_read_and_memory_is_bounded(tmp_path: Path) -> None:
    journal = write(tmp_path, 500, close=False)
    course = Course(tmp_path / "journal.sqlite")
    assert course.refresh()
    assert not course.refresh()
    before = course.records
    journal.step(*suspicion(501, "odd"))
    assert course.refresh()
    assert (course.records, course.last_step) == (before + 1, 501)
    assert standing(course).word is Word.SUSPICIOUS
    assert [event.word for event in course.events.latest(5)] == ["SUSPECT"]
    assert course.findings.map(1, 501, 10)["layers"][0]["name"] == "layers.2"
    journal.close()
    assert course.refresh()
    assert (course.complete, standing(course).activity) == (True, "closed")
    log = EventLog()
    for seq in range(3 * KEPT_OTHERS):
        log.add(Happening(seq, seq, "SUSPECT" if seq else "ROLLBACK", ""))
    assert log.total == 3 * KEPT_OTHERS
    assert len(log.latest(10**6)) == KEPT_OTHERS + 1
    assert log.latest(10**6)[0].word == "ROLLBACK"
    findings = FindingLog()
    findings.add(1, [Evidence("a", 1.0, True, Guarantee.HEURISTIC, "fc: odd")] * (KEPT + 5))
    assert findings.map(0, 2, 3)["layers"][0]["cells"] == [(1, KEPT)]


@pytest.fixture(scope="module")
def rescued(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network whose learning rate is wrong for five steps, supervised."""
    folder = tmp_path_factory.mktemp("runs") / "rescued"
    torch.manual_seed(0)
    x = torch.randn(256, 8)
    y = x[:, :1] * x[:, 1:2]
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    probe = DataLoader(TensorDataset(x[:64], y[:64]), batch_size=64)

    def losses(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (output - target).square().mean(1)

    supervisor = Supervisor(model, probe, optimizer=optimizer, loss_fn=losses, run_dir=folder)
    for step in range(1, 221):
        optimizer.param_groups[0]["lr"] = 1.0 if 150 <= step < 155 else 3e-3
        batch = torch.randint(0, 256, (32,))
        loss = losses(model(x[batch]), y[batch]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        supervisor.update(loss)
    supervisor.close()
    return folder


def test_a_rescued_run_reads_as_what_it_was(rescued: Path) -> None:
    course = Course(rescued / "journal.sqlite")
    course.refresh()
    with JournalReader(rescued) as reader:
        undone = [d for _, d in reader.steps() if d.action == "ROLLBACK"]
        outcomes = [row.data() for row in reader.rows("outcome")]
    assert undone
    found = [event for event in course.events.latest(100) if event.word == "ROLLBACK"]
    assert [event.text for event in found] == [d.reason for d in undone]
    assert [event.restored for event in found] == [outcome["restored_step"] for outcome in outcomes]
    assert course.actions["ROLLBACK"] == len(undone)
    assert standing(course).word in (Word.HEALTHY, Word.RECOVERING)
    assert standing(course).advice


# --- journals that are damaged, foreign or gone -----------------------------------------------------------------------


def test_what_is_no_journal_is_said_to_be_none(tmp_path: Path) -> None:
    cases: dict[str, Callable[[Path], object]] = {
        "noise": lambda file: file.write_bytes(os.urandom(5_000)),
        "empty": lambda file: file.write_bytes(b""),
        "foreign": lambda file: sqlite3.connect(file).execute("CREATE TABLE t (x)").connection.close(),
    }
    for name, make in cases.items():
        file = tmp_path / name / "journal.sqlite"
        file.parent.mkdir()
        make(file)
        course = Course(file)
        course.refresh()
        assert standing(course).word is Word.UNREADABLE, name
        assert course.trouble
        assert str(tmp_path) not in course.trouble


@pytest.mark.parametrize("damage", ["UPDATE records SET body = x'0102' WHERE seq = 40", "UPDATE records SET body = 'x' "
                                    "WHERE seq = 40", "UPDATE records SET blob = 'text' WHERE seq = 40"])  # fmt: skip
def test_a_damaged_row_ends_the_reading_with_a_sentence(tmp_path: Path, damage: str) -> None:
    write(tmp_path, 60)
    with sqlite3.connect(tmp_path / "journal.sqlite") as connection:
        connection.execute(damage)
    connection.close()
    course = Course(tmp_path / "journal.sqlite")
    course.refresh()
    assert course.trouble is not None
    assert "40" in course.trouble
    assert not course.refresh()


def test_a_header_that_lies_about_everything_does_no_harm(tmp_path: Path) -> None:
    with JournalWriter(tmp_path) as journal:
        journal.write_header({"format": 1, "settings": [], "statistics": "y", "model": 3, "probe": None})
        journal.step(*step_of(1, np.random.default_rng(0)))
        journal.record("outcome", 1, {"restored_step": "x", "error": ["\x1b[2J"]})
        journal.record("note", 1, {"pause": "<b>\x00</b>"})
    with served(tmp_path) as (port, made):
        key = made.library.entries()[0].key
        found = wait_for(lambda: ask(port, f"/api/v1/runs/{key}")[1], lambda data: data["records"] > 3)
        assert found["settings"]["give_back"] is None
        events = ask(port, f"/api/v1/runs/{key}/events")[1]["events"]
        assert all(event["text"].isprintable() for event in events)
        assert any("<b>?</b>" in event["text"] for event in events)  # the page puts it in as text


def test_texts_are_cut_and_cleaned() -> None:
    assert shown("a\x1b]0;x\x07\u202eb") == "a?]0;x??b"
    assert len(shown("x" * 10_000)) < 2_100


def test_links_out_of_a_folder_are_not_followed(tmp_path: Path) -> None:
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    write(outside / "run", 20)
    write(inside / "own", 20)
    (inside / "link").symlink_to(outside / "run")
    (inside / "sly").mkdir()
    (inside / "sly" / "journal.sqlite").symlink_to(outside / "run" / "journal.sqlite")
    assert [name for name, _ in journals(inside)] == ["own"]
    course = Course(inside / "own" / "journal.sqlite")
    shutil.move(course.file, tmp_path / "moved.sqlite")
    course.file.symlink_to(outside / "run" / "journal.sqlite")
    course.refresh()
    assert "symbolic link" in (course.trouble or "")


# --- the server -------------------------------------------------------------------------------------------------------


@contextmanager
def served(*runs: Path, **options: Any) -> Iterator[tuple[int, Any]]:
    made = server.Dashboard(list(runs), port=0, **options)
    thread = threading.Thread(target=made.serve)
    thread.start()
    try:
        wait_for(lambda: made._server.started, bool)
        yield made.port, made
    finally:
        made.stop()
        thread.join(20)
    assert not thread.is_alive()


def wait_for(get: Callable[[], Any], good: Callable[[Any], Any], seconds: float = 15.0) -> Any:
    deadline = time.monotonic() + seconds
    while not good(found := get()):
        assert time.monotonic() < deadline, found
        time.sleep(0.05)
    return found


def ask(port: int, path: str, method: str = "GET", **headers: str) -> tuple[int, Any, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        body = answer.read()
        found = {name.lower(): value for name, value in answer.getheaders()}
    finally:
        connection.close()
    return answer.status, (json.loads(body) if "json" in found.get("content-type", "") else body), found


def test_the_interface_tells_a_run(rescued: Path) -> None:
    names = sorted(path.name for path in rescued.iterdir())
    content = (rescued / "journal.sqlite").read_bytes()
    with served(rescued.parent) as (port, _):
        status, listed, _ = ask(port, "/api/v1/runs")
        assert (status, listed["version"], [run["name"] for run in listed["runs"]]) == (200, 1, ["rescued"])
        run = f"/api/v1/runs/{listed['runs'][0]['id']}"
        summary = wait_for(lambda: ask(port, run)[1], lambda data: data["records"] and not data["behind"])
        assert (summary["step"], summary["activity"], summary["first_step"]) == (220, "closed", 0)
        series = ask(port, f"{run}/series?from=1&to=220&points=100")[1]
        assert series["width"] == 3
        assert len(series["steps"]) == len(series["columns"]["loss"]["low"])
        assert any(mark["word"] == "ROLLBACK" for mark in series["marks"])
        events = ask(port, f"{run}/events?limit=500")[1]["events"]
        rollback = next(event for event in events if event["word"] == "ROLLBACK")
        evidence = ask(port, f"{run}/events/{rollback['seq']}")[1]
        assert evidence["text"] == rollback["text"]
        assert evidence["outcome"]["exact"] is True
        assert evidence["outcome"]["restored_step"] == rollback["restored"]
        assert any(item["fired"] for item in evidence["evidence"])
        assert evidence["advice"]
        found = wait_for(lambda: ask(port, f"{run}/certificate?make=1")[1]["certificate"], lambda c: c["report"], 60.0)
        claims = {claim["name"]: claim["status"] for claim in found["report"]["claims"]}
        assert (claims["chain"], claims["C2"], found["stale"]) == ("HOLDS", "HOLDS", False)
        assert ask(port, f"{run}/certificate")[1]["non_claims"]
        assert ask(port, f"{run}/layers")[1]["layers"] == []
    # Read-only: not a byte, not a file more.
    assert sorted(path.name for path in rescued.iterdir()) == names
    assert (rescued / "journal.sqlite").read_bytes() == content


def test_a_run_that_was_killed_is_left_as_it_is(tmp_path: Path) -> None:
    write(tmp_path / "run", 50, close=False).abandon()
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with served(tmp_path) as (port, made):
        run = f"/api/v1/runs/{made.library.entries()[0].key}"
        wait_for(lambda: ask(port, run)[1], lambda data: data["records"] == 51)
        wait_for(lambda: ask(port, f"{run}/certificate?make=1")[1]["certificate"], lambda c: c["report"], 60.0)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_new_rows_reach_every_viewer_while_another_process_writes(tmp_path: Path) -> None:
    with written(tmp_path / "run", 300, 0.01) as writer, served(tmp_path) as (port, made):
        key = made.library.entries()[0].key
        connections = [http.client.HTTPConnection("127.0.0.1", port, timeout=20) for _ in range(3)]
        answers = []
        for connection in connections:
            connection.request("GET", f"/api/v1/runs/{key}/stream")
            answers.append(connection.getresponse())
        for answer in answers:
            assert answer.headers["content-type"].startswith("text/event-stream")
            seen = list(islice((step for step in _steps(answer) if step), 3))
            assert seen == sorted(set(seen))
        assert writer.wait(60) == 0
        assert next(step for step in _steps(answers[0]) if step >= 300) == 300
        for connection in connections:
            connection.close()
        # The writer could fold its log while the page watched.
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["journal.sqlite"]
        wait_for(lambda: ask(port, f"/api/v1/runs/{key}")[1], lambda data: data["activity"] == "closed")


@contextmanager
def written(folder: Path, steps: int, pause_s: float) -> Iterator[subprocess.Popen[str]]:
    """A process that writes a run, once it has begun."""
    command = [sys.executable, "-m", "tests.dashboard_runs", str(folder), str(steps), str(pause_s)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with open(folder.with_suffix(".log"), "w") as log:
        writer = subprocess.Popen(command, stdout=log, text=True, cwd=ROOT, env=environment)
    try:
        wait_for(lambda: folder.with_suffix(".log").read_text(), bool, 60.0)
        yield writer
    finally:
        writer.kill()
        writer.wait()


def _steps(answer: http.client.HTTPResponse) -> Iterator[int]:
    while line := answer.readline():
        if line.startswith(b"data: "):
            yield json.loads(line[6:])["step"]


def test_a_run_that_vanishes_is_still_shown(tmp_path: Path) -> None:
    write(tmp_path / "run", 50)
    with served(tmp_path) as (port, made):
        run = f"/api/v1/runs/{made.library.entries()[0].key}"
        wait_for(lambda: ask(port, run)[1], lambda data: data["records"] == 52)
        shutil.rmtree(tmp_path / "run")
        found = wait_for(lambda: ask(port, run)[1], lambda data: data["trouble"])
        assert "gone" in found["trouble"]
        assert ask(port, f"{run}/series")[0] == 200
        status, answer, _ = ask(port, f"{run}/events/3")
        assert status == 409
        assert str(tmp_path) not in json.dumps(answer)


def test_wrong_questions_get_clear_answers(rescued: Path) -> None:
    with served(rescued) as (port, made):
        run = f"/api/v1/runs/{made.library.entries()[0].key}"
        for path, wanted in (
            ("/nothing", 404),
            ("/api/v1/runs/0000000000000000", 404),
            ("/api/v1/runs/..%2f..%2fetc%2fpasswd", 404),
            ("/static/../server.py", 404),
            ("/static/%2e%2e/server.py", 404),
            ("/static/..%5c..%5cserver.py", 404),
            ("/static//etc/passwd", 404),
            (f"{run}/events/99999", 404),
            (f"{run}/events/0", 400),
            (f"{run}/events/{10**30}", 400),
            (f"{run}/series?points=1000000", 400),
            (f"{run}/series?points=-1", 400),
            (f"{run}/series?from=NaN", 400),
            (f"{run}/series?from=9&to=2", 400),
            (f"{run}/series?from=%D9%A3", 400),
            (f"{run}/events?limit=0", 400),
            (f"{run}/series?x={'a' * 600}", 414),
            (f"/{'a' * 600}", 414),
        ):
            status, answer, headers = ask(port, path)
            assert status == wanted, path
            assert answer["error"], path
            assert "Traceback" not in json.dumps(answer)
            assert "default-src 'none'" in headers["content-security-policy"]
        for method in ("POST", "PUT", "DELETE", "OPTIONS"):
            assert ask(port, run, method)[0] == 405
        assert ask(port, "/api/v1/runs")[0] == 200


def test_the_page_allows_nothing_from_elsewhere(rescued: Path) -> None:
    with served(rescued) as (port, _):
        status, body, headers = ask(port, "/")
        assert status == 200
        policy = headers["content-security-policy"]
        assert "'unsafe" not in policy
        assert "script-src 'self'" in policy
        assert (headers["x-content-type-options"], headers["referrer-policy"]) == ("nosniff", "no-referrer")
        page = body.decode()
        assert not re.search(r"<style|style=|\son\w+=|<script(?![^>]*src=)", page)
        for found in re.findall(r'(?:src|href)="([^"#]+)"', page):
            assert found.startswith(("/static/", "data:image/svg+xml")), found
            if found.startswith("/"):
                assert ask(port, found)[0] == 200, found
        assert b"MIT" in ask(port, "/static/vendor/uPlot.LICENSE")[1]
    for script in (ROOT / "kalmanguard/dashboard/static").glob("*.js"):
        text = script.read_text(encoding="utf-8")
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|https?://(?!www\.w3)", text
        )


def test_other_sites_cannot_ask(rescued: Path) -> None:
    with served(rescued) as (port, _):
        assert ask(port, "/api/v1/runs", Host=f"localhost:{port}")[0] == 200
        for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "", f"192.168.0.7:{port}"):
            assert ask(port, "/api/v1/runs", Host=host)[0] == 421, host
        assert ask(port, "/api/v1/runs", Sec_Fetch_Site="cross-site")[0] == 403
        assert ask(port, "/", Sec_Fetch_Site="cross-site")[0] == 200
    with served(rescued, allow_hosts=["runs.example"]) as (port, _):
        assert ask(port, "/api/v1/runs", Host="runs.example")[0] == 200


def test_a_token_is_asked_for_where_others_can_reach_the_address(rescued: Path) -> None:
    with served(rescued, host="0.0.0.0") as (port, made):
        token = made.token
        assert len(token) >= 32
        assert made.url == f"http://localhost:{port}/?token={token}"
        assert ask(port, "/")[0] == ask(port, "/api/v1/runs")[0] == ask(port, "/static/page.js")[0] == 401
        assert ask(port, "/?token=wrong")[0] == 401
        assert ask(port, f"/api/v1/runs?token={token}")[0] == 401  # only the first page takes it from the address
        assert ask(port, "/api/v1/runs", Authorization=f"Bearer {token}")[0] == 200
        assert ask(port, "/api/v1/runs", Authorization=f"Bearer {token}x")[0] == 401
        status, _, headers = ask(port, f"/?token={token}")
        assert (status, headers["location"]) == (303, "/")
        cookie = headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "samesite=strict" in cookie.lower()
        assert ask(port, "/api/v1/runs", Cookie=cookie.partition(";")[0])[0] == 200
        assert ask(port, "/api/v1/runs", Cookie="kalmanguard=1; \x01=;;")[0] == 401
    with pytest.raises(ConfigurationError, match="at least 16"):
        server.Dashboard([rescued], port=0, token="short")


def test_it_starts_without_torch_and_says_what_is_missing(tmp_path: Path) -> None:
    code = "import sys, kalmanguard.dashboard.server; print(*{n.partition('.')[0] for n in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert not {"torch", "scipy", "sklearn", "pandas", "matplotlib", "statsmodels"} & set(done.stdout.split())
    command = [sys.executable, "-m", "kalmanguard", "dashboard", str(tmp_path / "missing")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert "nothing at" in done.stderr
    with served(tmp_path) as (port, _):
        with pytest.raises(ConfigurationError, match="cannot listen"):
            server.Dashboard([tmp_path], port=port)
        assert ask(port, "/api/v1/runs")[1]["runs"] == []
