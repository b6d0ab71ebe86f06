"""Curvature, importance and landscape.

Oracles: the whole Hessian by `torch.func` on small nets in float64; the quadratic plant, whose eigenvalues are
known; the loop over single examples for the Fisher information; entropies in closed form; a run of full-batch gradient
descent, which settles at the edge of stability by itself (Cohen et al. 2021).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn.functional import cross_entropy, mse_loss, one_hot

from kalmanguard.actuators.actions import ElasticAnchor
from kalmanguard.errors import ConfigurationError
from kalmanguard.models import load_plant
from kalmanguard.models.digits import load_digits
from kalmanguard.models.quadratic import QuadraticPlant
from kalmanguard.records import Guarantee
from kalmanguard.sensors.curvature import StepScale, extreme_eigenvalues, hessian_trace, sharpness
from kalmanguard.sensors.curvature_monitor import CurvatureMonitor
from kalmanguard.sensors.importance import fisher_importance, gradient_entropy, second_moment_importance
from kalmanguard.sensors.landscape import loss_landscape
from kalmanguard.sensors.surface import LossSurface
from kalmanguard.snapshots.state import TrainingState


def small_net() -> tuple[nn.Module, Any]:
    """Tied, frozen, BatchNorm, dropout: 40 trainable parameters in float64."""
    net = nn.Sequential(
        nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3)
    )
    net[2].weight = net[0].weight
    net[2].bias.requires_grad_(False)
    net = net.double()
    return net, (torch.randn(12, 4, dtype=torch.float64), torch.randint(0, 3, (12,)))


def whole_hessian(net: nn.Module, loss_fn: Callable[[Any, Any], Tensor], batch: Any) -> Tensor:
    """Rows and columns in the order of the trainable parameters; evaluation mode."""
    net.eval()
    leaves = {n: p.detach() for n, p in net.named_parameters() if p.requires_grad}

    def loss(flat: Tensor) -> Tensor:
        pieces = flat.split([p.numel() for p in leaves.values()])
        state = {n: piece.view(p.shape) for (n, p), piece in zip(leaves.items(), pieces, strict=True)}
        return loss_fn(functional_call(net, state, (batch[0],)), batch[1])

    found = jacrev(jacrev(loss))(torch.cat([p.flatten() for p in leaves.values()]))
    net.train()
    return found


# -- surface ----------------------------------------------------------------------------------------------------------


def test_products_and_gradient_are_those_of_the_whole_hessian() -> None:
    net, batch = small_net()
    surface = LossSurface(net, cross_entropy, [batch])
    exact = whole_hessian(net, cross_entropy, batch)
    v = torch.randn(surface.size, dtype=torch.float64)
    torch.testing.assert_close(surface.hessian_product(v), exact @ v, rtol=1e-10, atol=1e-12)
    step = 1e-6 * v
    difference = surface.value(step) - surface.value(-step)
    assert difference == pytest.approx(2 * float(surface.gradient() @ step), rel=1e-5)


def test_several_batches_are_one() -> None:
    net, (x, y) = small_net()
    one, parts = (
        LossSurface(net, cross_entropy, [(x, y)]),
        LossSurface(net, cross_entropy, [(x[:5], y[:5]), (x[5:], y[5:])]),
    )
    v = torch.randn(one.size, dtype=torch.float64)
    torch.testing.assert_close(one.hessian_product(v), parts.hessian_product(v))
    torch.testing.assert_close(one.gradient(), parts.gradient())
    assert one.value() == pytest.approx(parts.value())


@pytest.mark.parametrize("evaluation", [True, False])
def test_nothing_leaves_a_trace(evaluation: bool) -> None:
    net, batch = small_net()
    optimizer = torch.optim.AdamW(net.parameters())
    cross_entropy(net(batch[0]), batch[1]).backward()
    optimizer.step()
    net[3].eval()
    state = TrainingState(net, optimizers=[optimizer], schedulers=[], include_gradients=True)
    digest, modes, grads = state.digest(), [m.training for m in net.modules()], [p.grad for p in net.parameters()]
    versions = [t._version for t in [*net.parameters(), *net.buffers()]]
    options = {"evaluation": evaluation}
    first = sharpness(net, cross_entropy, batch, optimizer=optimizer, **options)
    hessian_trace(net, cross_entropy, batch, samples=2, **options)
    fisher_importance(net, cross_entropy, [batch], **options)
    loss_landscape(net, cross_entropy, batch, points=3, **options)
    gradient_entropy(net)
    fisher_importance(net, cross_entropy, [batch], exact=True)
    assert sharpness(net, cross_entropy, batch, optimizer=optimizer, **options) == first  # dropout draws the same
    assert state.digest() == digest
    assert [m.training for m in net.modules()] == modes
    assert all(p.grad is g for p, g in zip(net.parameters(), grads, strict=True))
    assert [t._version for t in [*net.parameters(), *net.buffers()]] == versions
    assert torch.is_grad_enabled()


def test_attention_is_differentiated_twice() -> None:
    plant = load_plant("chartransformer")(seed=0, batch_size=2, context=16)
    found = sharpness(plant.model, plant.loss_fn, next(plant.loader), iterations=3)
    assert math.isfinite(found.value)
    assert found.value > 0


def test_half_precision_is_evaluated_in_float32() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.BatchNorm1d(8), nn.Linear(8, 3)).to(torch.bfloat16)
    batch = (torch.randn(16, 4).bfloat16(), torch.randint(0, 3, (16,)))
    wide = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.BatchNorm1d(8), nn.Linear(8, 3))
    wide.load_state_dict({name: value.float() for name, value in net.state_dict().items()})
    other = (batch[0].float(), batch[1])
    assert sharpness(net, cross_entropy, batch).value == pytest.approx(sharpness(wide, cross_entropy, other).value)
    exact = [
        fisher_importance(m, cross_entropy, [b], exact=True).values["0.weight"]
        for m, b in ((net, batch), (wide, other))
    ]
    torch.testing.assert_close(exact[0], exact[1])
    assert net[0].weight.dtype is torch.bfloat16


class Bag(nn.Module):
    """Takes the maximum over embeddings, which has a first derivative only."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.read = nn.EmbeddingBag(5, 3, mode="max"), nn.Linear(3, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.read(self.embed(tokens) ** 2)


