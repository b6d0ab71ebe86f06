"""The command line: what a newcomer types, what a script reads, and what happens when either is wrong."""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import time
import zlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from kalmanguard import FaultInjector, Settings, Supervisor
from kalmanguard.cli import plants, story, terminal
from kalmanguard.cli.app import app
from kalmanguard.cli.folders import fresh_folder
from kalmanguard.cli.options import FAULT_KINDS
from kalmanguard.cli.training import Lane, read_settings
from kalmanguard.engine import STATISTICS
from kalmanguard.errors import ConfigurationError
from kalmanguard.faults import CATALOGUE
from kalmanguard.journal.schema import FILE_NAME
from kalmanguard.models import MLPPlant, plant_names
from kalmanguard.records import Action, Decision, Level, Mode
from kalmanguard.report import render

RUNNER = CliRunner(env={"COLUMNS": "100", "TERM": "dumb"})
FAULTS = ("--fault", "lr_spike:50@61:steps=5", "--fault", "nan_gradient@97")


def call(*arguments: object) -> Any:
    return RUNNER.invoke(app, [str(argument) for argument in arguments])


def parsed(result: Any) -> dict[str, Any]:
    """Stdout is exactly one JSON object, without nan and the like."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    data = json.loads(result.stdout, parse_constant=refuse)
    assert isinstance(data, dict)
    return data


def in_a_new_process(*arguments: object, cwd: Path, without_torch: bool = True) -> subprocess.CompletedProcess[str]:
    """``python -m kalmanguard`` where importing torch fails, as on a machine that does not have it."""
    environment = dict(os.environ)
    if without_torch:
        blocked = cwd / "blocked"
        blocked.mkdir(exist_ok=True)
        (blocked / "torch.py").write_text("raise ImportError('torch is not installed')\n")
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(blocked), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "kalmanguard", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("cli") / "run"
    return folder, call("run", "mlp", "--steps", 130, *FAULTS, "--run-dir", folder, "--json")


@pytest.fixture
def run_copy(trained: tuple[Path, Any], tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained[0], tmp_path / "copy"))


# --- help -------------------------------------------------------------------------------------------------------------

COMMANDS = ("demo", "run", "show", "verify", "replay", "monitor", "doctor")


def test_help_lists_every_command() -> None:
    result = call("--help")
    assert result.exit_code == 0
    for command in COMMANDS:
        assert command in result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_says_what_its_exit_codes_mean(command: str) -> None:
    result = call(command, "--help")
    assert result.exit_code == 0
    assert "Exit codes" in result.stdout
    assert "0: " in result.stdout
    assert "2: " in result.stdout
    assert "--json" in result.stdout


def test_help_and_version_load_nothing_heavy() -> None:
    code = (
        "import sys\nfrom kalmanguard.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "heavy = {'torch', 'scipy', 'matplotlib', 'pandas', 'sklearn', 'statsmodels', 'filterpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    for argument in ("--help", "--version"):
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", code, argument],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr


def test_version() -> None:
    result = call("--version")
    assert result.exit_code == 0
    assert result.stdout == f"kalmanguard {version('kalmanguard')}\n"


def test_help_names_every_fault_and_plant() -> None:
    assert FAULT_KINDS.split(", ") == list(CATALOGUE)
    for name in plant_names():
        assert name in call("run", "--help").stdout
        assert name in call("demo", "--help").stdout


# --- run --------------------------------------------------------------------------------------------------------------


def test_run_prints_one_json_object_with_what_came_of_it(trained: tuple[Path, Any]) -> None:
    folder, result = trained
    assert result.exit_code == 0, result.output
    data = parsed(result)
    assert data["exit_code"] == 0
    assert data["steps_done"] == data["statistics"]["steps"] == 130
    assert data["faults"] == ["lr_spike:50@61:steps=5", "nan_gradient@97"]
    assert {"ROLLBACK", "VETO"} <= {event["action"] for event in data["events"]}
    assert 0 < data["held_out_loss"] < 1.5
    assert data["certificate"]["exit_code"] in (0, 3)
    assert json.loads((folder / "summary.json").read_text()) == data
    assert json.loads((folder / "run.json").read_text())["plant"] == "mlp"


def test_run_for_people_tells_events_report_certificate_and_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = call("run", "mlp", "--steps", 100, *FAULTS)
    assert result.exit_code == 0, result.output
    for words in ("step 50/100", "ROLLBACK", "stability report", "Certificate", "runs/mlp-1"):
        assert words in result.stdout
    assert (tmp_path / "runs" / "mlp-1" / FILE_NAME).is_file()
    again = call("run", "mlp", "--steps", 5, "--json")
    assert parsed(again)["folder"] == "runs/mlp-2"


def test_run_passes_its_options_on(tmp_path: Path) -> None:
    result = call(
        "run", "mlp", "--steps", 20, "--optimizer", "sgd", "--lr", 0.05, "--batch-size", 16, "--schedule", "cosine",
        "--seed", 3, "--mode", "observe", "--settings", "aggressive", "--run-dir", tmp_path / "run",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "SGD at 0.05" in result.stdout
    assert "batches of 16" in result.stdout
    header = parsed(call("show", tmp_path / "run", "--json"))["header"]
    assert header["settings"]["mode"] == "observe"
    assert header["settings"]["give_back"] == 0.12
    assert "ScaleLearningRate(factor=0.2)" in str(header["recovery"]), "the preset's own ladder"


def test_run_reads_settings_from_toml(tmp_path: Path) -> None:
    toml = tmp_path / "guard.toml"
    toml.write_text('preset = "conservative"\nprobe_every = 9\n')
    folder = tmp_path / "run"
    assert call("run", "mlp", "--steps", 12, "--settings", toml, "--run-dir", folder).exit_code == 0
    settings = parsed(call("show", folder, "--json"))["header"]["settings"]
    assert (settings["probe_every"], settings["give_back"]) == (9, 0.35)


def test_a_halted_run_exits_with_4(tmp_path: Path) -> None:
    toml = tmp_path / "guard.toml"
    toml.write_text("rollback_budget = 1\nprobe_every = 5\n")
    folder = tmp_path / "run"
    result = call(
        "run", "mlp", "--steps", 300, "--fault", "nan_gradient@60:steps=none", "--settings", toml, "--run-dir", folder,
        "--json",
    )  # fmt: skip
    assert result.exit_code == 4, result.output
    data = parsed(result)
    assert data["exit_code"] == 4
    assert data["steps_done"] < 300
    assert "halt" in data["halted"]
    assert "halted" in call("run", "mlp", "--steps", 300, "--fault", "nan_gradient@60:steps=none", "--settings", toml,
                            "--run-dir", tmp_path / "second").stdout  # fmt: skip


def test_an_interrupt_closes_the_run_properly(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "kalmanguard", "run", "mlp", "--steps", "1000000", "--run-dir", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        deadline = time.monotonic() + 60
        while not (folder / "run.json").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Interrupted after step" in output
    assert "Traceback" not in output
    claims = {claim["name"]: claim["status"] for claim in parsed(call("verify", folder, "--json"))["claims"]}
    assert (claims["chain"], claims["run"]) == ("HOLDS", "HOLDS")
    assert call("replay", folder).exit_code == 0


def test_interventions_as_exceptions_end_the_run(tmp_path: Path) -> None:
    toml = tmp_path / "guard.toml"
    toml.write_text('raise_on = ["veto"]\n')
    result = call(
        "run", "mlp", "--steps", 80, "--fault", "nan_gradient@41", "--settings", toml, "--run-dir", tmp_path / "run",
        "--json",
    )  # fmt: skip
    assert result.exit_code == 4, result.output
    assert parsed(result)["steps_done"] == 41


@pytest.mark.parametrize(("plant", "at"), [("gan", 61), ("cartpole", 41)])
def test_plants_with_another_loop_are_supervised_as_well(plant: str, at: int, tmp_path: Path) -> None:
    result = call(
        "run", plant, "--steps", at + 4, "--fault", f"nan_gradient@{at}", "--run-dir", tmp_path / "run", "--json"
    )
    assert result.exit_code == 0, result.output
    summary = parsed(result)
    assert summary["steps_done"] == at + 4
    assert [event["step"] for event in summary["events"] if event["action"] == "VETO"] == [at]
    assert math.isfinite(summary["held_out_loss"])
    assert summary["statistics"]["errors"] == 0


# --- wrong input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "jet"), "choose one of c"),
        (("run", "mlp", "--fault", "gremlin@3"), "the kinds are nan_gradient"),
        (("run", "mlp", "--fault", "nan_gradient"), "write KIND"),
        (("run", "mlp", "--fault", "nan_gradient@500", "--steps", 400), "due at step 500, but the run ends after 400"),
        (("run", "mlp", "--settings", "timid"), "conservative, balanced, aggressive"),
        (("run", "mlp", "--settings", "none.toml"), "cannot be read"),
        (("run", "quadratic", "--batch-size", 4), "has no option 'batch_size'"),
        (("run", "mlp", "--optimizer", "lbfgs"), "choose adamw or sgd"),
        (("run", "mlp", "--run-dir", "/proc/nowhere/run"), "/proc/nowhere"),
        (("demo", "--plant", "jet"), "choose one of c"),
        (("demo", "--out", "/proc/nowhere"), "/proc/nowhere"),
        (("show", "nowhere"), "no journal"),
        (("verify", "nowhere"), "no journal"),
        (("replay", "nowhere"), "no journal"),
    ],
)
def test_wrong_input_is_one_clear_line_and_exit_code_2(
    arguments: tuple[object, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = call(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
    assert "Traceback" not in result.output
    as_json = call(*arguments, "--json")
    assert as_json.exit_code == 2
    assert message in parsed(as_json)["error"]
    assert parsed(as_json)["exit_code"] == 2


def test_a_folder_that_holds_a_run_is_left_alone(run_copy: Path) -> None:
    before = {path: path.read_bytes() for path in run_copy.rglob("*") if path.is_file()}
    result = call("run", "mlp", "--steps", 5, "--run-dir", run_copy)
    assert result.exit_code == 2
    assert "never overwritten" in result.stderr
    assert {path: path.read_bytes() for path in run_copy.rglob("*") if path.is_file()} == before


def test_verify_refuses_what_is_no_head(run_copy: Path) -> None:
    result = call("verify", run_copy, "--head", "abc")
    assert result.exit_code == 2
    assert "64 hexadecimal digits" in result.stderr


# --- verify, replay, show ---------------------------------------------------------------------------------------------


def test_verify_says_what_the_standalone_verifier_says(trained: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = trained
    data = parsed(call("verify", folder, "--json"))
    done = subprocess.run(
        [sys.executable, Path(terminal.__file__).parents[1] / "certificate" / "verify.py", folder, "--json"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert json.loads(done.stdout) == data
    result = call("verify", folder)
    assert result.exit_code == done.returncode == data["exit_code"]
    for claim in data["claims"]:
        assert claim["status"] in result.stdout
    head = tmp_path / "head.txt"
    head.write_text(f"{data['head']} {data['records']}\n")
    for value in (data["head"], head):
        claims = {claim["name"]: claim for claim in parsed(call("verify", folder, "--head", value, "--json"))["claims"]}
        assert claims["head"]["status"] == "HOLDS"


def test_verify_replay_and_show_run_where_torch_is_not_installed(run_copy: Path, tmp_path: Path) -> None:
    expected = call("verify", run_copy, "--json")
    done = in_a_new_process("verify", run_copy, "--json", cwd=tmp_path)
    assert (done.returncode, json.loads(done.stdout)) == (expected.exit_code, parsed(expected)), done.stderr
    for command in ("replay", "show"):
        done = in_a_new_process(command, run_copy, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
    assert in_a_new_process("run", "mlp", cwd=tmp_path).returncode != 0, "torch must really be blocked"


def test_a_tampered_journal_fails_verification_and_replay(run_copy: Path) -> None:
    connection = sqlite3.connect(run_copy / FILE_NAME)
    (seq, blob) = connection.execute("SELECT max(seq), blob FROM records WHERE kind = 'step' AND step = 90").fetchone()
    at = len(blob) + 8 * (STATISTICS.index("z_loss") - len(STATISTICS))
    tampered = blob[:at] + struct.pack("<d", 0.125) + blob[at + 8 :]
    connection.execute("UPDATE records SET blob = ? WHERE seq = ?", (tampered, seq))
    connection.commit()
    connection.close()
    assert call("verify", run_copy).exit_code == 1
    result = call("replay", run_copy, "--json")
    assert result.exit_code == 1
    first = parsed(result)["differences"][0]
    assert (first["record"], first["step"], first["field"]) == (seq, 90, "statistics.z_loss")
    shown = call("replay", run_copy)
    assert shown.exit_code == 1
    assert "Different" in shown.stdout
    assert "statistics.z_loss" in shown.stdout


def test_an_interrupted_run_is_incomplete_but_shown(run_copy: Path) -> None:
    connection = sqlite3.connect(run_copy / FILE_NAME)
    connection.execute("DELETE FROM records WHERE kind = 'close'")
    connection.commit()
    connection.close()
    assert call("verify", run_copy).exit_code == 3
    shown = call("show", run_copy)
    assert shown.exit_code == 0
    assert "not closed" in shown.stdout
    assert "INCOMPLETE" in shown.stdout


def test_replay_is_identical(trained: tuple[Path, Any]) -> None:
    result = call("replay", trained[0])
    assert result.exit_code == 0
    assert "Identical" in result.stdout
    data = parsed(call("replay", trained[0], "--json"))
    assert data["identical"]
    assert data["decisions"] > 130


def test_replay_answers_what_if(trained: tuple[Path, Any], tmp_path: Path) -> None:
    toml = tmp_path / "wary.toml"
    toml.write_text("suspicion = 1.5\nwarmup_steps = 5\n")
    result = call("replay", trained[0], "--settings", toml, "--differences", 2)
    assert result.exit_code == 0, result.output
    assert "what if" in result.stdout
    assert result.stdout.count("(record ") == 2
    data = parsed(call("replay", trained[0], "--settings", toml, "--json"))
    assert data["what_if"]
    assert data["differing"] > 0


def test_show_tells_the_run(trained: tuple[Path, Any]) -> None:
    result = call("show", trained[0], "--events", 1)
    assert result.exit_code == 0, result.output
    for words in ("MLP, 26,122 parameters", "lr_spike:50@61", "ROLLBACK", "VETO", "Held-out loss", "(the last 1 of"):
        assert words in result.stdout
    assert "Step 97: the proposed update was dropped" in result.stdout
    data = parsed(call("show", trained[0], "--json"))
    assert data["steps"] == sum(data["actions"].values()) == sum(data["levels"].values()) == 130
    assert data["event_count"] == len(data["events"])
    assert data["probes"][0][0] == 0
    assert data["rollbacks"]
    assert all(restored < step for step, restored in data["rollbacks"])
    assert len(parsed(call("show", trained[0], "--json", "--events", 1))["events"]) == 1


# --- demo -------------------------------------------------------------------------------------------------------------


def png_size(path: Path) -> tuple[int, int]:
    """Width and height of a PNG whose chunks are all intact."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, kinds = 8, []
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        body, (checksum,) = (
            data[at + 4 : at + 8 + length],
            struct.unpack(">I", data[at + 8 + length : at + 12 + length]),
        )
        assert zlib.crc32(body) == checksum
        kinds.append(body[:4])
        at += 12 + length
    assert kinds[-1] == b"IEND"
    width, height = struct.unpack(">II", data[16:24])
    return int(width), int(height)


