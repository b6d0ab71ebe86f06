"""A catalogue of training faults and a seeded injector that brings them into any PyTorch loop."""

from __future__ import annotations

from kalmanguard.faults.attachment import Appointment
from kalmanguard.faults.batch import FaultyBatches
from kalmanguard.faults.catalogue import CATALOGUE, parse_fault
from kalmanguard.faults.data import GarbageBatch, LabelNoise
from kalmanguard.faults.fault import DataFault, Fault, FaultRecord, GradientFault, LearningRateFault, StateFault
from kalmanguard.faults.gradient import GradientScale, InfGradient, NaNGradient
from kalmanguard.faults.injector import FaultInjector
from kalmanguard.faults.learning_rate import LearningRateCreep, LearningRateSpike
from kalmanguard.faults.state import BatchNormPoison, BitFlip, MomentsReset, MomentsZeroed, WeightScale

__all__ = [
    "CATALOGUE",
    "Appointment",
    "BatchNormPoison",
    "BitFlip",
    "DataFault",
    "Fault",
    "FaultInjector",
    "FaultRecord",
    "FaultyBatches",
    "GarbageBatch",
    "GradientFault",
    "GradientScale",
    "InfGradient",
    "LabelNoise",
    "LearningRateCreep",
    "LearningRateFault",
    "LearningRateSpike",
    "MomentsReset",
    "MomentsZeroed",
    "NaNGradient",
    "StateFault",
    "WeightScale",
    "parse_fault",
]
