"""Transient faults: how soon they are seen, what they cost, and how well the run ends beside its undisturbed twin."""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from benchmarks.benchmark import Benchmark, Result
from benchmarks.flight import Flight, give_back
from benchmarks.guards.peers import arc_version
from benchmarks.markdown import counts, number, spread, table
from benchmarks.plants import fault_step
from benchmarks.pool import fly_all

RECIPES = ("mlp", "cnn", "chartransformer")
STEPS = 400
#: Fault in the injector's notation, its name in the tables, how many places it strikes, and the only recipe it fits.
FAULTS = (
    ("nan_gradient@{}", "NaN gradient", 1, None),
    ("lr_spike:50@{}:steps=5", "learning rate x50, 5 steps", 1, None),
    ("gradient_scale:1000@{}", "gradient x1000", 1, None),
    ("garbage_batch@{}", "garbage batch", 1, None),
    ("bit_flip@{}", "bit flip in an exponent", 4, None),
    ("moments_zeroed@{}", "second moment zeroed", 1, None),
    ("weight_scale:1.5@{}", "weights x1.5", 1, None),
    ("batchnorm_poison:50@{}", "BatchNorm statistics x50", 1, "cnn"),
)
#: Share of the progress whose loss counts as harm.
HARM = 0.2
_NULLS = 4
_SWINGS = (150, 260)


class Recovery(Benchmark):
    """Every fault on every plant, under every guard."""

    name = "recovery"
    summary = "transient faults: final loss beside the clean twin, detection delay, steps lost"

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--recipes", nargs="+", default=list(RECIPES), metavar="NAME", help="what is trained")
        parser.add_argument("--steps", type=int, default=STEPS, help="length of a run")

    def run(self, options: argparse.Namespace) -> Result:
        seeds = range(options.seeds or (1 if options.quick else 3))
        recipes = ["mlp"] if options.quick else options.recipes
        guards = ["none", "kalmanguard", "z-score", "clipping"]
        version = arc_version()
        if version is not None:
            guards.append("ARC")
        cases = list(_cases(recipes, seeds, options.steps, guards))
        flights = [flight for case in cases for flight in case["flights"].values()]
        nulls = {(r, s): _nulls(r, s, options.steps) for r in recipes for s in seeds}
        flights += [flight for group in nulls.values() for flight in group]
        flown = fly_all(flights, processes=options.processes, cache=options.cache)
        return {
            "arc": version,
            "guards": guards,
            "cases": [_judge(case, flown) for case in cases],
            "nulls": [
                {"recipe": r, "seed": s, "ratios": [_ratio(flown[f.key], flown[_clean(f).key]) for f in group]}
                for (r, s), group in nulls.items()
            ],
        }

    def markdown(self, result: Result) -> str:
        parts = []
        if result["arc"] is None:
            parts.append("The peer ARC is not installed, so it is not in the tables.")
        parts.append(
            "Final held-out loss over that of the clean twin, median / worst. *Harmful*: without a guard, the true "
            "loss gives back more than 20 % of the progress at some step. *Null*: nothing is wrong, but one random "
            "batch is skipped."
        )
        parts.append(_outcomes(result))
        parts.append(
            "Steps from the first harm of the unguarded twin to the first suspicion and to the first deed (veto, "
            "clip or rollback); negative: before any harm was done. Harmful cases only, median / worst."
        )
        parts.append(_delays(result))
        parts.append("What the guards did. *Lost*: updates that were applied and then undone, median / most.")
        parts.append(_deeds(result))
        parts.append(_verdict(result))
        return "\n\n".join(parts)


# --- flights ----------------------------------------------------------------------------------------------------------


