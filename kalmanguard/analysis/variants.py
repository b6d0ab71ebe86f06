"""What would other settings have said? The same engine over the same measurements, side by side and in sweeps."""

from __future__ import annotations

import html
import itertools
import multiprocessing
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from kalmanguard.analysis.judgement import Judgement
from kalmanguard.errors import ConfigurationError
from kalmanguard.settings import Settings

if TYPE_CHECKING:
    from kalmanguard.analysis.trajectory import Trajectory

Given = Settings | str | Mapping[str, Any]


class Change(NamedTuple):
    """A row on which two settings differ: level and proposed action under each; empty where nothing was said."""

    row: int
    step: int
    before: str
    after: str


@dataclass(frozen=True, eq=False)
class WhatIf:
    """Two judgements of one run.

    Attributes
    ----------
    before, after
        Under the settings of the run (or those it was compared with), and under the others.
    notes
        What the comparison should be read with.
    """

    before: Judgement
    after: Judgement
    notes: tuple[str, ...] = ()

    @property
    def changes(self) -> tuple[Change, ...]:
        """Every listed event that only one of them has, or that they judge differently, in the order of the log."""
        one, other = ({e.row: _word(e.level, e.proposed) for e in j.events} for j in (self.before, self.after))
        steps = {e.row: e.step for j in (self.before, self.after) for e in j.events}
        return tuple(
            Change(row, steps[row], one.get(row, ""), other.get(row, ""))
            for row in sorted(steps)
            if one.get(row, "") != other.get(row, "")
        )

    @property
    def settings_changed(self) -> dict[str, tuple[Any, Any]]:
        """Settings that differ, by name, with both values."""
        before, after = (j.settings.model_dump(mode="json") for j in (self.before, self.after))
        return {name: (before[name], after[name]) for name in before if before[name] != after[name]}

    def __str__(self) -> str:
        named = ", ".join(f"{name} {a} -> {b}" for name, (a, b) in self.settings_changed.items() if name != "mode")
        lines = [f"{self.before.name}: {self.before.rows:,} rows under {named or 'equal settings'}"]
        lines += [
            f"  {what}: {getattr(self.before, what):,} before, {getattr(self.after, what):,} after"
            for what in ("suspected", "episodes", "confirmed")
        ]
        changes = self.changes
        lines += [f"  step {c.step:,}: {c.before or 'nothing'} -> {c.after or 'nothing'}" for c in changes[:20]]
        if len(changes) > 20:
            lines.append(f"  ... and {len(changes) - 20:,} more")
        return "\n".join([*lines, *self.notes])

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


class SweepRow(NamedTuple):
    """One run under one variant; the first steps are ``None`` where nothing was said."""

    run: str
    variant: str
    rows: int
    suspected: int
    episodes: int
    confirmed: int
    first_suspected: int | None
    first_confirmed: int | None
    rows_per_s: float


@dataclass(frozen=True, eq=False)
class Sweep:
    """Every run under every variant, in the order in which they were given."""

    rows: tuple[SweepRow, ...]

    def __str__(self) -> str:
        return "\n".join("  ".join(cell.rjust(width) for cell, width in line) for line in self._cells())

    def _repr_html_(self) -> str:
        head, *body = [[html.escape(cell) for cell, _ in line] for line in self._cells()]
        top = "".join(f"<th>{cell}</th>" for cell in head)
        rows = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in line)}</tr>" for line in body)
        return f"<table><tr>{top}</tr>{rows}</table>"

    def _cells(self) -> list[list[tuple[str, int]]]:
        head = ["run", "variant", "rows", "suspected", "episodes", "confirmed", "first suspected", "first confirmed"]
        table = [
            head,
            *(["-" if v is None else f"{v:,}" if isinstance(v, int) else v for v in r[:8]] for r in self.rows),
        ]
        widths = [max(len(line[i]) for line in table) for i in range(len(head))]
        return [[(cell, width) for cell, width in zip(line, widths, strict=True)] for line in table]


def whatif(trajectory: Trajectory, settings: Given, *, before: Given | None = None) -> WhatIf:
    """Judge a run under two settings.

    Parameters
    ----------
    trajectory
        The run.
    settings
        Settings, a preset's name, a TOML file, or changes by name.
    before
        What they are compared with: by default the settings that a journal was recorded under, for other logs the
        usual ones.

    Notes
    -----
    What training did cannot be made again from a log: after the first intervention that differs, decisions are judged
    on the run as it was.

    Examples
    --------
    >>> import numpy as np
    >>> from kalmanguard.analysis.trajectory import Trajectory
    >>> loss = 2.0 + 0.05 * np.random.default_rng(0).normal(size=400)
    >>> loss[300] = 2.5
    >>> print(whatif(Trajectory.from_arrays(loss=loss), {"suspicion": 20.0}))
    run: 400 rows under suspicion 6.5 -> 20.0
      suspected: 1 before, 0 after
      episodes: 1 before, 0 after
      confirmed: 0 before, 0 after
      step 301: SUSPECT -> nothing
    """
    one, other = _baseline(trajectory, before), _settings(settings, trajectory)
    before_judged, after_judged = trajectory.judge(one), trajectory.judge(other)
    return WhatIf(before_judged, after_judged, tuple(_notes(trajectory, before_judged, after_judged)))


