"""Checks that all ranks write to one and the same folder."""

from __future__ import annotations

import tempfile
from pathlib import Path

from kalmanguard.distributed.peers import Peers
from kalmanguard.errors import SnapshotError


def share_folder(folder: Path, peers: Peers) -> None:
    """Make a folder on all ranks, and check that each can write to it and sees what the others have written.

    Raises
    ------
    SnapshotError
        It is not so; the same sentence on every rank.
    RankError
        A rank does not answer.
    """
    what = "share a checkpoint folder"
    written: list[Path] = []

    def write() -> str:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Not deleted when it is closed: the other ranks look for it.
            with tempfile.NamedTemporaryFile(dir=folder, prefix=".rank-", delete=False) as file:
                written.append(Path(file.name))
        except OSError as error:
            raise SnapshotError(
                f"The checkpoint folder {folder} cannot be written to: {error.strerror}. Choose another run_dir."
            ) from error
        return written[0].name

    def look() -> None:
        missing = [rank for rank, name in enumerate(names) if not (folder / name).exists()]
        if missing:
            raise SnapshotError(
                f"The checkpoint folder {folder} is another one here than on rank {missing[0]}: choose one on a file "
                "system that all ranks see."
            )

    try:
        names = peers.gather(what, peers.all(what, write))
        peers.all(what, look)
    finally:
        for path in written:
            path.unlink(missing_ok=True)
