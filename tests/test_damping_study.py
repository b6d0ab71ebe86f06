"""The damping study against closed forms, torch, statsmodels and hand computations; chosen thresholds on fresh runs."""

from __future__ import annotations

import cmath
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from statsmodels.stats.proportion import proportion_confint
from typer.testing import CliRunner

from kalmanguard.analysis.study.cases import (
    CHANGE,
    MOMENTA,
    SCENARIOS,
    EstimatorCase,
    LinearCase,
    Result,
    SpacingCase,
)
from kalmanguard.analysis.study.curves import (
    binomial_share,
    detection,
    false_alarms,
    first_alarm,
    poisson_rate,
    threshold_at,
)
from kalmanguard.analysis.study.damping import FILE_NAME, cases, sweep
from kalmanguard.analysis.study.detectors import (
    CALIBRATED,
    FAMILIES,
    FIRST,
    RULES,
    START,
    WINDOWED,
    against_past,
    blocks_of,
    read,
    records,
)
from kalmanguard.analysis.study.estimators import ESTIMATORS, oscillator
from kalmanguard.analysis.study.linear import System, heavy_ball_poles, pole_damping, stationary_jerk_ratio
from kalmanguard.analysis.study.plants import RECIPES, PlantCase, Point, harmed_at
from kalmanguard.analysis.study.report import write_page
from kalmanguard.analysis.study.sections import SECTIONS
from kalmanguard.cli.app import app
from kalmanguard.detectors.damping import DampingStatus, damping, jerk_ratio
from kalmanguard.errors import ConfigurationError
from kalmanguard.estimators.autocovariance import BLOCK, BLOCKS, total
from kalmanguard.records import FloatArray

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "research" / "damping.md"


# --- the simulator ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", MOMENTA)
def test_the_simulator_does_what_sgd_does_also_when_the_learning_rate_changes(momentum: float) -> None:
    curvatures = torch.tensor([3.0, 1.0, 0.1], dtype=torch.float64)
    system = System(curvatures=tuple(curvatures.tolist()), momentum=momentum, noise=0.0)
    rates = np.concatenate([np.full(30, 0.2), np.linspace(0.2, 0.7, 30)])
    x = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = torch.optim.SGD([x], lr=0.2, momentum=momentum)
    losses, velocities = [], []
    for rate in rates:
        optimizer.param_groups[0]["lr"] = float(rate)
        optimizer.zero_grad()
        (0.5 * (curvatures * x * x).sum()).backward()
        before = x.detach().clone()
        optimizer.step()
        velocities.append(((x.detach() - before) / rate).numpy())
        losses.append(float(0.5 * (curvatures * x * x).sum().detach()))
    run = system.simulate(rates, seed=0)
    np.testing.assert_allclose(run.losses, losses, rtol=1e-9)
    np.testing.assert_allclose(run.velocities, velocities, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("momentum", "share"), [(0.0, 0.3), (0.5, 0.95), (0.9, 0.1), (0.99, 0.6)])
