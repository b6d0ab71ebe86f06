"""Recovery actions: small classes to combine, or to subclass, into a recovery ladder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kalmanguard.actuators.effects import Anchor, GradientClip, LearningRateLimit
from kalmanguard.errors import ConfigurationError
from kalmanguard.records import Decision
from kalmanguard.sensors.importance import second_moment_importance


class Effects(Protocol):
    """Where an action puts what stays in force over the next steps."""

    effects: list[Any]


def _nothing() -> None:
    """Stand in for a control that does not apply."""


@dataclass
class Controls:
    """What a recovery action may touch.

    Attributes
    ----------
    model, optimizers
        The supervised model (never compiled away) and every bound optimizer.
    decision
        The decision that is being carried out; once a state is restored, with the step that it is of.
    restored_rates
        Learning rates that the restored state was trained at, per optimizer and group; empty before the restore.
    clip_value
        Recommended bound of the gradient norm; ``inf`` when unknown.
    hold_steps
        Steps for which an effect should stay in force.
    learning_rate
        The one limit on learning rates.
    tap
        The optimizer tap, for effects of your own.
    checkpoint
        Writes a durable checkpoint of the present state and returns its folder; ``None`` without a run folder.
    generator
        A random stream of the supervisor's own.
    drop
        Takes the gradients of the proposed update away until the step is over; only while a veto is carried out.
    restore
        Restores the state that was decided on, and proves that it is the captured one, bit for bit; the second call
        does nothing.
    halt
        Ends supervision: limits are lifted, and the durable checkpoints stay as they are.
    restored
        Whether `restore` has been carried out.
    """

    model: nn.Module
    optimizers: Sequence[Optimizer]
    decision: Decision
    restored_rates: Sequence[tuple[float, ...]]
    clip_value: float
    hold_steps: int
    learning_rate: LearningRateLimit
    tap: Effects
    checkpoint: Callable[[], Path | None]
    generator: torch.Generator = field(default_factory=torch.Generator)
    drop: Callable[[], None] = _nothing
    restore: Callable[[], None] = _nothing
    halt: Callable[[], None] = _nothing
    restored: bool = False


class RecoveryAction(ABC):
    """One thing that is done when an update is vetoed, a state is restored, or a run halts.

    Subclass it, or one of those below, and implement `apply`; an exception that it raises is recorded and does not stop
    the others.
    """

    @abstractmethod
    def apply(self, controls: Controls) -> None:
        """Carry the action out."""

    def describe(self) -> str:
        """The action and its parameters, for the journal."""
        arguments = ", ".join(f"{k}={v!r}" for k, v in vars(self).items() if not callable(v))
        return f"{type(self).__name__}({arguments})"


class Veto(RecoveryAction):
    """Drop the proposed update: parameters, moments and step counters stay as they are, bit for bit.

    Subclass it to do more (save the batch, say). An update that was decided to be vetoed is dropped in any case, after
    the actions if none of them did it.
    """

    def apply(self, controls: Controls) -> None:
        """Take the gradients away for the duration of the step."""
        controls.drop()


class Rollback(RecoveryAction):
    """Restore the state that was decided on; the first action of every rung.

    Subclass it to do something right before or right after; call ``super().apply(controls)`` in between.
    """

    def apply(self, controls: Controls) -> None:
        """Restore, and try older states while what was restored proves to be outside the envelope."""
        controls.restore()


class Halt(RecoveryAction):
    """End supervision with the state as it is now; the last action of a halt."""

    def apply(self, controls: Controls) -> None:
        """Lift all limits, and keep the durable checkpoints as they are."""
        controls.halt()


class HoldLearningRate(RecoveryAction):
    """Let no learning rate exceed the one that the restored state was trained at, until the run has recovered."""

    def apply(self, controls: Controls) -> None:
        """Put the limit in force."""
        for optimizer, rates in zip(controls.optimizers, controls.restored_rates, strict=False):
            controls.learning_rate.hold(optimizer, rates)


class ScaleLearningRate(RecoveryAction):
    """Multiply the learning rate, whatever the schedule makes of it, until the run has recovered; then warm it up."""

    def __init__(self, factor: float = 0.3) -> None:
        if not 0 < factor <= 1:
            raise ConfigurationError(f"factor = {factor} must lie in (0, 1].")
        self.factor = factor

    def apply(self, controls: Controls) -> None:
        """Put the factor in force."""
        controls.learning_rate.scale(self.factor)


class ClipGradients(RecoveryAction):
    """Clip the gradient norm to the recommended value for as long as the recovery lasts."""

    def apply(self, controls: Controls) -> None:
        """Start clipping, when there is a recommended value."""
        if controls.clip_value < float("inf"):
            controls.tap.effects.append(GradientClip(controls.clip_value, controls.hold_steps))


class ResetMoments(RecoveryAction):
    """Forget the optimizers' moments: for a poisoned optimizer state that older snapshots share."""

    def apply(self, controls: Controls) -> None:
        """Clear the per-parameter state."""
        for optimizer in controls.optimizers:
            if isinstance(optimizer, torch.optim.Adagrad):
                _reset_adagrad(optimizer)
            else:
                optimizer.state.clear()


