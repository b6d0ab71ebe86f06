"""Rough but healthy runs: every alarm is a false one, unless the bare run shows harm there as well."""

from __future__ import annotations

import argparse
import math
from collections import defaultdict

from scipy.stats import binomtest

from benchmarks.benchmark import Benchmark, Result
from benchmarks.flight import Flight, give_back
from benchmarks.guards import available, missing
from benchmarks.markdown import number, spread, table
from benchmarks.pool import fly_all
from benchmarks.recovery import HARM

LONG = (
    *("mlp", "mlp, batch 8", "mlp, batch 2", "mlp, SGD", "mlp, SGD momentum 0.9", "mlp, warm restarts"),
    *("mlp, warm-up cosine", "cnn"),
)
SHORT = ("chartransformer", "resnet", "vit", "unet", "rnn", "gan", "cartpole")
_LONG_STEPS, _SHORT_STEPS = 3_000, 400
#: Guards that run unless others are asked for.
USUAL = ("kalmanguard", "z-score", "ARC")
KINDS = ("suspicion", "veto", "rollback", "halt")


class Healthy(Benchmark):
    """Runs without any fault, supervised and bare."""

    name = "healthy"
    summary = "rough but healthy runs: false suspicions, vetoes and rollbacks with binomial intervals"

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--recipes", nargs="+", default=[*LONG, *SHORT], metavar="NAME", help="what is trained")
        usual = [guard for guard in USUAL if guard not in missing()]
        parser.add_argument("--guards", nargs="+", choices=available(), default=usual, metavar="NAME")

    def run(self, options: argparse.Namespace) -> Result:
        seeds = range(options.seeds or (1 if options.quick else 3))
        recipes = ["mlp", "mlp, SGD"] if options.quick else options.recipes
        guards = list(dict.fromkeys(["none", "kalmanguard", *options.guards]))
        flights = [_flight(recipe, seed, guard) for recipe in recipes for seed in seeds for guard in guards]
        flown = fly_all(flights, processes=options.processes, cache=options.cache)
        bare = {(f.recipe, f.seed): flown[f.key] for f in flights if f.guard == "none"}
        return {
            "missing": missing(),
            "guards": guards[1:],
            "runs": [
                _judge(flight, flown[flight.key], bare[flight.recipe, flight.seed])
                for flight in flights
                if flight.guard != "none"
            ],
        }

    def markdown(self, result: Result) -> str:
        groups: dict[tuple[str, str], list[Result]] = defaultdict(list)
        for run in result["runs"]:
            groups[run["guard"], run["recipe"]].append(run)
        rows = []
        for (guard, recipe), runs in groups.items():
            if guard == "kalmanguard":
                counts = [sum(run[kind] for run in runs) for kind in KINDS]
                touched = sum(run["rates_touched"] for run in runs)
                cells: list[object] = [recipe, f"{len(runs)} x {runs[0]['steps']:,}", *counts[:2]]
                cells += [sum(run["clips"] for run in runs), *counts[2:], sum(run["false"] for run in runs), touched]
                cells += [f"{sum(run['ratio'] == 1.0 for run in runs)} of {len(runs)}"]
                cells += [spread([r["ratio"] for r in runs]), spread([r["most_given_back"] for r in runs], 2)]
                rows.append(cells)
        parts = [
            "Nobody has damaged any of these runs. *False*: rollbacks and halts that undo a state which gives back no "
            f"more than {100 * HARM:.0f} % of the progress on examples that no guard sees, by the same definition of "
            "harm as elsewhere on this page; the others undo spikes that the run has by itself. *Learning rate "
            "touched*: steps whose rate differed from the bare run's; *same end*: runs whose final held-out loss is "
            "the bare run's to the last bit; *final*: over the bare run's, median / worst; *given back*: largest share "
            "of the progress on examples that no guard sees, at every 10th step, median / worst run.",
            table(
                [
                    *("kalmanguard on", "runs x steps", "suspicions", "vetoes", "clips", "rollbacks", "halts"),
                    *("false", "learning rate touched", "same end", "final", "given back"),
                ],
                rows,
            ),
            "False alarms per 1,000 steps, all runs together, with the exact 95 % interval (Clopper-Pearson):",
            table(
                [
                    *("guard", "steps", "any event", "suspicions", "vetoes", "rollbacks and halts", "of them false"),
                    "final / bare",
                ],
                [_rates(guard, result) for guard in result["guards"]],
            ),
        ]
        parts += [sentence for name, sentence in result["missing"].items() if name in USUAL]
        return "\n\n".join(parts)


def _flight(recipe: str, seed: int, guard: str) -> Flight:
    steps = _LONG_STEPS if recipe in LONG else _SHORT_STEPS
    truth = (0, *range(30, steps + 1, 10))
    return Flight(recipe=recipe, seed=seed, steps=steps, guard=guard, rates=True, truth=truth, undone=guard != "none")


def _judge(flight: Flight, run: Result, bare: Result) -> Result:
    kinds = [event["kind"] for event in run["events"]]
    shares = [give_back(run["truth"], t) for t, _ in run["truth"]]
    most = max(shares)
    rates = list(zip(run["rates"], bare["rates"], strict=False))
    return {
        "recipe": flight.recipe,
        "seed": flight.seed,
        "guard": flight.guard,
        "steps": run["ended"],
        **{kind: kinds.count(kind) for kind in KINDS},
        "alarmed_steps": len({event["step"] for event in run["events"]}),
        "clips": run["clips"],
        "false": sum(_undone(run, event["step"]) <= HARM for event in run["events"] if event["kind"] in KINDS[2:]),
        "undone": [_undone(run, step) for step, _ in run["truth_undone"]],
        "lost": run["lost"],
        "rates_touched": sum(one != other for one, other in rates) + len(bare["rates"]) - len(run["rates"]),
        "ratio": None if run["final"] is None else run["final"] / bare["final"],
        "most_given_back": most if math.isfinite(most) else None,
        "bare_most_given_back": max(give_back(bare["truth"], t) for t, _ in bare["truth"]),
        "probe_every": run.get("probe_every"),
        "words": [f"{e['step']}: {e['kind']}: {e['text']}" for e in run["events"][:20]],
    }


def _undone(run: Result, step: int) -> float:
    """Share of the progress that the state which was undone at a step had lost; 0 where nothing was undone."""
    found = [entry for entry in run["truth_undone"] if entry[0] == step]
    return give_back([*(entry for entry in run["truth"] if entry[0] < step), *found], step) if found else 0.0


def _rates(guard: str, result: Result) -> list[object]:
    runs = [run for run in result["runs"] if run["guard"] == guard]
    steps = sum(run["steps"] for run in runs)
    counts = [
        sum(run["alarmed_steps"] for run in runs),
        sum(run["suspicion"] for run in runs),
        sum(run["veto"] for run in runs),
        sum(run["rollback"] + run["halt"] for run in runs),
        sum(run["false"] for run in runs),
    ]
    return [guard, f"{steps:,}", *(_rate(count, steps) for count in counts), spread([run["ratio"] for run in runs])]


def _rate(count: int, steps: int) -> str:
    interval = binomtest(count, steps).proportion_ci(0.95, method="exact")
    low, high = (number(1_000 * bound, 2) for bound in (interval.low, interval.high))
    return f"{count}: {number(1_000 * count / steps, 2)} ({low} to {high})"
