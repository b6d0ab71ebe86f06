"""The state of every random generator that training draws from."""

from __future__ import annotations

import ctypes
import random
import sys
from dataclasses import dataclass
from typing import Any, Self, cast

import numpy as np
import torch
from torch import Tensor

from kalmanguard.errors import SnapshotError

_MT19937_BYTES = 624 * 4 + 4

NumpyState = tuple[str, np.ndarray[Any, np.dtype[np.uint32]], int, int, float]


@dataclass(frozen=True, slots=True, eq=False)
class RandomState:
    """Random state of torch on the CPU and every initialised device, of ``random`` and of numpy's global generator."""

    torch_cpu: Tensor
    cuda: dict[int, Tensor]
    mps: Tensor | None
    python: tuple[Any, ...]
    numpy: NumpyState

    @classmethod
    def capture(cls, *, numpy_memo: NumpyMemo | None = None) -> Self:
        """Read all generators; none of them advances."""
        cuda: dict[int, Tensor] = {}
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            cuda = {index: torch.cuda.get_rng_state(index) for index in range(torch.cuda.device_count())}
        mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
        return cls(
            torch_cpu=torch.get_rng_state(),
            cuda=cuda,
            mps=mps,
            python=random.getstate(),
            numpy=numpy_memo.read() if numpy_memo is not None else _numpy_state(),
        )

    def restore(self) -> None:
        """Set all generators; devices that no longer exist are skipped."""
        torch.set_rng_state(self.torch_cpu)
        if self.cuda and torch.cuda.is_available():
            for index, state in self.cuda.items():
                if index < torch.cuda.device_count():
                    torch.cuda.set_rng_state(state, index)
        if self.mps is not None and torch.backends.mps.is_available():
            torch.mps.set_rng_state(self.mps)
        random.setstate(self.python)
        np.random.set_state(self.numpy)

    def tree(self) -> dict[str, Any]:
        """Return the state as a plain tree that the codec can write."""
        return {
            "torch_cpu": self.torch_cpu,
            "cuda": dict(self.cuda),
            "mps": self.mps,
            "python": self.python,
            "numpy": tuple(self.numpy),
        }

    @classmethod
    def from_tree(cls, tree: Any) -> Self:
        """Rebuild the state from `tree`, refusing what no generator would accept.

        Raises
        ------
        SnapshotError
            The tree is not one that `tree` made.
        """
        try:
            state = cls(
                torch_cpu=tree["torch_cpu"],
                cuda=dict(tree["cuda"]),
                mps=tree["mps"],
                python=tuple(tree["python"]),
                numpy=cast("NumpyState", tuple(tree["numpy"])),
            )
            torch.Generator().set_state(state.torch_cpu)
            random.Random().setstate(state.python)
            np.random.RandomState(np.random.MT19937()).set_state(state.numpy)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise SnapshotError(f"The random state in the checkpoint cannot be used: {error}.") from error
        return state


def _numpy_state() -> NumpyState:
    return cast("NumpyState", np.random.get_state(legacy=True))


class NumpyMemo:
    """Reads numpy's global state, again only when it moved.

    ``np.random.get_state`` takes 25 us, most of them to turn 624 words into Python numbers, and a torch run rarely
    draws from numpy. The words in memory are compared instead. Their layout is checked against ``get_state`` at each
    full read, so an unknown layout costs time, not exactness.
    """

    def __init__(self) -> None:
        self._words = b""
        self._state: NumpyState | None = None

    def read(self) -> NumpyState:
        """Return the present state of numpy's global generator."""
        generator = np.random.mtrand.get_bit_generator()
        if not isinstance(generator, np.random.MT19937):
            return _numpy_state()
        words = ctypes.string_at(cast(int, generator.ctypes.state_address), _MT19937_BYTES)
        if self._state is not None and words == self._words:
            return self._state
        state = _numpy_state()
        # A pending second normal deviate is used up without moving the words, so such a state is never remembered.
        known_layout = words == state[1].astype(np.uint32).tobytes() + int(state[2]).to_bytes(4, sys.byteorder)
        self._state = state if known_layout and not state[3] else None
        self._words = words
        return state

    def forget(self) -> None:
        """Read in full next time: a restored state may differ from the remembered one in its pending deviate only."""
        self._state = None
