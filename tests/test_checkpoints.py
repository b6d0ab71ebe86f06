"""Checkpoints on disk and the codec they are written with: whole or not there, verified, never executable.

Oracle: the state that was saved. Faults are real: a process killed with -9, a file size limit, edited bytes, links.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kalmanguard.errors import ConfigurationError, SnapshotError
from kalmanguard.snapshots.codec import decode, encode
from kalmanguard.snapshots.disk import ANCHOR, CheckpointStore
from kalmanguard.snapshots.pretrained import pretrained_saver
from kalmanguard.snapshots.state import TrainingState


def tree_of(step: int, size: int = 1000) -> dict[str, Any]:
    return {"weight": torch.full((size,), float(step)), "step": step, "pair": (1, None)}


def saved(folder: Path, *steps: int) -> CheckpointStore:
    store = CheckpointStore(folder)
    for step in steps:
        assert store.save(step, tree_of(step), {"note": f"step {step}"})
        assert store.flush(10)
        assert store.last_error is None
    return store


# -- what is saved comes back ------------------------------------------------------------------------------------------


def test_the_last_clean_checkpoint_comes_back(tmp_path: Path) -> None:
    with saved(tmp_path, 1, 2) as store:
        store.save(3, tree_of(3), {}, clean=False)
    step, tree, meta = CheckpointStore(tmp_path).load_last_clean()
    assert (step, meta, tree["step"], tree["pair"]) == (2, {"note": "step 2"}, 2, (1, None))
    assert torch.equal(tree["weight"], torch.full((1000,), 2.0))
    assert sorted(store.checkpoints().values()) == [1, 2, 3]
    path = next(path for path, step in store.checkpoints().items() if step == 3)
    assert store.load(path)[0] == 3


def test_folders_are_used_in_turn_and_the_last_clean_one_is_kept(tmp_path: Path) -> None:
    with saved(tmp_path, 1, 2, 3, 4) as store:
        assert list(store.checkpoints().values()) == [2, 3, 4]
        for step in range(5, 12):
            store.save(step, tree_of(step), {}, clean=False)
            assert store.flush(10)
        assert list(store.checkpoints().values()) == [4, 10, 11]
    assert store.load_last_clean()[0] == 4
    with CheckpointStore(tmp_path) as again:  # a later process goes on in turn
        again.save(12, tree_of(12), {})
        assert again.flush(10)
        assert list(again.checkpoints().values()) == [4, 11, 12]
    assert sorted(path.name for path in tmp_path.iterdir()) == [ANCHOR, "slot-0", "slot-1", "slot-2"]


def test_training_resumes_bitwise_in_fresh_objects(tmp_path: Path) -> None:
    def build(seed: int) -> tuple[nn.Module, torch.optim.Optimizer, TrainingState]:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        return model, optimizer, TrainingState(model, optimizers=[optimizer], schedulers=[])

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[Tensor]:
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
        return [tensor.detach().clone() for tensor in model.state_dict().values()]

    model, optimizer, state = build(0)
    train(model, optimizer, 5)
    slot = state.capture()
    digest = state.digest(slot)
    with CheckpointStore(tmp_path) as store:
        store.save(5, slot, {"engine": {"level": np.float64(0.25), "mean": np.arange(3.0)}})
        train(model, optimizer, 1)
        state.capture(slot)  # the slot is reused while its copy is being written
    state.load_tree(store.load_last_clean()[1])
    assert state.digest() == digest
    expected = train(model, optimizer, 10)

    fresh, other, resumed = build(9)
    step, tree, meta = CheckpointStore(tmp_path).load_last_clean()
    resumed.load_tree(tree)
    assert (step, meta["engine"]["level"], meta["engine"]["mean"].tolist()) == (5, 0.25, [0.0, 1.0, 2.0])
    assert resumed.digest() == digest
    assert all(map(torch.equal, train(fresh, other, 10), expected))


def test_what_is_saved_is_what_was_there_when_save_was_called(tmp_path: Path) -> None:
    tree, meta = tree_of(1), {"list": [1], "array": np.zeros(2)}
    with CheckpointStore(tmp_path) as store:
        gate = threading.Event()
        store.save(1, tree, meta, model_saver=lambda folder: gate.wait(10) and None)
        store.save(2, tree, meta)
        tree["weight"].zero_()
        meta["list"].append(2)
        meta["array"] += 1
        gate.set()
    _, loaded, loaded_meta = store.load_last_clean()
    assert bool((loaded["weight"] == 1).all())
    assert (loaded_meta["list"], loaded_meta["array"].tolist()) == ([1], [0.0, 0.0])


def test_one_waits_while_one_is_written_and_the_newer_replaces_it(tmp_path: Path) -> None:
    model = nn.Linear(3, 3)
    state = TrainingState(model, optimizers=[], schedulers=[])
    started, gate = threading.Event(), threading.Event()

    def slow(folder: Path) -> None:
        started.set()
        assert gate.wait(10)

    with CheckpointStore(tmp_path) as store:
        store.save(1, state.capture(), {}, model_saver=slow)
        assert started.wait(10)
        for step in range(2, 8):
            nn.init.constant_(model.weight, step)
            assert store.save(step, state.capture(), {})
        assert not store.flush(0.01)
        gate.set()
        assert store.flush(10)
        assert list(store.checkpoints().values()) == [1, 7]
    _, tree, _ = store.load_last_clean()
    assert bool((tree["modules"]["model"]["parameters"]["weight"] == 7).all())


# -- freezing ----------------------------------------------------------------------------------------------------------


def test_nothing_is_overwritten_while_frozen(tmp_path: Path) -> None:
    with saved(tmp_path, 1) as store:
        before = snapshot(tmp_path)
        started, gate = threading.Event(), threading.Event()

        def slow(folder: Path) -> None:
            started.set()
            assert gate.wait(10)

        store.save(2, tree_of(2), {}, model_saver=slow)
        assert started.wait(10)
        store.save(3, tree_of(3), {})
        store.freeze()
        assert not store.save(4, tree_of(4), {})
        gate.set()
        assert store.flush(10)
        assert snapshot(tmp_path) == before
        assert store.last_error is None
        store.thaw()
        assert store.save(5, tree_of(5), {})
    assert store.load_last_clean()[0] == 5
    assert not store.save(6, tree_of(6), {}), "a closed store accepts nothing"


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# -- faults ------------------------------------------------------------------------------------------------------------


@contextmanager
def largest_file(nbytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_is_full_costs_one_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    with saved(tmp_path, 1) as store:
        before = snapshot(tmp_path)
        with largest_file(20_000):
            assert store.save(2, tree_of(2, size=50_000), {})
            assert store.flush(10)
        assert isinstance(store.last_error, OSError | SnapshotError)
        assert snapshot(tmp_path) == before
        store.save(3, tree_of(3), {})
    assert store.last_error is None
    assert store.load_last_clean()[0] == 3


def test_errors_of_the_writer_never_reach_training(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("written")
        raise RuntimeError("no tokenizer")

    with saved(tmp_path, 1) as store:
        before = snapshot(tmp_path)
        store.save(2, tree_of(2), {}, model_saver=fail)
        assert store.flush(10)
        assert "no tokenizer" in str(store.last_error)
        store.save(2, {"bad": object()}, {})
        assert store.flush(10)
        assert "tree.bad is an object" in str(store.last_error)
        assert snapshot(tmp_path) == before
        shutil.rmtree(tmp_path)
        store.save(3, tree_of(3), {})
        assert store.flush(10)
        assert isinstance(store.last_error, OSError)


KILLED = """
import os, random, signal, sys, time
import torch
from pathlib import Path
from kalmanguard.snapshots.disk import CheckpointStore

