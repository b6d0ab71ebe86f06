"""Whole analyses: health, what-if, sweeps, comparison, the page, the commands. On logs of real training.

Oracles: the live run's own journal; hand-made logs whose history is known.
"""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import torch
from scipy.stats import binom
from typer.testing import CliRunner

from kalmanguard import ConfigurationError, FaultInjector, Settings, Supervisor
from kalmanguard.analysis import Trajectory, analyze, compare, grid, sweep, whatif, write_report
from kalmanguard.analysis.analysis import Analyses, in_order
from kalmanguard.analysis.figures import draw, plot_losses
from kalmanguard.analysis.health import Health
from kalmanguard.cli.app import app
from kalmanguard.models import load_plant

mpl.use("agg")


def course(seed: int = 0, rows: int = 800, *, at: int | None = None, by: float = 0.0, lasting: int = 1) -> np.ndarray:
    rng, n = np.random.default_rng(seed), np.arange(rows)
    loss = 2.0 + 2.0 * np.exp(-n / 200) + 0.05 * rng.normal(size=rows)
    if at is not None:
        loss[at : at + lasting] += by
    return loss


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("supervised")
    plant = load_plant("mlp")(seed=2, steps=200)
    torch.manual_seed(2)
    faults = FaultInjector.parse(("lr_spike:50@120:steps=5",))
    with (
        Supervisor(plant.model, plant.probe_loader, optimizer=plant.optimizer, run_dir=folder) as supervisor,
        faults.attach(plant.model, plant.optimizer),
    ):
        for _ in range(200):
            supervisor.update(plant.train_step(faults.draw(next(plant.loader))))
        assert supervisor.statistics()["rollbacks"] >= 1
    return folder


# --- health -----------------------------------------------------------------------------------------------------------


def test_health_of_known_histories() -> None:
    def health(loss: np.ndarray) -> Health:
        return analyze(Trajectory.from_arrays(loss=loss), estimate=False).verdict.health

    assert health(course()) is Health.HEALTHY
    assert health(course(at=500, by=1.5, lasting=100)) is Health.WATCH
    assert health(course(at=500, by=1.0, lasting=300)) is Health.HARMED
    assert health(course(at=700, by=np.nan, lasting=100)) is Health.DIVERGED
    assert health(course(at=600, by=5.0, lasting=200)) is Health.DIVERGED
    assert health(course(rows=12)) is Health.UNKNOWN
    assert health(np.full(400, 2.3) + 0.05 * np.random.default_rng(0).normal(size=400)) is Health.WATCH  # no progress
    high = course()
    high[5:] = 1e6 * (1.0 + 0.1 * np.abs(np.random.default_rng(1).normal(size=795)))  # too high a rate from the start
    assert health(high) is Health.DIVERGED


def test_overfitting_is_watched_and_not_harm() -> None:
    n = np.arange(2000)
    rng = np.random.default_rng(1)
    train = 0.2 + 2.0 * np.exp(-n / 300) + 0.02 * rng.normal(size=2000)
    probe = np.full(2000, np.nan)
    probe[::20] = (
        0.6 + 1.6 * np.exp(-n[::20] / 300) + 4e-4 * np.maximum(0, n[::20] - 900) + 0.004 * rng.normal(size=100)
    )
    steps = n + 1
    logged = ~np.isnan(probe)
    trajectory = Trajectory.from_arrays(steps, loss=train, probe=(steps[logged], probe[logged]))
    result = analyze(trajectory, estimate=False)
    assert any("overfitting" in event.detectors for event in result.judgement.events)
    assert result.judgement.confirmed == 0
    assert any("stop early" in line for line in result.verdict.advice)


def test_runs_are_put_in_order_of_their_state() -> None:
    runs = [
        analyze(Trajectory.from_arrays(loss=loss, name=name), estimate=False)
        for name, loss in (("fine", course()), ("lost", course(at=500, by=1.0, lasting=300)), ("short", course(rows=9)))
    ]
    assert [one.name for one in in_order(runs).runs] == ["lost", "fine", "short"]
    assert in_order(runs).health is Health.HARMED


# --- what if ----------------------------------------------------------------------------------------------------------


