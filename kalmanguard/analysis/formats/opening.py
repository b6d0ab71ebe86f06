"""What is at a path: a file's reader by its content, or the parts of a folder."""

from __future__ import annotations

import json
from pathlib import Path

from kalmanguard.analysis.formats.bytes import head
from kalmanguard.analysis.formats.delimited import DelimitedReader
from kalmanguard.analysis.formats.journal import JournalReader
from kalmanguard.analysis.formats.parquet import ParquetReader
from kalmanguard.analysis.formats.records import RecordsReader
from kalmanguard.analysis.formats.tensorboard import EventReader, is_event_file
from kalmanguard.analysis.formats.trainer import FILE_NAME, TrainerReader, state_in
from kalmanguard.analysis.tables import Reader, printable
from kalmanguard.errors import TrajectoryError
from kalmanguard.journal.schema import FILE_NAME as JOURNAL

_LOGS = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".json")
_COMPRESSED = (".gz", ".bz2", ".xz")
_WEIGHTS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_MOST_FILES = 20_000
#: Folders that frameworks write the parts of one run to, and what their tags are then called.
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "eval", "evaluation", "dev"), "val"),
    "test": "test",
}


def open_file(path: Path) -> Reader:
    """The reader of one file, found by its content first and by its name second.

    Raises
    ------
    TrajectoryError
        There is no file, it is empty, or nothing here reads it.
    """
    if not path.is_file():
        raise TrajectoryError(f"There is no file {path}.")
    if is_event_file(path):
        return EventReader(path)
    start = head(path)
    if not start:
        raise TrajectoryError(f"{path} is empty, or is not what its name says.")
    if start.startswith(b"SQLite format 3\0"):
        return JournalReader(path)
    if start.startswith(b"PAR1"):
        return ParquetReader(path)
    if start.startswith(b"PK\x03\x04") or start.startswith(b"\x80") or path.suffix in _WEIGHTS:
        what = "an archive or a pickle" if path.suffix not in _WEIGHTS else "one checkpoint"
        raise TrajectoryError(
            f"{path} is {what}, which holds no course of a run: unpack it by hand if it holds a log; a folder of "
            "checkpoints with steps in their names can be read as a whole."
        )
    if path.name == FILE_NAME:
        return TrainerReader(path)
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    if text[:1] == b"[":
        return RecordsReader(path, document=True)
    if text[:1] == b"{":
        return RecordsReader(path, document=not _is_line(text, start))
    return DelimitedReader(path)


def parts(path: Path) -> list[tuple[str, Reader]]:
    """The readers of a path, each with the name of the run that it belongs to.

    A folder may be a run of ours, a Trainer's output, a log directory of TensorBoard, a folder of checkpoints, or hold
    log files: those that name their runs in a column belong together, others are a run each. Links are not followed.

    Raises
    ------
    TrajectoryError
        There is nothing that can be read.
    """
    if not path.exists():
        raise TrajectoryError(f"There is no file or folder {path}.")
    if path.is_file():
        return [(run_name(path), open_file(path))]
    if (path / JOURNAL).is_file():
        return [(path.resolve().name, JournalReader(path))]
    children = sorted(child for child in path.iterdir() if not child.is_symlink())
    if len(children) > _MOST_FILES:
        raise TrajectoryError(f"The folder {path} holds {len(children):,} entries; name one of them.")
    events = sorted(p for p in path.rglob("*tfevents*") if p.is_file() and not p.is_symlink() and is_event_file(p))
    if events:
        return _noted(_events(path, events), path, [c.name for c in children if c.is_file() and _suffix(c) in _LOGS])
    state = state_in(path)
    if state is not None:
        return [(path.resolve().name, TrainerReader(state))]
    journals = [child for child in children if child.is_dir() and (child / JOURNAL).is_file()]
    if journals:
        return [(child.name, JournalReader(child)) for child in journals]
    logs = [child for child in children if child.is_file() and _suffix(child) in _LOGS]
    if logs:
        return _logs(logs)
    if any(child.suffix in _WEIGHTS or child.is_dir() for child in children):
        # torch takes seconds to load, and only checkpoints need it.
        from kalmanguard.analysis.formats.checkpoints import CheckpointReader, found_in

        if found_in(path):
            return [(path.resolve().name, CheckpointReader(path))]
    raise TrajectoryError(
        f"The folder {path} holds neither a journal nor logs ({', '.join(_LOGS)}, TensorBoard events, {FILE_NAME}) nor "
        "checkpoints with a step in their names."
    )


def run_name(path: Path) -> str:
    """A file's name without its suffixes."""
    if is_event_file(path):
        return printable(path.resolve().parent.name)
    name = path.name
    for suffix in (*_COMPRESSED, *_LOGS):
        name = name.removesuffix(suffix)
    return printable(name or path.name)


def _logs(logs: list[Path]) -> list[tuple[str, Reader]]:
    """Log files of a folder; two of one name are two runs, and one that cannot be read does not hide the others."""
    names = [run_name(log) for log in logs]
    found: list[tuple[str, Reader]] = []
    refused: list[TrajectoryError] = []
    for log, name in zip(logs, names, strict=True):
        try:
            found.append((name if names.count(name) == 1 else printable(log.name), open_file(log)))
        except TrajectoryError as error:
            refused.append(error)
    if not found:
        raise refused[0]
    found[0][1].notes.extend(f"A file was left out: {why}" for why in refused)
    return found


def _events(folder: Path, events: list[Path]) -> list[tuple[str, Reader]]:
    """Event files by their folder; neighbours named for splits, such as train and validation, are one run."""
    found: list[tuple[str, Reader]] = []
    homes = {event.parent for event in events}
    for event in events:
        home, split = event.parent, _SPLITS.get(event.parent.name.lower())
        kin = [other for other in homes if other.parent == home.parent and other.name.lower() in _SPLITS]
        if split is not None and len(kin) > 1:
            found.append((_relative(folder, home.parent), EventReader(event, prefix=split)))
        else:
            found.append((_relative(folder, home), EventReader(event)))
    return found


def _noted(found: list[tuple[str, Reader]], path: Path, others: list[str]) -> list[tuple[str, Reader]]:
    if others:
        shown = printable(", ".join(others[:3])) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
        found[0][1].notes.append(f"Only TensorBoard events were read; {shown} in {path} were not: name one to read it.")
    return found


def _suffix(path: Path) -> str:
    name = path.name.lower()
    for suffix in _COMPRESSED:
        name = name.removesuffix(suffix)
    return Path(name).suffix


def _relative(root: Path, folder: Path) -> str:
    name = folder.relative_to(root).as_posix() if folder.is_relative_to(root) else "."
    return printable(root.resolve().name if name == "." else name)


def _is_line(text: bytes, start: bytes) -> bool:
    """Whether the first line is a whole JSON object, so that others follow."""
    first, newline, _ = text.partition(b"\n")
    if not newline and len(start) >= 4096:
        return True  # a long record; a document would be indented, or is refused as a line
    try:
        return isinstance(json.loads(first), dict) and not _is_document(first)
    except ValueError:
        return False


def _is_document(line: bytes) -> bool:
    """One object that holds the whole log: lists of records, or columns."""
    data = json.loads(line)
    lists = [value for value in data.values() if isinstance(value, list)]
    return any(value and isinstance(value[0], dict) for value in lists) or (len(lists) > 1 and len(lists) == len(data))
