"""SHA-256 digests of a training state, section by section, over one canonical form of live and captured states."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import torch
from torch import Tensor

from kalmanguard.errors import SnapshotError
from kalmanguard.snapshots.slot import Image
from kalmanguard.snapshots.tree import Leaf, Opaque, Refusal

_CORE: Final = ("modules", "module_extra", "extras", "scaler", "gradients")


class _Hasher(Protocol):
    def update(self, data: Any, /) -> None: ...


@dataclass(frozen=True, slots=True)
class Scope:
    """Which parts of a state are meant: what ``restore`` brings back with the same arguments.

    Attributes
    ----------
    rng
        Random state.
    schedule
        Learning rates and what else schedulers own, and the schedulers themselves.
    data
        The data cursor.
    moments
        The optimizers' per-parameter state.
    """

    rng: bool = True
    schedule: bool = False
    data: bool = False
    moments: bool = True


@dataclass(frozen=True, slots=True)
class SectionDigests:
    """One digest per section, so that the digest of any scope follows from one pass over the bytes.

    ``schedule`` and ``data`` hold the refusal instead where user objects put something without a canonical form there;
    it is raised only when such a scope is asked for.
    """

    core: str
    moments: str
    options: str
    schedule: str | SnapshotError
    data: str | SnapshotError
    rng: str

    def of(self, scope: Scope) -> str:
        """Combine the sections of ``scope`` to one hexadecimal digest.

        Raises
        ------
        SnapshotError
            A section of the scope holds a value without a canonical form.
        """
        chosen = {
            "core": self.core,
            "options": self.options,
            "moments": self.moments if scope.moments else None,
            "schedule": self.schedule if scope.schedule else None,
            "data": self.data if scope.data else None,
            "rng": self.rng if scope.rng else None,
        }
        for part in chosen.values():
            if isinstance(part, SnapshotError):
                raise part
        text = "/".join(f"{name}={part}" for name, part in chosen.items() if part is not None)
        return hashlib.sha256(text.encode()).hexdigest()


def section_digests(image: Image, owned: Sequence[AbstractSet[str]]) -> SectionDigests:
    """Digest a live or a captured state.

    Parameters
    ----------
    image
        The state.
    owned
        Per optimizer, the options that belong to the schedule.

    Raises
    ------
    SnapshotError
        A value without a canonical form, named with its path.
    """
    writer = _Writer(image)
    skeleton = image.skeleton
    groups = [
        [_partition(group, owned[number]) for group in groups] for number, groups in enumerate(skeleton["groups"])
    ]
    options = [[kept for kept, _ in parts] for parts in groups]
    scheduled = [[taken for _, taken in parts] for parts in groups]
    return SectionDigests(
        core=writer.digest({name: skeleton[name] for name in _CORE}),
        moments=writer.digest(skeleton["state"], "optimizers"),
        options=writer.digest(options, "optimizers"),
        schedule=writer.attempt([scheduled, skeleton["schedulers"]], "schedule"),
        data=writer.attempt(skeleton["loader"], "loader"),
        rng=_random_digest(image),
    )


def _partition(group: Mapping[str, Any], owned: AbstractSet[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    kept = {name: value for name, value in group.items() if name not in owned}
    return kept, {name: value for name, value in group.items() if name in owned}


def _random_digest(image: Image) -> str:
    state = image.random
    hasher = hashlib.sha256()
    for device, tensor in [("cpu", state.torch_cpu), *sorted(state.cuda.items()), ("mps", state.mps)]:
        hasher.update(f"{device}:".encode() + (b"" if tensor is None else tensor_digest(tensor)))
    hasher.update(repr(state.python).encode())
    kind, words, *rest = state.numpy
    hasher.update(f"{kind}{rest}".encode() + np.ascontiguousarray(words).tobytes())
    return hasher.hexdigest()


def tensor_digest(tensor: Tensor) -> bytes:
    """Digest dtype, shape and elements in logical order, whatever the memory format or the device."""
    dense = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    hasher = hashlib.sha256(f"{dense.dtype}{tuple(dense.shape)}:".encode())
    if dense.numel() > 0:
        # Bytes, not numbers: numpy knows neither bfloat16 nor the float8 types.
        hasher.update(dense.reshape(-1).view(torch.uint8).numpy().data)
    return hasher.digest()


class _Writer:
    """Feeds values to a hash in a form in which equal states give equal bytes."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self._digests: dict[int, bytes] = {}

    def digest(self, value: Any, *prefix: str) -> str:
        hasher = hashlib.sha256()
        try:
            self._feed(hasher, value)
        except Refusal as refusal:
            raise refusal.error(*prefix) from None
        return hasher.hexdigest()

    def attempt(self, value: Any, *prefix: str) -> str | SnapshotError:
        try:
            return self.digest(value, *prefix)
        except SnapshotError as error:
            return error

    def _leaf(self, leaf: Leaf) -> bytes:
        base = self._image.bases.get(leaf.index)
        if base is not None:
            if base.digest is None:
                base.digest = tensor_digest(base.tensor)
            return base.digest
        if leaf.index not in self._digests:
            self._digests[leaf.index] = tensor_digest(self._image.tensors[leaf.index])
        return self._digests[leaf.index]

    def _feed(self, hasher: _Hasher, value: Any) -> None:
        kind = type(value)
        if kind is Leaf:
            hasher.update(b"T" + self._leaf(value))
        elif isinstance(value, dict):
            hasher.update(f"D{len(value)}:".encode())
            for key in sorted(value, key=_key_order):
                self._item(hasher, key, key)
                self._item(hasher, value[key], key)
        elif kind is list or kind is tuple:
            hasher.update(f"{'L' if kind is list else 'U'}{len(value)}:".encode())
            for part, item in enumerate(value):
                self._item(hasher, item, part)
        elif kind is float:
            hasher.update(b"F" + struct.pack("<d", value))
        elif kind is str:
            text = value.encode("utf-8", "surrogatepass")
            hasher.update(f"S{len(text)}:".encode() + text)
        elif kind is bytes:
            hasher.update(f"Y{len(value)}:".encode() + value)
        elif isinstance(value, np.ndarray | np.generic):
            array = np.ascontiguousarray(value)
            hasher.update(f"A{array.dtype.str}{np.shape(value)}:".encode() + array.tobytes())
        elif kind is Opaque:
            self._feed(hasher, value.name())
        else:
            hasher.update(f"P{kind.__name__}{value}:".encode())

    def _item(self, hasher: _Hasher, item: Any, part: object) -> None:
        try:
            self._feed(hasher, item)
        except Refusal as refusal:
            raise refusal.at(part) from None


def _key_order(key: object) -> tuple[str, str]:
    return type(key).__name__, repr(key)
