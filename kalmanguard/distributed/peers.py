"""All ranks of a run, talking in a process group of their own about things that training need not wait for."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar, cast, final

import torch.distributed as dist

from kalmanguard.errors import RankError, SnapshotError

S = TypeVar("S")
T = TypeVar("T")


@final
class Peers:
    """The ranks of the default process group, or a process alone where there is none.

    Parameters
    ----------
    timeout_s
        Seconds after which a rank that does not answer is given up.

    Attributes
    ----------
    rank, size
        Of this process, and how many there are.
    group
        The process group (gloo, on the processor); ``None`` in a process that trains alone.

    Raises
    ------
    RankError
        Not all ranks make one.

    Notes
    -----
    Collective: every rank makes one at the same place. Two threads must not share one, since the order of their
    messages is not the same on every rank. What is exchanged is pickled by the ranks of this run for one another; no
    file takes part. After a `RankError` the group is out of step and answers no more.
    """

    def __init__(self, *, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self.rank, self.size = 0, 1
        self.group: dist.ProcessGroup | None = None
        if dist.is_available() and dist.is_initialized():
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
            self.group = self.ask(
                "agree on a process group", lambda: dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
            )

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def gather(self, what: str, value: T) -> list[T]:
        """What each rank has, in the order of the ranks; ``what`` says in an error what it was for.

        Raises
        ------
        RankError
            A rank does not answer.
        """
        if self.group is None:
            return [value]
        found: list[Any] = [None] * self.size
        self.ask(what, lambda: dist.all_gather_object(found, value, group=self.group))
        return cast("list[T]", found)

    def judged(self, what: str, value: S, judge: Callable[[list[S]], T]) -> T:
        """What rank 0 makes of the values of all ranks; they reach no other rank, so they may be many.

        Raises
        ------
        RankError
            A rank does not answer.
        """
        if self.group is None:
            return judge([value])
        given: list[Any] = [None] * self.size
        self.ask(what, lambda: dist.gather_object(value, given if self.is_first else None, group=self.group))
        held: list[Any] = [judge(given) if self.is_first else None]
        self.ask(what, lambda: dist.broadcast_object_list(held, src=0, group=self.group))
        return cast("T", held[0])

    def all(self, what: str, deed: Callable[[], T]) -> T:
        """Do something on every rank; return only if it went well on all of them.

        Raises
        ------
        SnapshotError
            It failed on a rank; the same sentence on each.
        RankError
            A rank does not answer.
        """
        made: T | None = None
        failure: Exception | None = None
        try:
            made = deed()
        except Exception as error:
            failure = error
        texts = self.gather(what, None if failure is None else _sentence(failure))
        failed = next((rank for rank, text in enumerate(texts) if text is not None), None)
        if failed is None:
            return cast("T", made)
        prefix = "" if self.size == 1 else f"Rank {failed}: "
        raise SnapshotError(f"{prefix}{texts[failed]}") from failure

    def ask(self, what: str, collective: Callable[[], T]) -> T:
        """Run a collective of this group.

        Raises
        ------
        RankError
            A rank has died, hangs, or is somewhere else.
        """
        try:
            return collective()
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise RankError(
                f"Rank {self.rank} of {self.size} could not {what} with the others within {self._timeout_s:g} s: one "
                f"has died, hangs, or takes another path ({reason}). Start again from the last checkpoint."
            ) from error


def _sentence(error: Exception) -> str:
    return str(error) if isinstance(error, SnapshotError) else f"{type(error).__name__}: {error}."
