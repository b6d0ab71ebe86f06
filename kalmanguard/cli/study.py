"""``kalmanguard study``: experiments whose truth is known, run again from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress
from rich.text import Text

from kalmanguard.cli.options import AsJson
from kalmanguard.cli.terminal import Command, console, emit

study = typer.Typer(no_args_is_help=True, help="Run a study again: its data, its figures and its tables.")


@study.callback()
def _studies() -> None:
    """Without a callback typer would make the only command the group itself."""


@study.command(cls=Command)
def damping(
    quick: Annotated[bool, typer.Option("--quick", help="A small part of every kind, in less than a minute.")] = False,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where data, figures and kept results go.")] = Path(
        "study-damping"
    ),
    seeds: Annotated[int, typer.Option(min=1, help="Reported seeds of every case, from 100 on.")] = 8,
    processes: Annotated[int, typer.Option(min=1, help="Processes, each with one thread.")] = 2,
    write: Annotated[
        Path | None, typer.Option(metavar="PAGE", help="Put the tables between the markers of this page as well.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Sweep damping thresholds over systems and networks, and hold them against the truth.

    Heavy balls below and across their bound, networks whose learning rate is raised, the edge of stability, and
    estimators under noise. Results of single cases are kept in the folder: an interrupted study goes on where it
    stopped. Thresholds that are chosen are chosen on seeds 0 to 4, and reported on others.

    Exit codes:

    - 0: done

    - 2: wrong input
    """
    from kalmanguard.analysis.study.damping import cases, sweep
    from kalmanguard.analysis.study.report import rows_of, write_files, write_page

    people = console(as_json=as_json)
    wanted = cases(seeds=seeds, quick=quick)
    with Progress(console=people, transient=True, disable=not people.is_terminal) as progress:
        task = progress.add_task("cases", total=len(wanted))
        results = sweep(
            wanted,
            folder=out,
            processes=processes,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    rows = rows_of(results)
    files = write_files(rows, out)
    if write is not None:
        write_page(rows, files, write)
    if as_json:
        matched = {name: rows[name] for name in ("matched-linear", "matched-plants")}
        emit({"cases": len(results), "matched": matched, "files": [str(file) for file in files], "exit_code": 0})
        return
    people.print(f"{len(results):,} cases. Thresholds chosen for one rate of false alarms, on other seeds:\n")
    if not rows["matched-linear"]:
        people.print("  too few cases to choose any: run it without --quick for this table")
    for row in rows["matched-linear"]:
        if row["group"] == "all":
            seen = f"{row['seen']:,} of {row['unstable']:,} unstable runs seen, {row['in_time']:,} before harm"
            people.print(Text(f"  {row['family']:28} {row['per_1000']:.2g} / 1,000 steps; {seen}"), soft_wrap=True)
    people.print(Text(f"\nWritten to {out}: {', '.join(file.name for file in files)}"), soft_wrap=True)
