"""Per-example losses of a batch: inferred where that is unambiguous, else the user's own function."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kalmanguard.errors import ConfigurationError

LossFn = Callable[[Any, Any], Tensor]

_TARGET_KEYS = ("labels", "label", "targets", "target", "y")
_INPUT_KEYS = ("inputs", "input", "x", "input_ids", "pixel_values", "image", "images")
_IGNORE = -100
_HELP = "pass loss_fn=..., a function loss_fn(output, target) that returns one loss per example or their mean"


def split_batch(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Split a batch into positional inputs, keyword inputs and target (``None`` when it holds none).

    ``(x, y)`` and ``(x1, x2, y)``: the last is the target. A dict is passed by keyword, with the labels, when it looks
    like a Hugging Face batch; otherwise its input goes in by position. A lone tensor is its own input.
    """
    if isinstance(batch, Tensor):
        return (batch,), {}, None
    if isinstance(batch, Mapping):
        target = next((batch[k] for k in _TARGET_KEYS if k in batch), None)
        names = [k for k in batch if k not in _TARGET_KEYS]
        if len(names) == 1 and names[0] in _INPUT_KEYS and "input_ids" not in batch and "pixel_values" not in batch:
            return (batch[names[0]],), {}, target
        return (), dict(batch), target
    if isinstance(batch, list | tuple) and len(batch) >= 2:
        return tuple(batch[:-1]), {}, batch[-1]
    if isinstance(batch, list | tuple) and len(batch) == 1:
        return (batch[0],), {}, None
    raise ConfigurationError(
        f"The probe loader yields {type(batch).__name__}; it must yield (inputs, target), a dict or a tensor."
    )


def batch_size(batch: Any) -> int:
    """Number of examples of a batch: the first dimension of its first tensor."""
    for item in (
        batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else (batch,)
    ):
        if isinstance(item, Tensor) and item.ndim:
            return int(item.shape[0])
    raise ConfigurationError(
        f"A batch of the probe loader, a {type(batch).__name__}, holds no tensor with a batch dimension; it must be "
        "(inputs, target), a dict or a tensor, with the examples along the first dimension."
    )


def take(batch: Any, count: int, start: int = 0) -> Any:
    """Examples ``start`` to ``start + count`` of a batch."""
    whole = batch_size(batch)

    def cut(item: Any) -> Any:
        return item[start : start + count] if isinstance(item, Tensor) and item.ndim and len(item) == whole else item

    return _map(batch, cut)


def copied(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors copied to ``device``: a loader may use its buffers again."""
    return _map(batch, lambda item: item.detach().to(device, copy=True) if isinstance(item, Tensor) else item)


def _map(batch: Any, f: Callable[[Any], Any]) -> Any:
    if isinstance(batch, Mapping):
        return {k: f(v) for k, v in batch.items()}
    if isinstance(batch, list | tuple):
        return tuple(f(v) for v in batch)
    return f(batch)


def per_example(output: Any, target: Any, loss_fn: LossFn | None, size: int) -> Tensor | None:
    """Losses of one batch, shape ``(size,)``; ``None`` when only a mean over the batch is to be had.

    Raises
    ------
    ConfigurationError
        The loss cannot be inferred; the message says which argument to pass.
    """
    if loss_fn is not None:
        return _by_user(output, target, loss_fn, size)
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(loss, Tensor):
        if loss.shape == (size,):
            return loss
        return _matching(logits, target, loss) if isinstance(logits, Tensor) and isinstance(target, Tensor) else None
    values = logits if isinstance(logits, Tensor) else output
    if not isinstance(values, Tensor):
        raise ConfigurationError(f"The model returns {type(output).__name__} without a .loss; {_HELP}.")
    if not isinstance(target, Tensor):
        raise ConfigurationError(f"The probe batches hold no target tensor; {_HELP}.")
    return _inferred(values, target)


def _inferred(values: Tensor, target: Tensor) -> Tensor:
    if not target.is_floating_point() and not target.is_complex() and target.dtype is not torch.bool:
        classes_last = values.ndim == target.ndim + 1 and values.shape[:-1] == target.shape and target.ndim >= 1
        classes_first = target.ndim >= 2 and values.shape[:1] + values.shape[2:] == target.shape
        # As many classes as positions: (B, T, V) and (B, C, L) cannot be told apart.
        if classes_last != classes_first:
            return _cross_entropy(values if classes_last else values.movedim(1, -1), target)
    if target.is_floating_point() and values.shape == target.shape and target.ndim >= 1:
        return (values.float() - target.float()).square().reshape(len(target), -1).mean(1)
    raise ConfigurationError(
        f"The probe's loss cannot be inferred from an output of shape {tuple(values.shape)} and a {target.dtype} "
        f"target of shape {tuple(target.shape)}; {_HELP}."
    )


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    losses = F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]).float(), target.reshape(-1).long(), reduction="none", ignore_index=_IGNORE
    ).view(len(target), -1)
    counted = (target.reshape(len(target), -1) != _IGNORE).sum(1).clamp(min=1)
    return losses.sum(1) / counted


def _matching(logits: Tensor, target: Tensor, loss: Tensor) -> Tensor | None:
    """The per-example form of a scalar loss, when one of the usual formulas reproduces it."""
    forms: list[tuple[Tensor, Tensor]] = []
    if logits.ndim == target.ndim + 1 and logits.shape[:-1] == target.shape and not target.is_floating_point():
        forms.append((logits, target))
        if target.ndim == 2 and target.shape[1] > 1:
            forms.append((logits[:, :-1], target[:, 1:]))
    means = [
        F.cross_entropy(values.reshape(-1, values.shape[-1]).float(), wanted.reshape(-1), ignore_index=_IGNORE)
        for values, wanted in forms
    ]
    # The nearest one: before training all of them may be near the logarithm of the number of classes.
    near = [i for i, mean in enumerate(means) if torch.allclose(mean, loss.float(), rtol=1e-3, atol=1e-4)]
    best = min(near, key=lambda i: float((means[i] - loss.float()).abs()), default=None)
    return None if best is None else _cross_entropy(*forms[best])


def _by_user(output: Any, target: Any, loss_fn: LossFn, size: int) -> Tensor | None:
    reduction = getattr(loss_fn, "reduction", None)
    if isinstance(loss_fn, nn.Module) and reduction in ("mean", "sum"):
        each = copy.copy(loss_fn)
        each.reduction = "none"  # type: ignore[assignment]
        return each(output, target).float().reshape(size, -1).mean(1)  # type: ignore[no-any-return]
    losses = loss_fn(output, target)
    if not isinstance(losses, Tensor):
        raise ConfigurationError(f"loss_fn returned {type(losses).__name__}; it must return a tensor.")
    if losses.ndim and losses.shape[0] == size:
        return losses.float().reshape(size, -1).mean(1)
    if losses.numel() != 1:
        raise ConfigurationError(
            f"loss_fn returned shape {tuple(losses.shape)} for {size} examples; it must return one loss each or a mean."
        )
    if not isinstance(output, Tensor) or not isinstance(target, Tensor) or len(output) != size or len(target) != size:
        return None
    return torch.stack([loss_fn(output[i : i + 1], target[i : i + 1]).reshape(()).float() for i in range(size)])


def batch_mean(output: Any, target: Any, loss_fn: LossFn | None) -> Tensor:
    """The mean loss of a batch whose per-example losses are not to be had."""
    if loss_fn is not None:
        return loss_fn(output, target).reshape(()).float()
    loss = output["loss"] if isinstance(output, Mapping) else output.loss
    return loss.mean().float()  # type: ignore[no-any-return]
