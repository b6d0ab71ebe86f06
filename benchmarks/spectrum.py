"""Spectral health and the thermostat: what they cost, and how far the estimates lie from the full decompositions."""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from benchmarks.benchmark import Benchmark, Result
from benchmarks.markdown import number, table
from benchmarks.plants import make_plant
from kalmanguard.actuators.thermostat import SpectralThermostat
from kalmanguard.sensors.spectrum import SpectralHealth
from kalmanguard.sensors.spectrum.measures import condition_number, connectivity

_SIDES = (64, 256, 1_024, 4_096)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_SIDE = 1_024


class Spectrum(Benchmark):
    """Time of a measurement, error of the estimates, cost of the thermostat per step."""

    name = "spectrum"
    summary = "spectral health: time per layer, error against full SVD; cost of the thermostat per step"

    def run(self, options: argparse.Namespace) -> Result:
        sides = _SIDES[:-1] if options.quick else _SIDES
        return {
            "time": [timing(side, dtype, rounds=5 if options.quick else 15) for side in sides for dtype in _DTYPES],
            "error": [error(kind, seed) for kind in ("random", "decaying", "rank 4") for seed in range(2)],
            "thermostat": overhead(100 if options.quick else 300),
        }

    def markdown(self, result: Result) -> str:
        timed = [
            [
                f"{t['side']:,} x {t['side']:,}, {t['dtype']}",
                f"{number(1e3 * t['first_s'])} ms",
                f"{number(1e3 * statistics.median(t['later_s']))} ms",
                f"{number(1e3 * min(t['later_s']))} to {number(1e3 * max(t['later_s']))} ms",
            ]
            for t in result["time"]
        ]
        errors = [
            [
                f"{e['kind']}, seed {e['seed']}",
                *(f"{100 * e[key]:+.2f} %" for key in ("first", "tenth")),
                *(
                    number(e[key])
                    for key in ("stable_rank", "condition", "whole_condition", "fiedler", "whole_fiedler")
                ),
            ]
            for e in result["error"]
        ]
        cost = result["thermostat"]
        return "\n\n".join([
            "One layer, processor time of one core: its first measurement (cold power iteration), then later ones.",
            table(["layer", "first", "later, median", "range"], timed),
            f"{_SIDE:,} x {_SIDE:,} matrices, float32: error of the stable rank against the full SVD at the first and "
            "the tenth measurement; beside the measures of the sampled submatrix those of the whole matrix, which they "
            "are not estimates of.",
            table(
                [
                    *("matrix", "stable rank, first", "tenth", "exact"),
                    *("condition, sample", "whole", "Fiedler, sample", "whole"),
                ],
                errors,
            ),
            f"The thermostat on the ViT ({cost['layers']} matrices), default cadence, forced to act at target 1.0: "
            f"{number(1e6 * cost['hook_s'] / cost['steps'])} us a step of "
            f"{number(1e3 * cost['step_s'] / cost['steps'])} ms, "
            f"**{number(100 * cost['hook_s'] / cost['step_s'], 2)} %**.",
        ])  # fmt: skip


def timing(side: int, dtype: str, *, rounds: int) -> Result:
    """Processor seconds of measuring a single layer."""
    torch.manual_seed(0)
    health = SpectralHealth(nn.Linear(side, side, bias=False).to(_DTYPES[dtype]))
    seconds = []
    for _ in range(rounds + 1):
        started = time.thread_time()
        health.measure()
        seconds.append(time.thread_time() - started)
    return {"side": side, "dtype": dtype, "first_s": seconds[0], "later_s": seconds[1:]}


def error(kind: str, seed: int) -> Result:
    """Estimates of one matrix beside its full decompositions."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(_SIDE, _SIDE, generator=generator)
    if kind == "decaying":  # singular values like 1/k
        left, _ = torch.linalg.qr(weights)
        right, _ = torch.linalg.qr(torch.randn(_SIDE, _SIDE, generator=generator))
        weights = (left / torch.arange(1.0, _SIDE + 1)) @ right
    elif kind == "rank 4":
        weights = weights[:, :4] @ weights[:4] + 0.01 * torch.randn(_SIDE, _SIDE, generator=generator)
    layer = nn.Linear(_SIDE, _SIDE, bias=False)
    with torch.no_grad():
        layer.weight.copy_(weights)
    health = SpectralHealth(layer)
    reports = [health.measure().layers[0] for _ in range(10)]
    values = torch.linalg.svdvals(weights.double())
    exact = float(values.square().sum() / values[0] ** 2)
    return {
        "kind": kind,
        "seed": seed,
        "stable_rank": exact,
        "first": reports[0].stable_rank / exact - 1,
        "tenth": reports[-1].stable_rank / exact - 1,
        "condition": reports[-1].condition_number,
        "whole_condition": condition_number(weights.double()),
        "fiedler": reports[-1].fiedler_value,
        "whole_fiedler": connectivity(weights.double())[0],
    }


def overhead(steps: int) -> Result:
    """Processor seconds in the thermostat's hook, clocked by hooks before and behind it, and of the whole steps."""
    torch.manual_seed(0)
    plant = make_plant("vit", seed=0, steps=steps)
    clock = {"begin": 0.0, "hook_s": 0.0}

    def begin(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        clock["begin"] = time.thread_time()

    def end(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        clock["hook_s"] += time.thread_time() - clock["begin"]

    plant.optimizer.register_step_post_hook(begin)
    thermostat = SpectralThermostat(plant.model, plant.optimizer, target=1.0)
    plant.optimizer.register_step_post_hook(end)
    started = time.thread_time()
    for _ in range(steps):
        plant.step_loss(next(plant.loader)).backward()  # type: ignore[no-untyped-call]
        plant.optimizer.step()
        plant.optimizer.zero_grad()
    step_s = time.thread_time() - started
    return {"steps": steps, "hook_s": clock["hook_s"], "step_s": step_s, "layers": len(thermostat.state())}
