"""The commands, put together."""

from __future__ import annotations

from typing import Annotated

import typer

from kalmanguard.cli.analyze import analyze
from kalmanguard.cli.calibrate import calibrate
from kalmanguard.cli.compare import compare
from kalmanguard.cli.dashboard import dashboard
from kalmanguard.cli.demo import demo
from kalmanguard.cli.doctor import doctor
from kalmanguard.cli.monitor import monitor
from kalmanguard.cli.replay import replay
from kalmanguard.cli.run import run
from kalmanguard.cli.show import show
from kalmanguard.cli.stress import stress
from kalmanguard.cli.study import study
from kalmanguard.cli.terminal import Command
from kalmanguard.cli.verify import verify

app = typer.Typer(
    name="kalmanguard",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        import kalmanguard

        typer.echo(f"kalmanguard {kalmanguard.__version__}")
        raise typer.Exit()


@app.callback()
def top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """A flight controller for PyTorch training: it watches a run, undoes what breaks it, and certifies what it did.

    Start with `kalmanguard demo`. Every command has its own `--help`.
    """


_PANELS = {
    "Train": (demo, run),
    "Watch and check": (monitor, dashboard, show, verify, replay),
    "Analyse": (analyze, compare, calibrate, stress),
    "Set up": (doctor,),
}
for panel, commands in _PANELS.items():
    for command in commands:
        app.command(cls=Command, rich_help_panel=panel)(command)
app.add_typer(study, name="study", rich_help_panel="Analyse")
