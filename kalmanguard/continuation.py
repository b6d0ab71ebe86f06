"""The state of a supervisor as plain values, and how a run goes on from its last clean checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from kalmanguard import statefile
from kalmanguard.detectors.drift import RATES
from kalmanguard.errors import ConfigurationError, JournalError, SnapshotError
from kalmanguard.journal.reader import JournalReader
from kalmanguard.journal.schema import Row
from kalmanguard.loop import Loop

_NEVER = -(1 << 40)
#: Of `state_of`; another one than before wherever the state of the engine has another shape.
_STATE_FORMAT = 3


class _Found(NamedTuple):
    """A checkpoint that is in place: step of its state, what was saved beside it, digest of its manifest."""

    step: int
    meta: dict[str, Any]
    digest: str


def state_of(loop: Loop) -> dict[str, Any]:
    """The supervisor's own state as plain values; snapshots are not part of it."""
    return {
        "format": _STATE_FORMAT,
        "step": loop.step,
        "objective": loop.objective,
        "engine": statefile.dump(loop.state),
        "probe": loop.probe.digest,
        "probe_examples": loop.probe.size,
        "stride": loop.suite.stride,
        "tally": dict(loop.tally),
        "rate_ceiling": loop.actuator.rate_ceiling,
    }


def take_up(loop: Loop, state: Mapping[str, Any]) -> None:
    """Go on from a saved state; the ring starts empty.

    Raises
    ------
    ConfigurationError
        The state is of another format or another probe set.
    """
    if state.get("format") != _STATE_FORMAT:
        raise ConfigurationError(
            f"The supervisor's saved state has format {state.get('format')!r}; this version reads format "
            f"{_STATE_FORMAT}."
        )
    examples = int(state["probe_examples"])
    if state["probe"] != loop.probe.digest_of(examples):
        raise ConfigurationError(
            "The saved state belongs to another probe set; pass the same probe_loader, or call reset()."
        )
    loaded = statefile.load(state["engine"])
    # Its own wealth begins anew, so that a third party can follow it from the journal.
    drift = loaded.ledger.drift._replace(wealth=(0.0,) * len(RATES))
    ledger = loaded.ledger._replace(slots=(), episode=None, last_snapshot=_NEVER, drift=drift)
    loop.probe.shrink(examples)
    loop.suite.stride = int(state["stride"])
    loop.tally = Counter({str(k): int(v) for k, v in state["tally"].items()})
    ceiling = float(state.get("rate_ceiling", 1.0))
    loop.resume_at(int(state["step"]), int(state["objective"]), loaded._replace(ledger=ledger, saved=()))
    loop.tap.begun = True  # the first reading was taken in the run that the state comes from
    loop.actuator.rate_ceiling = ceiling
    _record_resume(loop)


def continue_run(loop: Loop, run_dir: Path | None, *, or_anew: bool, rewinds: bool) -> int | None:
    """Restore the last clean checkpoint: training and supervision; on all ranks.

    Parameters
    ----------
    loop
        Newly made, with the optimizer bound to it.
    run_dir
        Where this rank keeps the journal, if it does.
    or_anew
        Whether a run that never had a checkpoint may begin anew.
    rewinds
        Whether the data loader is rewound.

    Returns
    -------
    int or None
        Step of the restored state; ``None`` when the run begins anew.
    """
    loop.tap.bind()
    spent = _fresh_spent(loop, run_dir)
    found = _restored(loop, run_dir, or_anew=or_anew, rewinds=rewinds)
    if found is None:
        # Killed before its first checkpoint: the records go on, the training begins anew.
        _record_resume(loop, anew=True)
        loop.tally.update(spent)
        return None
    # The checkpoint may be of an earlier step than the one it was written at: the filters go back with the state.
    state = statefile.load(found.meta["engine"])
    estimators = dict(state.saved).get(found.step, state.estimators)
    take_up(loop, {**found.meta, "engine": statefile.dump(state._replace(estimators=estimators))})
    loop.tally.update(spent - loop.tally)
    # Every file of it was verified. Who was killed right after writing it could not say so any more.
    durable = {"state": found.step, "clean": True, "manifest_sha256": found.digest, "found": True}
    loop.journal.record("durable", loop.step, durable)
    # What was restored is known to be good: it is probed and captured again before it is trained on.
    loop.tap.begun = False
    return found.step


