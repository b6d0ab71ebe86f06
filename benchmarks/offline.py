"""Offline analysis: rows a second of reading and judging, and memory against the length of a log."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.benchmark import Benchmark, Result
from benchmarks.markdown import number, table
from kalmanguard import Engine, Settings
from kalmanguard.analysis import Trajectory

ROWS = 100_000
#: Lengths of the logs that are streamed, each by a process of its own.
LENGTHS = (100_000, 1_000_000, 10_000_000)
#: Rows of the longest log that are judged; reading it to the end takes minutes already.
_STREAM = r"""
import json, re, sys, time
from itertools import islice
from kalmanguard.analysis import Judge, Trajectory
from kalmanguard import Settings
started, judging = time.perf_counter(), Judge(Settings(mode="observe"), stand_in=True)
rows = 0
for m in Trajectory.stream(sys.argv[1]).measurements():
    rows += 1
    if rows <= 200_000:
        judging.take(m)
# Not getrusage: its peak is inherited from the process that started this one.
peak = int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1])
print(json.dumps([rows, judging.result().rows, peak, time.perf_counter() - started]))
"""


class Offline(Benchmark):
    """What reading, judging and streaming cost."""

    name = "offline"
    summary = "offline analysis: rows a second of reading and judging, memory against the length of a log"

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--rows", type=int, default=ROWS, help="rows of the logs that are read and judged")

    def run(self, options: argparse.Namespace) -> Result:
        rows = min(options.rows, 5_000) if options.quick else options.rows
        with tempfile.TemporaryDirectory() as folder:
            trajectory = _made(rows)
            files = {
                "CSV": trajectory.to_csv(Path(folder) / "log.csv"),
                "JSON lines": trajectory.to_jsonl(Path(folder) / "log.jsonl"),
            }
            measured = {
                f"read {name}": _rate(lambda path=path: len(Trajectory.load(path))) for name, path in files.items()
            }
            judged = _made(min(rows, 20_000))
            measured["engine alone"] = _rate(lambda: _engine(judged))
            measured["judge"] = _rate(lambda: judged.judge().rows)
            streamed = [_streamed(Path(folder), length) for length in (LENGTHS[:1] if options.quick else LENGTHS)]
        return {"rows": rows, "rates": measured, "streamed": streamed}

    def markdown(self, result: Result) -> str:
        rates = [
            [name, f"{median(found):,.0f}", f"{min(found):,.0f} to {max(found):,.0f}"]
            for name, found in result["rates"].items()
        ]
        streams = [
            [
                f"{run['rows']:,}",
                f"{run['bytes'] / 1e6:,.0f} MB",
                f"{run['peak_kb'] / 1e3:,.0f} MB",
                f"{number(run['seconds'], 3)} s",
            ]
            for run in result["streamed"]
        ]
        return "\n\n".join([
            f"A log of {result['rows']:,} rows with step, training loss, gradient norm and a held-out loss at every "
            "50th row; rows a second of processor time, median and range of five.",
            table(["", "rows a second", "range"], rates),
            "The same streamed from a CSV file by a process of its own, the first 200,000 rows judged, all read: peak "
            "memory of the process (that of the interpreter with its libraries included).",
            table(["rows", "file", "peak memory", "time"], streams),
        ])  # fmt: skip


def _made(rows: int) -> Trajectory:
    rng, n = np.random.default_rng(0), np.arange(rows)
    loss = 2.0 + 2.0 * np.exp(-n / 5_000) + 0.05 * rng.normal(size=rows)
    held_out = n[::50] + 1, (loss[::50] + 0.02).copy()
    return Trajectory.from_arrays(n + 1, loss=loss, gradient_norm=np.exp(0.2 * rng.normal(size=rows)), probe=held_out)


def _engine(trajectory: Trajectory) -> int:
    engine = Engine(Settings(mode="observe"))
    state = engine.init()
    for m in trajectory.measurements():
        state, _ = engine.step(state, m)
    return len(trajectory)


def _rate(work: Callable[[], int]) -> list[float]:
    found = []
    for _ in range(5):
        started = time.process_time()
        rows = work()
        found.append(rows / (time.process_time() - started))
    return found


def _streamed(folder: Path, rows: int) -> Result:
    path = folder / f"{rows}.csv"
    rng = np.random.default_rng(1)
    with open(path, "w", encoding="utf-8") as file:
        file.write("step,loss,grad_norm\n")
        for start in range(0, rows, 100_000):
            noise = rng.normal(size=(min(100_000, rows - start), 2))
            file.writelines(
                f"{start + i + 1},{2.0 + 0.05 * a:.6f},{1.0 + 0.1 * b:.6f}\n" for i, (a, b) in enumerate(noise.tolist())
            )
    done = subprocess.run(
        [sys.executable, "-c", _STREAM, str(path)], capture_output=True, text=True, check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    count, judged, peak, seconds = json.loads(done.stdout)
    size = path.stat().st_size
    path.unlink()
    return {"rows": count, "judged": judged, "bytes": size, "peak_kb": peak, "seconds": seconds}
