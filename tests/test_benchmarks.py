"""The benchmarks' own machinery: what they measure with must be right, or their figures mean nothing."""

from __future__ import annotations

import json
import math

import pytest
import torch

from benchmarks.__main__ import BENCHMARKS, main
from benchmarks.flight import Flight, fly, give_back
from benchmarks.markdown import counts, insert, number, spread, table
from benchmarks.plants import RECIPES, Truth, fault_step, make_plant


@pytest.fixture(autouse=True)
def left_as_it_was(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_numbers_keep_their_digits_and_say_when_they_are_not_finite():
    assert [number(x) for x in (0.98765, 12.345, 1234.5, 0.00123, 0.0)] == ["0.988", "12.3", "1,234", "0.00123", "0"]
    assert number(None) == number(math.nan) == "∞"
    assert spread([1.0, 2.0, None]) == "2.00 / ∞"
    assert counts([3, 1, 2, 10]) == "2.5 / 10"
    assert table(["a", "b"], [["x", 1]]).splitlines() == ["| a | b |", "| --- | --: |", "| x | 1 |"]


def test_a_section_goes_between_its_markers_and_nowhere_else(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- cost -->\nold\n<!-- /cost -->\nafter\n")
    insert(page, "cost", "new")
    insert(page, "cost", "newer")
    assert page.read_text() == "before\n<!-- cost -->\n\nnewer\n\n<!-- /cost -->\nafter\n"
    with pytest.raises(SystemExit, match="healthy"):
        insert(page, "healthy", "new")


def test_give_back_is_the_lost_share_of_the_progress():
    truth = [[0, 3.0], [10, 1.0], [20, 1.5], [30, None]]
    assert [give_back(truth, t) for t in (0, 10, 20, 30)] == [0.0, 0.0, 0.25, math.inf]


def test_faults_come_at_primes_that_depend_on_plant_and_seed():
    steps = {fault_step(recipe, seed) for recipe in RECIPES for seed in range(5)}
    assert len(steps) > 10
    assert all(150 <= n <= 260 and all(n % d for d in range(2, n)) for n in steps)


def test_the_truth_is_measured_on_examples_that_are_not_probed():
    plant = make_plant("mlp", seed=0, steps=10)
    truth = Truth(plant)
    probed = torch.cat([inputs for inputs, _ in plant.probe_loader])[:128]
    seen = torch.cat([inputs for inputs, _ in truth._batches])
    assert len(seen) == 222
    assert not (seen[:, None] == probed[None]).all(-1).any()
    assert truth() == truth()


def test_updates_that_were_undone_are_counted_once():
    clean = fly(Flight(recipe="mlp", seed=0, steps=130))
    broken = fly(Flight(recipe="mlp", seed=0, steps=130, faults=("gradient_scale:1e4@107",), guard="z-score"))
    assert clean["lost"] == 0
    assert clean["events"] == []
    [event] = [event for event in broken["events"] if event["kind"] == "rollback"]
    assert event["step"] == 107
    assert broken["lost"] == 106 - event["restored"] > 0


def test_a_supervised_healthy_run_is_the_bare_run():
    bare = fly(Flight(recipe="mlp", seed=1, steps=120, rates=True))
    supervised = fly(Flight(recipe="mlp", seed=1, steps=120, rates=True, guard="kalmanguard"))
    assert supervised["final"] == bare["final"]
    assert supervised["rates"] == bare["rates"]
    assert supervised["mode"] == "WATCHING"
    assert supervised["errors"] == 0


def test_the_command_line_lists_runs_and_rewrites(tmp_path, capsys):
    assert main([]) == 0
    listed = capsys.readouterr().out
    assert all(benchmark.name in listed for benchmark in BENCHMARKS)
    raw, page = tmp_path / "journal.json", tmp_path / "page.md"
    raw.write_text(
        json.dumps({"command": "python -m benchmarks journal", "machine": "2 shared cores", "figures": {"row": [1.0]}})
    )
    page.write_text("<!-- journal -->\n<!-- /journal -->\n")
    assert main(["journal", "--load", str(raw), "--write", str(page)]) == 0
    assert "| row | 1.00 | 1.00 | 1.00 |" in page.read_text()
