"""What is stressed: copies of the user's model, optimizer and data, and what its held-out loss is worth."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kalmanguard.errors import ConfigurationError
from kalmanguard.faults.batch import map_batch
from kalmanguard.sensors import losses as L
from kalmanguard.sensors.probe import Probe
from kalmanguard.sensors.trace import evaluation_mode, random_streams_kept

LossFn = Callable[[Any, Any], Tensor]
#: Scales of the mean output among which the best constant output is sought.
_SCALES = (0.0, 0.25, 0.5, 0.75, 1.0)
#: Standard errors by which the held-out loss must lie below that of a constant output.
_CLEARLY = 2.0


@dataclass(eq=False)
class Flyer:
    """A model in training: a copy, so that nothing of the user's is touched."""

    model: nn.Module
    optimizer: Optimizer

    def copy(self) -> Flyer:
        """Copy both, the optimizer holding the copied parameters."""
        return Flyer(*copy.deepcopy((self.model, self.optimizer)))


@dataclass(eq=False)
class Subject:
    """A model whose robustness is judged.

    Attributes
    ----------
    start
        Model and optimizer as they were given.
    trained
        The same after the warm-up training, if there was any; this state is what is perturbed.
    batches, held_out
        Training batches, and those that the loss is measured on.
    loss_fn
        As for `Probe`.
    loss, uninformed
        Held-out loss of the trained state, and that of the best constant output.
    learned
        ``uninformed - loss`` where it is clearly more than nothing, else 0.
    """

    start: Flyer
    trained: Flyer
    batches: list[Any]
    held_out: list[Any]
    loss_fn: LossFn | None
    examples: int
    loss: float = math.nan
    uninformed: float = math.nan
    learned: float = 0.0

    def measure(self) -> None:
        """Measure `loss`, `uninformed` and `learned` of the trained state."""
        reading = self.probe(self.trained.model).read()
        self.loss = reading.mean
        self.uninformed = uninformed_loss(self.trained.model, self.held_out, self.loss_fn, self.examples)
        gained = self.uninformed - self.loss
        error = float(reading.losses.std(ddof=1)) / math.sqrt(len(reading.losses))
        self.learned = gained if gained > _CLEARLY * error else 0.0

    def probe(self, model: nn.Module) -> Probe:
        """The held-out loss of a copy."""
        return Probe(model, self.held_out, examples=self.examples, loss_fn=self.loss_fn)

    def retained(self, loss: float) -> float:
        """Share of the learned that is left at this held-out loss, in [0, 1]; 0 if it is not finite."""
        return share(loss, best=self.loss, uninformed=self.uninformed) if self.learned else 0.0

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.start.model.parameters()).device


def share(loss: float, *, best: float, uninformed: float) -> float:
    """Where a loss lies between that of a constant output (0) and the best one (1), cut to [0, 1].

    >>> [share(loss, best=0.0, uninformed=2.0) for loss in (0.5, 3.0, math.nan)]
    [0.75, 0.0, 0.0]
    """
    if not math.isfinite(loss) or not uninformed > best:
        return 0.0
    return min(1.0, max(0.0, (uninformed - loss) / (uninformed - best)))


def uninformed_loss(model: nn.Module, batches: Sequence[Any], loss_fn: LossFn | None, examples: int) -> float:
    """Held-out loss of an output that is the same for every example.

    The constant is the model's mean output, times that of five scales from 0 to 1 which makes the loss least. Where the
    output is no tensor it cannot be averaged: then the examples get each other's targets, a stand-in that lies higher.

    Raises
    ------
    ConfigurationError
        The loss cannot be had from an output (see `Probe`).
    """
    device = next(model.parameters()).device
    kept, wanted = [], examples
    for batch in batches:
        if wanted:
            kept.append(L.copied(L.take(batch, min(wanted, L.batch_size(batch))), device))
            wanted -= L.batch_size(kept[-1])
    with random_streams_kept(device), evaluation_mode(model):
        outputs, targets = [], []
        for batch in kept:
            inputs, keywords, target = L.split_batch(batch)
            output = model(*inputs, **keywords)
            if not isinstance(output, Tensor) or len(output) != L.batch_size(batch) or target is None:
                rolled = [map_batch(b, inputs=lambda t: t, targets=lambda t: t.roll(1, 0)) for b in kept]
                return Probe(model, rolled, examples=examples, loss_fn=loss_fn).read().mean
            outputs.append(output)
            targets.append(target)
        if any(o.shape[1:] != outputs[0].shape[1:] for o in outputs):
            # Outputs of several lengths: each batch has its own mean.
            means = [o.float().mean(0, keepdim=True) for o in outputs]
        else:
            means = [torch.cat(outputs).float().mean(0, keepdim=True)] * len(outputs)
        found = [
            _loss_of([s * m.expand_as(o) for m, o in zip(means, outputs, strict=True)], targets, loss_fn)
            for s in _SCALES
        ]
    finite = [loss for loss in found if math.isfinite(loss)]
    return min(finite, default=math.nan)


def _loss_of(outputs: list[Tensor], targets: list[Any], loss_fn: LossFn | None) -> float:
    total, count = 0.0, 0
    for output, target in zip(outputs, targets, strict=True):
        losses = L.per_example(output, target, loss_fn, len(output))
        mean = losses.mean() if losses is not None else L.batch_mean(output, target, loss_fn)
        total += float(mean) * len(output)
        count += len(output)
    return total / count


def training_loss(model: nn.Module, batch: Any, loss_fn: LossFn | None) -> Tensor:
    """Mean loss of a training batch, with its graph."""
    inputs, keywords, target = L.split_batch(batch)
    output = model(*inputs, **keywords)
    wanted = batch if target is None and isinstance(batch, Mapping) else target
    if loss_fn is not None:
        return loss_fn(output, wanted).mean()
    losses = L.per_example(output, wanted, None, L.batch_size(batch))
    return losses.mean() if losses is not None else L.batch_mean(output, wanted, None)


@contextmanager
def seeded_streams(device: torch.device, seed: int) -> Iterator[None]:
    """Torch's random streams start from ``seed`` inside, and are as before afterwards."""
    with random_streams_kept(device):
        torch.default_generator.manual_seed(seed)
        if device.type not in ("cpu", "meta"):
            torch.get_device_module(device).manual_seed(seed)
        yield


def materialised(
    batches: Sequence[Any], held_out: Sequence[Any] | None, device: torch.device
) -> tuple[list[Any], list[Any]]:
    """Training and held-out batches, copied; without held-out ones the last third is held out.

    Raises
    ------
    ConfigurationError
        There are too few examples.
    """
    train = [L.copied(batch, device) for batch in batches]
    if held_out is not None:
        held = [L.copied(batch, device) for batch in held_out]
    elif len(train) > 1:
        cut = max(1, len(train) * 2 // 3)
        train, held = train[:cut], train[cut:]
    elif train and (size := L.batch_size(train[0])) >= 4:
        cut = size * 2 // 3
        train, held = [L.take(train[0], cut)], [L.take(train[0], size - cut, cut)]
    else:
        raise ConfigurationError(
            "The data sample is too small: give at least two batches, or one of at least 4 examples, so that some can "
            "be held out."
        )
    if not train or not held:
        raise ConfigurationError(
            "The data sample is empty; it must yield at least one batch for training and one held out."
        )
    return train, held
