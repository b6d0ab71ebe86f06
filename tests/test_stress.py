"""Stress tests: exact where an exact answer is known, models and streams untouched, no file executed, time kept."""

from __future__ import annotations

import copy
import json
import math
import pickle
import random
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import cross_entropy
from typer.testing import CliRunner

from benchmarks.stress import judge
from kalmanguard.cli.app import app
from kalmanguard.errors import ConfigurationError
from kalmanguard.models import CNNPlant, GANPlant
from kalmanguard.models.digits import load_digits
from kalmanguard.stress import KINDS, Curve, stress
from kalmanguard.stress.bit_flips import interval
from kalmanguard.stress.budget import Clock
from kalmanguard.stress.loading import load, made
from kalmanguard.stress.precision import round_mantissa
from kalmanguard.stress.records import crossing
from kalmanguard.stress.samples import load_sample
from kalmanguard.stress.subject import Flyer, uninformed_loss
from kalmanguard.stress.training import OutOfTimeError, train
from kalmanguard.stress.weight_noise import perturbed

RUNNER = CliRunner(env={"COLUMNS": "100", "TERM": "dumb"})


def digits():
    data = load_digits()
    train = list(zip(data.train_inputs[:512].split(64), data.train_targets[:512].split(64), strict=True))
    return train, [(data.probe_inputs[:128], data.probe_targets[:128])]


