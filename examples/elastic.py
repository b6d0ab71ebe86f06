# %% [markdown]
# # A rank dies, and training goes on
#
# torchrun starts all processes again when one of them ends. This script then goes on by itself, from the last
# checkpoint that is on disk: one line, `Supervisor.resume_or_start`, does for the first start and for every other one.
# Here the second of two processes is killed once, as if its machine had lost power; afterwards the run goes on in one
# process.
#
#     export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
#     torchrun --standalone --nproc-per-node 2 --max-restarts 2 examples/elastic.py runs/elastic 300 150
#     torchrun --standalone --nproc-per-node 1 examples/elastic.py runs/elastic 400
#
# Without the first line torchrun keeps one store for all its starts, in which processes that were started again find
# the addresses of those that are gone. Without torchrun this file runs these commands itself.

# %%
import os
import signal
import subprocess
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from kalmanguard import Supervisor
from kalmanguard.models import load_plant

#: Checkpoints may take half of the time here, so that a run of seconds has some; the default is 1 %.
SETTINGS = {"probe_every": 5, "snapshot_every": 10, "checkpoint_share": 0.5, "rank_timeout_s": 60.0}


def train(folder: str, steps: int, killed_at: int | None) -> None:
    """What every process does, in its first life and in every other one."""
    torch.set_num_threads(1)
    # A rank that hangs while gradients are reduced is given up after this time; by default it is 30 minutes.
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, size = dist.get_rank(), dist.get_world_size()
    first_life = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    plant = load_plant("mlp")(seed=0)
    model = DistributedDataParallel(plant.model)
    # The loader is rewound to where the restored state was: it misses no batch, and has seen none twice.
    with Supervisor.resume_or_start(
        folder, model, plant.probe_loader, optimizer=plant.optimizer, loader=plant.loader, settings=SETTINGS
    ) as supervisor:
        print(f"rank {rank} of {size}: from step {supervisor.resumed_from or 0} to {steps}", flush=True)
        while supervisor.step < steps:
            inputs, targets = next(plant.loader)
            mine = slice(len(targets) * rank // size, len(targets) * (rank + 1) // size)
            loss = plant.loss_fn(model(inputs[mine]), targets[mine]).mean()
            loss.backward()
            if supervisor.step == killed_at and rank == 1 and first_life:
                print(f"rank {rank} is killed in step {killed_at + 1}", flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
            plant.step()
            supervisor.update(loss)
        # Probed, and certified if it is good: the state that a later start goes on from is the last one.
        supervisor.snapshot()
        supervisor.certificate()
    if rank == 0:
        print(supervisor.certificate(), flush=True)
    dist.destroy_process_group()


def launch(processes: int, *arguments: str) -> None:
    """Run this file under torchrun."""
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts", "2")
    subprocess.run(
        [*torchrun, "--nproc-per-node", str(processes), __file__, *arguments],
        check=True,
        env={**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
    )


# %%
if __name__ == "__main__":
    if "TORCHELASTIC_RESTART_COUNT" in os.environ:
        train(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else None)
    else:
        steps = int(sys.argv[1]) if len(sys.argv) > 1 else 300
        folder = str(Path(tempfile.mkdtemp()) / "run")
        launch(2, folder, str(steps), str(steps // 2))
        launch(1, folder, str(steps + steps // 3))
