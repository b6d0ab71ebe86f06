"""``kalmanguard doctor``: whether everything that supervision needs is there and works."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kalmanguard.cli.folders import shown
from kalmanguard.cli.options import AsJson
from kalmanguard.cli.terminal import ExitCode, console, emit

if TYPE_CHECKING:
    from kalmanguard.cli.checkup.check import Check

_STYLES = {"OK": "green", "ABSENT": "dim", "NOTE": "yellow", "PROBLEM": "bold red"}


def doctor(
    run_dir: Annotated[Path, typer.Option(help="Where runs are to be written; nothing is left there.")] = Path("runs"),
    self_test: Annotated[
        bool, typer.Option(help="Train a small network, break it, and check that it is rescued exactly.")
    ] = True,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Also say where the interpreter and the package lie.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check the environment, the optional parts, the run folder, and a rescue from end to end.

    Paths and host names are left out unless --verbose is given, so that the output can be posted. Needs no network.

    Exit codes:

    - 0: everything that is needed works, with notes or without

    - 1: a PROBLEM was found; each comes with a way out

    - 2: wrong input
    """
    people = console(as_json=as_json)
    with people.status("Looking ..."):
        checks = list(_checks(run_dir, verbose=verbose, self_test=self_test))
    problems = [check for check in checks if check.verdict == "PROBLEM"]
    notes = sum(check.verdict == "NOTE" for check in checks)
    code = ExitCode.FAILED if problems else ExitCode.OK
    if as_json:
        emit({"exit_code": int(code), "problems": len(problems), "notes": notes, "checks": [vars(c) for c in checks]})
    else:
        _tell(people, checks)
        verdict = f"{len(problems)} found, see above" if problems else "none"
        people.print(f"\n[bold]Problems[/bold]: {verdict}; notes: {notes}.")
    raise typer.Exit(code)


def _checks(run_dir: Path, *, verbose: bool, self_test: bool) -> Iterator[Check]:
    from kalmanguard.cli.checkup import selftest
    from kalmanguard.cli.checkup.check import Check, Verdict
    from kalmanguard.cli.checkup.environment import check_environment
    from kalmanguard.cli.checkup.folder import check_folder
    from kalmanguard.cli.checkup.parts import check_parts

    yield from check_environment()
    if verbose:
        import kalmanguard

        where = {"interpreter": sys.executable, "package": str(Path(kalmanguard.__file__).parent)}
        yield Check("Environment", "places", Verdict.OK, ", ".join(f"{k} {v}" for k, v in where.items()), values=where)
    yield from check_parts()
    yield from check_folder(run_dir, shown(run_dir))
    if self_test:
        yield from selftest.self_test()


def _tell(people: Console, checks: list[Check]) -> None:
    for group, found in groupby(checks, key=lambda check: check.group):
        people.print(f"\n[bold]{group}[/bold]")
        table = Table.grid(padding=(0, 1))
        table.add_column(width=7)
        table.add_column(width=14)
        table.add_column()
        for check in found:
            text = Text(check.text)
            if check.advice:
                text.append(f"\n{check.advice}", style="dim" if check.verdict == "ABSENT" else "default")
            table.add_row(Text(check.verdict, style=_STYLES[check.verdict]), check.name, text)
        people.print(table)
