"""What was decided, written to experiment trackers: TensorBoard, Weights & Biases, trackio."""

from __future__ import annotations

import math
import socket
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, runtime_checkable

from kalmanguard.engine import STATISTICS
from kalmanguard.errors import ConfigurationError
from kalmanguard.records import Action, Decision, Level

#: Statistics that are written, by their name there; what is not a number is left out.
_WRITTEN = {
    "y": "held_out_loss",
    "predicted": "predicted",
    "bound": "bound",
    "y_best": "best",
    "z_loss": "innovation/loss",
    "z_gradient": "innovation/gradient",
    "z_gain": "innovation/gain",
    "z_trajectory": "innovation/trajectory",
}
_AT = {STATISTICS.index(name): told for name, told in _WRITTEN.items()}
_LEVELS = {level: float(number) for number, level in enumerate(Level)}


@runtime_checkable
class Log(Protocol):
    """Something that takes decisions in, one for each step."""

    def add(self, decision: Decision) -> None:
        """Take one in; cheap."""

    def close(self) -> None:
        """Write what is left."""


def scalars(decision: Decision) -> dict[str, float]:
    """The numbers of a decision, by the names under which they are written.

    Examples
    --------
    >>> from kalmanguard.records import Mode
    >>> decision = Decision(7, Action.ACCEPT, Action.ACCEPT, Level.NOMINAL, Mode.WATCHING, "all is well")
    >>> sorted(scalars(decision))
    ['kalmanguard/action', 'kalmanguard/level']
    """
    found = {
        "kalmanguard/level": _LEVELS[decision.level],
        "kalmanguard/action": float(decision.action is not Action.ACCEPT),
    }
    for index, name in _AT.items():
        if index < len(decision.statistics) and math.isfinite(decision.statistics[index]):
            found[f"kalmanguard/{name}"] = float(decision.statistics[index])
    return found


class _Log(ABC):
    """Every ``every``-th decision, and all that are not nominal; a tracker that fails never stops training."""

    def __init__(self, every: int) -> None:
        if every < 1:
            raise ConfigurationError(f"every = {every}: at least every decision can be written; give a number from 1.")
        self._every, self._last, self._failed = every, 0, False
        self._undone: str | None = None

    def add(self, decision: Decision) -> None:
        """Write a decision, if it is due; one of a step that was written already is no news, but a rollback is."""
        notable = decision.level in (Level.SUSPECT, Level.CONFIRMED) or decision.action is not Action.ACCEPT
        between = decision.rolled_back and decision.step == self._last and decision.reason != self._undone
        due = decision.step > self._last and (notable or decision.step - self._last >= self._every)
        if self._failed or not (due or between):
            return
        self._last = decision.step
        self._undone = decision.reason if decision.rolled_back else None
        self._try(lambda: self._write(decision, decision.reason if notable else None))

    def close(self) -> None:
        """Write what is left."""
        self._try(self._finish)

    def _try(self, what: Callable[[], object]) -> None:
        try:
            what()
        except Exception as error:
            self._failed = True
            warnings.warn(
                f"{type(self).__name__} cannot write any more ({type(error).__name__}: {error}). Training goes on; the "
                "journal has everything.",
                stacklevel=4,
            )

    @abstractmethod
    def _write(self, decision: Decision, text: str | None) -> None:
        """Write one, with its sentence where it is not nominal."""

    @abstractmethod
    def _finish(self) -> None:
        """Write what is left."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()


class TensorBoardLog(_Log):
    """Event files for TensorBoard; needs the extra ``tensorboard``.

    Parameters
    ----------
    folder
        Where they go; beside those of the run itself, if you like.
    every
        Steps between two nominal decisions that are written.

    Raises
    ------
    ConfigurationError
        The package is not there, or ``every`` is below 1.

    Notes
    -----
    One record for each decision, with all of its scalars, written by a thread of its own.

    Examples
    --------
    >>> import tempfile
    >>> from kalmanguard.records import Mode
    >>> folder = tempfile.mkdtemp()
    >>> with TensorBoardLog(folder) as log:
    ...     log.add(Decision(7, Action.ACCEPT, Action.ACCEPT, Level.NOMINAL, Mode.WATCHING, "all is well"))
    >>> [".tfevents." in path.name for path in Path(folder).iterdir()]
    [True]
    """

    def __init__(self, folder: str | Path, *, every: int = 1) -> None:
        super().__init__(every)
        try:
            from tensorboard.compat.proto.event_pb2 import Event
            from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
            from tensorboard.compat.proto.tensor_pb2 import TensorProto
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError:
            raise ConfigurationError(
                "TensorBoardLog needs tensorboard: pip install 'kalmanguard[tensorboard]'."
            ) from None
        self._event, self._summary, self._tensor = Event, Summary, TensorProto
        self._is_text = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        self._writer = EventFileWriter(str(folder), filename_suffix=f".kalmanguard.{socket.gethostname()}")

    def _write(self, decision: Decision, text: str | None) -> None:
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in scalars(decision).items()]
        if text is not None:
            words = self._tensor(dtype="DT_STRING", string_val=[text.encode()])
            values.append(self._summary.Value(tag="kalmanguard/events", metadata=self._is_text, tensor=words))
        record = self._event(wall_time=time.time(), step=decision.step, summary=self._summary(value=values))
        self._writer.add_event(record)

    def _finish(self) -> None:
        self._writer.flush()  # not closed: a callback may go on to the next run


class TrackerLog(_Log):
    """A run of Weights & Biases (offline too) or of trackio: anything whose ``log`` takes a dict of numbers.

    Parameters
    ----------
    run
        What ``wandb.init`` or ``trackio.init`` has returned. It is not finished here: it is yours.
    every
        Steps between two nominal decisions that are written.

    Raises
    ------
    ConfigurationError
        The object has no ``log``, or ``every`` is below 1.

    Notes
    -----
    One call for each decision that is written. ``kalmanguard/step`` is its own axis, so your steps are not touched.

    Examples
    --------
    >>> from kalmanguard.records import Mode
    >>> class Run:
    ...     def log(self, numbers):
    ...         print(numbers["kalmanguard/step"], numbers["kalmanguard/level"])
    >>> log = TrackerLog(Run(), every=1)
    >>> log.add(Decision(7, Action.ACCEPT, Action.ACCEPT, Level.NOMINAL, Mode.WATCHING, "all is well"))
    7 1.0
    """

    def __init__(self, run: Any, *, every: int = 10) -> None:
        super().__init__(every)
        if not callable(getattr(run, "log", None)):
            raise ConfigurationError(
                f"A {type(run).__name__} has no log(); pass what wandb.init or trackio.init returned."
            )
        self._run = run
        if callable(define := getattr(run, "define_metric", None)):
            self._try(lambda: define("kalmanguard/*", step_metric="kalmanguard/step"))

    def _write(self, decision: Decision, text: str | None) -> None:
        told: dict[str, Any] = {"kalmanguard/step": decision.step, **scalars(decision)}
        if text is not None:
            told["kalmanguard/event"] = text
        self._run.log(told)

    def _finish(self) -> None:
        return  # every call was written at once
