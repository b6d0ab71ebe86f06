"""A series: values at integer steps, which may be irregular; checked once, here, for everything that reads one."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kalmanguard.errors import ConfigurationError
from kalmanguard.records import FloatArray


class Series(NamedTuple):
    """Steps ``(n,)``, strictly increasing, and their values ``(n,)``; nan where nothing was seen."""

    steps: NDArray[np.int64]
    values: FloatArray

    @property
    def seen(self) -> NDArray[np.bool_]:
        """Which rows hold a value, shape ``(n,)``."""
        return ~np.isnan(self.values)

    def known(self) -> Series:
        """Only the rows that hold a value."""
        return Series(self.steps[self.seen], self.values[self.seen])


def series(steps: ArrayLike, values: ArrayLike, *, least: int = 1) -> Series:
    """Check steps and values, and give them their types.

    Parameters
    ----------
    steps
        Whole numbers, strictly increasing, shape ``(n,)``.
    values
        Finite, or nan where nothing was seen, shape ``(n,)``.
    least
        Number of values that there must be, nan not counted.

    Raises
    ------
    ConfigurationError
        Shapes differ, steps are not increasing whole numbers, a value is infinite, or there are too few.

    Examples
    --------
    >>> series([1, 2, 5], [0.5, np.nan, 0.4]).known().steps
    array([1, 5])
    >>> series([1, 1], [0.5, 0.4])
    Traceback (most recent call last):
    kalmanguard.errors.ConfigurationError: Step 1 follows step 1: sort the rows by step and keep one for each.
    """
    try:
        at, x = np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"Steps and values must be numbers: {error}.") from None
    if at.ndim != 1 or at.shape != x.shape:
        raise ConfigurationError(f"Steps {at.shape} and values {x.shape} must be of the same length, in one dimension.")
    if not np.isfinite(at).all() or not (at == np.round(at)).all():
        raise ConfigurationError("A step is no whole number: count optimizer steps.")
    if np.isinf(x).any():
        row = int(np.isinf(x).argmax())
        raise ConfigurationError(f"The value at step {int(at[row])} is infinite: cut the series there, or make it nan.")
    back = np.flatnonzero(np.diff(at) <= 0)
    if len(back):
        one, next_one = int(at[back[0]]), int(at[back[0] + 1])
        raise ConfigurationError(f"Step {next_one} follows step {one}: sort the rows by step and keep one for each.")
    found = Series(at.astype(np.int64), x)
    count = int(found.seen.sum())
    if count < least:
        raise ConfigurationError(f"The series holds {count} values that are not nan; at least {least} are needed.")
    return found
