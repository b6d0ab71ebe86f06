"""Pytest fixture ``assert_stable``; nothing but this file is loaded until a test asks for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from kalmanguard.testing import StabilityResult


@pytest.fixture(name="assert_stable")
def _assert_stable() -> Callable[..., StabilityResult]:
    """`kalmanguard.testing.assert_stable`: assert that a short training is stable."""
    from kalmanguard.testing import assert_stable

    return assert_stable
