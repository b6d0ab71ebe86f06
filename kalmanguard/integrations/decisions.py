"""The decisions of a run at hand: all that were not nominal, and the latest ones."""

from __future__ import annotations

from collections import deque
from typing import final

from kalmanguard.errors import ConfigurationError
from kalmanguard.records import Action, Decision, Level


@final
class DecisionLog:
    """What was decided, in bounded memory: everything that matters, and the last ``keep`` decisions of any kind.

    A decision is kept for good when its level is SUSPECT or CONFIRMED, or its action is not ACCEPT. The journal holds
    all others too.

    Parameters
    ----------
    keep
        Number of latest decisions that are kept whatever they say.

    Raises
    ------
    ConfigurationError
        ``keep`` is less than 1.

    Examples
    --------
    >>> from kalmanguard.records import Mode
    >>> log = DecisionLog(keep=2)
    >>> for step in range(1, 6):
    ...     level = Level.SUSPECT if step == 2 else Level.NOMINAL
    ...     log.add(Decision(step, Action.ACCEPT, Action.ACCEPT, level, Mode.WATCHING, "an example"))
    >>> [decision.step for decision in log.all()]
    [2, 4, 5]
    """

    def __init__(self, *, keep: int) -> None:
        if keep < 1:
            raise ConfigurationError(f"keep = {keep}: at least the latest decision is kept; give a number from 1.")
        self._latest: deque[Decision] = deque(maxlen=keep)
        self._notable: list[Decision] = []

    def add(self, decision: Decision) -> None:
        """Take in what was decided about a step; what is no news (no step was taken since) is left out.

        A rollback between two steps is news.
        """
        last = self.last
        if last is not None and decision.step <= last.step:
            between = decision.step == last.step and decision.rolled_back and decision.reason != last.reason
            if not between:
                return
        elif decision.step <= 0:
            return
        if len(self._latest) == self._latest.maxlen and _is_notable(self._latest[0]):
            self._notable.append(self._latest[0])
        self._latest.append(decision)

    @property
    def last(self) -> Decision | None:
        """The latest one."""
        return self._latest[-1] if self._latest else None

    def all(self) -> tuple[Decision, ...]:
        """Everything that is kept, in the order of the steps."""
        return (*self._notable, *self._latest)


def _is_notable(decision: Decision) -> bool:
    return decision.level in (Level.SUSPECT, Level.CONFIRMED) or decision.action is not Action.ACCEPT
