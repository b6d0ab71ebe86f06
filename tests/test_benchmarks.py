"""The benchmarks' own machinery: what they measure with must be right, or their figures mean nothing."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch

from benchmarks.__main__ import BENCHMARKS, main
from benchmarks.flight import Flight, fly, give_back
from benchmarks.guards import available, make_guard, missing
from benchmarks.guards.published import aliases
from benchmarks.harm import lost_steps
from benchmarks.markdown import counts, insert, number, spread, table
from benchmarks.organic import SCENARIOS
from benchmarks.organic.out_of_memory import rehearse
from benchmarks.plants import RECIPES, REPLICA, Truth, fault_step, make_plant
from benchmarks.pool import fly_all
from benchmarks.replica import _judge
from benchmarks.stress import PAIRS, TWINS, Stress
from kalmanguard.stress import KINDS


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


def train(plant, guard, steps, *, scale=(), nan=()):
    """Train under a guard; gradients of the steps in ``scale`` are a thousand times too large."""
    for step in range(1, steps + 1):
        loss = plant.step_loss(next(plant.loader))
        loss.backward()
        for parameter in plant.model.parameters():
            if step in scale:
                parameter.grad.mul_(1_000)
            if step in nan:
                parameter.grad.fill_(math.nan)
        if not guard.admits(step, loss):
            plant.optimizer.zero_grad()
        plant.optimizer.step()
        plant.optimizer.zero_grad()
        if not guard.after(step, loss):
            return step
    return steps


@pytest.mark.parametrize("name", [name for name in available() if name != "kalmanguard"])
def test_guards_that_watch_change_nothing_and_all_of_them_run(name):
    bare, plant = make_plant("mlp", seed=0, steps=40), make_plant("mlp", seed=0, steps=40)
    train(bare, make_guard("none", bare), 40)
    guard = make_guard(name, plant)
    assert train(plant, guard, 40) == 40
    guard.close()
    if name in ("clipping", "ZClip"):  # these act on healthy gradients too
        return
    assert not [event for event in guard.events if event["kind"] != "suspicion"]
    for one, other in zip(bare.model.parameters(), plant.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_missing_peers_are_named():
    assert set(missing()) <= {"ARC", "Argus"}
    assert all(name not in available() and name in sentence for name, sentence in missing().items())


def test_the_published_gate_puts_the_state_back_and_its_aliased_form_hands_its_copy_away():
    for name, shared in (("Or", False), ("Or, aliased", True)):
        plant = make_plant("mlp", seed=0, steps=40)
        guard = make_guard(name, plant)
        train(plant, guard, 20)
        assert not guard.events
        before = copy.deepcopy(plant.model.state_dict())
        for parameter in plant.model.parameters():
            parameter.data.mul_(5)
        guard.after(21, torch.tensor(0.0))
        assert [(event["kind"], event["restored"]) for event in guard.events] == [("rollback", 20)]
        assert all(torch.equal(plant.model.state_dict()[key], before[key]) for key in before)
        assert aliases(plant.optimizer, guard._safe[1]) is shared


def test_the_published_gate_predicts_by_an_average_that_rejected_steps_leave_alone():
    plant = make_plant("mlp", seed=0, steps=40)
    guard = make_guard("Or", plant)
    start = guard._predicted
    train(plant, guard, 1)
    assert guard._predicted == pytest.approx(start + 0.1 * (guard._look() - start), rel=1e-6)
    predicted = guard._predicted
    with torch.no_grad():
        next(plant.model.parameters()).fill_(math.nan)
    guard.after(2, torch.tensor(0.0))
    assert guard._predicted == predicted
    assert guard.events[-1]["kind"] == "rollback"


def test_zclip_clips_an_outlier_below_its_threshold_and_lets_the_rest_pass():
    plant = make_plant("mlp", seed=0, steps=80)
    guard = make_guard("ZClip", plant)
    train(plant, guard, 60, scale={50})
    assert 50 in {event["step"] for event in guard.events}
    assert guard._mean < 20


def test_an_outlier_is_skipped_and_a_value_that_is_not_finite_blocks_the_window():
    plant = make_plant("mlp", seed=0, steps=200)
    guard = make_guard("OLMo-core", plant)
    train(plant, guard, 62, scale={40})  # before the 64th step nothing is judged
    assert guard.events == []
    plant = make_plant("mlp", seed=0, steps=200)
    guard = make_guard("OLMo-core", plant)
    train(plant, guard, 90, scale={80})
    assert 80 in {event["step"] for event in guard.events}
    plant = make_plant("mlp", seed=0, steps=200)
    guard = make_guard("OLMo-core", plant)
    train(plant, guard, 215, nan={80})
    assert {event["step"] for event in guard.events} >= set(range(80, 209))


def test_rules_that_end_a_run_end_it():
    plant = make_plant("mlp", seed=0, steps=40)
    assert train(plant, make_guard("Megatron", plant), 40, nan={30}) == 30
    guard = make_guard("LLM-foundry", make_plant("mlp", seed=0, steps=40))
    verdicts = [guard.after(step, torch.tensor(1.0 if step <= 100 else 4.0)) for step in range(1, 106)]
    assert verdicts == [True] * 104 + [False]


def test_harm_counts_what_is_lost_against_the_clean_twin_step_by_step():
    clean = {"truth": [[0, 3.0], [10, 1.0], [11, 1.0], [12, 1.0], [20, 1.0]], "truth_judged": [], "truth_end": 1.0}
    run = {
        "truth": [[0, 3.0], [10, 1.0], [11, None], [12, 2.0], [20, 1.0]],
        "truth_judged": [],
        "truth_end": 1.0,
        "ended": 20,
    }
    assert lost_steps(clean | {"ended": 20}, clean, since=10) == 0.0
    # 0, 1, 1/2 and 0 at steps 10, 11, 12 and 20, with straight lines between them
    assert lost_steps(run, clean, since=10) == pytest.approx(0.5 + 0.75 + 8 * 0.25)
    assert lost_steps(run | {"truth_judged": [[11, 1.0], [12, 1.0]]}, clean, since=10) == 0.0
    halted = run | {"ended": 11, "truth": run["truth"][:3], "truth_end": 2.0}
    assert lost_steps(halted, clean, since=12) == pytest.approx(0.5 + 8 * 0.5)


def test_the_published_experiment_is_judged_against_the_lowest_loss_before_and_the_twin_at_the_end():
    clean = {"truth": [[0, 3.0], [118, 1.0], [134, 0.9], [136, 0.8], [250, 0.5]], "truth_judged": [], "truth_end": 0.5}
    events = [{"step": step, "kind": "rollback", "text": ""} for step in (110, 120, 121, 122)]
    run = {
        "truth": [[0, 3.0], [118, 1.0], [134, 4.0], [136, 1.2], [250, 0.6]],
        "truth_judged": [[134, 2.0]],
        "truth_end": 0.6,
        "events": events,
    }
    case = _judge("Or", 0, run, clean)
    assert (case["peak_inside"], case["peak_after"], case["peak_at"], case["peaked"]) == (2.0, 1.2, 136, True)
    assert case["end_over_clean"] == pytest.approx(1.2)
    assert (case["in_a_row"], case["early"], case["livelocked"]) == (3, 1, False)
    stuck = run | {"events": [{"step": step, "kind": "rollback", "text": ""} for step in range(190, 251)]}
    assert _judge("Or", 0, stuck, clean)["livelocked"]


def free_run(name, seed, steps):
    plant = SCENARIOS[name].make(seed=seed, steps=SCENARIOS[name].steps)
    gauges = [plant.gauge()]
    for _ in range(steps):
        plant.step_loss(next(plant.loader)).backward()
        plant.optimizer.step()
        plant.optimizer.zero_grad()
        if plant.scheduler is not None:
            plant.scheduler.step()
        gauges.append(plant.gauge())
    return plant, gauges


def test_the_dirac_gan_spirals_outwards_at_the_rate_of_its_eigenvalues():
    plant, distances = free_run("dirac-gan", 3, 100)
    assert (distances[100] / distances[0]) ** (1 / 100) == pytest.approx(math.sqrt(1 + 0.1**2), rel=1e-3)
    assert plant.held_out_loss() == pytest.approx(distances[100] ** 2, rel=0.02)


def test_the_catapult_follows_its_recursion_and_ends_flatter():
    plant = SCENARIOS["catapult"].make(seed=0, steps=300)
    rate, width = plant.optimizer.param_groups[0]["lr"], 512
    for _ in range(20):
        f, curvature = float(plant.model(torch.ones(1)).detach()), plant.model.curvature()
        plant.step_loss(next(plant.loader)).backward()
        plant.optimizer.step()
        plant.optimizer.zero_grad()
        product = rate * curvature
        assert float(plant.model(torch.ones(1)).detach()) == pytest.approx(
            f * (1 - product + rate**2 * f**2 / width), rel=1e-3, abs=1e-5
        )
        assert plant.model.curvature() == pytest.approx(curvature + rate * f**2 * (product - 4) / width, rel=1e-4)
    assert plant.gauge() < 2 < 3.0


@pytest.mark.parametrize(("name", "steps", "growth"), [("baird", 200, 2), ("weight-drift", 120, 1.3)])
def test_what_grows_grows(name, steps, growth):
    _, gauges = free_run(name, 0, steps)
    assert gauges[-1] > growth * gauges[0]


def test_every_scenario_can_be_probed_and_believed():
    for name in SCENARIOS:
        plant = make_plant(name, seed=1, steps=10)
        assert sum(len(targets) for _, targets in plant.probe_loader) >= 350
        assert math.isfinite(Truth(plant)())
        assert math.isfinite(plant.gauge())
        assert math.isfinite(float(plant.step_loss(next(plant.loader)).detach()))
    assert math.isfinite(Truth(make_plant(REPLICA, seed=0, steps=10))())


def test_a_failed_allocation_passes_through_and_leaves_everything_as_it_was():
    case = rehearse(0)
    assert "memory" in case["exception"]
    assert case["untouched"]
    assert case["went_on"]
    assert case["restored"]
    assert case["passed"]
    assert case["errors"] == 0


def test_a_cache_saves_runs_from_being_flown_again(tmp_path):
    flights = [Flight(recipe="catapult", seed=0, steps=20, guard=guard) for guard in ("none", "kalmanguard")]
    file = tmp_path / "cache.jsonl"
    first = fly_all(flights, processes=1, cache=file)
    second = fly_all(flights, processes=1, cache=file)
    assert [first[f.key]["seconds"] for f in flights] == [second[f.key]["seconds"] for f in flights]
    assert len(file.read_text().splitlines()) == 2


def test_scenarios_are_run_drawn_and_written(tmp_path):
    figure, raw, page = tmp_path / "organic.svg", tmp_path / "organic.json", tmp_path / "page.md"
    page.write_text("<!-- organic -->\n<!-- /organic -->\n")
    where = ["--json", str(raw), "--plot", str(figure), "--write", str(page), "--processes", "1"]
    assert main(["organic", "--quick", "--trace", "--only", "dirac-gan", "catapult", "out-of-memory", *where]) == 0
    result = json.loads(raw.read_text())
    assert {bare["name"] for bare in result["bare"]} == {"dirac-gan", "catapult"}
    assert "| dirac-gan | 1 |" in page.read_text()
    assert figure.read_text().startswith("<?xml")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["recovery", "replica"])
def test_a_short_look_is_drawn_and_written(name, tmp_path, capsys):
    figure, raw = tmp_path / "figure.png", tmp_path / "raw.json"
    assert main([name, "--quick", "--json", str(raw), "--plot", str(figure)]) == 0
    assert "| kalmanguard |" in capsys.readouterr().out
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert json.loads(raw.read_text())["guards"][:2] == ["none", "kalmanguard"]


#: Sound twins of the benchmark of stability scores.
SOUND = {sound for sound, _ in PAIRS.values()}


def test_the_table_of_stability_scores_counts_weak_twins_that_score_lower():
    parts = dict.fromkeys(KINDS, 50.0)
    cases = [
        {"twin": twin, "seed": seed, "score": 60.0 + seed if twin in SOUND else 40.0, **parts}
        for twin in TWINS
        for seed in (0, 1)
    ]
    cases[1 + 2 * list(TWINS).index("CNN, no norm")]["score"] = 99.0
    section = Stress().markdown({"cases": cases})
    assert "| 60.5 (60.0 to 61.0) | 40.0 (40.0 to 40.0) | 2 of 2 |" in section
    assert "| CNN (3 layers), no normalisation | 60.5 (60.0 to 61.0) | 69.5 (40.0 to 99.0) | 1 of 2 |" in section
    assert f"Below: {2 * len(PAIRS) - 1} of {2 * len(PAIRS)}" in section
