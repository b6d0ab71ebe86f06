"""One training run of a plant, step by step, as the commands drive it: with faults, and under supervision or not."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from kalmanguard.cli.plants import Plant
from kalmanguard.errors import ConfigurationError, Intervention
from kalmanguard.faults import FaultInjector
from kalmanguard.records import Action, Decision
from kalmanguard.sensors.probe import Probe
from kalmanguard.settings import Settings
from kalmanguard.supervisor import Supervisor

_GAUGE_EXAMPLES = 64


class Lane:
    """A plant in training, advanced one step at a time, so that several can run side by side.

    Each lane has a stream of torch's global generator to itself: what is drawn in one lane does not depend on which
    others there are, nor does a rollback in one rewind another.

    Parameters
    ----------
    name
        What the run is called.
    plant
        What is trained.
    faults
        What happens to it, in the notation of `FaultInjector.parse`; faults in an optimizer strike the plant's first.
    seed
        Of the faults and of torch's global generator.
    settings
        Of the supervisor; ``None`` for an unsupervised run.
    run_dir
        Folder of the supervised run.

    Attributes
    ----------
    steps, seconds
        Steps done and the time they took, supervision included, measuring for display not.
    losses
        Training loss of every step.
    curve
        Step and held-out loss, where `gauge` measured it.
    stopped
        Why the run ended before its last step, if it did.
    """

    def __init__(
        self,
        name: str,
        plant: Plant,
        *,
        faults: Sequence[str] = (),
        seed: int = 0,
        settings: Settings | None = None,
        run_dir: Path | None = None,
    ) -> None:
        self.name, self.plant = name, plant
        self.steps, self.seconds = 0, 0.0
        self.losses: list[float] = []
        self.curve: list[tuple[float, float]] = []
        self.stopped: str | None = None
        self.supervisor: Supervisor | None = None
        self.injector = FaultInjector.parse(faults, seed=seed)
        self._probe: Probe | None = None
        self._random_state = torch.Generator().manual_seed(seed).get_state()
        self._open = ExitStack()
        try:
            self._open.enter_context(self.injector.attach(plant.model, plant.optimizers[0]))
            if settings is not None:
                self.supervisor = Supervisor(
                    plant.model,
                    plant.probe_loader,
                    optimizer=plant.optimizers,
                    scheduler=plant.schedulers,
                    loader=plant.loader,
                    loss_fn=plant.loss_fn,
                    settings=settings,
                    run_dir=run_dir,
                )
                self._open.enter_context(self.supervisor)
        except BaseException:
            self._open.close()
            raise

    @property
    def halted(self) -> bool:
        """Whether supervision has stopped the run."""
        return self.stopped is not None

    def advance(self) -> Decision | None:
        """Train one step; returns the supervisor's decision. A run that was stopped stays where it is."""
        if self.halted:
            return None
        started = time.perf_counter()
        outside = torch.get_rng_state()
        torch.set_rng_state(self._random_state)
        decision: Decision | None = None
        try:
            loss = self._train()
            if self.supervisor is not None:
                decision = self.supervisor.update(loss)
        except Intervention as stop:  # the settings ask for interventions as exceptions: that ends the run
            self.stopped = str(stop)
            decision = stop.decision if isinstance(stop.decision, Decision) else None
        finally:
            self._random_state = torch.get_rng_state()
            torch.set_rng_state(outside)
            self.seconds += time.perf_counter() - started
        if decision is not None and decision.action is Action.HALT:
            self.stopped = decision.reason
        return decision

    def _train(self) -> torch.Tensor:
        loss = self.plant.train_step(self.injector.draw(next(self.plant.loader)))
        self.steps += 1
        self.losses.append(float(loss))
        return loss

    def gauge(self) -> float:
        """Measure the held-out loss on the first examples of the probe's split, for display, and note it."""
        if self._probe is None:
            plant = self.plant
            self._probe = Probe(plant.model, plant.probe_loader, examples=_GAUGE_EXAMPLES, loss_fn=plant.loss_fn)
        value = self._probe.read().mean
        self.curve.append((self.steps, value))
        return value

    def close(self) -> None:
        """End the run: close the journal, remove the hooks."""
        self._open.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()


def check_faults(faults: Sequence[str], steps: int) -> FaultInjector:
    """Parse faults, and refuse those that would never happen.

    Raises
    ------
    ConfigurationError
        A fault does not follow the notation, or is due after the last step.
    """
    injector = FaultInjector.parse(faults)
    for entry, text in zip(injector.schedule, faults, strict=True):
        if entry.at > steps:
            raise ConfigurationError(f"{text!r} is due at step {entry.at:,}, but the run ends after {steps:,} steps.")
    return injector


def read_settings(value: str, **changes: Any) -> Settings:
    """Settings from a preset's name or a TOML file, with ``changes`` on top and the preset's own recovery ladder."""
    from kalmanguard.actuators.actions import Recovery
    from kalmanguard.settings import PRESETS

    settings = Settings.of(value)
    if value in PRESETS and settings.recovery is None:
        changes.setdefault("recovery", Recovery.preset(value))
    return settings.model_copy(update=changes)
