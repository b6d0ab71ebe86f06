"""Reference plants: real networks on real data with stock recipes, nothing to download."""

from __future__ import annotations

from .chartransformer import CharTransformer, CharTransformerPlant
from .cnn import CNN, CNNPlant
from .mlp import MLP, MLPPlant
from .plant import Plant, load_plant, plant_names
from .quadratic import HeavyBall, QuadraticPlant
from .resnet import ResNet, ResNetPlant
from .unet import UNet, UNetPlant

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
    "ResNet",
    "ResNetPlant",
    "UNet",
    "UNetPlant",
    "load_plant",
    "plant_names",
]
