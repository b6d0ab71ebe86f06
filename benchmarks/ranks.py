"""What supervision costs in several processes: steps of a bare and a supervised twin in turns, on 1, 2 and 4 ranks."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks.benchmark import Benchmark, Result
from benchmarks.markdown import number, table
from benchmarks.plants import make_plant, probe_loss
from kalmanguard import Supervisor

#: Recipe and counted steps.
RUNS = (("chartransformer base", 150), ("chartransformer", 400), ("mlp", 1_500))
_RANKS = (1, 2, 4)
_DISCARDED = 40


class Ranks(Benchmark):
    """The ratio of supervised to bare time, by number of processes."""

    name = "ranks"
    summary = "time with and without supervision on 1, 2 and 4 processes (gloo, DistributedDataParallel)"

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--recipes", nargs="+", default=[recipe for recipe, _ in RUNS], metavar="NAME")
        parser.add_argument("--ranks", nargs="+", type=int, default=list(_RANKS), metavar="N")

    def run(self, options: argparse.Namespace) -> Result:
        runs = [(recipe, steps // 5 if options.quick else steps) for recipe, steps in RUNS if recipe in options.recipes]
        seeds = range(options.seeds or (1 if options.quick else 3))
        # In turns, so that a busy minute of the machine meets all numbers of ranks alike.
        found = [
            {"recipe": recipe, "ranks": ranks, "steps": steps, **timed(recipe, steps, seed, ranks)}
            for recipe, steps in runs
            for seed in seeds
            for ranks in options.ranks
        ]
        return {"runs": found}

    def markdown(self, result: Result) -> str:
        rows = []
        groups: dict[tuple[str, int], list[Result]] = {}
        for run in result["runs"]:
            groups.setdefault((run["recipe"], run["ranks"]), []).append(run)
        for (recipe, ranks), runs in groups.items():
            ratios = sorted(run["supervised_s"] / run["bare_s"] for run in runs)
            bare = sorted(run["bare_s"] / run["steps"] for run in runs)[len(runs) // 2]
            rows.append([
                recipe, ranks, f"{len(runs)} x {runs[0]['steps']:,}", f"{number(1e3 * bare)} ms",
                f"**{number(ratios[len(ratios) // 2], 4)}**", f"{number(ratios[0], 4)} to {number(ratios[-1], 4)}",
            ])  # fmt: skip
        return "\n\n".join([
            "Total time of all steps of rank 0 with supervision over that of the bare twin, whose steps alternate with "
            f"the supervised ones; the first {_DISCARDED} are not counted; median and range over seeds. Each rank "
            "trains on its part of the batch, one thread a process.",
            table(["plant", "ranks", "repeats x steps", "bare step", "ratio", "range"], rows),
        ])  # fmt: skip


def timed(recipe: str, steps: int, seed: int, ranks: int) -> Result:
    """Seconds of rank 0's steps, all together and of the median one, bare and supervised."""
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        given = (ranks, recipe, steps, seed, folder, queue)
        processes = [context.Process(target=_rank, args=(rank, *given)) for rank in range(ranks)]
        for process in processes:
            process.start()
        found: Result = queue.get(timeout=1_800)
        for process in processes:
            process.join()
    return found


def _rank(rank: int, ranks: int, recipe: str, steps: int, seed: int, folder: str, queue: Any) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    plants = {name: make_plant(recipe, seed=seed, steps=steps + _DISCARDED) for name in ("bare", "supervised")}
    models: dict[str, Any] = {
        name: DistributedDataParallel(plant.model) if ranks > 1 else plant.model for name, plant in plants.items()
    }
    flown = plants["supervised"]
    supervisor = Supervisor(
        models["supervised"], flown.probe_loader, optimizer=flown.optimizers, loss_fn=probe_loss(flown),
        run_dir=Path(folder) / "run",
    )  # fmt: skip
    times: dict[str, list[float]] = {name: [] for name in plants}
    for step in range(_DISCARDED + steps):
        for name in ("bare", "supervised") if step % 2 else ("supervised", "bare"):
            plant = plants[name]
            inputs, targets = next(plant.loader)
            part = slice(len(targets) * rank // ranks, len(targets) * (rank + 1) // ranks)
            started = time.perf_counter()
            loss = plant.loss_fn(models[name](inputs[part]), targets[part]).mean()
            loss.backward()  # type: ignore[no-untyped-call]
            plant.step()
            if name == "supervised":
                supervisor.update(loss)
            if step >= _DISCARDED:
                times[name].append(time.perf_counter() - started)
    numbers = supervisor.statistics()
    supervisor.close()
    if rank == 0:
        found: Result = {"probe_every": numbers["probe_every"]}
        for name, seconds in times.items():
            found |= {f"{name}_s": sum(seconds), f"{name}_median_s": statistics.median(seconds)}
        queue.put(found)
    if ranks > 1:
        dist.destroy_process_group()
