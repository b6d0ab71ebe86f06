"""Parquet files, by batches; needs pyarrow (the extra ``parquet``)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from kalmanguard.analysis.tables import Chunk, Column
from kalmanguard.errors import TrajectoryError

_ROWS = 65_536


class ParquetReader:
    """Streams the columns of numbers and of words; others are left out and noted."""

    format = "Parquet"
    named = False

    def __init__(self, path: Path) -> None:
        self.notes: list[str] = []
        self._path = path

    def chunks(self) -> Iterator[Chunk]:
        try:
            import pyarrow as pa
            from pyarrow import parquet
        except ImportError:
            raise TrajectoryError(
                f"{self._path} is a Parquet file, which needs pyarrow: pip install 'kalmanguard[parquet]'."
            ) from None
        try:
            with parquet.ParquetFile(self._path) as file:
                others = [
                    field.name
                    for field in file.schema_arrow
                    if not (
                        pa.types.is_integer(kind := _plain(pa, field.type))
                        or pa.types.is_floating(kind)
                        or pa.types.is_decimal(kind)
                        or _is_text(pa, kind)
                    )
                ]
                if others:
                    self.notes.append(f"Columns that hold no numbers were left out: {', '.join(others)}.")
                wanted = [name for name in file.schema_arrow.names if name not in others]
                if file.metadata.num_rows == 0:
                    raise TrajectoryError(f"{self._path} holds no rows.")
                for batch in file.iter_batches(_ROWS, columns=wanted):
                    yield _chunk(pa, batch)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise TrajectoryError(f"{self._path} is no Parquet file that can be read: {error}.") from None


def _plain(pa: Any, kind: Any) -> Any:
    """What a column holds, however it is stored."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_text(pa: Any, kind: Any) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _chunk(pa: Any, batch: Any) -> Chunk:
    columns: dict[str, Column] = {}
    texts: dict[str, tuple[str, ...]] = {}
    for name, array in zip(batch.schema.names, batch.columns, strict=True):
        if isinstance(array, pa.DictionaryArray):
            array = array.dictionary_decode()
        if _is_text(pa, array.type):
            texts[name] = tuple("" if word is None else word for word in array.to_pylist())
            continue
        logged = ~np.asarray(array.is_null())
        # Nulls become nan in the values, and stay absent by the mask.
        values = array.cast("float64", safe=False).to_numpy(zero_copy_only=False).astype(np.float64)
        columns[name] = Column(np.where(logged, values, np.nan), logged)
    return Chunk(batch.num_rows, columns, texts)
