"""What a Trainer does not tell its callbacks: itself, the loss of a step, the gradient norm before clipping."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, final

from torch import Tensor
from torch.optim import Optimizer

from kalmanguard.errors import ConfigurationError
from kalmanguard.integrations.wrapping import tell_norms, wrap


def calling_trainer(callback: object) -> tuple[Any, str | None]:
    """The Trainer whose event is being handled, and the checkpoint that it resumes from.

    A Trainer passes neither to its callbacks, so they are read off the call stack: it is the first object that owns
    ``callback`` and calls from below.

    Raises
    ------
    ConfigurationError
        No Trainer is calling.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        handler = getattr(owner, "callback_handler", None)
        if hasattr(owner, "training_step") and any(one is callback for one in getattr(handler, "callbacks", ())):
            return owner, frame.f_locals.get("resume_from_checkpoint")
        frame = frame.f_back
    raise ConfigurationError(
        f"{type(callback).__name__} is called by something else than a transformers Trainer that it belongs to; pass "
        "it as Trainer(..., callbacks=[...]) or to trainer.add_callback."
    )


def replaced_methods(trainer: Any) -> dict[str, str]:
    """Which methods that make a step are not transformers' own but a subclass's or a patch's, and where they are from.

    Examples
    --------
    >>> class Trainer:
    ...     def training_step(self): ...
    >>> replaced_methods(Trainer())
    {'training_step': 'kalmanguard.integrations.huggingface.tap.training_step'}
    """
    found = {name: getattr(trainer, name, None) for name in ("_inner_training_loop", "training_step", "compute_loss")}
    places = {name: f"{method.__module__}.{method.__name__}" for name, method in found.items() if method is not None}
    return {name: place for name, place in places.items() if not place.startswith("transformers.")}


def torch_optimizer(optimizer: Any, purpose: str) -> Optimizer:
    """The torch optimizer beneath accelerate's.

    Raises
    ------
    ConfigurationError
        There is none (DeepSpeed has its own).
    """
    while not isinstance(optimizer, Optimizer) or type(optimizer).__name__ == "AcceleratedOptimizer":
        inner = getattr(optimizer, "optimizer", None)
        if inner is None or inner is optimizer:
            raise ConfigurationError(
                f"The Trainer's optimizer is {type(optimizer).__name__}, with no torch optimizer beneath it; "
                f"{purpose} cannot attach itself to that."
            )
        optimizer = inner
    return optimizer


@final
class TrainerTap:
    """Listen to a Trainer's ``training_step`` and its accelerator's ``clip_grad_norm_``; nothing of theirs is changed.

    Parameters
    ----------
    trainer
        The Trainer; only this object's methods are wrapped, and `close` unwraps them.
    clipped_from
        Called with the gradient norm before clipping, of every optimizer step.
    died
        Called with what ends a training step as an exception, before it goes on its way.

    Notes
    -----
    A Trainer scales the losses of a step's micro-batches so that their sum is the loss of the step; a loss that is not
    finite stays so here, though ``logging_nan_inf_filter`` takes it out of the log. The sum is formed where the losses
    lie, and nothing waits for it.
    """

    def __init__(
        self,
        trainer: Any,
        *,
        clipped_from: Callable[[Tensor | float], None],
        died: Callable[[BaseException], None],
    ) -> None:
        self._loss: Tensor | None = None
        self._batches: list[Any] = []
        self._died = died
        self._closed = False
        self._undo = [
            wrap(trainer, "training_step", self._training_step),
            tell_norms(trainer.accelerator, clipped_from),
        ]

    def take(self) -> tuple[Tensor | None, Any]:
        """The loss of the step, and its batch if there was only one; both are forgotten here."""
        loss, batches = self._loss, self._batches
        self._loss, self._batches = None, []
        return loss, batches[0] if len(batches) == 1 else None

    def close(self) -> None:
        """Unwrap the methods; harmless when repeated."""
        self._closed = True
        while self._undo:
            self._undo.pop()()

    def _training_step(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._closed:
            return method(*args, **kwargs)
        try:
            loss = method(*args, **kwargs)
        except BaseException as error:
            self._died(error)
            raise
        if isinstance(loss, Tensor):
            part = loss.detach().float()
            self._loss = part if self._loss is None else self._loss + part
        self._batches.append(kwargs["inputs"] if "inputs" in kwargs else args[1] if len(args) > 1 else None)
        return loss
