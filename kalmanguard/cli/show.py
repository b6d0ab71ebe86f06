"""``kalmanguard show``: what happened in a run, from its journal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from kalmanguard.cli.options import AsJson, Run
from kalmanguard.cli.terminal import blocks_fit, console, emit, number, sparkline, status
from kalmanguard.errors import JournalError

if TYPE_CHECKING:
    from kalmanguard.cli.story import Event, Point
    from kalmanguard.cli.summary import RunSummary

_LABEL = 16


def show(
    run: Run,
    events: Annotated[int, typer.Option(min=0, help="How many events are listed, the latest ones.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Tell what happened in a run: decisions, held-out loss, events, certificate.

    Works while the run goes on, and needs neither PyTorch nor the model.

    Exit codes:

    - 0: shown, whatever the run and its certificate are like

    - 2: there is no journal that can be read
    """
    from kalmanguard.certificate import verify as verifier
    from kalmanguard.cli.summary import summarise
    from kalmanguard.cli.tables import print_claims

    summary = summarise(run)
    try:
        report = verifier.verify(run)
    except verifier.UnreadableJournalError as error:
        raise JournalError(str(error)) from None
    if as_json:
        listed = summary.to_dict()
        listed["events"] = listed["events"][-events:] if events else []
        emit(listed | {"event_count": len(summary.events), "certificate": report.to_dict()})
        return
    people = console()
    table = Table.grid(padding=(0, 1))
    table.add_column(width=_LABEL, style="bold")
    table.add_column()
    for label, value in _facts(summary, people):
        table.add_row(label, value)
    people.print(table)
    _tell_events(people, summary.events, events)
    people.print("\n[bold]Certificate[/bold]")
    print_claims(people, report)
    people.print(Text(f"\nThe numbers behind it: kalmanguard verify {run}", style="dim"))


def _facts(summary: RunSummary, people: Console) -> Iterator[tuple[str, RenderableType]]:
    header = summary.header
    state = "closed" if summary.complete else "not closed: it goes on, or was cut short"
    yield "Run", Text(f"{summary.path}, {summary.steps:,} steps, {summary.records:,} records, {state}")
    if summary.origin is not None:
        faults = ", ".join(map(str, summary.origin.get("faults", ()))) or "none"
        yield "Made by", Text(f"kalmanguard run {summary.origin.get('plant')}; faults: {faults}")
    model, probe = header.get("model", {}), header.get("probe", {})
    yield "Model", Text(f"{model.get('type', '?')}, {_size(model)}; probe of {probe.get('n', '?')} examples")
    environment = header.get("environment", {})
    yield "Environment", Text(", ".join(f"{name} {version}" for name, version in environment.items()) or "?")
    yield "Settings", Text(_settings(summary))
    yield "Last decision", Text(summary.last_decision or "none yet")
    yield "Actions", _counts(summary.actions)
    yield "Levels", _counts(summary.levels)
    for label, points in (("Held-out loss", summary.probes), ("Training loss", summary.losses)):
        if points:
            yield label, Text(_course(points))
            yield "", _line(points, summary.steps, people)
    if summary.envelope:
        e = summary.envelope
        bound = number(e["bound"]) if math.isfinite(e["bound"]) else "not in force yet"
        yield "Envelope", Text(f"first {number(e['y0'])}, best {number(e['y_best'])}, bound {bound}")
    for text in summary.marks:
        yield "Noted", Text(text)
    if summary.errors:
        first = f"{len(summary.errors):,} inside the supervisor; the first at {summary.errors[0]}"
        yield "Faults", Text(first, style="yellow")


def _size(model: dict[str, object]) -> str:
    parameters, trainable = model.get("parameters"), model.get("trainable")
    if not isinstance(parameters, int):
        return "size unknown"
    return f"{parameters:,} parameters" + ("" if trainable == parameters else f", {trainable:,} of them trainable")


def _settings(summary: RunSummary) -> str:
    mode = summary.header.get("settings", {}).get("mode", "?")
    others = ", ".join(f"{name} = {value}" for name, value in summary.changed_settings.items() if name != "mode")
    return f"mode {mode}; {others or 'otherwise the defaults'}"


def _counts(counts: Mapping[str, int]) -> Text:
    text = Text()
    for index, (word, count) in enumerate(sorted(counts.items(), key=lambda item: -item[1])):
        text.append("" if index == 0 else ", ").append_text(status(word)).append(f" {count:,}")
    return text if counts else Text("none yet")


def _course(points: Sequence[Point]) -> str:
    finite = [y for _, y in points if math.isfinite(y)]
    lost = len(points) - len(finite)
    text = f"{number(points[0][1])} at first, {number(min(finite, default=None))} at best, {number(points[-1][1])} last"
    return text + (f"; not finite {lost} times" if lost else "")


def _line(points: Sequence[Point], steps: int, people: Console) -> Text:
    finite = [y for _, y in points if math.isfinite(y)]
    low, high = min(finite, default=0.0), points[0][1] if math.isfinite(points[0][1]) else max(finite, default=1.0)
    width = max(16, people.width - _LABEL - 2)
    return Text(
        sparkline(points, width=width, end=max(1, steps), low=low, high=high, blocks=blocks_fit(people)),
        style="cyan",
        no_wrap=True,
    )


def _tell_events(people: Console, events: Sequence[Event], listed: int) -> None:
    if not events:
        people.print("\nNo events: nothing was suspicious, dropped or undone.")
        return
    left_out = max(0, len(events) - listed)
    people.print(
        "\n[bold]Events[/bold]" + (f" (the last {len(events) - left_out} of {len(events)})" if left_out else "")
    )
    table = Table.grid(padding=(0, 1))
    table.add_column(width=9)
    table.add_column()
    for event in events[left_out:]:
        word = event.action if event.action != "ACCEPT" else event.level
        table.add_row(status(word), Text(event.reason))
    people.print(table)
