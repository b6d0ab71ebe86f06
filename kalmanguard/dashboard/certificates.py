"""Certificates of the runs that are looked at, each derived by the verifier in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfile
from threading import Condition, Thread
from typing import Any, final

from kalmanguard.certificate import verify as verifier

#: Seconds that a verification may take, and between two of the same run that nobody has asked for.
LONGEST_S, PAUSE_S = 900.0, 30.0
_NICE = 10


@dataclass
class Certificate:
    """What is known of one run's certificate: of which state of the run, when, and whether it is being made."""

    report: dict[str, Any] | None = None
    trouble: str | None = None
    records: int = 0
    made_at: float = 0.0
    took_s: float = 0.0
    pending: bool = False

    def to_dict(self, records: int) -> dict[str, Any]:
        """As plain values; ``stale``: the run, of so many records now, has gone on since."""
        return {
            "report": self.report,
            "trouble": self.trouble,
            "pending": self.pending,
            "records": self.records,
            "stale": self.records != records,
            "age_s": max(0.0, time.time() - self.made_at) if self.made_at else None,
        }


@final
class Certificates:
    """Verifies one run at a time, at a low priority, so that neither the page nor training waits for it.

    Parameters
    ----------
    told
        Called with a run's key whenever its certificate has changed; from the verifying thread.
    """

    def __init__(self, told: Callable[[str], None]) -> None:
        self._told = told
        self._known: dict[str, Certificate] = {}
        self._queue: list[tuple[str, Path, int]] = []
        self._wake = Condition()
        self._process: subprocess.Popen[str] | None = None
        self._stopped = False
        self._thread = Thread(target=self._work, name="kalmanguard-certificates", daemon=True)
        self._thread.start()

    def get(self, key: str) -> Certificate:
        """What is known now."""
        with self._wake:
            return self._known.setdefault(key, Certificate())

    def want(self, key: str, file: Path, records: int, *, asked: bool) -> None:
        """Have a certificate made of a run that has so many records, unless there is one, or one is on its way.

        A run that goes on is verified again by itself only after a pause of 30 seconds and twenty times what the last
        verification took.
        """
        with self._wake:
            known = self._known.setdefault(key, Certificate())
            if known.pending or not records or known.records == records:
                return
            if not asked and time.time() - known.made_at < max(PAUSE_S, 20.0 * known.took_s):
                return
            known.pending = True
            self._queue.append((key, file, records))
            self._wake.notify()

    def close(self) -> None:
        """Stop verifying, and wait for the process to end."""
        with self._wake:
            self._stopped = True
            if self._process is not None:
                self._process.kill()
            self._wake.notify()
        self._thread.join(10.0)

    def _work(self) -> None:
        while True:
            with self._wake:
                while not self._queue and not self._stopped:
                    self._wake.wait()
                if self._stopped:
                    return
                key, file, records = self._queue.pop(0)
            started = time.monotonic()
            report, trouble = self._verify(file)
            with self._wake:
                self._known[key] = Certificate(report, trouble, records, time.time(), time.monotonic() - started)
            if not self._stopped:
                self._told(key)

    def _verify(self, file: Path) -> tuple[dict[str, Any] | None, str | None]:
        with tempfile.TemporaryDirectory(prefix="kalmanguard-") as folder:
            try:
                return self._report(_settled(file, Path(folder))), None
            except subprocess.TimeoutExpired:
                return None, f"Verifying took more than {LONGEST_S:.0f} s: run kalmanguard verify by hand."
            except (OSError, ValueError, KeyError):
                return None, "The certificate cannot be checked: run kalmanguard verify on the run to see why."

    def _report(self, file: Path) -> dict[str, Any]:
        command = [sys.executable, "-I", verifier.__file__, "--json", "--", str(file)]
        with self._wake:
            if self._stopped:
                raise ValueError("stopped")
            process = self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        with suppress(OSError, AttributeError):
            os.setpriority(os.PRIO_PROCESS, process.pid, _NICE)
        try:
            printed, _ = process.communicate(timeout=LONGEST_S)
        finally:
            process.kill()
            process.wait()
            with self._wake:
                self._process = None
        found = json.loads(printed)
        return {
            "exit_code": int(found["exit_code"]),
            "head": str(found["head"]),
            "claims": [
                {name: claim[name] for name in ("name", "title", "status", "text")} for claim in found["claims"]
            ],
            "non_claims": [str(text) for text in found["non_claims"]],
        }


def _settled(file: Path, folder: Path) -> Path:
    """The journal itself, or a copy, where SQLite would make a log beside a journal that nobody writes."""
    with open(file, "rb") as stream:
        logged = stream.read(20)[18:20] == b"\x02\x02"
    if not logged or Path(f"{file}-wal").exists():
        return file
    return Path(copyfile(file, folder / file.name))
