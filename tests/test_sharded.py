"""The supervisor over sharded parameters: FSDP2, replicas of shards, tensor parallelism and both, on gloo processes.

Oracles: the sketch of the whole tensor for those of its shards; the same run without a supervisor, bit for bit; the
states of every rank after every step, which a rollback must bring back; and the first pass over steps for the second.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.testing._internal.distributed.fake_pg import FakeStore

from kalmanguard.certificate.verify import verify
from kalmanguard.replay import replay
from kalmanguard.sensors import shards
from kalmanguard.sensors.sketch import Sketch

from .rank_runs import launch
from .shard_runs import train

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")

_SLOW = pytest.mark.slow
#: Layouts and numbers of ranks; the first is quick.
LAYOUTS = [
    ("fsdp", 2),
    pytest.param("tp", 2, marks=_SLOW),
    *(pytest.param(name, 4, marks=_SLOW) for name in ("fsdp", "hsdp", "2d")),
]


# -- the sketch --------------------------------------------------------------------------------------------------------


def block_sketch(rank: int, value: torch.Tensor, mesh: tuple[int, ...], placements: Sequence[Any]) -> np.ndarray:
    """The sketch of what ``rank`` holds, in a process that believes to be that rank."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        found = np.full(64, np.nan)
        try:
            torch.set_num_threads(1)
            dist.init_process_group("fake", rank=rank, world_size=math.prod(mesh), store=FakeStore())
            place = init_device_mesh("cpu", mesh)
            shape, offset = compute_local_shape_and_global_offset(value.shape, place, placements)
            part = value[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))].contiguous()
            spread = DTensor.from_local(
                part, place, placements, shape=value.shape, stride=value.stride(), run_check=False
            )
            coordinate = place.get_coordinate()
            assert coordinate is not None
            counted = all(not p.is_replicate() or coordinate[i] == 0 for i, p in enumerate(placements))
            found = np.zeros(64)
            if counted and part.numel():
                found = Sketch([("w", spread)], size=64, total=value.numel())()
        finally:
            os.write(writer, found.tobytes())
            os._exit(0)
    os.wait()
    data = os.read(reader, 64 * 8)
    os.close(reader)
    os.close(writer)
    return np.frombuffer(data)


@pytest.mark.parametrize(
    ("mesh", "placements"),
    [
        ((2,), (Shard(0),)),
        ((3,), (Shard(0),)),
        ((2,), (Shard(1),)),
        ((2, 2), (Replicate(), Shard(0))),
        ((2, 2), (Shard(0), Shard(1))),
    ],
    ids=["rows", "three", "columns", "hybrid", "both"],
)
@pytest.mark.parametrize("shape", [(7, 5), (513, 385), (512, 384), (64, 48, 3, 3), (300, 1536)], ids=str)
def test_the_sketches_of_shards_add_up_to_that_of_the_whole(
    shape: tuple[int, ...], mesh: tuple[int, ...], placements: Sequence[Any]
) -> None:
    value = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    whole = Sketch([("w", value)], size=64, total=value.numel())()
    parts = [block_sketch(rank, value, mesh, placements) for rank in range(math.prod(mesh))]
    np.testing.assert_allclose(np.sum(parts, axis=0), whole, atol=3e-7 * float(np.abs(whole).max()))


def test_runs_of_a_block() -> None:
    whole = torch.arange(4 * 6 * 5).reshape(4, 6, 5)
    block = shards.Shard(whole[1:3, 2:5], (4, 6, 5), (1, 2, 0))
    starts, length = block.runs()
    found = np.concatenate([np.arange(s, s + length) for s in starts])
    assert found.tolist() == block.tensor.reshape(-1).tolist()


# -- training ----------------------------------------------------------------------------------------------------------


def agreeing(ranks: list[Any]) -> list[dict[str, Any]]:
    for rank in ranks:
        assert isinstance(rank, dict), rank
        assert rank["decisions"] == ranks[0]["decisions"]
        assert rank.get("errors", 0) == 0
    return ranks


@pytest.mark.parametrize(("layout", "size"), LAYOUTS)
@pytest.mark.parametrize("mode", [pytest.param("observe", marks=_SLOW), "protect"])
def test_a_clean_run_is_the_bare_run(layout: str, size: int, mode: str, tmp_path: Path) -> None:
    runs = []
    for name in (None, mode):
        folder = tmp_path / str(name)
        folder.mkdir()
        runs.append(agreeing(launch(train, size, folder, layout=layout, mode=name, steps=36)))
    bare, supervised = runs
    assert [rank["states"] for rank in supervised] == [rank["states"] for rank in bare]
    assert len({rank["states"][-1] for rank in bare}) == (size if layout in ("fsdp", "tp", "2d") else 2)


