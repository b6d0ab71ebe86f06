"""``kalmanguard compare``: recorded runs side by side."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from kalmanguard.cli.analyze import Chosen, Columns, read
from kalmanguard.cli.folders import shown
from kalmanguard.cli.options import AsJson
from kalmanguard.cli.terminal import console, emit

if TYPE_CHECKING:
    from kalmanguard.analysis.analysis import Analysis

#: Columns of a terminal from which on the table fits.
_WIDE = 130


def compare(
    paths: Annotated[list[Path], typer.Argument(metavar="A B...", help="Logs or run folders, as for analyze.")],
    column: Columns = None,
    settings: Chosen = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write all of them as one HTML page there.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare runs: where they end, how soon they get there, how rough the way is.

    The first one is what the others are held against. Final losses come with an interval that allows for the memory of
    the curve; it says nothing of what other seeds would give.

    Exit codes:

    - 0: compared

    - 2: fewer than two runs can be read, or they have no loss in common
    """
    from kalmanguard.analysis.analysis import in_order
    from kalmanguard.analysis.comparison import compare as put_together
    from kalmanguard.analysis.report import write_report

    people = console(as_json=as_json)
    runs = [run for path in paths for run in read(people, path, None, column, settings)]
    comparison = put_together(_told_apart(runs))
    written = None if report is None else write_report(in_order(runs), report)
    if as_json:
        emit(comparison.to_dict())
        return
    head, rows = comparison.cells()
    if people.width >= _WIDE:
        people.print(_table(head, rows))
    else:
        # One block for each run: a table of nine columns does not fit.
        for row in rows:
            grid = Table.grid(padding=(0, 2))
            for heading, cell in zip(head[1:], row[1:], strict=True):
                grid.add_row(f"  {heading}", Text(cell))
            people.print(Text(row[0], style="bold"))
            people.print(grid)
    if written is not None:
        people.print(Text(f"\nReport   {shown(written)}"), soft_wrap=True)


def _table(head: list[str], rows: list[list[str]]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for heading in head:
        table.add_column(heading, justify="left" if heading in ("run", "health") else "right")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _told_apart(runs: list[Analysis]) -> list[Analysis]:
    """Runs of one name are called by where they lie."""
    names = [run.name for run in runs]
    return [replace(run, name=run.path) if names.count(run.name) > 1 else run for run in runs]