def sweep(
    trajectories: Trajectory | Sequence[Trajectory],
    variants: Mapping[str, Given],
    *,
    processes: int | None = None,
) -> Sweep:
    """Judge many runs under many settings, in parallel processes.

    Parameters
    ----------
    trajectories
        One or more.
    variants
        Settings, presets or changes by a name of your own; `grid` makes them from lists of values.
    processes
        By default one per processor; 1 stays in this process.

    Raises
    ------
    ConfigurationError
        There is no trajectory or no variant, a variant cannot be, ``processes`` is below 1, or they cannot start.

    Examples
    --------
    >>> import numpy as np
    >>> from kalmanguard.analysis.trajectory import Trajectory
    >>> loss = 2.0 + 0.05 * np.random.default_rng(0).normal(size=400)
    >>> loss[300] = 2.5
    >>> result = sweep(Trajectory.from_arrays(loss=loss), grid(suspicion=[5.0, 20.0]), processes=1)
    >>> [(row.variant, row.suspected) for row in result.rows]
    [('suspicion=5.0', 1), ('suspicion=20.0', 0)]
    """
    runs = list(trajectories) if isinstance(trajectories, Sequence) else [trajectories]
    if not runs or not variants:
        raise ConfigurationError(
            f"A sweep needs runs and variants; there are {len(runs)} runs and {len(variants)} variants."
        )
    if processes is not None and processes < 1:
        raise ConfigurationError(f"processes = {processes}: use at least 1.")
    jobs = [(run, name, _settings(given, run)) for run in runs for name, given in variants.items()]
    count = min(processes or os.cpu_count() or 1, len(jobs))
    if count == 1:
        return Sweep(tuple(map(_row, jobs)))
    try:
        with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn")) as pool:
            return Sweep(tuple(pool.map(_row, jobs)))
    except BrokenProcessPool:
        raise ConfigurationError(
            f"The {count} processes of the sweep could not start: in a script, call it below "
            '`if __name__ == "__main__":`, or pass processes=1.'
        ) from None


def grid(**values: Sequence[Any]) -> dict[str, dict[str, Any]]:
    """Every combination of values of settings, by a name that says which.

    >>> list(grid(suspicion=[5.0, 8.0], give_back=[0.2]))
    ['suspicion=5.0, give_back=0.2', 'suspicion=8.0, give_back=0.2']
    """
    combinations = itertools.product(*values.values())
    made = [dict(zip(values, combination, strict=True)) for combination in combinations]
    return {", ".join(f"{name}={value}" for name, value in one.items()): one for one in made}


def _row(job: tuple[Trajectory, str, Settings]) -> SweepRow:
    run, variant, settings = job
    started = time.perf_counter()
    judged = run.judge(settings)
    seconds = max(time.perf_counter() - started, 1e-9)
    confirmed = (e.step for e in judged.events if e.proposed != "ACCEPT")
    suspected = (e.step for e in judged.events if e.proposed == "ACCEPT")
    return SweepRow(
        run.name, variant, judged.rows, judged.suspected, judged.episodes, judged.confirmed, next(suspected, None),
        next(confirmed, None), judged.rows / seconds,
    )  # fmt: skip


def _baseline(trajectory: Trajectory, given: Given | None) -> Settings:
    return trajectory.settings if given is None else _settings(given, trajectory)


def _settings(given: Given, trajectory: Trajectory) -> Settings:
    """Make settings: changes by name are laid over those that the run was recorded under."""
    if isinstance(given, Mapping):
        if "preset" in given:
            return Settings.of(dict(given))
        return Settings(**{**trajectory.settings.model_dump(), **given})
    return Settings.of(given)


def _word(level: str, proposed: str) -> str:
    return level if proposed == "ACCEPT" else proposed


def _notes(trajectory: Trajectory, before: Judgement, after: Judgement) -> Iterator[str]:
    if after.proposals != before.proposals:
        yield (
            "After the first intervention that differs, decisions are judged on measurements of the run as it was, "
            "not of a run under these settings."
        )
    if trajectory.recorded and after.unseen_probes:
        yield f"These settings would have taken {after.unseen_probes:,} probes that the run did not take."
