"""Adapters of PEFT under the Trainer's callback: a small GPT-2 of real text, frozen, and LoRA beside its layers.

Oracles: the bare run bit for bit, the states that a second callback has recorded, and the uninterrupted run.
"""

from __future__ import annotations

import tempfile
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kalmanguard.faults import FaultInjector
from kalmanguard.journal.reader import JournalReader
from kalmanguard.records import Action
from kalmanguard.replay import replay

pytest.importorskip("transformers")
pytest.importorskip("peft")
import peft
from transformers import TrainerCallback

from .test_huggingface import (
    Faults,
    Recorder,
    capitals,
    essence,
    gpt2,
    guard,
    logged,
    moments,
    rolled_back,
    streams,
    trainer_of,
    weights,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of transformers, accelerate and peft themselves
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
train = partial(trainer_of, data=capitals, learning_rate=3e-2, lr_scheduler_type="constant")


@cache
def learned() -> dict[str, Tensor]:
    """The weights of a base that has learned the text as it stands."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(Path(folder), steps=60)
        trainer.train()
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def adapted(**options: Any) -> Any:
    """The same base and adapters every time; with dropout, so that they draw from the random streams."""
    base = gpt2()
    base.load_state_dict(learned())
    torch.manual_seed(1)
    layers = ["c_attn", "c_fc", "c_proj"]
    config = peft.LoraConfig(
        r=2, target_modules=layers, lora_dropout=0.05, fan_in_fan_out=True, task_type="CAUSAL_LM", **options
    )
    return peft.get_peft_model(base, config)


def frozen(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


class Damage(TrainerCallback):
    """A value that is not a number, written into an adapter after a step; put before the guard."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **others: Any) -> None:
        if state.global_step == self.step:
            adapter = next(p for name, p in model.named_parameters() if "lora_B" in name)
            adapter.data[0, 0] = torch.nan


class Memory(TrainerCallback):
    """What snapshots take at the end of training; put before the guard, which lets them go then."""

    def __init__(self, callback: Any) -> None:
        self.callback = callback

    def on_train_end(self, *args: Any, **others: Any) -> None:
        supervisor = self.callback.supervisor
        self.slots = supervisor._loop.actuator.ring.steps()
        self.nbytes = supervisor.diagnose()["snapshot_bytes"]
        self.slot = supervisor._loop.actuator.state.bytes_per_slot()
        self.base = supervisor._loop.actuator.state.base_bytes


@pytest.mark.parametrize("mode", ["observe", pytest.param("protect", marks=pytest.mark.slow)])
def test_a_clean_run_is_the_bare_run(mode: str, tmp_path: Path) -> None:
    bare = train(tmp_path / "bare", model=adapted(), steps=30)
    bare.train()
    expected = weights(bare.model), moments(bare), logged(bare), streams()
    callback = guard(mode=mode)
    watched = train(tmp_path / "watched", [callback], model=adapted(), steps=30)
    watched.train()
    assert (weights(watched.model), moments(watched), logged(watched), streams()) == expected
    assert callback.supervisor is not None
    assert callback.supervisor.statistics()["errors"] == 0
    assert {decision.action for decision in callback.decisions} == {Action.ACCEPT}
    assert callback.supervisor.statistics()["progress"] > 0.1  # the adapters do learn


@pytest.mark.parametrize("kind", ["gradient", "weight", "bit flip"])
def test_what_strikes_an_adapter_is_undone_bit_for_bit(kind: str, tmp_path: Path) -> None:
    model = adapted()
    before = frozen(model)
    injector = FaultInjector(seed=0)
    if kind == "gradient":
        injector.at(41).nan_gradient(match="lora_A")
    elif kind == "bit flip":
        injector.at(41).bit_flip(match="lora_A")
    others = [Damage(41)] if kind == "weight" else [Faults(injector)]
    callback, recorder = guard(), Recorder()
    trainer = train(tmp_path, [*others, callback, recorder], model=model, steps=60)
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
        assert 0 < undone[0].restored_step <= 40 < undone[0].step <= 48  # type: ignore[operator]
        for decision in undone:
            assert decision.restored_step is not None
            assert recorder.states[decision.step] == recorder.states[decision.restored_step]
        with JournalReader(tmp_path / "_kalmanguard") as reader:
            outcomes = [row.data() for row in reader.rows("outcome")]
        assert all(found["digest_expected"] == found["digest_actual"] is not None for found in outcomes)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    after = frozen(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert replay(tmp_path / "_kalmanguard").identical


def test_a_resumed_run_decides_as_the_one_that_was_not_interrupted(tmp_path: Path) -> None:
    """PEFT's checkpoints hold the adapters alone."""
    options: dict[str, Any] = {"steps": 60, "save_strategy": "steps", "save_steps": 40}
    whole, again = guard(), guard()
    uninterrupted = train(tmp_path, [whole], model=adapted(), **options)
    uninterrupted.train()
    checkpoint = tmp_path / "checkpoint-40"
    assert (checkpoint / "adapter_model.safetensors").exists()
    assert not (checkpoint / "model.safetensors").exists()
    resumed = train(tmp_path, [again], model=adapted(), **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert weights(resumed.model) == weights(uninterrupted.model)
    assert moments(resumed) == moments(uninterrupted)
    assert [essence(d) for d in again.decisions] == [essence(d) for d in whole.decisions[40:]]


@pytest.mark.parametrize("extra", [pytest.param({}, marks=pytest.mark.slow), {"modules_to_save": ["ln_f"]}])
def test_the_base_is_kept_once_however_many_snapshots_there_are(extra: dict[str, Any], tmp_path: Path) -> None:
    model = adapted(**extra)
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    whole = sum(p.nbytes for p in model.parameters())
    callback = guard()
    memory = Memory(callback)
    train(tmp_path, [memory, callback], model=model, steps=60).train()
    assert len(memory.slots) >= 3
    assert 3 * trained <= memory.slot < 3 * trained + 0.1 * (whole - trained)  # weights and two moments
    assert memory.base == pytest.approx(whole - trained, rel=0.1)
    assert memory.nbytes < len(memory.slots) * whole
