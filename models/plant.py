"""What a reference plant is, and how one is found by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from kalmanguard.errors import ConfigurationError

from .stream import Batch, BatchStream

GROUP = "kalmanguard.plants"


class Plant(ABC):
    """A network, the data it learns and a stock recipe that trains it: what a supervisor flies in a test.

    ``for batch in plant.loader: plant.train_step(batch)`` trains it; `train_step` is `backward` and `step`, for loops
    that have something to do in between. With the same seed and the same state of torch's global generator (which
    dropout draws from) two runs on one thread are bit-identical. Making a plant leaves the global generator as it was.

    Attributes
    ----------
    name
        What the plant is registered as.
    model
        All that is trained, in one module.
    optimizers, schedulers
        Each is stepped once a step; there is a scheduler per optimizer, or none without a schedule.
    optimizer, scheduler
        The first ones, which mostly are the only ones; the scheduler is ``None`` without a schedule.
    loader
        Endless training batches ``(inputs, targets)``, rewindable.
    probe_loader
        A finite list of batches from a split of its own, for the supervisor.
    """

    def __init__(
        self,
        *,
        name: str,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        scheduler: LRScheduler | Sequence[LRScheduler] | None,
        loader: BatchStream,
        probe_loader: list[Batch],
        held_out: Sequence[Batch],
    ) -> None:
        self.name = name
        self.model = model
        self.optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
        self.schedulers = [scheduler] if isinstance(scheduler, LRScheduler) else list(scheduler or ())
        self.optimizer = self.optimizers[0]
        self.scheduler = self.schedulers[0] if self.schedulers else None
        self.loader = loader
        self.probe_loader = probe_loader
        self._held_out = held_out

    @abstractmethod
    def loss_fn(self, output: Tensor, target: Tensor) -> Tensor:
        """Loss of a batch on which the plant is judged: the mean, or one for each example."""

    def step_loss(self, batch: Batch) -> Tensor:
        """Forward pass and loss of one training batch, in the mode that the model is in."""
        inputs, targets = batch
        return self.loss_fn(self.model(inputs), targets)

    def backward(self, batch: Batch) -> Tensor:
        """Forward and backward pass of one training batch; the gradients are then as the optimizers get them.

        Returns
        -------
        Tensor
            The training loss, without its graph.
        """
        loss = self.step_loss(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def step(self) -> None:
        """Step every optimizer and every schedule, and clear the gradients."""
        for optimizer in self.optimizers:
            optimizer.step()
        for scheduler in self.schedulers:
            scheduler.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def train_step(self, batch: Batch) -> Tensor:
        """Train on one batch; returns its loss."""
        loss = self.backward(batch)
        self.step()
        return loss

    def held_out_loss(self) -> float:
        """Mean loss on the held-out split, which neither training nor the probe ever sees.

        Leaves no trace: train and eval flags of every module, buffers and random states are as before.
        """
        total = examples = 0.0
        with untraced(self.model):
            for inputs, targets in self._held_out:
                total += float(self.loss_fn(self.model(inputs), targets).mean()) * len(targets)
                examples += len(targets)
        return total / examples

    def describe(self) -> str:
        """One line: the network, its size, the optimizer and the data sets."""
        parameters = sum(p.numel() for p in self.model.parameters())
        group = self.optimizer.param_groups[0]
        twice = f"{len(self.optimizers)} x " if len(self.optimizers) > 1 else ""
        probe = sum(len(targets) for _, targets in self.probe_loader)
        held_out = sum(len(targets) for _, targets in self._held_out)
        momentum = f", momentum {group['momentum']:g}" if "momentum" in group else ""
        schedule = f", {type(self.scheduler).__name__}" if self.scheduler is not None else ""
        return (
            f"{self.name}: {type(self.model).__name__} with {parameters:,} parameters, "
            f"{twice}{type(self.optimizer).__name__} at {group['initial_lr'] if self.scheduler else group['lr']:g}"
            f"{momentum}{schedule}, batches of {self.loader.batch_size}; "
            f"probe of {probe:,}, held-out set of {held_out:,} examples"
        )


@contextmanager
def untraced(model: nn.Module) -> Iterator[None]:
    """Evaluate without a trace: eval mode and no gradients inside; modes and random states restored afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices), torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


@contextmanager
def initialised_with(seed: int) -> Iterator[None]:
    """Draw initial weights from ``seed``; the global generator is as before afterwards, those of GPUs untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed every GPU as well
        yield


def plant_names() -> tuple[str, ...]:
    """Names of all registered plants, sorted; those of other packages included."""
    return tuple(sorted(_registered()))


def load_plant(name: str) -> Callable[..., Plant]:
    """Find a registered plant: a callable with keyword options only, such as ``load_plant("mlp")(seed=1)``.

    Parameters
    ----------
    name
        A name in the entry-point group ``kalmanguard.plants``.

    Raises
    ------
    ConfigurationError
        No plant is registered at all, none with that name, or its module cannot be imported.
    """
    found = _registered()
    if not found:
        raise ConfigurationError(
            f"No plants are registered in the entry-point group {GROUP!r}: install the package (pip install -e .), "
            "since a bare copy of the sources registers none."
        )
    if name not in found:
        raise ConfigurationError(f"There is no plant {name!r}; choose one of {', '.join(sorted(found))}.")
    try:
        return cast("Callable[..., Plant]", found[name].load())
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(
            f"Plant {name!r} is registered as {found[name].value!r}, which cannot be loaded: {error}."
        ) from error


def _registered() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=GROUP)}
