"""The supervisor in a Lightning Trainer: real training on scikit-learn's digits.

Oracles: the bare run (bit for bit, while nothing is wrong or nothing may be done), the states that another callback has
recorded after every batch (a rollback is exact or it is none), the uninterrupted run (for one that resumes), and
`torch.nn.utils.get_total_norm` of gradients before they are clipped.
"""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from kalmanguard.errors import ConfigurationError, TrainingHalted
from kalmanguard.faults import FaultInjector
from kalmanguard.journal.reader import JournalReader
from kalmanguard.models import load_plant
from kalmanguard.records import Action, Decision, Mode
from kalmanguard.replay import replay
from kalmanguard.settings import Settings

pytest.importorskip("lightning")
import lightning.pytorch as pl

from kalmanguard.integrations.lightning import KalmanGuardLightning

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*is a wrapper and will be removed"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:You are trying to `self.log"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
    pytest.mark.filterwarnings("ignore:.*num_workers"),
]
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
SLOW = partial(pytest.param, marks=pytest.mark.slow)
FIXED: dict[str, Any] = {"probe_examples": 32, "fresh_examples": 64, "probe_every": 5, "snapshot_every": 10}


def data(*, shuffle: bool = True) -> tuple[DataLoader[Any], DataLoader[Any]]:
    plant = load_plant("mlp")(seed=0)
    inputs, targets = (torch.cat(parts) for parts in zip(*(next(plant.loader) for _ in range(20)), strict=True))
    held_out = [torch.cat(parts) for parts in zip(*plant.probe_loader, strict=True)]
    order = torch.Generator().manual_seed(1)
    train = DataLoader(TensorDataset(inputs, targets), batch_size=32, shuffle=shuffle, generator=order, drop_last=True)
    return train, DataLoader(TensorDataset(*held_out), batch_size=64)


class Digits(pl.LightningModule):
    """Dropout makes it draw from the random streams; ``poisoned`` batches get gradients that are not finite."""

    def __init__(self, *, manual: bool = False, schedule: bool = False, poisoned: int = -1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 10))
        self.automatic_optimization = not manual
        self.schedule, self.poisoned = schedule, poisoned
        self.norms: list[float] = []

    def forward(self, pixels: Tensor) -> Tensor:
        found: Tensor = self.layers(pixels)
        return found

    def training_step(self, batch: Any, index: int) -> Any:
        loss = cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        if self.automatic_optimization:
            return loss
        optimizers: Any = self.optimizers()
        for optimizer, part in zip(optimizers, (self.layers[0], self.layers[3]), strict=True):
            self.toggle_optimizer(optimizer)
            self.manual_backward(cross_entropy(self(batch[0]), batch[1]) + 0.0 * part.weight.sum())
            optimizer.step()
            optimizer.zero_grad()
            self.untoggle_optimizer(optimizer)
        return {"loss": loss.detach()}

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_loss", cross_entropy(self(batch[0]), batch[1]))

    def on_after_backward(self) -> None:
        if self.trainer.fit_loop.total_batch_idx + 1 == self.poisoned:
            for p in self.parameters():
                if p.grad is not None:
                    p.grad.fill_(torch.nan)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.norms.append(float(nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None])))

    def configure_optimizers(self) -> Any:
        if not self.automatic_optimization:
            parts = self.layers[0], self.layers[3]
            return [torch.optim.AdamW(part.parameters(), lr=3e-3) for part in parts]
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        if not self.schedule:
            return optimizer
        rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rates, "interval": "step"}}


