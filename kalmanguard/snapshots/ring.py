"""The ring of snapshots in memory; which steps it keeps is decided elsewhere."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Self, final

from kalmanguard.errors import ConfigurationError, SnapshotError
from kalmanguard.snapshots.digest import Scope, SectionDigests
from kalmanguard.snapshots.memory import free_host_bytes, slots_for
from kalmanguard.snapshots.slot import Slot
from kalmanguard.snapshots.state import TrainingState

__all__ = ["Ring", "free_host_bytes", "slots_for"]

#: A slot's digest has not been asked for, is waiting or being computed, or is there (or has failed).
_NONE: Final = "none"
_QUEUED: Final = "queued"
_HASHING: Final = "hashing"
_DONE: Final = "done"


@dataclass(slots=True, eq=False)
class _Entry:
    """One slot of the ring and what is known about its content."""

    slot: Slot
    step: int
    certified: bool = False
    phase: str = _NONE
    digests: SectionDigests | None = None
    error: Exception | None = None


@dataclass(slots=True)
class _Shared:
    """What the training thread and the digest thread share, under one condition."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    queue: deque[_Entry] = field(default_factory=deque)
    closed: bool = False


@final
class Ring:
    """A fixed number of slots, captured, certified, evicted and restored by step.

    Parameters
    ----------
    state
        The training state.
    slots
        How many captured states are held at most.

    Notes
    -----
    Buffers of an evicted slot are reused, so a run allocates each slot once. Certified slots are digested by one
    daemon thread (SHA-256 takes five times as long as the copy); a slot that is being digested is neither reused nor
    restored: the training thread waits for that one digest.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Linear(2, 1)
    >>> with Ring(TrainingState(model, optimizers=[], schedulers=[]), slots=2) as ring:
    ...     ring.capture(1)
    ...     ring.certify(1)
    ...     _ = torch.nn.init.zeros_(model.weight)
    ...     ring.restore(1)
    ...     expected, actual = ring.verify(1)
    >>> expected == actual
    True
    """

    def __init__(self, state: TrainingState, *, slots: int) -> None:
        if slots < 1:
            raise ConfigurationError(f"slots = {slots}: a ring needs at least one slot.")
        self._state = state
        self._slots = slots
        self._entries: dict[int, _Entry] = {}
        self._free: list[Slot] = []
        #: Step of the state that was captured beside the ring, and the slot for such states, which outlives it.
        self.braced: int | None = None
        self._beside: Slot | None = None
        self._shared = _Shared()
        self._worker: threading.Thread | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def nbytes(self) -> int:
        """Bytes of all slots, free ones and the shared base copies of frozen tensors included."""
        slots = [*self._free, *[entry.slot for entry in self._entries.values()]]
        if self._beside is not None:
            slots.append(self._beside)
        return sum(slot.nbytes for slot in slots) + self._state.base_bytes

    def steps(self) -> tuple[int, ...]:
        """Return the steps held, oldest first."""
        return tuple(sorted(self._entries))

    def certified(self) -> tuple[int, ...]:
        """Return the certified steps held, oldest first."""
        return tuple(sorted(step for step, entry in self._entries.items() if entry.certified))

    def slot(self, step: int) -> Slot:
        """Return the slot that holds ``step``; it belongs to the ring and is only valid until evicted."""
        return self._entry(step).slot

    @property
    def beside(self) -> Slot | None:
        """The slot that holds the state of step `braced`; valid until the next `brace`."""
        return None if self.braced is None else self._beside

    def capture(self, step: int) -> None:
        """Copy the present state into a free slot.

        Raises
        ------
        SnapshotError
            The ring is full or holds the step already, or the state could not be captured; the slot is free then.
        """
        if step in self._entries:
            raise SnapshotError(f"The ring already holds step {step}; evict it before capturing it again.")
        if len(self._entries) >= self._slots:
            raise SnapshotError(f"The ring is full ({self._slots} slots); evict a step before capturing step {step}.")
        slot = self._free.pop() if self._free else None
        try:
            slot = self._state.capture(slot)
        except BaseException:
            if slot is not None:
                self._free.append(slot)
            raise
        self._entries[step] = _Entry(slot, step)

    def brace(self, step: int) -> None:
        """Copy the present state, as ``step``, into a slot beside the ring, until `adopt` or the next call."""
        self.braced = None
        if self._beside is None and self._free:
            self._beside = self._free.pop()
        self._beside = self._state.capture(self._beside)
        self.braced = step

    def adopt(self, step: int) -> None:
        """Take the state that `brace` has captured as ``step`` into the ring.

        Raises
        ------
        SnapshotError
            That state was not captured, or the ring holds one of that step.
        """
        if self._beside is None or self.braced != step or step in self._entries:
            raise SnapshotError(f"The state before step {step + 1} was not captured, so it cannot enter the ring.")
        self._entries[step] = _Entry(self._beside, step)
        self.braced = self._beside = None

    def evict(self, step: int) -> None:
        """Give the slot of ``step`` up."""
        entry = self._entry(step)
        self._settle(entry)
        del self._entries[step]
        self._free.append(entry.slot)

    def certify(self, step: int) -> None:
        """Mark ``step`` as certified and have its digest computed in the background."""
        entry = self._entry(step)
        entry.certified = True
        with self._shared.changed:
            if entry.phase != _NONE or self._shared.closed:
                return
            entry.phase = _QUEUED
            self._shared.queue.append(entry)
            self._shared.changed.notify_all()
        if self._worker is None:
            self._worker = threading.Thread(
                target=_digest_entries, args=(self._state, self._shared), name="kalmanguard-digest", daemon=True
            )
            self._worker.start()

    def restore(
        self,
        step: int,
        *,
        rng: bool = True,
        schedule: bool = False,
        data: bool = False,
        reset_moments: bool = False,
    ) -> None:
        """Bring the state of ``step`` back; see `TrainingState.restore`."""
        entry = self._entry(step)
        with self._shared.changed:
            self._shared.changed.wait_for(lambda: entry.phase != _HASHING)
        self._state.restore(entry.slot, rng=rng, schedule=schedule, data=data, reset_moments=reset_moments)

    def digest(
        self, step: int, *, rng: bool = True, schedule: bool = False, data: bool = False, moments: bool = True
    ) -> str:
        """Return the digest of the captured state, waiting for it or, if nobody has begun, computing it here.

        Raises
        ------
        SnapshotError
            The state holds a value without a canonical form.
        """
        entry = self._entry(step)
        self._settle(entry)
        if entry.digests is None and entry.error is None:
            _digest(self._state, entry)
        if entry.error is not None:
            raise SnapshotError(f"The state of step {step} could not be digested: {entry.error}") from entry.error
        assert entry.digests is not None
        return entry.digests.of(Scope(rng=rng, schedule=schedule, data=data, moments=moments))

    def verify(
        self, step: int, *, rng: bool = True, schedule: bool = False, data: bool = False, moments: bool = True
    ) -> tuple[str, str]:
        """Return (digest of the captured state, digest of the live state); equal right after ``restore(step)``."""
        expected = self.digest(step, rng=rng, schedule=schedule, data=data, moments=moments)
        actual = self._state.digest(rng=rng, schedule=schedule, data=data, moments=moments, like=self._entry(step).slot)
        return expected, actual

    def close(self) -> None:
        """Stop the digest thread and free all slots."""
        with self._shared.changed:
            self._shared.closed = True
            self._shared.queue.clear()
            self._shared.changed.notify_all()
        if self._worker is not None:
            self._worker.join()
            self._worker = None
        self._entries.clear()
        self._free.clear()
        self.braced = self._beside = None

    def _entry(self, step: int) -> _Entry:
        entry = self._entries.get(step)
        if entry is None:
            held = ", ".join(map(str, self.steps())) or "none"
            raise SnapshotError(f"The ring does not hold step {step}; it holds {held}.")
        return entry

    def _settle(self, entry: _Entry) -> None:
        """Wait for a digest under way; take one that nobody has begun back from the queue."""
        with self._shared.changed:
            if entry.phase == _QUEUED:
                self._shared.queue.remove(entry)
                entry.phase = _NONE
            self._shared.changed.wait_for(lambda: entry.phase != _HASHING)


def _digest(state: TrainingState, entry: _Entry) -> None:
    try:
        entry.digests = state.section_digests(entry.slot)
    except Exception as error:  # judged by whoever asks for the digest
        entry.error = error
    entry.phase = _DONE


def _digest_entries(state: TrainingState, shared: _Shared) -> None:
    while True:
        with shared.changed:
            shared.changed.wait_for(lambda: shared.queue or shared.closed)
            if shared.closed:
                return
            entry = shared.queue.popleft()
            entry.phase = _HASHING
        _digest(state, entry)
        with shared.changed:
            shared.changed.notify_all()
