"""The journal: one append-only, hash-chained SQLite file per run."""

from __future__ import annotations

from kalmanguard.journal.reader import JournalReader
from kalmanguard.journal.schema import Row
from kalmanguard.journal.writer import JournalWriter

__all__ = ["JournalReader", "JournalWriter", "Row"]
