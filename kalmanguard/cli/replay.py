"""``kalmanguard replay``: make every decision of a run again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from kalmanguard.cli.completion import complete_settings
from kalmanguard.cli.options import AsJson, Run
from kalmanguard.cli.terminal import console, emit, status

if TYPE_CHECKING:
    from kalmanguard.replay import ReplayReport

_ORDER = ("ACCEPT", "VETO", "ROLLBACK", "HALT", "WARMUP", "NOMINAL", "SUSPECT", "CONFIRMED")


def replay(
    run: Run,
    settings: Annotated[
        str | None,
        typer.Option(
            metavar="PRESET|TOML",
            autocompletion=complete_settings,
            help="Ask what other settings would have decided: conservative, balanced or aggressive, or a TOML file.",
        ),
    ] = None,
    differences: Annotated[int, typer.Option(min=0, help="How many differences are listed, the first ones.")] = 10,
    as_json: AsJson = False,
) -> None:
    """Decide every step of a run again, and compare.

    The measurements in the journal go through the same engine again; every decision must come out as it was recorded,
    bit for bit. Neither PyTorch nor the model is needed. With --settings it is a what-if: how would these settings
    have judged the same measurements?

    Exit codes:

    - 0: every decision is as recorded, or a what-if was answered

    - 1: a decision differs

    - 2: there is no journal that can be read
    """
    from kalmanguard.replay import replay as fold
    from kalmanguard.settings import Settings

    people = console(as_json=as_json)
    other = None if settings is None else Settings.of(settings)
    with Progress(console=people, transient=True, disable=not people.is_terminal) as progress:
        task = progress.add_task("replaying", total=None)
        report = fold(run, other, progress=lambda done, total: progress.update(task, completed=done, total=total))
    if as_json:
        emit(report.to_dict())
    else:
        _tell(people, report, listed=differences)
    raise typer.Exit(report.exit_code)


def _tell(people: Console, report: ReplayReport, *, listed: int) -> None:
    people.print(Text(f"{report.path}: {report.decisions:,} decisions made again"))
    if report.what_if:
        people.print(f"With these settings {report.differing:,} of them differ in what is proposed or in the level.\n")
        people.print(_counts(report))
    elif report.identical:
        people.print("[green]Identical[/green]: all of them are bit for bit what was recorded.")
    else:
        people.print(
            f"[bold red]Different[/bold red]: {report.differing:,} of them are not what was recorded, "
            f"{report.differing_actions:,} in what was proposed."
        )
    if report.differences and listed:
        people.print("\n[bold]First differences[/bold]")
        for difference in report.differences[:listed]:
            people.print(Text(f"  {difference}"))
    for note in report.notes:
        people.print(Text(f"Note: {note}", style="yellow"))


def _counts(report: ReplayReport) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("")
    for heading in ("recorded", "what if"):
        table.add_column(heading, justify="right")
    for word in _ORDER:
        before, after = report.recorded.get(word, 0), report.replayed.get(word, 0)
        if before or after:
            table.add_row(status(word), f"{before:,}", f"{after:,}")
    return table
