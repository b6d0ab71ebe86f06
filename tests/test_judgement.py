"""Runs judged offline. Oracles: brute force for decimated curves; the engine itself, and a real run's own journal.

Rates are held against exact binomial bounds.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from kalmanguard import Engine, Measurement, ProbeReading, Settings, Supervisor
from kalmanguard.analysis import Trajectory
from kalmanguard.analysis.decimation import Decimator
from kalmanguard.analysis.estimates import estimates
from kalmanguard.analysis.health import Health, verdict
from kalmanguard.analysis.judgement import Judge, judge
from kalmanguard.journal import JournalReader
from kalmanguard.models import load_plant
from kalmanguard.records import Action

#: A spike as one large run had it: gradient norms and losses of six rows.
SPIKE = list(zip((0.24, 0.95, 2.4, 15.9, 145.0, 960.0), (2.20, 2.22, 2.60, 2.24, 2.35, 5.10), strict=True))


def healthy(seed: int, rows: int, *, noise: float = 0.03, spread: float = 0.2) -> list[Measurement]:
    rng = np.random.default_rng(seed)
    losses = 2.2 + 2.0 * np.exp(-np.arange(rows) / 100) + noise * rng.normal(size=rows)
    norms = 0.24 * np.exp(spread * rng.normal(size=rows))
    return [
        Measurement(step=10 * n, loss=float(y), gradient_norm=float(g))
        for n, (y, g) in enumerate(zip(losses, norms, strict=True), start=1)
    ]


# --- curves in bounded memory -----------------------------------------------------------------------------------------


@given(st.lists(st.floats(-1e6, 1e6, allow_nan=False), min_size=1, max_size=200), st.integers(1, 7))
@settings(max_examples=60, deadline=None)
def test_buckets_keep_least_greatest_and_mean(values: list[float], buckets: int) -> None:
    decimator = Decimator(buckets)
    for step, value in enumerate(values):
        decimator.add(step, value)
    curve = decimator.curve()
    assert len(curve.steps) <= 2 * buckets
    assert (curve.first, curve.last, curve.best, curve.finite) == (values[0], values[-1], min(values), len(values))
    starts = [*map(int, curve.steps), len(values)]
    for index, (a, b) in enumerate(itertools.pairwise(starts)):
        part = values[a:b]
        assert (curve.low[index], curve.high[index]) == (min(part), max(part))
        assert curve.mean[index] == pytest.approx(math.fsum(part) / len(part), rel=1e-9, abs=1e-9)


def test_values_that_are_not_finite_are_listed_apart() -> None:
    decimator = Decimator(4)
    for step, value in enumerate([1.0, math.nan, math.inf, 2.0]):
        decimator.add(step, value)
    curve = decimator.curve()
    assert (curve.lost, curve.lost_count, curve.finite) == ((1, 2), 2, 2)
    assert np.isfinite(curve.high).all()


# --- the engine over a log --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_a_spike_is_flagged_at_its_second_or_third_value(seed: int) -> None:
    rows = healthy(seed, 200)
    rows += [
        Measurement(step=2000 + 10 * n, loss=loss, gradient_norm=norm) for n, (norm, loss) in enumerate(SPIKE, start=1)
    ]
    result = judge(rows, stand_in=True)
    flagged = [event.step for event in result.events]
    assert flagged[0] in (2020, 2030)
    assert "gradient" in result.events[0].detectors


@pytest.mark.parametrize("seed", range(5))
def test_a_spike_on_a_plateau_is_flagged_as_well(seed: int) -> None:
    """Where nothing is gained there is no envelope yet, which must not mute the trends."""
    rng = np.random.default_rng(seed)
    losses = [*(2.2 + 0.02 * rng.normal(size=200)), *(loss for _, loss in SPIKE)]
    norms = [*(0.25 * np.exp(0.15 * rng.normal(size=200))), *(norm for norm, _ in SPIKE)]
    result = Trajectory.from_arrays(loss=losses, gradient_norm=norms).judge()
    assert result.events[0].step in (202, 203)


def test_false_suspicions_of_a_healthy_log_are_rare() -> None:
    runs = [judge(healthy(seed, 1000), stand_in=True) for seed in range(12)]
    suspected = sum(run.suspected for run in runs)
    rows = sum(run.rows for run in runs)
    assert suspected <= binom.ppf(0.999, rows, 1e-3)
    assert [run.confirmed for run in runs] == [0] * 12
    assert {verdict(run).health for run in runs} == {Health.HEALTHY}


def test_harm_is_confirmed_from_the_training_loss_alone() -> None:
    rows = healthy(3, 400)
    rng = np.random.default_rng(9)
    rows += [Measurement(step=4000 + 10 * n, loss=4.0 + 0.1 * float(rng.normal())) for n in range(1, 200)]
    result = judge(rows, stand_in=True)
    first = next((event for event in result.events if event.proposed != Action.ACCEPT), None)
    assert first is not None
    assert first.step <= 4000 + 10 * 64
    assert first.restore is not None
    assert first.restore <= 4000
    assert verdict(result).health is Health.HARMED
    assert any("checkpoint from step" in line for line in verdict(result).advice)


def test_what_ends_not_finite_has_diverged_and_one_skipped_loss_has_not() -> None:
    rows = healthy(4, 300)
    skipped = [*rows[:200], Measurement(step=rows[200].step, loss=math.nan), *rows[201:]]
    assert verdict(judge(skipped, stand_in=True)).health in (Health.HEALTHY, Health.WATCH)
    lost = [*rows, *(Measurement(step=3000 + 10 * n, loss=math.nan) for n in range(1, 40))]
    found = verdict(judge(lost, stand_in=True))
    assert found.health is Health.DIVERGED
    assert "3,010" in found.reasons[0]


def test_too_little_is_unknown() -> None:
    assert verdict(judge(healthy(0, 10), stand_in=True)).health is Health.UNKNOWN
    assert verdict(judge([])).health is Health.UNKNOWN
    assert verdict(judge(Measurement(step=n) for n in range(1, 100))).health is Health.UNKNOWN


def test_a_gradient_that_is_not_finite_would_have_been_dropped() -> None:
    rows = healthy(5, 100)
    rows[60] = Measurement(step=rows[60].step, loss=rows[60].loss, gradient_norm=math.inf)
    result = judge(rows, stand_in=True)
    assert result.proposals[Action.VETO] == 1
    assert [event.step for event in result.events if event.proposed == "VETO"] == [610]


def test_the_clock_counts_rows_whatever_the_logging_interval() -> None:
    rows = healthy(6, 400)
    rows[350] = Measurement(step=rows[350].step, loss=6.0)
    dense = [Measurement(step=n, loss=m.loss, gradient_norm=m.gradient_norm) for n, m in enumerate(rows, 1)]
    sparse, other = judge(rows, stand_in=True), judge(dense, stand_in=True)
    assert [event.step for event in sparse.events] == [10 * event.step for event in other.events]


def test_a_restart_goes_on_from_the_estimators_of_its_step() -> None:
    """A run that is resumed from an earlier checkpoint repeats its losses: nothing of that is suspicious."""
    rows = healthy(7, 600, noise=0.01)
    again = [*rows[:500], *rows[300:]]
    result = judge(again, stand_in=True)
    assert result.restarts == (3010,)
    assert (result.suspected, result.confirmed) == (0, 0)


def test_memory_does_not_grow_with_the_log() -> None:
    folding = Judge(Settings(mode="observe"), stand_in=True, buckets=50)
    rng = np.random.default_rng(0)
    for n in range(1, 20_001):
        folding.take(Measurement(step=n, loss=2.0 + 0.01 * float(rng.normal())))
    result = folding.result()
    assert result.rows == 20_000
    assert all(len(curve.steps) <= 100 for curve in result.curves.values())
    assert len(result.recent) < 5_000


def test_a_journal_is_judged_as_it_was_live(tmp_path: Path) -> None:
    plant = load_plant("mlp")(seed=3, steps=120)
    torch.manual_seed(3)
    with Supervisor(
        plant.model, plant.probe_loader, optimizer=plant.optimizer, settings={"mode": "observe"}, run_dir=tmp_path
    ) as supervisor:
        for _ in range(120):
            supervisor.update(plant.train_step(next(plant.loader)))
    with JournalReader(tmp_path) as reader:
        recorded = list(reader.steps())
        known = Settings(**reader.header["settings"])
    result = judge((m for m, _ in recorded), known, logged_clock=True)
    levels = [decision.level.value for _, decision in recorded]
    assert dict(result.levels) == {level: levels.count(level) for level in set(levels)}


def test_held_out_losses_without_examples_are_not_paired() -> None:
    """A log has one number a reading; the spread of one number is not known, so no paired test is made of it."""
    engine = Engine(Settings(mode="observe"))
    state = engine.init()
    found = []
    for step in range(1, 60):
        probe = ProbeReading(np.array([2.0 + 0.001 * (step % 3)]))
        state, decision = engine.step(state, Measurement(step=step, probe=probe))
        found += [item.detector for item in decision.evidence]
    assert "paired-probe" not in found


# --- estimates --------------------------------------------------------------------------------------------------------


def test_estimates_of_a_log_whose_truth_is_known() -> None:
    rng, n = np.random.default_rng(8), np.arange(1, 1501)
    losses = 3.0 - 4e-4 * n + 0.1 * rng.normal(size=1500)
    norms = np.exp(0.001 * n + 0.1 * rng.normal(size=1500))
    rows = [
        Measurement(step=int(s), loss=float(y), gradient_norm=float(g))
        for s, y, g in zip(n, losses, norms, strict=True)
    ]
    found = {e.name: e for e in estimates(judge(rows, stand_in=True))}
    slope, noise, growth = (
        found[name]
        for name in ("Slope of the training loss", "Noise of the training loss", "Growth of the gradient norm")
    )
    assert slope.low < -0.4 < slope.high
    assert slope.meaning == "falling"
    assert noise.low < 0.1 < noise.high
    assert growth.low < 0.001 < growth.high
    assert found["Oscillation of the loss"].text.startswith("none")
    assert found["Regime at the end"].text.startswith("nominal")


def test_an_oscillating_loss_is_told() -> None:
    rng, n = np.random.default_rng(9), np.arange(1, 1201)
    losses = 2.0 + 0.3 * np.sin(2 * np.pi * n / 12) + 0.1 * rng.normal(size=1200)
    rows = [Measurement(step=int(s), loss=float(y)) for s, y in zip(n, losses, strict=True)]
    found = {e.name: e for e in estimates(judge(rows, stand_in=True))}
    assert found["Oscillation of the loss"].value == pytest.approx(1 / 12, rel=0.02)


def test_there_are_no_estimates_of_nothing() -> None:
    assert list(estimates(judge([]))) == []
    assert list(estimates(judge(healthy(0, 20), stand_in=True))) == []
    constant = [Measurement(step=s, loss=1.0, gradient_norm=1.0) for s in range(1, 400)]
    assert all(math.isfinite(e.value) or math.isnan(e.value) for e in estimates(judge(constant, stand_in=True)))


# --- logs say nothing of their noise ----------------------------------------------------------------------------------

ROWS = 3_000


def wandering(rng: np.random.Generator, memory: float, deviation: float) -> np.ndarray:
    noise = rng.normal(size=ROWS) * deviation * math.sqrt(1.0 - memory * memory)
    return np.array(list(itertools.accumulate(noise.tolist(), lambda x, e: memory * x + e)))


def probed(y: np.ndarray, first: int = 0, every: int = 40) -> tuple[np.ndarray, np.ndarray]:
    rows = np.arange(first + every - 1, ROWS, every)
    return rows + 1, y[rows]


NULLS = {
    "plateau": lambda rng, t: {
        "loss": 2 + 0.1 * rng.normal(size=ROWS), "probe": probed(2 + 0.02 * rng.normal(size=ROWS)),
    },
    "fine-tuning": lambda rng, t: {
        "loss": 1 + 0.1 * rng.normal(size=ROWS),
        "probe": probed(1 + 0.03 * np.exp(-t / 400) + 0.02 * rng.normal(size=ROWS)),
    },
    "probed late": lambda rng, t: {
        "loss": 1 + 0.2 * np.exp(-t / 800) + 0.1 * rng.normal(size=ROWS),
        "probe": probed(1 + 0.2 * np.exp(-t / 800) + 0.01 * rng.normal(size=ROWS), first=1_500),
    },
    "no probe": lambda rng, t: {"loss": 1.5 + 2 * np.exp(-t / 300) + wandering(rng, 0.9, 0.15)},
    "flat": lambda rng, t: {"loss": 2 + wandering(rng, 0.0, 0.15)},
    "flat, with memory": lambda rng, t: {"loss": 2 + wandering(rng, 0.9, 0.15)},
}  # fmt: skip
HARMED = {
    "a third, at once": lambda rng, t: {"loss": 1.5 + 2 * np.exp(-t / 300) + 0.7 * (t > 2_000)},
    "a third, slowly": lambda rng, t: {"loss": 1.5 + 2 * np.exp(-t / 300) + 0.8 * np.clip((t - 1_500) / 1_000, 0, 1)},
}


@pytest.mark.parametrize("kind", NULLS)
def test_noise_is_no_harm(kind: str) -> None:
    for seed in range(6):
        judged = Trajectory.from_arrays(**NULLS[kind](np.random.default_rng(seed), np.arange(ROWS))).judge()
        assert judged.confirmed == 0, seed
        assert verdict(judged).health in (Health.HEALTHY, Health.WATCH), seed


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("kind", HARMED)
def test_harm_stands_out_of_noise(kind: str, held_out: bool) -> None:
    for seed in range(4):
        rng = np.random.default_rng(seed)
        y = HARMED[kind](rng, np.arange(ROWS))["loss"]
        channels = {"loss": y + 0.1 * rng.normal(size=ROWS)}
        if held_out:
            channels["probe"] = probed(y + 0.02 * rng.normal(size=ROWS))
        assert verdict(Trajectory.from_arrays(**channels).judge()).health is Health.HARMED, seed


def test_a_lost_reading_that_came_back_is_no_end() -> None:
    y = 1.5 + 2.0 * np.exp(-np.arange(2_000) / 300) + 0.01 * np.random.default_rng(0).normal(size=2_000)
    probe = y[39::40].copy()
    probe[-3] = math.nan
    judged = Trajectory.from_arrays(loss=y, probe=(np.arange(40, 2_001, 40), probe)).judge()
    assert verdict(judged).health is not Health.DIVERGED


def test_the_last_events_are_listed_whatever_there_were_before() -> None:
    rng = np.random.default_rng(0)
    rows = [
        Measurement(step=n, loss=2.0 + 0.01 * rng.normal(), gradient_norm=math.nan if n % 2 else 1.0)
        for n in range(1, 13_000)
    ]
    judged = judge(rows)
    assert judged.events[-1].row == judged.events[-1].step == 12_999
    assert len(judged.events) + judged.unlisted == sum(n for level, n in judged.proposals.items() if level != "ACCEPT")


def test_a_restart_does_not_join_what_lies_apart() -> None:
    from kalmanguard.analysis import analyze

    rng = np.random.default_rng(0)
    loss = 2.0 + 0.03 * rng.normal(size=1_200)
    loss[[500, 1_100]] = 4.0
    steps = np.concatenate([np.arange(1, 601), np.arange(1, 601)])
    incidents = analyze(Trajectory.from_arrays(steps, loss=loss), estimate=False).incidents
    assert [i.first for i in incidents] == [501, 501]


def test_few_readings_that_fall_have_made_progress() -> None:
    """A dozen held-out losses of a run that goes well: what they fall by is not their noise."""
    for seed in range(6):
        rng = np.random.default_rng(seed)
        y = 3.3 + 7.5 * np.exp(-np.arange(1_600) / 250) + 0.02 * rng.normal(size=1_600)
        steps = np.arange(125, 1_601, 125)
        judged = Trajectory.from_arrays(loss=y, probe=(steps, y[steps - 1])).judge()
        assert judged.standing is not None
        assert judged.standing.progressed, seed
        assert verdict(judged).health is Health.HEALTHY, seed
