# %% [markdown]
# # What would other settings have said?
#
# Three runs in observe mode, two of them with a fault, judged again under other settings: the same engine over the same
# measurements.

# %%
import sys
import tempfile
from pathlib import Path

import torch

from kalmanguard import FaultInjector, Supervisor
from kalmanguard.analysis import Trajectory, grid, sweep, whatif
from kalmanguard.models import load_plant

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 400
FAULTS: dict[str, tuple[str, ...]] = {
    "quiet": (),
    "labels": (f"label_noise:0.3@{STEPS // 2}:steps=none",),
    "rate": (f"lr_spike:20@{STEPS // 2}:steps=5",),
}


def train(name: str, folder: Path) -> Trajectory:
    """Train and observe; what the supervisor saw is in the journal."""
    torch.manual_seed(0)
    plant = load_plant("mlp")(seed=0, steps=STEPS)
    injector = FaultInjector.parse(FAULTS[name])
    observe = {"mode": "observe", "probe_every": 5}
    with (
        Supervisor(
            plant.model, plant.probe_loader, optimizer=plant.optimizer, settings=observe, run_dir=folder / name
        ) as supervisor,
        injector.attach(plant.model, plant.optimizer),
    ):
        for _ in range(STEPS):
            supervisor.update(plant.train_step(injector.draw(next(plant.loader))))
    return Trajectory.load(folder / name)


def main() -> None:
    """Spawned processes import this file again, so what it does stands in a function."""
    folder = Path(tempfile.mkdtemp())
    runs = [train(name, folder) for name in FAULTS]

    # %% One run, two settings, step by step.
    print(whatif(runs[1], {"give_back": 0.05}))

    # %% All runs under a grid of settings, in parallel processes.
    print(sweep(runs, grid(suspicion=[5.0, 6.5, 9.0], give_back=[0.05, 0.2]), processes=2))


if __name__ == "__main__":
    main()
