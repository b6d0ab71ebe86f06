"""What an optimizer does to sampled elements of a layer: hooks around its step, small copies, read afterwards."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim import optimizer as global_hooks
from torch.utils.hooks import RemovableHandle

from kalmanguard.forensics.hooks import Hook
from kalmanguard.forensics.layers import Layer
from kalmanguard.forensics.samples import Update
from kalmanguard.sensors.integrity import IntegritySensor

_ELEMENTS = 256
_GRADIENT_ELEMENTS = 4096
_OWN = {torch.optim.Adam: "Adam", torch.optim.AdamW: "AdamW", torch.optim.SGD: "SGD", torch.optim.RMSprop: "RMSprop"}


@dataclass(slots=True)
class _Taken:
    optimizer: Optimizer
    group: Mapping[str, Any]
    count_before: int
    before: Tensor
    state_before: dict[str, Tensor]
    after: Tensor | None = None
    gradient: Tensor | None = None
    state: dict[str, Tensor] | None = None
    count: int = -1
    eps: float = 0.0


class UpdateWatch:
    """Watch the steps of the optimizers that hold a model's parameters.

    Parameters
    ----------
    parameters
        Of the model.
    optimizer
        The one that trains it; ``None`` for any that steps and holds one of the parameters.
    integrity
        Whether to compare what a step starts from with what the step before has left.
    failed
        Called with an exception that was swallowed.

    Attributes
    ----------
    steps
        Steps of these optimizers since the last `read`.
    seen
        Whether there ever was one.
    """

    def __init__(self, parameters: list[Tensor], optimizer: Optimizer | None, *, integrity: bool, failed: Any) -> None:
        self._parameters, self._optimizer, self._failed = parameters, optimizer, failed
        self._ids = set(map(id, parameters))
        self._integrity = IntegritySensor([p for p in parameters if p.requires_grad]) if integrity else None
        self._known: list[Optimizer] = []
        self._groups: weakref.WeakKeyDictionary[Optimizer, tuple[Any, int, dict[int, Mapping[str, Any]]]]
        self._groups = weakref.WeakKeyDictionary()
        self._strangers: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._handles: list[RemovableHandle] = []
        self._armed: list[tuple[Layer, bool]] = []
        self._taken: dict[str, _Taken] = {}
        self._gradients: dict[str, Tensor | float] = {}
        self._tampered: tuple[str, ...] = ()
        self.steps = 0
        self.seen = False

    def attach(self) -> None:
        """Put the hooks on."""
        owner = weakref.ref(self)

        # Torch's global hooks must not keep a forgotten watch, and with it the model, alive.
        def note(name: str, *args: Any) -> None:
            watch = owner()
            if watch is not None:
                getattr(watch, name)(*args)

        failed = self._failed
        before, after = (Hook(partial(note, name), failed) for name in ("_before", "_after"))
        if self._optimizer is not None:
            self._handles = [
                self._optimizer.register_step_pre_hook(before),
                self._optimizer.register_step_post_hook(after),
            ]
        else:
            self._handles = [
                global_hooks.register_optimizer_step_pre_hook(before),
                global_hooks.register_optimizer_step_post_hook(after),
            ]

    def detach(self) -> None:
        """Take them off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def arm(self, layers: list[tuple[Layer, bool]]) -> None:
        """Take the gradients of these layers in the next step, and the updates of those that are marked."""
        self._armed = layers

    def read(self) -> tuple[dict[str, Update], dict[str, float], tuple[str, ...]]:
        """Updates and gradient sizes by layer, and what was tampered with, since the last call."""
        if not self.seen:
            self._take_gradients()  # no torch optimizer: whatever is there now
        taken, gradients, tampered = self._taken, self._gradients, self._tampered
        self._taken, self._gradients, self._armed, self._tampered, self.steps = {}, {}, [], (), 0
        if self._integrity is not None and self._known:
            self._integrity.remember(self._known)
        updates = {name: update for name, part in taken.items() if (update := _update(part)) is not None}
        return updates, {name: float(size) for name, size in gradients.items()}, tampered

    def forget(self) -> None:
        """Something that is known has set the state."""
        self._tampered = ()
        if self._integrity is not None:
            self._integrity.forget()

    def _trains(self, optimizer: Optimizer) -> bool:
        if any(optimizer is known for known in self._known):
            return True
        if optimizer in self._strangers:
            return False
        if any(id(p) in self._ids for group in optimizer.param_groups for p in group["params"]):
            self._known.append(optimizer)
            return True
        self._strangers.add(optimizer)
        return False

    def _groups_of(self, optimizer: Optimizer) -> dict[int, Mapping[str, Any]]:
        """Group of each parameter; loading a state makes a new list of groups, adding one a longer list."""
        present = optimizer.param_groups
        known = self._groups.get(optimizer)
        if known is not None and known[0] is present and known[1] == len(present):
            return known[2]
        by_id: dict[int, Mapping[str, Any]] = {id(p): group for group in present for p in group["params"]}
        self._groups[optimizer] = (present, len(present), by_id)
        return by_id

    @torch.no_grad()
    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self._trains(optimizer):
            return
        self.seen = True
        if self.steps == 0 and self._integrity is not None:
            self._tampered = self._integrity.check()
            self._integrity.forget()
        if not self._armed:
            return
        groups = self._groups_of(optimizer)
        self._take_gradients(groups)
        for layer, wanted in self._armed:
            weight = layer.weight
            group = groups.get(id(weight))
            if wanted and group is not None and layer.name not in self._taken and weight.grad is not None:
                state = optimizer.state.get(weight, {})
                before, count = _state_of(state, weight), _count(state)
                part = _sampled(weight, _ELEMENTS)
                if part is not None:
                    self._taken[layer.name] = _Taken(optimizer, dict(group, params=()), count, part, before)

    @torch.no_grad()
    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self._trains(optimizer):
            return
        self.steps += 1
        for layer, _ in self._armed:
            taken = self._taken.get(layer.name)
            if taken is None or taken.optimizer is not optimizer or taken.after is not None:
                continue
            weight, state = layer.weight, optimizer.state.get(layer.weight, {})
            taken.after = _sampled(weight, _ELEMENTS)
            if weight.grad is not None and getattr(optimizer, "grad_scale", None) is None:
                taken.gradient = _sampled(weight.grad, _ELEMENTS)
            taken.state, taken.count = _state_of(state, weight), _count(state)
            taken.eps = max((torch.finfo(v.dtype).eps for v in taken.state.values()), default=0.0)

    @torch.no_grad()
    def _take_gradients(self, groups: Mapping[int, Any] | None = None) -> None:
        for layer, _ in self._armed:
            held = groups is None or id(layer.weight) in groups
            if not (held and layer.trained) or layer.is_table or layer.name in self._gradients:
                continue
            gradient = layer.weight.grad
            if gradient is None:
                self._gradients[layer.name] = 0.0
                continue
            part = _sampled(gradient, _GRADIENT_ELEMENTS)
            if part is not None:
                self._gradients[layer.name] = torch.linalg.vector_norm(part, dtype=_wide(part)) / part.numel() ** 0.5


