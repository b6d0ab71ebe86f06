"""What a training state consists of right now: the live tensors, found once and checked cheaply ever after."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kalmanguard.snapshots.arena import Spec
from kalmanguard.snapshots.frozen import FrozenStore
from kalmanguard.snapshots.slot import Base, Layout
from kalmanguard.snapshots.tree import Leaf, Refusal, storage_tensor


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """The live side of a `Layout`: where the tensors of the static part are read from and written to.

    Attributes
    ----------
    layout
        The structure, shared with the slots.
    sources
        Live tensors in the order of ``layout.specs``.
    live
        Live tensors in the order of the leaves: ``sources``, then the frozen ones.
    groups
        ``sources`` by (device, dtype), in the order of ``layout.groups``.
    leaves
        Leaf of each live tensor object by its id.
    mixed
        (optimizer, key in the image, key in ``optimizer.state``) of the states that are walked at every capture.
    """

    layout: Layout
    sources: list[Tensor]
    live: list[Tensor]
    groups: list[tuple[torch.device, list[Tensor]]]
    leaves: dict[int, Leaf]
    mixed: list[tuple[int, Any, Any]]


@final
class Inventory:
    """Finds every parameter, buffer and optimizer state, and notices when one is another than before.

    Parameters
    ----------
    modules
        Module by label; a live dict.
    optimizers
        The live list of optimizers.

    Notes
    -----
    `plan` costs a few microseconds when nothing changed: it compares the identities of all tensors, containers and
    storages with those of the last walk. Exact, because what was seen is kept alive, so that no id is used twice.
    """

    def __init__(self, modules: Mapping[str, nn.Module], optimizers: Sequence[Optimizer]) -> None:
        self._modules = modules
        self._optimizers = optimizers
        self.frozen = FrozenStore()
        self._plan: Plan | None = None
        self._holders: list[Iterable[object]] = []
        self._seen: list[object] = []
        self._ids: list[int] = []
        self._roots: list[int] = []
        self._owners: list[Tensor] = []
        self._whereabouts: list[tuple[object, ...]] = []

    def plan(self, *, fresh: bool = False) -> Plan:
        """Return the present plan, walking everything again if something changed or ``fresh`` asks for it.

        Raises
        ------
        SnapshotError
            A tensor cannot be copied exactly.
        """
        moved = self.frozen.changed()  # asked first: a walk for another reason must not keep a stale base
        if self._plan is not None and not fresh and not moved and self._unchanged():
            return self._plan
        self._plan = None  # stays unset if the walk fails
        self._plan = self._walk()
        return self._plan

    def restored(self, bases: Collection[Base]) -> None:
        """Tell that a state with these bases was written back, so that this does not count as a change of theirs."""
        if not self.frozen.restored(bases):
            self._plan = None

    def _unchanged(self) -> bool:
        return (
            list(map(id, chain.from_iterable(self._holders))) == self._ids
            and self._containers() == self._roots
            and list(map(_whereabouts, self._owners)) == self._whereabouts
        )

    def _containers(self) -> list[int]:
        """Return the identities of what ``Optimizer.load_state_dict`` replaces."""
        return [id(part) for optimizer in self._optimizers for part in (optimizer.state, optimizer.param_groups)]

    def _walk(self) -> Plan:
        walk = _Walk(self.frozen)
        modules = {label: walk.module(label, module) for label, module in self._modules.items()}
        states: list[dict[Any, dict[str, Tensor | None]]] = []
        mixed: list[tuple[int, Any, Any]] = []
        for number, optimizer in enumerate(self._optimizers):
            pure: dict[Any, dict[str, Tensor | None]] = {}
            for key, live_key, state in optimizer_states(optimizer):
                if is_pure(state):
                    for name, value in state.items():
                        if value is not None:
                            walk.add(value, f"optimizers.{number}.state.{key}.{name}", frozen=False)
                    pure[key] = state
                else:
                    mixed.append((number, key, live_key))
            states.append(pure)
        plan = walk.plan(modules, states, mixed)
        self._watch(walk, states)
        return plan

    def _watch(self, walk: _Walk, states: list[dict[Any, dict[str, Tensor | None]]]) -> None:
        holders: list[Iterable[object]] = [self._modules.values(), self._optimizers]
        for module in chain.from_iterable(module.modules() for module in self._modules.values()):
            holders += [module._parameters.values(), module._buffers.values(), module._modules.values()]
        for optimizer, pure in zip(self._optimizers, states, strict=True):
            holders += [optimizer.param_groups, *[group["params"] for group in optimizer.param_groups]]
            holders += [optimizer.state.keys(), optimizer.state.values()]
            holders += [state.values() for state in pure.values()]
        self._holders = holders
        self._seen = list(chain.from_iterable(holders))
        self._ids = list(map(id, self._seen))
        self._roots = self._containers()
        self._owners = walk.owners
        self._whereabouts = list(map(_whereabouts, walk.owners))


def _whereabouts(tensor: Tensor) -> tuple[object, ...]:
    # New memory under a tensor (`p.data = ...`) may lie where the old lay, so the address alone does not tell.
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


class _Walk:
    """Collects tensors, each storage once, and numbers them: the trained ones first, then the frozen ones."""

    def __init__(self, frozen: FrozenStore) -> None:
        self.owners: list[Tensor] = []
        self._frozen = frozen
        self._objects: list[tuple[Tensor, object]] = []
        self._unique: dict[object, tuple[Tensor, Tensor]] = {}
        self._movable: set[object] = set()

    def module(self, label: str, module: nn.Module) -> dict[str, dict[str, Tensor | None]]:
        parameters, buffers = module_tensors(module)
        for name, parameter in parameters.items():
            self.add(parameter, f"{label}.{name}", frozen=True)
        for name, buffer in buffers.items():
            if buffer is not None:  # kernels update running statistics without touching their version counter
                self.add(buffer, f"{label}.{name}", frozen=False)
        return {"parameters": dict(parameters), "buffers": buffers}

    def add(self, tensor: Tensor, path: str, *, frozen: bool) -> None:
        try:
            local = storage_tensor(tensor)
        except Refusal as refusal:
            raise refusal.error(path) from None
        key = memory_key(local)
        self._unique.setdefault(key, (tensor, local))
        self._objects.append((tensor, key))
        self.owners.append(local)
        if not (frozen and self._frozen.admits(tensor, local)):
            self._movable.add(key)

    def plan(
        self,
        modules: dict[str, dict[str, dict[str, Tensor | None]]],
        states: list[dict[Any, dict[str, Tensor | None]]],
        mixed: list[tuple[int, Any, Any]],
    ) -> Plan:
        moving = [key for key in self._unique if key in self._movable]
        still = [key for key in self._unique if key not in self._movable]
        self._frozen.retain([self._unique[key][0] for key in still])
        live = [self._unique[key][1] for key in [*moving, *still]]
        by_key = {
            key: Leaf(index, tensor.device)
            for index, (key, tensor) in enumerate(zip([*moving, *still], live, strict=True))
        }
        leaves = {id(tensor): by_key[key] for tensor, key in self._objects}

        def leaf(tensor: Tensor | None) -> Leaf | None:
            return None if tensor is None else leaves[id(tensor)]

        skeleton: dict[str, Any] = {
            "modules": {
                label: {kind: {name: leaf(tensor) for name, tensor in named.items()} for kind, named in kinds.items()}
                for label, kinds in modules.items()
            },
            "state": [
                {key: {name: leaf(tensor) for name, tensor in state.items()} for key, state in pure.items()}
                for pure in states
            ],
        }
        sources = live[: len(moving)]
        groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for index, source in enumerate(sources):
            # One call for the whole host: there, mixed dtypes cost nothing and calls do.
            groups.setdefault((source.device, source.dtype if source.is_cuda else torch.uint8), []).append(index)
        layout = Layout(
            specs=tuple(Spec.of(source) for source in sources),
            groups=tuple(tuple(group) for group in groups.values()),
            bases=tuple(self._frozen.base(*self._unique[key]) for key in still),
            skeleton=skeleton,
        )
        return Plan(
            layout=layout,
            sources=sources,
            live=live,
            groups=[(device, [sources[i] for i in group]) for (device, _), group in groups.items()],
            leaves=leaves,
            mixed=mixed,
        )


def memory_key(tensor: Tensor) -> object:
    """Equal for tensors that are the same elements of the same memory; tied parameters share it."""
    if tensor.numel() == 0:
        return id(tensor)
    return (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride())


def named_modules(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name all submodules, shared ones under each of their names; ``prefix`` ends with a dot unless empty."""
    for name, child in module.named_modules(remove_duplicate=False):
        yield (f"{name}." if name else ""), child


