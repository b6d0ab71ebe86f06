"""Batch sources that own their randomness and can be rewound to any batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from kalmanguard.errors import ConfigurationError

#: Inputs and targets, both with the examples along dimension 0.
Batch = tuple[Tensor, Tensor]


def seeded(*keys: int) -> torch.Generator:
    """Make a generator of its own for the given keys, independent of torch's global one."""
    seed = int(np.random.SeedSequence(keys).generate_state(1)[0])
    return torch.Generator().manual_seed(seed)


class BatchStream(ABC, Iterator[Batch]):
    """An endless source of batches in which batch number ``i`` is a function of ``(seed, i)`` alone.

    Its whole state is therefore one number, the position, and rewinding is exact: no generator has to be wound back.

    Parameters
    ----------
    seed
        Key of the order; never touches torch's global generator.
    batch_size
        Examples per batch.
    device
        Where the batches are put.

    Raises
    ------
    ConfigurationError
        A negative seed, or a batch size below 1.
    """

    def __init__(self, *, seed: int, batch_size: int, device: torch.device) -> None:
        if seed < 0:
            raise ConfigurationError(f"seed = {seed} is negative; use 0 or a positive number.")
        if batch_size < 1:
            raise ConfigurationError(f"batch_size = {batch_size}: a batch holds at least one example.")
        self.seed = seed
        self.batch_size = batch_size
        self.device = device
        self.position = 0

    @abstractmethod
    def batch(self, index: int) -> Batch:
        """Return batch number ``index``, counted from 0, on the CPU."""

    def __next__(self) -> Batch:
        inputs, targets = self.batch(self.position)
        self.position += 1
        return inputs.to(self.device), targets.to(self.device)

    def state_dict(self) -> dict[str, int]:
        """Return the position in the stream, with the seed and batch size that it belongs to."""
        return {"seed": self.seed, "batch_size": self.batch_size, "position": self.position}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Move to the position of ``state_dict``.

        Raises
        ------
        ConfigurationError
            The state belongs to a stream with another seed or batch size.
        """
        for key, own in (("seed", self.seed), ("batch_size", self.batch_size)):
            if state_dict[key] != own:
                raise ConfigurationError(
                    f"This state belongs to a stream with {key} = {state_dict[key]}, but this one has {own}; "
                    f"make the plant with the same {key}."
                )
        self.position = int(state_dict["position"])


class ShuffledStream(BatchStream):
    """A fixed set in a fresh random order every epoch; an incomplete last batch is dropped.

    Examples
    --------
    >>> stream = ShuffledStream(torch.arange(6.0), torch.arange(6), seed=0, batch_size=3, device=torch.device("cpu"))
    >>> first, _ = next(stream)
    >>> second, _ = next(stream)
    >>> sorted(torch.cat([first, second]).tolist())
    [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    >>> stream.load_state_dict({"seed": 0, "batch_size": 3, "position": 0})
    >>> torch.equal(next(stream)[0], first)
    True
    """

    def __init__(self, inputs: Tensor, targets: Tensor, *, seed: int, batch_size: int, device: torch.device) -> None:
        super().__init__(seed=seed, batch_size=batch_size, device=device)
        if batch_size > len(inputs):
            raise ConfigurationError(f"batch_size = {batch_size} exceeds the {len(inputs)} training examples.")
        self._inputs = inputs
        self._targets = targets
        self._per_epoch = len(inputs) // batch_size
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.long)

    def batch(self, index: int) -> Batch:
        """Return batch number ``index``, counted from 0, on the CPU."""
        epoch, place = divmod(index, self._per_epoch)
        if epoch != self._epoch:
            self._order = torch.randperm(len(self._inputs), generator=seeded(self.seed, epoch))
            self._epoch = epoch
        chosen = self._order[place * self.batch_size : (place + 1) * self.batch_size]
        return self._inputs[chosen], self._targets[chosen]


class WindowStream(BatchStream):
    """Windows of a token sequence at random places; the targets are the inputs one token later."""

    def __init__(self, tokens: Tensor, *, context: int, seed: int, batch_size: int, device: torch.device) -> None:
        super().__init__(seed=seed, batch_size=batch_size, device=device)
        self._tokens = tokens
        self._places = len(tokens) - context
        self._window = torch.arange(context + 1)
        if self._places < 1:
            raise ConfigurationError(f"context = {context} exceeds the {len(tokens)} training tokens.")

    def batch(self, index: int) -> Batch:
        """Return batch number ``index``, counted from 0, on the CPU."""
        starts = torch.randint(self._places, (self.batch_size, 1), generator=seeded(self.seed, index))
        windows = self._tokens[starts + self._window].long()
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def in_batches(inputs: Tensor, targets: Tensor, *, batch_size: int, device: torch.device) -> list[Batch]:
    """Cut a finite set into batches, in order, on the device; the last one may be smaller."""
    pairs = zip(torch.split(inputs, batch_size), torch.split(targets, batch_size), strict=True)
    return [(x.clone().to(device), y.clone().to(device)) for x, y in pairs]
