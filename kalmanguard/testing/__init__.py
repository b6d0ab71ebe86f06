"""Assert in a test that a training is stable; `kalmanguard.pytest_plugin` has a fixture of the same name."""

from __future__ import annotations

from kalmanguard.testing.assertion import StabilityResult, assert_stable
from kalmanguard.testing.factory import standard_loop
from kalmanguard.testing.instability import InstabilityError
from kalmanguard.testing.trial import Trial

__all__ = ["InstabilityError", "StabilityResult", "Trial", "assert_stable", "standard_loop"]