def module_tensors(module: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, Tensor | None]]:
    """Return all parameters and buffers by name, tied ones under each of their names, empty buffers as None."""
    parameters: dict[str, nn.Parameter] = {}
    buffers: dict[str, Tensor | None] = {}
    for prefix, child in named_modules(module):
        parameters.update({prefix + name: p for name, p in child._parameters.items() if p is not None})
        buffers.update({prefix + name: buffer for name, buffer in child._buffers.items()})
    return parameters, buffers


def optimizer_states(optimizer: Optimizer) -> list[tuple[Any, Any, Any]]:
    """List (key in the image, live key, state) of all states that are not empty.

    Parameters are numbered in the order of the param groups, like in torch's own ``state_dict``; other keys are kept
    as a tuple. State of tensors that are in no group is not trained any more and left out.
    """
    ordinals = parameter_ordinals(optimizer)
    states: list[tuple[Any, Any, Any]] = []
    for live_key, state in cast("dict[Any, Any]", optimizer.state).items():
        if isinstance(live_key, Tensor):
            ordinal = ordinals.get(id(live_key))
            if ordinal is not None and not (isinstance(state, dict) and not state):
                states.append((ordinal, live_key, state))
        else:
            states.append((("key", live_key), live_key, state))
    return states


def parameter_ordinals(optimizer: Optimizer) -> dict[int, int]:
    """Number the parameters of all param groups by identity."""
    parameters = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    return {id(parameter): ordinal for ordinal, parameter in enumerate(parameters)}


def is_pure(state: object) -> bool:
    """Whether a parameter's state is a plain dict of tensors, whose identities alone tell if it changed."""
    return type(state) is dict and all(value is None or isinstance(value, Tensor) for value in state.values())
