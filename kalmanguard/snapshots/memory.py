"""How much host memory is free, and how many slots fit into it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Final

from kalmanguard.errors import SnapshotError

#: Share of the free host memory that the ring may take when no budget is stated.
DEFAULT_SHARE: Final = 0.25
#: More slots than this buy no further ages worth keeping.
MOST_SLOTS: Final = 16
#: cgroup v1 says "no limit" with a number near 2**63.
_UNLIMITED: Final = 1 << 60


def free_host_bytes(root: Path = Path("/")) -> int:
    """Return the bytes that this process may still take before something is swapped or killed.

    The smallest of what the kernel has available and what the limits of all control groups above this process leave;
    page cache that can be given back counts as free.

    Parameters
    ----------
    root
        Where ``proc`` and ``sys`` are found.
    """
    rooms = [room for room in (_available(root), *_control_groups(root)) if room is not None]
    if rooms:
        return max(0, min(rooms))
    return _physical() // 2


def slots_for(bytes_per_slot: int, budget_bytes: int | None, *, spills: bool = False, most: int = MOST_SLOTS) -> int:
    """Return how many slots the budget holds, at most ``most``.

    Parameters
    ----------
    bytes_per_slot
        Size of one slot.
    budget_bytes
        Memory for the whole ring; None takes a quarter of what is free.
    spill
        Folder for slots on disk; with it at least two slots are made, whatever the memory.
    most
        Upper bound.

    Raises
    ------
    SnapshotError
        Fewer than two fit and there is no folder to spill to.

    Examples
    --------
    >>> slots_for(300, 1000)
    3
    """
    free = free_host_bytes() if budget_bytes is None else None
    budget = int(DEFAULT_SHARE * free) if free is not None else int(budget_bytes or 0)
    fitting = min(most, budget // max(bytes_per_slot, 1))
    if fitting >= 2:
        return fitting
    if spills:
        return 2
    origin = f"a quarter of the {free:,} bytes of free host memory" if free is not None else "snapshot_bytes"
    raise SnapshotError(
        f"Two snapshots of {bytes_per_slot:,} bytes need {2 * bytes_per_slot:,} bytes, but the budget is {budget:,} "
        f"bytes ({origin}): raise snapshot_bytes, or give a run_dir to spill snapshots to."
    )


def _available(root: Path) -> int | None:
    for line in _read(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _control_groups(root: Path) -> Iterator[int | None]:
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            yield from _limits(root / "sys/fs/cgroup", path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            yield from _limits(
                root / "sys/fs/cgroup/memory",
                path,
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_inactive_file",
            )


def _limits(mount: Path, path: str, limit_name: str, usage_name: str, cache_name: str) -> Iterator[int | None]:
    """Yield what each group from ours up to the root leaves; in a container our own path may not be mounted."""
    relative = PurePosixPath(path.lstrip("/"))
    if ".." in relative.parts:
        relative = PurePosixPath()
    for part in (relative, *relative.parents):
        folder = mount / part
        limit, usage = _number(folder / limit_name), _number(folder / usage_name)
        if limit is None or usage is None or limit >= _UNLIMITED:
            continue
        cache = 0
        for line in _read(folder / "memory.stat").splitlines():
            name, _, value = line.partition(" ")
            if name == cache_name:
                cache = int(value)
        yield limit - max(0, usage - cache)


def _physical() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdigit() else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
