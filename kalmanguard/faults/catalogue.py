"""All kinds of faults by name, and the short notation of the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from kalmanguard.errors import ConfigurationError
from kalmanguard.faults.data import GarbageBatch, LabelNoise
from kalmanguard.faults.fault import Fault
from kalmanguard.faults.gradient import GradientScale, InfGradient, NaNGradient
from kalmanguard.faults.learning_rate import LearningRateCreep, LearningRateSpike
from kalmanguard.faults.state import BatchNormPoison, BitFlip, MomentsReset, MomentsZeroed, WeightScale

_KINDS: tuple[type[Fault], ...] = (
    NaNGradient,
    InfGradient,
    GradientScale,
    LearningRateSpike,
    LearningRateCreep,
    GarbageBatch,
    LabelNoise,
    BitFlip,
    MomentsZeroed,
    MomentsReset,
    WeightScale,
    BatchNormPoison,
)

#: Every kind of fault under its name.
CATALOGUE: Mapping[str, type[Fault]] = MappingProxyType({kind.kind: kind for kind in _KINDS})


def parse_fault(text: str) -> tuple[int, Fault]:
    """Read one fault and its step from the notation of the command line.

    ::

        KIND[:VALUE]@STEP[:NAME=VALUE]...

    ``VALUE`` is the kind's main number (``factor``, ``rate``, ``fraction``; the duration of a garbage batch or of
    a non-finite gradient; the target of a bit flip, ``which`` of moments). ``none`` stands for None: ``steps=none``
    lasts for good. A pattern may hold no ``:``.

    Parameters
    ----------
    text
        Such as ``nan_gradient@700``, ``lr_spike:50@500:steps=5``, ``label_noise:0.3@200``,
        ``bit_flip:second_moment@300:match=head``.

    Raises
    ------
    ConfigurationError
        The text does not follow the notation, or the fault refuses its numbers.

    Examples
    --------
    >>> step, fault = parse_fault("lr_spike:50@500:steps=5")
    >>> step, fault.describe()
    (500, 'lr_spike(factor=50.0, steps=5)')
    >>> parse_fault("bit_flop@3")
    Traceback (most recent call last):
    kalmanguard.errors.ConfigurationError: 'bit_flop@3': there is no fault 'bit_flop'; the kinds are nan_gradient, ...
    """
    head, at, tail = text.partition("@")
    name, has_value, value = head.partition(":")
    step, *pairs = tail.split(":")
    if name not in CATALOGUE:
        raise ConfigurationError(f"{text!r}: there is no fault {name!r}; the kinds are {', '.join(CATALOGUE)}.")
    if not at or not step.isdecimal():
        raise ConfigurationError(
            f"{text!r}: write KIND[:VALUE]@STEP[:NAME=VALUE]..., for example lr_spike:50@500:steps=5."
        )
    kind = CATALOGUE[name]
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    given: dict[str, object] = {}
    if has_value:
        if not fields:
            raise ConfigurationError(f"{text!r}: {name} takes no value.")
        main = next(iter(fields.values()))
        given[main.name] = _convert(text, main, value)
    for pair in pairs:
        key, equals, raw = pair.partition("=")
        if not equals or key not in fields:
            raise ConfigurationError(
                f"{text!r}: {pair!r} is not NAME=VALUE with a name that {name} knows ({', '.join(fields) or 'none'})."
            )
        if key in given:
            raise ConfigurationError(f"{text!r}: {key} is given twice.")
        given[key] = _convert(text, fields[key], raw)
    missing = [key for key, field in fields.items() if field.default is dataclasses.MISSING and key not in given]
    if missing:
        raise ConfigurationError(f"{text!r}: {name} needs its {missing[0]}, as in {name}:VALUE@{step}.")
    return int(step), kind(**given)


def _convert(text: str, field: dataclasses.Field[object], raw: str) -> object:
    kind = str(field.type)
    if "None" in kind and raw.lower() == "none":
        return None
    try:
        if kind.startswith("float"):
            return float(raw)
        if kind.startswith("int"):
            return int(raw)
    except ValueError:
        wanted = "a whole number" if kind.startswith("int") else "a number"
        raise ConfigurationError(f"{text!r}: {field.name} = {raw!r} is not {wanted}.") from None
    return raw
