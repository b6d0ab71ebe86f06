"""Many runs over a few processes, with those that depend on nothing of ours kept from one time to the next."""

from __future__ import annotations

import json
import multiprocessing
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.benchmark import Result
from benchmarks.flight import Flight, fly


def fly_all(flights: Sequence[Flight], *, processes: int, cache: Path | None = None) -> dict[str, Result]:
    """Run all of them and return the results by `Flight.key`.

    Parameters
    ----------
    flights
        What to run; equal ones run once.
    processes
        Number of worker processes; one torch thread each.
    cache
        File of JSON lines with results of runs without kalmanguard, which are read from there and added to it.
    """
    wanted = {flight.key: flight for flight in flights}
    found: dict[str, Result] = {}
    if cache is not None and cache.exists():
        for line in cache.read_text(encoding="utf-8").splitlines():
            key, result = json.loads(line)
            if key in wanted:
                found[key] = result
    todo = [flight for key, flight in wanted.items() if key not in found]
    # The longest first, so that no process is left alone with one at the end.
    todo.sort(key=lambda f: -f.steps * (30 if "transformer" in f.recipe else 4 if "cnn" in f.recipe else 1))
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes) as pool:
        for count, (key, result) in enumerate(pool.imap_unordered(_keyed, todo), start=1):
            found[key] = result
            if cache is not None and wanted[key].guard != "kalmanguard":
                with cache.open("a", encoding="utf-8") as file:
                    file.write(json.dumps([key, result]) + "\n")
            if sys.stderr.isatty():
                print(f"\r{count} of {len(todo)} runs", end="\n" if count == len(todo) else "", file=sys.stderr)
    return found


def _keyed(flight: Flight) -> tuple[str, Result]:
    return flight.key, fly(flight)