def _cases(recipes: Iterable[str], seeds: Iterable[int], steps: int, guards: list[str]) -> Iterable[dict[str, Any]]:
    for recipe in recipes:
        for seed in seeds:
            at = fault_step(recipe, seed)
            for notation, name, places, only in FAULTS:
                if only is not None and not recipe.startswith(only):
                    continue
                if notation.startswith("moments") and "SGD" in recipe:
                    continue  # it keeps no second moment
                for place in range(places):
                    yield {
                        "recipe": recipe,
                        "seed": seed,
                        "at": at,
                        "fault": name,
                        "place": place,
                        "flights": {
                            guard: Flight(
                                recipe=recipe,
                                seed=seed,
                                steps=steps,
                                guard=guard,
                                faults=(notation.format(at),),
                                place=100 * seed + place,
                                truth=_truth_steps(at, steps) if guard == "none" else (),
                            )
                            for guard in guards
                        }
                        | {
                            # Clipping changes the recipe, so it is held against a clean run that clips as well.
                            "clean": Flight(recipe=recipe, seed=seed, steps=steps),
                            "clean, clipping": Flight(recipe=recipe, seed=seed, steps=steps, guard="clipping"),
                        },
                    }


def _truth_steps(at: int, steps: int) -> tuple[int, ...]:
    return (0, *range(30, at - 10, 10), *range(at - 10, min(at + 60, steps)), *range(at + 60, steps + 1, 10))


def _nulls(recipe: str, seed: int, steps: int) -> list[Flight]:
    others = np.random.default_rng([77, seed]).integers(*_SWINGS, _NULLS - 1).tolist()
    return [Flight(recipe=recipe, seed=seed, steps=steps, skip=at) for at in (fault_step(recipe, seed), *others)]


def _clean(flight: Flight) -> Flight:
    return Flight(recipe=flight.recipe, seed=flight.seed, steps=flight.steps)


# --- what came of them ------------------------------------------------------------------------------------------------


def _ratio(one: Result, other: Result) -> float | None:
    return None if one["final"] is None else one["final"] / other["final"]


def _judge(case: dict[str, Any], flown: dict[str, Result]) -> Result:
    results = {name: flown[flight.key] for name, flight in case["flights"].items()}
    at = case["at"]
    twin = results["none"]
    harm = next((t for t, _ in twin["truth"] if t >= at and give_back(twin["truth"], t) > HARM), None)
    judged: Result = {key: case[key] for key in ("recipe", "seed", "at", "fault", "place")}
    judged |= {"harm_at": harm, "injected": twin["faults"][:1], "clean": results["clean"]["final"], "guards": {}}
    for guard, run in results.items():
        if guard.startswith("clean"):
            continue
        events = run["events"]
        seen = next((e["step"] for e in events if e["step"] >= at), None)
        acted = next((e["step"] for e in events if e["step"] >= at and e["kind"] != "suspicion"), None)
        judged["guards"][guard] = {
            "ratio": _ratio(run, results["clean, clipping" if guard == "clipping" else "clean"]),
            "suspected": seen,
            "acted": acted,
            "early": sum(e["step"] < at for e in events),
            "lost": run["lost"],
            "kinds": [e["kind"] for e in events if e["step"] >= at],
            "clips": run["clips"],
            "ended": run["ended"],
            "mode": run.get("mode"),
            "words": [f"{e['step']}: {e['kind']}: {e['text']}" for e in events[:12]],
        }
    return judged


def _grouped(result: Result) -> dict[tuple[str, str], list[Result]]:
    groups: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for case in result["cases"]:
        groups[case["recipe"], case["fault"]].append(case)
    return groups


def _of(cases: list[Result], guard: str, what: Callable[[Result, Result], Any]) -> list[Any]:
    return [what(case, case["guards"][guard]) for case in cases]


