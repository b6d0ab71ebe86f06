"""PyTorch to numbers: the sketch, the losses and the probe that leaves no trace.

Oracles: linear algebra (a sketch is linear, norms keep their expectation), torch's own loss functions called one
example at a time, and the state of the process before and after. Tolerances: 1e-6 where the sketch sums in float32,
1e-12 where it sums in float64, zero where nothing may change. Statistical bounds are named beside the assertion.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from kalmanguard.errors import ConfigurationError
from kalmanguard.records import FloatArray
from kalmanguard.sensors.losses import batch_size, split_batch, take
from kalmanguard.sensors.probe import Probe
from kalmanguard.sensors.sketch import Sketch
from kalmanguard.sensors.suite import loss_value

# -- sketch -----------------------------------------------------------------------------------------------------------


def shapes(kind: str) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a small network, of one with large matrices, and of both kinds at once."""
    small = [("a.weight", (32, 64)), ("a.bias", (32,)), ("b.weight", (10, 32)), ("b.bias", (10,))]
    large = [("w", (256, 512)), ("v", (512, 128))]
    return {"small": small, "large": large, "mixed": small + large}[kind]


def random_parameters(kind: str, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(shape, generator=generator, dtype=dtype) for _, shape in shapes(kind)]


def sketch_of(kind: str, values: list[Tensor], *, size: int = 64, seed: int = 0) -> FloatArray:
    names = [name for name, _ in shapes(kind)]
    return Sketch(list(zip(names, values, strict=True)), size=size, seed=seed)()


@pytest.mark.parametrize("kind", ["small", "large", "mixed"])
def test_sketch_is_linear(kind: str) -> None:
    generator = torch.Generator().manual_seed(1)
    a, b = random_parameters(kind, generator), random_parameters(kind, generator)
    total = [2.0 * x - 3.0 * y for x, y in zip(a, b, strict=True)]
    expected = 2.0 * sketch_of(kind, a) - 3.0 * sketch_of(kind, b)
    np.testing.assert_allclose(sketch_of(kind, total), expected, rtol=1e-5, atol=1e-4 if kind != "small" else 1e-5)


@pytest.mark.parametrize("kind", ["small", "mixed"])
def test_squared_norm_is_unbiased_over_seeds(kind: str) -> None:
    generator = torch.Generator().manual_seed(2)
    values = random_parameters(kind, generator)
    true = sum(float(v.double().square().sum()) for v in values)
    ratios = []
    for seed in range(200):
        s = sketch_of(kind, values, seed=seed)
        ratios.append(float(s @ s) / true)
    error = float(np.std(ratios)) / math.sqrt(len(ratios))
    assert abs(float(np.mean(ratios)) - 1.0) < 5 * error
    # A map with k rows has a relative variance of 2 / k at best.
    assert float(np.std(ratios)) < 1.5 * math.sqrt(2 / 64)


def updates(shape: tuple[int, int], count: int) -> dict[str, list[Tensor]]:
    rows, columns = shape
    generator = torch.Generator().manual_seed(3)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    rank_one = [torch.outer(normal(rows), normal(columns)) for _ in range(count)]
    dense = [normal(rows, columns) for _ in range(count)]
    sparse = []
    for update in dense:
        keep = torch.rand(shape, generator=generator) < 300 / (rows * columns)
        sparse.append(update * keep)
    one_row = [torch.zeros(shape).index_copy_(0, torch.tensor([i % rows]), u[:1]) for i, u in enumerate(dense)]
    constant = [torch.full(shape, 0.1) * (1 + i) for i in range(count)]
    return {"rank one": rank_one, "dense": dense, "sparse": sparse, "one row": one_row, "constant": constant}


@pytest.mark.parametrize("shape", [(64, 128), (512, 256)])
def test_norms_are_kept_on_rank_one_sparse_and_dense_updates(shape: tuple[int, int]) -> None:
    """Signs must be independent: one sign vector for all rows fails here on rank-one updates (0.06 to 1.86)."""
    weight = torch.zeros(shape)
    ratios: dict[str, list[float]] = {}
    sketches = [Sketch([("weight", weight)], size=64, seed=seed) for seed in range(10)]
    for kind, made in updates(shape, 12).items():
        for update in made:
            weight.copy_(update)
            ratios.setdefault(kind, []).extend(float(np.linalg.norm(s()) / update.norm()) for s in sketches)
    # One row of a matrix fills only a few chunks, so only a few of the k buckets: right on average, and that is all.
    single = np.square(ratios.pop("one row"))
    assert abs(float(single.mean()) - 1.0) < 5 * float(single.std()) / math.sqrt(len(single))
    for kind, values in ratios.items():
        low, high = np.quantile(values, [0.05, 0.95])
        assert 0.75 <= low <= high <= 1.25, (kind, low, high)


