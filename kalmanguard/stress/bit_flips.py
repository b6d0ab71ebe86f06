"""Bit flips in the weights, sampled by layer and position of the bit: which ones harm, and which are silent."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import nn

from kalmanguard.faults.fault import seeded
from kalmanguard.faults.state import flip_bit
from kalmanguard.sensors.probe import Probe
from kalmanguard.stress.budget import Clock
from kalmanguard.stress.records import GIVE_BACK, CriticalPoint, Curve, Findings, Layer, Recommendation
from kalmanguard.stress.subject import Subject
from kalmanguard.stress.weight_noise import by_layer

_KEY = 0xB17
#: Flips for each bit position and seed.
_REPEATS = 3


def bit_flips(subject: Subject, *, seeds: Sequence[int], clock: Clock) -> Findings:
    """Flip one bit at a time and measure what is left of what the model has learned.

    For each position of a bit and each repetition a layer is drawn, then one of its elements: every layer counts alike,
    however large it is. A flip is *harmful* if more than 20 % of the learned is lost, *not finite* if the loss says so
    by itself, and *silent* if it is harmful while every loss stays finite.

    Parameters
    ----------
    subject
        What is stressed; each bit is flipped back, bit for bit.
    seeds
        Of the drawing.
    clock
        Time that there is.

    Returns
    -------
    Findings
        The curve over positions from the last of the mantissa to the sign; shares with exact binomial intervals; flips
        and harmful flips of each layer.

    Notes
    -----
    Guarantee: the intervals are EXACT for flips that are drawn in this way (by layer), not for uniform ones over
    memory. Buffers and optimizer states are not struck. Cost: a held-out pass for each flip.
    """
    found = Findings()
    model = subject.trained.model
    probe = subject.probe(model)
    layers = by_layer(model)
    names = list(layers)
    widths = {8 * p.element_size() for parameters in layers.values() for _, p in parameters}
    positions = range(min(widths))
    struck: Counter[str] = Counter()
    harmed: Counter[str] = Counter()
    fatal: Counter[int] = Counter()
    tries = harmful = silent = 0
    rows: list[tuple[float, ...]] = []
    for seed in seeds:
        row: list[float] = []
        for bit in positions:
            total = 0.0
            for repeat in range(_REPEATS):
                if clock.spent:
                    break
                generator = seeded(_KEY, seed, bit, repeat)
                name = names[int(torch.randint(len(names), (1,), generator=generator))]
                loss = _flipped_loss(layers[name], bit, generator, probe)
                left = subject.retained(loss)
                total += left / _REPEATS
                tries += 1
                struck[name] += 1
                if subject.learned and left < 1.0 - GIVE_BACK:
                    harmful += 1
                    harmed[name] += 1
                    fatal[bit] += 1
                    silent += math.isfinite(loss)
            else:
                row.append(total)
        if len(row) < len(positions):
            break
        rows.append(tuple(row))
    if not rows:
        return found
    found.curve = Curve("bit flips", tuple(f"bit {bit}" for bit in positions), tuple(rows), len(seeds))
    found.layers = [Layer(name, 0, 0.0, None, struck[name], harmed[name]) for name in names]
    low, high = interval(harmful, tries)
    found.points.append(
        CriticalPoint(
            "harmful bit flips",
            harmful / tries,
            f"{harmful} of {tries} flips are harmful ({low:.1%} to {high:.1%}), {silent} of them with finite losses.",
        )
    )
    if fatal:
        bits = ", ".join(str(bit) for bit in sorted(fatal))
        found.points.append(CriticalPoint("lowest fatal bit", float(min(fatal)), f"Bits that did harm: {bits}."))
    if silent:
        found.recommendations.append(
            Recommendation(
                "Check weights when they are loaded and while they are used (digests of checkpoints, Forensics' check "
                "for corruption): finiteness alone does not see these.",
                f"{silent} of {harmful} harmful flips leave every held-out loss finite.",
            )
        )
    return found


def _flipped_loss(
    parameters: Sequence[tuple[str, nn.Parameter]], bit: int, generator: torch.Generator, probe: Probe
) -> float:
    place = int(torch.randint(sum(p.numel() for _, p in parameters), (1,), generator=generator))
    for _, parameter in parameters:
        if place < parameter.numel():
            break
        place -= parameter.numel()
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(place), parameter.shape))
    flip_bit(parameter, index, bit)
    try:
        return probe.read().mean
    finally:
        flip_bit(parameter, index, bit)


def interval(hits: int, tries: int, level: float = 0.95) -> tuple[float, float]:
    """Exact binomial confidence interval (Clopper-Pearson) of a share.

    >>> tuple(round(x, 4) for x in interval(0, 10))
    (0.0, 0.3085)
    """
    from scipy.stats import beta

    tail = (1.0 - level) / 2.0
    low = float(beta.ppf(tail, hits, tries - hits + 1)) if hits else 0.0
    high = float(beta.ppf(1.0 - tail, hits + 1, tries - hits)) if hits < tries else 1.0
    return low, high
