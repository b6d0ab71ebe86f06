"""Instabilities that training makes by itself, without an injector, and harmless things that look like them."""

from __future__ import annotations

from benchmarks.organic.attention import BurntTransformer, HotTransformer
from benchmarks.organic.baird import Baird
from benchmarks.organic.catapult import Catapult, LateCatapult
from benchmarks.organic.digits import AdamEpsilon, DeepMLP, EdgeOfStability, HotDeepMLP, WeightDrift
from benchmarks.organic.dirac_gan import DiracGAN
from benchmarks.organic.identity_rnn import IdentityRNN, WarmIdentityRNN
from benchmarks.organic.scenario import Scenario

#: Scenarios by the name that ``--only`` and the tables use.
SCENARIOS: dict[str, Scenario] = {
    "attention": Scenario(HotTransformer, steps=300, harmful=True),
    "attention-sgd": Scenario(BurntTransformer, steps=300, harmful=True),
    "deep-mlp": Scenario(DeepMLP, steps=300, harmful=True),
    "deep-mlp-hot": Scenario(HotDeepMLP, steps=300, harmful=True),
    "identity-rnn": Scenario(IdentityRNN, steps=300, harmful=True),
    "identity-rnn-late": Scenario(WarmIdentityRNN, steps=400, harmful=True),
    "adam-epsilon": Scenario(AdamEpsilon, steps=2_500, harmful=True),
    "dirac-gan": Scenario(DiracGAN, steps=1_500, harmful=True),
    "baird": Scenario(Baird, steps=1_000, harmful=True),
    "catapult": Scenario(Catapult, steps=300, harmful=False),
    "catapult-late": Scenario(LateCatapult, steps=500, harmful=False),
    "edge-of-stability": Scenario(EdgeOfStability, steps=1_500, harmful=False),
    "weight-drift": Scenario(WeightDrift, steps=2_000, harmful=False),
}
