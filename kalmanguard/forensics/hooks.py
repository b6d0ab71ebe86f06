"""Hooks that can be put on for one step, fail quietly, and stay behind when the model is copied or pickled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Hook:
    """A hook that never raises, does nothing while torch compiles, and returns nothing.

    Copied or pickled with its module it becomes one that does nothing: a copy of the model is not looked at.
    """

    def __init__(self, do: Callable[..., None], failed: Callable[[Exception], None]) -> None:
        self._do, self._failed = do, failed

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Do it."""
        if torch.compiler.is_compiling():
            return
        try:
            self._do(*args, **kwargs)
        except Exception as error:
            self._failed(error)

    def __reduce__(self) -> tuple[Any, ...]:
        return Hook, (nothing, nothing)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return Hook(nothing, nothing)


def nothing(*args: Any, **kwargs: Any) -> None:
    """Do nothing."""