def test_sparse_gradients_count_like_dense_ones() -> None:
    batch = (torch.tensor([0, 2, 2, 4]), torch.randn(4, 1))
    products = []
    for sparse in (False, True):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Embedding(5, 3, sparse=sparse), nn.Tanh(), nn.Linear(3, 1))
        surface = LossSurface(net, mse_loss, [batch])
        products.append(surface.hessian_product(torch.ones(surface.size)))
    torch.testing.assert_close(*products)


def test_what_cannot_work_is_refused_with_a_sentence() -> None:
    x, y = torch.randn(4, 2), torch.randn(4, 1)
    with pytest.raises(ConfigurationError, match="differentiated twice"):
        sharpness(Bag(), mse_loss, (torch.randint(5, (4, 2)), y))
    with pytest.raises(ConfigurationError, match="trainable"):
        sharpness(nn.Linear(2, 1).requires_grad_(False), mse_loss, (x, y))
    with pytest.raises(ConfigurationError, match="complex"):
        sharpness(nn.Linear(2, 1, dtype=torch.complex64), mse_loss, (x, y))
    with pytest.raises(ConfigurationError, match="holds no values"):
        sharpness(nn.Linear(2, 1, device="meta"), mse_loss, (x, y))
    with pytest.raises(ConfigurationError, match="no batch"):
        sharpness(nn.Linear(2, 1), mse_loss, [])
    with pytest.raises(ConfigurationError, match="samples"):
        hessian_trace(nn.Linear(2, 1), mse_loss, (x, y), samples=1)
    with pytest.raises(ConfigurationError, match="Module"):
        sharpness("model", mse_loss, (x, y))  # type: ignore[arg-type]


def test_a_linear_loss_has_no_curvature() -> None:
    net = nn.Linear(3, 1)
    found = sharpness(net, lambda output, target: output.mean(), (torch.randn(4, 3), torch.zeros(4)))
    assert (found.value, found.residual) == (0.0, 0.0)


