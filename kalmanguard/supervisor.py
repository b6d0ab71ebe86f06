"""The supervisor: sense, step the engine, record, act. No mathematics and no formats live here."""

from __future__ import annotations

import atexit
import dataclasses
import json
import math
import platform
import statistics as stats
import sys
import tempfile
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kalmanguard import statefile
from kalmanguard.actuators.actions import Recovery
from kalmanguard.actuators.actuator import Actuator
from kalmanguard.certificate.betting import LAMBDA_RULE, STAKE
from kalmanguard.detectors.drift import RATES
from kalmanguard.engine import STATISTICS, Engine, EngineState
from kalmanguard.errors import (
    ConfigurationError,
    Intervention,
    JournalError,
    KalmanguardError,
    PauseIntervention,
    RollbackIntervention,
    SnapshotError,
    TrainingHalted,
    VetoIntervention,
)
from kalmanguard.journal.schema import locate
from kalmanguard.journal.writer import JournalWriter
from kalmanguard.records import Action, Costs, Decision, Level, Measurement, Mode, Outcome, ProbeReading
from kalmanguard.sensors.optimizer import OptimizerTap
from kalmanguard.sensors.probe import Probe
from kalmanguard.sensors.suite import SensorSuite, loss_value
from kalmanguard.settings import PRESETS, Settings
from kalmanguard.snapshots.memory import slots_for
from kalmanguard.snapshots.state import TrainingState

if TYPE_CHECKING:
    from kalmanguard.certificate.verify import Report

