"""The spectral thermostat as a callback of a Trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from kalmanguard.actuators.thermostat import SpectralThermostat
from kalmanguard.errors import ConfigurationError
from kalmanguard.integrations.huggingface.tap import torch_optimizer


class SpectralThermostatCallback(TrainerCallback):
    """A `SpectralThermostat` on a Trainer's model and optimizer, from the beginning of training to its end.

    ``Trainer(..., callbacks=[SpectralThermostatCallback()])`` is all there is to do. The thermostat is attached to the
    torch optimizer beneath accelerate's, so it acts once per optimizer step whatever ``gradient_accumulation_steps``
    is, and neither the loss nor a gradient is touched.

    Parameters
    ----------
    target, every, strongest, include, seed
        Of the `SpectralThermostat`.

    Attributes
    ----------
    thermostat
        The one that acts or has acted last; ``None`` before training.

    Raises
    ------
    ConfigurationError
        At the beginning of training: no torch optimizer is reachable (DeepSpeed), or it trains no matrix that can be
        regulated (FSDP shards its parameters, which cannot be read in place).

    Notes
    -----
    A Trainer that resumes from a checkpoint starts the loops anew: their targets are shares of the stable ranks then.

    Examples
    --------
    >>> callback = SpectralThermostatCallback(target=0.9)
    >>> callback.thermostat is None
    True
    """

    def __init__(
        self,
        *,
        target: float = 0.8,
        every: int = 10,
        strongest: float = 0.02,
        include: Callable[[str], bool] | None = None,
        seed: int = 0,
    ) -> None:
        self._target, self._every, self._strongest, self._include, self._seed = target, every, strongest, include, seed
        self.thermostat: SpectralThermostat | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Attach a new thermostat."""
        optimizer = torch_optimizer(optimizer, "the spectral thermostat")
        if model is None:
            raise ConfigurationError("The Trainer has passed no model to its callbacks; there is nothing to regulate.")
        self._close()
        self.thermostat = SpectralThermostat(
            model,
            optimizer,
            target=self._target,
            every=self._every,
            strongest=self._strongest,
            include=self._include,
            seed=self._seed,
        )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Detach."""
        self._close()

    def _close(self) -> None:
        if self.thermostat is not None:
            self.thermostat.close()