def _outcomes(result: Result) -> str:
    rows: list[list[object]] = []
    groups = _grouped(result)
    for recipe in dict.fromkeys(recipe for recipe, _ in groups):
        nulls = [ratio for null in result["nulls"] if null["recipe"] == recipe for ratio in null["ratios"]]
        rows.append([f"**{recipe}**, null", len(nulls), "", spread(nulls), *[""] * (len(result["guards"]) - 1)])
        for (owner, fault), cases in groups.items():
            if owner == recipe:
                harmful = sum(case["harm_at"] is not None for case in cases)
                ratios = [spread(_of(cases, guard, lambda _, run: run["ratio"])) for guard in result["guards"]]
                rows.append([f"{recipe}, {fault}", len(cases), harmful, *ratios])
    everything = [spread(_of(result["cases"], g, lambda _, run: run["ratio"])) for g in result["guards"]]
    harmful = sum(case["harm_at"] is not None for case in result["cases"])
    rows.append(["**all faults**", len(result["cases"]), harmful, *everything])
    return table(["plant, fault", "runs", "harmful", *_names(result["guards"])], rows)


def _names(guards: list[str]) -> list[str]:
    return ["no guard" if guard == "none" else guard for guard in guards]


def _delays(result: Result) -> str:
    guards = [guard for guard in result["guards"] if guard not in ("none", "clipping")]
    rows = []
    for (recipe, fault), cases in _grouped(result).items():
        harmful = [case for case in cases if case["harm_at"] is not None]
        if harmful:
            cells: list[object] = [f"{recipe}, {fault}", len(harmful)]
            for guard in guards:
                for what in ("suspected", "acted"):
                    delays = [_delay(case, guard, what) for case in harmful]
                    cells.append(counts(delays))
            rows.append(cells)
    head = [f"{guard}: {what}" for guard in guards for what in ("seen", "acted")]
    return table(["plant, fault", "harmful runs", *head], rows)


def _delay(case: Result, guard: str, what: str) -> float:
    at = case["guards"][guard][what]
    return math.inf if at is None else float(at - case["harm_at"])


def _deeds(result: Result) -> str:
    guards = [guard for guard in result["guards"] if guard not in ("none", "clipping")]
    rows = []
    for (recipe, fault), cases in _grouped(result).items():
        cells: list[object] = [f"{recipe}, {fault}"]
        for guard in guards:
            kinds = [kind for case in cases for kind in case["guards"][guard]["kinds"]]
            lost = _of(cases, guard, lambda _, run: run["lost"])
            cells += [f"{kinds.count('veto')}, {kinds.count('rollback')}, {kinds.count('halt')}", counts(lost)]
        rows.append(cells)
    head = [f"{guard}: {what}" for guard in guards for what in ("vetoes, rollbacks, halts", "lost")]
    return table(["plant, fault", *head], rows)


def _verdict(result: Result) -> str:
    cases = result["cases"]
    harmful = [case for case in cases if case["harm_at"] is not None]
    lines = []
    for guard in result["guards"]:
        if guard in ("none", "clipping"):
            continue
        late = [case for case in harmful if _delay(case, guard, "suspected") > 2]
        ignored = [case for case in harmful if _delay(case, guard, "acted") == math.inf]
        needless = [
            case
            for case in cases
            if case["harm_at"] is None and {"rollback", "halt"} & set(case["guards"][guard]["kinds"])
        ]
        early = sum(case["guards"][guard]["early"] for case in cases)
        lines.append(
            f"- {guard}: of {len(harmful)} harmful runs, {len(late)} were seen later than 2 steps after the first "
            f"harm or never, and in {len(ignored)} nothing was done; {len(needless)} of {len(cases) - len(harmful)} "
            f"harmless runs were rolled back; {early} events before any fault."
        )
    worst = max(cases, key=lambda case: _number(case["guards"]["kalmanguard"]["ratio"]))
    lines.append(
        f"- kalmanguard's worst: {worst['recipe']}, {worst['fault']}, seed {worst['seed']}, step {worst['at']}: "
        f"{number(worst['guards']['kalmanguard']['ratio'])}, without a guard "
        f"{number(worst['guards']['none']['ratio'])}."
    )
    return "\n".join(lines)


def _number(value: float | None) -> float:
    return math.inf if value is None else value