def test_without_noise_a_mode_follows_its_poles(momentum: float, share: float) -> None:
    system = System(curvatures=(2.0,), momentum=momentum, noise=0.0)
    run = system.simulate(np.full(40, share * system.limit), seed=0)
    first, second = heavy_ball_poles(share * system.limit * 2.0, momentum)
    assert abs(first) < 1.0
    # x_t = a first^t + b second^t from x_0 = 1 and x_-1 = 1, since the buffer starts at zero.
    a, b = np.linalg.solve([[1.0, 1.0], [1 / first, 1 / second if second else 0.0]], [1.0, 1.0]) if second else (1.0, 0)
    x = np.array([a * first**t + b * second**t for t in range(1, 41)])
    np.testing.assert_allclose(run.losses, (x * x).real, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("momentum", MOMENTA)
def test_the_bound_of_stability_is_where_the_theorem_says(momentum: float) -> None:
    system = System(curvatures=(1.0, 0.5), momentum=momentum, noise=0.0)
    below = system.simulate(np.full(4_000, 0.99 * system.limit), seed=0).losses
    above = system.simulate(np.full(4_000, 1.01 * system.limit), seed=0).losses
    assert below[-1] < 1e-3 * below[:100].max()
    assert above[-1] > 1e3 * above[0]
    for share in (0.99, 1.01):
        z = heavy_ball_poles(share * system.limit, momentum)[0]
        assert (abs(z) > 1.0) == (share > 1.0) == (pole_damping(z)[0] < 0.0)


@pytest.mark.parametrize(("momentum", "share"), [(0.0, 0.5), (0.5, 0.9), (0.9, 0.1), (0.99, 0.05)])
def test_stationary_moments_are_those_of_the_closed_forms(momentum: float, share: float) -> None:
    system = System(curvatures=(1.0,) * 64, momentum=momentum, noise=2.0)
    rate = share * system.limit
    velocities = system.simulate(np.full(6_000, rate), seed=1).velocities[2_000:]
    assert (velocities**2).sum(1).mean() == pytest.approx(system.velocity_power(rate), rel=0.06)
    assert jerk_ratio(total(blocks_of(velocities))) == pytest.approx(stationary_jerk_ratio(rate, momentum), rel=0.02)


@pytest.mark.parametrize("momentum", MOMENTA)
def test_the_jerk_ratio_begins_at_one_pole_and_ends_at_two(momentum: float) -> None:
    assert stationary_jerk_ratio(0.0, momentum) == pytest.approx(math.sqrt(3.0 - momentum))
    assert stationary_jerk_ratio(2.0 * (1.0 + momentum), momentum) == pytest.approx(2.0)


def test_a_simulation_that_grows_beyond_numbers_ends() -> None:
    run = System(curvatures=(1.0,), momentum=0.0, noise=0.0).simulate(np.full(500, 12.0), seed=0)
    assert len(run.losses) == len(run.velocities) < 100
    assert np.isfinite(run.losses).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"curvatures": (1.0, 2.0)}, "the largest first"),
        ({"curvatures": ()}, "the largest first"),
        ({"momentum": 1.0}, "below 1"),
        ({"noise": -1.0}, "not negative"),
    ],
)
def test_what_is_no_system_is_refused(options: dict[str, object], message: str) -> None:
    arguments = {"curvatures": (1.0,), "momentum": 0.5, "noise": 1.0} | options
    with pytest.raises(ConfigurationError, match=message):
        System(**arguments)  # type: ignore[arg-type]


def test_nothing_is_stationary_beyond_the_bound() -> None:
    with pytest.raises(ConfigurationError, match="not below the limit"):
        System(curvatures=(1.0,), momentum=0.0, noise=1.0).velocity_power(2.0)


# --- families ---------------------------------------------------------------------------------------------------------


def noise_driven(share: float, *, momentum: float, seed: int, steps: int = START + BLOCK, k: int = 32) -> FloatArray:
    system = System(curvatures=(1.0,) * k, momentum=momentum, noise=1.0)
    return system.simulate(np.full(steps, share * system.limit), seed=seed).velocities


def test_statistics_of_a_window_are_what_numpy_computes() -> None:
    v = noise_driven(0.3, momentum=0.9, seed=3)
    readings = read(v)
    assert readings.steps == (START, START + BLOCK)
    for index, end in enumerate(readings.steps):
        t = np.arange(end - BLOCKS * BLOCK, end)
        a, j = v[t] - v[t - 1], v[t] - 2 * v[t - 1] + v[t - 2]
        assert readings.values["jerk ratio"][index] == pytest.approx(math.sqrt((j**2).sum() / (a**2).sum()))
        cosine = (v[t] * v[t - 1]).sum() / (v[t] ** 2).sum()
        assert readings.values["alternation"][index] == pytest.approx(-cosine)
        y = np.array([(v[t] * v[t - 3]).sum(), (v[t] * v[t - 4]).sum()])
        M = np.array([[(v[t - 1 - i] * v[t - h]).sum() for i in (0, 1)] for h in (3, 4)])
        phi = np.linalg.solve(M, y)
        z = max(np.roots([1.0, -phi[0], -phi[1]]), key=abs)
        assert readings.values["pole, estimate"][index] == pytest.approx(abs(z))
        zeta = -math.log(abs(z)) / abs(cmath.log(complex(z)))
        assert readings.values["damping ratio, estimate"][index] == pytest.approx(-zeta)