class Ordered(Digits):
    """Without dropout, and its data in order: Lightning's checkpoints hold no random streams."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[2] = nn.Identity()  # type: ignore[assignment]


def weights(module: nn.Module) -> bytes:
    return b"".join(v.detach().contiguous().view(torch.uint8).numpy().tobytes() for v in module.state_dict().values())


class Recorder(pl.Callback):
    """Every parameter after each batch; put behind the supervisor, after what that has done."""

    def __init__(self) -> None:
        self.states: list[bytes] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.states.append(weights(pl_module))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.states.append(weights(pl_module))


class Damage(pl.Callback):
    """Multiplies all weights after the batches of ``steps``; put before the supervisor."""

    def __init__(self, steps: range, factor: float) -> None:
        self.steps, self.factor, self.batch = steps, factor, 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.batch += 1
        if self.batch in self.steps:
            with torch.no_grad():
                for p in pl_module.parameters():
                    p.mul_(self.factor)


def guard(**changes: Any) -> KalmanGuardLightning:
    return KalmanGuardLightning(settings=Settings(**{**FIXED, **changes}))


def fit(
    folder: Path,
    callbacks: list[Any],
    *,
    module: Digits | None = None,
    steps: int = 60,
    resume: Any = None,
    **options: Any,
) -> tuple[Any, Digits]:
    module = module or Digits()
    train, held_out = data(shuffle=not isinstance(module, Ordered))
    torch.manual_seed(5)
    trainer = pl.Trainer(
        default_root_dir=str(folder), callbacks=callbacks, max_steps=steps, accelerator="cpu", logger=False,
        enable_progress_bar=False, enable_model_summary=False,
        **{"enable_checkpointing": False, "num_sanity_val_steps": 0, **options},
    )  # fmt: skip
    trainer.fit(module, train, held_out, ckpt_path=resume, weights_only=False if resume else None)
    return trainer, module


# -- nothing is wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "options", "kind"),
    [
        ("observe", {}, {}),
        ("protect", {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2}, {"schedule": True}),
        ("protect", {"precision": "bf16-mixed"}, {}),
        ("protect", {"num_sanity_val_steps": 2, "val_check_interval": 10}, {}),
        ("protect", {"steps": 80}, {"manual": True}),
    ],
)
def test_a_clean_run_is_the_bare_run(mode: str, options: Any, kind: dict[str, bool], tmp_path: Path) -> None:
    _, bare = fit(tmp_path / "bare", [], module=Digits(**kind), **options)
    stream = torch.get_rng_state().tolist()
    callback = guard(mode=mode)
    trainer, watched = fit(tmp_path / "watched", [callback], module=Digits(**kind), **options)
    assert weights(watched) == weights(bare)
    assert torch.get_rng_state().tolist() == stream
    assert callback.supervisor is not None
    assert callback.supervisor.statistics()["errors"] == 0
    assert callback.supervisor.step == len(callback.decisions) == trainer.global_step // (2 if "manual" in kind else 1)
    assert {decision.action for decision in callback.decisions} == {Action.ACCEPT}
    assert callback.certificate is not None
    assert not any(claim.status == "FAILED" for claim in callback.certificate.claims)
    assert replay(tmp_path / "watched" / "kalmanguard").identical


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_journal_holds_the_loss_and_the_norm_before_clipping(accumulation: int, tmp_path: Path) -> None:
    class Losses(pl.Callback):
        def __init__(self) -> None:
            self.sums = [0.0]

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
            self.sums[-1] += float(outputs["loss"])
            if trainer.global_step == len(self.sums):  # an epoch's end cuts an accumulation short
                self.sums.append(0.0)

    losses = Losses()
    _, module = fit(
        tmp_path, [guard(mode="observe"), losses], steps=20, gradient_clip_val=0.05,
        accumulate_grad_batches=accumulation,
    )  # fmt: skip
    with JournalReader(tmp_path / "kalmanguard") as reader:
        steps = [m for m, _ in reader.steps() if m.gradient_norm is not None]
        facts = next(row.data()["facts"] for row in reader.rows("note") if row.data().get("about") == "training")
    assert [m.loss for m in steps] == pytest.approx(losses.sums[:20], rel=1e-5)
    assert [m.gradient_norm for m in steps] == pytest.approx(module.norms, rel=1e-5)
    assert min(module.norms) > 0.05
    assert (facts["module"], facts["planned_steps"], facts["accumulation"]) == ("Digits", 20, accumulation)


# -- something is wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("manual", [False, True])
def test_a_gradient_that_is_not_finite_is_dropped_before_it_acts(manual: bool, tmp_path: Path) -> None:
    callback, recorder = guard(), Recorder()
    fit(tmp_path, [callback, recorder], module=Digits(manual=manual, poisoned=40), steps=120 if manual else 60)
    vetoed = [decision.step for decision in callback.decisions if decision.action is Action.VETO]
    assert vetoed == [40]
    assert recorder.states[40] == recorder.states[39]
    assert recorder.states[41] != recorder.states[40]
    assert callback.supervisor is not None
    assert callback.supervisor.statistics()["errors"] == 0


@pytest.mark.parametrize("kind", ["damage", "bit flip", "learning rate"])
def test_what_damages_the_weights_is_undone_bit_for_bit(kind: str, tmp_path: Path) -> None:
    callback, recorder = guard(), Recorder()
    module, injector = Digits(), FaultInjector(seed=0)
    callbacks: list[Any] = [callback, recorder]
    if kind == "damage":
        callbacks.insert(0, Damage(range(41, 42), -1.0))
    elif kind == "bit flip":
        injector.at(41).bit_flip(match="0.weight")
    else:
        injector.at(41).lr_spike(300.0, steps=3)

    class Attach(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            injector.attach(pl_module, trainer.optimizers[0])

    try:
        fit(tmp_path, [Attach(), *callbacks], module=module, steps=70)
    finally:
        injector.detach()
    undone = [decision for decision in callback.decisions if decision.rolled_back]
    assert undone
    for decision in undone:
        assert decision.restored_step is not None
        assert recorder.states[decision.step] == recorder.states[decision.restored_step]
    assert 0 < undone[0].restored_step <= 40 < undone[0].step <= 48  # type: ignore[operator]
    assert replay(tmp_path / "kalmanguard").identical
    assert callback.certificate is not None
    assert not any(claim.status == "FAILED" for claim in callback.certificate.claims)


def test_a_halt_stops_training_with_the_best_certified_state(tmp_path: Path) -> None:
    callback, recorder = guard(rollback_budget=2), Recorder()
    trainer, module = fit(tmp_path, [Damage(range(41, 200), 3.0), callback, recorder], steps=120)
    last = callback.decisions[-1]
    assert (last.action, last.mode) == (Action.HALT, Mode.HALTED)
    assert trainer.global_step == last.step < 120
    assert last.restored_step is not None
    assert weights(module) == recorder.states[last.restored_step]


def test_a_halt_is_an_exception_for_those_who_say_so(tmp_path: Path) -> None:
    callback = guard(rollback_budget=2, on_halt="raise")
    with pytest.raises(TrainingHalted):
        fit(tmp_path, [Damage(range(41, 200), 3.0), callback], steps=120)
    assert callback.decisions[-1].action is Action.HALT
    with JournalReader(tmp_path / "kalmanguard") as reader:
        assert reader.complete


# -- stopping and going on ---------------------------------------------------------------------------------------------


def essence(decision: Decision) -> tuple[Any, ...]:
    """What was decided, and every number that the engine has decided it on but the drift test's wealth."""
    numbers = tuple(None if np.isnan(x) else x for i, x in enumerate(decision.statistics) if not 10 <= i < 14)
    return decision.step, decision.action, decision.proposed, decision.level, decision.mode, decision.reason, numbers


