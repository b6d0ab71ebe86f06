"""Whatever people train with: the supervisor beside it, watching without a trace and bringing it back exactly.

Oracle: the bare run. In observe mode, and in protect mode while nothing is wrong, the supervised run is the bare run
bit for bit, random streams, buffers and optimizer state included; after a rollback the training goes on exactly as it
went on after the capture. So every tolerance is zero.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer, lr_scheduler, swa_utils
from torch.utils.checkpoint import checkpoint

from kalmanguard.certificate.verify import verify
from kalmanguard.faults import FaultInjector
from kalmanguard.records import Action, Decision, Level
from kalmanguard.settings import Settings
from kalmanguard.supervisor import Supervisor

MakeOptimizer = Callable[[list[nn.Parameter]], Optimizer]
OPTIONS: dict[str, Any] = {"probe_examples": 128, "probe_every": 5, "snapshot_every": 10}


@cache
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x, y = torch.from_numpy(pixels).float()[order] / 8.0 - 1.0, torch.from_numpy(labels).long()[order]
    return x[:1200], y[:1200], x[1200:], y[1200:]


def held_out(shape: tuple[int, ...] = (64,)) -> list[tuple[Tensor, Tensor]]:
    _, _, x, y = digits()
    return [(x[:256].reshape(-1, *shape), y[:256])]


def batches(steps: int, shape: tuple[int, ...] = (64,), *, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    x, y, _, _ = digits()
    for step in range(first, first + steps):
        chosen = torch.randint(0, len(x), (32,), generator=torch.Generator().manual_seed(step))
        yield x[chosen].reshape(-1, *shape), y[chosen]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(128, 10),
    )  # fmt: skip


class Transformer(nn.Module):
    """Eight rows of pixels as eight tokens, with dropout and noise from every random stream."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.embed(x.view(-1, 8, 8))
        if self.training:
            hidden = hidden + 1e-3 * (random.random() + float(np.random.rand()))
        logits: Tensor = self.head(self.body(hidden).mean(1))
        return logits


@dataclass(frozen=True)
class Recipe:
    """How to train: a model, an optimizer, perhaps a schedule."""

    model: Callable[[], nn.Module] = mlp
    optimizer: MakeOptimizer = lambda p: torch.optim.AdamW(p, lr=3e-3)
    scheduler: Callable[[Optimizer], Any] | None = None
    shape: tuple[int, ...] = (64,)


class Training:
    """One run of a recipe, supervised or bare, from the same seeds."""

    def __init__(self, recipe: Recipe, settings: Settings | None = None, **options: Any) -> None:
        digits()  # what its import draws is not the run's
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        self.recipe = recipe
        self.model = recipe.model()
        self.optimizer = recipe.optimizer([p for p in self.model.parameters() if p.requires_grad])
        self.scheduler = recipe.scheduler(self.optimizer) if recipe.scheduler is not None else None
        self.supervisor = (
            Supervisor(self.model, held_out(recipe.shape), scheduler=self.scheduler, settings=settings, **options)
            if settings is not None
            else None
        )
        self.count = 0

    def step(self, x: Tensor, y: Tensor, spoil: Callable[[nn.Module], None] | None = None) -> Decision | None:
        self.count += 1
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(x), y)
        loss.backward()
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        if spoil is not None:
            spoil(self.model)
        return self.supervisor.update(loss) if self.supervisor is not None else None

    def go(self, steps: int) -> list[Decision | None]:
        return [self.step(x, y) for x, y in batches(steps, self.recipe.shape, first=self.count)]

    def everything(self, *, streams: bool = True) -> list[Any]:
        """Every bit that decides how the run goes on; random ``streams`` included, unless they are left out."""
        found: list[Any] = [v.detach().numpy().tobytes() for v in self.model.state_dict().values()]
        for p in self.model.parameters():
            state = self.optimizer.state.get(p, {})
            found.append({k: v.numpy().tobytes() if isinstance(v, Tensor) else v for k, v in state.items()})
        if streams:
            found += self.streams()
        found += [group["lr"] for group in self.optimizer.param_groups]
        found += [module.training for module in self.model.modules()]
        return found

    @staticmethod
    def streams() -> list[Any]:
        numpy_state = [repr(part) for part in np.random.get_state()]
        return [torch.get_rng_state().numpy().tobytes(), random.getstate(), *numpy_state]

    def close(self) -> None:
        if self.supervisor is not None:
            self.supervisor.close()


