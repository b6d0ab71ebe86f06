"""Is the probe better predicted by the path travelled or by the number of steps?"""

from __future__ import annotations

import argparse
import math
import multiprocessing
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from benchmarks.benchmark import Benchmark, Result
from benchmarks.markdown import number, table
from benchmarks.plants import make_plant
from kalmanguard.detectors.paired import paired_standard_error
from kalmanguard.estimators.probe import ProbeFilter, ProbeState
from kalmanguard.estimators.trajectory import TrajectoryFilter, TrajectoryState
from kalmanguard.sensors.probe import Probe
from kalmanguard.sensors.sketch import Sketch

RECIPES = tuple(
    plant + schedule for plant in ("mlp", "chartransformer") for schedule in ("", ", warm-up cosine", ", warm restarts")
)
STEPS = {"mlp": 800, "chartransformer": 400}
SPACINGS = (1, 5, 20, 60)
_AFTER = 50
_PROBED = 128


class ProbeClock(Benchmark):
    """The probe filter under two clocks, on the same recorded runs."""

    name = "probe_clock"
    summary = "the probe predicted by path travelled or by steps: innovations and log score"

    def run(self, options: argparse.Namespace) -> Result:
        seeds = range(options.seeds or (1 if options.quick else 3))
        recipes = [r for r in RECIPES if r.startswith("mlp")] if options.quick else RECIPES
        todo = [(recipe, seed) for recipe in reversed(recipes) for seed in seeds]
        with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
            flown = dict(zip(todo, pool.starmap(record, todo, chunksize=1), strict=True))
        return {
            "steps": STEPS,
            "rows": [
                {"recipe": recipe, "spacing": spacing, **compare([flown[recipe, seed] for seed in seeds], spacing)}
                for recipe in recipes
                for spacing in SPACINGS
            ],
        }

    def markdown(self, result: Result) -> str:
        rows = []
        for row in result["rows"]:
            by_path, by_steps, same = row["path"], row["steps"], row["last"]
            rows.append([
                f"{row['recipe']}, every {row['spacing']}", row["probes"],
                f"{number(by_path[0])}", f"{number(by_steps[0])}", f"{number(same)}",
                _signed(100 * (by_path[0] / by_steps[0] - 1)), f"{by_path[1]:.2f}", f"{by_steps[1]:.2f}",
                f"{by_path[1] - by_steps[1]:+.2f}",
            ])  # fmt: skip
        better = sum(row["path"][1] > row["steps"][1] for row in result["rows"])
        nearer = sum(row["path"][0] < row["steps"][0] for row in result["rows"])
        return "\n\n".join([
            f"The same filter, fed with the predicted path or with the number of steps; probes after step {_AFTER}, "
            "of all seeds together. *Error*: mean of |measured - predicted| in nats, and that of repeating the "
            "last probe; *log score*: mean log density of the probe under the prediction (greater is better).",
            table(
                [
                    *("recipe, probe", "probes", "error: path", "steps", "last probe", "path against steps"),
                    *("log score: path", "steps", "gain"),
                ],
                rows,
            ),
            f"The path has the smaller error in {nearer} and the better log score in {better} of {len(rows)} settings.",
        ])  # fmt: skip


def record(recipe: str, seed: int) -> dict[str, Any]:
    """Train bare; return the per-example probe losses at every step, and the path that was predicted for it."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    steps = STEPS[recipe.split(",")[0]]
    plant = make_plant(recipe, seed=seed, steps=steps)
    probe = Probe(plant.model, plant.probe_loader, examples=_PROBED)
    sketch, trajectory, state = Sketch(plant.model.named_parameters()), TrajectoryFilter(), TrajectoryState()
    position = sketch()
    losses, speeds = [probe.read().losses], [0.0]
    for _ in range(steps):
        rate = plant.optimizer.param_groups[0]["lr"]
        plant.train_step(next(plant.loader))
        present = sketch()
        speeds.append(rate * state.length)
        if rate > 0:
            state, _ = trajectory.step(state, present - position, rate)
        position = present
        losses.append(probe.read().losses)
    return {"losses": np.array(losses), "speeds": speeds}


def compare(runs: list[dict[str, Any]], spacing: int) -> Result:
    """Score both clocks on the probes of some runs, taken every ``spacing`` steps."""
    scores = {clock: [pair for run in runs for pair in _score(run, spacing, clock)] for clock in ("path", "steps")}
    means = [run["losses"].mean(1)[::spacing] for run in runs]
    last = [abs(b - a) for y in means for i, (a, b) in enumerate(pairwise(y), 1) if i * spacing > _AFTER]
    return {
        "probes": len(scores["path"]),
        **{clock: np.mean(pairs, axis=0).tolist() for clock, pairs in scores.items()},
        "last": float(np.mean(last)),
    }


def _score(run: dict[str, Any], spacing: int, clock: str) -> list[tuple[float, float]]:
    """Absolute innovation and log density of every probe after the first steps."""
    probe, state = ProbeFilter(), ProbeState()
    error = 0.0
    reference = None
    scores = []
    for step, (losses, speed) in enumerate(zip(run["losses"], run["speeds"], strict=True)):
        state = probe.travel(state, speed if clock == "path" else 1.0)
        if step % spacing:
            continue
        y = float(losses.mean())
        if reference is not None:
            # The floor of the engine: the tracked standard error of paired differences.
            paired = paired_standard_error(losses, reference)
            error = paired if error == 0 else error + 0.2 * (paired - error)
        floor = max(error, 1e-4 * abs(y))
        predicted = probe.predict(state, floor)
        if predicted is not None and predicted.ready and step > _AFTER:
            z = (y - predicted.level) / predicted.deviation
            density = -0.5 * z * z - math.log(predicted.deviation * math.sqrt(2 * math.pi))
            scores.append((abs(y - predicted.level), density))
        state = probe.update(state, y, floor)
        reference = losses
    return scores


def _signed(percent: float) -> str:
    return f"{percent:+.0f} %"
