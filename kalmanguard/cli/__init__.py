"""The command line: one file a command."""

from __future__ import annotations


def main() -> None:
    """Run the command line on ``sys.argv``."""
    from kalmanguard.cli.app import app

    app(prog_name="kalmanguard")