#: Steps after which the sensors' own cost is fitted to the budget, and the cadences are set.
_FIT_AT, _COSTS_AT = 5, 25
#: Fewest examples that a probe is cut down to, and the probe interval that its size is fitted to.
_SMALLEST_PROBE, _PROBE_INTERVAL = 32, 100


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
    settings
        A `Settings`, a preset's name ("conservative", "balanced", "aggressive"), a TOML path or a dict.
    run_dir
        Folder for the journal and durable checkpoints; ``None`` keeps the journal in a private temporary file.

    Raises
    ------
    ConfigurationError
        Something that cannot work: an empty probe loader, a loss that cannot be inferred, another model's optimizer.
    JournalError
        ``run_dir`` holds a run already (see `resume`), or cannot be written.
    SnapshotError
        The memory budget cannot hold two snapshots.

    Notes
    -----
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
        settings: Settings | str | Path | dict[str, Any] = "balanced",
        run_dir: str | Path | None = None,
    ) -> None:
        self._build(model, probe_loader, optimizer, scheduler, scaler, loader, loss_fn, settings, run_dir, None)

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
        settings: Settings | str | Path | dict[str, Any] = "balanced",
    ) -> Self:
        """Continue a run from the last clean checkpoint of ``run_dir``: model, optimizer, random state, supervision.

        The optimizer must exist, since its state is restored now. `step` then tells where the run continues.

        Raises
        ------
        JournalError, SnapshotError
            There is no journal or no complete clean checkpoint, or one was changed.
        """
        self = cls.__new__(cls)
        self._build(
            model, probe_loader, optimizer, scheduler, scaler, loader, loss_fn, settings, run_dir, Path(run_dir)
        )
        return self

    def _build(
        self,
        model: nn.Module,
        probe_loader: Iterable[Any],
        optimizer: Optimizer | Sequence[Optimizer] | None,
        scheduler: Any,
        scaler: Any,
        loader: Any,
        loss_fn: Callable[[Any, Any], Tensor] | None,
        settings: Settings | str | Path | dict[str, Any],
        run_dir: str | Path | None,
        resume: Path | None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ConfigurationError(f"model is a {type(model).__name__}; pass the torch.nn.Module that is trained.")
        self.settings = Settings.of(settings)
        self.model: nn.Module = getattr(model, "_orig_mod", model)
        self.run_dir = Path(run_dir) if run_dir is not None else None
        self._rewindable = hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
        if self.settings.replay and not self._rewindable:
            raise ConfigurationError(
                "settings.replay needs a loader with state_dict() and load_state_dict(); pass loader=..., for example "
                "a StatefulDataLoader, or switch replay off."
            )
        optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer or ())
        for item in optimizers:
            if not isinstance(item, Optimizer):
                raise ConfigurationError(f"optimizer is a {type(item).__name__}; pass a torch.optim.Optimizer.")
        self._probe = Probe(
            self.model,
            probe_loader,
            examples=self.settings.probe_examples,
            fresh=self.settings.fresh_examples,
            loss_fn=loss_fn,
        )
        self._engine = Engine(self.settings)
        self._state: EngineState = self._engine.init()
        self._tap = OptimizerTap(
            self.model.parameters(),
            optimizers,
            protect=self.settings.mode == "protect",
            before_first_step=self._begin,
            before_step=self._before_step,
        )
        try:
            self._suite = SensorSuite(self.model, self._tap, size=self.settings.sketch_size, seed=self.settings.seed)
            self._extras: dict[str, Any] = {}
            schedulers = [] if scheduler is None else scheduler if isinstance(scheduler, list) else [scheduler]
            training = TrainingState(
                self.model,
                optimizers=self._tap.optimizers,
                schedulers=schedulers,
                scaler=scaler,
                loader=loader if self._rewindable else None,
                extras=self._extras,
                device="same" if self.settings.snapshots_on == "device" else "host",
                spill=self._spill_folder(),
            )
            recovery = self.settings.recovery or Recovery.preset(_preset_of(settings))
            self._actuator = Actuator(
                model=self.model,
                tap=self._tap,
                state=training,
                settings=self.settings,
                recovery=recovery,
                extras=self._extras,
                folder=self.run_dir / "checkpoints" if self.run_dir is not None else None,
            )
            self._actuator.describe_state = _weakly(self)
            self._journal = JournalWriter.resume(resume) if resume is not None else JournalWriter(self.run_dir)
        except BaseException:
            self._tap.close()
            raise
        self._step = self._started_at = 0
        self._first_reading: ProbeReading | None = None
        self._objective = 0
        self._last: Decision | None = None
        self._first_error: str | None = None
        self._closed = False
        self._exit = atexit.register(_at_exit, weakref.ref(self))
        self._step_s: list[float] = []
        self._probe_s: list[float] = []
        self._own_s = self._total_s = 0.0
        self._ended = time.perf_counter()
        self._costs: Costs | None = None
        self._tally: Counter[str] = Counter()
        if resume is not None:
            self._continue()
        else:
            self._journal.write_header(self._header(recovery))

    # -- the straight line ---------------------------------------------------------------------------------------

    def update(self, loss: Tensor | float | None = None) -> Decision:
        """Supervise the step that was just taken; call once per step, after ``optimizer.step()``.

        Parameters
        ----------
        loss
            The training loss of the step, if there is one number; it sharpens detection and tells overfitting from
            corruption, but nothing depends on it.

        Returns
        -------
        Decision
            What was decided about this step. Without an optimizer step since the last call (gradient accumulation, a
            step that a GradScaler skipped) the last decision is returned and nothing advances.

        Raises
        ------
        BindError
            At the first call, when no optimizer of the model can be found.
        TrainingHalted
            The recovery ladder is exhausted (``on_halt="raise"``, protect mode); the best state is restored.
        """
        started = time.perf_counter()
        try:
            if self._closed:
                raise ConfigurationError("The supervisor is closed; make a new one to supervise further steps.")
            if self._tap.paused or self._tap.steps == 0:
                self._tap.bind()
                return self._last or self._nothing_yet()
            self._step_s.append(started - self._ended)
            decision = self._advance(loss)
        except KalmanguardError:
            if self.settings.strict or self._closed or self._step == 0:
                raise
            raise
        except Exception as fault:
            decision = self._degrade(fault)
        finally:
            now = time.perf_counter()
            self._own_s += now - started
            self._total_s += now - self._ended
            self._ended = now
        self._announce(decision)
        return decision

    def _advance(self, loss: Tensor | float | None) -> Decision:
        self._step += 1
        if self._step == _FIT_AT:
            self._fit_sensors()
        measurement = self._suite.measure(
            self._step, loss_value(loss), costs=self._measured_costs(), objective=self._objective
        )
        foresight = self._engine.observe(self._state, measurement)
        reading = None
        if foresight.wants_probe:
            reading = self._read_probe()
            measurement = dataclasses.replace(measurement, probe=reading)
        self._state, decision = self._engine.decide(foresight, reading)
        decision = self._in_mode(decision)
        self._record(measurement, decision)
        if self.settings.mode == "protect":
            decision = self._act(decision)
        self._last = decision
        self._count(decision)
        return decision

    def _act(self, decision: Decision) -> Decision:
        orders = decision.orders
        if decision.mode is Mode.HALTED:
            self._tap.gate = math.inf
            return decision
        self._tap.gate, self._tap.clip = orders.gate, orders.clip
        if decision.proposed in (Action.ROLLBACK, Action.HALT):
            return self._roll_back(decision)
        if orders.release:
            self._actuator.release()
        if orders.snapshot or orders.evict or orders.certify:
            self._actuator.keep(orders, decision.step)
            if orders.certified:
                self._actuator.checkpoint(decision.step, clean=True)
        return decision

    def _roll_back(self, decision: Decision) -> Decision:
        first = decision
        store = self._actuator.store
        if store is not None:
            store.freeze()
        self._actuator.keep(dataclasses.replace(decision.orders, snapshot=False), decision.step)
        restored: int | None = None
        while decision.proposed in (Action.ROLLBACK, Action.HALT) and decision.orders.restore is not None:
            target, rung = decision.orders.restore, decision.orders.rung
            self._journal.record(
                "intent", decision.step, {"action": decision.proposed, "restore": target, "rung": rung}
            )
            self._journal.sync()
            outcome = self._actuator.restore(target, action=decision.proposed, rung=rung)
            self._journal.record("outcome", decision.step, dataclasses.asdict(outcome))
            self._suite.interrupt()
            restored = target
            slot = next((s for s in self._state.ledger.slots if s.step == target), None)
            check = outcome.action is not Action.HALT and (slot is None or not slot.certified)
            measurement = Measurement(
                step=decision.step,
                outcome=outcome,
                probe=self._read_probe() if check else None,
                objective=self._objective,
            )
            self._state, decision = self._engine.step(self._state, measurement)
            self._record(measurement, decision)
            self._actuator.keep(decision.orders, decision.step)
            if outcome.action is Action.HALT:
                break
        halted = self._state.ledger.mode is Mode.HALTED
        final = dataclasses.replace(
            first,
            action=Action.HALT if halted else Action.ROLLBACK,
            proposed=Action.HALT if halted else Action.ROLLBACK,
            mode=self._state.ledger.mode,
            restored_step=restored,
            orders=dataclasses.replace(first.orders, restore=restored),
        )
        failures = self._actuator.recover(
            final,
            restored if restored is not None else -1,
            clip_value=self.recommended_clip_value(),
            hold_steps=self._state.ledger.ladder.hold,
        )
        for failure in failures:
            self._note_error(f"a recovery action failed: {failure}")
        if store is not None and not halted:
            store.thaw()
        return final

    def _begin(self) -> None:
        """Before the very first optimizer step: the state that everything can fall back to, and y_0."""
        try:
            self._first_reading = self._read_probe()
            self._start(self._first_reading)
        except Exception as fault:
            self._degrade(fault)

    def _start(self, reading: ProbeReading) -> None:
        measurement = Measurement(step=self._started_at, probe=reading, objective=self._objective)
        self._state, decision = self._engine.step(self._state, measurement)
        self._record(measurement, decision)
        if self.settings.mode == "protect" and self._started_at not in self._actuator.ring.steps():
            self._actuator.keep(decision.orders, self._started_at)
            if decision.orders.certified:
                self._actuator.checkpoint(self._started_at, clean=True)

    def _fit_sensors(self) -> None:
        """Once, early in warm-up: a probe and a sketch that cost more than their share of a step are thinned out.

        The engine then starts anew, from the first reading on the smaller probe: nothing was learned yet.
        """
        settings = self.settings
        if self._first_reading is None or "probe_examples" in settings.model_fields_set:
            return
        share = settings.budget / 2.0
        step_s = stats.median(self._step_s[1:])
        allowed = _PROBE_INTERVAL * share * step_s / min(self._probe_s)
        size = max(min(_SMALLEST_PROBE, self._probe.size), min(self._probe.size, int(allowed * self._probe.size)))
        stride = 1 if self._suite.sketch_s() <= share * step_s else 2
        if size == self._probe.size and stride == self._suite.stride:
            return
        self._probe.shrink(size)
        self._suite.stride = stride
        self._journal.record(
            "note", self._step, {"reset": True, "probe_examples": size, "probe": self._probe.digest, "stride": stride}
        )
        self._state = self._engine.init()
        self._start(ProbeReading(self._first_reading.losses[:size]))

    def _before_step(self) -> None:
        self._suite.before_step()

    def _read_probe(self) -> ProbeReading:
        started = time.perf_counter()
        reading = self._probe.read()
        self._probe_s.append(time.perf_counter() - started)
        del self._probe_s[:-16]
        return reading

    def _record(self, measurement: Measurement, decision: Decision) -> None:
        try:
            self._journal.step(measurement, decision)
        except JournalError as error:
            self._note_error(f"the journal can no longer be written: {error}")

    def _in_mode(self, decision: Decision) -> Decision:
        if self.settings.mode == "protect" or decision.proposed is Action.ACCEPT:
            return decision
        return dataclasses.replace(decision, action=Action.ACCEPT)

    def _measured_costs(self) -> Costs | None:
        if self._costs is not None or self._step < _COSTS_AT or not self._probe_s:
            return None
        # The first steps pay for allocations and compilations that the others do not.
        step_s = stats.median(self._step_s[2:] or self._step_s)
        capture_s = min(self._actuator.capture_s) if self._actuator.capture_s else 0.0
        slots = self._capacity()
        self._costs = Costs(step_s, stats.median(self._probe_s), capture_s, slots)
        self._step_s.clear()
        return self._costs

    def _capacity(self) -> int:
        if self.settings.mode != "protect":
            return 2
        try:
            return self._actuator.capacity()
        except SnapshotError as error:
            # It was estimated at construction; with two slots the ring still works, at more memory than was allowed.
            self._note_error(str(error))
            return 2

    def _spill_folder(self) -> Path | None:
        """Where the ring lives on disk; ``None`` when it lives in memory, which must then hold two snapshots."""
        settings = self.settings
        if settings.mode != "protect" or settings.snapshots_on == "device":
            return None
        folder = self.run_dir / "ring" if self.run_dir is not None else None
        if settings.snapshots_on == "disk":
            if folder is None:
                raise ConfigurationError('snapshots_on = "disk" needs a run_dir to keep them in.')
            return folder
        # Before the first step there is no optimizer state yet: Adam's two moments are what to expect.
        trained = sum(p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad)
        whole = sum(t.numel() * t.element_size() for t in (*self.model.parameters(), *self.model.buffers()))
        try:
            slots_for(whole + 2 * trained, settings.snapshot_bytes)
        except SnapshotError:
            if folder is None:
                raise
            return folder
        return None

    # -- by hand -------------------------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """Steps supervised so far."""
        return self._step

    def snapshot(self) -> Decision:
        """Probe the present state and capture it, whatever the cadence says; it counts as certified if it is good."""
        outcome = Outcome(Action.ACCEPT, manual=True)
        measurement = Measurement(step=self._step, outcome=outcome, probe=self._read_probe(), objective=self._objective)
        self._state, decision = self._engine.step(self._state, measurement)
        self._record(measurement, decision)
        self._actuator.keep(decision.orders, self._step)
        return decision

    def rollback(self, step: int | None = None) -> Decision:
        """Restore a state of the ring now: that of ``step``, or the newest certified one.

        Raises
        ------
        SnapshotError
            The ring holds no such state; the message lists what it holds.
        """
        slots = self._state.ledger.slots
        held = tuple(s.step for s in slots)
        certified = [s.step for s in slots if s.certified]
        target = step if step is not None else (certified[-1] if certified else None)
        if target is None or target not in self._actuator.ring.steps():
            raise SnapshotError(f"There is no snapshot of step {step}; the ring holds steps {list(held)}.")
        self._journal.record("intent", self._step, {"action": "ROLLBACK", "restore": target, "manual": True})
        self._journal.sync()
        outcome = self._actuator.restore(target, action=Action.ROLLBACK, rung=0, manual=True)
        self._journal.record("outcome", self._step, dataclasses.asdict(outcome))
        self._suite.interrupt()
        measurement = Measurement(step=self._step, outcome=outcome, objective=self._objective)
        self._state, decision = self._engine.step(self._state, measurement)
        self._record(measurement, decision)
        self._tally["rollbacks"] += 1
        self._last = dataclasses.replace(
            decision,
            action=Action.ROLLBACK,
            proposed=Action.ROLLBACK,
            level=Level.CONFIRMED,
            restored_step=target,
            reason=f"Step {self._step}: the state of step {target} was restored by hand.",
        )
        return self._last

    def pause(self, reason: str = "paused by hand") -> _Pause:
        """Stop supervising until ``resume()`` of what is returned is called, or its ``with`` block ends."""
        self._tap.paused = True
        self._journal.record("note", self._step, {"pause": reason})
        if self.settings.on_pause is not None:
            self.settings.on_pause(reason)
        if "pause" in self.settings.raise_on:
            raise PauseIntervention(reason, self._last)
        return _Pause(self)

    def _unpause(self) -> None:
        if self._tap.paused:
            self._tap.paused = False
            self._suite.interrupt()
            self._journal.record("note", self._step, {"pause": None})

    def register(self, name: str, obj: Any) -> None:
        """Make an object's state part of every snapshot: EMA weights, a curriculum, a tokenizer.

        Anything with ``state_dict()`` and ``load_state_dict()`` is captured and restored; anything with
        ``save_pretrained()`` is written beside durable checkpoints.
        """
        stateful = hasattr(obj, "state_dict") and hasattr(obj, "load_state_dict")
        if not stateful and not hasattr(obj, "save_pretrained"):
            raise ConfigurationError(
                f"register({name!r}): a {type(obj).__name__} has neither state_dict()/load_state_dict() nor "
                "save_pretrained()."
            )
        if name in self._extras:
            raise ConfigurationError(f"register({name!r}): that name is taken; choose another one.")
        if self._actuator.ring.steps():
            raise ConfigurationError(
                f"register({name!r}): register before the first step, so that every snapshot has it."
            )
        self._extras[name] = obj

    def new_objective(self) -> None:
        """The task changes: what has been gained on the old one no longer binds, and warm-up starts again."""
        self._objective += 1
        self._journal.record("objective", self._step, {"objective": self._objective})
        for step in self._actuator.ring.steps():
            self._actuator.ring.evict(step)

    def reset(self) -> None:
        """Forget what was learned, and start supervising anew from the present state."""
        self._journal.record("note", self._step, {"reset": True})
        self._state = self._engine.init()
        self._costs = None
        for step in self._actuator.ring.steps():
            self._actuator.ring.evict(step)
        self._actuator.release()
        self._tap.gate = math.inf
        self._suite.interrupt()

    def emergency(self) -> Path | None:
        """Save everything now: checkpoint of the present state, journal flushed, diagnosis as ``emergency.json``.

        Returns
        -------
        Path or None
            The diagnosis, or ``None`` without a run folder.
        """
        diagnosis = self.diagnose()
        self._journal.record("note", self._step, {"emergency": True})
        self._journal.sync()
        if self.run_dir is None:
            return None
        store = self._actuator.store
        if store is not None:
            store.save(self._step, self._actuator.state.capture(), self.state_dict(), clean=False)
            store.flush()
        path = self.run_dir / "emergency.json"
        draft = path.with_suffix(".part")
        draft.write_text(json.dumps(diagnosis, indent=2, default=str) + "\n")
        draft.replace(path)
        return path

    # -- asking --------------------------------------------------------------------------------------------------

    def should_clip_gradients(self) -> bool:
        """Whether the last gradient was larger than `recommended_clip_value`."""
        norm = self._state.estimators.gradient.gaussian
        last = self._last_gradient
        return norm is not None and last is not None and last > self.recommended_clip_value()

    def recommended_clip_value(self) -> float:
        """Gradient norm that healthy steps stay below: three deviations above its trend; inf while unknown."""
        trend = self._state.estimators.gradient
        if trend.gaussian is None or trend.scale.seen < 10:
            return math.inf
        return math.exp(trend.gaussian.level + 3.0 * trend.scale.deviation)

    def statistics(self) -> dict[str, Any]:
        """Counts, costs and the present state of the envelope."""
        ledger = self._state.ledger
        cadence = ledger.cadence
        progress = ledger.start - ledger.best
        return {
            "steps": self._step,
            "suspicions": self._tally["suspicions"],
            "probes": ledger.probes,
            "vetoes": self._tally["vetoes"],
            "rollbacks": self._tally["rollbacks"],
            "errors": self._tally["errors"],
            "mode": ledger.mode.value,
            "warm": ledger.warm,
            "probe_every": cadence.probe_every if cadence else None,
            "snapshot_every": cadence.snapshot_every if cadence else None,
            "snapshots": [slot._asdict() for slot in ledger.slots],
            "first_probe": ledger.start,
            "best_probe": ledger.best,
            "progress": progress if math.isfinite(progress) else 0.0,
            "lapsed_probes": ledger.lapsed,
            "overhead_frac": self._own_s / self._total_s if self._total_s else 0.0,
            "fresh_examples_left": self._probe.fresh_left,
        }

    def diagnose(self) -> dict[str, Any]:
        """Everything at once: statistics, the last decision, estimator states, optimizers, environment, errors."""
        return {
            "statistics": self.statistics(),
            "last_decision": dataclasses.asdict(self._last) if self._last else None,
            "settings": self.settings.model_dump(mode="json"),
            "engine": json.loads(statefile.dump(self._state)),
            "optimizers": [
                {"type": type(o).__name__, "learning_rates": [float(g["lr"]) for g in o.param_groups]}
                for o in self._tap.optimizers
            ],
            "parameters_finite": all(bool(torch.isfinite(p).all()) for p in self.model.parameters()),
            "snapshot_bytes": self._actuator.ring.nbytes,
            "first_error": self._first_error,
            "environment": _environment(),
            "run_dir": str(self.run_dir) if self.run_dir else None,
        }

    def report(self) -> str:
        """A stability report in plain text: what was seen, what was done, what it cost, what is certified."""
        from kalmanguard.report import render

        return render(self.statistics(), self._last, self.settings, self._events())

    def certificate(self, fresh: Iterable[Any] | None = None) -> Report:
        """Issue the certificate of the run so far, derived from its journal by the standalone verifier.

        Parameters
        ----------
        fresh
            Held-out batches that were never used before, for the betting test of claim C3 against the best certified
            state; by default the examples of the probe loader that were set aside (each is used once).
        """
        from kalmanguard.certificate.verify import verify

        self._bet(fresh)
        # On a closed copy: the statement is about the run up to now, and the run itself goes on.
        with tempfile.TemporaryDirectory() as folder:
            self._journal.save_copy(folder)
            with JournalWriter.resume(folder) as copy:
                copy.close({"steps": self._step})
            return verify(folder)

    def _bet(self, fresh: Iterable[Any] | None) -> None:
        from kalmanguard.certificate.betting import BettingTest, alpha_t

        certified = [s for s in self._state.ledger.slots if s.certified and s.step in self._actuator.ring.steps()]
        if not certified or (fresh is None and not self._probe.fresh_left):
            return
        batches = self._probe.take_fresh(fresh)
        if not batches:
            return
        # The anchor is fixed by the reused probe, before any of the fresh losses is seen.
        reference = min(certified, key=lambda s: s.level).step
        candidate = self._probe.read_fresh(batches)
        present = self._actuator.state.capture()
        try:
            self._actuator.ring.restore(reference, rng=False, schedule=False, data=False)
            anchor = self._probe.read_fresh(batches)
        finally:
            self._actuator.state.restore(present, rng=True, schedule=True, data=False)
        self._suite.interrupt()
        self._tally["fresh"] += 1
        settings = self.settings
        level = alpha_t(settings.certificate_alpha, self._tally["fresh"])
        test = BettingTest(delta=settings.certificate_delta, clip=settings.certificate_clip, alpha=level)
        differences = np.nan_to_num(candidate - anchor, nan=math.inf)
        test.update_all(differences)
        self._journal.record(
            "fresh",
            self._step,
            {
                "reference_step": reference,
                "index": self._tally["fresh"],
                "alpha_t": level,
                "log_wealth": test.log_wealth,
                "certified": test.rejects,
                "first": self._tally["fresh_examples"],
            },
            np.asarray(differences, dtype="<f8").tobytes(),
        )
        self._tally["fresh_examples"] += len(differences)

    def save(self, folder: str | Path) -> Path:
        """Save the model for use elsewhere: by its ``save_pretrained`` with a registered tokenizer, else safetensors.

        Returns
        -------
        Path
            The folder.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save = getattr(self.model, "save_pretrained", None)
        if callable(save):
            save(folder)
            for other in self._extras.values():
                if hasattr(other, "save_pretrained"):
                    other.save_pretrained(folder)
        else:
            from safetensors.torch import save_model

            save_model(self.model, str(folder / "model.safetensors"))
        return folder

    def state_dict(self) -> dict[str, Any]:
        """The supervisor's own state as plain values, for a checkpoint of yours; snapshots are not part of it."""
        return {
            "format": 1,
            "step": self._step,
            "objective": self._objective,
            "engine": statefile.dump(self._state),
            "probe": self._probe.digest,
            "probe_examples": self._probe.size,
            "stride": self._suite.stride,
            "tally": dict(self._tally),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state; the ring starts empty, so there is nothing to roll back to until a snapshot is due."""
        if state.get("format") != 1:
            raise ConfigurationError(
                f"The supervisor's saved state has format {state.get('format')!r}; this version reads format 1."
            )
        if state["probe"] != self._probe.digest_of(int(state["probe_examples"])):
            raise ConfigurationError(
                "The saved state belongs to another probe set; pass the same probe_loader, or call reset()."
            )
        loaded = statefile.load(state["engine"])
        # Its own wealth begins anew, so that a third party can follow it from the journal.
        drift = loaded.ledger.drift._replace(wealth=(0.0,) * len(RATES))
        for step in self._actuator.ring.steps():
            self._actuator.ring.evict(step)
        self._state = loaded._replace(
            ledger=loaded.ledger._replace(slots=(), episode=None, last_snapshot=-(1 << 40), drift=drift), saved=()
        )
        self._step, self._objective = int(state["step"]), int(state["objective"])
        self._started_at = self._step
        self._probe.shrink(int(state["probe_examples"]))
        self._suite.stride = int(state["stride"])
        self._tally = Counter({str(k): int(v) for k, v in state["tally"].items()})
        self._suite.interrupt()

    def close(self) -> None:
        """Write the closing record, finish the checkpoints, remove the hooks; harmless when repeated."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self._exit)
        self._tap.close()
        try:
            certified = [s.step for s in self._state.ledger.slots if s.certified]
            if certified and self.settings.mode == "protect" and self._state.ledger.episode is None:
                self._actuator.checkpoint(certified[-1], clean=True, force=True)
            self._journal.close({"steps": self._step, "statistics": _plain(self.statistics())})
        except KalmanguardError as error:
            self._note_error(f"the run could not be closed properly: {error}")
        finally:
            self._actuator.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    # -- inner matters -------------------------------------------------------------------------------------------

    @property
    def _last_gradient(self) -> float | None:
        return self._tap.last_norm

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
            self._degrade(fault)
        if settings.mode != "protect":
            return
        if decision.action is Action.HALT and settings.on_halt == "raise":
            raise TrainingHalted(decision.reason, decision)
        if decision.action is Action.ROLLBACK and "rollback" in settings.raise_on:
            raise RollbackIntervention(decision.reason, decision)
        if decision.action is Action.VETO and "veto" in settings.raise_on:
            raise VetoIntervention(decision.reason, decision)

    def _degrade(self, fault: Exception) -> Decision:
        if self.settings.strict:
            raise fault
        self._note_error(f"{type(fault).__name__}: {fault}")
        self._tap.reset()
        decision = Decision(
            self._step, Action.ACCEPT, Action.ACCEPT, Level.WARMUP, self._state.ledger.mode,
            f"Step {self._step} was not supervised: a fault inside the supervisor ({type(fault).__name__}: {fault}).",
            certificate="LAPSED",
        )  # fmt: skip
        self._last = decision
        return decision

    def _note_error(self, text: str) -> None:
        if self.settings.strict:
            raise KalmanguardError(text)
        self._tally["errors"] += 1
        if self._first_error is None:
            self._first_error = text
            warnings.warn(f"kalmanguard: {text}. Training goes on; supervision is degraded.", stacklevel=4)
        # When the journal itself is what failed, the warning above has said so.
        with suppress(JournalError):
            self._journal.record("error", self._step, {"text": text})

    def _nothing_yet(self) -> Decision:
        return Decision(
            self._step, Action.ACCEPT, Action.ACCEPT, Level.WARMUP, Mode.WATCHING, "No optimizer step was taken yet."
        )

    def _count(self, decision: Decision) -> None:
        if decision.level is Level.SUSPECT:
            self._tally["suspicions"] += 1
        if decision.action is Action.VETO:
            self._tally["vetoes"] += 1
        if decision.rolled_back:
            self._tally["rollbacks"] += 1

    @contextmanager
    def _journal_path(self) -> Iterator[Path]:
        if self._journal.path is not None:
            yield self._journal.path
            return
        with tempfile.TemporaryDirectory() as folder:
            self._journal.save_copy(folder)
            yield locate(folder)

    def _events(self) -> list[tuple[int, str]]:
        from kalmanguard.journal.reader import JournalReader

        with self._journal_path() as path:
            return [
                (decision.step, decision.reason)
                for measurement, decision in JournalReader(path).steps()
                if decision.level in (Level.SUSPECT, Level.CONFIRMED) and measurement.outcome is None
            ]

    def _continue(self) -> None:
        self._tap.bind()
        store = self._actuator.store
        if store is None:
            raise SnapshotError("A run without a run folder has no checkpoint to resume from.")
        step, tree, meta = store.load_last_clean()
        self._actuator.state.load_tree(tree, rng=True, schedule=True, data=self._rewindable)
        self.load_state_dict(meta)
        self._journal.record("resume", step, {"step": step, "engine": statefile.dump(self._state)})

    def _header(self, recovery: Recovery) -> dict[str, Any]:
        settings = self.settings
        return {
            "format": 1,
            "settings": settings.model_dump(mode="json"),
            "recovery": recovery.describe(),
            "statistics": list(STATISTICS),
            "certificate": {
                "alpha": settings.certificate_alpha,
                "delta": settings.certificate_delta,
                "clip": settings.certificate_clip,
                "lambda_rule": LAMBDA_RULE,
                "c": STAKE,
                "kinds": 24,
            },
            "probe": {"n": self._probe.size, "digest": self._probe.digest},
            "model": {
                "type": type(self.model).__name__,
                "parameters": sum(p.numel() for p in self.model.parameters()),
                "trainable": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            },
            "environment": _environment(),
        }


class _Pause:
    """Supervision is paused until `resume`."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor

    def resume(self) -> None:
        """Supervise again."""
        self._supervisor._unpause()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.resume()


def _weakly(supervisor: Supervisor) -> Callable[[], dict[str, Any]]:
    own = weakref.ref(supervisor)

    def state() -> dict[str, Any]:
        alive = own()
        return alive.state_dict() if alive is not None else {}

    return state


def _at_exit(own: weakref.ref[Supervisor]) -> None:
    """A program that ends without `close`: finish what its threads do, which the interpreter would tear down."""
    supervisor = own()
    if supervisor is None:
        return
    if getattr(sys, "last_value", None) is None:
        supervisor.close()
    else:
        # It died of an exception: the journal must read INCOMPLETE.
        supervisor._actuator.close()


def _preset_of(settings: object) -> str:
    return settings if isinstance(settings, str) and settings in PRESETS else "balanced"


def _environment() -> dict[str, str]:
    return {
        "kalmanguard": version("kalmanguard"),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    return {k: (None if isinstance(v, float) and not math.isfinite(v) else v) for k, v in value.items()}
