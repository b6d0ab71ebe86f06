"""Names for all tensors of a training state, and which part of each whole tensor this rank holds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from kalmanguard.snapshots.inventory import module_tensors, optimizer_states


@dataclass(frozen=True, slots=True)
class Part:
    """A box of a whole tensor: what one rank holds of it.

    Attributes
    ----------
    shape
        Of the whole tensor.
    offsets, sizes
        Where the box begins, and how far it goes, along each dimension.
    """

    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Part:
        """All of a tensor."""
        return cls(tuple(shape), (0,) * len(shape), tuple(shape))

    @property
    def nothing(self) -> bool:
        """Whether the whole has elements and this rank none of them."""
        return math.prod(self.sizes) == 0 and math.prod(self.shape) > 0


def part_of(tensor: Tensor) -> Part | None:
    """Which part of a sharded or replicated DTensor is here; ``None`` for what is no part of a whole.

    The box is the one that torch.distributed.checkpoint takes for it. Pending sums (``Partial``) are no parts.

    Examples
    --------
    >>> part_of(torch.zeros(2, 3)) is None
    True
    """
    if not isinstance(tensor, DTensor) or any(placement.is_partial() for placement in tensor.placements):
        return None
    shape = tuple(tensor.shape)
    if tensor.device_mesh.get_coordinate() is None:  # this rank belongs to another part of the mesh
        return Part(shape, (0,) * len(shape), (0,) * len(shape))
    (box,) = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]
    return Part(shape, tuple(box.offsets), tuple(box.sizes))


def live_parts(modules: Mapping[str, nn.Module], optimizers: Sequence[Optimizer]) -> dict[str, Part]:
    """The parts that this rank holds of all DTensors among parameters, buffers, gradients and optimizer state.

    The keys are the names that `numbered` gives to the same tensors of a captured tree. State that a parameter has none
    of yet is not among them; see `state_part`.
    """
    parts = _Parts()
    for label, module in modules.items():
        parameters, buffers = module_tensors(module)
        for name, parameter in parameters.items():
            parts.add(f"tree/modules/{label}/parameters/{name}", parameter)
            if label == "model":
                parts.add(f"tree/gradients/{name}", parameter)
        for name, buffer in buffers.items():
            parts.add(f"tree/modules/{label}/buffers/{name}", buffer)
    for number, optimizer in enumerate(optimizers):
        for key, _, state in optimizer_states(optimizer):
            for name, value in state.items() if isinstance(state, dict) else ():
                parts.add(f"tree/state/{number}/{key}/{name}", value)
    return parts.found


class _Parts:
    """Parts by name; equal placements are worked out once, for a model has many of them and torch takes its time."""

    def __init__(self) -> None:
        self.found: dict[str, Part] = {}
        self._known: dict[object, Part | None] = {}

    def add(self, name: str, value: object) -> None:
        if isinstance(value, DTensor):
            key = (value.shape, value.device_mesh, value.placements)
            if key not in self._known:
                self._known[key] = part_of(value)
            part = self._known[key]
            if part is not None:
                self.found[name] = part


def numbered(content: Mapping[str, Any]) -> tuple[dict[str, Any], list[str], list[Tensor]]:
    """Replace each tensor of nested plain values by its number.

    Parameters
    ----------
    content
        Nested dicts, lists and tuples; the other values stay as they are.

    Returns
    -------
    tuple
        The copy, in which a tensor of one whole number stands for each tensor, so that `snapshots.codec` can write it;
        the names, which are the paths; and the tensors. A tensor that occurs twice has one number, and so stays one.

    Examples
    --------
    >>> tree, names, tensors = numbered({"tree": {"a": [torch.ones(2)], "b": 1}})
    >>> tree, names
    ({'tree': {'a': [tensor(0)], 'b': 1}}, ['tree/a/0'])
    """
    names: list[str] = []
    tensors: list[Tensor] = []
    seen: dict[int, Tensor] = {}

    def walk(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in seen:
                seen[id(value)] = torch.tensor(len(tensors))
                tensors.append(value)
                # Keys that only differ in type print alike.
                names.append(path if path not in names_taken else f"{path}#{len(names)}")
                names_taken.add(names[-1])
            return seen[id(value)]
        if type(value) is dict:
            return {key: walk(item, f"{path}/{key}" if path else str(key)) for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)(walk(item, f"{path}/{number}") for number, item in enumerate(value))
        return value

    names_taken: set[str] = set()
    return walk(content, ""), names, tensors
