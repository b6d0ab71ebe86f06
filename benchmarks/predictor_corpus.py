"""What the failure predictor learns from: observed runs, healthy and damaged, with the truth beside every step."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import multiprocessing
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.plants import Truth, probe_loss
from kalmanguard import FaultInjector, Settings, Supervisor
from kalmanguard.engine import STATISTICS
from kalmanguard.errors import ConfigurationError
from kalmanguard.journal import JournalReader
from kalmanguard.models import load_plant, plant_names
from kalmanguard.models.plant import Plant
from kalmanguard.records import Action, Decision, Level, Measurement

Options = tuple[tuple[str, Any], ...]

#: What is kept of every step, in order: the engine's statistics, the measurement's numbers, its verdicts, the truth.
COLUMNS = (*STATISTICS, "loss", "rate", "gradient_norm", "level_code", "proposed_code", "truth")
_LEVELS, _ACTIONS = tuple(Level), tuple(Action)
#: Steps between probes; drawn anew for every run, so that no predictor learns a cadence.
_CADENCES = (11, 21, 41)
#: Faults come after warm-up, which ends with the third probe.
_EARLIEST = 100
#: A synthetic objective without data, which has no held-out loss of its own; a policy whose return loses a fifth of its
#: progress in health.
_LEFT_OUT = ("quadratic", "cartpole")
#: Plants whose targets are no labels that could be exchanged.
_NO_LABELS = ("unet", "rnn", "gan")

#: Faults that take time to do harm: name, and the injector's notation (joined by spaces where several strike).
DEVELOPING = (
    ("learning rate x1.01 per step", "lr_creep:1.01@{}"),
    ("learning rate x1.03 per step", "lr_creep:1.03@{}"),
    ("learning rate x1.06 per step", "lr_creep:1.06@{}"),
    ("30 % of the labels wrong", "label_noise:0.3@{}"),
    ("60 % of the labels wrong", "label_noise:0.6@{}"),
    ("all labels wrong", "label_noise:1.0@{}"),
    ("learning rate x4, for good", "lr_spike:4@{}:steps=none"),
    ("learning rate x10, for good", "lr_spike:10@{}:steps=none"),
    ("learning rate x8, 20 steps", "lr_spike:8@{}:steps=20"),
    ("gradient x8, 30 steps", "gradient_scale:8@{}:steps=30"),
    ("weights x1.04, 30 times", " ".join(f"weight_scale:1.04@+{n}" for n in range(30))),
)
#: Faults that strike at once: nothing before them tells of them.
SUDDEN = (
    ("NaN gradient", "nan_gradient@{}"),
    ("bit flip in an exponent", "bit_flip@{}"),
    ("learning rate x50, 5 steps", "lr_spike:50@{}:steps=5"),
    ("gradient x1000", "gradient_scale:1000@{}"),
    ("weights x1.5", "weight_scale:1.5@{}"),
    ("second moment zeroed", "moments_zeroed@{}"),
    ("garbage batch", "garbage_batch@{}"),
)
#: Fault of a recipe that is wrong from its first step.
HOT = "learning rate too high from the start"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One run: plant, options, what is wrong with it (``""`` for nothing), from which step on, and for how long.

    ``truth_every`` steps lie between measurements of the true loss.
    """

    plant: str
    options: Options = ()
    seed: int
    steps: int
    kind: str = ""
    notation: str = ""
    truth_every: int = 1

    @property
    def key(self) -> str:
        """The same for equal runs, and the name of its file."""
        return hashlib.sha256(repr(dataclasses.astuple(self)).encode()).hexdigest()[:20]

    @property
    def at(self) -> int:
        """First damaged step; 1 for a recipe that is wrong from the start, 0 for a healthy run."""
        if not self.kind:
            return 0
        if self.kind == HOT:
            return 1
        latest = max(_EARLIEST + 30, self.steps // 2)
        return int(np.random.default_rng([2_601, *self.key.encode()]).integers(_EARLIEST, latest))

    @property
    def probe_every(self) -> int:
        """Steps between the supervisor's probes."""
        return int(np.random.default_rng([5, self.seed, len(self.kind), self.steps]).choice(_CADENCES))

    @property
    def faults(self) -> tuple[str, ...]:
        """In the notation of `FaultInjector.parse`."""
        parts = []
        for part in self.notation.split():
            head, plus, offset = part.partition("@+")
            parts.append(f"{head}@{self.at + int(offset)}" if plus else part.format(self.at))
        return tuple(parts)

    @property
    def sudden(self) -> bool:
        """Whether its fault strikes at once."""
        return self.kind in dict(SUDDEN)


class Trace(NamedTuple):
    """A recorded run: ``rows`` holds `COLUMNS` for every step from 1, shape ``(T, C)``, and the truth of step 0."""

    case: Case
    rows: NDArray[np.float64]
    start: float

    def column(self, name: str) -> NDArray[np.float64]:
        """One column of all steps."""
        return np.asarray(self.rows[:, COLUMNS.index(name)])


def corpus(*, seeds: int, plants: Sequence[str] | None = None, quick: bool = False) -> list[Case]:
    """List the runs; ``plants`` are all that are registered, by default."""
    cases: list[Case] = []
    for plant in plants or [name for name in plant_names() if name not in _LEFT_OUT]:
        cases += {"mlp": _mlp, "chartransformer": _chartransformer}.get(plant, _other)(plant, seeds, quick)
    return cases


def _mlp(plant: str, seeds: int, quick: bool) -> list[Case]:
    sgd = (("optimizer", "sgd"),)
    plain = (*sgd, ("momentum", 0.0))
    restarts = (("schedule", "warm-restarts"),)
    healthy: list[Options] = [
        *((), (("batch_size", 8),), (("batch_size", 2),), (("lr", 3e-3),), restarts, (("schedule", "warmup-cosine"),)),
        *(sgd, plain, (*plain, *restarts), (*sgd, ("schedule", "cosine")), (*sgd, ("lr", 0.02), ("batch_size", 16))),
    ]
    hot: list[Options] = [
        *((("lr", 0.01), ("batch_size", 8)), (("lr", 0.03),), (("lr", 0.1),)),
        *(
            (*sgd, ("lr", 0.2)),
            (*sgd, ("lr", 0.3)),
            (*sgd, ("batch_size", 16)),
            (*sgd, ("lr", 0.05), ("batch_size", 8)),
        ),
    ]
    damaged: list[Options] = [(), sgd, (("batch_size", 8),)]
    if quick:
        healthy, hot, damaged = healthy[:2], hot[:1], damaged[:2]
    cases = _healthy(plant, healthy, seeds, steps=400 if quick else 1_500)
    cases += _damaged(plant, hot, [(HOT, "")], seeds, steps=500)
    cases += _damaged(plant, damaged, DEVELOPING, seeds, steps=400)
    cases += _damaged(plant, [()], SUDDEN, 1 if quick else 2, steps=300)
    return cases


def _chartransformer(plant: str, seeds: int, quick: bool) -> list[Case]:
    del seeds, quick  # a step of it takes as long as twenty of the others
    small = (("size", "small"),)
    cases = _healthy(plant, [small, (*small, ("schedule", "warmup-cosine"))], 1, steps=400, every=10)
    return cases + _damaged(plant, [small], (*DEVELOPING[1:10], *SUDDEN[1:3]), 1, steps=240, every=8)


def _other(plant: str, seeds: int, quick: bool) -> list[Case]:
    healthy: list[Options] = [(), (("optimizer", "sgd"),)] if plant == "cnn" else [()]
    developing = [(kind, fault) for kind, fault in DEVELOPING if "label" not in kind or plant not in _NO_LABELS]
    cases = _healthy(plant, healthy, min(seeds, 3), steps=400 if quick else 800)
    cases += _damaged(plant, [()], developing, 1 if quick else min(seeds, 3), steps=300)
    return cases + _damaged(plant, [()], SUDDEN, 1, steps=300)


def _healthy(plant: str, recipes: list[Options], seeds: int, *, steps: int, every: int = 5) -> list[Case]:
    return [
        Case(plant=plant, options=options, seed=seed, steps=steps, truth_every=every)
        for options in recipes
        for seed in range(seeds)
    ]


def _damaged(
    plant: str, recipes: list[Options], faults: Sequence[tuple[str, str]], seeds: int, *, steps: int, every: int = 2
) -> list[Case]:
    """List damaged runs, each with a seed of its own: two with the same one are the same run up to the fault."""
    kinds = [HOT, *dict(DEVELOPING), *dict(SUDDEN)]
    return [
        Case(
            plant=plant, options=options, seed=1_000 * (1 + kinds.index(kind)) + number, steps=steps, kind=kind,
            notation=fault, truth_every=every,
        )
        for kind, fault in faults
        for number, (options, _) in enumerate(product(recipes, range(seeds)))
    ]  # fmt: skip


def record_all(cases: Sequence[Case], folder: Path | None, processes: int) -> list[Trace | None]:
    """Record all of them in order; ``None`` for what is impossible, such as moments where the optimizer keeps none."""
    traces: list[Trace | None] = []
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for trace in pool.imap(partial(_record_if_possible, folder=folder), cases):
            traces.append(trace)
            if sys.stderr.isatty():
                print(f"\r{len(traces)} of {len(cases)} runs", end="", file=sys.stderr)
    return traces


def _record_if_possible(case: Case, folder: Path | None) -> Trace | None:
    try:
        return record(case, folder)
    except ConfigurationError:
        return None


def record(case: Case, folder: Path | None = None) -> Trace:
    """Run one case, supervised in observe mode, or read it from ``folder`` where it was kept."""
    file = None if folder is None else folder / f"{case.key}.npz"
    if file is not None and file.exists():
        with np.load(file, allow_pickle=False) as kept:
            if kept["columns"].tolist() == list(COLUMNS):  # else of an engine with other statistics
                return Trace(case, kept["rows"].astype(np.float64), float(kept["start"]))
    torch.set_num_threads(1)
    torch.manual_seed(case.seed)
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as run_dir:
        warnings.simplefilter("ignore")  # what a fault or a supervisor has to say is in the record
        plant = load_plant(case.plant)(seed=case.seed, steps=case.steps, **dict(case.options))
        start, truth = _fly(case, plant, run_dir)
        rows = np.array([[*row, truth[step]] for step, row in _rows(run_dir)])
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(file, rows=rows, start=start, columns=np.array(COLUMNS))
    return Trace(case, rows, start)


def _fly(case: Case, plant: Plant, run_dir: str) -> tuple[float, dict[int, float]]:
    truth_of: Callable[[], float] = Truth(plant)
    truth: dict[int, float] = {}
    try:
        start = truth_of()
    except ZeroDivisionError:  # the supervisor probes all that there is
        truth_of = plant.held_out_loss
        start = truth_of()
    injector = FaultInjector.parse(case.faults, seed=case.seed)
    settings = Settings(mode="observe", probe_every=case.probe_every, snapshot_every=50)
    supervisor = Supervisor(
        plant.model, plant.probe_loader, optimizer=plant.optimizers, scheduler=plant.schedulers,
        loss_fn=probe_loss(plant), settings=settings, run_dir=run_dir,
    )  # fmt: skip
    with supervisor, injector.attach(plant.model, plant.optimizer):
        for step in range(1, case.steps + 1):
            loss = plant.train_step(injector.draw(next(plant.loader)))
            # Between two measurements nothing is known: nan; a loss that is not finite is an infinite one.
            measured = truth_of() if step % case.truth_every == 0 else math.nan
            truth[step] = math.inf if step % case.truth_every == 0 and not math.isfinite(measured) else measured
            supervisor.update(loss)
    return start, truth


def _rows(run_dir: str) -> Iterator[tuple[int, list[float]]]:
    with JournalReader(run_dir) as reader:
        for m, decision in reader.steps():
            if m.step > 0:  # the probe before the first step is no step
                yield m.step, _row(m, decision)


def _row(m: Measurement, decision: Decision) -> list[float]:
    none = math.nan
    return [
        *(decision.statistics or (none,) * len(STATISTICS)),
        none if m.loss is None else m.loss,
        max(m.learning_rates, default=none) * m.lr_factor,
        none if m.gradient_norm is None else m.gradient_norm,
        _LEVELS.index(decision.level),
        _ACTIONS.index(decision.proposed),
    ]
