"""Record a run from its training loop, without supervising it: one JSON line a step, which `Trajectory.load` reads."""

from __future__ import annotations

import json
import math
import warnings
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from kalmanguard.analysis.assembly import LARGEST_STEP
from kalmanguard.analysis.formats.records import VELOCITY
from kalmanguard.analysis.reading import read_runs
from kalmanguard.errors import ConfigurationError, TrajectoryError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn
    from torch.optim import Optimizer

_SUFFIXES = (".jsonl", ".ndjson")
#: Names that are no channel's.
_TAKEN = ("run", VELOCITY)


class Recorder:
    """Writes what is logged, and with a model also learning rate, gradient norm and the sketched update of every step.

    Parameters
    ----------
    path
        New file with the suffix ``.jsonl``; ``append`` goes on with an old one.
    model
        Its trained parameters are sketched after every logged step. Without one, only what is logged is written.
    optimizer
        Those that train the model; by default found at their first step.
    append
        Go on with the file, where there is one.
    sketch_size, seed
        Rows and key of the sketch; the same ones as a supervisor's give velocities that can be compared.

    Raises
    ------
    ConfigurationError
        The suffix is another one.
    TrajectoryError
        The file exists already, or cannot be written.

    Notes
    -----
    The run is not touched: no parameter, gradient, random state or schedule is changed (hooks only look, and are
    removed on `close`). Each row goes to the operating system at once, so that a killed process loses none. Values that
    are no numbers are left out, with a warning; so are rows that a failing disk does not take. On an accelerator a
    tensor that is logged is waited for.

    Examples
    --------
    >>> import tempfile, torch
    >>> path = tempfile.mkdtemp() + "/run.jsonl"
    >>> model = torch.nn.Linear(4, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> with Recorder(path, model, optimizer) as recorder:
    ...     for step in range(3):
    ...         loss = model(torch.ones(8, 4)).square().mean()
    ...         loss.backward()
    ...         optimizer.step()
    ...         optimizer.zero_grad()
    ...         recorder.log(loss=loss)
    >>> from kalmanguard.analysis import Trajectory
    >>> sorted(Trajectory.load(path).channels)
    ['gradient_norm', 'learning_rate', 'loss']
    """

    def __init__(
        self,
        path: str | Path,
        model: nn.Module | None = None,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        *,
        append: bool = False,
        sketch_size: int = 64,
        seed: int = 0,
    ) -> None:
        self.path = Path(path)
        if self.path.suffix not in _SUFFIXES:
            raise ConfigurationError(f"{self.path}: a recording is JSON lines; name it with the suffix .jsonl.")
        self._suite: Any = None
        self._tap: Any = None
        if model is not None:
            self._watch(model, optimizer, sketch_size, seed)
        self._step = 0
        if append:
            _cut_to_whole_lines(self.path)
            self._step = _last_step(self.path)
        self._failed = False
        try:
            self._file = open(self.path, "a" if append else "x", encoding="utf-8")  # noqa: SIM115 - open for the run
        except FileExistsError:
            self._let_go()
            raise TrajectoryError(
                f"{self.path} exists already: name a new file, or pass append=True to go on with it."
            ) from None
        except OSError as error:
            self._let_go()
            raise TrajectoryError(f"{self.path} cannot be written: {error.strerror}.") from None

    def log(self, step: int | None = None, /, **values: Any) -> None:
        """Write one row.

        Parameters
        ----------
        step
            By default one more than before; whole and not negative, else it is counted on with a warning.
        **values
            Numbers by name: ``loss``, ``probe`` (held-out loss), ``learning_rate``, ``gradient_norm``, or any other;
            ``None`` is left out. Tensors keep no graph. ``run`` and ``velocity`` mean something else in a recording,
            and are written as ``run (column)`` and ``velocity (column)``.
        """
        self._step = self._counted(values.pop("step", None) if step is None else step)
        row: dict[str, Any] = {"step": self._step}
        if self._suite is not None:
            row |= self._sensed()
        for name, value in values.items():
            number = None if value is None else _number(value)
            if number is not None:
                row[f"{name} (column)" if name in _TAKEN else name] = number
            elif value is not None:
                warnings.warn(
                    f"{name} = {value!r:.60} at step {self._step} is no number, and was left out.", stacklevel=2
                )
        try:
            self._file.write(json.dumps(row, separators=(",", ":")) + "\n")
            self._file.flush()
        except OSError as error:
            if not self._failed:
                self._failed = True
                warnings.warn(
                    f"{self.path} cannot be written any more ({error.strerror}): rows from step {self._step} on may be "
                    "missing. Training goes on.",
                    stacklevel=2,
                )

    def _counted(self, step: Any) -> int:
        if step is None:
            return self._step + 1
        number = _number(step)
        if number is None or not 0 <= number <= LARGEST_STEP or number % 1:
            warnings.warn(
                f"step = {step!r:.60} is no whole number from 0 on: it is counted as {self._step + 1}.", stacklevel=3
            )
            return self._step + 1
        return int(number)

    def close(self) -> None:
        """Close the file and take the hooks off."""
        self._let_go()
        with suppress(OSError):  # of a full disk; it was told when it happened
            self._file.close()

    def _watch(self, model: nn.Module, optimizer: Any, size: int, seed: int) -> None:
        from kalmanguard.sensors.optimizer import OptimizerTap
        from kalmanguard.sensors.suite import SensorSuite

        given = () if optimizer is None else tuple(optimizer) if isinstance(optimizer, list | tuple) else (optimizer,)
        trained = [p for p in model.parameters() if p.requires_grad]
        self._tap = OptimizerTap(trained, given, protect=False, by_flag=False)
        self._suite = SensorSuite(model, self._tap, size=size, seed=seed)
        self._suite.interrupt()

    def _sensed(self) -> dict[str, Any]:
        m = self._suite.measure(self._step, None, costs=None, objective=0)
        row: dict[str, Any] = {}
        if m.learning_rates:
            row["learning_rate"] = max(m.learning_rates)
        if m.gradient_norm is not None:
            row["gradient_norm"] = m.gradient_norm
        if m.buffer_norm is not None:
            row["buffer_norm"] = m.buffer_norm
        if m.velocity is not None:
            row[VELOCITY] = m.velocity.tolist()
        return row

    def _let_go(self) -> None:
        if self._tap is not None:
            self._tap.close()
            self._tap = self._suite = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()


def _number(value: Any) -> float | None:
    try:
        number = float(value.detach() if hasattr(value, "detach") else value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
    except (TypeError, ValueError, RuntimeError):
        return None
    return number  # Python reads and writes NaN and Infinity in JSON, and so does the reader


def _cut_to_whole_lines(path: Path) -> None:
    """Take off what a killed writer left of its last line: what is appended would run into it."""
    with suppress(FileNotFoundError), open(path, "rb+") as file:
        data = file.read()
        file.truncate(data.rfind(b"\n") + 1)


def _last_step(path: Path) -> int:
    if not path.exists() or not path.stat().st_size:
        return 0
    return max((int(run.rows.steps[-1]) for run in read_runs(path, None).values()), default=0)
