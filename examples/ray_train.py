# %% [markdown]
# # Ray Train: a fault on one worker, and a worker that is killed
#
# Ray starts two workers, which train one network under DistributedDataParallel. A bit flips in the weights of one of
# them: both go back to the same state, bit for bit. Later one worker is killed. Ray starts both anew, and the run goes
# on from its last clean checkpoint, in the same journal. Needs ray (`pip install 'ray[train]'`).

# %%
import hashlib
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from kalmanguard import FaultInjector, Supervisor
from kalmanguard.models import load_plant

WORKERS = 2


def digest(model: torch.nn.Module) -> str:
    """Of all parameters."""
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()[:12]


# %% [markdown]
# What every worker does. It runs again from its beginning when Ray starts the workers anew: a journal in `folder`,
# which all of them can reach, tells it that.


# %%
def train(config: dict[str, Any]) -> None:
    """Train this worker's part of every batch, and tell of it in a file."""
    torch.set_num_threads(1)
    steps, folder = config["steps"], Path(config["folder"])
    rank = ray.train.get_context().get_world_rank()

    def tell(text: str) -> None:
        with open(folder / f"rank{rank}.txt", "a") as file:
            file.write(f"rank {rank} {text}\n")

    plant = load_plant("mlp")(seed=0)
    model = ray.train.torch.prepare_model(plant.model, move_to_device=False)

    begun = (folder / "run" / "journal.sqlite").exists()
    dist.barrier()  # before rank 0 begins the journal that the others look for
    # A checkpoint takes a share of the time; half of it here, since the run is so short. Ranks give up on a dead one.
    settings = {"probe_every": 5, "checkpoint_share": 0.5, "rank_timeout_s": 20.0}
    options: dict[str, Any] = {"optimizer": plant.optimizer, "loader": plant.loader, "settings": settings}
    if begun:
        supervisor = Supervisor.resume(folder / "run", model, plant.probe_loader, **options)
        tell(f"resumes from step {supervisor.resumed_from} with {digest(plant.model)}")
    else:
        supervisor = Supervisor(model, plant.probe_loader, run_dir=folder / "run", **options)

    injector = FaultInjector(seed=0)
    if rank == 1 and not begun:
        injector.at(steps // 2).bit_flip()
    first = (supervisor.resumed_from or 0) + 1
    with supervisor, injector.attach(plant.model, plant.optimizer):
        for step in range(first, steps + 1):
            inputs, targets = next(plant.loader)
            mine = slice(len(targets) * rank // WORKERS, len(targets) * (rank + 1) // WORKERS)
            loss = plant.loss_fn(model(inputs[mine]), targets[mine]).mean()
            loss.backward()
            if rank == 1 and not begun and step == 3 * steps // 4:
                tell(f"is killed in step {step}")
                os.kill(os.getpid(), signal.SIGKILL)
            plant.step()
            decision = supervisor.update(loss)
            if decision.action != "ACCEPT":
                tell(f"has {digest(plant.model)}: {decision.reason}")
        tell(f"ends with {digest(plant.model)}, held-out loss {plant.held_out_loss():.3f}")


# %%
def main() -> None:
    """Start Ray on this machine alone, and let it restart the workers once."""
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 400
    folder = Path(tempfile.mkdtemp())
    ray.init(num_cpus=WORKERS, include_dashboard=False)
    trainer = ray.train.torch.TorchTrainer(
        train,
        train_loop_config={"steps": steps, "folder": str(folder)},
        scaling_config=ray.train.ScalingConfig(num_workers=WORKERS),
        torch_config=ray.train.torch.TorchConfig(backend="gloo"),
        run_config=ray.train.RunConfig(
            name="ray", storage_path=str(folder), failure_config=ray.train.FailureConfig(max_failures=1)
        ),
    )
    trainer.fit()
    ray.shutdown()
    for rank in range(WORKERS):
        print((folder / f"rank{rank}.txt").read_text(), end="")
    print(f"The journal of both lives of the run is {folder / 'run'}.")


if __name__ == "__main__":
    main()