def test_a_resumed_run_decides_as_the_one_that_was_not_interrupted(tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    every = 2 * len(data()[0])
    options: dict[str, Any] = {"steps": 2 * every, "enable_checkpointing": True}

    def keep() -> Any:
        return ModelCheckpoint(dirpath=tmp_path / "kept", every_n_train_steps=every, save_top_k=-1, filename="{step}")

    whole, again = guard(), guard()
    _, expected = fit(tmp_path / "a", [whole, keep()], module=Ordered(), **options)
    checkpoint = str(tmp_path / "kept" / f"step={every}.ckpt")
    _, resumed = fit(tmp_path / "b", [again, keep()], module=Ordered(), resume=checkpoint, **options)
    assert weights(resumed) == weights(expected)
    assert [essence(d) for d in again.decisions] == [essence(d) for d in whole.decisions[every:]]
    assert replay(tmp_path / "b" / "kalmanguard").identical


def test_a_run_that_dies_says_so(tmp_path: Path) -> None:
    class Dies(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, index: int) -> None:
            if trainer.global_step == 15:
                raise RuntimeError("the lights go out")

    callback = guard()
    with pytest.raises(RuntimeError, match="lights"):
        fit(tmp_path, [callback, Dies()])
    fit(tmp_path, [callback], steps=10)
    assert (tmp_path / "kalmanguard").is_dir()
    assert (tmp_path / "kalmanguard-2").is_dir()
    assert len(callback.decisions) == 10


def test_what_cannot_work_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="rewound"):
        guard(replay=True)
    train, _ = data()
    trainer = pl.Trainer(
        default_root_dir=str(tmp_path), callbacks=[guard()], max_steps=2, accelerator="cpu", logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    with pytest.raises(ConfigurationError, match="no held-out examples"):
        trainer.fit(Digits(), train)