def nan_weight(model: nn.Module) -> None:
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).view(-1)[3] = math.nan


RECIPES = {
    "mlp": Recipe(),
    "cnn": Recipe(model=cnn, shape=(1, 8, 8)),
    "transformer": Recipe(model=Transformer, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3)),
}


# -- without a trace --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["observe", "protect"])
@pytest.mark.parametrize("name", RECIPES)
def test_a_healthy_supervised_run_is_the_bare_run_bit_for_bit(name: str, mode: Any) -> None:
    bare = Training(RECIPES[name])
    bare.go(80)
    end = bare.everything()
    watched = Training(RECIPES[name], Settings(mode=mode, **OPTIONS))
    decisions = watched.go(80)
    assert all(d is not None and d.action is Action.ACCEPT for d in decisions)
    assert watched.everything() == end
    watched.close()


@pytest.mark.parametrize("mode", ["observe", "protect"])
def test_so_it_is_with_the_defaults_and_a_run_folder(mode: Any, tmp_path: Path) -> None:
    bare = Training(RECIPES["cnn"])
    bare.go(60)
    end = bare.everything()
    watched = Training(RECIPES["cnn"], Settings(mode=mode), run_dir=tmp_path / "run")
    watched.go(60)
    assert watched.everything() == end
    watched.close()


def test_a_faulted_run_that_is_only_observed_is_the_bare_faulted_run() -> None:
    ends = []
    for settings in (None, Settings(mode="observe", **OPTIONS)):
        run = Training(RECIPES["mlp"], settings)
        with FaultInjector().at(41).lr_spike(100, steps=5).at(60).nan_gradient().attach(run.model, run.optimizer):
            run.go(80)
        ends.append(run.everything())
        run.close()
    assert ends[0] == ends[1]


def test_a_vetoed_step_is_a_skipped_step() -> None:
    """The supervised run with a nan gradient is the bare run without that one step, moments and all."""
    bare = Training(RECIPES["mlp"])
    for index, (x, y) in enumerate(batches(80)):
        if index != 60:
            bare.step(x, y)
    end = bare.everything()
    guarded = Training(RECIPES["mlp"], Settings(**OPTIONS))
    with FaultInjector().at(61).nan_gradient().attach(guarded.model, guarded.optimizer):
        guarded.go(80)
    assert guarded.everything() == end
    guarded.close()


# -- optimizers -------------------------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, MakeOptimizer] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-4),
    "Adam amsgrad": lambda p: torch.optim.Adam(p, lr=3e-3, amsgrad=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=3e-3, fused=True),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=3e-3, foreach=True),
    "AdamW rate in a tensor": lambda p: torch.optim.AdamW(p, lr=torch.tensor(3e-3)),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, centered=True, momentum=0.5),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=3e-3),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=3e-3),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=0.5),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_is_watched_and_brought_back(name: str) -> None:
    run = Training(Recipe(optimizer=OPTIMIZERS[name]), Settings(**OPTIONS))
    run.go(60)
    assert run.supervisor is not None
    assert run.supervisor.statistics()["errors"] == 0
    run.supervisor.snapshot()
    kept = run.everything()
    x, y = next(batches(1))
    decision = run.step(x, y, spoil=nan_weight)
    assert decision is not None
    assert decision.rolled_back
    assert decision.restored_step == 60
    assert run.everything() == kept
    assert all(p.grad is None for p in run.model.parameters())  # of a backward pass that was given up
    later = run.go(30)
    assert all(d is not None and d.action is Action.ACCEPT for d in later)
    run.close()


class Home(Optimizer):
    """A user's own optimizer, with state of its own kind."""

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                state["count"] = state.get("count", 0) + 1
                state["past"] = [*state.get("past", []), p.grad.clone()][-2:]
                p.sub_(sum(state["past"]) / len(state["past"]), alpha=group["lr"])