@pytest.fixture(scope="module")
def demonstrated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("demo") / "out"
    return out, call("demo", "--plant", "mlp", "--steps", 150, "--out", out, "--json")


def test_demo_writes_everything_that_it_says(demonstrated: tuple[Path, Any]) -> None:
    out, result = demonstrated
    assert result.exit_code == 0, result.output
    data = parsed(result)
    folder = out / "run-1"
    assert data["folder"] == str(folder)
    assert png_size(folder / "story.png") == (1600, 1024)
    for name in (FILE_NAME, "summary.json", "checkpoints"):
        assert (folder / name).exists()
    written = json.loads((folder / "summary.json").read_text())
    assert {key: value for key, value in written.items() if key in data} == data
    assert set(written["curves"]) == {"clean", "faulted", "supervised"}
    assert call("replay", folder).exit_code == 0
    assert call("verify", folder).exit_code in (0, 3)


def test_demo_shows_that_supervision_helps(demonstrated: tuple[Path, Any]) -> None:
    outcomes = {outcome["name"]: outcome for outcome in parsed(demonstrated[1])["outcomes"]}
    clean, faulted, supervised = (outcomes[name] for name in ("clean", "faulted", "supervised"))
    assert clean["ratio"] == 1
    assert clean["steps_undone"] == clean["steps_behind"] == 0
    assert supervised["rollbacks"] >= 1
    assert supervised["steps_undone"] >= supervised["rollbacks"]
    lost = faulted["held_out_loss"]
    assert lost is None or lost > 1.5 * clean["held_out_loss"]
    assert lost is None or supervised["held_out_loss"] < lost
    assert faulted["steps_behind"] > supervised["steps_behind"]


