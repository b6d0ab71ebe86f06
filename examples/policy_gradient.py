# %% [markdown]
# # Reinforcement learning: the network makes its own data
#
# A policy that is damaged plays worse, and learns from what it plays. The supervisor probes it on fixed states, by its
# regret against the best linear controller, and needs no environment for that. Needs gymnasium (the extra `rl`).

# %%
import sys
import tempfile

import torch

from kalmanguard import FaultInjector, Supervisor
from kalmanguard.models import load_plant

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 200

torch.manual_seed(0)
plant = load_plant("cartpole")(seed=0, steps=STEPS)
injector = FaultInjector(seed=0)
injector.at(STEPS // 2).nan_gradient()  # a return that overflowed
injector.at(3 * STEPS // 4).bit_flip(match="actor")

print(f"regret before training {plant.held_out_loss():.3f}")
with (
    Supervisor(
        plant.model, plant.probe_loader, optimizer=plant.optimizer, loss_fn=plant.loss_fn, run_dir=tempfile.mkdtemp()
    ) as supervisor,
    injector.attach(plant.model, plant.optimizer),
):
    for _ in range(STEPS):
        decision = supervisor.update(plant.train_step(next(plant.loader)))
        if decision.action != "ACCEPT":
            print(decision.reason)
    print(f"regret at the end {plant.held_out_loss():.3f}")
    print(supervisor.certificate())
