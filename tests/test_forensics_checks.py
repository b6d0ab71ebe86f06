"""The parts of layer forensics against oracles: torch's own attention and optimizers, and closed forms.

Attention logits are compared with the weights that torch's own attention returns (float32, 1e-5); optimizer recursions
with the state that torch's own optimizers make; the true update with the change of float64 parameters (1e-6 relative,
since their optimizer state is float64 as well).
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kalmanguard import Forensics
from kalmanguard.forensics import Severity
from kalmanguard.forensics.attention import AttentionWatch, projected_logits, scaled_logits
from kalmanguard.forensics.baseline import Baseline
from kalmanguard.forensics.checks import (
    AttentionHealth,
    Corruption,
    DeadUnits,
    GradientFlow,
    LossSpike,
    OptimizerState,
    Precision,
    Representation,
    Saturation,
    WeightBalance,
)
from kalmanguard.forensics.checks.precision import true_update
from kalmanguard.forensics.features import sampled_rows
from kalmanguard.forensics.layers import Rotation, find_layers
from kalmanguard.forensics.samples import Attention, Features, LayerSample, Sample
from kalmanguard.forensics.updates import UpdateWatch

OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "Adam with a penalty": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1),
    "Adam maximising": lambda p: torch.optim.Adam(p, lr=1e-3, maximize=True),
    "Adam, amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1),
    "SGD dampened": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, dampening=0.5),
    "SGD, Nesterov": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-3),
}


def failed(error):
    raise error


def updates(model, optimizer, steps, *, between=None, dtype=torch.float32):
    """All sampled updates of one layer over some steps of training."""
    layer = find_layers(model)[0]
    watch = UpdateWatch(list(model.parameters()), optimizer, integrity=False, failed=failed)
    watch.attach()
    found = []
    for step in range(steps):
        if between is not None:
            between(step)
        watch.arm([(layer, True)])
        model(torch.randn(16, 8, dtype=dtype)).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(watch.read()[0][layer.name])
    watch.detach()
    return found


def judged(check, sample):
    [finding] = check.judge(Sample(1, layers=(sample,)))
    return finding


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_torch_computes_never_violates_the_recursion(make, dtype):
    model = nn.Linear(8, 4).to(dtype)
    check = OptimizerState()
    for update in updates(model, make(model.parameters()), 60, dtype=dtype):
        finding = judged(check, LayerSample("x", update=update))
        assert finding.severity is Severity.OK, finding.message


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("factor", [0.0, 0.5, 2.0, -1.0])
def test_moments_that_change_within_a_step_are_found_from_the_first(key, factor):
    model = nn.Linear(8, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    [first] = updates(model, optimizer, 1)
    assert judged(OptimizerState(), LayerSample("x", update=first)).severity is Severity.OK
    moment = first.state[key] * factor
    broken = type(first)(**{f: getattr(first, f) for f in first.__slots__} | {"state": {**first.state, key: moment}})
    assert judged(OptimizerState(), LayerSample("x", update=broken)).severity is Severity.CRITICAL


@pytest.mark.parametrize("factor", [0.0, 0.5, 0.97])
def test_a_second_moment_that_is_lowered_between_samples_is_found_whatever_the_gradients(factor):
    model = nn.Linear(8, 4)
    optimizer = torch.optim.AdamW(model.parameters())

    def lower(step):
        if step == 20:
            optimizer.state[model.weight]["exp_avg_sq"].mul_(factor)

    check = OptimizerState()
    findings = [
        judged(check, LayerSample("x", update=update))
        for step, update in enumerate(updates(model, optimizer, 26, between=lower))
        if step % 5 == 0
    ]
    # 0.97 is below 0.999^5, a factor that five steps of decay cannot explain; gradients may refill some elements.
    assert [f.severity is Severity.CRITICAL for f in findings] == [False, False, False, False, True, False]
    assert "faster than their decay" in findings[4].message


def test_a_reset_optimizer_is_said_to_be_one():
    model = nn.Linear(8, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    check = OptimizerState()

    def reset(step):
        if step == 5:
            optimizer.state.clear()

    findings = [judged(check, LayerSample("x", update=u)) for u in updates(model, optimizer, 8, between=reset)]
    assert [f.severity for f in findings].count(Severity.OK) == 7
    assert "reset or reloaded" in findings[5].message


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in ("RMSprop", "Adagrad", "NAdam")])
def test_the_true_update_is_the_change_of_the_parameters(name):
    model = nn.Linear(8, 4).double()
    sign = -1.0
    for update in updates(model, OPTIMIZERS[name](model.parameters()), 5, dtype=torch.float64):
        change = true_update(update)
        np.testing.assert_allclose(sign * change, update.after - update.before, rtol=1e-5, atol=1e-12)


def test_precision_counts_what_rounds_away_in_bfloat16_and_nothing_in_float32():
    shares = {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = nn.Linear(8, 4).to(dtype)
        check = Precision()
        found = updates(model, torch.optim.AdamW(model.parameters(), lr=1e-6), 12, dtype=dtype)
        shares[dtype] = judged(check, LayerSample("x", update=found[-1]))
    assert shares[torch.float32].severity is Severity.OK
    assert shares[torch.float32].statistic == 0.0
    assert shares[torch.bfloat16].severity is Severity.CRITICAL
    assert shares[torch.bfloat16].statistic > 0.95


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["none", "bool", "float"])
@pytest.mark.parametrize("groups", [1, 2])
def test_logits_are_those_of_torch_s_attention(causal, kind, groups):
    if causal and kind != "none":
        pytest.skip("torch takes one or the other")
    q, k = torch.randn(2, 4, 8, 16), torch.randn(2, 4 // groups, 8, 16)
    mask = None
    if kind != "none":
        mask = torch.rand(2, 1, 8, 8) > 0.3
        mask[..., 0] = True
        if kind == "float":
            mask = torch.zeros(2, 1, 8, 8).masked_fill(~mask, torch.finfo(torch.float32).min)
    options = {"attn_mask": mask, "is_causal": causal, "scale": 0.3, "enable_gqa": groups > 1}
    # With the identity for values, torch's output is the attention matrix itself.
    eye = torch.eye(8).expand(2, 4 // groups, 8, 8)
    weights = F.scaled_dot_product_attention(q, k, eye, **options)
    torch.testing.assert_close(scaled_logits(q, k, eye, **options).softmax(-1), weights, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("mask", [None, "causal", "padding"])
@pytest.mark.parametrize("kdim", [None, 24])
def test_logits_of_multihead_attention_are_its_own(batch_first, mask, kdim):
    module = nn.MultiheadAttention(16, 2, batch_first=batch_first, kdim=kdim)
    nn.init.normal_(module.in_proj_bias)
    query, key = torch.randn(2, 6, 16), torch.randn(2, 6, kdim or 16)
    given = {"query": query, "key": key}
    if not batch_first:
        given = {name: x.transpose(0, 1) for name, x in given.items()}
    if mask == "causal":
        given["attn_mask"] = torch.ones(6, 6, dtype=torch.bool).triu(1)
    if mask == "padding":
        given["key_padding_mask"] = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    value = torch.randn(2, 6, 16) if batch_first else torch.randn(6, 2, 16)
    _, weights = module(value=value, need_weights=True, average_attn_weights=False, **given)
    logits = projected_logits(module, given)
    torch.testing.assert_close(logits.softmax(-1), weights, rtol=1e-4, atol=1e-5)


class ByHand(nn.Module):
    """Attention as written by hand, in one of several ways."""

    def __init__(self, way):
        super().__init__()
        self.split, self.way = nn.Linear(16, 48), way

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in self.split(x).chunk(3, -1))
        if self.way == "matmul":
            logits = q @ k.transpose(-1, -2) / 8**0.5
            return F.softmax(logits.masked_fill(torch.ones(6, 6, dtype=torch.bool).triu(1), -math.inf), dim=-1) @ v
        if self.way == "einsum":
            return torch.einsum("bhqk,bhkd->bhqd", torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(-1), v)
        if self.way == "scaled":
            return F.scaled_dot_product_attention(q, k, v)
        return q.softmax(-1) + k.softmax(-1) * v


@pytest.mark.parametrize(("way", "found"), [("matmul", 1), ("einsum", 1), ("scaled", 1), ("no attention", 0)])
def test_attention_is_found_where_it_is_computed(way, found):
    model = nn.Sequential(nn.Linear(16, 16), ByHand(way), nn.Flatten(1), nn.Linear(96, 1))
    watch = AttentionWatch(model, failed)
    for _ in range(2):
        watch.arm()
        model(torch.randn(3, 6, 16)).sum().backward()
        watch.disarm()
    assert [name for name, _ in watch.owners] == ["1"] * found
    seen = watch.read()
    assert len(seen) == found
    if way == "matmul":
        assert np.isneginf(seen["1"].logits).any()
    assert torch.overrides._get_current_function_mode_stack() == []


def test_only_the_sampled_attention_is_watched():
    model = nn.Sequential(*(ByHand("scaled") for _ in range(3)))
    model = nn.ModuleList(model)
    watch = AttentionWatch(nn.ModuleList([model]), failed)
    watch.known, watch.owners = True, [(str(i), module) for i, module in enumerate(model)]
    names = []
    for _ in range(6):
        watch.arm()
        for module in model:
            module(torch.randn(3, 6, 16))
        watch.disarm()
        names += watch.read()
    assert names == ["0", "1", "2"] * 2


def attention(check, logits):
    return judged(check, LayerSample("a", attention=Attention(logits)))


def test_attention_collapse_rank_collapse_and_growth():
    rng = np.random.default_rng(0)

    def random(size):
        return size * rng.normal(size=(2, 4, 8, 32))

    for _ in range(3):
        check = AttentionHealth()
        for _ in range(8):
            assert attention(check, random(1.0)).severity is Severity.OK
    assert "single keys" in attention(check, random(40.0)).message
    assert "attend alike" in attention(check, np.repeat(random(1.0)[:, :, :1], 8, axis=2)).message
    large = random(1.0) + 300.0
    assert attention(check, large).severity is Severity.CRITICAL
    for value in (math.nan, math.inf):
        assert "not finite" in attention(check, np.where(np.arange(32) == 5, value, random(1.0))).message
    # Uniform from the start, and rows with one allowed key, are nobody's fault.
    fresh = AttentionHealth()
    for _ in range(20):
        assert attention(fresh, np.zeros((2, 4, 8, 32))).severity is Severity.OK
    masked = np.where(np.arange(3) > np.arange(3)[:, None], -np.inf, 50.0)[None, None]
    assert fresh.judge(Sample(1, layers=(LayerSample("a", attention=Attention(masked)),))) == []


def rows_of(check, rows, name="x", largest=3e38):
    return judged(check, LayerSample(name, features=Features(rows.astype(np.float32), largest)))


def test_units_die_at_their_own_pace_and_sparse_ones_are_not_dead():
    rng = np.random.default_rng(0)
    check = DeadUnits()
    rates = np.full(100, 0.5)
    rates[50:] = 0.02
    rates[90:] = 0.0

    def rows():
        return np.where(rng.random((32, 100)) < rates, 1.0 + rng.random((32, 100)), 0.0)

    worst = max(rows_of(check, rows()).statistic for _ in range(300))
    assert worst == 0.0
    rates[:30] = 0.0
    shares = [rows_of(check, rows()).statistic for _ in range(3)]
    assert shares[-1] == pytest.approx(30 / 90)
    rates[50:] = 0.0
    late = [rows_of(check, rows()).statistic for _ in range(60)]
    assert late[3] == pytest.approx(30 / 90)
    assert late[-1] == pytest.approx(70 / 90)


@pytest.mark.parametrize("function", [torch.tanh, torch.sigmoid])
def test_saturation_grows_from_its_own_baseline(function):
    check = Saturation()
    for _ in range(8):
        assert rows_of(check, function(torch.randn(64, 32)).numpy()).severity is Severity.OK
    assert rows_of(check, function(100.0 * torch.randn(64, 32)).numpy()).severity is Severity.CRITICAL
    binary = Saturation()
    for _ in range(20):
        assert rows_of(binary, (torch.rand(64, 32) > 0.5).float().numpy()).severity is Severity.OK
    rectified = Saturation()
    for scale in (1.0,) * 8 + (1e-4,) * 4:
        assert rows_of(rectified, torch.relu(scale * torch.randn(64, 32)).numpy()).severity is Severity.OK
    assert rows_of(check, np.full((4, 4), 2e4), largest=65504.0).severity is Severity.WARNING
    assert rows_of(check, np.full((4, 4), np.nan)).severity is Severity.CRITICAL


def test_representation_collapses_in_size_or_in_rank():
    rng = np.random.default_rng(0)
    for fault, word in (("size", "alike"), ("rank", "directions")):
        check = Representation()
        for _ in range(8):
            assert rows_of(check, 1.0 + rng.normal(size=(64, 32))).severity is Severity.OK
        rows = 1.0 + 1e-2 * rng.normal(size=(64, 32))
        if fault == "rank":
            rows = 1.0 + np.outer(rng.normal(size=64), rng.normal(size=32))
        finding = rows_of(check, rows)
        assert finding.severity is not Severity.OK
        assert word in finding.message
    assert Representation().judge(Sample(1, layers=(LayerSample("x", features=Features(np.zeros((3, 2)), 1.0)),))) == []


def flow(check, sizes):
    layers = tuple(LayerSample(name, gradient_rms=size) for name, size in sizes.items())
    return {f.layer: f.severity for f in check.judge(Sample(1, layers=layers))}


def test_gradient_flow_is_judged_against_peers_of_the_same_step():
    rng = np.random.default_rng(0)
    check = GradientFlow()
    for step in range(40):
        scale = math.exp(-step)  # all gradients vanish together: a loss that goes to zero
        sizes = {name: scale * math.exp(0.3 * rng.normal()) for name in "abc"}
        assert set(flow(check, sizes).values()) == {Severity.OK}
    vanished = [flow(check, {"a": 1e-9, "b": 1.0, "c": 1.0})["a"] for _ in range(2)]
    assert vanished == [Severity.OK, Severity.CRITICAL]
    none = [flow(check, {"a": 1.0, "b": 0.0, "c": 1.0})["b"] for _ in range(5)]
    assert none[0] is Severity.OK
    assert none[-1] is Severity.CRITICAL
    assert flow(GradientFlow(), {"a": 0.0, "b": 0.0}) == {}


def test_a_layer_that_is_skipped_at_times_is_not_blocked():
    rng = np.random.default_rng(0)
    check = GradientFlow()
    seen = [flow(check, {"a": float(rng.random() < 0.5), "b": 1.0, "c": 1.0})["a"] for _ in range(300)]
    assert set(seen) == {Severity.OK}


def test_weights_that_grow_apart_slowly_are_told_from_all_growing():
    check = WeightBalance()

    def step(factors):
        layers = tuple(LayerSample(name, weight_rms=size) for name, size in factors.items())
        return {f.layer: f.severity for f in check.judge(Sample(1, layers=layers))}

    for t in range(60):
        together = step({name: math.exp(0.1 * t) for name in "abcd"})
    assert set(together.values()) == {Severity.OK}
    for t in range(60):
        apart = step({name: math.exp(6.0 + (0.1 * t if name == "a" else 0.0)) for name in "abcd"})
    assert apart["a"] is not Severity.OK
    assert apart["b"] is Severity.OK


def test_a_loop_that_writes_to_its_parameters_itself_is_left_alone():
    check = Corruption()
    found = [bool(check.judge(Sample(step, tampered=("parameters",)))) for step in range(20)]
    assert sum(found) == 2
    assert check.judge(Sample(21, tampered=("silent parameters",)))[0].severity is Severity.CRITICAL


def test_one_weight_that_jumps_alone_is_told_from_a_layer_that_grows():
    check = Corruption()

    def block(largest, second):
        return check.judge(Sample(1, layers=(LayerSample("x", block=(0, largest, second)),)))

    assert block(0.3, 0.29) == []
    assert block(20.0, 19.0) == []
    assert block(1e38, 19.0)[0].severity is Severity.CRITICAL


def test_a_loss_spike_is_no_hard_batch():
    rng = np.random.default_rng(0)
    check = LossSpike()

    def fires(loss):
        return any(f.severity is not Severity.OK for f in check.judge(Sample(1, loss=loss)))

    quiet = [fires(0.02 * rng.gamma(1.0) + 2.0 * math.exp(-t / 30)) for t in range(600)]
    assert not any(quiet)
    assert not fires(0.5)  # one hard batch
    assert not any(fires(0.02 * rng.gamma(1.0)) for _ in range(20))
    assert [fires(3.0) for _ in range(5)].index(True) == 2
    assert fires(math.nan)
    assert LossSpike().judge(Sample(1)) == []


def test_a_baseline_does_not_learn_a_fault_quickly():
    baseline = Baseline(size=5, memory=50)
    for value in (1.0, 1.1, 0.9, 1.05, 0.95):
        baseline.learn(value)
    for _ in range(10):
        baseline.learn(100.0)
    assert baseline.level < 1.5


def test_rows_are_spread_over_examples_and_positions():
    x = torch.arange(20 * 3 * 6 * 6, dtype=torch.float32).view(20, 3, 6, 6)
    rows = sampled_rows(x, 1, 3)
    assert rows.shape == (64, 3)
    assert len({tuple(row.tolist()) for row in rows}) == 64
    assert torch.equal(rows[:, 1] - rows[:, 0], torch.full((64,), 36.0))
    for shape in ((1, 5), (3, 1, 5), (64, 5), (65, 5), (200, 600)):
        assert sampled_rows(torch.zeros(shape), -1, 7).shape[0] == min(64, math.prod(shape[:-1]))


def test_every_layer_has_its_turn():
    for count in range(1, 12):
        for size in range(1, 5):
            rotation = Rotation(count=count, size=size)
            seen = [i for _ in range(rotation.groups) for i in rotation.next()]
            assert sorted(seen) == list(range(count))


def test_a_check_that_fails_does_not_stop_the_others():
    class Failing:
        name, needs = "failing", frozenset()

        def judge(self, sample):
            raise RuntimeError("no")

        def forget(self):
            pass

    model = nn.Linear(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with Forensics(model, optimizer, checks=[Failing(), LossSpike()]) as forensics:
        for _ in range(3):
            model(torch.randn(4, 8)).mean().backward()
            optimizer.step()
            report = forensics.step(math.nan)
    assert [f.check for f in report.findings] == ["loss_spike"]
    assert "RuntimeError: no" in report.summary()