folder, seeds = Path(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)

def train(start, pipe):
    store = CheckpointStore(folder)
    for step in range(start, start + 10_000):
        tree = {f"t{i}": torch.full((5_000,), float(step)) for i in range(8)}
        store.save(step, tree, {"step": step}, clean=step % 4 != 3)
        if step % 2 == 0:
            store.flush()
            assert store.last_error is None, store.last_error
            if step % 4 != 3:
                os.write(pipe, step.to_bytes(8, "little"))

last = 0
for seed in range(seeds):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            train(last + 1, writer)
        finally:
            os._exit(1)
    os.close(writer)
    confirmed = int.from_bytes(os.read(reader, 8), "little")
    time.sleep(random.Random(seed).uniform(0.0, 0.05))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    rest = os.read(reader, 1 << 16)
    os.close(reader)
    if rest:
        confirmed = int.from_bytes(rest[-8:], "little")
    step, tree, meta = CheckpointStore(folder).load_last_clean()
    assert step >= confirmed > last, (step, confirmed, last)
    assert meta == {"step": step} and step % 4 != 3
    assert all(bool((tensor == step).all()) for tensor in tree.values())
    last = step
print("survived", last)
"""


def test_killed_at_any_moment_the_last_confirmed_checkpoint_loads(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), "20"],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parent.parent,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("survived")


def test_leftovers_of_a_killed_process_are_cleared(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2).close()
    shutil.copytree(tmp_path / "slot-0", tmp_path / ".new")
    shutil.copytree(tmp_path / "slot-0", tmp_path / ".old")
    (tmp_path / f".{ANCHOR}.tmp").write_text("{")
    assert CheckpointStore(tmp_path).load_last_clean()[0] == 2
    saved(tmp_path, 3).close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [ANCHOR, "slot-0", "slot-1", "slot-2"]
    assert CheckpointStore(tmp_path).load_last_clean()[0] == 3


# -- foreign, damaged, hostile -----------------------------------------------------------------------------------------


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated tensors": (lambda f: truncate(f / "slot-0/tensors.safetensors"), "truncated"),
    "flipped bit in the tensors": (lambda f: flip(f / "slot-0/tensors.safetensors"), "digest differs"),
    "flipped bit in the tree": (lambda f: flip(f / "slot-0/tree.json"), "digest differs"),
    "truncated manifest": (lambda f: truncate(f / "slot-0/manifest.json"), "truncated or damaged"),
    "edited manifest": (
        lambda f: edit(f / "slot-0/manifest.json", lambda d: d.update(step=9)),
        "changed after it was written",
    ),
    "missing tensors": (lambda f: (f / "slot-0/tensors.safetensors").unlink(), "missing"),
    "missing manifest": (lambda f: (f / "slot-0/manifest.json").unlink(), "missing"),
    "missing slot": (lambda f: shutil.rmtree(f / "slot-0"), "not a checkpoint folder"),
    "missing anchor": (lambda f: (f / ANCHOR).unlink(), "anchor of the last clean checkpoint is missing"),
    "truncated anchor": (lambda f: truncate(f / ANCHOR), "truncated or damaged"),
    "empty anchor": (lambda f: (f / ANCHOR).write_text(""), "not valid JSON"),
    "anchor that is a list": (lambda f: (f / ANCHOR).write_text("[]"), "holds no JSON object"),
    "foreign anchor": (lambda f: (f / ANCHOR).write_text('{"format":"other"}'), "not written by kalmanguard"),
    "newer anchor": (lambda f: edit(f / ANCHOR, lambda d: d.update(version=2)), "newer than the version 1"),
    "version that is no number": (lambda f: edit(f / ANCHOR, lambda d: d.update(version="2")), "version is '2'"),
    "anchor that leads out": (lambda f: edit(f / ANCHOR, lambda d: d.update(folder="../x")), "no checkpoint of this"),
    "absolute anchor": (lambda f: edit(f / ANCHOR, lambda d: d.update(folder="/etc")), "no checkpoint of this"),
    "number as anchor": (lambda f: edit(f / ANCHOR, lambda d: d.update(folder=3)), "no checkpoint of this"),
    "anchor as a link": (lambda f: link(f / ANCHOR, f.parent / "elsewhere.json"), "is a link"),
    "slot as a link": (lambda f: link(f / "slot-0", f.parent / "elsewhere"), "is a link"),
    "tensors as a link": (lambda f: link(f / "slot-0/tensors.safetensors", f.parent / "elsewhere"), "is a link"),
    "a stray file": (lambda f: (f / "slot-0/stray").write_text("x"), "does not belong"),
    "a stray link": (lambda f: (f / "slot-0/stray").symlink_to("/etc"), "is a link"),
}


def link(path: Path, elsewhere: Path) -> None:
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_and_hostile_checkpoints_are_refused_with_a_sentence(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    saved(folder, 1).close()
    assert CheckpointStore(folder).load_last_clean()[0] == 1
    damage, sentence = DAMAGE[name]
    damage(folder)
    with pytest.raises(SnapshotError, match=sentence):
        CheckpointStore(folder).load_last_clean()


def manifest_edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "manifest.json", change)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda d: d["files"].update({"../out": {"bytes": 0, "sha256": ""}}), "leads out of"),
        (lambda d: d["files"].update({"/etc/passwd": {"bytes": 0, "sha256": ""}}), "leads out of"),
        (lambda d: d["files"].update({"a//b": {"bytes": 0, "sha256": ""}}), "leads out of"),
        (lambda d: d["files"].update({"a\\b": {"bytes": 0, "sha256": ""}}), "not the name of a file"),
        (lambda d: d["files"].pop("tree.json"), "does not list"),
        (lambda d: d.pop("step"), "damaged: KeyError"),
        (lambda d: d.update(files=3), "damaged: TypeError"),
        (lambda d: d.update(version=7), "newer"),
        (lambda d: d.update(format="zip"), "not written by kalmanguard"),
    ],
)
def test_a_manifest_cannot_lead_elsewhere(
    change: Callable[[dict[str, Any]], object], sentence: str, tmp_path: Path
) -> None:
    store = saved(tmp_path, 1)
    store.close()
    edit(tmp_path / "slot-0/manifest.json", change)
    with pytest.raises(SnapshotError, match=sentence):
        store.load(tmp_path / "slot-0")
    assert store.checkpoints() == {} or "out" in sentence or "name" in sentence


def test_a_tree_that_is_not_ours_is_refused(tmp_path: Path) -> None:
    store = saved(tmp_path, 1)
    store.close()
    text = '{"$":"tuple","v":[1]}'
    (tmp_path / "slot-0/tree.json").write_text(text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    edit(
        tmp_path / "slot-0/manifest.json",
        lambda d: d["files"].update({"tree.json": {"bytes": len(text), "sha256": digest}}),
    )
    with pytest.raises(SnapshotError, match="not the tree of a checkpoint"):
        store.load(tmp_path / "slot-0")


def test_a_folder_that_cannot_be_used_is_refused_at_construction(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SnapshotError, match="cannot be written to"):
        CheckpointStore(tmp_path / "file" / "run")
    with pytest.raises(ConfigurationError, match="slots = 1"):
        CheckpointStore(tmp_path, slots=1)
    with pytest.raises(SnapshotError, match="is missing"):
        CheckpointStore(tmp_path / "empty").load_last_clean()
    with pytest.raises(SnapshotError, match="not a checkpoint folder"):
        CheckpointStore(tmp_path / "empty").load(tmp_path / "file")


# -- save_pretrained ---------------------------------------------------------------------------------------------------


class Pretrained(nn.Module):
    """Has the interface of the hub libraries' models: tied weights, a buffer that is not saved, ``save_pretrained``."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("positions", torch.arange(4).expand(2, 4))
        self.register_buffer("cache", torch.zeros(2), persistent=False)

    def save_pretrained(self, folder: Path, state_dict: dict[str, Tensor] | None = None) -> None:
        weights = dict(self.state_dict() if state_dict is None else state_dict)
        assert weights["embed.weight"].data_ptr() == weights.pop("head.weight").data_ptr()
        save_file(weights, folder / "model.safetensors")
        (folder / "config.json").write_text("{}")


