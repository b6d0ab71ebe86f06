"""Exact copies of a training run's whole state, in memory and on disk.

Read ``state`` first: `TrainingState` captures into a ``slot``, restores in place and digests. ``ring`` holds the slots,
``disk`` writes checkpoints in the background. Beneath them, ``inventory`` finds the tensors, ``reading`` everything
else, ``restoring`` puts it back, and ``codec`` turns a state into JSON and tensors without ever pickling.
"""
