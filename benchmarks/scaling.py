"""What supervision costs on many ranks: a model of a step from 1 to 10,000 ranks, against what is measured here."""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.benchmark import Benchmark, Result
from benchmarks.markdown import number, table
from benchmarks.ranks import timed
from kalmanguard.distributed.agreement import Summary
from kalmanguard.distributed.lines import partners
from kalmanguard.distributed.replicas import Replicas
from kalmanguard.sensors.norm import total_norm
from kalmanguard.sensors.sketch import Sketch

_SKETCH = 64
_RANKS = (2, 4)
_RECIPE = "chartransformer"
_ELEMENTS = 8_000_000
#: Latency of one message between machines, which cannot be measured here: kernel TCP in one data centre.
_NETWORK_S = 1e-4
#: Bytes a second that an accelerator reads from its memory, and a network card sends: assumed, not measured.
_DEVICE_BYTES_S, _NETWORK_BYTES_S = 1.5e12, 2.5e10
#: Model, elements, ranks, ranks that share one copy, and seconds of a step, as such runs are commonly reported.
_RUNS = (
    ("124M, replicas", 124e6, 8, 1, 0.4),
    ("7B, sharded", 7e9, 64, 64, 3.0),
    ("70B, sharded", 70e9, 1_024, 1_024, 8.0),
    ("405B, shards of 1,000 in 10 replicas", 405e9, 10_000, 1_000, 15.0),
)
_SIMULATED = (1, 2, 4, 8, 64, 512, 1_000, 4_096, 10_000)


