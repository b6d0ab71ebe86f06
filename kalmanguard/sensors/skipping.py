"""Steps that a gradient scaler skips, one after the other, although its scale has become tiny."""

from __future__ import annotations

from typing import Any, final

#: Calls without a step after which the scale is read, and how often from then on: reading waits for an accelerator.
_FIRST, _EVERY = 16, 8
#: No scale below this one is needed by finite weights: what overflows even so is not finite.
_TINY = 2.0**-10


@final
class SkipWatch:
    """Tells when a scaler cannot find a scale any more: a weight is damaged, and no step will ever be taken again.

    A scaler halves its scale at every step whose gradient is not finite. At the beginning of training it may do so a
    dozen times. When the scale is below 2^-10 and there was still no step, the gradient is not finite at any scale.

    Parameters
    ----------
    scaler
        A ``GradScaler``, or ``None``, which never skips.

    Notes
    -----
    HEURISTIC. A fused optimizer skips by itself and counts as stepping, so its overflows are seen as gradients that
    are not finite. Cost: nothing while steps are taken.

    Examples
    --------
    >>> import torch
    >>> watch = SkipWatch(torch.amp.GradScaler("cpu", init_scale=2.0**-12))
    >>> watch._scaler._lazy_init_scale_growth_tracker(torch.device("cpu"))
    >>> [call for call in range(1, 60) if watch.is_stuck()]
    [16]
    """

    def __init__(self, scaler: Any | None) -> None:
        self._scaler = scaler
        self.calls = 0
        self._told = False

    def stepped(self) -> None:
        """A step was taken."""
        self.calls, self._told = 0, False

    def is_stuck(self) -> bool:
        """Take in a call without a step; true once, until the next step, when the scaler is stuck."""
        if self._scaler is None or self._told or not hasattr(self._scaler, "get_scale"):
            return False
        self.calls += 1
        if self.calls < _FIRST or self.calls % _EVERY:
            return False
        self._told = float(self._scaler.get_scale()) < _TINY
        return self._told
