"""The supervisor's state beside a Trainer's own, in each of its checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from kalmanguard.errors import SnapshotError

#: Name of the file in a checkpoint's folder.
NAME: Final = "kalmanguard.json"


def save_state(checkpoint: Path, state: dict[str, Any]) -> None:
    """Write ``state`` into the folder of a checkpoint, all of it or nothing.

    Raises
    ------
    SnapshotError
        It cannot be written.
    """
    draft = checkpoint / f"{NAME}.part"
    try:
        draft.write_text(json.dumps(state), encoding="utf-8")
        draft.replace(checkpoint / NAME)
    except OSError as error:
        raise SnapshotError(f"{checkpoint / NAME} cannot be written: {error.strerror}.") from error


def load_state(checkpoint: Path) -> dict[str, Any]:
    """Read what `save_state` wrote.

    Raises
    ------
    SnapshotError
        There is no such file, or it is damaged.
    """
    path = checkpoint / NAME
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SnapshotError(f"{checkpoint} holds no state of a supervisor.") from None
    except (OSError, ValueError) as error:
        raise SnapshotError(f"{path} cannot be read: {error}.") from error
    if not isinstance(state, dict):
        raise SnapshotError(f"{path} holds a {type(state).__name__}, not the state of a supervisor.")
    return state
