"""One short training under watch: what a test's training function is given."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kalmanguard.errors import ConfigurationError
from kalmanguard.faults import FaultInjector
from kalmanguard.records import Action, Decision, FloatArray
from kalmanguard.sensors.probe import Probe
from kalmanguard.settings import Settings
from kalmanguard.supervisor import Supervisor

_PROBES, _SNAPSHOTS = 40, 8  # in a run


class Trial:
    """One run of a training function: how long, with which seed, and who watches.

    Attributes
    ----------
    seed
        Seed of the run; Python's, NumPy's and torch's streams start from it already.
    steps
        Optimizer steps that the run is to take.
    """

    def __init__(
        self, *, seed: int, steps: int, faults: Sequence[str] = (), mode: Literal["observe", "protect"]
    ) -> None:
        self.seed, self.steps = seed, steps
        self._injector = FaultInjector.parse(faults, seed=seed)
        self._mode = mode
        self._open = ExitStack()
        self._supervisor: Supervisor | None = None
        self._probe: Probe | None = None
        self._handed_out = 0
        self.decisions: list[Decision] = []
        self.gradient_norms: list[float] = []
        self.first: FloatArray | None = None

    def supervise(
        self,
        model: nn.Module,
        held_out: Iterable[Any],
        *,
        optimizer: Optimizer,
        scheduler: Any = None,
        scaler: Any = None,
        loader: Any = None,
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
    ) -> Supervisor:
        """Put the run under a supervisor; the arguments are those of `Supervisor`.

        Call it once, before the first step, and the supervisor's ``update(loss)`` after each.

        Raises
        ------
        ConfigurationError
            It was called already, or the supervisor refuses an argument.
        """
        if self._supervisor is not None:
            raise ConfigurationError("trial.supervise was called twice; a trial is one training of one model.")
        batches = list(held_out)
        self._probe = Probe(model, batches, loss_fn=loss_fn)
        self.first = self._probe.read().losses
        self._open.enter_context(self._injector.attach(model, optimizer))
        handle = optimizer.register_step_pre_hook(self._watch)
        self._open.callback(handle.remove)
        self._supervisor = Supervisor(
            model, batches, optimizer=optimizer, scheduler=scheduler, scaler=scaler, loader=loader, loss_fn=loss_fn,
            settings=self._settings(),
        )  # fmt: skip
        self._open.enter_context(self._supervisor)
        return self._supervisor

    def batches(self, loader: Iterable[Any]) -> Iterator[Any]:
        """As many batches as the run has steps, from the loader over and over, with the faults that are due.

        Raises
        ------
        ConfigurationError
            The loader is empty, or `supervise` was not called before.
        """
        if self._supervisor is None:
            raise ConfigurationError(
                "Call trial.supervise(model, held_out, optimizer=...) before trial.batches(loader)."
            )
        while self._handed_out < self.steps:
            before = self._handed_out
            for batch in loader:
                self._handed_out += 1
                yield self._injector.draw(batch)
                if self._handed_out >= self.steps:
                    return
            if self._handed_out == before:
                raise ConfigurationError("The loader yields no batch.")

    # --- what the assertion asks ---

    @property
    def supervised(self) -> bool:
        """Whether the training function called `supervise`."""
        return self._supervisor is not None

    @property
    def faults_done(self) -> int:
        """How often a fault acted."""
        return sum("missed" not in record.details for record in self._injector.log)

    @property
    def halted(self) -> bool:
        """Whether supervision gave the run up."""
        return any(decision.action is Action.HALT for decision in self.decisions)

    def last(self) -> FloatArray:
        """Held-out losses of the present state, one for each example."""
        assert self._probe is not None
        return self._probe.read().losses

    def digest(self) -> str:
        """SHA-256 over parameters and buffers."""
        assert self._supervisor is not None
        digest = hashlib.sha256()
        for name, tensor in self._supervisor.model.state_dict().items():
            digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._open.close()

    def _settings(self) -> Settings:
        # Fixed cadences: measured ones depend on how busy the machine is, and a test must not.
        return Settings(
            mode=self._mode,
            on_halt="return",
            on_decision=self.decisions.append,
            probe_every=max(1, self.steps // _PROBES),
            snapshot_every=max(1, self.steps // _SNAPSHOTS),
            warmup_steps=max(5, min(30, self.steps // 5)),
        )

    def _watch(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        del args, kwargs
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.gradient_norms.append(float(nn.utils.get_total_norm(gradients)))
