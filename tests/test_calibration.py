"""Calibration. Oracles: the order statistic, scipy's binomial law, and MAPIE where it computes the same.

And the theorems themselves: coverage over fresh draws, the bound of adaptive conformal inference on hostile sequences,
the error rate of a certification.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, kstest
from typer.testing import CliRunner

from kalmanguard import Settings
from kalmanguard.calibration import conformal, load, risk
from kalmanguard.calibration import thresholds as calibrations
from kalmanguard.calibration.aci import ACIState, AdaptiveConformal
from kalmanguard.calibration.card import card
from kalmanguard.calibration.corpus import Corpus, RunScores
from kalmanguard.calibration.exchangeability import conformal_p_values, martingale_test, permutation_p_value
from kalmanguard.cli.app import app
from kalmanguard.cli.fleet import fly, parse_seeds, plan
from kalmanguard.control.watch import Watch
from kalmanguard.detectors.drift import RATES, DriftState, DriftTest
from kalmanguard.errors import ConfigurationError, JournalError
from kalmanguard.estimators.bank import CHANNELS
from kalmanguard.healthy import TWO_SIDED, UnhealthyRun, false_alarms, read_run, read_runs
from kalmanguard.journal import JournalReader
from kalmanguard.records import Guarantee
from kalmanguard.replay import replay

RUNNER = CliRunner(env={"COLUMNS": "120", "TERM": "dumb"})
MODELS = Path(__file__).parent.parent / "models" / "calibration"


def run_of(scores: Any, source: str = "mlp", seed: int | None = 0) -> RunScores:
    scores = np.asarray(scores, dtype=np.float64)
    return RunScores(source, seed, len(scores), "s", "0.1.0", "j", scores.reshape(len(scores), -1))


def dependent_runs(rng: np.random.Generator, count: int, steps: int = 60) -> list[np.ndarray]:
    """Runs of different spread whose steps depend on one another, as those of training do."""
    found = []
    for _ in range(count):
        noise, spread = rng.normal(size=steps), math.exp(rng.normal(0.0, 0.5))
        for i in range(1, steps):
            noise[i] = 0.9 * noise[i - 1] + math.sqrt(1 - 0.81) * noise[i]
        found.append(spread * noise)
    return found


# --- the corpus -------------------------------------------------------------------------------------------------------


def test_a_corpus_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    corpus = Corpus(("a", "b"), (run_of([[1.0, np.nan], [2.5, 3.0]]), run_of([[4.0, np.nan]], "cnn", None)))
    corpus.save(tmp_path / "corpus.npz")
    again = Corpus.load(tmp_path / "corpus.npz")
    assert again.digest == corpus.digest
    assert again.runs[1].seed is None
    assert [c.tolist() for c in again.channel("b")] == [[3.0]]
    assert again.steps == 3


def test_a_corpus_that_was_changed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "corpus.npz"
    Corpus(("a",), (run_of([1.0, 2.0]),)).save(path)
    with np.load(path) as file:
        np.savez(tmp_path / "other.npz", head=file["head"], scores_0=file["scores_0"] + 1e-12)
        np.savez(tmp_path / "objects.npz", head=file["head"], scores_0=np.array([[{}]], dtype=object))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ConfigurationError, match="does not match its digest"):
        Corpus.load(tmp_path / "other.npz")
    with pytest.raises(ConfigurationError, match="no corpus"):
        Corpus.load(tmp_path / "objects.npz")  # would have to be unpickled
    with pytest.raises(ConfigurationError, match="no corpus"):
        Corpus.load(path)
    with pytest.raises(ConfigurationError, match="cannot be read"):
        Corpus.load(tmp_path / "missing.npz")


def test_the_digest_is_of_the_scores_not_of_the_journal() -> None:
    one = run_of([1.0, 2.0])
    moved = RunScores(one.source, one.seed, one.steps, one.settings, one.version, "another head", one.scores)
    changed = RunScores(one.source, one.seed, one.steps, one.settings, one.version, one.journal, one.scores + 1)
    assert moved.digest == one.digest != changed.digest


def test_runs_without_the_right_columns_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="one column for each"):
        Corpus(("a", "b"), (run_of([1.0, 2.0]),))
    with pytest.raises(ConfigurationError, match="at least one"):
        Corpus(("a",), ())


# --- conformal thresholds ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 4, 9, 10, 19, 99, 100, 101, 250])
@pytest.mark.parametrize("level", [0.5, 0.8, 0.9, 0.95, 0.99])
def test_split_threshold_is_the_order_statistic(n: int, level: float) -> None:
    scores = np.random.default_rng(n).normal(size=n)
    rank = math.ceil(round((n + 1) * level, 9))
    if rank > n:
        with pytest.raises(ConfigurationError, match=f"{n} scores support levels up to"):
            conformal.split_threshold(scores, level)
    else:
        assert conformal.split_threshold(scores, level) == np.sort(scores)[rank - 1]
        # With one score a run the two theorems are one.
        assert conformal.hierarchical_threshold([*scores[:, None]], level) == np.sort(scores)[rank - 1]


def test_runs_are_the_unit_of_the_hierarchical_threshold() -> None:
    runs = [np.full(length, float(value)) for value, length in enumerate((50, 1, 7, 3, 9, 2, 2, 80, 4))]
    assert conformal.hierarchical_threshold(runs, 0.9) == 8.0
    assert conformal.hierarchical_threshold(runs, 0.5) == 4.0
    with pytest.raises(ConfigurationError, match="99 are needed"):
        conformal.hierarchical_threshold(runs, 0.99)


@pytest.mark.parametrize("level", [0.5, 0.9])
def test_hierarchical_thresholds_cover_new_runs_whose_steps_depend_on_one_another(level: float) -> None:
    rng = np.random.default_rng(1)
    coverage = []
    for _ in range(250):
        *known, new = dependent_runs(rng, 20)
        coverage.append(np.mean(new <= conformal.hierarchical_threshold(known, level)))
    error = np.std(coverage) / math.sqrt(len(coverage))
    assert level - 3 * error <= np.mean(coverage) <= level + 1 / 20 + 3 * error


def test_a_threshold_fitted_on_the_steps_of_one_run_does_not_cover() -> None:
    """The test above can fail: steps that are taken for exchangeable undercover by far more than its error."""
    rng = np.random.default_rng(2)
    coverage = []
    for _ in range(250):
        known, new = dependent_runs(rng, 2)
        coverage.append(np.mean(new <= np.sort(known)[math.ceil(61 * 0.9) - 1]))
    assert np.mean(coverage) < 0.9 - 3 * np.std(coverage) / math.sqrt(len(coverage))


def test_the_design_effect_is_one_for_independent_steps_and_their_number_for_constant_runs() -> None:
    rng = np.random.default_rng(3)
    independent = [rng.random(100) < 0.1 for _ in range(400)]
    constant = [np.full(100, i % 10 == 0) for i in range(400)]
    assert conformal.design_effect(independent) < 1.3
    assert 90 < conformal.design_effect(constant) < 110
    assert conformal.design_effect([np.zeros(10, dtype=bool)] * 3) == 1.0


def test_pooled_steps_are_worth_what_they_are_worth() -> None:
    rng = np.random.default_rng(4)
    independent = [rng.normal(size=500) for _ in range(10)]
    threshold, size = conformal.pooled_threshold(independent, 0.99)
    assert 2.0 < threshold < 2.7
    assert size > 2_000
    alike = [np.full(500, float(i)) for i in range(150)]
    with pytest.raises(ConfigurationError, match="they are worth"):
        conformal.pooled_threshold(alike, 0.995)
    with pytest.raises(ConfigurationError, match="two runs"):
        conformal.pooled_threshold(independent[:1], 0.9)


@pytest.mark.parametrize("bad", [[], [np.array([])], [np.array([1.0, np.nan])]])
def test_bad_scores_are_refused(bad: list[np.ndarray]) -> None:
    for fit in (conformal.hierarchical_threshold, conformal.pooled_threshold):
        with pytest.raises(ConfigurationError, match="at least one run"):
            fit(bad, 0.5)
    with pytest.raises(ConfigurationError, match="outside"):
        conformal.split_threshold(np.ones(3), 1.0)
    with pytest.raises(ConfigurationError, match="nan"):
        conformal.split_threshold(np.array([1.0, np.nan]), 0.5)


# --- adaptive conformal inference -------------------------------------------------------------------------------------

HOSTILE = {
    "always beyond": lambda aci, state, i: math.inf,
    "never beyond": lambda aci, state, i: -math.inf,
    "beyond whenever that is possible": lambda aci, state, i: 1e9 if aci.threshold(state) < math.inf else 0.0,
    "a spike at every alarm-free moment": lambda aci, state, i: 1e9 if state.alpha > aci.target else -1e9,
    "long shifts": lambda aci, state, i: 1e9 if (i // 400) % 2 else -1e9,
}


@pytest.mark.parametrize("adversary", HOSTILE)
@pytest.mark.parametrize(("target", "gamma"), [(0.1, 0.05), (0.01, 0.02), (0.001, None), (0.5, 0.005)])
def test_the_bound_holds_on_hostile_sequences(adversary: str, target: float, gamma: float | None) -> None:
    aci = AdaptiveConformal(np.random.default_rng(0).normal(size=5_000), target=target, gamma=gamma)
    state = aci.init()
    for i in range(3_000):
        state, _ = aci.step(state, HOSTILE[adversary](aci, state, i))
        assert abs(state.exceeded / state.steps - target) <= aci.bound(state.steps)


@given(st.lists(st.floats(allow_nan=False), min_size=1, max_size=300), st.floats(0.001, 0.999), st.floats(0.001, 1.0))
def test_the_bound_holds_on_any_sequence(scores: list[float], target: float, gamma: float) -> None:
    aci = AdaptiveConformal(np.arange(20.0), target=target, gamma=gamma)
    state = aci.init()
    for score in scores:
        state, _ = aci.step(state, score)
    assert abs(state.exceeded / state.steps - target) <= aci.bound(state.steps) + 1e-12


def test_clipping_alpha_as_mapie_does_would_void_the_bound() -> None:
    aci = AdaptiveConformal(np.random.default_rng(0).normal(size=5_000), target=0.1, gamma=0.05)
    adversary = HOSTILE["beyond whenever that is possible"]
    state = aci.init()
    for i in range(2_000):
        state, _ = aci.step(state, adversary(aci, state, i))
        state = state._replace(alpha=min(1.0, max(0.0, state.alpha)))
    assert abs(state.exceeded / state.steps - 0.1) > 3 * aci.bound(state.steps)


def test_mapie_clips_alpha_so_the_line_is_our_own() -> None:
    from mapie.regression import TimeSeriesRegressor
    from sklearn.dummy import DummyRegressor

    x, y = np.zeros((60, 1)), np.random.default_rng(0).normal(size=60)
    regressor = TimeSeriesRegressor(DummyRegressor(), method="aci", random_state=0).fit(x, y)
    for _ in range(5):  # far outside of every interval
        regressor.adapt_conformal_inference(np.zeros((1, 1)), np.array([1e9]), gamma=0.5, confidence_level=0.9)
    assert min(regressor.current_alpha.values()) == 0.0


def test_thresholds_are_infinite_outside_of_the_unit_interval_and_nan_is_no_score() -> None:
    aci = AdaptiveConformal(np.arange(99.0), target=0.1, gamma=0.05)
    assert aci.threshold(ACIState(-0.01)) == math.inf
    assert aci.threshold(ACIState(1.01)) == -math.inf
    assert aci.threshold(ACIState(0.1)) == 89.0
    assert aci.threshold(ACIState(0.001)) == math.inf  # 99 scores say nothing about one in a thousand
    state = aci.init()
    assert aci.step(state, math.nan) == (state, None)
    assert aci.step(ACIState(1.01), -math.inf)[1].exceeded


def test_adaptive_coverage_holds_where_a_fixed_threshold_fails() -> None:
    rng = np.random.default_rng(5)
    scores = rng.normal(size=1_000)
    stream = rng.normal(size=20_000) * np.linspace(1.0, 3.0, 20_000)
    aci = AdaptiveConformal(scores, target=0.1)
    fixed, state = aci.threshold(aci.init()), aci.init()
    for score in stream.tolist():
        state, _ = aci.step(state, score)
    low, high = binom.interval(0.99, 20_000, 0.1)
    assert low <= state.exceeded <= high
    assert np.sum(stream > fixed) > high


@pytest.mark.parametrize(
    ("scores", "target", "gamma"),
    [([], 0.1, 0.1), ([np.nan], 0.1, 0.1), ([1.0], 0.0, 0.1), ([1.0], 0.1, 0.0), ([1.0], 0.1, math.inf)],
)
def test_what_cannot_adapt_is_refused(scores: list[float], target: float, gamma: float) -> None:
    with pytest.raises(ConfigurationError):
        AdaptiveConformal(np.array(scores), target=target, gamma=gamma)


# --- risk control -----------------------------------------------------------------------------------------------------


def test_p_values_are_the_binomial_law_and_that_of_mapie() -> None:
    from mapie.risk_control.methods import compute_hoeffding_bentkus_p_value

    for n, events in ((59, 0), (100, 2), (64, 7)):
        losses = np.zeros(n)
        losses[:events] = 1.0
        ours = risk.p_value(losses, target=0.1)
        mapies = compute_hoeffding_bentkus_p_value(np.array([events / n]), n, 0.1, binary=True)[0, 0]
        assert ours == pytest.approx(binom.cdf(events, n, 0.1), rel=1e-12)
        assert ours == pytest.approx(mapies, rel=1e-9)
    shares = np.random.default_rng(0).random(200) * 0.1
    mapies = compute_hoeffding_bentkus_p_value(np.array([shares.mean()]), 200, 0.15)[0, 0]
    assert risk.p_value(shares, target=0.15) == pytest.approx(mapies, rel=1e-9)


def test_candidates_are_certified_until_the_first_failure() -> None:
    losses = np.zeros((100, 4))
    losses[:30, 2] = 1.0
    certified = risk.certify(losses, target=0.05, delta=0.05)
    assert certified.chosen == 1  # the fourth would pass, but comes after a failure
    assert certified.p_values[3] < 0.05
    assert risk.certify(losses[:50], target=0.05, delta=0.05).chosen is None  # 50 runs are too few: 59 are needed


def test_a_wrong_certification_is_as_rare_as_stated() -> None:
    rng = np.random.default_rng(6)
    repeats, wrong = 400, 0
    for _ in range(repeats):
        losses = (rng.random((80, 1)) < np.array([0.02, 0.11, 0.11, 0.11])).astype(float)
        chosen = risk.certify(losses, target=0.1, delta=0.1).chosen
        wrong += chosen is not None and chosen >= 1
    assert wrong <= binom.ppf(0.999, repeats, 0.1)


def test_the_rule_of_three() -> None:
    for n in (59, 100, 3_000):
        bound = risk.upper_bound(0, n, delta=0.05)
        assert bound <= -math.log(0.05) / n
        assert (1 - bound) ** n == pytest.approx(0.05)
    bound = risk.upper_bound(3, 50, delta=0.05)
    assert binom.cdf(3, 50, bound) == pytest.approx(0.05)
    assert risk.upper_bound(5, 5, delta=0.05) == 1.0
    assert risk.runs_needed(0.05, delta=0.05) == 59


@pytest.mark.parametrize("losses", [np.zeros((0, 2)), np.zeros(3), np.array([[1.5]]), np.array([[np.nan]])])
def test_losses_that_are_none_are_refused(losses: np.ndarray) -> None:
    with pytest.raises(ConfigurationError, match="Losses"):
        risk.certify(losses, target=0.1, delta=0.1)


@pytest.mark.parametrize("text", ["suspicion", "=1,2", "suspicion=", "suspicion=8,8", "suspicion=a,b"])
def test_candidates_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="NAME=VALUE"):
        risk.parse_candidates(text)


# --- exchangeability --------------------------------------------------------------------------------------------------


def test_conformal_p_values_are_uniform_and_see_a_shift() -> None:
    rng = np.random.default_rng(7)
    calibration = rng.normal(size=20_000)
    assert kstest(conformal_p_values(rng.normal(size=500), calibration, seed=1), "uniform").pvalue > 0.01
    assert kstest(conformal_p_values(rng.normal(0.5, size=500), calibration, seed=1), "uniform").pvalue < 1e-6
    assert conformal_p_values(np.array([99.0, -99.0]), np.arange(9.0), seed=0) == pytest.approx([0.05, 0.95], abs=0.05)


def test_exchangeability_tests_keep_their_size_and_have_power() -> None:
    rng = np.random.default_rng(8)
    permutation = sum(permutation_p_value(rng.normal(size=30), permutations=99, seed=i) <= 0.05 for i in range(60))
    martingale = sum(martingale_test(rng.normal(size=200), seed=i).rejected for i in range(60))
    most = binom.ppf(0.999, 60, 0.05)
    assert permutation <= most
    assert martingale <= most
    drifting = rng.normal(size=200) + np.linspace(0.0, 2.0, 200)
    assert permutation_p_value(drifting[::6], permutations=99) <= 0.05
    assert martingale_test(drifting).rejected
    with pytest.raises(ConfigurationError, match="two finite"):
        martingale_test(np.array([1.0, np.nan]))


# --- calibration files ------------------------------------------------------------------------------------------------


def small() -> calibrations.Calibration:
    rng = np.random.default_rng(9)
    runs = tuple(run_of(rng.normal(size=(100, 2)), "mlp" if i % 2 else "cnn", i) for i in range(30))
    return calibrations.fit(Corpus(("loss", "gain"), runs), command="kalmanguard calibrate ...")


def test_levels_that_runs_support_are_exact_and_others_say_what_they_rest_on() -> None:
    calibration = small()
    kinds = {q.level: (q.method, q.guarantee) for q in calibration.channels["loss"]}
    assert kinds[0.9] == ("hierarchical", Guarantee.EXACT)
    assert kinds[0.95] == ("pooled", Guarantee.ASYMPTOTIC)
    assert 0.99985 not in kinds
    assert "0.99985" in calibration.refused["loss"][-1]
    assert calibration.threshold("loss", 0.93) == calibration.threshold("loss", 0.95)
    with pytest.raises(ConfigurationError, match="calibrate on more runs"):
        calibration.threshold("loss", 0.99985)
    with pytest.raises(ConfigurationError, match="no channel"):
        calibration.threshold("speed", 0.9)


def test_infinite_scores_leave_a_level_out() -> None:
    scores = np.array([*range(95), *[math.inf] * 5], dtype=np.float64)
    calibration = calibrations.fit(Corpus(("loss",), tuple(run_of(scores[:, None]) for _ in range(30))))
    assert [q.level for q in calibration.channels["loss"]] == [0.5, 0.8, 0.9]
    assert "infinite" in calibration.refused["loss"][0]


def test_a_calibration_is_a_file_without_dates_and_comes_back(tmp_path: Path) -> None:
    for name in ("one.json", "other.json"):
        small().save(tmp_path / name)
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "other.json").read_bytes()
    assert calibrations.load(tmp_path / "one.json") == small()
    with pytest.raises(ValueError, match="frozen"):
        small().runs = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data.update(format=2), "format"),
        (lambda data: data["channels"]["loss"].reverse(), "do not rise"),
        (lambda data: data["channels"]["loss"][0].update(threshold="high"), "threshold"),
        (lambda data: data.update(extra=1), "extra"),
    ],
)
def test_a_calibration_that_is_none_is_refused(change: Any, words: str, tmp_path: Path) -> None:
    data = small().model_dump(mode="json")
    change(data)
    (tmp_path / "bad.json").write_text(json.dumps(data))
    with pytest.raises(ConfigurationError, match=f"no calibration of this version.*{words}"):
        calibrations.load(tmp_path / "bad.json")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        calibrations.load(tmp_path / "missing.json")


def test_the_shipped_calibration_is_complete_and_so_is_its_card() -> None:
    calibration = load("default")
    assert set(calibration.channels) == set(CHANNELS)
    assert card(calibration) == (MODELS / "CARD.md").read_text(encoding="utf-8")
    assert "kalmanguard calibrate --plants" in calibration.command
    limits = calibrations.thresholds(calibration, 1.5e-4)
    assert limits
    assert all(limits[c] == calibration.threshold(c, 1 - 1.5e-4) > calibration.threshold(c, 0.9) for c in limits)
    assert calibrations.thresholds(calibration, 1e-9) == {}


def test_without_the_plants_there_is_no_default_and_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match="not installed"):
        load("default")


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    place = tmp_path_factory.mktemp("runs")
    sorties = plan("mlp,mlp:batch_size=8", seeds=range(3), steps=80, probe_every=1, folder=place)
    return [fly(sortie) for sortie in sorties]


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("broken") / "run"
    options = ["--fault", "nan_gradient@40", "--steps", "60", "--run-dir", str(folder), "--json"]
    assert RUNNER.invoke(app, ["run", "mlp", *options]).exit_code == 0
    return folder


def test_scores_are_what_the_tail_tests_compared(folders: list[Path]) -> None:
    run = read_run(folders[0])
    assert (run.source, run.seed, run.steps, run.scores.shape) == ("mlp", 0, 80, (50, 5))
    with JournalReader(folders[0]) as reader:
        names = reader.statistic_names
        last = list(reader.statistics())[-1][1]
        assert run.journal == reader.head
    expected = [last[names.index(f"z_{channel}")] for channel in CHANNELS]
    for index, channel in enumerate(CHANNELS):
        value = abs(expected[index]) if channel in TWO_SIDED else expected[index]
        np.testing.assert_array_equal(run.scores[-1, index], value)
    tails = Watch(Settings())._tails
    assert tuple(test.channel for test in tails if test._two_sided) == TWO_SIDED


def test_equal_runs_have_equal_scores(folders: list[Path], tmp_path: Path) -> None:
    [again] = plan("mlp", seeds=range(1), steps=80, probe_every=1, folder=tmp_path)
    one, other = read_run(folders[0]), read_run(fly(again))
    assert one.digest == other.digest
    assert fly(again) == again.folder  # a complete run that lies there is used again
    [longer] = plan("mlp", seeds=range(1), steps=80, probe_every=2, folder=tmp_path)
    with pytest.raises(ConfigurationError, match="holds another run"):
        fly(longer)


def test_runs_that_are_not_healthy_are_refused_with_a_sentence(folders: list[Path], broken: Path) -> None:
    with pytest.raises(UnhealthyRun, match="faults were injected"):
        read_run(broken)
    (broken / "run.json").rename(broken / "elsewhere.json")
    try:
        with pytest.raises(UnhealthyRun, match=r"step 40: an update was dropped \(nonfinite\)"):
            read_run(broken)
        assert read_run(broken, unhealthy=True).source == "MLP with 26,122 parameters"
        assert read_runs([*folders, broken]).alarmed == (broken,)  # nobody says that it was not healthy
        options = ["--out", broken.parent / "c.json", "--vary", "suspicion=8", "--target-rate", "0.6", "--json"]
        assert json.loads(call(*folders, broken, *options).stdout)["certified"]["runs"] == 7
    finally:
        (broken / "elsewhere.json").rename(broken / "run.json")
    corpus, paths, refused, alarmed = read_runs([*folders, broken, folders[2]])
    assert alarmed == ()
    assert len(corpus.runs) == 6
    assert list(paths) == folders
    assert [("faults" in text, "counts once" in text) for text in refused] == [(True, False), (False, True)]
    with pytest.raises(ConfigurationError, match="No healthy run is left"):
        read_runs([broken])
    with pytest.raises(JournalError):
        read_run(folders[0].parent)


def test_alarms_are_those_of_the_replay(folders: list[Path]) -> None:
    quiet, nervous = false_alarms(folders[0], suspicion=50.0), false_alarms(folders[0], suspicion=1.2)
    assert quiet.suspicions <= nervous.suspicions > 0
    assert quiet.unseen == nervous.unseen == 0  # probed at every step
    with JournalReader(folders[0]) as reader:
        settings = Settings(**{**reader.header["settings"], "suspicion": 1.2})
    counts = replay(folders[0], settings).replayed
    assert nervous.suspicions == counts.get("SUSPECT", 0) + counts.get("CONFIRMED", 0)


@pytest.mark.parametrize("text", ["", "mlp:batch_size", "mlp:=3", "mlp:steps=few", ":steps=3"])
def test_plants_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="not of the form"):
        plan(text, seeds=range(1), steps=10, probe_every=1, folder=Path())
    with pytest.raises(ConfigurationError, match="seeds"):
        parse_seeds("3:1")


# --- the command ------------------------------------------------------------------------------------------------------


def call(*arguments: object) -> Any:
    return RUNNER.invoke(app, ["calibrate", "--processes", "1", *map(str, arguments)])


def test_calibrate_on_own_runs(folders: list[Path], broken: Path, tmp_path: Path) -> None:
    out, corpus = tmp_path / "own.json", tmp_path / "own.npz"
    result = call(*folders, broken, "--out", out, "--corpus", corpus)
    assert result.exit_code == 0, result.output
    assert "Left out" in result.output
    calibration = calibrations.load(out)
    assert calibration.runs == 6
    assert [source.source for source in calibration.sources] == ["mlp", "mlp:batch_size=8"]
    assert calibration.corpus == Corpus.load(corpus).digest
    assert (tmp_path / "own.md").read_text(encoding="utf-8") == card(calibration)
    assert call(*folders, "--out", out).exit_code == 0  # an older calibration is written over, other files are not
    (tmp_path / "own.md").write_text("my notes")
    assert call(*folders, "--out", out).exit_code == 2
    assert (tmp_path / "own.md").read_text() == "my notes"


def test_calibrate_trains_plants(folders: list[Path], tmp_path: Path) -> None:
    out, keep = tmp_path / "c.json", folders[0].parent
    # Runs of another probe cadence lie there under the same names, so it must not touch them.
    assert call("--plants", "mlp", "--seeds", "1", "--steps", "80", "--keep", keep, "--out", out).exit_code == 2
    result = call("--plants", "mlp", "--seeds", "1:3", "--steps", "60", "--out", out, "--level", "0.5", "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["calibration"]["sources"] == [{"source": "mlp", "runs": 2, "steps": 60, "seeds": [1, 2]}]
    assert set(os.listdir(tmp_path)) == {"c.json", "c.md"}


def test_calibrate_certifies_a_setting(folders: list[Path], tmp_path: Path) -> None:
    options = ["--out", tmp_path / "c.json", "--vary", "suspicion=20,8", "--json"]
    enough = call(*folders, *options, "--target-rate", "0.45")
    assert enough.exit_code == 0, enough.output
    certified = json.loads(enough.stdout)["certified"]
    assert certified["value"] == 8
    assert certified["rates"] == [0.0, 0.0]
    assert certified["p_values"][0] == pytest.approx(0.55**6)
    few = call(*folders, *options[:-1], "--target-rate", "0.05")
    assert few.exit_code == 1
    assert "59 are needed" in " ".join(few.output.split())
    steps = call(*folders, *options, "--target-rate", "0.45", "--event", "suspicion")
    assert json.loads(steps.stdout)["certified"]["runs"] == 6


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["somewhere", "--plants", "mlp"],
        ["--plants", "nothing", "--seeds", "1"],
        ["--plants", "mlp", "--seeds", "x"],
        ["--plants", "mlp", "--target-rate", "1.5"],
        ["--plants", "mlp", "--vary", "suspicion", "--target-rate", "0.5"],
    ],
)
def test_calibrate_refuses_what_makes_no_sense(arguments: list[str], tmp_path: Path) -> None:
    result = call(*arguments, "--out", tmp_path / "c.json")
    assert result.exit_code == 2
    assert "Error:" in result.output
    assert not list(tmp_path.iterdir())


# --- the benchmark's shortcut -----------------------------------------------------------------------------------------


def test_the_simulated_drift_statistic_is_the_detectors() -> None:
    """`benchmarks.calibration` simulates the recursion for many runs at once; this is the same one."""
    rng = np.random.default_rng(10)
    test, state, wealth = DriftTest(run_length=1e9), DriftState(), np.zeros(len(RATES))
    for loss in rng.normal(1.0, 0.1, size=200).tolist():
        state, result, _ = test.step(state, loss)
        if result is not None:
            wealth = (1.0 + np.array(RATES) * result.x) * (wealth + 1.0)
            assert result.statistic == pytest.approx(wealth.mean(), rel=1e-12)
