"""How the elements of a sketch are read: views of large blocks that need no copy, one small buffer for all the rest."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from kalmanguard.sensors.shards import IntArray, Shard

WINDOW = 1 << 18  # elements of the sign pool that one fused product covers; 1 MiB of float32, stays in cache
_SMALL = 1 << 15  # blocks below this size are gathered into one buffer, one kernel for all of them


class Plan:
    """Pieces of parameters, each with the signs of its elements and the chunks that it belongs to.

    Parameters
    ----------
    chunk
        Elements of a chunk.
    pool
        Pool of signs, shape ``(2 * WINDOW,)``, float32, on ``device``.
    device
        Where the products are computed.

    Attributes
    ----------
    copied
        Contiguous pieces that are copied into the buffer.
    scattered
        Blocks whose rows do not fit into chunks, and the places of their elements in the buffer.
    segments
        Chunks of large blocks, shape ``(..., chunk)``, or what makes them, and their signs.
    """

    def __init__(self, chunk: int, pool: Tensor, device: torch.device) -> None:
        self._chunk, self._pool, self._device = chunk, pool, device
        #: Chunks that share one offset into the pool.
        self._per_window = WINDOW // chunk
        self.copied: list[Tensor] = []
        self.scattered: list[tuple[Tensor, Tensor]] = []
        self.segments: list[tuple[Tensor | Callable[[], Tensor], Tensor]] = []
        self._rows = 0
        self._spots: list[tuple[int, torch.Size]] = []
        self._signs: list[Tensor] = []
        self._in_buffer: list[tuple[int, IntArray]] = []
        self._in_segments: list[tuple[int, IntArray]] = []

    def add(self, block: Shard, key: int) -> None:
        """Take a block in; ``key`` is that of its parameter."""
        if block.tensor.is_complex():
            block = Shard(torch.view_as_real(block.tensor), (*block.whole, 2), (*block.offset, 0))
        tensor, c = block.tensor, self._chunk
        starts, length = block.runs()
        large = tensor.numel() >= _SMALL and tensor.device == self._device
        if len(starts) == 1:
            first = int(starts[0])
            # What is left of chunks that the block does not hold from end to end.
            head, tail = -first % c, (first + length) % c
            if not large or ((head or tail) and not tensor.is_contiguous()):
                head, tail = length, 0
            self._copy(tensor, first, 0, head, key)
            self._cut(tensor, first, head, length - tail, key)
            self._copy(tensor, first, length - tail, tail, key)
            return
        rest = np.arange(len(starts))
        regular = len(np.unique(np.diff(starts))) == 1 and length % c == 0 and not (starts % c).any()
        if large and regular and tensor.is_contiguous():
            rest = self._cut_rows(tensor, starts, length, int(starts[1] - starts[0]), key)
        if len(rest) == len(starts):
            self._scatter(tensor, starts, length, key)
        else:
            rows = tensor.view(-1, length)
            for i in rest.tolist():
                self._copy(rows[i], int(starts[i]), 0, length, key)

    def buffer(self) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The buffer and its signs, shape ``(rows, chunk)``, and the places in it that `copied` is copied to."""
        flat = torch.zeros(self._rows, self._chunk, dtype=torch.float64, device=self._device)
        signs = torch.cat(self._signs) if self._signs else self._pool[:0].view(0, self._chunk)
        base = flat.view(-1)
        views = [base[at : at + shape.numel()].view(shape) for at, shape in self._spots]
        return flat, signs.to(torch.float64), views

    def chunks(self) -> list[tuple[int, IntArray]]:
        """Key and chunks, in the order of the buffer's rows and then of the segments."""
        return [*self._in_buffer, *self._in_segments]

    def _into_buffer(self, key: int, chunks: IntArray) -> int:
        """Add rows to the buffer; returns the place of their first element."""
        at = self._rows * self._chunk
        self._rows += len(chunks)
        self._in_buffer.append((key, chunks))
        windows = chunks // self._per_window
        starts = self._offsets(key, windows) + (chunks % self._per_window) * self._chunk
        if len(chunks) and chunks[-1] - chunks[0] == len(chunks) - 1 and windows[0] == windows[-1]:
            signs = self._pool[int(starts[0]) : int(starts[0]) + len(chunks) * self._chunk].view(-1, self._chunk)
        else:
            index = torch.from_numpy(starts).to(self._device)[:, None] + torch.arange(self._chunk, device=self._device)
            signs = self._pool[index]
        self._signs.append(signs)
        return at

    def _copy(self, tensor: Tensor, first: int, at: int, count: int, key: int) -> None:
        """A contiguous piece into the buffer: ``count`` elements from the ``at``-th one of the block."""
        if not count:
            return
        c, start = self._chunk, first + at
        place = self._into_buffer(key, np.arange(start // c, (start + count - 1) // c + 1)) + start % c
        piece = tensor if count == tensor.numel() else tensor.view(-1)[at : at + count]
        self.copied.append(piece)
        self._spots.append((place, piece.shape))

    def _cut(self, tensor: Tensor, first: int, start: int, stop: int, key: int) -> None:
        """Whole chunks of a contiguous block, one segment for each window of the pool."""
        c, at = self._chunk, start
        while at < stop:
            chunk = (first + at) // c
            window = chunk // self._per_window
            count = min((window + 1) * self._per_window - chunk, (stop - at) // c)
            offset = int(self._offsets(key, np.array([window]))[0]) + (chunk % self._per_window) * c
            signs = self._pool[offset : offset + count * c].view(count, c)
            self._segment(partial(_piece, tensor, at, count * c, (count, c)), tensor, signs)
            self._in_segments.append((key, np.arange(chunk, chunk + count)))
            at += count * c

    def _cut_rows(self, tensor: Tensor, starts: IntArray, length: int, spacing: int, key: int) -> IntArray:
        """Rows of a block that are whole chunks, at regular distances; returns those that lie across two windows."""
        c, per = self._chunk, self._per_window
        first, last = starts // c, (starts + length - 1) // c
        windows = np.where(first // per == last // per, first // per, -1)
        edges = np.flatnonzero(np.diff(windows, prepend=-2, append=-2))
        for low, high in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            window = int(windows[low])
            if window < 0:
                continue
            offset = int(self._offsets(key, windows[low : low + 1])[0]) + int(first[low] % per) * c
            shape = (high - low, length // c, c)
            signs = self._pool.as_strided(shape, (spacing, c, 1), offset)
            self._segment(partial(_piece, tensor, low * length, (high - low) * length, shape), tensor, signs)
            self._in_segments.append((key, (first[low:high, None] + np.arange(length // c)).ravel()))
        return np.flatnonzero(windows < 0)

    def _segment(self, make: Callable[[], Tensor], tensor: Tensor, signs: Tensor) -> None:
        ready = tensor.is_contiguous() and tensor.dtype == torch.float32
        self.segments.append((make() if ready else make, signs))

    def _scatter(self, tensor: Tensor, starts: IntArray, length: int, key: int) -> None:
        """Rows that begin or end within chunks, element by element."""
        c = self._chunk
        elements = (starts[:, None] + np.arange(length)).ravel()
        chunks, row = np.unique(elements // c, return_inverse=True)
        place = self._into_buffer(key, chunks)
        self.scattered.append((tensor, torch.from_numpy(place + row * c + elements % c).to(self._device)))

    def _offsets(self, key: int, windows: IntArray) -> IntArray:
        """Where in the pool the signs of a window begin."""
        found: IntArray = (mix(np.uint64(key) + windows.astype(np.uint64) + np.uint64(1)) % np.uint64(WINDOW)).astype(
            np.int64
        )
        return found


def _piece(tensor: Tensor, at: int, count: int, shape: tuple[int, ...]) -> Tensor:
    return tensor.reshape(-1)[at : at + count].to(torch.float32).view(shape)


def mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64 finaliser: a counter-based generator (Steele, Lea, Flood, OOPSLA 2014, section 5)."""
    x = (x + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = x ^ (x >> np.uint64(31))
    return mixed
