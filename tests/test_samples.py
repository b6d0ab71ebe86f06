"""Per-sample signals and data quality.

Oracles: autograd and plain formulas in float64 (tolerance 1e-12, a few roundings); float32 against float64; planted
labels; the order that a score of data must have.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.data_quality import judge, record
from kalmanguard.detectors.data_quality import curve_quality, forgetting_events, sample_quality
from kalmanguard.errors import ConfigurationError
from kalmanguard.models import load_plant
from kalmanguard.sensors.samples import SampleSignals, sample_signals

FIELDS = ("loss", "confidence", "margin", "entropy", "correct", "logit_gradient_l1", "logit_gradient_l2", "tokens")


def oracle(logits: Tensor, targets: Tensor) -> dict[str, np.ndarray]:
    """Textbook formulas per token, in float64, averaged over the targets that are not -100."""
    z = logits.detach().double().reshape(len(logits), -1, logits.shape[-1]).requires_grad_()
    y = targets.reshape(len(targets), -1)
    counted = y != -100
    safe = y.clamp(min=0)
    losses = cross_entropy(z.flatten(0, 1), safe.flatten(), reduction="none").view(y.shape)
    (gradient,) = torch.autograd.grad(losses.sum(), z)
    p = z.detach().softmax(-1)
    own = z.detach().gather(2, safe[..., None])[..., 0]
    rest = z.detach().scatter(2, safe[..., None], -math.inf).amax(2)
    tokens = {
        "loss": losses.detach(),
        "confidence": p.amax(2),
        "margin": own - rest,
        "entropy": torch.special.entr(p).sum(2),
        "correct": (own > rest).double(),
        "logit_gradient_l1": gradient.abs().sum(2),
        "logit_gradient_l2": gradient.norm(dim=2),
    }
    means = {k: (v.where(counted, torch.zeros(())).sum(1) / counted.sum(1)).numpy() for k, v in tokens.items()}
    return {**means, "tokens": counted.sum(1).numpy()}


def assert_equal(found: SampleSignals, expected: dict[str, np.ndarray], *, rtol: float, atol: float = 0.0) -> None:
    for name in FIELDS:
        np.testing.assert_allclose(getattr(found, name), expected[name], rtol=rtol, atol=atol, err_msg=name)


@given(
    st.integers(1, 5), st.integers(0, 6), st.integers(2, 9), st.floats(0.1, 30), st.integers(1, 60), st.integers(0, 99)
)
def test_signals_are_the_textbook_ones_whatever_the_pieces(
    batch: int, length: int, classes: int, scale: float, piece: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, length) if length else (batch,)
    logits = scale * torch.randn((*shape, classes), generator=generator, dtype=torch.float64)
    targets = torch.randint(classes, shape, generator=generator)
    if length:
        targets[torch.rand(shape, generator=generator) < 0.3] = -100
    with np.errstate(invalid="ignore"):
        expected = oracle(logits, targets)
    assert_equal(sample_signals(logits, targets, piece_elements=piece), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_lower_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    logits = (5 * torch.randn(6, 20, 300)).to(dtype)
    targets = torch.randint(300, (6, 20))
    assert_equal(sample_signals(logits, targets), oracle(logits, targets), rtol=2e-5, atol=1e-6)


def test_nothing_is_lost_where_the_model_is_nearly_certain() -> None:
    """p_y = 1 - 2 exp(-60): a difference from 1 that float32 cannot hold."""
    found = sample_signals(torch.tensor([[60.0, 0.0, 0.0]]), torch.tensor([0]))
    missing = 2 * math.exp(-60)
    assert found.loss[0] == pytest.approx(missing, rel=1e-5)
    assert found.logit_gradient_l1[0] == pytest.approx(2 * missing, rel=1e-5)
    assert found.logit_gradient_l2[0] == pytest.approx(missing * math.sqrt(1.5), rel=1e-5)
    assert found.entropy[0] == pytest.approx(missing * 61, rel=1e-5)


def test_what_is_not_finite_stays_where_it_is() -> None:
    inf = math.inf
    logits = torch.tensor([[0.0, 1.0], [math.nan, 1.0], [inf, 0.0], [-inf, 0.0], [0.0, -inf], [1e38, -1e38]])
    found = sample_signals(logits, torch.zeros(6, dtype=torch.long))
    assert [name for name in FIELDS[:-1] if np.isfinite(getattr(found, name)[1:3]).any()] == []
    assert found.loss[0] == pytest.approx(math.log1p(math.e))
    assert found.loss[3:].tolist() == [inf, 0.0, 0.0]
    assert found.entropy[3:].tolist() == [0.0, 0.0, 0.0]
    assert found.correct[3:].tolist() == [0.0, 1.0, 1.0]


def test_masked_tokens_do_not_count_even_if_they_are_nan() -> None:
    logits = torch.randn(2, 3, 5)
    targets = torch.tensor([[1, -100, 2], [-100, -100, -100]])
    clean = sample_signals(logits, targets)
    logits[0, 1] = math.nan
    assert all(np.array_equal(getattr(clean, f)[0], getattr(sample_signals(logits, targets), f)[0]) for f in FIELDS)
    assert np.isnan(clean.loss[1])
    assert clean.tokens.tolist() == [2.0, 0.0]


def test_a_shifted_view_of_a_real_language_model() -> None:
    plant = load_plant("chartransformer")(seed=0)
    inputs, targets = next(plant.loader)
    logits = plant.model(inputs)
    assert_equal(sample_signals(logits[:, :-1], targets[:, :-1]), oracle(logits[:, :-1], targets[:, :-1]), rtol=1e-4)
    assert sample_signals(logits, targets).loss.mean() == pytest.approx(plant.loss_fn(logits, targets).item(), rel=1e-5)
    assert logits.requires_grad
    assert logits.grad_fn is not None


def test_memory_stays_small_against_the_logits() -> None:
    """The largest tensor that is made has no more elements than a piece."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            for item in result if isinstance(result, tuple | list) else (result,):
                # A view has the storage of the logits; what counts is new memory.
                if isinstance(item, Tensor) and item.untyped_storage().data_ptr() != whole:
                    self.elements = max(self.elements, item.untyped_storage().nbytes() // item.element_size())
            return result

    logits = torch.randn(4, 64, 500)
    whole = logits.untyped_storage().data_ptr()
    with Largest() as seen:
        sample_signals(logits[:, :-1], torch.randint(500, (4, 63)), piece_elements=4000)
    assert 0 < seen.elements <= 4000


@pytest.mark.parametrize(
    ("logits", "targets", "words"),
    [
        (torch.zeros(2, 3), torch.tensor([0, 3]), "no class from 0 to 2"),
        (torch.zeros(2, 3), torch.tensor([0, -1]), "ignore_index"),
        (torch.zeros(2, 3), torch.tensor([0]), "do not fit"),
        (torch.zeros(3), torch.tensor(0), "do not fit"),
        (torch.zeros(2, 1), torch.tensor([0, 0]), "at least 2"),
        (torch.zeros(2, 3, dtype=torch.long), torch.tensor([0, 0]), "floating-point"),
        (torch.zeros(2, 3, dtype=torch.complex64), torch.tensor([0, 0]), "floating-point"),
        (torch.zeros(2, 3), torch.tensor([0.0, 0.0]), "class indices"),
        (torch.zeros(2, 3, device="meta"), torch.tensor([0, 0]), "meta"),
        (torch.zeros(2, 3).to_sparse(), torch.tensor([0, 0]), "dense"),
        ([[0.0]], torch.tensor([0]), "list"),
    ],
)
def test_bad_input_is_refused_with_a_sentence(logits: Tensor, targets: Tensor, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        sample_signals(logits, targets)


def test_an_empty_batch_gives_empty_signals() -> None:
    assert sample_signals(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)).loss.shape == (0,)
    assert np.isnan(sample_signals(torch.zeros(2, 0, 3), torch.zeros(2, 0, dtype=torch.long)).loss).all()


# -- data quality -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scores() -> dict[tuple[float, int, str], dict[str, float]]:
    return {
        (noise, seed, name): judge(record(seed, noise, 14, name))
        for noise in (0.0, 0.1, 0.3, 0.6)
        for seed, name in ((0, "none"), (1, "none"), (0, "in the middle"), (0, "at once"))
    }


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("key", ["score", "score_losses", "score_curve"])
def test_scores_fall_with_the_share_of_wrong_labels(scores: dict, seed: int, key: str) -> None:
    found = [scores[noise, seed, "none"][key] for noise in (0.0, 0.1, 0.3, 0.6)]
    assert found[0] > 0.95
    assert all(better > worse + 0.03 for better, worse in pairwise(found))


@pytest.mark.parametrize("seed", [0, 1])
def test_the_score_estimates_the_clean_share_and_the_suspects_are_the_wrong_ones(scores: dict, seed: int) -> None:
    for noise in (0.1, 0.3, 0.6):
        case = scores[noise, seed, "none"]
        assert case["score"] == pytest.approx(1.0 - case["wrong"], abs=0.05)
        assert case["auroc"] > 0.97
        assert case["precision"] > 0.75
        assert case["recall"] > 0.9


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.3, 0.6])
def test_a_model_that_diverges_is_not_bad_data(scores: dict, noise: float) -> None:
    healthy, middle, start = (scores[noise, 0, name] for name in ("none", "in the middle", "at once"))
    assert middle["score"] == pytest.approx(healthy["score"], abs=0.06)
    assert middle["score_losses"] == pytest.approx(healthy["score_losses"], abs=0.1)
    assert start["score"] is start["score_losses"] is start["score_curve"] is None


