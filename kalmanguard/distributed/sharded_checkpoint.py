"""One checkpoint of all ranks: each writes its files, all read what they need, and every file has a digest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

from kalmanguard.distributed.content import Content, content_file, differing, held_twice
from kalmanguard.distributed.parts import Part
from kalmanguard.distributed.peers import Peers
from kalmanguard.distributed.planning import Piece, PieceSavePlanner
from kalmanguard.distributed.resharding import Loaded, read_content
from kalmanguard.distributed.storage import INDEX, ShardWriter
from kalmanguard.errors import SnapshotError
from kalmanguard.snapshots.checkpoint import (
    MANIFEST,
    MODEL,
    SHARDED_FORMAT,
    Manifest,
    check_files,
    check_strays,
    read_manifest,
    write_manifest,
)
from kalmanguard.snapshots.files import file_digest, sync, sync_tree, walk, write_text

#: Files without which there is no checkpoint.
REQUIRED: Final = (INDEX, content_file(0))


def write_sharded(
    folder: Path,
    *,
    peers: Peers,
    step: int,
    sequence: int,
    clean: bool,
    tree: Any,
    meta: Mapping[str, Any],
    parts: Mapping[str, Part],
    model_saver: Callable[[Path], None] | None,
) -> str:
    """Write a checkpoint into the new folder ``folder``, synced, with all ranks; return the digest of its manifest.

    Parameters
    ----------
    folder
        Not there yet; rank 0 makes it.
    peers
        The ranks.
    step, sequence, clean
        For the manifest; rank 0's count.
    tree, meta
        This rank's.
    parts
        What this rank's tensors are parts of, by name.
    model_saver
        Called on the rank that has one, with an empty folder inside the checkpoint.

    Raises
    ------
    SnapshotError
        A rank could not; the same sentence on each.
    RankError
        A rank does not answer.
    """

    def others() -> dict[str, tuple[int, str]]:
        """Write what torch has not; size and digest of all that this rank has written."""
        write_text(folder / content_file(peers.rank), text)
        mine = [folder / writer.file, folder / content_file(peers.rank)]
        if model_saver is not None:
            (folder / MODEL).mkdir()
            model_saver(folder / MODEL)
            sync_tree(folder / MODEL)
            mine += walk(folder / MODEL)
        if peers.is_first:
            mine.append(folder / INDEX)
        sync(folder)
        return {path.relative_to(folder).as_posix(): (path.stat().st_size, file_digest(path)) for path in mine}

    def manifest() -> str:
        if not peers.is_first:
            return ""
        digest = write_manifest(folder, step=step, clean=clean, sequence=sequence, files=files, kind=SHARDED_FORMAT)
        sync(folder)
        return digest

    content = peers.all("describe a checkpoint", lambda: Content(tree, meta, parts))
    held = content.boxes()
    twice = peers.judged("compare what the ranks hold", held, held_twice)
    digests = peers.all("compare replicas", lambda: content.digests(twice))
    own = peers.judged("compare replicas", (held, digests), differing)
    pieces, text = content.pieces(own, peers.rank)
    writer = ShardWriter(folder, peers.rank)
    _save(pieces, writer, peers)
    files: dict[str, tuple[int, str]] = {}
    for written in peers.gather("list a checkpoint", peers.all("write a checkpoint", others)):
        files |= written
    return peers.all("complete a checkpoint", manifest)


def _save(pieces: dict[str, Piece], writer: ShardWriter, peers: Peers) -> None:
    planner = PieceSavePlanner()
    if peers.group is None:
        # What dcp.save does, which warns in a process that is alone.
        planner.set_up_planner(pieces, is_coordinator=True)
        (plan,), metadata = planner.create_global_plan([planner.create_local_plan()])
        writer.prepare_global_plan([plan])
        writer.finish(metadata, [writer.write_data(planner.finish_plan(plan), planner).wait()])
        return
    try:
        peers.ask(
            "write a checkpoint",
            lambda: save(pieces, storage_writer=writer, planner=planner, process_group=peers.group),
        )
    except CheckpointException as error:  # torch has told every rank about it
        rank, (failure, _) = min(error.failures.items(), key=lambda item: item[0])
        raise SnapshotError(f"Rank {rank}: {failure}") from failure


def read_sharded(
    folder: Path,
    manifest_digest: str,
    *,
    peers: Peers,
    modules: Mapping[str, nn.Module],
    optimizers: Sequence[Optimizer],
) -> tuple[int, Loaded]:
    """Verify every file of a checkpoint, shared out among the ranks, and read this rank's part.

    Parameters
    ----------
    folder
        The checkpoint.
    manifest_digest
        Digest that the manifest must have.
    peers
        The ranks; need not be as many as wrote it.
    modules, optimizers
        The live objects, whose placements decide what is read.

    Returns
    -------
    tuple
        The step, and what was read.

    Raises
    ------
    SnapshotError
        Anything is missing, truncated, tampered with, foreign, newer, or of another model; the same on every rank.
    RankError
        A rank does not answer.
    """

    def verify() -> Manifest:
        if folder.is_symlink() or not folder.is_dir():
            raise SnapshotError(f"{folder} is not a checkpoint folder.")
        manifest = read_manifest(folder, kind=SHARDED_FORMAT, required=REQUIRED)
        if manifest.digest != manifest_digest:
            raise SnapshotError(f"{folder / MANIFEST} was changed after it was written: its SHA-256 digest differs.")
        check_files(folder, manifest, sorted(manifest.files)[peers.rank :: peers.size])
        if peers.is_first:
            check_strays(folder, manifest)
        return manifest

    def read() -> Loaded:
        return read_content(folder, rank=peers.rank, size=peers.size, modules=modules, optimizers=optimizers)

    manifest = peers.all("verify a checkpoint", verify)
    return manifest.step, peers.all("read a checkpoint", read)