# -- eigenvalues ------------------------------------------------------------------------------------------------------


def test_ends_of_the_spectrum_and_the_trace_of_a_small_net() -> None:
    net, batch = small_net()
    exact = torch.linalg.eigvalsh(whole_hessian(net, cross_entropy, batch))
    surface = LossSurface(net, cross_entropy, [batch])
    found = extreme_eigenvalues(surface, iterations=60, tolerance=1e-8)
    assert found.highest == pytest.approx(float(exact[-1]), rel=1e-6)
    assert exact[0] < 0  # no minimum: there is negative curvature to be found
    assert extreme_eigenvalues(surface, iterations=60, tolerance=0.0).lowest == pytest.approx(float(exact[0]), rel=1e-3)
    rough = extreme_eigenvalues(surface, iterations=4)
    assert rough.highest <= float(exact[-1]) + 1e-9
    assert min(abs(rough.highest - exact)) <= rough.residual + 1e-9
    trace = hessian_trace(net, cross_entropy, batch, samples=400)
    assert abs(trace.value - float(exact.sum())) < 4.9 * trace.standard_error  # one seed in a million
    assert 0 < trace.standard_error < 0.2 * float(exact.abs().sum())


@pytest.mark.parametrize("curvatures", [(4.0, 2.0, 1.0), (1.0, 0.3, 0.1, 0.03), (7.0,)])
def test_the_quadratic_plant_has_the_eigenvalues_it_was_given(curvatures: tuple[float, ...]) -> None:
    plant = QuadraticPlant(curvatures=curvatures, lr=0.1, momentum=0.9)
    found = sharpness(plant.model, plant.loss_fn, plant.probe_loader, optimizer=plant.optimizer, tolerance=1e-9)
    assert found.value == pytest.approx(max(curvatures), rel=1e-9)
    # The plant's own theory of where it becomes unstable.
    assert found.ratio == pytest.approx(0.1 / plant.dynamics.stability_limit(), rel=1e-9)
    trace = hessian_trace(plant.model, plant.loss_fn, plant.probe_loader)
    assert trace.value == pytest.approx(sum(curvatures), rel=1e-9)  # diagonal: without error


def make(name: str, parameters: Any, factor: float) -> torch.optim.Optimizer:
    """An optimizer whose edge, for curvature 1, lies at ``factor`` 1 by the formulas that are tested."""
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=2.0 * factor)
    if name == "momentum":
        return torch.optim.SGD(parameters, lr=3.8 * factor, momentum=0.9)
    if name == "dampened":
        return torch.optim.SGD(parameters, lr=3.8 / 0.9 * factor, momentum=0.9, dampening=0.1)
    if name == "nesterov":
        return torch.optim.SGD(parameters, lr=3.8 / 2.8 * factor, momentum=0.9, nesterov=True)
    return torch.optim.SGD(parameters, lr=2.0 * factor / 1.5, weight_decay=0.5)


@pytest.mark.parametrize("name", ["sgd", "momentum", "dampened", "nesterov", "decay"])
def test_a_quadratic_converges_below_the_edge_and_diverges_beyond(name: str) -> None:
    """The edge is not only what a formula says: the optimizer itself is run on both sides of it."""
    for factor in (0.97, 1.03):
        net = nn.Linear(1, 1, bias=False).double()
        nn.init.ones_(net.weight)
        batch = (torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64))

        def loss_fn(output: Tensor, target: Tensor) -> Tensor:
            return 0.5 * mse_loss(output, target)

        optimizer = make(name, net.parameters(), factor)
        ratio = sharpness(net, loss_fn, batch, optimizer=optimizer).ratio
        assert ratio == pytest.approx(factor, rel=1e-6)
        for _ in range(600):
            optimizer.zero_grad()
            loss_fn(net(batch[0]), batch[1]).backward()
            optimizer.step()
        assert (abs(net.weight.item()) < 1.0) == (factor < 1.0)


