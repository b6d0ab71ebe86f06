"""The supervisor in a training loop of Accelerate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from kalmanguard.errors import ConfigurationError
from kalmanguard.integrations.session import Session, Supervised, settings_for_trainers
from kalmanguard.integrations.tracking import Log
from kalmanguard.integrations.wrapping import tell_norms
from kalmanguard.records import Decision
from kalmanguard.settings import Settings

if TYPE_CHECKING:
    from accelerate import Accelerator


_FOLDER = "kalmanguard"


class AccelerateGuard(Supervised):
    """Supervise a loop that trains with an ``Accelerator``: one object, and one call for each micro-batch.

    Parameters
    ----------
    accelerator
        The one that has prepared model and optimizer.
    model, optimizer, scheduler
        What ``accelerator.prepare`` has returned; one optimizer or several, and a scheduler where there is one.
    probe_loader
        Iterable of held-out batches, as of `Supervisor`.
    loss_fn, settings
        As of `Supervisor`; unless the settings say otherwise a halt is no exception but a decision.
    run_dir
        Folder for the journal and durable checkpoints; every run gets one of its own: where there is one already,
        ``-2``, ``-3`` and so on is appended.
    keep
        Number of latest decisions that `decisions` holds besides all that were not nominal.
    logs
        Trackers that decisions are written to: `TensorBoardLog`, `TrackerLog`.

    Raises
    ------
    ConfigurationError
        As of `Supervisor`; ``settings.replay``.

    Notes
    -----
    Losses of micro-batches are averaged, gradient norms are those from before ``accelerator.clip_grad_norm_``, a step
    that the scaler skips is none, and ``accelerator.save_state`` keeps the supervisor's state, which ``load_state``
    gives back. In several processes every rank makes its guard, and all decide alike (`kalmanguard.distributed`).

    Examples
    --------
    >>> import tempfile, torch
    >>> from accelerate import Accelerator
    >>> accelerator = Accelerator(cpu=True)
    >>> model = torch.nn.Linear(4, 2)
    >>> model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    >>> held_out = [(torch.randn(32, 4), torch.randint(0, 2, (32,)))]
    >>> with AccelerateGuard(accelerator, model, held_out, optimizer=optimizer, run_dir=tempfile.mkdtemp()) as guard:
    ...     for _ in range(3):
    ...         loss = torch.nn.functional.cross_entropy(model(torch.randn(8, 4)), torch.randint(0, 2, (8,)))
    ...         accelerator.backward(loss)
    ...         _ = accelerator.clip_grad_norm_(model.parameters(), 1.0)
    ...         optimizer.step()
    ...         optimizer.zero_grad()
    ...         decision = guard.update(loss)
    >>> decision.step, decision.action.value
    (3, 'ACCEPT')
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        probe_loader: Iterable[Any],
        *,
        optimizer: Any,
        scheduler: Any = None,
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        settings: Settings | str | Path | dict[str, Any] = "balanced",
        run_dir: str | Path = _FOLDER,
        keep: int = 1000,
        logs: Sequence[Log] = (),
    ) -> None:
        self._session = Session(settings_for_trainers(settings, "Accelerate"), loss_fn=loss_fn, keep=keep, logs=logs)
        self._losses: list[Tensor] = []
        self._accelerator = accelerator
        optimizers = [_inner(o) for o in (optimizer if isinstance(optimizer, list | tuple) else [optimizer])]
        supervisor = self._session.begin(
            accelerator.unwrap_model(model),
            probe_loader,
            folder=Path(run_dir),
            facts={"accumulation": accelerator.gradient_accumulation_steps, "precision": accelerator.mixed_precision},
            optimizer=optimizers,
            scheduler=None if scheduler is None else getattr(scheduler, "scheduler", scheduler),
            scaler=accelerator.scaler,
        )
        self._unwrap = tell_norms(accelerator, supervisor.clipped_from)
        accelerator.register_for_checkpointing(self)

    def update(self, loss: Tensor | float | None = None, *, batch: Any = None) -> Decision:
        """Supervise; call after ``optimizer.step()`` of every micro-batch, whether it has stepped or not.

        Parameters
        ----------
        loss
            Of the micro-batch, as it was given to ``accelerator.backward``.
        batch
            As of `Supervisor.update`; of the last micro-batch.

        Raises
        ------
        ConfigurationError
            The guard is closed.
        """
        if self.supervisor is None or not self._session.is_open:
            raise ConfigurationError("The guard is closed; make a new one to supervise further steps.")
        if loss is not None:
            self._losses.append(loss.detach().float() if isinstance(loss, Tensor) else torch.tensor(float(loss)))
        before = self.supervisor.step
        mean = sum(self._losses[1:], self._losses[0]) / len(self._losses) if self._losses else None
        decision = self._session.judge(mean, batch=batch)
        if self.supervisor.step > before or self._accelerator.sync_gradients:  # the scaler may have skipped the step
            self._losses.clear()
        assert decision is not None
        return decision

    def state_dict(self) -> dict[str, Any]:
        """For ``accelerator.save_state``: one JSON text."""
        text = self._session.text()
        return {} if text is None else {"supervisor": text}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """For ``accelerator.load_state``; what does not fit is warned about, and supervision begins anew."""
        if "supervisor" in state_dict:
            self._session.resume_text(state_dict["supervisor"])
        self._losses.clear()

    def close(self) -> None:
        """Issue the certificate, close the run, and unwrap the accelerator's method."""
        self._session.end()
        self._unwrap()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is not None:
            self._session.abandon(error)
        self.close()


def _inner(optimizer: Any) -> Any:
    """The torch optimizer beneath accelerate's."""
    return optimizer.optimizer if type(optimizer).__name__ == "AcceleratedOptimizer" else optimizer
