r"""What the file of a run looks like: table, hash chain, kinds of records, named statistics.

A run folder holds one SQLite database, ``journal.sqlite``, with one table

======== =========== ===========================================================================
column   class       content
======== =========== ===========================================================================
seq      INTEGER     1, 2, 3, ... without gaps
kind     TEXT        ``header`` first, ``step`` for steps, ``close`` last, others for rare records
step     INTEGER     step of training that the record belongs to
body     BLOB, TEXT  fixed binary layout for ``step`` (`kalmanguard.journal.codec`), else JSON
blob     BLOB        arrays of little-endian float64; may be empty
digest   BLOB        ``sha256(previous digest | seq, step, three lengths | kind | body | blob)``
======== =========== ===========================================================================

with integers packed as ``<qqIII`` and 32 zero bytes before the first record. The lengths make the hashed text
unambiguous, the kind fixes the storage class of the body: a changed bit anywhere in a row breaks the chain.

Records that a certificate is checked from (`kalmanguard.certificate.verify`):

``header``
    ``format`` (1), ``settings`` (all of them), ``statistics`` (the names of `Decision.statistics`; the verifier says
    which it needs), ``certificate`` (``alpha``, ``delta``, ``clip``, ``lambda_rule``, ``c`` and, for the transcript
    bound, ``kinds``), ``probe`` (``n``, ``digest``); anything else that describes the run.
``snapshot``
    ``digest`` of the state captured at ``step``.
``durable``
    a checkpoint of the state of step ``state`` is forced to the disk, whole and under its final name: ``clean`` when it
    is the one that a resume takes, ``manifest_sha256`` of its manifest, a true ``found`` when a resume has found and
    verified it. Written afterwards, by the process that keeps the records; what lies in memory is never called so.
``intent``, ``outcome``
    before and after an intervention; an outcome has the fields of `kalmanguard.records.Outcome`.
``fresh``
    a betting test on fresh examples: ``reference_step``, ``index`` t, ``alpha_t``, ``log_wealth``, ``certified`` and
    the paired differences, candidate minus reference, as the record's blob; ``first`` is the index of the first
    example used, so that no example can be used twice unseen.
``resume``, ``note`` with a true ``reset``
    the engine's ledger starts anew, or from a checkpoint with the drift test restarted; ``anew`` is true for a run that
    had none yet when it was killed.
``close``
    written by `JournalWriter.close`; a run without it reads INCOMPLETE.
"""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any, NamedTuple

from kalmanguard.errors import JournalError

FILE_NAME = "journal.sqlite"
APPLICATION_ID = 0x4B476A31  # "KGj1", what `file` and SQLite show of a foreign program's database
SCHEMA_VERSION = 1
GENESIS = bytes(32)

CREATE = (
    "CREATE TABLE records (seq INTEGER PRIMARY KEY, kind TEXT NOT NULL, step INTEGER NOT NULL, "
    "body NOT NULL, blob BLOB NOT NULL, digest BLOB NOT NULL)"
)
COLUMNS = "seq, kind, step, body, blob, digest"

_PREFIX = struct.Struct("<qqIII").pack


class Row(NamedTuple):
    """One record as it is stored."""

    seq: int
    kind: str
    step: int
    body: bytes | str
    blob: bytes
    digest: bytes

    def data(self) -> dict[str, Any]:
        """The JSON body of a record that is not a step."""
        try:
            value = json.loads(self.body) if isinstance(self.body, str) else None
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise JournalError(f"Record {self.seq} ({self.kind}) of the journal has no JSON object for a body.")
        return value


def chained(previous: bytes, seq: int, kind: bytes, step: int, body: bytes, blob: bytes) -> bytes:
    """Digest of a record that follows the one with the digest ``previous``."""
    prefix = _PREFIX(seq, step, len(kind), len(body), len(blob))
    return hashlib.sha256(b"".join((previous, prefix, kind, body, blob))).digest()


def is_intact(row: Row, previous: bytes) -> bool:
    """Whether ``row`` carries the digest that follows from its content and the digest before it."""
    # SQLite stores a value of any class in any column.
    stored: tuple[object, ...] = row
    classes = (int, str, int, bytes if row.kind == "step" else str, bytes, bytes)
    if not all(isinstance(value, kind) for value, kind in zip(stored, classes, strict=True)):
        return False
    body = row.body.encode("utf-8", "surrogatepass") if isinstance(row.body, str) else row.body
    return chained(previous, row.seq, row.kind.encode("utf-8", "surrogatepass"), row.step, body, row.blob) == row.digest


def locate(path: str | Path) -> Path:
    """The journal's file: ``path`` itself when it ends in ``.sqlite``, else the one in the run folder ``path``."""
    path = Path(path)
    return path if path.suffix == ".sqlite" else path / FILE_NAME


def check_identity(file: Path, application_id: int, version: int) -> None:
    """Refuse a database of another program or of a newer kalmanguard."""
    if application_id != APPLICATION_ID:
        raise JournalError(f"{file} is an SQLite database of another program, not a kalmanguard journal.")
    if version > SCHEMA_VERSION:
        raise JournalError(
            f"{file} was written by a newer kalmanguard (journal version {version}; this one reads up to "
            f"{SCHEMA_VERSION}): upgrade kalmanguard to read it."
        )