@torch.no_grad()
def _reset_adagrad(optimizer: torch.optim.Adagrad) -> None:
    """Put the accumulators back to their start: older versions of torch make them in the constructor only."""
    start = optimizer.defaults["initial_accumulator_value"]
    for state in optimizer.state.values():
        state["step"].zero_()
        state["sum"].copy_(torch.full_like(state["sum"], complex(start, start) if state["sum"].is_complex() else start))


class PerturbWeights(RecoveryAction):
    """Add Gaussian noise to every trainable parameter, relative to its own root mean square."""

    def __init__(self, scale: float = 1e-3) -> None:
        if not scale > 0:
            raise ConfigurationError(f"scale = {scale} must be positive.")
        self.scale = scale

    @torch.no_grad()
    def apply(self, controls: Controls) -> None:
        """Perturb, from the supervisor's own random stream."""
        for p in controls.model.parameters():
            if p.requires_grad and p.is_floating_point():
                noise = torch.randn(p.shape, generator=controls.generator, dtype=torch.float32)
                p.add_((noise * (self.scale * p.float().square().mean().sqrt().cpu())).to(p))


class ElasticAnchor(RecoveryAction):
    """Pull the parameters towards the restored state for as long as the recovery lasts, by Fisher importance."""

    def __init__(self, strength: float = 0.1) -> None:
        if not strength > 0:
            raise ConfigurationError(f"strength = {strength} must be positive.")
        self.strength = strength

    def apply(self, controls: Controls) -> None:
        """Anchor at the present, restored parameters."""
        anchors: dict[Tensor, tuple[Tensor, Tensor | None]] = {}
        for optimizer in controls.optimizers:
            importance = second_moment_importance(optimizer)
            for group in optimizer.param_groups:
                anchors |= {p: (p.detach().clone(), importance.get(p)) for p in group["params"]}
        controls.tap.effects.append(Anchor(anchors, self.strength, controls.hold_steps))


class SaveCheckpoint(RecoveryAction):
    """Write a durable checkpoint of the restored state."""

    def apply(self, controls: Controls) -> None:
        """Queue the checkpoint; without a run folder there is nowhere to write, and nothing happens."""
        controls.checkpoint()


class Notify(RecoveryAction):
    """Call a function of yours with the decision, for a message to whoever is on duty."""

    def __init__(self, send: Callable[[Decision], object]) -> None:
        if not callable(send):
            raise ConfigurationError(f"send = {send!r} must be a function that takes a Decision.")
        self.send = send

    def apply(self, controls: Controls) -> None:
        """Send."""
        self.send(controls.decision)


