"""A fixed random-sign sketch of all parameters: ``s = S theta``, k numbers that stand for the whole trajectory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from kalmanguard.errors import ConfigurationError
from kalmanguard.records import FloatArray
from kalmanguard.sensors.shards import IntArray, local, locals_of, shard_of
from kalmanguard.sensors.sketch_plan import WINDOW, Plan, mix

_CHUNK = 128


class Sketch:
    """Linear sketch ``s = S theta`` with S a k x n matrix of signs, one non-zero per column.

    The n elements are cut into chunks; each chunk belongs to one of k buckets, and a bucket is the signed sum of its
    chunks. An element's sign is the product of a sign from a shared pool, read at an offset of its own for every
    2048 chunks, and a sign of its chunk; both, and the bucket, are functions of (seed, parameter name, index of the
    element) alone, so any sharding of the same model gives parts of the same sketch: of a DTensor the local block is
    sketched, and the parts of all blocks add up to the sketch of the whole, to rounding. ``E ||S x||^2 = ||x||^2``, and
    one changed weight moves one bucket.

    Parameters
    ----------
    named_parameters
        Pairs of name and tensor; a tensor that appears twice (tied weights) is counted once.
    size
        Number k of buckets.
    seed
        Key of the signs.
    total
        Elements of the whole model, where only a part of it is given here.

    Raises
    ------
    ConfigurationError
        There is no parameter, or a parameter is sparse.

    Notes
    -----
    Cost: one pass over the parameters, about three times ``torch._foreach_norm`` at 25 M parameters on a
    CPU core (``python -m benchmarks sketch``); memory 2 MiB for the pool
    plus sixteen bytes for every element of parameters smaller than 32,768 elements. Those are summed in float64; of
    larger ones, chunks of 128 are summed in float32 and the chunks in float64, so a difference of two sketches resolves
    updates of 1e-5 of a weight. Measured accuracy of the norm: see ``docs/benchmarks.md``; an update that is confined
    to one row of one matrix falls into a few buckets only, and its norm is then known to a factor of 2.

    References
    ----------
    Achlioptas, "Database-friendly random projections", JCSS 66 (2003), section 2; Charikar, Chen, Farach-Colton,
    "Finding frequent items in data streams", TCS 312 (2004), section 3 (one bucket per column).

    Examples
    --------
    >>> weight = torch.zeros(3, 5)
    >>> sketch = Sketch([("weight", weight)], size=8)
    >>> sketch().tolist()
    [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    >>> weight[1, 2] = 2.0
    >>> sorted(map(abs, sketch().tolist()))
    [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 2.0]
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        *,
        size: int = 64,
        seed: int = 0,
        total: int | None = None,
    ) -> None:
        unique: dict[int, tuple[str, Tensor]] = {}
        for name, tensor in named_parameters:
            if tensor.layout is not torch.strided:
                raise ConfigurationError(f"Parameter {name!r} is {tensor.layout}; only dense parameters are supported.")
            if tensor.numel():
                unique.setdefault(id(tensor), (name, tensor))
        if not unique:
            raise ConfigurationError("The model has no parameters; there is nothing to supervise.")
        self.size = size
        self._names = [name for name, _ in unique.values()]
        self._parameters = [tensor for _, tensor in unique.values()]
        self._device = local(self._parameters[0]).device
        # Several chunks per bucket also in small models, else a bucket is one weight matrix's row.
        elements = total or sum(p.numel() for p in self._parameters)
        self._chunk = min(_CHUNK, 1 << max(0, (elements // (8 * size)).bit_length() - 1))
        self._pool = _pool(seed)
        self._keys = [_key(seed, name) for name in self._names]
        self._build()

    def __call__(self) -> FloatArray:
        """Sketch the present parameters: shape ``(k,)``, float64, on the host; non-finite when a parameter is."""
        return np.asarray(self.on_device().cpu().numpy(), dtype=np.float64)

    @torch.no_grad()
    def on_device(self) -> Tensor:
        """Sketch the present parameters without a host synchronisation: shape ``(k,)``, float64."""
        if self._stale():
            self._build()
        parts = []
        plan = self._plan
        if plan.copied:
            torch._foreach_copy_(self._views, plan.copied)
        for block, index in plan.scattered:
            self._flat.view(-1).index_copy_(0, index, block.reshape(-1).to(self._device, torch.float64))
        if len(self._flat):
            parts.append(torch.linalg.vecdot(self._flat, self._flat_signs))
        for values, signs in plan.segments:
            chunks = values if isinstance(values, Tensor) else values()
            parts.append(torch.linalg.vecdot(chunks, signs).to(self._device, torch.float64).view(-1))
        parts.append(self._zero)
        dots = torch.cat(parts)
        return (dots[self._order] * self._order_signs).sum(1)

    def _stale(self) -> bool:
        # An optimizer or the user may put new storage under a parameter; the prepared views would read the old one.
        present = locals_of(self._parameters)
        return any(p.data_ptr() != pointer for p, pointer in zip(present, self._pointers, strict=True))

    def _build(self) -> None:
        blocks = [shard_of(name, p.detach()) for name, p in zip(self._names, self._parameters, strict=True)]
        self._pointers = [block.tensor.data_ptr() for block in blocks]
        self._plan = plan = Plan(self._chunk, self._pool.to(self._device), self._device)
        for block, key in zip(blocks, self._keys, strict=True):
            if block.tensor.numel():
                plan.add(block, key)
        self._flat, self._flat_signs, self._views = plan.buffer()
        buckets, signs = zip(*(self._placed(key, chunks) for key, chunks in plan.chunks()), strict=True)
        self._arrange(np.concatenate(buckets), np.concatenate(signs))
        self._zero = torch.zeros(1, dtype=torch.float64, device=self._device)

    def _placed(self, key: int, chunks: IntArray) -> tuple[np.ndarray, np.ndarray]:
        """Buckets and signs of a parameter's chunks."""
        index = chunks.astype(np.uint64)
        # Neighbouring chunks go to different buckets, so that buckets are equally full whatever the hash.
        buckets = ((index + np.uint64(key % self.size)) % np.uint64(self.size)).astype(np.int64)
        return buckets, 1.0 - 2.0 * (mix(index ^ np.uint64(key)) >> np.uint64(63)).astype(np.float64)

    def _arrange(self, bucket: np.ndarray, sign: np.ndarray) -> None:
        # One gather and a row sum: deterministic on every device, which atomics in index_add_ are not.
        counts = np.bincount(bucket, minlength=self.size)
        width = int(counts.max())
        order = np.full((self.size, width), len(bucket), dtype=np.int64)
        weight = np.zeros((self.size, width))
        rank = np.argsort(bucket, kind="stable")
        column = np.arange(len(bucket)) - np.repeat(np.cumsum(counts) - counts, counts)
        order[bucket[rank], column] = rank
        weight[bucket[rank], column] = sign[rank]
        self._order = torch.from_numpy(order).to(self._device)
        self._order_signs = torch.from_numpy(weight).to(self._device)


@lru_cache(maxsize=4)
def _pool(seed: int) -> Tensor:
    bits = np.random.Philox(key=seed).random_raw(2 * WINDOW // 64).view(np.uint8)
    return torch.from_numpy(np.unpackbits(bits).astype(np.float32) * 2.0 - 1.0)


def _key(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest(), "little") >> 1
