"""What each rank of the tests with sharded parameters runs: one process of a real training of a small transformer."""

from __future__ import annotations

import hashlib
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from kalmanguard import Settings, Supervisor
from kalmanguard.models import load_plant
from kalmanguard.models.vit import ViT
from kalmanguard.sensors import shards
from kalmanguard.sensors.shards import local

from . import rank_death_runs
from .rank_runs import FIXED, essence

#: Meshes by layout: which dimensions replicate, shard, and split the forward pass.
LAYOUTS = ("fsdp", "hsdp", "tp", "2d")


def shard(model: nn.Module, layout: str, size: int) -> DeviceMesh | None:
    """Spread a vision transformer of two blocks over the ranks; returns the mesh of tensor parallelism, if any."""
    if layout == "fsdp":
        mesh, split = init_device_mesh("cpu", (size,)), None
    elif layout == "hsdp":
        mesh, split = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard")), None
    elif layout == "tp":
        mesh, split = None, init_device_mesh("cpu", (size,))
    else:
        both = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("data", "tensor"))
        mesh, split = both["data"], both["tensor"]
    for block in model.blocks:  # type: ignore[union-attr]
        if split is not None:
            parallelize_module(block, split, {"feed.widen": ColwiseParallel(), "feed.merge": RowwiseParallel()})
        if mesh is not None:
            fully_shard(block, mesh=mesh)
    if mesh is not None:
        fully_shard(model, mesh=mesh)
    return split


def digest(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """Of all that this rank holds of parameters, buffers and optimizer state."""
    found = hashlib.sha256()
    state = [value for p in model.parameters() for value in optimizer.state.get(p, {}).values()]
    for tensor in [*model.parameters(), *model.buffers(), *state]:
        if isinstance(tensor, Tensor):
            found.update(local(tensor.detach()).contiguous().numpy().tobytes())
    return found.hexdigest()


def train(
    rank: int,
    size: int,
    folder: Path,
    *,
    layout: str = "fsdp",
    steps: int = 60,
    mode: str | None = "protect",
    faults: tuple[tuple[str, int, int], ...] = (),
    clip: float | None = None,
    again: int = 0,
    small: bool = False,
    resume: bool = False,
    doom: tuple[int, str, int] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Train on digits.

    ``faults`` are (kind, rank, step); ``again`` runs the last so many steps twice; ``doom`` is the rank that is killed,
    the place (see `rank_death_runs.PLACES`), and the step from which that may happen.
    """
    warnings.simplefilter("ignore")
    plant = load_plant("vit")(seed=0, batch_size=16 if small else 64)
    model, loss_fn = plant.model, nn.functional.cross_entropy
    if small:
        torch.manual_seed(0)
        model = ViT(width=16, layers=1, heads=2)
    split = shard(model, layout, size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    # Ranks that split a forward pass work on the same examples.
    part, parts = (rank, size) if split is None else (rank // split.size(), size // split.size())
    torch.manual_seed(100 + part)
    supervisor = None
    if mode is not None:
        chosen = Settings(**{**FIXED, "mode": mode, "rank_timeout_s": 60.0, **settings})
        make = partial(Supervisor.resume, folder / "run") if resume else partial(Supervisor, run_dir=folder / "run")
        supervisor = make(
            model,
            plant.probe_loader,
            optimizer=optimizer,
            settings=chosen.model_copy(update={"replay": bool(again)}),
            loader=plant.loader,
        )
    if doom is not None and doom[0] == rank:
        rank_death_runs.PLACES[doom[1]](folder)
    states, decisions = [digest(model, optimizer)], []
    first = _whole(model)

    def take(step: int) -> None:
        if doom is not None and step == doom[2]:
            assert supervisor is not None
            supervisor._loop.actuator.wait_for_checkpoint()
            rank_death_runs.armed = rank == doom[0]
        inputs, targets = next(plant.loader)
        piece = slice(len(targets) * part // parts, len(targets) * (part + 1) // parts)
        loss = loss_fn(model(inputs[piece]), targets[piece])
        loss.backward()  # type: ignore[no-untyped-call]
        due = [kind for kind, on, at in faults if at == step and on in (rank, -1)]
        _strike_gradient(model, due)
        if clip is not None:
            norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
            if supervisor is not None:
                supervisor.clipped_from(norm)
        rate = optimizer.param_groups[0]["lr"]
        if "spike" in due:
            optimizer.param_groups[0]["lr"] = 100 * rate
        optimizer.step()
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        if "flip" in due:
            _flip(model)
        if supervisor is not None:
            decisions.append(supervisor.update(loss))
        states.append(digest(model, optimizer))

    begin = steps - again
    for step in range(1, steps + 1):
        take(step)
        if supervisor is not None and again and step == begin:
            supervisor.snapshot()
    found: dict[str, Any] = {"states": list(states), "decisions": [essence(decision) for decision in decisions]}
    if supervisor is not None and again:
        supervisor.rollback(begin)
        states.clear()
        states.append(digest(model, optimizer))
        for step in range(again):
            take(steps + 1 + step)
        found |= {"again": list(states), "from": begin}
    if supervisor is not None:
        found["errors"] = supervisor.statistics()["errors"]
        found["resumed_from"] = supervisor.resumed_from
        found |= {"first": first, "whole": _whole(model)}
        supervisor.save(folder / "saved")
        found["certificate"] = [(claim.name, claim.status) for claim in supervisor.certificate().claims]
        supervisor.close()
    return found


def _whole(model: nn.Module) -> dict[str, Tensor]:
    return {name: shards.whole(p.detach()).clone() for name, p in model.named_parameters()}


def _strike_gradient(model: nn.Module, due: list[str]) -> None:
    for p in model.parameters():
        if p.grad is not None and local(p.grad).numel():
            if "nan" in due:
                local(p.grad).view(-1)[0] = torch.nan
            if "explosion" in due:
                local(p.grad).mul_(1e4)
            return


def _flip(model: nn.Module) -> None:
    """The highest bit of an exponent, which makes a small weight a huge one."""
    for p in model.parameters():
        held = local(p.detach()).view(-1)
        if len(held) > 100:
            held[50:51].view(torch.int32).bitwise_xor_(1 << 30)
            return
