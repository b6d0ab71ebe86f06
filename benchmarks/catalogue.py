"""The whole catalogue of faults on every plant: is every harmful one seen, and how soon?"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from scipy.stats import binomtest

from benchmarks.benchmark import Benchmark, Result
from benchmarks.flight import Flight, give_back
from benchmarks.markdown import counts, table
from benchmarks.plants import fault_step
from benchmarks.pool import fly_all
from benchmarks.recovery import HARM

RECIPES = ("mlp", "mlp, SGD", "cnn", "chartransformer", "resnet", "vit", "unet", "rnn", "gan", "cartpole")
#: Fault in the injector's notation, and whether it strikes all at once.
FAULTS = (
    ("nan_gradient@{}", True),
    ("inf_gradient@{}", True),
    ("gradient_scale:1000@{}", True),
    ("lr_spike:50@{}:steps=5", True),
    ("garbage_batch@{}", True),
    ("bit_flip@{}", True),
    ("moments_zeroed@{}", True),
    ("moments_reset@{}", True),
    ("weight_scale:3@{}", True),
    ("batchnorm_poison:50@{}", True),
    ("lr_creep@{}", False),
    ("label_noise:1.0@{}:steps=none", False),
)
#: Plants that a fault does not apply to: no second moment, no BatchNorm, no labels.
_WITHOUT = {
    "moments_zeroed": ("mlp, SGD", "resnet"),
    "moments_reset": ("mlp, SGD",),
    "batchnorm_poison": tuple(name for name in RECIPES if name not in ("cnn", "resnet")),
    "label_noise": ("unet", "rnn", "gan", "cartpole"),
    "garbage_batch": ("cartpole",),
}
_AFTER = 100


class Catalogue(Benchmark):
    """Detection of every kind of fault on every plant."""

    name = "catalogue"
    summary = "every fault of the catalogue on every plant: which harmful ones are seen, and when"

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--recipes", nargs="+", default=list(RECIPES), metavar="NAME", help="what is trained")

    def run(self, options: argparse.Namespace) -> Result:
        seeds = range(options.seeds or (1 if options.quick else 3))
        recipes = ["mlp"] if options.quick else options.recipes
        cases = list(_cases(recipes, seeds, quick=options.quick))
        flights = [flight for case in cases for flight in case["flights"].values()]
        flown = fly_all(flights, processes=options.processes, cache=options.cache)
        return {"cases": [_judge(case, flown) for case in cases]}

    def markdown(self, result: Result) -> str:
        cases = result["cases"]
        harmful = [case for case in cases if case["harm_at"] is not None]
        seen = [case for case in harmful if case["seen"] is not None]
        interval = binomtest(len(seen), len(harmful)).proportion_ci(0.95, method="exact") if harmful else None
        lines = [
            f"{len(cases)} damaged runs of {len({case['recipe'] for case in cases})} plants, {len(harmful)} of them "
            f"harmful: within {_AFTER} steps, and without a guard, more than 20 % of the progress is given back or a "
            "parameter is not finite. *Seen*: suspected, vetoed or undone; *delay*: steps from the first harm to that, "
            "negative where it came first, median / worst; *early*: events before the fault, all runs together."
        ]
        groups: dict[str, list[Result]] = defaultdict(list)
        for case in cases:
            groups[case["fault"].split("@")[0]].append(case)
        rows = [[fault, *_row(group)] for fault, group in groups.items()]
        by_plant: dict[str, list[Result]] = defaultdict(list)
        for case in cases:
            by_plant[case["recipe"]].append(case)
        rows += [[f"**{recipe}**", *_row(group)] for recipe, group in by_plant.items()]
        lines.append(table(["fault, or plant", "runs", "harmful", "seen", "delay", "undone or vetoed", "early"], rows))
        if interval is not None:
            sudden = [_delay(case) for case in harmful if case["sudden"]]
            lines.append(
                f"Seen: {len(seen)} of {len(harmful)} ({100 * interval.low:.1f} to {100 * interval.high:.1f} %, exact "
                f"binomial, 95 %). Sudden faults, median / worst delay: {counts(sudden)}."
            )
        missed = [case for case in harmful if case["seen"] is None]
        lines += [f"Missed: {case['recipe']}, seed {case['seed']}, {case['fault']} at {case['at']}." for case in missed]
        return "\n\n".join(lines)


def _cases(recipes: Iterable[str], seeds: Iterable[int], *, quick: bool) -> Iterable[dict[str, Any]]:
    for recipe in recipes:
        for seed in seeds:
            at = fault_step(recipe, seed)
            for notation, sudden in FAULTS[: 4 if quick else None]:
                if recipe in _WITHOUT.get(notation.split("@")[0].split(":")[0], ()):
                    continue
                # The first harm of a sudden fault is asked for to the step.
                truth = (0, *range(20, at - 1, 20), *range(at - 1, at + 13), *range(at + 13, at + _AFTER + 1, 3))
                yield {
                    "recipe": recipe,
                    "seed": seed,
                    "at": at,
                    "fault": notation,
                    "sudden": sudden,
                    "flights": {
                        guard: Flight(
                            recipe=recipe,
                            seed=seed,
                            steps=at + _AFTER,
                            guard=guard,
                            faults=(notation.format(at),),
                            place=100 * seed,
                            truth=truth if guard == "none" else (),
                        )
                        for guard in ("none", "kalmanguard")
                    },
                }


def _judge(case: dict[str, Any], flown: dict[str, Result]) -> Result:
    bare, run = (flown[case["flights"][guard].key] for guard in ("none", "kalmanguard"))
    at = case["at"]
    events = [event for event in run["events"] if event["step"] >= at]
    judged: Result = {key: case[key] for key in ("recipe", "seed", "at", "fault", "sudden")}
    return judged | {
        "harm_at": next((t for t, _ in bare["truth"] if t >= at and give_back(bare["truth"], t) > HARM), None),
        "seen": next((event["step"] for event in events), None),
        "acted": next((event["step"] for event in events if event["kind"] != "suspicion"), None),
        "early": len(run["events"]) - len(events),
        "words": [f"{e['step']}: {e['kind']}: {e['text']}" for e in events[:4]],
    }


def _row(group: list[Result]) -> list[object]:
    harmful = [case for case in group if case["harm_at"] is not None]
    return [
        len(group),
        len(harmful),
        sum(case["seen"] is not None for case in harmful),
        counts([_delay(case) for case in harmful]),
        sum(case["acted"] is not None for case in harmful),
        sum(case["early"] for case in group),
    ]


def _delay(case: Result) -> float:
    return math.inf if case["seen"] is None else float(case["seen"] - case["harm_at"])
