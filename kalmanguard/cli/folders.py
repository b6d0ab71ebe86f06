"""Where commands write: always into a folder of their own, never over what was there before."""

from __future__ import annotations

import json
import os
from itertools import count
from pathlib import Path
from typing import Any

from kalmanguard.cli.terminal import plain


def fresh_folder(parent: Path, stem: str) -> Path:
    """Make ``parent/stem-1``, or the next number that is free."""
    parent.mkdir(parents=True, exist_ok=True)
    for index in count(1):
        folder = parent / f"{stem}-{index}"
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise AssertionError("count() does not end")


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write a JSON file in one piece."""
    draft = path.with_name(path.name + ".part")
    draft.write_text(json.dumps(plain(data), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(draft, path)


def shown(path: Path) -> str:
    """A path for people: relative to the working folder where it lies below it."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
