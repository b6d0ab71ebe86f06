"""``kalmanguard run``: train a plant under supervision, with faults if wanted."""

from __future__ import annotations

import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from kalmanguard.cli.completion import complete_plants, complete_settings
from kalmanguard.cli.folders import fresh_folder, shown, write_json
from kalmanguard.cli.options import AsJson, Faults, Seed
from kalmanguard.cli.plants import make_plant
from kalmanguard.cli.story import Event
from kalmanguard.cli.terminal import STYLES, ExitCode, console, duration, emit, number, warnings_on

if TYPE_CHECKING:
    from kalmanguard.certificate.verify import Report
    from kalmanguard.cli.training import Lane
    from kalmanguard.records import Decision

_LOSS_EVERY_S = 0.2


class Mode(StrEnum):
    """What the supervisor may do."""

    PROTECT = "protect"
    OBSERVE = "observe"


def run(
    plant: Annotated[
        str,
        typer.Argument(
            metavar="PLANT",
            autocompletion=complete_plants,
            help="What is trained: mlp, cnn, resnet, vit, unet, rnn, gan, cartpole, chartransformer, quadratic, or "
            "another registered plant.",
        ),
    ],
    fault: Faults = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of training.")] = 400,
    seed: Seed = 0,
    settings: Annotated[
        str,
        typer.Option(
            metavar="PRESET|TOML",
            help="conservative, balanced or aggressive, or a TOML file of settings.",
            autocompletion=complete_settings,
        ),
    ] = "balanced",
    mode: Annotated[
        Mode | None, typer.Option(help="Act on what is found, or only report it. By default as the settings say.")
    ] = None,
    run_dir: Annotated[
        Path | None,
        typer.Option(help="Folder for journal and checkpoints; by default the next free one of runs/PLANT-1, -2, ..."),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Examples per step. [default: the plant's]")] = None,
    optimizer: Annotated[str | None, typer.Option(help="adamw or sgd. [default: the plant's]")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate. [default: the plant's]")] = None,
    schedule: Annotated[
        str | None, typer.Option(help="cosine, warmup-cosine or warm-restarts. [default: constant]")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train a plant under supervision.

    A plant is a small network with its data and its recipe, ready to train; nothing is downloaded. Faults can be
    injected at chosen steps to see what comes of them. At the end a report and the certificate are printed; journal
    and checkpoints stay in the run folder.

    Exit codes:

    - 0: finished

    - 2: wrong input

    - 4: halted, with the best certified state restored
    """
    started = time.perf_counter()
    people = console(as_json=as_json)
    faults = list(fault or ())
    changes: dict[str, Any] = {"on_halt": "return"} | ({} if mode is None else {"mode": mode.value})
    options = {
        "seed": seed, "steps": steps, "batch_size": batch_size, "optimizer": optimizer, "lr": lr, "schedule": schedule,
    }  # fmt: skip
    with people.status("Loading PyTorch and the data ..."):
        from kalmanguard.certificate.verify import verify
        from kalmanguard.cli.training import Lane, check_faults, read_settings

        check_faults(faults, steps)
        chosen = read_settings(settings, **changes)
        made = make_plant(plant, options)
    folder = run_dir if run_dir is not None else fresh_folder(Path("runs"), plant)
    facts = {"plant": plant, "options": options, "faults": faults, "settings": settings, "mode": chosen.mode}
    with warnings_on(people), Lane(plant, made, faults=faults, seed=seed, settings=chosen, run_dir=folder) as lane:
        write_json(folder / "run.json", facts)
        people.print(Text(f"{made.describe()}."))
        try:
            events = _train(lane, steps, people, silent=as_json)
        except KeyboardInterrupt:
            people.print(Text(f"Interrupted after step {lane.steps:,}; what was done until then lies in {folder}."))
            raise
        assert lane.supervisor is not None
        lane.supervisor.certificate()  # spends the fresh examples on claim C3, in the journal
        held_out = made.held_out_loss()
        text, statistics = lane.supervisor.report(), lane.supervisor.statistics()
    report = verify(folder)
    code = ExitCode.HALTED if lane.halted else ExitCode.OK
    result = facts | {
        "steps_done": lane.steps,
        "halted": lane.stopped,
        "held_out_loss": held_out,
        "statistics": statistics,
        "events": [vars(event) for event in events],
        "seconds": time.perf_counter() - started,
        "certificate": report.to_dict(),
        "folder": str(folder),
        "exit_code": int(code),
    }
    write_json(folder / "summary.json", result)
    if as_json:
        emit(result)
    else:
        _tell(people, text, report, folder, held_out=held_out, seconds=lane.seconds)
    raise typer.Exit(code)


def _train(lane: Lane, steps: int, people: Console, *, silent: bool) -> list[Event]:
    events: list[Event] = []
    progress = Progress(
        BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn(), console=people,
        disable=not people.is_terminal,
    )  # fmt: skip
    quiet = silent and not people.is_terminal
    next_shown = 0.0
    with progress:
        task = progress.add_task("", total=steps)
        for step in range(1, steps + 1):
            decision = lane.advance()
            if decision is not None and (event := _event(decision)) is not None:
                events.append(event)
                if not quiet:
                    people.print(_line(event), soft_wrap=not people.is_terminal)
            now = time.monotonic()
            if now >= next_shown or step == steps or lane.halted:
                loss = f"training loss {number(lane.losses[-1])}" if lane.losses else ""
                progress.update(task, completed=lane.steps, description=loss)
                next_shown = now + _LOSS_EVERY_S
            if not people.is_terminal and not quiet and step % max(1, steps // 10) == 0:
                people.print(f"step {step:,}/{steps:,}: training loss {number(lane.losses[-1])}")
            if lane.halted:
                break
    return events


def _event(decision: Decision) -> Event | None:
    return Event.of(decision) if decision.level.value in ("SUSPECT", "CONFIRMED") else None


def _line(event: Event) -> Text:
    word = event.action if event.action != "ACCEPT" else event.level
    return Text.assemble((f"{word:<9} ", STYLES.get(word, "default")), event.reason)


def _tell(people: Console, text: str, report: Report, folder: Path, *, held_out: float, seconds: float) -> None:
    from kalmanguard.cli.tables import print_claims

    people.print()
    people.print(Text(text))
    people.print(f"\nFinal loss on data that neither training nor the probe saw: {number(held_out)}")
    people.print(f"Training took {duration(seconds)}, supervision included.")
    people.print("\n[bold]Certificate[/bold]")
    print_claims(people, report)
    name = shown(folder)
    people.print(Text(f"\nEverything lies in {name}. Look closer with: kalmanguard show {name}"))