def test_an_optimizer_of_the_users_own_is_watched_and_brought_back() -> None:
    run = Training(Recipe(optimizer=Home), Settings(**OPTIONS))
    run.go(60)
    assert run.supervisor is not None
    run.supervisor.snapshot()
    kept = [p.tolist() for p in run.model.parameters()]
    x, y = next(batches(1))
    decision = run.step(x, y, spoil=nan_weight)
    assert decision is not None
    assert decision.rolled_back
    assert [p.tolist() for p in run.model.parameters()] == kept
    assert {s["count"] for s in run.optimizer.state.values()} == {60}
    run.go(10)
    run.close()


def test_lbfgs_with_its_closure() -> None:
    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4, history_size=5)
    supervisor = Supervisor(model, held_out(), settings=Settings(**OPTIONS))
    x, y, _, _ = digits()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x[:512]), y[:512])
        loss.backward()
        return loss

    decisions = [supervisor.update(optimizer.step(closure)) for _ in range(40)]
    assert [d.step for d in decisions] == list(range(1, 41))
    assert {d.action for d in decisions} == {Action.ACCEPT}
    nan_weight(model)
    optimizer.step(closure)
    decision = supervisor.update()
    assert decision.rolled_back
    assert float(optimizer.step(closure).detach()) < 1.0
    supervisor.close()


def test_two_optimizers_form_one_step() -> None:
    torch.manual_seed(0)
    model = mlp()
    first = torch.optim.SGD(model[0].parameters(), lr=0.1)  # type: ignore[index]
    second = torch.optim.Adam(model[2].parameters(), lr=3e-3)  # type: ignore[index]
    supervisor = Supervisor(model, held_out(), optimizer=[first, second], settings=Settings(**OPTIONS))

    def go(steps: int, *, spoil: bool = False) -> list[Decision]:
        found = []
        for x, y in batches(steps):
            F.cross_entropy(model(x), y).backward()
            for optimizer in (first, second):
                optimizer.step()
                optimizer.zero_grad()
            if spoil:
                nan_weight(model)
            found.append(supervisor.update())
        return found

    assert [d.step for d in go(60)] == list(range(1, 61))
    supervisor.snapshot()
    kept = copy.deepcopy((model.state_dict(), second.state_dict()))
    assert go(1, spoil=True)[0].rolled_back
    assert all(torch.equal(v, kept[0][k]) for k, v in model.state_dict().items())
    assert second.state_dict()["state"][0]["step"] == kept[1]["state"][0]["step"]
    assert {d.action for d in go(20)} == {Action.ACCEPT}
    supervisor.close()


def test_an_adversarial_pair_under_one_supervisor() -> None:
    """Generator and discriminator of one module, trained in turn, with a loss that is negative and no accuracy."""
    torch.manual_seed(0)
    pair = nn.ModuleDict({"g": nn.Linear(4, 8), "d": nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))})
    generator = torch.optim.Adam(pair["g"].parameters(), lr=1e-3)
    discriminator = torch.optim.Adam(pair["d"].parameters(), lr=1e-3)
    real = torch.randn(256, 8) + 1.0

    class Gap(nn.Module):
        """What the probe looks at: how well the discriminator tells real from made, negative as it learns."""

        def __init__(self) -> None:
            super().__init__()
            self.pair = pair

        def forward(self, z: Tensor) -> Tensor:
            made: Tensor = self.pair["d"](self.pair["g"](z))
            return made

    supervisor = Supervisor(
        Gap(),
        [(torch.randn(128, 4), real[:128])],
        loss_fn=lambda output, x: (output - pair["d"](x)).squeeze(1),
        settings=Settings(**OPTIONS),
    )
    for step in range(80):
        z = torch.randn(32, 4)
        x = real[torch.randint(0, 256, (32,))]
        discriminator.zero_grad()
        loss = (pair["d"](pair["g"](z).detach()) - pair["d"](x)).mean()
        loss.backward()
        discriminator.step()
        generator.zero_grad()
        (-pair["d"](pair["g"](z)).mean()).backward()
        generator.step()
        decision = supervisor.update(loss)
        assert decision.action is Action.ACCEPT
        assert decision.step == step + 1
    nan_weight(pair["g"])
    generator.step()
    assert supervisor.update().rolled_back
    assert supervisor.statistics()["best_probe"] < 0
    supervisor.close()


