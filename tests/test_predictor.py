"""The failure predictor: features without units, files without pickle, classifiers that are scikit-learn's.

Oracles: scikit-learn's ``predict_proba`` (both classifiers, equal to rounding); the definition of an exponential mean
as a sum over all steps (features); a second engine that is given everything in another unit (metamorphic); hand-made
classifiers whose probability is known.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks.predictor_corpus import COLUMNS, DEVELOPING, HOT, Case, Trace, corpus, record
from benchmarks.predictor_training import (
    Fitted,
    Run,
    choose_threshold,
    false_alarms,
    firings,
    folds_of,
    prepare,
    to_file,
)
from kalmanguard.detectors.classifiers import LogisticClassifier, Node, TreeClassifier, probability
from kalmanguard.detectors.predictor import FailurePredictor, PredictorState
from kalmanguard.detectors.predictor_file import PredictorFile, read_predictor
from kalmanguard.engine import STATISTICS, Engine
from kalmanguard.errors import ConfigurationError
from kalmanguard.estimators.features import FEATURES, INPUTS, FeatureBank, FeatureState
from kalmanguard.faults import FaultInjector
from kalmanguard.records import Action, Decision, Guarantee, Level, Measurement, Mode, ProbeReading
from kalmanguard.settings import Settings

RATE_RISE = FEATURES.index("learning rate over its certified range, mean of 4 steps")


def stream(*, steps: int = 150, unit: float = 1.0, harm_at: int = 10_000) -> list[Measurement]:
    """A descent with noise, probed at every tenth step; from ``harm_at`` on all grows by 5 % a step."""
    rng = np.random.default_rng(3)
    measurements = []
    for step in range(1, steps + 1):
        worse = 1.05 ** max(0, step - harm_at)
        noise, direction = rng.normal(size=2), rng.normal(size=64)
        loss = unit * worse * (0.3 + 2.0 * math.exp(-step / 30)) * math.exp(0.05 * noise[0])
        held_out = unit * worse * (0.4 + 2.0 * math.exp(-step / 30)) * np.exp(0.1 * rng.normal(size=32))
        measurements.append(
            Measurement(
                step=step,
                loss=loss,
                learning_rates=(0.01 * worse,),
                gradient_norm=unit * worse * math.exp(0.2 * noise[1]),
                velocity=unit * 1e-3 * worse * (1.0 + direction),
                probe=ProbeReading(held_out) if step % 10 == 0 else None,
            )
        )
    return measurements


def decided(measurements: list[Measurement]) -> list[Decision]:
    engine = Engine(Settings(mode="observe"))
    state, decisions = engine.init(), []
    for m in measurements:
        state, decision = engine.step(state, m)
        decisions.append(decision)
    return decisions


def features_of(measurements: list[Measurement]) -> list[tuple[float, ...]]:
    bank, state, rows = FeatureBank(STATISTICS), FeatureState(), []
    for m, decision in zip(measurements, decided(measurements), strict=True):
        state = bank.step(state, m, decision.statistics)
        rows.append(state.features)
    return rows


def content(**changes: object) -> dict[str, object]:
    """A logistic predictor that looks at the learning rate's rise alone: p = 1/2 where it is 0.4."""
    coefficients = [0.0] * len(FEATURES)
    coefficients[RATE_RISE] = 10.0
    return {
        "kind": "logistic",
        "features": list(FEATURES),
        "horizon": 20,
        "harm": 0.2,
        "threshold": 0.5,
        "false_alarms_per_1000": 0.1,
        "typical": [0.0] * len(FEATURES),
        "intercept": -4.0,
        "coefficients": coefficients,
        **changes,
    }


def made(**changes: object) -> FailurePredictor:
    return FailurePredictor(PredictorFile(**content(**changes)), statistics=STATISTICS)  # type: ignore[arg-type]


# -- features ---------------------------------------------------------------------------------------------------------


def test_features_are_the_same_in_any_unit() -> None:
    """Powers of two scale without rounding, so what is left is the engine's absolute floors: none is met here."""
    one = np.array(features_of(stream(harm_at=100)))
    other = np.array(features_of(stream(unit=2.0**10, harm_at=100)))
    assert np.abs(one).max() > 1.0
    np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9)


def test_a_mean_is_the_exponential_mean_of_all_steps_before() -> None:
    measurements = stream(steps=60)
    z = np.arcsinh([dict(zip(STATISTICS, d.statistics, strict=True))["z_gradient"] for d in decided(measurements)])
    weights = 0.25 * 0.75 ** np.arange(60)[::-1]
    features = dict(zip(FEATURES, features_of(measurements)[-1], strict=True))
    assert features["gradient innovation, mean of 4 steps"] == pytest.approx(float(weights @ z), rel=1e-9)
    peaks = np.maximum(z, 0.0) * 0.95 ** np.arange(60)[::-1]
    assert features["gradient innovation, peak"] == pytest.approx(float(peaks.max()), rel=1e-9)


