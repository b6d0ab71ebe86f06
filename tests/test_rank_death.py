"""What survives when a rank ends for good: killed, stopped, out of memory, at the places where it hurts most.

Oracles: the states that the surviving ranks have recorded after every step, bit for bit; the checkpoint's own digests;
the verifier, which shares no code with what wrote the journal; the same resume made twice.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from kalmanguard.certificate.verify import HOLDS, INCOMPLETE, LAPSED, verify
from kalmanguard.journal import JournalReader
from kalmanguard.replay import replay
from kalmanguard.snapshots.disk import CheckpointStore

from .rank_death_runs import doomed, resumed
from .rank_runs import launch

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")

slow = pytest.mark.slow
TIMEOUT_S = 10.0
#: On a busy machine a process that was told may be late to say so.
PATIENCE_S = 10.0


def survivors(found: list[Any], victim: int, *, place: str) -> list[dict[str, Any]]:
    """What the others have found, each of them told by a `RankError` in time."""
    alive = [rank for number, rank in enumerate(found) if number != victim]
    for rank in alive:
        assert isinstance(rank, dict), rank
        assert rank["error"] == "RankError", rank
        assert "Start all ranks again from the last checkpoint, with Supervisor.resume" in rank["text"]
        assert 0.0 <= rank["waited_s"] < TIMEOUT_S + PATIENCE_S, place
    return alive


def durable(run: Path) -> list[tuple[int, str]]:
    """Step and manifest of what the journal calls durable."""
    with JournalReader(run) as reader:
        found = [row.data() for row in reader.rows("durable")]
    return [(int(data["state"]), str(data["manifest_sha256"])) for data in found if data["clean"]]


def resume_twice(run: Path, folder: Path, size: int, steps: int) -> dict[str, Any]:
    """The same resume made twice, from two copies: every rank goes the same way, both times."""
    made = []
    for number in range(2):
        place = folder / f"resumed-{number}"
        place.mkdir()
        copy = run if number else Path(shutil.copytree(run, place / "run"))
        ranks = launch(resumed, size, place, run_dir=copy, steps=steps)
        for rank in ranks:
            assert isinstance(rank, dict), rank
            assert rank == ranks[0]
        made.append(ranks[0])
    assert made[0] == made[1]
    return made[0]


def check_what_is_left(
    run: Path, states: dict[int, str], folder: Path, size: int, *, recorded: bool, steps: int
) -> None:
    """The checkpoint loads, the journal says what is true of it, and training goes on from there."""
    store = CheckpointStore(run / "checkpoints")
    step, _, _ = store.load_last_clean()
    store.close()
    newest = step, store.last_clean_digest()
    said = durable(run)
    # Whoever dies between the anchor and the record has said too little, never too much.
    assert said
    assert said[-1] == newest if recorded else (newest not in said and said[-1][0] < step)
    report = verify(run)
    assert report["run"].status == INCOMPLETE
    assert report["durable"].status == HOLDS
    assert f"the last is the state of step {said[-1][0]}, manifest {said[-1][1][:16]}" in report["durable"].text
    assert report.exit_code == 3
    assert all(claim.status not in ("FAILED", LAPSED) for claim in report.claims), report
    assert replay(run).identical

    first = resume_twice(run, folder, size, steps)
    assert first["from"] == step
    assert first["position"] == step  # one batch a step
    assert first["states"][0] == states[step]
    assert len(set(first["states"])) > steps // 2
    assert first["errors"] == 0
    report = verify(run)
    assert report.exit_code == 0, report
    assert report["run"].status == report["durable"].status == HOLDS
    assert newest in durable(run)
    assert replay(run).identical


CASES = [
    # place, ranks, the one that dies, ranks that go on
    ("capture", 2, 0, 2),
    ("between tensors", 2, 1, 1),
    pytest.param("capture", 2, 1, 2, marks=slow),
    pytest.param("capture", 4, 0, 2, marks=slow),
    pytest.param("capture", 4, 3, 4, marks=slow),
    pytest.param("intent", 2, 0, 2, marks=slow),
    pytest.param("intent", 4, 2, 2, marks=slow),
    pytest.param("between tensors", 2, 0, 4, marks=slow),
    pytest.param("between tensors", 4, 1, 4, marks=slow),
    pytest.param("between tensors", 4, 0, 1, marks=slow),
    pytest.param("restored", 2, 0, 2, marks=slow),
    pytest.param("restored", 2, 1, 2, marks=slow),
    pytest.param("tensor file", 2, 0, 2, marks=slow),
    pytest.param("manifest", 2, 0, 1, marks=slow),
    pytest.param("rename", 2, 0, 2, marks=slow),
    pytest.param("anchor", 2, 0, 2, marks=slow),
    pytest.param("anchor", 4, 0, 2, marks=slow),
    pytest.param("record", 2, 0, 2, marks=slow),
    pytest.param("recorded", 2, 0, 2, marks=slow),
]


@pytest.mark.parametrize(("place", "size", "victim", "then"), CASES)
def test_a_rank_is_killed(place: str, size: int, victim: int, then: int, tmp_path: Path) -> None:
    found = launch(doomed, size, tmp_path, victim=victim, place=place, rank_timeout_s=TIMEOUT_S)
    assert found[victim] is None
    assert (tmp_path / "death").exists(), "nobody came to the place"
    alive = survivors(found, victim, place=place)
    assert all(rank["states"] == alive[0]["states"] for rank in alive)
    assert max(alive[0]["states"]) < 80
    steps = 300 if place in ("intent", "between tensors") else 60
    check_what_is_left(tmp_path / "run", alive[0]["states"], tmp_path, then, recorded=place != "record", steps=steps)
