"""The supervisor in a run of Unsloth: one line after its trainer was made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kalmanguard.errors import ConfigurationError

if TYPE_CHECKING:
    from kalmanguard.integrations.huggingface import KalmanGuardCallback


def supervise(trainer: Any, guard: KalmanGuardCallback | None = None) -> KalmanGuardCallback:
    """Supervise a trainer that Unsloth has patched; call before ``trainer.train()``.

    ``guard = supervise(trainer)`` is all there is to do.

    Parameters
    ----------
    trainer
        A transformers Trainer, such as the ``SFTTrainer`` of a script that has imported Unsloth.
    guard
        A `KalmanGuardCallback` with options of its own; one with the defaults when ``None``.

    Returns
    -------
    KalmanGuardCallback
        The callback, with ``decisions``, ``supervisor`` and ``certificate``.

    Raises
    ------
    ConfigurationError
        The trainer is not one of transformers (Unsloth's trainer for MLX is not), or it is supervised already.

    Notes
    -----
    Unsloth puts other code in the place of ``Trainer.training_step`` and of the training loop, and its own functions
    among torch's global optimizer hooks. The callback listens to whatever ``training_step`` the trainer has when it is
    called, needs nothing of the loop but that it calls callbacks, and removes no hooks but those of the supervisor.
    Which methods were not transformers' own stands in the journal. Unsloth keeps casts of the adapters by the version
    counters of their tensors; a rollback counts these up, so no cast outlives it.

    Unsloth wants to be imported before transformers. Importing this module imports neither, so the order of imports in
    a script does not matter. Where Unsloth's losses come without logits, the probe's examples are evaluated one by one
    (at most 32, else 16 parts), which costs as many forward passes.

    Examples
    --------
    >>> supervise(object())
    Traceback (most recent call last):
    kalmanguard.errors.ConfigurationError: object is no transformers Trainer; ...
    """
    from kalmanguard.integrations.huggingface import KalmanGuardCallback

    handler = getattr(trainer, "callback_handler", None)
    if handler is None or not hasattr(trainer, "training_step"):
        raise ConfigurationError(
            f"{type(trainer).__name__} is no transformers Trainer; pass the trainer that was made after Unsloth was "
            "imported, or use Supervisor in a loop of your own."
        )
    if any(isinstance(callback, KalmanGuardCallback) for callback in handler.callbacks):
        raise ConfigurationError(
            f"This {type(trainer).__name__} is supervised already; use the guard that it has, or make a new trainer."
        )
    guard = guard if guard is not None else KalmanGuardCallback()
    trainer.add_callback(guard)
    return guard
