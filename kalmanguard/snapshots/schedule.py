"""Which param-group options belong to the learning-rate schedule."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from torch.optim import Optimizer

#: Options that a learning-rate schedule writes.
SCHEDULED: Final = frozenset({"lr", "initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum"})
#: What it writes too when it cycles the momentum (OneCycleLR, CyclicLR).
CYCLED: Final = frozenset({"momentum", "betas"})


def scheduled_options(optimizer: Optimizer, schedulers: Iterable[Any]) -> frozenset[str]:
    """Return the names of the options of ``optimizer`` that the schedule owns, and a rollback leaves alone."""
    if any(_cycles_momentum(scheduler, optimizer) for scheduler in schedulers):
        return SCHEDULED | CYCLED
    return SCHEDULED


def _cycles_momentum(scheduler: Any, optimizer: Optimizer) -> bool:
    parts = [scheduler, *getattr(scheduler, "_schedulers", ())]
    return any(
        getattr(part, "cycle_momentum", False) and getattr(part, "optimizer", optimizer) is optimizer for part in parts
    )