def test_equal_settings_change_nothing_and_others_say_what() -> None:
    trajectory = Trajectory.from_arrays(loss=course(at=500, by=0.6))
    assert whatif(trajectory, {}).changes == ()
    change = whatif(trajectory, {"suspicion": 25.0})
    assert change.settings_changed == {"suspicion": (6.5, 25.0)}
    assert [(c.step, c.before, c.after) for c in change.changes] == [(501, "SUSPECT", "")]


def test_a_journal_is_held_against_its_own_settings(run: Path) -> None:
    trajectory = Trajectory.load(run)
    same = whatif(trajectory, {})
    assert same.before.confirmed >= 1
    assert same.changes == ()
    early = whatif(trajectory, {"suspicion": 2.0})
    assert early.after.suspected > early.before.suspected
    assert early.settings_changed == {"suspicion": (6.5, 2.0)}


def test_a_sweep_in_processes_equals_one_in_this(run: Path) -> None:
    trajectories = [Trajectory.load(run), Trajectory.from_arrays(loss=course(at=300, by=0.5), name="log")]
    variants = grid(suspicion=[5.0, 8.0], give_back=[0.1, 0.3])
    here = sweep(trajectories, variants, processes=1)
    there = sweep(trajectories, variants, processes=2)
    assert [row[:8] for row in here.rows] == [row[:8] for row in there.rows]
    assert len(here.rows) == 8
    assert "suspicion=5.0, give_back=0.1" in str(here)


def test_sweeps_that_cannot_be_are_refused() -> None:
    trajectory = Trajectory.from_arrays(loss=course())
    with pytest.raises(ConfigurationError, match="0 variants"):
        sweep(trajectory, {})
    with pytest.raises(ConfigurationError, match="processes = 0"):
        sweep(trajectory, {"a": {}}, processes=0)
    with pytest.raises(ConfigurationError, match="no setting 'suspicoin'"):
        whatif(trajectory, {"suspicoin": 3.0})


def test_thousands_of_rows_a_second() -> None:
    """A floor that no machine misses; the figure itself is measured by ``python -m benchmarks offline``."""
    row = sweep(Trajectory.from_arrays(loss=course(rows=4000)), {"usual": {}}, processes=1).rows[0]
    assert row.rows_per_s > 1_000


# --- comparison -------------------------------------------------------------------------------------------------------


def test_intervals_of_differences_cover() -> None:
    """The second run ends 5 % above the first: its interval covers that in about 95 % of the cases."""
    covered = 0
    for seed in range(40):
        runs = [
            analyze(Trajectory.from_arrays(loss=factor * course(seed=2 * seed + k, rows=1000)), estimate=False)
            for k, factor in enumerate((1.0, 1.05))
        ]
        _, low, high = compare(runs).rows[1].difference
        covered += low <= 0.05 <= high
    assert covered >= binom.ppf(0.001, 40, 0.95)


def test_the_target_is_what_every_run_reaches() -> None:
    runs = [
        analyze(Trajectory.from_arrays(loss=course(), name="a"), estimate=False),
        analyze(Trajectory.from_arrays(loss=course() + 0.5, name="b"), estimate=False),
    ]
    comparison = compare(runs)
    assert comparison.target == pytest.approx(float((course() + 0.5).min()))
    a, b = comparison.rows
    assert a.reached is not None
    assert b.reached is not None
    assert a.reached < b.reached
    assert comparison.plot().get_ylabel() == "training loss"
    with pytest.raises(ConfigurationError, match="two or more"):
        compare(runs[:1])


# --- pictures and pages -----------------------------------------------------------------------------------------------


