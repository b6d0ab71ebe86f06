# %% [markdown]
# # A GAN, with two optimizers and no loss that falls
#
# The training loss of a GAN says little, so the supervisor is given what the generator is judged by: a score of its
# samples against held-out digits. In the middle, the learning rate of the generator explodes for three steps.

# %%
import sys
import tempfile

import torch

from kalmanguard import FaultInjector, Supervisor
from kalmanguard.models import load_plant

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 400


def train(*, supervised: bool) -> float:
    """Train from the same seed; returns the score of the end, lower is better."""
    torch.manual_seed(0)
    plant = load_plant("gan")(seed=0, steps=STEPS)
    injector = FaultInjector(seed=0)
    injector.at(STEPS // 2).lr_spike(100.0, steps=3)
    settings = {"mode": "protect" if supervised else "observe"}
    with (
        # Both networks are one module, and both optimizers belong to it.
        Supervisor(
            plant.model, plant.probe_loader, optimizer=plant.optimizers, loss_fn=plant.loss_fn, settings=settings,
            run_dir=tempfile.mkdtemp(),
        ) as supervisor,
        injector.attach(plant.model, plant.optimizer),
    ):  # fmt: skip
        for _ in range(STEPS):
            decision = supervisor.update(plant.train_step(next(plant.loader)))
            if decision.action != "ACCEPT":
                print("  " + decision.reason)
    return plant.held_out_loss()


# %%
for supervised in (False, True):
    print(f"{'supervised' if supervised else 'observed only'}: score {train(supervised=supervised):.3f} at the end")
