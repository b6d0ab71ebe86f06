"""``kalmanguard calibrate``: thresholds of the tail tests from healthy runs, and settings with a certified rate."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from enum import StrEnum
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from kalmanguard.cli.completion import complete_runs
from kalmanguard.cli.options import AsJson
from kalmanguard.cli.terminal import console, emit, number
from kalmanguard.errors import ConfigurationError

if TYPE_CHECKING:
    from kalmanguard.calibration.risk import Certification
    from kalmanguard.calibration.thresholds import Calibration
    from kalmanguard.cli.fleet import Sortie

_CANDIDATES = "suspicion=20,16,14,12,10,9,8,7,6,5,4"


class Event(StrEnum):
    """What a certified rate is the rate of."""

    ROLLBACK = "rollback"
    SUSPICION = "suspicion"


def calibrate(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[RUN]...", help="Run folders of your own healthy runs.", autocompletion=complete_runs),
    ] = None,
    plants: Annotated[
        str | None,
        typer.Option(
            metavar="PLANT[:NAME=VALUE]...,...",
            help="Train these instead, for example mlp,mlp:batch_size=8,cnn:steps=600; nothing is downloaded.",
        ),
    ] = None,
    seeds: Annotated[str, typer.Option(metavar="FIRST:END", help="Seeds of every plant, or their number.")] = "0:20",
    steps: Annotated[int, typer.Option(min=1, help="Steps of a run, where a plant does not name its own.")] = 400,
    processes: Annotated[int, typer.Option(min=1, help="Processes that train or replay.")] = 2,
    keep: Annotated[
        Path | None, typer.Option(help="Folder for the trained runs; complete ones that lie there are used again.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The calibration.")] = Path("calibration.json"),
    card: Annotated[Path | None, typer.Option(help="Its card. [default: beside it, with suffix .md]")] = None,
    corpus: Annotated[Path | None, typer.Option(help="Write the scores there as well, as an npz file.")] = None,
    level: Annotated[
        list[float] | None,
        typer.Option(help="A level, in (0, 1); may be given several times. [default: 0.5 to 0.99985]"),
    ] = None,
    unhealthy: Annotated[bool, typer.Option(help="Also take runs with vetoes, confirmations or a halt.")] = False,
    target_rate: Annotated[
        float | None, typer.Option(help="Certify a setting for this rate of false alarms; see --event.")
    ] = None,
    delta: Annotated[float, typer.Option(help="Probability that what is certified is wrong.")] = 0.05,
    event: Annotated[
        Event, typer.Option(help="The rate of runs with any false rollback, or of suspicious steps in a run.")
    ] = Event.ROLLBACK,
    vary: Annotated[
        str, typer.Option(metavar="NAME=VALUE,...", help="The setting and its candidates, most conservative first.")
    ] = _CANDIDATES,
    as_json: AsJson = False,
) -> None:
    """Calibrate on healthy runs.

    Takes the normalised innovations that the journals of healthy runs hold, and fits thresholds that a step of a new
    run stays below with a stated probability. Runs that are not healthy are left out, and named. Written are the
    calibration (JSON) and a card (Markdown) that says what it was fitted on and what is guaranteed.

    With --target-rate the runs are also replayed under every candidate of --vary, and the least conservative one whose
    rate of false alarms is at most the target is named, at confidence 1 - delta. Runs are what is counted: N runs
    without a false alarm certify a rate of 3 / N at 95 %, and no less.

    Exit codes:

    - 0: calibrated

    - 1: no candidate could be certified

    - 2: wrong input, or no healthy run
    """
    from kalmanguard.calibration.card import card as describe
    from kalmanguard.calibration.risk import certify, parse_candidates
    from kalmanguard.calibration.thresholds import LEVELS, fit
    from kalmanguard.cli.fleet import fly, parse_seeds, plan, pool
    from kalmanguard.healthy import read_runs

    people = console(as_json=as_json)
    if bool(runs) == bool(plants):
        raise ConfigurationError("Name run folders, or plants to train with --plants: one of the two.")
    if target_rate is not None and not (0 < target_rate < 1 and 0 < delta < 1):
        raise ConfigurationError(f"--target-rate {target_rate} and --delta {delta} must lie between 0 and 1.")
    candidates, range_of_seeds = parse_candidates(vary), parse_seeds(seeds)
    card = card or out.with_suffix(".md")
    _keep_what_is_foreign(out, '"format"')
    _keep_what_is_foreign(card, "# Calibration")
    with ExitStack() as stack:
        mapped = stack.enter_context(pool(processes if plants or target_rate is not None else 1))
        if plants:
            place = keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kalmanguard-")))
            # What a candidate asks of a step must have been measured there: then a probe at every step is needed.
            probe_every = 10 if target_rate is None else 1
            sorties = plan(plants, seeds=range_of_seeds, steps=steps, probe_every=probe_every, folder=place)
            folders: list[Path] = _through(people, "training", mapped, fly, _longest_first(sorties))
            folders = [sortie.folder for sortie in sorties]
            command = f"kalmanguard calibrate --plants {plants} --seeds {seeds} --steps {steps}"
        else:
            folders, command = list(runs or ()), f"kalmanguard calibrate RUN... ({len(runs or ()):,} runs)"
        found = read_runs(folders, unhealthy=unhealthy)
        calibration = fit(found.corpus, levels=level or LEVELS, command=command)
        certified = None
        if target_rate is not None:
            # Without the runs that were left out for an alarm, false alarms would be left out of their own rate.
            losses, unseen = _losses(people, mapped, (*found.paths, *found.alarmed), candidates, event)
            certified = certify(losses, target=target_rate, delta=delta), unseen
    calibration.save(out)
    card.write_text(describe(calibration), encoding="utf-8")
    if corpus is not None:
        found.corpus.save(corpus)
    if as_json:
        emit(_report(calibration, found.refused, out, card, candidates, certified))
    else:
        _tell(people, calibration, found.refused, out, card)
        if certified is not None:
            _tell_certified(people, candidates, event, *certified)
    raise typer.Exit(int(certified is not None and certified[0].chosen is None))


def _keep_what_is_foreign(path: Path, mark: str) -> None:
    """Write over an older file of the same kind only."""
    if path.exists() and mark not in path.read_text(encoding="utf-8", errors="replace")[:100]:
        raise ConfigurationError(f"{path} exists and is not what would be written there: choose another name.")


def _through(
    people: Console, what: str, mapped: Callable[..., Any], work: Callable[[Any], Any], jobs: list[Any]
) -> list[Any]:
    with Progress(console=people, transient=True, disable=not people.is_terminal) as progress:
        return list(progress.track(mapped(work, jobs), total=len(jobs), description=what))


def _longest_first(sorties: list[Sortie]) -> list[Sortie]:
    slow = {"chartransformer": 20, "cnn": 4}
    return sorted(sorties, key=lambda sortie: -sortie.steps * slow.get(sortie.plant, 1))


def _losses(
    people: Console,
    mapped: Callable[..., Any],
    folders: Sequence[Path],
    candidates: tuple[str, tuple[float | int, ...]],
    event: Event,
) -> tuple[Any, int]:
    import numpy as np

    name, values = candidates
    jobs = list(product(folders, values))
    alarms = _through(people, "replaying", mapped, partial(_replay, name), jobs)
    losses = []
    for alarm in alarms:
        if event is Event.ROLLBACK:
            # What a probe that was not taken would have shown is not known: that counts as an alarm.
            losses.append(float(alarm.rollbacks > 0 or alarm.unseen > 0))
        else:
            losses.append(alarm.suspicions / alarm.steps)
    return np.array(losses).reshape(len(folders), len(values)), sum(alarm.unseen > 0 for alarm in alarms)


def _replay(name: str, job: tuple[Path, float | int]) -> Any:
    from kalmanguard.healthy import false_alarms

    return false_alarms(job[0], **{name: job[1]})


def _report(
    calibration: Calibration,
    refused: tuple[str, ...],
    out: Path,
    card: Path,
    candidates: tuple[str, tuple[float | int, ...]],
    certified: tuple[Certification, int] | None,
) -> dict[str, Any]:
    report: dict[str, Any] = {
        "calibration": calibration.model_dump(mode="json"),
        "refused": refused,
        "files": [str(out), str(card)],
        "exit_code": 0,
    }
    if certified is not None:
        result, unseen = certified
        name, values = candidates
        report["certified"] = {
            "setting": name,
            "value": None if result.chosen is None else values[result.chosen],
            "candidates": values,
            "rates": result.rates,
            "p_values": result.p_values,
            "target": result.target,
            "delta": result.delta,
            "runs": result.runs,
            "replays_with_unseen_probes": unseen,
        }
        report["exit_code"] = int(result.chosen is None)
    return report


def _tell(people: Console, calibration: Calibration, refused: tuple[str, ...], out: Path, card: Path) -> None:
    for text in refused:
        people.print(Text(f"Left out: {text}", style="yellow"), soft_wrap=True)
    people.print(f"{calibration.runs:,} healthy runs, {calibration.steps:,} steps after warm-up\n")
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("level")
    for channel in calibration.channels:
        table.add_column(channel, justify="right")
    for level in sorted({q.level for quantiles in calibration.channels.values() for q in quantiles}):
        found = [next((q for q in qs if q.level == level), None) for qs in calibration.channels.values()]
        table.add_row(
            f"{level:g}",
            *(
                "-" if q is None else f"{number(q.threshold, 3)}{' ' if q.method == 'hierarchical' else '*'}"
                for q in found
            ),
        )
    people.print(table)
    people.print("\n* from pooled steps: right in the limit of many runs; the others are exact for runs drawn alike.")
    for channel, texts in calibration.refused.items():
        for text in texts:
            people.print(Text(f"{channel}, {text}", style="dim"))
    people.print(Text(f"\nWritten: {out} and {card}"), soft_wrap=True)


def _tell_certified(
    people: Console,
    candidates: tuple[str, tuple[float | int, ...]],
    event: Event,
    result: Certification,
    unseen: int,
) -> None:
    from kalmanguard.calibration.risk import runs_needed, upper_bound

    name, values = candidates
    what = "runs with a false rollback" if event is Event.ROLLBACK else "suspicious steps of a run"
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for heading in (name, f"rate of {what}", "p-value"):
        table.add_column(heading, justify="right")
    for index, value in enumerate(values):
        mark = "  <" if index == result.chosen else ""
        table.add_row(f"{value:g}", number(result.rates[index], 3), number(result.p_values[index], 2) + mark)
    people.print()
    people.print(table)
    if unseen:
        # What such a probe would have shown is not known; whether a step was suspicious is.
        counted = "counted as alarms" if event is Event.ROLLBACK else "which may change what follows them"
        people.print(Text(f"{unseen:,} replays asked for probes that were not taken: {counted}.", "yellow"))
    if result.chosen is None:
        needed = runs_needed(result.target, delta=result.delta)
        people.print(
            f"\nNo candidate is certified for a rate of {result.target:g} at confidence {1 - result.delta:g}. The unit "
            f"is the run: {result.runs:,} runs without any event show a rate below "
            f"{upper_bound(0, result.runs, delta=result.delta):.2g}, and {needed:,} are needed for the target."
        )
    else:
        people.print(
            f"\nCertified: {name} = {values[result.chosen]:g} keeps the rate of {what} at or below {result.target:g}, "
            f"at confidence {1 - result.delta:g}, for runs drawn like these {result.runs:,}."
        )
