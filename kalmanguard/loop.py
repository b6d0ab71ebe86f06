"""The straight line of one step: sense, fold into the engine, record, act. No mathematics and no formats live here."""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

from kalmanguard.actuators.actuator import Actuator
from kalmanguard.attribution import Attributor
from kalmanguard.detectors.attribution import Cause
from kalmanguard.detectors.excursion import RATIO
from kalmanguard.distributed.agreement import REPLICAS
from kalmanguard.distributed.replicas import Replicas
from kalmanguard.engine import Engine, EngineState
from kalmanguard.errors import JournalError, KalmanguardError, RankError, RestoreFailed, SnapshotError
from kalmanguard.estimators.bank import usual_gradient
from kalmanguard.incidents import Incidents
from kalmanguard.journal.writer import JournalWriter
from kalmanguard.records import Action, Costs, Decision, Level, Measurement, Mode, Outcome, ProbeReading
from kalmanguard.sensors.attachable import Attached
from kalmanguard.sensors.optimizer import OptimizerTap
from kalmanguard.sensors.probe import Probe
from kalmanguard.sensors.suite import SensorSuite, loss_value
from kalmanguard.sensors.timing import Timings
from kalmanguard.settings import Settings

#: Steps after which the sensors' own cost is fitted to the budget, and after which the cadences are set.
_FIT_AT, _COSTS_AT = 5, 25
#: Times the largest gradient norm so far beyond which the state is captured before the step is applied.
_DARING = 1.2
#: Latest events that are kept at hand for a report; all of them stand in the journal.
_EVENTS = 1000


