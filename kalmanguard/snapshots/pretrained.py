"""Saves a model's exact captured weights through its own ``save_pretrained``, beside training."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kalmanguard.errors import SnapshotError
from kalmanguard.snapshots.reading import original


def pretrained_saver(model: nn.Module, tree: Mapping[str, Any], tokenizer: Any | None = None) -> Callable[[Path], None]:
    """Return a ``model_saver`` for `CheckpointStore.save` that writes the weights in ``tree``, not the live ones.

    Parameters
    ----------
    model
        A module with ``save_pretrained(folder, state_dict=...)``.
    tree
        What `TrainingState.tree` returned; its weights are copied here.
    tokenizer
        Saved beside the model if it has ``save_pretrained`` too.

    Raises
    ------
    SnapshotError
        ``save_pretrained`` takes no ``state_dict``, so it would read weights that training is changing; or the
        model's ``state_dict`` names what the snapshot does not know.
    """
    inner = original(model)
    save: Any = getattr(inner, "save_pretrained", None)
    if save is None or not _takes_state_dict(save):
        raise SnapshotError(
            f"{type(inner).__name__}.save_pretrained takes no state_dict, so it cannot run beside training; save the "
            "model yourself when training pauses."
        )
    state_dict = _weights(inner, tree)

    def save_model(folder: Path) -> None:
        save(folder, state_dict=state_dict)
        if tokenizer is not None and hasattr(tokenizer, "save_pretrained"):
            tokenizer.save_pretrained(folder)

    return save_model


def _takes_state_dict(save: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(save).parameters
    except (TypeError, ValueError):
        return False
    return "state_dict" in parameters


def _weights(model: nn.Module, tree: Mapping[str, Any]) -> dict[str, Tensor]:
    captured = {**tree["modules"]["model"]["buffers"], **tree["modules"]["model"]["parameters"]}
    clones: dict[int, Tensor] = {}
    weights: dict[str, Tensor] = {}
    for name, live in model.state_dict().items():
        value = captured.get(name)
        if not isinstance(live, Tensor):
            continue
        if value is None:
            raise SnapshotError(f"model.{name} is in the model's state_dict but not in the snapshot.")
        # Cloned one by one: savers take tensors that share a storage for tied weights.
        if id(value) not in clones:
            clones[id(value)] = value.expand(live.shape).clone(memory_format=torch.contiguous_format)
        weights[name] = clones[id(value)]
    return weights
