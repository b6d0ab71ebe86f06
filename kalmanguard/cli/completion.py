"""What the shell completes besides options: run folders, plants, presets, kinds of faults. Loads nothing heavy."""

from __future__ import annotations

import os
from collections.abc import Iterator

_JOURNAL = "journal.sqlite"
#: As `kalmanguard.settings.PRESETS` names them; that module is not loaded for a key stroke.
PRESETS = ("conservative", "balanced", "aggressive")


def complete_runs(incomplete: str) -> Iterator[str]:
    """Run folders: those where the user is typing, and those in folders right below."""
    for folder in _folders(incomplete):
        if _is_run(folder):
            yield folder
        else:
            yield from _runs_in(folder)


def complete_watched(incomplete: str) -> Iterator[str]:
    """Run folders, and folders of them."""
    for folder in _folders(incomplete):
        below = [] if _is_run(folder) else _runs_in(folder)
        if below or _is_run(folder):
            yield folder
        yield from below


def _folders(incomplete: str) -> list[str]:
    base, stem = os.path.split(incomplete)
    try:
        with os.scandir(base or ".") as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir())
    except OSError:
        return []
    hidden = stem.startswith(".")
    return [os.path.join(base, name) for name in names if name.startswith(stem) and (hidden or name[0] != ".")]


def _runs_in(folder: str) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.path for entry in entries if _is_run(entry.path))
    except OSError:
        return []


def _is_run(folder: str) -> bool:
    return os.path.isfile(os.path.join(folder, _JOURNAL))


def complete_plants(incomplete: str) -> list[str]:
    """Names of registered plants."""
    from kalmanguard.cli.plants import plant_names

    return [name for name in plant_names() if name.startswith(incomplete)]


def complete_settings(incomplete: str) -> list[str]:
    """Presets, and TOML files of the folder that is being typed."""
    base, stem = os.path.split(incomplete)
    try:
        names = sorted(os.listdir(base or "."))
    except OSError:
        names = []
    presets = [name for name in PRESETS if name.startswith(incomplete)]
    return presets + [os.path.join(base, name) for name in names if name.startswith(stem) and name.endswith(".toml")]


def complete_faults(incomplete: str) -> list[str]:
    """Kinds of faults; the step is still to be given."""
    from kalmanguard.cli.options import FAULT_KINDS

    return [kind for kind in FAULT_KINDS.split(", ") if kind.startswith(incomplete)]
