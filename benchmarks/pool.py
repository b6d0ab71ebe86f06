"""Many runs over a few processes, kept from one time to the next."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import sys
from collections.abc import Sequence
from pathlib import Path

import kalmanguard
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
        File of JSON lines with results, which are read from there and added to it as runs end, so that an
        interrupted benchmark goes on where it stopped. Runs with kalmanguard are reused only while its sources are
        the same; remove the file after a change to plants or guards.
    """
    wanted = {flight.key: flight for flight in flights}
    found: dict[str, Result] = {}
    own = _sources() if cache is not None else ""
    if cache is not None and cache.exists():
        for line in cache.read_text(encoding="utf-8").splitlines():
            key, result, *sources = json.loads(line)
            if key in wanted and sources in ([], [""], [own]):
                found[key] = result
    todo = [flight for key, flight in wanted.items() if key not in found]
    # The longest first, so that no process is left alone with one at the end.
    todo.sort(key=lambda f: -f.steps * (30 if "transformer" in f.recipe else 4 if "cnn" in f.recipe else 1))
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes) as pool:
        for count, (key, result) in enumerate(pool.imap_unordered(_keyed, todo), start=1):
            found[key] = result
            if cache is not None:
                with cache.open("a", encoding="utf-8") as file:
                    sources = own if wanted[key].guard.startswith("kalmanguard") else ""
                    file.write(json.dumps([key, result, sources]) + "\n")
            if sys.stderr.isatty():
                print(f"\r{count} of {len(todo)} runs", end="\n" if count == len(todo) else "", file=sys.stderr)
    return found


def _sources() -> str:
    """Digest of kalmanguard's sources, on which its runs depend."""
    digest = hashlib.sha256()
    for file in sorted(Path(kalmanguard.__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _keyed(flight: Flight) -> tuple[str, Result]:
    return flight.key, fly(flight)
