"""What survives when a rank ends for good: killed, stopped, out of memory, at the places where it hurts most.

Oracles: the states that the surviving ranks have recorded after every step, bit for bit; the checkpoint's own digests;
the verifier, which shares no code with what wrote the journal; the same resume made twice.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kalmanguard.certificate.verify import HOLDS, INCOMPLETE, LAPSED, verify
from kalmanguard.journal import JournalReader
from kalmanguard.replay import replay
from kalmanguard.snapshots.disk import CheckpointStore

from .rank_death_runs import DOOMED, STEPS, doomed, resumed
from .rank_runs import launch

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")

slow = pytest.mark.slow
ROOT = Path(__file__).parents[1]
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
        # The end of a process is noticed at once; one that only stops, by the timeout.
        assert 0.0 <= rank["waited_s"] < TIMEOUT_S + PATIENCE_S * place.startswith("stopped"), rank["waited_s"]
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
    pytest.param("between tensors", 2, 1, 1, marks=slow),
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
    assert max(alive[0]["states"]) < STEPS
    steps = 300 if place in ("intent", "between tensors") else 60
    check_what_is_left(tmp_path / "run", alive[0]["states"], tmp_path, then, recorded=place != "record", steps=steps)


@slow
@pytest.mark.parametrize(("size", "victim"), [(2, 1), (4, 2)])
def test_a_checkpoint_in_flight_outlives_another_rank(size: int, victim: int, tmp_path: Path) -> None:
    """Rank 0 is told in mid-write: the write is finished, recorded, and what a resume takes."""
    found = launch(doomed, size, tmp_path, victim=victim, place="in flight", rank_timeout_s=TIMEOUT_S)
    assert found[victim] is None
    assert (tmp_path / "writing").exists()
    alive = survivors(found, victim, place="in flight")
    step, _, _ = CheckpointStore(tmp_path / "run" / "checkpoints").load_last_clean()
    assert step >= DOOMED
    check_what_is_left(tmp_path / "run", alive[0]["states"], tmp_path, 2, recorded=True, steps=60)


@pytest.mark.parametrize(
    "place",
    [
        "out of memory",
        "stopped in the supervisor",
        "stopped in training",
    ],
)
@pytest.mark.parametrize("victim", [1, 0])
@slow
def test_a_rank_fails_without_a_signal(place: str, victim: int, tmp_path: Path) -> None:
    """The reduction of gradients waits as long as its own process group says; the rest, as the settings say."""
    found = launch(
        doomed, 2, tmp_path, victim=victim, place=place, rank_timeout_s=TIMEOUT_S, timeout_s=TIMEOUT_S, limit=60.0
    )
    alive = survivors(found, victim, place=place)
    if place == "out of memory":
        # It says what happened to it, and not that the others are to blame.
        assert found[victim]["error"] == "OutOfMemoryError"
        assert alive[0]["waited_s"] < TIMEOUT_S
    else:
        assert found[victim] is None
        assert "imed out" in alive[0]["text"]
        assert alive[0]["waited_s"] > TIMEOUT_S - 1.0
    check_what_is_left(tmp_path / "run", alive[0]["states"], tmp_path, 2, recorded=True, steps=60)


@slow
def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew_on_all_ranks(tmp_path: Path) -> None:
    """Rank 0 alone can see that; where it is refused, the others do not wait for it until the timeout."""
    run = tmp_path / "run"
    found = launch(doomed, 2, tmp_path, victim=0, place="tensor file", doomed_at=0, rank_timeout_s=TIMEOUT_S)
    survivors(found, 0, place="tensor file")
    assert durable(run) == []
    assert not CheckpointStore(run / "checkpoints").holds_clean
    (tmp_path / "again").mkdir()
    ranks = launch(resumed, 2, tmp_path / "again", run_dir=run, steps=40, how="resume_or_start")
    for rank in ranks:
        assert isinstance(rank, dict), rank
        assert (rank["from"], rank["position"], len(rank["states"])) == (None, 0, 41)
        assert rank == ranks[0]
    assert verify(run).exit_code == 0
    assert replay(run).identical
    for tensors in (run / "checkpoints").glob("slot-*/tensors.safetensors"):
        tensors.unlink()
    (tmp_path / "refused").mkdir()
    ranks = launch(resumed, 2, tmp_path / "refused", run_dir=run, steps=40, how="resume_or_start")
    assert all("SnapshotError" in rank and "is missing from the checkpoint" in rank for rank in ranks), ranks


# -- torchrun ----------------------------------------------------------------------------------------------------------


def torchrun(processes: int, *arguments: str, restarts: int = 2) -> str:
    """What the elastic example says; its ranks are started again by torchrun."""
    command = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts", str(restarts))
    done = subprocess.run(
        [*command, "--nproc-per-node", str(processes), str(ROOT / "examples" / "elastic.py"), *arguments],
        capture_output=True, text=True, check=False, timeout=180,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3_000:]
    return done.stdout


@slow
def test_torchrun_starts_all_ranks_again_and_they_go_on_by_themselves(tmp_path: Path) -> None:
    """Two processes, one of which is killed, then one process: one journal, certified."""
    run = tmp_path / "run"
    told = torchrun(2, str(run), "150", "75")
    assert "rank 1 is killed in step 76" in told
    starts = [int(start) for start in re.findall(r"rank 0 of 2: from step (\d+) to 150", told)]
    assert len(starts) == 2
    assert starts[0] == 0 < starts[1] <= 75
    assert verify(run).exit_code == 0, verify(run)
    told = torchrun(1, str(run), "200")
    assert "rank 0 of 1: from step 150 to 200" in told
    report = verify(run)
    assert report.exit_code == 0, report
    assert report["run"].status == report["durable"].status == HOLDS
    assert "the last is the state of step 200" in report["durable"].text
    assert replay(run).identical
    with JournalReader(run) as reader:
        resumed_at = [row.step for row in reader.rows("resume")]
        # Where rank 0 was told before torchrun ended it, it has saved its last certified state, and counts on.
        assert starts[1] <= resumed_at[0] <= 75
        assert resumed_at[1:] == [150]
        steps = [measured.step for measured, _ in reader.steps() if measured.learning_rates]
        # What the killed rank's peers had recorded beyond the checkpoint is done again.
        assert steps[-1] == 200
        assert sorted(set(steps)) == list(range(1, 201))