def weight_sizes(weight: Tensor, block: int) -> tuple[float, tuple[int, float, float]] | None:
    """Root mean square of sampled elements; and of one block its index and two largest magnitudes."""
    part = _sampled(weight, _GRADIENT_ELEMENTS)
    if part is None:
        return None
    size = float(torch.linalg.vector_norm(part, dtype=_wide(part))) / part.numel() ** 0.5
    flat = weight.detach().flatten()
    index = block % -(-flat.numel() // BLOCK)
    piece = flat[index * BLOCK : (index + 1) * BLOCK]
    low, high = (float(v) for v in piece.aminmax())
    largest = max(-low, high)
    if not largest < float("inf"):
        return size, (index, float("nan"), largest)
    # The second largest costs a selection: the other extreme bounds it from below, and settles most cases.
    second = min(-low, high) if low < 0.0 < high else 0.0
    if second * 8.0 < largest and piece.numel() > 1:
        second = float(piece.abs().topk(2).values[1])
    return size, (index, largest, second)


#: Elements of a weight that are searched for a large one at a time.
BLOCK = 1 << 16


def _update(taken: _Taken) -> Update | None:
    if taken.after is None or taken.state is None:
        return None
    return Update(
        optimizer=_OWN.get(type(taken.optimizer), ""),
        group=taken.group,
        count_before=taken.count_before,
        count=taken.count,
        before=_array(taken.before),
        after=_array(taken.after),
        gradient=_array(taken.gradient) if taken.gradient is not None else None,
        state_before={key: _array(value) for key, value in taken.state_before.items()},
        state={key: _array(value) for key, value in taken.state.items()},
        precision=torch.finfo(taken.before.dtype).eps,
        state_precision=taken.eps,
    )


def _sampled(tensor: Tensor, most: int) -> Tensor | None:
    """A copy of at most so many elements, the same ones each time; ``None`` where that would copy everything first."""
    tensor = tensor.detach()
    if tensor.layout is not torch.strided:
        return None
    if tensor.numel() > most:
        if not tensor.is_contiguous() and tensor.numel() > BLOCK:
            return None
        flat = tensor.flatten()
        return flat[:: flat.numel() // most][:most].clone()
    return tensor.flatten().clone()


def _state_of(state: Mapping[str, Any], weight: Tensor) -> dict[str, Tensor]:
    found = {}
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == weight.shape and value.is_floating_point() and key != "step":
            part = _sampled(value, _ELEMENTS)
            if part is not None:
                found[str(key)] = part
    return found


def _count(state: Mapping[str, Any]) -> int:
    step = state.get("step")
    if step is None:
        return 0 if not state else -1
    return int(step)


def _wide(part: Tensor) -> torch.dtype:
    return torch.float64 if part.dtype is torch.float64 or part.device.type == "cpu" else torch.float32


def _array(part: Tensor) -> np.ndarray:
    array: np.ndarray = part.cpu().to(torch.float64).numpy()
    return array
