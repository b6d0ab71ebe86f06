"""The standalone verifier: honest runs hold, every kind of false one is found, and it stands alone.

Oracles: a small simulator written here, which follows the stated rules (envelope, drift test, betting) and is then made
to lie in one place; scipy for the chi-square functions and statsmodels for Ljung-Box (1e-9: same formulas).
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from kalmanguard.certificate.betting import LAMBDA_RULE, STAKE, BettingTest, alpha_t
from kalmanguard.certificate.verify import (
    FAILED,
    HOLDS,
    INCOMPLETE,
    LAPSED,
    NOT_CLAIMED,
    RATES,
    VACUOUS,
    Report,
    UnreadableJournalError,
    chi_square_cdf,
    chi_square_quantile,
    main,
    verify,
)
from kalmanguard.journal import JournalReader, JournalWriter
from kalmanguard.records import Action, Decision, Level, Measurement, Mode, Orders, Outcome, ProbeReading
from kalmanguard.settings import Settings

SETTINGS = Settings(run_length=500.0, rollback_budget=4)
NAMES = (
    *("y", "level", "predicted", "scale", "y0", "y_best", "bound", "allowance", "allowance_se", "accepted"),
    *("drift_x", "drift_m", "drift_alarm", "drift_reset", "of no concern"),
)
NO_PROBE = dict.fromkeys(NAMES, math.nan)


@dataclass
class Entry:
    """One record to be written: a step with its statistics by name, or a rare one."""

    kind: str
    step: int
    data: dict[str, Any]
    blob: bytes = b""
    measurement: Measurement | None = None
    decision: Decision | None = None


@dataclass
class Run:
    """A run that follows the rules, as a list of records that a test may falsify before it is written."""

    entries: list[Entry] = field(default_factory=list)
    header: dict[str, Any] = field(
        default_factory=lambda: {
            "format": 1,
            "settings": SETTINGS.model_dump(mode="json"),
            "statistics": list(NAMES),
            "certificate": {"alpha": 0.05, "delta": 0.05, "clip": 4.0, "lambda_rule": LAMBDA_RULE, "c": STAKE},
            "probe": {"n": 32, "digest": "00"},
        }
    )

    def write(self, folder: Path, *, close: bool = True) -> JournalWriter:
        journal = JournalWriter(folder)
        journal.write_header(self.header)
        for entry in self.entries:
            if entry.measurement is not None and entry.decision is not None:
                values = tuple(entry.data[name] for name in self.header["statistics"])
                journal.step(entry.measurement, dataclasses.replace(entry.decision, statistics=values))
            else:
                journal.record(entry.kind, entry.step, entry.data, entry.blob)
        if close:
            journal.close({"steps": len(self.entries)})
        else:
            journal.abandon()
        return journal

    def steps(self, condition: Callable[[Entry], bool] = lambda entry: True) -> list[Entry]:
        return [entry for entry in self.entries if entry.measurement is not None and condition(entry)]

    def probes(self) -> list[Entry]:
        return self.steps(lambda entry: not math.isnan(entry.data["y"]))

    def record(self, kind: str, **data: Any) -> Entry:
        step = self.entries[-1].step if self.entries else 0
        self.entries.append(Entry(kind, step, data))
        return self.entries[-1]


class Simulator:
    """Follows the rules that the verifier re-derives; a Kalman filter with known noise supplies the predictions."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.run = Run()
        self.wealth = [0.0] * len(RATES)
        self.y0, self.y_best, self.se = math.nan, math.inf, 0.05
        self.level, self.variance = 5.0, 0.01
        self.step, self.objective = 0, 0

    def advance(self, count: int, *, probe_every: int = 4, drift: float = 0.0, level: Level = Level.NOMINAL) -> None:
        for _ in range(count):
            self.step += 1
            x = float(np.clip(self.rng.normal(drift - 0.3, 0.5), -1, 1))
            probed = self.step % probe_every == 0
            self.add(x, self.losses() if probed else None, level=level)

    def losses(self) -> np.ndarray:
        truth = 1.0 + 4.0 * math.exp(-self.step / 150)
        return truth + self.rng.normal(0, 0.05 * math.sqrt(32), 32)

    def add(self, x: float = math.nan, losses: np.ndarray | None = None, **changes: Any) -> Entry:
        s = {**NO_PROBE, **self.bet(x)}
        if losses is not None:
            s |= self.judge(losses)
        decision = {"level": Level.NOMINAL, "mode": Mode.WATCHING, "action": Action.ACCEPT, "certificate": "HOLDS"}
        decision |= changes
        measurement = Measurement(
            self.step,
            velocity=self.rng.normal(size=8),
            probe=None if losses is None else ProbeReading(losses),
            objective=self.objective,
        )
        done = Decision(self.step, proposed=decision["action"], reason="simulated", **decision)
        self.run.entries.append(Entry("step", self.step, s, b"", measurement, done))
        return self.run.entries[-1]

    def bet(self, x: float) -> dict[str, float]:
        if math.isnan(x):
            return {"drift_x": x, "drift_m": x, "drift_alarm": 0.0, "drift_reset": 0.0}
        reset = not any(self.wealth)
        self.wealth = [(1 + rate * x) * (m + 1) for rate, m in zip(RATES, self.wealth, strict=True)]
        value = sum(self.wealth) / len(RATES)
        alarm = value >= SETTINGS.run_length
        if alarm:
            self.wealth = [0.0] * len(RATES)
        return {"drift_x": x, "drift_m": value, "drift_alarm": float(alarm), "drift_reset": float(reset)}

    def judge(self, losses: np.ndarray) -> dict[str, float]:
        y = ProbeReading(losses).mean
        if math.isnan(self.y0):
            self.y0 = self.y_best = self.level = y
        predicted, variance = self.level, self.variance + 0.05**2
        scale = math.sqrt(variance + 0.05**2)
        gain = variance / scale**2
        self.level, self.variance = predicted + gain * (y - predicted), (1 - gain) * variance
        allowance = max(
            SETTINGS.give_back * (self.y0 - self.y_best),
            SETTINGS.standard_errors * self.se,
            SETTINGS.floor_frac * abs(self.y_best),
        )
        bound = self.y_best + allowance
        s = {"y": y, "level": self.level, "predicted": predicted, "scale": scale, "y0": self.y0}
        s |= {"y_best": self.y_best, "bound": bound, "allowance": allowance, "allowance_se": self.se}
        s |= {"accepted": float(y <= bound)}
        if y <= bound:
            self.y_best = min(self.y_best, max(self.level, y))
        return s

    def roll_back(self, *, digest: str = "ab" * 32) -> Entry:
        """A rollback with its outcome; returns the outcome's record."""
        target = self.step - 5
        self.step += 1
        self.add(level=Level.CONFIRMED, action=Action.ROLLBACK, orders=Orders(restore=target))
        self.run.record("intent", action="ROLLBACK", restore=target, rung=0)
        outcome = Outcome(Action.ROLLBACK, target, 0, digest, digest)
        return self.run.record("outcome", **dataclasses.asdict(outcome))

    def certify(self, index: int, mean: float, examples: int = 1000) -> Entry:
        """A betting test on fresh examples."""
        differences = self.rng.normal(mean, 0.2, examples)
        level = alpha_t(0.05, index)
        test = BettingTest(delta=0.05, clip=4.0, alpha=level)
        path = test.update_all(differences)
        entry = self.run.record(
            "fresh",
            reference_step=1,
            index=index,
            alpha_t=level,
            log_wealth=float(path[-1]),
            certified=test.rejects,
            first=1000 * (index - 1),
        )
        entry.blob = differences.tobytes()
        return entry


