"""TensorBoard event files: their scalars; needs the package tensorboard (the extra ``tensorboard``)."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kalmanguard.analysis.formats.records import chunk_of
from kalmanguard.analysis.tables import Chunk
from kalmanguard.errors import TrajectoryError

_ROWS = 16_384


def is_event_file(path: Path) -> bool:
    """By its name, as TensorBoard itself finds them."""
    return ".tfevents." in path.name


class EventReader:
    """Streams one event file; a damaged tail is left out and noted. ``prefix`` goes before every tag."""

    format = "TensorBoard"
    named = False

    def __init__(self, path: Path, *, prefix: str = "") -> None:
        self.notes: list[str] = []
        self._path = path
        self._prefix = f"{prefix}/" if prefix else ""

    def chunks(self) -> Iterator[Chunk]:
        batch: list[dict[str, Any]] = []
        any_row = False
        for record in self._records():
            any_row = True
            batch.append(record)
            if len(batch) == _ROWS:
                yield chunk_of(batch, str(self._path), self.notes)
                batch = []
        if batch:
            yield chunk_of(batch, str(self._path), self.notes)
        if not any_row:
            raise TrajectoryError(f"{self._path} holds no scalars.")

    def _records(self) -> Iterator[dict[str, Any]]:
        try:
            from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
            from tensorboard.util import tensor_util
        except ImportError:
            raise TrajectoryError(
                f"{self._path} is a TensorBoard event file: pip install 'kalmanguard[tensorboard]' to read it."
            ) from None
        from google.protobuf.message import DecodeError

        records, damaged = _intact_records(self._path)
        if damaged is not None:
            self.notes.append(damaged)
        read = 0
        try:
            for event in EventFileLoader(str(self._path)).Load():
                read += 1
                for value in event.summary.value:
                    number = _scalar(value, tensor_util)
                    if number is not None:
                        yield {"step": event.step, self._prefix + value.tag: number}
        except (DecodeError, ValueError, TypeError, OSError, struct.error) as error:
            raise TrajectoryError(f"{self._path} is no TensorBoard event file that can be read: {error}.") from None
        if read < records:
            # The loader stops at the first record whose checksum is wrong.
            self.notes.append(
                f"Record {read + 1:,} of {records:,} is damaged: it and what comes after it in this file were left out."
            )


def _scalar(value: Any, tensor_util: Any) -> float | None:
    kind = value.WhichOneof("value")
    if kind == "simple_value":
        return float(value.simple_value)
    # Histograms, texts and images are tensors of other shapes.
    if (
        kind == "tensor"
        and not value.tensor.tensor_shape.dim
        and value.metadata.plugin_data.plugin_name in ("", "scalars")
    ):
        array = tensor_util.make_ndarray(value.tensor)
        return float(array) if array.dtype.kind in "fiu" else None
    return None


def _intact_records(path: Path) -> tuple[int, str | None]:
    """How many whole records (length, its checksum, data, its checksum) there are, and a note on what is cut short."""
    size = path.stat().st_size
    if size < 16:
        raise TrajectoryError(f"{path} has {size} bytes: it is no TensorBoard event file.")
    at = records = 0
    with open(path, "rb") as file:
        while at + 16 <= size:
            (length,) = struct.unpack("<Q", file.read(12)[:8])
            if at + 16 + length > size:
                break
            at += 16 + length
            records += 1
            file.seek(at)
    if at == 0:
        raise TrajectoryError(f"{path} is no TensorBoard event file: its first record is cut short.")
    cut = f"The file is cut short after {at:,} of its {size:,} bytes; the rest was left out."
    return records, None if at == size else cut
