"""The fault injector: damages an ordinary training loop at chosen steps, in repeatable ways."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from types import TracebackType
from typing import Self, TypeVar, final

from torch import nn
from torch.optim import Optimizer

from kalmanguard.errors import ConfigurationError
from kalmanguard.faults.attachment import Appointment, Attachment
from kalmanguard.faults.batch import FaultyBatches
from kalmanguard.faults.catalogue import parse_fault
from kalmanguard.faults.fault import DataFault, Fault, FaultRecord, is_count
from kalmanguard.faults.fluent import Fluent

T = TypeVar("T")


@final
class FaultInjector(Fluent):
    """Seeded faults on a schedule, for any PyTorch loop.

    Step ``t`` is the ``t``-th step of the optimizer, from 1. What happens in it happens here:

    =================  =============================================================================================
    state faults       between step ``t - 1`` and the forward pass of ``t``: when its batch is drawn from `batches`,
                       else at the model's first training-mode forward pass with gradients enabled
    data faults        in the batches drawn from `batches` for step ``t``; all of them when gradients are accumulated
    gradient faults    while ``backward()`` accumulates, so that clipping, gradient scalers and hooks see them
    learning rates     from before the first hook of ``optimizer.step()`` until after its last, so that schedulers
                       and logs outside compose with them and nothing is left behind
    =================  =============================================================================================

    A step whose gradients were vetoed by a hook still counts; one that a gradient scaler skipped does not, and is
    tried again without the gradient fault. Restoring an earlier training state does not rewind the injector.

    Parameters
    ----------
    seed
        Key of all random draws; torch's global generator is never touched.

    Raises
    ------
    ConfigurationError
        A negative seed.

    Notes
    -----
    While attached, the injector is held by hooks on the model and by torch's global optimizer hooks; `detach`, or
    leaving the ``with`` block, removes all of them. Draw batches no earlier than the step that uses them: a prefetcher
    belongs inside `batches`, not around it. With ``torch.compile`` use `batches`, since compiled models may skip
    forward hooks. For several optimizers use several injectors.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> injector = FaultInjector(seed=0).at(2).lr_spike(50, steps=2).at(3).nan_gradient()
    >>> with injector.attach(model, optimizer):
    ...     for inputs in injector.batches(torch.ones(4, 1, 2)):
    ...         model(inputs).sum().backward()
    ...         optimizer.step()
    ...         optimizer.zero_grad()
    >>> [(record.step, record.kind) for record in injector.log]
    [(2, 'lr_spike'), (3, 'lr_spike'), (3, 'nan_gradient')]
    """

    def __init__(self, *, seed: int = 0) -> None:
        if seed < 0:
            raise ConfigurationError(f"seed = {seed} is negative; use 0 or a positive number.")
        self.seed = seed
        self._at: int | None = None
        self._schedule: list[Appointment] = []
        self._log: list[FaultRecord] = []
        self._attachment: Attachment | None = None

    @classmethod
    def parse(cls, faults: Iterable[str], *, seed: int = 0) -> FaultInjector:
        """Make an injector from the notation of the command line, ``KIND[:VALUE]@STEP[:NAME=VALUE]...``.

        Parameters
        ----------
        faults
            Such as ``["lr_spike:50@500:steps=5", "nan_gradient@700"]``; see `parse_fault` for the grammar.
        seed
            Key of all random draws.

        Raises
        ------
        ConfigurationError
            A text does not follow the notation.
        """
        injector = cls(seed=seed)
        for text in faults:
            step, fault = parse_fault(text)
            injector.at(step).add(fault)
        return injector

    def at(self, step: int) -> Self:
        """Name the step, from 1, at which the faults that follow begin."""
        if not is_count(step):
            raise ConfigurationError(f"at({step}): steps are whole numbers from 1.")
        self._at = step
        return self

    def add(self, fault: Fault) -> Self:
        """Schedule a fault, which may be of the user's own kind.

        Raises
        ------
        ConfigurationError
            No step was named before, or a run is going on.
        """
        if self._at is None:
            raise ConfigurationError(f"{fault.kind}: say when, as in FaultInjector().at(500).{fault.kind}(...).")
        if self._attachment is not None:
            raise ConfigurationError("The injector is attached to a run; schedule faults before attaching it.")
        self._schedule.append(Appointment(len(self._schedule), self._at, fault))
        return self

    def attach(self, model: nn.Module, optimizer: Optimizer, *, first_step: int = 1) -> Self:
        """Start a run: check every fault against it, start a new log, and install the hooks.

        Parameters
        ----------
        model, optimizer
            What to damage. Faults already past (``first_step`` of a resumed run) are left out.
        first_step
            Number of the optimizer's next step.

        Raises
        ------
        ConfigurationError
            The injector is attached already, or a fault cannot act on this model and optimizer.
        """
        if self._attachment is not None:
            raise ConfigurationError("The injector is attached already; call detach() first.")
        if first_step < 1:
            raise ConfigurationError(f"first_step = {first_step}: steps count from 1.")
        for entry in self._schedule:
            entry.fault.check(model, optimizer, fresh=entry.at == first_step)
        self._log = []
        self._attachment = Attachment(
            tuple(self._schedule),
            model,
            optimizer,
            seed=self.seed,
            first_step=first_step,
            record=self._log.append,
        )
        return self

    def detach(self) -> None:
        """End the run: remove every hook; the log stays. Without a run, do nothing."""
        if self._attachment is not None:
            self._attachment.close()
            self._attachment = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.detach()

    def batches(self, loader: Iterable[T], *, targets: str | int | None = None) -> FaultyBatches[T]:
        """Wrap the training loader: the same batches, but for the faults that are due.

        Parameters
        ----------
        loader
            Any iterable of tensors, tuples, lists or mappings of tensors.
        targets
            Key or index of the targets in a batch; by default the last of several, or ``labels``, ``label``,
            ``targets``, ``target`` or ``y``.
        """
        return FaultyBatches(loader, partial(self.draw, targets=targets))

    def draw(self, batch: T, *, targets: str | int | None = None) -> T:
        """Pass one batch through the faults of the step that uses it; `batches` does this for a whole loader.

        Raises
        ------
        ConfigurationError
            The injector is not attached, or the batch is of a form that a due fault cannot read.
        """
        if self._attachment is None:
            raise ConfigurationError("Attach the injector to a model and optimizer before drawing batches through it.")
        drawn: T = self._attachment.draw(batch, targets)
        return drawn

    @property
    def schedule(self) -> tuple[Appointment, ...]:
        """What is to happen, in the order of scheduling."""
        return tuple(self._schedule)

    @property
    def log(self) -> tuple[FaultRecord, ...]:
        """What was done in the present or last run."""
        return tuple(self._log)

    @property
    def needs_batches(self) -> bool:
        """Whether a fault in the data is scheduled, so that the loop must draw from `batches`."""
        return any(isinstance(entry.fault, DataFault) for entry in self._schedule)

    def describe(self) -> str:
        """One line per scheduled fault, in the order of steps."""
        entries = sorted(self._schedule, key=lambda entry: entry.at)
        return "\n".join(f"step {entry.at}: {entry.fault.describe()}" for entry in entries) or "no faults"