class Tokenizer:
    def save_pretrained(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")


def test_save_pretrained_writes_the_captured_weights_not_the_live_ones(tmp_path: Path) -> None:
    model = Pretrained()
    state = TrainingState(model, optimizers=[], schedulers=[])
    slot = state.capture()
    before = model.embed.weight.detach().clone()
    saver = pretrained_saver(model, state.tree(slot), Tokenizer())
    with CheckpointStore(tmp_path) as store:
        nn.init.zeros_(model.embed.weight)
        store.save(1, slot, {}, model_saver=saver)
    assert store.last_error is None
    assert store.load_last_clean()[0] == 1
    files = tmp_path / "slot-0" / "model"
    weights = load_file(files / "model.safetensors")
    assert torch.equal(weights["embed.weight"], before)
    assert torch.equal(weights["positions"], model.positions)
    assert sorted(weights) == ["embed.weight", "positions"]
    assert (files / "tokenizer.json").exists()
    flip(files / "model.safetensors")
    with pytest.raises(SnapshotError, match="digest differs"):
        store.load_last_clean()


def test_a_save_pretrained_that_reads_live_weights_is_refused() -> None:
    class Live(nn.Linear):
        def save_pretrained(self, folder: Path) -> None:
            raise AssertionError

    model = Live(1, 1)
    state = TrainingState(model, optimizers=[], schedulers=[])
    with pytest.raises(SnapshotError, match=r"Live\.save_pretrained takes no state_dict"):
        pretrained_saver(model, state.tree())


# -- codec -------------------------------------------------------------------------------------------------------------

ATOMS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4), st.binary(max_size=4),
    st.sampled_from([torch.bfloat16, torch.device("cuda:1"), float("-0.0")]),
)  # fmt: skip
TREES = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.one_of(st.text(max_size=3), st.integers(), st.just("$"), st.none()), inner, max_size=3),
    ),
    max_leaves=12,
)


