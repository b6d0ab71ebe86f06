"""``kalmanguard analyze``: what a recorded run was like, whoever recorded it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from kalmanguard.cli.completion import complete_settings
from kalmanguard.cli.folders import shown
from kalmanguard.cli.options import AsJson
from kalmanguard.cli.terminal import blocks_fit, console, emit, sparkline, status
from kalmanguard.errors import ConfigurationError

if TYPE_CHECKING:
    from kalmanguard.analysis.analysis import Analyses, Analysis

Log = Annotated[
    Path,
    typer.Argument(
        metavar="PATH",
        help="A run folder or journal of kalmanguard, or what others leave: CSV, JSON lines, Parquet, TensorBoard "
        "events, trainer_state.json, a folder of checkpoints, a folder of any of these.",
    ),
]
Columns = Annotated[
    list[str] | None,
    typer.Option(
        "--column",
        metavar="CHANNEL=NAME",
        help="What a column means where its name does not say so, such as loss=my_objective, probe=dev/nll, step=it, "
        "gradient_norm=gn; may be given several times.",
    ),
]
Chosen = Annotated[
    str | None,
    typer.Option(
        metavar="PRESET|TOML",
        help="Settings to judge by. [default: a journal's own, or balanced]",
        autocompletion=complete_settings,
    ),
]
#: Files from this size on are streamed: what is larger when decompressed is refused by other bounds.
_STREAMED_BYTES = 1 << 28
#: Runs, and incidents of a run, that are told on the terminal.
_RUNS, _INCIDENTS = 12, 8


def analyze(
    path: Log,
    run: Annotated[str | None, typer.Option(metavar="NAME", help="Only this run of a log with several.")] = None,
    column: Columns = None,
    settings: Chosen = None,
    report: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Where the HTML page goes. [default: NAME.report.html in this folder]"),
    ] = None,
    no_report: Annotated[bool, typer.Option("--no-report", help="Write no page.")] = False,
    as_json: AsJson = False,
) -> None:
    """Analyse recorded runs: what happened when, what a supervisor would have done, how healthy the run is now.

    The engine that supervises live runs is folded over the log. Written is one HTML page with its pictures inside; with
    --json only one object is printed, and a page written if --report names one.

    Exit codes:

    - 0: analysed, whatever the runs are like

    - 2: there is nothing that can be read
    """
    from kalmanguard.analysis.analysis import in_order
    from kalmanguard.analysis.report import write_report

    people = console(as_json=as_json)
    analyses = in_order(read(people, path, run, column, settings))
    page = report
    if page is None and not no_report and not as_json:
        from kalmanguard.analysis.formats.opening import run_name

        page = Path(f"{run_name(path.resolve()) or 'runs'}.report.html")
    written = None if page is None or no_report else write_report(analyses, page)
    if as_json:
        emit({"path": str(path), **analyses.to_dict()})
        return
    _tell(people, analyses)
    if written is not None:
        people.print(Text(f"\nReport   {shown(written)}"), soft_wrap=True)


def read(
    people: Console, path: Path, run: str | None, column: list[str] | None, settings: str | None
) -> list[Analysis]:
    """Load and analyse every run at a path, with progress."""
    from kalmanguard.analysis.analysis import analyze as judge
    from kalmanguard.analysis.trajectory import Stream, Trajectory
    from kalmanguard.settings import Settings

    chosen = None if settings is None else Settings.of(settings).model_copy(update={"mode": "observe"})
    columns = columns_of(column)
    trajectories: list[Trajectory | Stream]
    if path.is_file() and path.stat().st_size >= _STREAMED_BYTES and path.suffix != ".sqlite":
        trajectories = [Trajectory.stream(path, columns=columns, run=run)]
    elif run is not None:
        trajectories = [Trajectory.load(path, columns=columns, run=run)]
    else:
        trajectories = [*Trajectory.load_all(path, columns=columns).values()]
    analyses = []
    with Progress(console=people, transient=True, disable=not people.is_terminal) as progress:
        task = progress.add_task("analysing", total=len(trajectories))
        for trajectory in trajectories:
            analyses.append(judge(trajectory, chosen, estimate=len(trajectories) <= _RUNS))
            progress.advance(task)
    return analyses


def columns_of(given: list[str] | None) -> dict[str, str] | None:
    """Read ``CHANNEL=NAME`` options."""
    if not given:
        return None
    columns = {}
    for text in given:
        channel, equals, name = text.partition("=")
        if not (channel and equals and name):
            raise ConfigurationError(f"--column {text!r}: write CHANNEL=NAME, such as loss=my_objective.")
        columns[channel.strip()] = name
    return columns


def _tell(people: Console, analyses: Analyses) -> None:
    if len(analyses.runs) > 1:
        people.print(_overview(analyses))
        left = len(analyses.runs) - _RUNS
        if left > 0:
            people.print(Text(f"... and {left:,} more, in no worse state"))
        counts = ", ".join(f"{n:,} {health}" for health, n in analyses.counts().items())
        people.print(Text(f"\n{len(analyses.runs):,} runs: {counts}", style="bold"))
        return
    _tell_run(people, analyses.runs[0])


def _overview(analyses: Analyses) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for heading, justify in (("run", "left"), ("health", "left"), ("rows", "right"), ("suspicious", "right")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    table.add_column("confirmed", justify="right")
    table.add_column("why")
    for run in analyses.runs[:_RUNS]:
        j = run.judgement
        table.add_row(
            Text(run.name), status(run.verdict.health.value), f"{j.rows:,}", f"{j.suspected:,}", f"{j.confirmed:,}",
            Text(" ".join(run.verdict.reasons)),
        )  # fmt: skip
    return table


def _tell_run(people: Console, run: Analysis) -> None:
    j = run.judgement
    people.print(Text.assemble((run.name, "bold"), "  ", status(run.verdict.health.value)))
    people.print(Text(" ".join(run.verdict.reasons)))
    facts = Table.grid(padding=(0, 2))
    facts.add_row("Source", Text(f"{run.path} ({run.format})"))
    facts.add_row("Logged", f"{j.rows:,} rows, steps {j.first_step:,} to {j.last_step:,}")
    for name, label in (("loss", "Training loss"), ("probe", "Held-out loss"), ("gradient_norm", "Gradient norm")):
        curve = j.curves.get(name)
        if curve and curve.finite and (name != "probe" or j.probes):
            points = list(zip(curve.steps - j.first_step + 1, curve.mean, strict=True))
            line = sparkline(
                points, width=40, end=max(1, j.last_step - j.first_step + 1), low=float(curve.mean.min()),
                high=float(curve.mean.max()), blocks=blocks_fit(people),
            )  # fmt: skip
            facts.add_row(label, Text.assemble(f"{curve.first:.4g} to {curve.last:.4g}  ", (line, "cyan")))
    facts.add_row("Rows", f"{j.suspected:,} suspicious, {j.confirmed:,} confirmed; stretches of either: {j.episodes:,}")
    for estimate in run.estimates:
        facts.add_row(Text(estimate.name), Text(estimate.text))
    for note in run.notes:
        facts.add_row("Noted", Text(note, style="yellow"))
    people.print(facts)
    incidents = run.incidents
    if incidents:
        people.print("\n[bold]What happened[/bold]")
        told = Table.grid(padding=(0, 2))
        # What was confirmed is told before what was only looked at.
        told_first = sorted(incidents, key=lambda incident: not incident.proposals)[:_INCIDENTS]
        for incident in sorted(told_first, key=lambda incident: incident.first):
            span = f"{incident.first:,}" + (f" to {incident.last:,}" if incident.last != incident.first else "")
            told.add_row(span, Text(f"{incident.message}; it {run.verb} {incident.deed}"))
        people.print(told)
        if len(incidents) > _INCIDENTS:
            people.print(Text(f"... and {len(incidents) - _INCIDENTS:,} more"))
    if run.verdict.advice:
        people.print("\n[bold]What to try[/bold]")
        for line in run.verdict.advice:
            people.print(Text(f"- {line}"))
