"""How much each parameter matters: diagonal Fisher information, second moments, and the entropy of the gradient."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.optim import Optimizer

from kalmanguard.errors import ConfigurationError
from kalmanguard.sensors import losses as L
from kalmanguard.sensors.surface import LossSurface
from kalmanguard.sensors.trace import evaluation_mode, random_streams_kept


@dataclass(frozen=True, slots=True, eq=False)
class Importance:
    """Diagonal importance of every trainable parameter.

    Attributes
    ----------
    values
        By parameter name, in its shape, float32 or float64.
    examples
        Training examples that went into it.
    """

    values: dict[str, Tensor]
    examples: int

    def per_layer(self) -> dict[str, float]:
        """Mean importance of the parameters of each layer (the module that owns them)."""
        sums: dict[str, Tensor] = {}
        counts: dict[str, int] = defaultdict(int)
        for name, value in self.values.items():
            layer = name.rpartition(".")[0]
            sums[layer] = sums[layer] + value.sum() if layer in sums else value.sum()
            counts[layer] += value.numel()
        return {layer: float(total) / max(1, counts[layer]) for layer, total in sums.items()}


def fisher_importance(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    batches: Iterable[Any],
    *,
    exact: bool = False,
    evaluation: bool = True,
    chunk: int = 32,
) -> Importance:
    """Diagonal of the empirical Fisher information, streamed over batches.

    With ``exact`` it is ``mean_i g_i^2`` over the gradients of single examples. Otherwise it is the mean over batches
    of ``|B| g_B^2`` with the batch's mean gradient: the same in expectation where the mean gradient is zero, larger by
    ``(|B| - 1)`` times its square elsewhere, at the cost of ordinary training steps.

    Parameters
    ----------
    model, loss_fn, evaluation
        As for `LossSurface`; ``loss_fn`` is the negative log-likelihood, a mean over the batch.
    batches
        Batches ``(inputs, target)``; read once.
    exact
        Differentiate every example on its own, ``chunk`` at a time. The model must be one that `torch.func.vmap` can
        run: in evaluation mode, since BatchNorm mixes the examples of a batch in training.

    Raises
    ------
    ConfigurationError
        As `LossSurface`; no batch; or, with ``exact``, a model that cannot be run example by example.

    Notes
    -----
    *Empirical*: with the targets of the data in place of draws from the model, so it is no Fisher information proper
    where the model is wrong about the data. Guarantee: EXACT as the stated mean. Leaves no trace.

    References
    ----------
    Kunstner, Balles, Hennig, "Limitations of the empirical Fisher approximation for natural gradient descent", NeurIPS
    2019, equation 3.

    Examples
    --------
    >>> model = nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.ones_(model.weight)
    >>> x, y = torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1)
    >>> fisher_importance(model, nn.functional.mse_loss, [(x, y)], exact=True).values["weight"].item()  # (2^2 + 8^2)/2
    34.0
    """
    if exact and not evaluation:
        raise ConfigurationError("exact = True needs evaluation = True: in training, examples of a batch may mix.")
    if chunk < 1:
        raise ConfigurationError(f"chunk = {chunk} must be at least 1.")
    total: Tensor | None = None
    surface: LossSurface | None = None
    examples = 0
    for batch in batches:
        surface = LossSurface(model, loss_fn, [batch], evaluation=evaluation)
        size = L.batch_size(batch)
        squares = _squares(surface, loss_fn, batch, chunk) if exact else surface.gradient().square_().mul_(size * size)
        total = squares if total is None else total.add_(squares)
        examples += size
    if total is None or surface is None:
        raise ConfigurationError("There is no batch to measure the importance on.")
    pieces = surface.split(total / examples)
    return Importance(dict(zip(surface.names, pieces, strict=True)), examples)


def _squares(surface: LossSurface, loss_fn: Callable[[Any, Any], Tensor], batch: Any, chunk: int) -> Tensor:
    """Sum over the examples of their squared gradients, shape ``(size,)``."""
    batch = L.copied(batch, surface.device)
    inputs, keywords, target = L.split_batch(batch)
    if keywords or target is None or not all(isinstance(item, Tensor) for item in (*inputs, target)):
        raise ConfigurationError("exact = True takes batches (inputs, target) of tensors.")
    wide = torch.float32 if any(p.dtype in (torch.float16, torch.bfloat16) for p in surface.parameters) else None

    def widened(tensor: Tensor) -> Tensor:
        return tensor.to(wide) if wide is not None and tensor.is_floating_point() else tensor

    leaves = {name: widened(p.detach()) for name, p in zip(surface.names, surface.parameters, strict=True)}
    others = {name: widened(p.detach()) for name, p in surface.model.named_parameters() if not p.requires_grad}
    others |= {name: widened(b.detach().clone()) for name, b in surface.model.named_buffers()}

    def loss_of_one(state: Mapping[str, Tensor], one: tuple[Tensor, ...], wanted: Tensor) -> Tensor:
        output = functional_call(surface.model, {**others, **state}, tuple(item[None] for item in one))
        return loss_fn(output, wanted[None]).mean()

    gradient = vmap(grad(loss_of_one), in_dims=(None, 0, 0))
    total = torch.zeros(surface.size, dtype=surface.dtype, device=surface.device)
    with random_streams_kept(surface.device), evaluation_mode(surface.model), torch.enable_grad():
        for start in range(0, len(target), chunk):
            part = slice(start, start + chunk)
            try:
                found = gradient(leaves, tuple(widened(item[part]) for item in inputs), target[part])
            except RuntimeError as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                raise ConfigurationError(
                    f"The model cannot be run example by example ({error}); use exact = False."
                ) from error
            total += torch.cat([g.detach().square().sum(0).reshape(-1).to(total) for g in found.values()])
    return total


def second_moment_importance(optimizer: Optimizer) -> dict[Tensor, Tensor]:
    """Importance by parameter from an adaptive optimizer's second moments, normalised to mean 1 for each parameter.

    ``exp_avg_sq`` is a running mean of the squared gradients of batches, hence an estimate of the diagonal of the
    empirical Fisher information that costs nothing. Parameters without it are missing from the result.
    """
    found = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            moment = optimizer.state.get(p, {}).get("exp_avg_sq")
            if isinstance(moment, Tensor):
                found[p] = moment / moment.mean().clamp(min=1e-30)
    return found


@dataclass(frozen=True, slots=True)
class GradientEntropy:
    """How evenly the squared gradient is spread: 1 over all entries alike, 0 on a single one.

    Attributes
    ----------
    total
        Of all entries together; nan without a gradient that is finite and not zero.
    by_name
        Of each parameter for itself.
    """

    total: float
    by_name: dict[str, float]


@torch.no_grad()
def gradient_entropy(model: nn.Module) -> GradientEntropy:
    """Normalised entropy of the present gradients, ``-sum_i p_i ln p_i / ln n`` with ``p_i = g_i^2 / sum g^2``.

    Parameters
    ----------
    model
        With gradients, between ``backward()`` and ``zero_grad()``; parameters without one do not count. Tied ones count
        once.

    Notes
    -----
    Guarantee: EXACT as the stated number. Cost: three passes over the gradients and one copy to the host.

    Examples
    --------
    >>> model = nn.Linear(4, 1, bias=False)
    >>> model.weight.grad = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    >>> gradient_entropy(model).total
    1.0
    """
    names, rows, counts = [], [], []
    for name, p in model.named_parameters():
        if p.grad is None or not p.grad.is_floating_point():
            continue
        g = p.grad.coalesce().values() if p.grad.is_sparse else p.grad
        wide = g.double() if g.dtype is torch.float64 else g.float()
        if not wide.numel():
            continue
        largest = wide.abs().amax()
        squares = (wide / largest.clamp(min=torch.finfo(wide.dtype).tiny)).square_()
        rows.append(torch.stack([largest, squares.sum(), torch.special.entr(squares).sum()]))
        names.append(name)
        counts.append(p.numel())
    if not rows:
        return GradientEntropy(math.nan, {})
    widest = torch.float64 if any(row.dtype is torch.float64 for row in rows) else torch.float32
    table = torch.stack([row.to(rows[0].device, widest) for row in rows]).cpu().tolist()
    by_name = {
        name: _normalised(mass, spread, count)
        for name, (_, mass, spread), count in zip(names, table, counts, strict=True)
    }
    top = max(largest for largest, _, _ in table)
    if not (math.isfinite(top) and top > 0.0) or any(math.isnan(mass) for _, mass, _ in table):
        return GradientEntropy(math.nan, by_name)
    mass = spread = 0.0
    for largest, own, entropy in table:
        scale = (largest / top) ** 2
        if scale > 0.0:
            mass += scale * own
            # entr(c x) = c entr(x) - c x ln c
            spread += scale * entropy - scale * own * math.log(scale)
    return GradientEntropy(_normalised(mass, spread, sum(counts)), by_name)


def _normalised(mass: float, spread: float, count: int) -> float:
    """Entropy of shares ``x / mass`` from ``sum x`` and ``-sum x ln x``, over its greatest value."""
    if not (math.isfinite(mass) and mass > 0.0):
        return math.nan
    if count < 2:
        return 1.0
    return min(1.0, max(0.0, (math.log(mass) + spread / mass) / math.log(count)))
