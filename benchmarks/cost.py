"""What supervision costs: all of it, against the bare loop, steps of the two taking turns in one process."""

from __future__ import annotations

import argparse
import cProfile
import gc
import pstats
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.benchmark import Benchmark, Result
from benchmarks.markdown import number, table
from benchmarks.plants import make_plant, probe_loss
from kalmanguard import Engine, Measurement, ProbeReading, Settings, Supervisor
from kalmanguard.models import Plant

#: Recipe, counted steps, repeats.
RUNS = (("chartransformer base", 400, 3), ("chartransformer", 1_000, 5), ("mlp", 3_000, 7))
_DISCARDED = 30
#: Functions whose cumulative time the profile gives, by the end of their file's path and name.
_PARTS = (
    ("supervisor.py", "update"),
    ("sensors/optimizer.py", "_before"),
    ("sensors/optimizer.py", "_after"),
    ("sensors/integrity.py", "check"),
    ("sensors/suite.py", "measure"),
    ("sensors/sketch.py", "__call__"),
    ("sensors/integrity.py", "remember"),
    ("sensors/probe.py", "read"),
    ("engine.py", "observe"),
    ("engine.py", "decide"),
    ("journal/writer.py", "step"),
    ("actuators/actuator.py", "keep"),
    ("actuators/actuator.py", "checkpoint"),
)
_NUMBERS = ("suspicions", "probes", "vetoes", "rollbacks", "probe_every", "snapshot_every")
_IMPORTS = ("import torch", "import torch, kalmanguard", "import torch; from kalmanguard import Supervisor")