def test_demo_for_people_ends_with_table_certificate_and_places(tmp_path: Path) -> None:
    result = call("demo", "--plant", "mlp", "--steps", 40, "--out", tmp_path, "--fault", "nan_gradient@33")
    assert result.exit_code == 0, result.output
    for words in ("step 20/40", "VETO", "to clean", "not finite", "all 40", "HOLDS", "story.png", "kalmanguard show"):
        assert words in result.stdout
    assert "Warning" not in result.stdout


def test_demo_never_touches_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "run-1").mkdir()
    (tmp_path / "run-1" / "precious").write_text("keep me")
    result = call(
        "demo", "--plant", "quadratic", "--steps", 20, "--out", tmp_path, "--fault", "nan_gradient@7", "--json"
    )
    assert result.exit_code == 0, result.output
    assert parsed(result)["folder"] == str(tmp_path / "run-2")
    assert [path.name for path in (tmp_path / "run-1").iterdir()] == ["precious"]


def test_demo_survives_whatever_becomes_of_the_faulted_run(tmp_path: Path) -> None:
    """Not finite from the first measurement on, and at a loss that grows beyond any axis."""
    for fault in ("nan_gradient@1", "lr_spike:1e6@3:steps=none"):
        result = call("demo", "--plant", "mlp", "--steps", 12, "--out", tmp_path, "--fault", fault, "--json")
        assert result.exit_code in (0, 4), result.output
        assert png_size(Path(parsed(result)["figure"])) == (1600, 1024)