def mlp(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    model = mlp()
    flyer = Flyer(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    train(flyer, digits()[0], cross_entropy, steps=150, seed=0, clock=Clock(600.0))
    return model.eval()


# --- the parts --------------------------------------------------------------------------------------------------------


def test_rounding_to_ten_and_seven_bits_is_what_the_half_types_do():
    values = torch.randn(10_000)
    assert torch.equal(round_mantissa(values, 7), values.bfloat16().float())
    within = values[values.abs() > 1e-4]  # float16 has no such small normal numbers
    assert torch.equal(round_mantissa(within, 10), within.half().float())


def test_noise_is_relative_and_is_taken_back_bit_for_bit():
    layer = nn.Linear(2000, 2, bias=False)
    with torch.no_grad():
        layer.weight[0] *= 100.0
    before = layer.weight.detach().clone()
    with perturbed([("weight", layer.weight)], 0.3, torch.Generator().manual_seed(0)):
        moved = (layer.weight.detach() - before).norm(dim=1) / before.norm(dim=1)
        assert torch.allclose(moved, torch.tensor([0.3, 0.3]), rtol=0.1)
    assert torch.equal(layer.weight, before)


def test_the_uninformed_loss_is_that_of_the_best_constant():
    model = nn.Linear(3, 1)
    x = torch.randn(256, 3)
    y = model(x).detach() + 2.0 * torch.randn(256, 1)
    found = uninformed_loss(model, [(x, y)], None, 256)
    mean = float(model(x).detach().mean())
    assert found == pytest.approx(min(float((y - s * mean).square().mean()) for s in (0, 0.25, 0.5, 0.75, 1)), rel=1e-5)
    classes = nn.Linear(3, 7)
    with torch.no_grad():
        classes.weight.zero_()
        classes.bias.zero_()
    target = torch.randint(0, 7, (256,))
    assert uninformed_loss(classes, [(x, target)], None, 256) == pytest.approx(math.log(7), rel=1e-5)


def test_the_score_rises_with_every_share():
    row = [0.9, 0.5, 0.1]
    base = Curve("k", ("a", "b", "c"), (tuple(row),), 1).score
    for place in range(3):
        better = [*row]
        better[place] += 0.05
        assert Curve("k", ("a", "b", "c"), (tuple(better),), 1).score > base
    assert crossing([1.0, 10.0], [0.9, 0.9], 0.8) is None
    assert crossing([1.0, 100.0], [0.9, 0.7], 0.8) == pytest.approx(10.0)


def test_the_interval_of_a_share_is_the_exact_one():
    low, high = interval(3, 20)
    # Clopper-Pearson by its definition: each tail has 2.5 %.
    upper = sum(math.comb(20, k) * high**k * (1 - high) ** (20 - k) for k in range(4))
    lower = sum(math.comb(20, k) * low**k * (1 - low) ** (20 - k) for k in range(3, 21))
    assert upper == pytest.approx(0.025, rel=1e-6)
    assert lower == pytest.approx(0.025, rel=1e-6)


def test_training_stops_when_the_time_is_over():
    model = mlp()
    now = iter(range(100))
    clock = Clock(5.0, now=lambda: float(next(now)))
    with pytest.raises(OutOfTimeError) as caught:
        train(
            Flyer(model, torch.optim.SGD(model.parameters(), 0.1)), *(digits()[0], None), steps=50, seed=0, clock=clock
        )
    assert caught.value.steps == 4


# --- the whole --------------------------------------------------------------------------------------------------------


def test_model_optimizer_and_streams_stay_and_the_report_repeats(trained):
    batches, held_out = digits()
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-2)
    state, moments = copy.deepcopy(trained.state_dict()), copy.deepcopy(optimizer.state_dict())
    data = [tensor.clone() for tensor in batches[0]]
    streams = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    reports = [
        stress(
            trained,
            batches,
            cross_entropy,
            held_out=held_out,
            optimizer=optimizer,
            seeds=2,
            budget_s=600.0,
            train_steps=15,
        )
        for _ in range(2)
    ]
    assert all(torch.equal(trained.state_dict()[name], value) for name, value in state.items())
    assert optimizer.state_dict() == moments
    assert all(p.grad is None or not p.grad.any() for p in trained.parameters())
    assert not trained.training
    assert all(torch.equal(a, b) for a, b in zip(data, batches[0], strict=True))
    assert torch.equal(torch.get_rng_state(), streams[0])
    assert random.getstate() == streams[1]
    assert np.array_equal(np.random.get_state()[1], streams[2])
    first, second = (report.to_dict() for report in reports)
    first.pop("seconds"), second.pop("seconds")
    assert first == second
    report = reports[0]
    assert report.complete
    assert report.left_out == ()
    assert 30 < report.score < 95
    assert report.interval[0] < report.score < report.interval[1]
    means = {curve.kind: curve.means for curve in report.curves}
    assert means["weight noise"][0] > 0.95 > means["weight noise"][-1]
    assert means["precision"][0] > 0.99  # ten bits are as good as all
    assert min(means["bit flips"][:16]) > 0.99  # the lower half of the mantissa
    assert {layer.name for layer in report.layers} == {"0", "2"}
    assert all(layer.importance > 0 for layer in report.layers)


def test_a_layer_made_fragile_is_found():
    """A network whose last layer works by the difference of large weights; the others are as they were."""
    batches, held_out = digits()
    model = mlp()
    train(
        Flyer(model, torch.optim.AdamW(model.parameters(), lr=1e-2)), batches, cross_entropy, steps=150, seed=0,
        clock=Clock(600.0),
    )  # fmt: skip
    wide = nn.Sequential(model[0], model[1], nn.Linear(32, 10))
    with torch.no_grad():
        offset = 20.0 * torch.ones(10, 16)
        wide[2].weight.copy_(torch.cat([model[2].weight + offset, -offset], 1))
        wide[2].bias.copy_(model[2].bias)

    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = wide[0], wide[2]

        def forward(self, x):
            h = torch.relu(self.first(x))
            return self.last(torch.cat([h, h], 1))

    report = stress(Doubled(), batches, cross_entropy, held_out=held_out, kinds=("weight noise",), seeds=2)
    assert report.layers[0].name == "last"
    assert report.layers[0].lost > 0.5 > report.layers[1].lost
    sound = stress(model, batches, cross_entropy, held_out=held_out, kinds=("weight noise",), seeds=2)
    assert report.score < sound.score - 10.0


def test_a_learning_rate_near_the_edge_scores_lower_and_is_recommended_down():
    batches, held_out = digits()
    reports = []
    for lr in (0.05, 3.0):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
        reports.append(
            stress(
                model, batches, cross_entropy, held_out=held_out, optimizer=optimizer, kinds=("learning rate",), seeds=2
            )
        )
    sound, weak = reports
    assert weak.score < sound.score - 20.0
    assert any("Lower the learning rate" in advice.action for advice in weak.recommendations)
    critical = next(p for p in sound.critical_points if p.name == "critical learning rate")
    assert 3.0 < critical.value < 100.0


def test_a_model_that_has_learned_nothing_scores_low_and_says_so():
    x, y = torch.randn(256, 4), torch.randint(0, 2, (256,))
    report = stress(
        nn.Linear(4, 2),
        list(zip(x.split(32), y.split(32), strict=True)),
        seeds=1,
        kinds=("weight noise",),
        warmup_steps=0,
    )
    assert report.score == 0.0
    assert "no better than a constant output" in report.summary()


def test_outliers_that_only_poison_running_statistics_are_told_apart():
    plant = CNNPlant(seed=0)
    report = stress(
        plant.model, plant.loader, plant.loss_fn, held_out=plant.probe_loader, optimizer=plant.optimizer, seeds=1,
        kinds=("batch outliers",), warmup_steps=100, budget_s=600.0,
    )  # fmt: skip
    found = {point.name: point for point in report.critical_points}
    assert found["running statistics"].value < 0.5  # in evaluation, inputs ten times too large break it
    assert report.curves[0].means[0] > 0.8  # what the parameters have lost
    assert any("running statistics" in advice.action for advice in report.recommendations)


def test_the_budget_is_kept_and_what_was_left_out_is_named():
    plant = CNNPlant(seed=0)
    began = time.monotonic()
    report = stress(
        plant.model, plant.loader, plant.loss_fn, held_out=plant.probe_loader, optimizer=plant.optimizer, budget_s=1.0,
        seeds=50,
    )  # fmt: skip
    assert time.monotonic() - began < 6.0  # a busy machine; a pass takes 20 ms
    assert report.left_out
    assert all(kind in " ".join(report.left_out) for kind in KINDS if kind not in {c.kind for c in report.curves})


def test_tokens_are_stressed_as_well():
    tokens = torch.randint(0, 8, (256, 6))
    target = tokens.roll(-1, 1)

    class Next(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(8, 16)
            self.mix = nn.GRU(16, 16, batch_first=True)
            self.out = nn.Linear(16, 8)

        def forward(self, x):
            return self.out(self.mix(self.table(x))[0])

    data = list(zip(tokens.split(32), target.split(32), strict=True))
    report = stress(
        Next(),
        data,
        lambda out, y: cross_entropy(out.flatten(0, 1), y.flatten()),
        seeds=1,
        budget_s=60.0,
        train_steps=10,
        warmup_steps=60,
    )
    outliers = next(curve for curve in report.curves if curve.kind == "batch outliers")
    assert outliers.levels == ("wrong targets", "garbage")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kinds": ("noise",)}, "name each at most once"),
        ({"seeds": 0}, "seeds = 0"),
        ({"budget_s": 0.0}, "budget_s = 0.0"),
        ({"train_steps": 0}, "train_steps = 0"),
        ({"optimizer": torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1)}, "not the model's"),
    ],
)
def test_wrong_arguments_are_refused(wrong, message):
    with pytest.raises(ConfigurationError, match=message):
        stress(mlp(), digits()[0], cross_entropy, **wrong)


