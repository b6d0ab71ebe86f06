"""A trajectory: a training run as it was recorded, by our journal or by what others leave."""

from __future__ import annotations

import csv
import html
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from kalmanguard.analysis.assembly import Assembled, Channel, Part, assemble, merged, whole_steps
from kalmanguard.analysis.columns import CHANNELS
from kalmanguard.analysis.drawing import axes_or_new, legend_above
from kalmanguard.analysis.formats.opening import run_name
from kalmanguard.analysis.formats.records import VELOCITY
from kalmanguard.analysis.judgement import Judge, Judgement, judge
from kalmanguard.analysis.reading import Block, Run, read_blocks, read_runs
from kalmanguard.analysis.tables import BoolArray, IntArray
from kalmanguard.errors import ConfigurationError, TrajectoryError
from kalmanguard.journal.reader import JournalReader
from kalmanguard.records import FloatArray, Measurement, ProbeReading
from kalmanguard.settings import Settings

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from kalmanguard.analysis.record import Recorder

_JOURNAL = "journal"
#: Rows that measurements are made of at a time.
_ROWS = 8_192
#: Larger values have no squares, and are taken as not finite.
_LARGEST = 1e150


class Source(NamedTuple):
    """Where a trajectory comes from; ``notes`` say what was guessed, left out or damaged."""

    path: str = ""
    format: str = "arrays"
    notes: tuple[str, ...] = ()


_NOWHERE = Source()