@pytest.mark.slow
def test_the_demonstration_itself_in_two_minutes(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = in_a_new_process("demo", "--out", tmp_path / "out", "--json", cwd=tmp_path, without_torch=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Processor time: a machine that is busy with something else must not fail it.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 120
    assert done.returncode == 0, done.stderr
    outcomes = {outcome["name"]: outcome for outcome in json.loads(done.stdout)["outcomes"]}
    assert outcomes["faulted"]["held_out_loss"] is None
    assert outcomes["supervised"]["ratio"] < 1.05


# --- what the commands are made of ------------------------------------------------------------------------------------


def test_lanes_side_by_side_are_what_each_is_alone() -> None:
    def losses(*, company: bool) -> list[float]:
        with Lane("one", MLPPlant(seed=0), seed=0) as one, Lane("two", MLPPlant(seed=1), seed=1) as two:
            for _ in range(8):
                one.advance()
                if company:
                    two.advance()
                    two.gauge()
        return one.losses

    assert losses(company=True) == losses(company=False)


def test_a_supervised_lane_without_faults_is_the_clean_one(tmp_path: Path) -> None:
    settings = read_settings("balanced", mode="observe")
    with (
        Lane("watched", MLPPlant(seed=0), settings=settings, run_dir=tmp_path / "run") as watched,
        Lane("bare", MLPPlant(seed=0)) as bare,
    ):
        for _ in range(40):
            watched.advance()
            bare.advance()
    assert watched.losses == bare.losses


def test_a_preset_brings_its_own_recovery() -> None:
    assert read_settings("aggressive").recovery != read_settings("conservative").recovery
    assert read_settings("balanced", mode="observe").mode == "observe"


def test_plants_of_the_command_line_are_the_registered_ones() -> None:
    assert plants.plant_names() == plant_names()
    made = plants.make_plant("quadratic", {"seed": 1, "steps": 50, "lr": None, "batch_size": None})
    assert made.describe().startswith("quadratic")


def test_fresh_folders_are_numbered(tmp_path: Path) -> None:
    assert [fresh_folder(tmp_path / "runs", "mlp").name for _ in range(3)] == ["mlp-1", "mlp-2", "mlp-3"]


def test_sparkline_keeps_spikes_and_marks_what_is_not_finite() -> None:
    points = [(float(step), 1.0) for step in range(1, 101)]
    points[41] = (42.0, 100.0)
    points[70] = (71.0, float("nan"))
    line = terminal.sparkline(points, width=10, end=100, low=1.0, high=10.0)
    assert line == "▁▁▁▁█▁▁x▁▁"
    assert terminal.sparkline(points[:50], width=10, end=100, low=1.0, high=10.0, blocks=False) == "____#"
    assert terminal.sparkline([(1.0, -3.0)], width=3, end=1, low=-3.0, high=-3.0) == "  ▁"


def test_steps_behind_is_read_off_the_clean_curve() -> None:
    told = story.Story("mlp", "", 100, 0, [], [], 8.0)
    told.curves["clean"] = [(float(step), 5.0 - step / 25 + 0.1 * (step % 2)) for step in range(101)]
    assert told.steps_behind(0.0) == told.steps_behind(-0.5) == 0
    assert told.steps_behind(1.0) == pytest.approx(25, abs=2)
    assert told.steps_behind(40.0) == told.steps_behind(float("nan")) == 100


def test_plain_makes_json_of_anything() -> None:
    value = {"a": (1.0, float("nan")), 3: [float("-inf"), {"b": True}], "c": "text"}
    assert terminal.plain(value) == {"a": [1.0, None], "3": [None, {"b": True}], "c": "text"}


@pytest.mark.parametrize(("name", "numbers"), [(name, {"factor": 2.0}) for name in CATALOGUE])
def test_every_fault_has_a_label(name: str, numbers: dict[str, float]) -> None:
    assert "×2" in story.fault_label(name, numbers)
    assert "_" not in story.fault_label(name, {})


def test_errors_of_other_kinds_are_not_hidden() -> None:
    guarded = typer.Typer()

    @guarded.command(cls=terminal.Command)
    def broken(wrong: bool = False) -> None:
        if wrong:
            raise ConfigurationError("seed = -1 is negative.")
        raise ZeroDivisionError

    assert isinstance(RUNNER.invoke(guarded, []).exception, ZeroDivisionError)
    assert RUNNER.invoke(guarded, ["--wrong"]).stderr == "Error: seed = -1 is negative.\n"


# --- the report of a supervisor ---------------------------------------------------------------------------------------


def test_a_supervisor_reports_in_plain_text() -> None:
    plant = MLPPlant(seed=0)
    injector = FaultInjector().at(41).nan_gradient()
    with (
        injector.attach(plant.model, plant.optimizer),
        Supervisor(plant.model, plant.probe_loader, optimizer=plant.optimizer) as supervisor,
    ):
        for _ in range(50):
            loss = plant.step_loss(injector.draw(next(plant.loader)))
            loss.backward()
            plant.optimizer.step()
            plant.optimizer.zero_grad()
            supervisor.update(loss)
        text = supervisor.report()
    assert "Verdict         stable: 1 step dropped, nothing had to be undone" in text
    assert "Step 41: the proposed update was dropped because its gradient is not finite." in text
    assert max(map(len, text.splitlines())) <= 80


def decision(action: Action, level: Level = Level.CONFIRMED) -> Decision:
    return Decision(9, action, action, level, Mode.HALTED if action is Action.HALT else Mode.WATCHING, "Step 9: why.")


@pytest.mark.parametrize(
    ("statistics", "last", "verdict"),
    [
        ({}, None, "stable: nothing had to be dropped or undone"),
        ({"vetoes": 2}, None, "stable: 2 steps dropped"),
        ({"rollbacks": 1, "vetoes": 2}, None, "recovered: 1 rollback, 2 steps dropped"),
        ({"rollbacks": 1, "mode": "RECOVERING"}, None, "recovering: 1 rollback"),
        ({"rollbacks": 3, "mode": "HALTED"}, None, "halted after 3 rollbacks"),
        ({"rollbacks": 3}, decision(Action.HALT), "halted after 3 rollbacks"),
    ],
)
def test_the_report_begins_with_a_verdict(statistics: dict[str, Any], last: Decision | None, verdict: str) -> None:
    assert f"Verdict         {verdict}" in render(statistics, last, Settings(), [])


def test_a_long_list_of_events_keeps_its_beginning_and_its_end() -> None:
    events = [(step, f"Step {step}: something.") for step in range(100)]
    text = render({"errors": 1, "lapsed_probes": 2, "warm": True}, decision(Action.ACCEPT), Settings(), events)
    assert "Step 9: something." in text
    assert "Step 10: something." not in text
    assert "... 60 more ..." in text
    assert "Step 69: something." not in text
    assert "Step 70: something." in text
    assert "1 fault inside the supervisor" in text
    assert "LAPSED: 2 probes" in text