class _Page(HTMLParser):
    """Collects what a browser would fetch, and checks that tags are closed in order."""

    VOID = ("meta", "br", "img", "link", "input")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        self.fetched += [v for k, v in attributes if k in ("src", "href", "xlink:href") and v and not v.startswith("#")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_runs_nothing(tmp_path: Path, run: Path) -> None:
    evil = '<script>alert(1)</script>"&'
    runs = [
        analyze(Trajectory.load(run)),
        analyze(Trajectory.from_arrays(loss=course(at=500, by=1.0, lasting=300), name=evil)),
        analyze(Trajectory.from_arrays(loss=course(at=700, by=np.nan, lasting=100), name="gone")),
    ]
    written = write_report(in_order(runs), tmp_path / "page.html")
    text = written.read_text(encoding="utf-8")
    page = _Page()
    page.feed(text)
    assert page.open == []
    assert page.fetched == []
    assert page.scripts == 0
    assert evil not in text
    assert text.count("<svg") >= 6  # a picture and a sparkline of every run
    assert "DIVERGED" in text
    assert "roll back to the state of step" in text
    assert text.count("<th>it did</th>") == 1  # of the journal; the others were not supervised
    assert text.count("<th>it would</th>") == 2


def test_a_report_never_writes_over_something_else(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    log.write_text("step,loss\n1,2.0\n", encoding="utf-8")
    result = analyze(Trajectory.from_arrays(loss=course()))
    with pytest.raises(ConfigurationError, match="is no report"):
        write_report(result, log)
    assert log.read_text(encoding="utf-8") == "step,loss\n1,2.0\n"
    page = write_report(result, tmp_path / "page.html")
    assert write_report(result, page) == page  # an older report is replaced
    with pytest.raises(ConfigurationError, match="cannot be written"):
        write_report(result, tmp_path / "nowhere" / "page.html")


def test_figures_take_and_return_axes() -> None:
    from matplotlib.figure import Figure

    result = analyze(Trajectory.from_arrays(loss=course(at=500, by=1.0)), estimate=False)
    axes = Figure().add_subplot()
    assert plot_losses(result.judgement, axes) is axes
    assert len(draw(result.judgement).axes) >= 3


# --- commands ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "metrics.csv"
    rows = [f"{10 * n},{y:.6f}" for n, y in enumerate(course(at=500, by=1.0, lasting=60), start=1)]
    path.write_text("\n".join(["step,train_loss", *rows]) + "\n", encoding="utf-8")
    return path


def test_analyze_prints_one_object(log: Path) -> None:
    done = CliRunner().invoke(app, ["analyze", str(log), "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["suspected"] + found["confirmed"] == len(found["events"]) > 0
    assert found["confirmed"] >= 1
    assert found["events"][0]["step"] == pytest.approx(5010, abs=10)
    assert found["runs"][0]["channels"]["loss"]["count"] == 800
    assert not list(log.parent.glob("*.html"))  # only where it is asked for


def test_analyze_tells_and_writes(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(log.parent)
    before = log.read_bytes()
    done = CliRunner().invoke(app, ["analyze", "metrics.csv"])
    assert done.exit_code == 0, done.output
    assert "What happened" in done.stdout
    assert "metrics.report.html" in done.stdout
    assert (log.parent / "metrics.report.html").exists()
    assert log.read_bytes() == before


def test_analyze_takes_columns_and_settings(tmp_path: Path) -> None:
    path = tmp_path / "odd.csv"
    rows = [f"{n},{y:.6f}" for n, y in enumerate(course(at=500, by=1.0), start=1)]
    path.write_text("\n".join(["tick,objective", *rows]) + "\n", encoding="utf-8")
    options = ["--column", "loss=objective", "--column", "step=tick", "--json"]
    found = json.loads(CliRunner().invoke(app, ["analyze", str(path), *options]).stdout)
    assert found["suspected"] >= 1
    quiet = tmp_path / "quiet.toml"
    quiet.write_text("suspicion = 60.0\n", encoding="utf-8")
    found = json.loads(CliRunner().invoke(app, ["analyze", str(path), *options, "--settings", str(quiet)]).stdout)
    assert found["suspected"] == 0


def test_compare_prints_a_table_and_an_object(log: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.csv"
    rows = [f"{10 * n},{y:.6f}" for n, y in enumerate(course(seed=5), start=1)]
    other.write_text("\n".join(["step,train_loss", *rows]) + "\n", encoding="utf-8")
    done = CliRunner().invoke(app, ["compare", str(log), str(other)])
    assert done.exit_code == 0, done.output
    assert "against" in done.stdout
    found = json.loads(CliRunner().invoke(app, ["compare", str(log), str(other), "--json"]).stdout)
    assert [row["name"] for row in found["runs"]] == ["metrics", "other"]


def test_what_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["analyze", str(tmp_path / "missing.csv")])
    assert done.exit_code == 2
    assert "Traceback" not in done.output
    assert re.search(r"missing\.csv", re.sub(r"\s", "", done.output))


def test_settings_that_are_unknown_stop_the_command(log: Path) -> None:
    done = CliRunner().invoke(app, ["analyze", str(log), "--settings", "bold"])
    assert done.exit_code == 2
    assert isinstance(Settings.preset("balanced"), Settings)
    assert isinstance(Analyses(()).health, Health)
