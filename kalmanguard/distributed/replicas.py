"""The processes that train replicas of one model, and the few numbers that they tell each other in every step."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Self, TypeVar, final

import numpy as np
import torch
import torch.distributed as dist

from kalmanguard.distributed.agreement import agreed, packed
from kalmanguard.errors import KalmanguardError, RankError
from kalmanguard.records import Decision, FloatArray, Measurement

T = TypeVar("T")


@final
class Replicas:
    """A group of ranks that hold the same parameters and take the same steps, as under DistributedDataParallel.

    Parameters
    ----------
    timeout_s
        Seconds after which a rank that does not answer is given up.
    sketch_size
        Rows of the sketch.

    Attributes
    ----------
    rank, size
        Of this process, and how many there are.

    Notes
    -----
    Every rank runs an engine of its own on one and the same measurement: what the ranks have measured is exchanged and
    put together before it is judged (`kalmanguard.distributed.agreement`), and a digest of what was decided goes along
    with the next one, so decisions are identical by construction, and that is checked in every step. The exchange has a
    process group of its own (gloo, on the processor), so it does not stand in the queue of the gradients. Cost per
    step: one reduction of a number before the optimizer steps, and one gathering of the sketch and some twenty numbers
    after it, both waited for. Whatever goes wrong in an exchange is a `RankError` on every rank that is left, within
    the timeout; what one rank alone cannot do (measure, probe, restore) is a fault of supervision on all of them.
    """

    def __init__(self, *, timeout_s: float, sketch_size: int) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._timeout_s, self._sketch_size = timeout_s, sketch_size
        self._group = self._ask(
            "agree on a process group", lambda: dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        )
        self._decided = 0.0

    @classmethod
    def found(cls, *, timeout_s: float, sketch_size: int) -> Self | None:
        """The ranks of the default process group; ``None`` in a process that trains alone."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return None
        return cls(timeout_s=timeout_s, sketch_size=sketch_size)

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that keeps the journal and the checkpoints."""
        return self.rank == 0

    def largest(self, norm: float) -> float:
        """The largest gradient norm of any rank; infinite when one is not a number."""
        value = torch.tensor([norm if not math.isnan(norm) else math.inf], dtype=torch.float64)
        self._ask("compare gradients", lambda: dist.all_reduce(value, dist.ReduceOp.MAX, group=self._group))
        return float(value)

    def agree(self, measurement: Measurement | None, position: FloatArray | None) -> Measurement:
        """Put the measurements of all ranks together, the same on each.

        Parameters
        ----------
        measurement
            What this rank has measured; ``None`` when it could not.
        position
            The sketch of its parameters, shape ``(k,)``.

        Raises
        ------
        RankError
            A rank does not answer, is at another step, or has decided otherwise.
        KalmanguardError
            A rank could not measure.
        """
        row = packed(measurement, position, self._decided, size=self._sketch_size)
        table = self._gathered("compare what was measured", row)
        return agreed(table, measurement)

    def remember(self, decision: Decision) -> None:
        """Keep a digest of what was decided, to be compared with the others' in the next step."""
        text = repr(
            (decision.step, decision.proposed, decision.level, decision.mode, decision.orders, decision.statistics)
        )
        # 52 bits are exact in the float64 that it travels in.
        self._decided = float(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 12)

    def gather(self, losses: FloatArray | None) -> list[FloatArray]:
        """Parts of a probe, in the order of the ranks; ``None`` where a rank could not read its own.

        Raises
        ------
        RankError
            A rank does not answer.
        KalmanguardError
            A rank could not read its part.
        """
        sizes = self._gathered("count a probe", np.array([-1.0 if losses is None else float(len(losses))]))[:, 0]
        if (sizes < 0).any():
            raise KalmanguardError(f"rank {int((sizes < 0).argmax())} could not read its part of the probe")
        row = np.zeros(int(sizes.max()))
        if losses is not None:
            row[: len(losses)] = losses
        table = self._gathered("read a probe", row)
        return [table[rank, : int(size)] for rank, size in enumerate(sizes)]

    def smallest(self, number: int) -> int:
        """The smallest of whole numbers, such as what memory allows."""
        return int(self._gathered("compare memory", np.array([float(number)])).min())

    def same(self, text: str, what: str) -> None:
        """Check that a text is the same on all ranks.

        Raises
        ------
        RankError
            It is not.
        """
        digest = hashlib.sha256(text.encode()).digest()
        table = self._gathered(f"compare {what}", np.frombuffer(digest, dtype=np.uint8).astype(np.float64))
        differs = (table != table[0]).any(axis=1)
        if differs.any():
            raise RankError(
                f"Rank {int(differs.argmax())} has another {what} than rank 0: every rank must be given the same."
            )

    def of_first(self, value: T) -> T:
        """What rank 0 has, such as durations, which no two processes measure alike."""
        held: list[Any] = [value]
        self._ask("hear rank 0", lambda: dist.broadcast_object_list(held, src=0, group=self._group))
        found: T = held[0]
        return found

    def lost(self, error: BaseException) -> RankError | None:
        """What an exception says about the other ranks, if it is that of a collective which they did not join.

        The gradients are reduced by DistributedDataParallel, which says with a bare error of its backend, after the
        timeout of its own process group, what `RankError` says in words.
        """
        known = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
        return self._without_others("go on", error) if known else None

    def _gathered(self, what: str, row: FloatArray) -> FloatArray:
        mine = torch.from_numpy(np.ascontiguousarray(row, dtype=np.float64))
        rows = [torch.empty_like(mine) for _ in range(self.size)]
        self._ask(what, lambda: dist.all_gather(rows, mine, group=self._group))
        table: FloatArray = torch.stack(rows).numpy()
        return table

    def _ask(self, what: str, collective: Callable[[], T]) -> T:
        try:
            return collective()
        except (RuntimeError, ValueError) as error:
            within = f"{what} with the others within {self._timeout_s:g} s"
            raise self._without_others(within, error) from error

    def _without_others(self, what: str, error: BaseException) -> RankError:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        return RankError(
            f"Rank {self.rank} of {self.size} could not {what}: another one has died, hangs, or takes another path "
            f"({reason}). Start all ranks again from the last checkpoint, with Supervisor.resume."
        )