def test_a_sample_too_small_is_refused():
    with pytest.raises(ConfigurationError, match="too small"):
        stress(mlp(), [(torch.zeros(2, 64), torch.zeros(2, dtype=torch.long))], cross_entropy)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sound", "weak"),
    [("deep", "deep, plain"), ("deep", "deep, plain, no norm"), ("MLP", "MLP, rate x 30"), ("CNN", "CNN, rate x 30")],
)
def test_known_weaknesses_score_below_their_sound_twins(sound, weak):
    for seed in (0, 1):
        better, worse = (judge((name, seed)) for name in (sound, weak))
        # Apart by more than the stresses' own noise.
        assert worse["score"] + 3.0 * math.hypot(better["error"], worse["error"]) < better["score"]


# --- files ------------------------------------------------------------------------------------------------------------


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def write_module(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of the user's own, in the working folder."""
    name = f"user_models_{random.randrange(10**9)}"
    (folder / f"{name}.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def make():\n    return nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))\n"
        "def number():\n    return 3\n"
        "def sized(width):\n    return nn.Linear(width, 2)\n"
    )
    monkeypatch.chdir(folder)
    return name


def test_state_dicts_are_read_and_nothing_is_executed(trained, tmp_path, monkeypatch):
    module = write_module(tmp_path, monkeypatch)
    save_file(trained.state_dict(), tmp_path / "a.safetensors")
    torch.save({"model": {f"module.{k}": v for k, v in trained.state_dict().items()}, "step": 3}, tmp_path / "b.pt")
    for name in ("a.safetensors", "b.pt"):
        found = load(name, factory=f"{module}:make").model
        assert all(torch.equal(found.state_dict()[k], v) for k, v in trained.state_dict().items())
    marker = tmp_path / "executed"
    (tmp_path / "c.bin").write_bytes(pickle.dumps({"weight": Bomb(marker)}))
    torch.save({"weight": Bomb(marker)}, tmp_path / "d.pt")
    for name in ("c.bin", "d.pt"):
        with pytest.raises(ConfigurationError, match=r"cannot be read as plain tensors.*--i-trust-this-pickle"):
            load(name, factory=f"{module}:make")
        result = RUNNER.invoke(app, ["stress", name, "--factory", f"{module}:make", "--json"])
        assert result.exit_code == 2
        assert "plain tensors" in json.loads(result.stdout)["error"]
        with pytest.raises(ConfigurationError, match="plain tensors"):
            load_sample(name.replace("bin", "pt") if name == "d.pt" else name, size=8)
    assert not marker.exists()


def test_a_trusted_pickle_is_loaded_with_a_warning(trained, tmp_path):
    torch.save(trained, tmp_path / "whole.pt")
    with pytest.raises(ConfigurationError, match="plain tensors"):
        load(str(tmp_path / "whole.pt"))
    with pytest.warns(UserWarning, match="may run any code"):
        found = load(str(tmp_path / "whole.pt"), trust_pickle=True).model
    assert torch.equal(found[0].weight, trained[0].weight)


def test_what_cannot_be_loaded_says_why(trained, tmp_path, monkeypatch):
    module = write_module(tmp_path, monkeypatch)
    save_file({"other": torch.ones(2)}, tmp_path / "odd.safetensors")
    save_file(trained.state_dict(), tmp_path / "a.safetensors")
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        archive.writestr("script/code/__torch__.py", "")
    (tmp_path / "broken.safetensors").write_bytes(b"\x00" * 20)
    for name, options, message in (
        ("missing.pt", {"factory": f"{module}:make"}, "There is no file"),
        ("a.safetensors", {}, "say with --factory"),
        ("script.pt", {"factory": f"{module}:make"}, "TorchScript archive, which is a program"),
        ("odd.safetensors", {"factory": f"{module}:make"}, "does not fit the Sequential"),
        ("broken.safetensors", {"factory": f"{module}:make"}, "no safetensors file"),
        ("nowhere:make", {}, "cannot be imported"),
        (f"{module}:nothing", {}, "cannot be imported"),
        (f"{module}:number", {}, "returned a int"),
        (f"{module}:sized", {}, "cannot be called without arguments"),
        ("just_a_name", {}, "neither a file"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            load(name, **options)
    with pytest.raises(ConfigurationError, match="trains with 2 optimizers"):
        made(GANPlant(seed=0))


def test_samples_are_read_from_arrays_tensors_and_tables(tmp_path):
    x, y = np.random.default_rng(0).normal(size=(20, 3)), np.arange(20) % 2
    np.savez(tmp_path / "s.npz", x=x, y=y)
    torch.save({"inputs": torch.from_numpy(x).float(), "targets": torch.from_numpy(y)}, tmp_path / "s.pt")
    lines = [",".join([*map(repr, map(float, row)), str(label)]) for row, label in zip(x, y, strict=True)]
    (tmp_path / "s.csv").write_text("\n".join(["a,b,c,label", *lines]))
    for name in ("s.npz", "s.pt", "s.csv"):
        batches = list(load_sample(str(tmp_path / name), size=8))
        assert [len(batch[0]) for batch in batches] == [8, 8, 4]
        assert torch.equal(torch.cat([b[1] for b in batches]), torch.from_numpy(y))
        assert torch.equal(torch.cat([b[0] for b in batches]), torch.from_numpy(x).float())
    np.savez(tmp_path / "bad.npz", x=np.array([Bomb(tmp_path / "executed")], dtype=object))
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n3,x\n")
    for name, message in (("bad.npz", "plain numbers"), ("bad.csv", "line 3"), ("s.txt", r"give a \.npz")):
        with pytest.raises(ConfigurationError, match=message):
            load_sample(str(tmp_path / name), size=8)
    assert not (tmp_path / "executed").exists()


# --- the command ------------------------------------------------------------------------------------------------------

QUICK = ("--seeds", "1", "--train-steps", "10", "--budget", "60")


def test_the_command_prints_one_object_and_fails_below_a_threshold(trained, tmp_path, monkeypatch):
    module = write_module(tmp_path, monkeypatch)
    save_file(trained.state_dict(), tmp_path / "m.safetensors")
    data = load_digits()
    np.savez(tmp_path / "d.npz", x=data.probe_inputs[:256].numpy(), y=data.probe_targets[:256].numpy())
    before = (tmp_path / "m.safetensors").read_bytes()
    common = ["stress", "m.safetensors", "--factory", f"{module}:make", "--data", "d.npz", *QUICK, "--json"]
    result = RUNNER.invoke(app, [*common, "--fail-below", "99.9"])
    assert result.exit_code == 1, result.output
    found = json.loads(result.stdout)
    assert found["complete"]
    assert found["exit_code"] == 1
    assert "is below 99.9" in found["failure"]
    assert 0 < found["score"] < 99.9
    assert [part["kind"] for part in found["stresses"]] == list(KINDS)
    assert (tmp_path / "m.safetensors").read_bytes() == before
    late = RUNNER.invoke(app, [*common, "--fail-below", "1", "--budget", "0.001"])
    assert late.exit_code == 1
    assert "not complete" in json.loads(late.stdout)["failure"]


def test_the_command_reports_on_a_plant():
    result = RUNNER.invoke(app, ["stress", "mlp", *QUICK, "--warmup-steps", "60"])
    assert result.exit_code == 0, result.output
    for word in ("Stability score", "Score: 100 times", "Layers, the most sensitive", "Critical points", "Notes"):
        assert word in result.stdout
    wrong = RUNNER.invoke(app, ["stress", "kalmanguard.models.mlp:MLPPlant", "--lr", "-1"])
    assert wrong.exit_code == 2