def test_two_supervisors_do_not_disturb_each_other() -> None:
    runs = [Training(RECIPES["mlp"], Settings(**OPTIONS)) for _ in range(2)]
    alone = Training(RECIPES["mlp"])
    alone.go(40)
    for x, y in batches(40):
        for run in runs:
            run.step(x, y)
    for run in runs:
        assert run.supervisor is not None
        assert run.supervisor.step == 40
        assert [p.tolist() for p in run.model.parameters()] == [p.tolist() for p in alone.model.parameters()]
    x, y = next(batches(1))
    decision = runs[0].step(x, y, spoil=nan_weight)
    assert decision is not None
    assert decision.rolled_back
    other = runs[1].step(x, y)
    assert other is not None
    assert other.action is Action.ACCEPT
    for run in runs:
        run.close()


# -- precision --------------------------------------------------------------------------------------------------------


def test_mixed_precision_with_a_grad_scaler() -> None:
    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=7)
    supervisor = Supervisor(model, held_out(), scaler=scaler, settings=Settings(**OPTIONS))
    skipped = []
    for step, (x, y) in enumerate(batches(60)):
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        if step in (20, 45):
            loss = loss * math.inf
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        before = supervisor.step
        decision = supervisor.update(loss)
        if supervisor.step == before:
            skipped.append(step)
        assert decision.action is Action.ACCEPT
    assert skipped == [20, 45]  # what the scaler skips is no step
    assert supervisor.step == 58
    supervisor.snapshot()
    scale = scaler.get_scale()
    scaler.update(3.0)
    supervisor.rollback(58)
    assert scaler.get_scale() == scale
    assert supervisor.statistics()["errors"] == 0
    supervisor.close()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_in_other_precisions(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = mlp().to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = [(x.to(dtype), y) for x, y in held_out()]
    supervisor = Supervisor(model, probe, settings=Settings(**OPTIONS))
    for x, y in batches(60):
        F.cross_entropy(model(x.to(dtype)), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        decision = supervisor.update()
        assert decision.action is Action.ACCEPT
    supervisor.snapshot()
    kept = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        model[0].weight.zero_()  # type: ignore[index,operator]
    supervisor.rollback(60)
    assert all(torch.equal(p, k) for p, k in zip(model.parameters(), kept, strict=True))
    supervisor.close()


def test_complex_and_empty_parameters() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.spectrum = nn.Parameter(torch.randn(64, dtype=torch.complex64))
            self.nothing = nn.Parameter(torch.zeros(0, 3))
            self.head = nn.Linear(64, 10)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(torch.fft.ifft(torch.fft.fft(x) * self.spectrum).real)
            return logits

    run = Training(Recipe(model=Odd), Settings(**OPTIONS))
    decisions = run.go(60)
    assert all(d is not None and d.action is Action.ACCEPT for d in decisions)
    assert run.supervisor is not None
    assert run.supervisor.statistics()["errors"] == 0
    run.close()


# -- how gradients are made -------------------------------------------------------------------------------------------


def test_gradient_accumulation_counts_the_optimizers_steps() -> None:
    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    supervisor = Supervisor(model, held_out(), settings=Settings(**OPTIONS))
    seen = []
    for index, (x, y) in enumerate(batches(160)):
        loss = F.cross_entropy(model(x), y) / 4
        loss.backward()
        if index % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()
        seen.append(supervisor.update(loss).step)
    assert supervisor.step == 40
    assert seen[:8] == [0, 0, 0, 1, 1, 1, 1, 2]
    supervisor.close()


def test_gradient_checkpointing() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.1))
            self.head = nn.Linear(32, 10)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(checkpoint(self.body, x, use_reentrant=False))
            return logits

    bare = Training(Recipe(model=Checkpointed))
    bare.go(60)
    end = bare.everything()
    run = Training(Recipe(model=Checkpointed), Settings(**OPTIONS))
    decisions = run.go(60)
    assert [d.step for d in decisions if d is not None] == list(range(1, 61))
    assert run.everything() == end
    run.close()


