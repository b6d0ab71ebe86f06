"""Evaluate a training batch again, on the present parameters or on others, without leaving a trace."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from kalmanguard.errors import ConfigurationError
from kalmanguard.sensors import losses as L
from kalmanguard.sensors.trace import random_streams_kept


class BatchLoss:
    """Mean loss of training batches, in the modes that the modules are in: as training computed it.

    Parameters
    ----------
    model
        The supervised model, not compiled.
    loss_fn
        ``loss_fn(output, target)``; inferred when ``None``, as for the probe.

    Notes
    -----
    Parameters, buffers (BatchNorm statistics included) and random streams are bitwise as before, and no gradient is
    touched; what a module keeps elsewhere is not put back. Dropout draws other masks than in training, but the same
    ones in every evaluation from one random state.
    Cost: one forward pass, copies of the buffers, and of the parameters where others are lent.
    """

    def __init__(self, model: nn.Module, loss_fn: L.LossFn | None = None) -> None:
        self._model: nn.Module = getattr(model, "_orig_mod", model)
        self._loss_fn = loss_fn

    def mean(self, batches: Sequence[Any], state: Mapping[str, Tensor] | None = None) -> float:
        """Mean loss over the examples of the batches.

        Parameters
        ----------
        batches
            Batches as the training loader yields them; moved to the model's device.
        state
            Parameters and buffers by name to evaluate on in place of the present ones.

        Raises
        ------
        ConfigurationError
            The loss cannot be inferred, or the state is not one of this model.
        """
        if not batches:
            raise ConfigurationError("There is no batch to evaluate.")
        device = next(self._model.parameters()).device
        lent = nullcontext() if state is None else state_lent(self._model, state)
        with torch.no_grad(), random_streams_kept(device), _buffers_kept(self._model), lent:
            total = examples = 0.0
            for batch in batches:
                size = L.batch_size(batch)
                total += float(self._loss(L.copied(batch, device), size)) * size
                examples += size
        return total / max(examples, 1.0)

    def _loss(self, batch: Any, size: int) -> Tensor:
        inputs, keywords, target = L.split_batch(batch)
        output = self._model(*inputs, **keywords)
        target = batch if target is None and isinstance(batch, Mapping) else target
        if self._loss_fn is not None:
            return self._loss_fn(output, target).mean()
        losses = L.per_example(output, target, None, size)
        return L.batch_mean(output, target, None) if losses is None else losses.mean()


@contextmanager
def state_lent(model: nn.Module, state: Mapping[str, Tensor]) -> Iterator[None]:
    """Give a model other parameters and buffers for a moment, in place; what it had comes back bit for bit.

    Raises
    ------
    ConfigurationError
        A name or a shape is not the model's; nothing was changed then.
    """
    live = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    missing = [name for name, own in live.items() if name not in state or state[name].shape != own.shape]
    if missing:
        raise ConfigurationError(f"The state does not fit the model: {', '.join(missing[:3])} is missing or differs.")
    # Through .data, so that neither autograd nor a version counter takes it for an edit.
    own = [tensor.data for tensor in live.values()]
    kept = [tensor.clone() for tensor in own]
    try:
        for tensor, name in zip(own, live, strict=True):
            tensor.copy_(state[name])
        yield
    finally:
        for tensor, value in zip(own, kept, strict=True):
            tensor.copy_(value)


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Put back the buffers that a forward pass in training mode changes, also those that it replaces."""
    owners = [(module, name, buffer) for module in model.modules() for name, buffer in module._buffers.items()]
    kept = [None if buffer is None else buffer.data.clone() for _, _, buffer in owners]
    try:
        yield
    finally:
        for (module, name, buffer), value in zip(owners, kept, strict=True):
            if buffer is not None and value is not None:
                buffer.data.copy_(value)
            if module._buffers.get(name) is not buffer:
                module._buffers[name] = buffer
