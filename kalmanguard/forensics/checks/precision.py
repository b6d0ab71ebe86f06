"""Precision erosion: weights whose update is too small for their own dtype and rounds away."""

from __future__ import annotations

import math

import numpy as np

from kalmanguard.forensics.checks.check import Need
from kalmanguard.forensics.report import Finding, Severity
from kalmanguard.forensics.samples import Array, Sample, Update
from kalmanguard.records import Guarantee

_WARNING_FRAC, _CRITICAL_FRAC = 0.75, 0.95
#: Updates below this share of the layer's largest so far are the end of a schedule, or of what there is to learn.
_SPENT_FRAC = 0.01


class Precision:
    """Share of sampled weights whose true update lies below half the spacing of numbers there and left them unchanged.

    The true update is computed in float64 from the optimizer's state after the step: ``lr m^ / (sqrt(v^) + eps)`` with
    bias correction and weight decay (Adam, AdamW), ``lr`` times the momentum buffer or the gradient (SGD). The spacing
    (ulp) at w is ``2^floor(log2 |w|) eps``. A warning when three quarters, critical when 95 % of the updates that are
    not zero are lost (training in bfloat16 that works loses about half). A weight that did move (stochastic rounding, a
    master copy in float32) is not lost.

    Notes
    -----
    Guarantee: EXACT for the sampled elements, up to the rounding of the computation itself; which share is harmful is
    HEURISTIC: gradients that agree in sign for long are lost as well as noise. Updates whose root mean square is below
    a hundredth of the layer's largest so far are not judged: a schedule that ends at zero loses every one of them, and
    so does SGD where the loss is zero. Other optimizers are not judged. 256 elements of the largest weight. Latency:
    one sample of the layer. Cost: a few passes over 256 numbers.
    """

    name = "precision"
    needs = frozenset({Need.UPDATES})

    def __init__(self) -> None:
        self._largest: dict[str, float] = {}

    def judge(self, sample: Sample) -> list[Finding]:
        found = []
        for seen in sample.layers:
            update = seen.update
            if update is None:
                continue
            change = true_update(update)
            if change is None:
                continue
            size = math.sqrt(float(np.square(change).mean()))
            self._largest[seen.name] = max(size, self._largest.get(seen.name, 0.0))
            if size > _SPENT_FRAC * self._largest[seen.name]:
                found.append(self._judge(seen.name, update, change))
        return found

    def forget(self) -> None:
        """Nothing to forget."""

    def _judge(self, name: str, update: Update, change: Array) -> Finding:
        moving = change != 0.0
        lost = moving & (update.after == update.before) & (np.abs(change) < 0.5 * spacing(update))
        share = float(lost.sum() / max(1, int(moving.sum())))
        severity = (
            Severity.CRITICAL
            if share >= _CRITICAL_FRAC
            else Severity.WARNING
            if share >= _WARNING_FRAC
            else Severity.OK
        )
        message = f"{share:.0%} of the updates are lost to rounding: below half the spacing of the weight's dtype"
        guarantee = Guarantee.EXACT if severity is not Severity.OK else Guarantee.HEURISTIC
        return Finding(self.name, name, severity, share, message, guarantee)


def spacing(update: Update) -> Array:
    """Distance from each weight to the next larger number of its dtype."""
    _, exponent = np.frexp(update.before)
    spaced: Array = np.ldexp(update.precision, exponent - 1)
    return spaced


def true_update(update: Update) -> Array | None:
    """The step that the optimizer meant to take, in float64; ``None`` where that is not known or not finite."""
    group, state = update.group, update.state
    rate, decay = float(group.get("lr", 0.0)), float(group.get("weight_decay") or 0.0)
    if update.optimizer in ("Adam", "AdamW") and {"exp_avg", "exp_avg_sq"} <= set(state) and update.count > 0:
        first, second = (float(b) for b in group["betas"])
        v = state.get("max_exp_avg_sq", state["exp_avg_sq"]) / (1.0 - second**update.count)
        step = state["exp_avg"] / (1.0 - first**update.count) / (np.sqrt(np.maximum(v, 0.0)) + float(group["eps"]))
        if update.optimizer == "AdamW" or group.get("decoupled_weight_decay"):
            step = step + decay * update.before
    elif update.optimizer == "SGD" and update.gradient is not None:
        gradient = -update.gradient if group.get("maximize") else update.gradient
        gradient = gradient + decay * update.before
        momentum = float(group.get("momentum") or 0.0)
        buffer = state.get("momentum_buffer")
        step = gradient
        if momentum and buffer is not None:
            step = gradient + momentum * buffer if group.get("nesterov") else buffer
    else:
        return None
    change: Array = rate * step
    return change if math.isfinite(float(change.sum())) else None
