# %% [markdown]
# # Replicas that decide alike
#
# Two processes train one network under DistributedDataParallel. One of them meets a gradient that is not a number, and
# later a bit flips in the weights of the other. Both drop the step, both go back to the same state, bit for bit.
#
# Under torchrun the two lines that start processes fall away: `torchrun --nproc-per-node 2 your_script.py`.

# %%
import hashlib
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from kalmanguard import FaultInjector, Supervisor
from kalmanguard.models import load_plant

RANKS = 2
STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 300


def digest(model: torch.nn.Module) -> str:
    """Of all parameters."""
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()[:12]


def train(rank: int, folder: str) -> None:
    """What every process does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    plant = load_plant("mlp")(seed=0)
    model = DistributedDataParallel(plant.model)
    fault = f"nan_gradient@{STEPS // 2}" if rank == 1 else f"bit_flip@{2 * STEPS // 3}"
    injector = FaultInjector.parse((fault,), seed=0)
    # The one line: on every rank, with the same held-out examples. Rank 0 keeps the journal.
    with (
        Supervisor(model, plant.probe_loader, settings={"probe_every": 5}, run_dir=f"{folder}/run") as supervisor,
        injector.attach(plant.model, plant.optimizer),
    ):
        for _ in range(STEPS):
            inputs, targets = next(plant.loader)
            mine = slice(len(targets) * rank // RANKS, len(targets) * (rank + 1) // RANKS)
            loss = plant.loss_fn(model(inputs[mine]), targets[mine]).mean()
            loss.backward()
            plant.step()
            decision = supervisor.update(loss)
            if decision.action != "ACCEPT":
                print(f"rank {rank}, parameters {digest(plant.model)}: {decision.reason}", flush=True)
        print(f"rank {rank} ends with {digest(plant.model)}", flush=True)
    dist.destroy_process_group()


def main() -> None:
    """Spawned processes import this file again, so what it does stands in a function."""
    folder = tempfile.mkdtemp()
    torch.multiprocessing.spawn(train, (folder,), nprocs=RANKS)
    print(f"The journal of all ranks is {Path(folder) / 'run'}.")


if __name__ == "__main__":
    main()
