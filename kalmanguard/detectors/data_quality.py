"""Data quality from how examples were learned: which labels training contradicts, what share of them it supports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kalmanguard.errors import ConfigurationError
from kalmanguard.records import FloatArray, Guarantee

#: Fewest checks of each example, and steps of a curve, that are judged.
_CHECKS, _STEPS = 3, 50
#: Relative fall of the loss that counts as learning.
_FALL_FRAC = 0.02
#: Percentile of the indicators' areas that is the threshold (Pleiss et al., section 3.2).
_PERCENTILE = 99.0
#: Share of the whole fall that may lie in the last third of the way down, for the loss to count as settled.
_SETTLED_FRAC = 0.2
#: Share of its way down that a loss has to climb again for the run to count as broken.
_BROKEN_FRAC = 0.5
#: A gradient norm below this share of that at the beginning has vanished.
_VANISHED_FRAC = 1e-3


@dataclass(frozen=True, slots=True, eq=False)
class DataQuality:
    """What the trajectory says about the data.

    Attributes
    ----------
    score
        From 0 to 1, high is good; ``None`` where nothing can be said, and `message` says why.
    message
        One sentence.
    checks
        Checks (rows, steps) that were used: those up to the best one.
    areas
        One number an example, shape ``(n,)``; low is suspect; nan where an example was never seen. Empty for a curve.
    suspects
        Examples below the threshold, most suspect first.
    ranking
        All examples that were seen, most suspect first.
    guarantee
        HEURISTIC, always.
    """

    score: float | None
    message: str
    checks: int
    areas: FloatArray = field(default_factory=lambda: np.empty(0))
    suspects: NDArray[np.intp] = field(default_factory=lambda: np.empty(0, np.intp))
    ranking: NDArray[np.intp] = field(default_factory=lambda: np.empty(0, np.intp))
    guarantee: Guarantee = Guarantee.HEURISTIC


def sample_quality(
    losses: ArrayLike,
    *,
    margins: ArrayLike | None = None,
    untrained_loss: float | None = None,
    indicators: Sequence[int] = (),
) -> DataQuality:
    """Share of the examples whose label the model's own learning supports.

    An example is suspect when its area under the margin, ``mean_t (z_y - max_{k != y} z_k)``, is below 0: averaged over
    training, the model preferred another class. The score is one minus the share of suspects. Without margins the area
    is ``untrained_loss - mean_t loss``: a suspect is one whose label became *less* likely than it was to a model that
    knew nothing.

    Parameters
    ----------
    losses
        Shape ``(checks, examples)``: `SampleSignals.loss` at several times, as a rule once an epoch; nan where an
        example was not seen. They say whether the model learned, and how long.
    margins
        Of the same shape, `SampleSignals.margin`.
    untrained_loss
        Loss of knowing nothing, ``ln C`` for C classes; by default the mean of the first check, which must then come
        before training.
    indicators
        Examples that were given a wrong label, or a class of their own, on purpose; the threshold is then the 99th
        percentile of their areas, and they count as no suspects. Their labels must be trained on like the others.

    Raises
    ------
    ConfigurationError
        The arrays are not two-dimensional and of one shape, or the indicators are no examples.

    Notes
    -----
    Guarantee: HEURISTIC. Rests on early learning: what many examples agree on is learned before single labels are
    memorised. It fails where that does: trained for so long that wrong labels are memorised, most areas become
    positive; labels that are wrong by a rule are learned as the rule; hard and rare examples look like wrong ones.
    Measured on wrong labels drawn at random: ``python -m benchmarks data_quality``. From losses alone the share is
    underestimated where most labels are wrong, because nothing is then much less likely than to begin with.

    A model that diverges is not bad data: checks after the one with the lowest mean loss do not count, nor do checks
    that are not finite. It abstains with fewer than three checks left, and where the loss never fell below the
    untrained one, since everything is contradicted or nothing is then, whatever the labels are.

    References
    ----------
    Pleiss, Zhang, Elenberg, Weinberger, "Identifying mislabeled data using the area under the margin ranking", NeurIPS
    2020, equation 1 and section 3.2.

    Examples
    --------
    >>> margins = np.linspace(-0.1, 3.0, 8)[:, None] * np.ones(20)
    >>> margins[:, :4] *= -1  # four labels are contradicted
    >>> quality = sample_quality(np.logaddexp(0, -margins), margins=margins)
    >>> quality.score, quality.suspects
    (0.8, array([0, 1, 2, 3]))
    """
    table = np.asarray(losses, dtype=np.float64)
    other = table if margins is None else np.asarray(margins, dtype=np.float64)
    if table.ndim != 2 or not table.size or other.shape != table.shape:
        raise ConfigurationError(
            f"losses of shape {table.shape}{'' if margins is None else f' and margins of shape {other.shape}'}: pass "
            "(checks, examples), at least one of each, the same for both."
        )
    marked = np.asarray(list(indicators), dtype=np.intp)
    if marked.size and not (marked.min() >= 0 and marked.max() < table.shape[1]):
        raise ConfigurationError(f"indicators name examples outside 0 to {table.shape[1] - 1}.")
    table = _sound(table)
    if len(table) < _CHECKS:
        return DataQuality(None, f"Only {len(table)} checks are finite; at least {_CHECKS} are needed.", len(table))
    level = np.nanmean(table, axis=1)
    untrained = float(level[0]) if untrained_loss is None else untrained_loss
    used = int(np.argmin(level)) + 1
    if not untrained - level[used - 1] >= _FALL_FRAC * abs(untrained):
        message = "The model has not learned from these examples, so its word on their labels is worth nothing."
        return DataQuality(None, message, used)
    if used < _CHECKS:
        return DataQuality(
            None, f"The loss was lowest at check {used}; at least {_CHECKS} until then are needed.", used
        )
    evidence = untrained - table if margins is None else np.where(np.isfinite(other), other, np.nan)
    return _judged(evidence[:used], marked)


def _sound(table: FloatArray) -> FloatArray:
    """Checks up to the first at which what was seen is not finite for the most part; single ones count as not seen."""
    infinite = np.isinf(table)
    seen = (~np.isnan(table)).sum(1)
    broken = (seen == 0) | (2 * infinite.sum(1) > seen)
    end = int(np.argmax(broken)) if broken.any() else len(table)
    sound: FloatArray = np.where(infinite, np.nan, table)[:end]
    return sound


def _judged(table: FloatArray, marked: NDArray[np.intp]) -> DataQuality:
    seen = (~np.isnan(table)).sum(0)
    areas: FloatArray = np.full(table.shape[1], np.nan)
    np.divide(np.nansum(table, axis=0), seen, out=areas, where=seen > 0)
    threshold = 0.0
    if marked.size and not np.isnan(areas[marked]).all():
        threshold = float(np.nanpercentile(areas[marked], _PERCENTILE))
    ranking = np.argsort(areas, kind="stable")[: int((seen > 0).sum())]
    ranking = ranking[~np.isin(ranking, marked)]
    if not ranking.size:
        return DataQuality(None, "No example was seen but the indicators.", len(table), areas)
    suspects = ranking[areas[ranking] < threshold]
    score = 1.0 - len(suspects) / len(ranking)
    message = (
        f"Training contradicts the labels of {len(suspects)} of {len(ranking)} examples, over {len(table)} checks."
    )
    return DataQuality(score, message, len(table), areas, suspects, ranking)


def forgetting_events(correct: ArrayLike) -> FloatArray:
    """How often each example was forgotten: right at one check and wrong at the next one that saw it.

    Parameters
    ----------
    correct
        Shape ``(checks, examples)``: 1 where right, 0 where wrong, nan where not seen (`SampleSignals.correct`).

    Returns
    -------
    numpy.ndarray
        Counts of shape ``(examples,)``; infinite for examples that were never right, which rank above all others.

    Notes
    -----
    Guarantee: EXACT as a count. As a ranking of suspects HEURISTIC: what is forgotten often is hard, or wrong.

    References
    ----------
    Toneva et al., "An empirical study of example forgetting during deep neural network learning", ICLR 2019, section 3.

    Examples
    --------
    >>> forgetting_events([[0, 1, 0], [1, 0, 0], [1, 1, 0], [1, 0, 0]])
    array([ 0.,  2., inf])
    """
    table = np.asarray(correct, dtype=np.float64)
    if table.ndim != 2:
        raise ConfigurationError(f"Shape {table.shape} is not (checks, examples).")
    events = np.zeros(table.shape[1])
    before = np.full(table.shape[1], np.nan)
    ever = np.zeros(table.shape[1], dtype=bool)
    for row in table:
        events += (before >= 0.5) & (row < 0.5)
        ever |= row >= 0.5
        before = np.where(np.isnan(row), before, row)
    return np.where(ever, events, np.inf)


def curve_quality(losses: ArrayLike, *, gradient_norms: ArrayLike | None = None) -> DataQuality:
    """Share of the untrained model's loss that training could explain: ``1 - lowest level / first level``.

    For wrong labels at random the loss cannot settle below the entropy of the labels, which grows with their share; the
    lowest level from before a divergence is not changed by it. The level is the mean over a fiftieth of the steps, of
    five at least.

    Parameters
    ----------
    losses
        Training loss of every step from the first one on, shape ``(steps,)``; a loss that is 0 at best, such as
        cross-entropy or a mean square.
    gradient_norms
        Norms of the gradient of the same steps, if known.

    Raises
    ------
    ConfigurationError
        The curves are not one-dimensional or differ in length.

    Notes
    -----
    Guarantee: HEURISTIC, and weaker than `sample_quality`: it cannot tell wrong labels from hard examples, text that
    has an entropy of its own, or too small a model, so it compares data under one recipe only. It fails where noise is
    memorised: a curve over many epochs of a large model falls all the same. It abstains with fewer than 50 finite
    steps; where the loss never fell, or has negative values; where it climbed again before it had settled (the model
    broke before the data could be known); and where the gradient vanished on the way (the model is stuck).

    Examples
    --------
    >>> steps = np.arange(400)
    >>> curve_quality(0.05 + 2.25 * np.exp(-steps / 40)).score > curve_quality(1.3 + np.exp(-steps / 40)).score
    True
    >>> curve_quality(2.3 + steps / 100).score is None
    True
    """
    curve = np.asarray(losses, dtype=np.float64)
    norms = None if gradient_norms is None else np.asarray(gradient_norms, dtype=np.float64)
    if curve.ndim != 1 or (norms is not None and norms.shape != curve.shape):
        raise ConfigurationError("losses, and gradient_norms where given, must be of the same shape (steps,).")
    finite = np.isfinite(curve)
    end = len(curve) if finite.all() else int(np.argmin(finite))
    if end < _STEPS:
        return DataQuality(None, f"Only {end} steps are finite; at least {_STEPS} are needed.", end)
    window = max(5, end // 50)
    level = np.convolve(curve[:end], np.full(window, 1.0 / window), mode="valid")
    # What comes after the first step may be far above it already.
    first, at = min(float(curve[0]), float(np.median(curve[:5]))), int(np.argmin(level))
    lowest, fall, steps = float(level[at]), first - float(level[at]), at + window
    if curve[:end].min() < 0 or not first > 0:
        return DataQuality(None, "The loss has negative values, so 0 is not what a perfect model reaches.", end)
    if fall < _FALL_FRAC * first:
        return DataQuality(None, "The loss never fell: a model that does not learn says nothing about its data.", steps)
    settled = float(level[2 * at // 3]) - lowest <= _SETTLED_FRAC * fall
    broken = end < len(curve) or float(level[-1]) - lowest > _BROKEN_FRAC * fall
    if broken and not settled:
        message = "The loss was still falling when the run broke: that is the model's doing, and hides the data's."
        return DataQuality(None, message, steps)
    score = float(np.clip(1.0 - lowest / first, 0.0, 1.0))
    if norms is not None:
        early, late = np.median(norms[:window]), np.median(norms[at:steps])
        if late < _VANISHED_FRAC * early and lowest > 0.1 * first:
            return DataQuality(None, "The gradient vanished while the loss was high: the model is stuck.", steps)
    bound = "" if settled else " at least, for it was still falling"
    return DataQuality(score, f"Training explained {score:.0%} of the untrained model's loss{bound}.", steps)
