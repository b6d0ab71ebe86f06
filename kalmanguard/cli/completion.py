"""What the shell completes besides options: run folders, plants, presets, kinds of faults. Loads nothing heavy."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from kalmanguard.cli.options import FAULT_KINDS

_JOURNAL = "journal.sqlite"
#: As `kalmanguard.settings.PRESETS` names them; that module is not loaded for a key stroke.
PRESETS = ("conservative", "balanced", "aggressive")


def complete_runs(incomplete: str) -> Iterator[tuple[str, str]]:
    """Folders that hold a run, or lead on: ``ru`` gives ``runs/``, ``runs/`` gives the runs in it."""
    base, stem = os.path.split(incomplete)
    try:
        entries = sorted(entry.name for entry in os.scandir(base or ".") if entry.is_dir())
    except OSError:
        return
    for name in entries:
        if name.startswith(stem) and (stem.startswith(".") or not name.startswith(".")):
            path = os.path.join(base, name)
            if os.path.exists(os.path.join(path, _JOURNAL)):
                yield path, "a run"
            elif _leads_on(Path(path)):
                yield f"{path}/", "a folder with runs"


def _leads_on(folder: Path) -> bool:
    try:
        return any(os.path.exists(os.path.join(entry.path, _JOURNAL)) for entry in os.scandir(folder))
    except OSError:
        return False


def complete_plants(incomplete: str) -> list[str]:
    """Names of registered plants."""
    from kalmanguard.cli.plants import plant_names

    return [name for name in plant_names() if name.startswith(incomplete)]


def complete_settings(incomplete: str) -> list[str]:
    """Presets, and TOML files of the folder that is being typed."""
    presets = [name for name in PRESETS if name.startswith(incomplete)]
    base, stem = os.path.split(incomplete)
    try:
        names = sorted(os.listdir(base or "."))
    except OSError:
        names = []
    return presets + [os.path.join(base, name) for name in names if name.startswith(stem) and name.endswith(".toml")]


def complete_faults(incomplete: str) -> list[str]:
    """Kinds of faults, up to the step that is still to be given."""
    return [f"{kind}" for kind in FAULT_KINDS.split(", ") if kind.startswith(incomplete)]
