"""Decides what of an image goes back where, and in which order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from kalmanguard.errors import SnapshotError
from kalmanguard.snapshots.digest import Scope
from kalmanguard.snapshots.inventory import Plan, module_tensors
from kalmanguard.snapshots.reading import Members, Reader
from kalmanguard.snapshots.restoring import Restoration
from kalmanguard.snapshots.schedule import scheduled_options
from kalmanguard.snapshots.slot import Image

_Load = tuple[str, Callable[[Any], Any], Any]


def put_back(image: Image, scope: Scope, members: Members, reader: Reader, *, unmoved: Plan | None = None) -> None:
    """Restore ``members`` to ``image``, as far as ``scope`` says.

    ``unmoved``: the present plan, if its tensors are the very ones that were captured, where they were then.

    Order: what can be refused is refused first; then the users' objects, which may fail; then tensors and options in
    one go; the random state last, because rewinding a loader draws from it.

    Raises
    ------
    SnapshotError
        The live objects are not those that were captured, or one of them did not take its state back.
    """
    members.refresh()
    captured = image.skeleton
    restoration = Restoration(image)
    unmoved = unmoved if scope.moments and unmoved is not None and not unmoved.mixed else None
    if unmoved is not None:
        restoration.unmoved(unmoved.live)
    else:
        for label, skeleton in captured["modules"].items():
            if label not in members.modules:
                raise SnapshotError(f"{label} was captured but is no longer registered; register it again.")
            restoration.module(label, members.modules[label], skeleton)
    _optimizers(restoration, captured, scope, members, states_too=unmoved is None)
    if captured["gradients"] is not None:
        restoration.gradients(module_tensors(members.model)[0], captured["gradients"])
    loads = [(path, load, restoration.detached(path, state)) for path, load, state in _loads(captured, members, reader)]
    loads += [
        (path, load, restoration.detached(path, state)) for path, load, state in _rewinds(captured, members, scope)
    ]
    for path, load, state in loads:
        try:
            load(state)
        except Exception as error:
            raise SnapshotError(
                f"{path} did not take its captured state back ({type(error).__name__}: {error}); the model and the "
                "optimizers were left as they are."
            ) from error
    restoration.commit()
    if scope.rng:
        image.random.restore()


def _optimizers(
    restoration: Restoration, captured: Mapping[str, Any], scope: Scope, members: Members, *, states_too: bool
) -> None:
    states, groups = captured["state"], captured["groups"]
    _same_number("optimizers", len(states), len(members.optimizers))
    for number, optimizer in enumerate(members.optimizers):
        known = number < len(states)  # one that was added later had no state then, and keeps its options
        if states_too:
            restoration.optimizer_state(optimizer, states[number] if known and scope.moments else {})
        if known:
            skip = frozenset[str]() if scope.schedule else scheduled_options(optimizer, members.schedulers)
            restoration.options(optimizer.param_groups, groups[number], skip)


def _loads(captured: Mapping[str, Any], members: Members, reader: Reader) -> list[_Load]:
    """List what always restores itself: extras, modules with state of their own, the scaler."""
    loads: list[_Load] = []
    extras = members.plain_extras()
    for name, state in captured["extras"].items():
        if name not in extras:
            raise SnapshotError(
                f"extras.{name} was captured but is no longer registered; register it again, or resume with "
                f"extras={{{name!r}: ...}}."
            )
        loads.append((f"extras.{name}", extras[name].load_state_dict, state))
    if captured["module_extra"]:
        custom = {f"{label}.{name}": module for label, name, module in reader.custom_modules(reader.plan())}
        for path, state in captured["module_extra"].items():
            if path not in custom:
                raise SnapshotError(f"{path} kept state of its own when it was captured and is gone now.")
            loads.append((path, custom[path].set_extra_state, state))
    if members.scaler is not None and captured["scaler"]:  # a disabled scaler has an empty state and refuses to load it
        loads.append(("scaler", members.scaler.load_state_dict, captured["scaler"]))
    return loads


def _rewinds(captured: Mapping[str, Any], members: Members, scope: Scope) -> list[_Load]:
    """List what is rewound on request only: the schedule and the data cursor."""
    loads: list[_Load] = []
    if scope.schedule:
        _same_number("schedulers", len(captured["schedulers"]), len(members.schedulers))
        for number, state in enumerate(captured["schedulers"]):
            loads.append((f"schedulers.{number}", members.schedulers[number].load_state_dict, state))
    if scope.data:
        if captured["loader"] is None or members.cursor is None:
            raise SnapshotError(
                "The data cursor cannot be rewound: the loader has no state_dict and load_state_dict. Use a stateful "
                "loader, or restore with data=False."
            )
        loads.append(("loader", members.cursor.load_state_dict, captured["loader"]))
    return loads


def _same_number(what: str, captured: int, live: int) -> None:
    if captured > live:
        raise SnapshotError(
            f"{captured} {what} were captured but {live} are here; give the same ones in the same order."
        )
