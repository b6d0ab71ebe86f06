"""One captured training state: preallocated buffers, the plain values beside them, and the random state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from kalmanguard.errors import SnapshotError
from kalmanguard.snapshots.arena import Placement, Spec, allocate
from kalmanguard.snapshots.rng import RandomState
from kalmanguard.snapshots.tree import Leaf, Refusal, join, without_constants


@dataclass(slots=True, eq=False)
class Base:
    """The one copy of a frozen tensor that all slots share; never written again, so its digest is kept."""

    tensor: Tensor
    digest: bytes | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """What slots of one structure have in common; slots with the same layout object can reuse each other's buffers.

    Attributes
    ----------
    specs
        The tensors that each slot copies.
    groups
        Positions in ``specs`` by (device, dtype), for one ``_foreach_copy_`` each.
    bases
        Frozen tensors; their leaves follow those of ``specs``.
    skeleton
        The part of the image's skeleton that does not change from capture to capture.
    """

    specs: tuple[Spec, ...]
    groups: tuple[tuple[int, ...], ...]
    bases: tuple[Base, ...]
    skeleton: dict[str, Any]

    @property
    def nbytes(self) -> int:
        """Bytes that each slot holds, without the shared bases."""
        return sum(spec.nbytes for spec in self.specs)


@dataclass(frozen=True, slots=True)
class Image:
    """A whole training state, live or captured: a skeleton and the tensors its leaves count."""

    skeleton: dict[str, Any]
    tensors: Sequence[Tensor]
    random: RandomState
    bases: dict[int, Base]


@final
class Slot:
    """Buffers of one captured state; made and filled by `TrainingState.capture`.

    Parameters
    ----------
    layout
        Structure of the static part.
    placement
        Where the buffers are allocated.
    """

    def __init__(self, layout: Layout, placement: Placement) -> None:
        self.placement = placement
        self.layout = Layout((), (), (), {})
        self.static: list[Tensor] = []
        self.groups: list[list[Tensor]] = []
        self.dynamic: list[Tensor] = []
        self.events: list[torch.cuda.Event] = []
        self.skeleton: dict[str, Any] = {}
        self.random: RandomState | None = None
        self.prepare(layout)

    @property
    def nbytes(self) -> int:
        """Bytes of this slot's own buffers, without the shared bases."""
        return self.layout.nbytes + sum(tensor.nbytes for tensor in self.dynamic)

    @property
    def complete(self) -> bool:
        """Whether the last capture into this slot went through."""
        return self.random is not None

    def prepare(self, layout: Layout) -> None:
        """Declare the content torn until a capture completes, and make the buffers fit ``layout``."""
        self.random = None
        if layout is self.layout:
            return
        if layout.specs != self.layout.specs:
            self.static, self.groups = [], []  # freed before, not after, the new buffers are allocated
            self.layout = Layout((), (), (), {})
            self.static = allocate(layout.specs, self.placement)
            self.groups = [[self.static[index] for index in group] for group in layout.groups]
        self.layout = layout

    def dynamic_buffers(self, sources: Sequence[Tensor]) -> list[Tensor]:
        """Give one buffer per source, reusing those that fit in shape and type."""
        buffers: list[Tensor] = []
        for index, source in enumerate(sources):
            old = self.dynamic[index] if index < len(self.dynamic) else None
            if old is not None and self._fits(old, source):
                buffers.append(old)
            else:
                buffers += allocate([Spec.of(source)], Placement(same_device=self.placement.same_device))
        self.dynamic = buffers
        return buffers

    def _fits(self, buffer: Tensor, source: Tensor) -> bool:
        device = source.device if self.placement.same_device else torch.device("cpu")
        return buffer.shape == source.shape and buffer.dtype == source.dtype and buffer.device == device

    def image(self) -> Image:
        """Return the captured state, waiting for copies that are still under way.

        Raises
        ------
        SnapshotError
            The last capture into this slot failed half-way.
        """
        if self.random is None:
            raise SnapshotError("This slot holds no complete state: its last capture failed; capture into it again.")
        for event in self.events:
            event.synchronize()
        first = len(self.static)
        bases = dict(enumerate(self.layout.bases, start=first))
        tensors = [*self.static, *[base.tensor for base in self.layout.bases], *self.dynamic]
        return Image(self.skeleton, tensors, self.random, bases)

    def tree(self) -> dict[str, Any]:
        """Return the state as nested plain values with CPU tensors, which alias the slot where it lies on the host."""
        return image_tree(self.image(), copy=False)

    def copy(self, into: Slot | None = None) -> Slot:
        """Copy the state to a host slot of its own, reusing the buffers of ``into`` where they fit."""
        image = self.image()
        slot = Slot(self.layout, Placement(pin=False)) if into is None else into
        slot.prepare(self.layout)
        with torch.no_grad():
            for group, sources in zip(slot.groups, self.groups, strict=True):
                torch._foreach_copy_(group, sources)
            buffers = slot.dynamic_buffers(self.dynamic)
            if buffers:
                torch._foreach_copy_(buffers, self.dynamic)
        slot.skeleton, slot.random = self.skeleton, image.random
        return slot


def image_tree(image: Image, *, copy: bool) -> dict[str, Any]:
    """Join an image to a tree of plain values and detached CPU tensors, which alias the image unless ``copy``."""
    made: dict[int, Tensor] = {}

    def tensor_of(leaf: Leaf) -> Tensor:
        if leaf.index not in made:  # one object per storage, so that tied tensors stay tied
            made[leaf.index] = image.tensors[leaf.index].detach().to("cpu", copy=copy)
        return made[leaf.index]

    skeleton = dict(image.skeleton)
    for part in ("schedulers", "loader"):  # functions stay those of the program that loads the state
        skeleton[part] = without_constants(skeleton[part])
    try:
        tree: dict[str, Any] = join(skeleton, tensor_of)
    except Refusal as refusal:
        raise refusal.error() from None
    tree["random"] = image.random.tree()
    return tree
