"""Spectral health: right numbers, every layer seen, silent on healthy runs, evidence of a collapse, no trace.

Oracles: ``torch.linalg.svdvals`` in float64 for norms, ranks and conditions; networkx's normalised Laplacian with
numpy's correlation for the Fiedler value; random matrices for the Marchenko-Pastur expectations.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace

import networkx
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from kalmanguard.errors import ConfigurationError
from kalmanguard.models import CharTransformerPlant, CNNPlant, MLPPlant, Plant, ViTPlant
from kalmanguard.records import Evidence, Guarantee
from kalmanguard.sensors.spectrum import LayerSpectrum, SpectralHealth
from kalmanguard.sensors.spectrum.baseline import LEARNED_FROM, Baseline
from kalmanguard.sensors.spectrum.layers import matrix_layers
from kalmanguard.sensors.spectrum.measures import (
    condition_number,
    connectivity,
    random_condition_number,
    random_stable_rank,
    top_singular,
)


def train(plant: Plant, steps: int, health: SpectralHealth, start: int = 1) -> list[Evidence]:
    found: list[Evidence] = []
    for step in range(start, start + steps):
        plant.step_loss(next(plant.loader)).backward()
        plant.optimizer.step()
        plant.optimizer.zero_grad()
        if plant.scheduler is not None:
            plant.scheduler.step()
        found += health.sense(step)
    return found


def linear(weights: Tensor) -> nn.Linear:
    layer = nn.Linear(weights.shape[1], weights.shape[0], bias=False, dtype=weights.dtype)
    with torch.no_grad():
        layer.weight.copy_(weights)
    return layer


def exact_stable_rank(weights: Tensor) -> float:
    values = torch.linalg.svdvals(weights.double())
    return float(values.square().sum() / values[0] ** 2)


# --- measures against oracles -----------------------------------------------------------------------------------------


@given(rows=st.integers(2, 30), columns=st.integers(3, 30), seed=st.integers(0, 2**31))
def test_connectivity_is_the_second_eigenvalue_of_networkx_normalised_laplacian(
    rows: int, columns: int, seed: int
) -> None:
    matrix = np.random.default_rng(seed).standard_normal((rows, columns))
    weights = np.abs(np.corrcoef(matrix))
    np.fill_diagonal(weights, 0.0)
    laplacian = networkx.normalized_laplacian_matrix(networkx.from_numpy_array(weights)).toarray()
    value, constant = connectivity(torch.from_numpy(matrix))
    assert value == pytest.approx(np.linalg.eigvalsh(laplacian)[1], abs=1e-10)
    assert constant == 0


def test_connectivity_tells_groups_apart_and_its_blind_spot_is_as_stated() -> None:
    draws = torch.randn(3, 64, dtype=torch.float64)
    groups, _ = torch.linalg.qr((draws - draws.mean(1, keepdim=True)).T)
    two = torch.cat([groups[:, :1].T.repeat(5, 1), groups[:, 1:2].T.repeat(7, 1)])
    assert connectivity(two)[0] < 1e-6
    same = groups[:, :1].T.repeat(10, 1)
    assert connectivity(same)[0] == pytest.approx(10 / 9)
    scaled = two * torch.linspace(-3, 5, 12, dtype=torch.float64)[:, None] + 2  # correlation sees neither
    assert connectivity(scaled)[0] < 1e-6


def test_constant_rows_are_counted_and_left_out() -> None:
    matrix = torch.randn(6, 20, dtype=torch.float64)
    value, _ = connectivity(matrix)
    holed = torch.cat([torch.zeros(2, 20, dtype=torch.float64), matrix, torch.full((1, 20), 0.3, dtype=torch.float64)])
    assert connectivity(holed) == (pytest.approx(value), 3)
    lonely, constant = connectivity(holed[:3])
    assert math.isnan(lonely)
    assert constant == 2


@given(rows=st.integers(1, 30), columns=st.integers(1, 30), seed=st.integers(0, 2**31))
def test_condition_number_is_that_of_the_svd(rows: int, columns: int, seed: int) -> None:
    matrix = torch.from_numpy(np.random.default_rng(seed).standard_normal((rows, columns)))
    values = torch.linalg.svdvals(matrix)
    assert condition_number(matrix) == pytest.approx(float(values[0] / values[-1]), rel=1e-4)
    assert condition_number(torch.cat([matrix, torch.zeros(1, columns).double()]).T[:, : rows + 1]) >= 1


def test_condition_of_a_singular_or_zero_matrix_is_infinite() -> None:
    assert condition_number(torch.ones(4, 4, dtype=torch.float64)) == math.inf
    assert condition_number(torch.zeros(4, 4, dtype=torch.float64)) == math.inf


@given(rows=st.integers(4, 40), columns=st.integers(4, 40), seed=st.integers(0, 2**31), iterations=st.integers(1, 6))
def test_power_iteration_never_exceeds_the_norm_and_gives_its_own_rayleigh_quotient(
    rows: int, columns: int, seed: int, iterations: int
) -> None:
    rng = np.random.default_rng(seed)
    matrix = torch.from_numpy(rng.standard_normal((rows, columns)))
    start = torch.from_numpy(rng.standard_normal(columns))
    value, left, right = top_singular(matrix, start, iterations=iterations)
    exact = float(torch.linalg.matrix_norm(matrix, 2))
    assert float(value) <= exact * (1 + 1e-12)
    assert float(left @ matrix @ right) == pytest.approx(float(value))
    more, _, _ = top_singular(matrix, start, iterations=iterations + 1)
    assert float(more) >= float(value) * (1 - 1e-12)


def test_random_expectations_are_those_of_random_matrices() -> None:
    for shape in ((400, 400), (200, 800), (900, 300)):
        matrix = torch.randn(shape, dtype=torch.float64)
        assert exact_stable_rank(matrix) == pytest.approx(random_stable_rank(*shape), rel=0.05)
        if shape[0] != shape[1]:
            assert condition_number(matrix) == pytest.approx(random_condition_number(*shape), rel=0.05)
    assert random_condition_number(5, 5) == math.inf


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    ("kind", "first", "settled"),
    # Relative error of the stable rank at the first and the 20th measurement; measured at most 0.14, 0.03 and 1e-5.
    [("random", 0.25, 0.05), ("low rank and noise", 0.25, 0.05), ("dominant", 1e-3, 1e-4)],
)
def test_stable_rank_is_near_the_full_svd(kind: str, first: float, settled: float, seed: int) -> None:
    torch.manual_seed(seed)
    weights = torch.randn(400, 600)
    if kind == "low rank and noise":
        weights = weights[:, :3] @ torch.randn(3, 600) + 0.1 * weights
    if kind == "dominant":
        weights += 1.0
    health = SpectralHealth(linear(weights))
    exact = exact_stable_rank(weights)
    measured = [health.measure().layers[0].stable_rank for _ in range(20)]
    assert -1e-5 < measured[0] / exact - 1 < first  # from above, up to float32's rounding
    assert abs(measured[-1] / exact - 1) < settled


@pytest.mark.parametrize(("size", "measurements"), [(10_000, 1), (1_000, 3)])  # 22 and 2.2 times the old norm
def test_a_direction_that_was_not_there_before_is_found(size: float, measurements: int) -> None:
    layer = linear(torch.randn(300, 300) + 3.0)
    health = SpectralHealth(layer)
    for _ in range(10):
        health.measure()
    with torch.no_grad():
        axis = torch.zeros(300)
        axis[:2] = torch.tensor([1.0, -1.0])  # orthogonal to the old top direction
        layer.weight += size * torch.outer(axis, axis)
    found = [health.measure().layers[0].stable_rank for _ in range(measurements)]
    assert found[-1] == pytest.approx(exact_stable_rank(layer.weight.detach()), rel=0.01)


def test_small_layers_are_measured_whole() -> None:
    layer = nn.Linear(50, 30)
    spectrum = SpectralHealth(layer).measure().layers[0]
    values = torch.linalg.svdvals(layer.weight.detach().double())
    assert spectrum.shape == spectrum.sampled_shape == (30, 50)
    assert spectrum.condition_number == pytest.approx(float(values[0] / values[-1]), rel=1e-5)
    large = SpectralHealth(nn.Linear(1000, 500), max_rows=64, max_columns=128).measure().layers[0]
    assert large.sampled_shape == (64, 128)
    assert large.shape == (500, 1000)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_half_precision_is_measured_and_near_float32(dtype: torch.dtype) -> None:
    weights = torch.randn(60, 90)
    plain = SpectralHealth(linear(weights)).measure()
    other = SpectralHealth(linear(weights.to(dtype))).measure()
    assert not other.skipped
    for name in ("stable_rank", "condition_number", "fiedler_value", "spectral_norm"):
        assert getattr(other.layers[0], name) == pytest.approx(getattr(plain.layers[0], name), rel=0.02)


# --- layers -----------------------------------------------------------------------------------------------------------


class Conv1D(nn.Module):
    """As in transformers: weights of shape (inputs, outputs)."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.nf = outputs
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))


