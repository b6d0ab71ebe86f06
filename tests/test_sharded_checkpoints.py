"""Durable checkpoints of sharded runs: real training under ``fully_shard`` on one to four processes.

Oracles: the whole tensors that were saved, put together from all ranks, bit for bit; how the run that saved went on;
torch's own reader of checkpoints. Faults are real: processes killed with -9, a file size limit, edited bytes, pickles.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from kalmanguard.distributed.content import differing, held_twice
from kalmanguard.distributed.durable import ANCHOR, ShardedStore
from kalmanguard.distributed.jobs import JobQueue
from kalmanguard.distributed.parts import Part
from kalmanguard.errors import ConfigurationError, SnapshotError
from kalmanguard.snapshots.disk import CheckpointStore
from kalmanguard.snapshots.state import TrainingState

from .rank_runs import launch
from .sharded_checkpoint_runs import Run, drifted, everything, hanging, killed, load, save

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def started(run: Any, size: int, folder: Path, **options: Any) -> list[Any]:
    folder.mkdir(parents=True, exist_ok=True)
    found = launch(run, size, folder, **options)
    for told in found:
        assert not isinstance(told, str), told
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], Path]:
    folder = tmp_path_factory.mktemp("two")
    return started(everything, 2, folder), folder


# -- two ranks ---------------------------------------------------------------------------------------------------------


def test_two_ranks_go_on_bit_for_bit(two: tuple[list[Any], Path]) -> None:
    for rank, found in enumerate(two[0]):
        saved, loaded = found["saved"], found["loaded"]
        assert loaded["step"] == 3
        assert loaded["meta"]["rank"] == rank
        assert loaded["meta"]["mean"].tolist() == [rank, 1 + rank, 2 + rank]
        assert loaded["digest"] == saved["digest"]
        assert same(loaded["whole"], saved["whole"])
        assert loaded["later"] == saved["later"], "dropout, data and schedule go on as well"
        assert found["plain_interface"] == (3, saved["digest"])
    buffers = [found["loaded"]["own"]["buffers"]["statistics.running_mean"] for found in two[0]]
    assert not torch.equal(*buffers), "each rank has statistics of its own, or this test shows nothing"


def test_torch_reads_what_was_written(two: tuple[list[Any], Path]) -> None:
    for found in two[0]:
        assert found["foreign reader"]
        for name, parameter in found["foreign reader"].items():
            assert torch.equal(parameter, found["saved"]["whole"][name])


def test_ranks_at_different_speeds_write_the_same_checkpoints(two: tuple[list[Any], Path]) -> None:
    (steps, last, meta), other = (found["differing_speeds"] for found in two[0])
    assert (steps, last, meta) == other
    assert last == steps[-1] == meta["step"] == 30
    folder = two[1] / "speeds"
    written = json.loads((folder / json.loads((folder / ANCHOR).read_text())["folder"] / "manifest.json").read_text())
    assert 3 < written["sequence"] < 30, "some, not all, were replaced while they waited"


def test_a_frozen_store_changes_nothing_on_any_rank(two: tuple[list[Any], Path]) -> None:
    assert [found["frozen"] for found in two[0]] == [[True] * 7] * 2


def test_a_disk_that_is_full_on_one_rank_is_told_to_all(two: tuple[list[Any], Path]) -> None:
    for error, unchanged, last in (found["full_disk"] for found in two[0]):
        assert error.startswith("SnapshotError: Rank 1: ")
        assert "could not be written" in error
        assert unchanged
        assert last == 4


def test_folders_that_are_not_the_same_are_refused(two: tuple[list[Any], Path]) -> None:
    for found in two[0]:
        assert "is another one here than on rank" in found["other_folders"]


def test_what_is_in_the_folder(two: tuple[list[Any], Path]) -> None:
    folder = two[1] / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == [ANCHOR, "slot-0"]
    assert sorted(path.name for path in (folder / "slot-0").iterdir()) == [
        "index.json",
        "manifest.json",
        "rank-00000.json",
        "rank-00000.safetensors",
        "rank-00001.json",
        "rank-00001.safetensors",
    ]
    stored = [load_file(folder / f"slot-0/rank-0000{rank}.safetensors") for rank in (0, 1)]
    assert not stored[0].keys() & stored[1].keys(), "nothing is stored twice"
    assert "tree/modules/model/parameters/embed.weight@0,0" in stored[0]
    assert "tree/modules/model/parameters/embed.weight@3,0" in stored[1]
    assert "rank-1/tree/modules/model/buffers/statistics.running_mean@0" in stored[1]


# -- a process alone ---------------------------------------------------------------------------------------------------


def test_two_ranks_resume_as_one(two: tuple[list[Any], Path]) -> None:
    saved = two[0][0]["saved"]
    found = load(0, 1, Path(), saved=two[1] / "checkpoints", how="alone")
    assert same(found["whole"], saved["whole"])
    assert (found["step"], found["meta"]["rank"]) == (3, 0)
    assert torch.equal(found["own"]["torch"], saved["own"]["torch"]), "the random stream of rank 0"
    assert same(found["own"]["buffers"], saved["own"]["buffers"])
    assert found["own"]["rates"] == saved["own"]["rates"]


def small(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer, TrainingState]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))
    model.register_buffer("phase", torch.randn(3, dtype=torch.complex64))
    model.register_buffer("none", torch.zeros(0, 2))
    model.register_buffer("narrow", torch.randn(2, 3).to(torch.bfloat16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    state = TrainingState(model, optimizers=[optimizer], schedulers=[], include_gradients=True)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
    return model, optimizer, state


def test_every_kind_of_tensor_comes_back_without_a_process_group(tmp_path: Path) -> None:
    _, _, state = small()
    digest = state.digest()
    with ShardedStore(tmp_path, state=state) as store:
        assert store.save(5, state.capture(), {"array": [1, (2, None)], "nested": {"x": torch.arange(3)}})
    _, _, other = small(1)
    assert other.digest() != digest
    step, meta = ShardedStore(tmp_path, state=other).load_last_clean_into()
    assert other.digest() == digest
    assert (step, meta["array"], meta["nested"]["x"].tolist()) == (5, [1, (2, None)], [0, 1, 2])
    with ShardedStore(tmp_path / "tree", state=state) as store:
        store.save(6, state.tree(), {})
    other.load_tree(store.load_last_clean()[1])
    assert other.digest() == state.digest()


def test_another_model_is_refused_and_nothing_changes(two: tuple[list[Any], Path]) -> None:
    for found in two[0]:
        error, unchanged = found["another_model"]
        assert "blocks.0.up.weight is (30, 12) in the checkpoint and (31, 12) now" in error
        assert unchanged


class Bomb:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("planted-pickle-was-run"),)


def signed(folder: Path) -> None:
    """Make the manifest and the anchor agree with files that were changed: the writer of the folder is the enemy."""
    slot = folder / "slot-0"
    data = json.loads((slot / "manifest.json").read_text())
    data["files"] = {
        path.relative_to(slot).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in slot.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }
    (slot / "manifest.json").write_text(json.dumps(data))
    anchor = json.loads((folder / ANCHOR).read_text())
    anchor["manifest_sha256"] = hashlib.sha256((slot / "manifest.json").read_bytes()).hexdigest()
    (folder / ANCHOR).write_text(json.dumps(anchor))


def edited(name: str, change: Callable[[dict[str, Any]], object], *, sign: bool = True) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "slot-0" / name
        data = json.loads(path.read_text())
        change(data)
        path.write_text(json.dumps(data))
        if sign:
            signed(folder)

    return edit


def planted(name: str, *, sign: bool = True) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        (folder / "slot-0" / name).write_bytes(pickle.dumps(Bomb()))
        if sign:
            signed(folder)

    return plant


def truncate(folder: Path) -> None:
    path = folder / "slot-0/rank-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


def flip(folder: Path) -> None:
    path = folder / "slot-0/rank-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))


def first_chunk(data: dict[str, Any]) -> dict[str, Any]:
    return next(iter(data["tensors"].values()))["chunks"][0]  # type: ignore[no-any-return]


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated part": (truncate, r"rank-00001\.safetensors has .* truncated"),
    "flipped bit": (flip, r"rank-00001\.safetensors was changed after it was written"),
    "missing part": (lambda f: (f / "slot-0/rank-00001.safetensors").unlink(), r"rank-00001\.safetensors is missing"),
    "missing text": (lambda f: (f / "slot-0/rank-00001.json").unlink(), r"rank-00001\.json is missing"),
    "missing index": (lambda f: (f / "slot-0/index.json").unlink(), "index.json is missing"),
    "unsigned index": (edited("index.json", lambda d: d.update(ranks=1), sign=False), "index.json"),
    "edited manifest": (edited("manifest.json", lambda d: d.update(step=9), sign=False), "digest differs"),
    "stray file": (planted(".metadata", sign=False), r"\.metadata does not belong to the checkpoint"),
    "pickle beside": (planted(".metadata"), ""),
    "pickle as index": (planted("index.json"), "not valid JSON"),
    "pickle as text": (planted("rank-00000.json"), "not valid JSON"),
    "pickle as part": (planted("rank-00001.safetensors"), "rank-00001.safetensors cannot be read"),
    "index leads out": (edited("index.json", lambda d: first_chunk(d).update(file="../../x")), "leads out of"),
    "index without a part": (
        edited("index.json", lambda d: next(iter(d["tensors"].values()))["chunks"].clear()),
        "does not hold all of",
    ),
    "index with another box": (edited("index.json", lambda d: first_chunk(d).update(sizes=[1, 1])), "not hold all"),
    "index of a foreign type": (edited("index.json", lambda d: d["tensors"].update(x={"dtype": "load"})), "damaged"),
    "index of a newer version": (edited("index.json", lambda d: d.update(version=2)), "newer than the version 1"),
    "text names nothing": (edited("rank-00000.json", lambda d: d["tensors"]["t0"].update(name="x")), "does not hold"),
    "text without tensors": (edited("rank-00000.json", lambda d: d.pop("tensors")), "damaged: KeyError"),
    "text of another kind": (edited("rank-00000.json", lambda d: d.update(content=[1])), "not a rank's part"),
    "anchor leads out": (
        lambda f: (f / ANCHOR).write_text(
            json.dumps({**json.loads((f / ANCHOR).read_text()), "folder": "../checkpoints"})
        ),
        "no checkpoint of this folder",
    ),
    "no anchor": (lambda f: (f / ANCHOR).unlink(), "anchor of the last clean checkpoint is missing"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_and_hostile_checkpoints_are_refused(
    name: str, two: tuple[list[Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "checkpoints"
    shutil.copytree(two[1] / "checkpoints", folder)
    damage, sentence = DAMAGE[name]
    damage(folder)
    run = Run("alone")
    digest = run.state.digest()
    store = ShardedStore(folder, state=run.state)
    if sentence:
        with pytest.raises(SnapshotError, match=sentence):
            store.load_last_clean_into()
        assert run.state.digest() == digest
        assert not run.optimizer.state
    else:
        store.load_last_clean_into()
    assert not Path("planted-pickle-was-run").exists()
    pickle.loads(pickle.dumps(Bomb()))
    assert Path("planted-pickle-was-run").exists(), "the pickle would have been noticed"


def test_each_store_names_the_other(two: tuple[list[Any], Path], tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match=r"read it with kalmanguard\.distributed\.durable\.ShardedStore"):
        CheckpointStore(two[1] / "checkpoints").load_last_clean()
    state = small()[2]
    with CheckpointStore(tmp_path) as store:
        store.save(1, state.capture(), {})
    with pytest.raises(SnapshotError, match=r"read it with kalmanguard\.snapshots\.disk\.CheckpointStore"):
        ShardedStore(tmp_path, state=state).load_last_clean()
    with pytest.raises(SnapshotError, match="read it with"):
        ShardedStore(tmp_path, state=state).load(tmp_path / "slot-0")
    with pytest.raises(SnapshotError, match="not a checkpoint folder"):
        ShardedStore(tmp_path, state=state).load(tmp_path / "nowhere")


def test_what_cannot_work_is_refused_at_construction(tmp_path: Path) -> None:
    state = small()[2]
    with pytest.raises(ConfigurationError, match="slots = 1"):
        ShardedStore(tmp_path, state=state, slots=1)
    with pytest.raises(ConfigurationError, match="timeout_s = 0"):
        ShardedStore(tmp_path, state=state, timeout_s=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(SnapshotError, match="cannot be written to"):
        ShardedStore(tmp_path / "file" / "run", state=state)


def test_folders_are_used_in_turn_and_leftovers_cleared(tmp_path: Path) -> None:
    state = small()[2]
    with ShardedStore(tmp_path, state=state) as store:
        for step in range(1, 7):
            store.save(step, state.capture(), {}, clean=step < 3)
            assert store.flush(30)
        assert list(store.checkpoints().values()) == [2, 5, 6]
    shutil.copytree(tmp_path / "slot-0", tmp_path / ".new")
    with ShardedStore(tmp_path, state=state) as store:
        assert store.load_last_clean()[0] == 2
        store.save(7, state.capture(), {}, model_saver=lambda folder: (folder / "config.json").write_text("{}"))
    assert list(store.checkpoints().values()) == [2, 6, 7]
    assert sorted(path.name for path in tmp_path.iterdir()) == [ANCHOR, "slot-0", "slot-1", "slot-2"]
    step, _, _ = store.load_last_clean()
    (path,) = [path for path, number in store.checkpoints().items() if number == step]
    assert (path / "model" / "config.json").exists()


# -- agreement ---------------------------------------------------------------------------------------------------------


class Table:
    """Ranks that are threads: `Peers` without processes."""

    def __init__(self, size: int) -> None:
        self.rows: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=20)


class Seat:
    def __init__(self, table: Table, rank: int) -> None:
        self.table, self.rank, self.size = table, rank, len(table.rows)

    def gather(self, what: str, value: Any) -> list[Any]:
        self.table.rows[self.rank] = value
        self.table.barrier.wait()
        found = list(self.table.rows)
        self.table.barrier.wait()
        return found


@pytest.mark.parametrize("seed", range(6))
def test_ranks_agree_on_what_is_next_however_fast_they_are(seed: int) -> None:
    size, last = 3, 40
    table = Table(size)
    queues = [JobQueue(Seat(table, rank)) for rank in range(size)]  # type: ignore[arg-type]
    written: list[list[tuple[int, str | None]]] = [[] for _ in range(size)]

    def write(rank: int, pace: random.Random) -> None:
        while (found := queues[rank].next()) is not None:
            job, refusal = found
            written[rank].append((job.step, refusal))
            time.sleep(pace.uniform(0, 0.002))
            queues[rank].done(job)

    def train(rank: int, pace: random.Random) -> None:
        for step in range(1, last + 1):
            job, _ = queues[rank].number(step, True, None)
            if (rank, step) == (1, last):
                job.refusal = "no memory"
            queues[rank].put(job)
            time.sleep(pace.uniform(0, 0.004) if pace.random() < 0.7 else 0)

    threads = [threading.Thread(target=write, args=(rank, random.Random(seed * 10 + rank))) for rank in range(size)]
    threads += [threading.Thread(target=train, args=(rank, random.Random(99 * seed + rank))) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads[size:]:
        thread.join(20)
    assert all(queue.wait(20) for queue in queues)
    for queue in queues:
        queue.close()
    for thread in threads:
        thread.join(20)
    steps = [step for step, _ in written[0]]
    assert written[0] == written[1] == written[2]
    assert steps == sorted(set(steps))
    assert written[0][-1] == (last, "Rank 1: no memory")
    assert all(refusal is None for _, refusal in written[0][:-1])


def test_what_is_called_alike_and_is_not_is_found() -> None:
    left, right, whole = Part((4,), (0,), (2,)), Part((4,), (2,), (2,)), Part.whole((4,))
    held = [
        {
            "sharded": ("f", left),
            "alike": ("f", whole),
            "other": ("f", whole),
            "shape": ("f", whole),
            "one": ("f", left),
        },
        {"sharded": ("f", right), "alike": ("f", whole), "other": ("f", whole), "shape": ("f", Part.whole((3,)))},
    ]
    assert held_twice(held) == {"alike", "other"}
    digests = [{"alike": b"1", "other": b"1"}, {"alike": b"1", "other": b"2"}]
    assert differing(list(zip(held, digests, strict=True))) == {"other", "shape"}


# -- other numbers of ranks, other meshes ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "sizes", "after"),
    [
        ("fsdp", (2, 4), "fsdp"),
        ("fsdp", (4, 2), "fsdp"),
        ("replicas", (2, 2), "fsdp"),
        ("fsdp", (2, 2), "replicas"),
        ("2d", (4, 2), "fsdp"),
        ("fsdp", (2, 4), "2d"),
        ("2d", (4, 4), "2d"),
    ],
)
def test_whole_tensors_are_the_same_on_other_ranks(
    before: str, sizes: tuple[int, int], after: str, tmp_path: Path
) -> None:
    saved = started(save, sizes[0], tmp_path / "before", how=before)
    loaded = started(load, sizes[1], tmp_path / "after", how=after, saved=tmp_path / "before" / "checkpoints")
    for rank, found in enumerate(loaded):
        assert same(found["whole"], saved[0]["whole"])
        assert found["own"]["rates"] == saved[0]["own"]["rates"]
        assert found["own"]["epoch"] == 3
        if sizes[0] == sizes[1]:
            assert torch.equal(found["own"]["torch"], saved[rank]["own"]["torch"])
            assert same(found["own"]["buffers"], saved[rank]["own"]["buffers"])
        else:
            stream = saved[0]["own"]["torch"] if rank == 0 else found["fresh"]
            assert torch.equal(found["own"]["torch"], stream)
            assert same(found["own"]["buffers"], saved[0]["own"]["buffers"])
    if (before, sizes[0]) == (after, sizes[1]):
        assert [found["later"] for found in loaded] == [found["later"] for found in saved]


@pytest.mark.slow
@pytest.mark.parametrize(("size", "warm"), [(2, 0), (2, 2), (4, 0)])
def test_optimizer_state_of_other_shapes_is_made_anew(size: int, warm: int, tmp_path: Path) -> None:
    saved = started(save, 2, tmp_path / "before", optimizer="size")
    options = {"optimizer": "size", "warm": warm, "saved": tmp_path / "before" / "checkpoints"}
    loaded = started(load, size, tmp_path / "after", **options)
    assert all(same(found["whole"], saved[0]["whole"]) for found in loaded)
    if size == 2:
        assert [found["later"] for found in loaded] == [found["later"] for found in saved]


@pytest.mark.slow
def test_parameters_that_differ_are_kept_for_each_rank_and_refused_elsewhere(tmp_path: Path) -> None:
    for found in started(drifted, 2, tmp_path):
        assert found["error"] is None
        assert found["loaded"] == found["digest"]
    with pytest.raises(
        SnapshotError, match=r"not the same on the 2 ranks .* loaded on 2 ranks only, and this run has 1"
    ):
        load(0, 1, Path(), saved=tmp_path / "checkpoints", how="alone")


# -- ranks that die ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "call", "nth"),
    [
        (0, "fsync", 1),  # its part
        (1, "fsync", 1),
        (1, "fsync", 2),  # its text
        (0, "fsync", 5),  # the manifest
        (0, "rename", 1),  # the new folder into place
        (0, "replace", 1),  # the anchor, after the folder
    ],
)
def test_killed_at_any_moment_the_last_clean_checkpoint_loads(victim: int, call: str, nth: int, tmp_path: Path) -> None:
    found = started(killed, 2, tmp_path, victim=victim, call=call, nth=nth)
    assert found[victim] is None
    survivor = found[1 - victim]
    assert survivor["flushed"]
    assert survivor["seconds"] < 20, "it is noticed at once, not when the time is up"
    assert survivor["error"].startswith("RankError: ")
    assert (survivor["accepted"], survivor["closed"]) == (False, True)
    again = load(0, 1, Path(), saved=tmp_path / "checkpoints", how="alone")
    assert (again["step"], again["meta"]) == (1, {"step": 1})
    assert same(again["whole"], survivor["whole"])
    run = Run("alone")  # whoever starts again goes on in the same folder
    with ShardedStore(tmp_path / "checkpoints", state=run.state) as store:
        assert store.save(9, run.state.capture(), {})
        assert store.flush(30)
        assert store.last_error is None
    assert store.load_last_clean()[0] == 9
    assert {path.name for path in store.folder.iterdir()} <= {ANCHOR, "slot-0", "slot-1", "slot-2"}


@pytest.mark.slow
def test_the_death_of_one_of_four_is_noticed_by_all(tmp_path: Path) -> None:
    found = started(killed, 4, tmp_path, victim=2, call="fsync", timeout_s=25)
    assert found[2] is None
    for survivor in (found[0], found[1], found[3]):
        assert survivor["flushed"]
        assert survivor["error"].startswith("RankError: ")
        assert not survivor["accepted"]


@pytest.mark.slow
def test_a_rank_that_hangs_holds_nobody_up(tmp_path: Path) -> None:
    found = started(hanging, 2, tmp_path)[0]
    assert len(found["losses"]) == 3
    assert found["trained"] < 5, "training goes on while the background thread waits"
    assert found["flushed"]
    assert found["error"].startswith("RankError: ")
    assert "within 5 s" in found["error"]
    assert not found["accepted"]


# -- documentation -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_page_runs(tmp_path: Path) -> None:
    page = (Path(__file__).parent.parent / "docs" / "sharded_checkpoints.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "train.py").write_text(block)
    told = []
    for size in (2, 1):
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={size}",
            "train.py",
        ]
        done = subprocess.run(
            command,
            check=False,
            capture_output=True,
            text=True,
            timeout=180,
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)},
        )
        assert done.returncode == 0, done.stderr
        told.append(done.stdout.strip())
    assert told == ["rank 0 of 2, steps 1 to 20, no error", "rank 0 of 1, steps 21 to 40, no error"]
