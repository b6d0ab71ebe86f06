"""The probe: held-out losses per example at the present parameters, measured without leaving a trace."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kalmanguard.errors import ConfigurationError
from kalmanguard.records import FloatArray, ProbeReading
from kalmanguard.sensors import losses as L
from kalmanguard.sensors.shards import is_fully_sharded, local, reshard
from kalmanguard.sensors.trace import BufferGuard, evaluation_mode, random_streams_kept


class Probe:
    """A fixed held-out set, materialised once, and the loss on it.

    Parameters
    ----------
    model
        The supervised model; a ``torch.compile``d one is evaluated through its original module, so that switching to
        evaluation mode compiles nothing.
    loader
        Iterable of held-out batches: ``(inputs, target)``, dicts, or tensors. Read once, at construction, with every
        random state restored afterwards.
    examples
        Number of examples that a reading evaluates.
    fresh
        Number of further examples that are set aside for the certificate; each is used once.
    loss_fn
        ``loss_fn(output, target)`` returning a loss per example or their mean; inferred when ``None``: a ``.loss`` on
        the output, cross-entropy for integer targets, mean squared error for float targets of the output's shape.

    Raises
    ------
    ConfigurationError
        The loader is empty or yields too few examples, or the loss cannot be inferred.

    Notes
    -----
    Where only a batch's mean can be had, a batch is cut into single examples if there are at most 32, else into 16
    parts, and a part is the unit. Cost: one forward pass over ``examples``.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        *,
        examples: int = 128,
        fresh: int = 0,
        loss_fn: L.LossFn | None = None,
    ) -> None:
        self._model: nn.Module = getattr(model, "_orig_mod", model)
        self._loss_fn = loss_fn
        parameter = next(self._model.parameters(), None)
        if parameter is None:
            raise ConfigurationError("The model has no parameters; there is nothing to supervise.")
        self.device = local(parameter).device
        self._guard = BufferGuard(self._model)
        with random_streams_kept(self.device):
            self._batches, self._fresh = _materialise(loader, examples, fresh, self.device)
        self.digest = _digest(self._batches)
        self._share = (0, 1)
        self._gather: Callable[[FloatArray | None, int, int], list[FloatArray]] | None = None
        self._sharded = is_fully_sharded(self._model)
        reading = self.read()
        if len(reading.losses) < 2:
            raise ConfigurationError(
                "The probe loader yields fewer than two examples; a probe needs at least 2, better 64 or more."
            )
        self.size = len(reading.losses)

    def share(self, part: int, parts: int, gather: Callable[[FloatArray | None, int, int], list[FloatArray]]) -> None:
        """Evaluate one part of the examples only, from now on, where the example is the unit; else all of them.

        Parameters
        ----------
        part, parts
            Number of this process's part, and how many there are; several processes may have the same one.
        gather
            Given this process's losses, or ``None`` when they could not be had, and these two numbers, returns the
            losses of each part.
        """
        whole = self.size == sum(map(L.batch_size, self._batches))
        self._share, self._gather = (part, parts) if whole else (0, 1), gather

    def shrink(self, size: int) -> None:
        """Evaluate the first ``size`` examples only, from now on; where parts are the unit, nothing changes."""
        if self.size != sum(map(L.batch_size, self._batches)) or size >= self.size:
            return
        self._batches, self.digest, self.size = self._first(size), self.digest_of(size), size

    def digest_of(self, size: int) -> str:
        """SHA-256 of the first ``size`` examples."""
        return _digest(self._first(size))

    def _first(self, size: int) -> list[Any]:
        kept = []
        for batch in self._batches:
            count = min(size, L.batch_size(batch))
            if count:
                kept.append(L.take(batch, count))
            size -= count
        return kept

    def read(self) -> ProbeReading:
        """Measure the held-out losses now: shape ``(n,)``, float64."""
        if self._gather is None:
            return ProbeReading(self._evaluate(self._batches))
        part, parts = self._share
        bounds = [_bounds(L.batch_size(batch), parts) for batch in self._batches] if parts > 1 else []
        mine, fault = None, None
        try:
            mine = self._evaluate_part(bounds, part) if bounds else self._evaluate(self._batches)
        except Exception as error:
            fault = error  # the others must hear of it before it goes on its way
        try:
            gathered = self._gather(mine, part, parts)
        except Exception as error:
            raise error from fault
        if not bounds:
            return ProbeReading(gathered[0])
        # From the order of parts to that of examples.
        starts = [0] * parts
        losses: list[FloatArray] = []
        for edges in bounds:
            for number, found in enumerate(gathered):
                count = edges[number + 1] - edges[number]
                losses.append(found[starts[number] : starts[number] + count])
                starts[number] += count
        return ProbeReading(np.concatenate(losses))

    def _evaluate_part(self, bounds: list[list[int]], part: int) -> FloatArray:
        """Losses of one part of each batch, by as many forward passes in every process: a sharded one waits in each."""
        counts = [edges[part + 1] - edges[part] for edges in bounds]
        pieces = [
            L.take(batch, max(count, 1), edges[part] if count else 0)
            for batch, edges, count in zip(self._batches, bounds, counts, strict=True)
        ]
        losses, kept, at = self._evaluate(pieces), [np.zeros(0)], 0
        for count in counts:
            kept.append(losses[at : at + count])
            at += max(count, 1)
        return np.concatenate(kept)

    @property
    def fresh_left(self) -> int:
        """Examples that are still unused for the certificate."""
        return sum(map(L.batch_size, self._fresh))

    def spend_fresh(self) -> None:
        """Take the examples that were set aside as used: an earlier process of the run has seen them."""
        self._fresh = []

    def read_fresh(self, batches: list[Any]) -> FloatArray:
        """Measure losses on other batches at the present parameters."""
        return self._evaluate(batches)

    def take_fresh(self, loader: Iterable[Any] | None = None) -> list[Any]:
        """Hand out unused examples, all that are left or those of ``loader``; they are never handed out again."""
        if loader is not None:
            with random_streams_kept(self.device):
                return [L.copied(batch, self.device) for batch in loader]
        batches, self._fresh = self._fresh, []
        return batches

    def _evaluate(self, batches: list[Any]) -> FloatArray:
        try:
            with random_streams_kept(self.device), self._guard.kept(), evaluation_mode(self._model):
                parts = [self._losses(batch) for batch in batches]
        finally:
            if self._sharded:
                reshard(self._model)
        losses: FloatArray = torch.cat(parts).double().cpu().numpy()
        return losses

    def _losses(self, batch: Any) -> Tensor:
        size = L.batch_size(batch)
        output, target = self._forward(batch)
        losses = L.per_example(output, target, self._loss_fn, size)
        if losses is not None:
            return losses
        parts = size if size <= 32 else 16
        bounds = np.linspace(0, size, parts + 1).astype(int).tolist()
        means = []
        for start, stop in pairwise(bounds):
            output, target = self._forward(L.take(batch, stop - start, start))
            means.append(L.batch_mean(output, target, self._loss_fn))
        return torch.stack(means)

    def _forward(self, batch: Any) -> tuple[Any, Any]:
        inputs, keywords, target = L.split_batch(batch)
        output = self._model(*inputs, **keywords)
        # A user's own loss on a dict without a recognisable target gets the whole batch.
        return output, batch if target is None and isinstance(batch, Mapping) else target