@dataclass(frozen=True, eq=False)
class Trajectory:
    """One run as columns.

    Attributes
    ----------
    name
        Of the run.
    steps
        Shape ``(n,)``, row by row as logged; a step that goes back is a restart.
    channels
        Sparse series by name: ``loss``, ``probe`` (held-out), ``learning_rate``, ``gradient_norm``, ``buffer_norm``,
        and every other column of numbers under its own name. What was not logged is in no row; nan was logged.
    velocities
        Sketched updates, shape ``(n, k)``, rows of nan where there are none; ``None`` without any.
    source
        Where it comes from.

    Examples
    --------
    >>> trajectory = Trajectory.from_arrays(loss=[3.0, 2.0, float("nan")], probe=([3], [2.5]))
    >>> trajectory
    Trajectory('run': 3 rows, steps 1 to 3, loss 3, probe 1)
    >>> trajectory.series("probe")
    (array([3]), array([2.5]))
    """

    name: str
    steps: IntArray
    channels: Mapping[str, Channel]
    velocities: FloatArray | None = None
    source: Source = _NOWHERE

    # -- making one ----------------------------------------------------------------------------------------------------

    @classmethod
    def load(cls, path: str | Path, *, columns: Mapping[str, str] | None = None, run: str | None = None) -> Trajectory:
        """Read one run.

        Parameters
        ----------
        path
            A journal or run folder of ours, or CSV, TSV, JSON lines, JSON, Parquet, TensorBoard events, a Trainer's
            state, a folder of any of these, or of checkpoints; compressed logs as well.
        columns
            Column by channel where its name does not say it: ``{"loss": "my objective", "step": "it"}``.
        run
            Which one, where there are several.

        Raises
        ------
        TrajectoryError
            Nothing can be read, a column is missing or ambiguous, or there are several runs and ``run`` names none.
        """
        runs = cls.load_all(path, columns=columns)
        if run is not None:
            if run not in runs:
                raise TrajectoryError(f"{path} holds no run {run!r}; there are {_listed(runs)}.")
            return runs[run]
        if len(runs) > 1:
            raise TrajectoryError(f"{path} holds {len(runs):,} runs: say which, with run=; there are {_listed(runs)}.")
        return next(iter(runs.values()))

    @classmethod
    def load_all(cls, path: str | Path, *, columns: Mapping[str, str] | None = None) -> dict[str, Trajectory]:
        """Read every run at a path, by name; arguments and errors as of `load`."""
        return {name: cls._of(Path(path), run) for name, run in read_runs(Path(path), columns).items()}

    @classmethod
    def stream(cls, path: str | Path, *, columns: Mapping[str, str] | None = None, run: str | None = None) -> Stream:
        """Open one run without reading it into memory, for logs of any length; arguments as of `load`.

        Rows are taken in the order of the file: late ones are put in their place among some ten thousand neighbours.
        """
        return Stream(Path(path), columns, run)

    @classmethod
    def record(cls, path: str | Path, model: Any = None, optimizer: Any = None, **options: Any) -> Recorder:
        """Write a run from a training loop, without supervising it; see `kalmanguard.analysis.record.Recorder`."""
        from kalmanguard.analysis.record import Recorder

        return Recorder(path, model, optimizer, **options)

    @classmethod
    def from_arrays(
        cls, steps: ArrayLike | None = None, *, name: str = "run", velocities: ArrayLike | None = None, **channels: Any
    ) -> Trajectory:
        """Make one from arrays.

        Parameters
        ----------
        steps
            Whole numbers, shape ``(n,)``; 1 to n by default.
        name, velocities
            As of the class.
        **channels
            Per channel its values ``(n,)``, or a pair ``(steps, values)`` where it was logged at some steps only.

        Raises
        ------
        ConfigurationError
            Lengths differ, values are no numbers, or there is nothing.
        TrajectoryError
            A step is no whole number.
        """
        dense = {k: _floats(v, k) for k, v in channels.items() if not isinstance(v, tuple)}
        sparse = {k: v for k, v in channels.items() if isinstance(v, tuple)}
        lengths = {k: len(v) for k, v in dense.items()}
        if not channels or len(set(lengths.values())) > 1:
            raise ConfigurationError(f"Channels of one length are needed; there are {lengths or 'none'}.")
        rows = next(iter(lengths.values()), 0)
        at = np.arange(1, rows + 1) if steps is None else np.asarray(steps)
        if at.ndim != 1 or (lengths and len(at) != rows) or not np.issubdtype(at.dtype, np.number):
            raise ConfigurationError(f"steps of shape {at.shape} do not fit channels of {rows} values.")
        at = whole_steps(at.astype(np.float64), "steps")
        sketched = None if velocities is None else np.asarray(velocities, dtype=np.float64)
        if sketched is not None and (sketched.ndim != 2 or len(sketched) != len(at)):
            raise ConfigurationError(f"velocities of shape {sketched.shape} do not fit {len(at)} steps.")
        parts = [Part(at, {k: Channel(np.arange(len(v)), v) for k, v in dense.items()}, sketched)]
        for channel, pair in sparse.items():
            if len(pair) != 2 or len(pair[0]) != len(pair[1]):
                raise ConfigurationError(f"{channel}: give values, or a pair of as many steps as values.")
            where, values = whole_steps(_floats(pair[0], channel), channel), _floats(pair[1], channel)
            parts.append(Part(where, {channel: Channel(np.arange(len(values)), values)}))
        whole = [assemble([part]) for part in parts if len(part.steps)]
        rows_of = whole[0] if len(whole) == 1 else merged(whole)
        return cls(name, rows_of.steps, rows_of.channels, rows_of.velocities, Source(notes=rows_of.notes))

    @classmethod
    def _of(cls, path: Path, run: Run) -> Trajectory:
        rows: Assembled = run.rows
        where = path if run.format != _JOURNAL or not (path / run.name).is_dir() else path / run.name
        return cls(run.name, rows.steps, rows.channels, rows.velocities, Source(str(where), run.format, run.notes))

    # -- looking at it -------------------------------------------------------------------------------------------------

    def series(self, channel: str) -> tuple[IntArray, FloatArray]:
        """Steps and values of a channel.

        Raises
        ------
        ConfigurationError
            There is no such channel.
        """
        if channel not in self.channels:
            raise ConfigurationError(
                f"There is no channel {channel!r}; there are {', '.join(self.channels) or 'none'}."
            )
        found = self.channels[channel]
        return self.steps[found.rows], found.values

    @property
    def restarts(self) -> IntArray:
        """Rows at which the step goes back."""
        return np.flatnonzero(np.diff(self.steps) < 0) + 1

    @property
    def gaps(self) -> list[tuple[int, int]]:
        """Pairs of neighbouring steps that lie more than twenty times the usual distance apart."""
        apart = np.diff(self.steps)
        forward = apart[apart > 0]
        if not len(forward):
            return []
        wide = np.flatnonzero(apart > 20 * float(np.median(forward)))
        return [(int(self.steps[row]), int(self.steps[row + 1])) for row in wide]

    def segments(self) -> list[slice]:
        """Rows between restarts."""
        edges = [0, *self.restarts.tolist(), len(self.steps)]
        return [slice(a, b) for a, b in pairwise(edges) if b > a]

    @property
    def recorded(self) -> bool:
        """Whether it is a journal of ours, whose measurements are complete."""
        return self.source.format == _JOURNAL

    @cached_property
    def settings(self) -> Settings:
        """What a journal was recorded under; for other logs the usual settings, in observe mode."""
        return _recorded_settings(self.source.path) if self.recorded else Settings(mode="observe")

    def measurements(self) -> Iterator[Measurement]:
        """What the engine may see of it: a journal's own records, or one measurement for each row."""
        if self.recorded:
            yield from _recorded(self.source.path)
            return
        yield from _measurements(self.steps, self.channels, self.velocities)

    def judge(self, settings: Settings | None = None) -> Judgement:
        """Fold the live engine over it; by default under its own `settings`."""
        return judge(
            self.measurements(),
            settings or self.settings,
            name=self.name,
            logged_clock=self.recorded,
            stand_in=not self.recorded and "probe" not in self.channels,
        )

    def plot(self, axes: Axes | None = None, channels: Iterable[str] = ("loss", "probe")) -> Axes:
        """Draw channels over steps; restarts break the lines, what is not finite is marked at the edge."""
        from kalmanguard.analysis.figures import draw_series

        axes = axes_or_new(axes)
        for channel in channels:
            if channel in self.channels:
                steps, values = self.series(channel)
                draw_series(axes, steps, values, channel)
        axes.set_xlabel("step")
        legend_above(axes)
        return axes

    # -- writing it ----------------------------------------------------------------------------------------------------

    def to_jsonl(self, path: str | Path) -> Path:
        """Write one record for each row, which `load` reads back to the last bit; never over another file."""
        with _new(path) as file:
            for record in self._records():
                file.write(json.dumps(record, separators=(",", ":")) + "\n")
        return Path(path)

    def to_csv(self, path: str | Path) -> Path:
        """Write a table with an empty cell where nothing was logged; sketched updates are left out."""
        with _new(path) as file:
            table = csv.writer(file)
            table.writerow(["step", *self.channels])
            for record in self._records():
                table.writerow([record["step"], *(record.get(name, "") for name in self.channels)])
        return Path(path)

    def _records(self) -> Iterator[dict[str, Any]]:
        found: list[dict[str, Any]] = [{"step": int(step)} for step in self.steps]
        for name, channel in self.channels.items():
            for row, value in zip(channel.rows.tolist(), channel.values.tolist(), strict=True):
                found[row][name] = value
        if self.velocities is not None:
            for row in np.flatnonzero(~np.isnan(self.velocities).all(axis=1)).tolist():
                found[row][VELOCITY] = self.velocities[row].tolist()
        yield from found

    def __len__(self) -> int:
        return len(self.steps)

    def __repr__(self) -> str:
        counts = ", ".join(f"{name} {len(channel.rows):,}" for name, channel in self.channels.items())
        span = f"steps {self.steps[0]:,} to {self.steps[-1]:,}" if len(self) else "no steps"
        return f"Trajectory({self.name!r}: {len(self):,} rows, {span}, {counts})"

    def _repr_html_(self) -> str:
        rows = []
        for name, channel in self.channels.items():
            finite = channel.values[np.isfinite(channel.values)]
            first, best, last = (finite[0], finite.min(), finite[-1]) if len(finite) else (math.nan,) * 3
            cells = [name, f"{len(channel.rows):,}", *(f"{value:.4g}" for value in (first, best, last))]
            rows.append("".join(f"<td>{html.escape(cell)}</td>" for cell in cells))
        head = "".join(f"<th>{cell}</th>" for cell in ("channel", "values", "first", "least", "last"))
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in self.source.notes)
        table = f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"
        return f"<div><b>{html.escape(self.name)}</b>, {len(self):,} rows{table}<ul>{notes}</ul></div>"


