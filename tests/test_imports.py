"""Importing kalmanguard is cheap, and the numeric core runs where torch is not installed.

Each case runs in a fresh interpreter, because what this one has imported already would hide what is loaded.
"""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import kalmanguard

PACKAGE = Path(kalmanguard.__file__).parent
HEAVY = {"torch", "scipy", "filterpy", "statsmodels", "mapie", "sklearn", "pandas", "matplotlib"}
#: What must load where torch is not installed.
NUMERIC = [
    "engine",
    "statefile",
    "replay",
    "report",
    "estimators",
    "detectors",
    "control",
    "calibration",
    "journal",
    "certificate",
    "settings",
    "records",
    "errors",
]


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded(statement: str) -> set[str]:
    code = f"import sys; before = set(sys.modules)\n{statement}\nprint(*sorted(set(sys.modules) - before))"
    return {name.partition(".")[0] for name in run(code).split()}


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert not loaded("import kalmanguard") & (HEAVY | {"numpy", "pydantic", "rich", "typer"})


def test_records_and_errors_load_numpy_at_most() -> None:
    assert not loaded("from kalmanguard import Decision, Measurement, TrainingHalted") & (HEAVY | {"pydantic"})


def test_supervisor_loads_no_statistics_or_plotting_before_one_is_made() -> None:
    assert not loaded("import torch\nfrom kalmanguard import Supervisor") & (HEAVY - {"torch"})


@pytest.mark.parametrize("module", NUMERIC)
def test_numeric_core_runs_without_torch(module: str) -> None:
    names = sorted(
        ".".join(("kalmanguard", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
        for path in [PACKAGE / f"{module}.py", *(PACKAGE / module).rglob("*.py")]
        if path.exists()
    )
    assert names
    imports = "".join(f"import {name}\n" for name in names)
    assert not loaded(f"sys.modules['torch'] = None\n{imports}") & (HEAVY - {"torch"})


def test_verify_stands_alone() -> None:
    names = loaded("sys.modules['torch'] = sys.modules['pydantic'] = None\nimport kalmanguard.certificate.verify as v")
    assert not names & (HEAVY - {"torch"})
    tree = ast.parse((PACKAGE / "certificate" / "verify.py").read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "." for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    tops = {name.partition(".")[0] for name in imported}
    assert tops <= {"numpy", "__future__", *sys.stdlib_module_names}


@pytest.mark.parametrize("name", kalmanguard.__all__)
def test_every_public_name_is_there(name: str) -> None:
    value = getattr(kalmanguard, name)
    if name != "__version__":
        assert value.__name__ == name
        assert value is getattr(importlib.import_module(value.__module__), name)
    assert name in dir(kalmanguard)


def test_version_is_that_of_the_installed_package() -> None:
    assert kalmanguard.__version__ == version("kalmanguard")


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Supervizor'"):
        _ = kalmanguard.Supervizor  # type: ignore[attr-defined]


def test_core_never_names_the_plants() -> None:
    """Plants are found through entry points only; a lazy import of them would escape the static contract."""
    guilty = [path for path in PACKAGE.rglob("*.py") if "kalmanguard.models" in _imports(path)]
    assert guilty == []


def _imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {".".join(name.split(".")[:2]) for name in names}