class Cost(Benchmark):
    """Total time with and without, the engine's step alone, and imports."""

    name = "cost"
    summary = "total time with and without supervision, steps interleaved; Engine.step; import time"

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--recipes", nargs="+", default=[r for r, _, _ in RUNS], metavar="NAME")
        parser.add_argument("--profile", action="store_true", help="also profile the supervised steps, part by part")

    def run(self, options: argparse.Namespace) -> Result:
        runs = [run for run in RUNS if run[0] in options.recipes]
        if options.quick:
            runs = [(recipe, steps // 4, 1) for recipe, steps, _ in runs]
        result: Result = {"runs": []}
        for recipe, steps, repeats in runs:
            repeated = [interleave(recipe, steps, seed) for seed in range(options.seeds or repeats)]
            result["runs"].append({"recipe": recipe, "steps": steps, "repeats": repeated})
        result["engine"] = engine_step(rounds=5 if options.quick else 20)
        result["imports"] = import_times(rounds=2 if options.quick else 7)
        result["profile"] = {r: profile(r, steps) for r, steps, _ in runs} if options.profile else {}
        return result

    def markdown(self, result: Result) -> str:
        rows = []
        for run in result["runs"]:
            repeats = run["repeats"]
            ratios = sorted(repeat["supervised_s"] / repeat["bare_s"] for repeat in repeats)
            first = repeats[0]
            rows.append([
                run["recipe"], f"{first['parameters']:,}", f"{len(repeats)} x {run['steps']:,}",
                f"{number(1e3 * statistics.median(r['bare_s'] for r in repeats) / run['steps'])} ms",
                f"**{number(statistics.median(ratios), 4)}**", f"{number(ratios[0], 4)} to {number(ratios[-1], 4)}",
                number(max(0.0, statistics.median(r["beside_s"] / r["bare_s"] for r in repeats)), 2),
                ", ".join(str(r["statistics"]["probe_every"]) for r in repeats),
                ", ".join(str(r["statistics"]["snapshot_every"]) for r in repeats),
                f"{number(1e3 * statistics.median(r['start_s'] for r in repeats), 2)} ms",
                f"{number(1e3 * statistics.median(r['end_s'] for r in repeats), 2)} ms",
            ])  # fmt: skip
        engine, imports = result["engine"], result["imports"]
        base, with_package, with_supervisor = (statistics.median(imports[code]) for code in _IMPORTS)
        parts = [
            "*Ratio*: total time of all steps with supervision (updates, probes, snapshots, journal and "
            "checkpoints in a run folder) over that of the bare twin, whose steps alternate with the supervised "
            f"ones; the first {_DISCARDED} are not counted; median over repeats. *Beside*: processor time of "
            "background threads (checkpoints), over the bare time; it delays both twins alike and is not in the "
            "ratio.",
            table(
                [
                    *("plant", "parameters", "repeats x steps", "bare step", "ratio", "range", "beside"),
                    *("probe every", "snapshot every", "construction", "close"),
                ],
                rows,
            ),
            f"`Engine.step`: {number(engine['plain'])} us without a probe, {number(engine['probed'])} us with one of "
            "128 examples (median of rounds).",
            f"Import: torch alone {number(base)} s, with kalmanguard {number(with_package - base, 2)} s more, "
            f"with `Supervisor` {number(with_supervisor - base, 2)} s more (median of "
            f"{len(imports[_IMPORTS[0]])} new interpreters each).",
        ]
        for recipe, profile_ in result["profile"].items():
            rows = [[name, number(us), number(calls, 2)] for name, us, calls in profile_]
            parts += [
                f"Where it goes, {recipe}, under cProfile (which makes Python calls slower): microseconds per "
                "supervised step, callees included, and calls per step.",
                table(["part", "us", "calls"], rows),
            ]
        return "\n\n".join(parts)


def interleave(recipe: str, steps: int, seed: int) -> Result:
    """Alternate the steps of a bare and a supervised twin, and add up the time of each."""
    torch.manual_seed(seed)
    bare, flown = (make_plant(recipe, seed=seed, steps=steps + _DISCARDED) for _ in range(2))
    gc.collect()
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        supervisor = _supervise(flown, Path(folder))
        start_s = time.perf_counter() - started
        totals = {"bare": 0.0, "supervised": 0.0}
        own = everywhere = 0.0
        for step in range(_DISCARDED + steps):
            if step == _DISCARDED:
                totals = dict.fromkeys(totals, 0.0)
                own, everywhere = time.thread_time(), time.process_time()
            # In turns also within a pair, so that neither always finds the other's leavings in the cache.
            for name in ("bare", "supervised") if step % 2 else ("supervised", "bare"):
                plant = bare if name == "bare" else flown
                batch = next(plant.loader)
                started = time.perf_counter()
                _step(plant, batch, None if name == "bare" else supervisor)
                totals[name] += time.perf_counter() - started
        beside = time.process_time() - everywhere - (time.thread_time() - own)
        numbers = supervisor.statistics()
        started = time.perf_counter()
        supervisor.close()
        end_s = time.perf_counter() - started
    return {
        "parameters": sum(p.numel() for p in bare.model.parameters()),
        "bare_s": totals["bare"],
        "supervised_s": totals["supervised"],
        "beside_s": beside,
        "start_s": start_s,
        "end_s": end_s,
        "statistics": {key: numbers[key] for key in _NUMBERS},
    }


def _supervise(plant: Plant, folder: Path) -> Supervisor:
    return Supervisor(
        plant.model, plant.probe_loader, optimizer=plant.optimizers, loss_fn=probe_loss(plant), run_dir=folder
    )


def _step(plant: Plant, batch: Any, supervisor: Supervisor | None) -> None:
    loss = plant.train_step(batch)
    if supervisor is not None:
        supervisor.update(loss)


def engine_step(rounds: int) -> dict[str, float]:
    """Microseconds of one `Engine.step`, without and with a probe: medians over rounds of 200 and 20 steps."""
    engine = Engine(Settings())
    rng = np.random.default_rng(0)
    state = engine.init()
    seconds: dict[str, list[float]] = {"plain": [], "probed": []}

    def measurement(step: int, *, probe: bool) -> Measurement:
        level = 2.3 * np.exp(-step / 2_000)
        return Measurement(
            step=step,
            loss=float(level + 0.05 * rng.normal()),
            learning_rates=(1e-3,),
            gradient_norm=float(np.exp(0.2 * rng.normal())),
            velocity=1e-3 * rng.normal(size=64),
            probe=ProbeReading(level + 0.01 * rng.gamma(2.0, 0.5, 128)) if probe else None,
        )

    for step in range(500):
        state, _ = engine.step(state, measurement(step, probe=step % 20 == 0))
    begin = 500
    for _ in range(rounds):
        for name, count in (("plain", 200), ("probed", 20)):
            measurements = [measurement(step, probe=name == "probed") for step in range(begin, begin + count)]
            begin += count
            started = time.perf_counter()
            for one in measurements:
                state, _ = engine.step(state, one)
            seconds[name].append((time.perf_counter() - started) / count)
    return {name: 1e6 * statistics.median(values) for name, values in seconds.items()}


def import_times(rounds: int) -> dict[str, list[float]]:
    """Seconds of imports in new interpreters, in turns."""
    times: dict[str, list[float]] = {code: [] for code in _IMPORTS}
    for _ in range(rounds + 1):
        for code in _IMPORTS:
            timed = f"import time; t = time.perf_counter(); {code}; print(time.perf_counter() - t)"
            done = subprocess.run([sys.executable, "-c", timed], capture_output=True, text=True, check=True)
            times[code].append(float(done.stdout))
    return {code: values[1:] for code, values in times.items()}  # the first reads the files from disk


def profile(recipe: str, steps: int) -> list[tuple[str, float, float]]:
    """Microseconds and calls per step of every part of supervision, by cProfile."""
    torch.manual_seed(0)
    plant = make_plant(recipe, seed=0, steps=steps + _DISCARDED)
    profiler = cProfile.Profile()
    with (
        tempfile.TemporaryDirectory() as folder,
        _supervise(plant, Path(folder)) as supervisor,
    ):
        for step in range(_DISCARDED + steps):
            if step == _DISCARDED:
                profiler.enable()
            _step(plant, next(plant.loader), supervisor)
        profiler.disable()
    parts = []
    for (path, _, name), (_, calls, _, cumulative, _) in pstats.Stats(profiler).stats.items():  # type: ignore[attr-defined]
        for file, function in _PARTS:
            if path.endswith(f"kalmanguard/{file}") and name == function:
                parts.append((f"{file.removesuffix('.py')}: {name}", 1e6 * cumulative / steps, calls / steps))
    return sorted(parts, key=lambda part: -part[1])
