"""Every scenario under every guard: what it comes to by itself, and what a guard makes of it."""

from __future__ import annotations

import argparse
import itertools
import math
from typing import Any

from benchmarks.benchmark import Benchmark, Result
from benchmarks.flight import Flight
from benchmarks.guards import available, missing
from benchmarks.markdown import counts, number, spread, table
from benchmarks.organic import SCENARIOS
from benchmarks.organic.out_of_memory import rehearse
from benchmarks.pool import fly_all

_MEMORY = "out-of-memory"
#: Share of the loss between the start and the best of the bare run that a saved run may lack.
_SLACK = 0.25


class Organic(Benchmark):
    """Instabilities without an injector, and harmless things that look like them."""

    name = "organic"
    summary = "instabilities that training makes by itself, and what only looks like one"

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        names = [*SCENARIOS, _MEMORY]
        parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help="scenarios to run")
        parser.add_argument("--guards", nargs="+", choices=available(), metavar="NAME", help="guards to compare")
        parser.add_argument("--trace", action="store_true", help="list what kalmanguard said and did, run by run")

    def run(self, options: argparse.Namespace) -> Result:
        seeds = range(options.seeds or (1 if options.quick else 5))
        names = [name for name in options.only if name in SCENARIOS]
        if options.quick and len(names) == len(SCENARIOS):
            names = ["dirac-gan", "catapult"]
        guards = options.guards or (["none", "kalmanguard"] if options.quick else available())
        guards = list(dict.fromkeys(["none", "kalmanguard", *guards]))
        flights = {(n, s, g): _flight(n, s, g) for n in names for s in seeds for g in guards}
        flown = fly_all(list(flights.values()), processes=options.processes, cache=options.cache)
        runs = {key: flown[flight.key] for key, flight in flights.items()}
        return {
            "missing": missing(),
            "guards": guards,
            "trace": options.trace,
            "harmful": {name: SCENARIOS[name].harmful for name in names},
            "bare": [_bare(name, seed, runs[name, seed, "none"]) for name in names for seed in seeds],
            "cases": [
                _judge(n, s, g, runs[n, s, g], runs[n, s, "none"])
                for n in names
                for s in seeds
                for g in guards
                if g != "none"
            ],
            "memory": [rehearse(seed) for seed in seeds] if _MEMORY in options.only else [],
        }

    def markdown(self, result: Result) -> str:
        parts = list(result["missing"].values())
        for harmful, title in ((True, "What ends badly by itself."), (False, "What must be left alone.")):
            names = [name for name, harms in result["harmful"].items() if harms is harmful]
            if names:
                parts += [f"**{title}** {_LEGEND[harmful]}", _own(names, result), _side_by_side(names, result)]
        if result["memory"]:
            parts.append(_memory(result["memory"]))
        if result["trace"]:
            parts += [_trace(case) for case in result["cases"] if case["guard"] == "kalmanguard"]
        return "\n\n".join(parts)


_LEGEND = {
    True: (
        "*End / best*: true loss, on examples that no guard sees, at the end over the best of the bare run, below 1 "
        "where a guarded run got further; *seen*, *acted*: steps at which kalmanguard first suspected and first did "
        "something; *mean / bare*: mean true loss of the whole run over that of the bare one (at most the start's "
        "counts); *saved*: the run ends with a finite loss that lacks at most a quarter of the progress of the bare "
        "run's best, or, where the bare run never progresses, that exceeds the start by at most a quarter. Median / "
        "worst over the seeds."
    ),
    False: (
        "*Left alone*: no veto, clip, rollback or halt; *end / bare*: true loss at the end over that of the bare run "
        "(both plus a millionth of the start's). Median / worst over the seeds."
    ),
}


def _flight(name: str, seed: int, guard: str) -> Flight:
    steps = SCENARIOS[name].steps
    return Flight(recipe=name, seed=seed, steps=steps, guard=guard, truth=(0, *range(5, steps + 1, 5)))


def _bare(name: str, seed: int, run: Result) -> Result:
    truth = run["truth"]
    known = [(y, t) for t, y in truth if y is not None]
    best, best_at = min(known)
    gauge = [y for _, y in run["gauge"]]
    return {
        "name": name,
        "seed": seed,
        "start": truth[0][1],
        "best": best,
        "best_at": best_at,
        "worst": max(y for y, _ in known),
        "end": run["truth_end"],
        "lost_at": next((t for t, y in truth if y is None), None),
        "gauged": SCENARIOS[name].make.gauged,  # type: ignore[attr-defined]
        "gauge": [gauge[0], gauge[-1], max((y for y in gauge if y is not None), default=None)] if gauge else [],
    }


def _judge(name: str, seed: int, guard: str, run: Result, bare: Result) -> Result:
    events, steps = run["events"], SCENARIOS[name].steps
    deeds = [e for e in events if e["kind"] != "suspicion"]
    kinds = [e["kind"] for e in events]
    end, start = run["truth_end"], bare["truth"][0][1]
    best = min(y for _, y in bare["truth"] if y is not None)
    allowed = best + _SLACK * (start - best) if best < start else (1 + _SLACK) * start
    tiny = 1e-6 * start
    other = bare["truth_end"]
    return {
        "name": name,
        "seed": seed,
        "guard": guard,
        "seen": events[0]["step"] if events else None,
        "acted": deeds[0]["step"] if deeds else None,
        "clips": run["clips"],
        "vetoes": kinds.count("veto"),
        "rollbacks": kinds.count("rollback"),
        "halted_at": run["ended"] if "halt" in kinds else None,
        "suspicions": kinds.count("suspicion"),
        "end": end,
        "end_over_start": None if end is None else (end + tiny) / (start + tiny),
        "end_over_bare": None if end is None else 0.0 if other is None else (end + tiny) / (other + tiny),
        "end_over_best": None if end is None else (end + tiny) / (best + tiny),
        "area_over_bare": _area(run, steps, start) / _area(bare, steps, start),
        "saved": end is not None and end <= allowed,
        "left_alone": not deeds and not run["clips"],
        "lost": run["lost"],
        "mode": run.get("mode"),
        "warm_at": run.get("warm_at"),
        "probe_every": run.get("probe_every"),
        "errors": run.get("errors"),
        "words": [f"step {e['step']}: {e['level']} {e['kind']}: {e['text']}" for e in _telling(events)],
    }