def test_every_kind_of_matrix_is_seen_with_one_row_per_output() -> None:
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(6, 5),
            "conv": nn.Conv2d(3, 8, 3),
            "up": nn.ConvTranspose2d(6, 9, 3),
            "gpt": Conv1D(7, 11),
            "words": nn.Embedding(20, 6),
            "attention": nn.MultiheadAttention(8, 2),
            "rnn": nn.LSTM(5, 6),
            "tiny": nn.Linear(3, 40),
            "norm": nn.LayerNorm(8),
        }
    )
    model.register_parameter("positions", nn.Parameter(torch.randn(1, 17, 8)))
    model["tied"] = nn.Linear(6, 20, bias=False)
    model["tied"].weight = model["words"].weight
    model["linear"].weight.requires_grad_(False)  # frozen layers have spectra too
    shapes = {layer.name: tuple(layer.matrix().shape) for layer in matrix_layers(model)}
    assert shapes == {
        "linear.weight": (5, 6),
        "conv.weight": (8, 27),
        "up.weight": (9, 54),
        "gpt.weight": (7, 11),
        "words.weight": (20, 6),
        "attention.in_proj_weight": (24, 8),
        "attention.out_proj.weight": (8, 8),
        "rnn.weight_ih_l0": (24, 5),
        "rnn.weight_hh_l0": (24, 6),
        "positions": (17, 8),
    }
    up = next(layer for layer in matrix_layers(model) if layer.name == "up.weight")
    assert torch.equal(up.matrix()[4], model["up"].weight[:, 4].flatten())