def test_lengths_are_held_against_their_past() -> None:
    v = np.random.default_rng(0).normal(size=(START + 2 * BLOCK, 16))
    v[START:] *= 3.0
    blocks = [v[6 + i * BLOCK : 6 + (i + 1) * BLOCK] for i in range(FIRST + 2)]
    logs = [0.5 * math.log((block**2).sum() / BLOCK) for block in blocks]
    readings = read(v).values[CALIBRATED[1]]
    assert readings == pytest.approx(against_past(logs)[FIRST - 1 :])
    assert abs(readings[0]) < 4.0 < 10.0 < readings[1]


def test_one_family_holds_the_three_gates_on_the_modulus() -> None:
    """The score and the supervisor's status agree window by window, and zeta below zero is |z| above one."""
    critical = 0
    for seed in range(30):
        v = noise_driven(0.97 + 0.002 * seed, momentum=0.0, seed=seed, k=8)
        blocks = blocks_of(v)[FIRST - BLOCKS : FIRST]
        score = WINDOWED["pole, standard errors"](blocks)
        status = damping(blocks).status
        assert (score >= 2.5) == (status is DampingStatus.CRITICAL)
        assert not (score < -2.5) or status in (DampingStatus.STABLE, DampingStatus.UNKNOWN)
        assert (WINDOWED["pole, estimate"](blocks) >= 1.0) == (score >= 0.0)
        bound = WINDOWED["damping ratio, upper bound"](blocks)
        assert (bound > 0.0) == (score > 2.5)
        critical += status is DampingStatus.CRITICAL
    assert 5 <= critical <= 25, "both sides must have been seen"


def test_records_find_the_first_alarm_of_any_threshold() -> None:
    rng = np.random.default_rng(5)
    values = rng.normal(size=200).cumsum()
    values[3] = math.nan
    steps = range(16, 16 * 201, 16)
    run = {"records": {"x": records(steps, values.tolist())}}
    for threshold in np.linspace(-20.0, 20.0, 81):
        first = next((step for step, value in zip(steps, values, strict=True) if value >= threshold), None)
        assert first_alarm(run, "x", float(threshold)) == first


def test_every_rule_is_of_a_family_that_is_read() -> None:
    readings = read(noise_driven(0.5, momentum=0.0, seed=0))
    assert set(readings.values) == set(FAMILIES)
    assert {rule.family for rule in RULES} <= set(FAMILIES)
    assert len({rule.name for rule in RULES}) == len(RULES)


# --- rates ------------------------------------------------------------------------------------------------------------


def test_intervals_are_the_exact_ones() -> None:
    low, high = proportion_confint(3, 20, method="beta")
    share = binomial_share(3, 20)
    assert (share.low, share.high) == pytest.approx((low, high))
    rate = poisson_rate(4, 2_000)
    # Garwood's bounds for 4 events: 1.0899 to 10.2416.
    assert (rate.low, rate.per_1000, rate.high) == pytest.approx((1.0899 / 2, 2.0, 10.2416 / 2), rel=1e-4)
    with pytest.raises(ConfigurationError, match="no rate"):
        poisson_rate(0, 0)


def white(seed: int) -> Result:
    """A stable run: velocities without memory."""
    readings = read(np.random.default_rng(seed).normal(size=(START + 40 * BLOCK, 8)))
    found = {family: records(readings.steps, readings.values[family]) for family in FAMILIES}
    return {"steps": START + 40 * BLOCK, "records": found}


def test_a_chosen_threshold_keeps_its_rate_on_fresh_runs() -> None:
    design, fresh = [white(seed) for seed in range(40)], [white(seed) for seed in range(1000, 1040)]
    for family in ("jerk ratio", "pole, standard errors", *CALIBRATED):
        threshold = threshold_at(design, family, per_1000=0.5)
        chosen, found = false_alarms(design, family, threshold), false_alarms(fresh, family, threshold)
        assert 0.2 < chosen.per_1000 <= 0.5
        # Two Poisson counts of one rate: given their sum, each is binomial.
        share = found.steps / (found.steps + chosen.steps)
        assert binomtest(found.alarms, found.alarms + chosen.alarms, share).pvalue > 1e-3, family
        lower = max(v for run in design for _, v in run["records"][family] if v < threshold)
        assert false_alarms(design, family, lower).per_1000 > 0.5, "the least one was asked for"


