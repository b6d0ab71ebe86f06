"""From readers to runs: columns get their meaning, rows their run and step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kalmanguard.analysis.assembly import Assembled, Channel, Part, assemble, merged, whole_steps
from kalmanguard.analysis.columns import Meaning, assign, squashed
from kalmanguard.analysis.formats.opening import parts
from kalmanguard.analysis.tables import Chunk, IntArray, Reader
from kalmanguard.errors import TrajectoryError

#: A column of words with more runs than this names something else.
_MOST_RUNS = 20_000


class Run(NamedTuple):
    """One run as read."""

    name: str
    format: str
    rows: Assembled
    notes: tuple[str, ...]


class Block(NamedTuple):
    """Some rows of one run, in the order of the log: raw steps and channels."""

    run: str
    part: Part


def read_runs(path: Path, columns: Mapping[str, str] | None) -> dict[str, Run]:
    """Read everything at a path into memory, by run."""
    streams: dict[str, list[Assembled]] = {}
    formats: dict[str, str] = {}
    notes: dict[str, list[str]] = {}
    for name, reader in parts(path):
        pieces: dict[str, list[Part]] = {}
        said: list[str] = []
        for block in _blocks(name, reader, columns, said):
            pieces.setdefault(block.run, []).append(block.part)
        for run, found in pieces.items():
            streams.setdefault(run, []).append(assemble(found))
            formats[run] = reader.format
            notes.setdefault(run, []).extend([*said, *reader.notes])
    runs = {}
    for run, whole in streams.items():
        rows = whole[0] if len(whole) == 1 else merged(whole)
        if not rows.channels:
            continue
        runs[run] = Run(run, formats[run], rows, tuple(dict.fromkeys([*notes[run], *rows.notes, *_seen(rows)])))
    if not runs:
        raise TrajectoryError(f"{path} holds no column of numbers besides the steps.")
    return runs


def read_blocks(path: Path, columns: Mapping[str, str] | None, run: str | None, notes: list[str]) -> Iterator[Block]:
    """Stream the rows of one run.

    Raises
    ------
    TrajectoryError
        There are several files or several runs and no ``run`` that chooses among them.
    """
    found = parts(path)
    if len(found) > 1 and run is not None and any(name == run for name, _ in found):
        found = [(name, reader) for name, reader in found if name == run]
    if len(found) > 1:
        raise TrajectoryError(
            f"{path} holds {len(found)} files, which cannot be streamed together: name one of them, or load it whole."
        )
    name, reader = found[0]
    only: str | None = run
    for block in _blocks(name, reader, columns, notes):
        if only is None:
            only = block.run
        if block.run == only:
            yield block
        elif run is None:
            raise TrajectoryError(
                f"{path} holds several runs, such as {only!r} and {block.run!r}: say which, with run=."
            )
    notes.extend(reader.notes)


def _blocks(name: str, reader: Reader, columns: Mapping[str, str] | None, notes: list[str]) -> Iterator[Block]:
    meaning: Meaning | None = None
    known: set[str] = set()
    counted = 0
    for chunk in reader.chunks():
        fresh = chunk.columns.keys() - known
        if meaning is None or fresh:
            known |= chunk.columns.keys()
            meaning = _meaning(reader, known, chunk, columns)
        for run, part in _split(name, chunk, meaning, counted, columns):
            yield Block(run, part)
        counted += chunk.rows
    notes.extend(meaning.notes if meaning is not None else ())


def _meaning(reader: Reader, known: set[str], chunk: Chunk, columns: Mapping[str, str] | None) -> Meaning:
    if reader.named and not columns:
        return Meaning("step", None, {name: name for name in known if name != "step"}, ())
    wide = _wide(known)
    if wide:
        # A tracker's export: one column for each run and metric.
        step = next((n for n in sorted(known) if squashed(n) in ("step", "globalstep", "trainerglobalstep")), None)
        return Meaning(
            step, None, {n: n for n in known if n != step}, ("One column for each run: an export of a tracker.",)
        )
    return assign(sorted(known, key=_order), columns, words=chunk.texts)


def _order(name: str) -> tuple[int, str]:
    return len(name), name


def _wide(names: set[str]) -> bool:
    marks = [n for n in names if n.endswith(("__MIN", "__MAX"))]
    return bool(marks) and all(" - " in n for n in marks)


def _split(
    name: str, chunk: Chunk, meaning: Meaning, counted: int, columns: Mapping[str, str] | None
) -> Iterator[tuple[str, Part]]:
    usable = np.ones(chunk.rows, dtype=np.bool_)
    if meaning.step is not None and meaning.step in chunk.columns:
        column = chunk.columns[meaning.step]
        usable = column.logged
        steps = np.zeros(chunk.rows, dtype=np.int64)
        steps[usable] = whole_steps(column.values[usable], meaning.step)
    elif meaning.step is not None:
        return  # rows without a step, such as a record of settings
    else:
        steps = np.arange(counted + 1, counted + chunk.rows + 1)
    if _wide(set(meaning.channels)):
        yield from _split_wide(name, chunk, meaning, steps, columns)
        return
    if meaning.run is None:
        yield name, _part(chunk, meaning.channels, steps, np.flatnonzero(usable))
        return
    labels = _labels(chunk, meaning.run)
    if len(set(labels)) > _MOST_RUNS:
        raise TrajectoryError(f"Column {meaning.run!r} names more than {_MOST_RUNS:,} runs: it means something else.")
    groups: dict[str, list[int]] = {}
    for row, label in enumerate(labels):
        if usable[row]:
            groups.setdefault(label, []).append(row)
    for label, rows in groups.items():
        yield label, _part(chunk, meaning.channels, steps, np.array(rows))


def _labels(chunk: Chunk, run: str) -> tuple[str, ...]:
    if run in chunk.texts:
        return chunk.texts[run]
    if run not in chunk.columns:
        return ("",) * chunk.rows
    return tuple(f"{value:.0f}" if value % 1 == 0 else repr(value) for value in chunk.columns[run].values.tolist())


def _part(chunk: Chunk, channels: Mapping[str, str], steps: IntArray, rows: IntArray) -> Part:
    place = np.full(chunk.rows, -1, dtype=np.int64)
    place[rows] = np.arange(len(rows))
    found = {}
    for name, channel in channels.items():
        column = chunk.columns.get(name)
        if column is not None:
            at = np.flatnonzero(column.logged & (place >= 0))
            if len(at):
                found[channel] = Channel(place[at], column.values[at])
    return Part(steps[rows], found, None if chunk.velocities is None else chunk.velocities[rows])


def _split_wide(
    name: str, chunk: Chunk, meaning: Meaning, steps: IntArray, columns: Mapping[str, str] | None
) -> Iterator[tuple[str, Part]]:
    runs: dict[str, dict[str, str]] = {}
    for column in meaning.channels:
        if not column.endswith(("__MIN", "__MAX")):
            run, dash, metric = column.rpartition(" - ")
            runs.setdefault(run if dash else name, {})[metric if dash else column] = column
    for run, metrics in runs.items():
        meant = assign(metrics, columns)
        channels = {metrics[metric]: channel for metric, channel in meant.channels.items()}
        logged = np.zeros(chunk.rows, dtype=np.bool_)
        for column in channels:
            logged |= chunk.columns[column].logged if column in chunk.columns else False
        rows = np.flatnonzero(logged)
        if len(rows):
            yield run, _part(chunk, channels, steps, rows)


def _seen(rows: Assembled) -> Iterator[str]:
    """Sentences on gaps and restarts."""
    apart = np.diff(rows.steps)
    back = int((apart < 0).sum())
    if back:
        yield f"The step goes back {back:,} times: the run was restarted from earlier checkpoints."
    forward = apart[apart > 0]
    if len(forward) > 10:
        usual = float(np.median(forward))
        wide = int((forward > 20 * usual).sum())
        if wide:
            yield f"{wide:,} gaps of more than 20 times the usual distance of {usual:,.0f} steps."
