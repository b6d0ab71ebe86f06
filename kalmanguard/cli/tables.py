"""Tables that several commands print."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kalmanguard.certificate.verify import NON_CLAIMS, Report
from kalmanguard.cli.terminal import status


def claims_table(report: Report, *, detailed: bool) -> Table:
    """Every claim of a certificate with its status; ``detailed`` with the numbers that it rests on."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column()
    for claim in report.claims:
        table.add_row(claim.name, status(claim.status), claim.title)
        if detailed:
            table.add_row("", "", Text(claim.text, style="dim"))
    return table


def print_claims(console: Console, report: Report) -> None:
    """Print the claims, and what their statuses mean."""
    console.print(claims_table(report, detailed=False))
    meanings = {
        "HOLDS": "derived again from the journal",
        "NOT CLAIMED": "nothing to check, or nothing promised",
        "VACUOUS": "true, but too weak to be of use",
        "LAPSED": "held once, or broken openly",
        "INCOMPLETE": "the journal was not closed",
        "FAILED": "the journal contradicts itself",
    }
    found = {claim.status for claim in report.claims}
    legend = "; ".join(f"{word}: {meaning}" for word, meaning in meanings.items() if word in found)
    console.print(Text(f"{legend}.", style="dim"))


def print_report(console: Console, report: Report) -> None:
    """Print a verifier's report in full."""
    console.print(f"{report.path}: {report.records:,} records, {report.steps:,} steps", soft_wrap=True)
    console.print(f"head {report.head}\n", soft_wrap=True)
    console.print(claims_table(report, detailed=True))
    console.print("\n[bold]Not claimed[/bold]")
    console.print(bullets(NON_CLAIMS))


def bullets(lines: Sequence[str]) -> Table:
    """A list with hanging indents."""
    table = Table.grid(padding=(0, 1))
    for line in lines:
        table.add_row("-", line)
    return table
