# %% [markdown]
# # The damping study, in small
#
# `kalmanguard study damping` runs all of it; `docs/research/damping.md` has the results. Here is one question of it:
# what do the published thresholds on the ratio of jerk to acceleration say of gradient descent with momentum that is
# perfectly stable?

# %%
import argparse
import math

import numpy as np

from kalmanguard.analysis.study.linear import System, heavy_ball_poles, stationary_jerk_ratio

parser = argparse.ArgumentParser()
parser.add_argument("--tiny", action="store_true", help="fewer steps")
STEPS = 400 if parser.parse_args().tiny else 4000

# %%
system = System(curvatures=tuple(np.geomspace(1.0, 0.01, 16).tolist()), momentum=0.9, noise=1.0)
print(f"stable below a learning rate of {system.limit:.2f}")
for share in (0.1, 0.5, 0.9, 1.02):
    rate = share * system.limit
    run = system.simulate(np.full(STEPS, rate), seed=0)
    v = np.asarray(run.velocities)[STEPS // 4 :]
    acceleration, jerk = np.diff(v, axis=0), np.diff(v, n=2, axis=0)
    ratio = math.sqrt(float((jerk**2).sum(1).mean() / (acceleration**2).sum(1).mean()))
    modulus = max(abs(z) for z in heavy_ball_poles(rate * 1.0, 0.9))
    verdict = "snap" if ratio > math.sqrt(2) else "drift" if ratio > math.sqrt(0.5) else "stable"
    print(f"rate {rate:5.2f}: largest pole {modulus:.3f}, jerk over acceleration {ratio:.2f}: {verdict}")
print(f"a single mode at a vanishing rate has {stationary_jerk_ratio(1e-6, 0.9):.3f}")
