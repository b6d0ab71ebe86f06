"""Ablation: what every detector is worth, by taking it away, and what those that are off would add."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from typing import Any

from benchmarks.benchmark import Benchmark, Result
from benchmarks.flight import Flight, give_back
from benchmarks.guards.own import variants
from benchmarks.harm import lost_steps
from benchmarks.markdown import number, table
from benchmarks.plants import fault_step
from benchmarks.pool import fly_all
from benchmarks.recovery import HARM

RECIPES = ("mlp", "mlp, SGD", "cnn")
_STEPS = 400
#: Fault in the injector's notation, and whether it is over after a few steps.
FAULTS = (
    ("nan_gradient@{}", True),
    ("lr_spike:50@{}:steps=5", True),
    ("lr_spike:10@{}:steps=5", True),
    ("gradient_scale:1000@{}", True),
    ("gradient_scale:8@{}", True),
    ("garbage_batch@{}", True),
    ("bit_flip@{}", True),
    ("moments_zeroed@{}", True),
    ("weight_scale:1.5@{}", True),
    ("batchnorm_poison:50@{}", True),
    ("lr_creep@{}", False),
    ("lr_spike:10@{}:steps=none", False),
    ("label_noise:0.3@{}:steps=none", False),
    ("label_noise:1.0@{}:steps=none", False),
)
_PROMPT = 2


class Ablation(Benchmark):
    """The same faults with one detector less, or one more."""

    name = "ablation"
    summary = "what every detector is worth: the same faults without it, and those that are off switched on"

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--recipes", nargs="+", default=list(RECIPES), metavar="NAME", help="what is trained")
        parser.add_argument("--only", nargs="+", metavar="NAME", help="variants, such as 'without loss'")

    def run(self, options: argparse.Namespace) -> Result:
        seeds = range(options.seeds or (1 if options.quick else 2))
        recipes = ["mlp"] if options.quick else options.recipes
        names = list(variants())
        if options.only or options.quick:
            names = ["all", *(options.only or ["probes alone"])]
        cases = list(_cases(recipes, seeds, names, quick=options.quick))
        flights = [flight for case in cases for flight in case["flights"].values()]
        flown = fly_all(flights, processes=options.processes, cache=options.cache)
        return {"variants": names, "cases": [_judge(case, flown) for case in cases]}

    def markdown(self, result: Result) -> str:
        faults = [case for case in result["cases"] if case["fault"] is not None]
        harmful = [case for case in faults if case["harm_at"] is not None]
        clean = [case for case in result["cases"] if case["fault"] is None]
        rows = []
        for name in result["variants"]:
            delays = [_delay(case, name) for case in harmful]
            loss = math.fsum(case["runs"][name]["harm"] for case in harmful)
            bare = math.fsum(case["runs"]["none"]["harm"] for case in harmful)
            steps = sum(case["steps"] for case in clean)
            alarms = [sum(case["runs"][name][kind] for case in clean) for kind in ("suspicions", "deeds")]
            rows.append(
                [
                    name,
                    f"{sum(d <= _PROMPT for d in delays)} of {len(delays)}",
                    sum(math.isinf(d) for d in delays),
                    number(sorted(delays)[len(delays) // 2]) if delays else "",
                    f"{100 * loss / bare:.1f} %" if bare else "",
                    number(max((case["runs"][name]["harm"] for case in harmful), default=0.0)),
                    number(1000 * alarms[0] / steps),
                    alarms[1],
                ]
            )
        head = [
            "variant",
            "seen in time",
            "never seen",
            "delay",
            "harm left",
            "most",
            "false suspicions",
            "false deeds",
        ]
        return "\n\n".join(
            [
                f"{len(faults)} damaged runs, {len(harmful)} of them harmful without a guard (more than 20 % of the "
                "progress is given back at some step). *Seen in time*: suspected at most two steps after the first "
                "harm; *delay*: steps from the first harm to the first suspicion, median; *harm left*: steps of "
                "progress lost against the clean twin, summed over the harmful runs, over those without a guard; "
                "*most*: of one run, in steps; *false suspicions* per 1,000 steps and *false deeds* (vetoes, clips, "
                "rollbacks, halts) in "
                f"{sum(case['steps'] for case in clean):,} steps of undamaged runs.",
                table(head, rows),
            ]
        )


def _cases(recipes: Iterable[str], seeds: Iterable[int], names: list[str], *, quick: bool) -> Iterable[dict[str, Any]]:
    for recipe in recipes:
        for seed in seeds:
            at = fault_step(recipe, seed)
            for notation, transient in (*FAULTS[: 3 if quick else None], (None, True)):
                if notation is not None and (
                    (notation.startswith("moments") and "SGD" in recipe)
                    or (notation.startswith("batchnorm") and not recipe.startswith("cnn"))
                ):
                    continue
                truth = (
                    0,
                    *range(20, at - 4, 10),
                    *range(at - 4, min(at + 40, _STEPS), 2),
                    *range(at + 40, _STEPS, 10),
                )
                yield {
                    "recipe": recipe,
                    "seed": seed,
                    "at": at,
                    "fault": notation,
                    "transient": transient,
                    "flights": {
                        name: Flight(
                            recipe=recipe,
                            seed=seed,
                            steps=_STEPS,
                            guard=name if name in ("none", "clean") else f"kalmanguard: {name}",
                            faults=() if notation is None else (notation.format(at),),
                            place=100 * seed,
                            truth=truth,
                        )
                        for name in ("none", *names)
                    }
                    | {"clean": Flight(recipe=recipe, seed=seed, steps=_STEPS, truth=truth)},
                }


def _judge(case: dict[str, Any], flown: dict[str, Result]) -> Result:
    runs = {name: flown[flight.key] for name, flight in case["flights"].items()}
    at = case["at"] if case["fault"] is not None else 1
    harm = next((t for t, _ in runs["none"]["truth"] if t >= at and give_back(runs["none"]["truth"], t) > HARM), None)
    judged: Result = {key: case[key] for key in ("recipe", "seed", "at", "fault", "transient")}
    judged |= {"harm_at": harm, "steps": _STEPS, "runs": {}}
    for name, run in runs.items():
        if name == "clean":
            continue
        events = [event for event in run["events"] if event["step"] >= at]
        judged["runs"][name] = {
            "seen": next((event["step"] for event in events), None),
            "harm": lost_steps(run, runs["clean"], since=at),
            "suspicions": sum(event["kind"] == "suspicion" for event in events),
            "deeds": sum(event["kind"] != "suspicion" for event in events) + run["clips"],
        }
    return judged


def _delay(case: Result, name: str) -> float:
    seen = case["runs"][name]["seen"]
    return math.inf if seen is None else float(seen - case["harm_at"])
