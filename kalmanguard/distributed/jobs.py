"""Checkpoints that wait to be written, and how all ranks agree on which one is next."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from kalmanguard.distributed.parts import Part
from kalmanguard.distributed.peers import Peers
from kalmanguard.errors import RankError
from kalmanguard.snapshots.slot import Slot


@dataclass(slots=True, eq=False)
class Job:
    """One call of `ShardedStore.save`, with a copy of the state that nobody else touches.

    Attributes
    ----------
    number
        Of the call, from 1; the same on every rank.
    step, clean, source, meta, model_saver
        What `ShardedStore.save` was given.
    parts
        What the tensors of ``source`` are parts of.
    refusal
        Why there is nothing to write; empty where that is no error.
    """

    number: int
    step: int
    clean: bool
    model_saver: Callable[[Path], None] | None
    source: Slot | Any = None
    meta: Any = None
    parts: Mapping[str, Part] | None = None
    refusal: str | None = None


@final
class JobQueue:
    """At most one job being written and one that waits; a newer one takes the place of the one that waits.

    Parameters
    ----------
    peers
        The ranks, for the background thread alone.

    Notes
    -----
    Background threads do not run at the same speed, so what waits differs between ranks, and rank 0 cannot choose
    alone: it might choose a job that another rank has replaced already. They agree by the number of the call: each
    offers the job that it holds, which thereby can no longer be replaced. If all have offered the same, that is the
    next one; else whoever has offered an older one than the newest gives it up, waits for one at least as new, and all
    offer again. A further round takes a call that was not offered before, and the last one is not replaced on any rank,
    so the rounds end, with the last call at the latest. A call that has led to nothing on one rank (frozen, no memory)
    is offered all the same, with the reason, so that nobody waits for it.
    """

    def __init__(self, peers: Peers) -> None:
        self.frozen = False
        self._peers = peers
        self._changed = threading.Condition()
        self._pending: Job | None = None
        self._writing = False
        self._open = True
        self._count = 0
        self._dropped = 0
        self._staging: list[Slot] = []

    def number(self, step: int, clean: bool, model_saver: Callable[[Path], None] | None) -> tuple[Job, Slot | None]:
        """Begin a job, giving up the one that waits; buffers for its copy, if there are any to be used again."""
        with self._changed:
            self._count += 1
            # Given up first: its buffers hold the newer one.
            self._retire(self._pending)
            self._pending = None
            return Job(self._count, step, clean, model_saver), self._staging.pop() if self._staging else None

    def put(self, job: Job) -> None:
        """Let a job wait to be written."""
        with self._changed:
            self._pending = job if self._open else None
            self._changed.notify_all()

    @property
    def open(self) -> bool:
        """Whether jobs are written at all."""
        return self._open

    def close(self) -> None:
        """Let `next` return ``None``; what waits is given up."""
        with self._changed:
            self._open, self._pending = False, None
            self._staging.clear()
            self._changed.notify_all()

    def freeze(self) -> None:
        """Make void all jobs so far."""
        with self._changed:
            self.frozen, self._dropped = True, self._count

    def void(self, job: Job) -> bool:
        """Whether `freeze` was called after this job."""
        return job.number <= self._dropped

    def wait(self, timeout_s: float | None) -> bool:
        """Wait until nothing waits or is being written; False when the time was not enough."""
        with self._changed:
            return self._changed.wait_for(lambda: self._pending is None and not self._writing, timeout_s)

    # -- the background thread's side ------------------------------------------------------------------------------

    def next(self) -> tuple[Job, str | None] | None:
        """Wait for a job and agree with the other ranks on it; ``None`` when the queue is closed.

        Returns
        -------
        tuple
            The job, the same on every rank; and why it is not to be written, if so, empty where that is no error.

        Raises
        ------
        RankError
            A rank does not answer, or saves something else.
        """
        job = self._take(at_least=0)
        if job is None:
            return None
        while True:
            refusal = "" if job.refusal is None and self.void(job) else job.refusal
            offers = self._peers.gather("agree on the next checkpoint", (job.number, job.step, refusal))
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
        steps = [step for _, step, _ in offers]
        if len(set(steps)) > 1:
            raise RankError(f"The ranks save the steps {steps} at one time: every rank must save the same ones.")
        refusals = [(rank, refusal) for rank, (_, _, refusal) in enumerate(offers) if refusal is not None]
        return job, next((f"Rank {rank}: {text}" for rank, text in refusals if text), "" if refusals else None)

    def done(self, job: Job | None) -> None:
        """Take a job's buffers back: it is written, or has failed."""
        with self._changed:
            self._retire(job)
            self._writing = False
            self._changed.notify_all()

    def _take(self, *, at_least: int) -> Job | None:
        with self._changed:
            self._changed.wait_for(
                lambda: not self._open or (self._pending is not None and self._pending.number >= at_least)
            )
            job, self._pending = self._pending, None
            self._writing = job is not None
            return job

    def _retire(self, job: Job | None) -> None:
        """Keep a job's buffers for the next copy."""
        if job is not None and isinstance(job.source, Slot):
            self._staging.append(job.source)
            job.source = None
