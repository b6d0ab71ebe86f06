"""The hands of the supervisor: capture, restore, recovery actions, durable checkpoints. Decides nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kalmanguard.actuators.actions import Controls, Recovery, RecoveryAction
from kalmanguard.actuators.effects import LearningRateLimit
from kalmanguard.control.retention import MOST_SLOTS, SMALL_RING
from kalmanguard.errors import RankError, RestoreFailed, SnapshotError
from kalmanguard.records import Action, Decision, Orders, Outcome
from kalmanguard.sensors.optimizer import OptimizerTap
from kalmanguard.settings import Settings
from kalmanguard.snapshots.disk import CheckpointStore
from kalmanguard.snapshots.memory import slots_for
from kalmanguard.snapshots.pretrained import pretrained_saver
from kalmanguard.snapshots.ring import Ring
from kalmanguard.snapshots.state import TrainingState

if TYPE_CHECKING:
    from kalmanguard.distributed.durable import ShardedStore

_DISK_BYTES_PER_S = 2e8
#: Seconds that the end of a run waits for its last checkpoint.
_WAIT_S = 60.0
#: Slots that are set aside to brace: one that is being filled, and one that has just entered the ring.
_BRACES = 2


class Actuator:
    """Carry out orders on a live model and its optimizers.

    Parameters
    ----------
    model
        The supervised model, not compiled.
    tap
        The optimizer tap: where effects that last are put.
    state
        What a snapshot captures.
    settings
        Memory, rewinding, and the share of time for checkpoints.
    recovery
        The ladder's actions.
    extras
        What the user has registered.
    store
        Where durable checkpoints go; ``None`` for none.
    spills
        Whether snapshots that do not fit into memory may lie on disk.
    describe
        The supervisor's own state, which goes into each checkpoint.
    agree
        Given whether this rank would write a checkpoint, says whether all do, where each writes a part of it.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        tap: OptimizerTap,
        state: TrainingState,
        settings: Settings,
        recovery: Recovery,
        extras: Mapping[str, Any],
        store: CheckpointStore | ShardedStore | None,
        spills: bool,
        describe: Callable[[], Mapping[str, Any]],
        agree: Callable[[bool], bool] | None = None,
    ) -> None:
        self._model, self._tap, self.state = model, tap, state
        self._settings, self._recovery = settings, recovery
        self.ring = Ring(state, slots=MOST_SLOTS + 1)
        #: Whether there is memory to capture a state beside the ring, right before a step that looks dangerous.
        self.braces = False
        self._spills, self._extras, self._describe, self._agree = spills, extras, describe, agree
        self.store = store
        self._limit = LearningRateLimit()
        tap.effects.append(self._limit)
        self._rates: dict[int, tuple[tuple[float, ...], ...]] = {}
        self._generator = torch.Generator().manual_seed(settings.seed)
        self._next_checkpoint = 0.0
        self._braced_rates: tuple[tuple[float, ...], ...] = ()
        self._restored = -1
        #: Seconds that the latest capture took, between two training steps.
        self.capture_s = 0.0

    def capacity(self) -> int:
        """Slots that fit the memory budget; where there is room for more than a small ring, two are set aside to brace.

        Raises
        ------
        SnapshotError
            Fewer than two fit, and there is no run folder to keep them in.
        """
        most = MOST_SLOTS + _BRACES
        fit = slots_for(self.state.bytes_per_slot(), self._settings.snapshot_bytes, spills=self._spills, most=most)
        self.braces = fit > SMALL_RING + _BRACES
        return fit - _BRACES if self.braces else min(fit, MOST_SLOTS)

    def keep(self, orders: Orders, step: int) -> None:
        """Execute what concerns the ring: evict, certify, capture."""
        # An observing supervisor keeps nothing but what was captured by hand.
        if orders.adopt:
            self.ring.adopt(step - 1)
            self._rates[step - 1] = self._braced_rates
        held = self.ring.steps()
        for old in orders.evict:
            if old in held:
                self.ring.evict(old)
                self._rates.pop(old, None)
        for known in orders.certify:
            if known in held:
                self.ring.certify(known)
        if orders.snapshot:
            started = time.perf_counter()
            self.ring.capture(step)
            self.capture_s = time.perf_counter() - started
            self._rates[step] = self._present_rates()
            if orders.certified:
                self.ring.certify(step)

    def brace(self, step: int) -> None:
        """Capture the state that ``step`` has left, beside the ring, right before the next step is applied."""
        self.ring.brace(step)
        # The learning rates of the step to come may be what makes it dangerous.
        last = self._tap.last_rates
        now = zip(self._tap.optimizers, self._present_rates(), strict=True)
        self._braced_rates = tuple(last.get(id(optimizer), rates) for optimizer, rates in now)

    def _present_rates(self) -> tuple[tuple[float, ...], ...]:
        return tuple(
            tuple(float(group["lr"]) for group in optimizer.param_groups) for optimizer in self._tap.optimizers
        )

    def restore(self, step: int, *, action: Action, rung: int, manual: bool = False) -> Outcome:
        """Restore a ring slot and show that it is the captured state, bit for bit.

        What feeds training goes on together: data, schedule and random streams are rewound all, to run the steps again,
        or not at all. A restore by hand rewinds the random streams, for it is the captured state that is asked for.
        """
        replay = self._settings.replay
        scope = {"rng": replay or manual, "schedule": replay, "data": replay}
        self.ring.restore(step, **scope)
        for optimizer in self._tap.optimizers:
            # What is left of the last backward pass belongs to the state that was given up.
            optimizer.zero_grad(set_to_none=True)
        expected, actual = self.ring.verify(step, **scope)
        self._restored = step
        error = None if expected == actual else "the restored state differs from the captured one"
        return Outcome(action, step, rung, expected, actual, manual, error)

    def controls(self, decision: Decision, *, clip_value: float, hold_steps: int) -> Controls:
        """What the actions that carry ``decision`` out may touch."""
        return Controls(
            model=self._model,
            optimizers=tuple(self._tap.optimizers),
            decision=decision,
            restored_rates=(),
            clip_value=clip_value,
            hold_steps=hold_steps,
            learning_rate=self._limit,
            tap=self._tap,
            checkpoint=lambda: self._store_path() if self.store is not None else None,
            generator=self._generator,
        )

    def restored_rates(self) -> tuple[tuple[float, ...], ...]:
        """Learning rates that the state which was restored last had been trained at, per optimizer and group."""
        return self._rates.get(self._restored, ())

    def recover(self, controls: Controls) -> list[str]:
        """Run the actions of the decision's rung, or those of a halt; returns what went wrong.

        Raises
        ------
        RestoreFailed
            No state was restored; the actions that would follow are left out.
        """
        failures: list[str] = []
        halting = controls.decision.proposed is Action.HALT
        pending = list(self._recovery.on_halt if halting else self._recovery.actions(controls.decision.orders.rung))
        while pending:
            action = pending.pop(0)
            failures += _apply(action, controls)
            if not controls.restored:
                why = failures[-1] if failures else f"{action.describe()} has not called restore()"
                raise RestoreFailed(why)
            if not halting and controls.decision.proposed is Action.HALT:
                # No older state was sound: what follows is a halt, and its own rollback has nothing left to do.
                halting, pending = True, list(self._recovery.on_halt)
        return failures

    def veto(self, controls: Controls) -> list[str]:
        """Run the actions of a veto; returns what went wrong."""
        return [failure for action in self._recovery.on_veto for failure in _apply(action, controls)]

    def halt(self) -> None:
        """Whoever trains on does so unsupervised, and with a learning rate of their own."""
        self._lift()
        self.freeze()

    def clear(self, *, but: int | None = None) -> None:
        """Give all slots up, ``but`` one, and lift what recovery has put in force."""
        for step in self.ring.steps():
            if step != but:
                self.ring.evict(step)
        self._lift()

    def freeze(self) -> None:
        """Keep the durable checkpoints as they are: a confirmed failure is being dealt with."""
        if self.store is not None:
            self.store.freeze()

    def thaw(self) -> None:
        """Write checkpoints again."""
        if self.store is not None:
            self.store.thaw()

    def release(self, *, lasting: bool = False) -> None:
        """Lift what recovery has put in force; ``lasting``: the learning rate gets no more than what has worked."""
        self._limit.release(lasting=lasting)
        self._tap.effects[:] = [self._limit]

    @property
    def rate_ceiling(self) -> float:
        """Share of the learning rate that the loop asks for which it gets at most when nothing else is in force."""
        return self._limit.ceiling

    @rate_ceiling.setter
    def rate_ceiling(self, value: float) -> None:
        self._limit.resume(value)

    def _lift(self) -> None:
        """Give everything back, what was to last included."""
        self._limit.ceiling = 1.0
        self.release()

    def checkpoint(self, step: int, *, clean: bool, force: bool = False) -> bool:
        """Queue a durable checkpoint of a ring slot, unless the last one was too recent for its share of time."""
        if self.store is None:
            return False
        due = force or time.monotonic() >= self._next_checkpoint
        if not (due if self._agree is None else self._agree(due)):
            return False
        started = time.monotonic()
        saved = self.store.save(
            step, self.ring.slot(step), dict(self._describe()), model_saver=self._saver(step), clean=clean
        )
        # The bytes are written beside training, at some 200 MB/s that training does not have then.
        took = time.monotonic() - started + self.state.bytes_per_slot() / _DISK_BYTES_PER_S
        self._next_checkpoint = started + took / self._settings.checkpoint_share
        return saved

    @property
    def writes_together(self) -> bool:
        """Whether a checkpoint is the work of all ranks, so that one of them cannot save alone."""
        return self._agree is not None

    def wait_for_checkpoint(self) -> bool:
        """Wait until the checkpoint that was queued last is on disk; whether it is."""
        return self.store is not None and self.store.flush(_WAIT_S) and self.store.last_error is None

    def close(self) -> None:
        """Finish writing and give the memory back."""
        self.ring.close()
        if self.store is not None:
            self.store.close()

    def _store_path(self) -> Path | None:
        self.checkpoint(self._restored, clean=True, force=True)
        return self.store.folder if self.store is not None else None

    def _saver(self, step: int) -> Callable[[Path], None] | None:
        if self._agree is not None:
            return None  # what is here is a part of the model
        if not callable(getattr(self._model, "save_pretrained", None)):
            return None
        tokenizer = next((o for o in self._extras.values() if hasattr(o, "save_pretrained")), None)
        try:
            return pretrained_saver(self._model, self.ring.slot(step).tree(), tokenizer)
        except SnapshotError:
            # It can only save its live weights, which training is changing: the checkpoint goes without.
            return None


def _apply(action: RecoveryAction, controls: Controls) -> list[str]:
    try:
        action.apply(controls)
    except (RankError, RestoreFailed):
        raise
    except Exception as error:
        return [f"{action.describe()}: {type(error).__name__}: {error}"]
    return []
