"""Does the stability score rank models as it should? Models of known weakness against their sound twins."""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice

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
_STRESS_SEEDS = 2
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
    lr = float(case.optimizer.param_groups[0]["lr"])
    optimizer = torch.optim.SGD(case.model.parameters(), lr=lr, momentum=0.9)
    return Case(case.model, optimizer, case.loader, case.probe_loader, case.loss_fn)


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


def converged(seed: int, *, eps: float) -> Case:
    """The MLP after 1,000 steps, where gradients are small, and an Adam with this epsilon for what follows."""
    case = plain(MLPPlant, seed)
    for inputs, targets in islice(case.loader, 1000):
        case.optimizer.zero_grad()
        case.loss_fn(case.model(inputs), targets).backward()
        case.optimizer.step()
    case.optimizer.zero_grad()
    return _renewed(case, lr=float(case.optimizer.param_groups[0]["lr"]), eps=eps)


#: Every model by name.
TWINS: dict[str, Callable[[int], Case]] = {
    "deep": deep,
    "deep, plain": partial(deep, residual=False),
    "deep, plain, no norm": partial(deep, residual=False, norm=False),
    "deep, no norm": partial(deep, norm=False),
    "ResNet": partial(plain, ResNetPlant),
    "ResNet, no norm": bare_resnet,
    "CNN": partial(plain, CNNPlant),
    "CNN, no norm": bare_cnn,
    "CNN, rate x 30": partial(plain, CNNPlant, lr=30 * 2e-3),
    "MLP": partial(plain, MLPPlant),
    "MLP, rate x 30": partial(plain, MLPPlant, lr=30 * 2e-3),
    "MLP, epsilon": small_epsilon,
    "MLP, converged, epsilon 1e-3": partial(converged, eps=1e-3),
    "MLP, converged, epsilon 1e-16": partial(converged, eps=1e-16),
    "MLP, SGD": partial(plain, MLPPlant, optimizer="sgd"),
    "MLP, SGD, rate x 30": partial(plain, MLPPlant, optimizer="sgd", lr=30 * 0.05),
}
#: Name of a weakness: the sound twin and the weak one.
PAIRS = {
    "deep network, no residual connections": ("deep", "deep, plain"),
    "deep network, neither residual nor normalisation": ("deep", "deep, plain, no norm"),
    "deep network, no normalisation": ("deep", "deep, no norm"),
    "ResNet, no normalisation": ("ResNet", "ResNet, no norm"),
    "CNN (3 layers), no normalisation": ("CNN", "CNN, no norm"),
    "CNN, learning rate x 30": ("CNN", "CNN, rate x 30"),
    "MLP, learning rate x 30": ("MLP", "MLP, rate x 30"),
    "MLP with SGD, learning rate x 30": ("MLP, SGD", "MLP, SGD, rate x 30"),
    "MLP from scratch, Adam with epsilon 1e-30": ("MLP", "MLP, epsilon"),
    "MLP after 1,000 steps, Adam with epsilon 1e-16 in place of 1e-3": (
        "MLP, converged, epsilon 1e-3",
        "MLP, converged, epsilon 1e-16",
    ),
}


class Stress(Benchmark):
    """Scores of sound and weak twins, over seeds of their weights and data."""

    name = "stress"
    summary = "stability score: models of known weakness against their sound twins"

    def run(self, options: argparse.Namespace) -> Result:
        seeds = range(options.seeds or (1 if options.quick else 3))
        jobs = [(name, seed) for seed in seeds for name in TWINS]
        found: dict[tuple[str, int], Result] = {}
        if options.cache is not None and options.cache.exists():
            lines = map(json.loads, options.cache.read_text(encoding="utf-8").splitlines())
            found = {(name, seed): result for name, seed, result in lines}
        todo = [job for job in jobs if job not in found]
        with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
            for job, result in zip(todo, pool.imap(judge, todo), strict=True):
                found[job] = result
                if options.cache is not None:
                    with options.cache.open("a", encoding="utf-8") as file:
                        file.write(json.dumps([*job, result]) + "\n")
        return {"cases": [{"twin": name, "seed": seed, **found[name, seed]} for name, seed in jobs]}

    def markdown(self, result: Result) -> str:
        twins: dict[str, dict[int, Result]] = defaultdict(dict)
        for case in result["cases"]:
            twins[case["twin"]][case["seed"]] = case
        rows = []
        below = total = 0
        for name, (good, bad) in PAIRS.items():
            sound, weak = ([case for _, case in sorted(twins[twin].items())] for twin in (good, bad))
            lower = sum(w["score"] < s["score"] for s, w in zip(sound, weak, strict=True))
            below, total = below + lower, total + len(sound)
            kinds = [f"{_mean(sound, kind):.0f} / {_mean(weak, kind):.0f}" for kind in KINDS]
            rows.append([name, _range(sound), _range(weak), f"{lower} of {len(sound)}", *kinds])
        bounds = binomtest(below, total).proportion_ci(0.95, method="exact")
        return "\n\n".join(
            [
                "Score of the sound twin and of the weak one: mean, and least to greatest over seeds of weights and "
                "data (2 seeds of stresses in each); *below*: seeds for which the weak twin scores lower; then the "
                "five parts, sound / weak. All that have learned nothing yet are trained for 200 steps first.",
                table(["weakness", "sound", "weak", "below", *KINDS], rows),
                f"Below: {below} of {total} ({100 * bounds.low:.0f} to {100 * bounds.high:.0f} %, binomial, 95 %). "
                "Seeds of one pair are alike.",
            ]
        )


def judge(job: tuple[str, int]) -> Result:
    """Score one twin."""
    torch.set_num_threads(1)
    name, seed = job
    case = TWINS[name](seed)
    report = stress(
        case.model,
        case.loader,
        case.loss_fn,
        held_out=case.probe_loader,
        optimizer=case.optimizer,
        seeds=_STRESS_SEEDS,
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
