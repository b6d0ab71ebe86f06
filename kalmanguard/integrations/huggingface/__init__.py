"""Hugging Face Trainer: supervision and regulation as callbacks. Needs ``pip install 'kalmanguard[huggingface]'``."""

from __future__ import annotations

from kalmanguard.errors import ConfigurationError

try:
    import accelerate  # noqa: F401
    import transformers  # noqa: F401
except ImportError as error:
    raise ConfigurationError(
        "kalmanguard.integrations.huggingface needs transformers and accelerate, which cannot be imported "
        f"({error}); install them with: pip install 'kalmanguard[huggingface]'."
    ) from error

from kalmanguard.integrations.huggingface.callback import KalmanGuardCallback
from kalmanguard.integrations.huggingface.thermostat import SpectralThermostatCallback

__all__ = ["KalmanGuardCallback", "SpectralThermostatCallback"]
