"""Per-sample signals of a classifier, from its logits alone: loss, confidence, margin, entropy, gradient norms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from kalmanguard.errors import ConfigurationError
from kalmanguard.records import FloatArray

#: Elements of one piece of work: small against the logits, large against the cost of a kernel launch.
_PIECE = 1 << 20
#: Differences of logits below this are the same: their exponential is zero in every dtype.
_LOWEST = -1000.0


@dataclass(frozen=True, slots=True, eq=False)
class SampleSignals:
    """Signals of each sample, arrays of shape ``(B,)``, float64; of a sequence the mean over its counted tokens.

    A sample without any counted token, or with a logit that is nan or ``+inf``, is nan.

    Attributes
    ----------
    loss
        Cross-entropy ``-ln p_y`` in nats.
    confidence
        Probability of the most likely class, ``max_k p_k``.
    margin
        Logit of the target minus the largest other one; negative where another class is preferred.
    entropy
        ``-sum_k p_k ln p_k`` in nats.
    correct
        1 where the target has the largest logit (ties count as wrong), else 0; of a sequence the share of its tokens.
    logit_gradient_l1, logit_gradient_l2
        Norms of the gradient of the loss with respect to the logits, ``p - onehot(y)``; of a sequence the mean of its
        tokens' norms. They are not norms of the gradient with respect to the parameters.
    tokens
        Counted positions.
    """

    loss: FloatArray
    confidence: FloatArray
    margin: FloatArray
    entropy: FloatArray
    correct: FloatArray
    logit_gradient_l1: FloatArray
    logit_gradient_l2: FloatArray
    tokens: FloatArray


class _Others(NamedTuple):
    """Sums over the classes other than the target, relative to their largest logit ``top``: of ``e``, ``e^2``, ``e d``.

    ``d`` is a logit minus ``top``, and ``e`` its exponential.
    """

    top: Tensor
    mass: Tensor
    square: Tensor
    moment: Tensor


def sample_signals(
    logits: Tensor, targets: Tensor, *, ignore_index: int = -100, piece_elements: int = _PIECE
) -> SampleSignals:
    """Measure every sample of a batch.

    With ``q`` the softmax over the classes other than the target and ``s = 1 - p_y``::

        loss = softplus(d),  s = sigmoid(d),  d = logsumexp_{k != y} z_k - z_y
        |p - onehot|_1 = 2 s,    |p - onehot|_2 = s sqrt(1 + sum q_k^2),    H(p) = H(s) + s H(q)

    so that nothing is lost to cancellation where ``p_y`` is close to 1.

    Parameters
    ----------
    logits
        Shape ``(B, C)``, or ``(B, T, V)`` with the classes last; any real floating-point dtype. Half precision is
        computed in float32, a piece at a time.
    targets
        Class indices of shape ``(B,)`` or ``(B, T)``. For a causal language model pass ``logits[:, :-1]`` and
        ``labels[:, 1:]``; such views are not copied as a whole.
    ignore_index
        Target of positions that do not count.
    piece_elements
        Largest number of logits that are worked on at a time; working memory is about four times that, in float32.

    Raises
    ------
    ConfigurationError
        The shapes or dtypes do not fit, there are fewer than two classes, or a target is no class.

    Notes
    -----
    Guarantee: EXACT up to rounding, in the sense of the formulas. No autograd graph is made or kept. One copy to the
    host, at the end. Cost: some ten passes over the logits, a small piece at a time.

    Examples
    --------
    >>> signals = sample_signals(torch.tensor([[2.0, 0.0, 0.0], [2.0, 0.0, 0.0]]), torch.tensor([0, 1]))
    >>> signals.loss.round(3), signals.margin, signals.correct
    (array([0.24, 2.24]), array([ 2., -2.]), array([1., 0.]))
    >>> signals.logit_gradient_l1.round(3)
    array([0.426, 1.787])
    """
    values, labels = _checked(logits, targets, piece_elements)
    with torch.no_grad():
        counted = labels != ignore_index
        foreign = counted & ((labels < 0) | (labels >= values.shape[-1]))
        safe = torch.where(counted & ~foreign, labels, 0)
        tokens = counted.sum(1)
        means = _sums(values, safe, counted, piece_elements) / tokens
        # One copy for everything.
        rows = torch.cat([means, tokens[None].to(means), foreign.sum(1)[None].to(means)])
        table = rows.cpu().double().numpy()
    if table[-1].any():
        raise ConfigurationError(
            f"{int(table[-1].sum())} of the targets are no class from 0 to {values.shape[-1] - 1}; mark positions that "
            f"do not count with ignore_index = {ignore_index}."
        )
    return SampleSignals(*np.ascontiguousarray(table[:-1]))


def _checked(logits: Tensor, targets: Tensor, piece_elements: int) -> tuple[Tensor, Tensor]:
    """Logits ``(B, T, V)`` and int64 targets ``(B, T)`` on their device, with ``T = 1`` for plain classification."""
    for name, tensor in (("logits", logits), ("targets", targets)):
        if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided or tensor.is_meta:
            raise ConfigurationError(f"{name} must be a dense tensor with values; got {_kind(tensor)}.")
    if not logits.is_floating_point():
        raise ConfigurationError(f"logits are {logits.dtype}; pass real floating-point logits.")
    if targets.is_floating_point() or targets.is_complex() or targets.dtype is torch.bool:
        raise ConfigurationError(f"targets are {targets.dtype}; pass class indices.")
    if logits.ndim not in (2, 3) or logits.shape[:-1] != targets.shape:
        raise ConfigurationError(
            f"logits of shape {tuple(logits.shape)} and targets of shape {tuple(targets.shape)} do not fit: pass "
            "(B, C) with (B,), or (B, T, V) with (B, T), the classes last."
        )
    if logits.shape[-1] < 2:
        raise ConfigurationError(f"There are {logits.shape[-1]} classes; a margin needs at least 2.")
    if piece_elements < 1:
        raise ConfigurationError(f"piece_elements = {piece_elements} must be at least 1.")
    values, labels = logits.detach(), targets.detach().to(logits.device, torch.int64)
    return (values[:, None], labels[:, None]) if values.ndim == 2 else (values, labels)


def _kind(value: object) -> str:
    return f"one on the {value.device} device, {value.layout}" if isinstance(value, Tensor) else type(value).__name__


def _sums(values: Tensor, labels: Tensor, counted: Tensor, piece: int) -> Tensor:
    """Sums of the seven signals over the counted tokens of each sample, shape ``(7, B)``."""
    batch, length, classes = values.shape
    dtype = torch.float64 if values.dtype is torch.float64 else torch.float32
    sums = torch.zeros((7, batch), dtype=dtype, device=values.device)
    positions = max(1, piece // classes)
    samples, tokens = max(1, positions // max(1, length)), min(positions, max(1, length))
    for first in range(0, batch, samples):
        block = slice(first, first + samples)
        for start in range(0, length, tokens):
            span = slice(start, start + tokens)
            signals = _signals(values[block, span], labels[block, span], dtype, piece)
            # Not a product: what does not count may be nan.
            signals = signals.masked_fill(~counted[block, span], 0.0)
            sums[:, block] += signals.sum(2)
    return sums


def _signals(logits: Tensor, labels: Tensor, dtype: torch.dtype, piece: int) -> Tensor:
    """The seven signals of each token, shape ``(7, b, t)``."""
    own = logits.gather(2, labels[..., None])[..., 0].to(dtype)
    own = own.masked_fill(own == torch.inf, torch.nan)
    classes = logits.shape[-1]
    width = max(2, min(classes, piece // max(1, labels.numel())))
    others: _Others | None = None
    for start in range(0, classes, width):
        part = _others(logits[..., start : start + width], labels - start, dtype)
        others = part if others is None else _merged(others, part)
    assert others is not None
    top, mass, square, moment = others
    # Where every other class is ruled out (-inf), there is no mass to share.
    alone = mass == 0
    known = mass.masked_fill(alone, 1.0)
    lead = (top + known.log()).masked_fill(alone, -torch.inf) - own
    wrong, right = torch.sigmoid(lead), torch.sigmoid(-lead)
    # torch's softplus is linear above 20.
    loss = -logsigmoid(-lead)
    margin = own - top.masked_fill(alone, -torch.inf)
    entropy_of_others = (known.log() - moment / known).masked_fill(alone, 0.0)
    # s ln s is 0 at 0, where its logarithm is not finite.
    surprise = -logsigmoid(lead).masked_fill(wrong == 0, 0.0)
    surprise = wrong * surprise + right * loss.masked_fill(right == 0, 0.0)
    entropy = surprise + wrong * entropy_of_others
    confidence = torch.where(margin > 0, right, wrong / known)
    length = wrong * (1.0 + square / known.square()).sqrt()
    correct = torch.where(margin.isnan(), margin, (margin > 0).to(dtype))
    return torch.stack([loss, confidence.where(~margin.isnan(), margin), margin, entropy, correct, 2 * wrong, length])


def _others(logits: Tensor, labels: Tensor, dtype: torch.dtype) -> _Others:
    """Sums over one range of classes; ``labels`` count from its beginning and may lie outside."""
    values = logits.to(dtype, copy=True)
    inside = (labels >= 0) & (labels < logits.shape[-1])
    place = torch.where(inside, labels, 0)[..., None]
    values.scatter_(2, place, values.gather(2, place).masked_fill(inside[..., None], -torch.inf))
    top = values.amax(2).clamp(min=torch.finfo(dtype).min)
    # Clamped, for 0 times infinity is no number.
    values.sub_(top[..., None]).clamp_(min=_LOWEST)
    powers = values.exp()
    moment = values.mul_(powers).sum(2)
    mass = powers.sum(2)
    return _Others(top, mass, powers.square_().sum(2), moment)


def _merged(a: _Others, b: _Others) -> _Others:
    """Sums over two ranges of classes, relative to the larger of their largest logits."""
    top = torch.maximum(a.top, b.top)
    parts = []
    for part in (a, b):
        shift = (part.top - top).clamp(min=_LOWEST)
        weight = shift.exp()
        parts.append((weight * part.mass, weight.square() * part.square, weight * (part.moment + shift * part.mass)))
    (mass, square, moment), (more_mass, more_square, more_moment) = parts
    return _Others(top, mass + more_mass, square + more_square, moment + more_moment)
