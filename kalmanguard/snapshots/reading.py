"""Reads the live objects of a training run into skeletons."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, final, runtime_checkable

from torch import Tensor, nn
from torch.optim import Optimizer

from kalmanguard.errors import SnapshotError
from kalmanguard.snapshots.inventory import Inventory, Plan, module_tensors, named_modules
from kalmanguard.snapshots.tree import ATOMS, Leaf, Refusal, describe, split, storage_tensor


@runtime_checkable
class Stateful(Protocol):
    """Anything with a state that can be taken and put back."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any:
        """Take the state on."""


@dataclass(slots=True, eq=False)
class Members:
    """The live objects that make up a training state."""

    model: nn.Module
    optimizers: list[Optimizer]
    schedulers: list[Any]
    scaler: Any | None
    loader: Any | None
    extras: dict[str, object]
    include_gradients: bool
    modules: dict[str, nn.Module] = field(init=False)

    def __post_init__(self) -> None:
        self.model = original(self.model)
        self.modules = {"model": self.model}

    def refresh(self) -> None:
        """Follow the live dict of extras: the modules among them are kept like the model."""
        for name, extra in self.extras.items():
            label = f"extras.{name}"
            if isinstance(extra, nn.Module) and self.modules.get(label) is not extra:
                self.modules[label] = original(extra)
            elif not isinstance(extra, Stateful):
                raise SnapshotError(
                    f"extras.{name} {describe(extra)} without state_dict and load_state_dict; register "
                    "objects that have both."
                )
        if len(self.modules) > 1:
            gone = [label for label in self.modules if label != "model" and label[7:] not in self.extras]
            for label in gone:
                del self.modules[label]

    def plain_extras(self) -> dict[str, Any]:
        """Return the extras that are not modules."""
        return {name: extra for name, extra in self.extras.items() if not isinstance(extra, nn.Module)}

    @property
    def cursor(self) -> Any | None:
        """The loader, if its position can be taken and put back."""
        return self.loader if isinstance(self.loader, Stateful) else None


@final
class Reader:
    """Makes the skeleton of the present state; tensors outside the plan are collected in the order of their leaves.

    Parameters
    ----------
    members
        The live objects.
    inventory
        Finds the tensors whose identity can be remembered.
    """

    def __init__(self, members: Members, inventory: Inventory) -> None:
        self._members = members
        self._inventory = inventory
        self._custom: list[tuple[str, str, nn.Module]] = []
        self._custom_plan: Plan | None = None

    def plan(self, *, fresh: bool = False) -> Plan:
        """Return the present plan; see `Inventory.plan`."""
        self._members.refresh()
        return self._inventory.plan(fresh=fresh)

    def skeleton(self, plan: Plan, dynamic: list[Tensor]) -> dict[str, Any]:
        """Read everything that the plan does not cover, appending its tensors to ``dynamic``.

        Raises
        ------
        SnapshotError
            A value cannot be kept exactly; the sentence names its path.
        """
        members = self._members
        take = _taker(plan, dynamic)
        skeleton: dict[str, Any] = dict(plan.layout.skeleton)
        if plan.mixed:
            skeleton["state"] = self._states(plan, take)
        skeleton["groups"] = [[_options(group, take) for group in o.param_groups] for o in members.optimizers]
        skeleton["schedulers"] = [
            _state_of(scheduler, take, "schedulers", number, lenient=True)
            for number, scheduler in enumerate(members.schedulers)
        ]
        skeleton["scaler"] = None if members.scaler is None else _state_of(members.scaler, take, "scaler")
        cursor = None if members.loader is None else members.cursor
        skeleton["loader"] = None if cursor is None else _state_of(cursor, take, "loader", lenient=True)
        skeleton["extras"] = (
            {name: _state_of(extra, take, "extras", name) for name, extra in members.plain_extras().items()}
            if members.extras
            else {}
        )
        skeleton["gradients"] = self._gradients(take) if members.include_gradients else None
        skeleton["module_extra"] = {
            f"{label}.{name}": _kept(module.get_extra_state(), take, label, name, "extra_state")
            for label, name, module in self.custom_modules(plan)
        }
        return skeleton

    def custom_modules(self, plan: Plan) -> list[tuple[str, str, nn.Module]]:
        """List the modules that keep state of their own besides tensors (``get_extra_state``)."""
        if self._custom_plan is not plan:
            self._custom_plan = plan
            self._custom = [
                (label, prefix.removesuffix("."), child)
                for label, module in self._members.modules.items()
                for prefix, child in named_modules(module)
                if type(child).get_extra_state is not nn.Module.get_extra_state
            ]
        return self._custom

    def _states(self, plan: Plan, take: Callable[[Tensor], Leaf]) -> list[dict[Any, Any]]:
        states = [dict(state) for state in plan.layout.skeleton["state"]]
        for number, key, live_key in plan.mixed:
            value = self._members.optimizers[number].state[live_key]
            states[number][key] = _kept(value, take, "optimizers", number, "state", key)
        return states

    def _gradients(self, take: Callable[[Tensor], Leaf]) -> dict[str, Leaf]:
        parameters, _ = module_tensors(self._members.model)
        return {
            name: _kept(parameter.grad, take, "model", name, "grad")
            for name, parameter in parameters.items()
            if parameter.grad is not None
        }


def original(module: nn.Module) -> nn.Module:
    """Return the module inside ``torch.compile``'s wrapper."""
    inner = getattr(module, "_orig_mod", module)
    return inner if isinstance(inner, nn.Module) else module


def _taker(plan: Plan, dynamic: list[Tensor]) -> Callable[[Tensor], Leaf]:
    known = plan.leaves
    first = len(plan.live)
    seen: dict[int, tuple[Tensor, Leaf]] = {}  # holds the tensors, so that no id is used twice meanwhile

    def take(tensor: Tensor) -> Leaf:
        leaf = known.get(id(tensor))
        if leaf is not None:
            return leaf
        entry = seen.get(id(tensor))
        if entry is None:
            local = storage_tensor(tensor)
            entry = seen[id(tensor)] = (tensor, Leaf(first + len(dynamic), local.device))
            dynamic.append(local)
        return entry[1]

    return take


def _kept(value: Any, take: Callable[[Tensor], Leaf], *path: object, lenient: bool = False) -> Any:
    try:
        return split(value, take, lenient=lenient)
    except Refusal as refusal:
        raise refusal.error(*path) from None


def _state_of(member: Any, take: Callable[[Tensor], Leaf], *path: object, lenient: bool = False) -> Any:
    try:
        state = member.state_dict()
    except Exception as error:
        where = ".".join(map(str, path))
        raise SnapshotError(f"{where}.state_dict() failed: {type(error).__name__}: {error}") from error
    return _kept(state, take, *path, lenient=lenient)


def _options(group: dict[str, Any], take: Callable[[Tensor], Leaf]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, value in group.items():
        if name == "params":
            made[name] = len(value)
        elif type(value) in ATOMS:
            made[name] = value
        else:
            try:
                made[name] = split(value, take)
            except Refusal:  # a function or another object of the program's, not state
                continue
    return made
