"""What a sensor must have to be attached to a supervisor, and the guard around those that are."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Protocol, runtime_checkable

from kalmanguard.errors import ConfigurationError, KalmanguardError
from kalmanguard.records import Decision, Evidence, Guarantee, Measurement


@runtime_checkable
class Attachable(Protocol):
    """A sensor of one's own: asked once after every optimizer step, closed with the supervisor.

    `sense` returns what it found, mostly nothing; evidence that fired buys one held-out probe, never a rollback by
    itself. It must leave the training as it is, and is cheap when nothing is due. Three more methods are called where
    there are any: ``attach()`` when it is handed to the supervisor, to put hooks on; ``observe(measurement, decision)``
    after each step was decided; and ``forget()`` whenever parameters or optimizer were set from outside, by a rollback
    say, so that what it remembers no longer fits them.

    Examples
    --------
    >>> class LossTarget:
    ...     def sense(self, step): return ()
    ...     def close(self): pass
    >>> isinstance(LossTarget(), Attachable)
    True
    """

    def sense(self, step: int) -> tuple[Evidence, ...]:
        """Look at the present state, after step ``step``."""
        ...

    def close(self) -> None:
        """Take off all hooks."""
        ...


class Attached:
    """The sensors of one supervisor. One that raises is taken off and reported; training and the others go on."""

    def __init__(self, report: Callable[[str, BaseException], None]) -> None:
        self._report = report
        self._sensors: list[Attachable] = []
        #: Whether a sensor was ever attached, which all ranks know alike: one that raises is taken off on its own rank.
        self.expected = False
        self._closed = False

    def add(self, sensor: Attachable) -> None:
        """Ask ``sensor`` too from the next step on."""
        if isinstance(sensor, type) or not isinstance(sensor, Attachable):
            raise ConfigurationError(
                f"attach() was given a {type(sensor).__name__} without sense(step) and close(); see "
                "kalmanguard.sensors.attachable.Attachable."
            )
        if any(sensor is other for other in self._sensors):
            return
        if self._closed:
            raise ConfigurationError("The supervisor is closed; attach the sensor to a new one.")
        if callable(attach := getattr(sensor, "attach", None)):
            attach()
        self._sensors.append(sensor)
        self.expected = True

    def remove(self, sensor: Attachable) -> None:
        """Ask it no more, and close it."""
        self._sensors = [other for other in self._sensors if other is not sensor]
        try:
            sensor.close()
        except Exception as fault:
            self._report(f"{type(sensor).__name__} could not be closed: {type(fault).__name__}: {fault}", fault)

    def sense(self, step: int) -> tuple[Evidence, ...]:
        """Everything that the sensors have found at this step."""
        if not self._sensors:
            return ()
        found: list[Evidence] = []
        for sensor in tuple(self._sensors):
            try:
                found.extend(_checked(sensor, item) for item in sensor.sense(step))
            except Exception as fault:
                self._report(f"{type(sensor).__name__} failed and is off: {type(fault).__name__}: {fault}", fault)
                self.remove(sensor)
        return tuple(found)

    def observe(self, measurement: Measurement, decision: Decision) -> None:
        """Tell those that want to know what was measured and decided."""
        self._tell("observe", measurement, decision)

    def forget(self) -> None:
        """The state was set from outside."""
        self._tell("forget")

    def close(self) -> None:
        """Close all, whatever happens."""
        self._closed = True
        for sensor in tuple(self._sensors):
            with suppress(KalmanguardError):
                self.remove(sensor)

    def _tell(self, what: str, *about: object) -> None:
        for sensor in tuple(self._sensors):
            method = getattr(sensor, what, None)
            try:
                if callable(method):
                    method(*about)
            except Exception as fault:
                self._report(f"{type(sensor).__name__} failed and is off: {type(fault).__name__}: {fault}", fault)
                self.remove(sensor)


def _checked(sensor: Attachable, item: Evidence) -> Evidence:
    """The evidence with plain values, under the name of its sensor: the journal must be able to keep it."""
    if not isinstance(item, Evidence):
        raise TypeError(f"sense() returned a {type(item).__name__}, not Evidence")
    return Evidence(
        f"{type(sensor).__name__}.{item.detector}",
        float(item.statistic),
        bool(item.fired),
        Guarantee(item.guarantee),
        str(item.message),
        None if item.p_value is None else float(item.p_value),
        None if item.e_value is None else float(item.e_value),
    )
