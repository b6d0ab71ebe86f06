"""How the demonstration ends: results, certificate, and where everything lies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kalmanguard.certificate.verify import Report
from kalmanguard.cli.folders import shown
from kalmanguard.cli.story import CLEAN, FAULTED, SUPERVISED, Outcome, Story
from kalmanguard.cli.tables import print_claims
from kalmanguard.cli.terminal import duration, number


def tell(people: Console, story: Story, report: Report, folder: Path, *, seconds: float) -> None:
    """Print how the demonstration ended: table, certificate, places."""
    people.print()
    people.print(_table(story.outcomes))
    people.print(
        "[dim]Steps undone: dropped before being applied, or rolled back. Steps behind: for how long the clean run had "
        "already been where this one ended.[/dim]"
    )
    people.print(
        "\n[bold]Certificate[/bold] of the supervised run, derived from its journal by the standalone verifier"
    )
    print_claims(people, report)
    people.print(
        Text(
            "Its head, to be kept elsewhere: with verify --head it shows whether the journal was rewritten.",
            style="dim",
        )
    )
    people.print(report.head)
    people.print(f"\n[bold]Where everything lies[/bold] (took {duration(seconds)})")
    _places(people, folder)


def _table(outcomes: Sequence[Outcome]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("run", "final held-out\nloss", "ratio\nto clean", "steps\nundone", "steps\nbehind", "vetoes"):
        table.add_column(heading, justify="left" if heading == "run" else "right")
    table.add_column("rollbacks", justify="right")
    table.add_column("time", justify="right")
    for o in outcomes:
        style = {CLEAN: "default", FAULTED: "red", SUPERVISED: "cyan"}[o.name]
        behind = "-" if o.name == CLEAN else f"all {o.steps_behind:,}" if not math.isfinite(o.held_out_loss) else (
            f"{o.steps_behind:,}"
        )  # fmt: skip
        watched = o.name == SUPERVISED
        table.add_row(
            o.name,
            number(o.held_out_loss),
            number(o.ratio) if math.isfinite(o.ratio) else "-",
            f"{o.steps_undone:,}" if watched else "-",
            behind,
            f"{o.vetoes}" if watched else "-",
            f"{o.rollbacks}" if watched else "-",
            duration(o.seconds),
            style=style,
        )
    return table


def _places(people: Console, folder: Path) -> None:
    name = shown(folder)
    for path, what in (
        ("story.png", "the figure"),
        ("summary.json", "all numbers of it"),
        ("journal.sqlite", "the journal: what was measured and decided at every step"),
        ("checkpoints", "durable checkpoints of the supervised run"),
    ):
        people.print(Text.assemble(f"{name}/{path:<14}  ", (what, "dim")), soft_wrap=True)
    people.print()
    for purpose, command in (("Look closer", "show"), ("Check it", "verify"), ("Decide again", "replay")):
        people.print(Text(f"{purpose:<13} kalmanguard {command} {name}"), soft_wrap=True)