def _area(run: Result, steps: int, start: float) -> float:
    """Mean over the run of the true loss, that of the end once it has halted; at most the start's counts."""
    judged = dict(map(tuple, run["truth_judged"]))
    losses = [judged.get(t, y) for t, y in run["truth"]]
    losses += [run["truth_end"]] * ((steps - run["truth"][-1][0]) // 5)
    return math.fsum(start if y is None else min(y, start) for y in losses) / len(losses)


def _telling(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All deeds, and the first suspicion of every spell, up to forty of them."""
    kept = [
        event
        for place, event in enumerate(events)
        if event["kind"] != "suspicion" or place == 0 or events[place - 1]["step"] < event["step"] - 1
    ]
    return kept[:40]


def _of(result: Result, name: str, guard: str) -> list[Result]:
    return [case for case in result["cases"] if case["name"] == name and case["guard"] == guard]


def _own(names: list[str], result: Result) -> str:
    rows: list[list[object]] = []
    for name, guard in itertools.product(names, ("kalmanguard", "kalmanguard, dynamics", "kalmanguard, forensics")):
        bare = [one for one in result["bare"] if one["name"] == name]
        cases = _of(result, name, guard)
        if not cases:
            continue
        gauges = [one["gauge"] for one in bare if one["gauge"]]
        grown = f"{bare[0]['gauged']}: {number(gauges[0][0])} to {number(gauges[0][2])}" if gauges else "–"
        deeds = [sum(case[key] for case in cases) for key in ("vetoes", "clips", "rollbacks")]
        halts = sum(case["halted_at"] is not None for case in cases)
        cells: list[object] = [name + guard.removeprefix("kalmanguard"), len(bare), grown]
        if result["harmful"][name]:
            cells += [
                counts([one["best_at"] for one in bare]),
                spread([_ratio(one["end"], one["best"]) for one in bare]),
                counts([case["seen"] for case in cases]),
                counts([case["acted"] for case in cases]),
            ]
        else:
            cells += [
                spread([_ratio(one["worst"], one["start"]) for one in bare]),
                sum(case["suspicions"] for case in cases),
            ]
        cells.append(f"{', '.join(map(str, deeds))}, {halts}")
        if result["harmful"][name]:
            cells += [spread([case["end_over_best"] for case in cases])]
            cells += [spread([case["area_over_bare"] for case in cases])]
            cells += [f"{sum(case['saved'] for case in cases)} of {len(cases)}"]
        else:
            cells += [spread([case["end_over_bare"] for case in cases])]
            cells += [f"{sum(case['left_alone'] for case in cases)} of {len(cases)}"]
        rows.append(cells)
    deeds_head = "vetoes, clips, rollbacks, halts"
    if result["harmful"][names[0]]:
        head = ["best at step", "bare end / best", "seen", "acted", deeds_head, "end / best", "mean / bare", "saved"]
    else:
        head = ["bare largest / start", "suspicions", deeds_head, "end / bare", "left alone"]
    return table(["scenario", "runs", "what grows, seed 0", *head], rows)


def _side_by_side(names: list[str], result: Result) -> str:
    harmful = result["harmful"][names[0]]
    verdict, measure = ("saved", "end_over_best") if harmful else ("left_alone", "end_over_bare")
    rows = []
    for name in names:
        cells: list[object] = [name]
        for guard in result["guards"][1:]:
            cases = _of(result, name, guard)
            cells.append(f"{spread([c[measure] for c in cases])} ({sum(c[verdict] for c in cases)})")
        rows.append(cells)
    what = "end / best of the bare run (runs saved)" if harmful else "end / bare (runs left alone)"
    return f"Side by side: {what}.\n\n" + table(["scenario", *result["guards"][1:]], rows)


def _ratio(one: float | None, other: float) -> float | None:
    return None if one is None else one / other if other else math.inf


def _memory(cases: list[Result]) -> str:
    def all_of(key: str) -> str:
        return f"{sum(bool(case[key]) for case in cases)} of {len(cases)}"

    rows = [
        ["the allocator's own exception reaches the caller", all_of("exception")],
        ["state and count of steps as before", all_of("untouched")],
        ["training goes on with the next batch", all_of("went_on")],
        ["a held state is then restored bit for bit", all_of("restored")],
        ["a run that dies of it can be resumed", all_of("resumed_at")],
        ["the exception carries a sentence that says what to do", all_of("advice")],
    ]
    return "**A memory spike.** One batch asks for more memory than there is.\n\n" + table(["what", "runs"], rows)


def _trace(case: Result) -> str:
    end = f"end / start {number(case['end_over_start'])}, end / best {number(case['end_over_best'])}"
    state = f"mode {case['mode']}, warm at {case['warm_at']}, probe every {case['probe_every']}"
    lines = [f"{case['name']}, seed {case['seed']}: {end}; {state}; saved {case['saved']}"]
    return "\n".join([*lines, *(f"    {word}" for word in case["words"])])