def test_a_crossing_is_detected_and_alarms_before_the_change_are_not_counted_for_it() -> None:
    runs = [
        LinearCase(
            momentum=0.0, spectrum="flat", noise="gradient noise", scenario="just over", seed=seed, steps=CHANGE + 256
        ).run()
        for seed in range(6)
    ]  # fmt: skip
    found = detection(runs, "pole, standard errors", 2.5)
    assert found.seen.hits == found.seen.of == 6
    assert 0 < found.delay <= 128
    blind = detection(runs, "jerk ratio", 0.707)
    assert blind.early.hits == 6
    assert math.isnan(blind.delay)
    for run in runs:
        assert run["crossing"] == CHANGE < run["harm"]


def test_a_creeping_rate_crosses_the_bound_where_its_share_reaches_one() -> None:
    for scenario in SCENARIOS.values():
        shares = scenario.shares(1_000)
        above = np.flatnonzero(shares >= 1.0 - 1e-12)
        assert scenario.crossing == (int(above[0]) if above.size else None)


def test_even_spacing_hides_the_alternation_of_a_system_near_its_bound() -> None:
    found = {m: SpacingCase(momentum=0.0, share=0.98, spacing=m, seeds=6).run() for m in (1, 2, 3, 4)}
    cosines = {m: -float(np.median(result["alternation"])) for m, result in found.items()}
    assert max(cosines[1], cosines[3]) < -0.7
    assert min(cosines[2], cosines[4]) > -0.4


# --- estimators -------------------------------------------------------------------------------------------------------


def test_all_estimators_agree_without_reading_noise_and_least_squares_fails_with_it() -> None:
    clean = EstimatorCase(zeta=0.2, frequency=0.5, steps=1_024, snr=math.inf, seeds=6).run()
    noisy = EstimatorCase(zeta=0.2, frequency=0.5, steps=1_024, snr=10.0, seeds=6).run()
    for name in ESTIMATORS:
        assert np.median(clean[name]["zeta"]) == pytest.approx(0.2, abs=0.05)
        assert np.median(clean[name]["frequency"]) == pytest.approx(0.5, abs=0.03)
    for name in ("least squares", "Burg"):
        assert min(noisy[name]["zeta"]) > 0.5
    for name in ("instruments", "maximum likelihood"):
        assert np.median(noisy[name]["zeta"]) == pytest.approx(0.2, abs=0.07)


def test_the_oscillator_has_the_signal_to_noise_ratio_that_was_asked_for() -> None:
    clean = oscillator(0.3, 0.6, steps=20_000, snr=math.inf, seed=1)
    noisy = oscillator(0.3, 0.6, steps=20_000, snr=4.0, seed=1)
    assert clean.var() / (noisy - clean).var() == pytest.approx(4.0, rel=0.1)
    with pytest.raises(ConfigurationError, match="between 0 and 1"):
        oscillator(1.0, 0.5, steps=10, snr=1.0, seed=0)


# --- real networks ----------------------------------------------------------------------------------------------------


def test_harm_is_a_fifth_of_the_progress_or_no_number() -> None:
    truth = [Point(0, 2.0), Point(10, 1.0), Point(20, 1.19), Point(30, 1.21), Point(40, 0.5)]
    assert harmed_at(truth, since=0) == 30
    assert harmed_at(truth, since=35) is None
    assert harmed_at([*truth, Point(50, math.nan)], since=35) == 50
    assert harmed_at([Point(0, 2.0), Point(10, math.inf)], since=5) == 10


@pytest.mark.slow
def test_a_plant_bears_its_recipe_and_not_fifty_times_its_learning_rate() -> None:
    calm = PlantCase(recipe="mlp, SGD", factor=1.0, seed=7, steps=400).run()
    broken = PlantCase(recipe="mlp, SGD", factor=50.0, seed=7, steps=400).run()
    assert calm["harm"] is None
    assert calm["change"] is None
    assert broken["harm"] is not None
    assert broken["harm"] > broken["change"] == CHANGE
    assert calm["condemned"]["jerk ratio > 1.414"] == calm["windows"] > 0
    assert set(RECIPES) >= {"mlp, SGD"}


# --- the sweep and its files ------------------------------------------------------------------------------------------