def test_losses_below_zero() -> None:
    """A log density: nothing is ever taken the logarithm of, or divided by."""
    torch.manual_seed(0)
    model = nn.Linear(4, 2)

    def negative_log_density(output: Tensor, target: Tensor) -> Tensor:
        mean, log_scale = output[:, 0], output[:, 1] - 4.0
        return log_scale + 0.5 * ((target - mean) / log_scale.exp()).square()

    weights = torch.tensor([0.5, -0.3, 0.2, 0.1])

    def data(n: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(n, 4)
        return x, x @ weights + 0.01 * torch.randn(n)

    optimizer = torch.optim.Adam(model.parameters(), lr=3e-2)
    supervisor = Supervisor(model, [data(128)], loss_fn=negative_log_density, settings=Settings(**OPTIONS))
    for _ in range(200):
        x, y = data(64)
        loss = negative_log_density(model(x), y).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decision = supervisor.update(loss)
        assert decision.action in (Action.ACCEPT, Action.VETO)
    assert supervisor.statistics()["best_probe"] < -2.0
    assert decision.level is not Level.WARMUP
    with torch.no_grad():
        model.weight.add_(5.0)
    found = []
    for _ in range(6):
        x, y = data(64)
        loss = negative_log_density(model(x), y).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(supervisor.update(loss))
    assert any(d.rolled_back for d in found)
    supervisor.close()


def test_an_update_may_be_called_in_any_context() -> None:
    run = Training(RECIPES["mlp"], Settings(**OPTIONS))
    assert run.supervisor is not None
    supervisor = run.supervisor
    for index, (x, y) in enumerate(batches(40)):
        run.optimizer.zero_grad()
        loss = F.cross_entropy(run.model(x), y)
        loss.backward()
        run.optimizer.step()
        with torch.no_grad() if index % 2 else torch.autocast("cpu", torch.bfloat16):
            supervisor.update(loss.item() if index % 3 else loss)
    assert supervisor.statistics()["errors"] == 0
    assert all(p.requires_grad for p in run.model.parameters())
    run.close()


# -- kinds of models --------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """An autoencoder-classifier whose decoder shares the encoder's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(64, 64)
        self.decode = nn.Linear(64, 64)
        self.decode.weight = self.encode.weight
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.decode(torch.tanh(self.encode(x)))))
        return logits


def frozen() -> nn.Module:
    model = mlp()
    model[0].requires_grad_(False)  # type: ignore[index,operator]
    return model


@pytest.mark.parametrize("make", [Tied, frozen])
def test_tied_and_frozen_parameters(make: Callable[[], nn.Module]) -> None:
    bare = Training(Recipe(model=make))
    bare.go(60)
    end = bare.everything()
    run = Training(Recipe(model=make), Settings(**OPTIONS))
    run.go(60)
    assert run.everything() == end
    assert run.supervisor is not None
    run.supervisor.snapshot()
    x, y = next(batches(1))
    decision = run.step(x, y, spoil=nan_weight)
    assert decision is not None
    assert decision.rolled_back
    if isinstance(run.model, Tied):
        assert run.model.decode.weight is run.model.encode.weight
    assert run.everything() == end
    run.close()


def test_layers_that_are_unfrozen_on_the_way() -> None:
    run = Training(Recipe(model=frozen), Settings(**OPTIONS))
    run.go(40)
    assert run.supervisor is not None
    for p in run.model.parameters():
        p.requires_grad_(True)
    run.optimizer.add_param_group({"params": list(run.model[0].parameters()), "lr": 1e-3})  # type: ignore[index]
    decisions = run.go(60)
    assert all(d is not None and d.action is Action.ACCEPT for d in decisions)
    assert run.supervisor.statistics()["errors"] == 0
    run.supervisor.snapshot()
    kept = run.everything()
    x, y = next(batches(1))
    decision = run.step(x, y, spoil=nan_weight)
    if decision is None or not decision.rolled_back:
        run.supervisor.rollback(100)
    assert run.everything() == kept
    run.close()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_models(backend: str) -> None:
    torch.manual_seed(0)
    plain, model = mlp(), mlp()
    model.load_state_dict(plain.state_dict())
    compiled = torch.compile(model, backend=backend)
    optimizer = torch.optim.AdamW(compiled.parameters(), lr=3e-3)
    supervisor = Supervisor(compiled, held_out(), settings=Settings(**OPTIONS))  # type: ignore[arg-type]
    twin = torch.optim.AdamW(plain.parameters(), lr=3e-3)
    for x, y in batches(50):
        for network, its in ((compiled, optimizer), (plain, twin)):
            F.cross_entropy(network(x), y).backward()
            its.step()
            its.zero_grad()
        assert supervisor.update().action is Action.ACCEPT
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    supervisor.snapshot()
    nan_weight(model)
    supervisor.rollback(50)
    x, y = next(batches(1))
    assert torch.equal(compiled(x), plain(x))
    torch._dynamo.reset()
    supervisor.close()