class Loop:
    """Run the engine over a live training; owned by the `Supervisor`, which is what users see.

    Attributes
    ----------
    state
        The engine's state.
    step, objective
        Steps supervised so far, and objectives declared.
    last
        The last decision.
    tally
        Counts of suspicions, vetoes, rollbacks.
    events
        Steps and reasons of what was suspected or confirmed.
    """

    def __init__(
        self,
        *,
        settings: Settings,
        probe: Probe,
        tap: OptimizerTap,
        suite: SensorSuite,
        actuator: Actuator,
        journal: JournalWriter,
        incidents: Incidents,
        attributor: Attributor,
        replicas: Replicas | None = None,
    ) -> None:
        self.settings, self.probe, self.tap, self.suite = settings, probe, tap, suite
        self.actuator, self.journal, self.incidents = actuator, journal, incidents
        self.attributor = attributor
        self.replicas = replicas
        self.engine = Engine(settings)
        self.state: EngineState = self.engine.init()
        self.step = self._started_at = 0
        self.objective = 0
        self.last: Decision | None = None
        self.tally: Counter[str] = Counter()
        self.events: deque[tuple[int, str]] = deque(maxlen=_EVENTS)
        self.timings = Timings()
        self.attached = Attached(lambda what, fault: self.incidents.report(self.step, what, fault))
        self._costs: Costs | None = None
        self._snapshot_failed = False
        self._reported: Exception | None = None
        self._fitted = False
        self._reunited = -1
        self._first_reading: ProbeReading | None = None

    @property
    def protects(self) -> bool:
        """Whether decisions are carried out."""
        return self.settings.mode == "protect"

    def advance(self, loss: Any) -> Decision:
        """Supervise one step."""
        self.step += 1
        if self.step == self._started_at + _FIT_AT and not self._fitted:
            self._fit_sensors()
        measurement = self._measure(loss) if self.replicas is None else self._agree(self.replicas, loss)
        self.attributor.saw(self.step, measurement.loss, self.state.estimators.loss)
        foresight = self.engine.observe(self.state, measurement)
        reading = None
        if foresight.wants_probe:
            reading = self.read_probe()
            measurement = dataclasses.replace(measurement, probe=reading)
        self.state, decision = self.engine.decide(foresight, reading)
        if not self.protects and decision.proposed is not Action.ACCEPT:
            decision = dataclasses.replace(decision, action=Action.ACCEPT)
        if self.replicas is not None:
            self.replicas.remember(decision)
        self._record(measurement, decision)
        self.attached.observe(measurement, decision)
        if self.attributor.wanted(decision, self.state):
            self._attribute()
        if self.protects:
            parted = decision.proposed is Action.ACCEPT and self._parted(measurement)
            decision = self._reunite(decision) if parted else self._act(decision)
        self.last = decision
        if self.actuator.braces:
            self.suite.buffers.remember()
        if decision.level in (Level.SUSPECT, Level.CONFIRMED):
            self._count(decision)
        return decision

    def _measure(self, loss: Any) -> Measurement:
        measurement = self.suite.measure(
            self.step,
            loss_value(loss),
            costs=None if self.replicas is not None else self._measured_costs(),
            objective=self.objective,
            findings=self.attached.sense(self.step),
        )
        failed, self._snapshot_failed = self._snapshot_failed, False
        braced = self.actuator.ring.braced == self.step - 1
        if failed or braced:
            measurement = dataclasses.replace(measurement, snapshot_failed=failed, braced=braced)
        return measurement

    def _agree(self, replicas: Replicas, loss: Any) -> Measurement:
        """Measure, and put together what all ranks have measured: from here on every rank goes the same way."""
        own, fault = None, None
        try:
            own = self._measure(loss)
        except Exception as error:
            fault = error  # the others must hear of it before it goes on its way
        try:
            measurement = replicas.agree(own, self.suite.sketched)
        except KalmanguardError as error:
            raise error from fault
        if self.attached.expected:
            # Sensors of the user's may see what only one rank has.
            measurement = dataclasses.replace(measurement, findings=replicas.of_first(measurement.findings))
        if self._costs is None and self.step >= _COSTS_AT:
            # What takes how long, no two processes measure alike; memory is that of the rank that has least.
            costs = self._measured_costs()
            known = replicas.smallest(0 if costs is None else costs.slots)
            self._costs = None
            if costs is not None and known:
                self._costs = dataclasses.replace(replicas.of_first(costs), slots=known)
                measurement = dataclasses.replace(measurement, costs=self._costs)
        return measurement

    @staticmethod
    def _parted(measurement: Measurement) -> bool:
        return any(item.detector == REPLICAS for item in measurement.findings)

    def _reunite(self, decision: Decision) -> Decision:
        """Ranks that no longer hold the same parameters are set back to the last state that they had in common."""
        # What each of them has now must not be captured: it is not the same.
        self._snapshot_failed = decision.orders.snapshot
        self.actuator.keep(dataclasses.replace(decision.orders, snapshot=False), decision.step)
        together = -1 if self.replicas is None else self.replicas.together
        certified = [slot.step for slot in self.state.ledger.slots if slot.certified and slot.step <= together]
        held = [step for step in certified if step in self.actuator.ring.steps()]
        if self._reunited == self.step - 1 or not held:
            why = "no state that they had in common is left" if not held else "they differ again right after a restore"
            raise RankError(
                f"The ranks no longer hold the same parameters at step {self.step}, and {why}: start again from the "
                "last checkpoint."
            )
        outcome = self.restore(held[-1], action=Action.ROLLBACK, rung=0, manual=True)
        self.feed(Measurement(step=self.step, outcome=outcome, objective=self.objective))
        self._reunited = self.step
        return dataclasses.replace(
            decision,
            action=Action.ROLLBACK,
            proposed=Action.ROLLBACK,
            level=Level.CONFIRMED,
            restored_step=held[-1],
            reason=f"Step {self.step}: the ranks no longer held the same parameters; the state of step {held[-1]} is "
            "restored on all of them.",
        )

    def _attribute(self) -> None:
        """Before anything is restored: what explains the loss must be asked of the state that it was seen on."""
        found = self.attributor.attribute(self.state)
        if found.cause is not Cause.ABSTAIN:
            self.events.append((self.step, found.message))
        self._journal(self.journal.record, "note", self.step, {"cause": found.cause.value, "text": found.message})

    def _count(self, decision: Decision) -> None:
        self.events.append((decision.step, decision.reason))
        self.tally["suspicions"] += decision.level is Level.SUSPECT
        self.tally["vetoes"] += decision.action is Action.VETO
        self.tally["rollbacks"] += decision.rolled_back

    def begin(self) -> None:
        """Before the very first optimizer step: y_0, and the state that everything can fall back to."""
        try:
            self._first_reading = self.read_probe()
            self._start(self._first_reading)
            if not math.isfinite(self._first_reading.mean):
                what = (
                    "the held-out loss is not finite before the first step, so nothing can be certified: look for nan "
                    "in the probe's data, in loss_fn and in the model's parameters"
                )
                self.incidents.report(self.step, what)
        except RankError:
            raise
        except (Exception, SnapshotError) as fault:
            self.incidents.report(self.step, f"supervision could not begin: {type(fault).__name__}: {fault}", fault)

    def feed(self, measurement: Measurement) -> Decision:
        """Fold in a measurement that is no training step, and record it."""
        self.state, decision = self.engine.step(self.state, measurement)
        self._record(measurement, decision)
        return decision

    def read_probe(self) -> ProbeReading:
        """Probe the present state."""
        started = time.perf_counter()
        reading = self.probe.read()
        self.timings.add_probe(time.perf_counter() - started)
        return reading

    def restore(self, target: int, *, action: Action, rung: int, manual: bool = False) -> Outcome:
        """Restore a ring slot: announced and made durable in the journal before, and recorded after."""
        announced = {"action": action.value, "restore": target, "rung": rung, "manual": manual}
        self.journal.record("intent", self.step, announced)
        self.journal.sync()
        outcome = self._restored(target, action=action, rung=rung, manual=manual)
        self.journal.record("outcome", self.step, dataclasses.asdict(outcome))
        if outcome.error is not None:
            self.incidents.report(self.step, f"rollback to step {target}: {outcome.error}")
        self.interrupt()
        return outcome

    def _restored(self, target: int, *, action: Action, rung: int, manual: bool) -> Outcome:
        """Restore on every rank, or on none that counts: a state that one of them cannot restore is given up by all."""
        if self.replicas is None:
            return self.actuator.restore(target, action=action, rung=rung, manual=manual)
        outcome, fault = None, None
        try:
            outcome = self.actuator.restore(target, action=action, rung=rung, manual=manual)
        except Exception as error:
            fault = error  # the others must hear of it before it goes on its way
        told = self.replicas.outcomes(outcome)
        if told is None:
            raise SnapshotError(f"a rank could not restore the state of step {target}") from fault
        return told

    def renew(self) -> None:
        """Forget what was learned, and what the ring holds."""
        self.state = self.engine.init(began=self.step)
        self._costs = None
        self.actuator.clear()
        self.tap.gate = math.inf
        self.interrupt()

    def resume_at(self, step: int, objective: int, state: EngineState) -> None:
        """Take up a saved state; the sensors were fitted in the run that it comes from."""
        self.actuator.clear()
        self.state, self.step, self.objective = state, step, objective
        self._started_at, self._fitted = step, True
        self.interrupt()

    def interrupt(self) -> None:
        """The state was set, or trained on, without us: what was prepared for the next step no longer fits it."""
        self.actuator.ring.braced = None
        self.tap.brace_norm = self.tap.brace_rate = math.inf
        self.attributor.interrupt()
        self.suite.interrupt()
        self.attached.forget()

    def clip_value(self) -> float:
        """Gradient norm that healthy steps stay below: three deviations above its trend; inf while unknown."""
        return usual_gradient(self.state.estimators, 3.0)

    def _act(self, decision: Decision) -> Decision:
        orders, tap = decision.orders, self.tap
        if decision.mode is Mode.HALTED:
            tap.gate = math.inf
            return decision
        tap.gate, tap.clip = orders.gate, orders.clip
        tap.brace_norm, tap.brace_rate = self._bounds_to_brace_at()
        if decision.proposed in (Action.ROLLBACK, Action.HALT):
            return self._roll_back(decision)
        if orders.release:
            self.actuator.release(lasting=orders.lasting)
        if orders.snapshot or orders.evict or orders.certify or orders.adopt:
            self._keep(decision)
        return decision

    def _bounds_to_brace_at(self) -> tuple[float, float]:
        """Gradient norm and learning rate beyond what has been seen, before which the state is captured."""
        ledger = self.state.ledger
        # What is replayed must start from where the loader and the schedule were, and those have moved on by then.
        if self.settings.replay or not (
            self.actuator.braces and ledger.warm and ledger.mode is Mode.WATCHING and ledger.episode is None
        ):
            return math.inf, math.inf
        norm, excursion = _DARING * self.state.estimators.largest_gradient, ledger.excursion
        return norm or math.inf, RATIO * excursion.fired_at * max(excursion.reference, default=math.inf)

    def brace(self) -> None:
        """Capture the state before a step that looks dangerous: called in the middle of the step, before its update.

        Buffers are those of the end of the step before; the random streams have moved on by this step's forward pass,
        as they would in a rollback, which does not rewind them.
        """
        ring = self.actuator.ring
        ring.braced = None
        if self.step in ring.steps():
            return
        try:
            with self.suite.buffers.as_remembered() as known:
                if known and not self.suite.tampered:
                    self.actuator.brace(self.step)
        except Exception as fault:
            what = f"the state of step {self.step} could not be captured: {type(fault).__name__}: {fault}"
            self.incidents.report(self.step, what, fault)
        if self.replicas is not None and not self.replicas.all(ring.braced is not None):
            ring.braced = None

    def _keep(self, decision: Decision) -> None:
        try:
            self.actuator.keep(decision.orders, decision.step)
        except Exception as fault:
            what = f"the snapshot of step {decision.step} failed: {type(fault).__name__}: {fault}"
            self.incidents.report(self.step, what, fault)
        if not decision.orders.snapshot:
            return
        # The engine must not count on a state that the ring does not hold, of this rank or of another.
        held = decision.step in self.actuator.ring.steps()
        self._snapshot_failed = not (held if self.replicas is None else self.replicas.all(held))
        if self._snapshot_failed or not decision.orders.certified or decision.level is Level.SUSPECT:
            return
        try:
            self._checkpoint(decision.step)
        except Exception as fault:
            what = f"the checkpoint of step {decision.step} failed: {type(fault).__name__}: {fault}"
            self.incidents.report(self.step, what, fault)

    def veto(self, drop: Callable[[], None]) -> None:
        """Carry a veto out: called in the middle of the step, before its update is applied."""
        ledger = self.state.ledger
        decision = Decision(
            self.step + 1, Action.VETO, Action.VETO, Level.CONFIRMED, ledger.mode,
            f"Step {self.step + 1}: the proposed update is dropped; its gradient norm is {self.tap.last_norm:.4g}.",
        )  # fmt: skip
        controls = self.actuator.controls(decision, clip_value=self.clip_value(), hold_steps=ledger.ladder.hold)
        controls.drop = drop
        self._report(self.actuator.veto(controls))

    def report_failed_checkpoint(self) -> None:
        """Say, once, that the last checkpoint was not written: the one before it is what a killed run goes on from."""
        error = None if self.actuator.store is None else self.actuator.store.last_error
        if error is not None and error is not self._reported:
            self._reported = error
            self.incidents.report(
                self.step, f"a checkpoint was not written, or not recorded: {type(error).__name__}: {error}", error
            )

    def _checkpoint(self, step: int) -> None:
        self.report_failed_checkpoint()
        # A checkpoint must not outlive the records of the steps that led to it.
        self._journal(self.journal.flush)
        self.actuator.checkpoint(step, clean=True)

    def _roll_back(self, first: Decision) -> Decision:
        """Run the rung's actions: the first one restores, the others act on what was restored."""
        self.actuator.freeze()
        self.actuator.keep(first.orders, first.step)
        controls = self.actuator.controls(first, clip_value=self.clip_value(), hold_steps=0)

        def restore() -> None:
            if controls.restored:
                return
            try:
                controls.decision = self._restore_a_sound_state(first)
            except (RestoreFailed, RankError):
                raise
            except Exception as fault:
                raise RestoreFailed(f"{type(fault).__name__}: {fault}") from fault
            controls.restored = True
            controls.restored_rates = self.actuator.restored_rates()
            controls.clip_value, controls.hold_steps = self.clip_value(), self.state.ledger.ladder.hold
            # The state is a good one again, and may be saved; a halted run keeps what it has then.
            self.actuator.thaw()

        def halt() -> None:
            if self.state.ledger.mode is Mode.HALTED:
                self.actuator.halt()

        controls.restore, controls.halt = restore, halt
        try:
            failures = self.actuator.recover(controls)
        except RestoreFailed as fault:
            return self._not_restored(first, fault)
        halt()  # in any case, whatever the actions did
        self._report(failures)
        return controls.decision

    def _restore_a_sound_state(self, first: Decision) -> Decision:
        """Restore, probe what was never probed, and try older states while the engine asks for it."""
        decision, restored = first, None
        while decision.proposed in (Action.ROLLBACK, Action.HALT) and decision.orders.restore is not None:
            restored = decision.orders.restore
            try:
                outcome = self.restore(restored, action=decision.proposed, rung=decision.orders.rung)
            except RankError:
                raise
            except Exception as fault:
                raise RestoreFailed(f"step {restored}: {type(fault).__name__}: {fault}") from fault
            certified = any(s.certified for s in self.state.ledger.slots if s.step == restored)
            check = outcome.action is Action.ROLLBACK and not certified
            probe = self._probe_if_possible() if check else None
            decision = self.feed(Measurement(step=first.step, outcome=outcome, probe=probe, objective=self.objective))
            if outcome.action is Action.HALT:
                break
            self.actuator.keep(decision.orders, decision.step)
        halted = self.state.ledger.mode is Mode.HALTED
        done = Action.HALT if halted or restored is None else Action.ROLLBACK
        return dataclasses.replace(
            first,
            action=done,
            proposed=done,
            mode=self.state.ledger.mode,
            restored_step=restored,
            orders=dataclasses.replace(first.orders, restore=restored),
        )

    def _probe_if_possible(self) -> ProbeReading | None:
        """Probe; a state that was restored is one also when its probe cannot be read."""
        try:
            return self.read_probe()
        except RankError:
            raise
        except Exception as fault:
            self.incidents.report(self.step, f"the restored state was not probed: {fault}", fault)
            return None

    def _report(self, failures: list[str]) -> None:
        for failure in failures:
            self.incidents.report(self.step, f"a recovery action failed: {failure}")

    def _not_restored(self, first: Decision, fault: RestoreFailed) -> Decision:
        """Nothing was restored: the engine gives that state up, and will ask for another one."""
        what = f"the rollback failed: {fault}"
        self.actuator.thaw()
        self.interrupt()
        self.feed(
            Measurement(
                step=first.step,
                outcome=Outcome(first.proposed, rung=first.orders.rung, error=what),
                objective=self.objective,
            )
        )
        self.incidents.report(self.step, what, fault)
        return dataclasses.replace(first, action=Action.ACCEPT)

    def _start(self, reading: ProbeReading) -> None:
        at = self._started_at
        decision = self.feed(Measurement(step=at, probe=reading, objective=self.objective))
        if self.protects and at not in self.actuator.ring.steps():
            self.actuator.keep(decision.orders, at)
            if decision.orders.certified:
                self._checkpoint(at)

    def _fit_sensors(self) -> None:
        """Once, early in warm-up: a probe and a sketch that cost more than their share of a step are thinned out.

        The engine then starts anew, from the first reading on the smaller probe: nothing was learned yet.
        """
        settings = self.settings
        if self._first_reading is None or "probe_examples" in settings.model_fields_set:
            return
        fit = self.timings.fit(probe_examples=self.probe.size, sketch_s=self.suite.sketch_s(), budget=settings.budget)
        size, stride = fit if self.replicas is None else self.replicas.of_first(fit)
        if (size, stride) == (self.probe.size, self.suite.stride):
            return
        self.probe.shrink(size)
        self.suite.stride = stride
        fitted = {"reset": True, "probe_examples": self.probe.size, "probe": self.probe.digest, "stride": stride}
        self.journal.record("note", self.step, fitted)
        self.state = self.engine.init()
        self.actuator.clear(but=self._started_at)
        self._start(ProbeReading(self._first_reading.losses[: self.probe.size]))

    def _measured_costs(self) -> Costs | None:
        if self._costs is not None or self.step < _COSTS_AT or not self.timings.probes_s:
            return None
        if self.protects and not self.actuator.capture_s:
            return None
        slots = 2
        if self.protects:
            try:
                slots = self.actuator.capacity()
            except SnapshotError as error:
                # It was estimated at construction; two slots are kept, at more memory than was allowed.
                self.incidents.report(self.step, str(error), error)
        self._costs = Costs(
            self.timings.step_s(), self.timings.probe_s(), self.actuator.capture_s if self.protects else 0.0, slots
        )
        return self._costs

    def _record(self, measurement: Measurement, decision: Decision) -> None:
        self._journal(self.journal.step, measurement, decision)

    def _journal(self, write: Callable[..., None], *record: Any) -> None:
        try:
            write(*record)
        except JournalError as error:
            self.incidents.report(self.step, f"the journal can no longer be written: {error}", error)
