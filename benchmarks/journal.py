"""What the journal costs.

Variants take turns in short rounds on one machine, so that its moods hit all alike. A round's figure is the mean of its
rows, with what SQLite does every so many rows counted in; given are the median and the extremes over the rounds.
"""

from __future__ import annotations

import argparse
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.benchmark import Benchmark, Result
from benchmarks.markdown import number, table
from kalmanguard.certificate.verify import verify
from kalmanguard.journal import JournalReader, JournalWriter
from kalmanguard.journal.codec import pack, unpack
from kalmanguard.records import Action, Decision, Level, Measurement, Mode, ProbeReading
from kalmanguard.settings import Settings

ROUNDS = 30
ROWS = 400  # twice per round and a bit, SQLite folds its log into the file
SKETCH, PROBE, STATISTICS = 64, 128, 23
NAMES = (
    *("y", "predicted", "scale", "level", "y0", "y_best", "bound", "allowance", "allowance_se", "accepted"),
    *("drift_x", "drift_m", "drift_alarm", "drift_reset"),
)


class Journal(Benchmark):
    """Writing, reading and verifying rows."""

    name = "journal"
    summary = "the journal: microseconds to write, read and verify a row"

    def run(self, options: argparse.Namespace) -> Result:
        # On the file system that runs are written to: a temporary one may live in memory.
        with tempfile.TemporaryDirectory(dir=".") as folder:
            return {"figures": measure(Path(folder), 5 if options.quick else ROUNDS)}

    def markdown(self, result: Result) -> str:
        rows = [
            [name, number(statistics.median(values)), number(min(values)), number(max(values))]
            for name, values in result["figures"].items()
        ]
        return table(["microseconds a row", "median", "least", "most"], rows)


def example(step: int, *, probe: bool) -> tuple[Measurement, Decision]:
    """An uneventful step: sketch, learning rate, loss, gradient norm, and a probe every so often."""
    rng = np.random.default_rng(step)
    losses = rng.normal(2.0, 0.5, PROBE)
    values = [np.nan] * STATISTICS
    values[10:14] = [0.0, 1.0, 0.0, 1.0]
    if probe:
        reading = ProbeReading(losses)
        values[:10] = [reading.mean, reading.mean, 0.1, 2.0, 4.0, 2.0, 2.4, 0.4, 0.1, 1.0]
    measurement = Measurement(
        step,
        loss=2.0,
        learning_rates=(1e-3,),
        gradient_norm=1.0,
        velocity=rng.normal(size=SKETCH),
        rounding_floor=1e-7,
        probe=ProbeReading(losses) if probe else None,
    )
    reason = f"Step {step} accepted: no innovation beyond its bound."
    return measurement, Decision(
        step, Action.ACCEPT, Action.ACCEPT, Level.NOMINAL, Mode.WATCHING, reason, statistics=tuple(values)
    )


def header() -> dict[str, object]:
    """A header that the verifier accepts."""
    names = [*NAMES, *(f"further {i}" for i in range(STATISTICS - len(NAMES)))]
    return {"format": 1, "settings": Settings().model_dump(mode="json"), "statistics": names}


def bare_table(file: Path) -> tuple[sqlite3.Connection, Callable[[int, bytes, bytes], object]]:
    """The same rows in the same table without chain or codec: what SQLite itself costs."""
    connection = sqlite3.connect(file, isolation_level=None)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")
    connection.execute("CREATE TABLE records (seq INTEGER PRIMARY KEY, kind, step, body, blob, digest)")
    digest = bytes(32)

    def insert(seq: int, body: bytes, blob: bytes) -> object:
        return connection.execute("INSERT INTO records VALUES (?, 'step', ?, ?, ?, ?)", (seq, seq, body, blob, digest))

    return connection, insert


def measure(folder: Path, rounds: int) -> dict[str, list[float]]:
    """Microseconds per row (or per call), one figure a round."""
    figures: dict[str, list[float]] = {}

    def clock(name: str, work: Callable[[], object], count: int) -> None:
        started = time.perf_counter()
        work()
        figures.setdefault(name, []).append(1e6 * (time.perf_counter() - started) / count)

    plain = [example(step, probe=False) for step in range(1, ROWS + 1)]
    probed = [example(step, probe=True) for step in range(1, ROWS + 1)]
    packed = [pack(*pair) for pair in plain]
    files = {name: JournalWriter(folder / name) for name in ("plain", "probed", "synced")}
    memory = JournalWriter(None)
    for journal in (*files.values(), memory):
        journal.write_header(header())
    connection, insert = bare_table(folder / "bare.sqlite")
    for turn in range(rounds):
        base = turn * ROWS + 1
        clock("pack", lambda: [pack(*pair) for pair in plain], ROWS)
        clock("unpack", lambda: [unpack(*row) for row in packed], ROWS)
        clock("SQLite alone", lambda base=base: [insert(base + i, *row) for i, row in enumerate(packed)], ROWS)
        clock("row", lambda: [files["plain"].step(*pair) for pair in plain], ROWS)
        clock("row with a probe of 128", lambda: [files["probed"].step(*pair) for pair in probed], ROWS)
        clock("row, temporary journal", lambda: [memory.step(*pair) for pair in plain], ROWS)
        clock(
            "row and sync", lambda: [(files["synced"].step(*pair), files["synced"].sync()) for pair in plain[:20]], 20
        )
    connection.close()
    for journal in (*files.values(), memory):
        journal.close()
    for name in ("plain", "probed"):
        total = rounds * ROWS
        for _ in range(3):
            clock(f"verify, {name}", lambda name=name: verify(folder / name), total)
            with JournalReader(folder / name) as reader:
                clock(f"read, {name}", lambda reader=reader: sum(1 for _ in reader.steps()), total)
    return figures