@given(st.integers(0, 3), st.integers(0, 10_000), st.floats(0.5, 1e6))
def test_one_changed_weight_moves_one_bucket_by_as_much(which: int, where: int, amount: float) -> None:
    values = [torch.zeros(shape) for _, shape in shapes("small")]
    sketch = Sketch(list(zip([n for n, _ in shapes("small")], values, strict=True)), size=64)
    flat = values[which].view(-1)
    flat[where % flat.numel()] = amount
    moved = np.flatnonzero(sketch())
    assert len(moved) == 1
    assert abs(float(sketch()[moved[0]])) == float(torch.tensor(amount))


def test_signs_and_buckets_depend_on_seed_and_name_only() -> None:
    generator = torch.Generator().manual_seed(4)
    values = random_parameters("small", generator)
    first = sketch_of("small", values, seed=7)
    np.testing.assert_array_equal(first, sketch_of("small", [v.clone() for v in values], seed=7))
    assert not np.allclose(first, sketch_of("small", values, seed=8))
    backwards = Sketch(list(reversed(list(zip([n for n, _ in shapes("small")], values, strict=True)))), seed=7)
    np.testing.assert_allclose(backwards(), first, rtol=1e-12, atol=1e-12)


def test_random_streams_are_not_touched() -> None:
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tobytes()  # type: ignore[union-attr]
    sketch_of("mixed", random_parameters("mixed", torch.Generator().manual_seed(5)))
    assert torch.equal(state[0], torch.get_rng_state())
    assert state[1] == random.getstate()
    assert state[2] == np.random.get_state()[1].tobytes()  # type: ignore[union-attr]


def test_tied_parameters_count_once() -> None:
    weight = torch.randn(20, 30)
    once = Sketch([("embedding", weight), ("bias", torch.ones(5))])()
    twice = Sketch([("embedding", weight), ("bias", torch.ones(5)), ("head", weight)])()
    np.testing.assert_array_equal(once, twice)


