"""Several processes that train one model: what each has measured made one measurement, the same on every rank.

``durable`` keeps checkpoints of parameters that are shared out among them. It is imported by itself, for it needs
torch.distributed.checkpoint, which a process alone can do without.
"""

from kalmanguard.distributed.replicas import Replicas

__all__ = ["Replicas"]
