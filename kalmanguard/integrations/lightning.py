"""The supervisor as a callback of a Lightning Trainer; needs ``lightning`` or ``pytorch_lightning``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset

from kalmanguard.errors import ConfigurationError, Intervention, KalmanguardError
from kalmanguard.integrations.session import Session, Supervised, settings_for_trainers
from kalmanguard.integrations.tracking import Log
from kalmanguard.records import Action
from kalmanguard.settings import Settings

try:
    from lightning.pytorch.callbacks import Callback
except ImportError:  # the older of its two packages, which has classes of its own
    from pytorch_lightning.callbacks import Callback  # type: ignore[assignment]

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


#: Examples of a probe's batch where a loader makes batches of its own kind.
_BATCH = 32
#: Of the run folder in a Trainer's root folder.
_FOLDER = "kalmanguard"


class KalmanGuardLightning(Supervised, Callback):
    """Supervise a Lightning Trainer's run: decisions, exact rollback, journal, certificate.

    ``Trainer(callbacks=[KalmanGuardLightning(loss_fn=...)])`` is all there is to do. Every batch that ends with a step
    of an optimizer is judged in ``on_train_batch_end``, by the loss that ``training_step`` returned (the sum over its
    micro-batches, as Lightning scales them), the gradient norm from before clipping, the update, and the held-out
    losses; what is confirmed to be wrong is undone there, before checkpoints are written. The Trainer's step counter
    goes on.

    Parameters
    ----------
    probe_loader
        Iterable of held-out batches; by default the Trainer's validation loader (the first of several). They pass
        through the module's own batch transfer hooks.
    loss_fn
        ``loss_fn(output, target)`` for the probe, where ``output`` is what the module's ``forward`` returns; inferred
        as by `Supervisor` when ``None``.
    settings
        A `Settings`, a preset's name, a TOML path or a dict. Unless they say otherwise a halt is no exception: the
        best certified state is restored and training stops.
    run_dir
        Folder for the journal and durable checkpoints, ``kalmanguard`` in ``trainer.default_root_dir`` by default.
        Every ``fit`` writes a run of its own: where there is one already, ``-2``, ``-3`` and so on is appended.
    keep
        Number of latest decisions that `decisions` holds besides all that were not nominal.
    logs
        Trackers that decisions are written to: `TensorBoardLog`, `TrackerLog`.

    Raises
    ------
    ConfigurationError
        At construction: unknown settings, ``keep`` below 1, ``settings.replay``. At the beginning of training: no
        held-out examples, a loss that cannot be inferred, an optimizer that is not torch's.
    JournalError, SnapshotError
        At the beginning of training: the run folder cannot be written, or memory cannot hold two snapshots.

    Notes
    -----
    Automatic and manual optimization, one or several optimizers, gradient accumulation and mixed precision; the probe
    itself is evaluated without autocast. Lightning computes gradients inside ``optimizer.step``, where torch's own
    hooks are too early: they are judged in ``on_before_optimizer_step``. In several processes (the strategy ``ddp``)
    every rank has its callback, all decide alike and roll back together (`kalmanguard.distributed`); rank 0 keeps the
    journal. In observe mode the run is the bare run bit for bit: EXACT, random streams included. Checkpoints of
    Lightning carry the supervisor's state; a run that resumes from one goes on with the same decisions, but there is
    nothing to roll back to until the next snapshot is due, the drift test's wealth begins anew, a suspicion that was
    being watched is dropped, and cadences which the settings do not fix are measured anew.

    Examples
    --------
    >>> guard = KalmanGuardLightning(settings="conservative")
    >>> guard.decisions, guard.supervisor
    ((), None)
    """

    def __init__(
        self,
        *,
        probe_loader: Iterable[Any] | None = None,
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        settings: Settings | str | Path | dict[str, Any] = "balanced",
        run_dir: str | Path | None = None,
        keep: int = 1000,
        logs: Sequence[Log] = (),
    ) -> None:
        self._probe_loader, self._run_dir = probe_loader, run_dir
        self._session = Session(settings_for_trainers(settings, "Lightning"), loss_fn=loss_fn, keep=keep, logs=logs)
        self._saved: object = None
        self._forget()

    def _forget(self) -> None:
        """Begin to gather the losses of another step."""
        self._loss: Tensor | None = None
        self._batches = 0
        self._reached_step = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make a supervisor for this run, with the state of its checkpoint when it resumes."""
        optimizers = list(trainer.optimizers)
        odd = next((o for o in optimizers if not isinstance(o, Optimizer)), None)
        if odd is not None:
            raise ConfigurationError(
                f"The optimizer is a {type(odd).__name__}, not one of torch's; the supervisor cannot attach itself."
            )
        base = Path(self._run_dir) if self._run_dir is not None else Path(trainer.default_root_dir) / _FOLDER
        facts = {
            "module": type(pl_module).__name__,
            "parameters": sum(p.numel() for p in pl_module.parameters()),
            "planned_steps": _planned(trainer),
            "accumulation": trainer.accumulate_grad_batches,
            "precision": str(trainer.precision),
        }
        self._forget()
        self._session.begin(
            pl_module,
            _probe_batches(trainer, self._probe_loader),
            folder=base,
            facts=facts,
            optimizer=optimizers,
            scheduler=[config.scheduler for config in trainer.lr_scheduler_configs],
            scaler=getattr(trainer.precision_plugin, "scaler", None),
        )
        saved, self._saved = self._saved, None
        if saved is not None:
            self._session.resume_text(saved)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Judge gradients where they are ready: inside the step, before they are clipped."""
        if self._session.is_open and self.supervisor is not None:
            self._reached_step = True
            self.supervisor.gradients_ready(optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Judge the step, if this batch ended with one, and undo what is confirmed to be wrong."""
        supervisor = self.supervisor
        if supervisor is None or not self._session.is_open:
            return
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor) and loss.numel() == 1:
            part = loss.detach().float().reshape(())
            self._loss = part if self._loss is None else self._loss + part
        self._batches += 1
        before = supervisor.step
        try:
            decision = self._session.judge(self._loss, batch=batch if self._batches == 1 else None)
        except Intervention:
            self._forget()
            raise
        if supervisor.step > before or self._reached_step:  # a step that a scaler has skipped is over too
            self._forget()
        if decision is not None and decision.action is Action.HALT:
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Issue the certificate and close the run."""
        self._session.end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Say in the journal what has ended the run."""
        self._session.abandon(exception)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of everything, whatever has ended the run."""
        self._session.abandon(None)

    def state_dict(self) -> dict[str, Any]:
        """The supervisor's state, which Lightning puts into its checkpoints: one JSON text."""
        text = self._session.text()
        return {} if text is None else {"supervisor": text}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state of a checkpoint until training begins."""
        self._saved = state_dict.get("supervisor")


def _planned(trainer: Trainer) -> int | None:
    steps = trainer.estimated_stepping_batches
    return int(steps) if steps != float("inf") else None


def _probe_batches(trainer: Trainer, loader: Iterable[Any] | None) -> Iterator[Any]:
    """Held-out batches, read through a loader of our own where that can be made: a Trainer's may hold a state."""
    if loader is None:
        source = trainer.fit_loop.epoch_loop.val_loop._data_source
        with torch.random.fork_rng():
            found = source.dataloader() if source.is_defined() else None
        while isinstance(found, list | tuple | dict):
            found = next(iter(found.values() if isinstance(found, dict) else found), None)
        if found is None:
            raise ConfigurationError(
                "There are no held-out examples to probe: pass KalmanGuardLightning(probe_loader=...), or give the "
                "Trainer a validation loader."
            )
        loader = found
    if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
        loader = DataLoader(loader.dataset, batch_size=loader.batch_size or _BATCH, collate_fn=loader.collate_fn)
    return _moved(trainer, loader)


def _moved(trainer: Trainer, loader: Iterable[Any]) -> Iterator[Any]:
    try:
        for batch in loader:
            ready = trainer.precision_plugin.convert_input(batch)
            yield trainer.strategy.batch_to_device(ready, dataloader_idx=0)
    except KalmanguardError:
        raise
    except Exception as error:
        raise ConfigurationError(
            f"The probe's examples cannot be read ({type(error).__name__}: {error}); pass a probe_loader of batches "
            "that the module can be called on."
        ) from error
