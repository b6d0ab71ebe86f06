"""The fluent notation: one method per kind of fault."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Self

from kalmanguard.faults.data import GarbageBatch, LabelNoise
from kalmanguard.faults.fault import Fault
from kalmanguard.faults.gradient import GradientScale, InfGradient, NaNGradient
from kalmanguard.faults.learning_rate import LearningRateCreep, LearningRateSpike
from kalmanguard.faults.moments import Which
from kalmanguard.faults.state import BatchNormPoison, BitFlip, MomentsReset, MomentsZeroed, Target, WeightScale


class Fluent(ABC):
    """Schedules faults at the step named last by ``at``; every method returns the injector."""

    @abstractmethod
    def add(self, fault: Fault) -> Self:
        """Schedule a fault, which may be of the user's own kind."""

    def nan_gradient(self, *, steps: int | None = 1, match: str | None = None) -> Self:
        """All matching gradients are nan."""
        return self.add(NaNGradient(steps=steps, match=match))

    def inf_gradient(self, *, steps: int | None = 1, match: str | None = None) -> Self:
        """All matching gradients are infinite."""
        return self.add(InfGradient(steps=steps, match=match))

    def gradient_scale(self, factor: float, *, steps: int | None = 1, match: str | None = None) -> Self:
        """All matching gradients are multiplied by ``factor``."""
        return self.add(GradientScale(factor, steps=steps, match=match))

    def lr_spike(self, factor: float, *, steps: int | None = 5) -> Self:
        """The learning rate is ``factor`` times too large for some steps."""
        return self.add(LearningRateSpike(factor, steps=steps))

    def lr_creep(self, rate: float = 1.03, *, steps: int | None = None) -> Self:
        """The learning rate grows by ``rate`` with every step, for good unless ``steps`` says how long."""
        return self.add(LearningRateCreep(rate, steps=steps))

    def garbage_batch(self, *, steps: int | None = 1) -> Self:
        """Random inputs with shuffled targets; needs `FaultInjector.batches`."""
        return self.add(GarbageBatch(steps=steps))

    def label_noise(self, fraction: float, *, steps: int | None = None) -> Self:
        """Targets are wrong with probability ``fraction``, for good by default; needs `FaultInjector.batches`."""
        return self.add(LabelNoise(fraction, steps=steps))

    def bit_flip(self, target: Target = "parameter", *, bit: int | None = None, match: str | None = None) -> Self:
        """One bit of one element flips, the highest of its exponent by default."""
        return self.add(BitFlip(target, bit=bit, match=match))

    def moments_zeroed(self, which: Which = "second") -> Self:
        """Optimizer moments become zero, while the step counter goes on."""
        return self.add(MomentsZeroed(which))

    def moments_reset(self) -> Self:
        """The optimizer forgets all its state."""
        return self.add(MomentsReset())

    def weight_scale(self, factor: float, *, match: str | None = None) -> Self:
        """All matching parameters are multiplied by ``factor``."""
        return self.add(WeightScale(factor, match=match))

    def batchnorm_poison(self, factor: float) -> Self:
        """BatchNorm's running statistics are multiplied by ``factor``."""
        return self.add(BatchNormPoison(factor))
