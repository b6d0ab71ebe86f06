"""The whole state of a training run: captured into slots, restored in place, digested."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kalmanguard.errors import ConfigurationError, SnapshotError
from kalmanguard.snapshots.arena import Placement
from kalmanguard.snapshots.copying import Copier
from kalmanguard.snapshots.digest import Scope, SectionDigests, section_digests
from kalmanguard.snapshots.inventory import Inventory, Plan
from kalmanguard.snapshots.loading import image_of_tree
from kalmanguard.snapshots.putting import put_back
from kalmanguard.snapshots.reading import Members, Reader
from kalmanguard.snapshots.rng import NumpyMemo, RandomState
from kalmanguard.snapshots.schedule import scheduled_options
from kalmanguard.snapshots.slot import Image, Slot, image_tree


@final
class TrainingState:
    """Everything that decides how training goes on, as one thing that can be captured and restored exactly.

    Parameters
    ----------
    model
        The trained module; of a compiled one the original is kept.
    optimizers
        A live list: optimizers appended later are part of later captures.
    schedulers
        Learning-rate schedulers, a live list too.
    scaler
        A ``GradScaler``, or None.
    loader
        The data loader; its cursor is part of the state where it has ``state_dict``.
    extras
        Further objects with ``state_dict`` and ``load_state_dict`` by name, a live dict (EMA weights, for example).
        Modules among them are captured and restored like the model.
    device
        ``"host"`` keeps slots in host memory, ``"same"`` beside the tensors that they copy.
    spill
        Folder in which slots are memory-mapped files instead of memory.
    include_gradients
        Whether accumulated gradients belong to the state.

    Notes
    -----
    Restored in place: parameters, buffers and optimizer state keep their identity and address. A slot is never
    aliased, so steps taken after a restore do not change it. By default the learning-rate schedule and the data
    cursor are left where they are: ``lr``, ``initial_lr`` and the bounds that schedulers keep in the param groups,
    and ``momentum`` and ``betas`` of an optimizer whose scheduler cycles them, belong to the schedule.

    Not part of the state: ``requires_grad`` and train/eval flags, plain attributes of modules and optimizers, and
    whatever lives in other processes.

    Examples
    --------
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Linear(3, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> state = TrainingState(model, optimizers=[optimizer], schedulers=[])
    >>> slot = state.capture()
    >>> model(torch.ones(3)).sum().backward()
    >>> optimizer.step()
    >>> state.digest() == state.digest(slot)
    False
    >>> state.restore(slot)
    >>> state.digest() == state.digest(slot)
    True
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        optimizers: list[Optimizer],
        schedulers: list[Any],
        scaler: Any | None = None,
        loader: Any | None = None,
        extras: dict[str, object] | None = None,
        device: Literal["host", "same"] = "host",
        spill: Path | None = None,
        include_gradients: bool = False,
    ) -> None:
        if device not in ("host", "same"):
            raise ConfigurationError(f"device = {device!r}: choose 'host' or 'same'.")
        if spill is not None and device == "same":
            raise ConfigurationError("spill keeps slots on disk and needs device = 'host'.")
        self._members = Members(
            model=model,
            optimizers=optimizers,
            schedulers=schedulers,
            scaler=scaler,
            loader=loader,
            extras={} if extras is None else extras,
            include_gradients=include_gradients,
        )
        self._placement = Placement(same_device=device == "same", spill=spill)
        self._inventory = Inventory(self._members.modules, optimizers)
        self._reader = Reader(self._members, self._inventory)
        self._copier = Copier()
        self._numpy_memo = NumpyMemo()

    def capture(self, into: Slot | None = None) -> Slot:
        """Copy the whole state, into the buffers of ``into`` where they fit.

        Returns
        -------
        Slot
            ``into`` if given, else a new slot.

        Raises
        ------
        SnapshotError
            Something cannot be kept exactly (the sentence names it), or the memory is not there. ``into`` then holds
            no state until the next capture that succeeds.
        """
        if into is not None:
            into.random = None
        with torch.no_grad():
            plan = self._reader.plan()
            dynamic: list[Tensor] = []
            skeleton = self._reader.skeleton(plan, dynamic)
            if into is None:
                slot = Slot(plan.layout, self._placement)
            else:
                slot = into
                slot.prepare(plan.layout)
            self._copier.fill(slot, plan, dynamic)
            slot.skeleton = skeleton
            slot.random = RandomState.capture(numpy_memo=self._numpy_memo)
        return slot

    def restore(
        self,
        slot: Slot,
        *,
        rng: bool = True,
        schedule: bool = False,
        data: bool = False,
        reset_moments: bool = False,
    ) -> None:
        """Bring a captured state back, in place.

        Parameters
        ----------
        slot
            What `capture` returned.
        rng
            Bring the random state back, last of all: rewinding a loader draws from it.
        schedule
            Bring learning rates and schedulers back.
        data
            Bring the data cursor back.
        reset_moments
            Clear the optimizers' per-parameter state instead of bringing it back.

        Raises
        ------
        SnapshotError
            The live objects are not those that were captured; nothing was changed then, unless a
            ``load_state_dict`` of the user's failed half-way.
        """
        scope = Scope(rng=rng, schedule=schedule, data=data, moments=not reset_moments)
        self._put_back(slot.image(), scope, unmoved=self._unmoved(slot))

    def digest(
        self,
        source: Slot | None = None,
        *,
        rng: bool = True,
        schedule: bool = False,
        data: bool = False,
        moments: bool = True,
        like: Slot | None = None,
    ) -> str:
        """Return the SHA-256 digest of a slot, or of the live state, over what `restore` brings back.

        Parameters
        ----------
        source
            A slot, or None for the live state.
        rng, schedule, data
            As for `restore`.
        moments
            False after ``reset_moments=True``.
        like
            Leave out of the live state the optimizers, param groups and extras that this slot does not know,
            because they were added later.

        Raises
        ------
        SnapshotError
            The scope holds a value without a canonical form.
        """
        scope = Scope(rng=rng, schedule=schedule, data=data, moments=moments)
        return self.section_digests(source, like=like).of(scope)

    def section_digests(self, source: Slot | None = None, *, like: Slot | None = None) -> SectionDigests:
        """Digest a slot or the live state section by section; safe to call for a slot from another thread."""
        image = self._live_image(like) if source is None else source.image()
        owned = [scheduled_options(optimizer, self._members.schedulers) for optimizer in self._members.optimizers]
        return section_digests(image, owned)

    def bytes_per_slot(self) -> int:
        """Return the bytes that one slot takes at present; ask after the first step, when optimizer state exists."""
        with torch.no_grad():
            plan = self._reader.plan()
            dynamic: list[Tensor] = []
            self._reader.skeleton(plan, dynamic)
        return plan.layout.nbytes + sum(tensor.nbytes for tensor in dynamic)

    @property
    def base_bytes(self) -> int:
        """Bytes of the frozen tensors' base copies, which all slots share."""
        return self._inventory.frozen.nbytes

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """The modules that are captured, by label: the model, and those among the extras."""
        self._members.refresh()
        return self._members.modules

    @property
    def optimizers(self) -> Sequence[Optimizer]:
        """The optimizers that are captured, in order."""
        return self._members.optimizers

    def tree(self, slot: Slot | None = None) -> dict[str, Any]:
        """Copy a slot, or the live state, to a tree of plain values and CPU tensors; for `codec.encode`."""
        return image_tree(self._live_image(None) if slot is None else slot.image(), copy=True)

    def load_tree(
        self, tree: Mapping[str, Any], *, rng: bool = True, schedule: bool = True, data: bool = False
    ) -> None:
        """Bring back a state that another process saved; optimizer state is recreated.

        Raises
        ------
        SnapshotError
            The tree is foreign, or the live objects are not those that were saved.
        """
        try:
            image = image_of_tree(tree, self._members.modules, self._members.optimizers)
            self._put_back(image, Scope(rng=rng, schedule=schedule, data=data))
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise SnapshotError(
                f"This is not a training state of ours: {type(error).__name__} {error} while it was read."
            ) from error

    def _unmoved(self, slot: Slot) -> Plan | None:
        """The present plan, if what the slot was captured from is still where it was."""
        try:
            with torch.no_grad():
                plan = self._reader.plan()
        except SnapshotError:  # something can no longer be captured; what was captured may come back all the same
            return None
        return plan if plan.layout is slot.layout else None

    def _put_back(self, image: Image, scope: Scope, *, unmoved: Plan | None = None) -> None:
        put_back(image, scope, self._members, self._reader, unmoved=unmoved)
        self._inventory.restored(list(image.bases.values()))
        self._numpy_memo.forget()

    def _live_image(self, like: Slot | None) -> Image:
        with torch.no_grad():
            plan = self._reader.plan(fresh=True)  # a check on captures must not share what they remember
            dynamic: list[Tensor] = []
            skeleton = self._reader.skeleton(plan, dynamic)
        if like is not None:
            skeleton = _restricted(skeleton, like.skeleton)
        return Image(skeleton, [*plan.live, *dynamic], RandomState.capture(), {})


def _restricted(skeleton: dict[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Drop from a live skeleton what was added since ``known`` was captured."""
    made = dict(skeleton)
    for part in ("modules", "module_extra", "extras"):
        made[part] = {name: value for name, value in skeleton[part].items() if name in known[part]}
    made["state"] = skeleton["state"][: len(known["state"])]
    made["groups"] = [now[: len(then)] for now, then in zip(skeleton["groups"], known["groups"], strict=False)]
    made["schedulers"] = skeleton["schedulers"][: len(known["schedulers"])]
    return made