@pytest.mark.parametrize(("layout", "size"), LAYOUTS)
def test_faults_are_undone_exactly_on_all_ranks(layout: str, size: int, tmp_path: Path) -> None:
    """A gradient that is no number and a flipped bit on the last rank, a rate that explodes on all."""
    faults = (("nan", size - 1, 35), ("spike", -1, 45), ("flip", size - 1, 60))
    ranks = agreeing(launch(train, size, tmp_path, layout=layout, steps=70, faults=faults))
    acted = [decision for decision in ranks[0]["decisions"] if decision[1] != "ACCEPT"]
    assert [(decision[0], decision[1]) for decision in acted] == [(35, "VETO"), (45, "ROLLBACK"), (60, "ROLLBACK")]
    for rank in ranks:
        states = rank["states"]
        assert states[35] == states[34]
        for step, target in ((45, acted[1][4]), (60, acted[2][4])):
            assert states[step] == states[target]
        assert len(set(states)) == len(states) - 3
        claims = dict(rank["certificate"])
        assert claims["C1"] == claims["C2"] == claims["C6"] == "HOLDS"
    assert replay(tmp_path / "run").identical


@pytest.mark.slow
def test_clipping_hides_no_explosion(tmp_path: Path) -> None:
    """The norm of a gradient that FSDP2 has clipped comes in parts; it is told as one."""
    ranks = agreeing(launch(train, 2, tmp_path, steps=50, clip=0.5, faults=(("explosion", 1, 40),)))
    acted = [decision for decision in ranks[0]["decisions"] if decision[1] == "VETO"]
    assert [decision[0] for decision in acted] == [40]


@pytest.mark.parametrize(
    ("size", "layout"),
    [(2, "fsdp"), pytest.param(4, "fsdp", marks=_SLOW), pytest.param(4, "2d", marks=_SLOW)],
)
def test_a_run_is_resumed_on_as_many_ranks_as_there_are(size: int, layout: str, tmp_path: Path) -> None:
    """A run of two ranks, closed with its last certified state on disk, goes on with that state, however it is cut."""
    before = agreeing(launch(train, 2, tmp_path, steps=40))
    for rank in range(2):
        (tmp_path / f"rank{rank}.pt").unlink()
    (tmp_path / "store").unlink(missing_ok=True)
    after = agreeing(launch(train, size, tmp_path, layout=layout, steps=20, resume=True))
    assert len(after) == size
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in after[0]["whole"].items())
    for rank in after:
        assert rank["resumed_from"] == 40
        for name, value in before[0]["whole"].items():
            assert torch.equal(rank["first"][name], value), name
    if (size, layout) == (2, "fsdp"):
        assert [rank["states"][0] for rank in after] == [rank["states"][40] for rank in before]
    report = verify(tmp_path / "run")
    assert report.exit_code == 0, str(report)
    assert {claim.name: claim.status for claim in report.claims}["durable"] == "HOLDS"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "victim", "size"),
    [("capture", 1, 2), ("capture", 0, 4), ("intent", 0, 2), ("between tensors", 1, 2), ("between tensors", 3, 4)],
)
def test_a_rank_is_killed_in_a_snapshot_or_a_rollback(place: str, victim: int, size: int, tmp_path: Path) -> None:
    """The others are told; what is on disk is whole, and all of what the journal calls durable is there."""
    faults = (("flip", size - 1, 47),) if place != "capture" else ()
    options = {"steps": 80, "checkpoint_share": 0.5, "rank_timeout_s": 15.0}
    found = launch(train, size, tmp_path, doom=(victim, place, 45), faults=faults, **options)
    assert found[victim] is None
    assert (tmp_path / "death").exists(), "nobody came to the place"
    for rank in (*range(victim), *range(victim + 1, size)):
        assert isinstance(found[rank], str), found[rank]
        assert "Error" in found[rank]
    before = verify(tmp_path / "run")
    said = {claim.name: claim for claim in before.claims}
    assert (said["run"].status, said["durable"].status) == ("INCOMPLETE", "HOLDS")
    after = []
    for number in range(2):
        folder = tmp_path / f"after-{number}"
        folder.mkdir()
        shutil.copytree(tmp_path / "run", folder / "run")
        after.append(agreeing(launch(train, 2, folder, steps=20, resume=True)))
    assert [rank["states"] for rank in after[0]] == [rank["states"] for rank in after[1]]
    assert f"the last is the state of step {after[0][0]['resumed_from']}," in said["durable"].text
    report = verify(tmp_path / "after-0" / "run")
    assert report.exit_code == 0, str(report)


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "size"), [("fsdp", 2), ("fsdp", 4), ("2d", 4)])
def test_steps_after_a_rollback_are_the_same_steps_again(layout: str, size: int, tmp_path: Path) -> None:
    """300 steps, a rollback to where they began with data, schedule and random streams, and the same 300 steps.

    The supervisor observes: in protect mode it would not have what was gained given back.
    """
    options = {"steps": 320, "again": 300, "mode": "observe", "limit": 400.0}
    for rank in agreeing(launch(train, size, tmp_path, layout=layout, **options)):
        assert rank["again"] == rank["states"][rank["from"] : rank["from"] + 301]


