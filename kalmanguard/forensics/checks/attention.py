"""Attention: rows that collapse onto single keys or become all alike, and logits that grow without bound."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from kalmanguard.forensics.baseline import Baseline
from kalmanguard.forensics.checks.check import Need
from kalmanguard.forensics.report import Finding, Severity
from kalmanguard.forensics.samples import Array, Sample

#: Rows with fewer allowed keys say nothing about collapse.
_FEWEST_KEYS = 4
_COLLAPSED, _FALLEN_FRAC = 0.1, 0.3
_ALIKE, _APART = 0.05, 0.25
_LOGIT_WARNING, _LOGIT_CRITICAL, _LOGIT_GROWTH = 50.0, 200.0, 4.0


class Rows(NamedTuple):
    """Mean entropy over its greatest possible value, mean total variation between two rows, and largest logit."""

    entropy: float
    difference: float
    logit: float


@dataclass(slots=True)
class _Layer:
    entropy: Baseline = field(default_factory=lambda: Baseline(memory=0))
    difference: float = 0.0
    logit: Baseline = field(default_factory=lambda: Baseline(memory=0))


class AttentionHealth:
    """Real attention rows of sampled heads and queries: entropy, difference between rows, and largest logit.

    *Collapse*: the mean of ``H(row) / log(allowed keys)`` over rows with at least four allowed keys is below 0.1 and
    below 0.3 of what it was at first (warning), below half of both (critical). *Rank collapse*: any two queries attend
    alike: their rows, renormalised over the keys that both may see, differ by less than 0.05 in total variation, after
    they differed by more than 0.25. *Logit growth*: ``max |q.k| / sqrt(d)`` (as the call scales it) above 50 and 4
    times the first (warning), above 200 (critical).

    Notes
    -----
    Guarantee: HEURISTIC. Uniform attention at the start, one head that copies the token before, or a row with one
    allowed key are all normal and none is judged: the mean over the sampled heads (at most 4) is. So the collapse of
    one head in many is not seen. Seen are ``scaled_dot_product_attention`` (causal, masked, grouped queries),
    ``nn.MultiheadAttention`` and softmax over a product that torch functions made; not seen are other kernels
    (FlashAttention called directly, xFormers, FlexAttention) and compiled code. Latency: one sample of the attention,
    after a baseline of 5. Cost: 2 examples x 4 heads x 8 queries against all keys.
    """

    name = "attention"
    needs = frozenset({Need.ATTENTION})

    def __init__(self) -> None:
        self._layers: dict[str, _Layer] = {}

    def judge(self, sample: Sample) -> list[Finding]:
        found = []
        for seen in sample.layers:
            if seen.attention is not None:
                rows = measure(seen.attention.logits)
                if rows is not None:
                    found.append(self._judge(seen.name, rows))
        return found

    def forget(self) -> None:
        """Nothing to forget: baselines hold for the run."""

    def _judge(self, name: str, rows: Rows) -> Finding:
        layer = self._layers.setdefault(name, _Layer())
        if not rows.logit < np.inf:
            return Finding(self.name, name, Severity.CRITICAL, rows.logit, "an attention logit is not finite")
        first, logit = layer.entropy, layer.logit
        candidates = []
        if first.ready:
            if rows.entropy < min(_COLLAPSED, _FALLEN_FRAC * first.level):
                sharp = rows.entropy < 0.5 * min(_COLLAPSED, _FALLEN_FRAC * first.level)
                message = f"attention collapses onto single keys: {rows.entropy:.1%} of the greatest entropy"
                message += f", {first.level:.0%} at first"
                severity = Severity.CRITICAL if sharp else Severity.WARNING
                candidates.append(Finding(self.name, name, severity, rows.entropy, message))
            if rows.difference < _ALIKE and layer.difference > _APART:
                message = (
                    f"all queries attend alike: rows differ by {rows.difference:.2%}, {layer.difference:.0%} before"
                )
                candidates.append(Finding(self.name, name, Severity.WARNING, rows.difference, message))
            if rows.logit > max(_LOGIT_WARNING, _LOGIT_GROWTH * logit.level):
                severity = Severity.CRITICAL if rows.logit > _LOGIT_CRITICAL else Severity.WARNING
                message = f"attention logits reach {rows.logit:.3g}, {logit.level:.3g} at first"
                candidates.append(Finding(self.name, name, severity, rows.logit, message))
        else:
            first.learn(rows.entropy)
            logit.learn(rows.logit)
        layer.difference = max(0.98 * layer.difference, rows.difference)
        if candidates:
            return max(candidates, key=lambda f: f.severity.rank)
        return Finding(self.name, name, Severity.OK, rows.entropy, "attention rows are spread and differ")


def measure(logits: Array) -> Rows | None:
    """Measure sampled rows ``(..., queries, keys)``; ``None`` where too few keys are allowed to say anything.

    Examples
    --------
    >>> uniform = measure(np.zeros((1, 1, 2, 8)))
    >>> uniform.entropy, uniform.difference, uniform.logit
    (1.0, 0.0, 0.0)
    >>> round(measure(100.0 * np.eye(8)).entropy, 6)
    0.0
    """
    if np.isnan(logits).any():
        return Rows(np.nan, np.nan, np.inf)
    allowed = logits > -1e30
    keys = allowed.sum(-1)
    if not (keys >= _FEWEST_KEYS).any():
        return None
    known = np.where(allowed, logits.astype(np.float64), -np.inf)
    largest = float(np.abs(np.where(allowed, known, 0.0)).max())
    if not largest < np.inf:
        return Rows(np.nan, np.nan, np.inf)
    weights = np.exp(known - np.maximum(known.max(-1, keepdims=True), -1e300))
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    entropy = -(weights * np.log(np.maximum(weights, 1e-300))).sum(-1)
    long = keys >= _FEWEST_KEYS
    share = float((entropy[long] / np.log(keys[long])).mean())
    return Rows(min(1.0, max(0.0, share)), _difference(weights, allowed), largest)


def _difference(weights: Array, allowed: np.ndarray) -> float:
    """Mean total variation between neighbouring sampled rows, over the keys that both may see."""
    both = allowed[..., 1:, :] & allowed[..., :-1, :]
    first, second = (np.where(both, part, 0.0) for part in (weights[..., 1:, :], weights[..., :-1, :]))
    mass = np.minimum(first.sum(-1), second.sum(-1))
    use = (both.sum(-1) >= _FEWEST_KEYS) & (mass > 1e-6)
    if not use.any():
        return 0.0
    first, second = (part[use] / part[use].sum(-1, keepdims=True) for part in (first, second))
    return float(0.5 * np.abs(first - second).sum(-1).mean())
