"""A run judged offline: the live engine folded over recorded measurements, in bounded memory."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from kalmanguard.analysis.decimation import Curve, Decimator
from kalmanguard.detectors.drift import DriftState
from kalmanguard.engine import STATISTICS, Engine, EngineState
from kalmanguard.estimators.bank import CHANNELS, Estimators
from kalmanguard.records import Action, Decision, FloatArray, Level, Measurement, Orders, Outcome, ProbeReading
from kalmanguard.settings import Settings

#: Events that are listed one by one, from the beginning and from the end; all of them are counted.
LISTED, LISTED_LAST = 4_000, 1_000
#: Rows at the end of a run that are kept one by one, for what is estimated of its present state.
RECENT = 4_096
#: Training losses whose mean stands in for a held-out loss, where a log has none.
STAND_IN = 16
#: Of these, the greatest that are left out.
_SPIKES = 2
#: States of the estimators that are kept for a run that goes back to an earlier step.
_REMEMBERED = 128
_INNOVATIONS = ("z_loss", "z_gradient", "z_gain", "z_buffers", "z_trajectory")
_AT_PROBES = ("y", "predicted", "scale", "bound", "y_best")
_AT = {name: STATISTICS.index(name) for name in (*_INNOVATIONS, *_AT_PROBES, "y0", "allowance")}


class Event(NamedTuple):
    """A row that the supervisor would have watched, dropped or undone.

    ``row`` counts from 1 in the order of the log, ``step`` is the logged one. ``proposed`` is the action, ``restore``
    the logged step of the state that a rollback would have gone back to, ``detectors`` what fired, ``message`` why.
    """

    row: int
    step: int
    level: str
    proposed: str
    detectors: tuple[str, ...]
    message: str
    restore: int | None = None


class Standing(NamedTuple):
    """Where the last reading stands: held-out loss ``y``, the first one, the best level, and what it may be above it.

    ``allowance`` covers the noise of a reading, so progress below it has not been shown.
    """

    y: float
    start: float
    best: float
    allowance: float

    @property
    def progressed(self) -> bool:
        """Whether more was gained than noise accounts for."""
        return self.start - self.best > self.allowance

    @property
    def give_back(self) -> float:
        """Share of the progress that is lost; 0 where noise accounts for it, nan without progress."""
        if not self.progressed:
            return math.nan
        lost = self.y - self.best
        return lost / (self.start - self.best) if lost > self.allowance else 0.0


class Recent(NamedTuple):
    """One row of the run's end; ``None`` where nothing was logged, nan where an innovation is not known."""

    step: int
    loss: float | None
    gradient_norm: float | None
    learning_rate: float | None
    z_loss: float
    z_gradient: float
    velocity: FloatArray | None


@dataclass(frozen=True, eq=False)
class Judgement:
    """What the engine says about a recorded run.

    Attributes
    ----------
    name
        Of the run.
    settings
        That it was judged under.
    rows, first_step, last_step
        Number of measurements, and the logged steps that they span.
    levels, proposals
        How many rows had each `Level`, and for how many each `Action` was proposed.
    events
        Every row that was not accepted in peace, in order: the first `LISTED` and the last `LISTED_LAST` of them.
    unlisted
        Number of events between those.
    curves
        Decimated series by name: ``loss``, ``probe``, ``gradient_norm``, ``learning_rate``, innovations ``z_...`` in
        standard deviations, ``predicted``, ``scale``, ``bound`` and ``give_back`` at probes.
    recent
        The last rows one by one.
    restarts
        Logged steps that the run went back to.
    probes
        Number of held-out readings that were logged.
    episodes
        Stretches of events with fewer than 20 rows between them.
    unseen_probes
        Rows at which a supervisor would have probed and nothing was recorded.
    standing
        Of the last finite reading; ``None`` without any.
    """

    name: str
    settings: Settings
    rows: int
    first_step: int
    last_step: int
    levels: Mapping[str, int]
    proposals: Mapping[str, int]
    events: tuple[Event, ...]
    unlisted: int
    curves: Mapping[str, Curve]
    recent: tuple[Recent, ...]
    restarts: tuple[int, ...]
    probes: int
    episodes: int
    unseen_probes: int
    standing: Standing | None

    @property
    def suspected(self) -> int:
        """Rows that were suspicious, and no more."""
        return self.levels.get(Level.SUSPECT, 0)

    @property
    def confirmed(self) -> int:
        """Rows at which something would have been dropped or undone."""
        return sum(count for action, count in self.proposals.items() if action != Action.ACCEPT)

    @property
    def give_back(self) -> float:
        """Share of the progress that is lost at the end; nan without a reading or without progress."""
        return self.standing.give_back if self.standing else math.nan


