"""Curvature of the loss: trace of the Hessian, sharpness, and how near the learning rate is to what it can bear."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from kalmanguard.errors import ConfigurationError
from kalmanguard.sensors.surface import LossSurface


class TraceEstimate(NamedTuple):
    """Trace of the Hessian, its standard error over the random vectors, and how many there were."""

    value: float
    standard_error: float
    samples: int


class Eigenvalues(NamedTuple):
    """Ends of a spectrum: ``highest`` and ``lowest`` Ritz value, each with the norm of its residual.

    An eigenvalue lies within ``residual`` of ``highest``; that it is the largest is likely, not certain. A Ritz value
    never lies outside the spectrum (up to rounding), so ``highest`` errs downwards.
    """

    highest: float
    residual: float
    lowest: float
    lowest_residual: float
    iterations: int


@dataclass(frozen=True, slots=True)
class Sharpness:
    """Sharpness, and what it means for the learning rate.

    Attributes
    ----------
    value
        Largest eigenvalue of the Hessian.
    residual
        How far that may be from an eigenvalue.
    effective
        Largest eigenvalue of ``eta P^-1 H``, with the learning rate and the optimizer's preconditioner; ``None``
        without an optimizer, or before an Adam has taken a step.
    edge
        Value of ``effective`` from which a quadratic diverges: 2 for plain gradient descent, ``2 (1 + beta)`` with
        momentum, 38 for Adam with ``beta_1 = 0.9``.
    ratio
        ``effective / edge``: 1 is the edge of stability.
    """

    value: float
    residual: float
    effective: float | None = None
    edge: float | None = None
    ratio: float | None = None


def hessian_trace(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    batch: Any,
    *,
    samples: int = 16,
    seed: int = 0,
    evaluation: bool = True,
) -> TraceEstimate:
    """Estimate the trace of the Hessian as the mean of ``v^T H v`` over random signs ``v``.

    Parameters
    ----------
    model, loss_fn, evaluation
        As for `LossSurface`.
    batch
        One batch, or a list of several.
    samples
        Number of random vectors, at least 2; each costs one Hessian-vector product, about two backward passes more
        than a training step.
    seed
        Of the random vectors; no global random stream is used.

    Raises
    ------
    ConfigurationError
        As `LossSurface` and its products; or fewer than two samples.

    Notes
    -----
    Guarantee: unbiased (EXACT in expectation); the standard error is ASYMPTOTIC in the number of samples.

    References
    ----------
    Hutchinson, "A stochastic estimator of the trace of the influence matrix for Laplacian smoothing splines",
    Communications in Statistics 18 (1989), 1059-1076.

    Examples
    --------
    >>> model = nn.Linear(2, 1, bias=False)
    >>> x, y = torch.eye(2), torch.zeros(2, 1)
    >>> hessian_trace(model, nn.functional.mse_loss, (x, y), samples=4)  # diagonal: every sample is the trace
    TraceEstimate(value=2.0, standard_error=0.0, samples=4)
    """
    if samples < 2:
        raise ConfigurationError(f"samples = {samples}: a standard error needs at least 2 random vectors.")
    surface = surface_of(model, loss_fn, batch, evaluation)
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(samples):
        v = _signs(surface, generator)
        found.append(float(torch.dot(v, surface.hessian_product(v))))
    values = np.array(found)
    return TraceEstimate(float(values.mean()), float(values.std(ddof=1)) / math.sqrt(samples), samples)


def extreme_eigenvalues(
    surface: LossSurface,
    *,
    iterations: int = 30,
    tolerance: float = 1e-2,
    seed: int = 0,
    scale: Tensor | None = None,
    decay: Tensor | None = None,
) -> Eigenvalues:
    """Ends of the spectrum of ``D (H + W) D`` by the Lanczos method, which keeps three vectors only.

    Parameters
    ----------
    surface
        The loss.
    iterations
        Most Hessian-vector products.
    tolerance
        It ends when the residual of the highest value is below this share of it.
    seed
        Of the first vector.
    scale, decay
        Diagonals of D and W, shape ``(size,)``; identity and zero by default.

    Notes
    -----
    Without reorthogonalisation, rounding makes copies of eigenvalues that have converged; the ends of the spectrum are
    as good as with it (Paige 1980, "Accuracy and effectiveness of the Lanczos algorithm for the symmetric
    eigenproblem"). A value that is not finite ends it with nan.
    """
    if iterations < 1:
        raise ConfigurationError(f"iterations = {iterations}: at least one is needed.")
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(surface.size, generator=generator, dtype=torch.float64).to(surface.device, surface.dtype)
    q /= q.norm()
    before, beta = torch.zeros_like(q), 0.0
    diagonal: list[float] = []
    off: list[float] = []
    result = Eigenvalues(math.nan, math.nan, math.nan, math.nan, 0)
    for count in range(1, min(iterations, surface.size) + 1):
        v = q if scale is None else scale * q
        w = surface.hessian_product(v)
        if decay is not None:
            w += decay * v
        w = w if scale is None else scale * w
        alpha = float(torch.dot(q, w))
        w -= alpha * q + beta * before
        beta = float(w.norm())
        if not math.isfinite(alpha) or not math.isfinite(beta):
            return Eigenvalues(math.nan, math.nan, math.nan, math.nan, count)
        diagonal.append(alpha)
        result = _ritz(diagonal, off, beta)
        # An invariant subspace: nothing is left to find in it.
        if beta <= 1e-6 * max(abs(result.highest), abs(result.lowest)):
            break
        if count > 1 and result.residual <= tolerance * abs(result.highest):
            break
        off.append(beta)
        before, q = q, w / beta
    return result


def _ritz(diagonal: list[float], off: list[float], beta: float) -> Eigenvalues:
    matrix = np.diag(diagonal) + np.diag(off, 1) + np.diag(off, -1)
    values, vectors = np.linalg.eigh(matrix)
    ends = np.abs(vectors[-1]) * beta
    return Eigenvalues(float(values[-1]), float(ends[-1]), float(values[0]), float(ends[0]), len(diagonal))


def sharpness(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    batch: Any,
    *,
    optimizer: Optimizer | None = None,
    iterations: int = 30,
    tolerance: float = 1e-2,
    seed: int = 0,
    evaluation: bool = True,
) -> Sharpness:
    """Largest eigenvalue of the Hessian, and how near an optimizer's learning rate is to the edge of stability.

    Parameters
    ----------
    model, loss_fn, evaluation
        As for `LossSurface`.
    batch
        One batch, or a list of several: the more examples, the nearer to the sharpness of the whole training loss. That
        of a small batch lies above it.
    optimizer
        SGD, Adam or AdamW, with its present learning rates and moments.
    iterations, tolerance, seed
        As for `extreme_eigenvalues`.

    Raises
    ------
    ConfigurationError
        As `LossSurface` and its products; an optimizer of another kind, or one that does not hold all trainable
        parameters.

    Notes
    -----
    Guarantee: EXACT up to ``residual`` as an eigenvalue of this batch's Hessian. What it says about stability is
    HEURISTIC: full-batch training settles at ratio 1 by itself and is healthy there; small batches keep it below.
    Cost: up to ``iterations`` Hessian-vector products, twice that for Adam.

    References
    ----------
    Cohen et al., "Gradient descent on neural networks typically occurs at the edge of stability", ICLR 2021; "Adaptive
    gradient methods at the edge of stability", arXiv 2207.14484, section 2 (``38 / eta``).

    Examples
    --------
    >>> model = nn.Linear(2, 1, bias=False)
    >>> x, y = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.zeros(2, 1)
    >>> found = sharpness(model, nn.functional.mse_loss, (x, y), optimizer=SGD(model.parameters(), lr=0.25))
    >>> round(found.value, 3), round(found.ratio, 3)  # the Hessian is diag(4, 1)
    (4.0, 0.5)
    """
    surface = surface_of(model, loss_fn, batch, evaluation)
    plain = extreme_eigenvalues(surface, iterations=iterations, tolerance=tolerance, seed=seed)
    step = None if optimizer is None else StepScale.of(surface, optimizer)
    if step is None:
        return Sharpness(plain.highest, plain.residual)
    if step.uniform:
        effective = step.rate * (plain.highest + step.weight_decay)
    else:
        scaled = extreme_eigenvalues(
            surface, iterations=iterations, tolerance=tolerance, seed=seed, scale=step.scale, decay=step.decay
        )
        effective = scaled.highest
    return Sharpness(plain.highest, plain.residual, effective, step.edge, effective / step.edge)


@dataclass(frozen=True, slots=True, eq=False)
class StepScale:
    """What an optimizer makes of a gradient: ``eta P^-1`` as the square of ``scale``, coupled weight decay, the edge.

    Attributes
    ----------
    scale, decay
        Flat vectors, shape ``(size,)``.
    edge
        Largest stable eigenvalue of ``scale (H + decay) scale``: of several param groups the least.
    uniform, rate, weight_decay
        Whether one number each serves for all parameters, and those numbers.
    """

    scale: Tensor
    decay: Tensor
    edge: float
    uniform: bool
    rate: float
    weight_decay: float

    @classmethod
    def of(cls, surface: LossSurface, optimizer: Optimizer, *, floor_frac: float = 0.0) -> StepScale | None:
        """Read an optimizer; ``None`` where an Adam has not taken a step yet.

        With ``floor_frac`` no entry of Adam's denominator counts as less than this share of the root mean square of its
        parameter's: entries that hardly ever see a gradient (rare tokens) then do not decide what the largest
        eigenvalue is.

        Raises
        ------
        ConfigurationError
            Another kind of optimizer, one that maximises, or one that does not hold all trainable parameters.
        """
        require_known(optimizer)
        rates: dict[int, Tensor | float] = {}
        decays: dict[int, float] = {}
        edges = []
        for group in optimizer.param_groups:
            if group["maximize"]:
                raise ConfigurationError("The optimizer maximises, so its learning rate has no edge of stability.")
            adam = isinstance(optimizer, Adam | AdamW)
            edges.append(_adam_edge(group) if adam else _sgd_edge(group))
            coupled = not (isinstance(optimizer, AdamW) or group.get("decoupled_weight_decay", False))
            for p in group["params"]:
                rate = _adam_rate(optimizer, group, p, floor_frac) if adam else _sgd_rate(group)
                if rate is None:
                    if p.requires_grad:
                        return None
                    continue
                rates[id(p)], decays[id(p)] = rate, float(group["weight_decay"]) if coupled else 0.0
        parameters = surface.parameters
        if any(id(p) not in rates for p in parameters):
            raise ConfigurationError(
                "The optimizer does not hold every trainable parameter of the model; pass its own."
            )
        chosen = [rates[id(p)] for p in parameters]
        numbers = {rate for rate in chosen if not isinstance(rate, Tensor)}
        kinds = {decays[id(p)] for p in parameters}
        uniform = len(numbers) == 1 and len(kinds) == 1 and not any(isinstance(rate, Tensor) for rate in chosen)
        whole = [_spread(decays[id(p)], p, surface) for p in parameters]
        flat = [_spread(rate, p, surface) for p, rate in zip(parameters, chosen, strict=True)]
        return cls(
            torch.cat(flat).sqrt(), torch.cat(whole), min(edges), uniform, numbers.pop() if uniform else math.nan,
            kinds.pop() if uniform else math.nan,
        )  # fmt: skip


def _spread(value: Tensor | float, p: Tensor, surface: LossSurface) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().reshape(-1).to(surface.device, surface.dtype)
    return torch.full((p.numel(),), value, dtype=surface.dtype, device=surface.device)


def require_known(optimizer: Optimizer) -> None:
    """Refuse an optimizer whose edge of stability is not known."""
    if not isinstance(optimizer, SGD | Adam | AdamW):
        raise ConfigurationError(
            f"The edge of stability of {type(optimizer).__name__} is not known here; it is for SGD, Adam and AdamW."
        )


def _sgd_rate(group: dict[str, Any]) -> float:
    damped = 1.0 - float(group["dampening"]) if group["momentum"] else 1.0
    return float(group["lr"]) * damped


def _sgd_edge(group: dict[str, Any]) -> float:
    beta = float(group["momentum"])
    return 2.0 * (1.0 + beta) / (1.0 + 2.0 * beta if group["nesterov"] else 1.0)


def _adam_rate(optimizer: Optimizer, group: dict[str, Any], p: Tensor, floor_frac: float) -> Tensor | None:
    state = optimizer.state.get(p, {})
    moment = state.get("max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq")
    if moment is None:
        return None
    correction = 1.0 - float(group["betas"][1]) ** float(state["step"])
    wide = moment if moment.dtype is torch.float64 else moment.float()
    deviation = (wide / correction).sqrt()
    if floor_frac:
        deviation = deviation.clamp(min=floor_frac * deviation.square().mean().sqrt())
    rate: Tensor = float(group["lr"]) / (deviation + float(group["eps"]))
    return rate


def _adam_edge(group: dict[str, Any]) -> float:
    beta = float(group["betas"][0])
    return 2.0 * (1.0 + beta) / (1.0 - beta)


def surface_of(model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], batch: Any, evaluation: bool) -> LossSurface:
    """The loss on one batch, or on a list of several (a list that holds tensors only is a batch)."""
    several = isinstance(batch, list) and not any(isinstance(item, Tensor) for item in batch)
    return LossSurface(model, loss_fn, batch if several else [batch], evaluation=evaluation)


def _signs(surface: LossSurface, generator: torch.Generator) -> Tensor:
    signs = torch.randint(2, (surface.size,), generator=generator, dtype=torch.int8)
    return signs.to(surface.device, surface.dtype).mul_(2).sub_(1)
