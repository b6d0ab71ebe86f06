"""Runs for the dashboard's tests: journals written row by row, and a writer in a process of its own."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np

from kalmanguard.engine import STATISTICS
from kalmanguard.journal import JournalWriter
from kalmanguard.records import Action, Decision, Evidence, Guarantee, Level, Measurement, Mode, ProbeReading
from kalmanguard.settings import Settings

HEADER = {
    "format": 1,
    "settings": Settings().model_dump(mode="json"),
    "statistics": list(STATISTICS),
    "certificate": {"alpha": 0.05, "delta": 0.05, "clip": 4.0, "lambda_rule": "x", "c": 0.5, "kinds": 4},
    "probe": {"n": 16, "digest": "00"},
    "model": {"type": "Net", "parameters": 10, "trainable": 10},
}


def loss_of(step: int) -> float:
    """A loss that falls, with a spike at every step that 997 divides."""
    return 1.0 + 3.0 / step + (50.0 if step % 997 == 0 else 0.0)


def step_of(step: int, rng: np.random.Generator, *, sketch: int = 8) -> tuple[Measurement, Decision]:
    """An uneventful step; every tenth with a probe."""
    values = dict.fromkeys(STATISTICS, float("nan"))
    values |= {"z_loss": float(rng.normal()), "drift_m": 1.0, "drift_alarm": 0.0, "drift_reset": 0.0, "drift_x": 0.0}
    probe = None
    if step % 10 == 0:
        y = 1.0 + 3.0 / step
        probe = ProbeReading(np.full(16, y))
        values |= {"y": y, "predicted": y, "scale": 0.1, "bound": y + 0.5, "y_best": y - 0.01, "y0": 4.0}
    m = Measurement(
        step=step, loss=loss_of(step), learning_rates=(1e-3,), gradient_norm=0.5, velocity=rng.normal(size=sketch),
        probe=probe,
    )  # fmt: skip
    text = f"Step {step} accepted: no innovation beyond its bound."
    accept = Action.ACCEPT
    decision = Decision(
        step, accept, accept, Level.NOMINAL, Mode.WATCHING, text, statistics=tuple(values[name] for name in STATISTICS)
    )
    return m, decision


def suspicion(step: int, message: str) -> tuple[Measurement, Decision]:
    """A step that is suspicious, with a finding of a sensor on top."""
    said = Evidence("loss", 9.0, True, Guarantee.HEURISTIC, message, 1e-9)
    found = Evidence("Forensics.saturation", 0.7, True, Guarantee.HEURISTIC, f"layers.2: {message}")
    m = Measurement(step=step, loss=2.0, learning_rates=(1e-3,), findings=(found,))
    decision = Decision(
        step, Action.ACCEPT, Action.ACCEPT, Level.SUSPECT, Mode.WATCHING, f"Step {step}: {message}", evidence=(said,)
    )
    return m, decision


def write(folder: Path, steps: int, *, close: bool = True) -> JournalWriter:
    """Write a run."""
    journal = JournalWriter(folder)
    journal.write_header(HEADER)
    rng = np.random.default_rng(0)
    for step in range(1, steps + 1):
        journal.step(*step_of(step, rng))
    journal.flush()
    if close:
        journal.close()
    return journal


def main(folder: str, steps: str, pause_s: str) -> None:
    """Write a run, a row at a time; print every step once it is committed."""
    rng = np.random.default_rng(0)
    with JournalWriter(folder) as journal:
        journal.write_header(HEADER)
        for step in range(1, int(steps) + 1):
            journal.step(*(suspicion(step, "it looks odd") if step % 50 == 0 else step_of(step, rng)))
            journal.flush()
            print(step, flush=True)
            time.sleep(float(pause_s))


if __name__ == "__main__":
    main(*sys.argv[1:])