class _Clock:
    """Counts rows, since the engine's time constants are in measurements, whatever was logged how often."""

    def __init__(self, *, logged: bool) -> None:
        self._logged = logged
        self.now = 0
        self._steps: dict[int, int] = {}

    def tick(self, step: int) -> int:
        self.now = step if self._logged else self.now + 1
        return self.now

    def note(self, step: int) -> None:
        if not self._logged:
            self._steps[self.now] = step
            if len(self._steps) > 2 * RECENT:
                for old in list(self._steps)[:RECENT]:
                    del self._steps[old]

    def step(self, clock: int) -> int | None:
        """The logged step of an engine's step; ``None`` where it is forgotten."""
        return clock if self._logged else self._steps.get(clock)


class Judge:
    """Folds measurements one by one; `result` may be asked for at any time.

    Parameters
    ----------
    settings
        What the run is judged under; in observe mode, as nothing that it proposes is done.
    name
        Of the run.
    logged_clock
        The measurements come from a journal of ours: their steps are the engine's own.
    stand_in
        The log has no held-out loss: the last 16 training losses, but for the greatest two, are read as one at every
        16th row. They are of other examples each time, so they tell nothing of overfitting.
    buckets
        Width of the decimated curves.

    Notes
    -----
    What the live tap does is done here: a gradient that is not finite, or beyond the gate that the decision before has
    set, counts as one that would have been dropped. A step that goes back is a restart: the estimators are those of the
    nearest earlier row of that step, as if that state had been restored by hand; the envelope goes on.
    Cost: about a fifth more than the engine alone (``python -m benchmarks offline``).
    """

    def __init__(
        self,
        settings: Settings,
        *,
        name: str = "run",
        logged_clock: bool = False,
        stand_in: bool = False,
        buckets: int = 500,
    ) -> None:
        self.settings = settings
        self._name = name
        self._engine = Engine(settings)
        self._state: EngineState = self._engine.init()
        self._clock = _Clock(logged=logged_clock)
        self._journal = logged_clock
        self._orders = Orders()
        self._losses: list[float] | None = [] if stand_in else None
        self._curves: dict[str, Decimator] = {}
        self._buckets = buckets
        self._levels: Counter[str] = Counter()
        self._proposals: Counter[str] = Counter()
        self._events: list[Event] = []
        self._last_events: deque[Event] = deque(maxlen=LISTED_LAST)
        self._event_count = 0
        self._recent: deque[Recent] = deque(maxlen=RECENT)
        self._history: list[tuple[int, int, Estimators]] = []
        self._every = 1
        self._restarts: list[int] = []
        self._rows = self._probes = self._episodes = self._unseen = 0
        self._first = self._last = 0
        self._last_event = -(1 << 40)
        self._standing: Standing | None = None

    @property
    def state(self) -> EngineState:
        """The engine's state after the last measurement."""
        return self._state

    def take(self, m: Measurement) -> Decision:
        """Fold in the next measurement, and return what the engine decides about it."""
        if self._rows == 0:
            self._first = m.step
        elif m.step < self._last and not self._journal:
            self._restart(m.step)
        logged = m
        clock = self._clock.tick(m.step)
        if not self._journal:
            m = self._stood_in(_gated(m, self._orders))
            if m.step != clock:
                m = replace(m, step=clock)
        self._clock.note(logged.step)
        foresight = self._engine.observe(self._state, m)
        self._unseen += foresight.wants_probe and m.probe is None
        self._state, decision = self._engine.decide(foresight, m.probe)
        decision = self._heard(decision)
        self._orders = decision.orders
        self._rows += 1
        self._last = logged.step
        self._note(logged, m.probe, decision)
        return decision

    def _heard(self, decision: Decision) -> Decision:
        """A log may begin on a plateau: the envelope needs progress, but the trends know enough without it."""
        ready = decision.level is Level.WARMUP and self._clock.now > self.settings.warmup_steps
        if self._journal or not ready or not any(e.fired and e.detector in CHANNELS for e in decision.evidence):
            return decision
        return replace(decision, level=Level.SUSPECT)

    def _stood_in(self, m: Measurement) -> Measurement:
        if self._losses is None:
            return m
        if m.probe is not None:
            # They come too late to be judged by: two kinds of loss on one scale would be harm.
            m = replace(m, probe=None)
        if m.loss is None:
            return m
        self._losses.append(m.loss)
        if len(self._losses) < STAND_IN:
            return m
        finite = [loss for loss in self._losses if math.isfinite(loss)]
        self._losses = []
        # One that a scaler has skipped is no harm; a run of them is.
        enough = len(finite) > STAND_IN // 2
        # Its mean alone: neighbouring losses share their examples, or their average, so their spread is not its error.
        # The greatest two are left out, so that a spike of a row or two, which is told anyway, is no lasting harm.
        kept = sorted(finite)[:-_SPIKES]
        return replace(m, probe=ProbeReading(np.array([math.fsum(kept) / len(kept) if enough else math.nan])))

    def result(self) -> Judgement:
        """What has been found so far."""
        return Judgement(
            name=self._name,
            settings=self.settings,
            rows=self._rows,
            first_step=self._first,
            last_step=self._last,
            levels=dict(self._levels),
            proposals=dict(self._proposals),
            events=(*self._events, *self._last_events),
            unlisted=self._event_count - len(self._events) - len(self._last_events),
            curves={name: decimator.curve() for name, decimator in self._curves.items()},
            recent=tuple(self._recent),
            restarts=tuple(self._restarts),
            probes=self._probes,
            episodes=self._episodes,
            unseen_probes=self._unseen,
            standing=self._standing,
        )

    def _restart(self, step: int) -> None:
        self._restarts.append(step)
        earlier = [(clock, e) for logged, clock, e in self._history if logged < step]
        self._history = [item for item in self._history if item[0] < step]
        clock, estimators = earlier[-1] if earlier else (0, Estimators())
        # What noise readings have is no less known for it.
        estimators = estimators._replace(wander=self._state.estimators.wander)
        # As where a live run is resumed, the drift test begins anew: what it has seen is of steps that are undone.
        ledger = self._state.ledger._replace(drift=DriftState())
        self._state = EngineState(self._state.estimators, ledger, ((clock, estimators),))
        outcome = Outcome(Action.ROLLBACK, restored_step=clock, manual=True)
        self._state, decision = self._engine.step(self._state, Measurement(step=self._clock.now, outcome=outcome))
        self._orders = decision.orders

    def _remember(self, step: int) -> None:
        if not self._journal and self._rows % self._every == 0:
            self._history.append((step, self._clock.now, self._state.estimators))
            if len(self._history) > _REMEMBERED:
                self._history = self._history[::2]
                self._every *= 2

    def _note(self, m: Measurement, probe: ProbeReading | None, decision: Decision) -> None:
        self._remember(m.step)
        statistics = decision.statistics or (math.nan,) * len(STATISTICS)
        if m.loss is not None:
            self._add("loss", m.step, m.loss)
        if m.gradient_norm is not None:
            self._add("gradient_norm", m.step, m.gradient_norm)
        if m.learning_rates:
            self._add("learning_rate", m.step, max(m.learning_rates) * m.lr_factor)
        for name in _INNOVATIONS:
            z = statistics[_AT[name]]
            if not math.isnan(z):
                self._add(name, m.step, z)
        if probe is not None:
            self._probes += m.probe is not None
            self._note_probe(m.step, probe.mean, statistics)
        self._recent.append(
            Recent(
                m.step,
                m.loss,
                m.gradient_norm,
                max(m.learning_rates) * m.lr_factor if m.learning_rates else None,
                statistics[_AT["z_loss"]],
                statistics[_AT["z_gradient"]],
                m.velocity,
            )
        )
        if m.outcome is not None and m.outcome.restored_step is not None:
            return  # what follows a restore is no row of training
        self._levels[decision.level] += 1
        self._proposals[decision.proposed] += 1
        if decision.level in (Level.SUSPECT, Level.CONFIRMED) or decision.proposed is not Action.ACCEPT:
            self._episodes += self._rows - self._last_event > _APART
            self._last_event = self._rows
            self._event_count += 1
            event = self._event(m.step, decision)
            (self._events if len(self._events) < LISTED else self._last_events).append(event)

    def _note_probe(self, step: int, measured: float, statistics: tuple[float, ...]) -> None:
        self._add("probe", step, measured)
        for name in ("predicted", "scale", "bound"):
            value = statistics[_AT[name]]
            if math.isfinite(value):
                self._add(name, step, value)
        standing = Standing(*(statistics[_AT[name]] for name in ("y", "y0", "y_best", "allowance")))
        if all(map(math.isfinite, standing)):
            self._standing = standing
            if standing.start > standing.best:
                self._add("give_back", step, max(0.0, standing.y - standing.best) / (standing.start - standing.best))

    def _add(self, name: str, step: float, value: float) -> None:
        curve = self._curves.get(name)
        if curve is None:
            curve = self._curves[name] = Decimator(self._buckets)
        curve.add(step, value)

    def _event(self, step: int, decision: Decision) -> Event:
        fired = [item for item in decision.evidence if item.fired]
        restore = decision.orders.restore
        # Of a reason only the middle: it names steps of the engine's own clock.
        why = decision.reason.partition(": ")[2].partition("; the state of step")[0].partition(", and the recovery")[0]
        message = "; ".join(dict.fromkeys(item.message for item in fired)) or why
        if self._losses is not None:
            message = message.replace(f" on the same {STAND_IN} examples", "")
            message = message.replace("held-out loss", f"mean of {STAND_IN} training losses")
        return Event(
            self._rows,
            step,
            decision.level.value,
            decision.proposed.value,
            tuple(item.detector for item in fired),
            message,
            None if restore is None else self._clock.step(restore),
        )