def test_averaged_weights_of_torch_are_part_of_a_snapshot() -> None:
    run = Training(RECIPES["mlp"], Settings(**OPTIONS))
    assert run.supervisor is not None
    average = swa_utils.AveragedModel(run.model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9))
    run.supervisor.register("average", average)
    for x, y in batches(40):
        run.step(x, y)
        average.update_parameters(run.model)
    run.supervisor.snapshot()
    kept = copy.deepcopy(average.state_dict())
    for x, y in batches(5):
        run.step(x, y)
        average.update_parameters(run.model)
    run.supervisor.rollback(40)
    assert all(torch.equal(v, kept[k]) for k, v in average.state_dict().items())
    run.close()


@dataclass
class Output:
    """What models of the Hugging Face kind return."""

    loss: Tensor | None
    logits: Tensor


class Pretrained(nn.Module):
    """A tiny causal language model of that kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(17, 16), nn.Linear(16, 17)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Output:
        logits = self.head(self.embed(input_ids))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].reshape(-1, 17), labels[:, 1:].reshape(-1))
        return Output(loss, logits)

    def save_pretrained(self, folder: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
        save_file(self.state_dict() if state_dict is None else state_dict, Path(folder) / "weights.safetensors")


def test_models_with_a_loss_of_their_own_and_batches_that_are_dicts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    text = torch.arange(4000) * 7 % 17

    def batch(n: int) -> dict[str, Tensor]:
        starts = torch.randint(0, 3900, (n,))
        ids = torch.stack([text[s : s + 12] for s in starts])
        return {"input_ids": ids, "labels": ids}

    model = Pretrained()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    supervisor = Supervisor(
        model, [batch(64)], settings=Settings(**{**OPTIONS, "probe_examples": 64}), run_dir=tmp_path / "run"
    )
    for _ in range(60):
        output = model(**batch(16))
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        decision = supervisor.update(output.loss)
        assert decision.action is Action.ACCEPT
    assert supervisor.statistics()["best_probe"] < 1.5
    supervisor.close()
    assert list(
        (tmp_path / "run").rglob("weights.safetensors")
    )  # beside the durable checkpoint, in the model's own way
    assert verify(tmp_path / "run")["C1"].status == "HOLDS"


def test_a_model_that_can_only_save_its_live_weights_is_supervised_all_the_same(tmp_path: Path) -> None:
    class Live(nn.Linear):
        def save_pretrained(self, folder: str | Path) -> None:
            save_file(self.state_dict(), Path(folder) / "weights.safetensors")

    run = Training(Recipe(model=lambda: Live(64, 10)), Settings(**OPTIONS), run_dir=tmp_path / "run")
    run.go(40)
    assert run.supervisor is not None
    assert run.supervisor.statistics()["errors"] == 0
    run.close()


# -- schedules and data -----------------------------------------------------------------------------------------------

SCHEDULES: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1.0 / (1.0 + 0.01 * t)),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=5e-3, total_steps=200),
    "warm restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=25),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, 0.1, total_iters=20), lr_scheduler.CosineAnnealingLR(o, 180)],
        milestones=[20],
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.filterwarnings("ignore:The epoch parameter:UserWarning")
def test_a_schedule_is_left_alone_and_goes_on_after_a_rollback(name: str) -> None:
    recipe = Recipe(scheduler=SCHEDULES[name])
    bare = Training(recipe)
    rates = []
    for x, y in batches(120):
        bare.step(x, y)
        rates.append(bare.optimizer.param_groups[0]["lr"])
    run = Training(recipe, Settings(**OPTIONS))
    seen, rolled = [], 0
    for index, (x, y) in enumerate(batches(120)):
        decision = run.step(x, y, spoil=nan_weight if index == 80 else None)
        assert decision is not None
        rolled += decision.rolled_back
        seen.append(run.optimizer.param_groups[0]["lr"])
    assert rolled == 1
    assert seen == rates  # the run keeps its length: the schedule is not rewound
    run.close()


class Rewindable:
    """A training loader with a cursor."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            self.at += 1
            yield next(batches(1, first=self.at - 1))

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


