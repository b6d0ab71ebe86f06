"""The loss as a function of the trainable parameters, on fixed batches: values, gradients, Hessian-vector products."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from kalmanguard.errors import ConfigurationError
from kalmanguard.sensors import losses as L
from kalmanguard.sensors.trace import evaluation_mode, random_streams_kept

_HALF = (torch.float16, torch.bfloat16)


class LossSurface:
    """Mean loss of a model over fixed batches, as a function of one flat vector of its trainable parameters.

    Parameters
    ----------
    model
        The model; of a compiled or ``DistributedDataParallel`` one the original is evaluated. Frozen parameters stay
        constants, tied ones count once.
    loss_fn
        ``loss_fn(output, target)``, a mean over the batch.
    batches
        Batches ``(inputs, target)``, dicts or tensors; each counts by its number of examples.
    evaluation
        Evaluate in evaluation mode (BatchNorm with its running statistics, no dropout). Otherwise in the modes that the
        modules are in, with the same random draws every time.

    Raises
    ------
    ConfigurationError
        There is nothing to differentiate, no batch, or a parameter is complex, sharded or without values.

    Notes
    -----
    Works on views or copies of the parameters, so that values, gradients, buffers, modes and random streams of the
    model are bitwise as before. Models in half precision are evaluated in float32, with copies of parameters and
    buffers in that type. Attention uses its mathematical form and recurrent layers no cuDNN, since the fast kernels
    cannot be differentiated twice; sums may differ from training in the last digits. Other operations without a second
    derivative are refused when a product is asked for, but for custom ones marked ``once_differentiable``: torch leaves
    their part out without a word, and so does the product.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        batches: Sequence[Any],
        *,
        evaluation: bool = True,
    ) -> None:
        self.model: nn.Module = _original(model)
        self._loss_fn, self._evaluation = loss_fn, evaluation
        named = dict(self.model.named_parameters())
        self.names = [name for name, p in named.items() if p.requires_grad]
        if not self.names:
            raise ConfigurationError("The model has no trainable parameter, so its loss has no curvature to measure.")
        for name, p in named.items():
            if not p.is_floating_point() or p.is_meta or p.layout is not torch.strided or hasattr(p, "device_mesh"):
                raise ConfigurationError(
                    f"Parameter {name} ({p.dtype}, {p.device}) is complex, sharded or holds no values; curvature needs "
                    "plain real parameters on one machine."
                )
        self._half = any(p.dtype in _HALF for p in named.values())
        self.device = named[self.names[0]].device
        if not batches:
            raise ConfigurationError("There is no batch to evaluate the loss on.")
        self._batches = [self._widened(L.copied(batch, self.device)) for batch in batches]
        self._sizes = [L.batch_size(batch) for batch in batches]
        self.dtype = torch.float64 if any(p.dtype is torch.float64 for p in named.values()) else torch.float32
        self.size = sum(named[name].numel() for name in self.names)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The live trainable parameters, in the order of the flat vector."""
        named = dict(self.model.named_parameters())
        return [named[name] for name in self.names]

    def value(self, shift: Tensor | None = None) -> float:
        """Loss at the present parameters, moved by ``shift`` of shape ``(size,)`` where given."""
        with torch.no_grad():
            moved = self._leaves()
            if shift is not None:
                moved = [p + d for p, d in zip(moved, self.split(shift), strict=True)]
            total = 0.0
            for batch, weight in self._weighted():
                with self._prepared(differentiate=False):
                    total += weight * float(self._loss(moved, batch))
        return total

    def gradient(self) -> Tensor:
        """Gradient at the present parameters, shape ``(size,)``."""
        total = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        leaves = [p.requires_grad_() for p in self._leaves()]
        for batch, weight in self._weighted():
            with self._prepared():
                found = torch.autograd.grad(self._loss(leaves, batch), leaves, allow_unused=True)
            total.add_(self._flat(found, leaves), alpha=weight)
        return total

    def hessian_product(self, vector: Tensor) -> Tensor:
        """Product ``H v`` of the Hessian at the present parameters with a vector of shape ``(size,)``.

        Raises
        ------
        ConfigurationError
            Some operation of the model cannot be differentiated twice.
        """
        total = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        leaves = [p.requires_grad_() for p in self._leaves()]
        pieces = self.split(vector)
        for batch, weight in self._weighted():
            with self._prepared():
                try:
                    total.add_(self._flat(self._product(leaves, batch, pieces), leaves), alpha=weight)
                except (NotImplementedError, RuntimeError) as error:
                    if isinstance(error, torch.OutOfMemoryError):
                        raise
                    raise ConfigurationError(f"The loss cannot be differentiated twice: {error}") from error
        return total

    def split(self, vector: Tensor) -> list[Tensor]:
        """Pieces of a flat vector in the shapes of the parameters."""
        parameters = self.parameters
        pieces = torch.split(vector, [p.numel() for p in parameters])
        return [
            piece.view(p.shape).to(p.device, torch.float32 if p.dtype in _HALF else p.dtype)
            for piece, p in zip(pieces, parameters, strict=True)
        ]

    def _product(self, leaves: list[Tensor], batch: Any, pieces: list[Tensor]) -> Sequence[Tensor | None]:
        first = torch.autograd.grad(self._loss(leaves, batch), leaves, create_graph=True, allow_unused=True)
        # Where the loss is linear, the gradient is a constant, and the product zero.
        curved = [(g, v) for g, v in zip(first, pieces, strict=True) if g is not None and g.requires_grad]
        if not curved:
            return [None] * len(leaves)
        gradients, vectors = zip(*curved, strict=True)
        return torch.autograd.grad(gradients, leaves, vectors, allow_unused=True)

    def _leaves(self) -> list[Tensor]:
        return [p.detach().float() if p.dtype in _HALF else p.detach() for p in self.parameters]

    def _flat(self, tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> Tensor:
        parts = [
            torch.zeros(p.numel(), dtype=self.dtype, device=self.device)
            if t is None
            else t.detach().to_dense().reshape(-1).to(self.device, self.dtype)
            for t, p in zip(tensors, like, strict=True)
        ]
        return torch.cat(parts)

    def _weighted(self) -> Iterator[tuple[Any, float]]:
        whole = sum(self._sizes)
        for batch, size in zip(self._batches, self._sizes, strict=True):
            yield batch, size / whole

    def _loss(self, leaves: Sequence[Tensor], batch: Any) -> Tensor:
        inputs, keywords, target = L.split_batch(batch)
        # A forward pass in training mode writes into copies.
        state = {name: self._wide(b.detach().clone()) for name, b in self.model.named_buffers()}
        if self._half:
            state |= {name: self._wide(p.detach()) for name, p in self.model.named_parameters() if not p.requires_grad}
        state |= dict(zip(self.names, leaves, strict=True))
        output = functional_call(self.model, state, inputs, keywords)
        target = batch if target is None and isinstance(batch, Mapping) else target
        return self._loss_fn(output, target).mean()

    def _wide(self, tensor: Tensor) -> Tensor:
        return tensor.float() if self._half and tensor.dtype in _HALF else tensor

    def _widened(self, batch: Any) -> Any:
        if isinstance(batch, Mapping):
            return {k: self._widened(v) for k, v in batch.items()}
        if isinstance(batch, tuple):
            return tuple(self._widened(v) for v in batch)
        return self._wide(batch) if isinstance(batch, Tensor) else batch

    @contextmanager
    def _prepared(self, *, differentiate: bool = True) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(random_streams_kept(self.device))
            if self._evaluation:
                stack.enter_context(evaluation_mode(self.model))
            stack.enter_context(torch.set_grad_enabled(differentiate))
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if self.device.type == "cuda" and any(isinstance(m, nn.RNNBase) for m in self.model.modules()):
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            if any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in self.model.modules()):
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            yield


def _original(model: nn.Module) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"model is a {type(model).__name__}; pass the torch.nn.Module that is trained.")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    inner: nn.Module = getattr(model, "_orig_mod", model)
    return inner
