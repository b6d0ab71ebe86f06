"""Half precision with a GradScaler, on a CPU: in a plain loop, in a Hugging Face Trainer and in Lightning.

Scales grow until a gradient overflows in float16, so steps are skipped as they are on an accelerator. Oracles: the bare
run bit for bit, the scaler's state included; states recorded after each step; what the scaler itself has skipped.
Neither framework offers a scaler on a CPU, so it is put where they keep theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from kalmanguard import Supervisor
from kalmanguard.certificate.verify import verify
from kalmanguard.faults import FaultInjector
from kalmanguard.integrations.decisions import DecisionLog
from kalmanguard.integrations.tracking import TrackerLog
from kalmanguard.journal.reader import JournalReader
from kalmanguard.models import load_plant
from kalmanguard.records import Action, Decision, Level, Mode
from kalmanguard.replay import replay
from kalmanguard.sensors.skipping import SkipWatch

FIXED: dict[str, Any] = {"probe_examples": 32, "fresh_examples": 64, "probe_every": 5, "snapshot_every": 10}
SLOW = partial(pytest.param, marks=pytest.mark.slow)
State = tuple[bytes, dict[str, Any]]


def growing() -> torch.amp.GradScaler:
    """Doubles every seventh step, so that it overflows again and again."""
    return torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=7)


def weights(model: nn.Module) -> bytes:
    return b"".join(v.detach().contiguous().view(torch.uint8).numpy().tobytes() for v in model.state_dict().values())


def brought_back(before: list[State], behind: list[State]) -> None:
    """What a rollback leaves is a state of before, whole: weights and scaler, both of them other ones than at hand."""
    changed = [i for i, (old, new) in enumerate(zip(before, behind, strict=True)) if old != new]
    assert changed
    for i in changed:
        assert behind[i] in behind[:i]
        assert behind[i][0] != before[i][0]
        assert behind[i][1] != before[i][1]


# -- a plain loop ------------------------------------------------------------------------------------------------------


class Loop:
    """Digits in half precision; ``supervised`` makes the supervisor, ``states`` holds what follows each real step."""

    def __init__(
        self,
        dtype: torch.dtype,
        *,
        mode: str | None = None,
        steps: int = 90,
        clip: bool = False,
        fault: Callable[[FaultInjector], object] | None = None,
        folder: Path | None = None,
    ) -> None:
        torch.manual_seed(0)
        self.plant = plant = load_plant("mlp")(seed=0)
        scaler, injector = growing(), FaultInjector(seed=0)
        if fault is not None:
            fault(injector)
        self.supervisor = None
        if mode is not None:
            self.supervisor = Supervisor(
                plant.model, plant.probe_loader, optimizer=plant.optimizer, scaler=scaler,
                settings={**FIXED, "mode": mode}, run_dir=folder,
            )  # fmt: skip
        self.states: dict[int, State] = {}
        self.reached: dict[int, dict[str, Any]] = {}
        self.decisions: list[Any] = []
        self.skipped: list[int] = []
        with injector.attach(plant.model, plant.optimizer):
            for step in range(1, steps + 1):
                inputs, targets = next(plant.loader)
                with torch.autocast("cpu", dtype):
                    loss = cross_entropy(plant.model(inputs), targets)
                scaler.scale(loss).backward()
                scale = scaler.get_scale()
                if clip:
                    scaler.unscale_(plant.optimizer)
                    norm = nn.utils.clip_grad_norm_(plant.model.parameters(), 0.5)
                    if self.supervisor is not None:
                        self.supervisor.clipped_from(norm)
                scaler.step(plant.optimizer)
                scaler.update()
                plant.optimizer.zero_grad()
                if scaler.get_scale() < scale:
                    self.skipped.append(step)
                if self.supervisor is not None:
                    reached = scaler.state_dict()
                    decision = self.supervisor.update(loss)
                    if not self.decisions or decision is not self.decisions[-1]:
                        self.decisions.append(decision)
                        self.states[decision.step] = weights(plant.model), scaler.state_dict()
                        self.reached[decision.step] = reached
        self.end = weights(plant.model), scaler.state_dict(), torch.get_rng_state().tolist()


@pytest.mark.parametrize("dtype", [torch.float16, SLOW(torch.bfloat16)])
@pytest.mark.parametrize(("mode", "clip"), [("observe", False), SLOW("observe", True), ("protect", True)])
def test_a_clean_loop_is_the_bare_loop(dtype: torch.dtype, mode: str, clip: bool) -> None:
    bare, watched = Loop(dtype, clip=clip), Loop(dtype, mode=mode, clip=clip)
    assert watched.end == bare.end
    assert watched.skipped == bare.skipped
    assert (len(bare.skipped) > 5) == (dtype is torch.float16)  # bfloat16 has the range of float32
    assert watched.supervisor is not None
    # What the scaler skips is no step, no fault and no news.
    assert [d.step for d in watched.decisions] == list(range(1, 91 - len(bare.skipped)))
    assert {d.action for d in watched.decisions} == {Action.ACCEPT}
    assert watched.supervisor.statistics()["vetoes"] == watched.supervisor.statistics()["errors"] == 0


def test_a_rollback_brings_the_scaler_back(tmp_path: Path) -> None:
    loop = Loop(
        torch.float16, mode="protect", fault=lambda injector: injector.at(41).lr_spike(300.0, steps=2), folder=tmp_path
    )  # fmt: skip
    assert loop.supervisor is not None
    undone = [d for d in loop.decisions if d.rolled_back]
    assert undone
    for decision in undone:
        assert loop.states[decision.step] == loop.states[decision.restored_step]
        assert loop.reached[decision.step] != loop.states[decision.restored_step][1]
    assert loop.skipped
    loop.supervisor.close()
    assert replay(tmp_path).identical


def test_a_scaler_that_skips_for_ever_is_helped_out(tmp_path: Path) -> None:
    """A weight of 1e38 is infinite in float16: the scaler skips every step, and nothing is measured any more."""

    def damage(injector: FaultInjector) -> None:
        injector.at(41).bit_flip()

    with pytest.warns(UserWarning, match="gradients are not finite. Nothing is restored, since it only observes"):
        observed = Loop(torch.float16, mode="observe", fault=damage, steps=120)
    assert len(observed.decisions) < 50
    loop = Loop(torch.float16, mode="protect", fault=damage, steps=120, folder=tmp_path)
    assert loop.supervisor is not None
    undone = [d for d in loop.decisions if d.rolled_back]
    assert len(undone) == 1
    assert "the scaler's scale is below 2^-10" in undone[0].reason
    restored = undone[0].restored_step
    assert loop.states[undone[0].step] == loop.states[restored]
    assert restored < 41
    assert loop.decisions[-1].step > 60  # training goes on
    assert loop.plant.held_out_loss() < 0.5
    loop.supervisor.close()
    assert replay(tmp_path).identical
    assert not any(claim.status == "FAILED" for claim in verify(tmp_path).claims)


def test_a_rollback_between_two_steps_is_kept_and_written_once() -> None:
    """Nothing was measured since the last step, so the decision has its number."""

    class Run:
        def __init__(self) -> None:
            self.told: list[Any] = []

        def log(self, numbers: dict[str, Any]) -> None:
            self.told.append(numbers.get("kalmanguard/event"))

    run, log = Run(), DecisionLog(keep=5)
    tracker = TrackerLog(run, every=1)
    nominal = Decision(41, Action.ACCEPT, Action.ACCEPT, Level.NOMINAL, Mode.WATCHING, "all is well")
    undone = Decision(41, Action.ROLLBACK, Action.ROLLBACK, Level.CONFIRMED, Mode.WATCHING, "stuck", restored_step=40)
    for decision in (nominal, nominal, undone, undone):
        log.add(decision)
        tracker.add(decision)
    assert log.all() == (nominal, undone)
    assert run.told == [None, "stuck"]


def test_accumulation_and_a_scale_that_is_found_are_no_reason() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**-9)
    scaler._lazy_init_scale_growth_tracker(torch.device("cpu"))
    watch = SkipWatch(scaler)
    assert not any(watch.is_stuck() for _ in range(200))
    scaler.update(2.0**-11)
    assert [watch.is_stuck() for _ in range(16)].count(True) == 1
    watch.stepped()
    assert [watch.is_stuck() for _ in range(16)] == [False] * 15 + [True]
    assert not any(SkipWatch(None).is_stuck() for _ in range(50))


# -- Hugging Face ------------------------------------------------------------------------------------------------------


def _half_precision_trainer(folder: Path, callbacks: list[Any], **options: Any) -> Any:
    from .test_huggingface import trainer_of

    trainer = trainer_of(folder, callbacks, **options)
    accelerator = trainer.accelerator
    # As of accelerate on an accelerator: autocast, a scaler, gradients unscaled before they are clipped.
    accelerator.state._mixed_precision = "fp16"
    accelerator.native_amp, accelerator.scaler = True, growing()
    return trainer


@pytest.fixture
def half() -> Any:
    pytest.importorskip("transformers")
    from accelerate.state import AcceleratorState

    yield _half_precision_trainer
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("mode", "accumulation", "optim"),
    [("observe", 2, "adamw_torch"), SLOW("observe", 1, "adamw_torch"), ("protect", 1, "adamw_torch_fused")],
)
def test_a_clean_trainer_is_the_bare_trainer(
    mode: str, accumulation: int, optim: str, half: Any, tmp_path: Path
) -> None:
    """A fused optimizer is told to skip and steps; so an overflow is a step that was dropped, as it is anyway."""
    from . import test_huggingface as hf

    options = {"steps": 40, "gradient_accumulation_steps": accumulation, "max_grad_norm": 0.5, "optim": optim}
    bare = half(tmp_path / "bare", [], **options)
    bare.train()
    expected = hf.weights(bare.model), hf.moments(bare), hf.logged(bare), hf.streams()
    scale = bare.accelerator.scaler.state_dict()
    callback = hf.guard(mode=mode)
    watched = half(tmp_path / "watched", [callback], **options)
    watched.train()
    assert (hf.weights(watched.model), hf.moments(watched), hf.logged(watched), hf.streams()) == expected
    assert watched.accelerator.scaler.state_dict() == scale
    assert callback.supervisor is not None
    assert callback.supervisor.statistics()["errors"] == 0
    told = [entry for entry in hf.logged(watched) if "loss" in entry]
    taken = [entry for entry in told if np.isfinite(entry["grad_norm"])]
    skipped = len(told) - len(taken)
    assert skipped > 2
    dropped = [d for d in callback.decisions if d.action is Action.VETO]
    assert {d.action for d in callback.decisions} <= {Action.ACCEPT, Action.VETO}
    assert len(dropped) == (skipped if "fused" in optim else 0)
    assert len(callback.decisions) - len(dropped) == len(taken)
    with JournalReader(tmp_path / "watched" / "_kalmanguard") as reader:
        norms = [(m.loss, m.gradient_norm) for m, _ in reader.steps() if m.gradient_norm is not None]
    measured = [(loss, norm) for loss, norm in norms if np.isfinite(norm)]
    assert [loss for loss, _ in measured] == pytest.approx([entry["loss"] for entry in taken], rel=1e-5)
    assert [norm for _, norm in measured] == pytest.approx([entry["grad_norm"] for entry in taken], rel=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_rollback_in_a_trainer_brings_the_scaler_back(half: Any, tmp_path: Path) -> None:
    from . import test_huggingface as hf

    class Recorder(hf.transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self.states: list[State] = []

        def on_step_end(self, *args: Any, model: Any = None, **others: Any) -> None:
            self.states.append((hf.weights(model), trainer.accelerator.scaler.state_dict()))

    injector = FaultInjector(seed=0)
    injector.at(41).bit_flip(match="wte")
    callback, before, behind = hf.guard(), Recorder(), Recorder()
    trainer = half(tmp_path, [hf.Faults(injector), before, callback, behind], steps=70)
    try:
        trainer.train()
    finally:
        injector.detach()
    assert hf.rolled_back(callback)
    brought_back(before.states, behind.states)


def test_a_loop_of_accelerate_forgets_the_loss_of_a_step_that_was_skipped(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    from kalmanguard.integrations.accelerate import AccelerateGuard

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    accelerator.state._mixed_precision = "fp16"
    accelerator.native_amp, accelerator.scaler = True, growing()
    plant = load_plant("mlp")(seed=0)
    model, optimizer = accelerator.prepare(plant.model, plant.optimizer)
    taken, losses = [], []
    with AccelerateGuard(
        accelerator, model, plant.probe_loader, optimizer=optimizer, settings=FIXED, run_dir=tmp_path / "run"
    ) as guard:
        for _ in range(120):
            inputs, targets = next(plant.loader)
            with accelerator.accumulate(model):
                loss = cross_entropy(model(inputs), targets)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            guard.update(loss)
            losses.append(float(loss.detach()))
            if accelerator.sync_gradients:
                if not optimizer.step_was_skipped:
                    taken.append(sum(losses) / len(losses))
                losses = []
        assert guard.supervisor is not None
        assert guard.supervisor.statistics()["errors"] == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    assert 40 < len(taken) < 59
    with JournalReader(tmp_path / "run") as reader:
        measured = [m.loss for m, _ in reader.steps() if m.gradient_norm is not None]
    assert measured == pytest.approx(taken, rel=1e-5)


# -- Lightning ---------------------------------------------------------------------------------------------------------


def _fit(folder: Path, callbacks: list[Any], **options: Any) -> tuple[Any, Any]:
    from lightning.pytorch.plugins.precision import MixedPrecision

    from .test_lightning import fit

    return fit(folder, callbacks, plugins=[MixedPrecision("16-mixed", "cpu", growing())], **options)


lightning_warnings = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore:.*does not have many workers",
    "ignore:.*num_workers",
    "ignore:.*is a wrapper and will be removed",
    "ignore:You defined a `validation_step`",
    "ignore:Detected call of `lr_scheduler.step",
)


@lightning_warnings
@pytest.mark.parametrize(("mode", "options"), [
    SLOW("observe", {}),
    ("observe", {"accumulate_grad_batches": 2}),
    SLOW("protect", {"gradient_clip_val": 0.5}),
])  # fmt: skip
def test_a_clean_lightning_run_is_the_bare_run(mode: str, options: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    from . import test_lightning as pl

    class Losses(pl.pl.Callback):
        """Losses of the steps that the scaler has let pass, as the weights show."""

        def on_train_start(self, trainer: Any, module: Any) -> None:
            self.taken: list[float] = []
            self.sum, self.steps, self.weights = 0.0, 0, pl.weights(module)

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *args: Any) -> None:
            self.sum += float(outputs["loss"])
            if trainer.global_step > self.steps:
                if pl.weights(module) != self.weights:
                    self.taken.append(self.sum)
                self.sum, self.steps, self.weights = 0.0, trainer.global_step, pl.weights(module)

    trainer, bare = _fit(tmp_path / "bare", [], steps=60, **options)
    stream, scale = torch.get_rng_state().tolist(), trainer.precision_plugin.scaler.state_dict()
    callback, losses = pl.guard(mode=mode), Losses()
    trainer, watched = _fit(tmp_path / "watched", [callback, losses], steps=60, **options)
    assert pl.weights(watched) == pl.weights(bare)
    assert trainer.precision_plugin.scaler.state_dict() == scale
    assert torch.get_rng_state().tolist() == stream
    assert callback.supervisor is not None
    assert callback.supervisor.statistics()["errors"] == 0
    assert {d.action for d in callback.decisions} == {Action.ACCEPT}
    assert 30 < len(callback.decisions) < 58
    with JournalReader(tmp_path / "watched" / "kalmanguard") as reader:
        measured = [m.loss for m, _ in reader.steps() if m.gradient_norm is not None]
    assert measured == pytest.approx(losses.taken, rel=1e-5)


@lightning_warnings
def test_a_rollback_in_lightning_brings_the_scaler_back(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    from . import test_lightning as pl

    class Recorder(pl.pl.Callback):
        def __init__(self) -> None:
            self.states: list[State] = []

        def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
            self.states.append((pl.weights(module), trainer.precision_plugin.scaler.state_dict()))

    callback, before, behind = pl.guard(), Recorder(), Recorder()
    _fit(tmp_path, [pl.Damage(range(51, 52), -1.0), before, callback, behind], steps=80)
    assert any(decision.rolled_back for decision in callback.decisions)
    brought_back(before.states, behind.states)
