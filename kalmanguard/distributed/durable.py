"""Durable checkpoints of a sharded run: every rank writes its own part, in the background, all or nothing."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self, final

from kalmanguard.distributed.background import BackgroundWriter
from kalmanguard.distributed.jobs import JobQueue
from kalmanguard.distributed.parts import live_parts
from kalmanguard.distributed.peers import Peers
from kalmanguard.distributed.resharding import Loaded, create_state
from kalmanguard.distributed.sharded_checkpoint import REQUIRED, read_sharded
from kalmanguard.distributed.shared_folder import share_folder
from kalmanguard.errors import ConfigurationError
from kalmanguard.snapshots.checkpoint import MANIFEST, SHARDED_FORMAT
from kalmanguard.snapshots.disk import detached
from kalmanguard.snapshots.files import file_digest
from kalmanguard.snapshots.rotation import ANCHOR, Rotation
from kalmanguard.snapshots.slot import Slot
from kalmanguard.snapshots.state import TrainingState

__all__ = ["ANCHOR", "ShardedStore"]


@final
class ShardedStore:
    """A folder with the last few checkpoints of all ranks, and an anchor file that names the last clean one.

    Takes the place of `CheckpointStore` where parameters are DTensors (FSDP2, tensor parallel, meshes of both), of
    which each rank holds a part. Replicas (DistributedDataParallel) and a process alone work as well.

    Parameters
    ----------
    folder
        On a file system that all ranks see; made if it is not there.
    state
        What slots are captured from: its live tensors tell which part of each whole is here.
    slots
        Sub-folders ``slot-0``, ``slot-1``, ... used in turn; the one with the last clean checkpoint is never reused.
    timeout_s
        Seconds after which a rank that does not answer is given up; more than the slowest disk takes for a part, since
        the ranks wait for one another in the background. The death of a process is noticed at once by the ranks that
        exchange something with it at that moment, and by the others when these leave or the time is up.
    on_durable
        Called on rank 0, in the background, with step, cleanness and manifest digest of a checkpoint that is on disk,
        whole and under its final name.

    Raises
    ------
    ConfigurationError
        Fewer than two slots.
    SnapshotError
        The folder cannot be written to by a rank, or is not the same one on all.
    RankError
        A rank does not answer.

    Notes
    -----
    Collective: every rank makes one, and calls `save`, `freeze`, `thaw`, `close`, `load` and `load_last_clean` in the
    same order as the others, though not at the same time: `save` copies this rank's part and returns without asking
    the others anything.

    *Atomic.* Every rank writes its files to a temporary folder and forces them to the disk; when all have said so and
    none is frozen, rank 0 renames the folder into place and replaces the anchor. Killed at any moment on any rank, the
    anchor names a checkpoint that is complete for all ranks.

    *What is next.* At most one checkpoint is being written and one is waiting; a newer one takes the place of the one
    that waits, and all ranks agree on which one is next (`JobQueue`).

    *What goes wrong.* `save` never raises for the disk or for another rank: what one rank meets is `last_error` on all,
    and the checkpoint before it stays. A rank that dies or hangs costs the others further checkpoints: `last_error` is
    a `RankError` then, and `save` returns False from there on. Only `freeze` waits for other ranks, where they are just
    about to rename a checkpoint into place, and `flush` and `close` as long as they are told to.

    The planning, of who writes what several ranks hold and of what is read from where, is that of
    torch.distributed.checkpoint. Its ``async_save`` is not used: it copies the state before it returns, and so does
    `save` already, since the slot may be captured into again; a thread of ours saves the second copy.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        state: TrainingState,
        slots: int = 3,
        timeout_s: float = 600.0,
        on_durable: Callable[[int, bool, str], object] | None = None,
    ) -> None:
        if slots < 2:
            raise ConfigurationError(f"slots = {slots}: at least 2 are needed, to keep one while the other is written.")
        if not timeout_s > 0:
            raise ConfigurationError(f"timeout_s = {timeout_s}: give the ranks some seconds to answer.")
        self.folder = Path(folder)
        self._state = state
        self._rotation = Rotation(self.folder, slots, kind=SHARDED_FORMAT, required=REQUIRED)
        self._front = Peers(timeout_s=timeout_s)  # for the training thread
        peers = Peers(timeout_s=timeout_s)  # for the background thread
        share_folder(self.folder, self._front)
        self._jobs = JobQueue(peers)
        self._writer = BackgroundWriter(self._jobs, self._rotation, peers, on_durable=on_durable)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- writing ---------------------------------------------------------------------------------------------------

    def save(
        self,
        step: int,
        source: Slot | Any,
        meta: dict[str, Any],
        *,
        model_saver: Callable[[Path], None] | None = None,
        clean: bool = True,
    ) -> bool:
        """Copy this rank's part of a state and have it written; return whether it was accepted.

        Parameters
        ----------
        step
            Step of the state.
        source
            A slot, or a tree for the codec; it may be changed as soon as this returns.
        meta
            Further plain values, numpy arrays and tensors for the codec; each rank's own.
        model_saver
            Called in the background on rank 0, with an empty folder inside the checkpoint; it must not read what
            training changes meanwhile, nor wait for other ranks.
        clean
            Whether the state is certified, so that the anchor may name it.

        Returns
        -------
        bool
            False when the store is frozen or closed, a rank has been lost, or the state could not be copied (see
            `last_error`).
        """
        if not self._jobs.open:
            return False
        job, staging = self._jobs.number(step, clean, model_saver)
        if self._jobs.frozen:
            job.refusal = ""
        else:
            try:
                job.parts = live_parts(self._state.modules, self._state.optimizers)
                job.source = source.copy(staging) if isinstance(source, Slot) else detached(source)
                job.meta = detached(meta)
            except Exception as error:
                self._writer.last_error = error
                job.refusal = f"{type(error).__name__}: {error}"
        self._jobs.put(job)
        self._writer.start()
        return job.refusal is None

    @property
    def last_error(self) -> Exception | None:
        """What the last attempt to write met, on whichever rank; ``None`` after one that went well."""
        return self._writer.last_error

    @property
    def frozen(self) -> bool:
        """Whether nothing is overwritten at present."""
        return self._jobs.frozen

    def freeze(self) -> None:
        """Keep what is on disk: drop what waits or is being written, refuse new checkpoints until `thaw`."""
        self._jobs.freeze()
        self._writer.settle()

    def thaw(self) -> None:
        """Accept checkpoints again."""
        self._jobs.frozen = False

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until everything accepted is on disk or has failed; return False when the time was not enough.

        What this rank has accepted is written once the other ranks have come as far.
        """
        return self._jobs.wait(timeout_s)

    def close(self, timeout_s: float | None = 60.0) -> bool:
        """Write what is waiting, then stop the thread; return whether all was done in time."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        done = self.flush(timeout_s)
        self._jobs.close()
        self._writer.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
        return done

    # -- reading ---------------------------------------------------------------------------------------------------

    def load_last_clean(self) -> tuple[int, Any, dict[str, Any]]:
        """Verify the last clean checkpoint and return this rank's part of it as (step, tree, meta).

        The tree is for `TrainingState.load_tree`, whatever number of ranks and whatever mesh it was saved on: of each
        tensor it holds what the live one holds here. Random streams and metadata are this rank's own where as many
        ranks saved it; on another number, rank 0 gets those of rank 0, and the others keep their random streams.

        Raises
        ------
        SnapshotError
            There is none; the anchor or the checkpoint is damaged, foreign, newer, or leads out of the folder; or it is
            of another model. The same on every rank.
        RankError
            A rank does not answer.
        """
        step, loaded = self._load(self._rotation.last_clean)
        return step, loaded.tree, loaded.meta

    def load(self, path: str | os.PathLike[str]) -> tuple[int, Any, dict[str, Any]]:
        """Verify the checkpoint in the folder ``path``; as `load_last_clean`."""
        step, loaded = self._load(lambda: (Path(path), None))
        return step, loaded.tree, loaded.meta

    def load_last_clean_into(
        self, *, rng: bool = True, schedule: bool = True, data: bool = False
    ) -> tuple[int, dict[str, Any]]:
        """Verify the last clean checkpoint, bring it back in place, and return (step, meta).

        Optimizer state that this process has not made yet is made, placed like its parameter where it has its shape
        and on every rank otherwise.

        Parameters
        ----------
        rng, schedule, data
            As for `TrainingState.load_tree`. A data cursor is this rank's own only where as many ranks saved it.

        Raises
        ------
        SnapshotError
            As for `load_last_clean`: nothing was changed then; or a rank could not take its part back: its own state is
            as it was, that of the others may be restored already.
        RankError
            A rank does not answer.
        """
        step, loaded = self._load(self._rotation.last_clean)

        def restore() -> None:
            made = create_state(self._state.optimizers, loaded)
            try:
                self._state.load_tree(loaded.tree, rng=rng, schedule=schedule, data=data)
            except BaseException:
                for optimizer, parameter in made:
                    optimizer.state.pop(parameter, None)
                raise

        self._front.all("restore a checkpoint", restore)
        return step, loaded.meta

    @property
    def holds_clean(self) -> bool:
        """Whether an anchor names a last clean checkpoint; that it can be loaded, loading shows."""
        return self._rotation.is_anchored

    def last_clean_digest(self) -> str:
        """Return the SHA-256 digest of the manifest that the anchor vouches for.

        Raises
        ------
        SnapshotError
            There is no anchor, or it is damaged.
        """
        return self._rotation.last_clean()[1]

    def checkpoints(self) -> dict[Path, int]:
        """Return the steps of all checkpoints with a readable manifest, oldest save first."""
        return self._rotation.checkpoints()

    def _load(self, locate: Callable[[], tuple[Path, str | None]]) -> tuple[int, Loaded]:
        def find() -> tuple[Path, str] | None:
            if not self._front.is_first:
                return None
            folder, digest = locate()
            if digest is None and (folder / MANIFEST).is_file():
                digest = file_digest(folder / MANIFEST)
            return folder, digest or ""

        found = self._front.gather("find a checkpoint", self._front.all("find a checkpoint", find))[0]
        assert found is not None
        return read_sharded(*found, peers=self._front, modules=self._state.modules, optimizers=self._state.optimizers)