def test_nothing_of_a_later_step_enters() -> None:
    short, long = features_of(stream(steps=60)), features_of(stream(steps=80, harm_at=61))
    assert short == long[:60]


def test_the_certified_range_follows_a_slow_schedule_and_not_a_jump() -> None:
    bank = FeatureBank(STATISTICS)
    nothing = (math.nan,) * len(STATISTICS)

    def risen(rates: list[float]) -> float:
        state = FeatureState()
        for step, rate in enumerate(rates, start=1):
            state = bank.step(state, Measurement(step=step, learning_rates=(rate,)), nothing)
        return state.fast[INPUTS.index("learning rate over its certified range")]

    assert risen([0.1] * 40 + [0.1 * 1.009**n for n in range(60)]) < 0.01
    assert risen([0.1] * 40 + [0.01] * 20 + [0.1] * 20) == 0.0
    assert risen([0.1] * 40 + [1.0] * 10) > 1.5


@given(
    st.lists(
        st.tuples(st.floats(width=64), st.floats(width=64), st.lists(st.floats(width=64), min_size=23, max_size=23)),
        max_size=40,
    )
)
def test_no_number_at_all_makes_features_that_are_not_finite(
    steps: list[tuple[float, float, list[float]]],
) -> None:
    bank, state = FeatureBank(STATISTICS), FeatureState()
    for step, (loss, norm, statistics) in enumerate(steps, start=1):
        m = Measurement(step=step, loss=loss, learning_rates=(norm,), gradient_norm=norm)
        state = bank.step(state, m, statistics[: len(STATISTICS)])
    assert all(map(math.isfinite, state.features))


def test_the_statistics_are_found_by_name_and_missed_by_name() -> None:
    measurements = stream(steps=40)
    turned = FeatureBank(STATISTICS[::-1])
    state = FeatureState()
    for m, decision in zip(measurements, decided(measurements), strict=True):
        state = turned.step(state, m, decision.statistics[::-1])
    assert state.features == features_of(measurements)[-1]
    with pytest.raises(ConfigurationError, match="z_loss"):
        FeatureBank([name for name in STATISTICS if name != "z_loss"])


# -- classifiers ------------------------------------------------------------------------------------------------------


def labelled() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(600, len(FEATURES)))
    return x, (x[:, 0] * x[:, 1] + x[:, 2] + 0.3 * rng.normal(size=600)) > 0.5


@pytest.mark.parametrize("kind", ["logistic", "boosting"])
def test_probabilities_are_those_of_scikit_learn(kind: str, tmp_path: Path) -> None:
    x, y = labelled()
    model = (
        make_pipeline(StandardScaler(), LogisticRegression())
        if kind == "logistic"
        else HistGradientBoostingClassifier(max_iter=20, max_leaf_nodes=8, early_stopping=False)
    ).fit(x, y)
    fitted = Fitted(kind, model, float(y.mean()), threshold=1.0)
    path = tmp_path / "own.json"
    path.write_text(to_file(fitted, [_run(x)], 20, {"runs": 1}).dump(), encoding="utf-8")
    file = read_predictor(path)
    fresh = np.random.default_rng(1).normal(size=(400, len(FEATURES)))
    fresh[:50] = x[:50]  # rows that lie on the trees' own thresholds
    ours = [probability(file.classifier().log_odds(row.tolist())) for row in fresh]
    np.testing.assert_allclose(ours, model.predict_proba(fresh)[:, 1], rtol=1e-9, atol=1e-12)
    assert file.threshold == pytest.approx(probability(1.0), rel=1e-12)


def _run(x: np.ndarray) -> Run:
    flags = np.ones(len(x), bool)
    return Run(
        case=Case(plant="mlp", seed=0, steps=len(x)), features=x, usable=flags, healthy=flags, failure=None,
        suspected=~flags, confirmed=~flags,
    )  # fmt: skip


def test_probability_saturates_without_overflow() -> None:
    assert probability(0.0) == 0.5
    assert probability(2.0) == pytest.approx(1.0 - probability(-2.0))
    assert (probability(-5e3), probability(5e3)) == (0.0, 1.0)


def test_trees_that_are_none_are_refused() -> None:
    leaf = Node(-1, 0.0, 0, 0, 1.0)
    for root in (Node(0, 0.0, 0, 1, 0.0), Node(0, 0.0, 1, 9, 0.0), Node(7, 0.0, 1, 2, 0.0), Node(-2, 0.0, 1, 2, 0.0)):
        with pytest.raises(ConfigurationError, match="Node 0"):
            TreeClassifier(intercept=0.0, trees=[[root, leaf, leaf]], features=3)
    with pytest.raises(ConfigurationError, match="empty"):
        TreeClassifier(intercept=0.0, trees=[[]], features=3)


