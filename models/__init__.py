"""Reference plants: real networks on real data with stock recipes, nothing to download."""

from __future__ import annotations

from .cartpole import ActorCritic, CartPolePlant
from .chartransformer import CharTransformer, CharTransformerPlant
from .cnn import CNN, CNNPlant
from .gan import GAN, GANPlant
from .mlp import MLP, MLPPlant
from .plant import Plant, load_plant, plant_names
from .quadratic import HeavyBall, QuadraticPlant
from .resnet import ResNet, ResNetPlant
from .rnn import RNN, RNNPlant
from .unet import UNet, UNetPlant
from .vit import ViT, ViTPlant

__all__ = [
    "CNN",
    "GAN",
    "MLP",
    "RNN",
    "ActorCritic",
    "CNNPlant",
    "CartPolePlant",
    "CharTransformer",
    "CharTransformerPlant",
    "GANPlant",
    "HeavyBall",
    "MLPPlant",
    "Plant",
    "QuadraticPlant",
    "RNNPlant",
    "ResNet",
    "ResNetPlant",
    "UNet",
    "UNetPlant",
    "ViT",
    "ViTPlant",
    "load_plant",
    "plant_names",
]
