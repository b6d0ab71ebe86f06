"""The doctor: finds what is wrong, says the way out, and its own rescue is a real one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from kalmanguard.cli.app import app
from kalmanguard.cli.checkup import folder as folder_checks
from kalmanguard.cli.checkup import parts, selftest
from kalmanguard.cli.checkup.check import Verdict
from kalmanguard.cli.checkup.environment import check_environment, memory_limit, usable_cores
from kalmanguard.cli.checkup.folder import check_folder, file_system
from kalmanguard.cli.checkup.parts import EXTRAS, TESTED, Requirement, judge, release

ROOT = Path(__file__).parent.parent
RUNNER = CliRunner(env={"COLUMNS": "100", "TERM": "dumb"})


def call(*arguments: object) -> Any:
    return RUNNER.invoke(app, ["doctor", *map(str, arguments)])


@pytest.fixture(scope="module")
def examined(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    place = tmp_path_factory.mktemp("doctor")
    result = call("--run-dir", place / "runs", "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert isinstance(data, dict)
    return place, data, result.stdout


def named(data: dict[str, Any], group: str, name: str) -> dict[str, Any]:
    (found,) = [check for check in data["checks"] if (check["group"], check["name"]) == (group, name)]
    assert isinstance(found, dict)
    return found


def test_it_finds_everything_in_order_and_leaves_nothing_behind(examined: tuple[Path, dict[str, Any], str]) -> None:
    place, data, _ = examined
    assert (data["exit_code"], data["problems"]) == (0, 0)
    assert list(place.iterdir()) == []
    assert named(data, "Environment", "torch")["values"]["version"] == torch.__version__
    assert named(data, "Environment", "cores")["values"]["threads"] == torch.get_num_threads()
    assert named(data, "Run folder", "journal")["values"]["records"] >= 500
    assert "gloo" in named(data, "Environment", "distributed")["values"]["backends"]


def test_its_rescue_is_real(examined: tuple[Path, dict[str, Any], str]) -> None:
    data = examined[1]
    assert named(data, "Self-test", "rollback")["values"] == {"rollbacks": 1, "C2": "HOLDS"}
    assert named(data, "Self-test", "certificate")["values"]["claims"]["chain"] == "HOLDS"
    assert named(data, "Self-test", "replay")["values"]["identical"] is True
    assert named(data, "Self-test", "overhead")["values"]["ratio"] > 1


def test_a_self_test_without_a_rescue_is_a_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(selftest, "_FAULT", "lr_spike:1@61:steps=1")  # a fault that does nothing
    found = {check.name: check.verdict for check in selftest._rescued(tmp_path / "run")}
    assert found == {"rollback": Verdict.PROBLEM, "certificate": Verdict.OK, "replay": Verdict.OK}


def test_a_self_test_that_breaks_is_a_finding_and_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "_PLANT", "jet")
    found = {check.name: check for check in selftest.self_test()}
    assert found["training"].verdict is Verdict.PROBLEM
    assert "There is no plant 'jet'" in found["training"].text


def test_what_it_prints_can_be_posted(examined: tuple[Path, dict[str, Any], str]) -> None:
    place, _, printed = examined
    for private in (str(place), str(Path.home()), sys.prefix, str(ROOT)):
        assert f"{private}/" not in printed
    told = call("--no-self-test", "--verbose", "--run-dir", place)
    assert told.exit_code == 0
    assert sys.executable in told.stdout.replace("\n", "").replace(" ", "")


def test_for_people_it_is_a_list_with_a_verdict(tmp_path: Path) -> None:
    result = call("--no-self-test", "--run-dir", tmp_path)
    assert result.exit_code == 0, result.output
    assert [line for line in result.stdout.splitlines() if line and not line.startswith(("OK", "NOTE", " ", "ABSENT"))][
        :-1
    ] == ["Environment", "Packages", "Extras", "Run folder"]
    assert re.search(r"Problems: none; notes: \d+\.", result.stdout)


def test_a_folder_that_cannot_be_written_to_is_a_problem() -> None:
    result = call("--no-self-test", "--run-dir", "/proc/nowhere", "--json")
    assert result.exit_code == 1
    check = named(json.loads(result.stdout), "Run folder", "writable")
    assert check["verdict"] == "PROBLEM"
    assert "--run-dir" in check["advice"]


def test_without_torch_it_still_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch.so is missing')\n")
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "kalmanguard", "doctor", "--run-dir", tmp_path, "--json"],
        capture_output=True, text=True, env=environment, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    data = json.loads(done.stdout)
    check = named(data, "Environment", "torch")
    assert check["verdict"] == "PROBLEM"
    assert "libtorch.so is missing" in check["text"]
    assert "pip install torch" in check["advice"]
    assert named(data, "Self-test", "training")["verdict"] == "PROBLEM"
    assert named(data, "Run folder", "journal")["verdict"] == "OK", "journals need no torch"


# --- versions ---------------------------------------------------------------------------------------------------------


def project() -> dict[str, Any]:
    return dict(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"])


def test_the_tested_versions_are_those_of_the_constraints() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.lower().split("==") for line in lines if "==" in line)
    assert {name: pinned[name] for name in TESTED} == TESTED


def test_every_requirement_has_a_tested_version_and_every_extra_a_purpose() -> None:
    stated = project()
    extras = {name: lines for name, lines in stated["optional-dependencies"].items() if name not in parts._DEVELOPMENT}
    for lines in (stated["dependencies"], *extras.values()):
        for line in lines:
            match = parts._REQUIREMENT.match(line)
            assert match is not None
            assert match[1] in TESTED, "tell the doctor which version was tested"
    assert set(extras) <= set(EXTRAS)


def test_requirements_are_read_from_the_package() -> None:
    found = parts.requirements()
    assert Requirement("torch", "2.6", "") in found
    assert Requirement("pyarrow", "15", "parquet") in found
    assert Requirement("accelerate", "", "huggingface") in found


@pytest.mark.parametrize(
    ("found", "needed", "verdict", "words"),
    [
        (None, True, Verdict.PROBLEM, "pip install 'torch>=2.6'"),
        (None, False, Verdict.ABSENT, "pip install"),
        ("2.5.1+cpu", True, Verdict.PROBLEM, "Upgrade"),
        ("2.6.0", True, Verdict.OK, ""),
        (TESTED["torch"] + "+cpu", True, Verdict.OK, ""),
        ("99.0", True, Verdict.NOTE, f"torch=={TESTED['torch']}"),
    ],
)
def test_versions_are_judged_by_what_is_required_and_what_was_tested(
    found: str | None, needed: bool, verdict: Verdict, words: str
) -> None:
    check = judge(Requirement("torch", "2.6", ""), found, needed=needed)
    assert check.verdict is verdict
    assert words in check.advice


def test_releases_are_compared_as_numbers() -> None:
    assert release("2.13.0+cpu") > release("2.6")
    assert release("10.0") > release("9.9.9")


# --- machines that this one is not ------------------------------------------------------------------------------------


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_quotas_of_control_groups_count(tmp_path: Path) -> None:
    second = write(
        tmp_path / "v2",
        {
            "proc/self/cgroup": "0::/job/step\n",
            "sys/fs/cgroup/job/step/cpu.max": "max 100000\n",
            "sys/fs/cgroup/job/cpu.max": "50000 100000\n",
            "sys/fs/cgroup/job/memory.max": "1073741824\n",
            "sys/fs/cgroup/job/step/memory.max": "max\n",
        },
    )
    assert usable_cores(second) == 0.5
    assert memory_limit(second) == 2**30
    first = write(
        tmp_path / "v1",
        {
            "proc/self/cgroup": "4:memory:/job\n3:cpu,cpuacct:/job\n",
            "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "25000\n",
            "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "536870912\n",
        },
    )
    assert usable_cores(first) == 0.25
    assert memory_limit(first) == 2**29
    assert usable_cores(tmp_path / "neither") >= 1
    assert memory_limit(tmp_path / "neither") is None
    torch.set_num_threads(2)
    try:
        cores = {check.name: check for check in check_environment(second)}["cores"]
    finally:
        torch.set_num_threads(1)
    assert cores.verdict is Verdict.NOTE
    assert "OMP_NUM_THREADS=1" in cores.advice


def test_file_systems_of_several_machines_are_pointed_out(tmp_path: Path) -> None:
    home = tmp_path / "home dir" / "runs"
    home.mkdir(parents=True)
    point = str(tmp_path / "home dir").replace(" ", "\\040")
    mounts = f"1 0 0:1 / / rw - ext4 /dev/sda rw\n2 1 0:2 / {point} rw,relatime shared:3 - nfs4 server:/x rw\n"
    root = write(tmp_path / "root", {"proc/self/mountinfo": mounts})
    assert file_system(home, root) == "nfs4"
    assert file_system(tmp_path, root) == "ext4"
    assert file_system(home, tmp_path / "nothing") is None
    found = {check.name: check for check in check_folder(home, "runs", root)}
    assert found["file system"].verdict is Verdict.NOTE
    assert "local disk" in found["file system"].advice
    assert found["journal"].verdict is Verdict.OK


def test_a_slow_disk_and_a_clock_that_is_off_are_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_checks, "_SLOW_SYNC_S", 0.0)
    monkeypatch.setattr(folder_checks, "_SKEW_S", -1.0)
    found = {check.name: check.verdict for check in check_folder(tmp_path, "runs")}
    assert found["journal"] is found["clock"] is Verdict.NOTE
