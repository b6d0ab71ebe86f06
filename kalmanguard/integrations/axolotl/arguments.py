"""What Axolotl's YAML file may say about supervision."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, field_validator

from kalmanguard.settings import Settings

#: Keys of the section that are no settings of the supervisor.
OWN = ("run_dir", "keep")


class KalmanGuardArgs(BaseModel):
    """The section ``kalmanguard``: settings of the supervisor by name, a ``preset`` among them, and ``run_dir``.

    Examples
    --------
    >>> KalmanGuardArgs(kalmanguard={"preset": "conservative", "run_dir": "runs/a"}).kalmanguard["preset"]
    'conservative'
    """

    kalmanguard: dict[str, Any] | None = None

    @field_validator("kalmanguard")
    @classmethod
    def _can_be(cls, section: dict[str, Any] | None) -> dict[str, Any] | None:
        if section is not None:
            settings_of(section)
        return section


def settings_of(section: dict[str, Any]) -> Settings:
    """The settings that a section asks for.

    Raises
    ------
    ConfigurationError
        A name does not exist, or a value is out of range.
    """
    return Settings.of({name: value for name, value in section.items() if name not in OWN})
