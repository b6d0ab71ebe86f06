"""Reference plants: real networks on real data with stock recipes, nothing to download."""

from __future__ import annotations

from .chartransformer import CharTransformer, CharTransformerPlant
from .cnn import CNN, CNNPlant
from .mlp import MLP, MLPPlant
from .plant import Plant, load_plant, plant_names
from .quadratic import HeavyBall, QuadraticPlant
from .vit import ViT, ViTPlant

__all__ = [
    "CNN",
    "MLP",
    "CNNPlant",
    "CharTransformer",
    "CharTransformerPlant",
    "HeavyBall",
    "MLPPlant",
    "Plant",
    "QuadraticPlant",
    "ViT",
    "ViTPlant",
    "load_plant",
    "plant_names",
]