def simulate(seed: int = 0) -> Simulator:
    """A complete honest run: warm-up, training, two rollbacks, a drift alarm, a betting test."""
    simulator = Simulator(seed)
    simulator.advance(20, level=Level.WARMUP)
    simulator.advance(300)
    for _ in range(2):
        simulator.roll_back()
        simulator.advance(30)
    simulator.advance(60, drift=1.5)
    simulator.advance(20)
    simulator.certify(1, 0.0)
    return simulator


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


def check(run: Run, folder: Path, **options: Any) -> Report:
    run.write(folder, close=options.pop("close", True))
    return verify(folder, **options)


def status(report: Report) -> dict[str, str]:
    return {claim.name: claim.status for claim in report.claims}


# --- honest runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_an_honest_run_holds(folder: Path, seed: int) -> None:
    report = check(simulate(seed).run, folder)
    found = status(report)
    assert found.pop("C5") in (HOLDS, NOT_CLAIMED)
    assert found == {
        "chain": HOLDS, "head": NOT_CLAIMED, "run": HOLDS, "C1": HOLDS, "C2": HOLDS, "C3": HOLDS, "C3-reuse": VACUOUS,
        "C4": HOLDS, "C6": HOLDS, "durable": NOT_CLAIMED,
    }  # fmt: skip
    assert report.exit_code == 0
    assert report.steps == 462
    with JournalReader(folder) as reader:
        assert report.head == reader.head
        assert report.records == len(reader)
    assert "before and after: 2," in report["C2"].text
    assert "alarms: 0" not in report["C4"].text
    assert "Tests: 1, certified: 1" in report["C3"].text


