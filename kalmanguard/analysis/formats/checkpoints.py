"""A folder of checkpoints as a trajectory: parameters loaded one file at a time, safely, and sketched."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kalmanguard.analysis.tables import Chunk, Column
from kalmanguard.errors import TrajectoryError
from kalmanguard.records import FloatArray
from kalmanguard.sensors.sketch import Sketch

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
#: Under which keys a training script keeps the model's own state.
_MODEL_KEYS = ("model", "state_dict", "model_state_dict", "module", "params")
_SIZE = 64
#: One file of several that are one checkpoint.
_SHARD = re.compile(r"-[0-9]+-of-[0-9]+")


def found_in(folder: Path) -> list[tuple[int, Path]]:
    """Checkpoints in a folder, by step: files, or folders such as ``checkpoint-500`` that hold one.

    The step is the number behind ``step`` in the name, where there is one, else the last whole one. Links are not
    followed.

    Raises
    ------
    TrajectoryError
        A folder holds one checkpoint in several files.
    """
    found: dict[int, Path] = {}
    for child in sorted(folder.iterdir()):
        if child.is_symlink():
            continue
        file: Path | None = child
        if child.is_dir():
            inside = [p for p in sorted(child.iterdir()) if _is_weights(p)]
            if sum(bool(_SHARD.search(p.name)) for p in inside) > 1:
                raise TrajectoryError(
                    f"{child} holds a checkpoint in several files: save it as one to have its parameters compared."
                )
            file = next((p for p in inside if p.suffix == ".safetensors"), inside[0] if inside else None)
        elif not _is_weights(child):
            continue
        step = _step_in(child.name if child.is_dir() else child.stem)
        if file is None or step is None:
            continue
        if step not in found or file.suffix == ".safetensors":
            found[step] = file
    return sorted(found.items())


def _step_in(name: str) -> int | None:
    """The step that a name tells.

    >>> _step_in("epoch=1-step=1200"), _step_in("epoch=1-val_loss=0.29"), _step_in("checkpoint-500"), _step_in("best")
    (1200, 1, 500, None)
    """
    for word in ("step", "iter"):
        found = re.search(rf"{word}\w*?[=_-]?([0-9]+)", name, re.IGNORECASE)
        if found is not None:
            return int(found[1])
    numbers = re.findall(r"(?<![0-9.])[0-9]+(?![0-9.])", name)
    return int(numbers[-1]) if numbers else None


def _is_weights(path: Path) -> bool:
    names = ("optimizer", "scheduler", "rng_state", "scaler", "training_args")
    return path.suffix in SUFFIXES and path.is_file() and not path.is_symlink() and not path.name.startswith(names)


class CheckpointReader:
    """Steps, parameter norm, update norm and sketched updates between neighbouring checkpoints.

    The sketch is that of a live run with the same parameter names, so velocities can be compared with its.
    """

    format = "checkpoints"
    named = True

    def __init__(self, folder: Path) -> None:
        self.notes: list[str] = []
        self._folder = folder

    def chunks(self) -> Iterator[Chunk]:
        files = found_in(self._folder)
        before: dict[str, Tensor] | None = None
        sketched: FloatArray | None = None
        steps, norms, moved, velocities = [], [], [], []
        for step, file in files:
            state = _load(file)
            if before is not None:
                self._check(before, state, file)
            sketch = Sketch(sorted(state.items()), size=_SIZE)()
            norms.append(_norm(state.values()))
            moved.append(np.nan if before is None else _norm([state[k].double() - before[k].double() for k in state]))
            velocities.append(np.full(_SIZE, np.nan) if sketched is None else sketch - sketched)
            steps.append(float(step))
            before, sketched = state, sketch
        if not steps:
            raise TrajectoryError(f"The folder {self._folder} holds no checkpoints with a step in their names.")
        self.notes.append(
            f"{len(steps)} checkpoints of {sum(p.numel() for p in (before or {}).values()):,} parameters."
        )
        seen = np.ones(len(steps), dtype=np.bool_)
        known = ~np.isnan(moved)
        columns = {
            "step": Column(np.array(steps), seen),
            "parameter_norm": Column(np.array(norms), seen),
            "update_norm": Column(np.array(moved), known),
        }
        yield Chunk(len(steps), columns, {}, np.array(velocities))

    def _check(self, before: Mapping[str, Tensor], state: Mapping[str, Tensor], file: Path) -> None:
        if before.keys() != state.keys():
            odd = sorted(before.keys() ^ state.keys())[:3]
            raise TrajectoryError(f"{file} holds other parameters than the checkpoint before it, such as {odd}.")
        for name, tensor in state.items():
            if tensor.shape != before[name].shape:
                raise TrajectoryError(
                    f"{file}: {name} has the shape {tuple(tensor.shape)}, in the checkpoint before "
                    f"{tuple(before[name].shape)}."
                )


def _load(file: Path) -> dict[str, Tensor]:
    """Floating-point parameters of a checkpoint; nothing in it is ever executed."""
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            state: Any = load_file(file)
        except (SafetensorError, OSError, ValueError) as error:
            raise TrajectoryError(f"{file} is no safetensors file that can be read: {error}.") from None
    else:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a damaged or hostile pickle makes the restricted reader raise
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise TrajectoryError(
                f"{file} cannot be read as plain tensors ({reason[:160]}). Objects of other types are never unpickled: "
                "save model.state_dict(), or use safetensors."
            ) from None
    for key in _MODEL_KEYS:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
            break
    if not isinstance(state, Mapping):
        raise TrajectoryError(f"{file} holds a {type(state).__name__}, not the tensors of a model by name.")
    tensors = {str(k): v for k, v in state.items() if isinstance(v, Tensor) and v.is_floating_point() and v.numel()}
    if not tensors:
        raise TrajectoryError(f"{file} holds no floating-point tensors by name.")
    return tensors


def _norm(tensors: Any) -> float:
    return float(torch.stack([torch.linalg.vector_norm(t.detach(), dtype=torch.float64) for t in tensors]).norm())
