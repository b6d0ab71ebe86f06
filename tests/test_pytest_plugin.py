"""assert_stable: healthy trainings pass, broken ones fail with step and reason, and the plugin costs nothing."""

from __future__ import annotations

import math
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from kalmanguard.errors import ConfigurationError
from kalmanguard.models.digits import load_digits
from kalmanguard.testing import InstabilityError, Trial, assert_stable, standard_loop

pytest_plugins = "pytester"


def digits(batch: int = 64):
    """Batches of digits, and held-out ones."""
    data = load_digits()
    train = list(zip(data.train_inputs.split(batch), data.train_targets.split(batch), strict=True))
    return train, [(data.probe_inputs[:128], data.probe_targets[:128])]


def training(*, lr=2e-3, spoil=None, broken=None):
    """A training function; ``spoil(step, model, optimizer)`` acts before each step."""

    def train(trial: Trial) -> None:
        batches, held_out = digits()
        model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
        if broken == "unsupervised":
            return
        supervisor = trial.supervise(model, held_out, optimizer=optimizer, loss_fn=cross_entropy)
        for step, (x, y) in enumerate(trial.batches(batches), 1):
            if spoil is not None:
                spoil(step, model, optimizer)
            loss = cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            supervisor.update(loss)
            if broken == "short" and step == 30:
                break

    return train


def test_a_healthy_training_passes_and_leaves_the_random_streams_alone():
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    result = assert_stable(training(), steps=60, seeds=2, reproducible=True)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.array_equal(np.random.get_state()[1], before[2])
    assert all(last < 0.5 * first for first, last in zip(result.first, result.last, strict=True))
    assert result.first[0] != result.first[1]  # other weights
    assert all(1.0 <= ratio < 20.0 for ratio in result.largest_gradient)


def test_a_spike_of_the_learning_rate_is_a_failure_at_its_step():
    def spike(step, model, optimizer):
        optimizer.param_groups[0]["lr"] = 2e-3 * (300.0 if 60 <= step < 65 else 1.0)

    with pytest.raises(InstabilityError) as caught:
        assert_stable(training(spoil=spike), steps=100, seeds=1)
    assert 60 <= caught.value.step <= 70
    text = str(caught.value)
    assert text.startswith(f"Seed 0, step {caught.value.step}: ")
    assert "Evidence: " in text
    assert "Look at the learning rate" in text


def test_a_weight_that_is_not_a_number_is_a_failure_at_its_step():
    def spoil(step, model, optimizer):
        if step == 50:
            with torch.no_grad():
                model[0].weight[0, 0] = math.nan

    with pytest.raises(InstabilityError, match=r"Seed 0, step 5\d: .*finite"):
        assert_stable(training(spoil=spoil), steps=100, seeds=1)


def test_no_progress_is_a_failure():
    with pytest.raises(InstabilityError, match=r"the gain of .* is not above .* 1% of the first loss") as caught:
        assert_stable(training(lr=1e-9), steps=40, seeds=1)
    assert caught.value.step is None
    assert_stable(training(lr=1e-9), steps=40, seeds=1, improvement=None)


def test_a_gradient_beyond_the_bound_names_its_step():
    with pytest.raises(InstabilityError, match=r"the gradient's norm is .* times the median of the steps before; 1.01"):
        assert_stable(training(), steps=40, seeds=1, gradient_ratio=1.01)


def test_gradients_that_vanish_with_the_loss_are_no_failure():
    """At the end the norms are a millionth of those at the beginning."""

    def make(seed):
        x = torch.randn(192, 4)
        model = nn.Linear(4, 1)
        data = [(part, part.sum(1, keepdim=True)) for part in x.split(16)]
        return model, data, nn.functional.mse_loss, torch.optim.SGD(model.parameters(), lr=0.1)

    result = assert_stable(standard_loop(make), steps=120, seeds=1)
    assert result.last[0] < 1e-6 * result.first[0]


def test_what_draws_from_a_source_of_its_own_is_not_reproducible():
    own = torch.Generator().manual_seed(1)

    def spoil(step, model, optimizer):
        if step == 25:
            with torch.no_grad():
                model[0].weight.add_(1e-4 * torch.randn(model[0].weight.shape, generator=own))

    train = training(spoil=spoil)
    with pytest.raises(InstabilityError, match=r"Seed 0, step 2\d: two runs with the same seed part here"):
        assert_stable(train, steps=40, seeds=1, reproducible=True)


def test_faults_are_recovered_from_and_one_that_never_acts_is_refused():
    assert_stable(training(), steps=120, seeds=1, faults=["lr_spike:300@60:steps=5", "nan_gradient@70"])
    with pytest.raises(ConfigurationError, match="never acted in 120 steps"):
        assert_stable(training(), steps=120, seeds=1, faults=["nan_gradient@500"])


def test_a_fault_without_time_to_recover_fails():
    with pytest.raises(InstabilityError, match=r"after label_noise:1.0@10.* of the gain is left, 80% are wanted"):
        assert_stable(training(), steps=60, seeds=1, faults=["label_noise:1.0@10:steps=none"])


def test_misuse_is_refused_with_the_way_out():
    with pytest.raises(ConfigurationError, match=r"never called trial\.supervise"):
        assert_stable(training(broken="unsupervised"), steps=40, seeds=1)
    with pytest.raises(ConfigurationError, match="saw 30 steps, 40 are wanted"):
        assert_stable(training(broken="short"), steps=40, seeds=1)
    for wrong in ({"steps": 5}, {"seeds": 0}, {"gradient_ratio": 1.0}, {"improvement": 1.0}):
        with pytest.raises(ConfigurationError):
            assert_stable(training(), **wrong)


def test_a_factory_is_enough():
    def make(seed):
        batches, _ = digits()
        model = nn.Linear(64, 10)
        return model, batches, cross_entropy, torch.optim.SGD(model.parameters(), lr=0.1)

    result = assert_stable(standard_loop(make), steps=60, seeds=1)
    assert result.last[0] < result.first[0]


def test_the_fixture_passes_and_fails_tests(pytester: pytest.Pytester):
    pytester.makepyfile(
        """
        import torch
        from torch import nn

        def make(lr):
            def train(trial):
                generator = torch.Generator().manual_seed(0)
                x = torch.randn(512, 8, generator=generator)
                y = (x.sum(1) > 0).long()
                data = list(zip(x[:384].split(32), y[:384].split(32)))
                model = nn.Linear(8, 2)
                optimizer = torch.optim.SGD(model.parameters(), lr=lr)
                supervisor = trial.supervise(model, [(x[384:], y[384:])], optimizer=optimizer)
                for a, b in trial.batches(data):
                    loss = nn.functional.cross_entropy(model(a), b)
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    supervisor.update(loss)
            return train

        def test_sound(assert_stable):
            assert_stable(make(0.1), steps=60, seeds=1)

        def test_weak(assert_stable):
            assert_stable(make(1e-12), steps=60, seeds=1)
        """
    )
    # In a process of its own: pytester takes imported modules back, and torch cannot be imported twice.
    result = pytester.runpytest_subprocess("-p", "kalmanguard.pytest_plugin", "-p", "no:cacheprovider", "-W", "error")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(
        ["E *InstabilityError: Seed 0: the held-out loss goes from *Look at the learning rate*"]
    )


def test_the_plugin_loads_nothing_heavy():
    code = (
        "import sys, pytest; import kalmanguard.pytest_plugin; "
        "print([m for m in ('torch', 'numpy', 'scipy', 'pydantic', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
