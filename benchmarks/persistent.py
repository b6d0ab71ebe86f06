"""Faults that stay: wrong labels and a creeping learning rate, from one step on and for good."""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from typing import Any

from benchmarks.benchmark import Benchmark, Result
from benchmarks.flight import Flight, give_back
from benchmarks.guards.peers import arc_version
from benchmarks.markdown import counts, spread, table
from benchmarks.plants import fault_step
from benchmarks.pool import fly_all

RECIPES = ("mlp", "cnn", "chartransformer")
STEPS = 800
FAULTS = (
    ("label_noise:1.0@{}", "all labels wrong"),
    ("label_noise:0.3@{}", "30 % of the labels wrong"),
    ("lr_creep:1.03@{}", "learning rate x1.03 per step"),
)


class Persistent(Benchmark):
    """Every persistent fault on every plant, supervised, bare and under the peer."""

    name = "persistent"
    summary = "lasting faults: when they are suspected and confirmed, what is given back, how the run ends"

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--recipes", nargs="+", default=list(RECIPES), metavar="NAME", help="what is trained")
        parser.add_argument("--steps", type=int, default=STEPS, help="length of a run")

    def run(self, options: argparse.Namespace) -> Result:
        seeds = range(options.seeds or (1 if options.quick else 3))
        recipes = ["mlp"] if options.quick else options.recipes
        version = arc_version()
        guards = ["none", "kalmanguard", *(["ARC"] if version is not None else [])]
        flights = [
            (name, _flight(recipe, seed, options.steps, notation, guard))
            for recipe in recipes
            for seed in seeds
            for notation, name in FAULTS
            for guard in guards
        ]
        flown = fly_all([flight for _, flight in flights], processes=options.processes, cache=options.cache)
        return {
            "arc": version,
            "guards": guards,
            "cases": [{"fault": name, **_judge(flight, flown[flight.key])} for name, flight in flights],
        }

    def markdown(self, result: Result) -> str:
        groups: dict[tuple[str, str], dict[str, list[Result]]] = defaultdict(lambda: defaultdict(list))
        for case in result["cases"]:
            groups[case["recipe"], case["fault"]][case["guard"]].append(case)
        own = [[f"{recipe}, {fault}", *_own(runs["kalmanguard"])] for (recipe, fault), runs in groups.items()]
        parts = [
            "Steps after the beginning of the fault, median / most; *confirmed*: the first veto, rollback or halt; "
            "*given back*: share of the progress (on examples that no guard sees) that is lost when it comes; "
            "*final / best*: held-out loss at the end over the least before the fault, which is measured every ten "
            "steps and in the last one, both of the same run; *last / best*: the same for that last one, which is what "
            "stopping in time would have given. A run ends after 800 steps, or halted.",
            table(
                [
                    *("plant, fault", "suspected", "confirmed", "given back", "largest ever"),
                    *("vetoes", "rollbacks", "ended", "last / best", "final / best"),
                ],
                own,
            ),
        ]
        others = [guard for guard in result["guards"] if guard != "kalmanguard"]
        rows = []
        for (recipe, fault), runs in groups.items():
            cells: list[object] = [f"{recipe}, {fault}", spread([c["final_over_best"] for c in runs["kalmanguard"]])]
            for guard in others:
                cells.append(spread([c["final_over_best"] for c in runs[guard]]))
                if guard != "none":
                    cells.append(counts([c["confirmed"] for c in runs[guard]]))
            rows.append(cells)
        head = ["plant, fault", "kalmanguard: final / best"]
        for guard in others:
            head += ["no guard"] if guard == "none" else [f"{guard}: final / best", f"{guard}: confirmed"]
        parts.append(table(head, rows))
        if result["arc"] is None:
            parts.append("The peer ARC is not installed, so it is not in the tables.")
        return "\n\n".join(parts)


def _flight(recipe: str, seed: int, steps: int, notation: str, guard: str) -> Flight:
    at = fault_step(recipe, seed)
    return Flight(
        recipe=recipe,
        seed=seed,
        steps=steps,
        guard=guard,
        faults=(notation.format(at),),
        place=seed,
        # Not before step 30: the supervisor measures what a step costs, and looking takes time.
        truth=(0, *range(30, at, 10), *range(at, min(at + 200, steps + 1)), *range(at + 200, steps + 1, 5)),
        held_out=(*range(30, at - 1, 10), at - 1),
    )


def _judge(flight: Flight, run: Result) -> dict[str, Any]:
    at = fault_step(flight.recipe, flight.seed)
    events = [e for e in run["events"] if e["step"] >= at]
    seen = next((e["step"] for e in events), None)
    deed = next((e["step"] for e in events if e["kind"] in ("veto", "rollback", "halt")), None)
    before = [y for t, y in run["held_out"] if y is not None and t < at]
    best = min(before)
    shares = {t: give_back(run["truth"], t) for t, _ in run["truth"] if t >= at}
    kinds = [e["kind"] for e in events]
    return {
        "recipe": flight.recipe,
        "seed": flight.seed,
        "guard": flight.guard,
        "at": at,
        "suspected": None if seen is None else seen - at,
        "confirmed": None if deed is None else deed - at,
        "given_back": None if deed is None else _finite(shares.get(deed, math.inf)),
        "most_given_back": _finite(max(shares.values())),
        "early": len(run["events"]) - len(events),
        "vetoes": kinds.count("veto"),
        "rollbacks": kinds.count("rollback"),
        "halted": "halt" in kinds,
        "mode": run.get("mode"),
        "ended": run["ended"] - at,
        "last_over_best": before[-1] / best,
        "final_over_best": None if run["final"] is None else run["final"] / best,
        "words": [f"{e['step']}: {e['kind']}: {e['text']}" for e in events if e["kind"] != "suspicion"][:20],
    }


def _own(cases: list[Result]) -> list[object]:
    endings = [f"{c['mode'].lower()}" + (f" after {c['ended']}" if c["halted"] else "") for c in cases]
    return [
        counts([c["suspected"] for c in cases]),
        counts([c["confirmed"] for c in cases]),
        spread([c["given_back"] for c in cases], 2),
        spread([c["most_given_back"] for c in cases], 2),
        counts([c["vetoes"] for c in cases]),
        counts([c["rollbacks"] for c in cases]),
        ", ".join(endings),
        spread([c["last_over_best"] for c in cases]),
        spread([c["final_over_best"] for c in cases]),
    ]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
