"""Which parameters are weight matrices, and how each is laid out: one row per output unit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

#: A matrix with fewer rows or columns than this has no spectrum worth watching.
MIN_SIDE = 4

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True, slots=True, eq=False)
class MatrixLayer:
    """A parameter and how it is read as a matrix ``(output units, inputs)``; the view is made anew each time.

    Attributes
    ----------
    name
        Name of the parameter in the model; of a tied one, its first.
    parameter
        The live parameter.
    read
        Makes the matrix of a tensor that is shaped like the parameter; a view wherever strides allow.
    is_embedding
        Whether its rows are looked up instead of multiplied with.
    """

    name: str
    parameter: nn.Parameter
    read: Callable[[Tensor], Tensor]
    is_embedding: bool = False

    def matrix(self) -> Tensor:
        """The present weights as a matrix, in their own dtype."""
        return self.read(self.parameter.detach())

    def write(self, matrix: Tensor) -> None:
        """Put a matrix that was read from the weights back into them, in place; call it without gradients."""
        shape = self.parameter.shape
        if self.read is _turned:
            self.parameter.copy_(matrix.reshape(shape[1], shape[0], *shape[2:]).transpose(0, 1))
        elif self.read is _transposed:
            self.parameter.copy_(matrix.t())
        else:
            self.parameter.copy_(matrix.reshape(shape))


def matrix_layers(model: nn.Module) -> tuple[MatrixLayer, ...]:
    """Find every parameter of two or more dimensions that can be read as a matrix of at least 4 x 4.

    Convolutions are flattened to ``(channels out, channels in x kernel)``; transposed ones and transformers'
    ``Conv1D``, which keep their outputs in the second dimension, are turned. Any other parameter of more than
    two dimensions is a stack of rows of its last one. Tied parameters count once. Left out are sparse, complex,
    integer, quantised and sharded parameters, and those on the meta device: none of them can be read in place.
    """
    found: dict[int, MatrixLayer] = {}
    for prefix, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            if id(parameter) in found or not _is_plain(parameter):
                continue
            read = _reader(module, parameter)
            rows, columns = read(parameter.detach()).shape
            if min(rows, columns) >= MIN_SIDE:
                name = f"{prefix}.{own}" if prefix else own
                is_embedding = isinstance(module, (nn.Embedding, nn.EmbeddingBag))
                found[id(parameter)] = MatrixLayer(name, parameter, read, is_embedding)
    return tuple(found.values())


def _is_plain(parameter: nn.Parameter) -> bool:
    data = parameter.data
    return (
        # Subclasses (DTensor, quantised weights) and uninitialised parameters answer to few of torch's functions.
        type(parameter) is nn.Parameter
        and type(data) is Tensor
        and data.layout is torch.strided
        and data.is_floating_point()
        and data.dim() >= 2
        and data.numel() > 0
        and data.device.type != "meta"
        and data.element_size() > 1
    )


def _reader(module: nn.Module, parameter: nn.Parameter) -> Callable[[Tensor], Tensor]:
    if isinstance(module, _TRANSPOSED) and parameter.dim() > 2:
        return _turned
    if isinstance(module, _CONVOLUTIONS):
        return _flattened
    # By its name, since transformers is not imported for it: y = x W + b with W of shape (inputs, outputs).
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf") and parameter.dim() == 2:
        return _transposed
    return _stacked


def _turned(weights: Tensor) -> Tensor:
    return weights.transpose(0, 1).flatten(1)


def _flattened(weights: Tensor) -> Tensor:
    return weights.flatten(1)


def _transposed(weights: Tensor) -> Tensor:
    return weights.t()


def _stacked(weights: Tensor) -> Tensor:
    return weights.reshape(-1, weights.shape[-1])
