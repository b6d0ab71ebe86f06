"""The supervisor: what a user makes, calls once per step, and asks."""

from __future__ import annotations

import atexit
import dataclasses
import json
import math
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kalmanguard import statefile
from kalmanguard.betting import bet_on_fresh_examples
from kalmanguard.construction import Begin, Given, Owner, build
from kalmanguard.continuation import continue_run, state_of, take_up
from kalmanguard.errors import (
    ConfigurationError,
    Intervention,
    JournalError,
    KalmanguardError,
    PauseIntervention,
    RankError,
    RollbackIntervention,
    SnapshotError,
    TrainingHalted,
    VetoIntervention,
)
from kalmanguard.journal.header import environment
from kalmanguard.journal.writer import JournalWriter
from kalmanguard.records import Action, Decision, Level, Measurement, Mode, Outcome
from kalmanguard.sensors.attachable import Attachable
from kalmanguard.sensors.shards import is_sharded, locals_of, whole
from kalmanguard.sensors.skipping import SkipWatch
from kalmanguard.settings import Settings

if TYPE_CHECKING:
    from kalmanguard.certificate.verify import Report
    from kalmanguard.detectors.attribution import AttributionResult


class Supervisor:
    """Supervise a training loop: one call per step, after ``optimizer.step()``.

    Parameters
    ----------
    model
        The model that is trained; a ``torch.compile``d one is fine.
    probe_loader
        Iterable of held-out batches, read once at construction: ``(inputs, target)``, dicts, or tensors. They must not
        be training data, and what the supervisor reports about them must not be used to tune the run, or the
        certificate lapses.
    optimizer
        The optimizer, or several; found by itself at its first step when ``None``.
    scheduler, scaler
        Learning-rate scheduler(s) and GradScaler whose state belongs to a snapshot.
    loader
        Training loader; one with ``state_dict`` and ``load_state_dict`` can be rewound (``settings.replay``).
    loss_fn
        ``loss_fn(output, target)`` for the probe; inferred when ``None`` and unambiguous.
    extras
        Further objects by name, as for `register`: a run that has them is resumed with them.
    settings
        A `Settings`, a preset's name ("conservative", "balanced", "aggressive"), a TOML path or a dict.
    run_dir
        Folder for the journal and durable checkpoints; ``None`` keeps the journal in a private temporary file.

    Raises
    ------
    ConfigurationError
        Something that cannot work: an empty probe loader, a loss that cannot be inferred, another model's optimizer.
    RankError
        The ranks of a distributed run were given other settings, held-out examples or parameters.
    JournalError
        ``run_dir`` holds a run already (see `resume`), or cannot be written.
    SnapshotError
        The memory budget cannot hold two snapshots.

    Notes
    -----
    Where torch.distributed is initialised, every rank makes its supervisor of the same replica (as under
    DistributedDataParallel): what they measure is put together, so all decide alike (`kalmanguard.distributed`), and
    rank 0 keeps journal and checkpoints. `update`, `snapshot`, `rollback` and `attach` must then be called on all
    ranks.

    In observe mode a supervised run is bit-identical to the bare run. In protect mode only a confirmed fault changes
    anything. A fault inside the supervisor never stops training: it is recorded, warned about once, and supervision
    degrades (``settings.strict`` raises instead).

    Examples
    --------
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Linear(4, 2)
    >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    >>> held_out = [(torch.randn(32, 4), torch.randint(0, 2, (32,)))]
    >>> with Supervisor(model, held_out) as supervisor:
    ...     for _ in range(3):
    ...         loss = nn.functional.cross_entropy(model(torch.randn(8, 4)), torch.randint(0, 2, (8,)))
    ...         loss.backward()
    ...         optimizer.step()
    ...         optimizer.zero_grad()
    ...         decision = supervisor.update(loss)
    >>> decision.step, decision.action.value, decision.level.value
    (3, 'ACCEPT', 'WARMUP')
    """

    def __init__(
        self,
        model: nn.Module,
        probe_loader: Iterable[Any],
        *,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        scheduler: Any = None,
        scaler: Any = None,
        loader: Any = None,
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        extras: Mapping[str, Any] | None = None,
        settings: Settings | str | Path | dict[str, Any] = "balanced",
        run_dir: str | Path | None = None,
    ) -> None:
        given = Given(model, probe_loader, optimizer, scheduler, scaler, loader, loss_fn, settings, run_dir)
        self._build(given, "start", extras)

    @classmethod
    def resume(
        cls,
        run_dir: str | Path,
        model: nn.Module,
        probe_loader: Iterable[Any],
        *,
        optimizer: Optimizer | Sequence[Optimizer],
        scheduler: Any = None,
        scaler: Any = None,
        loader: Any = None,
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        extras: Mapping[str, Any] | None = None,
        settings: Settings | str | Path | dict[str, Any] = "balanced",
    ) -> Self:
        """Continue a run from the last clean checkpoint of ``run_dir``: model, optimizer, random state, supervision.

        The optimizer must exist, since its state is restored now. `step` goes on counting from where the checkpoint was
        written; what a killed process has done after that is recorded, but lost, and is done again. `resumed_from` is
        the step whose state was restored, which may be an earlier one. In several processes every rank resumes, as many
        as there are now; random streams are restored on rank 0 alone.

        Raises
        ------
        JournalError, SnapshotError
            There is no journal or no complete clean checkpoint, or one was changed.
        """
        self = cls.__new__(cls)
        given = Given(model, probe_loader, optimizer, scheduler, scaler, loader, loss_fn, settings, run_dir)
        self._build(given, "resume", extras)
        return self

    @classmethod
    def resume_or_start(
        cls,
        run_dir: str | Path,
        model: nn.Module,
        probe_loader: Iterable[Any],
        *,
        optimizer: Optimizer | Sequence[Optimizer],
        scheduler: Any = None,
        scaler: Any = None,
        loader: Any = None,
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        extras: Mapping[str, Any] | None = None,
        settings: Settings | str | Path | dict[str, Any] = "balanced",
    ) -> Self:
        """Continue the run in ``run_dir`` as `resume` does, or begin it there: one line for a script that is restarted.

        A run that was killed before its first checkpoint begins anew, and its journal goes on, so `resumed_from` is
        ``None`` then as in a new folder. In several processes rank 0 looks and all do the same; its run folder must lie
        where it finds it again.

        Raises
        ------
        JournalError, SnapshotError
            The journal or the checkpoint was changed or damaged, or a checkpoint that the journal calls durable is
            gone: progress is never given up silently.
        """
        self = cls.__new__(cls)
        given = Given(model, probe_loader, optimizer, scheduler, scaler, loader, loss_fn, settings, run_dir)
        self._build(given, "either", extras)
        return self

    def _build(self, given: Given, begin: Begin, extras: Mapping[str, Any] | None) -> None:
        own = weakref.ref(self)
        self._extras: dict[str, Any] = {}
        for name, obj in (extras or {}).items():
            self._extras[name] = _registrable(name, obj)
        owner = Owner(
            loop=lambda: _alive(own)._loop,
            describe=lambda: _alive(own).state_dict(),
            extras=self._extras,
        )
        built = build(given, begin, owner)
        self._loop, self.settings, self.model, self.run_dir = built.loop, built.settings, built.model, built.run_dir
        self._skips = SkipWatch(given.scaler)
        self._closed = False
        #: Step whose state `resume` has restored; ``None`` for a run that was begun anew.
        self.resumed_from: int | None = None
        self._own_s = self._total_s = 0.0
        self._ended = time.perf_counter()
        self._exit = atexit.register(_at_exit, own)
        if built.resumes:
            try:
                self.resumed_from = continue_run(
                    self._loop, self.run_dir, or_anew=begin == "either", rewinds=built.rewinds
                )
            except BaseException:
                self._abandon()
                raise

    def update(self, loss: Tensor | float | None = None, *, batch: Any = None) -> Decision:
        """Supervise the step that was just taken; call once per step, after ``optimizer.step()``.

        Parameters
        ----------
        loss
            The training loss of the step, if there is one number; it sharpens detection and tells overfitting from
            corruption, but nothing depends on it.
        batch
            The batch of the step, as the loader gave it, so that a spike of the loss can be attributed (`attribute`):
            two forward passes, once per suspicion. It is referred to until the next step, and never changed.

        Returns
        -------
        Decision
            What was decided about this step. Without an optimizer step since the last call (gradient accumulation, a
            step that a GradScaler skipped) the last decision is returned and nothing advances. When the scaler skips
            all steps, however small its scale, the newest certified state is restored.

        Raises
        ------
        BindError
            At the first call, when no optimizer of the model can be found.
        TrainingHalted
            The recovery ladder is exhausted (``on_halt="raise"``, protect mode); the best state is restored.
        """
        started = time.perf_counter()
        loop = self._loop
        if self._closed:
            raise ConfigurationError("The supervisor is closed; make a new one to supervise further steps.")
        if batch is not None:
            loop.attributor.remember(batch)
        if loop.tap.paused or loop.tap.steps == 0:
            loop.tap.bind()
            if not loop.tap.paused and self._skips.is_stuck():
                self._unstick()
            return loop.last or _nothing_yet(loop.step)
        self._skips.stepped()
        loop.timings.add_step(started - max(self._ended, loop.tap.other_ended_s))
        try:
            decision = loop.advance(loss)
        except RankError:
            raise  # a rank that goes on alone would wait for the others for ever
        except (Exception, KalmanguardError) as fault:
            decision = self._degrade(fault)
        finally:
            now = time.perf_counter()
            self._own_s += now - started
            self._total_s += now - self._ended
            self._ended = now
        self._announce(decision)
        return decision

    def clipped_from(self, norm: Tensor | float) -> None:
        """Tell the norm that the gradient had before it was clipped; call between clipping and ``optimizer.step()``.

        Without it the gradient is seen as the optimizer gets it, which after clipping is nearly always the same norm.

        Parameters
        ----------
        norm
            What ``torch.nn.utils.clip_grad_norm_`` returns; on an accelerator it is not waited for here.
        """
        # Of shards, a norm may be left in parts, one on each rank.
        self._loop.tap.clipped_from = whole(norm) if isinstance(norm, Tensor) else norm

    def gradients_ready(self, optimizer: Optimizer) -> None:
        """Show the gradients of a step with a closure, ``optimizer.step(closure)``; call at the closure's end.

        There they can be judged before they are applied, and the step dropped; without this call a step with a closure
        is judged afterwards only. Called outside a step, before gradients are clipped, it does what `clipped_from`
        does.

        Parameters
        ----------
        optimizer
            The one whose gradients they are.

        Examples
        --------
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Linear(4, 1)
        >>> optimizer = torch.optim.LBFGS(model.parameters())
        >>> held_out = [(torch.randn(32, 4), torch.randn(32, 1))]
        >>> with Supervisor(model, held_out) as supervisor:
        ...     def closure():
        ...         optimizer.zero_grad()
        ...         loss = (model(torch.ones(8, 4)) - torch.nan).square().mean()
        ...         loss.backward()
        ...         supervisor.gradients_ready(optimizer)
        ...         return loss
        ...     _ = optimizer.step(closure)
        ...     decision = supervisor.update()
        >>> decision.action.value, bool(torch.isfinite(model.weight).all())
        ('VETO', True)
        """
        self._loop.tap.gradients_ready(optimizer)

    def note(self, name: str, facts: Mapping[str, Any]) -> None:
        """Write facts about the run into its journal, which says them with all else: a recipe, a data set's version.

        Parameters
        ----------
        name
            What they are about.
        facts
            Plain values that JSON can hold.
        """
        self._loop.journal.record("note", self.step, {"about": name, "facts": dict(facts)})

    @property
    def is_first_rank(self) -> bool:
        """Whether this process keeps the records: the only one, or rank 0 of several."""
        return self._loop.replicas is None or self._loop.replicas.is_first

    # -- by hand -------------------------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """Steps supervised so far."""
        return self._loop.step

    def snapshot(self) -> Decision:
        """Probe the present state and capture it, whatever the cadence says; it counts as certified if it is good."""
        loop = self._loop
        outcome = Outcome(Action.ACCEPT, manual=True)
        decision = loop.feed(
            Measurement(step=loop.step, outcome=outcome, probe=loop.read_probe(), objective=loop.objective)
        )
        loop.actuator.keep(decision.orders, loop.step)
        return decision

    def rollback(self, step: int | None = None) -> Decision:
        """Restore a state of the ring now: that of ``step``, or the newest certified one.

        Raises
        ------
        SnapshotError
            The ring holds no such state; the message lists what it holds.
        """
        loop = self._loop
        held = loop.actuator.ring.steps()
        certified = self._certified()
        target = step if step is not None else (certified[-1] if certified else None)
        if target is None or target not in held:
            wanted = "certified state" if step is None else f"snapshot of step {step}"
            raise SnapshotError(f"There is no {wanted}; the ring holds steps {list(held)}.")
        outcome = loop.restore(target, action=Action.ROLLBACK, rung=0, manual=True)
        decision = loop.feed(Measurement(step=loop.step, outcome=outcome, objective=loop.objective))
        loop.tally["rollbacks"] += 1
        loop.actuator.release()  # whoever restores by hand is in charge of the learning rate too
        loop.last = dataclasses.replace(
            decision,
            action=Action.ROLLBACK,
            proposed=Action.ROLLBACK,
            level=Level.CONFIRMED,
            restored_step=target,
            reason=f"Step {loop.step}: the state of step {target} was restored by hand.",
        )
        return loop.last

    def pause(self, reason: str = "paused by hand") -> Pause:
        """Stop supervising until ``resume()`` of what is returned is called, or its ``with`` block ends."""
        self._loop.tap.paused = True
        self._loop.journal.record("note", self.step, {"pause": reason})
        if self.settings.on_pause is not None:
            self.settings.on_pause(reason)
        if "pause" in self.settings.raise_on:
            raise PauseIntervention(reason, self._loop.last)
        return Pause(self)

    def unpause(self) -> None:
        """Supervise again; what happened to the parameters meanwhile counts as no step."""
        if self._loop.tap.paused:
            self._loop.tap.paused = False
            self._loop.interrupt()
            self._loop.journal.record("note", self.step, {"pause": None})

    def attach(self, sensor: Attachable) -> None:
        """Ask a further sensor at every step: `Forensics`, a monitor, or one of your own with ``sense`` and ``close``.

        What it finds is journaled, and suspicious findings buy a probe; they never cause a rollback by themselves. A
        sensor that raises is taken off, reported once, and training goes on. It is closed with the supervisor.

        Raises
        ------
        ConfigurationError
            The object has no ``sense(step)`` or no ``close()``.
        """
        self._loop.attached.add(sensor)

    def detach(self, sensor: Attachable) -> None:
        """Take a sensor off again, and close it."""
        self._loop.attached.remove(sensor)

    def register(self, name: str, obj: Any) -> None:
        """Make an object's state part of every snapshot: EMA weights, a curriculum, a tokenizer.

        Anything with ``state_dict()`` and ``load_state_dict()`` is captured and restored; anything with
        ``save_pretrained()`` is written beside durable checkpoints.

        Raises
        ------
        ConfigurationError
            The object has neither, the name is taken, or snapshots without it exist already.
        """
        if name in self._extras:
            raise ConfigurationError(f"register({name!r}): that name is taken; choose another one.")
        if self._loop.actuator.ring.steps():
            raise ConfigurationError(
                f"register({name!r}): register before the first step, so that every snapshot has it."
            )
        self._extras[name] = _registrable(name, obj)

    def new_objective(self) -> None:
        """The task changes: what has been gained on the old one no longer binds, and warm-up starts again."""
        loop = self._loop
        loop.objective += 1
        loop.journal.record("objective", loop.step, {"objective": loop.objective})
        loop.actuator.clear()

    def reset(self) -> None:
        """Forget what was learned, and start supervising anew from the present state."""
        self._loop.journal.record("note", self.step, {"reset": True, "began": self.step})
        self._loop.renew()

    def emergency(self) -> Path | None:
        """Save everything now: checkpoint of the present state, journal flushed, diagnosis as ``emergency.json``.

        Returns
        -------
        Path or None
            The diagnosis, or ``None`` without a run folder.
        """
        loop, diagnosis = self._loop, self.diagnose()
        loop.journal.record("note", loop.step, {"emergency": True})
        loop.journal.sync()
        if self.run_dir is None:
            return None
        store = loop.actuator.store
        if store is not None:
            store.save(loop.step, loop.actuator.state.capture(), self.state_dict(), clean=False)
            store.flush()
        path = self.run_dir / "emergency.json"
        draft = path.with_suffix(".part")
        draft.write_text(json.dumps(diagnosis, indent=2, default=str) + "\n")
        draft.replace(path)
        return path

    def batches(self, loader: Iterable[Any]) -> Iterator[Any]:
        """Iterate over a loader and remember the batches of the step in work, in place of ``update(batch=...)``."""
        for batch in loader:
            self._loop.attributor.remember(batch)
            yield batch

    def attribute(self, batch: Any = None) -> AttributionResult:
        """What explains the training loss of the latest step: hard data, the model, or the hardware?

        The batch is evaluated again on the state of that step and on the newest certified one, without a trace. Where
        batches are known (`update`, `batches`) this is done by itself at a suspicion of the loss, once per episode, and
        recorded in the journal.

        Parameters
        ----------
        batch
            The batch of the latest step; by default the one that is known.

        Returns
        -------
        AttributionResult
            With ``cause`` ABSTAIN, and the reason, where it cannot be told: no certified state (observe mode keeps
            none), no batch, no training loss, no spike.
        """
        return self._loop.attributor.attribute(self._loop.state, batch)

    # -- asking --------------------------------------------------------------------------------------------------

    def should_clip_gradients(self) -> bool:
        """Whether the last gradient was larger than `recommended_clip_value`."""
        last = self._loop.tap.last_norm
        return last is not None and last > self.recommended_clip_value()

    def recommended_clip_value(self) -> float:
        """Gradient norm that healthy steps stay below: three deviations above its trend; inf while unknown."""
        return self._loop.clip_value()

    def statistics(self) -> dict[str, Any]:
        """Counts, costs and the present state of the envelope."""
        loop = self._loop
        ledger = loop.state.ledger
        progress = ledger.start - ledger.best
        return {
            "steps": loop.step,
            "suspicions": loop.tally["suspicions"],
            "probes": ledger.probes,
            "vetoes": loop.tally["vetoes"],
            "rollbacks": loop.tally["rollbacks"],
            "errors": loop.incidents.count,
            "mode": ledger.mode.value,
            "warm": ledger.warm,
            "probe_examples": loop.probe.size,
            "probe_every": ledger.cadence.probe_every if ledger.cadence else None,
            "snapshot_every": ledger.cadence.snapshot_every if ledger.cadence else None,
            "sketch_every": loop.suite.stride,
            "snapshots": [slot._asdict() for slot in ledger.slots],
            "first_probe": ledger.start,
            "best_probe": ledger.best,
            "progress": progress if math.isfinite(progress) else 0.0,
            "lapsed_probes": ledger.lapsed,
            "overhead_frac": self._own_s / self._total_s if self._total_s else 0.0,
            "fresh_examples_left": loop.probe.fresh_left,
        }

    def diagnose(self) -> dict[str, Any]:
        """Everything at once: statistics, the last decision, estimator states, optimizers, environment, errors."""
        loop = self._loop
        return {
            "statistics": self.statistics(),
            "last_decision": dataclasses.asdict(loop.last) if loop.last else None,
            "settings": self.settings.model_dump(mode="json"),
            "engine": json.loads(statefile.dump(loop.state)),
            "optimizers": [
                {"type": type(o).__name__, "learning_rates": [float(g["lr"]) for g in o.param_groups]}
                for o in loop.tap.optimizers
            ],
            "parameters_finite": all(bool(torch.isfinite(p).all()) for p in locals_of(list(self.model.parameters()))),
            "snapshot_bytes": loop.actuator.ring.nbytes,
            "first_error": loop.incidents.first,
            "environment": environment(),
            "run_dir": str(self.run_dir) if self.run_dir else None,
        }

    def report(self) -> str:
        """A stability report in plain text: what was seen, what was done, what it cost, what is certified."""
        from kalmanguard.report import render

        return render(self.statistics(), self._loop.last, self.settings, list(self._loop.events))

    def certificate(self, fresh: Iterable[Any] | None = None) -> Report:
        """Issue the certificate of the run so far, derived from its journal by the standalone verifier.

        Parameters
        ----------
        fresh
            Held-out batches that were never used before, for the betting test of claim C3 against the best certified
            state; by default the examples of the probe loader that were set aside (each is used once). Nothing is
            measured any more once the supervisor is closed.

        Raises
        ------
        JournalError
            The supervisor is closed and had no run folder.
        """
        from kalmanguard.certificate.verify import verify

        loop = self._loop
        if self._closed:
            if loop.journal.path is None:
                raise JournalError(
                    "The run was closed, and its temporary journal is gone; call certificate() before close(), or give "
                    "a run_dir."
                )
            return verify(loop.journal.path)
        bet_on_fresh_examples(loop, fresh)
        # On a closed copy: the statement is about the run up to now, and the run itself goes on.
        with tempfile.TemporaryDirectory() as folder:
            loop.journal.save_copy(folder)
            with JournalWriter.resume(folder) as copy:
                copy.close({"steps": loop.step})
            return verify(folder)

    def save(self, folder: str | Path) -> Path:
        """Save the model for use elsewhere: by its ``save_pretrained`` with a registered tokenizer, else safetensors.

        In several processes rank 0 writes; where parameters are sharded, every rank must call it.

        Returns
        -------
        Path
            The folder.
        """
        folder, replicas = Path(folder), self._loop.replicas
        sharded = any(is_sharded(p) for p in self.model.parameters())
        # Every rank has to give its shards; of what is whole then, one copy is enough.
        state = {name: whole(value) for name, value in self.model.state_dict().items()} if sharded else None
        if replicas is not None and not replicas.is_first:
            return folder
        folder.mkdir(parents=True, exist_ok=True)
        save = getattr(self.model, "save_pretrained", None)
        if callable(save):
            save(folder, **({} if state is None else {"state_dict": state}))
            for other in self._extras.values():
                if hasattr(other, "save_pretrained"):
                    other.save_pretrained(folder)
        elif state is None:
            from safetensors.torch import save_model

            save_model(self.model, str(folder / "model.safetensors"))
        else:
            from safetensors.torch import save_file

            save_file({name: value.contiguous() for name, value in state.items()}, folder / "model.safetensors")
        return folder

    def state_dict(self) -> dict[str, Any]:
        """The supervisor's own state as plain values, for a checkpoint of yours; snapshots are not part of it."""
        return state_of(self._loop)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state; the ring starts empty, so there is nothing to roll back to until a snapshot is due.

        Raises
        ------
        ConfigurationError
            The state is of another format or another probe set.
        """
        take_up(self._loop, state)

    def close(self) -> None:
        """Write the closing record, finish the checkpoints, remove the hooks; harmless when repeated."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self._exit)
        loop = self._loop
        loop.tap.close()
        loop.attached.close()
        try:
            loop.journal.flush()
            if loop.state.ledger.episode is None:
                self._keep_last_certified()
            # What becomes durable is recorded, and the closing record is the last one.
            loop.actuator.wait_for_checkpoint()
            loop.report_failed_checkpoint()
            statistics = {k: v for k, v in self.statistics().items() if not isinstance(v, float) or math.isfinite(v)}
            loop.journal.close({"steps": loop.step, "statistics": statistics})
        except KalmanguardError as error:
            loop.incidents.report(loop.step, f"the run could not be closed properly: {error}", error)
        finally:
            loop.actuator.close()
            loop.journal.abandon()  # of a closed journal nothing is left to let go
            if loop.replicas is not None:
                loop.replicas.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None or isinstance(error, Intervention):
            self.close()
        else:
            try:
                self._rescue(error)
            finally:
                # The run died: its journal must read INCOMPLETE.
                self._abandon()
            replicas = self._loop.replicas
            lost = None if replicas is None else replicas.lost(error)
            if lost is not None:
                raise lost from error

    def _certified(self) -> list[int]:
        held = self._loop.actuator.ring.steps()
        return [s.step for s in self._loop.state.ledger.slots if s.certified and not s.suspect and s.step in held]

    def _keep_last_certified(self) -> bool:
        """Have the newest certified state written to disk; whether there is one, and a place for it."""
        certified = self._certified()
        if not certified or self._loop.state.ledger.mode is Mode.HALTED:
            return False
        return self._loop.actuator.checkpoint(certified[-1], clean=True, force=True)

    def _rescue(self, error: BaseException) -> None:
        """The run dies of something else: make what is certified durable, and say what can be done, if anything."""
        if self._closed:
            return
        loop = self._loop
        try:
            loop.journal.flush()
            alone = not loop.actuator.writes_together  # the others may be gone, or go on
            saved = alone and self._keep_last_certified() and loop.actuator.wait_for_checkpoint()
            loop.report_failed_checkpoint()
        except Exception as fault:
            saved = False
            with suppress(KalmanguardError):  # what is under way is more important
                loop.incidents.report(
                    loop.step, f"the last state was not saved: {type(fault).__name__}: {fault}", fault
                )
        if not _is_out_of_memory(error):
            return
        certified = self._certified()
        where = (
            f"The state of step {certified[-1]} is certified and intact" if certified else "No state is certified yet"
        )
        if saved:
            where += f", and in {self.run_dir}: Supervisor.resume continues from it"
        error.add_note(
            f"kalmanguard: memory ran out after step {loop.step}. {where}. Make the batch or the sequences "
            "smaller (with more gradient accumulation), recompute activations, or give the snapshots less memory "
            "(snapshot_bytes, snapshots_on='disk')."
        )

    # -- inner matters -------------------------------------------------------------------------------------------

    def _announce(self, decision: Decision) -> None:
        settings = self.settings
        try:
            if settings.on_decision is not None:
                settings.on_decision(decision)
            if decision.rolled_back and settings.on_rollback is not None:
                settings.on_rollback(decision)
        except Intervention:
            raise
        except Exception as fault:
            self._loop.incidents.report(self.step, f"a callback failed: {type(fault).__name__}: {fault}", fault)
        if settings.mode != "protect":
            return
        if decision.action is Action.HALT and settings.on_halt == "raise":
            raise TrainingHalted(decision.reason, decision)
        if decision.action is Action.ROLLBACK and "rollback" in settings.raise_on:
            raise RollbackIntervention(decision.reason, decision)
        if decision.action is Action.VETO and "veto" in settings.raise_on:
            raise VetoIntervention(decision.reason, decision)

    def _unstick(self) -> None:
        """No step will be taken again: the newest certified state is restored, its scale included."""
        loop = self._loop
        found = (
            f"{self._skips.calls} calls without a step, and the scaler's scale is below 2^-10: gradients are not finite"
        )
        if self.settings.mode != "protect" or not self._certified():
            why = "it only observes" if self.settings.mode != "protect" else "there is no certified state yet"
            loop.incidents.report(loop.step, f"{found}. Nothing is restored, since {why}")
            return
        try:
            decision = self.rollback()
        except RankError:
            raise
        except Exception as fault:
            self._degrade(fault)
            return
        reason = f"Step {loop.step}: {found}; the state of step {decision.restored_step} is restored."
        loop.last = dataclasses.replace(decision, reason=reason)
        self._announce(loop.last)

    def _degrade(self, fault: Exception) -> Decision:
        loop = self._loop
        what = f"{type(fault).__name__}: {fault}"
        loop.incidents.report(loop.step, what, fault)
        loop.tap.reset()
        loop.last = Decision(
            loop.step, Action.ACCEPT, Action.ACCEPT, Level.WARMUP, loop.state.ledger.mode,
            f"Step {loop.step} was not supervised: a fault inside the supervisor ({what}).", certificate="LAPSED",
        )  # fmt: skip
        return loop.last

    def _abandon(self) -> None:
        self._closed = True
        atexit.unregister(self._exit)
        self._loop.tap.close()
        self._loop.attached.close()
        with suppress(KalmanguardError):  # what wrote it last has said so, or the end is near anyway
            self._loop.journal.flush()
        # A checkpoint that is being written is finished, and recorded.
        self._loop.actuator.close()
        if self._loop.replicas is not None:
            self._loop.replicas.close()
        self._loop.journal.abandon()


