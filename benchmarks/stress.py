"""Does the stability score rank models as it should? Models of known weakness against their sound twins."""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from scipy.stats import binomtest
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu

from benchmarks.benchmark import Benchmark, Result
from benchmarks.markdown import number, table
from kalmanguard.models.cnn import CNNPlant
from kalmanguard.models.digits import load_digits
from kalmanguard.models.mlp import MLPPlant
from kalmanguard.models.plant import initialised_with
from kalmanguard.models.resnet import ResNetPlant
from kalmanguard.models.stream import ShuffledStream, in_batches
from kalmanguard.stress import KINDS, stress

_BUDGET_S = 600.0  # never reached: a score must be complete here
_DEPTH, _WIDTH = 16, 32


@dataclass(frozen=True, slots=True)
class Case:
    """A model with its data and recipe, as a stress test takes it."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loader: ShuffledStream
    probe_loader: list[tuple[Tensor, Tensor]]
    loss_fn: Callable[[Tensor, Tensor], Tensor]


class Deep(nn.Module):
    """A deep network of equal layers, with or without residual connections and normalisation."""

    def __init__(self, *, residual: bool, norm: bool) -> None:
        super().__init__()
        self.first = nn.Linear(64, _WIDTH)
        self.layers = nn.ModuleList(nn.Linear(_WIDTH, _WIDTH) for _ in range(_DEPTH))
        self.norms = nn.ModuleList(nn.LayerNorm(_WIDTH) if norm else nn.Identity() for _ in range(_DEPTH))
        self.last = nn.Linear(_WIDTH, 10)
        self.residual = residual

    def forward(self, inputs: Tensor) -> Tensor:
        values = self.first(inputs)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            change = relu(layer(norm(values)))
            values = values + change if self.residual else change
        return self.last(values)


def deep(seed: int, *, residual: bool = True, norm: bool = True) -> Case:
    """The deep network on digits."""
    digits = load_digits()
    with initialised_with(seed):
        model = Deep(residual=residual, norm=norm)
    return Case(
        model,
        torch.optim.AdamW(model.parameters(), lr=2e-3),
        ShuffledStream(digits.train_inputs, digits.train_targets, seed=seed, batch_size=64, device=torch.device("cpu")),
        in_batches(digits.probe_inputs, digits.probe_targets, batch_size=128, device=torch.device("cpu")),
        cross_entropy,
    )


def plain(make: Callable[..., object], seed: int, **options: object) -> Case:
    """A plant as it is."""
    plant = make(seed=seed, **options)
    return Case(plant.model, plant.optimizer, plant.loader, plant.probe_loader, plant.loss_fn)


def bare_cnn(seed: int) -> Case:
    """The CNN without its BatchNorm."""
    case = plain(CNNPlant, seed)
    for name, module in list(case.model.features.named_children()):
        if isinstance(module, nn.BatchNorm2d):
            case.model.features._modules[name] = nn.Identity()
    return _renewed(case, lr=2e-3)


def bare_resnet(seed: int) -> Case:
    """The residual network without its BatchNorm."""
    case = plain(ResNetPlant, seed)
    for parent in list(case.model.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, nn.BatchNorm2d):
                setattr(parent, name, nn.Identity())
    return _renewed(case, lr=float(case.optimizer.param_groups[0]["lr"]))


def _renewed(case: Case, *, lr: float, eps: float = 1e-8) -> Case:
    optimizer = torch.optim.AdamW(case.model.parameters(), lr=lr, eps=eps)
    return Case(case.model, optimizer, case.loader, case.probe_loader, case.loss_fn)


def small_epsilon(seed: int) -> Case:
    """The MLP under an Adam whose second moment forgets at once and whose epsilon is next to nothing.

    The gradients of a model that fits its data vanish; divided by themselves they are steps of full size again.
    """
    case = plain(MLPPlant, seed)
    lr = float(case.optimizer.param_groups[0]["lr"])
    optimizer = torch.optim.AdamW(case.model.parameters(), lr=lr, eps=1e-30, betas=(0.9, 0.9))
    return Case(case.model, optimizer, case.loader, case.probe_loader, case.loss_fn)


#: Name of a comparison: the sound twin and the weak one.
PAIRS: dict[str, tuple[Callable[[int], Case], Callable[[int], Case]]] = {
    "deep, no residual connections": (deep, partial(deep, residual=False)),
    "deep, neither residual nor normalisation": (deep, partial(deep, residual=False, norm=False)),
    "deep, no normalisation": (deep, partial(deep, norm=False)),
    "CNN, no normalisation": (partial(plain, CNNPlant), bare_cnn),
    "ResNet, no normalisation": (partial(plain, ResNetPlant), bare_resnet),
    "MLP, learning rate x 30": (partial(plain, MLPPlant), partial(plain, MLPPlant, lr=30 * 2e-3)),
    "MLP with SGD, learning rate x 30": (
        partial(plain, MLPPlant, optimizer="sgd"),
        partial(plain, MLPPlant, optimizer="sgd", lr=30 * 0.05),
    ),
    "CNN, learning rate x 30": (partial(plain, CNNPlant), partial(plain, CNNPlant, lr=30 * 2e-3)),
    "MLP, Adam with epsilon 1e-30": (partial(plain, MLPPlant), small_epsilon),
}


class Stress(Benchmark):
    """Scores of sound and weak twins, over seeds of their weights and data."""

    name = "stress"
    summary = "stability score: models of known weakness against their sound twins"

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--pairs", help="names of pairs, separated by semicolons (default all)")

    def run(self, options: argparse.Namespace) -> Result:
        seeds = options.seeds or (1 if options.quick else 5)
        names = options.pairs.split(";") if options.pairs else list(PAIRS)
        jobs = [(name, side, seed) for name in names for side in (0, 1) for seed in range(seeds)]
        found: dict[str, Result] = {}
        if options.cache is not None and options.cache.exists():
            found = {key: value for key, value in map(json.loads, options.cache.read_text().splitlines())}
        todo = [job for job in jobs if repr(job) not in found]
        with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
            for job, result in zip(todo, pool.imap(judge, todo), strict=True):
                found[repr(job)] = result
                if options.cache is not None:
                    with options.cache.open("a", encoding="utf-8") as file:
                        file.write(json.dumps([repr(job), result]) + "\n")
        return {"cases": [{"pair": n, "side": side, "seed": s, **found[repr((n, side, s))]} for n, side, s in jobs]}

    def markdown(self, result: Result) -> str:
        groups: dict[str, dict[int, tuple[Result, Result]]] = defaultdict(dict)
        for case in result["cases"]:
            pair = groups[case["pair"]].get(case["seed"], ({}, {}))
            groups[case["pair"]][case["seed"]] = (case, pair[1]) if case["side"] == 0 else (pair[0], case)
        rows = []
        below = total = 0
        for name, pairs in groups.items():
            sound, weak = ([pair[side] for pair in pairs.values()] for side in (0, 1))
            lower = sum(w["score"] < s["score"] for s, w in pairs.values())
            below, total = below + lower, total + len(pairs)
            kinds = [f"{_mean(sound, kind):.0f} / {_mean(weak, kind):.0f}" for kind in KINDS]
            rows.append([name, _range(sound), _range(weak), f"{lower} of {len(pairs)}", *kinds])
        bounds = binomtest(below, total).proportion_ci(0.95, method="exact")
        return "\n\n".join(
            [
                "Score of the sound twin and of the weak one: mean, and least to greatest over seeds of weights and "
                "data (3 seeds of stresses in each); *below*: seeds for which the weak twin scores lower; then the "
                "five parts, sound / weak. All are trained for 200 steps first.",
                table(["weakness", "sound", "weak", "below", *KINDS], rows),
                f"Below: {below} of {total} ({100 * bounds.low:.0f} to {100 * bounds.high:.0f} %, binomial, 95 %). "
                "Seeds of one pair are alike.",
            ]
        )


def judge(job: tuple[str, int, int]) -> Result:
    """Score one twin."""
    torch.set_num_threads(1)
    name, side, seed = job
    case = PAIRS[name][side](seed)
    report = stress(
        case.model,
        case.loader,
        case.loss_fn,
        held_out=case.probe_loader,
        optimizer=case.optimizer,
        budget_s=_BUDGET_S,
        seed=seed,
    )
    if not report.complete:
        raise RuntimeError(f"{name}: the score is not complete: {report.left_out}")
    scores = {curve.kind: 100.0 * curve.score for curve in report.curves}
    return {"score": report.score, "error": report.standard_error, "loss": report.to_dict()["loss"], **scores}


def _mean(cases: list[Result], key: str) -> float:
    return sum(case[key] for case in cases) / len(cases)


def _range(cases: list[Result]) -> str:
    scores = [case["score"] for case in cases]
    return f"{number(_mean(cases, 'score'))} ({number(min(scores))} to {number(max(scores))})"
