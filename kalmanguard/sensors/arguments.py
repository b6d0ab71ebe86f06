"""Arguments that several sensors take, checked in one place."""

from __future__ import annotations

from torch import nn

from kalmanguard.errors import ConfigurationError
from kalmanguard.sensors.shards import is_sharded


def checked_model(model: object) -> nn.Module:
    """The model, if it is one.

    Raises
    ------
    ConfigurationError
        It is something else.

    Examples
    --------
    >>> checked_model("resnet")
    Traceback (most recent call last):
    kalmanguard.errors.ConfigurationError: model is a str; pass the torch.nn.Module that is trained.
    """
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"model is a {type(model).__name__}; pass the torch.nn.Module that is trained.")
    return model


def whole_model(model: object) -> nn.Module:
    """The model, if this process holds all of it.

    Raises
    ------
    ConfigurationError
        It is something else, or its parameters are sharded over processes.
    """
    known = checked_model(model)
    sharded = next((name for name, p in known.named_parameters() if is_sharded(p)), None)
    if sharded is not None:
        raise ConfigurationError(
            f"The parameter {sharded!r} is sharded over processes, and this reads whole parameters; the Supervisor "
            "itself does without them."
        )
    return known


def checked_count(name: str, value: object, least: int = 1) -> int:
    """The value, if it is a whole number of at least ``least``.

    Raises
    ------
    ConfigurationError
        It is not.

    Examples
    --------
    >>> checked_count("every", 2.5)
    Traceback (most recent call last):
    kalmanguard.errors.ConfigurationError: every = 2.5: it is a whole number of at least 1.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigurationError(f"{name} = {value!r}: it is a whole number of at least {least}.")
    return value
