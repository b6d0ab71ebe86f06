"""One run at a glance: healthy or not, where it stands, what happened, what is certified."""

from __future__ import annotations

import math
from collections.abc import Iterator

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from kalmanguard.cli.feed import Feed, Phase
from kalmanguard.cli.health import HEALTH_STYLES, Health
from kalmanguard.cli.runstate import RunState
from kalmanguard.cli.terminal import STYLES, blocks_fit, number, sparkline, status
from kalmanguard.cli.trace import Trace

_LABEL = 11
_BESIDE = 110  # from this width on a curve stands beside its numbers
_NUMBERS = 46
_MARK_STYLES = {"R": "magenta", "V": "yellow", "H": "bold red", "S": "cyan"}
_RANK = "VSRH"  # of the marks that fall into one column the gravest is shown


def glance(feed: Feed, health: Health, people: Console, *, height: int | None = None) -> RenderableType:
    """Draw a run.

    Parameters
    ----------
    feed, health
        The run and the judgement on it.
    people
        Where it is shown: its width decides the layout, its encoding the glyphs.
    height
        Lines that there are; events, then curves, are left out to fit. ``None`` for as many as it takes.
    """
    if not feed.readable:
        return Text(feed.trouble, style=HEALTH_STYLES.get(health.word, "default"))
    for curves in (True, False):
        top = Group(_headline(feed, health), "", _numbers(feed.run, people, curves=curves))
        used = _lines(people, top)
        if height is None or used + 3 <= height:
            break
    left = None if height is None else height - used
    return Group(top, *_events(feed.run, people, left))


def _headline(feed: Feed, health: Health) -> Text:
    text = Text.assemble((f" {health.word} ", HEALTH_STYLES[health.word] + " reverse"), " ", (feed.name, "bold"))
    text.append(f"  step {feed.run.step:,}, {_phase(feed)}")
    if feed.run.header.get("settings", {}).get("mode") == "observe":
        text.append(", observed only")
    if feed.speed is not None and feed.phase is Phase.RUNNING:
        text.append(f", {number(feed.speed, 3)} steps/s")
    return text.append(f"\n{health.sentence}", style="default")


def _phase(feed: Feed) -> str:
    if feed.phase is Phase.READING:
        return f"reading, {100 * feed.run.records // max(1, feed.total)} % so far"
    return feed.phase.value


def _numbers(run: RunState, people: Console, *, curves: bool) -> Table:
    beside = people.width >= _BESIDE
    drawn = people.width - _LABEL - 1 - (_NUMBERS + 1 if beside else 0)
    table = Table.grid(padding=(0, 1))
    table.add_column(width=_LABEL, style="bold")
    if beside and curves:
        table.add_column(width=_NUMBERS)
    table.add_column(width=drawn if beside and curves else None)
    for label, text, trace in _rows(run):
        lines = _curves(run, trace, people, max(8, drawn)) if curves and trace is not None else []
        if beside and curves:
            table.add_row(label, text, Group(*lines))
            continue
        table.add_row(label, text)
        for line in lines:
            table.add_row("", line)
    return table


def _rows(run: RunState) -> Iterator[tuple[str, Text, Trace | None]]:
    # A run is what its probes say: first of all, with what was done about it marked below.
    yield "Probe loss", _probe(run), run.probe
    yield "Give-back", Text(give_back(run)), None
    yield "Train loss", Text(_spread(run.loss)), run.loss
    held = f" (x{run.lr_factor:g} by recovery)" if run.lr_factor != 1 else ""
    yield "Learn rate", Text(f"{_spread(run.rate)}{held}"), run.rate
    yield "Gradient", Text(_spread(run.gradient)), run.gradient
    yield "Done", Text(done(run, letters=True)), None
    yield "Certificate", certificate(run), None
    for note in run.notes:
        yield "Noted", Text(note, style="yellow"), None


def _probe(run: RunState) -> Text:
    bound = number(run.bound) if math.isfinite(run.bound) else "not in force yet"
    text = Text(f"{number(run.probe.last)}, bound {bound}, best {number(run.best)}")
    if run.probe.not_finite:
        text.append(f"; not finite {run.probe.not_finite} times", style="red")
    return text


