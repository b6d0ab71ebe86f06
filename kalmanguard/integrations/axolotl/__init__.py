"""The supervisor as a plugin of Axolotl, configured in its YAML file."""

from kalmanguard.integrations.axolotl.arguments import KalmanGuardArgs
from kalmanguard.integrations.axolotl.plugin import KalmanGuardPlugin

__all__ = ["KalmanGuardArgs", "KalmanGuardPlugin"]
