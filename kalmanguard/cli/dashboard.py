"""``kalmanguard dashboard``: a live page over runs, in the browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from kalmanguard.cli.terminal import console
from kalmanguard.errors import ConfigurationError


def dashboard(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[RUNS]...", help="Run folders, or folders in which runs are looked for. [default: the present one]"
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on. Any but loopback asks viewers for a token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="Port to listen on; 0 takes a free one.")] = 8765,
    token: Annotated[
        str | None,
        typer.Option(
            envvar="KALMANGUARD_DASHBOARD_TOKEN",
            help="What viewers must bring, at least 16 characters; other users of the machine can see options, so set "
            "the variable instead. [default: made up and printed, where others can reach the address]",
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Another name of this server, as behind a proxy; may be given several times."
        ),
    ] = None,
) -> None:
    """Show runs in the browser: is it healthy, what happened, what is certified.

    Live while the runs go on, and read-only: it neither writes to a run folder nor holds up a run. Needs the extra
    `dashboard`, and neither PyTorch nor the model. Ctrl-C ends it.

    Exit codes:

    - 0: interrupted

    - 2: nothing to show, or an address that cannot be listened on
    """
    try:
        from kalmanguard.dashboard.server import Dashboard
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("starlette", "uvicorn", "anyio", "h11"):
            raise
        raise ConfigurationError(
            f"The dashboard needs {error.name}, which is not installed: pip install 'kalmanguard[dashboard]'."
        ) from None

    made = Dashboard(runs or [Path()], host=host, port=port, token=token, allow_hosts=allow_host or ())
    people = console()
    found = len(made.library.entries())
    people.print(Text(f"{found} run{'s' * (found != 1)} found; new ones are noticed. Ctrl-C ends it."))
    made.serve(lambda: people.print(Text(made.url), soft_wrap=True))
