"""What is shipped: built, looked into, installed alone; one version; a changelog that keeps up; completion."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import pytest

import kalmanguard
from kalmanguard.cli import completion
from kalmanguard.cli.options import FAULT_KINDS
from kalmanguard.journal.schema import FILE_NAME
from kalmanguard.models import plant_names
from kalmanguard.settings import PRESETS

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / ".ci" / "package"


def version() -> str:
    return str(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"])


def package(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, SCRIPT, "--borrow", *options], capture_output=True, text=True, timeout=600, check=False
    )


# --- the build --------------------------------------------------------------------------------------------------------


def test_archive_and_wheel_are_whole_and_install_alone(tmp_path: Path) -> None:
    before = set(os.listdir(ROOT))
    done = package("--brief", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert {file.name for file in tmp_path.iterdir()} == {
        f"kalmanguard-{version()}.tar.gz",
        f"kalmanguard-{version()}-py3-none-any.whl",
    }
    assert set(os.listdir(ROOT)) == before, "a build must leave nothing in the tree"


@pytest.mark.slow
def test_the_installed_wheel_trains_verifies_and_examines_itself() -> None:
    done = package()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Problems: none" in done.stdout


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = spec_from_loader("package_script", SourceFileLoader("package_script", str(SCRIPT)))
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
    try:
        spec.loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = before
    return module


def wheel_of(folder: Path, names: list[str]) -> Path:
    wheel = folder / "some.whl"
    with zipfile.ZipFile(wheel, "w") as packed:
        for name in names:
            packed.writestr(name, f"Name: kalmanguard\nVersion: {version()}\n" if name.endswith("METADATA") else "")
    return wheel


def test_a_wheel_that_lacks_or_adds_something_is_refused(script: ModuleType, tmp_path: Path) -> None:
    info = f"kalmanguard-{version()}.dist-info"
    names = [f"kalmanguard/{name}" if name.startswith("models/") else name for name in script.sources()]
    names += [f"{info}/{name}" for name in ("METADATA", "licenses/LICENSE", "entry_points.txt")]
    script.check_wheel(wheel_of(tmp_path, names), version())
    for missing in ("kalmanguard/py.typed", f"{info}/licenses/LICENSE"):
        with pytest.raises(SystemExit, match=f"Not packed: {re.escape(missing)}"):
            script.check_wheel(wheel_of(tmp_path, [name for name in names if name != missing]), version())
    templates = [name for name in names if name.endswith(".j2")]
    assert templates
    with pytest.raises(SystemExit, match="Not packed"):
        script.check_wheel(wheel_of(tmp_path, [name for name in names if name not in templates]), version())
    with pytest.raises(SystemExit, match=r"not part of the package: tests/test_cli\.py"):
        script.check_wheel(wheel_of(tmp_path, [*names, "tests/test_cli.py"]), version())
    with pytest.raises(SystemExit, match="beside the package"):
        script.check_wheel(wheel_of(tmp_path, [*names, "models/mlp.py"]), version())
    with pytest.raises(SystemExit, match="does not state the version 9"):
        script.check_wheel(wheel_of(tmp_path, [name.replace(version(), "9") for name in names]), "9")


# --- version and changelog --------------------------------------------------------------------------------------------


def test_there_is_one_version() -> None:
    assert kalmanguard.__version__ == version()
    stated = re.compile(r"""__version__\s*=\s*['"]""")
    files = [file for name in ("kalmanguard", "models") for file in (ROOT / name).rglob("*.py")]
    assert [file.name for file in files if stated.search(file.read_text(encoding="utf-8"))] == []


def test_the_changelog_has_an_entry_for_what_is_shipped() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    names = re.findall(r"^## \[([^\]]+)\]", text, re.MULTILINE)
    assert names[0] in ("Unreleased", version()), "the newest entry comes first"
    assert version() in names, "what pyproject.toml calls the version is described"
    released = [tuple(map(int, name.split("."))) for name in names if name != "Unreleased"]
    assert released == sorted(set(released), reverse=True)
    for name in names:
        entry = text.split(f"## [{name}]", 1)[1].split("\n## [", 1)[0]
        assert re.search(r"^- \S", entry, re.MULTILINE), f"{name} has no entry"


# --- completion -------------------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for run in ("runs/mlp-1", "runs/mlp-2", "alone"):
        (tmp_path / run).mkdir(parents=True)
        (tmp_path / run / FILE_NAME).touch()
    (tmp_path / "rubbish" / "deep").mkdir(parents=True)
    (tmp_path / "guard.toml").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_names_are_completed(place: Path) -> None:
    assert list(completion.complete_runs("")) == ["alone", "runs/mlp-1", "runs/mlp-2"]
    assert list(completion.complete_runs("runs/mlp-2")) == ["runs/mlp-2"]
    assert list(completion.complete_runs(f"{place}/ru")) == [f"{place}/runs/mlp-1", f"{place}/runs/mlp-2"]
    assert list(completion.complete_runs("nowhere/x")) == []
    assert list(completion.complete_watched("r")) == ["runs", "runs/mlp-1", "runs/mlp-2"]
    assert completion.complete_settings("") == [*PRESETS, "guard.toml"]
    assert completion.complete_settings("b") == ["balanced"]
    assert completion.complete_faults("") == FAULT_KINDS.split(", ")
    assert set(completion.complete_plants("")) == set(plant_names())


def shell_environment(place: Path) -> dict[str, str]:
    """With a ``kalmanguard`` on the path, a home of its own, and no detection of the shell around the tests."""
    command = place / "bin" / "kalmanguard"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m kalmanguard "$@"\n')
    command.chmod(0o755)
    return dict(os.environ) | {
        "PATH": f"{command.parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "HOME": str(place / "bin"),
        "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1",
    }


def done(*words: str, env: dict[str, str]) -> str:
    result = subprocess.run(words, capture_output=True, text=True, env=env, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_what_was_typed(place: Path) -> None:
    environment = shell_environment(place)
    done("kalmanguard", "--install-completion", "bash", env=environment)
    assert "kalmanguard" in (place / "bin" / ".bashrc").read_text()
    (installed,) = (place / "bin" / ".bash_completions").glob("kalmanguard*")
    typed = {"show r": ["runs/mlp-1", "runs/mlp-2"], "run m": ["mlp"], "mon": ["monitor"]}
    lines = [
        f'COMP_WORDS=(kalmanguard {text}); COMP_CWORD={len(text.split())}; _kalmanguard_completion kalmanguard; '
        'echo "${COMPREPLY[@]}"'
        for text in typed
    ]  # fmt: skip
    printed = done("bash", "--norc", "-c", "\n".join([f"source {installed}", *lines]), env=environment)
    assert [line.split() for line in printed.splitlines()] == list(typed.values())


@pytest.mark.skipif(shutil.which("fish") is None, reason="needs fish")
def test_fish_completes_what_was_typed(place: Path) -> None:
    environment = shell_environment(place)
    script = done("kalmanguard", "--show-completion", "fish", env=environment)
    printed = done("fish", "--no-config", "-c", f'{script}\ncomplete -C "kalmanguard show r"', env=environment)
    assert printed.split() == ["runs/mlp-1", "runs/mlp-2"]


@pytest.mark.parametrize(
    ("instruction", "variables"),
    [
        ("complete_zsh", {"_TYPER_COMPLETE_ARGS": "kalmanguard show runs/"}),
        (
            "complete_fish",
            {"_TYPER_COMPLETE_ARGS": "kalmanguard show runs/", "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
        ),
    ],
)
def test_what_zsh_and_fish_are_answered(instruction: str, variables: dict[str, str], place: Path) -> None:
    environment = shell_environment(place) | {"_KALMANGUARD_COMPLETE": instruction} | variables
    printed = done("kalmanguard", env=environment)
    assert re.findall(r"runs/mlp-\d", printed) == ["runs/mlp-1", "runs/mlp-2"]