def test_the_preconditioned_sharpness_of_adam_is_that_of_the_scaled_hessian() -> None:
    net, batch = small_net()
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(
        [{"params": trained[:2], "lr": 1e-2}, {"params": trained[2:], "lr": 3e-3, "weight_decay": 0.1}]
    )
    assert sharpness(net, cross_entropy, batch, optimizer=optimizer).ratio is None  # no step yet
    for _ in range(5):
        optimizer.zero_grad()
        cross_entropy(net(batch[0]), batch[1]).backward()
        optimizer.step()
    exact, rows = whole_hessian(net, cross_entropy, batch), []
    decay = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            v = optimizer.state[p]["exp_avg_sq"] / (1 - 0.999**5)
            rows.append(group["lr"] / (v.sqrt() + group["eps"]))
            decay.append(torch.full_like(p, group["weight_decay"]))
    scale = torch.cat([r.flatten() for r in rows]).sqrt()
    exact += torch.diag(torch.cat([d.flatten() for d in decay]))
    expected = float(torch.linalg.eigvalsh(scale[:, None] * exact * scale)[-1])
    found = sharpness(net, cross_entropy, batch, optimizer=optimizer, iterations=60, tolerance=1e-8)
    assert found.effective == pytest.approx(expected, rel=1e-6)
    assert found.edge == pytest.approx(38.0)


def test_an_optimizer_without_a_known_edge_is_refused() -> None:
    net, batch = small_net()
    trained = [p for p in net.parameters() if p.requires_grad]
    with pytest.raises(ConfigurationError, match="RMSprop"):
        sharpness(net, cross_entropy, batch, optimizer=torch.optim.RMSprop(trained))
    with pytest.raises(ConfigurationError, match="every trainable"):
        sharpness(net, cross_entropy, batch, optimizer=torch.optim.SGD(trained[:1], lr=0.1))
    with pytest.raises(ConfigurationError, match="maximises"):
        sharpness(net, cross_entropy, batch, optimizer=torch.optim.SGD(trained, lr=0.1, maximize=True))


# -- monitor ----------------------------------------------------------------------------------------------------------


def watched_run(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_fn: Any,
    batch: Any,
    steps: int,
    every: int,
    fault: Any = None,
) -> tuple[CurvatureMonitor, list[int]]:
    monitor = CurvatureMonitor(model, loss_fn, [batch], optimizer=optimizer, every=every)
    fired = []
    for step in range(1, steps + 1):
        if fault is not None:
            fault(step)
        optimizer.zero_grad()
        loss_fn(model(batch[0]), batch[1]).backward()
        optimizer.step()
        fired += [step for _ in monitor.sense(step)]
    return monitor, fired


def test_full_batch_descent_settles_at_the_edge_and_is_left_alone() -> None:
    digits = load_digits()
    batch = (digits.train_inputs[:128], one_hot(digits.train_targets[:128], 10).float())
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    monitor, fired = watched_run(model, optimizer, lambda a, b: 5 * mse_loss(a, b), batch, 1500, 50)
    assert fired == []
    late = list(monitor.history)[-10:]
    assert 0.85 < np.median(late) < 1.2
    assert monitor.readings == 30


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_healthy_training_is_left_alone_and_a_raised_rate_is_not(name: str) -> None:
    plant = load_plant("mlp")(seed=0, optimizer=name)
    batch = tuple(torch.cat(pair) for pair in zip(*[plant.loader.batch(10**6 + i) for i in range(4)], strict=True))
    monitor = CurvatureMonitor(plant.model, plant.loss_fn, [batch], optimizer=plant.optimizer, every=10)
    fired = []
    for step in range(1, 121):
        if step == 101:
            plant.optimizer.param_groups[0]["lr"] *= 300
        plant.optimizer.zero_grad()
        plant.step_loss(next(plant.loader)).backward()
        if step < 101:
            plant.optimizer.step()  # from then on the rate alone has changed
        fired += monitor.sense(step)
    assert [e.detector for e in fired][:1] == ["curvature"]
    assert fired[0].fired
    assert fired[0].guarantee is Guarantee.HEURISTIC
    assert fired[0].statistic > 2.0
    assert monitor.readings == 12
    assert len(fired) <= 2


