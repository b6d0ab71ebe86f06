"""The folders of a checkpoint store: which one is written next, and which one is the last clean one."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, Final, final

from kalmanguard.errors import SnapshotError
from kalmanguard.snapshots.checkpoint import (
    FORMAT,
    TENSORS,
    TREE,
    VERSION,
    Manifest,
    check_format,
    read_checkpoint,
    read_manifest,
)
from kalmanguard.snapshots.files import inside, read_json, remove, replace_text, sync

ANCHOR: Final = "last_clean.json"
_SLOT_NAME: Final = re.compile(r"slot-(0|[1-9][0-9]{0,5})")


@final
class Rotation:
    """Sub-folders ``slot-0``, ``slot-1``, ... used in turn, and the anchor file that names the last clean one.

    Parameters
    ----------
    folder
        Where they lie.
    slots
        How many there are; at least two.
    kind
        Format of the checkpoints.
    required
        Files that each of them holds.

    Notes
    -----
    A checkpoint becomes visible by one rename and clean by another. The slot that the anchor names is never the next
    one, so there is no moment at which the anchor names a checkpoint that is not whole.
    """

    def __init__(
        self, folder: Path, slots: int, *, kind: str = FORMAT, required: Collection[str] = (TENSORS, TREE)
    ) -> None:
        self._folder = folder
        self._slots = slots
        self._kind, self._required = kind, required
        self.temporary = folder / ".new"
        self._old = folder / ".old"

    def load_last_clean(self) -> tuple[int, Any, dict[str, Any]]:
        """Verify and return the last clean checkpoint as (step, tree, meta).

        Raises
        ------
        SnapshotError
            There is none, or the anchor or the checkpoint is damaged, foreign, newer, or leads out of the folder.
        """
        folder, digest = self.last_clean()
        return read_checkpoint(folder, manifest_digest=digest)

    def last_clean(self) -> tuple[Path, str]:
        """Return the folder of the last clean checkpoint and the SHA-256 digest that its manifest must have.

        Raises
        ------
        SnapshotError
            There is no anchor, or it is damaged, foreign, newer, or leads out of the folder.
        """
        path = self._folder / ANCHOR
        anchor = read_json(path, "the anchor of the last clean checkpoint")
        check_format(anchor, path, self._kind)
        name, digest = anchor.get("folder"), anchor.get("manifest_sha256")
        if not isinstance(name, str) or not _SLOT_NAME.fullmatch(name) or not isinstance(digest, str):
            raise SnapshotError(f"{path} names {name!r}, which is no checkpoint of this folder.")
        return inside(self._folder, name), digest

    @property
    def is_anchored(self) -> bool:
        """Whether there is an anchor, sound or not."""
        return os.path.lexists(self._folder / ANCHOR)

    def checkpoints(self) -> dict[Path, int]:
        """Return the steps of all checkpoints with a readable manifest, oldest save first."""
        found = []
        for folder in sorted(self._folder.iterdir()):
            if _SLOT_NAME.fullmatch(folder.name) and not folder.is_symlink():
                try:
                    manifest = self._manifest(folder)
                except SnapshotError:
                    continue
                found.append((manifest.sequence, folder, manifest.step))
        return {folder: step for _, folder, step in sorted(found)}

    def commit(self, *, step: int, clean: bool, digest: str) -> None:
        """Rename the finished temporary folder into a slot and, if it is clean, let the anchor name it."""
        name = self._next_name()
        target, old = self._folder / name, self._old
        if target.exists():
            remove(old)
            os.rename(target, old)
        os.rename(self.temporary, target)
        sync(self._folder)
        if clean:
            anchor = {
                "format": self._kind,
                "version": VERSION,
                "folder": name,
                "step": step,
                "manifest_sha256": digest,
            }
            replace_text(self._folder / ANCHOR, json.dumps(anchor, indent=1))

    def _next_name(self) -> str:
        """Choose an unused slot, else the oldest, but never the one that the anchor names."""
        sequences = self._sequences()
        kept = self._anchored()
        names = [f"slot-{number}" for number in range(self._slots)]
        return min((name for name in names if name != kept), key=lambda name: sequences.get(name, -1))

    def _sequences(self) -> dict[str, int]:
        sequences = {}
        for folder in self._folder.iterdir():
            if _SLOT_NAME.fullmatch(folder.name):
                try:
                    sequences[folder.name] = self._manifest(folder).sequence
                except SnapshotError:
                    sequences[folder.name] = 0
        return sequences

    def _manifest(self, folder: Path) -> Manifest:
        return read_manifest(folder, kind=self._kind, required=self._required)

    def _anchored(self) -> str | None:
        try:
            return str(read_json(self._folder / ANCHOR, "the anchor")["folder"])
        except (SnapshotError, KeyError):
            return None

    def recover(self) -> int:
        """Clean up after a process that died while writing; return the last sequence number used."""
        remove(self.temporary)
        self.clear()
        return max(self._sequences().values(), default=0)

    def clear(self) -> None:
        """Delete the checkpoint that was replaced."""
        remove(self._old)
