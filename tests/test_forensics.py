"""Layer forensics on real training: silent on healthy runs, right about faults, and without a trace."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import weakref
from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import optimizer as optimizers
from torch.utils.checkpoint import checkpoint

from benchmarks.forensics import FAULTS, Deep, caught, healthy
from kalmanguard import Action, ConfigurationError, FaultInjector, Forensics, Guarantee, Supervisor
from kalmanguard.forensics import Extent, Finding, Report, Severity, Trend
from kalmanguard.models.mlp import MLPPlant


def train(model, optimizer, steps, *, forensics=None, make=None, width=8, accumulate=1, zero_first=True):
    losses = []
    for _ in range(steps):
        for _ in range(accumulate):
            loss = make() if make is not None else model(torch.randn(32, width)).float().square().mean()
            loss.backward()
        optimizer.step()
        if zero_first:
            optimizer.zero_grad()
        if forensics is not None:
            forensics.step(loss)
        if not zero_first:
            optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def hooks_of(model, optimizer):
    module_hooks = [
        len(hooks)
        for module in model.modules()
        for hooks in (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._forward_hooks_always_called,
            module._forward_hooks_with_kwargs,
            module._forward_pre_hooks_with_kwargs,
            module._backward_hooks,
        )
    ]
    own = [len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)]
    shared = [
        len(optimizers._global_optimizer_pre_hooks),
        len(optimizers._global_optimizer_post_hooks),
        len(torch.overrides._get_current_function_mode_stack()),
    ]
    return sum(module_hooks), sum(own), sum(shared)


@pytest.mark.parametrize(
    ("plant", "optimizer", "batch", "steps"),
    [
        ("mlp", "adamw", 64, 500),
        ("mlp", "adamw", 8, 500),
        ("mlp", "sgd", 64, 500),
        ("mlp", "sgd", 8, 500),
        ("cnn", "adamw", 64, 120),
        ("cnn", "sgd", 8, 200),
        ("chartransformer", "adamw", 8, 100),
    ],
)
def test_nothing_fires_on_a_healthy_plant(plant, optimizer, batch, steps):
    assert healthy(plant, optimizer, batch, 0, steps) == {}


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("batch", [8, 64])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize(("plant", "steps"), [("mlp", 2_000), ("cnn", 1_000), ("chartransformer", 1_000)])
def test_nothing_fires_in_a_thousand_healthy_steps(plant, steps, optimizer, batch, seed):
    assert healthy(plant, optimizer, batch, seed, steps) == {}


@pytest.mark.parametrize("name", [name for name in FAULTS if "chartransformer" not in name and "nothing" not in name])
def test_each_fault_is_found_by_the_check_that_it_is_for(name):
    make, strike, check = FAULTS[name]
    found = caught(make, strike, check, seed=0)
    assert not found["early"]
    assert found["own"] is not None
    # The MLP's layers are all sampled within 8 steps; the gradient has to be missing in four samples of one layer.
    assert found["own"] <= (48 if check == "gradient_flow" else 16)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FAULTS if "chartransformer" in name or "nothing" in name])
def test_each_slow_fault_is_found(name):
    make, strike, check = FAULTS[name]
    assert caught(make, strike, check, seed=0)["own"] is not None


def test_a_watched_run_is_the_bare_run_bit_for_bit():
    bare, watched = MLPPlant(seed=3), MLPPlant(seed=3)
    before = torch.random.get_rng_state()
    with Forensics(watched.model, watched.optimizer, every=1) as forensics:
        for _ in range(40):
            for plant in (bare, watched):
                loss = plant.step_loss(next(plant.loader))
                loss.backward()
                plant.optimizer.step()
                plant.optimizer.zero_grad()
            forensics.step(loss)
    assert forensics.errors == []
    assert all(torch.equal(p, q) for p, q in zip(bare.model.parameters(), watched.model.parameters(), strict=True))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("given", [True, False])
def test_detaching_leaves_no_trace(given):
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    before = hooks_of(model, optimizer)
    forensics = Forensics(model, optimizer if given else None, every=1).attach()
    assert hooks_of(model, optimizer) > before
    train(model, optimizer, 6, forensics=forensics, make=lambda: model(torch.randn(4, 6, 16)).square().mean())
    assert forensics.errors == []
    assert forensics.report.step == 6
    forensics.close()
    forensics.close()
    assert hooks_of(model, optimizer) == before
    assert forensics.step(1.0).step == 6


def test_a_forgotten_one_is_collected_and_its_hooks_do_nothing():
    model = nn.Linear(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    forensics = Forensics(model, every=1).attach()
    handles = list(forensics._updates._handles)
    alive = weakref.ref(forensics)
    del forensics
    gc.collect()
    assert alive() is None
    train(model, optimizer, 3)
    for handle in handles:
        handle.remove()


def test_hooks_sit_on_the_sampled_layers_only():
    model = Deep(32, 16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Forensics(model, optimizer, layers_per_step=2) as forensics:
        counts = []
        for _ in range(40):
            train(model, optimizer, 1, forensics=forensics, width=16)
            counts.append(sum(len(module._forward_pre_hooks) for module in model.modules()))
        assert forensics.detection_latency_steps == 16 * 4
    # After the first step in which attention is looked for in every module.
    assert set(counts[4:]) == {0, 2}


def test_every_layer_is_sampled_within_the_stated_latency():
    model = Deep(7, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with Forensics(model, optimizer, every=3) as forensics:
        train(model, optimizer, 30, forensics=forensics, width=16)
        visits = list(forensics._visits)
        train(model, optimizer, forensics.detection_latency_steps, forensics=forensics, width=16)
        assert [now - then for now, then in zip(forensics._visits, visits, strict=True)] == [1] * 7


def test_an_exception_in_the_forward_pass_leaves_no_mode_behind():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.project = nn.Linear(8, 8)
            self.error = None

        def forward(self, x):
            q = self.project(x)
            out = F.scaled_dot_product_attention(q, q, q)
            if self.error is not None:
                raise self.error
            return out

    model = Broken()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    forensics = Forensics(model, optimizer, every=1).attach()
    train(model, optimizer, 3, forensics=forensics, make=lambda: model(torch.randn(2, 1, 6, 8)).square().mean())
    assert [name for name, _ in forensics._attention.owners] == [""]
    for error in (ValueError("x"), KeyboardInterrupt()):
        model.error = error
        with pytest.raises(type(error)):
            model(torch.randn(2, 1, 6, 8))
    forensics.detach()
    assert torch.overrides._get_current_function_mode_stack() == []
    assert forensics.errors == []


def test_copies_and_pickles_of_a_watched_model_are_not_watched():
    model = nn.Sequential(OrderedDict(first=nn.Linear(8, 8), second=nn.Linear(8, 1)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Forensics(model, optimizer, every=1, layers_per_step=2) as forensics:
        train(model, optimizer, 4, forensics=forensics)
        assert any(module._forward_pre_hooks for module in model.modules())
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            other(torch.randn(4, 8))
        assert forensics._features._taken == {}


class Odd(nn.Module):
    """Tied weights, a layer called twice, a frozen one, a low-rank addition, and a dict of tuples as output."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(20, 16)
        self.twice = nn.Linear(16, 16)
        self.frozen = nn.Linear(16, 16).requires_grad_(False)
        self.down, self.up = nn.Linear(16, 2, bias=False), nn.Linear(2, 16, bias=False)
        nn.init.zeros_(self.up.weight)
        self.unused = nn.Linear(16, 4)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.tokens.weight
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, ids):
        x = self.tokens(ids)
        x = torch.tanh(self.twice(torch.tanh(self.twice(x))))
        x = self.frozen(x) + self.up(self.down(x))
        return {"logits": (self.head(x) * self.scale,), "none": None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("zero_first", [True, False])
def test_unusual_models_are_looked_at_without_errors_or_findings(dtype, zero_first):
    model = Odd().to(dtype)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.randint(20, (16, 9))

    def make() -> Tensor:
        logits = model(ids[:, :-1])["logits"][0]
        return F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())

    with Forensics(model, every=1, layers_per_step=3) as forensics:
        train(model, optimizer, 60, forensics=forensics, make=make, accumulate=2, zero_first=zero_first)
    assert forensics.errors == []
    assert forensics.report.step == 60
    assert forensics.report.findings == ()


