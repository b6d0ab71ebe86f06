"""``kalmanguard verify``: check a run's certificate from its journal alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kalmanguard.cli.options import AsJson, Run
from kalmanguard.cli.terminal import console, emit
from kalmanguard.errors import JournalError


def verify(
    run: Run,
    head: Annotated[
        str | None,
        typer.Option(
            metavar="HEX|FILE",
            help="Head of the journal that was published outside the run, 64 hexadecimal digits or a file that begins "
            "with them: without it a journal that was rewritten or cut short as a whole does not show.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check what a run claims about itself.

    Every claim is derived again from the numbers in the journal by a verifier that shares no code with what wrote them
    and needs neither PyTorch nor the model. The same as running kalmanguard/certificate/verify.py on its own.

    Exit codes:

    - 0: nothing worse than VACUOUS

    - 1: something FAILED: the journal contradicts itself

    - 2: there is no journal that can be read

    - 3: something LAPSED or is INCOMPLETE
    """
    from kalmanguard.certificate import verify as verifier
    from kalmanguard.cli.tables import print_report

    try:
        report = verifier.verify(run, _digest(head))
    except verifier.UnreadableJournalError as error:
        raise JournalError(str(error)) from None
    if as_json:
        emit(report.to_dict())
    else:
        print_report(console(), report)
    raise typer.Exit(report.exit_code)


def _digest(head: str | None) -> str | None:
    if head is None or (len(head) == 64 and all(digit in "0123456789abcdefABCDEF" for digit in head)):
        return head
    try:
        return Path(head).read_text(encoding="ascii").split()[0]
    except (OSError, UnicodeDecodeError, IndexError):
        raise JournalError(f"--head {head}: neither 64 hexadecimal digits nor a file that begins with them.") from None
