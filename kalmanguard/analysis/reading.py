"""From readers to runs: columns get their meaning, rows their run and step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kalmanguard.analysis.assembly import Assembled, Channel, Part, assemble, merged, whole_steps
from kalmanguard.analysis.columns import CHANNELS, Meaning, assign, squashed
from kalmanguard.analysis.formats.opening import parts
from kalmanguard.analysis.tables import ABSENT, BoolArray, Chunk, IntArray, Reader, printable
from kalmanguard.errors import TrajectoryError

#: Columns with fewer values than this in more than so many rows are summaries.
_FEW_VALUES, _MANY_ROWS = 2, 20
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
    labels = _Labels(name)
    counted = stepless = 0
    for chunk in reader.chunks():
        fresh = chunk.columns.keys() - known
        if meaning is None or fresh or chunk.texts:
            known |= chunk.columns.keys()
            meaning = _meaning(reader, known, chunk, columns, meaning)
        usable = _usable(chunk, meaning)
        stepless += int((~usable & _holding(chunk, meaning)).sum())
        for run, part in _split(chunk, meaning, usable, counted, labels, columns):
            yield Block(run, part)
        counted += chunk.rows
    if meaning is None:
        return
    never = [
        f"{name!r} for {channel}" for channel, name in (columns or {}).items() if not _is_there(name, known, meaning)
    ]
    if never:
        raise TrajectoryError(
            f"There is no column of numbers {never[0]}; there are {', '.join(map(repr, sorted(known)[:20]))}."
        )
    notes.extend(meaning.notes)
    if 2 * stepless > counted:
        raise TrajectoryError(
            f"{stepless:,} of {counted:,} rows have nothing in the column {meaning.step!r} of steps: say which one "
            "counts them, as in columns={'step': 'iteration'}."
        )
    if stepless:
        notes.append(f"{stepless:,} rows have no step ({meaning.step!r} is empty) and were left out.")


def _is_there(name: str, known: set[str], meaning: Meaning) -> bool:
    return name in known or name == meaning.run or any(column.endswith(f" - {name}") for column in known)


def _usable(chunk: Chunk, meaning: Meaning) -> BoolArray:
    """Rows with a step."""
    if meaning.step is None:
        return np.ones(chunk.rows, dtype=np.bool_)
    column = chunk.columns.get(meaning.step)
    return np.zeros(chunk.rows, dtype=np.bool_) if column is None else column.logged


def _holding(chunk: Chunk, meaning: Meaning) -> BoolArray:
    """Rows with a value that the engine would see; a record of settings has none."""
    held = np.zeros(chunk.rows, dtype=np.bool_)
    for name, channel in meaning.channels.items():
        if channel in CHANNELS and name in chunk.columns:
            held |= chunk.columns[name].logged
    return held


def _meaning(
    reader: Reader, known: set[str], chunk: Chunk, columns: Mapping[str, str] | None, before: Meaning | None
) -> Meaning:
    if reader.named and not columns:
        return Meaning("step", None, {name: name for name in known if name != "step"}, ())
    wide = _wide(known)
    if wide:
        # A tracker's export: one column for each run and metric.
        step = (columns or {}).get("step")
        if step is None:
            step = next((n for n in sorted(known) if squashed(n) in ("globalstep", "trainerglobalstep", "step")), None)
        return Meaning(
            step, None, {n: n for n in known if n != step}, ("One column for each run: an export of a tracker.",)
        )
    given = dict(columns or {})
    if before is not None:
        # What a column was taken to be it stays, whatever comes later.
        settled = {channel: name for name, channel in before.channels.items() if channel in CHANNELS}
        settled |= {kind: name for kind, name in (("step", before.step), ("run", before.run)) if name is not None}
        given = settled | given
    lost = next((n for channel, n in given.items() if channel != "run" and n in chunk.texts), None)
    if lost is not None:
        odd = next(word for word in chunk.texts[lost] if word.strip().lower() not in ABSENT)
        raise TrajectoryError(
            f"Column {lost!r} holds numbers and words, such as {odd[:40]!r}: write numbers with a point, and "
            "nothing or null where there is none."
        )
    rare = [n for n, column in chunk.columns.items() if chunk.rows > _MANY_ROWS and column.logged.sum() < _FEW_VALUES]
    meaning = assign(sorted(known, key=_order), given, words=chunk.texts, rare=rare, partial=True)
    return meaning if before is None else meaning._replace(notes=before.notes or meaning.notes)


def _order(name: str) -> tuple[int, str]:
    return len(name), name


def _wide(names: set[str]) -> bool:
    marks = [n for n in names if n.endswith(("__MIN", "__MAX"))]
    return bool(marks) and all(" - " in n for n in marks)


def _split(
    chunk: Chunk,
    meaning: Meaning,
    usable: BoolArray,
    counted: int,
    labels: _Labels,
    columns: Mapping[str, str] | None,
) -> Iterator[tuple[str, Part]]:
    if not usable.any():
        return
    steps = np.arange(counted + 1, counted + chunk.rows + 1)
    if meaning.step is not None:
        steps = np.zeros(chunk.rows, dtype=np.int64)
        steps[usable] = whole_steps(chunk.columns[meaning.step].values[usable], meaning.step)
    if _wide(set(meaning.channels)):
        yield from _split_wide(labels.name, chunk, meaning, steps, usable, columns)
        return
    if meaning.run is None:
        yield labels.name, _part(chunk, meaning.channels, steps, np.flatnonzero(usable))
        return
    for label, rows in labels.groups(chunk, meaning.run, usable).items():
        yield label, _part(chunk, meaning.channels, steps, np.array(rows))


class _Labels:
    """To which run each row belongs: a row without a label to that of the one before."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._last: str | None = None
        self._seen: set[str] = set()

    def groups(self, chunk: Chunk, run: str, usable: BoolArray) -> dict[str, list[int]]:
        words = self._words(chunk, run)
        last = self._last or next((word for word in words if word), self.name)
        found: dict[str, list[int]] = {}
        for row, word in enumerate(words):
            last = word or last
            if usable[row]:
                found.setdefault(last, []).append(row)
        self._last = last
        self._seen.update(found)
        if len(self._seen) > _MOST_RUNS:
            raise TrajectoryError(f"Column {run!r} names more than {_MOST_RUNS:,} runs: it means something else.")
        return found

    @staticmethod
    def _words(chunk: Chunk, run: str) -> tuple[str, ...]:
        if run in chunk.texts:
            return tuple(map(printable, chunk.texts[run]))
        if run not in chunk.columns:
            return ("",) * chunk.rows
        values, logged = chunk.columns[run]
        return tuple(
            "" if not there else f"{value:.0f}" if value % 1 == 0 else repr(value)
            for value, there in zip(values.tolist(), logged.tolist(), strict=True)
        )


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
    name: str,
    chunk: Chunk,
    meaning: Meaning,
    steps: IntArray,
    usable: BoolArray,
    columns: Mapping[str, str] | None,
) -> Iterator[tuple[str, Part]]:
    runs: dict[str, dict[str, str]] = {}
    for column in meaning.channels:
        if not column.endswith(("__MIN", "__MAX")):
            run, dash, metric = column.rpartition(" - ")
            runs.setdefault(run if dash else name, {})[metric if dash else column] = column
    for run, metrics in runs.items():
        meant = assign(metrics, {c: n for c, n in (columns or {}).items() if c != "step"})
        channels = {metrics[metric]: channel for metric, channel in meant.channels.items()}
        logged = np.zeros(chunk.rows, dtype=np.bool_)
        for column in channels:
            logged |= chunk.columns[column].logged if column in chunk.columns else False
        rows = np.flatnonzero(logged & usable)
        if len(rows):
            yield printable(run), _part(chunk, channels, steps, rows)


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
