"""What each rank of the distributed tests runs: one process of a real training under DistributedDataParallel."""

from __future__ import annotations

import hashlib
import os
import signal
import traceback
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kalmanguard import FaultInjector, Settings, Supervisor
from kalmanguard.models import load_plant
from kalmanguard.records import Decision

FIXED: dict[str, Any] = {"probe_examples": 64, "fresh_examples": 32, "probe_every": 5, "snapshot_every": 10}


def digest(model: nn.Module) -> str:
    """Of all parameters and buffers."""
    found = hashlib.sha256()
    for tensor in model.state_dict().values():
        found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def essence(decision: Decision) -> tuple[Any, ...]:
    """What was decided and said, with every number behind it."""
    numbers = tuple(repr(x) for x in decision.statistics)
    told = decision.step, decision.action.value, decision.level.value, decision.mode.value, decision.restored_step
    return (*told, decision.reason, numbers)


def launch(
    run: Any, size: int, folder: Path, *, limit: float = 120.0, timeout_s: float = 1800.0, **options: Any
) -> list[Any]:
    """Run ``run(rank, size, folder, **options)`` in ``size`` processes; what each returned, or the error's text.

    ``timeout_s`` is that of the default process group, in which gradients are reduced.
    """
    # The server imports torch once, and forks each rank from there.
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kalmanguard", "kalmanguard.models"])
    given = (folder / "store", timedelta(seconds=timeout_s), options)
    processes = [context.Process(target=_rank, args=(run, rank, size, folder, *given)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(limit)
        if process.is_alive():
            process.kill()
            process.join()
    return [
        torch.load(folder / f"rank{rank}.pt", weights_only=False) if (folder / f"rank{rank}.pt").exists() else None
        for rank in range(size)
    ]


def _rank(
    run: Any, rank: int, size: int, folder: Path, store: Path, timeout: timedelta, options: dict[str, Any]
) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    # Frameworks initialise a group of their own when there is none, by these.
    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {**ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timeout)
    try:
        result = run(rank, size, folder, **options)
    except BaseException as error:
        result = f"{type(error).__name__}: {error}"
        if os.environ.get("TRACE"):
            traceback.print_exc()
    torch.save(result, folder / f"rank{rank}.pt")
    os._exit(0)  # a group whose peer has died may wait in its destructor


def train(
    rank: int,
    size: int,
    folder: Path,
    *,
    steps: int = 80,
    mode: str | None = "protect",
    faults: dict[int, tuple[str, ...]] | None = None,
    plant: str = "mlp",
    die: tuple[int, int] | None = None,
    extra_step: tuple[int, int] | None = None,
    broken_loss: tuple[int, int] | None = None,
    resume: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Train a plant, each rank on its part of every batch; ``faults`` by rank in the injector's notation."""
    made = load_plant(plant)(seed=0)
    torch.manual_seed(100 + rank)  # dropout draws on every rank for itself
    model = DistributedDataParallel(made.model)
    injector = FaultInjector.parse((faults or {}).get(rank, ()), seed=0)
    supervisor = None
    if mode is not None:
        chosen = Settings(**{**FIXED, "mode": mode, "rank_timeout_s": 60.0, **settings})
        if resume:
            supervisor = Supervisor.resume(
                folder / "run", model, made.probe_loader, optimizer=made.optimizer, settings=chosen
            )
        else:
            supervisor = Supervisor(model, made.probe_loader, settings=chosen, run_dir=folder / "run")
    states, decisions = [digest(made.model)], []
    with injector.attach(made.model, made.optimizer):
        for step in range(1, steps + 1):
            inputs, targets = injector.draw(next(made.loader))
            part = slice(len(targets) * rank // size, len(targets) * (rank + 1) // size)
            loss = made.loss_fn(model(inputs[part]), targets[part]).mean()
            loss.backward()
            if die == (rank, step):
                os.kill(os.getpid(), signal.SIGKILL)
            made.step()
            if extra_step == (rank, step):
                continue
            if supervisor is not None:
                told = "no number" if broken_loss == (rank, step) else loss
                decisions.append(supervisor.update(told))  # type: ignore[arg-type]
            states.append(digest(made.model))
    found = {
        "states": states,
        "decisions": [essence(decision) for decision in decisions],
        "rng": torch.get_rng_state().tolist(),
        "resumed_from": None if supervisor is None else supervisor.resumed_from,
    }
    if supervisor is not None:
        found["errors"] = supervisor.statistics()["errors"]
        found["certificate"] = [(claim.name, claim.status) for claim in supervisor.certificate().claims]
        supervisor.close()
    return found
