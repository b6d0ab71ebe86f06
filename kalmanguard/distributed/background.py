"""The thread in which a rank writes its part of checkpoints, in step with the same thread of the other ranks."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import final

from kalmanguard.distributed.jobs import Job, JobQueue
from kalmanguard.distributed.peers import Peers
from kalmanguard.distributed.sharded_checkpoint import write_sharded
from kalmanguard.errors import RankError, SnapshotError
from kalmanguard.snapshots.files import remove
from kalmanguard.snapshots.rotation import Rotation
from kalmanguard.snapshots.slot import Slot


@final
class BackgroundWriter:
    """Writes one job after the other, all ranks the same one, until the queue is closed.

    Parameters
    ----------
    jobs
        What waits; closed when a rank is lost.
    rotation
        Where checkpoints go; what changes in it is rank 0's doing.
    peers
        The ranks, for this thread alone.
    on_durable
        As for `ShardedStore`.

    Attributes
    ----------
    last_error
        What the last attempt met, on whichever rank.
    """

    def __init__(
        self,
        jobs: JobQueue,
        rotation: Rotation,
        peers: Peers,
        *,
        on_durable: Callable[[int, bool, str], object] | None = None,
    ) -> None:
        self.last_error: Exception | None = None
        self._on_durable = on_durable
        self._jobs, self._rotation, self._peers = jobs, rotation, peers
        self._committing = threading.Lock()
        self._sequence: int | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread, unless it runs."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="kalmanguard-checkpoint", daemon=True)
            self._thread.start()

    def join(self, timeout_s: float | None) -> None:
        """Wait until the thread has ended."""
        if self._thread is not None:
            self._thread.join(timeout_s)

    def settle(self) -> None:
        """Wait until a checkpoint that is being renamed into place is there."""
        with self._committing:
            pass

    def _run(self) -> None:
        while True:
            job: Job | None = None
            error: Exception | None = None
            try:
                found = self._jobs.next()
                if found is None:
                    return
                job, refusal = found
                if refusal:
                    raise SnapshotError(refusal)
                if refusal is None:
                    self._write(job)
            except Exception as failure:
                error = failure
            self.last_error = error
            if isinstance(error, RankError):
                self._jobs.close()
            self._jobs.done(job)

    def _write(self, job: Job) -> None:
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

    def _commit(self, job: Job, digest: str) -> None:
        """Rename the checkpoint into place, if no rank has been frozen meanwhile."""

        def rename() -> None:
            if self._peers.is_first:
                self._rotation.commit(step=job.step, clean=job.clean, digest=digest)
                self._sequence = (self._sequence or 0) + 1

        # Held until rank 0 is done, on every rank: after freeze() nothing on the disk changes.
        with self._committing:
            if any(self._peers.gather("commit a checkpoint", self._jobs.void(job))):
                return
            self._peers.all("commit a checkpoint", rename)
        if self._peers.is_first:
            if self._on_durable is not None:
                self._on_durable(job.step, job.clean, digest)
            with contextlib.suppress(OSError):  # the next checkpoint does it again
                self._rotation.clear()
