"""Durable checkpoints: written in the background, atomic, in a few folders used in turn."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, final

from torch import Tensor

from kalmanguard.errors import ConfigurationError, SnapshotError
from kalmanguard.snapshots.checkpoint import read_checkpoint, write_checkpoint
from kalmanguard.snapshots.files import remove
from kalmanguard.snapshots.rotation import ANCHOR, Rotation
from kalmanguard.snapshots.slot import Slot

__all__ = ["ANCHOR", "CheckpointStore"]


@dataclass(slots=True, eq=False)
class _Job:
    """One checkpoint to be written, with a copy of the state that nobody else touches."""

    step: int
    source: Slot | Any
    meta: Any
    model_saver: Callable[[Path], None] | None
    clean: bool


@final
class CheckpointStore:
    """A folder with the last few checkpoints and an anchor file that names the last clean one.

    Parameters
    ----------
    folder
        Made if it is not there.
    slots
        Sub-folders ``slot-0``, ``slot-1``, ... used in turn; the one with the last clean checkpoint is never reused.
    on_durable
        Called with step, cleanness and the manifest's SHA-256 digest, from the thread that writes, once a checkpoint is
        forced to the disk under its final name. What it raises counts as a failure of that checkpoint.

    Raises
    ------
    ConfigurationError
        Fewer than two slots.
    SnapshotError
        The folder cannot be made or written to.

    Notes
    -----
    A checkpoint is written to a temporary folder, forced to the disk and renamed into place, then the anchor is
    replaced: killed at any moment, the anchor names a complete checkpoint. `save` copies the state and returns; it
    never raises for what goes wrong with the disk: `last_error` holds what the last attempt met, and the checkpoint
    before it stays. At most one checkpoint is being written and one is waiting; a newer one takes the place of the one
    that waits. What was accepted is not durable yet: a process that is killed before ``on_durable`` loses it.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        slots: int = 3,
        on_durable: Callable[[int, bool, str], object] | None = None,
    ) -> None:
        if slots < 2:
            raise ConfigurationError(f"slots = {slots}: at least 2 are needed, to keep one while the other is written.")
        self.folder = Path(folder)
        self._on_durable = on_durable
        self._rotation = Rotation(self.folder, slots)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise SnapshotError(
                f"The checkpoint folder {self.folder} cannot be written to: {error.strerror}. Choose another run_dir."
            ) from error
        self.last_error: Exception | None = None
        self._changed = threading.Condition()
        self._committing = threading.Lock()
        self._pending: _Job | None = None
        self._writing = False
        self._frozen = False
        self._closed = False
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
        """Copy a state and have it written; return whether it was accepted.

        Parameters
        ----------
        step
            Step of the state.
        source
            A slot, or a tree for the codec; it may be changed as soon as this returns.
        meta
            Further plain values, numpy arrays and tensors for the codec.
        model_saver
            Called in the background with an empty folder inside the checkpoint (``save_pretrained``, for example);
            it must not read what training changes meanwhile.
        clean
            Whether the state is certified, so that the anchor may name it.

        Returns
        -------
        bool
            False when the store is frozen or closed, or the state could not be copied (see `last_error`).
        """
        with self._changed:
            if self._frozen or self._closed:
                return False
            # The one that waits is given up first: its buffers hold the newer one.
            self._retire(self._pending)
            self._pending = None
            staging = self._staging.pop() if self._staging else None
        try:
            copy = source.copy(staging) if isinstance(source, Slot) else detached(source)
            job = _Job(step, copy, detached(meta), model_saver, clean)
        except Exception as error:
            self.last_error = error
            return False
        with self._changed:
            self._pending = job
            self._changed.notify_all()
        if self._worker is None:
            self._worker = threading.Thread(target=self._run, name="kalmanguard-checkpoint", daemon=True)
            self._worker.start()
        return True

    @property
    def frozen(self) -> bool:
        """Whether nothing is overwritten at present."""
        return self._frozen

    def freeze(self) -> None:
        """Keep what is on disk: drop what waits or is being written, refuse new checkpoints until `thaw`."""
        with self._changed:
            self._frozen = True
            self._retire(self._pending)
            self._pending = None
            self._changed.notify_all()
        with self._committing:  # a checkpoint that is being renamed into place is the last one
            pass

    def thaw(self) -> None:
        """Accept checkpoints again."""
        with self._changed:
            self._frozen = False

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until everything accepted is on disk or has failed; return False when the time was not enough."""
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
        """Verify and return the last clean checkpoint as (step, tree, meta).

        Raises
        ------
        SnapshotError
            There is none, or the anchor or the checkpoint is damaged, foreign, newer, or leads out of the folder.
        """
        return self._rotation.load_last_clean()

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

    def load(self, path: str | os.PathLike[str]) -> tuple[int, Any, dict[str, Any]]:
        """Verify and return the checkpoint in the folder ``path`` as (step, tree, meta).

        Raises
        ------
        SnapshotError
            It is damaged, foreign or newer.
        """
        return read_checkpoint(Path(path))

    def checkpoints(self) -> dict[Path, int]:
        """Return the steps of all checkpoints with a readable manifest, oldest save first."""
        return self._rotation.checkpoints()

    # -- the background thread's side ------------------------------------------------------------------------------

    def _retire(self, job: _Job | None) -> None:
        """Keep a job's buffers for the next copy."""
        if job is not None and isinstance(job.source, Slot):
            self._staging.append(job.source)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending is not None or self._closed)
                job, self._pending = self._pending, None
                if job is None:
                    return
                self._writing = True
            error: Exception | None = None
            try:
                self._write(job)
            except Exception as failure:
                error = failure
            with self._changed:
                self.last_error = error
                self._retire(job)
                self._writing = False
                self._changed.notify_all()

    def _write(self, job: _Job) -> None:
        if self._sequence is None:
            self._sequence = self._rotation.recover()
        temporary = self._rotation.temporary
        try:
            remove(temporary)
            digest = write_checkpoint(
                temporary,
                step=job.step,
                sequence=self._sequence + 1,
                clean=job.clean,
                tree=job.source.tree() if isinstance(job.source, Slot) else job.source,
                meta=job.meta,
                model_saver=job.model_saver,
            )
            with self._committing:
                if self._frozen:
                    return
                self._rotation.commit(step=job.step, clean=job.clean, digest=digest)
                self._sequence += 1
            if self._on_durable is not None:
                self._on_durable(job.step, job.clean, digest)
            self._rotation.clear()
        finally:
            with contextlib.suppress(OSError):
                remove(temporary)


def detached(value: Any) -> Any:
    """Copy a tree of plain values, so that the training thread may change the original."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: detached(item) for key, item in value.items()}
    if isinstance(value, list):
        return [detached(item) for item in value]
    if isinstance(value, tuple):
        return tuple([detached(item) for item in value])
    return value.copy() if hasattr(value, "__array_interface__") else value
