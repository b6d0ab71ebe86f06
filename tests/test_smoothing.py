"""The smoother against others'.

Oracles: statsmodels' exact diffuse smoother, with missing values; filterpy's Rauch-Tung-Striebel smoother, started
where the diffuse phase ends; the joint Gaussian of all states and values written out, with the start by generalised
least squares. Tolerance 1e-6 relative to the largest value, throughout.
"""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from filterpy.kalman import KalmanFilter

from kalmanguard.analysis.augmented import Noise
from kalmanguard.analysis.smoothing import smooth
from kalmanguard.errors import ConfigurationError

GRID = [
    Noise(1.0, 0.1), Noise(0.01, 3.0), Noise(1.0, 0.0), Noise(1.0, 0.1, 0.01), Noise(0.5, 0.0, 0.02),
    Noise(2.0, 0.3, 0.0), Noise(1.0, 0.0, 0.0),
]  # fmt: skip


def walk(noise, n, seed, *, missing=0.0):
    rng = np.random.default_rng(seed)
    slope = np.cumsum(rng.normal(size=n)) * math.sqrt(noise.slope or 0.0) + (0.0 if noise.slope is None else 0.05)
    level = 5.0 + np.cumsum(slope + rng.normal(size=n) * math.sqrt(noise.level))
    values = level + rng.normal(size=n) * math.sqrt(noise.measurement)
    values[rng.random(n) < missing] = np.nan
    return level, values


def close(mine, other, *, tolerance=1e-6):
    np.testing.assert_allclose(mine, other, rtol=0, atol=tolerance * max(1e-12, np.nanmax(np.abs(other))))


@pytest.mark.parametrize("noise", GRID)
@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_it_is_statsmodels_smoother(noise, missing):
    from statsmodels.tsa.statespace.structural import UnobservedComponents

    values = walk(noise, 120, 1, missing=missing)[1]
    if missing:
        values[:2] = np.nan
    smoothed = smooth(np.arange(120), values, noise)
    trend = "local level" if noise.slope is None else "local linear trend"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the variances that are zero
        model = UnobservedComponents(values, level=trend, use_exact_diffuse=True)
    variances = [noise.measurement, noise.level] + ([] if noise.slope is None else [noise.slope])
    other = model.smooth(variances)
    close(smoothed.level, other.smoothed_state[0])
    close(smoothed.level_sd, np.sqrt(other.smoothed_state_cov[0, 0]))
    if noise.slope is not None:
        close(smoothed.slope, other.smoothed_state[1])
        close(smoothed.slope_sd, np.sqrt(np.maximum(other.smoothed_state_cov[1, 1], 0)), tolerance=1e-5)
    judged = ~np.isnan(smoothed.innovations)
    assert judged.sum() == (~np.isnan(values)).sum() - noise.unknowns
    close(smoothed.innovations[judged], other.forecasts_error[0, judged])
    close(smoothed.innovation_variances[judged], other.forecasts_error_cov[0, 0, judged])
    assert smoothed.log_likelihood == pytest.approx(other.llf_obs[judged].sum(), rel=1e-8)


@pytest.mark.parametrize("noise", GRID)
def test_it_is_filterpys_smoother(noise):
    values = walk(noise, 80, 2)[1]
    smoothed = smooth(np.arange(80), values, noise)
    slope, d = noise.slope or 0.0, noise.unknowns
    kf = KalmanFilter(dim_x=2, dim_z=1)
    kf.F, kf.H = np.array([[1.0, 1.0], [0.0, 1.0]]), np.array([[1.0, 0.0]])
    kf.Q, kf.R = np.diag([noise.level, slope]), np.array([[noise.measurement]])
    if d == 1:
        kf.x, kf.P = np.array([[values[0]], [0.0]]), np.diag([noise.measurement, 0.0])
        kf.F = np.eye(2)
    else:  # two values fix level and slope: x_1 = z_1 - v_1, s_1 = z_1 - z_0 + noise
        kf.x = np.array([[values[1]], [values[1] - values[0]]])
        r, both = noise.measurement, 2 * noise.measurement + noise.level + slope
        kf.P = np.array([[r, r], [r, both]])
    start = kf.x.copy(), kf.P.copy()
    means, covariances, _, _ = kf.batch_filter(values[d:])
    means, covariances = np.concatenate([start[0][None], means]), np.concatenate([start[1][None], covariances])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x, p, _, _ = kf.rts_smoother(means, covariances, inv=np.linalg.pinv)
    close(smoothed.level[d - 1 :], x[:, 0, 0])
    close(smoothed.level_sd[d - 1 :], np.sqrt(p[:, 0, 0]))
    if d == 2:
        close(smoothed.slope[d - 1 :], x[:, 1, 0])


