"""From what a user passes to the loop that supervises it: every part made, in one process or in several."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

from kalmanguard.actuators.actions import Recovery
from kalmanguard.actuators.actuator import Actuator
from kalmanguard.attribution import Attributor
from kalmanguard.distributed.replicas import Replicas
from kalmanguard.errors import ConfigurationError, JournalError, SnapshotError
from kalmanguard.incidents import Incidents
from kalmanguard.journal.database import holds_run
from kalmanguard.journal.header import header
from kalmanguard.journal.writer import JournalWriter
from kalmanguard.loop import Loop
from kalmanguard.sensors.arguments import checked_model
from kalmanguard.sensors.optimizer import OptimizerTap
from kalmanguard.sensors.probe import Probe
from kalmanguard.sensors.reevaluation import BatchLoss
from kalmanguard.sensors.shards import is_sharded, locals_of
from kalmanguard.sensors.suite import SensorSuite, trained_parameters
from kalmanguard.settings import Settings
from kalmanguard.snapshots.disk import CheckpointStore
from kalmanguard.snapshots.memory import slots_for
from kalmanguard.snapshots.state import TrainingState

if TYPE_CHECKING:
    from kalmanguard.distributed.durable import ShardedStore

#: Begin a run, go on from its last clean checkpoint, or whichever there is.
Begin = Literal["start", "resume", "either"]


class Given(NamedTuple):
    """What the user passes to the supervisor; see there."""

    model: nn.Module
    probe_loader: Iterable[Any]
    optimizer: Optimizer | Sequence[Optimizer] | None
    scheduler: Any
    scaler: Any
    loader: Any
    loss_fn: Callable[[Any, Any], Tensor] | None
    settings: Settings | str | Path | dict[str, Any]
    run_dir: str | Path | None


class Owner(NamedTuple):
    """What the parts ask of the supervisor that they belong to; asked late, so that no part keeps it alive."""

    loop: Callable[[], Loop]
    describe: Callable[[], dict[str, Any]]
    extras: dict[str, Any]


class Built(NamedTuple):
    """The loop, and what was found out on the way.

    Attributes
    ----------
    model
        The module that is trained, out of what wraps it.
    run_dir
        Where this rank keeps records and checkpoints; ``None`` for nowhere.
    resumes
        Whether the run is to be continued.
    rewinds
        Whether the data loader can be rewound.
    """

    loop: Loop
    settings: Settings
    model: nn.Module
    run_dir: Path | None
    resumes: bool
    rewinds: bool


def build(given: Given, begin: Begin, owner: Owner) -> Built:
    """Make the parts of a supervisor, and write the head of its journal.

    Raises
    ------
    ConfigurationError, RankError, JournalError, SnapshotError
        As `Supervisor`.
    """
    chosen = _calibrated(Settings.of(given.settings))
    model = _inner(getattr(checked_model(given.model), "_orig_mod", given.model))
    replicas = _replicas(chosen)
    shards = _is_sharded(model, chosen, replicas)
    resumes = begin == "resume" or (begin == "either" and _finds_run(given.run_dir, replicas))
    first = replicas is None or replicas.is_first
    # Decisions are equal on all ranks: one journal holds them all, and of replicas one set of checkpoints.
    run_dir = Path(given.run_dir) if given.run_dir is not None and first else None
    rewinds = hasattr(given.loader, "state_dict") and hasattr(given.loader, "load_state_dict")
    if chosen.replay and not rewinds:
        raise ConfigurationError(
            "settings.replay needs a loader with state_dict() and load_state_dict(); pass loader=..., for example a "
            "StatefulDataLoader, or switch replay off."
        )
    schedulers = _schedulers(given.scheduler)
    probe = Probe(
        model, given.probe_loader, examples=chosen.probe_examples, fresh=chosen.fresh_examples, loss_fn=given.loss_fn
    )
    if replicas is not None:
        replicas.same(probe.digest, "probe")
        probe.share(*replicas.parts_of_data(model), replicas.gather)
    recovery = chosen.recovery or Recovery.preset(chosen.ladder)
    tap = OptimizerTap(
        model.parameters(),
        _optimizers(given.optimizer),
        protect=chosen.mode == "protect",
        before_first_step=lambda: owner.loop().begin(),
        before_step=lambda: owner.loop().suite.before_step(),  # noqa: PLW0108
        on_veto=None if recovery.vetoes_plainly else (lambda drop: owner.loop().veto(drop)),
        on_brace=lambda: owner.loop().brace(),
        agree=None if replicas is None else replicas.gradient,
    )
    try:
        training = TrainingState(
            model,
            optimizers=tap.optimizers,
            schedulers=schedulers,
            scaler=given.scaler,
            loader=given.loader if rewinds else None,
            extras=owner.extras,
            device="same" if chosen.snapshots_on == "device" else "host",
            spill=_spill_folder(model, chosen, given.run_dir, 0 if replicas is None else replicas.rank),
        )
        suite = _suite(model, tap, chosen, replicas)
        journal = JournalWriter.resume(Path(given.run_dir or ".")) if resumes and first else JournalWriter(run_dir)

        def durable(step: int, clean: bool, digest: str) -> None:
            record = {"state": step, "clean": clean, "manifest_sha256": digest}
            journal.record("durable", journal.last_step, record)

        store: CheckpointStore | ShardedStore | None = None
        if shards and given.run_dir is not None:
            from kalmanguard.distributed.durable import ShardedStore

            store = ShardedStore(Path(given.run_dir) / "checkpoints", state=training, on_durable=durable)
        elif run_dir is not None:
            store = CheckpointStore(run_dir / "checkpoints", on_durable=durable)
        actuator = Actuator(
            model=model,
            tap=tap,
            state=training,
            settings=chosen,
            recovery=recovery,
            extras=owner.extras,
            store=store,
            spills=given.run_dir is not None,
            describe=owner.describe,
            agree=replicas.of_first if shards and replicas is not None else None,
        )
        loop = Loop(
            settings=chosen,
            probe=probe,
            tap=tap,
            suite=suite,
            actuator=actuator,
            journal=journal,
            incidents=Incidents(journal, strict=chosen.strict),
            attributor=Attributor(BatchLoss(model, given.loss_fn), actuator.ring),
            replicas=replicas,
        )
    except BaseException:
        tap.close()
        raise
    if not (resumes and first):
        journal.write_header(header(chosen, recovery.describe(), model, probe.size, probe.digest))
    return Built(loop, chosen, model, run_dir, resumes, rewinds)


def _replicas(chosen: Settings) -> Replicas | None:
    if not chosen.replicas:
        return None
    replicas = Replicas.found(timeout_s=chosen.rank_timeout_s, sketch_size=chosen.sketch_size)
    if replicas is not None:
        replicas.same(chosen.model_dump_json(), "settings")
    return replicas


def _is_sharded(model: nn.Module, chosen: Settings, replicas: Replicas | None) -> bool:
    sharded = any(is_sharded(p) for p in model.parameters())
    if sharded and not chosen.replicas:
        raise ConfigurationError(
            "The parameters are sharded over processes (FSDP, tensor parallelism), and settings.replicas = False would "
            "supervise each shard as if it were a model of its own: leave it at True."
        )
    return sharded and replicas is not None


def _finds_run(run_dir: str | Path | None, replicas: Replicas | None) -> bool:
    """Whether the run folder holds a run; where it is not shared, only rank 0 can tell."""
    found = holds_run(run_dir or ".") if replicas is None or replicas.is_first else False
    return found if replicas is None else replicas.of_first(found)


def _suite(model: nn.Module, tap: OptimizerTap, chosen: Settings, replicas: Replicas | None) -> SensorSuite:
    if replicas is None:
        return SensorSuite(model, tap, size=chosen.sketch_size, seed=chosen.seed)
    held = replicas.divide(trained_parameters(model))
    parts = [part.parameters for part in held.parts]
    suite = SensorSuite(model, tap, size=chosen.sketch_size, seed=chosen.seed, parts=parts, total=held.total)
    replicas.check(suite.positions())
    return suite


def _spill_folder(model: nn.Module, chosen: Settings, run_dir: str | Path | None, rank: int) -> Path | None:
    """Where the ring lives on disk; ``None`` when it lives in memory, which must then hold two snapshots."""
    if chosen.mode != "protect" or chosen.snapshots_on == "device":
        return None
    if chosen.snapshots_on == "disk":
        if run_dir is None:
            raise ConfigurationError('snapshots_on = "disk" needs a run_dir to keep them in.')
        return _made(Path(run_dir), rank)
    # Before the first step there is no optimizer state yet: Adam's two moments are what to expect.
    trained = sum(p.nbytes for p in locals_of([p for p in model.parameters() if p.requires_grad]))
    whole = sum(t.nbytes for t in locals_of([*model.parameters(), *model.buffers()]))
    try:
        slots_for(whole + 2 * trained, chosen.snapshot_bytes)
    except SnapshotError:
        if run_dir is None:
            raise
        return _made(Path(run_dir), rank)
    return None


def _made(run_dir: Path, rank: int) -> Path:
    folder = run_dir / "ring" / f"rank-{rank}" if rank else run_dir / "ring"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise JournalError(
            f"The run folder {run_dir} cannot be written to: {error.strerror}. Choose another run_dir."
        ) from None
    return folder


def _inner(model: nn.Module) -> nn.Module:
    """The module that DistributedDataParallel wraps: a forward pass through the wrapper would wait for other ranks."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def _optimizers(given: Optimizer | Sequence[Optimizer] | None) -> list[Optimizer]:
    optimizers = [given] if isinstance(given, Optimizer) else list(given or ())
    for item in optimizers:
        if not isinstance(item, Optimizer):
            raise ConfigurationError(f"optimizer is a {type(item).__name__}; pass a torch.optim.Optimizer.")
    return optimizers


def _schedulers(given: Any) -> list[Any]:
    schedulers = [] if given is None else list(given) if isinstance(given, list) else [given]
    for item in schedulers:
        if not hasattr(item, "state_dict"):
            raise ConfigurationError(f"scheduler is a {type(item).__name__} without state_dict(); pass the object.")
    return schedulers


def _calibrated(settings: Settings) -> Settings:
    """Settings with what a named calibration holds, so that the journal's header says it."""
    if not isinstance(settings.calibration, str):
        return settings
    from kalmanguard.calibration import load

    return settings.model_copy(update={"calibration": load(settings.calibration).pairs()})
