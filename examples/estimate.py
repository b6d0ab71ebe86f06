# %% [markdown]
# # How noisy is a curve, where does it change, does it oscillate?
#
# Full-batch gradient descent on a quadratic with a little measurement noise: the loss rings at a frequency that theory
# knows, and the estimators find it. Then the noise and the trend of a real training loss.

# %%
import math
import sys

import numpy as np
import torch

from kalmanguard.analysis.changepoints import changepoints
from kalmanguard.analysis.consistency import consistency
from kalmanguard.analysis.identification import identify
from kalmanguard.analysis.oscillator import oscillator
from kalmanguard.analysis.smoothing import smooth
from kalmanguard.models import load_plant

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 1500
rng = np.random.default_rng(0)

# %% [markdown]
# ## A heavy ball with known poles
#
# $x_{t+1} = x_t + \beta (x_t - x_{t-1}) - \eta\lambda x_t$ driven by gradient noise: its poles solve
# $z^2 - (1 + \beta - \eta\lambda) z + \beta = 0$.

# %%
beta, rate = 0.9, 0.3
pole = np.roots([1.0, -(1.0 + beta - rate), beta])[0]
s = np.log(pole)
print(f"theory: damping ratio {-s.real / abs(s):.3f}, natural frequency {abs(s):.3f} radians per step")
x = np.zeros(STEPS + 200)
for t in range(2, len(x)):
    x[t] = x[t - 1] + beta * (x[t - 1] - x[t - 2]) - rate * x[t - 1] + rng.normal()
position = x[200:] + 0.5 * x.std() * rng.normal(size=STEPS)
print("found: ", oscillator(position))

# %% [markdown]
# ## A real training loss

# %%
torch.manual_seed(0)
plant = load_plant("mlp")(seed=0, steps=STEPS)
loss = np.array([float(plant.train_step(next(plant.loader))) for _ in range(STEPS)])
steps = np.arange(1, STEPS + 1)

late = slice(STEPS // 2, None)  # the trend of the beginning is no straight line
found = identify(steps[late], loss[late], trend=True)
smoothed = smooth(steps[late], loss[late], found.noise)
print(found)
print(smoothed)
print(consistency(smoothed.innovations, smoothed.innovation_variances))

# %% [markdown]
# ## Where it changes
#
# Normalised innovations with a shift in the middle.

# %%
z = rng.normal(size=STEPS)
z[STEPS // 2 : STEPS // 2 + 80] += 1.5
print(changepoints(steps, z, rate=0.01))
assert math.isfinite(found.log_likelihood)
