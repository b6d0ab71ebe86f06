"""What watching costs a run: steps with and without viewers in turn, and how soon a row reaches them.

A writer appends 200 rows a second, as a training loop does; the journal's call is what a step waits for. Rounds without
a dashboard, with one that nobody looks at, and with 20 viewers take turns. Every viewer follows the stream of summaries
and asks for the whole course whenever it changes, as the page does.
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from benchmarks.benchmark import Benchmark, Result
from benchmarks.journal import NAMES, example
from benchmarks.markdown import number, table
from kalmanguard.journal import JournalWriter

VIEWERS, ROWS_PER_S, SECONDS, ROUNDS = 20, 200, 8.0, 5


class DashboardBenchmark(Benchmark):
    """Viewers of a run that is being written."""

    name = "dashboard"
    summary = "the dashboard: what 20 viewers cost a run, and how soon a row reaches them"

    def run(self, options: argparse.Namespace) -> Result:
        rounds, seconds = (1, 3.0) if options.quick else (ROUNDS, SECONDS)
        figures: dict[str, list[dict[str, float]]] = {}
        for _ in range(rounds):
            for name, viewers in (("no dashboard", None), ("no viewer", 0), (f"{VIEWERS} viewers", VIEWERS)):
                figures.setdefault(name, []).append(measure(viewers, seconds))
        return {"figures": figures}

    def markdown(self, result: Result) -> str:
        rows = []
        for name, rounds in result["figures"].items():
            cells = [name]
            for key in ("row_us", "row_99_us", "latency_ms", "latency_99_ms"):
                values = [one[key] for one in rounds if key in one]
                cells.append(number(statistics.median(values)) if values else "–")
            rows.append(cells)
        heads = ["", "row, median us", "row, 99 % us", "to the viewer, median ms", "to the viewer, 99 % ms"]
        return table(heads, rows) + (
            "\n\nMedians over the rounds. *Row*: what the training loop waits for in the journal, of which one row in "
            "sixteen commits. *To the viewer*: from the call that wrote a row to the summary that holds it; a row may "
            "wait up to 80 ms for its commit, and a viewer is told at most every 0.25 s."
        )


def measure(viewers: int | None, seconds: float) -> dict[str, float]:
    """Write for so long, watched by so many viewers; ``None``: there is no dashboard at all."""
    with tempfile.TemporaryDirectory(dir=".") as folder:
        journal = JournalWriter(Path(folder) / "run")
        journal.write_header({"format": 1, "statistics": list(NAMES)})
        server = _Served(Path(folder), viewers) if viewers is not None else None
        written: dict[int, float] = {}
        took = []
        try:
            rows = int(seconds * ROWS_PER_S)
            examples = [example(step, probe=step % 100 == 0) for step in range(1, rows + 1)]
            began = time.perf_counter()
            for step, (measurement, decision) in enumerate(examples, 1):
                time.sleep(max(0.0, began + step / ROWS_PER_S - time.perf_counter()))
                before = time.perf_counter()
                journal.step(measurement, decision)
                written[step] = time.perf_counter()
                took.append(written[step] - before)
            journal.flush()
            time.sleep(1.0)
        finally:
            latencies = server.close(written) if server is not None else []
            journal.abandon()
    found = {"row_us": 1e6 * float(np.median(took)), "row_99_us": 1e6 * float(np.quantile(took, 0.99))}
    if latencies:
        found |= {
            "latency_ms": 1e3 * float(np.median(latencies)),
            "latency_99_ms": 1e3 * float(np.quantile(latencies, 0.99)),
        }
    return found


class _Served:
    """A dashboard in a process of its own, and its viewers as threads."""

    def __init__(self, folder: Path, viewers: int) -> None:
        command = [sys.executable, "-m", "kalmanguard", "dashboard", str(folder), "--port", "0"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self._process.stdout.readline()
        self._port = int(self._process.stdout.readline().rsplit(":", 1)[1].strip().rstrip("/"))
        time.sleep(1.0)
        self._seen: list[tuple[int, float]] = []
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._watch) for _ in range(viewers)]
        for thread in self._threads:
            thread.start()

    def close(self, written: dict[int, float]) -> list[float]:
        """End it; returns for every row and viewer the seconds from its writing to its arrival."""
        self._ended.set()
        self._process.terminate()
        self._process.wait(20)
        for thread in self._threads:
            thread.join(20)
        return [at - written[step] for step, at in self._seen if step in written]

    def _watch(self) -> None:
        asked = http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)
        asked.request("GET", "/api/v1/runs")
        run = f"/api/v1/runs/{json.loads(asked.getresponse().read())['runs'][0]['id']}"
        stream = http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)
        stream.request("GET", f"{run}/stream")
        answer = stream.getresponse()
        last = 0
        while not self._ended.is_set() and (line := answer.readline()):
            if not line.startswith(b"data: "):
                continue
            at, summary = time.perf_counter(), json.loads(line[6:])
            # Every row since the last message has arrived with this one.
            self._seen += [(step, at) for step in range(last + 1, summary["step"] + 1)]
            last = summary["step"]
            asked.request("GET", f"{run}/series?points=500")
            asked.getresponse().read()
