"""Rows of a log put together: several rows of one step joined, late ones put in their place, restarts kept in order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from kalmanguard.analysis.tables import IntArray
from kalmanguard.errors import TrajectoryError
from kalmanguard.records import FloatArray

#: Rows from which on steps that only fall are a log with its newest row first, and no restarts.
_DESCENDING = 3
#: Steps beyond this are no counts.
LARGEST_STEP = 1 << 53


class Channel(NamedTuple):
    """A sparse series: increasing rows where something was logged, and what it was; nan and infinities as such."""

    rows: IntArray
    values: FloatArray


class Assembled(NamedTuple):
    """Steps ``(n,)``, channels over their rows, velocities ``(n, k)`` or ``None``, and what was noted."""

    steps: IntArray
    channels: Mapping[str, Channel]
    velocities: FloatArray | None
    notes: tuple[str, ...]


class Part(NamedTuple):
    """Raw rows: steps ``(m,)``, per channel the rows that have it and its values, velocities ``(m, k)`` or ``None``."""

    steps: IntArray
    channels: Mapping[str, Channel]
    velocities: FloatArray | None = None


def whole_steps(values: FloatArray, name: str) -> IntArray:
    """Steps as whole numbers.

    Raises
    ------
    TrajectoryError
        One is not finite, negative, fractional, or too large to be a count.
    """
    if not np.isfinite(values).all():
        row = int((~np.isfinite(values)).argmax())
        raise TrajectoryError(
            f"The step in row {row + 1} ({name!r}) is {float(values[row])}: steps must be whole numbers."
        )
    bad = (values < 0) | (values != np.floor(values)) | (values > LARGEST_STEP)
    if bad.any():
        row = int(bad.argmax())
        raise TrajectoryError(
            f"The step in row {row + 1} ({name!r}) is {float(values[row])!r}: whole numbers from 0 to 2^53 are."
        )
    return values.astype(np.int64)


def assemble(parts: Iterable[Part]) -> Assembled:
    """Put one stream of rows together.

    Rows of one step in a row are one row. A row with a smaller step than the one before is late when it lacks what most
    rows have, and is put in its place; else the run was restarted there, and goes on from that step.
    """
    parts = list(parts)
    steps = np.concatenate([p.steps for p in parts]) if parts else np.zeros(0, np.int64)
    channels = _concatenated(parts)
    velocities = _velocities(parts, len(steps))
    if not len(steps):
        return Assembled(steps, {}, None, ())
    notes: list[str] = []
    if len(steps) > _DESCENDING and (np.diff(steps) < 0).all():
        notes.append("The newest row comes first: the rows are read from the end.")
        last = len(steps) - 1
        steps = steps[::-1]
        channels = {name: Channel(last - c.rows[::-1], c.values[::-1]) for name, c in channels.items()}
        velocities = None if velocities is None else velocities[::-1]
    segment = _segments(steps, channels)
    if segment[-1] and _counts_within_epochs(steps, segment, _epoch(channels)):
        notes.append("The steps begin again in every epoch: they are counted on from one epoch to the next.")
        steps = _counted_on(steps, segment)
        segment = np.zeros_like(segment)
    order = np.lexsort((np.arange(len(steps)), steps, segment))
    steps, segment = steps[order], segment[order]
    new = np.ones(len(steps), dtype=np.bool_)
    new[1:] = (steps[1:] != steps[:-1]) | (segment[1:] != segment[:-1])
    # Where each raw row has gone to.
    target = np.empty(len(steps), dtype=np.int64)
    target[order] = np.cumsum(new) - 1
    rank = np.empty(len(steps), dtype=np.int64)
    rank[order] = np.arange(len(steps))
    made = {}
    for name, channel in channels.items():
        made[name], conflicts = _placed(channel, target, rank)
        if conflicts:
            notes.append(f"{name} has several values at {conflicts:,} steps: the last one of each is kept.")
    if velocities is not None:
        placed = np.full((int(new.sum()), velocities.shape[1]), np.nan)
        seen = np.isfinite(velocities).any(axis=1)
        placed[target[seen]] = velocities[seen]
        velocities = placed
    return Assembled(steps[new], made, velocities, tuple(notes))


def merged(streams: Iterable[Assembled]) -> Assembled:
    """Put several streams of one run together by step: files or tags that each hold some of the channels.

    Where a stream goes back, its later rows stand for its earlier ones.
    """
    kept: list[Part] = []
    notes: list[str] = []
    for stream in streams:
        notes += stream.notes
        steps, rows = _last_pass(stream.steps)
        if len(rows) < len(stream.steps):
            notes.append(
                f"A restart at step {int(steps[-1]):,} or before: what was logged again stands for what was before."
            )
        place = np.full(len(stream.steps), -1, dtype=np.int64)
        place[rows] = np.arange(len(rows))
        channels = {}
        for name, channel in stream.channels.items():
            there = place[channel.rows] >= 0
            channels[name] = Channel(place[channel.rows[there]], channel.values[there])
        velocities = None if stream.velocities is None else stream.velocities[rows]
        kept.append(Part(steps, channels, velocities))
    if not kept:
        return Assembled(np.zeros(0, np.int64), {}, None, ())
    steps = np.unique(np.concatenate([part.steps for part in kept]))
    parts = []
    for part in kept:
        at = np.searchsorted(steps, part.steps)
        parts.append(Part(steps, {n: Channel(at[c.rows], c.values) for n, c in part.channels.items()}))
    channels = {}
    for part in parts:
        for name, channel in part.channels.items():
            if name in channels:
                notes.append(f"{name} is in several files: where they overlap the last one counts.")
                channel = _overridden(channels[name], channel)
            channels[name] = channel
    velocities = next((p.velocities for p in kept if p.velocities is not None), None)
    if velocities is not None:
        source = next(p for p in kept if p.velocities is not None)
        placed = np.full((len(steps), velocities.shape[1]), np.nan)
        placed[np.searchsorted(steps, source.steps)] = velocities
        velocities = placed
    return Assembled(steps, channels, velocities, tuple(dict.fromkeys(notes)))


def _overridden(first: Channel, later: Channel) -> Channel:
    """Both, with the values of the later one at the rows that both have."""
    kept = ~np.isin(first.rows, later.rows)
    rows = np.concatenate([first.rows[kept], later.rows])
    order = np.argsort(rows)
    return Channel(rows[order], np.concatenate([first.values[kept], later.values])[order])


def _concatenated(parts: list[Part]) -> dict[str, Channel]:
    offsets = np.cumsum([0, *(len(p.steps) for p in parts)])
    pieces: dict[str, list[tuple[IntArray, FloatArray]]] = {}
    for part, offset in zip(parts, offsets, strict=False):
        for name, channel in part.channels.items():
            pieces.setdefault(name, []).append((channel.rows + offset, channel.values))
    return {
        name: Channel(np.concatenate([r for r, _ in found]), np.concatenate([v for _, v in found]))
        for name, found in pieces.items()
    }


def _velocities(parts: list[Part], rows: int) -> FloatArray | None:
    sizes = {p.velocities.shape[1] for p in parts if p.velocities is not None}
    if not sizes:
        return None
    if len(sizes) > 1:
        raise TrajectoryError(f"Sketches of {sorted(sizes)} numbers in one log: they are of different runs.")
    k = sizes.pop()
    found = [np.full((len(p.steps), k), np.nan) if p.velocities is None else p.velocities for p in parts]
    return np.concatenate(found).reshape(rows, k)


def _segments(steps: IntArray, channels: Mapping[str, Channel]) -> IntArray:
    """Number of restarts before each raw row."""
    segment = np.zeros(len(steps), dtype=np.int64)
    if (np.diff(steps) >= 0).all():
        return segment
    # The channel with the most values marks the rows of training; what is logged besides may come late.
    main = max(channels.values(), key=lambda c: len(c.rows), default=None)
    rows = main.rows if main is not None and len(main.rows) else np.arange(len(steps))
    back = np.flatnonzero(np.diff(steps[rows]) < 0) + 1
    starts = rows[back]
    # Rows between the last of the old pass and the first of the new one belong to the new one if they go back as well.
    for position, start in zip(back, starts, strict=True):
        first = int(start)
        previous = int(rows[position - 1])
        while first - 1 > previous and steps[first - 1] <= steps[start]:
            first -= 1
        segment[first] += 1
    return np.cumsum(segment)


def _epoch(channels: Mapping[str, Channel]) -> Channel | None:
    """The column of epochs, under one of its usual names."""
    names = ("epoch", "epochs", "current_epoch", "train/epoch", "trainer/epoch", "train_epoch", "Epoch")
    return next((channels[name] for name in names if name in channels), None)


def _counts_within_epochs(steps: IntArray, segment: IntArray, epoch: Channel | None) -> bool:
    """Whether every segment starts at the same step as the first, in an epoch of its own."""
    if epoch is None or not len(epoch.rows):
        return False
    first = np.flatnonzero(np.diff(segment, prepend=-1))
    at = np.minimum(np.searchsorted(epoch.rows, first), len(epoch.rows) - 1)
    return bool((steps[first] == steps[0]).all() and (np.diff(epoch.values[at]) > 0).all())


def _counted_on(steps: IntArray, segment: IntArray) -> IntArray:
    starts = np.flatnonzero(np.diff(segment, prepend=-1))
    lengths = np.maximum.reduceat(steps, starts) - steps[0] + 1
    counted: IntArray = steps + np.concatenate([[0], np.cumsum(lengths)[:-1]])[segment]
    return counted


def _placed(channel: Channel, target: IntArray, rank: IntArray) -> tuple[Channel, int]:
    order = np.argsort(rank[channel.rows], kind="stable")
    rows, values = target[channel.rows][order], channel.values[order]
    last = np.ones(len(rows), dtype=np.bool_)
    last[:-1] = rows[1:] != rows[:-1]
    same = np.zeros(len(rows), dtype=np.bool_)
    same[:-1] = ~last[:-1]
    differs = np.zeros(len(rows), dtype=np.bool_)
    differs[:-1] = same[:-1] & (values[1:] != values[:-1]) & ~(np.isnan(values[1:]) & np.isnan(values[:-1]))
    return Channel(rows[last], values[last]), int(differs.sum())


def _last_pass(steps: IntArray) -> tuple[IntArray, IntArray]:
    """The rows that no later row of an earlier or equal step stands for."""
    least = np.minimum.accumulate(steps[::-1])[::-1]
    later = np.append(least[1:], np.iinfo(np.int64).max)
    rows = np.flatnonzero(steps < later)
    return steps[rows], rows
