"""The processes that train one model, and the few numbers that they tell each other in every step."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any, Self, TypeVar, final

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from kalmanguard.distributed.agreement import REPLICAS, Role, Sensed, Summary, settled, short_digest
from kalmanguard.distributed.holdings import Holdings, holdings
from kalmanguard.distributed.lines import Lines
from kalmanguard.errors import KalmanguardError, RankError
from kalmanguard.records import Decision, FloatArray, Measurement, Outcome
from kalmanguard.sensors.norm import total_norm
from kalmanguard.sensors.shards import data_mesh, is_sharded, local

T = TypeVar("T")


@final
class Replicas:
    """A group of ranks that train one model together and take the same steps: replicas, shards, or replicas of shards.

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
    holdings
        Who holds what; see `divide`.
    together
        Latest step after which ranks that should hold the same parameters were seen to do so.

    Notes
    -----
    Every rank runs an engine of its own on one and the same measurement: what the ranks have measured is added up
    (`kalmanguard.distributed.agreement`), and a digest of what was decided goes along with the next one, so decisions
    are identical by construction, and that is checked in every step. Cost per step: one sum of three numbers before the
    optimizer steps, and one of about a hundred after it, over lines of their own (`kalmanguard.distributed.lines`), so
    they do not stand in the queue of the gradients. Both are waited for: read a step late, a velocity would be judged
    when the next step was taken on top of it. All else that is told, which is little and rare, goes through a process
    group of its own (gloo, on the processor); only where the ranks differ in something is each of them asked for what
    it has measured. Whatever goes wrong in an exchange is a `RankError` on every rank that is left, within the
    timeout; what one rank alone cannot do (measure, probe, restore) is a fault of supervision on all of them.
    """

    def __init__(self, *, timeout_s: float, sketch_size: int) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._timeout_s, self._sketch_size = timeout_s, sketch_size
        self._group = self._ask(
            "agree on a process group", lambda: dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        )
        self._lines = Lines.laid(
            self.rank,
            self.size,
            tell=self._told,
            agree=lambda mine: bool(self.smallest(int(mine))),
            timeout_s=timeout_s,
        )
        self.holdings = Holdings([], (), 0)
        self.together = -1
        self._decided = 0
        self._holders: dict[int, int] = {}
        self._roles: list[Role] = []
        self._summary: Summary | None = None

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

    def divide(self, named_parameters: Iterable[tuple[str, Tensor]]) -> Holdings:
        """Find out which rank holds which part of the parameters."""
        self.holdings = holdings(named_parameters, self.rank, self._gathered_rows)
        self._holders = {id(p): part.holders for part in self.holdings.parts for _, p in part.parameters}
        self._roles = [Role(part.owned, part.slot) for part in self.holdings.parts]
        self._summary = Summary(ranks=self.size, roles=self._roles, shared=self.holdings.shared, size=self._sketch_size)
        return self.holdings

    def check(self, positions: Sequence[FloatArray]) -> None:
        """Check that ranks which should hold the same parameters do.

        Parameters
        ----------
        positions
            Sketches of the parts that `divide` has found.

        Raises
        ------
        RankError
            They do not.
        """
        mine = [(role.slot, position.tobytes()) for role, position in zip(self._roles, positions, strict=True)]
        held: dict[int, tuple[int, bytes]] = {}
        for rank, parts in enumerate(self._told(mine)):
            for slot, position in parts:
                first, known = held.setdefault(slot, (rank, position)) if slot is not None else (rank, position)
                if known != position:
                    raise RankError(
                        f"Rank {rank} has another set of parameters than rank {first}: every rank must be given the "
                        "same (settings.replicas = False, if that is meant)."
                    )

    def gradient(self, parameters: Sequence[Tensor], told: float | None) -> tuple[float, float | None]:
        """Norm of the gradient of the whole model, infinite when it is not a number on any rank.

        Parameters
        ----------
        parameters
            Those of this rank that have a gradient.
        told
            Norm that the user has told, of before clipping.

        Returns
        -------
        tuple
            Norm of what is there now, and that from before clipping: the root mean square of what the ranks were told.
        """
        square = 0.0
        for holders, group in _by_holders(parameters, self._holders).items():
            norm = total_norm([local(p.grad) for p in group if p.grad is not None])
            # Each of the ranks that hold the same adds its share, so that what one of them alone has is not lost.
            square += norm * norm / holders
        known = math.inf if told is None else told
        row = [square, known * known, float(told is not None)]
        value = np.array([x if not math.isnan(x) else math.inf for x in row])
        present, before, those = self._added("compare gradients", value).tolist()
        return math.sqrt(present), math.sqrt(before / self.size) if those == self.size else None

    def agree(
        self, measurement: Measurement | None, sketched: Sequence[tuple[FloatArray, FloatArray | None, float]]
    ) -> Measurement:
        """Put the measurements of all ranks together, the same on each.

        Parameters
        ----------
        measurement
            What this rank has measured; ``None`` when it could not.
        sketched
            Position, velocity and rounding floor of each of its parts.

        Raises
        ------
        RankError
            A rank does not answer, is at another step, or has decided otherwise.
        KalmanguardError
            A rank could not measure.
        """
        assert self._summary is not None  # `divide` comes first
        sensed: Sensed | None = None
        fault: Exception | None = None
        try:
            sensed = None if measurement is None else self._sensed(measurement, sketched)
            row = self._summary.vector(sensed)
        except Exception as error:
            # The others must hear of it before it goes on its way.
            sensed, fault, row = None, error, self._summary.vector(None)
        total = self._added("compare what was measured", row)
        # A rank that has not measured does not know what all the others know: that one is missing.
        found = None if sensed is None else self._summary.agreed(total, sensed.measurement)
        if found is None:
            try:
                found = settled(self._told((sensed, self._roles)), measurement or Measurement(step=0))
            except KalmanguardError as error:
                raise error from fault
        if not any(item.detector == REPLICAS for item in found.findings):
            self.together = found.step
        return found

    def remember(self, decision: Decision) -> None:
        """Keep a digest of what was decided, to be compared with the others' in the next step."""
        text = repr(
            (decision.step, decision.proposed, decision.level, decision.mode, decision.orders, decision.statistics)
        )
        self._decided = short_digest(text.encode())

    def gather(self, losses: FloatArray | None, part: int, parts: int) -> list[FloatArray]:
        """Losses of each part of a probe, of the first rank that has read it; ``None`` where a rank could not.

        Raises
        ------
        RankError
            A rank does not answer.
        KalmanguardError
            A rank could not read its part.
        """
        size = -1.0 if losses is None else float(len(losses))
        heads = self._gathered("count a probe", np.array([size, float(part)]))
        sizes = heads[:, 0]
        if (sizes < 0).any():
            raise KalmanguardError(f"rank {int((sizes < 0).argmax())} could not read its part of the probe")
        row = np.zeros(int(sizes.max()))
        if losses is not None:
            row[: len(losses)] = losses
        table = self._gathered("read a probe", row)
        readers = [int((heads[:, 1] == number).argmax()) for number in range(parts)]
        return [table[rank, : int(sizes[rank])] for rank in readers]

    def parts_of_data(self, model: nn.Module) -> tuple[int, int]:
        """Which part of the data this rank works on, and how many parts there are.

        Ranks that split a forward pass between them (tensor parallelism) must be given the same examples; where it is
        not known which do, all are.
        """
        if not any(is_sharded(p) for p in model.parameters()):
            return self.rank, self.size
        mesh = data_mesh(model)
        if mesh is None or not bool((mesh == self.rank).any()):
            return 0, 1
        return int((mesh.reshape(-1) == self.rank).nonzero()[0]), mesh.numel()

    def all(self, flag: bool) -> bool:
        """Whether something is so on every rank."""
        return float(self._added("compare a flag", np.array([float(flag)]))[0]) == self.size

    def smallest(self, number: int) -> int:
        """The smallest of whole numbers, such as what memory allows."""
        return int(self._gathered("compare numbers", np.array([float(number)])).min())

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

    def outcomes(self, outcome: Outcome | None) -> Outcome | None:
        """What came of a restore on all ranks: its digests cover those of each; ``None`` where one could not.

        Replicas that restore without their random streams have one and the same digest, which then stands for all.
        """
        told = self._told(outcome)
        done = [item for item in told if item is not None]
        if len(done) < len(told) or outcome is None:
            return None
        if all(item == done[0] for item in done):
            return outcome
        expected, actual = (
            _digest_of([getattr(item, name) for item in done]) for name in ("digest_expected", "digest_actual")
        )
        error = next((item.error for item in done if item.error is not None), None)
        return dataclasses.replace(outcome, digest_expected=expected, digest_actual=actual, error=error)

    def of_first(self, value: T) -> T:
        """What rank 0 has, such as durations, which no two processes measure alike."""
        held: list[Any] = [value]
        self._ask("hear rank 0", lambda: dist.broadcast_object_list(held, src=0, group=self._group))
        found: T = held[0]
        return found

    def _sensed(
        self, measurement: Measurement, sketched: Sequence[tuple[FloatArray, FloatArray | None, float]]
    ) -> Sensed:
        velocities = [velocity for _, velocity, _ in sketched if velocity is not None]
        return Sensed(
            measurement,
            self._decided,
            [position for position, _, _ in sketched],
            velocities if len(velocities) == len(sketched) else None,
            [floor for _, _, floor in sketched],
        )

    def close(self) -> None:
        """Hang up."""
        if self._lines is not None:
            self._lines.close()

    def _added(self, what: str, row: FloatArray) -> FloatArray:
        """The sum over all ranks."""
        lines = self._lines
        if lines is not None:
            return self._ask(what, lambda: lines.add(row))
        total = torch.from_numpy(row)
        self._ask(what, lambda: dist.all_reduce(total, group=self._group))
        found: FloatArray = total.numpy()
        return found

    def _told(self, value: T) -> list[T]:
        """What every rank has, in their order; plain values of our own only."""
        held: list[Any] = [None] * self.size
        self._ask("hear all ranks", lambda: dist.all_gather_object(held, value, group=self._group))
        return held

    def _gathered_rows(self, row: FloatArray) -> FloatArray:
        """Rows of different lengths, filled with zeros."""
        length = int(self._gathered("count parts", np.array([float(len(row))])).max())
        return self._gathered("compare parts", np.concatenate([row, np.zeros(length - len(row))]))

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
        except (RuntimeError, ValueError, OSError) as error:
            within = f"{what} with the others within {self._timeout_s:g} s"
            raise self._without_others(within, error) from error

    def _without_others(self, what: str, error: BaseException) -> RankError:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        return RankError(
            f"Rank {self.rank} of {self.size} could not {what}: another one has died, hangs, or takes another path "
            f"({reason}). Start all ranks again from the last checkpoint, with Supervisor.resume."
        )


def _digest_of(digests: Sequence[str | None]) -> str | None:
    return None if None in digests else hashlib.sha256("".join(map(str, digests)).encode()).hexdigest()


def _by_holders(parameters: Sequence[Tensor], holders: dict[int, int]) -> dict[int, list[Tensor]]:
    groups: dict[int, list[Tensor]] = {}
    for p in parameters:
        if p.grad is not None and local(p.grad).numel():
            groups.setdefault(holders.get(id(p), 1), []).append(p)
    return groups
