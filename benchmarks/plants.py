"""The recipes that are trained, and the loss that a benchmark believes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from benchmarks.organic import SCENARIOS
from benchmarks.replica_plant import RepeatedPhrase
from kalmanguard.models import Plant, load_plant
from kalmanguard.models.plant import untraced

#: Examples at the head of the probe loader that a supervisor probes by default; the truth uses others.
_PROBED = 128
_TRUTH = 256

#: Name of the published experiment's plant.
REPLICA = "repeated phrase"
_JUDGED_BY_OWN = ("gan", "cartpole")

#: Name of a recipe: registered plant and its options.
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "mlp": ("mlp", {}),
    "mlp, batch 8": ("mlp", {"batch_size": 8}),
    "mlp, batch 2": ("mlp", {"batch_size": 2}),
    "mlp, SGD": ("mlp", {"optimizer": "sgd", "momentum": 0.0}),
    "mlp, SGD momentum 0.9": ("mlp", {"optimizer": "sgd", "momentum": 0.9}),
    "mlp, warm restarts": ("mlp", {"schedule": "warm-restarts"}),
    "mlp, warm-up cosine": ("mlp", {"schedule": "warmup-cosine"}),
    "cnn": ("cnn", {}),
    "cnn, SGD": ("cnn", {"optimizer": "sgd", "momentum": 0.0}),
    "chartransformer": ("chartransformer", {"size": "small"}),
    "chartransformer, warm restarts": ("chartransformer", {"size": "small", "schedule": "warm-restarts"}),
    "chartransformer, warm-up cosine": ("chartransformer", {"size": "small", "schedule": "warmup-cosine"}),
    "chartransformer base": ("chartransformer", {"size": "base"}),
    "resnet": ("resnet", {}),
    "unet": ("unet", {}),
    "rnn": ("rnn", {}),
    "gan": ("gan", {}),
    "cartpole": ("cartpole", {}),
    "vit": ("vit", {}),
    "vit, 20 % of the data": ("vit", {"data_frac": 0.2}),
}


def make_plant(recipe: str, *, seed: int, steps: int) -> Plant:
    """Make the plant of a recipe or a scenario; ``steps`` is the length of its schedule, where it has one."""
    if recipe in SCENARIOS:
        return SCENARIOS[recipe].make(seed=seed, steps=steps)
    if recipe == REPLICA:
        return RepeatedPhrase(seed=seed, steps=steps)
    name, options = RECIPES[recipe]
    return load_plant(name)(seed=seed, steps=steps, **options)


def probe_loss(plant: Plant) -> Callable[[Tensor, Tensor], Tensor] | None:
    """What a user passes as ``loss_fn``: nothing where the supervisor can infer it."""
    return plant.loss_fn if plant.name in _JUDGED_BY_OWN else None


def fault_step(recipe: str, seed: int) -> int:
    """Draw the step at which a run is damaged: a prime between 150 and 260, so that no cadence divides it."""
    primes = [n for n in range(150, 261) if all(n % d for d in range(2, int(n**0.5) + 1))]
    return int(np.random.default_rng([2_601, seed, list(RECIPES).index(recipe)]).choice(primes))


class Truth:
    """Mean loss on examples that no guard sees: those of the probe split behind the ones that a supervisor probes."""

    def __init__(self, plant: Plant) -> None:
        self._plant = plant
        self._batches = []
        skip, take = _PROBED, _TRUTH
        for inputs, targets in plant.probe_loader:
            start = min(skip, len(targets))
            stop = min(start + take, len(targets))
            skip -= start
            take -= stop - start
            if stop > start:
                self._batches.append((inputs[start:stop], targets[start:stop]))

    def __call__(self) -> float:
        """Measure now, without a trace."""
        total = examples = 0.0
        with untraced(self._plant.model):
            for inputs, targets in self._batches:
                total += float(self._plant.loss_fn(self._plant.model(inputs), targets).mean()) * len(targets)
                examples += len(targets)
        return total / examples
