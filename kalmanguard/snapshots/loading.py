"""Turns a tree that was read from disk back into an image of a training state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kalmanguard.errors import SnapshotError
from kalmanguard.snapshots.rng import RandomState
from kalmanguard.snapshots.slot import Image
from kalmanguard.snapshots.tree import Leaf, Refusal, split

_HOST: Final = torch.device("cpu")
_PARTS: Final = (
    "modules", "state", "groups", "schedulers", "scaler", "loader", "extras", "gradients", "module_extra", "random"
)  # fmt: skip


def image_of_tree(tree: Any, modules: Mapping[str, nn.Module], optimizers: Sequence[Optimizer]) -> Image:
    """Number the tensors of ``tree`` and decide on which device each would be recreated.

    State beside a parameter is recreated on the parameter's device, except ``step``, which optimizers keep on the
    host unless they run captured or fused.

    Raises
    ------
    SnapshotError
        The tree is not one that `TrainingState.tree` made.
    """
    if not isinstance(tree, dict) or any(part not in tree for part in _PARTS):
        raise SnapshotError("This is not a training state of ours: the tree lacks some of its parts.")
    numbering = _Numbering()
    skeleton: dict[str, Any] = {name: numbering.split(tree[name], _HOST) for name in _PARTS[2:-1]}
    skeleton["modules"] = {
        label: numbering.split(part, _device(modules[label]) if label in modules else _HOST)
        for label, part in tree["modules"].items()
    }
    skeleton["state"] = [
        _states(states, optimizers[number] if number < len(optimizers) else None, numbering)
        for number, states in enumerate(tree["state"])
    ]
    return Image(skeleton, numbering.tensors, RandomState.from_tree(tree["random"]), {})


class _Numbering:
    """Gives each tensor object one leaf, so that tied tensors stay tied."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self._leaves: dict[int, Leaf] = {}

    def split(self, value: Any, device: torch.device) -> Any:
        def take(tensor: Tensor) -> Leaf:
            if id(tensor) not in self._leaves:
                self._leaves[id(tensor)] = Leaf(len(self.tensors), device)
                self.tensors.append(tensor)
            return self._leaves[id(tensor)]

        try:
            return split(value, take)
        except Refusal as refusal:
            raise refusal.error() from None


def _device(module: nn.Module) -> torch.device:
    parameter = next(module.parameters(), None)
    return _HOST if parameter is None else parameter.device


def _states(states: Mapping[Any, Any], optimizer: Optimizer | None, numbering: _Numbering) -> dict[Any, Any]:
    homes: list[tuple[torch.device, bool]] = []
    for group in () if optimizer is None else optimizer.param_groups:
        step_on_device = bool(group.get("capturable") or group.get("fused"))
        homes += [(parameter.device, step_on_device) for parameter in group["params"]]
    made: dict[Any, Any] = {}
    for key, state in states.items():
        device, step_on_device = homes[key] if isinstance(key, int) and key < len(homes) else (_HOST, True)
        if isinstance(state, dict):
            made[key] = {
                name: numbering.split(value, _HOST if name == "step" and not step_on_device else device)
                for name, value in state.items()
            }
        else:
            made[key] = numbering.split(state, device)
    return made
