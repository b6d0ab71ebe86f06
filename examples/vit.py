# %% [markdown]
# # A vision transformer, and a learning rate that is far too large
#
# Attention over patches of handwritten digits. Half-way the learning rate is a hundred times too large for three steps,
# as after a schedule that was set up wrongly. The same run twice: observed only, and protected. Thresholds are those of
# the calibration that is shipped; `kalmanguard calibrate` makes one of healthy runs of your own.

# %%
import sys
import tempfile

import torch

from kalmanguard import FaultInjector, Settings, Supervisor
from kalmanguard.certificate.verify import Report
from kalmanguard.models import load_plant

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 300


def train(settings: Settings) -> Report:
    """Train from the same seed, say what happened, and return the certificate."""
    torch.manual_seed(0)
    plant = load_plant("vit")(seed=0, steps=STEPS)
    injector = FaultInjector(seed=0)
    injector.at(STEPS // 2).lr_spike(100.0, steps=3)
    with (
        Supervisor(
            plant.model, plant.probe_loader, optimizer=plant.optimizer, settings=settings, run_dir=tempfile.mkdtemp()
        ) as supervisor,
        injector.attach(plant.model, plant.optimizer),
    ):
        for _ in range(STEPS):
            decision = supervisor.update(plant.train_step(next(plant.loader)))
            if decision.action != "ACCEPT":
                print(f"  {decision.reason}")
        print(f"{settings.mode}: held-out loss {plant.held_out_loss():.3f} after {STEPS} steps")
        return supervisor.certificate()


# %%
train(Settings(mode="observe", calibration="default"))

# %%
certificate = train(Settings(mode="protect", calibration="default"))

# %% [markdown]
# What can be claimed of the protected run, and what cannot.

# %%
for claim in certificate.claims:
    print(f"{claim.name:9}{claim.status:12}{claim.text}")
failed = [claim.name for claim in certificate.claims if claim.status == "FAILED"]
print(f"verdict: {'FAILED: ' + ', '.join(failed) if failed else 'no claim has failed'}")
