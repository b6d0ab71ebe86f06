"""Durable checkpoints of a sharded run: every rank writes its own part, in the background, all or nothing."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, final

from kalmanguard.distributed.content import Loaded, create_state
from kalmanguard.distributed.parts import Part, live_parts
from kalmanguard.distributed.peers import Peers
from kalmanguard.distributed.sharded_checkpoint import REQUIRED, read_sharded, write_sharded
from kalmanguard.errors import ConfigurationError, RankError, SnapshotError
from kalmanguard.snapshots.checkpoint import MANIFEST, SHARDED_FORMAT
from kalmanguard.snapshots.disk import detached
from kalmanguard.snapshots.files import file_digest, remove
from kalmanguard.snapshots.rotation import ANCHOR, Rotation
from kalmanguard.snapshots.slot import Slot
from kalmanguard.snapshots.state import TrainingState

__all__ = ["ANCHOR", "ShardedStore"]


@dataclass(slots=True, eq=False)
class _Job:
    """One call of `save`, with a copy of the state that nobody else touches.

    ``refusal`` says why there is none; it is empty where the store was frozen.
    """

    number: int
    step: int
    clean: bool
    source: Slot | Any = None
    meta: Any = None
    parts: Mapping[str, Part] | None = None
    model_saver: Callable[[Path], None] | None = None
    refusal: str | None = None


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
        Seconds after which a rank that does not answer is given up. Only the background thread waits that long, so it
        may be longer than the slowest disk; a process that has died is noticed at once.

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
    that waits. Background threads do not run at the same speed, so what waits differs between ranks. They agree by the
    number of the call of `save`: each offers the one that it holds, which thereby can no longer be replaced; if all
    have offered the same, it is written, else all that have offered an older one than the newest give theirs up,
    wait for one at least as new, and offer again. Each further round takes a call of `save` that was not offered yet,
    and the last one is never replaced on any rank, so they always come to an agreement, at the last one at the latest.
    Rank 0 cannot choose alone: it might choose one that another rank has replaced already.

    *What goes wrong.* `save` never raises for the disk or for another rank: what one rank meets is `last_error` on all,
    and the checkpoint before it stays. A rank that dies costs the others nothing but further checkpoints: `last_error`
    is a `RankError` then, and `save` returns False from there on.

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
    ) -> None:
        if slots < 2:
            raise ConfigurationError(f"slots = {slots}: at least 2 are needed, to keep one while the other is written.")
        if not timeout_s > 0:
            raise ConfigurationError(f"timeout_s = {timeout_s}: give the ranks some seconds to answer.")
        self.folder = Path(folder)
        self._state = state
        self._rotation = Rotation(self.folder, slots, kind=SHARDED_FORMAT, required=REQUIRED)
        self._front = Peers(timeout_s=timeout_s)  # for the training thread
        self._peers = Peers(timeout_s=timeout_s)  # for the background thread
        self._share_folder()
        self.last_error: Exception | None = None
        self._changed = threading.Condition()
        self._committing = threading.Lock()
        self._pending: _Job | None = None
        self._writing = False
        self._frozen = False
        self._closed = False
        self._broken = False
        self._count = 0
        self._dropped = 0
        self._staging: list[Slot] = []
        self._sequence: int | None = None
        self._worker: threading.Thread | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- the training thread's side --------------------------------------------------------------------------------

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
        with self._changed:
            if self._closed or self._broken:
                return False
            self._count += 1
            job = _Job(self._count, step, clean, model_saver=model_saver)
            # The one that waits is given up first: its buffers hold the newer one.
            self._retire(self._pending)
            self._pending = None
            staging = self._staging.pop() if self._staging else None
        if self._frozen:
            job.refusal = ""  # ranks that are not frozen, against the rules, must not wait for this one
        else:
            try:
                job.parts = live_parts(self._state.modules, self._state.optimizers)
                job.source = source.copy(staging) if isinstance(source, Slot) else detached(source)
                job.meta = detached(meta)
            except Exception as error:
                self.last_error = error
                job.refusal = f"{type(error).__name__}: {error}"
        with self._changed:
            if self._broken:
                return False
            self._pending = job
            self._changed.notify_all()
        if self._worker is None:
            self._worker = threading.Thread(target=self._run, name="kalmanguard-checkpoint", daemon=True)
            self._worker.start()
        return job.refusal is None

    @property
    def frozen(self) -> bool:
        """Whether nothing is overwritten at present."""
        return self._frozen

    def freeze(self) -> None:
        """Keep what is on disk: drop what waits or is being written, refuse new checkpoints until `thaw`."""
        with self._changed:
            self._frozen = True
            self._dropped = self._count
        with self._committing:  # a checkpoint that is being renamed into place is the last one
            pass

    def thaw(self) -> None:
        """Accept checkpoints again."""
        with self._changed:
            self._frozen = False

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until everything accepted is on disk or has failed; return False when the time was not enough.

        What this rank has accepted is written once the other ranks have come as far.
        """
        with self._changed:
            return self._changed.wait_for(lambda: self._pending is None and not self._writing, timeout_s)

    def close(self, timeout_s: float | None = 60.0) -> bool:
        """Write what is waiting, then stop the thread; return whether all was done in time."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        done = self.flush(timeout_s)
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._worker is not None:
            self._worker.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
        self._staging.clear()
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

    # -- the background thread's side ------------------------------------------------------------------------------

    def _share_folder(self) -> None:
        """Check that all ranks can write to one and the same folder."""

        def write() -> str | None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                file = tempfile.NamedTemporaryFile(dir=self.folder, prefix=".ranks-", delete=False)  # noqa: SIM115
            except OSError as error:
                raise SnapshotError(
                    f"The checkpoint folder {self.folder} cannot be written to: {error.strerror}. Choose another."
                ) from error
            file.close()
            written.append(Path(file.name))
            return written[0].name

        def look() -> None:
            if not all((self.folder / name).exists() for name in names if name):
                raise SnapshotError(
                    f"The checkpoint folder {self.folder} is not the same one on all ranks: choose one on a file system "
                    "that all of them see."
                )

        written: list[Path] = []
        try:
            names = self._front.gather("share a checkpoint folder", self._front.all("share a checkpoint folder", write))
            self._front.all("share a checkpoint folder", look)
        finally:
            for path in written:
                path.unlink(missing_ok=True)

    def _retire(self, job: _Job | None) -> None:
        """Keep a job's buffers for the next copy."""
        if job is not None and isinstance(job.source, Slot):
            self._staging.append(job.source)
            job.source = None

    def _run(self) -> None:
        while True:
            job = self._take(at_least=0)
            if job is None:
                return
            error: Exception | None = None
            try:
                job, refusal = self._agreed(job)
                if refusal:
                    raise SnapshotError(refusal)
                if refusal is None:
                    self._write(job)
            except Exception as failure:
                error = failure
            with self._changed:
                self.last_error = error
                self._retire(job)
                self._writing = False
                if isinstance(error, RankError):
                    self._broken, self._pending = True, None
                self._changed.notify_all()
            if self._broken:
                return

    def _take(self, *, at_least: int) -> _Job | None:
        """Wait for the newest job, of a number that is not less than given; ``None`` when there will be none."""

        def due() -> bool:
            return self._closed or (self._pending is not None and self._pending.number >= at_least)

        with self._changed:
            self._changed.wait_for(due)
            job, self._pending = self._pending, None
            self._writing = job is not None
            return job

    def _agreed(self, job: _Job) -> tuple[_Job, str | None]:
        """The job that all ranks write next, and why it is not written after all: see Notes of the class."""
        while True:
            offer = (job.number, job.step, self._refusal(job))
            offers = self._peers.gather("agree on the next checkpoint", offer)
            newest = max(number for number, _, _ in offers)
            if all(number == newest for number, _, _ in offers):
                break
            if job.number < newest:
                with self._changed:
                    self._retire(job)
                later = self._take(at_least=newest)
                if later is None:
                    raise RankError(
                        f"Rank {self._peers.rank} was closed before it had saved as often as the others: every rank "
                        "must call save() alike."
                    )
                job = later
        if len({step for _, step, _ in offers}) > 1:
            steps = [step for _, step, _ in offers]
            raise RankError(f"The ranks save different steps, {steps}: every rank must save the same ones.")
        refusals = [(rank, refusal) for rank, (_, _, refusal) in enumerate(offers) if refusal is not None]
        told = next((f"Rank {rank}: {text}" for rank, text in refusals if text), "" if refusals else None)
        return job, told

    def _refusal(self, job: _Job) -> str | None:
        return "" if job.refusal is None and job.number <= self._dropped else job.refusal

    def _write(self, job: _Job) -> None:
        temporary, first = self._rotation.temporary, self._peers.is_first

        def prepare() -> None:
            if not first:
                return
            if self._sequence is None:
                self._sequence = self._rotation.recover()
            remove(temporary)

        try:
            self._peers.all("begin a checkpoint", prepare)
            digest = write_sharded(
                temporary,
                peers=self._peers,
                step=job.step,
                sequence=(self._sequence or 0) + 1,
                clean=job.clean,
                tree=job.source.tree() if isinstance(job.source, Slot) else job.source,
                meta=job.meta,
                parts=job.parts or {},
                model_saver=job.model_saver if first else None,
            )
            self._commit(job, digest)
        finally:
            if first:
                with contextlib.suppress(OSError):
                    remove(temporary)

    def _commit(self, job: _Job, digest: str) -> None:
        """Rename the checkpoint into place, if no rank has been frozen meanwhile."""

        def rename() -> None:
            if self._peers.is_first:
                self._rotation.commit(step=job.step, clean=job.clean, digest=digest)
                self._sequence = (self._sequence or 0) + 1

        # Held until rank 0 is done, on every rank: after freeze() nothing on the disk changes.
        with self._committing:
            if any(self._peers.gather("commit a checkpoint", job.number <= self._dropped)):
                return
            self._peers.all("commit a checkpoint", rename)
        if self._peers.is_first:
            self._rotation.clear()