def _restored(loop: Loop, run_dir: Path | None, *, or_anew: bool, rewinds: bool) -> _Found | None:
    """Bring the last clean checkpoint back; ``None``, if that is allowed, when there never was one."""
    store, replicas = loop.actuator.store, loop.replicas
    if store is None and (replicas is None or replicas.is_first):
        raise SnapshotError("A run without a run folder has no checkpoint to resume from.")
    if _first_has_none(loop, run_dir, or_anew=or_anew):
        return None
    if replicas is not None:
        from kalmanguard.distributed.durable import ShardedStore

        if isinstance(store, ShardedStore):
            # Every rank reads its own part, and gets its own random streams where there are as many ranks as before.
            step, meta = store.load_last_clean_into(rng=True, schedule=True, data=rewinds)
            return _Found(step, meta, store.last_clean_digest())
    loaded, reason = None, ""
    if store is not None:
        try:
            loaded = (*store.load_last_clean(), store.last_clean_digest())
        except SnapshotError as error:
            if replicas is None:
                raise
            reason = str(error)
    if replicas is not None:
        loaded, reason = replicas.of_first((loaded, reason))
    if loaded is None:
        raise SnapshotError(reason)
    step, tree, meta, digest = loaded
    # One stream of random numbers on all ranks would be one and the same dropout everywhere.
    loop.actuator.state.load_tree(tree, rng=replicas is None or replicas.is_first, schedule=True, data=rewinds)
    return _Found(step, meta, digest)


def _first_has_none(loop: Loop, run_dir: Path | None, *, or_anew: bool) -> bool:
    """Whether there never was a checkpoint, by the folder and the records of the rank that keeps them."""
    if not or_anew:
        return False
    store, replicas = loop.actuator.store, loop.replicas
    none, reason = False, ""
    if run_dir is not None and store is not None:
        try:
            recorded = any(row.data().get("clean") for row in _recorded(run_dir, "durable"))
            none = not store.holds_clean and not recorded
        except JournalError as error:
            if replicas is None:
                raise
            reason = str(error)
    if replicas is not None:
        none, reason = replicas.of_first((none, reason))
    if reason:
        raise SnapshotError(reason)
    return none


def _recorded(run_dir: Path | None, kind: str) -> list[Row]:
    """Records of one kind from all processes that the run has had; none on a rank that keeps no journal."""
    if run_dir is None:
        return []
    with JournalReader(run_dir) as reader:
        return list(reader.rows(kind))


def _fresh_spent(loop: Loop, run_dir: Path | None) -> Counter[str]:
    """Bets that earlier processes have made: the level that they spent, and the examples, are gone for good."""
    spent = Counter[str]()
    for row in _recorded(run_dir, "fresh"):
        data = row.data()
        spent["bets"] = max(spent["bets"], int(data["index"]))
        used = int(data.get("first") or 0) + len(row.blob) // 8
        spent["fresh_examples"] = max(spent["fresh_examples"], used)
    if loop.replicas is not None:
        spent = loop.replicas.of_first(spent)
    if spent:
        loop.probe.spend_fresh()
    return spent


def _record_resume(loop: Loop, *, anew: bool = False) -> None:
    """Write all that a replay needs to go on from here."""
    record = {
        "step": loop.step,
        "engine": statefile.dump(loop.state),
        "settings": loop.settings.model_dump(mode="json"),
        "anew": anew,
    }
    loop.journal.record("resume", loop.step, record)