def test_the_monitor_is_cheap_when_not_due_never_raises_and_lets_go() -> None:
    plant = load_plant("mlp")(seed=0)
    calls = []

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) > 20:
            raise RuntimeError("boom")
        return cross_entropy(output, target)

    batch = next(plant.loader)
    monitor = CurvatureMonitor(plant.model, loss_fn, [batch], optimizer=plant.optimizer, every=7)
    assert monitor.sense(7) == ()  # Adam has no moments yet
    assert calls == []
    plant.step_loss(batch).backward()
    plant.optimizer.step()
    for step in range(1, 60):
        assert monitor.sense(step) == ()
    assert monitor.error is not None
    assert "boom" in monitor.error
    assert len(calls) <= 23  # it gave up
    assert monitor.readings > 0
    assert monitor.reading_s > 0
    monitor.close()
    monitor.close()
    assert monitor.sense(70) == ()


def test_the_monitor_refuses_what_cannot_work() -> None:
    net, batch = small_net()
    with pytest.raises(ConfigurationError, match="Adagrad"):
        CurvatureMonitor(net, cross_entropy, [batch], optimizer=torch.optim.Adagrad(net.parameters()))
    with pytest.raises(ConfigurationError, match="every"):
        CurvatureMonitor(net, cross_entropy, [batch], optimizer=torch.optim.SGD(net.parameters()), every=0)
    with pytest.raises(ConfigurationError, match="slack"):
        CurvatureMonitor(net, cross_entropy, [batch], optimizer=torch.optim.SGD(net.parameters()), slack=0.5)


def test_rare_entries_do_not_decide_what_the_monitor_sees() -> None:
    net = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    net.weight.grad = torch.tensor([[1.0, 1e-12]])
    optimizer.step()
    surface = LossSurface(net, mse_loss, [(torch.eye(2), torch.zeros(2, 1))])
    bare, floored = StepScale.of(surface, optimizer), StepScale.of(surface, optimizer, floor_frac=0.01)
    assert bare is not None
    assert floored is not None
    assert float(bare.scale[1] ** 2 / bare.scale[0] ** 2) > 1e6
    assert float(floored.scale[1] ** 2 / floored.scale[0] ** 2) < 200


# -- importance -------------------------------------------------------------------------------------------------------


def test_the_exact_fisher_information_is_that_of_a_loop_over_examples() -> None:
    net, (x, y) = small_net()
    net.eval()
    expected = {n: torch.zeros_like(p) for n, p in net.named_parameters() if p.requires_grad}
    for i in range(len(x)):
        loss = cross_entropy(net(x[i : i + 1]), y[i : i + 1])
        gradients = torch.autograd.grad(loss, [p for p in net.parameters() if p.requires_grad])
        for name, g in zip(expected, gradients, strict=True):
            expected[name] += g.square() / len(x)
    net.train()
    batches = [(x[:5], y[:5]), (x[5:], y[5:])]
    found = fisher_importance(net, cross_entropy, batches, exact=True, chunk=3)
    assert found.examples == 12
    assert found.values.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found.values[name], value)
    layers = found.per_layer()
    assert layers["5"] == pytest.approx(float(torch.cat([expected["5.weight"].flatten(), expected["5.bias"]]).mean()))
    # Batches of one example are the exact one.
    single = fisher_importance(net, cross_entropy, [(x[i : i + 1], y[i : i + 1]) for i in range(12)])
    for name, value in expected.items():
        torch.testing.assert_close(single.values[name], value)


def test_batches_count_by_their_size() -> None:
    net, (x, y) = small_net()
    gradient = LossSurface(net, cross_entropy, [(x, y)]).gradient()
    found = fisher_importance(net, cross_entropy, [(x, y)])
    torch.testing.assert_close(torch.cat([v.flatten() for v in found.values.values()]), 12 * gradient.square())


def test_importance_refuses_what_cannot_work() -> None:
    net, (x, y) = small_net()
    with pytest.raises(ConfigurationError, match="no batch"):
        fisher_importance(net, cross_entropy, [])
    with pytest.raises(ConfigurationError, match="evaluation"):
        fisher_importance(net, cross_entropy, [(x, y)], exact=True, evaluation=False)
    with pytest.raises(ConfigurationError, match="of tensors"):
        fisher_importance(net, cross_entropy, [{"x": x, "labels": y, "z": x}], exact=True)


