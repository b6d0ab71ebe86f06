"""What a run is like at its end: estimates with their intervals, what they mean and what stands behind them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from kalmanguard.analysis.changepoints import changepoints
from kalmanguard.analysis.checks import Verdict
from kalmanguard.analysis.consistency import consistency
from kalmanguard.analysis.identification import identify
from kalmanguard.analysis.judgement import Judgement, Recent
from kalmanguard.analysis.oscillator import oscillator
from kalmanguard.analysis.regimes import regimes
from kalmanguard.analysis.smoothing import smooth
from kalmanguard.analysis.tables import IntArray
from kalmanguard.detectors.damping import damping
from kalmanguard.detectors.lyapunov import lyapunov
from kalmanguard.detectors.oscillation import spectral_line
from kalmanguard.errors import ConfigurationError
from kalmanguard.estimators.autocovariance import BLOCK, BLOCKS, AutocovarianceState, observe
from kalmanguard.records import FloatArray, Guarantee

#: Rows that a trend is fitted to, that innovations are judged over, and that a spectrum is taken of.
_TREND, _JUDGED, _WINDOW = 600, 2_048, 1_024
#: Fewest values that are worth a line.
_LEAST = 64
#: Significance of a spectral line, and chance of a change point where there is none.
_LINE, _CHANGE = 1e-3, 1e-3
_NORMAL_95 = 1.96


class Estimate(NamedTuple):
    """One line: the value with its bounds, the same in words, what it means, and its guarantee."""

    name: str
    value: float
    low: float
    high: float
    text: str
    meaning: str
    guarantee: Guarantee


def estimates(judgement: Judgement) -> Iterator[Estimate]:
    """Estimate what there is data for, from the last rows since the last restart.

    Notes
    -----
    Guarantees are those of the methods (`kalmanguard.analysis.estimation` page); a run that is still changing meets
    none of their assumptions exactly, so all of it is to look at, not to decide by. Cost: seconds for a long run.
    """
    rows = _last_pass(judgement.recent)
    for make in _ALL:
        try:
            yield from make(rows)
        except ConfigurationError:
            continue  # too short, constant, or otherwise nothing that this method could be asked about


def _trend(rows: list[Recent]) -> Iterator[Estimate]:
    steps, loss = _series(rows[-_TREND:], lambda row: row.loss)
    if len(loss) < _LEAST:
        return
    found = identify(steps, loss, trend=True)
    smoothed = smooth(steps, loss, found.noise)
    slope, error = 1_000.0 * float(smoothed.slope[-1]), 1_000.0 * float(smoothed.slope_sd[-1])
    low, high = slope - _NORMAL_95 * error, slope + _NORMAL_95 * error
    meaning = "falling" if high < 0.0 else "rising" if low > 0.0 else "no trend can be told from the noise"
    yield Estimate(
        "Slope of the training loss", slope, low, high,
        f"{slope:+.3g} per 1,000 steps ({low:+.3g} to {high:+.3g})", meaning, Guarantee.ASYMPTOTIC,
    )  # fmt: skip
    noise = found.measurement
    deviation, least, most = (math.sqrt(max(v, 0.0)) if v == v else math.nan for v in noise)
    bounds = "" if math.isnan(most) else f" ({least:.3g} to {most:.3g})"
    yield Estimate(
        "Noise of the training loss", deviation, least, most, f"standard deviation {deviation:.3g}{bounds}",
        "what one batch differs from the next, by maximum likelihood", Guarantee.ASYMPTOTIC,
    )  # fmt: skip


def _innovations(rows: list[Recent]) -> Iterator[Estimate]:
    for name, of in (("loss", lambda row: row.z_loss), ("gradient norm", lambda row: row.z_gradient)):
        steps, z = _series(rows[-_JUDGED:], of)
        if len(z) < _LEAST:
            continue
        # Innovations are clipped where the filter clips them: one spike must not decide what the rest are like.
        judged = consistency(np.clip(z, -3.0, 3.0), np.ones(len(z)))
        nis = judged.nis
        meaning = "as large as the filter takes them to be, and without memory"
        if judged.verdict is not Verdict.CONSISTENT:
            meaning = f"{judged.verdict}: read their size in deviations with care"
        yield Estimate(
            f"Innovations of the {name}", nis.statistic, nis.low, nis.high,
            f"mean square {nis.statistic:.2f} ({nis.low:.2f} to {nis.high:.2f} expected), whiteness p = "
            f"{judged.whiteness.p_value:.2g}",
            meaning, Guarantee.ASYMPTOTIC,
        )  # fmt: skip
        split = changepoints(steps, z, rate=_CHANGE)
        if split.changes:
            listed = ", ".join(f"{step:,}" for step in split.changes[-6:])
            yield Estimate(
                f"Changes of the {name}", float(len(split.changes)), math.nan, math.nan,
                f"{len(split.changes)}, the last at {'step' if len(split.changes) == 1 else 'steps'} {listed}",
                "its innovations have another mean from there on", Guarantee.HEURISTIC,
            )  # fmt: skip


def _regime(rows: list[Recent]) -> Iterator[Estimate]:
    steps, z = _series(rows[-_JUDGED:], lambda row: row.z_loss)
    if len(z) < _LEAST:
        return
    stretches = regimes(steps, np.clip(z, -1e6, 1e6)).stretches
    last = stretches[-1]
    odd = [s for s in stretches if s.regime != "nominal" and s.probability > 0.9]
    told = f"; {len(odd)} other stretches, the last {odd[-1].regime} from step {odd[-1].start:,}" if odd else ""
    yield Estimate(
        "Regime at the end", last.probability, math.nan, math.nan,
        f"{last.regime} since step {last.start:,} (probability {last.probability:.2f}){told}",
        "of four kinds of innovations: nominal, oscillating, diverging, snapped", Guarantee.HEURISTIC,
    )  # fmt: skip


def _oscillation(rows: list[Recent]) -> Iterator[Estimate]:
    _, z = _series(rows[-_WINDOW:], lambda row: row.z_loss)
    if len(z) < _LEAST:
        return
    z = np.clip(z, -3.0, 3.0)
    line = spectral_line(z)
    seen = line.p_value < _LINE
    text = (
        f"period of {1.0 / line.frequency:.3g} rows, p = {line.p_value:.1g}"
        if seen
        else f"none, p = {line.p_value:.2g}"
    )
    yield Estimate(
        "Oscillation of the loss", line.frequency if seen else math.nan, math.nan, math.nan, text,
        "a line in the spectrum of its innovations; epochs make one too" if seen else "no line in their spectrum",
        Guarantee.ASYMPTOTIC,
    )  # fmt: skip
    heard = oscillator(z)
    if heard.identified:
        zeta, omega = heard.damping, heard.frequency
        yield Estimate(
            "Damping ratio of the loss", *zeta,
            f"{zeta.estimate:.2g} ({zeta.low:.2g} to {zeta.high:.2g}), frequency {omega.estimate:.3g} radians a row",
            "of a second-order process under noise; small ones are normal", Guarantee.ASYMPTOTIC,
        )  # fmt: skip


def _growth(rows: list[Recent]) -> Iterator[Estimate]:
    known = [row.gradient_norm for row in rows[-4 * _LEAST :] if row.gradient_norm is not None]
    if len(known) < _LEAST or not all(0.0 < norm < math.inf for norm in known):
        return
    found = lyapunov([math.log(norm) for norm in known])
    low, high = found.interval
    yield Estimate(
        "Growth of the gradient norm", found.exponent, low, high,
        f"{found.exponent:+.2g} per row ({low:+.2g} to {high:+.2g})",
        "grows" if low > 0.0 else "shrinks" if high < 0.0 else "neither grows nor shrinks", Guarantee.ASYMPTOTIC,
    )  # fmt: skip


def _poles(rows: list[Recent]) -> Iterator[Estimate]:
    """Poles of the trajectory, where sketched updates of steps in a row were recorded."""
    state, last = AutocovarianceState(), None
    for row in rows[-BLOCK * (BLOCKS + 1) :]:
        if row.velocity is None or (last is not None and row.step != last + 1):
            state = AutocovarianceState()
        if row.velocity is not None and row.learning_rate:
            state = observe(state, row.velocity / row.learning_rate)
        last = row.step
    found = damping(state.blocks)
    if math.isfinite(found.modulus.low):
        modulus = found.modulus
        yield Estimate(
            "Largest pole of the trajectory", modulus.estimate, modulus.low, modulus.high,
            f"modulus {modulus.estimate:.2f} ({modulus.low:.2f} to {modulus.high:.2f}): {found.status}",
            "of second-order dynamics of the updates; beyond 1 they grow", Guarantee.ASYMPTOTIC,
        )  # fmt: skip


_ALL: tuple[Callable[[list[Recent]], Iterator[Estimate]], ...] = (
    _trend, _innovations, _regime, _oscillation, _growth, _poles,
)  # fmt: skip


def _last_pass(rows: tuple[Recent, ...]) -> list[Recent]:
    """The rows since the last step that goes back, one for each step."""
    kept: list[Recent] = []
    for row in rows:
        if kept and row.step < kept[-1].step:
            kept = []
        if kept and row.step == kept[-1].step:
            kept[-1] = row
        else:
            kept.append(row)
    return kept


def _series(rows: list[Recent], of: Callable[[Recent], float | None]) -> tuple[IntArray, FloatArray]:
    """Steps and finite values."""
    pairs = [(row.step, value) for row in rows if (value := of(row)) is not None and math.isfinite(value)]
    return np.array([s for s, _ in pairs], dtype=np.int64), np.array([v for _, v in pairs], dtype=np.float64)