def test_what_is_read_can_be_written_back() -> None:
    model = nn.ModuleList([nn.Conv2d(4, 8, 3), nn.ConvTranspose2d(6, 9, 3), Conv1D(7, 11), nn.Linear(5, 5)])
    model[0].to(memory_format=torch.channels_last)
    for layer in matrix_layers(model):
        before = layer.parameter.detach().clone()
        doubled = layer.matrix().clone() * 2
        with torch.no_grad():
            layer.write(doubled)
        assert torch.equal(layer.parameter, 2 * before)


def test_transformers_conv1d_is_seen() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=40, n_positions=12)
    model = transformers.GPT2LMHeadModel(config)
    shapes = {layer.name: tuple(layer.matrix().shape) for layer in matrix_layers(model)}
    assert shapes["transformer.h.0.attn.c_attn.weight"] == (48, 16)
    assert shapes["transformer.h.0.mlp.c_proj.weight"] == (16, 64)
    assert len(shapes) == 6  # two embeddings (the head is tied) and four projections


def test_layers_take_turns_and_none_waits_longer_than_two_rounds() -> None:
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(7)])
    health = SpectralHealth(model, layers_per_measurement=3, seed=4)
    drawn = [[layer.name for layer in health.measure().layers] for _ in range(28)]
    assert all(len(set(names)) == 3 for names in drawn)
    again = SpectralHealth(model, layers_per_measurement=3, seed=4)
    assert drawn == [[layer.name for layer in again.measure().layers] for _ in range(28)]
    other = SpectralHealth(model, layers_per_measurement=3, seed=5)
    assert drawn != [[layer.name for layer in other.measure().layers] for _ in range(28)]
    for name in health.names:
        seen = [i for i, names in enumerate(drawn) if name in names]
        assert max(np.diff([-1, *seen])) <= math.ceil(2 * 7 / 3)
        assert abs(len(seen) - 28 * 3 / 7) <= 1.5


