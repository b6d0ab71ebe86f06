"""The supervisor on several ranks: real training of replicas under DistributedDataParallel, two and four processes.

Oracles: the same run without a supervisor, bit for bit; the other ranks, bit for bit; and the states that every rank
has recorded after every step (a rollback is exact or it is none).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from kalmanguard.distributed.agreement import REPLICAS, Role, Sensed, Summary, settled
from kalmanguard.errors import KalmanguardError, RankError
from kalmanguard.records import Measurement
from kalmanguard.replay import replay

from .rank_runs import launch, train

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")


# -- arithmetic --------------------------------------------------------------------------------------------------------


def sensed(*, at: float = 1.0, moved: float | None = 1.0, decided: int = 5, **changes: object) -> Sensed:
    given = {"step": 3, "loss": 1.0, "rounding_floor": 1e-9, "buffer_norm": 4.0, **changes}
    measurement = Measurement(**given)  # type: ignore[arg-type]
    return Sensed(measurement, decided, [np.full(8, at)], None if moved is None else [np.full(8, moved)], [1e-9])


def summed(*ranks: Sensed | None, shards: bool = False) -> Measurement | None:
    """What the sum of what all ranks tell says."""
    shared = () if shards else (len(ranks),)
    vectors = []
    for rank, item in enumerate(ranks):
        role = Role(owned=shards or rank == 0, slot=None if shards else 0)
        summary = Summary(ranks=len(ranks), roles=[role], shared=shared, size=8)
        vectors.append(summary.vector(item))
    own = next(item for item in ranks if item is not None).measurement
    np.testing.assert_allclose(sum(vectors), sum(reversed(vectors)), rtol=1e-12)
    return summary.agreed(np.sum(vectors, axis=0), own)


def asked(*ranks: Sensed | None) -> Measurement:
    own = next(item for item in ranks if item is not None).measurement
    return settled([(item, [Role(owned=rank == 0, slot=0)]) for rank, item in enumerate(ranks)], own)


def test_what_all_measure_alike_stays_as_it_is() -> None:
    m = sensed(lr_factor=0.5)
    found = summed(m, m, m)
    assert found is not None
    assert found.velocity is not None
    assert found.velocity.tolist() == [1.0] * 8
    for name in ("step", "loss", "buffer_norm", "rounding_floor", "lr_factor", "findings"):
        assert getattr(found, name) == pytest.approx(getattr(m.measurement, name)), name


def test_what_shards_measure_is_added_up() -> None:
    found = summed(sensed(moved=1.0), sensed(moved=0.1, at=7.0, loss=4.0, tampered=("moments",)), shards=True)
    assert found is not None
    assert found.velocity is not None
    assert found.velocity == pytest.approx(np.full(8, 1.1), rel=1e-10)
    assert (found.loss, found.tampered) == (2.5, ("moments",))
    assert found.rounding_floor == pytest.approx(1e-9 * 2**0.5)


@pytest.mark.parametrize(
    "other",
    [
        sensed(step=4),
        sensed(decided=6),
        sensed(at=np.nextafter(1.0, 2.0)),
        sensed(loss=float("nan")),
        sensed(learning_rates=(0.2,)),
        None,
    ],
)
def test_where_ranks_differ_each_is_asked(other: Sensed | None) -> None:
    assert summed(sensed(), sensed(), other) is None


def test_one_huge_velocity_leaves_the_next_ones_as_they_are() -> None:
    huge = summed(sensed(), sensed(moved=1e30), shards=True)
    small = summed(sensed(moved=1e-9), sensed(moved=2e-9), shards=True)
    assert huge is not None
    assert huge.velocity == pytest.approx(np.full(8, 1e30))
    assert small is not None
    assert small.velocity == pytest.approx(np.full(8, 3e-9), rel=1e-12)


def test_a_step_without_velocities_or_with_parameters_that_are_no_numbers_has_no_velocity() -> None:
    for other, finite in ((sensed(moved=None), True), (sensed(moved=None, parameters_finite=False), False)):
        found = summed(sensed(), other)
        assert found is not None
        assert (found.velocity, found.parameters_finite) == (None, finite)


def test_what_one_rank_suffers_is_not_averaged_away() -> None:
    good = sensed(tampered=("parameters",), learning_rates=(0.1, 0.2))
    bad = sensed(loss=float("nan"), moved=50.0, tampered=("silent moments",), learning_rates=(0.1, 0.9))
    found = asked(good, bad, good)
    assert found.tampered == ("parameters", "silent moments")
    assert found.learning_rates == (0.1, 0.9)
    assert found.loss is not None
    assert np.isnan(found.loss)
    assert found.velocity is not None
    assert found.velocity.tolist() == [50.0] * 8


@pytest.mark.parametrize(("positions", "told"), [([1, 1, 2], "rank 2"), ([1, float("nan")], "ranks 0 and 1")])
def test_replicas_that_differ_are_told(positions: list[float], told: str) -> None:
    found = asked(*(sensed(at=at) for at in positions))
    assert [item.detector for item in found.findings] == [REPLICAS]
    assert told in found.findings[0].message


def test_ranks_that_went_apart_cannot_go_on() -> None:
    with pytest.raises(RankError, match=r"at steps \[3, 4\]"):
        asked(sensed(), sensed(step=4))
    with pytest.raises(RankError, match="Rank 1 has decided otherwise"):
        asked(sensed(), sensed(decided=6))
    with pytest.raises(KalmanguardError, match="rank 1 could not measure"):
        asked(sensed(), None)


# -- training ----------------------------------------------------------------------------------------------------------


def same_everywhere(ranks: list[dict[str, list[object]]]) -> dict[str, list[object]]:
    for other in ranks[1:]:
        assert isinstance(other, dict), other
        assert other["states"] == ranks[0]["states"]
        assert other["decisions"] == ranks[0]["decisions"]
    assert all(rank["errors"] == 0 for rank in ranks)
    return ranks[0]


@pytest.mark.parametrize("mode", [pytest.param("observe", marks=pytest.mark.slow), "protect"])
def test_a_clean_run_is_the_bare_run(mode: str, tmp_path: Path) -> None:
    """Parameters and random streams of every rank; cadences measured, not fixed, come from rank 0."""
    (tmp_path / "bare").mkdir()
    (tmp_path / "watched").mkdir()
    bare = launch(train, 2, tmp_path / "bare", mode=None)
    watched = launch(train, 2, tmp_path / "watched", mode=mode, probe_every=None, snapshot_every=None)
    first = same_everywhere(watched)
    assert first["states"] == bare[0]["states"]
    assert [rank["rng"] for rank in watched] == [rank["rng"] for rank in bare]
    assert {decision[1] for decision in first["decisions"]} == {"ACCEPT"}  # type: ignore[index]
    assert replay(tmp_path / "watched" / "run").identical
    assert not any(status == "FAILED" for _, status in first["certificate"])  # type: ignore[misc]


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_fault_on_one_rank_is_answered_by_all(size: int, tmp_path: Path) -> None:
    """A gradient that is not finite is dropped in its step everywhere; a flipped bit is undone everywhere."""
    ranks = launch(
        train, size, tmp_path, faults={size - 1: ("nan_gradient@45",), 0: ("bit_flip@61",)}, steps=90
    )  # fmt: skip
    first = same_everywhere(ranks)
    states, decisions = first["states"], first["decisions"]
    assert decisions[44][1] == "VETO"  # type: ignore[index]
    assert states[45] == states[44]
    undone = [decision for decision in decisions if decision[1] == "ROLLBACK"]  # type: ignore[index]
    assert undone
    for step, *_, restored, _reason, _numbers in undone:  # type: ignore[misc]
        assert states[step] == states[restored]
    assert undone[0][0] in (61, 62)  # type: ignore[index]
    assert replay(tmp_path / "run").identical
    assert not any(status == "FAILED" for _, status in first["certificate"])  # type: ignore[misc]


def test_a_learning_rate_that_explodes_is_undone_on_all_ranks(tmp_path: Path) -> None:
    faults = dict.fromkeys(range(2), ("lr_spike:300@45:steps=4",))
    first = same_everywhere(launch(train, 2, tmp_path, faults=faults, steps=80))
    undone = [decision for decision in first["decisions"] if decision[1] == "ROLLBACK"]  # type: ignore[index]
    assert undone
    assert first["states"][undone[0][0]] == first["states"][undone[0][4]]  # type: ignore[index]


def test_replicas_that_part_quietly_are_set_back_to_what_they_had_in_common(tmp_path: Path) -> None:
    """Too little to show in any loss: weights of one rank scaled by a millionth."""
    first = same_everywhere(launch(train, 2, tmp_path, faults={1: ("weight_scale:1.000001@47",)}, steps=70))
    undone = [decision for decision in first["decisions"] if decision[1] == "ROLLBACK"]  # type: ignore[index]
    assert [decision[0] for decision in undone] == [47]  # type: ignore[index]
    assert "no longer held the same parameters" in undone[0][5]  # type: ignore[index]
    assert replay(tmp_path / "run").identical


@pytest.mark.slow
def test_a_cadence_never_follows_what_one_rank_alone_sees(tmp_path: Path) -> None:
    """Ranks whose losses differ keep and restore the same steps: where each decides by its own loss, they do not."""
    first = same_everywhere(
        launch(train, 2, tmp_path, faults={1: ("garbage_batch@40", "bit_flip@66")}, steps=90, probe_every=None)
    )
    assert any(decision[1] == "ROLLBACK" for decision in first["decisions"])  # type: ignore[index]


# -- what cannot go on -------------------------------------------------------------------------------------------------


def test_a_rank_that_dies_is_told_and_nobody_hangs(tmp_path: Path) -> None:
    alive, dead = launch(train, 2, tmp_path, die=(1, 30), rank_timeout_s=10.0)
    assert dead is None
    assert isinstance(alive, str)
    assert "RankError" in alive or "RuntimeError" in alive  # ours, or that of the gradients' own reduction


@pytest.mark.slow
def test_a_rank_that_skips_update_is_told(tmp_path: Path) -> None:
    ranks = launch(train, 2, tmp_path, extra_step=(1, 30), rank_timeout_s=10.0)
    # Whoever is told first ends, and the gradients' own reduction tells the other.
    assert all(isinstance(rank, str) and "Error" in rank for rank in ranks), ranks
    assert any("RankError" in rank for rank in ranks), ranks


def test_what_one_rank_cannot_measure_stops_no_training(tmp_path: Path) -> None:
    ranks = launch(train, 2, tmp_path, broken_loss=(1, 30))
    assert all(isinstance(rank, dict) for rank in ranks), ranks
    assert [rank["errors"] for rank in ranks] == [1, 1]
    assert ranks[0]["states"] == ranks[1]["states"]
    assert ranks[0]["decisions"][30:] == ranks[1]["decisions"][30:]


def test_a_step_without_gradients_is_a_step(tmp_path: Path) -> None:
    ranks = launch(_without_gradients, 2, tmp_path)
    assert ranks == [("ACCEPT", 0), ("ACCEPT", 0)], ranks


def _without_gradients(rank: int, size: int, folder: Path) -> object:
    from kalmanguard import Supervisor
    from kalmanguard.models import load_plant

    plant = load_plant("mlp")(seed=0)
    with Supervisor(plant.model, plant.probe_loader, optimizer=plant.optimizer) as supervisor:
        plant.optimizer.step()
        decision = supervisor.update()
        return decision.action.value, supervisor.statistics()["errors"]


def test_ranks_with_other_settings_are_refused(tmp_path: Path) -> None:
    ranks = launch(_other_settings, 2, tmp_path)
    assert all("another settings" in rank for rank in ranks), ranks


def test_ranks_with_other_parameters_are_refused_or_left_alone(tmp_path: Path) -> None:
    ranks = launch(_other_parameters, 2, tmp_path)
    assert all("another set of parameters" in rank[0] and rank[1] == "ACCEPT" for rank in ranks), ranks


def _other_parameters(rank: int, size: int, folder: Path) -> object:
    """Every rank trains a model of its own."""
    from kalmanguard import Supervisor
    from kalmanguard.models import load_plant

    plant = load_plant("mlp")(seed=rank)
    held_out = load_plant("mlp")(seed=0).probe_loader
    try:
        Supervisor(plant.model, held_out, optimizer=plant.optimizer)
    except RankError as error:
        refusal = str(error)
    with Supervisor(plant.model, held_out, optimizer=plant.optimizer, settings={"replicas": False}) as supervisor:
        decision = supervisor.update(plant.train_step(next(plant.loader)))
    return refusal, decision.action.value


def _other_settings(rank: int, size: int, folder: Path) -> object:
    return train(rank, size, folder, give_back=0.2 if rank == 0 else 0.3)


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_killed_run_is_resumed_on_as_many_ranks_as_there_are(size: int, tmp_path: Path) -> None:
    """The state is that of the last durable checkpoint, on every rank; what was certified as durable is not lost."""
    alive, dead = launch(train, 2, tmp_path, die=(1, 70), rank_timeout_s=10.0, checkpoint_share=0.5)
    assert dead is None
    assert isinstance(alive, str)
    for path in tmp_path.glob("rank*.pt"):
        path.unlink()
    (tmp_path / "store").unlink()
    first = same_everywhere(launch(train, size, tmp_path, resume=True, steps=40))
    assert isinstance(first["resumed_from"], int)
    assert 0 < first["resumed_from"] < 70
    assert first["decisions"][0][0] > first["resumed_from"]  # type: ignore[index]
    assert replay(tmp_path / "run").identical


# -- frameworks --------------------------------------------------------------------------------------------------------


def _framework(rank: int, size: int, folder: Path, *, kind: str) -> object:
    """Under 2 ranks: a gradient of rank 1 that is not finite, a bit that flips in rank 0's weights."""
    from kalmanguard import FaultInjector

    injector = FaultInjector(seed=0)
    if kind == "huggingface":
        from . import test_huggingface as hf

        if rank == 1:
            injector.at(30).nan_gradient()
        else:
            injector.at(41).bit_flip(match="wte")
        callback, recorder = hf.guard(), hf.Recorder()
        options = {"steps": 60, "ddp_backend": "gloo", "save_strategy": "steps", "save_steps": 25}
        hf.trainer_of(folder, [hf.Faults(injector), callback, recorder], **options).train()
        return _told(callback.decisions, callback.supervisor, recorder.states)
    if kind == "accelerate":
        return _accelerate(rank, folder, injector)
    from lightning.pytorch import Callback

    from . import test_lightning as lightning

    if rank == 0:
        injector.at(41).bit_flip(match="0.weight")

    class Attach(Callback):
        def on_train_start(self, trainer: object, pl_module: object) -> None:
            injector.attach(pl_module, trainer.optimizers[0])  # type: ignore[arg-type, attr-defined]

    guard, states = lightning.guard(), lightning.Recorder()
    module = lightning.Digits(poisoned=30 if rank == 1 else -1)
    lightning.fit(folder, [Attach(), guard, states], module=module, strategy="ddp", devices=size)
    return _told(guard.decisions, guard.supervisor, states.states)


