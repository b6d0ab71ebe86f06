"""Dynamics of the trajectory against systems whose poles, exponents and regimes are known, and on real training."""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from filterpy.kalman import IMMEstimator, KalmanFilter
from torch import nn

from kalmanguard import Settings, Supervisor
from kalmanguard.detectors.damping import SNAP, DampingStatus, damping, jerk_ratio, poles, second_order
from kalmanguard.detectors.dynamics import NAMES
from kalmanguard.detectors.lyapunov import lyapunov
from kalmanguard.detectors.onset import onset
from kalmanguard.detectors.oscillation import g_test, period_two, spectral_line, whiten
from kalmanguard.errors import ConfigurationError
from kalmanguard.estimators import regimes
from kalmanguard.estimators.autocovariance import BLOCK, BLOCKS, AutocovarianceState, Moments, observe, total
from kalmanguard.estimators.regimes import REGIMES, RegimeFilter
from kalmanguard.models.chartransformer import CharTransformerPlant
from kalmanguard.models.cnn import CNNPlant
from kalmanguard.models.mlp import MLPPlant
from kalmanguard.models.plant import Plant
from kalmanguard.records import FloatArray
from kalmanguard.sensors.benettin import benettin
from kalmanguard.sensors.damping import DampingMonitor
from kalmanguard.settings import DETECTORS

WINDOW = BLOCK * BLOCKS


def blocks_of(velocities: FloatArray) -> tuple[Moments, ...]:
    state = AutocovarianceState()
    for v in velocities:
        state = observe(state, v)
    return state.blocks


def second_order_process(
    modulus: float, angle: float, *, seed: int, steps: int = WINDOW + 204, k: int = 32
) -> FloatArray:
    rng = np.random.default_rng(seed)
    phi_1, phi_2 = 2.0 * modulus * math.cos(angle), -modulus * modulus
    x = np.zeros((steps, k))
    for t in range(2, steps):
        x[t] = phi_1 * x[t - 1] + phi_2 * x[t - 2] + rng.normal(size=k)
    return x[-WINDOW - 6 :]


# --- autocovariances and damping --------------------------------------------------------------------------------------


def test_block_sums_are_the_lagged_products() -> None:
    v = np.random.default_rng(0).normal(size=(6 + 3 * BLOCK, 8))
    blocks = blocks_of(v)
    assert len(blocks) == 3
    a, j = np.diff(v, axis=0, prepend=0.0), np.diff(v, n=2, axis=0, prepend=np.zeros((2, 8)))
    for i, block in enumerate(blocks):
        t = np.arange(6 + i * BLOCK, 6 + (i + 1) * BLOCK)
        np.testing.assert_allclose(
            block[:4], [(x[t] * y[t]).sum() for x, y in ((v, v), (v, np.roll(v, 1, 0)), (a, a), (j, j))]
        )
        for name in block._fields[4:]:
            first, second = int(name[1]), int(name[2])
            np.testing.assert_allclose(getattr(block, name), (v[t - first] * v[t - second]).sum(), rtol=1e-9)


@pytest.mark.parametrize("rho", [-0.8, 0.0, 0.5, 0.9])
def test_one_pole_has_a_jerk_ratio_of_sqrt_3_minus_rho(rho: float) -> None:
    rng = np.random.default_rng(2)
    v = np.zeros((4000, 64))
    for t in range(1, len(v)):
        v[t] = rho * v[t - 1] + rng.normal(size=64)
    assert jerk_ratio(total(blocks_of(v))) == pytest.approx(math.sqrt(3.0 - rho), rel=0.02)


def test_the_published_thresholds_call_a_random_walk_critical_and_ours_do_not() -> None:
    result = damping(blocks_of(np.random.default_rng(1).normal(size=(WINDOW + 6, 64))))
    assert result.ratio.estimate == pytest.approx(math.sqrt(3.0), abs=0.03)
    assert result.ratio.estimate > SNAP
    assert result.raw_status is DampingStatus.CRITICAL
    assert result.status is not DampingStatus.CRITICAL


@pytest.mark.parametrize(("modulus", "angle"), [(0.95, 0.3), (0.9, 0.8), (0.98, 1.5)])
def test_known_poles_are_found_and_their_intervals_cover_them(modulus: float, angle: float) -> None:
    covered, estimates = 0, []
    for seed in range(40):
        result = damping(blocks_of(second_order_process(modulus, angle, seed=seed)))
        covered += result.modulus.low <= modulus <= result.modulus.high
        estimates.append(result.modulus.estimate)
        assert result.status is not DampingStatus.CRITICAL
    assert np.median(estimates) == pytest.approx(modulus, abs=0.02)
    assert covered >= 34  # 95 % nominal; 34 of 40 has probability 0.996 at 95 %


