"""Opening a journal's database, and SQLite's errors as sentences."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

from kalmanguard.errors import JournalError
from kalmanguard.journal.schema import APPLICATION_ID, CREATE, SCHEMA_VERSION, check_identity, locate

BUSY_TIMEOUT_S = 10.0

_MEANING = {
    "SQLITE_FULL": "the disk is full: free some space and resume the run",
    "SQLITE_BUSY": "another process is writing to it: a run has one writer",
    "SQLITE_CONSTRAINT": "another process has written to it meanwhile: a run has one writer",
    "SQLITE_READONLY": "it is read-only: choose a run folder that can be written to",
    "SQLITE_CANTOPEN": "it cannot be opened: check that the folder exists and can be written to",
    "SQLITE_NOTADB": "it is not an SQLite database, so not a journal",
    "SQLITE_CORRUPT": "the file is damaged",
    "SQLITE_IOERR": "reading or writing failed: the disk may be full, over quota or failing",
}


def failure(file: str | Path, verb: str, error: Exception) -> JournalError:
    """A `JournalError` that says what SQLite or the operating system meant."""
    name = str(getattr(error, "sqlite_errorname", ""))
    meaning = next((text for prefix, text in _MEANING.items() if name.startswith(prefix)), None)
    detail = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return JournalError(f"The journal {file} cannot be {verb}: {meaning or detail}" + (f" ({detail})." * bool(meaning)))


def identity(connection: sqlite3.Connection) -> tuple[int, int]:
    """The application id and the schema version that the file carries."""
    (application_id,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    return application_id, version


def connect_to_write(file: Path | None) -> sqlite3.Connection:
    """Connect to a writer's database, ``None`` for a private temporary one; refuse what is no journal, untouched."""
    connection = sqlite3.connect(
        "" if file is None else os.fspath(file), timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
    )
    try:
        if not is_blank(connection):
            check_identity(Path(file or ""), *identity(connection))
    except BaseException:
        connection.close()
        raise
    return connection


def is_blank(connection: sqlite3.Connection) -> bool:
    """Whether the database is a new one: no table, and no program's mark."""
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    return not tables and not any(identity(connection))


def holds_run(path: str | Path) -> bool:
    """Whether a run folder, or a file, holds a journal with a record in it.

    Raises
    ------
    JournalError
        The file is no journal, or cannot be read.
    """
    file = locate(path)
    if not file.is_file():
        return False
    try:
        connection = _connect_to_read(f"{file.absolute().as_uri()}?mode=ro")
        try:
            # Killed before its table was made, it is blank and no other program's.
            if is_blank(connection):
                return False
            check_identity(file, *identity(connection))
            return bool(connection.execute("SELECT EXISTS (SELECT 1 FROM records)").fetchone()[0])
        finally:
            connection.close()
    except (sqlite3.Error, OSError) as error:
        raise failure(file, "read", error) from error


def prepare_to_write(connection: sqlite3.Connection, file: Path | None) -> None:
    """Set the database up for appending, and make its table if it is new.

    Write-ahead log with ``synchronous=NORMAL``: a committed row survives the death of the process; the death of the
    machine may cost rows since the last `sync_to_disk`, never the file's integrity.
    """
    blank = is_blank(connection)
    if file is None:
        connection.execute("PRAGMA journal_mode=MEMORY")
        connection.execute("PRAGMA synchronous=OFF")
    else:
        (mode,) = connection.execute("PRAGMA journal_mode=WAL").fetchone()
        if mode != "wal":
            raise JournalError(
                f"The journal {file} lies on a file system without shared memory maps, which its write-ahead log "
                "needs: choose a run folder on a local disk."
            )
        # fullfsync: a no-op but on macOS, where a plain fsync leaves the data in the drive's own cache.
        for setting in ("synchronous=NORMAL", "fullfsync=ON", "checkpoint_fullfsync=ON"):
            connection.execute(f"PRAGMA {setting}")
    if blank:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute(CREATE)
        connection.execute(f"PRAGMA application_id={APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
        connection.execute("COMMIT")
    if file is not None:
        _sync_folder(file.parent)


def open_for_reading(file: Path, *, traceless: bool = False) -> sqlite3.Connection:
    """Open a journal read-only, beside a writer at work, after its death, or in a read-only folder.

    ``traceless``: without a log beside it, so without a writer, the file is taken as one that nobody changes; otherwise
    SQLite may make an empty log and its index there. For short looks only: a writer that comes meanwhile is not seen.

    Raises
    ------
    JournalError
        When the file is missing, foreign, damaged or of a newer version.
    """
    if not file.is_file():
        raise JournalError(f"There is no journal at {file}: give a run folder or the path of its journal.")
    uri = file.absolute().as_uri()
    try:
        try:
            settled = traceless and not Path(f"{file}-wal").exists()
            connection = _connect_to_read(f"{uri}?{'immutable=1' if settled else 'mode=ro'}")
        except sqlite3.OperationalError as error:
            # SQLite wants to create the log's index beside the file. Without a log there is nothing to index.
            log = Path(f"{file}-wal")
            if error.sqlite_errorname != "SQLITE_CANTOPEN" or (log.exists() and log.stat().st_size):
                raise
            connection = _connect_to_read(f"{uri}?immutable=1")
    except (sqlite3.Error, OSError) as error:
        raise failure(file, "read", error) from error
    try:
        check_identity(file, *identity(connection))
    except BaseException:
        connection.close()
        raise
    return connection


def _connect_to_read(uri: str) -> sqlite3.Connection:
    connection = sqlite3.connect(uri, uri=True, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except BaseException:
        connection.close()
        raise
    return connection


def sync_to_disk(connection: sqlite3.Connection) -> None:
    """Make every committed row durable against the death of the machine.

    Under ``synchronous=FULL`` a commit flushes the write-ahead log, with all rows before it; rewriting the schema
    version is the smallest commit there is. (A checkpoint would not do: while a reader holds an old snapshot it may
    have nothing to copy, and then flushes nothing.)
    """
    connection.execute("PRAGMA synchronous=FULL")
    try:
        connection.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
    finally:
        connection.execute("PRAGMA synchronous=NORMAL")


def fold_log(connection: sqlite3.Connection) -> None:
    """Turn the closed journal into one plain file, if no reader is in the way; else the log stays beside it."""
    connection.execute("PRAGMA busy_timeout=100")
    try:
        connection.execute("PRAGMA journal_mode=DELETE").fetchone()
    except sqlite3.OperationalError as error:
        if not error.sqlite_errorname.startswith("SQLITE_BUSY"):
            raise


def _sync_folder(folder: Path) -> None:
    """Make the file's name as durable as its content; where folders cannot be opened it already is."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        return
    finally:
        os.close(descriptor)
