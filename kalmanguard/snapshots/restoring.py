"""Puts an image back into the live objects, in place, without ever handing out one of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from functools import partial
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kalmanguard.errors import SnapshotError
from kalmanguard.snapshots.arena import Spec
from kalmanguard.snapshots.inventory import (
    memory_key,
    module_tensors,
    named_modules,
    optimizer_states,
)
from kalmanguard.snapshots.slot import Image
from kalmanguard.snapshots.tree import Leaf, Refusal, join, keepable, storage_tensor


@final
class Restoration:
    """Collects what must be written where; `commit` then does it.

    Everything that can be refused is refused while collecting, before the first byte of the live state is touched.

    Parameters
    ----------
    image
        The state to bring back.
    """

    def __init__(self, image: Image) -> None:
        self._image = image
        self._writes: dict[object, tuple[Tensor, int]] = {}
        self._names: dict[object, str] = {}
        self._clones: dict[int, Tensor] = {}
        self._actions: list[Callable[[], object]] = []

    def commit(self) -> None:
        """Write all tensors in place and carry out all assignments."""
        groups: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
        for target, index in self._writes.values():
            targets, sources = groups.setdefault((target.device, target.dtype), ([], []))
            targets.append(target)
            sources.append(self._image.tensors[index])
        with torch.no_grad():
            for (device, _), (targets, sources) in groups.items():
                torch._foreach_copy_(targets, sources, non_blocking=device.type == "cuda")
        for action in self._actions:
            action()

    def unmoved(self, live: Sequence[Tensor]) -> None:
        """Write every tensor of the image's static part into the one that it was captured from."""
        self._writes.update((index, (target, index)) for index, target in enumerate(live))

    # -- modules ---------------------------------------------------------------------------------------------------

    def module(self, label: str, module: nn.Module, captured: Mapping[str, Mapping[str, Leaf | None]]) -> None:
        """Restore a module's parameters, which must be the captured ones, and its buffers, whichever they are now."""
        parameters, buffers = module_tensors(module)
        wanted = captured["parameters"]
        if parameters.keys() != wanted.keys():
            names = sorted(parameters.keys() ^ wanted.keys())
            raise SnapshotError(
                f"The parameters of {label} are not those that were captured: {', '.join(names[:3])}"
                f"{' and others' if len(names) > 3 else ''} exist on one side only. Rebuild the module as it was."
            )
        for name, parameter in parameters.items():
            self._write_exactly(f"{label}.{name}", parameter, wanted[name])
        children = dict(named_modules(module))
        for name in buffers.keys() | captured["buffers"].keys():
            prefix, _, attribute = name.rpartition(".")
            owner = children.get(f"{prefix}." if prefix else "")
            if owner is not None:
                self._buffer(owner._buffers, attribute, captured["buffers"], name)

    def _buffer(
        self, owner: dict[str, Tensor | None], attribute: str, captured: Mapping[str, Leaf | None], name: str
    ) -> None:
        if name not in captured:
            self._actions.append(partial(owner.pop, attribute, None))
            return
        leaf = captured[name]
        live = owner.get(attribute)
        if leaf is not None and live is not None and self._write(live, leaf):
            return
        value = None if leaf is None else self._clone(leaf)
        if live is not None or value is not None:
            self._actions.append(partial(owner.__setitem__, attribute, value))

    def _write_exactly(self, path: str, live: Tensor, leaf: Leaf | None) -> None:
        if leaf is None or not self._write(live, leaf):
            captured = "nothing" if leaf is None else _shape(self._image.tensors[leaf.index])
            raise SnapshotError(
                f"{path} is {_shape(live)} now but was {captured} when it was captured, or it shares memory now that "
                "it did not share then. Rebuild the model as it was."
            )

    # -- optimizers ------------------------------------------------------------------------------------------------

    def optimizer_state(self, optimizer: Optimizer, captured: Mapping[Any, Any]) -> None:
        """Make the optimizer's per-parameter state the captured one; what did not exist then is removed."""
        state = optimizer.state
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for key, gone, _ in optimizer_states(optimizer):
            if key not in captured:
                self._actions.append(partial(state.pop, gone, None))
        for key, wanted in captured.items():
            if isinstance(key, int):
                if key >= len(parameters):
                    raise SnapshotError(
                        f"The snapshot has optimizer state for {key + 1} parameters or more but the optimizer holds "
                        f"{len(parameters)}. Give it the parameters that it had."
                    )
                live_key: Any = parameters[key]
                if live_key not in state and hasattr(live_key, "to_local"):
                    self._actions.append(partial(state.__setitem__, live_key, self._sharded(live_key, wanted)))
                    continue
            else:
                live_key = key[1]
            self._assign(state, live_key, wanted)

    def options(
        self, groups: Sequence[dict[str, Any]], captured: Sequence[Mapping[str, Any]], skip: AbstractSet[str]
    ) -> None:
        """Restore the param groups' options except those named in ``skip``; later options are removed."""
        for number, (group, wanted) in enumerate(zip(groups, captured, strict=False)):
            if len(group["params"]) != wanted["params"]:
                raise SnapshotError(
                    f"Param group {number} holds {len(group['params'])} parameters now but held {wanted['params']} "
                    "when it was captured. Give the optimizer the parameters that it had."
                )
            for name in wanted:
                if name != "params" and name not in skip:
                    self._assign(group, name, wanted[name])
            for name in group.keys() - wanted.keys() - skip:
                if keepable(group[name]):  # functions and other objects are the program's, and stay
                    self._actions.append(partial(group.pop, name, None))

    # -- gradients and user objects --------------------------------------------------------------------------------

    def gradients(self, parameters: Mapping[str, nn.Parameter], captured: Mapping[str, Leaf]) -> None:
        """Restore the accumulated gradients; parameters that had none lose theirs."""
        for name, parameter in parameters.items():
            leaf = captured.get(name)
            if leaf is not None and parameter.grad is not None and self._write(parameter.grad, leaf):
                continue
            value = None if leaf is None else self._clone(leaf)
            if value is not None or parameter.grad is not None:
                self._actions.append(partial(setattr, parameter, "grad", value))

    def detached(self, path: str, skeleton: Any) -> Any:
        """Copy a captured subtree, tensors included, for a ``load_state_dict`` that may keep what it is given.

        Raises
        ------
        SnapshotError
            The subtree holds an object that may have changed since.
        """
        try:
            return join(skeleton, self._clone)
        except Refusal as refusal:
            raise refusal.error(path) from None

    # -- in place where it can be ----------------------------------------------------------------------------------

    def _assign(self, container: Any, key: Any, captured: Any) -> None:
        live = container.get(key)
        value = self._merge(live, captured)
        if value is not live or live is None:
            self._actions.append(partial(container.__setitem__, key, value))

    def _merge(self, live: Any, captured: Any) -> Any:
        """Return what must stand where ``live`` stands; ``live`` itself where it can be written into."""
        if isinstance(captured, Leaf):
            if isinstance(live, Tensor) and self._write(live, captured):
                return live
            return self._clone(captured)
        if isinstance(captured, dict):
            old = live if isinstance(live, dict) else {}
            items = {key: self._merge(old.get(key), item) for key, item in captured.items()}
            if old is not live:
                return items
            if list(old) == list(items) and all(old[key] is items[key] for key in items):
                return old
            self._actions += [old.clear, partial(old.update, items)]
            return old
        if isinstance(captured, list | tuple):
            olds = list(live) if isinstance(live, list | tuple) else []
            olds += [None] * (len(captured) - len(olds))
            merged = [self._merge(old, item) for old, item in zip(olds, captured, strict=False)]
            if isinstance(captured, tuple):
                return tuple(merged)
            if not isinstance(live, list):
                return merged
            self._actions.append(partial(live.__setitem__, slice(None), merged))
            return live
        return captured.copy() if isinstance(captured, np.ndarray) else captured

    def _write(self, live: Tensor, leaf: Leaf) -> bool:
        """Plan to write a leaf into ``live`` unless it does not fit or its memory is already taken by another leaf."""
        try:
            target = storage_tensor(live)
        except Refusal:
            return False
        source = self._image.tensors[leaf.index]
        if target.shape != source.shape or target.dtype != source.dtype:
            return False
        key = memory_key(target)
        return self._writes.setdefault(key, (target, leaf.index))[1] == leaf.index

    def _sharded(self, parameter: Any, captured: Any) -> Any:
        """Recreate the state of a sharded parameter: what has its shard's shape is sharded like it."""
        shard = parameter.to_local()

        def tensor_of(leaf: Leaf) -> Tensor:
            local = self._clone(leaf)
            if local.shape != shard.shape:
                return local
            made: Tensor = type(parameter.detach()).from_local(
                local,
                parameter.device_mesh,
                parameter.placements,
                run_check=False,
                shape=parameter.shape,
                stride=parameter.stride(),
            )
            return made

        return join(captured, tensor_of)

    def _clone(self, leaf: Leaf) -> Tensor:
        """Copy a leaf to a tensor of its own on the device it came from; equal leaves stay one tensor."""
        if leaf.index not in self._clones:
            source = self._image.tensors[leaf.index].detach()
            copy = torch.empty_strided(source.shape, Spec.of(source).stride, dtype=source.dtype, device=leaf.device)
            self._clones[leaf.index] = copy.copy_(source)
        return self._clones[leaf.index]


def _shape(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