def test_instruments_are_not_fooled_by_measurement_noise_as_least_squares_is() -> None:
    modulus, angle = 0.95, 0.5
    instruments, squares = [], []
    for seed in range(20):
        x = second_order_process(modulus, angle, seed=seed, steps=800)
        noisy = x + np.random.default_rng(100 + seed).normal(size=x.shape) * x.std() * 0.5
        m = total(blocks_of(noisy))
        instruments.append(max(map(abs, poles(m))))
        phi = np.linalg.solve([[m.power, m.neighbours], [m.neighbours, m.power]], [m.neighbours, m.v02])
        squares.append(max(abs(np.roots([1.0, -phi[0], -phi[1]]))))
    assert np.median(instruments) == pytest.approx(modulus, abs=0.03)
    assert np.median(squares) < 0.9


def heavy_ball(eta_lambda: float, beta: float, *, noise: float, steps: int = WINDOW + 7) -> FloatArray:
    """Updates of heavy-ball descent on 32 quadratics of one curvature."""
    rng = np.random.default_rng(3)
    x, v = rng.normal(size=32), np.zeros(32)
    out = []
    for _ in range(steps):
        v = beta * v - eta_lambda * (x + noise * rng.normal(size=32))
        x = x + v
        out.append(v)
    return np.array(out)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9])
def test_heavy_ball_is_critical_beyond_its_stability_limit_and_not_below(beta: float) -> None:
    limit = 2.0 * (1.0 + beta)
    assert damping(blocks_of(heavy_ball(1.1 * limit, beta, noise=0.1))).status is DampingStatus.CRITICAL
    for share in (0.05, 0.3, 0.7):
        assert damping(blocks_of(heavy_ball(share * limit, beta, noise=1.0))).status is not DampingStatus.CRITICAL


def test_damping_ratio_and_frequency_of_the_heavy_ball() -> None:
    beta, eta_lambda = 0.9, 0.26
    root = cmath.sqrt((1 + beta - eta_lambda) ** 2 - 4 * beta)
    pair = ((1 + beta - eta_lambda + root) / 2, (1 + beta - eta_lambda - root) / 2)
    zeta, _ = second_order(pair)
    assert zeta == pytest.approx(0.1, abs=0.01)
    assert math.isnan(second_order((complex(0.5), complex(-0.5)))[0])


# --- oscillation ------------------------------------------------------------------------------------------------------


def test_fishers_p_values_are_uniform_under_white_noise() -> None:
    rng = np.random.default_rng(5)
    p = [spectral_line(rng.normal(size=64)).p_value for _ in range(1000)]
    for level in (0.5, 0.1, 0.02):
        count = sum(value < level for value in p)
        assert abs(count - 1000 * level) <= 4.0 * math.sqrt(1000 * level * (1 - level))


@pytest.mark.parametrize("k", [2, 8])
def test_the_bound_for_several_columns_is_conservative_and_not_idle(k: int) -> None:
    rng = np.random.default_rng(6)
    p = [spectral_line(rng.normal(size=(64, k)), rank=k).p_value for _ in range(400)]
    assert sum(value < 0.05 for value in p) <= 20 + 4.0 * math.sqrt(19)
    line = np.sin(2 * np.pi * np.arange(64) / 5.0)[:, None]
    assert spectral_line(rng.normal(size=(64, k)) + 1.5 * line, rank=k).p_value < 1e-4


def test_g_test_is_a_probability_and_falls_with_the_share() -> None:
    for rank in (1.0, 3.0):
        values = [g_test(share, 31, rank=rank) for share in (0.05, 0.2, 0.4, 0.8, 1.0)]
        assert all(0.0 <= value <= 1.0 for value in values)
        assert values == sorted(values, reverse=True)
    assert spectral_line(np.zeros(64)).p_value == 1.0


def test_whitening_takes_momentum_out_and_leaves_an_alternation_in() -> None:
    rng = np.random.default_rng(7)
    v = np.zeros((WINDOW + 6, 8))
    for t in range(1, len(v)):
        v[t] = 0.9 * v[t - 1] + rng.normal(size=8)
    m = total(blocks_of(v))
    assert spectral_line(v[-64:], rank=8).p_value < 1e-6
    assert spectral_line(whiten(v[-64:], m), rank=8).p_value > 1e-3
    turning = np.where(np.arange(65)[:, None] % 2, 1.0, -1.0) * np.ones(8)
    assert np.abs(whiten(turning, Moments(power=1.0, neighbours=-1.0)).mean(0)).max() < 0.1
    assert period_two(blocks_of(turning[np.arange(WINDOW + 6) % 65 % 2])).estimate < -0.9


