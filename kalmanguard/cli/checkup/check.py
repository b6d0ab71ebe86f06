"""One finding of the doctor."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Verdict(StrEnum):
    """How a check came out."""

    OK = "OK"
    #: An optional part that is not installed.
    ABSENT = "ABSENT"
    #: Works, or is not needed, but someone should know.
    NOTE = "NOTE"
    PROBLEM = "PROBLEM"


@dataclass(frozen=True)
class Check:
    """What was looked at, how it is, and for what is not in order the way out; ``values`` are the numbers behind it."""

    group: str
    name: str
    verdict: Verdict
    text: str
    advice: str = ""
    values: dict[str, Any] = field(default_factory=dict)


def gibibytes(number: float) -> str:
    """A size for people.

    >>> gibibytes(3 * 2**29)
    '1.5 GiB'
    """
    return f"{number / 2**30:.1f} GiB"