@pytest.mark.parametrize("noise", GRID)
def test_irregular_steps_are_the_joint_gaussian(noise):
    rng = np.random.default_rng(3)
    steps = np.sort(rng.choice(90, size=25, replace=False))
    level, _ = walk(noise, 90, 4)
    values = level[steps] + rng.normal(size=25) * math.sqrt(noise.measurement)
    values[[0, 7, 8, 24]] = np.nan
    smoothed = smooth(steps, values, noise)
    # Level and slope at every step are sums of the start and the shocks: x = A (start, shocks).
    n, unknowns = 90, noise.unknowns
    variances = np.tile([noise.level, noise.slope or 0.0], n)
    a, rows = np.eye(2, 2 + 2 * n), []
    for step in range(n):
        if step > steps[0]:
            a = np.array([[1.0, 1.0], [0.0, 1.0]]) @ a
            a[:, 2 + 2 * step : 4 + 2 * step] += np.eye(2)
        rows.append(a.copy())
    states = np.concatenate([rows[step] for step in steps])
    fixed, shocks = states[:, :unknowns], states[:, 2:]
    seen = ~np.isnan(values)
    x, h = fixed[::2][seen], shocks[::2][seen]
    s = h * variances @ h.T + noise.measurement * np.eye(seen.sum())
    gain = np.linalg.solve(s, h * variances @ shocks.T).T
    information = np.linalg.inv(x.T @ np.linalg.solve(s, x))
    start = information @ x.T @ np.linalg.solve(s, values[seen])
    left = fixed - gain @ x
    mean = fixed @ start + gain @ (values[seen] - x @ start)
    posterior = shocks * variances @ shocks.T - gain @ (h * variances @ shocks.T) + left @ information @ left.T
    close(smoothed.level, mean[::2])
    close(smoothed.slope, mean[1::2])
    close(smoothed.level_sd**2, np.diag(posterior)[::2])
    close(smoothed.slope_sd**2, np.diag(posterior)[1::2])


def test_bands_cover_at_their_rate_and_plot(tmp_path):
    noise = Noise(1.0, 0.05, 0.001)
    inside = 0
    for seed in range(40):
        level, values = walk(noise, 100, seed, missing=0.2)
        low, high = smooth(np.arange(100), values, noise).band(0.9)
        inside += sum(bool(low[t] <= level[t] <= high[t]) for t in (10, 50))
    assert 61 <= inside <= 79  # 72 expected of 80; outside has probability 1e-3 at 90 %
    axes = smooth(np.arange(100), values, noise).plot()
    axes.figure.savefig(tmp_path / "level.png")
    assert (tmp_path / "level.png").stat().st_size > 1000


def test_a_level_far_from_zero_costs_no_digits_and_units_do_not_matter():
    values = walk(Noise(1.0, 0.1, 0.01), 60, 5)[1]
    near = smooth(np.arange(60), values, Noise(1.0, 0.1, 0.01))
    far = smooth(np.arange(60) + 10**9, values + 1e6, Noise(1.0, 0.1, 0.01))
    small = smooth(np.arange(60), 1e-3 * values, Noise(1e-6, 1e-7, 1e-8))
    close(far.level - 1e6, near.level)
    close(1e3 * small.level, near.level)
    assert small.log_likelihood == pytest.approx(near.log_likelihood + 58 * math.log(1e3))


@pytest.mark.parametrize(
    ("steps", "values", "noise", "said"),
    [
        ([0, 1], [1.0, 2.0], Noise(1.0, 1.0, 1.0), "holds 2 values"),
        ([0, 2, 1], [1.0, 2.0, 3.0], Noise(1.0, 1.0), "Step 1 follows step 2"),
        ([0, 1.5], [1.0, 2.0], Noise(1.0, 1.0), "no whole number"),
        ([0, 1], [1.0, math.inf], Noise(1.0, 1.0), "step 1 is infinite"),
        ([0, 1], ["a", "b"], Noise(1.0, 1.0), "must be numbers"),
        ([0, 1], [1.0], Noise(1.0, 1.0), "same length"),
        ([0, 1], [1.0, 2.0], Noise(0.0, 1.0), "Measurement variance 0.0"),
        ([0, 1], [1.0, 2.0], Noise(1.0, -1.0), "Level variance -1.0"),
        ([0, 1], [1.0, 2.0], Noise(1.0, 1.0, math.nan), "Slope variance nan"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(steps, values, noise, said):
    with pytest.raises(ConfigurationError, match=said):
        smooth(steps, values, noise)
