"""Optimizer state: moments that are impossible, or that the optimizer's own recursion cannot have made."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from kalmanguard.forensics.baseline import Baseline
from kalmanguard.forensics.checks.check import Need
from kalmanguard.forensics.report import Finding, Severity
from kalmanguard.forensics.samples import Array, Sample, Update
from kalmanguard.records import Guarantee

#: State that is a mean of squares: never negative.
SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")
_SLACK = 1e-3
_TINY = 1e-36
_JUMP, _SPREADS = math.log(30.0), 10.0


@dataclass(slots=True)
class _Layer:
    count: int = 0
    second: Array | None = None
    sizes: dict[str, Baseline] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)


class OptimizerState:
    """Moments against what the optimizer's update rule allows, element by element, from its first step on.

    1. Not finite, or a second moment that is negative.
    2. The recursion itself, over the sampled step, with the gradient that was used: ``v = b2 v + (1 - b2) g^2`` and
       ``m = b1 m + (1 - b1) g`` (Adam, AdamW), ``v = a v + (1 - a) g^2`` (RMSprop), ``buf = mu buf + (1 - d) g`` (SGD
       with momentum); an L2 penalty and ``maximize`` are in ``g``.
    3. Between two samples of a layer that lie k steps apart, ``v_t >= b2^k v_{t-k}``: a square was added at each step,
       whatever the gradients were. A second moment that was zeroed or scaled down in between violates that.
    4. Any optimizer: the logarithm of the mean magnitude jumps, by more than 30 times and 10 usual changes.

    Notes
    -----
    Guarantee: EXACT for 1 to 3 up to rounding (a relative 1e-3, and more where the state itself is kept in 16 bits):
    an optimizer of torch's own that keeps its rule cannot violate them. HEURISTIC for 4. A state that was reset or
    loaded (the optimizer's counter does not continue) is a warning, and a new start: `Forensics.forget` announces one
    that is meant. A second moment that is scaled *up* between two samples follows from no bound and is seen by 4 alone,
    or by the corruption check. 256 elements of the largest weight of a layer are looked at. Latency: one sample of the
    layer. Cost: some thirty passes over 256 numbers.
    """

    name = "optimizer_state"
    needs = frozenset({Need.UPDATES})

    def __init__(self) -> None:
        self._layers: dict[str, _Layer] = {}

    def judge(self, sample: Sample) -> list[Finding]:
        return [self._judge(seen.name, seen.update) for seen in sample.layers if seen.update is not None]

    def forget(self) -> None:
        self._layers.clear()

    def _judge(self, name: str, update: Update) -> Finding:
        layer = self._layers.setdefault(name, _Layer())
        worst = self._impossible(name, update) or self._reset(name, layer, update)
        worst = worst or self._lowered(name, layer, update) or self._off_rule(name, update)
        jump = self._jumped(name, layer, update)
        layer.count = update.count
        layer.second = update.state.get("exp_avg_sq", update.state.get("square_avg"))
        return worst or jump or Finding(self.name, name, Severity.OK, 0.0, "as the update rule makes them")

    def _impossible(self, name: str, update: Update) -> Finding | None:
        for key, values in (*update.state_before.items(), *update.state.items()):
            if not np.isfinite(values).all():
                return self._exact(name, math.nan, f"{key} is not finite")
            if key in SECOND_MOMENTS and values.min() < 0.0:
                return self._exact(name, float(values.min()), f"{key}, a mean of squares, is negative")
        return None

    def _reset(self, name: str, layer: _Layer, update: Update) -> Finding | None:
        if 0 <= update.count_before < layer.count:
            message = (
                f"the optimizer's state was reset or reloaded: its step {layer.count} is {update.count_before} now"
            )
            layer.second, layer.last = None, {}
            return Finding(self.name, name, Severity.WARNING, float(layer.count - update.count_before), message)
        return None

    def _lowered(self, name: str, layer: _Layer, update: Update) -> Finding | None:
        second = update.state_before.get("exp_avg_sq", update.state_before.get("square_avg"))
        decay = _decay(update)
        slack = _SLACK + 4.0 * update.state_precision * max(1, update.count_before - layer.count)
        if second is None or layer.second is None or decay is None or update.count_before < 0 or slack > 0.5:
            return None
        least = layer.second * decay ** (update.count_before - layer.count) * (1.0 - slack)
        low = second < least - _TINY
        if not low.any():
            return None
        share = float(low.mean())
        message = f"second moments fell faster than their decay allows, in {share:.0%} of the sampled elements"
        return self._exact(name, share, message)

    def _off_rule(self, name: str, update: Update) -> Finding | None:
        if update.gradient is None or not _stepped(update):
            return None
        slack = _SLACK + 4.0 * update.state_precision
        for key, expected, size in _expected(update, update.gradient):
            actual = update.state.get(key)
            if actual is None or not np.isfinite(expected).all():
                continue
            off = np.abs(actual - expected) > slack * size + _TINY
            if off.any():
                share = float(off.mean())
                message = f"{key} does not follow from the gradient, in {share:.0%} of the sampled elements"
                return self._exact(name, share, message)
        return None

    def _jumped(self, name: str, layer: _Layer, update: Update) -> Finding | None:
        found = None
        for key, values in update.state.items():
            mean = float(np.abs(values).mean())
            if not 0.0 < mean < math.inf:
                continue
            size = math.log(mean)
            change = abs(size - layer.last.get(key, size))
            usual = layer.sizes.setdefault(key, Baseline(floor=0.05))
            if usual.ready and change > max(_JUMP, usual.level + _SPREADS * usual.spread):
                message = f"{key} changed by a factor of {math.exp(min(change, 700.0)):.3g} from one sample to the next"
                found = Finding(self.name, name, Severity.WARNING, change, message)
            else:
                usual.learn(change)
            layer.last[key] = size
        return found

    def _exact(self, name: str, statistic: float, message: str) -> Finding:
        return Finding(self.name, name, Severity.CRITICAL, statistic, message, Guarantee.EXACT)


def _stepped(update: Update) -> bool:
    if update.count_before >= 0:
        return update.count == update.count_before + 1
    # Without a counter, a step that a guard has dropped shows as nothing having changed.
    before = update.state_before
    same = all(key in before and np.array_equal(values, before[key]) for key, values in update.state.items())
    return not (same and np.array_equal(update.after, update.before))


def _decay(update: Update) -> float | None:
    if update.optimizer in ("Adam", "AdamW"):
        return float(update.group["betas"][1])
    if update.optimizer == "RMSprop":
        return float(update.group["alpha"])
    return None


def _expected(update: Update, gradient: Array) -> list[tuple[str, Array, Array]]:
    """Name, expected values, and the size of the terms that they are sums of (which rounding is relative to)."""
    group, before = update.group, update.state_before
    g = -gradient if group.get("maximize") else gradient
    decoupled = update.optimizer == "AdamW" or group.get("decoupled_weight_decay")
    if group.get("weight_decay") and not decoupled:
        g = g + float(group["weight_decay"]) * update.before
    zero = np.zeros_like(g)
    if update.optimizer in ("Adam", "AdamW"):
        first, second = (float(b) for b in group["betas"])
        m, v = before.get("exp_avg", zero), before.get("exp_avg_sq", zero)
        return [
            _mixed("exp_avg", first, m, 1.0 - first, g),
            _mixed("exp_avg_sq", second, v, 1.0 - second, g * g),
        ]
    if update.optimizer == "RMSprop":
        alpha = float(group["alpha"])
        return [_mixed("square_avg", alpha, before.get("square_avg", zero), 1.0 - alpha, g * g)]
    if update.optimizer == "SGD" and group.get("momentum"):
        buffer = before.get("momentum_buffer")
        if buffer is None:
            return [("momentum_buffer", g, np.abs(g))]
        return [_mixed("momentum_buffer", float(group["momentum"]), buffer, 1.0 - float(group["dampening"]), g)]
    return []


def _mixed(key: str, a: float, x: Array, b: float, y: Array) -> tuple[str, Array, Array]:
    return key, a * x + b * y, np.abs(a * x) + np.abs(b * y)
