"""Views of training in progress: a live one on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from kalmanguard.cli.story import LANES, SUPERVISED, Event, Point, Story
from kalmanguard.cli.terminal import blocks_fit, number, sparkline, status
from kalmanguard.records import Decision

_LANE_STYLES = dict(zip(LANES, ("default", "red", "cyan"), strict=True))
_EVENTS = 4
_REFRESH_S = 0.15


class View(ABC):
    """Shows how far the runs are; a context manager."""

    @abstractmethod
    def update(self, step: int, decision: Decision | None) -> None:
        """Show a step."""

    @abstractmethod
    def event(self, event: Event) -> None:
        """Show something that was suspicious, dropped or undone."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        return None


class PlainView(View):
    """Lines of text, for logs: every tenth of the way, and every event."""

    def __init__(self, console: Console, story: Story) -> None:
        self._console, self._story = console, story
        self._every = max(1, story.steps // 10)

    def update(self, step: int, decision: Decision | None) -> None:
        if step % self._every and step != self._story.steps:
            return
        values = ", ".join(f"{name} {number(_last(self._story.curves.get(name, ())), 3)}" for name in LANES)
        self._console.print(f"step {step:,}/{self._story.steps:,}: held-out loss {values}", soft_wrap=True)

    def event(self, event: Event) -> None:
        self._console.print(f"  {event.action}: {event.reason}", soft_wrap=True)


class LiveView(View):
    """Three sparklines that grow, the last decision and the last events, redrawn in place."""

    def __init__(self, console: Console, story: Story) -> None:
        self._console, self._story = console, story
        self._blocks = blocks_fit(console)
        self._events: list[Event] = []
        self._decision: Decision | None = None
        self._step = 0
        self._next = 0.0
        self._progress = Progress(
            BarColumn(bar_width=None),
            TextColumn("step {task.completed:,.0f}/{task.total:,.0f}"),
            TimeRemainingColumn(),
            console=console,
            expand=True,
        )
        self._task = self._progress.add_task("", total=story.steps)
        self._live = Live(self._picture(), console=console, auto_refresh=False)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._live.update(self._picture(), refresh=True)
        self._live.stop()

    def update(self, step: int, decision: Decision | None) -> None:
        self._step = step
        self._decision = decision or self._decision
        now = time.monotonic()
        if now >= self._next or step == self._story.steps:
            self._progress.update(self._task, completed=step)
            self._live.update(self._picture(), refresh=True)
            self._next = time.monotonic() + _REFRESH_S

    def event(self, event: Event) -> None:
        self._events.append(event)
        self._next = 0.0

    def _picture(self) -> RenderableType:
        return Group(self._progress, "", self._lanes(), "", self._told())

    def _lanes(self) -> Table:
        story = self._story
        width = max(16, self._console.width - 28)
        low, high = _range(story)
        table = Table.grid(padding=(0, 1))
        table.add_column(width=10)
        table.add_column(width=width, no_wrap=True)
        table.add_column(justify="right", width=12)
        table.add_row("", Text("held-out loss, log scale", style="dim"), Text("now", style="dim"))
        for name in LANES:
            curve = story.curves.get(name, [])
            line = sparkline(curve, width=width, end=story.steps, low=low, high=high, blocks=self._blocks)
            style = _LANE_STYLES[name]
            table.add_row(Text(name, style=style), Text(line, style=style), Text(number(_last(curve)), style=style))
        marks = [" "] * width
        for span in story.spans:
            marks[min(width - 1, max(0, math.ceil(span.first / story.steps * width) - 1))] = "^"
        table.add_row(Text("faults", style="dim"), Text("".join(marks).rstrip(), style="yellow"), "")
        return table

    def _told(self) -> RenderableType:
        table = Table.grid(padding=(0, 1))
        table.add_column(width=10)
        table.add_column(ratio=1)
        decision = self._decision
        if decision is not None:
            # One line: it changes with every step.
            table.add_row(status(decision.level.value), Text(decision.reason, no_wrap=True, overflow="ellipsis"))
        table.add_row("", "")
        for event in self._events[-_EVENTS:]:
            table.add_row(status(event.action if event.action != "ACCEPT" else event.level), Text(event.reason))
        return table


def _last(curve: Sequence[Point]) -> float | None:
    return curve[-1][1] if curve else None


def _range(story: Story) -> tuple[float, float]:
    """From the lowest loss of all to the first one: a blow-up is cut off at the top instead of flattening the rest."""
    finite = [y for curve in story.curves.values() for _, y in curve if math.isfinite(y)]
    first = next((y for _, y in story.curves.get(SUPERVISED, ()) if math.isfinite(y)), 1.0)
    return min(finite, default=0.0), first


def make_view(console: Console, story: Story, *, silent: bool) -> View:
    """Live on a terminal; else plain lines, or nothing at all when ``silent``."""
    if console.is_terminal and not console.is_dumb_terminal:
        return LiveView(console, story)
    return PlainView(Console(quiet=True) if silent else console, story)
