# %% [markdown]
# # A language model whose parameters are sharded
#
# Two processes train a small GPT on Python's standard library under FSDP2 (`fully_shard`): each holds half of every
# parameter and of the optimizer's state. One of them meets a gradient that is not a number, and later a bit flips in
# the half that the other one holds. Both drop the step, and both bring their halves back, bit for bit.
#
# Under torchrun the lines that start processes fall away: `torchrun --nproc-per-node 2 your_script.py`.

# %%
import hashlib
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from kalmanguard import FaultInjector, Supervisor
from kalmanguard.models import load_plant

RANKS = 2
STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 300


def digest(model: torch.nn.Module) -> str:
    """Of the shards that this process holds."""
    shards = [parameter.to_local().detach() for parameter in model.parameters()]
    return hashlib.sha256(b"".join(shard.numpy().tobytes() for shard in shards)).hexdigest()[:12]


def train(rank: int, folder: str) -> None:
    """What every process does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    plant = load_plant("chartransformer")(seed=0)
    model = plant.model
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)  # made after the model is sharded
    fault = f"nan_gradient@{STEPS // 2}" if rank == 1 else f"bit_flip@{2 * STEPS // 3}"
    injector = FaultInjector.parse((fault,), seed=0)
    # The one line: on every rank, with the same held-out examples. Rank 0 keeps the journal.
    with (
        Supervisor(model, plant.probe_loader, settings={"probe_every": 5}, run_dir=f"{folder}/run") as supervisor,
        injector.attach(model, optimizer),
    ):
        for step in range(1, STEPS + 1):
            inputs, targets = next(plant.loader)
            mine = slice(len(targets) * rank // RANKS, len(targets) * (rank + 1) // RANKS)
            loss = plant.loss_fn(model(inputs[mine]), targets[mine])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            decision = supervisor.update(loss)
            if decision.action != "ACCEPT":
                print(f"rank {rank}, shards {digest(model)}: {decision.reason}", flush=True)
            elif rank == 0 and step % (STEPS // 5) == 0:
                print(f"step {step}: training loss {loss.item():.3f}", flush=True)
        certificate = supervisor.certificate()  # on every rank: it measures the model, of which each holds a part
    if rank == 0:
        print(*(f"{claim.name} {claim.status}: {claim.title}" for claim in certificate.claims), sep="\n")
    dist.destroy_process_group()


def main() -> None:
    """Spawned processes import this file again, so what it does stands in a function."""
    folder = tempfile.mkdtemp()
    torch.multiprocessing.spawn(train, (folder,), nprocs=RANKS)
    print(f"The journal of all ranks is {Path(folder) / 'run'}.")


if __name__ == "__main__":
    main()
