"""Copies live tensors into a slot, beside the computation where the hardware can."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from kalmanguard.snapshots.inventory import Plan
from kalmanguard.snapshots.slot import Slot


@final
class Copier:
    """Fills slots; holds one side stream per CUDA device."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def fill(self, slot: Slot, plan: Plan, dynamic: Sequence[Tensor]) -> None:
        """Copy the plan's tensors and the dynamic ones into the slot's buffers."""
        events: list[torch.cuda.Event] = []
        for (device, sources), targets in zip(plan.groups, slot.groups, strict=True):
            self._copy(slot, device, targets, sources, events)
        if dynamic or slot.dynamic:
            buffers = slot.dynamic_buffers(dynamic)
            by_device: dict[torch.device, tuple[list[Tensor], list[Tensor]]] = {}
            for buffer, source in zip(buffers, dynamic, strict=True):
                targets, sources = by_device.setdefault(source.device, ([], []))
                targets.append(buffer)
                sources.append(source)
            for device, (targets, sources) in by_device.items():
                self._copy(slot, device, targets, sources, events)
        slot.events = events

    def _copy(
        self,
        slot: Slot,
        device: torch.device,
        targets: list[Tensor],
        sources: list[Tensor],
        events: list[torch.cuda.Event],
    ) -> None:
        if device.type != "cuda":
            torch._foreach_copy_(targets, sources)
            return
        current = torch.cuda.current_stream(device)
        if slot.placement.same_device:
            torch._foreach_copy_(targets, sources)
            events.append(current.record_event())
            return
        if slot.placement.spill is not None:  # a mapped file is not page-locked: nothing to overlap
            torch._foreach_copy_(targets, sources)
            return
        stream = self._streams.get(device)
        if stream is None:
            stream = self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            torch._foreach_copy_(targets, sources, non_blocking=True)
            event = stream.record_event()
        # The host runs on. The device's next kernel waits: it might be the one that overwrites a source.
        current.wait_event(event)
        events.append(event)