def test_a_run_that_only_trained_claims_no_more_than_it_did(folder: Path) -> None:
    simulator = Simulator()
    simulator.advance(10, probe_every=100)
    for entry in simulator.run.steps():
        entry.data |= simulator.bet(math.nan)
    found = status(check(simulator.run, folder))
    assert [found[name] for name in ("C1", "C2", "C3", "C4", "C5")] == [NOT_CLAIMED] * 5
    assert found["C6"] == HOLDS


def test_a_run_without_the_statistics_says_so(folder: Path) -> None:
    run = simulate().run
    run.header["statistics"] = ["y", "of no concern"]
    report = check(run, folder)
    assert [report[name].status for name in ("C1", "C4", "C5")] == [NOT_CLAIMED] * 3
    assert "does not keep" in report["C1"].text
    assert report["C2"].status == HOLDS


def test_a_run_that_is_not_closed_reads_incomplete(folder: Path) -> None:
    report = check(simulate().run, folder, close=False)
    assert report["run"].status == INCOMPLETE
    assert report["chain"].status == HOLDS
    assert report.exit_code == 3


def test_the_report_prints_claims_and_non_claims(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = simulate().run
    run.write(folder)
    assert main([str(folder)]) == 0
    text = capsys.readouterr().out
    for name in ("chain", "head", "run", "C1", "C2", "C3", "C3-reuse", "C4", "C5", "C6"):
        assert f"\n  {name} " in text
    for word in ("convergence", "clipped", "between probes", "Shift", "cut tail"):
        assert word in text
    assert max(map(len, text.splitlines())) <= 120
    assert main([str(folder), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["exit_code"] == 0
    assert {claim["name"]: claim["status"] for claim in data["claims"]}["C1"] == HOLDS
    assert main([str(folder / "nothing"), "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["exit_code"] == 2
    assert main([str(folder / "nothing")]) == 2
    assert "no journal at" in capsys.readouterr().out


# --- C1 ---------------------------------------------------------------------------------------------------------------


def test_an_acceptance_outside_the_bound_fails_unless_it_is_marked(folder: Path, tmp_path: Path) -> None:
    run = simulate().run
    entry = run.probes()[50]
    assert entry.measurement is not None
    assert entry.decision is not None
    y = entry.data["bound"] + 1e-9
    losses = np.full(32, y)
    entry.measurement = dataclasses.replace(entry.measurement, probe=ProbeReading(losses))
    entry.data["y"] = ProbeReading(losses).mean
    assert entry.data["y"] > entry.data["bound"]
    report = check(run, folder)
    assert report["C1"].status == FAILED
    assert report["C1"].steps == (entry.step,)
    assert report.exit_code == 1
    entry.decision = dataclasses.replace(entry.decision, certificate="LAPSED")
    marked = check(run, tmp_path / "marked")
    assert marked["C1"].status == LAPSED
    assert marked["C1"].steps == (entry.step,)
    assert marked.exit_code == 3


def test_harm_that_is_let_pass_openly_lapses(folder: Path) -> None:
    """Overfitting: a probe outside the envelope is neither accepted nor undone, and marked."""
    simulator = Simulator()
    simulator.advance(100)
    simulator.step += 1
    entry = simulator.add(0.0, np.full(32, 9.0), certificate="LAPSED")
    assert entry.data["accepted"] == 0
    simulator.advance(20)
    report = check(simulator.run, folder)
    assert report["C1"].status == LAPSED
    assert report["C1"].steps == (101,)


def test_the_envelope_is_not_in_force_during_warm_up(folder: Path, tmp_path: Path) -> None:
    def run(level: Level) -> Run:
        simulator = Simulator()
        simulator.advance(8, level=Level.WARMUP)
        simulator.step += 1
        entry = simulator.add(0.0, np.full(32, 9.0), level=level)
        entry.data["accepted"] = 1.0
        simulator.advance(20, level=Level.WARMUP if level is Level.WARMUP else Level.NOMINAL)
        return simulator.run

    report = check(run(Level.WARMUP), folder)
    assert report["C1"].status == HOLDS
    assert "not in force: 1." in report["C1"].text
    # The step that ends warm-up was itself judged by warm-up's rule; the one after it is not.
    ending = run(Level.NOMINAL)
    assert check(ending, tmp_path / "ending")["C1"].status == HOLDS
    ending.steps()[7].decision = dataclasses.replace(ending.steps()[7].decision, level=Level.NOMINAL)  # type: ignore[type-var]
    assert check(ending, tmp_path / "after")["C1"].status == FAILED


FALSE_ENVELOPES: dict[str, Callable[[dict[str, float]], None]] = {
    "mean": lambda s: s.update(y=s["y"] * (1 + 1e-15) + 1e-15),
    "wide allowance": lambda s: s.update(allowance=s["allowance"] * 1.001, bound=s["y_best"] + s["allowance"] * 1.001),
    "bound": lambda s: s.update(bound=s["bound"] + 1e-6),
    "infinite bound": lambda s: s.update(bound=math.inf),
    "no bound": lambda s: s.update(bound=math.nan),
    "ratchet": lambda s: s.update(y_best=s["y_best"] + 0.5, bound=s["y_best"] + 0.5 + s["allowance"]),
    "start": lambda s: s.update(y0=s["y0"] + 1.0),
}


@pytest.mark.parametrize("name", FALSE_ENVELOPES)
def test_a_false_envelope_is_found(folder: Path, name: str) -> None:
    run = simulate().run
    entry = run.probes()[40]
    FALSE_ENVELOPES[name](entry.data)
    report = check(run, folder)
    assert report["C1"].status == FAILED
    assert entry.step in report["C1"].steps


def test_a_tighter_allowance_is_no_fault(folder: Path) -> None:
    run = simulate().run
    for entry in run.probes():
        if entry.data["y"] <= entry.data["y_best"] + entry.data["allowance"] / 2:
            entry.data["allowance"] /= 2
            entry.data["bound"] = entry.data["y_best"] + entry.data["allowance"]
    assert check(run, folder)["C1"].status == HOLDS


def test_probe_and_verdict_belong_together(folder: Path, tmp_path: Path) -> None:
    run = simulate().run
    entry = next(e for e in run.steps() if math.isnan(e.data["y"]))
    entry.data["accepted"] = 1.0
    assert "not taken" in check(run, folder)["C1"].text
    run = simulate().run
    entry = run.probes()[5]
    entry.data.update({**NO_PROBE, **{key: entry.data[key] for key in entry.data if key.startswith("drift")}})
    report = check(run, tmp_path / "silent")
    assert report["C1"].status == FAILED
    assert report["C1"].steps == (entry.step,)


def test_a_non_finite_probe_is_never_accepted(folder: Path, tmp_path: Path) -> None:
    run = simulate().run
    entry = run.probes()[30]
    assert entry.measurement is not None
    losses = np.array([1.0, math.nan, 2.0])
    entry.measurement = dataclasses.replace(entry.measurement, probe=ProbeReading(losses))
    entry.data |= {"y": math.nan, "accepted": 0.0}
    assert check(run, folder)["C1"].status == HOLDS
    entry.data["accepted"] = 1.0
    assert check(run, tmp_path / "accepted")["C1"].status == FAILED


@pytest.mark.parametrize("how", ["objective", "reset", "resume"])
def test_a_new_start_is_one_only_if_it_is_recorded(folder: Path, tmp_path: Path, how: str) -> None:
    def run(told: bool) -> Run:
        simulator = Simulator()
        simulator.advance(200)
        simulator.y0, simulator.y_best = 9.0, 8.0
        simulator.wealth = [0.0] * len(RATES)
        if told:
            simulator.objective += how == "objective"
            if how != "objective":
                simulator.run.record("note" if how == "reset" else "resume", **{how: True})
        simulator.advance(40)
        return simulator.run

    honest = check(run(True), folder)
    assert (honest["C1"].status, honest["C4"].status) == (HOLDS, HOLDS)
    if how != "objective":
        assert "a resume or a reset: 1." in honest["C1"].text
    secret = check(run(False), tmp_path / "secret")
    assert secret["C1"].status == FAILED
    assert "y_best rose" in secret["C1"].text


# --- C2 ---------------------------------------------------------------------------------------------------------------


def test_a_restore_that_is_not_exact_fails(folder: Path) -> None:
    simulator = simulate()
    entry = simulator.roll_back()
    entry.data["digest_actual"] = "cd" * 32
    report = check(simulator.run, folder)
    assert report["C2"].status == FAILED
    assert report["C2"].steps == (entry.step,)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"digest_actual": None}, "no digest"),
        ({"error": "out of memory"}, "out of memory"),
        ({"restored_step": None}, "names no state"),
    ],
)
def test_a_restore_that_is_not_shown_exact_lapses(folder: Path, changes: dict[str, Any], text: str) -> None:
    simulator = simulate()
    simulator.roll_back().data.update(changes)
    report = check(simulator.run, folder)
    assert report["C2"].status == LAPSED
    assert text in report["C2"].text


def test_a_rollback_without_outcome_is_missed(folder: Path, tmp_path: Path) -> None:
    simulator = simulate()
    simulator.roll_back()
    simulator.run.entries.pop()
    assert check(simulator.run, folder)["C2"].status == LAPSED
    assert check(simulator.run, tmp_path / "killed", close=False)["C2"].status == INCOMPLETE


def test_digests_are_held_against_those_recorded_at_capture(folder: Path, tmp_path: Path) -> None:
    def run(digest: str) -> Run:
        simulator = Simulator()
        simulator.advance(50)
        simulator.run.record("snapshot", digest="ab" * 32).step = 46
        simulator.advance(1)
        simulator.roll_back(digest=digest)
        simulator.advance(10)
        return simulator.run

    good = check(run("ab" * 32), folder)
    assert good["C2"].status == HOLDS
    assert "recorded at capture: 1." in good["C2"].text
    assert check(run("cd" * 32), tmp_path / "other")["C2"].status == FAILED


# --- C3 ---------------------------------------------------------------------------------------------------------------


def test_the_last_betting_test_decides(folder: Path, tmp_path: Path) -> None:
    simulator = simulate()
    simulator.certify(2, 0.3)
    report = check(simulator.run, folder)
    assert report["C3"].status == LAPSED
    assert "Tests: 2, certified: 1" in report["C3"].text
    never = Simulator()
    never.advance(10)
    never.certify(1, 0.3)
    assert check(never.run, tmp_path / "never")["C3"].status == NOT_CLAIMED


def test_differences_may_stand_in_the_record_itself(folder: Path) -> None:
    simulator = simulate()
    entry = simulator.certify(2, 0.0)
    entry.data["differences"] = np.frombuffer(entry.blob).tolist()
    entry.blob = b""
    assert check(simulator.run, folder)["C3"].status == HOLDS


FALSE_TESTS: dict[str, Callable[[Entry], None]] = {
    "wealth": lambda e: e.data.update(log_wealth=e.data["log_wealth"] + 1e-6),
    "verdict": lambda e: e.data.update(certified=not e.data["certified"]),
    "spending": lambda e: e.data.update(alpha_t=e.data["alpha_t"] * 1.5),
    "index used twice": lambda e: e.data.update(index=1, alpha_t=alpha_t(0.05, 1)),
    "index zero": lambda e: e.data.update(index=0, alpha_t=0.05),
    "examples used twice": lambda e: e.data.update(first=999),
    "a difference": lambda e: setattr(e, "blob", np.full(1, -4.0).tobytes() + e.blob[8:]),
}


@pytest.mark.parametrize("name", FALSE_TESTS)
def test_a_false_betting_test_is_found(folder: Path, name: str) -> None:
    simulator = simulate()
    FALSE_TESTS[name](simulator.certify(2, 0.0))
    report = check(simulator.run, folder)
    assert report["C3"].status == FAILED


def test_a_rule_that_is_not_known_is_not_claimed(folder: Path) -> None:
    run = simulate().run
    run.header["certificate"]["lambda_rule"] = "secret"
    report = check(run, folder)
    assert report["C3"].status == NOT_CLAIMED
    assert "'secret'" in report["C3"].text


def test_a_bet_of_everything_is_not_a_test(folder: Path) -> None:
    run = simulate().run
    run.header["certificate"]["c"] = 1.0
    assert check(run, folder)["C3"].status == FAILED


def test_the_reused_probe_is_worth_something_when_it_is_large(folder: Path) -> None:
    run = simulate().run
    run.header["probe"]["n"] = 10_000_000
    assert check(run, folder)["C3-reuse"].status == HOLDS


# --- C4, C5, C6 -------------------------------------------------------------------------------------------------------

FALSE_DRIFT: dict[str, Callable[[dict[str, float]], None]] = {
    "value": lambda s: s.update(drift_m=s["drift_m"] * (1 + 1e-9)),
    "bet": lambda s: s.update(drift_x=s["drift_x"] + 1e-6),
    "alarm": lambda s: s.update(drift_alarm=1.0),
    "unannounced restart": lambda s: s.update(drift_reset=1.0),
    "suppressed": lambda s: s.update(drift_x=math.nan),
}


@pytest.mark.parametrize("name", FALSE_DRIFT)
def test_a_false_drift_test_is_found(folder: Path, name: str) -> None:
    run = simulate().run
    entry = run.steps()[120]
    FALSE_DRIFT[name](entry.data)
    report = check(run, folder)
    assert report["C4"].status == FAILED
    assert report["C4"].steps[0] in (entry.step, entry.step + 1)


def test_a_silenced_alarm_is_found(folder: Path) -> None:
    run = simulate().run
    entry = run.steps(lambda e: e.data["drift_alarm"] == 1)[0]
    entry.data["drift_alarm"] = 0.0
    assert check(run, folder)["C4"].steps[0] == entry.step


def test_a_bet_beyond_its_range_is_found(folder: Path) -> None:
    simulator = Simulator()
    simulator.advance(10)
    simulator.step += 1
    simulator.add(1.5)
    assert "outside [-1, 1]" in check(simulator.run, folder)["C4"].text


def innovations(folder: Path, values: np.ndarray) -> Report:
    simulator = Simulator()
    for value in values.tolist():
        simulator.step += 1
        entry = simulator.add(math.nan, np.full(4, 2.0))
        entry.data |= {"predicted": 2.0 - 0.3 * value, "scale": 0.3}
    return check(simulator.run, folder)


def test_consistency_has_the_stated_size_and_power(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    good = [innovations(tmp_path / f"good{i}", rng.normal(size=300))["C5"].status for i in range(12)]
    assert good.count(HOLDS) >= 9
    walk = rng.normal(size=301)
    assert innovations(tmp_path / "wide", 1.3 * rng.normal(size=300))["C5"].status == NOT_CLAIMED
    assert innovations(tmp_path / "coloured", (walk[1:] + walk[:-1]) / math.sqrt(2))["C5"].status == NOT_CLAIMED


def test_consistency_figures_are_those_of_the_textbook(tmp_path: Path) -> None:
    from statsmodels.stats.diagnostic import acorr_ljungbox

    values = np.random.default_rng(1).normal(size=200)
    text = innovations(tmp_path, values)["C5"].text
    expected = acorr_ljungbox(values, lags=[10])["lb_pvalue"].iloc[0]
    assert f"Ljung-Box p = {expected:.3g} " in text
    assert f"Mean NIS {np.mean(values**2):.3f} " in text
    assert f"[{chi2.ppf(0.025, 200) / 200:.3f}, {chi2.ppf(0.975, 200) / 200:.3f}]" in text


@pytest.mark.parametrize("freedom", [1, 2, 10, 199, 5000, 300_000])
def test_chi_square_functions(freedom: int) -> None:
    spread = math.sqrt(2 * freedom)
    for x in (1e-3, 0.5 * freedom, freedom - spread, freedom, freedom + 2 * spread, 3.0 * freedom + 50):
        assert chi_square_cdf(x, freedom) == pytest.approx(chi2.cdf(x, freedom), rel=1e-9, abs=1e-12)
    for p in (0.025, 0.5, 0.975):
        assert chi_square_quantile(p, freedom) == pytest.approx(chi2.ppf(p, freedom), rel=1e-9)
    assert chi_square_cdf(0.0, freedom) == 0.0


def test_rollbacks_beyond_the_budget_fail(folder: Path, tmp_path: Path) -> None:
    def run(count: int, *, recover_after: int) -> Run:
        simulator = Simulator()
        simulator.advance(40)
        for index in range(count):
            simulator.roll_back()
            simulator.step += 1
            simulator.add(mode=Mode.RECOVERING)
            if index + 1 == recover_after:
                simulator.step += 1
                simulator.add(mode=Mode.WATCHING, orders=Orders(release=True))
        return simulator.run

    assert check(run(4, recover_after=9), folder)["C6"].status == HOLDS
    report = check(run(5, recover_after=9), tmp_path / "beyond")
    assert report["C6"].status == FAILED
    assert len(report["C6"].steps) == 1
    assert check(run(8, recover_after=4), tmp_path / "recovered")["C6"].status == HOLDS


def test_a_halt_counts_once(folder: Path) -> None:
    simulator = simulate()
    for _ in range(5):
        simulator.step += 1
        simulator.add(mode=Mode.HALTED, level=Level.CONFIRMED, action=Action.HALT)
    report = check(simulator.run, folder)
    assert "halts: 1." in report["C6"].text
    assert "interventions: 3," in report["C3-reuse"].text


# --- chain and head ---------------------------------------------------------------------------------------------------


def small_run() -> Run:
    simulator = Simulator()
    simulator.advance(8)
    simulator.roll_back()
    simulator.certify(1, 0.0, examples=3)
    return simulator.run


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(st.data())
def test_any_flipped_bit_of_any_row_is_found(tmp_path: Path, data: st.DataObject) -> None:
    original = tmp_path / "original"
    if not original.exists():
        small_run().write(original)
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    shutil.copy(original / "journal.sqlite", folder)
    connection = sqlite3.connect(folder / "journal.sqlite", isolation_level=None)
    connection.text_factory = bytes
    count = connection.execute("SELECT count(*) FROM records").fetchone()[0]
    seq = data.draw(st.integers(1, count))
    column = data.draw(st.sampled_from(["seq", "kind", "step", "body", "blob", "digest"]))
    query = f"SELECT {column}, typeof({column}) FROM records WHERE seq = ?"
    value, storage = connection.execute(query, (seq,)).fetchone()
    if storage == b"integer":
        bit = data.draw(st.integers(0, 62))
        try:
            connection.execute(f"UPDATE records SET {column} = ? WHERE seq = ?", (value ^ (1 << bit), seq))
        except sqlite3.IntegrityError:
            assume(False)
    else:
        assume(len(value))
        flipped = bytearray(value)
        bit = data.draw(st.integers(0, 8 * len(value) - 1))
        flipped[bit // 8] ^= 1 << bit % 8
        cast = "CAST(? AS TEXT)" if storage == b"text" else "?"
        connection.execute(f"UPDATE records SET {column} = {cast} WHERE seq = ?", (bytes(flipped), seq))
    connection.close()
    report = verify(folder)
    assert report["chain"].status == FAILED
    assert report.exit_code == 1
    assert report.records < count


def test_a_value_of_another_storage_class_is_found(folder: Path) -> None:
    small_run().write(folder)
    connection = sqlite3.connect(folder / "journal.sqlite", isolation_level=None)
    connection.execute("UPDATE records SET body = CAST(body AS BLOB) WHERE seq = 1")
    connection.close()
    assert verify(folder)["chain"].status == FAILED


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM records WHERE seq = 5",
        "DELETE FROM records WHERE seq = 1",
        "UPDATE records SET seq = seq + 1 WHERE seq > 100 OR kind = 'close'",
        "INSERT INTO records SELECT seq + 1000, kind, step, body, blob, digest FROM records WHERE seq = 4",
        "UPDATE records SET digest = zeroblob(32) WHERE kind = 'close'",
        "UPDATE records SET digest = NULL || 'x' WHERE 0",
    ],
)
def test_removed_moved_and_inserted_rows_are_found(folder: Path, statement: str) -> None:
    small_run().write(folder)
    connection = sqlite3.connect(folder / "journal.sqlite", isolation_level=None)
    changed = connection.execute(statement).rowcount
    connection.close()
    assert verify(folder)["chain"].status == (FAILED if changed else HOLDS)


def test_claims_speak_only_of_what_precedes_the_break(folder: Path) -> None:
    run = simulate().run
    run.probes()[60].data["y_best"] += 1.0
    run.write(folder)
    connection = sqlite3.connect(folder / "journal.sqlite", isolation_level=None)
    connection.execute("UPDATE records SET step = 0 WHERE seq = 100")
    connection.close()
    report = verify(folder)
    assert report["C1"].status == HOLDS
    assert report.records == 99
    assert "99 records before the break" in report["run"].text


def test_a_cut_tail_shows_only_against_a_published_head(folder: Path) -> None:
    journal = small_run().write(folder)
    head = journal.head
    connection = sqlite3.connect(folder / "journal.sqlite", isolation_level=None)
    connection.execute("DELETE FROM records WHERE seq > 9")
    connection.close()
    alone = verify(folder)
    assert (alone["chain"].status, alone["run"].status) == (HOLDS, INCOMPLETE)
    report = verify(folder, head)
    assert report["head"].status == FAILED
    assert report.exit_code == 1


def test_a_rewritten_journal_is_caught_by_the_head(folder: Path, tmp_path: Path) -> None:
    head = small_run().write(folder).head
    assert verify(folder, head.upper())["head"].status == HOLDS
    lie = small_run()
    lie.steps()[2].data["of no concern"] = 1.0
    lie.write(tmp_path / "lie")
    assert verify(tmp_path / "lie")["chain"].status == HOLDS
    assert verify(tmp_path / "lie", head)["head"].status == FAILED


def test_a_head_published_in_mid_run_is_found_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal = small_run().write(folder, close=False)
    journal.seal(folder / "head.txt")
    with JournalWriter.resume(folder) as resumed:
        resumed.record("note", 9, {"text": "goes on"})
    assert "record 13 of 15" in verify(folder, journal.head)["head"].text
    assert main([str(folder), "--head", str(folder / "head.txt")]) == 0
    assert main([str(folder), "--head", "ab" * 32]) == 1
    assert main([str(folder), "--head", str(folder / "nothing")]) == 2
    capsys.readouterr()


# --- files ------------------------------------------------------------------------------------------------------------


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    def refuse(match: str) -> None:
        with pytest.raises(UnreadableJournalError, match=match):
            verify(tmp_path)

    file = tmp_path / "journal.sqlite"
    refuse("no journal at")
    file.write_text("not a database, and long enough for SQLite to look at it\n" * 100)
    refuse("not a journal")
    file.unlink()
    connection = sqlite3.connect(file)
    connection.execute("CREATE TABLE records (seq)")
    connection.commit()
    refuse("another program")
    connection.close()
    file.unlink()
    JournalWriter(tmp_path).close()
    refuse("no record yet")
    file.unlink()
    run = small_run()
    run.write(tmp_path)
    connection = sqlite3.connect(file, isolation_level=None)
    connection.execute("PRAGMA user_version = 2")
    connection.close()
    refuse("newer kalmanguard")
    file.unlink()
    run.header["format"] = 2
    run.write(tmp_path)
    refuse("no header of format 1")
    file.unlink()
    run.header |= {"format": 1, "settings": {}}
    run.write(tmp_path)
    refuse("lacks the setting")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damage_to_the_file_never_passes_for_another_run(tmp_path: Path, data: st.DataObject) -> None:
    original = tmp_path / "original"
    if not original.exists():
        small_run().write(original)
    honest = verify(original)
    damaged = bytearray((original / "journal.sqlite").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    (folder / "journal.sqlite").write_bytes(damaged)
    try:
        report = verify(folder, honest.head)
    except UnreadableJournalError:
        return
    assert report.exit_code == 1 or dataclasses.replace(report, path=honest.path).head == honest.head


def test_a_live_journal_can_be_verified(folder: Path) -> None:
    run = small_run()
    journal = JournalWriter(folder)
    journal.write_header(run.header)
    for count, entry in enumerate(run.steps(), start=2):
        assert entry.measurement is not None
        assert entry.decision is not None
        values = tuple(entry.data[name] for name in NAMES)
        journal.step(entry.measurement, dataclasses.replace(entry.decision, statistics=values))
        journal.flush()
        report = verify(folder)
        assert report.records == count
        assert report["run"].status == INCOMPLETE
        assert report["chain"].status == HOLDS
    journal.close()


WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_verify import simulate, NAMES
from kalmanguard.journal import JournalWriter
import dataclasses
run = simulate().run
journal = JournalWriter(sys.argv[1])
journal.write_header(run.header)
print("go", flush=True)
while True:
    for entry in run.steps():
        values = tuple(entry.data[name] for name in NAMES)
        journal.step(entry.measurement, dataclasses.replace(entry.decision, statistics=values))
"""


def test_a_killed_run_verifies_to_its_last_record(folder: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder), str(Path(__file__).parent)], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"go\n"
    while True:
        with JournalReader(folder) as reader:
            if len(reader) > 200:
                break
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    report = verify(folder)
    assert report.records > 200
    assert report["chain"].status == HOLDS
    assert report["run"].status == INCOMPLETE


BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "kalmanguard", "pydantic", "scipy"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Block())
"""


def test_a_copy_of_the_file_stands_alone(folder: Path, tmp_path: Path) -> None:
    """Copied away, with torch and the whole package impossible to import."""
    head = simulate().run.write(folder).head
    source = Path(sys.modules[verify.__module__].__file__ or "")
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(source, alone / "verify.py")
    (alone / "sitecustomize.py").write_text(BLOCKED)
    done = subprocess.run(
        [sys.executable, str(alone / "verify.py"), str(folder), "--head", head, "--json"],
        capture_output=True, text=True, timeout=60, check=False, cwd=alone,
        env={**os.environ, "PYTHONPATH": str(alone)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["head"] == head
    assert {claim["status"] for claim in report["claims"]} <= {HOLDS, VACUOUS, NOT_CLAIMED}
    blocked = subprocess.run(
        [sys.executable, "-c", "import kalmanguard"], capture_output=True, text=True, timeout=60, check=False,
        cwd=alone, env={**os.environ, "PYTHONPATH": str(alone)},
    )  # fmt: skip
    assert "kalmanguard is blocked" in blocked.stderr