@given(TREES)
@settings(deadline=None, max_examples=30)
def test_the_codec_round_trips(tree: Any) -> None:
    text, tensors = encode(tree)
    assert repr(decode(text, tensors)) == repr(tree)


def test_the_codec_round_trips_tensors_and_arrays() -> None:
    shared = torch.arange(4)
    tree = {
        "shared": [shared, shared],
        "half": torch.randn(3, 2).to(torch.bfloat16).t(),
        "wide": torch.randn(2, dtype=torch.complex128),
        "scalar": torch.tensor(2.5),
        "array": np.arange(6, dtype=">i2").reshape(2, 3),
        "number": np.float64(0.1),
        "none": np.zeros((0, 2)),
    }
    back = decode(*encode(tree))
    assert back["shared"][0] is back["shared"][1]
    for name in ("half", "wide", "scalar"):
        assert torch.equal(back[name], tree[name])
        assert back[name].dtype == tree[name].dtype
    for name in ("array", "number", "none"):
        assert np.array_equal(back[name], tree[name])
        assert (back[name].dtype, type(back[name])) == (tree[name].dtype, type(tree[name]))


@pytest.mark.parametrize("value", [object(), {1, 2}, 1j, np.array(["a", None]), Path("."), len, nn.Linear(1, 1)])
def test_the_codec_refuses_everything_else(value: object) -> None:
    with pytest.raises(SnapshotError, match=r"^extras\.0\.x (is|has) a"):
        encode({"extras": [{"x": value}]})
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(SnapshotError, match="contains itself"):
        encode(loop)


@pytest.mark.parametrize(
    "text",
    ["", "[", '{"$":"evil","v":1}', '{"$":"tensor","v":"t7"}', '{"$":"dtype","v":"load"}', '{"$":"dict","v":[[[1],2]]}',
     '{"$":"ndarray","v":"t0","dtype":"O","shape":[]}', '{"$":"float","v":"x"}', '{"$":["a"]}', "[" * 100_000],
)  # fmt: skip
def test_the_codec_reads_nothing_foreign(text: str) -> None:
    with pytest.raises(SnapshotError, match="damaged or not ours"):
        decode(text, {"t0": torch.zeros(2)})
