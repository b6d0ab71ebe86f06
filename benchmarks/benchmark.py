"""What a benchmark is: options, a run that yields plain data, and a page section made from that data alone."""

from __future__ import annotations

import argparse
from abc import ABC, abstractmethod
from typing import Any

#: Plain data as JSON knows it; a number that is not finite is ``None``.
Result = dict[str, Any]


class Benchmark(ABC):
    """One benchmark. ``name`` is its name on the command line and in the page's markers, ``summary`` one line."""

    name: str
    summary: str

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Declare options beyond the common ones; there are none by default."""
        del parser

    @abstractmethod
    def run(self, options: argparse.Namespace) -> Result:
        """Measure; ``options`` holds at least ``seeds``, ``quick``, ``processes`` and ``cache``."""

    @abstractmethod
    def markdown(self, result: Result) -> str:
        """Write the section of the page, from the result alone."""