class Pause:
    """Supervision is paused until `resume`, or until the ``with`` block ends."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor

    def resume(self) -> None:
        """Supervise again."""
        self._supervisor.unpause()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.resume()


def _registrable(name: str, obj: Any) -> Any:
    stateful = hasattr(obj, "state_dict") and hasattr(obj, "load_state_dict")
    if not stateful and not hasattr(obj, "save_pretrained"):
        raise ConfigurationError(
            f"register({name!r}): a {type(obj).__name__} has neither state_dict()/load_state_dict() nor "
            "save_pretrained()."
        )
    return obj


def _is_out_of_memory(error: BaseException) -> bool:
    # On the host torch raises a plain RuntimeError.
    words = ("can't allocate memory", "not enough memory", "out of memory")
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or (isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words))


def _alive(own: weakref.ref[Supervisor]) -> Supervisor:
    supervisor = own()
    assert supervisor is not None  # its hooks and threads are closed with it
    return supervisor


def _at_exit(own: weakref.ref[Supervisor]) -> None:
    """A program that ends without `close`: finish what threads do, before the interpreter is torn down under them."""
    supervisor = own()
    if supervisor is None:
        return
    if getattr(sys, "last_value", None) is None:
        supervisor.close()
    else:
        supervisor._abandon()


def _nothing_yet(step: int) -> Decision:
    return Decision(step, Action.ACCEPT, Action.ACCEPT, Level.WARMUP, Mode.WATCHING, "No optimizer step was taken yet.")
