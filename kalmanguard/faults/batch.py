"""What in a batch is input and what is target, for the shapes that loaders yield."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar, final

from torch import Tensor

from kalmanguard.errors import ConfigurationError

_TARGET_KEYS = ("labels", "label", "targets", "target", "y")
_STRUCTURE_KEYS = ("position_ids", "token_type_ids")  # not content: random values would break the model, not train it

TensorMap = Callable[[Tensor], Tensor]
T = TypeVar("T")


@final
class FaultyBatches(Generic[T]):
    """A loader whose batches pass through an injector; as long, and as often iterable, as the loader itself."""

    def __init__(self, loader: Iterable[T], draw: Callable[[T], T]) -> None:
        self._loader = loader
        self._draw = draw

    def __iter__(self) -> Iterator[T]:
        return map(self._draw, self._loader)

    def __len__(self) -> int:
        return len(self._loader)  # type: ignore[arg-type]


def map_batch(batch: Any, *, inputs: TensorMap, targets: TensorMap, key: str | int | None = None) -> Any:
    """Build a batch of the same structure with ``inputs`` and ``targets`` applied to its tensors.

    Parameters
    ----------
    batch
        A tensor (an input), a tuple or list (the last of several is the target) or a mapping (the target is under
        ``labels``, ``label``, ``targets``, ``target`` or ``y``; masks and position ids are left alone). An input may
        itself be such a structure.
    inputs, targets
        What to apply; must not change a tensor in place.
    key
        Key or index of the target, where it is another one.

    Raises
    ------
    ConfigurationError
        The batch has another form, or has no such key.
    """
    if isinstance(batch, Tensor):
        return inputs(batch)
    if isinstance(batch, Mapping):
        target = key if key is not None else next((name for name in _TARGET_KEYS if name in batch), None)
        if key is not None and key not in batch:
            raise ConfigurationError(f"The batch has no key {key!r}; its keys are {', '.join(map(str, batch))}.")
        changed = {
            name: _map(value, targets) if name == target else value if _is_structure(name) else _map(value, inputs)
            for name, value in batch.items()
        }
        return _rebuilt_mapping(batch, changed)
    if isinstance(batch, tuple | list):
        place = key if key is not None else len(batch) - 1 if len(batch) > 1 else None
        if place is not None and (not isinstance(place, int) or not -len(batch) <= place < len(batch)):
            raise ConfigurationError(f"The batch is a {type(batch).__name__} of {len(batch)} without index {key!r}.")
        place = place if place is None else place % len(batch)
        return _rebuilt_sequence(
            batch, [_map(value, targets if index == place else inputs) for index, value in enumerate(batch)]
        )
    raise ConfigurationError(
        f"A batch of type {type(batch).__name__} is not understood; let the loader yield a tensor, tuple, list or dict."
    )


def tensors(batch: Any, *, key: str | int | None = None) -> tuple[list[Tensor], list[Tensor]]:
    """Return the input tensors and the target tensors of a batch; see `map_batch`."""
    inputs: list[Tensor] = []
    targets: list[Tensor] = []

    def keep(where: list[Tensor]) -> TensorMap:
        def note(tensor: Tensor) -> Tensor:
            where.append(tensor)
            return tensor

        return note

    map_batch(batch, inputs=keep(inputs), targets=keep(targets), key=key)
    return inputs, targets


def _map(value: Any, change: TensorMap) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return _rebuilt_mapping(
            value, {name: item if _is_structure(name) else _map(item, change) for name, item in value.items()}
        )
    if isinstance(value, tuple | list):
        return _rebuilt_sequence(value, [_map(item, change) for item in value])
    return value


def _is_structure(name: object) -> bool:
    return isinstance(name, str) and (name.endswith("mask") or name in _STRUCTURE_KEYS)


def _rebuilt_mapping(original: Mapping[Any, Any], changed: dict[Any, Any]) -> Any:
    if type(original) is dict:
        return changed
    rebuilt: Any = copy.copy(original)  # keeps a class of the user's own, such as a tokenizer's batch
    for name, value in changed.items():
        rebuilt[name] = value
    return rebuilt


def _rebuilt_sequence(original: Any, changed: list[Any]) -> Any:
    if hasattr(original, "_fields"):
        return type(original)(*changed)
    return type(original)(changed)
