"""Several runs watched together: found, read on, judged, and told as a picture, as lines or as plain values."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from kalmanguard.cli.feed import Feed, Phase
from kalmanguard.cli.folders import shown
from kalmanguard.cli.glance import certificate, done, give_back, glance
from kalmanguard.cli.health import HEALTH_STYLES, Health, judge
from kalmanguard.cli.terminal import ExitCode, blocks_fit, number, sparkline
from kalmanguard.journal.schema import FILE_NAME

_ABSENT = {Phase.WAITING: "WAITING", Phase.VANISHED: "VANISHED", Phase.UNREADABLE: "UNREADABLE"}

#: What is longer is verified by ``kalmanguard verify`` only: it would stop the picture for seconds.
_VERIFIED_RECORDS = 200_000
_PHASES = 60  # from this width on it is said whether a run is closed


class Watch:
    """Runs that are watched together.

    Parameters
    ----------
    paths
        Run folders, journals, or folders of run folders, in which new ones are found as they appear.
    silent_after_s
        Seconds without a record after which an open run counts as not healthy.
    """

    def __init__(self, paths: Sequence[Path], *, silent_after_s: float) -> None:
        self._paths = list(dict.fromkeys(paths))
        self._silent_after_s = silent_after_s
        self._feeds: dict[Path, Feed] = {}
        self._told: dict[Path, int] = {}

    @property
    def feeds(self) -> list[Feed]:
        """The runs, those that can still change first."""
        return sorted(self._feeds.values(), key=lambda feed: feed.ended)

    @property
    def ended(self) -> bool:
        """Whether nothing more is to come from any run."""
        return all(feed.ended for feed in self._feeds.values())

    @property
    def behind(self) -> bool:
        """Whether there is more to read at once."""
        return any(feed.phase is Phase.READING for feed in self._feeds.values())

    @property
    def exit_code(self) -> ExitCode:
        """2 when a run cannot be read, else 1 when one is not healthy, else 0."""
        if not all(feed.readable for feed in self._feeds.values()):
            return ExitCode.ERROR
        return ExitCode.OK if all(self.judge(feed).sound for feed in self._feeds.values()) else ExitCode.FAILED

    def poll(self, budget_s: float) -> None:
        """Look for new runs, and read what is new in each, for about ``budget_s`` in all."""
        found = [run for path in self._paths for run in _runs_in(path)]
        known = {path.parent for path in self._feeds}
        wanted = [path for path in found if path not in known]  # a folder whose runs have vanished is no run itself
        for path in list(self._feeds):
            if path not in wanted and self._feeds[path].phase is Phase.WAITING:
                del self._feeds[path]  # a folder that turned out to hold runs instead of being one
        for path in wanted:
            if path not in self._feeds:
                self._feeds[path] = Feed(path, shown(path.parent if path.name == FILE_NAME else path))
        for feed in self._feeds.values():
            feed.poll(budget_s / len(self._feeds))

    def verify(self) -> None:
        """Derive the certificates of closed runs, of as many as takes no longer than a moment in all."""
        left = _VERIFIED_RECORDS
        for feed in self._feeds.values():
            if feed.phase is Phase.CLOSED and feed.run.verified is None and feed.run.records <= left:
                left -= feed.run.records
                feed.verify()

    def judge(self, feed: Feed) -> Health:
        """Judge one run; one that cannot be read is not sound."""
        if feed.readable:
            return judge(feed.run, silent_after_s=self._silent_after_s)
        return Health(_ABSENT[feed.phase], False, feed.trouble)

    def picture(self, people: Console, *, height: int | None = None) -> RenderableType:
        """One run at a glance, or several as a table."""
        feeds = self.feeds
        if len(feeds) == 1:
            return glance(feeds[0], self.judge(feeds[0]), people, height=height)
        return self._table(feeds, people, height)

    def _table(self, feeds: list[Feed], people: Console, height: int | None) -> RenderableType:
        wide, widest = people.width >= 72, people.width >= 110
        table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0), expand=True)
        table.add_column("run", ratio=2, no_wrap=True, overflow="ellipsis")
        table.add_column("health", no_wrap=True)
        table.add_column("step", justify="right", no_wrap=True)
        table.add_column("probe", justify="right", no_wrap=True)
        if wide:
            for heading in ("bound", "best", "R", "V"):
                table.add_column(heading, justify="right", no_wrap=True)
        if widest:
            table.add_column("certificate", no_wrap=True)
            table.add_column("probe loss over the run", no_wrap=True, width=24)
        troubles = [Text(feed.trouble, style="yellow") for feed in feeds if feed.trouble]
        told = sum(len(text.wrap(people, people.width)) for text in troubles)
        room = len(feeds) if height is None or len(feeds) + told < height else max(1, height - told - 2)
        above = os.path.commonpath([os.path.dirname(feed.name) for feed in feeds]) if _relatives(feeds) else ""
        for feed in feeds[:room]:
            name = os.path.relpath(feed.name, above) if above else feed.name
            self._row(table, feed, name, people, wide=wide, widest=widest)
        more = [Text(f"... {len(feeds) - room:,} more", style="dim")] if room < len(feeds) else []
        return Group(table, *more, *troubles)

    def _row(self, table: Table, feed: Feed, name: str, people: Console, *, wide: bool, widest: bool) -> None:
        health, run = self.judge(feed), feed.run
        word = Text(health.word, style=HEALTH_STYLES[health.word])
        if not feed.readable:
            table.add_row(name, word)
            return
        if feed.phase is not Phase.RUNNING and people.width >= _PHASES:
            word.append(f" {feed.phase.value}", style="dim")
        cells: list[RenderableType] = [name, word, f"{run.step:,}", number(run.probe.last)]
        if wide:
            bound = run.bound if math.isfinite(run.bound) else None
            cells += [number(bound), number(run.best), f"{run.rollbacks:,}", f"{run.vetoes:,}"]
        if widest:
            low, high = (run.probe.low, run.probe.high) if math.isfinite(run.probe.low) else (0.0, 1.0)
            curve = sparkline(
                run.probe.highs(), width=24, end=max(1, run.step), low=low, high=high, blocks=blocks_fit(people)
            )
            stated = run.certificate if run.verified is None else ("ok" if not run.verified.exit_code else "see verify")
            cells += [stated, Text(curve, style="cyan")]
        table.add_row(*cells)

    def lines(self) -> Iterator[Text]:
        """Tell each run in one line, with the time, for logs; new events are in the line of their run."""
        now = time.strftime("%H:%M:%S")
        for path, feed in self._feeds.items():
            health, run = self.judge(feed), feed.run
            if not feed.readable:
                yield Text(f"{now} {health.word} {feed.trouble}")
                continue
            bound = number(run.bound) if math.isfinite(run.bound) else "none yet"
            told = (
                f"{now} {health.word} {feed.name} {feed.phase.value} step {run.step:,}, probe {number(run.probe.last)} "
                f"(bound {bound}, best {number(run.best)}), give-back {give_back(run)}, lr {number(run.rate.last, 3)}, "
                f"gradient {number(run.gradient.last, 3)}, {done(run)}, certificate {certificate(run)}"
            )
            new = run.event_count - self._told.get(path, 0)
            self._told[path] = run.event_count
            if new > 0 and run.events:
                last = run.events[-1].reason
                told += f"; {last}" if new == 1 else f"; {new:,} events, the last: {last}"
            yield Text(told)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {"exit_code": int(self.exit_code), "runs": [self._values(feed) for feed in self.feeds]}

    def _values(self, feed: Feed) -> dict[str, Any]:
        health, run = self.judge(feed), feed.run
        lost, allowed = run.give_back
        return {
            "run": feed.name,
            "phase": feed.phase.value,
            "health": health.word,
            "healthy": health.sound,
            "sentence": health.sentence,
            "step": run.step,
            "records": run.records,
            "silent_s": run.silent_s,
            "probe": {"last": run.probe.last, "first": run.first_probe, "best": run.best, "bound": run.bound},
            "give_back_frac": lost,
            "give_back_allowed_frac": allowed,
            "loss": {"last": run.loss.last, "min": run.loss.low, "max": run.loss.high},
            "learning_rate": run.rate.last,
            "lr_factor": run.lr_factor,
            "gradient_norm": run.gradient.last,
            "rollbacks": run.rollbacks,
            "vetoes": run.vetoes,
            "suspicions": run.suspicions,
            "errors": run.errors,
            "events": [vars(event) for event in run.events],
            "certificate": {
                "stated": run.certificate,
                "verified": None if run.verified is None else run.verified.to_dict(),
            },
        }


def _relatives(feeds: Sequence[Feed]) -> bool:
    """Whether the names are all absolute or all relative, so that they may have folders in common."""
    return len({os.path.isabs(feed.name) for feed in feeds}) == 1


def _runs_in(path: Path) -> list[Path]:
    """The run folder itself, or those right below it when it is none."""
    if path.suffix == ".sqlite" or (path / FILE_NAME).exists() or not path.is_dir():
        return [path]
    try:
        below = sorted(folder for folder in path.iterdir() if (folder / FILE_NAME).exists())
    except OSError:
        below = []
    return below or [path]
