"""Attribution in a live run: which batch, which states, and when it is worth two forward passes."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kalmanguard.detectors.attribution import AttributionResult, Cause, Certified, Usual, attribute
from kalmanguard.engine import EngineState
from kalmanguard.estimators.trend import TrendState
from kalmanguard.records import Decision
from kalmanguard.sensors.reevaluation import BatchLoss
from kalmanguard.snapshots.ring import Ring
from kalmanguard.snapshots.slot import Slot
from kalmanguard.snapshots.tree import join

#: Batches of one step (gradient accumulation) that are held at most.
_MOST_BATCHES = 16
#: Detectors that watch the training loss of single steps.
_LOSS = ("loss", "loss-finite")
_SEEN = 10
#: Relative difference by which the loss of a batch may change in the one step between report and evaluation.
_SAME_FRAC = 0.25


class Attributor:
    """Keep the batches of the latest step at hand, and put a spike of its loss down to data, model or hardware.

    Parameters
    ----------
    losses
        Evaluates batches without a trace.
    ring
        Holds the certified states.

    Notes
    -----
    A batch is referred to, not copied, until the first one of the next step is seen. Of a step with more than 16
    batches none is attributed by itself.
    """

    def __init__(self, losses: BatchLoss, ring: Ring) -> None:
        self._losses, self._ring = losses, ring
        self._batches: list[Any] = []
        self._too_many = self._complete = False
        self._step = 0
        self._loss: float | None = None
        self._usual: Usual | None = None
        self._braced = self._moved = False
        self._onset: int | None = None
        #: Whether what is evaluated again is what training reports; ``None`` while that is not known.
        self._same: bool | None = None
        #: The latest result.
        self.result: AttributionResult | None = None

    def remember(self, batch: Any) -> None:
        """Take note of a batch of the step in work."""
        if self._complete:
            self._batches, self._too_many, self._complete = [], False, False
        if any(batch is one for one in self._batches):
            return
        if len(self._batches) < _MOST_BATCHES:
            self._batches.append(batch)
        else:
            self._too_many = True

    def saw(self, step: int, loss: float | None, trend: TrendState) -> None:
        """Take note of a step's loss, and of its trend before that."""
        self._step, self._loss, self._usual, self._complete = step, loss, _usual(trend), True
        self._braced, self._moved = self._ring.braced == step - 1, False
        if self._same is None and self._batches and self._usual is not None and not self._too_many:
            self._same = self._is_same(loss)

    def interrupt(self) -> None:
        """The state was set from outside: it is no longer the one that the latest step has left."""
        self._moved = True

    def wanted(self, decision: Decision, state: EngineState) -> bool:
        """Whether the loss is suspected, for the first time in this episode, and its batches are known."""
        episode = state.ledger.episode
        if episode is None or not self._batches or self._too_many or episode.onset == self._onset:
            return False
        if not any(e.fired and e.detector in _LOSS for e in decision.evidence):
            return False
        self._onset = episode.onset
        return True

    def attribute(self, state: EngineState, batch: Any = None) -> AttributionResult:
        """Attribute the loss of the latest step; never raises, and abstains where something is missing."""
        known = batch is None or any(batch is one for one in self._batches)
        if known and self.result is not None and self.result.step == self._step:
            return self.result
        try:
            found = self._judged(state, batch)
        except Exception as fault:
            message = f"The states could not be read: {type(fault).__name__}: {fault}"
            found = AttributionResult(Cause.ABSTAIN, message, self._loss)
        self.result = replace(found, step=self._step)
        return self.result

    def _judged(self, state: EngineState, batch: Any) -> AttributionResult:
        batches = self._batches if batch is None else [batch]
        before = self._before()
        message = None
        if not batches or (batch is None and self._too_many):
            message = (
                "The batch is not known: pass it to update(loss, batch=...), iterate over supervisor.batches(loader), "
                "or call attribute(batch)."
            )
        elif self._moved and before is None:
            message = "The state was restored since that step; know the batch before: update(loss, batch=...)."
        elif self._same is False:
            message = (
                "The loss of training is not the one that is evaluated again (another factor, term or reduction): pass "
                "loss_fn= to the supervisor."
            )
        elif _distributed():
            message = "In a distributed run no rank evaluates on its own."
        if message is not None:
            return AttributionResult(Cause.ABSTAIN, message, self._loss)
        # The state that the loss was reported on is the better one, where it was captured.
        present = None if before is None else _tensors(before)
        return attribute(
            self._loss,
            self._usual,
            evaluate=partial(self._losses.mean, batches, present),
            certified=self._certified(state, batches),
        )

    def _is_same(self, loss: float | None) -> bool | None:
        """Compare on an ordinary step, once: one forward pass."""
        if loss is None or not math.isfinite(loss) or self._usual is None or _distributed():
            return None
        try:
            again = self._losses.mean(self._batches, None)
        except Exception:
            return None  # it will be said when it is asked for
        return abs(again - loss) <= max(_SAME_FRAC * abs(loss), 4.0 * self._usual.deviation)

    def _before(self) -> Slot | None:
        """The state from right before the latest step's update, if it was captured then."""
        if not self._braced:
            return None
        return self._ring.beside if self._ring.braced == self._step - 1 else self._held(self._step - 1)

    def _held(self, step: int) -> Slot | None:
        return self._ring.slot(step) if step in self._ring.steps() else None

    def _certified(self, state: EngineState, batches: list[Any]) -> Certified | None:
        """The newest certified state from before the trouble whose usual loss is known."""
        ledger, saved = state.ledger, dict(state.saved)
        onset = self._step if ledger.episode is None else min(self._step, ledger.episode.onset)
        for slot in sorted(ledger.slots, key=lambda s: -s.step):
            held, estimators = self._held(slot.step), saved.get(slot.step)
            if not slot.certified or slot.suspect or slot.step >= onset or held is None or estimators is None:
                continue
            usual = _usual(estimators.loss)
            if usual is not None:
                return Certified(partial(self._losses.mean, batches, _tensors(held)), usual, slot.step)
        return None


def _usual(trend: TrendState) -> Usual | None:
    if trend.level is None or trend.scale.seen < _SEEN:
        return None
    return Usual(trend.level, trend.scale.deviation)


def _tensors(slot: Slot) -> dict[str, Tensor]:
    """Parameters and buffers of a captured state by name; they alias the slot."""
    image = slot.image()
    model = join(image.skeleton["modules"]["model"], lambda leaf: image.tensors[leaf.index])
    return {**model["parameters"], **model["buffers"]}


def _distributed() -> bool:
    parallel = torch.distributed
    return parallel.is_available() and parallel.is_initialized() and parallel.get_world_size() > 1
