"""Nested state split into a skeleton of plain values and a flat list of tensors, and joined again.

A `Leaf` stands in the skeleton where a tensor was. Plain values are copied while splitting, so a skeleton never
aliases what it was made from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from types import BuiltinFunctionType, FunctionType, NoneType
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from kalmanguard.errors import SnapshotError

#: Immutable values that may be shared between a live object and its snapshot.
ATOMS: Final = frozenset({NoneType, bool, int, float, str, bytes, torch.dtype, torch.device})
_KEYS: Final = frozenset({NoneType, bool, int, float, str, tuple})
_NUMERIC_KINDS: Final = "biufc"


@dataclass(frozen=True, slots=True)
class Leaf:
    """Stands for tensor number ``index`` of an image; ``device`` is where the live one lay."""

    index: int
    device: torch.device


@dataclass(frozen=True, slots=True)
class Opaque:
    """An object that is kept by reference; only functions, classes and enum members are sure not to change."""

    value: Any

    @property
    def constant(self) -> bool:
        """Whether the object cannot have changed since it was captured."""
        return isinstance(self.value, Enum | FunctionType | BuiltinFunctionType | type)

    def name(self) -> str:
        """Return the qualified name of a constant.

        Raises
        ------
        Refusal
            The object may have changed since it was captured.
        """
        value = self.value
        if not self.constant:
            raise Refusal(f"{describe(value)}, whose state cannot be captured.")
        if isinstance(value, Enum):
            return f"{type(value).__qualname__}.{value.name}"
        return f"{value.__module__}.{value.__qualname__}"


class Refusal(Exception):  # noqa: N818 - carries a path outwards; always turned into a SnapshotError
    """A value that cannot be kept; the path to it is collected while the walk unwinds."""

    def __init__(self, reason: str, *path: object) -> None:
        super().__init__(reason)
        self.reason = reason
        self.path = [str(part) for part in path]

    def at(self, part: object) -> Refusal:
        """Prepend one step of the path."""
        self.path.insert(0, str(part))
        return self

    def error(self, *prefix: object) -> SnapshotError:
        """Word the refusal as the error that users see."""
        return SnapshotError(f"{'.'.join([*map(str, prefix), *self.path]) or 'the value'} {self.reason}")


def describe(value: object) -> str:
    """Name a value's type the way a sentence needs it: ``is a function``."""
    name = type(value).__name__
    return f"is {'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def split(value: Any, take: Callable[[Tensor], Leaf], *, lenient: bool = False) -> Any:
    """Copy nested plain values and replace each tensor by the leaf that ``take`` returns for it.

    Parameters
    ----------
    value
        Nested dicts, lists and tuples of numbers, strings, bytes, numpy arrays and tensors.
    take
        Called with each tensor; returns its leaf.
    lenient
        Keep a reference to anything else as `Opaque` instead of refusing it.

    Raises
    ------
    Refusal
        A value of another type; its path is relative to ``value``.
    """
    kind = type(value)
    if kind in ATOMS:
        return value
    if isinstance(value, Tensor):
        return take(value)
    if kind is list:
        return [_split_item(item, part, take, lenient) for part, item in enumerate(value)]
    if kind is tuple or kind is torch.Size:
        return tuple([_split_item(item, part, take, lenient) for part, item in enumerate(value)])
    if isinstance(value, dict):
        made: dict[Any, Any] = Counter() if kind is Counter else {}
        for key, item in value.items():
            if type(key) not in _KEYS:
                raise Refusal(f"has a key that {describe(key)}, which a snapshot cannot keep.")
            made[key] = _split_item(item, key, take, lenient)
        return made
    if isinstance(value, np.ndarray) and value.dtype.kind in _NUMERIC_KINDS:
        return value.copy()
    if isinstance(value, np.generic) and value.dtype.kind in _NUMERIC_KINDS:
        return value
    if lenient:
        return Opaque(value)
    raise Refusal(
        f"{describe(value)}; a snapshot keeps numbers, strings, bytes, None, tensors, numpy arrays and "
        "dicts, lists and tuples of them."
    )