def _spread(trace: Trace) -> str:
    if trace.last is None:
        return "not seen"
    text = f"{number(trace.last)}"
    if math.isfinite(trace.low):
        text += f", min {number(trace.low, 3)}, max {number(trace.high, 3)}"
    return text + (f"; not finite {trace.not_finite} times" if trace.not_finite else "")


def give_back(run: RunState) -> str:
    """What the last probe has lost of the progress, in words."""
    lost, allowed = run.give_back
    if not math.isfinite(allowed) or math.isnan(lost):
        return "no progress yet to give back"
    return f"{100 * lost:.1f} % of the progress, {100 * allowed:.0f} % allowed"


def done(run: RunState, *, letters: bool = False) -> str:
    """What the supervisor did, counted; with the ``letters`` that mark it below the curve."""
    counted = [("rollback", run.rollbacks, "R"), ("veto", run.vetoes, "V"), ("suspicion", run.suspicions, "")]
    counted += [("halt", run.halts, "H"), ("resume", run.resumes, "S")]
    plurals = {"veto": "vetoes"}
    parts = [
        f"{count:,} {noun if count == 1 else plurals.get(noun, noun + 's')}"
        + (f" ({letter})" if letters and letter and count else "")
        for noun, count, letter in counted
        if count or letter not in ("H", "S")
    ]
    return ", ".join(parts) + (f"; {run.errors:,} faults of its own" if run.errors else "")


def certificate(run: RunState) -> Text:
    """The certificate: as the run states it while it goes on, as derived from the journal once it is closed."""
    if run.verified is None:
        return Text.assemble(status(run.certificate), " as the run states it")
    found: dict[str, int] = {}
    for claim in run.verified.claims:
        found[claim.status] = found.get(claim.status, 0) + 1
    text = Text("verified: ")
    for index, word in enumerate(sorted(found, key=lambda word: -found[word])):
        text.append(", " if index else "").append(f"{found[word]} ").append_text(status(word))
    return text


def _curves(run: RunState, trace: Trace, people: Console, width: int) -> list[Text]:
    points = trace.highs()
    if not points:
        return []
    low, high = (trace.low, trace.high) if math.isfinite(trace.low) else (0.0, 1.0)
    end = max(1, run.step)
    line = sparkline(points, width=width, end=end, low=low, high=high, blocks=blocks_fit(people))
    lines = [Text(line, style="cyan", no_wrap=True, overflow="crop")]
    if trace is run.probe and run.marks:
        lines.append(marks_line(run, width))
    return lines


def marks_line(run: RunState, width: int) -> Text:
    """Letters below a curve, at the steps of rollbacks (R), vetoes (V), halts (H) and resumes (S)."""
    cells = [" "] * width
    for step, letter in run.marks:
        at = min(width - 1, max(0, math.ceil(step / max(1, run.step) * width) - 1))
        if cells[at] == " " or _RANK.index(letter) > _RANK.index(cells[at]):
            cells[at] = letter
    text = Text("".join(cells).rstrip(), no_wrap=True, overflow="crop")
    for letter, style in _MARK_STYLES.items():
        text.highlight_regex(rf"\b{letter}+\b", style)
    return text


def _events(run: RunState, people: Console, left: int | None) -> Iterator[RenderableType]:
    if not run.events:
        if left is None or left >= 2:
            yield Text("\nNothing was suspicious, dropped or undone so far.", style="dim")
        return
    table = Table.grid(padding=(0, 1))
    table.add_column(width=9)
    table.add_column()
    rows: list[tuple[Text, Text]] = []
    used = 2  # the empty line and the heading
    for event in reversed(run.events):
        word = event.action if event.action != "ACCEPT" else event.level
        row = Text(word, style=STYLES.get(word, "default")), Text(event.reason)
        used += len(row[1].wrap(people, max(8, people.width - 10)))
        if (left is not None and used > left) or (left is None and len(rows) == 5):
            break
        rows.append(row)
    if not rows:
        return
    for row in reversed(rows):
        table.add_row(*row)
    more = run.event_count - len(rows)
    yield Text.assemble("\n", ("Events", "bold"), f" (the last {len(rows)} of {run.event_count:,})" if more else "")
    yield table


def _lines(people: Console, picture: RenderableType) -> int:
    return len(people.render_lines(picture, people.options.update(height=None)))
