"""Nested state as JSON text plus a flat dict of tensors: nothing in it can run code when it is read."""

from __future__ import annotations

import base64
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from kalmanguard.errors import SnapshotError
from kalmanguard.snapshots.tree import Refusal, describe, storage_tensor

#: Key that marks a tagged value; dicts that use it themselves are written as lists of pairs.
_TAG: Final = "$"
_COMPLEX: Final = {torch.complex64: torch.float32, torch.complex128: torch.float64}
_NUMERIC_KINDS: Final = "biufc"

Json = Any


def encode(tree: Any) -> tuple[str, dict[str, Tensor]]:
    """Write a tree of plain values as JSON and its tensors as a flat dict.

    Parameters
    ----------
    tree
        Nested dicts, lists and tuples of None, bools, ints, floats (nan and infinities too), strings, bytes, tensors,
        numpy arrays and scalars, torch dtypes and devices. A tensor object that occurs twice is written once.

    Raises
    ------
    SnapshotError
        Anything else; the sentence names its path.

    Examples
    --------
    >>> text, tensors = encode({"step": 3, "scale": float("inf"), "w": torch.ones(2), (0, 1): "pair"})
    >>> decode(text, tensors)
    {'step': 3, 'scale': inf, 'w': tensor([1., 1.]), (0, 1): 'pair'}
    >>> encode({"extras": {"ema": {"fn": print}}})
    Traceback (most recent call last):
    kalmanguard.errors.SnapshotError: extras.ema.fn is a builtin_function_or_method; a checkpoint keeps numbers, \
strings, bytes, None, tensors, numpy arrays and dicts, lists and tuples of them.
    """
    encoder = _Encoder()
    try:
        value = encoder.encode(tree)
    except Refusal as refusal:
        raise refusal.error() from None
    except RecursionError:
        raise SnapshotError("The state is nested too deeply or contains itself; a checkpoint cannot keep it.") from None
    return json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":")), encoder.tensors


def decode(text: str, tensors: Mapping[str, Tensor]) -> Any:
    """Rebuild the tree that `encode` wrote.

    Raises
    ------
    SnapshotError
        The text is damaged or foreign, or refers to tensors that are not there.
    """
    try:
        return _decode(json.loads(text), tensors)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError, RecursionError) as error:
        raise SnapshotError(
            f"The state cannot be read ({type(error).__name__}: {error}); the text is damaged or not ours."
        ) from error


class _Encoder:
    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._seen: dict[int, tuple[Tensor, str]] = {}

    def encode(self, value: Any) -> Json:
        kind = type(value)
        if value is None or kind in (bool, int, str):
            return value
        if kind is float:
            return value if math.isfinite(value) else {_TAG: "float", "v": repr(value)}
        if kind is list:
            return [self._item(item, part) for part, item in enumerate(value)]
        if isinstance(value, dict):
            return self._dict(value)
        if isinstance(value, Tensor):
            return self._tensor(value)
        tag = _TAGS.get(kind)
        if tag is not None:
            return {_TAG: tag, "v": self._payload(value)}
        if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in _NUMERIC_KINDS:
            return self._numpy(value)
        raise Refusal(
            f"{describe(value)}; a checkpoint keeps numbers, strings, bytes, None, tensors, numpy arrays and dicts, "
            "lists and tuples of them."
        )

    def _item(self, item: Any, part: object) -> Json:
        try:
            return self.encode(item)
        except Refusal as refusal:
            raise refusal.at(part) from None

    def _dict(self, value: dict[Any, Any]) -> Json:
        if type(value) is not Counter and all(type(key) is str and key != _TAG for key in value):
            return {key: self._item(item, key) for key, item in value.items()}
        pairs = [[self._item(key, f"key {key!r}"), self._item(item, key)] for key, item in value.items()]
        return {_TAG: "counter" if type(value) is Counter else "dict", "v": pairs}

    def _payload(self, value: Any) -> Json:
        if isinstance(value, tuple):
            return [self._item(item, part) for part, item in enumerate(value)]
        if isinstance(value, bytes):
            return base64.b64encode(value).decode("ascii")
        return str(value).removeprefix("torch.")

    def _tensor(self, tensor: Tensor) -> Json:
        known = self._seen.get(id(tensor))
        if known is not None:
            return {_TAG: "tensor", "v": known[1]}
        plain = storage_tensor(tensor).detach().cpu().resolve_conj().resolve_neg().contiguous()
        real = _COMPLEX.get(plain.dtype)
        name = f"t{len(self.tensors)}" if real is None else f"c{len(self.tensors)}"
        self.tensors[name] = plain if real is None else torch.view_as_real(plain)
        self._seen[id(tensor)] = (tensor, name)
        return {_TAG: "tensor", "v": name}

    def _numpy(self, value: Any) -> Json:
        array = np.ascontiguousarray(value)
        name = f"n{len(self.tensors)}"
        self.tensors[name] = torch.from_numpy(np.frombuffer(bytearray(array.tobytes()), dtype=np.uint8))
        tag = "ndarray" if isinstance(value, np.ndarray) else "scalar"
        return {_TAG: tag, "v": name, "dtype": array.dtype.str, "shape": list(np.shape(value))}


_TAGS: Final[dict[type, str]] = {
    tuple: "tuple",
    torch.Size: "tuple",
    bytes: "bytes",
    torch.dtype: "dtype",
    torch.device: "device",
}


def _decode(value: Json, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if _TAG not in value:
        return {key: _decode(item, tensors) for key, item in value.items()}
    tag = value[_TAG]
    if tag not in _DECODERS:
        raise ValueError(f"unknown tag {tag!r}")
    return _DECODERS[tag](value, tensors)


def _decode_pairs(value: Json, tensors: Mapping[str, Tensor]) -> dict[Any, Any]:
    return {_decode(key, tensors): _decode(item, tensors) for key, item in value["v"]}


def _decode_tensor(value: Json, tensors: Mapping[str, Tensor]) -> Tensor:
    name = value["v"]
    if not isinstance(name, str) or name not in tensors:
        raise ValueError(f"there is no tensor {name!r}")
    tensor = tensors[name]
    return torch.view_as_complex(tensor) if name.startswith("c") else tensor


def _decode_numpy(value: Json, tensors: Mapping[str, Tensor]) -> Any:
    dtype = np.dtype(value["dtype"])
    if dtype.kind not in _NUMERIC_KINDS:
        raise ValueError(f"numpy type {dtype}")
    raw = _decode_tensor(value, tensors).numpy().tobytes()
    array = np.frombuffer(raw, dtype=dtype).reshape(value["shape"]).copy()
    return array if value[_TAG] == "ndarray" else array[()]


def _decode_dtype(value: Json, _: Mapping[str, Tensor]) -> torch.dtype:
    dtype = getattr(torch, value["v"], None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"there is no torch.{value['v']}")
    return dtype


_DECODERS: Final[dict[str, Callable[[Json, Mapping[str, Tensor]], Any]]] = {
    "tuple": lambda value, tensors: tuple(_decode(item, tensors) for item in value["v"]),
    "dict": _decode_pairs,
    "counter": lambda value, tensors: Counter(_decode_pairs(value, tensors)),
    "tensor": _decode_tensor,
    "ndarray": _decode_numpy,
    "scalar": _decode_numpy,
    "float": lambda value, _: float(value["v"]),
    "bytes": lambda value, _: base64.b64decode(value["v"], validate=True),
    "dtype": _decode_dtype,
    "device": lambda value, _: torch.device(value["v"]),
}