@dataclass(frozen=True)
class Recovery:
    """What is done for a veto, on each rung of the ladder, and at a halt.

    Attributes
    ----------
    rungs
        Actions per rung, mildest first; one without a `Rollback` begins with a plain one.
    on_halt
        Actions of a halt; a `Rollback` at the beginning and a `Halt` at the end are added where they are missing.
        Neither may stand anywhere else, nor a `Veto` in a rung or a halt.
    on_veto
        Actions when a proposed update is dropped; a `Veto` is added at the end if there is none.

    Examples
    --------
    >>> ladder = Recovery.preset("balanced")
    >>> [[type(a).__name__ for a in rung] for rung in ladder.rungs][0]
    ['Rollback', 'HoldLearningRate']
    """

    rungs: tuple[tuple[RecoveryAction, ...], ...]
    on_halt: tuple[RecoveryAction, ...] = ()
    on_veto: tuple[RecoveryAction, ...] = ()

    def __post_init__(self) -> None:
        if not self.rungs:
            raise ConfigurationError("A recovery ladder needs at least one rung; () is a rung that only rolls back.")
        on_halt, on_veto = self.on_halt, self.on_veto
        if not any(isinstance(action, Halt) for action in on_halt):
            on_halt = (*on_halt, Halt())
        if not any(isinstance(action, Veto) for action in on_veto):
            on_veto = (*on_veto, Veto())
        object.__setattr__(self, "rungs", tuple(map(_restoring, self.rungs)))
        object.__setattr__(self, "on_halt", _restoring(on_halt))
        object.__setattr__(self, "on_veto", on_veto)
        for number, rung in enumerate(self.rungs):
            _refuse(f"rung {number}", rung[1:], (Rollback, Halt, Veto))
        _refuse("on_halt", self.on_halt[1:-1], (Rollback, Halt, Veto))
        _refuse("on_veto", self.on_veto, (Rollback, Halt))
        if not isinstance(self.on_halt[-1], Halt):
            raise ConfigurationError(f"on_halt ends with {self.on_halt[-1].describe()}; put the Halt last.")

    @property
    def vetoes_plainly(self) -> bool:
        """Whether a veto does no more than to drop the update, so that nobody has to know of it before the step."""
        return all(type(action) is Veto for action in self.on_veto)

    def actions(self, rung: int) -> tuple[RecoveryAction, ...]:
        """Actions of a rung; rungs above the last one are the last one."""
        return self.rungs[min(rung, len(self.rungs) - 1)]

    def describe(self) -> dict[str, object]:
        """For the journal's header."""
        return {
            "rungs": [[action.describe() for action in rung] for rung in self.rungs],
            "on_halt": [action.describe() for action in self.on_halt],
            "on_veto": [action.describe() for action in self.on_veto],
        }

    @classmethod
    def preset(cls, name: str) -> Recovery:
        """The ladders of the presets: they differ in how hard the higher rungs cut."""
        cut, hard = {"conservative": (0.5, 0.3), "balanced": (0.3, 0.1), "aggressive": (0.2, 0.05)}[name]
        hold = HoldLearningRate()
        return cls(
            rungs=(
                (Rollback(), hold),
                (Rollback(), hold, ScaleLearningRate(cut), ClipGradients()),
                (Rollback(), hold, ScaleLearningRate(hard), ClipGradients(), ResetMoments(), SaveCheckpoint()),
            ),
            on_halt=(Rollback(), SaveCheckpoint(), Halt()),
            on_veto=(Veto(),),
        )


def _restoring(actions: tuple[RecoveryAction, ...]) -> tuple[RecoveryAction, ...]:
    return actions if actions and isinstance(actions[0], Rollback) else (Rollback(), *actions)


def _refuse(where: str, actions: tuple[RecoveryAction, ...], kinds: tuple[type[RecoveryAction], ...]) -> None:
    for action in actions:
        if isinstance(action, kinds):
            raise ConfigurationError(
                f"{where} has {action.describe()} at the wrong place: a Rollback comes first, in rungs and on_halt, a "
                "Halt last, in on_halt, and a Veto belongs to on_veto."
            )