def _bounds(size: int, parts: int) -> list[int]:
    """Edges of nearly equal parts."""
    return [size * part // parts for part in range(parts + 1)]


def _materialise(loader: Iterable[Any], examples: int, fresh: int, device: torch.device) -> tuple[list[Any], list[Any]]:
    probe: list[Any] = []
    spare: list[Any] = []
    wanted, reserve = examples, fresh
    for batch in loader:
        at, size = 0, L.batch_size(batch)
        if wanted and size:
            at = min(wanted, size)
            probe.append(L.copied(L.take(batch, at), device))
            wanted -= at
        if at < size and reserve:
            count = min(reserve, size - at)
            spare.append(L.copied(L.take(batch, count, at), device))
            reserve -= count
        if not wanted and not reserve:
            break
    if not probe:
        raise ConfigurationError("The probe loader is empty; it must yield at least one batch of held-out examples.")
    return probe, spare


def _digest(batches: list[Any]) -> str:
    """SHA-256 over the probe set's tensors, so that a journal says which examples it is about."""
    digest = hashlib.sha256()
    for batch in batches:
        items = (
            batch.items() if isinstance(batch, Mapping) else enumerate(batch if isinstance(batch, tuple) else (batch,))
        )
        for key, item in items:
            if isinstance(item, Tensor):
                digest.update(f"{key}:{item.dtype}:{tuple(item.shape)}".encode())
                digest.update(item.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
