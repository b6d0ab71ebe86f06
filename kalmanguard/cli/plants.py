"""Plants by name: whatever packages have registered in the entry-point group ``kalmanguard.plants``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, Protocol, cast

from kalmanguard.errors import ConfigurationError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

GROUP = "kalmanguard.plants"


class Plant(Protocol):
    """What a command needs of a plant: a model with its data and its recipe, ready to train."""

    model: nn.Module
    optimizers: list[Optimizer]
    schedulers: list[LRScheduler]
    loader: Iterator[Any]
    probe_loader: Iterable[Any]

    def loss_fn(self, output: Any, target: Any) -> Tensor:
        """Loss of a probe batch: the mean, or one for each example."""

    def train_step(self, batch: Any) -> Tensor:
        """Train on one batch: backward pass, optimizers, schedules; returns the training loss."""

    def held_out_loss(self) -> float:
        """Mean loss on a split that neither training nor the probe ever sees."""

    def describe(self) -> str:
        """One line about the plant."""


def plant_names() -> tuple[str, ...]:
    """Names of all registered plants, sorted."""
    return tuple(sorted(_registered()))


def make_plant(name: str, options: dict[str, Any]) -> Plant:
    """Make a plant with those options that are not None.

    Raises
    ------
    ConfigurationError
        There is no such plant, it cannot be loaded, or it does not have an option.
    """
    factory = _load(name)
    given = {key: value for key, value in options.items() if value is not None}
    known = inspect.signature(factory).parameters
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in known.values()):
        foreign = [key for key in given if key not in known]
        # Every command names steps and seed; the others were asked for.
        for key in ("steps", "seed"):
            if key in foreign:
                foreign.remove(key)
                del given[key]
        if foreign:
            raise ConfigurationError(
                f"Plant {name!r} has no option {foreign[0]!r}; its options are {', '.join(known) or 'none'}."
            )
    return factory(**given)


def _load(name: str) -> Callable[..., Plant]:
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
