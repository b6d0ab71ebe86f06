"""Where runs are written: a journal is made there, read while it is open, and removed; and the clocks."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from kalmanguard.cli.checkup.check import Check, Verdict
from kalmanguard.errors import JournalError

_GROUP = "Run folder"
#: Write-ahead logs share memory between processes; across the machines of these file systems nobody can.
_NETWORK = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "gpfs", "beegfs", "ceph", "afs", "glusterfs", "9p", "panfs"}
    | {"fuse.sshfs", "fuse.glusterfs", "fuse.s3fs", "fuse.gcsfuse", "pvfs2", "orangefs"}
)
_SLOW_SYNC_S = 0.2
_SKEW_S = 2.0
_EARLIEST_S = 1_735_689_600.0  # 2025-01-01: an earlier clock was never set
_ROWS = 500


def check_folder(folder: Path, name: str, root: Path = Path("/")) -> Iterator[Check]:
    """Try a journal in ``folder``, or in the nearest one above it that exists; nothing is left behind.

    Parameters
    ----------
    folder, name
        Where runs will be written, and what that is called in sentences.
    root
        Where ``proc`` is found.
    """
    place = nearest(folder)
    kind = file_system(place, root)
    if kind in _NETWORK:
        yield Check(
            _GROUP, "file system", Verdict.NOTE, f"{kind}, shared by several machines",
            "Watch a run on the machine that writes it, or choose a run_dir on a local disk and copy it afterwards.",
            {"type": kind},
        )  # fmt: skip
    else:
        yield Check(_GROUP, "file system", Verdict.OK, kind or "of a kind that this system does not tell",
                    values={"type": kind})  # fmt: skip
    try:
        with tempfile.TemporaryDirectory(prefix=".kalmanguard-doctor-", dir=place) as made:
            yield _journal(Path(made))
            yield _clock(Path(made))
    except OSError as error:
        yield Check(
            _GROUP, "writable", Verdict.PROBLEM, f"{name} cannot be written to: {error.strerror or error}.",
            "Choose another folder with --run-dir, or ask for the right to write there.",
        )  # fmt: skip


def nearest(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    folder = folder.absolute()
    return next((place for place in (folder, *folder.parents) if place.is_dir()), folder)


def file_system(place: Path, root: Path = Path("/")) -> str | None:
    """Type of the file system that a folder lies on; ``None`` where the system does not tell."""
    try:
        lines = (root / "proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    there, found, kind = place.resolve(), -1, None
    for line in lines:
        before, dash, after = line.partition(" - ")
        words = before.split()
        if not dash or len(words) < 5:
            continue
        mount = Path(words[4].replace("\\040", " "))
        # Of mounts on one point the last is the one that is seen.
        if (mount == there or mount in there.parents) and len(mount.parts) >= found:
            found, kind = len(mount.parts), after.split()[0]
    return kind


def _journal(folder: Path) -> Check:
    from kalmanguard.journal.reader import JournalReader
    from kalmanguard.journal.writer import JournalWriter

    try:
        with JournalWriter(folder) as journal:
            journal.write_header({"format": 1, "statistics": []})
            for step in range(_ROWS):
                journal.record("note", step, {"doctor": step})
            syncs = []
            for _ in range(5):
                started = time.perf_counter()
                journal.sync()
                syncs.append(time.perf_counter() - started)
            with JournalReader(folder) as reader:
                seen = reader.check_chain()
    except JournalError as error:
        return Check(
            _GROUP, "journal", Verdict.PROBLEM, str(error).replace(str(folder), "the folder"),
            "A run there would go unrecorded: choose a run_dir on a local disk.",
        )  # fmt: skip
    sync_s = statistics.median(syncs)
    values = {"records": seen, "sync_s": sync_s}
    if seen < _ROWS:
        return Check(
            _GROUP, "journal", Verdict.PROBLEM, f"a reader saw {seen} of {_ROWS} records while the journal was open",
            "Its write-ahead log is not shared there: choose a run_dir on a local disk.", values,
        )  # fmt: skip
    text = f"written, read meanwhile, chain intact; {1e3 * sync_s:.1f} ms to force it to the disk"
    if sync_s > _SLOW_SYNC_S:
        return Check(
            _GROUP, "journal", Verdict.NOTE, text, "The disk is slow: interventions wait for it, steps do not.", values
        )
    return Check(_GROUP, "journal", Verdict.OK, text, values=values)


def _clock(folder: Path) -> Check:
    mark = folder / "clock"
    before = time.time()
    mark.write_bytes(b"")
    stamped, after = os.stat(mark).st_mtime, time.time()
    skew_s = min(0.0, stamped - before) + max(0.0, stamped - after)
    resolution_s = time.get_clock_info("perf_counter").resolution
    values = {"skew_s": skew_s, "resolution_s": resolution_s}
    text = f"file times differ by {abs(skew_s):.1f} s from this machine's clock"
    if before < _EARLIEST_S:
        return Check(_GROUP, "clock", Verdict.NOTE, f"the clock says {time.strftime('%Y-%m-%d')}",
                     "Set it: no decision depends on it, but logs and file times do.", values)  # fmt: skip
    if abs(skew_s) > _SKEW_S:
        return Check(_GROUP, "clock", Verdict.NOTE, text,
                     "Synchronise the clocks: the monitor would call a run silent too early or too late.",
                     values)  # fmt: skip
    return Check(_GROUP, "clock", Verdict.OK, text, values=values)