def _accelerate(rank: int, folder: Path, injector: object) -> object:
    from . import test_accelerate as accelerate

    loop = accelerate.Loop(folder)
    if rank == 1:
        injector.at(30).nan_gradient()  # type: ignore[attr-defined]
    else:
        injector.at(41).bit_flip(match="0.weight")  # type: ignore[attr-defined]
    assert loop.guard is not None
    with injector.attach(loop.plant.model, loop.plant.optimizer), loop.guard as guard:  # type: ignore[attr-defined]
        loop.train(60)
    return _told(guard.decisions, guard.supervisor, loop.states)


def _told(decisions: object, supervisor: object, states: object) -> dict[str, object]:
    from .rank_runs import essence

    return {
        "states": states,
        "decisions": [essence(d) for d in decisions],  # type: ignore[attr-defined]
        "errors": supervisor.statistics()["errors"],  # type: ignore[attr-defined]
    }


@pytest.mark.parametrize(
    "kind", ["huggingface", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("lightning", "accelerate"))]
)
def test_frameworks_under_data_parallelism(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers" if kind == "huggingface" else kind)
    first = same_everywhere(launch(_framework, 2, tmp_path, kind=kind))
    states, decisions = first["states"], first["decisions"]
    acted = [decision for decision in decisions if decision[1] != "ACCEPT"]  # type: ignore[index]
    assert [decision[:2] for decision in acted[:2]] == [(30, "VETO"), (41, "ROLLBACK")]  # type: ignore[index]
    assert states[30] == states[29]
    assert states[41] == states[acted[1][4]]  # type: ignore[index]
    folder = {"huggingface": "_kalmanguard", "lightning": "kalmanguard", "accelerate": "run"}[kind]
    assert replay(tmp_path / folder).identical


@pytest.mark.slow
def test_decisions_are_equal_in_ten_thousand_steps_with_faults_on_random_ranks(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    kinds = ("nan_gradient@{}", "bit_flip@{}", "gradient_scale:1000@{}", "garbage_batch@{}", "weight_scale:1.00001@{}")
    faults: dict[int, tuple[str, ...]] = {0: (), 1: ()}
    for step in range(200, 10_000, 200):
        rank = int(rng.integers(2))
        faults[rank] = (*faults[rank], str(rng.choice(kinds)).format(step + int(rng.integers(100))))
    first = same_everywhere(launch(train, 2, tmp_path, steps=10_000, faults=faults, rollback_budget=1_000, limit=600))
    assert len(first["decisions"]) == 10_000
    assert sum(decision[1] != "ACCEPT" for decision in first["decisions"]) >= 20  # type: ignore[index, misc]
