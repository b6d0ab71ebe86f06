"""A small data sample from a file: arrays, tensors or a table, cut into batches."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kalmanguard.errors import ConfigurationError
from kalmanguard.sensors.losses import batch_size, take
from kalmanguard.stress.loading import call, read_tensors

#: Names under which a file keeps inputs and targets.
_INPUTS = ("inputs", "input", "x", "X", "data", "images")
_TARGETS = ("targets", "target", "y", "labels", "label")
#: A table with more rows is not a small sample.
_MOST_ROWS = 100_000


def load_sample(name: str, *, size: int) -> Iterable[Any]:
    """Batches of a data sample.

    Parameters
    ----------
    name
        ``module:function`` that returns batches; or a file: ``.npz`` and ``.pt`` with inputs and targets (by these
        names, as x and y, or the first two in it), ``.csv`` with a heading, the target in the last column or in one
        that is called so.
    size
        Examples in a batch, for a file.

    Raises
    ------
    ConfigurationError
        The file cannot be read, or holds no inputs and targets of one length.

    Notes
    -----
    No file is executed: ``.npz`` is read without pickles, ``.pt`` with ``weights_only=True``. In a table, a target of
    whole numbers is taken as classes.
    """
    path = Path(name)
    if path.suffix == ".npz":
        inputs, targets = _pair(_arrays(path), name)
    elif path.suffix in (".pt", ".pth", ".bin"):
        content = read_tensors(path)
        if isinstance(content, list) and content and not any(isinstance(item, Tensor) for item in content):
            return content  # batches already
        inputs, targets = _pair(content, name)
    elif path.suffix == ".csv":
        inputs, targets = _table(path)
    elif ":" in name:
        batches: Iterable[Any] = call(name)
        return batches
    else:
        raise ConfigurationError(f"--data {name}: give a .npz, .pt or .csv file, or module:function.")
    if size < 1:
        raise ConfigurationError(f"A batch size of {size} must be at least 1.")
    whole = (inputs, targets)
    return [take(whole, size, start) for start in range(0, batch_size(whole), size)]


def _pair(content: Any, name: str) -> tuple[Tensor, Tensor]:
    if isinstance(content, Mapping):
        inputs = next((content[key] for key in _INPUTS if key in content), None)
        targets = next((content[key] for key in _TARGETS if key in content), None)
        content = (inputs, targets) if inputs is not None and targets is not None else tuple(content.values())
    pair = tuple(content)[:2] if isinstance(content, list | tuple) else ()
    if len(pair) < 2 or not all(isinstance(t, Tensor) and t.ndim for t in pair) or len(pair[0]) != len(pair[1]):
        raise ConfigurationError(f"{name} must hold inputs and targets of one length, called so, or x and y.")
    return pair[0], pair[1]


def _arrays(path: Path) -> dict[str, Tensor]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        return {key: torch.from_numpy(_plain(value)) for key, value in arrays.items()}
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise ConfigurationError(f"{path} is no .npz file of plain numbers: {error}.") from None


def _plain(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Doubles as single precision, which models are in; whole numbers as 64 bits."""
    if array.dtype.kind == "f":
        return array.astype(np.float32)
    return array.astype(np.int64) if array.dtype.kind in "iu" else array


def _table(path: Path) -> tuple[Tensor, Tensor]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigurationError(f"{path} cannot be read as a table: {error}.") from None
    if len(rows) < 2 or len(rows[0]) < 2 or len(rows) > _MOST_ROWS:
        raise ConfigurationError(
            f"{path}: {max(0, len(rows) - 1):,} rows; give a heading, two columns or more and 1 to {_MOST_ROWS:,} rows."
        )
    heading = [cell.strip().lower() for cell in rows[0]]
    target = next((heading.index(name) for name in _TARGETS if name in heading), len(heading) - 1)
    values = np.empty((len(rows) - 1, len(heading)))
    for number, row in enumerate(rows[1:]):
        try:
            values[number] = [float(cell) for cell in row]
        except ValueError:
            raise ConfigurationError(
                f"{path}, line {number + 2}: {len(heading)} numbers are wanted, {','.join(row)[:80]!r} is there."
            ) from None
    wanted = values[:, target]
    if not all(map(math.isfinite, values.ravel().tolist())):
        raise ConfigurationError(f"{path} holds numbers that are not finite.")
    classes = bool((wanted == np.round(wanted)).all())
    inputs = torch.from_numpy(np.delete(values, target, axis=1).astype(np.float32))
    return inputs, torch.from_numpy(wanted.astype(np.int64) if classes else wanted.astype(np.float32)[:, None])
