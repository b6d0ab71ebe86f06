# %% [markdown]
# # What was a run like, of which only the log is left?
#
# A training run writes its losses into a CSV file, as training runs do. Half-way the learning rate is raised thirtyfold
# for some steps. Nobody supervised it; the log is all there is.

# %%
import csv
import sys
import tempfile
from pathlib import Path

import torch

from kalmanguard import FaultInjector
from kalmanguard.analysis import Trajectory, analyze, write_report
from kalmanguard.models import load_plant

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 1200
folder = Path(tempfile.mkdtemp())

torch.manual_seed(0)
plant = load_plant("mlp")(seed=0, steps=STEPS)
faults = FaultInjector.parse((f"lr_spike:30@{STEPS // 2}:steps=8",))
with (
    open(folder / "metrics.csv", "w", newline="") as file,
    faults.attach(plant.model, plant.optimizer),
):
    log = csv.writer(file)
    log.writerow(["step", "train/loss", "val/loss"])
    for step in range(1, STEPS + 1):
        loss = plant.train_step(faults.draw(next(plant.loader)))
        log.writerow([step, float(loss), plant.held_out_loss() if step % 25 == 0 else ""])

# %% [markdown]
# Columns are guessed from their names; what was guessed stands in the notes.

# %%
trajectory = Trajectory.load(folder / "metrics.csv")
print(trajectory)
print(*trajectory.source.notes, sep="\n")

# %%
result = analyze(trajectory)
print(result)

# %% [markdown]
# Every event has its step, what fired, and what a supervisor would have done.

# %%
for incident in result.incidents:
    print(f"steps {incident.first} to {incident.last}: {incident.message}; a supervisor would {incident.deed}")

# %% [markdown]
# The same as a page that opens from disk. On the command line: `kalmanguard analyze metrics.csv`.

# %%
print(write_report(result, folder / "report.html"))
