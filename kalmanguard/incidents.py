"""Faults of the guard itself: recorded, warned about once, never allowed to stop training."""

from __future__ import annotations

import warnings
from contextlib import suppress

from kalmanguard.errors import JournalError, KalmanguardError
from kalmanguard.journal.writer import JournalWriter


class Incidents:
    """Fail open, loudly; or raise, when the user wants to know at once.

    Parameters
    ----------
    journal
        Where each incident is recorded.
    strict
        Raise instead.
    """

    def __init__(self, journal: JournalWriter, *, strict: bool) -> None:
        self._journal, self._strict = journal, strict
        self.first: str | None = None
        self.count = 0

    def report(self, step: int, text: str, cause: BaseException | None = None) -> None:
        """Record one incident at ``step``; the first one is warned about.

        Raises
        ------
        KalmanguardError
            Under ``strict``.
        """
        if self._strict:
            raise cause if isinstance(cause, KalmanguardError) else KalmanguardError(text) from cause
        self.count += 1
        if self.first is None:
            self.first = text
            warnings.warn(f"kalmanguard: {text.rstrip('.')}. Training goes on; supervision is degraded.", stacklevel=2)
        # When the journal itself is what failed, the warning has said so.
        with suppress(JournalError):
            self._journal.record("error", step, {"text": text})