@pytest.mark.parametrize("shape", [(48, 32), (512, 128)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_give_the_sketch_of_their_values(shape: tuple[int, int], dtype: torch.dtype) -> None:
    value = torch.randn(shape).to(dtype)
    expected = Sketch([("w", value.to(torch.float32))])()
    np.testing.assert_allclose(Sketch([("w", value)])(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shape", [(48, 32), (512, 128)])
def test_layout_does_not_matter(shape: tuple[int, int]) -> None:
    value = torch.randn(shape)
    expected = Sketch([("w", value)])()
    np.testing.assert_allclose(Sketch([("w", value.t().contiguous().t())])(), expected, rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(Sketch([("w", torch.stack([value, value])[0])])(), expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("channels", [8, 128])
def test_channels_last_does_not_matter(channels: int) -> None:
    kernel = torch.randn(channels, channels, 3, 3)
    last = kernel.to(memory_format=torch.channels_last)
    assert not last.is_contiguous()
    np.testing.assert_allclose(Sketch([("k", last)])(), Sketch([("k", kernel)])(), rtol=1e-6, atol=1e-4)


def test_complex_parameters_are_the_sum_of_their_parts() -> None:
    value = torch.randn(40, 30, dtype=torch.complex64)
    sketch = Sketch([("w", value)])
    whole = sketch()
    assert 0.7 < float(np.linalg.norm(whole) / value.norm()) < 1.3
    kept = value.clone()
    value.imag.zero_()
    real = sketch()
    value.copy_(kept - value)
    np.testing.assert_allclose(real + sketch(), whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(16, 8), (512, 128)])
def test_new_storage_under_a_parameter_is_noticed(shape: tuple[int, int]) -> None:
    parameter = nn.Parameter(torch.randn(shape))
    sketch = Sketch([("w", parameter)])
    sketch()
    parameter.data = torch.randn(shape)
    np.testing.assert_array_equal(sketch(), Sketch([("w", parameter.detach().clone())])())
    with torch.no_grad():
        parameter.add_(1.0)
    np.testing.assert_array_equal(sketch(), Sketch([("w", parameter.detach().clone())])())
    parameter.data = parameter.data.to(torch.bfloat16)
    np.testing.assert_array_equal(sketch(), Sketch([("w", parameter.detach().clone())])())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", [(16, 8), (512, 128)])
def test_one_bad_weight_makes_the_sketch_not_finite(shape: tuple[int, int], bad: float) -> None:
    weight = torch.randn(shape)
    sketch = Sketch([("w", weight)])
    assert np.isfinite(sketch()).all()
    weight[3, 5] = bad
    assert not np.isfinite(sketch()).all()
    weight[3, 5] = 0.0
    assert np.isfinite(sketch()).all()


@pytest.mark.parametrize("shape", [(64, 128), (512, 512)])
def test_differences_resolve_updates_of_a_fine_tuning_run(shape: tuple[int, int]) -> None:
    """Relative updates of 1e-5: the difference of two sketches is the sketch of the difference, to a few percent."""
    weight = torch.randn(shape)
    before = weight.clone()
    sketch = Sketch([("w", weight)])
    first = sketch()
    weight.add_(1e-5 * torch.randn(shape))
    moved = sketch() - first
    update = (weight.double() - before.double()).float()
    expected = Sketch([("w", update)])()
    assert float(np.linalg.norm(moved - expected)) < 0.1 * float(np.linalg.norm(expected))


def test_what_cannot_be_sketched_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="no parameters"):
        Sketch([])
    with pytest.raises(ConfigurationError, match="only dense"):
        Sketch([("w", torch.randn(3, 3).to_sparse())])


# -- losses -----------------------------------------------------------------------------------------------------------


class Fixed(nn.Module):
    """Returns what it was made with, whatever goes in; one parameter, so that it counts as a model."""

    def __init__(self, output: Callable[[int], Any]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.output = output

    def forward(self, inputs: Tensor, **_: Any) -> Any:
        return self.output(len(inputs))


def inputs(n: int) -> Tensor:
    return torch.arange(n, dtype=torch.float32)[:, None]


def table(values: Tensor) -> Callable[[int], Tensor]:
    """Output of a batch of one is not the first row: inputs carry the row."""
    return lambda n: values[:n]


def test_integer_targets_mean_cross_entropy() -> None:
    logits, target = torch.randn(20, 5), torch.randint(0, 5, (20,))
    found = Probe(Fixed(table(logits)), [(inputs(20), target)]).read().losses
    np.testing.assert_allclose(found, F.cross_entropy(logits, target, reduction="none"), rtol=1e-6)


def test_tokens_are_averaged_per_sequence_and_padding_is_left_out() -> None:
    logits, target = torch.randn(6, 7, 11), torch.randint(0, 11, (6, 7))
    target[:, 5:] = -100
    target[0, 1:] = -100
    found = Probe(Fixed(table(logits)), [(inputs(6), target)]).read().losses
    expected = [
        float(F.cross_entropy(row[keep >= 0], keep[keep >= 0])) for row, keep in zip(logits, target, strict=True)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_images_of_classes_are_averaged_per_image() -> None:
    logits, target = torch.randn(4, 3, 6, 5), torch.randint(0, 3, (4, 6, 5))
    found = Probe(Fixed(table(logits)), [(inputs(4), target)]).read().losses
    expected = F.cross_entropy(logits, target, reduction="none").mean((1, 2))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("shape", [(8,), (8, 1), (8, 3, 4)])
def test_float_targets_of_the_same_shape_mean_squared_error(shape: tuple[int, ...]) -> None:
    output, target = torch.randn(shape), torch.randn(shape)
    found = Probe(Fixed(table(output)), [(inputs(8), target)]).read().losses
    np.testing.assert_allclose(found, (output - target).square().reshape(8, -1).mean(1), rtol=1e-6)


@pytest.mark.parametrize(
    ("output", "target"),
    [
        (torch.randn(8, 1), torch.randn(8)),  # would broadcast to (8, 8)
        (torch.randn(8, 3), torch.randn(8, 4)),
        (torch.randn(8), torch.randint(0, 2, (8,))),  # binary logits?
        (torch.randn(8, 3), torch.randint(0, 3, (8, 3))),  # many labels?
        (torch.randn(8, 3), torch.rand(8, 3) > 0.5),
        (torch.randn(2, 8, 3), torch.randint(0, 3, (8,))),
        (torch.randn(8, 5, 5), torch.randint(0, 5, (8, 5))),  # (B, T, V) or (B, C, L)?
        (torch.randn(8, 4, 4, 4), torch.randint(0, 4, (8, 4, 4))),  # (B, C, H, W) or (B, T, U, V)?
    ],
)
def test_ambiguous_losses_are_refused_with_the_way_out(output: Tensor, target: Tensor) -> None:
    with pytest.raises(ConfigurationError, match="loss_fn") as caught:
        Probe(Fixed(table(output)), [(inputs(8), target)])
    assert str(tuple(output.shape)) in str(caught.value)
    assert str(tuple(target.shape)) in str(caught.value)


def test_outputs_without_a_tensor_and_batches_without_a_target_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"returns tuple without a \.loss; pass loss_fn"):
        Probe(Fixed(lambda n: (torch.ones(n), torch.ones(n))), [(inputs(8), torch.ones(8))])
    with pytest.raises(ConfigurationError, match="no target tensor; pass loss_fn"):
        Probe(Fixed(lambda n: torch.ones(n, 2)), [inputs(8)])


@dataclass
class Output:
    """What a model of the Hugging Face kind returns."""

    loss: Tensor | None = None
    logits: Tensor | None = None


class Causal(nn.Module):
    """A tiny causal model that computes its own shifted loss, with attribute access to it."""

    def __init__(self, *, shift: bool = True, logits: bool = True) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(13, 8), nn.Linear(8, 13)
        self.shift, self.logits = shift, logits

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, attention_mask: Tensor | None = None) -> Output:
        logits = self.head(self.embed(input_ids))
        if labels is None:
            return Output(logits=logits)
        values, wanted = (logits[:, :-1], labels[:, 1:]) if self.shift else (logits, labels)
        return Output(F.cross_entropy(values.reshape(-1, 13), wanted.reshape(-1)), logits if self.logits else None)


def tokens(n: int = 12) -> dict[str, Tensor]:
    ids = torch.randint(0, 13, (n, 9))
    return {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("shift", [True, False])
def test_a_models_own_loss_is_taken_apart_by_example(shift: bool) -> None:
    model, batch = Causal(shift=shift), tokens(40)
    found = Probe(model, [batch]).read().losses
    with torch.no_grad():
        each = [float(model(**{k: v[i : i + 1] for k, v in batch.items()}).loss) for i in range(40)]
    np.testing.assert_allclose(found, each, rtol=1e-5)


@pytest.mark.parametrize(("size", "units"), [(12, 12), (32, 32), (50, 16)])
def test_a_loss_without_logits_is_measured_on_parts_of_the_batch(size: int, units: int) -> None:
    model, batch = Causal(logits=False), tokens(size)
    probe = Probe(model, [batch])
    found = probe.read().losses
    assert len(found) == probe.size == units
    with torch.no_grad():
        whole = float(model(**batch).loss)
    assert float(np.mean(found)) == pytest.approx(whole, rel=1e-2 if units == 16 else 1e-5)


def test_a_mapping_with_a_loss_is_read_like_an_object() -> None:
    class Mapped(Causal):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            return {"loss": output.loss, "logits": output.logits}

    model, batch = Mapped(), tokens()
    with torch.no_grad():
        whole = float(model(**batch)["loss"])
    assert Probe(model, [batch]).read().mean == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("key", ["x", "inputs", "image"])
def test_a_dict_with_one_input_and_a_label_goes_in_by_position(key: str) -> None:
    model = nn.Linear(4, 3)
    batch = {key: torch.randn(10, 4), "label": torch.randint(0, 3, (10,))}
    found = Probe(model, [batch]).read().losses
    with torch.no_grad():
        expected = F.cross_entropy(model(batch[key]), batch["label"], reduction="none")
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_several_inputs_and_a_target() -> None:
    model = nn.Bilinear(3, 4, 2)
    batch = (torch.randn(10, 3), torch.randn(10, 4), torch.randint(0, 2, (10,)))
    assert len(Probe(model, [batch]).read().losses) == 10
    assert len(Probe(model, [list(batch)]).read().losses) == 10


def per_row(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).abs().mean(1)


@pytest.mark.parametrize(
    ("loss_fn", "same"),
    [
        (nn.L1Loss(), True),
        (nn.L1Loss(reduction="none"), True),
        (nn.L1Loss(reduction="sum"), True),
        (per_row, True),
        (lambda output, target: per_row(output, target).mean(), True),
        (lambda output, target: (output - target).abs(), True),
        (lambda output, target: per_row(output, target)[:, None], True),
    ],
)
def test_a_loss_of_the_users_is_taken_per_example_in_any_form(loss_fn: Any, same: bool) -> None:
    output, target = torch.randn(24, 3), torch.randn(24, 3)
    found = Probe(Fixed(table(output)), [(inputs(24), target)], loss_fn=loss_fn).read().losses
    np.testing.assert_allclose(found, per_row(output, target), rtol=1e-6)
    assert same


def test_a_mean_of_the_users_on_an_output_that_cannot_be_cut_is_taken_on_parts() -> None:
    model = nn.Linear(4, 4)

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"prediction": self.inner(x)}

    x = torch.randn(10, 4)
    probe = Probe(Wrapped(), [(x, x)], loss_fn=lambda o, t: (o["prediction"] - t).square().mean())
    with torch.no_grad():
        np.testing.assert_allclose(probe.read().losses, (model(x) - x).square().mean(1), rtol=1e-5)


def test_a_loss_of_the_users_of_another_form_is_refused() -> None:
    batch = [(inputs(8), torch.randn(8, 3))]
    with pytest.raises(ConfigurationError, match="float; it must return a tensor"):
        Probe(Fixed(lambda n: torch.ones(n, 3)), batch, loss_fn=lambda o, t: 1.0)  # type: ignore[arg-type,return-value]
    with pytest.raises(ConfigurationError, match=r"shape \(3,\) for 8 examples"):
        Probe(Fixed(lambda n: torch.ones(n, 3)), batch, loss_fn=lambda o, t: (o - t).mean(0))


def test_a_dict_without_a_known_target_goes_whole_to_the_users_loss() -> None:
    model = nn.Linear(4, 1)

    class Takes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, state: Tensor, reward: Tensor) -> Tensor:
            value: Tensor = self.inner(state)
            return value

    batch = {"state": torch.randn(10, 4), "reward": torch.randn(10, 1)}
    probe = Probe(Takes(), [batch], loss_fn=lambda value, whole: (value - whole["reward"]).square())
    with torch.no_grad():
        np.testing.assert_allclose(
            probe.read().losses, (model(batch["state"]) - batch["reward"]).square()[:, 0], rtol=1e-6
        )


def test_batches_are_split_counted_and_cut() -> None:
    x, y = torch.randn(5, 2), torch.arange(5)
    assert split_batch((x, y))[0][0] is x
    assert split_batch(x)[2] is None
    assert batch_size({"name": "text", "x": x}) == 5
    assert take((x, y, "text", torch.tensor(3)), 2, 1)[1].tolist() == [1, 2]
    assert take((x, y, "text", torch.tensor(3)), 2, 1)[2] == "text"
    with pytest.raises(ConfigurationError, match="yields int"):
        split_batch(3)
    with pytest.raises(ConfigurationError, match="a tuple, holds no tensor"):
        batch_size(("a", "b"))


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (None, None),
        (1.5, 1.5),
        (torch.tensor(1.5, requires_grad=True), 1.5),
        (torch.tensor([[1.5]]), 1.5),
        (torch.tensor([1.0, 2.0]), 1.5),
        (torch.tensor([1, 2]), 1.5),
        (np.float32(1.5), 1.5),
        (torch.tensor(1.5, dtype=torch.bfloat16), 1.5),
    ],
)
def test_a_loss_is_one_number(loss: Any, expected: float | None) -> None:
    assert loss_value(loss) == expected


# -- the probe leaves no trace ----------------------------------------------------------------------------------------


class Restless(nn.Module):
    """Draws from every random stream and keeps statistics, in evaluation too."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
        self.register_buffer("calls", torch.zeros(()))
        self.calls: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        noise = random.random() + float(np.random.rand()) + float(torch.rand(()))
        logits: Tensor = self.body(x) + 0.0 * noise
        return logits


def held_out(n: int = 40) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(8, 4, generator=generator), torch.randint(0, 3, (8,), generator=generator)) for _ in range(n // 8)
    ]


def everything(model: nn.Module) -> list[Any]:
    return [
        torch.get_rng_state().tolist(),
        random.getstate(),
        [repr(part) for part in np.random.get_state()],
        [module.training for module in model.modules()],
        [value.tolist() for value in model.state_dict().values()],
        [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
        [p.requires_grad for p in model.parameters()],
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_inference_mode_enabled(),
    ]


def test_probing_leaves_no_trace() -> None:
    model = Restless()
    model.body[2].eval()  # a model that is partly in evaluation mode stays so
    model(torch.randn(6, 4)).sum().backward()
    probe = Probe(model, held_out())
    before = everything(model)
    first, second = probe.read().losses, probe.read().losses
    assert everything(model) == before
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("grad", [True, False])
def test_probing_leaves_grad_mode_and_autocast_alone(grad: bool) -> None:
    model = Restless()
    probe = Probe(model, held_out())
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16, enabled=grad):
        before = everything(model)
        probe.read()
        assert everything(model) == before


def test_a_training_loader_that_shuffles_is_read_without_a_trace() -> None:
    data = torch.utils.data.TensorDataset(torch.randn(64, 4), torch.randint(0, 3, (64,)))
    loader = torch.utils.data.DataLoader(data, batch_size=16, shuffle=True)
    model = Restless()
    before = everything(model)
    Probe(model, loader, examples=20)
    assert everything(model) == before


def test_a_forward_pass_that_raises_leaves_no_trace_either() -> None:
    model = Restless()
    probe = Probe(model, held_out())
    before = everything(model)

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    handle = model.body[3].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        probe.read()
    handle.remove()
    assert everything(model) == before


def test_the_probe_set_is_fixed_and_has_a_digest() -> None:
    model = nn.Linear(4, 3)
    batches = held_out()
    first, second = Probe(model, batches), Probe(model, batches)
    assert first.digest == second.digest
    changed = [(x.clone(), y) for x, y in batches]
    changed[0][0][0, 0] += 1
    assert Probe(model, changed).digest != first.digest
    kept = first.read().losses
    batches[0][0].zero_()  # what the user does with the batches afterwards is the user's business
    np.testing.assert_array_equal(first.read().losses, kept)


def test_examples_and_reserve_are_cut_to_size() -> None:
    def endless() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from held_out()

    probe = Probe(nn.Linear(4, 3), endless(), examples=20, fresh=30)
    assert probe.size == 20
    assert probe.fresh_left == 30
    batches = probe.take_fresh()
    assert sum(map(batch_size, batches)) == 30
    assert probe.fresh_left == 0
    assert probe.take_fresh() == []
    assert len(probe.read_fresh(batches)) == 30


def test_the_reserve_is_disjoint_from_the_probe() -> None:
    rows = torch.arange(64.0)[:, None].repeat(1, 4)
    loader = [(rows[i : i + 24], torch.zeros(len(rows[i : i + 24]), dtype=torch.long)) for i in (0, 24, 48)]
    probe = Probe(nn.Linear(4, 3), loader, examples=30, fresh=100)
    used = {float(x[0]) for batch in probe._batches for x in batch[0]}
    spare = {float(x[0]) for batch in probe.take_fresh() for x in batch[0]}
    assert not used & spare
    assert len(used | spare) == 64


def test_a_compiled_model_is_probed_through_its_original() -> None:
    model = nn.Linear(4, 3)
    compiled = torch.compile(model, backend="eager")
    np.testing.assert_array_equal(
        Probe(compiled, held_out()).read().losses,  # type: ignore[arg-type]
        Probe(model, held_out()).read().losses,
    )


def test_a_probe_needs_examples_and_parameters() -> None:
    with pytest.raises(ConfigurationError, match="probe loader is empty"):
        Probe(nn.Linear(4, 3), [])
    with pytest.raises(ConfigurationError, match="at least 2"):
        Probe(nn.Linear(4, 3), [(torch.randn(1, 4), torch.zeros(1, dtype=torch.long))])
    with pytest.raises(ConfigurationError, match="no parameters"):
        Probe(nn.ReLU(), held_out())


def test_a_loss_that_is_not_finite_makes_the_mean_nan() -> None:
    model = nn.Linear(4, 3)
    probe = Probe(model, held_out())
    with torch.no_grad():
        model.weight[0, 0] = math.inf
    assert math.isnan(probe.read().mean)