# --- evidence ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "options", "steps"),
    [
        (MLPPlant, {}, 600),
        (MLPPlant, {"optimizer": "sgd"}, 600),
        (MLPPlant, {"batch_size": 4, "schedule": "warm-restarts", "steps": 600}, 600),
        (CNNPlant, {}, 120),
        (ViTPlant, {"data_frac": 0.2}, 120),
        (CharTransformerPlant, {}, 100),
    ],
)
def test_healthy_plants_are_left_alone(make: type[Plant], options: dict[str, object], steps: int) -> None:
    plant = make(seed=1, **options)
    health = SpectralHealth(plant.model, every=10, layers_per_measurement=20)
    assert train(plant, steps, health) == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("make", "options", "steps"),
    [
        (MLPPlant, {"batch_size": 2}, 3000),
        (MLPPlant, {"optimizer": "sgd"}, 3000),
        (CNNPlant, {}, 600),
        (ViTPlant, {}, 400),
        (CharTransformerPlant, {}, 700),
    ],
)
def test_healthy_plants_are_left_alone_for_long(
    make: type[Plant], options: dict[str, object], steps: int, seed: int
) -> None:
    plant = make(seed=seed, **options)
    health = SpectralHealth(plant.model, every=20, layers_per_measurement=20)
    assert train(plant, steps, health) == []


def collapsed_to_one_direction(weights: Tensor) -> Tensor:
    left, values, right = torch.linalg.svd(weights, full_matrices=False)
    values[1:] *= 0.1
    return (left * values) @ right


def split_into_two_groups(weights: Tensor) -> Tensor:
    groups = weights.clone()
    half = len(weights) // 2
    groups[:half, 32:] = 0
    groups[half:, :32] = 0
    groups[:half, :32] += 30 * weights[0, :32]
    groups[half:, 32:] += 30 * weights[-1, 32:]
    return groups


