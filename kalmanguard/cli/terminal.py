"""What every command shares: consoles, exit codes, one line for an error, one JSON object, numbers and sparklines."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum
from typing import Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperCommand

from kalmanguard.errors import KalmanguardError


class ExitCode(IntEnum):
    """What a command ends with."""

    OK = 0
    FAILED = 1
    ERROR = 2
    LAPSED = 3
    HALTED = 4


# Colours of the terminal's own palette, so that they suit light and dark backgrounds.
STYLES = {
    "ACCEPT": "green",
    "VETO": "yellow",
    "ROLLBACK": "magenta",
    "HALT": "bold red",
    "WARMUP": "dim",
    "NOMINAL": "green",
    "SUSPECT": "yellow",
    "CONFIRMED": "magenta",
    "HOLDS": "green",
    "VACUOUS": "dim",
    "NOT CLAIMED": "dim",
    "LAPSED": "yellow",
    "INCOMPLETE": "yellow",
    "FAILED": "bold red",
}


class Command(TyperCommand):
    """A command whose expected failures are one clear line on stderr and exit code 2, never a traceback.

    With ``--json`` the same goes to stdout, as an object with ``error`` and ``exit_code``.
    """

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except KalmanguardError as error:
            self._fail(ctx, str(error))
        except OSError as error:
            if error.filename is None:
                raise
            self._fail(ctx, f"{error.filename}: {error.strerror}.")

    @staticmethod
    def _fail(ctx: Any, message: str) -> None:
        if ctx.params.get("as_json"):
            emit({"error": message, "exit_code": int(ExitCode.ERROR)})
        Console(stderr=True).print(Text(f"Error: {message}", style="bold red"), soft_wrap=True)
        raise typer.Exit(ExitCode.ERROR)


def console(*, as_json: bool = False) -> Console:
    """Stdout for people; with ``--json`` stdout belongs to the one object, and people are told on stderr."""
    return Console(stderr=as_json, highlight=False)


def emit(data: dict[str, Any]) -> None:
    """Print one JSON object on stdout; numbers that JSON does not have become null."""
    typer.echo(json.dumps(plain(data), indent=2))


def plain(value: Any) -> Any:
    """Replace what JSON does not have: numbers that are not finite by None, tuples by lists."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


@contextmanager
def warnings_on(target: Console) -> Iterator[None]:
    """Show Python warnings as single lines on the console, where a live view cannot garble them."""
    with warnings.catch_warnings():

        def show(message: Warning | str, *_: Any, **__: Any) -> None:
            target.print(Text(f"Warning: {message}", style="yellow"), soft_wrap=True)

        warnings.showwarning = show
        yield


def number(value: float | None, digits: int = 4) -> str:
    """A number for people, in ``digits`` significant digits; "-" for None, "not finite" for nan and infinities.

    >>> number(1.93277), number(0.5), number(12345.6), number(2.5e-7), number(float("nan")), number(None)
    ('1.933', '0.5000', '12,346', '2.500e-07', 'not finite', '-')
    """
    if value is None:
        return "-"
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e9:
        return f"{value:.{digits - 1}e}"
    places = digits - 1 - math.floor(math.log10(abs(value)))
    return f"{value:,.{max(places, 0)}f}"


def duration(seconds: float) -> str:
    """A duration for people.

    >>> duration(0.4), duration(12.34), duration(75)
    ('0.4 s', '12.3 s', '1 min 15 s')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    return f"{whole // 60} min {whole % 60} s"


def status(word: str) -> Text:
    """A status or level in its colour."""
    return Text(word, style=STYLES.get(word, "default"))


_BLOCKS = "▁▂▃▄▅▆▇█"
_ASCII = "_.:-=+*#"


def sparkline(
    points: Sequence[tuple[float, float]], *, width: int, end: float, low: float, high: float, blocks: bool = True
) -> str:
    """Draw points ``(step, value)`` in ``width`` characters over the steps 0 to ``end``, on a logarithmic scale.

    A character shows the highest value of its stretch, so that no spike is lost; ``x`` marks values that are not
    finite, and stretches without a point that lie between two others repeat the one before.

    >>> sparkline([(1, 4.0), (2, 2.0), (3, 1.0), (4, float("nan"))], width=4, end=4, low=1.0, high=4.0)
    '█▅▁x'
    """
    glyphs = _BLOCKS if blocks else _ASCII
    cells: list[float | None] = [None] * width
    last = -1
    for step, value in points:
        at = min(width - 1, max(0, math.ceil(step / end * width) - 1))
        known = cells[at]
        # A nan once there stays: no comparison with it is true.
        if known is None or not math.isfinite(value) or value > known:
            cells[at] = value
        last = max(last, at)
    line, glyph = [], " "
    for cell in cells[: last + 1]:
        if cell is not None:
            glyph = glyphs[_height(cell, low, high, len(glyphs))] if math.isfinite(cell) else "x"
        line.append(glyph)
    return "".join(line)


def _height(value: float, low: float, high: float, heights: int) -> int:
    if low > 0 and high > low:
        value, low, high = math.log(max(value, low)), math.log(low), math.log(high)
    share = (value - low) / (high - low) if high > low else 0.0
    return min(heights - 1, max(0, round(share * (heights - 1))))


def blocks_fit(target: Console) -> bool:
    """Whether the console's encoding has the block characters."""
    try:
        _BLOCKS.encode(target.encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True
