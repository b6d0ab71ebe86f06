"""The hooks that let faults act on one run of an ordinary training loop, and the clock that counts its steps."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from kalmanguard.errors import ConfigurationError
from kalmanguard.faults.batch import map_batch, tensors
from kalmanguard.faults.fault import (
    DataFault,
    Details,
    Fault,
    FaultRecord,
    GradientFault,
    LearningRateFault,
    StateFault,
    seeded,
)
from kalmanguard.faults.tap import GradientTap


@final
@dataclass(frozen=True, slots=True)
class Appointment:
    """A fault and its first step; ``index`` is its place in the schedule and keys its random draws."""

    index: int
    at: int
    fault: Fault

    def due(self, step: int) -> bool:
        """Whether the fault acts at ``step``."""
        duration = self.fault.duration
        return self.at <= step and (duration is None or step < self.at + duration)


@final
class Attachment:
    """One run: step ``t`` begins when its batch is drawn and ends after the ``t``-th optimizer step.

    Parameters
    ----------
    schedule
        What is to happen when.
    model, optimizer
        Whose steps are counted.
    seed
        Key of all random draws.
    first_step
        Number of the next step.
    record
        Called with everything that was done.
    """

    def __init__(
        self,
        schedule: Sequence[Appointment],
        model: nn.Module,
        optimizer: Optimizer,
        *,
        seed: int,
        first_step: int,
        record: Callable[[FaultRecord], None],
    ) -> None:
        self._schedule = schedule
        self._model = model
        self._optimizer = optimizer
        self._seed = seed
        self._record = record
        self.completed = first_step - 1
        self._begun = first_step - 1
        self._parts = 0  # batches drawn for this step, several where gradients are accumulated
        self._drawn = False
        self._labels: tuple[int, int] | None = None
        self._data = [(entry, entry.fault) for entry in schedule if isinstance(entry.fault, DataFault)]
        self._reads_labels = any(fault.needs_targets for _, fault in self._data)
        self._taps: list[GradientTap] = []
        self._rates: list[tuple[dict[str, Any], float | Tensor]] = []
        pre_hook = register_optimizer_step_pre_hook(self._before_step)
        self._post_hook = register_optimizer_step_post_hook(self._after_step)
        _reorder(pre_hook, last=False)
        self._handles = [model.register_forward_pre_hook(self._before_forward), pre_hook, self._post_hook]

    def close(self) -> None:
        """Remove every hook and take off what is still applied."""
        self._disarm()
        self._restore_rates()
        for handle in self._handles:
            handle.remove()

    def draw(self, batch: Any, key: str | int | None) -> Any:
        """Begin the step if it has not begun, and return the batch as its faults leave it."""
        step = self._begin()
        self._parts += 1
        self._drawn = True
        if self._reads_labels:
            self._note_labels(tensors(batch, key=key)[1])
        for entry, fault in self._data:
            if entry.due(step):
                batch = self._corrupt(batch, key, fault, seeded(self._seed, entry.index, step, self._parts))
        return batch

    def __deepcopy__(self, memo: dict[int, object]) -> Attachment:
        return self  # a copy of the model (for averaged weights, say) brings its hooks along; faults are not for it

    # --- the clock ----------------------------------------------------------------------------------------------------

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if module is not self._model or not (module.training and torch.is_grad_enabled()):
            return  # a copy, or a probe, which must neither start a step nor meet a fault
        if self._data and not self._drawn:
            raise ConfigurationError(
                "Faults in the data are scheduled, but the batches do not come through the injector: write "
                "`for batch in injector.batches(loader)`."
            )
        self._begin()

    def _begin(self) -> int:
        step = self.completed + 1
        if self._begun == step:
            return step
        self._begun = step
        self._parts = 0
        for entry in self._schedule:
            if not entry.due(step):
                continue
            if isinstance(entry.fault, StateFault):
                generator = seeded(self._seed, entry.index, step)
                self._note(step, entry.fault, entry.fault.strike(self._model, self._optimizer, generator))
            elif isinstance(entry.fault, GradientFault):
                self._taps.append(GradientTap(entry.fault, self._model))
        return step

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[Any, Any]) -> None:
        if optimizer is not self._optimizer:
            return
        late = self._begun != self.completed + 1
        step = self._begin()
        if late and not (len(args) > 1 or kwargs.get("closure")):
            for tap in self._taps:  # neither batch nor forward pass was seen: the gradients are there already
                tap.corrupt_now()
        for tap in self._taps:
            tap.corrupt_unseen()
        self._restore_rates()
        self._apply_rates(step)

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[Any, Any]) -> None:
        if optimizer is not self._optimizer:
            return
        self._restore_rates()
        for tap in self._taps:
            self._note(self._begun, tap.fault, tap.details())
        self._disarm()
        self.completed += 1

    # --- learning rates -----------------------------------------------------------------------------------------------

    def _apply_rates(self, step: int) -> None:
        factor = 1.0
        for entry in self._schedule:
            if isinstance(entry.fault, LearningRateFault) and entry.due(step):
                own = entry.fault.factor_at(step - entry.at + 1)
                factor *= own
                self._note(step, entry.fault, {"factor": own})
        if factor == 1.0:
            return
        # The outermost factor of all: applied before any other hook looks, taken off after all have put theirs back.
        _reorder(self._post_hook, last=True)
        for group in self._optimizer.param_groups:
            rate = group["lr"]
            self._rates.append((group, rate.clone() if isinstance(rate, Tensor) else rate))
            _set_rate(group, rate * factor)

    def _restore_rates(self) -> None:
        for group, rate in self._rates:
            _set_rate(group, rate)
        self._rates.clear()

    # --- data and gradients -------------------------------------------------------------------------------------------

    def _corrupt(self, batch: Any, key: str | int | None, fault: DataFault, generator: torch.Generator) -> Any:
        labels = self._labels or (0, 0)
        before = tensors(batch, key=key)
        if not before[1] and fault.needs_targets:
            raise ConfigurationError(
                f"{fault.kind}: the batch has no targets; name them with batches(..., targets=...)."
            )
        batch = map_batch(
            batch,
            inputs=lambda values: fault.corrupt_input(values, generator),
            targets=lambda values: fault.corrupt_target(values, labels, generator),
            key=key,
        )
        after = tensors(batch, key=key)
        changed = {"inputs": _changed(before[0], after[0]), "targets": _changed(before[1], after[1])}
        self._note(self._begun, fault, changed)
        return batch

    def _note_labels(self, targets: Sequence[Tensor]) -> None:
        for values in targets:
            valid = values[values >= 0] if not values.is_floating_point() else values[:0]
            if valid.numel():
                least, greatest = int(valid.min()), int(valid.max())
                known = self._labels or (least, greatest)
                self._labels = (min(known[0], least), max(known[1], greatest))

    def _disarm(self) -> None:
        for tap in self._taps:
            tap.close()
        self._taps.clear()

    def _note(self, step: int, fault: Fault, details: Details) -> None:
        self._record(FaultRecord(step, fault.kind, details))
        if "missed" in details:
            warnings.warn(f"{fault.describe()} had no effect at step {step}: {details['missed']}.", stacklevel=2)


def _reorder(handle: RemovableHandle, *, last: bool) -> None:
    hooks = handle.hooks_dict_ref()
    if hooks is not None:
        hooks.move_to_end(handle.id, last=last)


def _set_rate(group: dict[str, Any], rate: float | Tensor) -> None:
    if isinstance(group["lr"], Tensor):
        group["lr"].copy_(torch.as_tensor(rate))  # capturable optimizers hold on to the tensor itself
    else:
        group["lr"] = rate


def _changed(before: Sequence[Tensor], after: Sequence[Tensor]) -> int:
    return sum(int((old != new).sum()) for old, new in zip(before, after, strict=True))