class Stream:
    """A run that is read as it is used; every pass reads the file again.

    Attributes
    ----------
    name, source
        Complete once a pass has ended.
    settings
        What it is judged under by default: the usual settings, in observe mode.
    """

    def __init__(self, path: Path, columns: Mapping[str, str] | None, run: str | None) -> None:
        self._path, self._columns, self._run = path, columns, run
        self.name = run or run_name(path)
        self.settings = Settings(mode="observe")
        self._notes: list[str] = []

    @property
    def source(self) -> Source:
        """Where it comes from, with what was noted so far."""
        return Source(str(self._path), "stream", tuple(dict.fromkeys(self._notes)))

    def blocks(self) -> Iterator[Block]:
        """Raw rows, some ten thousand at a time."""
        self._notes.clear()
        for block in read_blocks(self._path, self._columns, self._run, self._notes):
            self.name = block.run
            yield block

    def measurements(self) -> Iterator[Measurement]:
        """One measurement for each step; neighbouring rows of one step are joined."""
        held: Assembled | None = None
        for block in self.blocks():
            part = block.part
            if not len(part.steps):
                continue
            if held is not None:
                # The last step of a piece may go on in the next one.
                part = _joined(held, part)
            rows = assemble([part])
            cut = len(rows.steps) - 1
            yield from _measurements(*_rows(rows, 0, cut))
            held = _take(rows, cut)
        if held is not None:
            yield from _measurements(held.steps, held.channels, held.velocities)

    def judge(self, settings: Settings | None = None) -> Judgement:
        """Fold the live engine over it in bounded memory; under the usual settings by default.

        Whether there are held-out losses is known only from the rows: they are looked for in the first ten thousand,
        and left out with a note where they come later than that.
        """
        rows = self.measurements()
        first = [m for _, m in zip(range(10_000), rows, strict=False)]
        known = any(m.probe is not None for m in first)
        folding = Judge(settings or self.settings, name=self.name, stand_in=not known)
        for m in first:
            folding.take(m)
        late = False
        for m in rows:
            late |= m.probe is not None
            folding.take(m)
        if late and not known:
            self._notes.append("Held-out losses come only after ten thousand rows, and were left out.")
        return folding.result()


