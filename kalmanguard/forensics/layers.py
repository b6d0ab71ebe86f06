"""The layers of a model that can be looked at, and whose turn it is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

_CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_TABLES = (nn.Embedding, nn.EmbeddingBag)


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """A module with parameters of its own.

    Attributes
    ----------
    weight
        Its largest parameter, trained ones first.
    axis
        Dimension of its input that the units lie along; ``None`` where its input is not looked at (tables, norms).
    """

    name: str
    module: nn.Module
    weight: Tensor
    axis: int | None

    @property
    def trained(self) -> bool:
        """Whether a gradient is expected now."""
        return self.weight.requires_grad

    @property
    def is_table(self) -> bool:
        """Whether rows of its weight have no gradient in most steps."""
        return isinstance(self.module, _TABLES)


def find_layers(model: nn.Module) -> list[Layer]:
    """All modules with a parameter that can be read, in order of registration; tied weights belong to the first.

    Left out are complex, sparse, quantised, distributed (DTensor), uninitialised parameters and those on ``meta``.

    Examples
    --------
    >>> [(layer.name, layer.axis) for layer in find_layers(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.LayerNorm(3)))]
    [('0', -1), ('2', None)]
    """
    layers: list[Layer] = []
    seen: set[int] = set()
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if id(p) not in seen and _readable(p)]
        seen.update(map(id, own))
        if own:
            weight = max(own, key=lambda p: (p.requires_grad, p.dim() >= 2, p.numel()))
            layers.append(Layer(name or type(module).__name__, module, weight, _axis(module)))
    return layers


def _axis(module: nn.Module) -> int | None:
    if isinstance(module, _TABLES):
        return None
    if isinstance(module, _CONVOLUTIONS):
        return 1
    matrices = any(p.dim() == 2 for p in module.parameters(recurse=False))
    # A module with children uses its own parameters in ways that its input does not show.
    leaf = next(module.children(), None) is None
    return -1 if matrices and leaf else None


def _readable(p: Tensor) -> bool:
    if is_lazy(p) or hasattr(p, "to_local"):
        return False
    return p.is_floating_point() and p.layout is torch.strided and p.device.type != "meta" and p.numel() > 0


class Rotation:
    """Groups of layers that take turns; the members of a group are spread over the depth.

    Examples
    --------
    >>> rotation = Rotation(count=7, size=3)
    >>> [rotation.next() for _ in range(4)]
    [(0, 3, 6), (1, 4), (2, 5), (0, 3, 6)]
    """

    def __init__(self, *, count: int, size: int) -> None:
        self.groups = -(-count // size) if count else 0
        self._count, self._turn = count, 0

    def next(self) -> tuple[int, ...]:
        """Indices of the next group."""
        if not self.groups:
            return ()
        group = tuple(range(self._turn, self._count, self.groups))
        self._turn = (self._turn + 1) % self.groups
        return group