def test_it_abstains_where_there_is_nothing_to_go_by() -> None:
    ones = np.ones((5, 4))
    assert "not learned" in sample_quality(ones).message
    assert "at least 3" in sample_quality(ones[:2]).message
    assert sample_quality(np.full((5, 4), np.nan)).score is None
    assert sample_quality(np.array([[2.0] * 4, [1.0] * 4, [np.inf] * 4, [np.inf] * 4])).score is None
    assert "at least 3 until then" in sample_quality(np.array([[2.0], [1.0], [3.0], [3.0]])).message


def test_examples_that_were_not_seen_are_not_judged() -> None:
    losses = np.linspace(2.0, 0.2, 6)[:, None] * np.ones(5)
    losses[:, 3] = np.nan
    losses[1:, 1] = 2.5
    quality = sample_quality(losses, untrained_loss=2.0)
    assert math.isnan(quality.areas[3])
    assert quality.ranking[0] == 1
    assert 3 not in quality.ranking
    assert quality.score == pytest.approx(0.75)


def test_indicators_set_the_threshold() -> None:
    """Wrong on purpose: their areas tell where wrong labels end up, even where all areas are positive."""
    losses = np.linspace(2.0, 0.2, 6)[:, None] * np.ones(8)
    margins = np.ones((6, 8)) * np.array([0.2, 0.25, 0.1, 3.0, 3.0, 3.0, 3.0, 3.0])
    assert sample_quality(losses, margins=margins).score == 1.0
    quality = sample_quality(losses, margins=margins, indicators=[0, 1])
    assert quality.suspects.tolist() == [2]
    assert quality.score == pytest.approx(5 / 6)
    assert not {0, 1} & set(quality.ranking.tolist())


