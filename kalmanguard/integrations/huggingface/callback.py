"""The supervisor as a callback of a Trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from kalmanguard.errors import ConfigurationError, Intervention, KalmanguardError
from kalmanguard.integrations.huggingface.architecture import architecture
from kalmanguard.integrations.huggingface.probing import probe_batches
from kalmanguard.integrations.huggingface.saved import load_state, save_state
from kalmanguard.integrations.huggingface.tap import TrainerTap, calling_trainer, replaced_methods, torch_optimizer
from kalmanguard.integrations.session import Session, Supervised, settings_for_trainers
from kalmanguard.integrations.tracking import Log
from kalmanguard.records import Action
from kalmanguard.settings import Settings

#: Of the run folder in a Trainer's output folder; what begins so is not pushed to the hub.
_FOLDER = "_kalmanguard"


class KalmanGuardCallback(Supervised, TrainerCallback):
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
    logs
        Trackers that decisions are written to: `TensorBoardLog`, `TrackerLog`.

    Raises
    ------
    ConfigurationError
        At construction: unknown settings, ``keep`` below 1. At the beginning of training: no held-out examples, a
        loss that cannot be inferred, an optimizer that is not torch's, ``settings.replay`` (a loader of the Trainer's
        cannot be rewound in mid-epoch).
    JournalError, SnapshotError
        At the beginning of training: the run folder cannot be written, or memory cannot hold two snapshots.

    Notes
    -----
    In several processes (DistributedDataParallel) every rank has its callback, all decide alike and roll back together
    (`kalmanguard.distributed`); rank 0 keeps the journal.

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
        logs: Sequence[Log] = (),
    ) -> None:
        self._probe_dataset, self._run_dir = probe_dataset, run_dir
        self._session = Session(settings_for_trainers(settings, "a Trainer"), loss_fn=loss_fn, keep=keep, logs=logs)
        self._tap: TrainerTap | None = None
        self._deaf = False

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
        if model is None:
            raise ConfigurationError("The Trainer has passed no model to its callbacks; there is nothing to supervise.")
        self._abandon(None)
        base = Path(self._run_dir) if self._run_dir is not None else Path(str(args.output_dir)) / _FOLDER
        facts = {
            **architecture(model),
            "planned_steps": state.max_steps,
            "batch": args.train_batch_size,
            "accumulation": args.gradient_accumulation_steps,
        }
        if replaced := replaced_methods(trainer):
            facts["replaced_methods"] = replaced
        supervisor = self._session.begin(
            model,
            probe_batches(trainer, self._probe_dataset),
            folder=base,
            facts=facts,
            optimizer=torch_optimizer(optimizer, "the supervisor"),
            scheduler=lr_scheduler,
            scaler=getattr(trainer.accelerator, "scaler", None),
        )
        self._deaf = False
        self._tap = TrainerTap(trainer, clipped_from=supervisor.clipped_from, died=self._abandon)
        if checkpoint is not None:
            self._session.resume(lambda: load_state(Path(checkpoint)))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Judge the step, and undo what is confirmed to be wrong."""
        if self._tap is None:
            return control
        loss, batch = self._tap.take()
        if loss is None and not self._deaf:
            self._deaf = True
            text = (
                f"no training_step of this Trainer was heard in step {state.global_step}: something has put another "
                "one in its place since training began. Supervision goes on without the training loss"
            )
            self._session.warn(text, ConfigurationError(f"{text}."))
        try:
            decision = self._session.judge(loss, batch=batch)
        except Intervention:
            self._untap()
            raise
        if decision is not None and decision.action is Action.HALT:
            control.should_training_stop = True
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the supervisor's state into the checkpoint that was just written; that of all ranks is the same."""
        held = self._session.state() if state.is_world_process_zero else None
        if held is None:
            return
        try:
            save_state(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}", held)
        except KalmanguardError as error:
            self._session.warn(f"the checkpoint goes without the supervisor's state: {error}", error)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Issue the certificate and close the run."""
        self._session.end()
        self._untap()

    def _untap(self) -> None:
        if self._tap is not None:
            self._tap.close()
            self._tap = None

    def _abandon(self, error: BaseException | None) -> None:
        """The run before has ended without `on_train_end`, with ``error`` if it is known: its journal says so."""
        self._untap()
        self._session.abandon(error)