def test_with_replay_a_transient_fault_leaves_no_trace_at_all() -> None:
    """Data, schedule and random streams are rewound too, so the run ends exactly where the undisturbed run ends."""
    recipe = Recipe(
        model=lambda: nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 10)),
        scheduler=lambda o: lr_scheduler.LambdaLR(o, lambda t: 1.0 / (1.0 + 0.02 * t)),
    )
    bare = Training(recipe)
    bare.go(100)
    end = bare.everything()
    loader = Rewindable()
    run = Training(recipe, Settings(replay=True, recovery_steps=5, **OPTIONS), loader=loader)
    spoilt = rolled = 0
    for x, y in loader:
        spoil = nan_weight if loader.at == 71 and not spoilt else None
        spoilt += spoil is not None
        decision = run.step(x, y, spoil=spoil)
        assert decision is not None
        rolled += decision.rolled_back
        if loader.at >= 100:
            break
    assert rolled == 1
    assert run.everything() == end
    run.close()


# -- where snapshots live ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["host", "device", "disk"])
def test_snapshots_on_host_device_and_disk(place: Any, tmp_path: Path) -> None:
    run = Training(RECIPES["cnn"], Settings(snapshots_on=place, **OPTIONS), run_dir=tmp_path / "run")
    run.go(40)
    assert run.supervisor is not None
    run.supervisor.snapshot()
    kept = run.everything(streams=False)
    drawn: list[list[Any]] = []

    def spoil(model: nn.Module) -> None:
        nan_weight(model)
        drawn.append(run.streams())

    x, y = next(batches(1, (1, 8, 8)))
    decision = run.step(x, y, spoil=spoil)
    assert decision is not None
    assert decision.rolled_back
    assert run.everything(streams=False) == kept
    assert run.streams() == drawn[0], "what feeds training goes on: data, schedule and random streams"
    assert run.supervisor.statistics()["errors"] == 0
    run.close()


def test_with_little_memory_snapshots_go_to_the_run_folder(tmp_path: Path) -> None:
    run = Training(RECIPES["mlp"], Settings(snapshot_bytes=1000, **OPTIONS), run_dir=tmp_path / "run")
    run.go(60)
    assert run.supervisor is not None
    assert len(run.supervisor.statistics()["snapshots"]) == 2
    x, y = next(batches(1))
    decision = run.step(x, y, spoil=nan_weight)
    assert decision is not None
    assert decision.rolled_back
    run.close()


# -- the reference plants ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp", "cnn", "chartransformer"])
@pytest.mark.parametrize("mode", ["observe", "protect"])
def test_the_reference_plants_are_the_bare_runs_bit_for_bit(name: str, mode: Any) -> None:
    from kalmanguard.models import load_plant

    ends = []
    for supervised in (False, True):
        torch.manual_seed(0)
        plant = load_plant(name)(seed=0)
        supervisor = (
            Supervisor(plant.model, plant.probe_loader, scheduler=plant.scheduler, settings=Settings(mode=mode))
            if supervised
            else None
        )
        for step, batch in enumerate(plant.loader):
            loss = plant.step_loss(batch)
            plant.optimizer.zero_grad()
            loss.backward()
            plant.optimizer.step()
            if plant.scheduler is not None:
                plant.scheduler.step()
            if supervisor is not None:
                assert supervisor.update(loss).action is Action.ACCEPT
            if step == 119:
                break
        ends.append(
            ([v.detach().clone() for v in plant.model.state_dict().values()], torch.get_rng_state(), random.getstate())
        )
        if supervisor is not None:
            supervisor.close()
    assert all(torch.equal(a, b) for a, b in zip(ends[0][0], ends[1][0], strict=True))
    assert torch.equal(ends[0][1], ends[1][1])
    assert ends[0][2] == ends[1][2]
