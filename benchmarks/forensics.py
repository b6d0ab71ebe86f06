"""Layer forensics: what it costs against depth, what it says of healthy runs, and when it finds each fault."""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.benchmark import Benchmark, Result
from benchmarks.markdown import number, table
from kalmanguard import Forensics
from kalmanguard.faults.state import flip_bit
from kalmanguard.forensics import Severity
from kalmanguard.models import load_plant

#: Rounds of the measurement of cost, by depth and by plant.
DEPTHS = {4: 40, 16: 30, 64: 12}
PLANTS = {"mlp": 40, "cnn": 20, "chartransformer": 12}
#: Steps of a healthy run, by plant and batch size.
HEALTHY = {
    ("mlp", 8): 2_000,
    ("mlp", 64): 2_000,
    ("cnn", 8): 1_000,
    ("cnn", 64): 1_000,
    ("chartransformer", 8): 1_000,
    ("chartransformer", 64): 300,
}
#: SGD with momentum 0.9 at batch 8 and the plant's learning rate kills the MLP: the run is not healthy.
_MOMENTUM = {8: 0.0, 64: 0.9}
_WIDTH = 128
_FAULT_STEP, _PATIENCE = 211, 400


class ForensicsBenchmark(Benchmark):
    """Cost and detection of `kalmanguard.Forensics` with its default settings."""

    name = "forensics"
    summary = "layer forensics: cost against depth, and steps to find each fault"

    def run(self, options: argparse.Namespace) -> Result:
        seeds = options.seeds or (1 if options.quick else 3)
        short = 3 if options.quick else 1
        cost = [{"model": f"{n} layers of {_WIDTH}", **deep(n, rounds // short)} for n, rounds in DEPTHS.items()]
        cost += [{"model": name, **planted(name, rounds // short)} for name, rounds in PLANTS.items()]
        faults = [
            {"fault": name, "check": check, "runs": [caught(make, strike, check, seed) for seed in range(seeds)]}
            for name, (make, strike, check) in FAULTS.items()
        ]
        return {"cost": cost, "faults": faults}

    def markdown(self, result: Result) -> str:
        parts = [
            "Median processor time of a step (forward, backward, optimizer) with `Forensics` attached and its "
            "`step(loss)` called, over that of the bare twin, whose blocks of steps take turns with it. *Latency*: "
            "steps in which every layer is sampled once."
        ]
        rows = []
        for c in result["cost"]:
            bare, added = f"{number(1e3 * c['bare_s'])} ms", f"{number(1e6 * c['added_s'], 2)} us"
            rows.append([c["model"], bare, f"**{number(c['ratio'], 4)}**", added, c["latency"]])
        parts.append(table(["model", "bare step", "ratio", "added a step", "latency"], rows))
        parts.append(
            f"Faults at step {_FAULT_STEP}: steps until the check that it is for fires, and until any does, per seed; "
            f"a dash where none did within {_PATIENCE} steps. *Before*: runs in which anything fired before the fault."
        )
        rows = []
        for f in result["faults"]:
            cells = [", ".join("–" if r[k] is None else str(r[k]) for r in f["runs"]) for k in ("own", "any")]
            rows.append([f["fault"], f["check"], *cells, sum(r["early"] for r in f["runs"])])
        parts.append(table(["fault", "check", "own check", "any check", "before"], rows))
        return "\n\n".join(parts)


class ForensicsHealthy(Benchmark):
    """False alarms of `kalmanguard.Forensics` with its default settings."""

    name = "forensics-healthy"
    summary = "layer forensics: findings in healthy runs, by check"

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--plants", nargs="+", default=list(PLANTS), metavar="NAME")

    def run(self, options: argparse.Namespace) -> Result:
        seeds = options.seeds or (1 if options.quick else 3)
        runs = [
            (name, optimizer, batch, seed, steps // 4 if options.quick else steps)
            for (name, batch), steps in HEALTHY.items()
            if name in options.plants
            for optimizer in ("adamw", "sgd")
            for seed in range(seeds)
        ]
        # The longest first, so that no process is left alone with one at the end.
        runs.sort(
            key=lambda run: -run[4] * run[2] * (30 if run[0] == "chartransformer" else 3 if run[0] == "cnn" else 1)
        )
        with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
            fired = pool.starmap(healthy, runs, chunksize=1)
        recipes: dict[str, tuple[int, Counter[str]]] = {}
        for (name, optimizer, batch, _, steps), found in sorted(
            zip(runs, fired, strict=True), key=lambda pair: pair[0]
        ):
            recipe = f"{name}, {optimizer}, batch {batch}"
            before, counts = recipes.get(recipe, (0, Counter()))
            recipes[recipe] = (before + steps, counts + Counter(found))
        return {"recipes": [{"recipe": r, "steps": n, "fired": dict(c)} for r, (n, c) in recipes.items()]}

    def markdown(self, result: Result) -> str:
        rows = []
        for h in result["recipes"]:
            fired = [f"{check} {number(1e3 * count / h['steps'], 2)}" for check, count in h["fired"].items()]
            rows.append([h["recipe"], f"{h['steps']:,}", ", ".join(fired) or "none"])
        steps = sum(h["steps"] for h in result["recipes"])
        return "\n\n".join([
            f"Findings per 1,000 healthy steps, by check ({steps:,} steps in all); each new one counts.",
            table(["recipe", "steps", "findings"], rows),
        ])  # fmt: skip


class Deep(nn.Module):
    """Residual rectified layers of equal width."""

    def __init__(self, depth: int, width: int = _WIDTH, activation: Callable[[Tensor], Tensor] = torch.relu) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + self.activation(layer(x)) / len(self.layers) ** 0.5
        return x


def deep(depth: int, rounds: int) -> Result:
    """Cost on a residual network of so many layers."""
    torch.manual_seed(0)
    twins = []
    for _ in range(2):
        model = Deep(depth)
        twins.append((model, torch.optim.AdamW(model.parameters(), lr=1e-3)))
    x = torch.randn(64, _WIDTH)
    steps = [lambda model=model: (model(x) - 1.0).square().mean() for model, _ in twins]
    return interleaved(twins, steps, rounds)


def planted(name: str, rounds: int) -> Result:
    """Cost on a reference plant."""
    plants = [load_plant(name)(seed=0) for _ in range(2)]
    steps = [lambda plant=plant: plant.step_loss(next(plant.loader)) for plant in plants]
    return interleaved([(plant.model, plant.optimizer) for plant in plants], steps, rounds)


def interleaved(twins: list[tuple[nn.Module, Any]], losses: list[Callable[[], Tensor]], rounds: int) -> Result:
    """Medians over blocks of as many steps as forensics has in one turn."""
    seconds: list[list[float]] = [[], []]
    with Forensics(*twins[1]) as forensics:
        block = 16
        for count in range(rounds + 3):
            for which in (0, 1) if count % 2 else (1, 0):
                optimizer = twins[which][1]
                started = time.process_time()
                for _ in range(block):
                    loss = losses[which]()
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                    if which:
                        forensics.step(loss)
                    optimizer.zero_grad()
                if count >= 3:
                    seconds[which].append((time.process_time() - started) / block)
        latency = forensics.detection_latency_steps
    pairs = list(zip(*seconds, strict=True))
    bare = statistics.median(seconds[0])
    return {
        "bare_s": bare,
        "ratio": statistics.median(watched / plain for plain, watched in pairs),
        "added_s": statistics.median(watched - plain for plain, watched in pairs),
        "latency": latency,
    }


def healthy(name: str, optimizer: str, batch: int, seed: int, steps: int) -> dict[str, int]:
    """New findings by check in one healthy run."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    plant = load_plant(name)(seed=seed, optimizer=optimizer, batch_size=batch, momentum=_MOMENTUM[batch])
    fired: Counter[str] = Counter()
    with Forensics(plant.model, plant.optimizer) as forensics:
        known: set[tuple[str, str]] = set()
        for _ in range(steps):
            loss = plant.step_loss(next(plant.loader))
            loss.backward()  # type: ignore[no-untyped-call]
            plant.optimizer.step()
            plant.optimizer.zero_grad()
            report = forensics.step(loss)
            now = {(f.check, f.layer) for f in report.findings}
            fired.update(check for check, _ in now - known)
            known = now
        if forensics.errors:
            fired["errors"] += len(forensics.errors)
    return dict(fired)


class Setup:
    """What a fault is done to: a model that is training."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> None:
        self.model, self.optimizer, self.loss = model, optimizer, loss


def of_plant(name: str, **options: Any) -> Callable[[int], Setup]:
    """Train a reference plant."""

    def make(seed: int) -> Setup:
        plant = load_plant(name)(seed=seed, **options)
        return Setup(plant.model, plant.optimizer, lambda: plant.step_loss(next(plant.loader)))

    return make


def tanh_net(seed: int) -> Setup:
    """Digits, but with tanh."""
    plant = load_plant("mlp")(seed=seed)
    model = nn.Sequential(
        nn.Linear(64, 128),
        nn.Tanh(),
        nn.Linear(128, 128),
        nn.Tanh(),
        nn.Linear(128, 128),
        nn.Tanh(),
        nn.Linear(128, 10),
    )

    def loss() -> Tensor:
        pixels, digits = next(plant.loader)
        return cross_entropy(model(pixels), digits)

    return Setup(model, torch.optim.AdamW(model.parameters(), lr=1e-3), loss)


def in_bfloat16(rate: float) -> Callable[[int], Setup]:
    """Digits with parameters in bfloat16 from the start; the learning rate is ``rate`` after the fault step."""

    def make(seed: int) -> Setup:
        plant = load_plant("mlp")(seed=seed)
        model = plant.model.to(torch.bfloat16)

        def loss() -> Tensor:
            pixels, digits = next(plant.loader)
            return cross_entropy(model(pixels.bfloat16()).float(), digits)

        return Setup(model, torch.optim.AdamW(model.parameters(), lr=max(rate, 2e-3)), loss)

    return make


@torch.no_grad()
def kill_units(setup: Setup) -> None:
    setup.model.layers[0].bias[:96] = -100.0  # type: ignore[index, union-attr]


@torch.no_grad()
def saturate(setup: Setup) -> None:
    setup.model[2].weight.mul_(100.0)  # type: ignore[index, operator, union-attr]


def block_gradient(setup: Setup) -> None:
    setup.model.layers[2].register_forward_pre_hook(lambda module, inputs: (inputs[0].detach(),))  # type: ignore[index, union-attr]


@torch.no_grad()
def scale_weights(setup: Setup) -> None:
    setup.model.layers[2].weight.mul_(10.0)  # type: ignore[index, operator, union-attr]


def _moments(setup: Setup, key: str) -> list[Tensor]:
    return [state[key] for state in setup.optimizer.state.values() if state.get(key) is not None]


def zero_second(setup: Setup) -> None:
    for moment in _moments(setup, "exp_avg_sq"):
        moment.zero_()


def zero_second_silently(setup: Setup) -> None:
    for moment in _moments(setup, "exp_avg_sq"):
        moment.data.zero_()


def garble_first(setup: Setup) -> None:
    generator = torch.Generator().manual_seed(0)
    for moment in _moments(setup, "exp_avg"):
        moment.data.copy_(moment.flatten()[torch.randperm(moment.numel(), generator=generator)].view_as(moment) * 100.0)


def negative_second(setup: Setup) -> None:
    for moment in _moments(setup, "exp_avg_sq"):
        moment.data.mul_(-1.0)


@torch.no_grad()
def sharpen_attention(setup: Setup) -> None:
    for block in setup.model.blocks:  # type: ignore[union-attr]
        width = block.attend.split.weight.shape[1]
        block.attend.split.weight[: 2 * width].mul_(12.0)


@torch.no_grad()
def flatten_attention(setup: Setup) -> None:
    for block in setup.model.blocks:  # type: ignore[union-attr]
        width = block.attend.split.weight.shape[1]
        block.attend.split.weight[:width].zero_()
        block.attend.split.bias[:width].zero_()


def collapse(setup: Setup) -> None:
    def same(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output.mean(0, keepdim=True) + 1e-3 * output

    setup.model.layers[1].register_forward_hook(same)  # type: ignore[index, union-attr]


def tiny_rate(setup: Setup) -> None:
    for group in setup.optimizer.param_groups:
        group["lr"] = 5e-5


def flip(setup: Setup) -> None:
    flip_bit(setup.model.layers[2].weight, (17, 31), 30)  # type: ignore[index, union-attr]


def flip_silently(setup: Setup) -> None:
    flip_bit(setup.model.layers[2].weight.data, (17, 31), 30)  # type: ignore[index, union-attr]


@torch.no_grad()
def garble_weights(setup: Setup) -> None:
    for parameter in setup.model.parameters():
        if parameter.dim() > 1:
            parameter.copy_(parameter.flatten().flip(0).view_as(parameter))


#: Fault: what it is done to, how, and the check that it is for.
FAULTS: dict[str, tuple[Callable[[int], Setup], Callable[[Setup], None], str]] = {
    "mlp: 96 of 128 units get the bias -100": (of_plant("mlp"), kill_units, "dead_units"),
    "tanh network: one layer x100": (tanh_net, saturate, "saturation"),
    "mlp: input of one layer detached": (of_plant("mlp"), block_gradient, "gradient_flow"),
    "mlp: one layer x10": (of_plant("mlp"), scale_weights, "weight_balance"),
    "mlp: exp_avg_sq zeroed": (of_plant("mlp"), zero_second, "optimizer_state"),
    "mlp: exp_avg_sq zeroed through .data": (of_plant("mlp"), zero_second_silently, "optimizer_state"),
    "mlp: exp_avg shuffled and x100": (of_plant("mlp"), garble_first, "optimizer_state"),
    "mlp: exp_avg_sq negative": (of_plant("mlp"), negative_second, "optimizer_state"),
    "chartransformer: query and key weights x12": (of_plant("chartransformer"), sharpen_attention, "attention"),
    "chartransformer: queries zeroed": (of_plant("chartransformer"), flatten_attention, "attention"),
    "mlp: features pulled to their mean": (of_plant("mlp"), collapse, "representation"),
    "mlp in bfloat16: learning rate 5e-5": (in_bfloat16(2e-3), tiny_rate, "precision"),
    "mlp: exponent bit of one weight flips": (of_plant("mlp"), flip, "corruption"),
    "mlp: the same through .data": (of_plant("mlp"), flip_silently, "corruption"),
    "mlp, batch 8, SGD 0.1, momentum 0.9, nothing done to it": (
        of_plant("mlp", optimizer="sgd", batch_size=8),
        lambda setup: None,
        "dead_units",
    ),
    "mlp: weights reversed": (of_plant("mlp"), garble_weights, "loss_spike"),
}


def caught(
    make: Callable[[int], Setup], strike: Callable[[Setup], None], check: str, seed: int
) -> dict[str, int | bool | None]:
    """Steps from a fault to the first finding of its own check, and of any; and whether one came before."""
    torch.manual_seed(seed)
    setup = make(seed)
    own = any_ = None
    early = False
    with Forensics(setup.model, setup.optimizer) as forensics:
        for step in range(1, _FAULT_STEP + _PATIENCE):
            if step == _FAULT_STEP:
                strike(setup)
            loss = setup.loss()
            loss.backward()  # type: ignore[no-untyped-call]
            setup.optimizer.step()
            setup.optimizer.zero_grad()
            report = forensics.step(loss)
            if step < _FAULT_STEP:
                early = early or report.level is not Severity.OK
            elif not report.ok:
                after = step - _FAULT_STEP + 1
                any_ = any_ or after
                if any(finding.check == check for finding in report.findings):
                    own = after
                    break
    if forensics.errors:
        raise RuntimeError(forensics.errors[0])
    return {"own": own, "any": any_, "early": early}
