"""One training run: a recipe, its faults and its guard, as plain data; and what came of it, as plain data."""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.benchmark import Result
from benchmarks.guards import Guard, make_guard
from benchmarks.organic.plant import OrganicPlant
from benchmarks.plants import Truth, make_plant
from kalmanguard import FaultInjector


@dataclass(frozen=True, slots=True, kw_only=True)
class Flight:
    """What to run.

    Attributes
    ----------
    recipe, seed, steps
        What is trained, and for how long.
    guard
        Name of the guard.
    faults
        In the notation of `FaultInjector.parse`.
    place
        Seed of the injector: where a bit flips, what garbage it is.
    skip
        Step whose batch is thrown away and replaced by the next; the mildest disturbance that there is.
    truth
        Steps at whose end the true loss is measured, before the guard judges the step.
    held_out
        Steps at whose end the held-out loss is measured; that of the end always is.
    rates
        Whether the learning rates that the optimizer really used are recorded.
    undone
        Whether the true loss of every state that a guard undoes is measured.
    """

    recipe: str
    seed: int
    steps: int
    guard: str = "none"
    faults: tuple[str, ...] = ()
    place: int = 0
    skip: int | None = None
    truth: tuple[int, ...] = ()
    held_out: tuple[int, ...] = ()
    rates: bool = False
    undone: bool = False

    @property
    def key(self) -> str:
        """The same for equal runs."""
        return repr(dataclasses.astuple(self))


def fly(flight: Flight) -> Result:
    """Run it.

    Among the results: ``truth`` at the end of a step as trained, ``truth_judged`` after a guard put another state back,
    ``truth_undone`` of the states that it took away, ``truth_end`` of the state that the run leaves behind, and
    ``step_cpu_s``, the mean processor time of a step with its guard, all threads together, without what is measured
    about it.
    """
    torch.set_num_threads(1)
    torch.manual_seed(flight.seed)
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a fault or a supervisor has to say is in the result
        result = _Loop(flight).run()
    return {"flight": dataclasses.asdict(flight), **result, "seconds": time.perf_counter() - started}


class _Loop:
    def __init__(self, flight: Flight) -> None:
        self.flight = flight
        self.plant = make_plant(flight.recipe, seed=flight.seed, steps=flight.steps)
        self.truth = Truth(self.plant)
        self.judged: dict[int, float] = {}
        self.undone: dict[int, float] = {}
        self.gauges: dict[int, float] = {}
        self.cpu_s = 0.0
        self.live = self.lost = 0
        self.live_at = {0: 0}
        self.rates: list[list[float]] = []

    def run(self) -> Result:
        flight, plant = self.flight, self.plant
        truth = {0: self.truth()} if 0 in flight.truth else {}
        held_out = {0: plant.held_out_loss()} if 0 in flight.held_out else {}
        injector = FaultInjector.parse(flight.faults, seed=flight.place)
        guard = make_guard(flight.guard, plant)
        if flight.rates:
            for optimizer in plant.optimizers:
                optimizer.register_step_pre_hook(self._see_rates)
        self._gauge(0)
        wanted, kept = set(flight.truth), set(flight.held_out)
        step = 0
        with injector.attach(plant.model, plant.optimizer):
            for step in range(1, flight.steps + 1):
                started = time.process_time()
                loss, seen = self._update(injector, guard, step)
                self.cpu_s += time.process_time() - started
                if step in wanted:
                    truth[step] = self.truth()
                    self._gauge(step)
                if step in kept:
                    held_out[step] = plant.held_out_loss()
                kept_state = copied(plant.model) if flight.undone else None
                started = time.process_time()
                goes_on = guard.after(step, loss)
                self.cpu_s += time.process_time() - started
                self._reckon(guard.events[seen:], step)
                restored = any(event["restored"] is not None for event in guard.events[seen:])
                if step in wanted and restored:
                    self.judged[step] = self.truth()
                if restored and kept_state is not None:
                    self.undone[step] = self._truth_of(kept_state)
                if not goes_on:
                    break
        return {
            "final": _finite(plant.held_out_loss()),
            "ended": step,
            "truth": [[t, _finite(y)] for t, y in truth.items()],
            "truth_judged": [[t, _finite(y)] for t, y in self.judged.items()],
            "truth_undone": [[t, _finite(y)] for t, y in self.undone.items()],
            "truth_end": _finite(self.truth()) if flight.truth else None,
            "gauge": [[t, _finite(y)] for t, y in self.gauges.items()],
            "step_cpu_s": self.cpu_s / step if step else None,
            "held_out": [[t, _finite(y)] for t, y in held_out.items()],
            "events": [event for event in guard.events if event["kind"] != "clip"],
            "lost": self.lost,
            "rates": self.rates,
            "faults": [dataclasses.asdict(record) for record in injector.log[:3]],
            "clips": sum(event["kind"] == "clip" for event in guard.events),
            **guard.close(),
        }

    def _truth_of(self, state: list[Tensor]) -> float:
        now = copied(self.plant.model)
        put_back(self.plant.model, state)
        truth = self.truth()
        put_back(self.plant.model, now)
        return truth

    def _update(self, injector: FaultInjector, guard: Guard, step: int) -> tuple[Tensor, int]:
        plant, flight = self.plant, self.flight
        if step == flight.skip:
            next(plant.loader)
        loss = plant.backward(injector.draw(next(plant.loader)))
        seen = len(guard.events)
        admitted = guard.admits(step, loss)
        if not admitted:
            # A step without gradients changes nothing, and the injector's clock goes on.
            plant.model.zero_grad()
        plant.step()
        self.live += admitted
        return loss, seen

    def _reckon(self, events: list[dict[str, Any]], step: int) -> None:
        """Keep count of the updates that are part of the present state, and of those that were undone."""
        for event in events:
            if event["kind"] == "veto" and event["restored"] is None and self.flight.guard.startswith("kalmanguard"):
                self.live -= 1
            if event["restored"] is not None:
                before = self.live_at.get(event["restored"], 0)
                self.lost += self.live - before
                self.live = before
        self.live_at[step] = self.live

    def _gauge(self, step: int) -> None:
        if isinstance(self.plant, OrganicPlant):
            self.gauges[step] = self.plant.gauge()

    def _see_rates(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.rates.append([float(group["lr"]) for group in optimizer.param_groups])


def copied(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers, copied."""
    return [tensor.detach().clone() for tensor in model.state_dict().values()]


@torch.no_grad()
def put_back(model: nn.Module, state: list[Tensor]) -> None:
    """Set parameters and buffers to what `copied` gave."""
    for tensor, value in zip(model.state_dict().values(), state, strict=True):
        tensor.copy_(value)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def give_back(truth: list[list[Any]], step: int) -> float:
    """Share of the progress that is lost at ``step``: infinite where the true loss is not finite."""
    start = truth[0][1]
    known = [y for t, y in truth if t <= step and y is not None]
    now = next(y for t, y in truth if t == step)
    if now is None:
        return math.inf
    best = min(known)
    if now <= best:
        return 0.0
    return float((now - best) / (start - best)) if start > best else math.inf