def test_shapes_are_checked() -> None:
    with pytest.raises(ConfigurationError, match=r"\(checks, examples\)"):
        sample_quality(np.ones(3))
    with pytest.raises(ConfigurationError, match="margins of shape"):
        sample_quality(np.ones((3, 2)), margins=np.ones((2, 3)))
    with pytest.raises(ConfigurationError, match="outside"):
        sample_quality(np.ones((3, 2)), indicators=[2])
    with pytest.raises(ConfigurationError, match="same shape"):
        curve_quality(np.ones(60), gradient_norms=np.ones(59))
    with pytest.raises(ConfigurationError, match=r"\(checks, examples\)"):
        forgetting_events(np.ones(3))


def test_forgetting_is_counted_over_gaps() -> None:
    nan = np.nan
    counts = forgetting_events([[1, 1, nan, 0], [nan, 0, nan, nan], [0, 1, nan, 0], [1, 0, nan, 0]])
    assert counts.tolist() == [1.0, 2.0, math.inf, math.inf]


def test_curves_that_say_nothing_about_the_data() -> None:
    steps = np.arange(300)
    falling = 2.3 - 0.006 * steps
    assert curve_quality(falling[:20]).score is None
    assert "negative" in curve_quality(falling - 3.0).message
    assert "never fell" in curve_quality(2.3 + 0 * steps).message
    broken = np.concatenate([falling[:150], np.full(150, 50.0)])
    assert "still falling" in curve_quality(broken).message
    assert "at least" in curve_quality(falling).message
    stuck = 1.5 + 0.8 * np.exp(-steps / 20)
    assert curve_quality(stuck).score is not None
    assert "vanished" in curve_quality(stuck, gradient_norms=np.exp(-steps / 10)).message


def test_a_late_divergence_does_not_change_the_score_of_a_curve() -> None:
    steps = np.arange(400)
    curve = 0.4 + 1.9 * np.exp(-steps / 30)
    broken = np.concatenate([curve, np.full(100, 40.0), np.full(20, np.nan)])
    assert curve_quality(broken).score == pytest.approx(curve_quality(curve).score, abs=0.01)