def test_accumulation_calls_without_a_step_change_nothing():
    model = nn.Linear(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Forensics(model, optimizer) as forensics:
        train(model, optimizer, 5, forensics=forensics)
        for _ in range(3):
            assert forensics.step(0.5).step == 5


def test_a_loop_without_a_torch_optimizer_is_followed():
    model = Deep(3, 8)
    with Forensics(model, every=1) as forensics:
        for _ in range(40):
            loss = model(torch.randn(16, 8)).square().mean()
            loss.backward()
            with torch.no_grad():
                for p in model.parameters():
                    p -= 1e-3 * p.grad
            report = forensics.step(loss)
            model.zero_grad()
        assert forensics.errors == []
        assert report.step == 40
        assert report.ok
        with torch.no_grad():
            model.layers[1].weight.mul_(10.0)
        for _ in range(4):
            model(torch.randn(16, 8)).square().mean().backward()
            report = forensics.step()
            model.zero_grad()
    assert {f.check for f in report.findings if f.layer == "layers.1"} >= {"weight_balance"}


def test_validation_between_steps_is_not_looked_at():
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with Forensics(model, optimizer, every=1, layers_per_step=2) as forensics:
        for _ in range(60):
            with torch.no_grad():
                model.eval()
                model(torch.full((32, 8), float("nan")))
                model.train()
            train(model, optimizer, 1, forensics=forensics)
    assert forensics.errors == []
    assert forensics.report.ok


@pytest.mark.parametrize("level", ["fp16", "bf16"])
def test_autocast_is_as_without_it(level):
    dtype = torch.bfloat16 if level == "bf16" else torch.float16
    seen = []
    for attached in (False, True):
        torch.manual_seed(0)
        model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        forensics = Forensics(model, optimizer, every=1, layers_per_step=9)
        if attached:
            forensics.attach()
        for _ in range(6):
            with torch.autocast("cpu", dtype):
                loss = model(torch.randn(4, 6, 16)).float().square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            forensics.step(loss)
        forensics.detach()
        assert forensics.errors == []
        seen.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_a_compiled_model_is_abstained_from_and_the_report_says_so():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
    compiled = torch.compile(model, backend="eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with Forensics(compiled, optimizer, every=1) as forensics:
        train(compiled, optimizer, 12, forensics=forensics)
        assert not any(module._forward_pre_hooks for module in model.modules())
    assert forensics.errors == []
    assert "compiled" in forensics.report.abstained[0]
    assert "compiled" in forensics.report.summary()
    assert not forensics.report.findings


def test_nan_input_is_reported_and_never_raised():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with Forensics(model, optimizer, every=1, layers_per_step=2) as forensics:
        train(model, optimizer, 10, forensics=forensics)
        train(model, optimizer, 3, forensics=forensics, make=lambda: model(torch.full((4, 8), torch.nan)).mean())
    report = forensics.report
    assert forensics.errors == []
    assert report.level is Severity.CRITICAL
    assert {f.check for f in report.findings} >= {"saturation", "weight_balance", "optimizer_state", "loss_spike"}
    json.dumps(report.to_dict(), allow_nan=False)


@pytest.mark.parametrize("first", ["forensics", "supervisor"])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_beside_a_supervisor_a_vetoed_step_is_no_corruption(name, first):
    plant = MLPPlant(seed=0, optimizer=name)
    forensics = Forensics(plant.model, plant.optimizer, every=1)
    if first == "forensics":
        forensics.attach()
    evidence, vetoed = [], 0
    with (
        Supervisor(plant.model, plant.probe_loader, optimizer=plant.optimizer) as supervisor,
        FaultInjector().at(60).nan_gradient(steps=3).attach(plant.model, plant.optimizer),
        forensics,
    ):
        for step in range(1, 121):
            loss = plant.step_loss(next(plant.loader))
            loss.backward()
            plant.optimizer.step()
            vetoed += supervisor.update(loss).action is Action.VETO
            plant.optimizer.zero_grad()
            evidence += forensics.sense(step)
    assert vetoed == 3
    assert evidence == []
    assert forensics.errors == []


def test_checkpointed_segments_are_looked_at_once_and_as_without():
    gradients = []
    for attached in (False, True):
        torch.manual_seed(0)
        attention = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.1)
        head = nn.Linear(16, 1)
        model = nn.ModuleList([attention, head])
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        forensics = Forensics(model, optimizer, every=1, layers_per_step=9)
        if attached:
            forensics.attach()
        for reentrant in (False, True, False, True, False, True):
            x = torch.randn(4, 6, 16, requires_grad=True)
            head(checkpoint(attention, x, use_reentrant=reentrant)).square().mean().backward()
            optimizer.step()
            forensics.step()
            gradients.append(attention.linear1.weight.grad.clone())
            optimizer.zero_grad()
        forensics.detach()
        assert forensics.errors == []
        assert torch.overrides._get_current_function_mode_stack() == []
    assert all(torch.equal(a, b) for a, b in zip(gradients[:6], gradients[6:], strict=True))


def test_evidence_for_a_supervisor_comes_once_for_each_finding():
    plant = MLPPlant(seed=0)
    forensics = Forensics(plant.model, plant.optimizer).attach()
    evidence = []
    for step in range(1, 140):
        if step == 101:
            with torch.no_grad():
                plant.model.layers[2].weight.mul_(10.0)
        plant.step_loss(next(plant.loader)).backward()
        plant.optimizer.step()
        plant.optimizer.zero_grad()
        evidence += [(step, one) for one in forensics.sense(step)]
    forensics.close()
    assert evidence
    assert all(step > 100 for step, _ in evidence)
    assert all(one.fired and one.guarantee is Guarantee.HEURISTIC for _, one in evidence)
    balance = [one for _, one in evidence if one.detector == "weight_balance"]
    assert len(balance) == 1
    assert balance[0].message.startswith("layers.2: ")


def test_what_is_set_on_purpose_can_be_announced():
    plant = MLPPlant(seed=0)
    saved = copy.deepcopy((plant.model.state_dict(), plant.optimizer.state_dict()))
    with Forensics(plant.model, plant.optimizer) as forensics:
        for step in range(120):
            if step == 100:
                plant.model.load_state_dict(saved[0])
                plant.optimizer.load_state_dict(saved[1])
                forensics.forget()
            train(
                plant.model, plant.optimizer, 1, forensics=forensics, make=lambda: plant.step_loss(next(plant.loader))
            )
            assert forensics.report.ok


def test_findings_expire_and_the_trend_recovers():
    plant = MLPPlant(seed=0)
    trends = []
    with Forensics(plant.model, plant.optimizer) as forensics:
        for step in range(160):
            if step == 100:
                with torch.no_grad():
                    for p in plant.model.parameters():
                        p.mul_(1.0)  # written, but not changed
            train(
                plant.model, plant.optimizer, 1, forensics=forensics, make=lambda: plant.step_loss(next(plant.loader))
            )
            trends.append(forensics.report.trend)
        assert forensics.report.ok
    assert Trend.WORSENING in trends[100:]
    assert Trend.RECOVERING in trends[105:]
    assert trends[-1] is Trend.STABLE


def test_the_report_sums_up():
    found = [
        Finding("dead_units", f"layers.{i}", Severity.WARNING if i else Severity.CRITICAL, 0.5, "half of them")
        for i in range(7)
    ]
    report = Report.of(found, step=9, layers=10, trend=Trend.WORSENING)
    assert report.level is Severity.CRITICAL
    assert report.scale is Extent.SYSTEMIC
    assert report.affected_fraction == 0.7
    assert next(iter(report.top_layers)) == "layers.0"
    assert len(report.top_layers) == 5
    assert "and 2 more" in report.summary()
    assert json.loads(json.dumps(report.to_dict()))["scale"] == "systemic"
    names = [str(Extent.of(affected, 100)) for affected in (0, 1, 10, 33, 50, 100)]
    assert names == ["none", "isolated", "isolated", "moderate", "widespread", "systemic"]


def test_what_cannot_work_is_refused():
    with pytest.raises(ConfigurationError, match="every = 0"):
        Forensics(nn.Linear(2, 2), every=0)
    with pytest.raises(ConfigurationError, match="no parameter"):
        Forensics(nn.ReLU())
    with torch.device("meta"):
        meta = nn.Linear(2, 2)
    with pytest.raises(ConfigurationError, match="meta"):
        Forensics(meta)
