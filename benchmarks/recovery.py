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
from benchmarks.guards import available, missing
from benchmarks.harm import lost_steps
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
#: Guards whose figures are given fault by fault; the others are in the table of scores alone.
DETAILED = ["none", "kalmanguard", "z-score", "clipping", "ARC"]
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
        parser.add_argument("--guards", nargs="+", choices=available(), metavar="NAME", help="guards to compare")

    def run(self, options: argparse.Namespace) -> Result:
        seeds = range(options.seeds or (1 if options.quick else 3))
        recipes = ["mlp"] if options.quick else options.recipes
        chosen = options.guards or (DETAILED if options.quick else [g for g in available() if "eps" not in g])
        guards = list(dict.fromkeys(["none", "kalmanguard", *(g for g in chosen if g not in missing())]))
        cases = list(_cases(recipes, seeds, options.steps, guards))
        flights = [flight for case in cases for flight in case["flights"].values()]
        nulls = {(r, s): _nulls(r, s, options.steps) for r in recipes for s in seeds}
        flights += [flight for group in nulls.values() for flight in group]
        flights += [_unharmed(r, s, options.steps, guard) for r in recipes for s in seeds for guard in guards]
        flown = fly_all(flights, processes=options.processes, cache=options.cache)
        return {
            "missing": missing(),
            "guards": guards,
            "cases": [_judge(case, flown) for case in cases],
            "clean": [_judge_clean(recipe, seed, guards, options.steps, flown) for recipe in recipes for seed in seeds],
            "nulls": [
                {"recipe": r, "seed": s, "ratios": [_ratio(flown[f.key], flown[_clean(f).key]) for f in group]}
                for (r, s), group in nulls.items()
            ],
        }

    def markdown(self, result: Result) -> str:
        parts = [*result["missing"].values(), _SCORE_LEGEND, _scores(result)]
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
                                truth=_truth_steps(at, steps),
                            )
                            for guard in guards
                        }
                        | {
                            # Clipping changes the recipe, so it is held against a clean run that clips as well.
                            "clean": _unharmed(recipe, seed, steps, "none"),
                            "clean, clipping": _unharmed(recipe, seed, steps, "clipping"),
                        },
                    }


def _truth_steps(at: int, steps: int) -> tuple[int, ...]:
    # At every step around the fault, where the first harm is asked for to the step; it costs as much as training.
    near, soon = range(at - 3, at + 20), range(at + 20, min(at + 60, steps), 4)
    return (0, *range(30, at - 3, 20), *near, *soon, *range(at + 60, steps + 1, 10))


def _nulls(recipe: str, seed: int, steps: int) -> list[Flight]:
    others = np.random.default_rng([77, seed]).integers(*_SWINGS, _NULLS - 1).tolist()
    return [Flight(recipe=recipe, seed=seed, steps=steps, skip=at) for at in (fault_step(recipe, seed), *others)]


def _clean(flight: Flight) -> Flight:
    return _unharmed(flight.recipe, flight.seed, flight.steps, "none")


