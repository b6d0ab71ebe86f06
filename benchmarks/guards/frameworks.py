"""The rules that large training frameworks ship, each rewritten from its description."""

from __future__ import annotations

import math
import statistics
from collections import deque

from torch import Tensor

from benchmarks.guards.guard import Guard, gradient_norm
from kalmanguard.models import Plant


class SkipStep(Guard):
    """OLMo-core: a step is skipped when loss or gradient norm lies six deviations off its mean over 128 steps.

    Notes
    -----
    From the source: window 128, factor 6, the absolute z-score, the test from the 64th value on, and that every value
    enters the window, those of skipped steps too. So a value that is not finite skips all steps until it has left the
    window. Ours: nothing; the clipping to norm 1 that the framework's recipes add is left out.

    References
    ----------
    allenai/OLMo-core, ``src/olmo_core/optim/skip_step_optimizer.py``, class ``SkipStepOptimizer``.
    """

    _WINDOW, _FACTOR = 128, 6.0

    def __init__(self, plant: Plant) -> None:
        super().__init__(plant)
        self._seen = deque[float](maxlen=self._WINDOW), deque[float](maxlen=self._WINDOW)

    def admits(self, step: int, loss: Tensor) -> bool:
        now = float(loss.detach()), gradient_norm(self.plant)
        usual = [self._is_usual(value, seen) for value, seen in zip(now, self._seen, strict=True)]
        for value, seen in zip(now, self._seen, strict=True):
            seen.append(value)
        if not all(usual):
            self.note(step, "veto", None, f"loss {now[0]:.4g}, gradient norm {now[1]:.4g}")
        return all(usual)

    def _is_usual(self, value: float, seen: deque[float]) -> bool:
        if len(seen) + 1 < max(20, self._WINDOW // 2):
            return True
        if not (math.isfinite(value) and all(map(math.isfinite, seen))):
            return False
        deviation = statistics.stdev(seen)
        return abs(value - statistics.fmean(seen)) <= self._FACTOR * deviation


class RerunChecks(Guard):
    """Megatron-LM: a loss or gradient norm that is not finite ends the run; one ten times the usual maximum is logged.

    Notes
    -----
    From the source: the two checks, both factors of 10, the maximum over the first 100 values, which is then kept, and
    which check is fatal. The framework reruns a rejected step to tell hardware from software. Here every loss is a
    function of state and batch, and the faults are part of them, so that a rerun gives the same value again: the
    verdict is a reproducible result, which is fatal when not finite and only logged when large. Ours: that verdict,
    taken without the rerun.

    References
    ----------
    NVIDIA/Megatron-LM, ``megatron/core/rerun_state_machine.py``, ``validate_result`` and ``is_unexpectedly_large``;
    ``--check-for-spiky-loss`` and ``--check-for-large-grads``.
    """

    _FACTOR, _SAMPLES = 10.0, 100

    def __init__(self, plant: Plant) -> None:
        super().__init__(plant)
        self._largest = [0.0, 0.0]
        self._samples = [0, 0]
        self._fatal = False

    def admits(self, step: int, loss: Tensor) -> bool:
        for which, value in enumerate((float(loss.detach()), gradient_norm(self.plant))):
            name = ("loss", "gradient norm")[which]
            if not math.isfinite(value):
                self._fatal = True
                self.note(step, "halt", None, f"{name} is {value}")
                return False
            if self._samples[which] < self._SAMPLES:
                self._samples[which] += 1
                self._largest[which] = max(self._largest[which], abs(value))
            elif abs(value) >= self._FACTOR * self._largest[which]:
                self.note(step, "suspicion", None, f"{name} {value:.4g}, usually at most {self._largest[which]:.4g}")
        return True

    def after(self, step: int, loss: Tensor) -> bool:
        return not self._fatal


class KillLossSpike(Guard):
    """LLM-foundry: the run is ended when five losses in a row are twice the mean of a window, or half of it is high.

    Notes
    -----
    From the source: window 100 (its least), multiplier 2, patience 4, a cap of 10 that half of the window must exceed
    from the 200th step on, and that every loss enters the window. Its default only logs; ours: here it ends the run,
    which is its other mode, and single outliers below the patience are reported as suspicions.

    References
    ----------
    mosaicml/llm-foundry, ``llmfoundry/callbacks/kill_loss_spike_callback.py``.
    """

    _WINDOW, _MULTIPLIER, _PATIENCE, _CAP = 100, 2.0, 4, 10.0

    def __init__(self, plant: Plant) -> None:
        super().__init__(plant)
        self._seen = deque[float](maxlen=self._WINDOW)
        self._outliers = 0

    def after(self, step: int, loss: Tensor) -> bool:
        value = float(loss.detach())
        goes_on = True
        if len(self._seen) == self._WINDOW:
            goes_on = not (self._is_spike(step, value) or self._is_high(step))
        self._seen.append(value)
        return goes_on

    def _is_spike(self, step: int, value: float) -> bool:
        mean = math.fsum(self._seen) / len(self._seen) if all(map(math.isfinite, self._seen)) else math.nan
        if not value >= self._MULTIPLIER * mean:
            self._outliers = 0
            return False
        self._outliers += 1
        killed = self._outliers > self._PATIENCE
        text = f"loss {value:.4g}, mean {mean:.4g}, {self._outliers} in a row"
        self.note(step, "halt" if killed else "suspicion", None, text)
        return killed

    def _is_high(self, step: int) -> bool:
        high = sum(value > self._CAP for value in self._seen)
        if step < 2 * self._WINDOW or high < self._WINDOW / 2:
            return False
        self.note(step, "halt", None, f"{high} of {self._WINDOW} losses above {self._CAP:g}")
        return True