#: Rows between two events from which on they are two episodes.
_APART = 20


def judge(
    measurements: Iterable[Measurement],
    settings: Settings | None = None,
    *,
    name: str = "run",
    logged_clock: bool = False,
    stand_in: bool = False,
) -> Judgement:
    """Fold measurements through the engine.

    Parameters
    ----------
    measurements
        In the order in which they were made, such as `Trajectory.measurements` gives them; streamed, never listed.
    settings
        By default the usual ones, in observe mode.
    name, logged_clock, stand_in
        As of `Judge`.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> rows = [Measurement(step=10 * n, loss=2.0 + 0.03 * rng.normal()) for n in range(1, 300)]
    >>> rows.append(Measurement(step=3000, loss=4.0))
    >>> result = judge(rows)
    >>> result.suspected, result.confirmed, result.events[0].step, result.events[0].detectors
    (1, 0, 3000, ('loss',))
    """
    folding = Judge(settings or Settings(mode="observe"), name=name, logged_clock=logged_clock, stand_in=stand_in)
    for m in measurements:
        folding.take(m)
    return folding.result()


def _gated(m: Measurement, orders: Orders) -> Measurement:
    """Note what a live tap would have dropped, or scaled down, before the step."""
    norm = m.gradient_norm
    if m.veto is not None or norm is None:
        return m
    if not math.isfinite(norm):
        return replace(m, veto="nonfinite")
    if norm > orders.gate:
        return replace(m, veto="clipped" if orders.clip else "explosion")
    return m