def _unharmed(recipe: str, seed: int, steps: int, guard: str) -> Flight:
    truth = _truth_steps(fault_step(recipe, seed), steps)
    return Flight(recipe=recipe, seed=seed, steps=steps, guard=guard, truth=truth)


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
        twin_clean = results["clean, clipping" if guard == "clipping" else "clean"]
        judged["guards"][guard] = {
            "lost_steps": lost_steps(run, twin_clean, since=at),
            "ratio": _ratio(run, twin_clean),
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


def _judge_clean(recipe: str, seed: int, guards: list[str], steps: int, flown: dict[str, Result]) -> Result:
    runs = {guard: flown[_unharmed(recipe, seed, steps, guard).key] for guard in guards}
    bare = runs["none"]
    return {
        "recipe": recipe,
        "seed": seed,
        "guards": {
            guard: {
                "steps": run["ended"],
                "alarms": len({event["step"] for event in run["events"]}),
                "deeds": len({e["step"] for e in run["events"] if e["kind"] != "suspicion"}) + run["clips"],
                "cpu_ratio": run["step_cpu_s"] / bare["step_cpu_s"],
                "ratio": _ratio(run, bare),
            }
            for guard, run in runs.items()
        },
    }


_SCORE_LEGEND = (
    "All faults together. *Harm*: the true loss in excess of the clean twin's, as a share of the progress that the "
    "twin has made, summed from the fault to the end of the run: steps' worth of an untrained model; of all runs, "
    "relative to doing nothing. At most all progress counts in a step; a halted run keeps the state that it left. "
    "*Worse than nothing*: runs with more harm than without a guard, by one step's worth at least. *Unseen*: "
    "harmful runs seen later than two steps after the first harm, or never; *nothing done*: harmful runs without a "
    "deed. *False alarms*, *false deeds* (vetoes, clips, rollbacks, halts): steps per 1,000 of clean runs. *Cost*: "
    "processor time of a step over the bare run's in clean runs, median (least to most), other programs disturbing."
)


def _scores(result: Result) -> str:
    cases = result["cases"]
    harmful = [case for case in cases if case["harm_at"] is not None]
    nothing = math.fsum(case["guards"]["none"]["lost_steps"] for case in cases)
    rows: list[list[object]] = []
    for guard in result["guards"]:
        own = [case["guards"][guard] for case in cases]
        harm = math.fsum(run["lost_steps"] for run in own)
        worse = sum(case["guards"][guard]["lost_steps"] > case["guards"]["none"]["lost_steps"] + 1 for case in cases)
        clean = [run["guards"][guard] for run in result["clean"]]
        steps = sum(run["steps"] for run in clean)
        idle = [_delay(case, guard, "acted") == math.inf and not case["guards"][guard]["clips"] for case in harmful]
        costs = sorted(run["cpu_ratio"] for run in clean)
        rows.append(
            [
                "no guard" if guard == "none" else guard,
                number(harm),
                f"{100 * harm / nothing:.1f} %" if nothing else "–",
                worse,
                sum(_delay(case, guard, "suspected") > 2 for case in harmful),
                sum(idle),
                *(number(1_000 * sum(run[key] for run in clean) / steps, 2) for key in ("alarms", "deeds")),
                f"{number(costs[len(costs) // 2])} ({number(costs[0])} to {number(costs[-1])})",
            ]
        )
    head = ["guard", "harm", "of doing nothing", "worse than nothing", "unseen", "nothing done", "false alarms"]
    return table([*head, "false deeds", "cost"], rows)


def _detailed(result: Result, *left_out: str) -> list[str]:
    return [guard for guard in result["guards"] if guard in DETAILED and guard not in left_out]


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
    guards = _detailed(result)
    for recipe in dict.fromkeys(recipe for recipe, _ in groups):
        nulls = [ratio for null in result["nulls"] if null["recipe"] == recipe for ratio in null["ratios"]]
        rows.append([f"**{recipe}**, null", len(nulls), "", spread(nulls), *[""] * (len(guards) - 1)])
        for (owner, fault), cases in groups.items():
            if owner == recipe:
                harmful = sum(case["harm_at"] is not None for case in cases)
                ratios = [spread(_of(cases, guard, lambda _, run: run["ratio"])) for guard in guards]
                rows.append([f"{recipe}, {fault}", len(cases), harmful, *ratios])
    everything = [spread(_of(result["cases"], g, lambda _, run: run["ratio"])) for g in guards]
    harmful = sum(case["harm_at"] is not None for case in result["cases"])
    rows.append(["**all faults**", len(result["cases"]), harmful, *everything])
    return table(["plant, fault", "runs", "harmful", *_names(guards)], rows)


def _names(guards: list[str]) -> list[str]:
    return ["no guard" if guard == "none" else guard for guard in guards]


def _delays(result: Result) -> str:
    guards = _detailed(result, "none", "clipping")
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
    guards = _detailed(result, "none", "clipping")
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
    for guard in _detailed(result, "none", "clipping"):
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
