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

_WINDOW = 1 << 18  # elements of the sign pool that one fused product covers; 1 MiB of float32, stays in cache
_CHUNK = 128
_SMALL = 1 << 15  # parameters below this size are gathered into one buffer, one kernel for all of them


class Sketch:
    """Linear sketch ``s = S theta`` with S a k x n matrix of signs, one non-zero per column.

    The n elements are cut into chunks; each chunk belongs to one of k buckets, and a bucket is the signed sum of its
    chunks. An element's sign is the product of a sign from a shared pool, read at an offset of its own for every
    2048 chunks, and a sign of its chunk; both, and the bucket, are functions of (seed, parameter name, index of the
    element) alone, so any sharding of the same model gives shards of the same sketch. ``E ||S x||^2 = ||x||^2``, and
    one changed weight moves one bucket.

    Parameters
    ----------
    named_parameters
        Pairs of name and tensor; a tensor that appears twice (tied weights) is counted once.
    size
        Number k of buckets.
    seed
        Key of the signs.

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

    def __init__(self, named_parameters: Iterable[tuple[str, Tensor]], *, size: int = 64, seed: int = 0) -> None:
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
        self._device = self._parameters[0].device
        total = sum(p.numel() for p in self._parameters)
        # Several chunks per bucket also in small models, else a bucket is one weight matrix's row.
        self._chunk = min(_CHUNK, 1 << max(0, (total // (8 * size)).bit_length() - 1))
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
        if self._small:
            torch._foreach_copy_(self._small_views, self._small)
            parts.append(torch.linalg.vecdot(self._flat, self._flat_signs).to(torch.float64))
        for chunks, signs, whole in self._segments:
            values = chunks if chunks is not None else whole()
            parts.append(torch.linalg.vecdot(values, signs).to(self._device, torch.float64))
        parts.append(self._zero)
        dots = torch.cat(parts)
        return (dots[self._order] * self._order_signs).sum(1)

    def _stale(self) -> bool:
        # An optimizer or the user may put new storage under a parameter; the prepared views would read the old one.
        return any(p.data_ptr() != pointer for p, pointer in zip(self._parameters, self._pointers, strict=True))

    def _build(self) -> None:
        c, device = self._chunk, self._device
        pool = self._pool.to(device)
        self._pointers = [p.data_ptr() for p in self._parameters]
        self._small: list[Tensor] = []
        small_at: list[tuple[int, int]] = []
        rows = 0
        buckets: list[np.ndarray] = []
        signs: list[np.ndarray] = []
        flat_signs: list[Tensor] = []
        self._segments: list[tuple[Tensor | None, Tensor, _Cast]] = []
        large: list[tuple[int, Tensor]] = []
        for index, parameter in enumerate(self._parameters):
            p = _real(parameter.detach())
            if p.numel() >= _SMALL and p.numel() % c == 0 and p.device == device:
                large.append((index, p))
                continue
            count = -(-p.numel() // c)
            self._small.append(p)
            small_at.append((rows, p.numel()))
            padded = torch.cat([pool[o : o + n * c] for o, n in self._windows(self._keys[index], count)])
            flat_signs.append(padded)
            rows += count
            self._place(index, count, buckets, signs)
        self._flat = torch.zeros(rows, c, dtype=torch.float64, device=device)
        self._flat_signs = (torch.cat(flat_signs) if flat_signs else pool[:0]).view(rows, c).to(torch.float64)
        base = self._flat.view(-1)
        self._small_views = [
            base[at * c : at * c + n].view(p.shape) for (at, n), p in zip(small_at, self._small, strict=True)
        ]
        for index, p in large:
            start = 0
            count = p.numel() // c
            for offset, n in self._windows(self._keys[index], count):
                cast = _Cast(p, start, n, c)
                ready = p.view(-1)[start * c : (start + n) * c].view(n, c) if _plain(p) else None
                self._segments.append((ready, pool[offset : offset + n * c].view(n, c), cast))
                start += n
            self._place(index, count, buckets, signs)
        self._arrange(np.concatenate(buckets), np.concatenate(signs))
        self._zero = torch.zeros(1, dtype=torch.float64, device=device)

    def _windows(self, key: int, count: int) -> list[tuple[int, int]]:
        """Offsets into the pool and numbers of chunks, one pair for every run of chunks that fits a window."""
        per = _WINDOW // self._chunk
        starts = range(0, count, per)
        offsets = _mix(np.uint64(key) + np.arange(1, len(starts) + 1, dtype=np.uint64)) % np.uint64(_WINDOW)
        return [(int(o), min(per, count - s)) for o, s in zip(offsets, starts, strict=True)]

    def _place(self, index: int, count: int, buckets: list[np.ndarray], signs: list[np.ndarray]) -> None:
        key = self._keys[index]
        chunk = np.arange(count, dtype=np.uint64)
        # Neighbouring chunks go to different buckets, so that buckets are equally full whatever the hash.
        buckets.append(((chunk + np.uint64(key % self.size)) % np.uint64(self.size)).astype(np.int64))
        signs.append(1.0 - 2.0 * (_mix(chunk ^ np.uint64(key)) >> np.uint64(63)).astype(np.float64))

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


class _Cast:
    """Chunks of a parameter that is not contiguous float32: converted anew at each call."""

    def __init__(self, parameter: Tensor, start: int, count: int, chunk: int) -> None:
        self._parameter, self._start, self._count, self._chunk = parameter, start, count, chunk

    def __call__(self) -> Tensor:
        flat = self._parameter.reshape(-1)
        part = flat[self._start * self._chunk : (self._start + self._count) * self._chunk]
        return part.to(torch.float32).view(self._count, self._chunk)


def _plain(p: Tensor) -> bool:
    return p.is_contiguous() and p.dtype == torch.float32


def _real(p: Tensor) -> Tensor:
    return torch.view_as_real(p) if p.is_complex() else p


@lru_cache(maxsize=4)
def _pool(seed: int) -> Tensor:
    bits = np.random.Philox(key=seed).random_raw(2 * _WINDOW // 64).view(np.uint8)
    return torch.from_numpy(np.unpackbits(bits).astype(np.float32) * 2.0 - 1.0)


def _key(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest(), "little") >> 1


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64 finaliser: a counter-based generator (Steele, Lea, Flood, OOPSLA 2014, section 5)."""
    x = (x + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = x ^ (x >> np.uint64(31))
    return mixed