def test_descent_at_the_edge_of_stability_alternates_and_slow_descent_does_not() -> None:
    assert period_two(blocks_of(heavy_ball(1.95, 0.0, noise=0.0))).high < -0.9
    assert period_two(blocks_of(heavy_ball(0.05, 0.0, noise=0.0))).low > 0.9


# --- Lyapunov ---------------------------------------------------------------------------------------------------------


def test_the_exponent_is_found_and_its_interval_covers_it_in_correlated_noise() -> None:
    covered = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        noise = np.zeros(64)
        for t in range(1, 64):
            noise[t] = 0.5 * noise[t - 1] + 0.2 * rng.normal()
        low, high = lyapunov([0.03 * t + noise[t] for t in range(64)]).interval
        covered += low <= 0.03 <= high
    assert covered >= 80  # Newey-West intervals are too short in small samples; 95 of 100 would be nominal


def test_too_few_or_broken_values_give_no_exponent() -> None:
    assert math.isnan(lyapunov([0.0] * 5).exponent)
    assert math.isnan(lyapunov([0.0] * 20 + [math.nan]).exponent)


class Square(nn.Module):
    def __init__(self, curvature: float) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.curvature = curvature


@pytest.mark.parametrize("curvature", [3.0, 15.0, 25.0])
def test_benettin_gives_the_logarithm_of_the_multiplier(curvature: float) -> None:
    result = benettin(
        Square(curvature),
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda m, _: m.curvature * (m.x**2).sum() / 2,
        range(60),
    )
    assert result.exponent == pytest.approx(math.log(abs(1.0 - 0.1 * curvature)), abs=1e-4)


def test_benettin_leaves_model_and_random_state_and_works_with_adam_and_dropout() -> None:
    plant = CNNPlant(seed=0)
    batches = [next(plant.loader) for _ in range(20)]
    before = [p.detach().clone() for p in plant.model.parameters()]
    torch.manual_seed(4)
    state = torch.random.get_rng_state()
    result = benettin(
        plant.model,
        lambda p: torch.optim.AdamW(p, lr=2e-3),
        lambda model, batch: plant.loss_fn(model(batch[0]), batch[1]),
        batches,
        distance=1e-3,
        every=5,
    )
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(before, plant.model.parameters(), strict=True))
    assert len(result.stretches) == 4
    assert all(map(math.isfinite, result.stretches))
    with pytest.raises(ConfigurationError, match="hundred roundings"):
        benettin(plant.model, lambda p: torch.optim.SGD(p, lr=0.1), lambda m, b: m(b), [], distance=1e-9)
    with pytest.raises(ConfigurationError, match="too few"):
        benettin(plant.model, lambda p: torch.optim.SGD(p, lr=0.1), lambda m, b: m(b).sum(), [])


# --- regimes ----------------------------------------------------------------------------------------------------------


def stock_filter() -> IMMEstimator:
    filters = []
    for j in range(4):
        kf = KalmanFilter(dim_x=2, dim_z=1)
        kf.x, kf.P = np.zeros((2, 1)), np.eye(2)
        kf.F = np.diag([regimes._SHIFT_DECAY[j], regimes._TURN_DECAY[j]])
        kf.Q = np.diag([regimes._SHIFT_NOISE[j], regimes._TURN_NOISE[j]])
        kf.H, kf.R = np.array([[1.0, 1.0]]), np.array([[regimes._MEASURED[j]]])
        filters.append(kf)
    prior = np.exp(RegimeFilter.init().log_probabilities)
    return IMMEstimator(filters, prior / prior.sum(), regimes.TRANSITIONS)


def test_the_regime_filter_is_the_stock_one_while_that_one_works() -> None:
    stock, state, own = stock_filter(), RegimeFilter.init(), RegimeFilter()
    for z in np.random.default_rng(8).normal(size=40) * np.where(np.arange(40) > 30, 4.0, 1.0):
        stock.predict()
        stock.update(np.array([[z]]))
        state = own.step(state, float(z))
        np.testing.assert_allclose(state.probabilities, stock.mu, rtol=1e-6, atol=1e-12)


