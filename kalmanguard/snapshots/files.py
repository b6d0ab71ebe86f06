"""Files that are either whole or not there: synced writes, atomic replacement, paths that cannot leave a folder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from kalmanguard.errors import SnapshotError

#: JSON beside the tensors is small; a larger file is not ours.
_LARGEST_JSON_BYTES: Final = 1 << 28


def sync(path: Path) -> None:
    """Force a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Force every file and folder below ``folder``, and itself, to the disk."""
    for path in walk(folder):
        sync(path)
    for parent, _, _ in os.walk(folder, topdown=False):
        sync(Path(parent))


def walk(folder: Path) -> Iterator[Path]:
    """Yield all files below ``folder`` in a fixed order.

    Raises
    ------
    SnapshotError
        A link or a special file: a checkpoint has none, and following one could lead anywhere.
    """
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in [*folders, *names]:
            path = Path(parent, name)
            if path.is_symlink() or not (path.is_dir() or path.is_file()):
                raise SnapshotError(f"{path} is a link or a special file; a checkpoint holds plain files only.")
        for name in sorted(names):
            yield Path(parent, name)


def write_text(path: Path, text: str) -> None:
    """Write a new file and force it to the disk."""
    with open(path, "x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def replace_text(path: Path, text: str) -> None:
    """Replace a file atomically: readers and crashes see the old or the new content, never a mixture."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        write_text(temporary, text)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON object.

    Raises
    ------
    SnapshotError
        The file is missing, a link, too large, truncated, or no JSON object.
    """
    if path.is_symlink():
        raise SnapshotError(f"{path} is a link; {what} must be a plain file.")
    try:
        if path.stat().st_size > _LARGEST_JSON_BYTES:
            raise SnapshotError(f"{path} has {path.stat().st_size:,} bytes, far too many for {what}.")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SnapshotError(f"There is no {path}, so {what} is missing.") from None
    except OSError as error:
        raise SnapshotError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise SnapshotError(f"{path} is truncated or damaged: it is not valid JSON.") from error
    if not isinstance(value, dict):
        raise SnapshotError(f"{path} is not {what}: it holds no JSON object.")
    return value


def file_digest(path: Path) -> str:
    """Return the SHA-256 digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_digest(text: str) -> str:
    """Return the SHA-256 digest of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def inside(folder: Path, relative: object) -> Path:
    """Join a path from a file to ``folder``, refusing any that leads out of it.

    Raises
    ------
    SnapshotError
        An absolute path, ``..``, or a link on the way.
    """
    if not isinstance(relative, str) or not relative or "\\" in relative or "\0" in relative:
        raise SnapshotError(f"{relative!r} is not the name of a file in {folder}.")
    parts = relative.split("/")
    if any(part in ("", ".", "..") for part in parts) or Path(relative).is_absolute() or Path(relative).drive:
        raise SnapshotError(f"{relative!r} leads out of {folder}; it is refused.")
    path = folder
    for part in parts:
        path = path / part
        if path.is_symlink():
            raise SnapshotError(f"{path} is a link; a checkpoint holds plain files only.")
    return path


def remove(folder: Path) -> None:
    """Remove a folder of ours, if it is there; a link is removed, never followed."""
    if folder.is_symlink():
        folder.unlink(missing_ok=True)
    elif folder.is_dir():
        shutil.rmtree(folder)
