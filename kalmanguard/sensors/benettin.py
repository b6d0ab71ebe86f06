"""Benettin's exponent: a shadow run beside the training, on the same batches, pulled back to a fixed distance."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kalmanguard.errors import ConfigurationError


class Benettin(NamedTuple):
    """Largest Lyapunov exponent per step, its standard error over the stretches, and each stretch's exponent."""

    exponent: float
    standard_error: float
    stretches: tuple[float, ...]


def benettin(
    model: nn.Module,
    make_optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
    step_loss: Callable[[nn.Module, Any], Tensor],
    batches: Iterable[Any],
    *,
    distance: float = 1e-4,
    every: int = 10,
    seed: int = 0,
) -> Benettin:
    """Train two copies that start ``distance`` apart on the same batches, and measure how fast they part.

    Parameters
    ----------
    model
        Where both copies start; it is left as it is.
    make_optimizer
        Makes each copy's optimizer from its parameters.
    step_loss
        ``step_loss(model, batch)``, the training loss.
    batches
        Finite; what both copies see, in this order, with the same random draws.
    distance
        Relative distance of the copies after each renormalisation, in units of the parameters' norm: small, but far
        above rounding (1e-7 in float32).
    every
        Steps between renormalisations.
    seed
        Of the direction in which the shadow starts.

    Raises
    ------
    ConfigurationError
        A distance below a hundred roundings of the parameters' dtype, or fewer batches than one stretch.

    Notes
    -----
    ``lambda = mean ln(d / d_0) / every`` over the stretches after the first, in which the separation turns into the
    fastest direction. Optimizer states part with the parameters and are pulled back with them. Guarantee: ASYMPTOTIC
    for a stationary map; training drifts, so read the stretches too. A positive exponent is no failure. It doubles the
    cost of training and is meant for offline study. The global random state is left as it was.

    References
    ----------
    Benettin, Galgani, Giorgilli, Strelcyn, Meccanica 15 (1980).

    Examples
    --------
    Gradient descent at rate 0.1 on x^2 contracts by 0.8 a step; the exponent is ln 0.8 = -0.223.

    >>> class Square(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.x = nn.Parameter(torch.ones(1, dtype=torch.float64))
    >>> result = benettin(Square(), lambda p: torch.optim.SGD(p, lr=0.1), lambda m, _: (m.x**2).sum(), range(50))
    >>> round(result.exponent, 3)
    -0.223
    """
    pair = copy.deepcopy(model), copy.deepcopy(model)
    optimizers = tuple(make_optimizer([p for p in m.parameters() if p.requires_grad]) for m in pair)
    trained = tuple([p for p in m.parameters() if p.requires_grad and p.is_floating_point()] for m in pair)
    coarsest = max((torch.finfo(p.dtype).eps for p in trained[0]), default=0.0)
    if not trained[0] or not distance > 100.0 * coarsest:
        raise ConfigurationError(
            f"distance = {distance}: it must exceed {100.0 * coarsest:.1e}, a hundred roundings of the parameters' "
            "dtype; give a larger one, or a model in float64."
        )
    length = distance * math.sqrt(sum(float(p.detach().double().square().sum()) for p in trained[0]))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad(), torch.random.fork_rng():
        directions = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in trained[1]]
        norm = math.sqrt(sum(float(d.square().sum()) for d in directions))
        for p, direction in zip(trained[1], directions, strict=True):
            p.add_((direction * (length / norm)).to(p))
    stretches: list[float] = []
    count = 0
    with torch.random.fork_rng():
        for batch in batches:
            for turn, (copied, optimizer) in enumerate(zip(pair, optimizers, strict=True)):
                with torch.random.fork_rng(enabled=turn == 0):  # dropout draws the same for both
                    optimizer.zero_grad()
                    step_loss(copied, batch).backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
            count += 1
            if count % every == 0:
                apart = _distance(*trained)
                if not (math.isfinite(apart) and apart > 0.0):
                    stretches.append(-math.inf if apart == 0.0 else math.inf)
                    break
                stretches.append(math.log(apart / length) / every)
                _pull_back(optimizers, pair, trained, length / apart)
    if len(stretches) < 2:
        raise ConfigurationError(f"{count} batches are too few for two stretches of {every} steps; give more of them.")
    settled = stretches[1:]
    mean = math.fsum(settled) / len(settled)
    spread = math.fsum((s - mean) ** 2 for s in settled) if math.isfinite(mean) else math.nan
    n = len(settled)
    return Benettin(mean, math.sqrt(spread / max(n - 1, 1) / n), tuple(stretches))


def _distance(first: list[nn.Parameter], second: list[nn.Parameter]) -> float:
    total = sum(
        float((a.detach().double() - b.detach().double()).square().sum()) for a, b in zip(first, second, strict=True)
    )
    return math.sqrt(total)


@torch.no_grad()
def _pull_back(
    optimizers: tuple[Optimizer, ...],
    pair: tuple[nn.Module, nn.Module],
    trained: tuple[list[nn.Parameter], ...],
    share: float,
) -> None:
    """Shrink the difference of the whole states, buffers and moments included, to ``share`` of what it is."""
    for one, other in zip(pair[0].buffers(), pair[1].buffers(), strict=True):
        if one.is_floating_point():
            _shrink(one, other, share)
    for a, b in zip(*trained, strict=True):
        _shrink(a, b, share)
        for key, value in optimizers[0].state.get(a, {}).items():
            other = optimizers[1].state[b][key]
            if isinstance(value, Tensor) and value.is_floating_point() and value.shape == a.shape:
                _shrink(value, other, share)
                if key in ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"):
                    other.clamp_(min=0.0)


def _shrink(a: Tensor, b: Tensor, share: float) -> None:
    b.copy_((a.double() + share * (b.double() - a.double())).to(b))
