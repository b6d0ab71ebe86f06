"""What each rank of the tests of sharded checkpoints runs: a small transformer under ``fully_shard``, trained for real.

What a run returns holds whole tensors, gathered from all ranks, so that runs on different numbers of ranks can be
compared bit for bit.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from kalmanguard.distributed.durable import ShardedStore
from kalmanguard.distributed.storage import ShardReader
from kalmanguard.errors import SnapshotError
from kalmanguard.snapshots.state import TrainingState

WIDTH = 12


class Block(nn.Module):
    """Feed-forward network with a residual, and batch statistics that every rank keeps for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 30)
        self.down = nn.Linear(30, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Transformer(nn.Module):
    """Tied embeddings, attention, two blocks; 5 tokens do not divide evenly among 2 or 4 ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.drop = nn.Dropout(0.2)
        self.statistics = nn.BatchNorm1d(WIDTH)
        self.head = nn.Linear(WIDTH, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        for block in self.blocks:
            x = block(x)
        x = self.statistics(self.drop(x).transpose(1, 2)).transpose(1, 2)
        return self.head(x)  # type: ignore[no-any-return]


class Cursor:
    """A loader whose position can be taken and put back."""

    def __init__(self, rank: int) -> None:
        self.rank, self.drawn = rank, 0

    def draw(self) -> Tensor:
        self.drawn += 1
        return torch.randint(5, (3, 7), generator=torch.Generator().manual_seed(1000 * self.rank + self.drawn))

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self.drawn, "rank": self.rank}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.drawn = state["drawn"]


class BySize(torch.optim.Optimizer):
    """Steps scaled by the mean square of each parameter, which is state of another shape than the parameter's."""

    def __init__(self, groups: Any) -> None:
        super().__init__(groups, {"lr": 1e-2})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                square = parameter.detach().square().mean()
                if isinstance(square, DTensor):
                    square = square.redistribute(placements=[Replicate()] * square.device_mesh.ndim)
                state = self.state[parameter]
                if not state:
                    state["steps"], state["size"] = 0, torch.zeros_like(square)
                state["steps"] += 1
                state["size"].lerp_(square, 0.1)
                parameter -= group["lr"] * parameter.grad * (state["size"] + 1e-3).sqrt()


class Run:
    """A model, sharded as ``how`` says, with all that belongs to its training."""

    def __init__(self, how: str = "fsdp", *, seed: int = 0, optimizer: str = "adamw") -> None:
        rank = dist.get_rank() if dist.is_initialized() else 0
        mates = (
            dist.get_world_size() // 2 if how == "2d" else 1
        )  # ranks that share the tensors of a layer, and its data
        torch.manual_seed(seed)
        self.model: nn.Module = Transformer()
        if how == "wide":
            self.model.blocks[0].up, self.model.blocks[0].down = nn.Linear(WIDTH, 31), nn.Linear(31, WIDTH)
        if how in ("fsdp", "wide"):
            for block in self.model.blocks:
                fully_shard(block)
            fully_shard(self.model)
        elif how == "2d":
            mesh = init_device_mesh("cpu", (2, mates), mesh_dim_names=("data", "tensor"))
            for block in self.model.blocks:
                plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
                parallelize_module(block, mesh["tensor"], plan)
                fully_shard(block, mesh=mesh["data"])
            fully_shard(self.model, mesh=mesh["data"])
        groups = [
            {"params": [p for p in self.model.parameters() if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in self.model.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ]
        made: dict[str, Any] = {
            "adamw": lambda: torch.optim.AdamW(groups, lr=1e-2),
            "size": lambda: BySize(groups),
        }
        self.optimizer = made[optimizer]()
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.97)
        self.cursor = Cursor(rank // mates)
        self.state = TrainingState(
            self.model, optimizers=[self.optimizer], schedulers=[self.scheduler], loader=self.cursor
        )
        torch.manual_seed(seed + rank // mates)
        random.seed(seed + rank)
        np.random.seed(seed + rank)
        self.replicated = how == "replicas"

    def train(self, steps: int) -> list[float]:
        """Losses of this rank."""
        losses = []
        for _ in range(steps):
            tokens = self.cursor.draw()
            self.optimizer.zero_grad()
            loss = nn.functional.cross_entropy(self.model(tokens).flatten(0, 1), tokens.roll(1, 1).flatten())
            loss.backward()
            if self.replicated:
                for parameter in self.model.parameters():
                    dist.all_reduce(parameter.grad)
            self.optimizer.step()
            self.scheduler.step()
            losses.append(loss.item())
        return losses

    def whole(self) -> dict[str, Tensor]:
        """Parameters and optimizer state, put together from all ranks."""
        found = dict(self.model.named_parameters())
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for number, parameter in enumerate(parameters):
            for name, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    found[f"{number}.{name}"] = value
        return {
            name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
            for name, value in found.items()
        }

    def own(self) -> dict[str, Any]:
        """What this rank has for itself."""
        return {
            "buffers": {name: buffer.clone() for name, buffer in self.model.named_buffers()},
            "torch": torch.get_rng_state(),
            "python": random.getstate(),
            "numpy": np.random.get_state()[1].tolist(),
            "rates": [group["lr"] for group in self.optimizer.param_groups],
            "epoch": self.scheduler.last_epoch,
            "drawn": self.cursor.drawn,
        }


def save(rank: int, size: int, folder: Path, *, how: str = "fsdp", optimizer: str = "adamw") -> dict[str, Any]:
    """Train, save, train on; what was saved, and how it went on."""
    run = Run(how, optimizer=optimizer)
    run.train(3)
    slot = run.state.capture()
    found = {"whole": run.whole(), "own": run.own(), "digest": run.state.digest(slot, schedule=True, data=True)}
    with ShardedStore(folder / "checkpoints", state=run.state, timeout_s=60) as store:
        assert store.save(3, slot, {"rank": rank, "scale": np.float64(0.5), "mean": np.arange(3.0) + rank})
        found["later"] = run.train(3)
        run.state.capture(slot)  # while its copy is being written
        assert store.flush(60)
        assert store.last_error is None, store.last_error
    return found


def load(
    rank: int, size: int, folder: Path, *, saved: Path, how: str = "fsdp", optimizer: str = "adamw", warm: int = 0
) -> dict[str, Any]:
    """Build anew from another seed, perhaps train a little, load, train on."""
    run = Run(how, seed=7, optimizer=optimizer)
    run.train(warm)
    fresh = torch.get_rng_state()
    with ShardedStore(saved, state=run.state, timeout_s=60) as store:
        step, meta = store.load_last_clean_into(data=True)
    found = {"step": step, "meta": meta, "whole": run.whole(), "own": run.own(), "fresh": fresh}
    found["digest"] = run.state.digest(schedule=True, data=True)
    found["later"] = run.train(3)
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def everything(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """What two ranks can show in one go, since starting them takes longer than all that they do."""
    found: dict[str, Any] = {"saved": save(rank, size, folder)}
    found["loaded"] = load(rank, size, folder, saved=folder / "checkpoints")
    found["foreign reader"] = read_by_torch(folder / "checkpoints" / "slot-0")
    run = Run()
    for part in (plain_interface, differing_speeds, frozen, full_disk, other_folders, another_model):
        dist.barrier()
        found[part.__name__] = part(rank, folder, run)
    return found


def read_by_torch(folder: Path) -> dict[str, Tensor]:
    """Parameters as torch.distributed.checkpoint reads them by its own planner."""
    run = Run(seed=9)
    into = {f"tree/modules/model/parameters/{name}": p.detach() for name, p in run.model.named_parameters()}
    dcp.load(into, storage_reader=ShardReader(folder))
    return {name: p for name, p in run.whole().items() if not name[0].isdigit()}


def plain_interface(rank: int, folder: Path, run: Run) -> tuple[int, str]:
    """As `CheckpointStore` is used."""
    with ShardedStore(folder / "checkpoints", state=run.state, timeout_s=60) as store:
        (path,) = store.checkpoints()
        step, tree, _ = store.load(path)
        run.state.load_tree(tree, data=True)
    return step, run.state.digest(schedule=True, data=True)


def differing_speeds(rank: int, folder: Path, run: Run) -> tuple[list[int], int, dict[str, int]]:
    """Ranks that save the same steps, each at a pace of its own."""
    pace = random.Random(rank)
    with ShardedStore(folder / "speeds", state=run.state, timeout_s=60) as store:
        slot = run.state.capture()
        for step in range(1, 31):
            assert store.save(step, slot, {"step": step}, model_saver=lambda folder: time.sleep(0.05))
            time.sleep(pace.uniform(0.0, 0.04))
        assert store.flush(60)
        assert store.last_error is None, store.last_error
        steps = list(store.checkpoints().values())
        step, _, meta = store.load_last_clean()
    return steps, step, meta


def frozen(rank: int, folder: Path, run: Run) -> list[bool]:
    gate = threading.Event()
    store = ShardedStore(folder / "frozen", state=run.state, timeout_s=60)
    slot = run.state.capture()
    store.save(1, slot, {})
    assert store.flush(60)
    dist.barrier()
    before = {name: data for name, data in files(store.folder).items() if not name.startswith(".")}
    store.save(2, slot, {}, model_saver=lambda folder: gate.wait(60) and None)
    store.save(3, slot, {})
    store.freeze()
    refused = not store.save(4, slot, {}) and store.frozen
    dist.barrier()  # all are frozen
    gate.set()
    assert store.flush(60)
    dist.barrier()
    found = [refused, files(store.folder) == before, store.last_error is None]
    dist.barrier()
    store.thaw()
    found.append(store.save(5, slot, {}))
    found += [store.close(), store.load_last_clean()[0] == 5, not store.save(6, slot, {})]
    return found


def full_disk(rank: int, folder: Path, run: Run) -> tuple[str, bool, int]:
    """The disk of rank 1 is full for a while."""
    with ShardedStore(folder / "full", state=run.state, timeout_s=60) as store:
        slot = run.state.capture()
        store.save(1, slot, {})
        assert store.flush(60)
        dist.barrier()
        before = files(store.folder)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (3_000, hard))
        assert store.save(2, slot, {})
        assert store.flush(60)
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        dist.barrier()
        error, same = f"{type(store.last_error).__name__}: {store.last_error}", files(store.folder) == before
        dist.barrier()
        # A copy that fails on one rank alone is told to the others.
        if rank == 1:
            store.save(3, {"bad": torch.empty(1, device="meta")}, {})
        else:
            store.save(3, slot, {})
        assert store.flush(60)
        assert "Rank 1" in str(store.last_error), store.last_error
        store.save(4, slot, {})
        assert store.flush(60)
        assert store.last_error is None
        return error, same, store.load_last_clean()[0]


def other_folders(rank: int, folder: Path, run: Run) -> str:
    try:
        ShardedStore(folder / f"of-rank-{rank}", state=run.state, timeout_s=60)
    except SnapshotError as error:
        return str(error)
    return "accepted"


def another_model(rank: int, folder: Path, run: Run) -> tuple[str, bool]:
    other = Run("wide")
    digest = other.state.digest()
    with ShardedStore(folder / "checkpoints", state=other.state, timeout_s=60) as store:
        try:
            store.load_last_clean_into()
        except SnapshotError as error:
            return str(error), other.state.digest() == digest
    return "accepted", False


def killed(
    rank: int, size: int, folder: Path, *, victim: int, call: str, nth: int = 1, timeout_s: float = 60.0
) -> dict[str, Any]:
    """One rank dies by SIGKILL at the ``nth`` call of ``os.<call>`` of the second checkpoint."""
    run = Run()
    run.train(1)
    store = ShardedStore(folder / "checkpoints", state=run.state, timeout_s=timeout_s)
    found: dict[str, Any] = {"whole": run.whole()}
    store.save(1, run.state.capture(), {"step": 1})
    assert store.flush(60)
    assert store.last_error is None, store.last_error
    run.train(1)
    slot = run.state.capture()
    dist.barrier()
    if rank == victim:
        original, calls = getattr(os, call), iter(range(1, 1000))

        def deadly(*arguments: Any, **options: Any) -> Any:
            if next(calls) == nth:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        setattr(os, call, deadly)
    store.save(2, slot, {"step": 2})
    started = time.monotonic()
    found["flushed"] = store.flush(40)
    found["seconds"] = time.monotonic() - started
    found["error"] = f"{type(store.last_error).__name__}: {store.last_error}"
    found["accepted"] = store.save(3, slot, {})
    found["closed"] = store.close()
    return found


def hanging(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Rank 1 is stopped in mid-run; the others notice when the time is up, and train on meanwhile."""
    run = Run("alone")
    store = ShardedStore(folder / "checkpoints", state=run.state, timeout_s=5)
    slot = run.state.capture()
    store.save(1, slot, {})
    assert store.flush(60)
    if rank == 1:
        time.sleep(20)  # it saves nothing any more
        return {}
    store.save(2, slot, {})
    started = time.monotonic()
    losses = run.train(3)
    busy = time.monotonic() - started
    return {
        "losses": losses,
        "trained": busy,
        "flushed": store.flush(30),
        "error": f"{type(store.last_error).__name__}: {store.last_error}",
        "accepted": store.save(3, slot, {}),
    }


def drifted(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Replicas that are none: each rank has parameters of its own under the same names."""
    run = Run("alone", seed=rank)
    run.train(2)
    with ShardedStore(folder / "checkpoints", state=run.state, timeout_s=60) as store:
        digest = run.state.digest()
        store.save(2, run.state.capture(), {})
        assert store.flush(60)
        run.train(2)
        store.load_last_clean_into()
        return {"digest": digest, "loaded": run.state.digest(), "error": store.last_error}