def _split_item(item: Any, part: object, take: Callable[[Tensor], Leaf], lenient: bool) -> Any:
    if type(item) in ATOMS:
        return item
    try:
        return split(item, take, lenient=lenient)
    except Refusal as refusal:
        raise refusal.at(part) from None


def keepable(value: Any) -> bool:
    """Whether `split` would take ``value``."""
    if type(value) in ATOMS:
        return True
    try:
        split(value, lambda tensor: Leaf(0, tensor.device))
    except Refusal:
        return False
    return True


def join(skeleton: Any, tensor_of: Callable[[Leaf], Any]) -> Any:
    """Undo `split`: fresh containers with ``tensor_of(leaf)`` in the place of each leaf.

    Raises
    ------
    Refusal
        An `Opaque` object that may have changed.
    """
    if isinstance(skeleton, Leaf):
        return tensor_of(skeleton)
    if isinstance(skeleton, dict):
        made: dict[Any, Any] = Counter() if type(skeleton) is Counter else {}
        for key, item in skeleton.items():
            made[key] = _join_item(item, key, tensor_of)
        return made
    if isinstance(skeleton, list):
        return [_join_item(item, part, tensor_of) for part, item in enumerate(skeleton)]
    if isinstance(skeleton, tuple):
        return tuple([_join_item(item, part, tensor_of) for part, item in enumerate(skeleton)])
    if isinstance(skeleton, np.ndarray):
        return skeleton.copy()
    if isinstance(skeleton, Opaque):
        skeleton.name()
        return skeleton.value
    return skeleton


def _join_item(item: Any, part: object, tensor_of: Callable[[Leaf], Any]) -> Any:
    if type(item) in ATOMS:
        return item
    try:
        return join(item, tensor_of)
    except Refusal as refusal:
        raise refusal.at(part) from None


def without_constants(skeleton: Any) -> Any:
    """Drop the dict items that are functions, classes or enum members."""
    if isinstance(skeleton, dict):
        items = {key: without_constants(item) for key, item in skeleton.items() if not _is_constant(item)}
        return Counter(items) if type(skeleton) is Counter else items
    if isinstance(skeleton, list):
        return [without_constants(item) for item in skeleton]
    return skeleton


def _is_constant(item: Any) -> bool:
    return isinstance(item, Opaque) and item.constant


def storage_tensor(tensor: Tensor) -> Tensor:
    """Return the strided tensor whose bytes are ``tensor``'s state, sharing its memory.

    A DTensor gives its local shard; dimensions that only repeat one element (``expand``) are narrowed to it, because
    they cannot be written to.

    Raises
    ------
    Refusal
        Lazy, sparse, quantized, nested, meta and wrapper tensors, whose bytes cannot be reached exactly.
    """
    if is_lazy(tensor):
        raise Refusal("has no shape yet: run one batch through the model first.")
    to_local = getattr(tensor, "to_local", None)
    if to_local is not None:
        with torch.no_grad():  # with gradients on, to_local() returns a view that autograd tracks
            tensor = to_local()
    if hasattr(type(tensor), "__tensor_flatten__"):
        raise Refusal(
            f"{describe(tensor)}, a wrapper around other tensors, whose bytes cannot be copied exactly: keep it out "
            "of the supervised state."
        )
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
        kind = "quantized" if tensor.is_quantized else "nested" if tensor.is_nested else str(tensor.layout)
        raise Refusal(
            f"is a {kind.removeprefix('torch.')} tensor; only dense tensors can be rolled back exactly: make it "
            "dense, or leave it out of the model and the optimizer."
        )
    if tensor.device.type == "meta":
        raise Refusal("is on the meta device and has no values yet: materialise the model first.")
    for dimension, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(dimension, 0, 1)
    return tensor
