"""The published experiment again: gradients 300 times too large for ten steps, under the paper's rule and others."""

from __future__ import annotations

import argparse
import math
from typing import Any

from benchmarks.benchmark import Benchmark, Result
from benchmarks.flight import Flight
from benchmarks.guards import available
from benchmarks.markdown import counts, spread, table
from benchmarks.plants import REPLICA
from benchmarks.pool import fly_all
from benchmarks.replica_plant import FAULT, STEPS, WINDOW

GUARDS = ("none", "clipping", "ZClip", "Or", "Or, aliased", "Or, eps 0.1", "Or, eps 0.1, aliased", "kalmanguard")


class Replica(Benchmark):
    """One fault, many seeds, every guard."""

    name = "replica"
    summary = "the published experiment: peaks after the fault, end loss beside the clean twin, livelock"

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--guards", nargs="+", choices=available(), default=list(GUARDS), metavar="NAME")

    def run(self, options: argparse.Namespace) -> Result:
        seeds = range(options.seeds or (1 if options.quick else 20))
        guards = ["none", "kalmanguard"] if options.quick else list(dict.fromkeys(["none", *options.guards]))
        flights = {(guard, True, seed): _flight(guard, seed, faulty=True) for guard in guards for seed in seeds}
        flights |= {("none", False, seed): _flight("none", seed, faulty=False) for seed in seeds}
        flown = fly_all(list(flights.values()), processes=options.processes, cache=options.cache)
        runs = {key: flown[flight.key] for key, flight in flights.items()}
        return {
            "guards": guards,
            "cases": [
                _judge(guard, seed, runs[guard, True, seed], runs["none", False, seed])
                for guard in guards
                for seed in seeds
            ],
            "curves": [
                {"guard": guard, "faulty": faulty, "truth": _present(runs[guard, faulty, 0])}
                for guard, faulty, seed in runs
                if seed == 0
            ],
        }

    def markdown(self, result: Result) -> str:
        rows: list[list[object]] = []
        for guard in result["guards"]:
            cases = [case for case in result["cases"] if case["guard"] == guard]
            rows.append(
                [
                    "no guard" if guard == "none" else guard,
                    len(cases),
                    spread([case["peak_inside"] for case in cases]),
                    spread([case["peak_after"] for case in cases]),
                    counts([case["peak_at"] for case in cases]),
                    sum(case["peaked"] for case in cases),
                    spread([case["end_over_clean"] for case in cases]),
                    counts([case["in_a_row"] for case in cases]),
                    sum(case["livelocked"] for case in cases),
                    sum(case["early"] for case in cases),
                ]
            )
        start, stop = WINDOW
        return "\n\n".join(
            [
                f"Gradients 300 times too large in steps {start} to {stop - 1} of {STEPS}. True loss on examples that "
                "no guard sees. *Peak in the window*, *after*: its largest value there, and from step "
                f"{stop + 5} on, over the lowest before the fault; *peaked*: runs in which the latter exceeds 1.1. "
                "*End / clean*: at the end, over the bare clean twin's. *In a row*: the longest unbroken series of "
                "rejected steps (vetoes, rollbacks); *livelocked*: runs that end in one longer than 50; *early*: "
                "rejections before the fault, all runs together. Median / worst.",
                table(
                    [
                        *("guard", "runs", "peak in the window", "peak after", "at step", "peaked", "end / clean"),
                        *("in a row", "livelocked", "early"),
                    ],
                    rows,
                ),
            ]
        )


def _flight(guard: str, seed: int, *, faulty: bool) -> Flight:
    truth = (0, *range(30, 110, 10), *range(110, 200, 2), *range(200, STEPS + 1, 5))
    return Flight(
        recipe=REPLICA, seed=seed, steps=STEPS, guard=guard, faults=(FAULT,) if faulty else (), place=seed, truth=truth
    )


def _present(run: Result) -> list[list[Any]]:
    """The true loss of the state that training goes on from, at the measured steps."""
    judged = dict(map(tuple, run["truth_judged"]))
    return [[t, judged.get(t, y)] for t, y in run["truth"]]


def _judge(guard: str, seed: int, run: Result, bare: Result) -> Result:
    losses = {t: math.inf if y is None else y for t, y in _present(run)}
    lowest = min(y for t, y in losses.items() if t < WINDOW[0])
    inside = [y / lowest for t, y in losses.items() if WINDOW[0] <= t < WINDOW[1] + 5]
    after = {t: y / lowest for t, y in losses.items() if t >= WINDOW[1] + 5}
    peak = max(after.values(), default=math.inf)
    rejected = sorted({e["step"] for e in run["events"] if e["kind"] in ("veto", "rollback")})
    series = _series(rejected)
    return {
        "guard": guard,
        "seed": seed,
        "peak_inside": _finite(max(inside)),
        "peak_after": _finite(peak),
        "peak_at": max(after, key=lambda t: after[t]) if after else None,
        "peaked": peak > 1.1,
        "end_over_clean": None if run["truth_end"] is None else run["truth_end"] / bare["truth_end"],
        "early": sum(step < WINDOW[0] for step in rejected),
        "rejected": len(rejected),
        "in_a_row": max((stop - start + 1 for start, stop in series), default=0),
        "livelocked": bool(series) and series[-1][1] == STEPS and series[-1][1] - series[-1][0] >= 50,
        "mode": run.get("mode"),
        "words": [f"{e['step']}: {e['kind']}: {e['text']}" for e in run["events"][:20]],
    }


def _series(steps: list[int]) -> list[tuple[int, int]]:
    """First and last step of every unbroken series."""
    found: list[tuple[int, int]] = []
    for step in steps:
        if found and found[-1][1] == step - 1:
            found[-1] = found[-1][0], step
        else:
            found.append((step, step))
    return found


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
