"""Wrong labels on digits: is the score an estimate of the clean share, are the flagged examples the wrong ones?"""

from __future__ import annotations

import argparse
from collections import defaultdict
from typing import NamedTuple

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from benchmarks.benchmark import Benchmark, Result
from benchmarks.markdown import number, table
from kalmanguard.detectors.data_quality import curve_quality, forgetting_events, sample_quality
from kalmanguard.models.digits import load_digits
from kalmanguard.models.mlp import MLPPlant
from kalmanguard.sensors.samples import sample_signals

NOISE = (0.0, 0.1, 0.3, 0.6)
EPOCHS = 20
#: Epoch at which the learning rate is raised for good, and by how much; 0 is right from the start.
DIVERGENCE = {"none": (EPOCHS, 1.0), "in the middle": (EPOCHS // 2, 3e4), "at once": (0, 3e4)}


class Recording(NamedTuple):
    """Margins and losses ``(epochs + 1, n)`` before each epoch and at the end, losses and gradient norms by step."""

    margins: np.ndarray
    losses: np.ndarray
    curve: np.ndarray
    norms: np.ndarray
    wrong: np.ndarray


class DataQualityBenchmark(Benchmark):
    """Scores and rankings of the MLP's training examples, with labels drawn wrong at random."""

    name = "data_quality"
    summary = "wrong labels: score of the data, ranking of the suspects, and a model that diverges"

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--epochs", type=int, default=EPOCHS, help=f"passes over the data (default {EPOCHS})")

    def run(self, options: argparse.Namespace) -> Result:
        seeds = range(options.seeds or (1 if options.quick else 5))
        return {
            "epochs": options.epochs,
            "cases": [
                {"noise": noise, "divergence": name, "seed": seed, **judge(record(seed, noise, options.epochs, name))}
                for name in DIVERGENCE
                for noise in NOISE
                for seed in seeds
            ],
        }

    def markdown(self, result: Result) -> str:
        groups: dict[tuple[str, float], list[Result]] = defaultdict(list)
        for case in result["cases"]:
            groups[case["divergence"], case["noise"]].append(case)
        learned = [
            [f"{noise:.0%}", *(_range(cases, key) for key in ("wrong", *_SCORES, *_QUALITIES))]
            for (divergence, noise), cases in groups.items()
            if divergence == "none"
        ]
        broken = [
            [f"{noise:.0%}, diverges {divergence}", *(_range(cases, key) for key in _SCORES)]
            for (divergence, noise), cases in groups.items()
            if divergence != "none"
        ]
        return "\n\n".join(
            [
                f"The MLP over {result['epochs']} epochs, measured before each and at the end; least to greatest over "
                f"{len({case['seed'] for case in result['cases']})} seeds. *Score*: from margins and from losses of "
                "the examples, and from the training curve alone, which compares data under one recipe only. "
                "*AUROC*: of the area under the margin, the mean loss and the number of forgetting events as rankings "
                "of the wrong labels; *precision* and *recall* of the suspects by margin.",
                table(
                    [
                        *("labels drawn wrong", "share wrong", "score", "score, losses", "score, curve"),
                        *("AUROC", "AUROC, losses", "AUROC, forgetting", "precision", "recall"),
                    ],
                    learned,
                ),
                "The same with a learning rate that is multiplied by 30,000 for good; a dash abstains.",
                table(["labels drawn wrong", "score", "score, losses", "score, curve"], broken),
            ]
        )


_SCORES = ("score", "score_losses", "score_curve")
_QUALITIES = ("auroc", "auroc_losses", "auroc_forgetting", "precision", "recall")


def _range(cases: list[Result], key: str) -> str:
    values = [case[key] for case in cases]
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    missing = f", {len(values) - len(known)} abstain" if len(known) < len(values) else ""
    return f"{number(min(known))} to {number(max(known))}{missing}"


def record(seed: int, noise: float, epochs: int, divergence: str = "none") -> Recording:
    """Train the MLP on digits of which a share ``noise`` has a wrong label, and measure every example each epoch."""
    digits = load_digits()
    inputs, labels = digits.train_inputs, digits.train_targets
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.rand(len(labels), generator=generator) < noise
    labels = torch.where(wrong, (labels + torch.randint(1, 10, labels.shape, generator=generator)) % 10, labels)
    plant = MLPPlant(seed=seed)
    begins, factor = DIVERGENCE[divergence]
    margins, losses, curve, norms = [], [], [], []
    for epoch in range(epochs + 1):
        with torch.no_grad():
            signals = sample_signals(plant.model(inputs), labels)
        margins.append(signals.margin)
        losses.append(signals.loss)
        if epoch == epochs:
            break
        if epoch == begins:
            plant.optimizer.param_groups[0]["lr"] *= factor
        for chosen in torch.randperm(len(labels), generator=generator).split(64):
            plant.optimizer.zero_grad()
            loss = plant.loss_fn(plant.model(inputs[chosen]), labels[chosen])
            loss.backward()
            norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in plant.model.parameters()])))
            plant.optimizer.step()
            curve.append(float(loss.detach()))
    return Recording(np.array(margins), np.array(losses), np.array(curve), np.array(norms), wrong.numpy())


def judge(recording: Recording) -> Result:
    """Scores of a recording, and how well its rankings find the wrong labels."""
    wrong = recording.wrong
    quality = sample_quality(recording.losses, margins=recording.margins)
    by_losses = sample_quality(recording.losses)
    by_curve = curve_quality(recording.curve, gradient_norms=recording.norms)
    found: Result = {
        "wrong": float(wrong.mean()),
        "score": quality.score,
        "score_losses": by_losses.score,
        "score_curve": by_curve.score,
        **dict.fromkeys(_QUALITIES),
    }
    if quality.score is not None and by_losses.score is not None and wrong.any():
        forgotten = np.minimum(forgetting_events(recording.margins > 0), len(recording.margins))
        hits = wrong[quality.suspects]
        found["auroc"] = float(roc_auc_score(wrong, -quality.areas))
        found["auroc_losses"] = float(roc_auc_score(wrong, -by_losses.areas))
        found["auroc_forgetting"] = float(roc_auc_score(wrong, forgotten))
        found["precision"] = float(hits.mean()) if len(hits) else None
        found["recall"] = float(hits.sum() / wrong.sum())
    return found