def test_the_elastic_anchor_weighs_by_the_same_importance() -> None:
    plant = load_plant("mlp")(seed=0)
    plant.step_loss(next(plant.loader)).backward()
    plant.optimizer.step()
    importance = second_moment_importance(plant.optimizer)
    assert importance.keys() == set(plant.model.parameters())
    assert all(float(value.mean()) == pytest.approx(1.0, rel=1e-4) for value in importance.values())
    assert second_moment_importance(torch.optim.SGD(plant.model.parameters())) == {}
    assert "ElasticAnchor" in ElasticAnchor().describe()


def test_entropy_of_gradients_in_closed_form() -> None:
    net = nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False))
    assert math.isnan(gradient_entropy(net).total)
    net[0].weight.grad = torch.ones(2, 4)
    net[1].weight.grad = torch.zeros(4, 2)
    net[1].weight.grad[0, 0] = 3.0
    found = gradient_entropy(net)
    assert found.by_name["0.weight"] == pytest.approx(1.0)
    assert found.by_name["1.weight"] == pytest.approx(0.0, abs=1e-12)
    shares = np.array([1 / 17] * 8 + [9 / 17])
    assert found.total == pytest.approx(-float((shares * np.log(shares)).sum()) / math.log(16))
    for p in net.parameters():
        p.grad *= 1e-30  # squares would vanish
    assert gradient_entropy(net).total == pytest.approx(found.total, rel=1e-5)
    net[0].weight.grad[0, 0] = math.nan
    assert math.isnan(gradient_entropy(net).total)


# -- landscape --------------------------------------------------------------------------------------------------------


def test_a_slice_is_the_loss_along_filter_normalised_directions() -> None:
    net, batch = small_net()
    found = loss_landscape(net, cross_entropy, batch, points=5, span=0.5)
    net.eval()
    assert found.losses[2] == pytest.approx(cross_entropy(net(batch[0]), batch[1]).item(), rel=1e-12)
    assert found.losses.shape == (5,)
    assert len(set(found.losses.tolist())) == 5
    plane = loss_landscape(net, cross_entropy, batch, dimensions=2, points=5, span=0.5)
    np.testing.assert_allclose(plane.losses[:, 2], found.losses, rtol=1e-12)  # the first direction is the same
    assert plane.losses.shape == (5, 5)


def test_rescaling_a_filter_rescales_its_direction() -> None:
    """Filter normalisation makes the slice of a homogeneous net independent of how its scale is spread."""
    net = nn.Sequential(nn.Linear(3, 5, bias=False), nn.ReLU(), nn.Linear(5, 2, bias=False)).double()
    batch = (torch.randn(9, 3, dtype=torch.float64), torch.randint(0, 2, (9,)))
    before = loss_landscape(net, cross_entropy, batch, points=5).losses
    with torch.no_grad():
        net[0].weight.mul_(10.0)
        net[2].weight.div_(10.0)
    np.testing.assert_allclose(loss_landscape(net, cross_entropy, batch, points=5).losses, before, rtol=1e-9)


@pytest.mark.parametrize("dimensions", [1, 2])
def test_plots_are_drawn_on_the_axes_that_are_given(dimensions: int) -> None:
    from matplotlib.figure import Figure

    net, batch = small_net()
    found = loss_landscape(net, cross_entropy, batch, dimensions=dimensions, points=5)
    ax = Figure().add_subplot()
    assert found.plot(ax) is ax
    assert ax.get_xlabel()
    own = found.plot()
    assert own.figure is not ax.figure
    found.losses[...] = np.nan
    if dimensions == 2:
        with pytest.raises(ConfigurationError, match="finite"):
            found.plot()


def test_landscape_refuses_what_cannot_work() -> None:
    net, batch = small_net()
    for options in ({"dimensions": 3}, {"points": 4}, {"span": 0.0}):
        with pytest.raises(ConfigurationError):
            loss_landscape(net, cross_entropy, batch, **options)
