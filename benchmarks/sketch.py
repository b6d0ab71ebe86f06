"""The sketch: what it costs beside a norm, how well it keeps lengths, and whether it resolves tiny updates."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from benchmarks.benchmark import Benchmark, Result
from benchmarks.markdown import number, table
from benchmarks.plants import make_plant
from kalmanguard.sensors.sketch import Sketch

_SIDE, _LAYERS = 1_024, 24
_SMALL_SIDE, _SMALL_LAYERS = 256, 6
_FINE_TUNING_RATE = 1e-5
_ORDERS = ("acceleration", "jerk")


class SketchBenchmark(Benchmark):
    """Time, accuracy of the norm, resolution."""

    name = "sketch"
    summary = "the sketch: time beside _foreach_norm, accuracy of the norm, resolution at tiny learning rates"

    def run(self, options: argparse.Namespace) -> Result:
        return {
            "time": cost(rounds=10 if options.quick else 60),
            "accuracy": accuracy(draws=40 if options.quick else 400),
            "resolution": [
                resolution(seed, repeated=repeated)
                for repeated in (False, True)
                for seed in range(options.seeds or (1 if options.quick else 3))
            ],
        }

    def markdown(self, result: Result) -> str:
        timed = result["time"]
        norm = statistics.median(timed["norm"])
        rows = []
        for name, label in (("norm", "`torch._foreach_norm`"), ("sketch", "`Sketch`, k = 64")):
            values = timed[name]
            median = statistics.median(values)
            rows.append([
                label, f"{number(1e3 * median)} ms", f"{number(1e3 * min(values))} to {number(1e3 * max(values))} ms",
                f"{number(median / norm)} x",
            ])  # fmt: skip
        accurate = [
            [kind, *(number(value) for value in values)] for kind, values in result["accuracy"]["points"].items()
        ]
        resolved = [
            [
                f"{'one batch again and again' if values['repeated'] else 'new batches'}, seed {values['seed']}",
                *(number(values[key]) for key in ("exact", "sketch", "rounded")),
                number(values["acceleration"]), number(values["jerk"]),
            ]
            for values in result["resolution"]
        ]  # fmt: skip
        return "\n\n".join([
            f"{timed['parameters']:,} float32 parameters in {timed['tensors']} tensors, the two taking turns:",
            table(["", "median", "range", "ratio"], rows),
            f"Norm of the sketched update over that of the update itself, {result['accuracy']['draws']} draws of signs "
            f"on {result['accuracy']['parameters']:,} parameters:",
            table(["update", "5 %", "50 %", "95 %"], accurate),
            "A character transformer trained on at a learning rate of 1e-5 (AdamW, float32 parameters): norm of "
            "the jerk over that of the acceleration, medians over 40 steps; exactly (float64 over all parameters), "
            "from the sketch, and from the same sketch rounded to float32. Beside them the sketched over the exact "
            "norm of each; on one batch again and again the trajectory is smooth, and rounding would show.",
            table(["", "exact", "sketch", "float32 sketch", "acceleration", "jerk"], resolved),
        ])  # fmt: skip


def cost(rounds: int) -> Result:
    """Seconds of a norm and of a sketch over the same parameters."""
    torch.manual_seed(0)
    parameters = [torch.randn(_SIDE, _SIDE) for _ in range(_LAYERS)] + [torch.randn(_SIDE) for _ in range(_LAYERS)]
    sketch = Sketch((f"p{i}", p) for i, p in enumerate(parameters))
    calls: dict[str, Callable[[], object]] = {"norm": lambda: torch._foreach_norm(parameters), "sketch": sketch}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 3):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if turn >= 3:
                seconds[name].append(time.perf_counter() - started)
    return {"parameters": sum(p.numel() for p in parameters), "tensors": len(parameters), **seconds}


def accuracy(draws: int) -> Result:
    """Sketched over true norm at its 5, 50 and 95 % points, for various updates; each draw has its own signs."""
    generator = torch.Generator().manual_seed(0)
    ratios: dict[str, list[float]] = {kind: [] for kind in _UPDATES}
    shapes = [(_SMALL_SIDE, _SMALL_SIDE)] * _SMALL_LAYERS
    for draw in range(draws):
        parameters = [torch.zeros(shape) for shape in shapes]
        sketch = Sketch(((f"p{i}", p) for i, p in enumerate(parameters)), seed=draw)
        for kind, make in _UPDATES.items():
            for parameter in parameters:
                parameter.copy_(make(parameter.shape, generator))
            true = float(torch.stack(torch._foreach_norm(parameters)).norm())
            ratios[kind].append(float(np.linalg.norm(sketch())) / true)
    points = {kind: np.quantile(values, [0.05, 0.5, 0.95]).tolist() for kind, values in ratios.items()}
    return {"draws": draws, "parameters": sum(r * c for r, c in shapes), "points": points}


def _rank_one(shape: torch.Size, generator: torch.Generator) -> Tensor:
    return torch.outer(*(torch.randn(n, generator=generator) for n in shape))


def _sparse(shape: torch.Size, generator: torch.Generator) -> Tensor:
    return _dense(shape, generator) * (torch.rand(shape, generator=generator) < 1e-3)


def _dense(shape: torch.Size, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator)


def _constant(shape: torch.Size, generator: torch.Generator) -> Tensor:
    return torch.ones(shape)


def _one_row(shape: torch.Size, generator: torch.Generator) -> Tensor:
    update = torch.zeros(shape)
    update[int(torch.randint(shape[0], (), generator=generator))] = torch.randn(shape[1], generator=generator)
    return update


def _one_column(shape: torch.Size, generator: torch.Generator) -> Tensor:
    return _one_row(shape, generator).T


_UPDATES: dict[str, Callable[[torch.Size, torch.Generator], Tensor]] = {
    "rank one": _rank_one,
    "sparse, 0.1 %": _sparse,
    "dense": _dense,
    "all elements equal": _constant,
    "one row of each matrix": _one_row,
    "one column of each matrix": _one_column,
}


def resolution(seed: int, *, repeated: bool, before: int = 100, steps: int = 60) -> dict[str, float]:
    """Jerk over acceleration at a fine-tuning rate: exact, sketched, and sketched in float32."""
    torch.manual_seed(seed)
    plant = make_plant("chartransformer", seed=seed, steps=before + steps)
    sketch = Sketch(plant.model.named_parameters())
    positions: dict[str, list[np.ndarray]] = {"exact": [], "sketch": [], "rounded": []}
    batch = next(plant.loader)
    for step in range(before + steps):
        if step == before:
            plant.optimizer.param_groups[0]["lr"] = _FINE_TUNING_RATE
        if step < before or not repeated:
            batch = next(plant.loader)
        plant.train_step(batch)
        if step >= before:
            present = sketch()
            exact = torch.cat([p.detach().flatten().double() for p in plant.model.parameters()])
            positions["exact"].append(exact.numpy())
            positions["sketch"].append(present)
            positions["rounded"].append(present.astype(np.float32).astype(np.float64))
    norms = {name: _derivatives(np.stack(values)[steps // 3 :]) for name, values in positions.items()}
    ratios = {name: float(np.median(jerk / acceleration[1:])) for name, (acceleration, jerk) in norms.items()}
    kept = {
        order: float(np.median(sketched / exact))
        for order, sketched, exact in zip(_ORDERS, norms["sketch"], norms["exact"], strict=True)
    }
    return {"seed": seed, "repeated": repeated, **ratios, **kept}


def _derivatives(positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.linalg.norm(np.diff(positions, 2, axis=0), axis=1), np.linalg.norm(np.diff(positions, 3, axis=0), axis=1)
