"""Supervision of a Trainer that was patched as Unsloth patches it.

Unsloth's kernels need an accelerator, so here a stand-in does to the real Trainer what its source does (2026.10):
``training_step`` and the training loop are compiled anew from their own source under other names, wrapped, and put into
the class; functions of its own are registered as global optimizer hooks; batches may be split by a ``training_step`` of
the object's own. Where the package itself is installed, its backend for CPUs runs whole (slow).

Oracles: the bare run under the same patches, recorded states, torch's own registry of hooks.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import optimizer as hooks

from kalmanguard.errors import ConfigurationError
from kalmanguard.faults import FaultInjector
from kalmanguard.integrations.unsloth import supervise
from kalmanguard.journal.reader import JournalReader
from kalmanguard.records import Action

transformers = pytest.importorskip("transformers")
from kalmanguard.integrations.huggingface import KalmanGuardCallback  # noqa: E402

from .test_huggingface import (  # noqa: E402
    FIXED,
    Faults,
    Recorder,
    essence,
    logged,
    moments,
    rolled_back,
    streams,
    trainer_of,
    weights,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of transformers and accelerate themselves
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def compiled_anew(name: str, new: str) -> Any:
    """A method of the Trainer from its own source, under another name and in another module."""
    module = inspect.getmodule(transformers.Trainer)
    source = textwrap.dedent(inspect.getsource(getattr(transformers.Trainer, name)))
    space = {**vars(module), "__name__": "unsloth_stand_in"}
    exec(source.replace(f"def {name}", f"def {new}", 1), space)
    return space[new]


class Patched:
    """What the stand-in has seen."""

    def __init__(self) -> None:
        self.settled = self.optimizer_steps = 0


@pytest.fixture
def patched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Patched]:
    seen = Patched()
    step = compiled_anew("training_step", "_unsloth_training_step")
    loop = compiled_anew("_inner_training_loop", "_fast_inner_training_loop")

    @functools.wraps(step)
    def settling(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.settled += 1
        return step(self, *args, **kwargs)

    def count(optimizer: Any, args: Any, kwargs: Any) -> None:
        seen.optimizer_steps += 1

    monkeypatch.setattr(transformers.Trainer, "training_step", settling)
    monkeypatch.setattr(transformers.Trainer, "_inner_training_loop", loop)
    handle = hooks.register_optimizer_step_post_hook(count)
    yield seen
    handle.remove()


def guard(**changes: Any) -> KalmanGuardCallback:
    return KalmanGuardCallback(settings={**FIXED, **changes})


def split_batches(trainer: Any) -> None:
    """As Unsloth's token budget does: a ``training_step`` of the object's own, which calls the one before twice."""
    before = trainer.training_step

    def training_step(model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        half = len(inputs["input_ids"]) // 2
        parts = [{k: v[rows] for k, v in inputs.items()} for rows in (slice(half), slice(half, None))]
        return sum(before(model, part, num_items_in_batch) for part in parts)

    trainer.training_step = training_step


def made(kind: str, folder: Path, **options: Any) -> Any:
    """A Trainer, and with it the seeds of the run."""
    trainer = trainer_of(folder, **options)
    if kind == "split":
        split_batches(trainer)
    return trainer


@pytest.mark.parametrize("kind", ["plain", pytest.param("accumulated", marks=pytest.mark.slow), "split"])
def test_a_clean_run_is_the_bare_run(kind: str, patched: Patched, tmp_path: Path) -> None:
    accumulation = 2 if kind == "accumulated" else 1
    options: dict[str, Any] = {"steps": 30, "gradient_accumulation_steps": accumulation, "max_grad_norm": 0.5}
    bare = made(kind, tmp_path / "bare", **options)
    bare.train()
    expected = weights(bare.model), moments(bare), logged(bare), streams()
    assert patched.settled == 30 * (1 if kind == "plain" else 2)
    watched = made(kind, tmp_path / "watched", **options)
    callback = supervise(watched, guard(mode="observe"))
    watched.train()
    assert (weights(watched.model), moments(watched), logged(watched), streams()) == expected
    assert len(callback.decisions) == 30
    assert callback.supervisor is not None
    assert callback.supervisor.statistics()["errors"] == 0
    assert ("training_step" in vars(watched)) == (kind == "split")
    with JournalReader(tmp_path / "watched" / "_kalmanguard") as reader:
        losses = [m.loss for m, _ in reader.steps() if m.gradient_norm is not None]
        facts = next(row.data()["facts"] for row in reader.rows("note") if row.data().get("about") == "training")
    told = [entry["loss"] for entry in logged(watched) if "loss" in entry]
    assert losses == pytest.approx(told, rel=1e-5)
    methods = facts["replaced_methods"]
    assert methods["_inner_training_loop"] == "unsloth_stand_in._fast_inner_training_loop"
    assert kind == "split" or methods["training_step"] == "unsloth_stand_in._unsloth_training_step"
    assert "compute_loss" not in methods


@pytest.mark.parametrize("kind", ["gradient", "bit flip"])
def test_what_goes_wrong_is_undone_and_a_resumed_run_goes_on(kind: str, patched: Patched, tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 60, "save_strategy": "steps", "save_steps": 50}
    injector = FaultInjector(seed=0)
    if kind == "gradient":
        injector.at(41).nan_gradient()
    else:
        injector.at(41).bit_flip(match="wte")
    recorder = Recorder()
    trainer = trainer_of(tmp_path, [Faults(injector)], **options)
    callback = supervise(trainer, guard())
    trainer.add_callback(recorder)
    try:
        trainer.train()
    finally:
        injector.detach()
    if kind == "gradient":
        assert [d.step for d in callback.decisions if d.action is Action.VETO] == [41]
        assert recorder.states[41] == recorder.states[40] != recorder.states[42]
    else:
        undone = rolled_back(callback)
        assert undone
        for decision in undone:
            assert decision.restored_step is not None
            assert recorder.states[decision.step] == recorder.states[decision.restored_step]
    resumed = trainer_of(tmp_path, **options)
    again = supervise(resumed, guard())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-50"))
    assert weights(resumed.model) == weights(trainer.model)
    if kind == "gradient":
        assert [essence(d) for d in again.decisions] == [essence(d) for d in callback.decisions[50:]]


def test_no_cast_of_a_weight_outlives_a_rollback(patched: Patched, tmp_path: Path) -> None:
    """Unsloth keeps casts by optimizer steps and version counters (``kernels/utils.py``); so does this one."""
    casts: list[tuple[tuple[int, int], torch.Tensor]] = []

    class Casts(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        wrong = 0

        def cast(self, model: nn.Module) -> torch.Tensor:
            weight = model.transformer.wte.weight
            key = patched.optimizer_steps, weight._version
            if not casts or casts[-1][0] != key:
                casts[:] = [(key, weight.detach().half())]
            return casts[-1][1]

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **others: Any) -> None:
            expected = model.transformer.wte.weight.detach().half()
            self.wrong += not torch.equal(self.cast(model), expected)

    injector = FaultInjector(seed=0)
    injector.at(41).bit_flip(match="wte")
    before, behind = Casts(), Casts()
    trainer = trainer_of(tmp_path, [Faults(injector), before], steps=60)
    callback = supervise(trainer, guard())
    trainer.add_callback(behind)
    try:
        trainer.train()
    finally:
        injector.detach()
    assert rolled_back(callback)
    assert behind.wrong == 0


def test_a_patch_that_comes_while_training_is_called_and_heard(
    patched: Patched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    before = transformers.Trainer.training_step

    def later(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(self.state.global_step)
        return before(self, *args, **kwargs)

    class Patches(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            if state.global_step == 5:
                monkeypatch.setattr(transformers.Trainer, "training_step", later)

    trainer = trainer_of(tmp_path, [Patches()], steps=10)
    callback = supervise(trainer, guard(mode="observe"))
    trainer.train()
    assert calls == [5, 6, 7, 8, 9]
    assert len(callback.decisions) == 10
    with JournalReader(tmp_path / "_kalmanguard") as reader:
        assert sum(m.loss is not None for m, _ in reader.steps()) == 10


def test_a_training_step_that_is_not_heard_is_warned_about(patched: Patched, tmp_path: Path) -> None:
    class Replaces(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            if state.global_step == 5:
                trainer.training_step = functools.partial(transformers.Trainer.training_step, trainer)

    trainer = trainer_of(tmp_path, [Replaces()], steps=10)
    callback = supervise(trainer, guard())
    with pytest.warns(UserWarning, match="was heard in step 6: something has put another") as caught:
        trainer.train()
    assert len([w for w in caught if "was heard" in str(w.message)]) == 1
    assert len(callback.decisions) == 10


def test_only_hooks_of_our_own_are_removed(patched: Patched, tmp_path: Path) -> None:
    """One foreign hook was there before, one comes in mid-run, one takes itself away while an optimizer steps."""

    class Registers(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            if state.global_step == 3:
                self.kept = hooks.register_optimizer_step_pre_hook(lambda *_: None)
                self.gone = hooks.register_optimizer_step_post_hook(lambda *_: self.gone.remove())

    def registered() -> set[int]:
        return {*hooks._global_optimizer_pre_hooks, *hooks._global_optimizer_post_hooks}

    before = registered()
    foreign = Registers()
    trainer = trainer_of(tmp_path, [foreign], steps=10)
    supervise(trainer, guard())
    trainer.train()
    try:
        assert registered() == {*before, foreign.kept.id}
        assert patched.optimizer_steps == 10
    finally:
        foreign.kept.remove()


def test_what_cannot_work_is_refused_in_one_sentence(patched: Patched, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="list is no transformers Trainer"):
        supervise([])
    trainer = trainer_of(tmp_path)
    assert isinstance(supervise(trainer), KalmanGuardCallback)
    with pytest.raises(ConfigurationError, match="is supervised already"):
        supervise(trainer)


def test_importing_it_imports_neither_unsloth_nor_transformers() -> None:
    code = "import sys, kalmanguard.integrations.unsloth; print({'unsloth', 'transformers', 'torch'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.slow
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("unsloth", "trl", "datasets")),
    reason="needs unsloth, trl and datasets",
)
def test_a_run_of_unsloth_itself(tmp_path: Path) -> None:
    def run(mode: str) -> dict[str, Any]:
        folder = tmp_path / mode
        folder.mkdir()
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("unsloth_run.py")), mode, str(folder)],
            cwd=folder, capture_output=True, text=True, check=False, timeout=300,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2_000:]
        return json.loads(done.stdout.strip().splitlines()[-1])  # type: ignore[no-any-return]

    bare, observed, protected = run("bare"), run("observe"), run("protect")
    assert len(bare["states"]) == 61
    assert observed["states"] == bare["states"]
    assert len(observed["decisions"]) == 60
    undone = [d for d in protected["decisions"] if d[1] == "ROLLBACK"]
    assert undone
    assert all(protected["states"][step] == protected["states"][restored] for step, _, restored in undone)
    assert protected["states"][41] != protected["states"][42]
