"""``kalmanguard demo``: the same plant three times side by side, broken in two of them and rescued in one."""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from kalmanguard.cli.completion import complete_plants
from kalmanguard.cli.folders import fresh_folder, write_json
from kalmanguard.cli.options import AsJson, Faults, Seed
from kalmanguard.cli.plants import make_plant
from kalmanguard.cli.story import CLEAN, LANES, SUPERVISED, Outcome, Span, Story, fault_label
from kalmanguard.cli.terminal import ExitCode, console, emit, warnings_on

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
        str,
        typer.Option(
            help="What is trained: mlp, cnn, resnet, vit, unet, rnn, gan, cartpole, chartransformer, quadratic, or "
            "another registered plant.",
            autocompletion=complete_plants,
        ),
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
    with ExitStack() as stack:
        with people.status("Loading PyTorch and the data ..."):
            import torch

            from kalmanguard.certificate.verify import verify
            from kalmanguard.cli.view import make_view

            # Networks this small gain nothing from more threads, and lose a lot to them where cores are shared.
            torch.set_num_threads(1)
            story = _prepare(plant, list(fault) if fault else _default_faults(plant, steps), steps=steps, seed=seed)
            folder = fresh_folder(out, "run")
            lanes = _lanes(story, folder, stack)
        people.print(Text(f"{story.description}."))
        people.print(
            f"Faults: {', '.join(f'{span.label} at step {span.first:,}' for span in story.spans) or 'none'}.\n"
        )
        view = make_view(people, story, silent=as_json)
        with warnings_on(people), view:
            _train(lanes, story, view)
        supervised = lanes[SUPERVISED].supervisor
        assert supervised is not None
        supervised.certificate()  # spends the fresh examples on claim C3, in the journal
        for lane in lanes.values():
            story.outcomes.append(_outcome(story, lane))
    report = verify(folder)
    from kalmanguard.cli.closing import tell
    from kalmanguard.cli.figure import draw

    figure = folder / "story.png"
    draw(story, figure)
    seconds, code = time.perf_counter() - started, _exit_code(story, report)
    ending = {
        "certificate": report.to_dict(),
        "folder": str(folder),
        "figure": str(figure),
        "seconds": seconds,
        "exit_code": int(code),
    }
    write_json(folder / "summary.json", story.to_dict() | ending)
    if as_json:
        emit({key: value for key, value in story.to_dict().items() if key not in ("curves", "innovations")} | ending)
    else:
        tell(people, story, report, folder, seconds=seconds)
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
    clean = story.outcomes[0].held_out_loss if story.outcomes else loss  # the clean run comes first
    events = story.interventions if lane.name == SUPERVISED else []
    return Outcome(
        name=lane.name,
        steps=lane.steps,
        held_out_loss=loss,
        ratio=loss / clean if clean else math.nan,
        vetoes=sum(event.action == "VETO" for event in events),
        rollbacks=sum(event.restored_step is not None for event in events),
        steps_undone=sum(event.lost for event in events),
        steps_behind=story.steps_behind(loss - clean),
        seconds=lane.seconds,
        stopped=lane.stopped,
    )


def _exit_code(story: Story, report: Report) -> ExitCode:
    if any(outcome.stopped for outcome in story.outcomes):
        return ExitCode.HALTED
    return ExitCode.FAILED if report.exit_code == 1 else ExitCode.OK
