"""``kalmanguard stress``: how much of what a model has learned it keeps when it is disturbed."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kalmanguard.cli.options import AsJson
from kalmanguard.cli.plants import make_plant, plant_names
from kalmanguard.cli.terminal import ExitCode, blocks_fit, console, duration, emit, number, warnings_on
from kalmanguard.errors import ConfigurationError

if TYPE_CHECKING:
    from kalmanguard.stress import StressReport
    from kalmanguard.stress.loading import Loaded

_LAYERS = 8
_BAR = 24


class Algorithm(StrEnum):
    """Optimizer of the trainings, where the factory gives none."""

    ADAMW = "adamw"
    SGD = "sgd"


class Loss(StrEnum):
    """Losses by name."""

    CROSS_ENTROPY = "cross-entropy"
    MSE = "mse"


def stress(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="module:factory, which is imported and called; a file with a state dict (.safetensors, .pt, .bin); or "
            "a plant's name.",
        ),
    ],
    factory: Annotated[
        str | None, typer.Option(metavar="MODULE:FUNCTION", help="What makes the model that a file's state belongs to.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="SAMPLE",
            help="Data sample: module:function that returns batches, or a .npz, .pt or .csv file with inputs and "
            "targets. Not needed for a factory that returns (model, batches, loss_fn) or a plant.",
        ),
    ] = None,
    loss: Annotated[Loss | None, typer.Option(help="Loss function. [default: the factory's, or inferred]")] = None,
    optimizer: Annotated[
        Algorithm | None, typer.Option(help="Optimizer of the trainings. [default: the factory's, or adamw]")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Your learning rate, of which multiples are tried.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples per batch, for a data file.")] = 32,
    budget: Annotated[float, typer.Option(help="Seconds that the test may take; loading is not counted.")] = 60.0,
    seeds: Annotated[int, typer.Option(min=1, help="Repetitions; they make the interval of the score.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="The first seed.")] = 0,
    train_steps: Annotated[int, typer.Option(min=1, help="Steps of the short trainings.")] = 40,
    warmup_steps: Annotated[
        int, typer.Option(min=0, help="Most steps of training first, for a model that has learned nothing yet.")
    ] = 200,
    fail_below: Annotated[
        float | None, typer.Option(min=0, max=100, help="Exit with 1 if the score is lower, or not complete.")
    ] = None,
    trust_pickle: Annotated[
        bool,
        typer.Option(
            "--i-trust-this-pickle", help="DANGER: unpickle the model file. Whoever made it can run any code here."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Stress a model: noise, learning rates, precision, bit flips and outliers.

    Only copies are changed. The score is the share of what the model has learned that is left; its definition is
    printed with it. A model file is never executed: state dicts are read as plain tensors.

    Exit codes:

    - 0: done

    - 1: the score is below --fail-below, or is not complete

    - 2: wrong input
    """
    people = console(as_json=as_json)
    with warnings_on(people):
        with people.status("Loading PyTorch and the model ..."):
            from kalmanguard.stress import stress as run
            from kalmanguard.stress.loading import load, made

            plant = model in plant_names()
            loaded = made(make_plant(model, {})) if plant else load(model, factory=factory, trust_pickle=trust_pickle)
            batches, held_out = _data(loaded, data, batch_size)
            chosen = _optimizer(loaded, optimizer, lr)
        with people.status(f"Under stress, for {duration(budget)} at most ..."):
            report = run(
                loaded.model,
                batches,
                _loss(loss) or loaded.loss_fn,
                held_out=held_out,
                optimizer=chosen,
                seeds=seeds,
                seed=seed,
                budget_s=budget,
                train_steps=train_steps,
                warmup_steps=warmup_steps,
            )
    reason = _failure(report, fail_below)
    code = ExitCode.OK if reason is None else ExitCode.FAILED
    if as_json:
        emit({"source": model, **report.to_dict(), "fail_below": fail_below, "failure": reason, "exit_code": int(code)})
    else:
        _tell(people, report)
        if reason is not None:
            people.print(Text(f"\nFailed: {reason}", style="bold red"))
    raise typer.Exit(code)


def _data(loaded: Loaded, data: str | None, size: int) -> tuple[Any, Any]:
    if data is not None:
        from kalmanguard.stress.samples import load_sample

        return load_sample(data, size=size), None
    if loaded.batches is None:
        raise ConfigurationError(
            "There is no data: give a sample with --data, or let the factory return (model, batches, loss_fn)."
        )
    return loaded.batches, loaded.held_out