def test_a_thousand_deviations_are_no_health() -> None:
    state, own = RegimeFilter.init(), RegimeFilter()
    for z in (0.1, -0.4, 1000.0):
        state = own.step(state, z)
    assert state.probabilities[0] < 1e-6
    assert state.probabilities.sum() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("series", "regime"),
    [
        (lambda t: 0.5 * (-1) ** (t // 3), "nominal"),
        (lambda t: 4.0 * (-1) ** t, "oscillating"),
        (lambda t: 3.0 + 0.3 * t, "diverging"),
        (lambda t: 0.2 if t < 19 else 60.0, "snapped"),
    ],
)
def test_regimes_are_told_apart(series: Callable[[int], float], regime: str) -> None:
    state, own = RegimeFilter.init(), RegimeFilter()
    for t in range(20):
        state = own.step(state, series(t))
    assert REGIMES[int(state.probabilities.argmax())] == regime


# --- onset ------------------------------------------------------------------------------------------------------------


def test_an_onset_is_found_where_the_mean_has_moved_and_not_made_up() -> None:
    rng = np.random.default_rng(9)
    errors, invented = [], 0
    for _ in range(200):
        window = rng.normal(size=(32, 5))
        window[-1, 2] = 20.0
        invented += onset(window.tolist()) is not None
        since = int(rng.integers(3, 12))
        window[-since:, 2] += 6.0
        found = onset(window.tolist())
        errors.append(abs(found.ago - since) if found is not None else 99)
    assert invented == 0
    assert np.median(errors) <= 1
    assert onset([]) is None


# --- on real training -------------------------------------------------------------------------------------------------


def train(plant: Plant, steps: int, after: Callable[[], object], *, rate: float = 1.0, at: int = 10**9) -> None:
    for step in range(steps):
        if step == at:
            for group in plant.optimizer.param_groups:
                group["lr"] *= rate
        plant.step_loss(next(plant.loader)).backward()
        plant.optimizer.step()
        plant.optimizer.zero_grad()
        after()


@pytest.mark.parametrize(
    ("make", "steps"),
    [
        (lambda: MLPPlant(seed=3), 600),
        (lambda: MLPPlant(seed=4, optimizer="sgd", momentum=0.0), 600),
        (lambda: MLPPlant(seed=5, optimizer="sgd"), 600),
        (lambda: MLPPlant(seed=6, batch_size=8, schedule="warm-restarts", steps=600), 600),
        (lambda: CNNPlant(seed=3), 250),
        (lambda: CharTransformerPlant(seed=3, size="small"), 200),
    ],
)
def test_no_diagnostic_ever_acts_on_healthy_training_and_few_speak(make: Callable[[], Plant], steps: int) -> None:
    torch.manual_seed(0)
    plant = make()
    settings = Settings(detectors=tuple(DETECTORS), calibration="default", probe_every=25)
    with Supervisor(plant.model, plant.probe_loader, settings=settings) as guard:
        spoke = []
        train(plant, steps, lambda: spoke.extend(e for e in guard.update().evidence if e.detector in NAMES))
        counts = guard.statistics()
    assert counts["rollbacks"] == counts["vetoes"] == 0
    assert len(spoke) <= 3


def test_damping_of_chosen_layers_by_pattern_by_name_and_one_by_one() -> None:
    plant = MLPPlant(seed=0)
    whole = DampingMonitor(plant.model, optimizer=plant.optimizer)
    each = DampingMonitor(plant.model, per_layer=True)
    some = DampingMonitor(plant.model, layers=r"layers\.[02]\.weight")
    named = DampingMonitor(plant.model, layers=["layers.4"])
    found: list[object] = []
    train(plant, 300, lambda: [found.extend(monitor.step()) for monitor in (whole, each, some, named)])
    assert len(each.names) == 3
    for monitor in (whole, each, some, named):
        for result in monitor.results().values():
            assert 1.0 < result.ratio.estimate < 2.0
            assert result.raw_status is not DampingStatus.STABLE
            assert result.status is not DampingStatus.CRITICAL
    assert len(found) <= 2
    with pytest.raises(ConfigurationError, match="matches no trained parameter"):
        DampingMonitor(plant.model, layers="attention")
    with pytest.raises(ConfigurationError, match="no regular expression"):
        DampingMonitor(plant.model, layers="(")
    with pytest.raises(ConfigurationError, match="There is no layer"):
        named.result("head")


def test_a_layer_that_is_driven_past_its_limit_is_critical_and_the_others_are_not() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"calm": nn.Linear(16, 16), "wild": nn.Linear(16, 16)}).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = DampingMonitor(model, per_layer=True, optimizer=optimizer)
    found = []
    for _ in range(WINDOW + 64):
        loss = 0.5 * sum(
            (p**2).sum() * (21.0 if name.startswith("wild") else 1.0) for name, p in model.named_parameters()
        )
        optimizer.zero_grad()
        loss = loss + 0.01 * sum((p * torch.randn_like(p)).sum() for p in model.parameters())
        loss.backward()
        optimizer.step()
        found += monitor.step()
    results = monitor.results()
    assert results["wild"].status is DampingStatus.CRITICAL
    assert results["wild"].recommendations
    assert results["calm"].status is not DampingStatus.CRITICAL
    assert {e.detector for e in found} == {"damping of wild"}