# -- files ------------------------------------------------------------------------------------------------------------


def test_a_file_comes_back_as_it_was_written(tmp_path: Path) -> None:
    file = PredictorFile(**content())  # type: ignore[arg-type]
    path = tmp_path / "own.json"
    path.write_text(file.dump(), encoding="utf-8")
    assert read_predictor(path) == file


def test_an_edited_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_text(PredictorFile(**content()).dump().replace('"intercept":-4.0', '"intercept":-5.0'), encoding="utf-8")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="digest"):
        read_predictor(path)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"features": [*FEATURES[1:], FEATURES[0]]}, "other features"),
        ({"coefficients": [0.0]}, "coefficients"),
        ({"typical": []}, "typical"),
        ({"kind": "trees"}, "trees"),
        ({"threshold": 1.5}, "threshold"),
        ({"intercept": math.nan}, "intercept"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_what_is_no_predictor_is_refused(changes: dict[str, object], word: str, tmp_path: Path) -> None:
    from kalmanguard.detectors import predictor_file

    whole = {"format": 1, "trees": [], "trained_on": {}, **content(), **changes}
    whole["digest"] = predictor_file._digest(whole)
    path = tmp_path / "own.json"
    path.write_text(json.dumps(whole), encoding="utf-8")
    with pytest.raises(ConfigurationError, match=word):
        read_predictor(path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format":2}', "\x80"])
def test_other_files_are_refused_with_a_sentence(text: str, tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigurationError, match=r"own\.json"):
        read_predictor(path)
    with pytest.raises(ConfigurationError, match="cannot be read"):
        read_predictor(tmp_path / "none.json")


def test_names_of_shipped_predictors() -> None:
    assert read_predictor("default") == read_predictor("boosting")
    assert (read_predictor("boosting").kind, read_predictor("logistic").kind) == ("trees", "logistic")
    with pytest.raises(ConfigurationError, match="boosting, logistic"):
        read_predictor("oracle")


def test_the_shipped_ones_load_without_torch_and_say_when_they_are_missing() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from kalmanguard.detectors.predictor_file import read_predictor\n"
        "assert read_predictor('logistic').kind == 'logistic'\n"
        "import kalmanguard.detectors.predictor_file as f\n"
        "f._PACKAGE = 'kalmanguard.elsewhere'\n"
        "try: read_predictor('default')\n"
        "except f.ConfigurationError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "not installed" in done.stdout


def test_the_card_is_about_the_shipped_files() -> None:
    folder = Path(__file__).parent.parent / "models" / "predictor"
    card = (folder / "CARD.md").read_text(encoding="utf-8")
    for path in folder.glob("*.json"):
        assert json.loads(path.read_text(encoding="utf-8"))["digest"] in card


# -- the predictor ----------------------------------------------------------------------------------------------------


def test_a_learning_rate_that_creeps_is_forecast_and_named() -> None:
    predictor, state, fired = made(), PredictorState(), []
    measurements = stream(harm_at=90)
    for m, decision in zip(measurements, decided(measurements), strict=True):
        before = state
        state, forecast = predictor.step(before, m, decision)
        again = predictor.step(before, m, decision)
        assert again[0] == state
        if forecast.fired:
            fired.append(m.step)
            assert forecast.evidence is not None
            assert forecast.probability >= predictor.threshold
            assert forecast.evidence.guarantee is Guarantee.HEURISTIC
            assert "learning rate over its certified range" in forecast.evidence.message
        else:
            assert forecast.evidence is None
    # 4 % a step net of what the range follows: 0.4 after ten steps, a little later in the mean of four.
    assert 98 <= fired[0] <= 106
    assert np.diff(fired).tolist() == [predictor.horizon] * (len(fired) - 1)


def test_it_abstains_while_it_knows_too_little_and_starts_anew_with_an_objective() -> None:
    predictor, state = made(intercept=9.0), PredictorState()
    probabilities = []
    for m in stream(steps=100):
        level = Level.WARMUP if m.step <= 50 else Level.NOMINAL
        m = Measurement(step=m.step, loss=m.loss, learning_rates=m.learning_rates, objective=int(m.step > 60))
        decision = Decision(
            m.step, Action.ACCEPT, Action.ACCEPT, level, Mode.WATCHING, "", statistics=(math.nan,) * len(STATISTICS)
        )
        state, forecast = predictor.step(state, m, decision)
        probabilities.append(forecast.probability)
    known = [step for step, p in enumerate(probabilities, start=1) if not math.isnan(p)]
    assert known == [*range(51, 61), *range(90, 101)]


def test_an_unsupervised_step_changes_no_feature() -> None:
    predictor = made()
    decision = Decision(1, Action.ACCEPT, Action.ACCEPT, Level.WARMUP, Mode.WATCHING, "")
    state, forecast = predictor.step(predictor.init(), Measurement(step=1, loss=math.inf), decision)
    assert state.features == FeatureState()
    assert math.isnan(forecast.probability)


def test_a_contribution_of_a_logistic_predictor_is_its_term() -> None:
    predictor = made(typical=[0.1] * len(FEATURES))
    features = np.random.default_rng(0).normal(size=len(FEATURES))
    terms = np.array(content()["coefficients"]) * (features - 0.1)
    np.testing.assert_allclose(predictor.contributions(features.tolist()), terms, atol=1e-12)


# -- what the benchmark measures with ---------------------------------------------------------------------------------


def test_every_case_is_a_run_of_its_own() -> None:
    cases = corpus(seeds=2, plants=["mlp", "cnn", "chartransformer"])
    assert len({case.key for case in cases}) == len(cases)
    assert len({(case.plant, case.options, case.seed) for case in cases}) == len(cases)
    for case in cases:
        assert FaultInjector.parse(case.faults, seed=0) is not None
        assert case.at == 0 if not case.kind else case.at == 1 if case.kind == HOT else 100 <= case.at < case.steps


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    kind, notation = DEVELOPING[2]
    case = Case(plant="mlp", options=(("optimizer", "sgd"),), seed=7, steps=200, kind=kind, notation=notation)
    folder = tmp_path_factory.mktemp("corpus")
    trace = record(case, folder)
    [file] = folder.iterdir()
    written = file.stat().st_mtime_ns
    np.testing.assert_array_equal(record(case, folder).rows, trace.rows)
    assert file.stat().st_mtime_ns == written
    assert trace.rows.shape == (200, len(COLUMNS))
    return trace


def test_a_run_is_labelled_before_its_failure_and_not_before_its_cause(failing: Trace) -> None:
    run = prepare(failing)
    assert run is not None
    assert run.failure is not None
    at, failure, truth = run.case.at, run.failure, failing.column("truth")
    assert at < failure
    best = min(failing.start, truth[:failure].min())
    assert not truth[failure - 1] - best <= 0.2 * (failing.start - best)
    assert run.group == "developing"
    assert not run.usable[failure - 1 :].any()
    assert not run.healthy[at - 1 :].any()
    sample, ahead = run.labels(horizon=200)
    assert not sample[: at - 1].any()  # each of them has the failure within 200 steps, and no cause of it yet
    assert ahead[at - 1 : failure - 1].all()
    sample, ahead = run.labels(horizon=5)
    assert np.flatnonzero(ahead & sample).tolist() == list(range(max(at, failure - 5) - 1, failure - 1))


@pytest.mark.parametrize("name", ["logistic", "boosting"])
def test_the_shipped_predictors_foretell_a_creeping_learning_rate(failing: Trace, name: str) -> None:
    run = prepare(failing)
    assert run is not None
    assert run.failure is not None
    file = read_predictor(name)
    classifier = file.classifier()
    scores = np.array([classifier.log_odds(row) for row in run.features.tolist()])
    fired = firings(run, scores, math.log(file.threshold / (1.0 - file.threshold)), file.horizon)
    assert run.case.at <= fired[0] < run.failure


def test_folds_share_no_run_and_cover_all() -> None:
    runs = [_run(np.zeros((1, len(FEATURES)))) for _ in range(23)]
    folds = folds_of(runs, 5)
    assert sorted(id(run) for _, test in folds for run in test) == sorted(map(id, runs))
    for training, test in folds:
        assert not {id(run) for run in training} & {id(run) for run in test}
        assert len(training) + len(test) == 23


def test_a_threshold_is_the_lowest_that_keeps_the_rate() -> None:
    rng = np.random.default_rng(0)
    runs = [_run(np.zeros((2_000, len(FEATURES)))) for _ in range(20)]
    scores = [rng.normal(size=2_000) for _ in runs]
    threshold = choose_threshold(runs, scores, horizon=50)
    healthy = np.sort(np.concatenate(scores))
    lower = float(healthy[np.searchsorted(healthy, threshold) - 1])
    assert false_alarms(runs, scores, threshold, 50) == 4  # 0.1 of 40 thousand steps
    assert false_alarms(runs, scores, lower, 50) == 5


def test_it_fires_again_only_after_the_horizon() -> None:
    run = _run(np.zeros((100, len(FEATURES))))
    assert firings(run, np.where(np.arange(100) >= 10, 1.0, -1.0), 0.0, horizon=40) == [11, 51, 91]


def test_the_logistic_classifier_is_exactly_rounded() -> None:
    assert LogisticClassifier(intercept=1.0, coefficients=(1e16, 1.0, -1e16)).log_odds((1.0, 1.0, 1.0)) == 2.0