def _optimizer(loaded: Loaded, name: Algorithm | None, lr: float | None) -> Any:
    import torch

    if lr is not None and not 0 < lr < float("inf"):
        raise ConfigurationError(f"lr = {lr}: a learning rate is positive and finite.")
    if name is None and lr is not None and loaded.optimizer is not None:
        for group in loaded.optimizer.param_groups:
            group["lr"] = lr
        return loaded.optimizer
    if name is None and lr is None:
        return loaded.optimizer
    trained = [p for p in loaded.model.parameters() if p.requires_grad]
    if name is Algorithm.SGD:
        return torch.optim.SGD(trained, lr=1e-2 if lr is None else lr, momentum=0.9)
    return torch.optim.AdamW(trained, lr=1e-3 if lr is None else lr)


def _loss(name: Loss | None) -> Any:
    from torch.nn import functional

    return {None: None, Loss.CROSS_ENTROPY: functional.cross_entropy, Loss.MSE: functional.mse_loss}[name]


def _failure(report: StressReport, threshold: float | None) -> str | None:
    if threshold is None:
        return None
    if report.score is None or not report.complete:
        return (
            f"the score is not complete ({'; '.join(report.left_out)}), so it cannot be held against {threshold:g}; "
            "raise --budget, or lower --seeds or --train-steps."
        )
    if report.score < threshold:
        return f"the score {report.score:.1f} is below {threshold:g}. {report.summary()}"
    return None


def _tell(people: Console, report: StressReport) -> None:
    from kalmanguard.stress import DEFINITION

    people.print(
        Text(f"{report.model}; held-out loss {number(report.loss)}, of a constant {number(report.uninformed)}")
    )
    people.print(Text(f"\n{report.summary()}", style="bold"))
    people.print(Text(DEFINITION, style="dim"))
    people.print()
    people.print(_curves(report, blocks=blocks_fit(people)))
    if report.layers:
        people.print("\n[bold]Layers, the most sensitive first[/bold]")
        people.print(_layers(report))
        if len(report.layers) > _LAYERS:
            people.print(Text(f"  and {len(report.layers) - _LAYERS} more (--json)", style="dim"))
    for heading, lines in (
        ("Critical points", [point.sentence for point in report.critical_points]),
        ("Recommendations", [f"{advice.action} {advice.finding}" for advice in report.recommendations]),
        ("Left out", list(report.left_out)),
        ("Notes", list(report.notes)),
    ):
        if lines:
            people.print(f"\n[bold]{heading}[/bold]")
            for line in lines:
                grid = Table.grid(padding=(0, 1))
                grid.add_row("  -", Text(line))
                people.print(grid)
    people.print(Text(f"\n{duration(report.seconds)} of {duration(report.budget_s)}.", style="dim"))


def _curves(report: StressReport, *, blocks: bool) -> Table:
    full, empty = ("█", "░") if blocks else ("#", ".")
    table = Table.grid(padding=(0, 2))
    for curve in report.curves:
        filled = round(_BAR * curve.score)
        error = "" if curve.standard_error is None else f"+- {100 * curve.standard_error:.1f}"
        worst = min(zip(curve.means, curve.levels, strict=True))
        table.add_row(
            Text(curve.kind),
            Text(full * filled + empty * (_BAR - filled)),
            Text(f"{100 * curve.score:.0f}", justify="right"),
            Text(error),
            Text(f"least {worst[0]:.0%} at {worst[1]}"),
        )
    return table


def _layers(report: StressReport) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=True, padding=(0, 2, 0, 0))
    for heading in ("layer", "parameters", "lost under noise", "+-", "harmful flips", "importance"):
        table.add_column(heading, justify="left" if heading == "layer" else "right")
    for layer in report.layers[:_LAYERS]:
        table.add_row(
            Text(layer.name or "(itself)"),
            f"{layer.parameters:,}",
            f"{layer.lost:.0%}",
            "-" if layer.standard_error is None else f"{layer.standard_error:.0%}",
            f"{layer.harmful_flips} of {layer.flips}",
            "-" if layer.importance is None else f"{layer.importance:.2g}",
        )
    return table