def tiny() -> list[LinearCase]:
    return [
        LinearCase(momentum=0.0, spectrum="one mode", noise="gradient noise", scenario=name, seed=0, steps=400)
        for name in ("half", "far over")
    ]


@pytest.mark.slow
def test_a_sweep_goes_on_where_it_stopped(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    first = sweep(tiny()[:1], folder=tmp_path, processes=1, progress=lambda *counts: None)
    with (tmp_path / FILE_NAME).open("a") as file:
        file.write('["killed while wri')
        file.write("\n" + json.dumps([repr(tiny()[1]), "other sources", {}]) + "\n")
    both = sweep(tiny(), folder=tmp_path, processes=1, progress=lambda done, of: seen.append((done, of)))
    assert seen == [(1, 2), (2, 2)]
    case = tiny()[0]
    assert json.dumps(both[case]) == json.dumps(first[case]) == json.dumps(case.run())
    assert both[tiny()[1]]["crossing"] == CHANGE
    text = (tmp_path / FILE_NAME).read_text()
    sweep(tiny(), folder=tmp_path, processes=1, progress=lambda *counts: None)
    assert (tmp_path / FILE_NAME).read_text() == text


def test_wrong_sizes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="at least one"):
        cases(seeds=0)
    with pytest.raises(ConfigurationError, match="at least one"):
        sweep(tiny(), folder=tmp_path, processes=0, progress=lambda *counts: None)


def test_all_cases_are_different_and_seeds_are_chosen_or_reported_never_both() -> None:
    for quick in (False, True):
        found = cases(seeds=3, quick=quick)
        assert len({repr(case) for case in found}) == len(found)
        seeds = {case.seed for case in found if isinstance(case, LinearCase | PlantCase)}
        assert min(seeds) == 0
        assert not any(5 <= seed < 100 for seed in seeds)


@pytest.mark.slow
def test_the_command_writes_data_figures_and_the_tables_of_a_page(tmp_path: Path) -> None:
    runner = CliRunner(env={"COLUMNS": "100", "TERM": "dumb"})
    page = tmp_path / "damping.md"
    markers = [f"<!-- {name} -->\nstale\n<!-- /{name} -->\n" for name in SECTIONS]
    page.write_text("before\n" + "\n".join(markers) + "after\n")
    out = tmp_path / "out"
    called = ["study", "damping", "--quick", "--out", str(out), "--processes", "2", "--write", str(page), "--json"]
    done = runner.invoke(app, called)
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    assert data["cases"] == len(cases(seeds=8, quick=True))
    assert {row["family"] for row in data["matched"]["matched-linear"]} == set(FAMILIES)
    assert all(Path(name).stat().st_size > 0 for name in data["files"])
    text = page.read_text()
    assert text.startswith("before")
    assert text.endswith("after\n")
    assert "stale" not in text
    assert text.count("| --- |") == len(SECTIONS)
    assert (page.with_suffix("") / "curves-linear.png").read_bytes().startswith(b"\x89PNG")
    again = runner.invoke(app, [*called[:5], "--seeds", "3", "--write", str(tmp_path / "none.md")])
    assert again.exit_code == 2
    assert "There is no page" in again.stderr


def test_help_names_the_exit_codes() -> None:
    done = CliRunner(env={"COLUMNS": "100", "TERM": "dumb"}).invoke(app, ["study", "damping", "--help"])
    assert done.exit_code == 0
    for words in ("Exit codes", "--quick", "--seeds", "--processes", "--json"):
        assert words in done.stdout


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_has_every_table_and_its_links_lead_somewhere() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for name in SECTIONS:
        section = text.partition(f"<!-- {name} -->")[2].partition(f"<!-- /{name} -->")[0]
        assert section.count("\n|") > 2, name
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    assert [target for target in targets if not (PAGE.parent / target).exists()] == []
    assert sum(file.stat().st_size for file in PAGE.with_suffix("").glob("*.csv")) < 500_000


def test_every_block_of_the_page_runs() -> None:
    found = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert found
    for number, block in enumerate(found, 1):
        exec(compile(block, f"{PAGE}, block {number}", "exec"), {"__name__": "__main__"})


def test_a_page_without_markers_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("nothing\n")
    with pytest.raises(ConfigurationError, match="has no lines"):
        write_page({}, [], page)
    assert page.read_text() == "nothing\n"