def most_rows_copied(weights: Tensor) -> Tensor:
    return weights[: len(weights) // 4].repeat(4, 1)  # 32 rows in 64 columns: half of the singular values are 0


@pytest.mark.parametrize(
    ("damage", "measure"),
    [
        (collapsed_to_one_direction, "stable rank"),
        (split_into_two_groups, "Fiedler value"),
        (most_rows_copied, "inverse condition number"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_collapse_is_evidence_at_the_next_measurement(damage: object, measure: str, dtype: torch.dtype) -> None:
    plant = MLPPlant(seed=0)
    health = SpectralHealth(plant.model if dtype is torch.float32 else plant.model.to(dtype), every=10)
    if dtype is not torch.float32:  # the plant's own loop, with batches of the weights' dtype
        plant.step_loss = lambda batch: plant.loss_fn(plant.model(batch[0].to(dtype)).float(), batch[1])  # type: ignore[method-assign]
    assert train(plant, 150, health) == []
    with torch.no_grad():
        weights = plant.model.layers[0].weight
        weights.copy_(damage(weights.float()))  # type: ignore[operator]
    found = health.sense(160)
    assert measure in [e.message.split(" of ")[0].removeprefix("the ") for e in found]
    assert all(e.fired and e.guarantee is Guarantee.HEURISTIC and "layers.0.weight" in e.message for e in found)
    assert health.sense(161) == ()  # not due


def spectrum(stable_rank: float, fiedler: float = 0.9, condition: float = 3.0) -> LayerSpectrum:
    return LayerSpectrum("w", (9, 9), (9, 9), 1.0, stable_rank, condition, fiedler, 0, 2.25, math.inf)


def test_a_slow_collapse_is_evidence_in_the_end_and_a_slow_healthy_fall_is_not() -> None:
    baseline = Baseline("w")
    fired_at = None
    for i in range(400):
        if baseline.compare(spectrum(40 * math.exp(-0.01 * i))):
            fired_at = i
            break
    assert fired_at is not None
    assert 8 <= math.exp(0.01 * (fired_at - 3)) < 9
    healthy = Baseline("w")
    assert not any(healthy.compare(spectrum(40 * math.exp(-0.01 * min(i, 190)))) for i in range(400))


def test_nothing_is_judged_before_it_is_known_and_nothing_finite_is_needed() -> None:
    baseline = Baseline("w")
    for i in range(LEARNED_FROM + 1):
        assert baseline.compare(spectrum(100.0 if i % 2 else 2.0)) == ()
    nan = replace(spectrum(30.0), fiedler_value=math.nan, condition_number=math.inf)
    baseline = Baseline("w")
    for _ in range(30):
        assert baseline.compare(nan) == ()  # always singular is no collapse
    assert [e.message.split(" of ")[0] for e in baseline.compare(replace(nan, stable_rank=3.0))] == ["the stable rank"]


# --- bad input and traces ---------------------------------------------------------------------------------------------


def test_what_cannot_be_measured_is_named_and_is_no_evidence() -> None:
    names = ("nan", "zero", "freed", "small", "large", "ok")
    model = nn.ModuleDict({name: nn.Linear(8, 8) for name in names})
    model["freed"] = nn.Conv2d(8, 8, 3)
    health = SpectralHealth(model, every=1, layers_per_measurement=6)
    with torch.no_grad():
        model["nan"].weight[0, 0] = math.nan
        model["zero"].weight.zero_()
        model["small"].weight.mul_(1e-30)
        model["large"].weight.mul_(1e30)
        model["freed"].weight.data = torch.empty(0)
    report = health.measure()
    assert [layer.name for layer in report.layers] == ["ok.weight"]
    assert report.skipped["nan.weight"] == "not finite in float32"
    assert report.skipped["zero.weight"] == "zero in float32"
    assert "freed.weight" in report.skipped
    assert report.skipped["small.weight"] == "zero in float32"
    assert report.skipped["large.weight"] == "not finite in float32"
    assert [health.sense(step) for step in range(1, 20)] == [()] * 19


def test_models_without_a_readable_matrix_are_refused() -> None:
    with torch.device("meta"):
        meta = nn.Linear(9, 9)
    odd = nn.ParameterDict({"complex": torch.randn(9, 9, dtype=torch.cfloat), "scalar": torch.randn(())})
    lazy = nn.LazyLinear(9)
    for model in (meta, odd, lazy, nn.Linear(1, 1), nn.Identity()):
        with pytest.raises(ConfigurationError, match="no spectrum to measure"):
            SpectralHealth(model)


@pytest.mark.parametrize(
    "options", [{"every": 0}, {"layers_per_measurement": 0}, {"max_rows": 7}, {"max_columns": 1}, {"seed": -1}]
)
def test_bad_options_are_refused(options: dict[str, int]) -> None:
    name, value = next(iter(options.items()))
    with pytest.raises(ConfigurationError, match=f"{name} = {value}"):
        SpectralHealth(nn.Linear(9, 9), **options)


def test_measuring_leaves_no_trace() -> None:
    runs = []
    for watched in (False, True):
        torch.manual_seed(7)  # dropout's stream
        plant = CNNPlant(seed=0)
        health = SpectralHealth(plant.model, every=2, layers_per_measurement=9)
        states = (random.getstate(), np.random.get_state()[1].tolist())
        for step in range(1, 13):
            plant.step_loss(next(plant.loader)).backward()
            if watched:
                with torch.autocast("cpu", torch.bfloat16):  # must not reach the measurement
                    health.sense(step)
            plant.optimizer.step()
            plant.optimizer.zero_grad()
        assert states == (random.getstate(), np.random.get_state()[1].tolist())
        assert all(not m._forward_hooks and not m._forward_pre_hooks for m in plant.model.modules())
        runs.append((torch.get_rng_state(), {k: v.clone() for k, v in plant.model.state_dict().items()}))
    assert torch.equal(runs[0][0], runs[1][0])
    assert all(torch.equal(value, runs[1][1][name]) for name, value in runs[0][1].items())


def test_a_closed_sensor_is_silent() -> None:
    health = SpectralHealth(nn.Linear(9, 9), every=1)
    health.close()
    health.close()
    assert health.sense(1) == ()
