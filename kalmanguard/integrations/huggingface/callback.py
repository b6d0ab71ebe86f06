"""The supervisor as a callback of a Trainer."""

from __future__ import annotations

import itertools
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from kalmanguard.errors import ConfigurationError, Intervention, KalmanguardError
from kalmanguard.integrations.decisions import DecisionLog
from kalmanguard.integrations.huggingface.architecture import architecture
from kalmanguard.integrations.huggingface.probing import probe_batches
from kalmanguard.integrations.huggingface.saved import load_state, save_state
from kalmanguard.integrations.huggingface.tap import TrainerTap, calling_trainer, torch_optimizer
from kalmanguard.journal.schema import locate
from kalmanguard.records import Action, Decision, Mode
from kalmanguard.settings import Settings
from kalmanguard.supervisor import Supervisor

if TYPE_CHECKING:
    from kalmanguard.certificate.verify import Report

_LOGGER = logging.getLogger(__name__)
#: Of the run folder in a Trainer's output folder; what begins so is not pushed to the hub.
_FOLDER = "_kalmanguard"


class KalmanGuardCallback(TrainerCallback):
    """Supervise a Trainer's run: decisions, exact rollback, journal, certificate.

    ``Trainer(..., eval_dataset=held_out, callbacks=[KalmanGuardCallback()])`` is all there is to do. Every optimizer
    step is judged by its loss (the sum over its micro-batches, as the Trainer scales them), its gradient norm from
    before clipping, its update, and the held-out losses; what is confirmed to be wrong is undone in ``on_step_end``,
    before the Trainer logs, evaluates or saves. The Trainer's step counter and schedule go on.

    Parameters
    ----------
    probe_dataset
        Held-out examples, as a Trainer's ``eval_dataset``, or a ``DataLoader``; by default the ``eval_dataset`` (the
        first of several). The first ``settings.probe_examples`` are probed, the next ``settings.fresh_examples`` kept
        for the certificate.
    settings
        A `Settings`, a preset's name, a TOML path or a dict. Unless they say otherwise a halt is no exception: the
        best certified state is restored and training stops as if it were at its end.
    run_dir
        Folder for the journal and durable checkpoints, ``_kalmanguard`` in ``args.output_dir`` by default. Every
        ``train()`` writes a run of its own: where there is one already, ``-2``, ``-3`` and so on is appended.
    loss_fn
        ``loss_fn(output, target)`` for the probe; by default the model's own ``.loss``, per sequence. Where only a
        mean can be had, examples are evaluated one by one.
    keep
        Number of latest decisions that `decisions` holds besides all that were not nominal.

    Attributes
    ----------
    supervisor
        The `Supervisor` of the present or last run; ``None`` before training.
    certificate
        Issued at the end of training; ``None`` before, or when it could not be.

    Raises
    ------
    ConfigurationError
        At construction: unknown settings, ``keep`` below 1. At the beginning of training: no held-out examples, a
        loss that cannot be inferred, several processes, an optimizer that is not torch's, ``settings.replay`` (a
        Trainer's loader cannot be rewound in mid-epoch).
    JournalError, SnapshotError
        At the beginning of training: the run folder cannot be written, or memory cannot hold two snapshots.

    Notes
    -----
    In observe mode the run is the bare run bit for bit: EXACT, random streams and logs included. A run that resumes
    from a Trainer's checkpoint takes the supervisor's state from it (``kalmanguard.json``) and goes on with the same
    decisions, with four exceptions: there is nothing to roll back to until the next snapshot is due, the drift test's
    wealth begins anew, a suspicion that was being watched is dropped, and cadences which the settings do not fix are
    measured anew. A checkpoint without that state, or with one of another probe set, is warned about, and supervision
    begins anew.

    Examples
    --------
    >>> callback = KalmanGuardCallback(settings="conservative")
    >>> callback.decisions, callback.supervisor
    ((), None)
    """

    def __init__(
        self,
        *,
        probe_dataset: Any = None,
        settings: Settings | str | Path | dict[str, Any] = "balanced",
        run_dir: str | Path | None = None,
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        keep: int = 1000,
    ) -> None:
        chosen = Settings.of(settings)
        if chosen.replay:
            raise ConfigurationError(
                "settings.replay = True: a Trainer's data loader cannot be rewound in mid-epoch; leave replay off."
            )
        if "on_halt" not in chosen.model_fields_set:
            chosen = chosen.model_copy(update={"on_halt": "return"})
        self._settings = chosen
        self._probe_dataset, self._run_dir, self._loss_fn, self._keep = probe_dataset, run_dir, loss_fn, keep
        self._log = DecisionLog(keep=keep)
        self._tap: TrainerTap | None = None
        self.supervisor: Supervisor | None = None
        self.certificate: Report | None = None

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """What was decided in the present or last run: all that was not nominal, and the latest decisions."""
        return self._log.all()

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        **kwargs: Any,
    ) -> None:
        """Make a supervisor for this run, with the state of its checkpoint when it resumes."""
        trainer, checkpoint = calling_trainer(self)
        if args.world_size > 1:
            raise ConfigurationError(
                f"The Trainer runs in {args.world_size} processes; this callback supervises one, since processes that "
                "decide each for itself would restore different states."
            )
        if model is None:
            raise ConfigurationError("The Trainer has passed no model to its callbacks; there is nothing to supervise.")
        self._abandon(None)
        self._log, self.certificate = DecisionLog(keep=self._keep), None
        base = Path(self._run_dir) if self._run_dir is not None else Path(str(args.output_dir)) / _FOLDER
        self.supervisor = supervisor = self._supervise(
            model,
            probe_batches(trainer, self._probe_dataset),
            optimizer=torch_optimizer(optimizer, "the supervisor"),
            scheduler=lr_scheduler,
            scaler=getattr(trainer.accelerator, "scaler", None),
            run_dir=_unused(base),
        )
        self._tap = TrainerTap(trainer, clipped_from=supervisor.clipped_from, died=self._abandon)
        facts = {
            **architecture(model),
            "planned_steps": state.max_steps,
            "batch": args.train_batch_size,
            "accumulation": args.gradient_accumulation_steps,
        }
        supervisor.note("training", facts)
        if checkpoint is not None:
            self._resume(supervisor, Path(checkpoint))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Judge the step, and undo what is confirmed to be wrong."""
        if self.supervisor is None or self._tap is None:
            return control
        loss, batch = self._tap.take()
        try:
            decision = self.supervisor.update(loss, batch=batch)
        except Intervention as intervention:
            if isinstance(intervention.decision, Decision):
                self._log.add(intervention.decision)
            self._close()
            raise
        self._log.add(decision)
        if decision.action is not Action.ACCEPT:
            _LOGGER.warning("kalmanguard: %s (%s)", decision.reason.rstrip("."), decision.action.value)
        if decision.action is Action.HALT:
            restored = "no earlier state" if decision.restored_step is None else f"step {decision.restored_step}"
            _LOGGER.warning("kalmanguard: training stops here; the model is that of %s.", restored)
            control.should_training_stop = True
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the supervisor's state into the checkpoint that was just written."""
        if self.supervisor is None or self._tap is None:
            return
        try:
            save_state(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}", self.supervisor.state_dict())
        except KalmanguardError as error:
            self._warn(f"the checkpoint goes without the supervisor's state: {error}", error)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Issue the certificate and close the run."""
        if self.supervisor is None or self._tap is None:
            return
        try:
            self.certificate = self.supervisor.certificate()
        except Exception as error:
            self._warn(f"no certificate was issued: {type(error).__name__}: {error}", error)
        self._close()

    def _supervise(self, model: nn.Module, batches: Any, **options: Any) -> Supervisor:
        try:
            return Supervisor(model, batches, loss_fn=self._loss_fn, settings=self._settings, **options)
        except KalmanguardError:
            raise
        except Exception as error:
            raise ConfigurationError(
                f"The model cannot be evaluated on the probe's examples ({type(error).__name__}: {error}); pass a "
                "probe_dataset that it can, or loss_fn=..."
            ) from error

    def _resume(self, supervisor: Supervisor, checkpoint: Path) -> None:
        try:
            supervisor.load_state_dict(load_state(checkpoint))
        except KalmanguardError as error:
            self._warn(f"{str(error).rstrip('.')}; supervision begins anew", error)
            return
        if supervisor.statistics()["mode"] == Mode.HALTED.value:
            # Whoever resumes a halted run wants it to go on.
            supervisor.reset()

    def _warn(self, text: str, error: Exception) -> None:
        if self._settings.strict:
            raise error
        warnings.warn(f"kalmanguard: {text.rstrip('.')}.", stacklevel=3)

    def _close(self) -> None:
        if self._tap is not None:
            self._tap.close()
            self._tap = None
        if self.supervisor is not None:
            self.supervisor.close()

    def _abandon(self, error: BaseException | None) -> None:
        """The run before has ended without `on_train_end`, with ``error`` if it is known: its journal says so."""
        if self._tap is None or self.supervisor is None:
            return
        self._tap.close()
        self._tap = None
        error = error or RuntimeError("training has ended without a word")
        self.supervisor.__exit__(type(error), error, error.__traceback__)


def _unused(base: Path) -> Path:
    """The folder, or the first of its numbered siblings, that holds no run yet."""
    names = itertools.chain([base.name], (f"{base.name}-{n}" for n in itertools.count(2)))
    return next(folder for name in names if not locate(folder := base.with_name(name)).exists())
