"""The thermostat: the step that it takes, the loop that decides on it, and the loops of others that it is put into.

Oracles: the full SVD in float64 for the step; autograd for its direction; a plain loop written out here for the
Trainer, with and without accumulation.
"""

from __future__ import annotations

import copy
import math
import random
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from kalmanguard import Settings, Supervisor
from kalmanguard.actuators.rounding import round_stochastically
from kalmanguard.actuators.thermostat import SpectralThermostat, _Loop
from kalmanguard.errors import ConfigurationError
from kalmanguard.models import MLPPlant, Plant, ViTPlant
from kalmanguard.models.digits import load_digits


def stable_rank(weights: Tensor) -> float:
    values = torch.linalg.svdvals(weights.detach().double())
    return float(values.square().sum() / values[0] ** 2)


def dominated(rows: int = 24, columns: int = 40, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """A random matrix with one direction of three times the next one's strength."""
    left, values, right = torch.linalg.svd(torch.randn(rows, columns, dtype=torch.float64), full_matrices=False)
    values[0] = 3 * values[1]
    return ((left * values) @ right).to(dtype)


def still(weights: Tensor, *, lr: float = 0.1) -> tuple[nn.Linear, torch.optim.Optimizer]:
    """A layer whose gradient is zero, so that only the thermostat moves it."""
    layer = nn.Linear(weights.shape[1], weights.shape[0], bias=False, dtype=weights.dtype)
    with torch.no_grad():
        layer.weight.copy_(weights)
    layer.weight.grad = torch.zeros_like(layer.weight)
    return layer, torch.optim.SGD(layer.parameters(), lr=lr)


def lower(thermostat: SpectralThermostat, factor: float = 10.0) -> None:
    """Make every target larger, so that the thermostat has something to do."""
    for loop in thermostat._loops.values():
        loop.target *= factor


def step(plant: Plant) -> None:
    plant.step_loss(next(plant.loader)).backward()
    plant.optimizer.step()
    plant.optimizer.zero_grad()


# --- the step ---------------------------------------------------------------------------------------------------------


def test_the_step_lowers_the_top_singular_value_alone_and_keeps_the_norm() -> None:
    weights = dominated(dtype=torch.float64)
    layer, optimizer = still(weights)
    thermostat = SpectralThermostat(layer, optimizer, every=1, strongest=0.02)
    lower(thermostat)
    optimizer.step()
    left, values, right = torch.linalg.svd(weights, full_matrices=False)
    share = thermostat.state()["weight"].strength
    assert share == 0.02
    values[0] *= 1 - share
    expected = (left * values) @ right
    expected *= torch.linalg.vector_norm(weights) / torch.linalg.vector_norm(expected)
    assert torch.allclose(layer.weight, expected, atol=1e-6)
    assert float(torch.linalg.vector_norm(layer.weight.detach())) == pytest.approx(
        float(torch.linalg.vector_norm(weights))
    )
    assert stable_rank(layer.weight) > 1.015 * stable_rank(weights)


def test_the_step_goes_down_the_gradient_of_minus_log_stable_rank() -> None:
    weights = dominated(dtype=torch.float64)
    variable = weights.clone().requires_grad_()
    (2 * torch.linalg.matrix_norm(variable, 2).log() - variable.square().sum().log()).backward()
    layer, optimizer = still(weights)
    thermostat = SpectralThermostat(layer, optimizer, every=1, strongest=1e-6)
    lower(thermostat)
    optimizer.step()
    moved = (layer.weight.detach() - weights).flatten()
    gradient = variable.grad.flatten()
    assert float(torch.cosine_similarity(moved, -gradient, dim=0)) == pytest.approx(1.0, abs=1e-6)


def test_plain_decay_of_any_strength_leaves_the_measure_where_it_was() -> None:
    weights = dominated()
    assert stable_rank(0.3 * weights) == pytest.approx(stable_rank(weights))


def test_the_norm_is_kept_also_where_the_vectors_have_not_converged() -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        layer, optimizer = still(torch.randn(50, 50))
        norm = float(torch.linalg.vector_norm(layer.weight.detach()))
        thermostat = SpectralThermostat(layer, optimizer, every=1, strongest=0.5)
        lower(thermostat)
        for loop in thermostat._loops.values():
            loop.right = torch.randn(50)
        for _ in range(20):
            optimizer.step()
        assert float(torch.linalg.vector_norm(layer.weight.detach())) == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_follow_float32_ones(dtype: torch.dtype) -> None:
    weights = dominated(96, 128)
    ends = []
    for kind in (torch.float32, dtype):
        layer, optimizer = still(weights.to(kind))
        thermostat = SpectralThermostat(layer, optimizer, every=1, strongest=0.002)  # below bfloat16's resolution
        lower(thermostat)
        for _ in range(150):
            optimizer.step()
        ends.append(stable_rank(layer.weight))
    assert ends[0] > 1.3 * stable_rank(weights)
    assert ends[1] == pytest.approx(ends[0], rel=0.05)


@pytest.mark.parametrize(("dtype", "gap"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_stochastic_rounding_is_right_on_average_and_only_to_neighbours(dtype: torch.dtype, gap: float) -> None:
    generator = torch.Generator().manual_seed(3)
    values = torch.cat([torch.randn(50), torch.tensor([1e-3, -7.7, 1.999, 0.0, 1.0])])
    draws = torch.stack([round_stochastically(values, dtype, generator) for _ in range(4000)]).double()
    spacing = 2 * gap * torch.exp2(values.abs().clamp_min(1e-30).log2().floor()).double()
    assert bool(((draws - values).abs() <= spacing).all())
    # Five standard errors of a mean of draws that lie at most half a spacing from their middle.
    assert bool(((draws.mean(0) - values).abs() <= 5 * spacing / 2 / math.sqrt(4000)).all())
    odd = torch.tensor([math.inf, -math.inf, math.nan])
    assert str(round_stochastically(odd, dtype, generator).tolist()) == "[inf, -inf, nan]"


# --- the loop ---------------------------------------------------------------------------------------------------------


def test_a_low_stable_rank_is_brought_to_its_target_and_then_let_go() -> None:
    layer, optimizer = still(torch.randn(32, 48))
    thermostat = SpectralThermostat(layer, optimizer, every=5)
    with torch.no_grad():
        layer.weight += 0.6
    strengths, ranks = [], []
    for _ in range(800):
        optimizer.step()
        strengths.append(thermostat.state()["weight"].strength)
        ranks.append(stable_rank(layer.weight))
    target = thermostat.state()["weight"].target
    assert min(ranks) < 0.4 * target
    assert max(strengths) <= 0.02
    assert max(strengths) > 0.005
    assert ranks[-1] == pytest.approx(target, rel=0.25)
    assert ranks[-1] > 0.95 * target
    assert strengths[-1] < 0.1 * max(strengths)


def test_a_steady_pull_is_held_at_the_target_by_the_integral() -> None:
    weights = torch.randn(32, 48)
    fallen = []
    for kept in (False, True):
        layer, optimizer = still(weights, lr=1.0)
        thermostat = SpectralThermostat(layer, optimizer, every=1, target=0.9)
        if not kept:
            thermostat.close()
        for _ in range(1500):  # the gradient feeds the top direction, whichever it is
            left, values, right = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
            layer.weight.grad = -0.002 * values[0] * torch.outer(left[:, 0], right[0])
            optimizer.step()
        fallen.append(stable_rank(layer.weight))
    state = thermostat.state()["weight"]
    assert fallen[0] < 0.2 * state.target
    assert fallen[1] == pytest.approx(state.target, rel=0.1)
    assert 0.001 < state.strength < 0.02


def test_the_loop_is_bounded_rises_falls_and_does_not_wind_up() -> None:
    loop = _Loop(None, torch.zeros(1), 10.0, 10.0)  # type: ignore[arg-type]
    rising = [loop.control(9.0, 1, 0.02) for _ in range(200)]
    assert all(b > a for a, b in pairwise(rising))
    saturated = [loop.control(1.0, 10, 0.02) for _ in range(5000)]
    assert max(saturated) == 0.02
    assert loop.integral <= 0.02
    # Once healthy it lets go at once: what a long saturation has piled up is no more than before it.
    before = loop.integral
    assert before < 0.011
    falling = [loop.control(15.0, 10, 0.02) for _ in range(400)]
    assert all(b <= a for a, b in pairwise(falling))
    assert falling[-1] == loop.integral == 0.0
    assert loop.control(10.0, 1, 0.02) == 0.0


def test_a_schedule_scales_the_step() -> None:
    moved = []
    for rate in (1.0, 0.25, 0.0):
        torch.manual_seed(0)
        layer, optimizer = still(dominated(dtype=torch.float64))
        before = layer.weight.detach().clone()
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _, rate=rate: rate)
        thermostat = SpectralThermostat(layer, optimizer, every=1, strongest=1e-4)
        lower(thermostat)
        optimizer.step()
        scheduler.step()
        moved.append(float(torch.linalg.vector_norm(layer.weight.detach() - before)))
    assert moved[1] == pytest.approx(moved[0] / 4, rel=1e-3)
    assert moved[2] == 0


@pytest.mark.parametrize("make", [MLPPlant, ViTPlant])
def test_while_healthy_the_run_is_bit_for_bit_the_bare_run(make: type[Plant]) -> None:
    ends = []
    for kept in (False, True):
        plant = make(seed=0)
        states = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
        if kept:
            thermostat = SpectralThermostat(plant.model, plant.optimizer, target=0.05, every=1)
        for _ in range(12):
            step(plant)
        assert torch.equal(torch.get_rng_state(), states[0])
        assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
        ends.append(plant.model.state_dict())
    assert all(state.strength == 0 for state in thermostat.state().values())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_on_a_real_run_stable_ranks_end_higher_than_without() -> None:
    ends = []
    for kept in (False, True):
        plant = MLPPlant(seed=0, optimizer="sgd")
        names = [name for name, p in plant.model.named_parameters() if p.dim() == 2]
        start = [stable_rank(plant.model.get_parameter(name)) for name in names]
        if kept:
            thermostat = SpectralThermostat(plant.model, plant.optimizer)
            assert list(thermostat.state()) == names
        for _ in range(600):
            step(plant)
        ends.append([stable_rank(plant.model.get_parameter(n)) / s for n, s in zip(names, start, strict=True)])
        loss = plant.held_out_loss()
    assert min(ends[0]) < 0.5
    assert min(ends[1]) > 0.6  # measured 0.65, without 0.31
    assert loss < 0.4


# --- hooks and states -------------------------------------------------------------------------------------------------


def test_it_acts_once_per_step_however_many_backward_passes_there_were() -> None:
    ends = []
    for pieces in (1, 4):
        plant = MLPPlant(seed=0, optimizer="sgd")
        plant.model.double()
        thermostat = SpectralThermostat(plant.model, plant.optimizer, target=1.0, every=2)
        for _ in range(20):
            inputs, targets = next(plant.loader)
            for part in range(pieces):
                chosen = slice(part * 64 // pieces, (part + 1) * 64 // pieces)
                loss = plant.loss_fn(plant.model(inputs[chosen].double()), targets[chosen])
                (loss / pieces).backward()
            plant.optimizer.step()
            plant.optimizer.zero_grad()
        ends.append((plant.model.state_dict(), thermostat.state()))
    assert max(state.strength for state in ends[0][1].values()) > 0
    assert all(torch.allclose(value, ends[1][0][name], atol=1e-9) for name, value in ends[0][0].items())
    assert ends[0][1].keys() == ends[1][1].keys()


def test_a_step_without_gradients_changes_nothing() -> None:
    layer, optimizer = still(dominated())
    thermostat = SpectralThermostat(layer, optimizer, every=1)
    lower(thermostat)
    layer.weight.grad = None
    before = layer.weight.detach().clone()
    optimizer.step()
    assert torch.equal(layer.weight, before)


def test_frozen_layers_embeddings_and_what_is_not_included_stay_as_they_are() -> None:
    model = nn.Sequential(nn.Embedding(20, 12), nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12))
    model[1].weight.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    thermostat = SpectralThermostat(model, optimizer, include=lambda name: name != "3.weight" and name != "0.weight")
    assert list(thermostat.state()) == ["2.weight"]
    assert list(SpectralThermostat(model, optimizer).state()) == ["2.weight", "3.weight"]


def test_convolutions_and_every_optimizer_of_torch_are_kept() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ConvTranspose2d(8, 5, 3)).to(memory_format=torch.channels_last)
    with torch.no_grad():
        for layer in model:
            layer.weight += 0.1  # gives it a dominant direction
    for make in (torch.optim.AdamW, torch.optim.Adagrad, torch.optim.RMSprop):
        optimizer = make(model.parameters(), lr=1e-12)
        thermostat = SpectralThermostat(model, optimizer, every=1, strongest=0.05)
        lower(thermostat)
        before = [stable_rank(model[0].weight.flatten(1)), stable_rank(model[1].weight.transpose(0, 1).flatten(1))]
        model(torch.randn(2, 4, 8, 8)).sum().backward()
        optimizer.step()
        assert stable_rank(model[0].weight.flatten(1)) > 1.01 * before[0]
        assert stable_rank(model[1].weight.transpose(0, 1).flatten(1)) > 1.01 * before[1]
        thermostat.close()
    assert thermostat.failure is None


def test_closing_detaches_and_leaves_no_trace() -> None:
    layer, optimizer = still(dominated())
    thermostat = SpectralThermostat(layer, optimizer, every=1)
    lower(thermostat)
    thermostat.close()
    thermostat.close()
    before = layer.weight.detach().clone()
    optimizer.step()
    assert torch.equal(layer.weight, before)
    assert not optimizer._optimizer_step_post_hooks
    assert copy.deepcopy(optimizer.state_dict()) == optimizer.state_dict()


def test_an_error_inside_is_told_once_and_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, optimizer = still(dominated())
    thermostat = SpectralThermostat(layer, optimizer, every=1)

    def broken(*args: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(thermostat, "_apply", broken)
    with pytest.warns(RuntimeWarning, match="out of memory"):
        optimizer.step()
    optimizer.step()  # no second warning, which would be an error here
    assert thermostat.failure == "RuntimeError: out of memory"


def test_weights_that_are_not_finite_or_zero_are_left_alone() -> None:
    model = nn.ModuleList([nn.Linear(8, 8, bias=False) for _ in range(3)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    thermostat = SpectralThermostat(model, optimizer, every=1)
    lower(thermostat)
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
        model[1].weight.zero_()
    for layer in model:
        layer.weight.grad = torch.zeros_like(layer.weight)
    before = [layer.weight.detach().clone() for layer in model]
    for _ in range(3):
        optimizer.step()
    assert int(model[0].weight.isnan().sum()) == 1
    assert torch.equal(model[1].weight, before[1])
    assert not torch.equal(model[2].weight, before[2])
    assert thermostat.failure is None


def test_a_resumed_run_is_the_same_run_bit_for_bit() -> None:
    def start() -> tuple[Plant, SpectralThermostat]:
        plant = MLPPlant(seed=0, optimizer="sgd")
        return plant, SpectralThermostat(plant.model, plant.optimizer, target=1.0, every=4)

    plant, thermostat = start()
    for _ in range(30):
        step(plant)
    saved = copy.deepcopy((plant.model.state_dict(), plant.optimizer.state_dict(), thermostat.state_dict()))
    for _ in range(30):
        step(plant)
    again, resumed = start()
    again.loader.position = 30
    again.model.load_state_dict(saved[0])
    again.optimizer.load_state_dict(saved[1])
    resumed.load_state_dict(saved[2])
    for _ in range(30):
        step(again)
    assert resumed.state() == thermostat.state()
    assert max(state.strength for state in resumed.state().values()) > 0
    theirs = again.model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in plant.model.state_dict().items())
    with pytest.raises(ConfigurationError, match="other layers"):
        SpectralThermostat(*still(dominated())).load_state_dict(saved[2])


def test_a_supervisor_takes_it_for_a_part_of_the_step() -> None:
    plant = MLPPlant(seed=0, optimizer="sgd")
    thermostat = SpectralThermostat(plant.model, plant.optimizer, target=1.0, every=1)
    with Supervisor(plant.model, plant.probe_loader, settings=Settings(mode="protect")) as supervisor:
        for _ in range(150):
            loss = plant.step_loss(next(plant.loader))
            loss.backward()
            plant.optimizer.step()
            decision = supervisor.update(loss)
            plant.optimizer.zero_grad()
            assert not [e for e in decision.evidence if e.fired and "outside" in e.message]
        numbers = supervisor.statistics()
    assert numbers["rollbacks"] == numbers["vetoes"] == 0
    assert max(state.strength for state in thermostat.state().values()) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": 0.0}, "target = 0.0"),
        ({"target": 1.1}, "target = 1.1"),
        ({"every": 0}, "every = 0"),
        ({"strongest": 0.0}, "strongest = 0.0"),
        ({"strongest": 0.6}, "strongest = 0.6"),
        ({"seed": -1}, "seed = -1"),
        ({"include": lambda name: False}, "and included"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    layer, optimizer = still(dominated())
    with pytest.raises(ConfigurationError, match=message):
        SpectralThermostat(layer, optimizer, **options)
    assert not optimizer._optimizer_step_post_hooks


def test_foreign_and_unfitting_optimizers_are_refused() -> None:
    layer, optimizer = still(dominated())
    with pytest.raises(ConfigurationError, match=r"dict is no torch\.optim\.Optimizer"):
        SpectralThermostat(layer, {"optimizer": optimizer})  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="trains no dense"):
        SpectralThermostat(nn.Linear(9, 9), optimizer)


# --- Hugging Face -----------------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """Two linear layers with the interface that a Trainer wants."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))

    def forward(self, pixels: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.layers(pixels.to(self.layers[0].weight.dtype))
        return (
            {"loss": cross_entropy(logits.float(), labels), "logits": logits}
            if labels is not None
            else {"logits": logits}
        )


class Examples(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __init__(self, count: int) -> None:
        digits = load_digits()
        self.inputs, self.targets = digits.train_inputs[:count], digits.train_targets[:count]

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixels": self.inputs[index], "labels": self.targets[index]}


def trained_by_trainer(
    tmp_path: Any, dtype: torch.dtype, accumulation: int, callbacks: list[Any]
) -> tuple[nn.Module, list[float]]:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(5)
    model = Classifier().to(dtype)

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=8,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=2,
        learning_rate=0.02,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = InOrder(model=model, args=arguments, train_dataset=Examples(256), callbacks=callbacks)
    trainer.train()
    return model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def trained_by_hand(dtype: torch.dtype, accumulation: int, *, kept: bool) -> tuple[nn.Module, list[float]]:
    torch.manual_seed(5)
    model = Classifier().to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    if kept:
        SpectralThermostat(model, optimizer, target=1.0, every=2)
    examples, losses = Examples(256), []
    for _ in range(2):
        for batches in _accumulated(8, accumulation):
            total = 0.0
            for chosen in batches:
                loss = model(examples.inputs[chosen], examples.targets[chosen])["loss"] / accumulation
                loss.backward()
                total += loss.item()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(total)
    return model, losses


def _accumulated(size: int, accumulation: int) -> Iterator[list[slice]]:
    for start in range(0, 256, size * accumulation):
        yield [slice(start + i * size, start + (i + 1) * size) for i in range(accumulation)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of transformers and accelerate themselves
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_trainer_with_the_callback_is_the_plain_loop_with_the_thermostat(
    tmp_path: Any, dtype: torch.dtype, accumulation: int
) -> None:
    from kalmanguard.integrations.huggingface import SpectralThermostatCallback

    callback = SpectralThermostatCallback(target=1.0, every=2)
    model, losses = trained_by_trainer(tmp_path, dtype, accumulation, [callback])
    plain, plain_losses = trained_by_hand(dtype, accumulation, kept=True)
    bare, _ = trained_by_hand(dtype, accumulation, kept=False)
    assert callback.thermostat is not None
    assert callback.thermostat.failure is None
    assert max(state.strength for state in callback.thermostat.state().values()) > 0
    assert len(losses) == 64 // accumulation
    assert losses == pytest.approx(plain_losses, rel=1e-3, abs=1e-4)  # the Trainer rounds what it logs
    ours, theirs = dict(plain.named_parameters()), dict(model.named_parameters())
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not torch.equal(bare.layers[0].weight, model.layers[0].weight)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_callback_detaches_at_the_end_and_refuses_what_it_cannot_reach() -> None:
    from kalmanguard.integrations.huggingface import SpectralThermostatCallback

    layer, optimizer = still(dominated())
    callback = SpectralThermostatCallback()
    callback.on_train_begin(None, None, None, model=layer, optimizer=optimizer)
    assert optimizer._optimizer_step_post_hooks
    callback.on_train_end(None, None, None)
    assert not optimizer._optimizer_step_post_hooks
    with pytest.raises(ConfigurationError, match="no torch optimizer beneath"):
        callback.on_train_begin(None, None, None, model=layer, optimizer=object())
    with pytest.raises(ConfigurationError, match="no model"):
        callback.on_train_begin(None, None, None, model=None, optimizer=optimizer)


def test_without_transformers_the_error_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import kalmanguard.integrations\n"
        "from kalmanguard.errors import ConfigurationError\n"
        "try:\n    import kalmanguard.integrations.huggingface\n"
        "except ConfigurationError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'kalmanguard[huggingface]'" in done.stdout
