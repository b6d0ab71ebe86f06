"""All runs that the page may show: found, read in turn by one thread, and known by opaque names only."""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Event as Signal
from threading import Lock, Thread
from typing import final

from kalmanguard.dashboard.certificates import Certificates
from kalmanguard.dashboard.course import Course, signature
from kalmanguard.dashboard.events import shown
from kalmanguard.errors import ConfigurationError
from kalmanguard.journal.schema import FILE_NAME

#: How deep runs are looked for under a folder, how many folders are visited, how many runs are taken.
DEPTH, VISITED, MOST_RUNS = 4, 20_000, 500
#: Seconds between two looks: at runs that somebody watches, at all others, for new runs.
POLL_S, IDLE_S, SCAN_S = 0.15, 3.0, 5.0
#: Runs that are kept in memory, and seconds after which one that nobody asks for may be dropped.
MOST_READ, KEPT_S = 24, 120.0
_SLICE_S = 0.25


@dataclass
class Entry:
    """One run: its opaque name, the name for people, and its course."""

    key: str
    name: str
    file: Path
    course: Course
    asked_at: float = -math.inf
    looked_at: float = -math.inf

    @property
    def watched(self) -> bool:
        """Whether somebody looks at it."""
        return time.monotonic() - self.asked_at < 30.0


@final
class Library:
    """The runs below the given folders, followed while they are written.

    One thread reads for all viewers. Symbolic links below a given folder are not followed, so nothing outside of it is
    shown; a folder that is named may be one.

    Parameters
    ----------
    roots
        Run folders, journals, or folders that are searched for runs, four levels deep.

    Raises
    ------
    ConfigurationError
        A root does not exist.

    Notes
    -----
    An uneventful look costs two ``stat`` calls a run.
    """

    def __init__(self, roots: Iterable[Path]) -> None:
        self.roots = tuple(roots)
        for root in self.roots:
            if not root.exists():
                raise ConfigurationError(f"There is nothing at {root}: give run folders, or a folder with runs in it.")
        #: Called with a run's key when it has changed, with None when the list has; from a thread of its own.
        self.told: Callable[[str | None], None] = lambda key: None
        self._entries: dict[str, Entry] = {}
        self._lock = Lock()
        self._stop, self._wake = Signal(), Signal()
        self.certificates = Certificates(self._certified)
        self._scanned = 0.0
        self.scan()
        self._thread = Thread(target=self._follow, name="kalmanguard-dashboard", daemon=True)
        self._thread.start()

    def entries(self) -> list[Entry]:
        """All runs, by name."""
        with self._lock:
            return sorted(self._entries.values(), key=lambda entry: entry.name)

    def get(self, key: str) -> Entry | None:
        """The run of that name, which from now on is watched closely; ``None`` when there is none."""
        with self._lock:
            entry = self._entries.get(key)
        if entry is not None:
            if not entry.watched:
                self._wake.set()
            entry.asked_at = time.monotonic()
        return entry

    def scan(self) -> None:
        """Look for runs that are new. A run that has vanished stays, as what was read of it."""
        found: dict[str, tuple[str, Path]] = {}
        for root in self.roots:
            for name, file in journals(root):
                key = hashlib.sha256(os.fsencode(file.absolute())).hexdigest()[:16]
                found.setdefault(key, (name, file))
        with self._lock:
            new = [key for key in found if key not in self._entries][: MOST_RUNS - len(self._entries)]
            for key in new:
                name, file = found[key]
                self._entries[key] = Entry(key, shown(name)[:200], file, Course(file))
        self._scanned = time.monotonic()
        if new:
            self.told(None)

    def close(self) -> None:
        """Stop reading."""
        self._stop.set()
        self._wake.set()
        self._thread.join(10.0)
        self.certificates.close()

    def _certified(self, key: str) -> None:
        self.told(key)

    def _follow(self) -> None:
        while not self._stop.is_set():
            busy = False
            if time.monotonic() - self._scanned > SCAN_S:
                self.scan()
            for entry in self.entries():
                if self._stop.is_set():
                    return
                busy |= self._look(entry)
            self._forget()
            if not busy:
                self._wake.wait(POLL_S)
                self._wake.clear()

    def _look(self, entry: Entry) -> bool:
        """Read what is new of a run, as closely as somebody looks at it; returns whether there is more to read."""
        now, course = time.monotonic(), entry.course
        if not entry.watched and now - entry.looked_at < IDLE_S:
            return False
        entry.looked_at = now
        if not entry.watched and not course.records:
            if course.glance():
                self.told(entry.key)
            return False
        if course.refresh(_SLICE_S, self._stop.is_set):
            self.told(entry.key)
            if entry.watched and not course.behind:
                self.certificates.want(entry.key, entry.file, course.records, asked=False)
        return entry.watched and course.behind > 0

    def _forget(self) -> None:
        """Drop what was read of the runs that were asked for the longest ago; asked for again, they are read again."""
        read = sorted((entry for entry in self.entries() if entry.course.records), key=lambda entry: entry.asked_at)
        for entry in read[: max(0, len(read) - MOST_READ)]:
            if len(read) > 2 * MOST_READ or time.monotonic() - entry.asked_at > KEPT_S:
                entry.course = Course(entry.file)


def journals(root: Path) -> Iterator[tuple[str, Path]]:
    """Name for people and journal of every run at or below a folder."""
    if root.is_file():
        yield root.absolute().parent.name, root
        return
    base = os.fspath(root)
    for visited, (folder, folders, files) in enumerate(os.walk(base)):
        if visited > VISITED:
            return
        depth = 0 if folder == base else os.path.relpath(folder, base).count(os.sep) + 1
        folders[:] = sorted(name for name in folders if not name.startswith(".")) if depth < DEPTH else []
        file = Path(folder) / FILE_NAME
        if FILE_NAME in files and not file.is_symlink() and signature(file):
            yield (root.absolute().name if depth == 0 else os.path.relpath(folder, base)), file
            folders[:] = []
