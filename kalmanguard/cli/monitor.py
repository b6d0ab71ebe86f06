"""``kalmanguard monitor``: runs at a glance in a terminal, while they go on."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from kalmanguard.cli.completion import complete_watched
from kalmanguard.cli.options import AsJson
from kalmanguard.cli.terminal import console, emit
from kalmanguard.errors import JournalError

if TYPE_CHECKING:
    from kalmanguard.cli.watch import Watch

_SLICE_S = 0.2  # how soon a terminal of another size is drawn anew
_BUDGET_S = 0.5  # for what one run has to be read of before the next picture
_INTERRUPTED = 128 + signal.SIGINT


def monitor(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[RUN]...",
            help="Run folders, or folders of run folders; they need not exist yet. [default: runs]",
            autocompletion=complete_watched,
            show_default=False,
        ),
    ] = None,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Look once, print, and exit.")] = False,
    follow: Annotated[
        bool,
        typer.Option("--follow", help="Stay when all runs are closed: for runs that are resumed or begun later."),
    ] = False,
    silent_after: Annotated[
        float, typer.Option(min=1.0, help="Seconds without a record after which an open run counts as not healthy.")
    ] = 300.0,
    as_json: AsJson = False,
) -> None:
    """Watch runs in a terminal, live.

    Read-only: the run does not notice. Several runs make a table. Where there is no terminal, one line a run and
    interval is printed. Ends by itself when every run is closed, or with Ctrl-C. Needs neither PyTorch nor the model.
    --json implies --once.

    Exit codes:

    - 0: every run is healthy

    - 1: a run is not: recovering, failing, outside its bound, halted, silent

    - 2: a run cannot be read, has vanished, or (with --once) is not there yet

    - 130: ended with Ctrl-C
    """
    from kalmanguard.cli.watch import Watch

    watch = Watch(runs or [Path("runs")], silent_after_s=silent_after)
    if once or as_json:
        _once(watch, as_json=as_json)
    else:
        _go_on(watch, console(), interval, follow=follow)
    raise typer.Exit(watch.exit_code)


def _once(watch: Watch, *, as_json: bool) -> None:
    people = console(as_json=as_json)
    watch.poll(math.inf)
    watch.verify()
    if len(watch.feeds) == 1 and not watch.feeds[0].readable:
        feed = watch.feeds[0]
        if feed.phase == "waiting":
            raise JournalError(f"There is no journal in {feed.name} yet; without --once it is waited for.")
        raise JournalError(feed.trouble)
    if as_json:
        emit(watch.to_dict())
    else:
        people.print(watch.picture(people))


def _go_on(watch: Watch, people: Console, interval: float, *, follow: bool) -> None:
    try:
        with _terminated_properly():
            if people.is_terminal and not people.is_dumb_terminal:
                _live(watch, people, interval, follow=follow)
            else:
                _lines(watch, people, interval, follow=follow)
    except KeyboardInterrupt:
        raise typer.Exit(_INTERRUPTED) from None
    if len(watch.feeds) == 1 and not watch.feeds[0].readable:
        raise JournalError(watch.feeds[0].trouble)


def _live(watch: Watch, people: Console, interval: float, *, follow: bool) -> None:
    try:
        # On the alternate screen: what was on the terminal before is there again afterwards.
        with Live(
            console=people, screen=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
        ) as live:
            while True:
                watch.poll(_BUDGET_S)
                live.update(_screen(watch, people, follow=follow), refresh=True)
                if watch.ended and not follow:
                    break
                _wait(live, watch, people, interval, follow=follow)
    finally:
        watch.verify()
        people.print(watch.picture(people))


def _screen(watch: Watch, people: Console, *, follow: bool) -> RenderableType:
    foot = "Ctrl-C ends this; the run goes on." if not follow else "Ctrl-C ends this."
    return Group(watch.picture(people, height=people.height - 1), Text(foot, style="dim", no_wrap=True))


def _wait(live: Live, watch: Watch, people: Console, interval: float, *, follow: bool) -> None:
    """Sleep until the next look, and draw again meanwhile when the terminal's size changes."""
    ends, size = time.monotonic() + (0.0 if watch.behind else interval), people.size
    while (left := ends - time.monotonic()) > 0:
        time.sleep(min(_SLICE_S, left))
        if people.size != size:
            size = people.size
            live.update(_screen(watch, people, follow=follow), refresh=True)


def _lines(watch: Watch, people: Console, interval: float, *, follow: bool) -> None:
    while True:
        started = time.monotonic()
        watch.poll(math.inf)
        if watch.ended and not follow:
            watch.verify()
        for line in watch.lines():
            people.print(line, soft_wrap=True)
        people.file.flush()
        if watch.ended and not follow:
            return
        time.sleep(max(0.0, interval - (time.monotonic() - started)))


@contextmanager
def _terminated_properly() -> Iterator[None]:
    """Turn SIGTERM into an exception, so that the terminal is left as it was found; a batch system sends it."""

    def leave(number: int, _: Any) -> None:
        raise SystemExit(128 + number)

    try:
        before = signal.signal(signal.SIGTERM, leave)
    except ValueError:  # not in the main thread: whoever runs this there has its own way to end it
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
