"""Several processes that train one model: what each has measured made one measurement, the same on every rank."""

from kalmanguard.distributed.replicas import Replicas

__all__ = ["Replicas"]