@pytest.mark.slow
def test_decisions_are_equal_in_ten_thousand_steps_with_faults_on_random_ranks(tmp_path: Path) -> None:
    generator = np.random.default_rng(11)
    kinds = ("nan", "spike", "flip", "explosion")
    steps = np.arange(60, 10_000, 97)
    faults = tuple(
        (kind, -1 if kind == "spike" else int(generator.integers(2)), int(step))
        for kind, step in zip(generator.choice(kinds, len(steps)), steps, strict=True)
    )
    ranks = agreeing(
        launch(train, 2, tmp_path, steps=10_000, faults=faults, rollback_budget=10_000, limit=900.0, small=True)
    )
    acted = [decision for decision in ranks[0]["decisions"] if decision[1] != "ACCEPT"]
    assert len(acted) >= len(faults) // 2


# -- frameworks --------------------------------------------------------------------------------------------------------


def _lightning(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Lightning's own strategy for FSDP2; a gradient of rank 1 that is no number in step 30."""
    import lightning.pytorch as pl
    from lightning.pytorch.strategies import ModelParallelStrategy
    from torch.distributed.fsdp import fully_shard
    from torch.utils.data import DataLoader, TensorDataset

    from kalmanguard import Settings
    from kalmanguard.integrations.lightning import KalmanGuardLightning
    from kalmanguard.models import load_plant

    from .rank_runs import FIXED, essence

    plant = load_plant("vit")(seed=0)
    batches = [next(plant.loader) for _ in range(40)]
    states = []

    class Digits(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = plant.model

        def configure_model(self) -> None:
            mesh = self.device_mesh["data_parallel"]
            for block in self.net.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(self.net, mesh=mesh)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.net(images)
            return logits

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

        validation_step = training_step

        def on_after_backward(self) -> None:
            if (rank, self.global_step) == (1, 29):
                for p in self.parameters():
                    if p.grad is not None:
                        shards.local(p.grad).fill_(torch.nan)

        def on_train_batch_end(self, *_: Any) -> None:
            states.append([shards.local(p.detach()).sum().item() for p in self.parameters()])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

        def train_dataloader(self) -> Any:
            inputs, targets = zip(*batches, strict=True)
            return DataLoader(TensorDataset(torch.cat(inputs), torch.cat(targets)), batch_size=32)

        def val_dataloader(self) -> Any:
            return DataLoader(TensorDataset(*plant.probe_loader[0]), batch_size=64)

    guard = KalmanGuardLightning(settings=Settings(**FIXED))
    trainer = pl.Trainer(
        accelerator="cpu", devices=size, max_steps=40, callbacks=[guard], logger=False, enable_checkpointing=False,
        strategy=ModelParallelStrategy(process_group_backend="gloo"), enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    module = Digits()
    trainer.fit(module)
    assert all(shards.is_sharded(p) for p in module.parameters())
    assert guard.supervisor is not None
    return {
        "decisions": [essence(decision) for decision in guard.decisions],
        "errors": guard.supervisor.statistics()["errors"],
        "states": states,
    }


@pytest.mark.slow
def test_lightning_with_sharded_parameters(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    for rank in agreeing(launch(_lightning, 2, tmp_path)):
        assert [decision[:2] for decision in rank["decisions"] if decision[1] != "ACCEPT"] == [(30, "VETO")]
        assert len(rank["decisions"]) == 40
