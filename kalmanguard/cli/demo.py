"""``kalmanguard demo``: the same plant three times side by side, broken in two of them and rescued in one."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from kalmanguard.cli.folders import fresh_folder, shown, write_json
from kalmanguard.cli.options import AsJson, Faults, Seed
from kalmanguard.cli.plants import make_plant
from kalmanguard.cli.story import CLEAN, FAULTED, LANES, SUPERVISED, Outcome, Span, Story, fault_label
from kalmanguard.cli.terminal import ExitCode, console, duration, emit, number, warnings_on

if TYPE_CHECKING:
    from kalmanguard.certificate.verify import Report
    from kalmanguard.cli.training import Lane
    from kalmanguard.cli.view import View

#: Kind and place of the faults by default, as shares of the run that no cadence divides.
_FAULTS = (("lr_spike:50@{}:steps=5", 0.3137), ("gradient_scale:1000@{}", 0.5471), ("bit_flip@{}", 0.7843))
_GAUGES = 100
_AFTER_FAULT = 8


def demo(
    out: Annotated[Path, typer.Option(help="Folder to write into; every run makes a new sub-folder.")] = Path(
        "demo-out"
    ),
    steps: Annotated[int, typer.Option(min=10, help="Steps of training, for each of the three runs.")] = 700,
    seed: Seed = 0,
    fault: Faults = None,
    plant: Annotated[
        str, typer.Option(help="What is trained: chartransformer, cnn, mlp, quadratic, or another registered plant.")
    ] = "chartransformer",
    as_json: AsJson = False,
) -> None:
    """Break a training run on purpose, and watch it being rescued. About a minute.

    The same network is trained three times side by side: undisturbed (clean), with faults (faulted), and with the same
    faults under supervision (supervised). Nothing is downloaded. Without --fault there are three: a learning rate 50
    times too large for 5 steps, a gradient 1000 times too large, and a flipped bit in a weight. A table, a figure
    (story.png) and the checked certificate of the supervised run tell what came of it.

    Exit codes:

    - 0: finished

    - 1: the certificate contradicts itself

    - 2: wrong input

    - 4: the supervised run was halted
    """
    started = time.perf_counter()
    people = console(as_json=as_json)
    people.print(
        "[bold]kalmanguard demo[/bold]: one network, trained three times side by side: undisturbed, with faults, and "
        "with the same faults under supervision."
    )
    from kalmanguard.certificate.verify import verify
    from kalmanguard.cli.view import make_view

    faults = list(fault) if fault else _default_faults(plant, steps)
    story = _prepare(plant, faults, steps=steps, seed=seed)
    with ExitStack() as stack:
        folder = fresh_folder(out, "run")
        lanes = _lanes(story, folder, stack)
        people.print(f"{story.description}.")
        people.print(
            f"Faults: {', '.join(f'{span.label} at step {span.first:,}' for span in story.spans) or 'none'}.\n"
        )
        view = make_view(people, story, silent=as_json)
        with warnings_on(people), view:
            _train(lanes, story, view)
        supervised = lanes[SUPERVISED].supervisor
        assert supervised is not None
        supervised.certificate()  # spends the fresh examples on claim C3, in the journal
        story.outcomes = [_outcome(story, lanes[name]) for name in LANES]
    report = verify(folder)
    from kalmanguard.cli.figure import draw

    figure, summary = folder / "story.png", folder / "summary.json"
    draw(story, figure)
    result = {**story.to_dict(), "certificate": report.to_dict(), "folder": str(folder), "figure": str(figure)}
    result["seconds"] = time.perf_counter() - started
    write_json(summary, result)
    code = _exit_code(story, report)
    if as_json:
        emit(
            {key: value for key, value in result.items() if key not in ("curves", "innovations")} | {"exit_code": code}
        )
    else:
        _tell(people, story, report, folder, seconds=result["seconds"])
    raise typer.Exit(code)


def _default_faults(plant: str, steps: int) -> list[str]:
    faults = [text.format(max(2, round(share * steps))) for text, share in _FAULTS]
    if plant == "chartransformer":
        faults[-1] += ":match=blocks"  # a bit of a rare character's embedding would flip unnoticed
    return faults


def _prepare(plant: str, faults: list[str], *, steps: int, seed: int) -> Story:
    from kalmanguard.cli.training import check_faults
    from kalmanguard.settings import Settings

    spans = []
    for entry in check_faults(faults, steps).schedule:
        lasting = entry.fault.duration
        last = steps if lasting is None else min(steps, entry.at + lasting - 1)
        spans.append(Span(fault_label(entry.fault.kind, vars(entry.fault)), entry.at, last))
    bound = Settings.preset("balanced").suspicion
    return Story(plant, "", steps, seed, faults, sorted(spans, key=lambda span: span.first), bound)


def _lanes(story: Story, folder: Path, stack: ExitStack) -> dict[str, Lane]:
    from kalmanguard.cli.training import Lane, read_settings

    lanes = {}
    for name in LANES:
        plant = make_plant(story.plant, {"seed": story.seed, "steps": story.steps})
        story.description = plant.describe()
        lane = Lane(
            name,
            plant,
            faults=() if name == CLEAN else story.faults,
            seed=story.seed,
            settings=read_settings("balanced", on_halt="return") if name == SUPERVISED else None,
            run_dir=folder if name == SUPERVISED else None,
        )
        lanes[name] = stack.enter_context(lane)
    return lanes


def _train(lanes: dict[str, Lane], story: Story, view: View) -> None:
    from kalmanguard.engine import STATISTICS

    every = max(1, story.steps // _GAUGES)
    closely = {step for span in story.spans for step in range(span.first - 1, span.first + _AFTER_FAULT)}
    for name, lane in lanes.items():
        story.curves[name] = [(0.0, lane.gauge())]
    for step in range(1, story.steps + 1):
        decision, event = None, None
        for name, lane in lanes.items():
            made = lane.advance()
            if name == SUPERVISED and made is not None:
                decision, event = made, story.note(made, STATISTICS)
        if event is not None:
            view.event(event)
        if step % every == 0 or step in closely or step == story.steps or (event is not None and event.lost):
            for name, lane in lanes.items():
                story.curves[name].append((float(step), lane.gauge()))
        view.update(step, decision)


def _outcome(story: Story, lane: Lane) -> Outcome:
    loss = lane.plant.held_out_loss()
    known = {outcome.name: outcome for outcome in story.outcomes}
    events = story.interventions if lane.name == SUPERVISED else []
    clean = known[CLEAN].held_out_loss if CLEAN in known else loss
    outcome = Outcome(
        name=lane.name,
        steps=lane.steps,
        held_out_loss=loss,
        ratio=loss / clean if clean else math.nan,
        vetoes=sum(event.action == "VETO" for event in events),
        rollbacks=sum(event.restored_step is not None for event in events),
        steps_undone=sum(event.lost for event in events),
        steps_behind=0 if lane.name == CLEAN else story.steps_behind(story.curves[lane.name]),
        seconds=lane.seconds,
        stopped=lane.stopped,
    )
    story.outcomes.append(outcome)
    return outcome


def _exit_code(story: Story, report: Report) -> ExitCode:
    if any(outcome.stopped for outcome in story.outcomes):
        return ExitCode.HALTED
    return ExitCode.FAILED if report.exit_code == 1 else ExitCode.OK


def _tell(people: Console, story: Story, report: Report, folder: Path, *, seconds: float) -> None:
    from kalmanguard.cli.tables import claims_table

    people.print()
    people.print(_table(story.outcomes))
    people.print(
        "[dim]Steps undone: dropped before being applied, or rolled back. Steps behind: for how long the clean run had "
        "already been where this one ended.[/dim]"
    )
    people.print(
        "\n[bold]Certificate[/bold] of the supervised run, derived from its journal by the standalone verifier"
    )
    people.print(claims_table(report, detailed=False))
    people.print(f"head {report.head}", soft_wrap=True)
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
    table = Table.grid(padding=(0, 2))
    name = shown(folder)
    for path, what in (
        (f"{name}/story.png", "the figure"),
        (f"{name}/summary.json", "all numbers of it"),
        (f"{name}/journal.sqlite", "the journal: what was measured and decided at every step"),
        (f"{name}/checkpoints", "durable checkpoints of the supervised run"),
    ):
        table.add_row(path, f"[dim]{what}[/dim]")
    people.print(table)
    people.print(f"\nLook closer with  kalmanguard show {name}")
    people.print(f"Check it with     kalmanguard verify {name}")
    people.print(f"Decide again with kalmanguard replay {name}")