def _floats(values: ArrayLike, channel: str) -> FloatArray:
    try:
        found = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise ConfigurationError(f"{channel}: {values!r:.60} are no numbers.") from None
    if found.ndim != 1:
        raise ConfigurationError(f"{channel} has the shape {found.shape}: one value for each row is needed.")
    return found


def _measurements(
    steps: IntArray, channels: Mapping[str, Channel], velocities: FloatArray | None
) -> Iterator[Measurement]:
    known = {name: channels[name] for name in CHANNELS if name in channels}
    for start in range(0, len(steps), _ROWS):
        stop = min(start + _ROWS, len(steps))
        dense: dict[str, list[float | None]] = {}
        for name, channel in known.items():
            cells: list[float | None] = [None] * (stop - start)
            a, b = np.searchsorted(channel.rows, (start, stop))
            values = channel.values[a:b]
            values = np.where(np.abs(values) > _LARGEST, np.copysign(np.inf, values), values)
            for row, value in zip(channel.rows[a:b].tolist(), values.tolist(), strict=True):
                cells[row - start] = value
            dense[name] = cells
        empty: list[float | None] = [None] * (stop - start)
        sketched = None if velocities is None else velocities[start:stop]
        moved: BoolArray = np.asarray([] if sketched is None else ~np.isnan(sketched).any(axis=1), dtype=np.bool_)
        for row, (step, loss, probe, rate, norm, buffers) in enumerate(
            zip(steps[start:stop].tolist(), *(dense.get(name, empty) for name in CHANNELS), strict=True)
        ):
            yield Measurement(
                step=step,
                loss=loss,
                learning_rates=() if rate is None else (rate,),
                gradient_norm=norm,
                buffer_norm=buffers,
                # A log holds one number a reading, without its examples.
                probe=None if probe is None else ProbeReading(np.array([probe])),
                velocity=sketched[row] if sketched is not None and moved[row] else None,
            )


def _recorded(path: str) -> Iterator[Measurement]:
    with JournalReader(path) as reader:
        for m, _ in reader.steps():
            yield m


def _recorded_settings(path: str) -> Settings:
    with JournalReader(path) as reader:
        recorded = reader.header.get("settings")
    try:
        return Settings(**recorded) if isinstance(recorded, dict) else Settings(mode="observe")
    except ConfigurationError as error:
        raise TrajectoryError(f"{path} was recorded under settings that this version does not have: {error}") from None


def _rows(rows: Assembled, start: int, stop: int) -> tuple[IntArray, dict[str, Channel], FloatArray | None]:
    channels = {}
    for name, channel in rows.channels.items():
        a, b = np.searchsorted(channel.rows, (start, stop))
        channels[name] = Channel(channel.rows[a:b] - start, channel.values[a:b])
    return rows.steps[start:stop], channels, None if rows.velocities is None else rows.velocities[start:stop]


def _take(rows: Assembled, start: int) -> Assembled:
    return Assembled(*_rows(rows, start, len(rows.steps)), ())


def _joined(held: Assembled, part: Part) -> Part:
    offset = len(held.steps)
    channels = {name: Channel(c.rows + offset, c.values) for name, c in part.channels.items()}
    for name, channel in held.channels.items():
        if not len(channel.rows):
            continue
        after = channels.get(name)
        channels[name] = (
            channel
            if after is None
            else Channel(np.concatenate([channel.rows, after.rows]), np.concatenate([channel.values, after.values]))
        )
    velocities = part.velocities
    if velocities is not None or held.velocities is not None:
        k = (velocities if velocities is not None else held.velocities).shape[1]  # type: ignore[union-attr]
        before = np.full((offset, k), np.nan) if held.velocities is None else held.velocities
        now = np.full((len(part.steps), k), np.nan) if velocities is None else velocities
        velocities = np.concatenate([before, now])
    return Part(np.concatenate([held.steps, part.steps]), channels, velocities)


def _new(path: str | Path) -> Any:
    try:
        return open(path, "x", encoding="utf-8", newline="")
    except FileExistsError:
        raise TrajectoryError(f"{path} exists already: name a new file.") from None
    except OSError as error:
        raise TrajectoryError(f"{path} cannot be written: {error.strerror}.") from None


def _listed(runs: Mapping[str, Any]) -> str:
    names = list(runs)
    shown = ", ".join(map(repr, names[:10]))
    return shown + (f" and {len(names) - 10:,} more" if len(names) > 10 else "")