class Scaling(Benchmark):
    """Measured parts, the model that is made of them, and a simulation of the exchange."""

    name = "scaling"
    summary = "cost of a supervised step from 1 to 10,000 ranks: measured parts, model, simulation"

    def run(self, options: argparse.Namespace) -> Result:
        repeats = 300 if options.quick else 2_000
        return {
            "local": _local(repeats // 20),
            "exchanges": [_exchanges(ranks, repeats) for ranks in _RANKS],
            "steps": [{"ranks": n, **timed(_RECIPE, repeats // 10, 0, n)} for n in (1, *_RANKS)],
        }

    def markdown(self, result: Result) -> str:
        local, exchanges = result["local"], result["exchanges"]
        return "\n\n".join([
            _measured(exchanges),
            f"Sketch {number(1e9 * local['sketch_s'] / local['elements'])} ns and norm "
            f"{number(1e9 * local['norm_s'] / local['elements'])} ns an element of float32 on one core here "
            f"({local['elements']:,} elements, medians).",
            _points(result["steps"], exchanges),
            _simulated(exchanges),
            _model(),
        ])  # fmt: skip


def _local(repeats: int) -> Result:
    """Seconds that this process takes for what needs no other."""
    torch.set_num_threads(1)
    values = torch.randn(_ELEMENTS // 1_000, 1_000, generator=torch.Generator().manual_seed(0))
    sketch = Sketch([("w", values)], size=_SKETCH)
    jobs: dict[str, Callable[[], object]] = {"sketch_s": sketch, "norm_s": lambda: total_norm([values])}
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, job in jobs.items():
            started = time.perf_counter()
            job()
            times[name].append(time.perf_counter() - started)
    return {"elements": _ELEMENTS, **{name: float(np.median(found)) for name, found in times.items()}}


def _exchanges(ranks: int, repeats: int) -> Result:
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        given = (ranks, repeats, Path(folder) / "store", queue)
        processes = [context.Process(target=_rank, args=(rank, *given)) for rank in range(ranks)]
        for process in processes:
            process.start()
        found: Result = queue.get(timeout=600)
        for process in processes:
            process.join()
    return found


def _rank(rank: int, ranks: int, repeats: int, store: Path, queue: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    lines = Replicas(timeout_s=60.0, sketch_size=_SKETCH)._lines
    assert lines is not None
    row = np.zeros(Summary(ranks=ranks, roles=[], shared=(ranks,), size=_SKETCH).length)
    tensor, group = torch.from_numpy(row.copy()), dist.new_group(backend="gloo")
    jobs: dict[str, Callable[[], object]] = {
        "lines": lambda: lines.add(row),
        "gloo": lambda: dist.all_reduce(tensor, group=group),
    }
    times: dict[str, list[float]] = {name: [] for name in jobs}
    # In blocks, so that no exchange is timed right after one of the other kind.
    for _ in range(10):
        for name, job in jobs.items():
            for turn in range(repeats // 10 + 3):
                started = time.perf_counter()
                job()
                if turn >= 3:
                    times[name].append(time.perf_counter() - started)
    if rank == 0:
        queue.put({
            "ranks": ranks, "numbers": len(row),
            **{f"{name}_s": np.quantile(found, (0.5, 0.99)).tolist() for name, found in times.items()},
            "sample_s": np.sort(times["lines"])[:: max(1, repeats // 200)].tolist(),
        })  # fmt: skip
    dist.barrier()
    dist.destroy_process_group()


def _measured(exchanges: list[Result]) -> str:
    rows = [
        [
            e["ranks"], e["numbers"], len(partners(0, e["ranks"])),
            *(f"{number(1e6 * e[f'{name}_s'][q])} us" for name in ("lines", "gloo") for q in (0, 1)),
        ]
        for e in exchanges
    ]  # fmt: skip
    head = ["ranks", "numbers", "rounds", "lines, median", "99 %", "all_reduce of gloo, median", "99 %"]
    return "\n\n".join(["One exchange between processes of this machine:", table(head, rows)])


def _points(steps: list[Result], exchanges: list[Result]) -> str:
    """The median step holds neither probe nor snapshot: what is added to it is fixed work and two exchanges."""
    added = {s["ranks"]: s["supervised_median_s"] - s["bare_median_s"] for s in steps}
    told = {1: 0.0, **{e["ranks"]: 2 * e["lines_s"][0] for e in exchanges}}
    rows = [
        [
            s["ranks"], f"{number(1e3 * s['bare_median_s'])} ms", f"{number(1e6 * added[s['ranks']])} us",
            f"{number(1e6 * (added[1] + told[s['ranks']]))} us",
            number(s["supervised_median_s"] / s["bare_median_s"], 4),
        ]
        for s in steps
    ]  # fmt: skip
    return "\n\n".join([
        f"Model against measured points: the median step of the {_RECIPE} under DistributedDataParallel, whose batch "
        "is split over the ranks. *Model*: what is added on one rank, and two exchanges.",
        table(["ranks", "bare step", "added, measured", "added, model", "ratio of medians"], rows),
    ])  # fmt: skip


def _simulated(exchanges: list[Result]) -> str:
    """Recursive doubling with latencies drawn from those measured between two processes, or scaled to a network's."""
    sample = np.array(exchanges[0]["sample_s"])
    generator = np.random.default_rng(0)
    rows = []
    for ranks in _SIMULATED:
        shown = [ranks, len(partners(0, ranks)) if ranks > 1 else 0]
        for scale in (1.0, _NETWORK_S / float(np.median(sample))):
            times = [_wait(ranks, scale * sample, generator) for _ in range(60)]
            shown += [f"{number(1e6 * float(np.quantile(times, q)))} us" for q in (0.5, 0.99)]
        rows.append(shown)
    head = ["ranks", "rounds", "this machine's latency", "99 %", f"{1e6 * _NETWORK_S:.0f} us, assumed", "99 %"]
    return "\n\n".join([
        "Simulated: from the arrival of the last rank to the end of the exchange on the last one, each message with a "
        "latency drawn from those measured between two processes here, and from the same ones scaled to a median that "
        "is assumed of a network.",
        table(head, rows),
    ])  # fmt: skip


def _wait(ranks: int, sample: np.ndarray, generator: np.random.Generator) -> float:
    done = np.zeros(ranks)
    half = 1 << (ranks.bit_length() - 1)
    extra = ranks - half

    def latency(count: int) -> np.ndarray:
        drawn: np.ndarray = generator.choice(sample, count)
        return drawn

    done[:extra] = np.maximum(done[:extra], done[half:] + latency(extra))
    index, distance = np.arange(half), 1
    while distance < half:
        done[:half] = np.maximum(done[:half], done[index ^ distance] + latency(half))
        distance *= 2
    done[half:] = done[:extra] + latency(extra)
    return float(done.max())


def _model() -> str:
    rows = []
    for name, elements, ranks, shards, step_s in _RUNS:
        own = elements / shards
        rounds = math.ceil(math.log2(ranks))
        shared = (1,) * (shards if ranks > shards else 0)
        told = Summary(ranks=ranks, roles=[], shared=shared, size=_SKETCH).length
        sent = rounds * 8 * (3 + told)
        # The weights are read for the sketch, the gradient for its norm.
        read_s = 2 * 4 * own / _DEVICE_BYTES_S
        told_s = 2 * rounds * _NETWORK_S + sent / _NETWORK_BYTES_S
        rows.append([
            name, f"{ranks:,}", f"{own / 1e6:,.0f}M", f"{8 * own / 1e9:.2g} GB", f"{sent / 1e3:.3g} kB",
            f"{1e3 * read_s:.2g} ms", f"{1e3 * told_s:.2g} ms", f"{step_s:g} s",
            f"{100 * (read_s + told_s) / step_s:.2g} %",
        ])  # fmt: skip
    head = ["run", "ranks", "elements a rank", "read a step", "sent a step", "reading", "exchanges", "step", "share"]
    return "\n\n".join([
        f"The model, on assumed hardware ({_DEVICE_BYTES_S / 1e12:g} TB/s of memory, {_NETWORK_BYTES_S / 1e9:g} GB/s "
        f"and {1e6 * _NETWORK_S:.0f} us of network), without probes and snapshots:",
        table(head, rows),
    ])  # fmt: skip
