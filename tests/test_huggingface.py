"""The supervisor in a Hugging Face Trainer: real training of tiny transformers on the standard library's own text.

Oracles: the bare run (bit for bit, while nothing is wrong or nothing may be done), the states that a second callback
has recorded after every step (a rollback is exact or it is none), the uninterrupted run (for one that resumes), and
what the Trainer itself logs (losses, gradient norms).
"""

from __future__ import annotations

import argparse
import copy
import logging
import random
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kalmanguard.certificate.verify import verify
from kalmanguard.errors import ConfigurationError, SnapshotError, TrainingHalted
from kalmanguard.faults import FaultInjector
from kalmanguard.journal.reader import JournalReader
from kalmanguard.records import Action, Decision, Level, Mode
from kalmanguard.replay import replay
from kalmanguard.settings import Settings

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from kalmanguard.integrations.decisions import DecisionLog  # noqa: E402
from kalmanguard.integrations.huggingface import KalmanGuardCallback  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of transformers and accelerate themselves
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
LENGTH = 24
SLOW = partial(pytest.param, marks=pytest.mark.slow)
FIXED: dict[str, Any] = {"probe_examples": 32, "fresh_examples": 64, "probe_every": 5, "snapshot_every": 10}


@cache
def windows() -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Windows of the text of argparse, ASCII by ASCII: to train on, and held out."""
    text = Path(str(argparse.__file__)).read_bytes()[: 800 * LENGTH]
    rows = torch.tensor([min(byte, 127) for byte in text]).view(-1, LENGTH)
    examples = [{"input_ids": row, "labels": row.clone()} for row in rows]
    return examples[:600], examples[600:]


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=128, n_positions=LENGTH, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)  # type: ignore[no-any-return]


class Recorder(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
    """Every parameter and moment after each step; put behind the supervisor, after what that has done."""

    def __init__(self) -> None:
        self.states: list[bytes] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.states.append(weights(model))

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.states.append(weights(model))


class Faults(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
    def __init__(self, injector: FaultInjector, *, first_step: int = 1) -> None:
        self.injector, self.first_step = injector, first_step

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        self.injector.attach(model, optimizer.optimizer, first_step=self.first_step)


def weights(model: nn.Module) -> bytes:
    return b"".join(v.detach().cpu().view(torch.uint8).numpy().tobytes() for v in model.state_dict().values())


def trainer_of(
    folder: Path,
    callbacks: list[Any] | None = None,
    *,
    model: nn.Module | None = None,
    data: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
    steps: int = 60,
    **options: Any,
) -> Any:
    train, held_out = ([data(row) for row in rows] for rows in windows())
    random.seed(0)
    np.random.seed(0)
    arguments: dict[str, Any] = {
        "per_device_train_batch_size": 8,
        "max_steps": steps,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "linear",
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **options,
    }
    return transformers.Trainer(
        model=model or gpt2(),
        args=transformers.TrainingArguments(output_dir=str(folder), **arguments),
        train_dataset=train,
        eval_dataset=held_out,
        callbacks=callbacks or [],
    )


def logged(trainer: Any) -> list[dict[str, Any]]:
    """What the Trainer has logged, without what it times."""
    timed = ("runtime", "per_second")
    return [{k: v for k, v in entry.items() if not k.endswith(timed)} for entry in trainer.state.log_history]


def streams() -> list[Any]:
    return [
        torch.get_rng_state().tolist(),
        random.getstate(),
        [part.tolist() if hasattr(part, "tolist") else part for part in np.random.get_state()],
    ]


def moments(trainer: Any) -> list[bytes]:
    state = trainer.optimizer.optimizer.state_dict()["state"]
    return [v.numpy().tobytes() for entry in state.values() for v in entry.values()]


def guard(**changes: Any) -> KalmanGuardCallback:
    return KalmanGuardCallback(settings=Settings(**{**FIXED, **changes}))


# -- nothing is wrong --------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of torch.compile, tracing
@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("observe", {}),
        SLOW("observe", {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2, "steps": 30}),
        SLOW("protect", {"bf16": True, "steps": 30}),
        SLOW("protect", {"torch_compile": True, "torch_compile_backend": "eager", "steps": 30}),
        SLOW("protect", {"optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0}),
    ],
)
def test_a_clean_run_is_the_bare_run(mode: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Weights, moments, logs, evaluations in between, checkpoints' worth of random state: all of it bit for bit."""
    options = {"eval_strategy": "steps", "eval_steps": 20, "max_grad_norm": 0.5, "steps": 40, **options}
    bare = trainer_of(tmp_path / "bare", **options)
    bare.train()
    expected = weights(bare.model), moments(bare), logged(bare), streams()
    callback = guard(mode=mode)
    watched = trainer_of(tmp_path / "watched", [callback], **options)
    watched.train()
    assert (weights(watched.model), moments(watched), logged(watched), streams()) == expected
    assert callback.supervisor is not None
    assert callback.supervisor.step == watched.state.global_step == len(callback.decisions)
    assert callback.supervisor.statistics()["errors"] == 0
    assert {decision.action for decision in callback.decisions} == {Action.ACCEPT}
    # What was wrapped is the Trainer's own again.
    assert "training_step" not in vars(watched)
    assert "clip_grad_norm_" not in vars(watched.accelerator)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_journal_holds_the_loss_and_the_norm_before_clipping(accumulation: int, tmp_path: Path) -> None:
    callback = guard(mode="observe")
    trainer = trainer_of(tmp_path, [callback], steps=20, gradient_accumulation_steps=accumulation, max_grad_norm=0.1)
    trainer.train()
    folder = tmp_path / "_kalmanguard"
    with JournalReader(folder) as reader:
        steps = [m for m, _ in reader.steps()]
        facts = [row.data() for row in reader.rows("note")]
    told = [entry for entry in logged(trainer) if "loss" in entry]
    measured = [m for m in steps if m.gradient_norm is not None]
    assert len(measured) == len(told) == 20
    assert [m.loss for m in measured] == pytest.approx([entry["loss"] for entry in told], rel=1e-5)
    norms = [entry["grad_norm"] for entry in told]
    assert [m.gradient_norm for m in measured] == pytest.approx(norms, rel=1e-5)
    assert min(norms) > 0.1
    about = next(note["facts"] for note in facts if note.get("about") == "training")
    assert about["kind"] == "gpt2"
    assert (about["num_hidden_layers"], about["hidden_size"], about["vocab_size"]) == (2, 16, 128)
    assert (about["dtypes"], about["planned_steps"], about["accumulation"]) == (["float32"], 20, accumulation)
    assert replay(folder).identical
    assert callback.certificate is not None
    assert not any(claim.status == "FAILED" for claim in callback.certificate.claims)


def test_the_probe_is_the_shifted_loss_of_each_sequence(tmp_path: Path) -> None:
    """Also before training, when the loss is near log(vocabulary) whichever way the labels are shifted."""
    callback = guard(mode="observe")
    model = gpt2()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.1)  # all logits are nearly equal
    held_out = torch.stack([example["input_ids"] for example in windows()[1][:32]])
    with torch.no_grad():
        logits = copy.deepcopy(model).eval()(held_out).logits
    expected = [float(F.cross_entropy(row[:-1], ids[1:])) for row, ids in zip(logits, held_out, strict=True)]
    trainer_of(tmp_path, [callback], model=model, steps=1).train()
    with JournalReader(tmp_path / "_kalmanguard") as reader:
        first, _ = next(reader.steps())
    assert first.probe is not None
    assert first.probe.losses.tolist() == pytest.approx(expected, rel=1e-5)


# -- something is wrong ------------------------------------------------------------------------------------------------


def struck(folder: Path, faults: Callable[[FaultInjector], object], **options: Any) -> tuple[Any, Any, Recorder]:
    """A protected run in which something happens; the supervisor, the Trainer, and the states after each step."""
    injector = FaultInjector(seed=0)
    faults(injector)
    callback, recorder = guard(), Recorder()
    trainer = trainer_of(folder, [Faults(injector), callback, recorder], **options)
    try:
        trainer.train()
    finally:
        injector.detach()
    return callback, trainer, recorder


def rolled_back(callback: KalmanGuardCallback) -> list[Decision]:
    return [decision for decision in callback.decisions if decision.rolled_back]


@pytest.mark.parametrize("accumulation", [1, SLOW(4)])
def test_a_gradient_that_is_not_finite_is_dropped_before_it_acts(accumulation: int, tmp_path: Path) -> None:
    callback, trainer, recorder = struck(
        tmp_path, lambda injector: injector.at(40).nan_gradient(), gradient_accumulation_steps=accumulation
    )
    vetoed = [decision for decision in callback.decisions if decision.action is Action.VETO]
    assert [decision.step for decision in vetoed] == [40]
    assert recorder.states[40] == recorder.states[39]
    assert recorder.states[41] != recorder.states[40]
    assert trainer.state.global_step == 60
    assert not rolled_back(callback)
    assert callback.supervisor.statistics()["errors"] == 0


@pytest.mark.parametrize("accumulation", [1, SLOW(4)])
@pytest.mark.parametrize(
    "fault",
    [lambda injector: injector.lr_spike(100.0, steps=4), lambda injector: injector.bit_flip(match="wte")],
    ids=["lr-spike", "bit-flip"],
)
def test_what_damages_the_weights_is_undone_bit_for_bit(
    fault: Callable[[FaultInjector], object], accumulation: int, tmp_path: Path
) -> None:
    callback, trainer, recorder = struck(
        tmp_path,
        lambda injector: fault(injector.at(41)),
        steps=70,
        gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=8 // accumulation,
    )
    undone = rolled_back(callback)
    assert undone
    for decision in undone:
        assert decision.restored_step is not None
        assert recorder.states[decision.step] == recorder.states[decision.restored_step]
    assert 0 < undone[0].restored_step <= 40 < undone[0].step <= 48
    with JournalReader(tmp_path / "_kalmanguard") as reader:
        outcomes = [row.data() for row in reader.rows("outcome")]
    assert len(outcomes) >= len(undone)
    assert all(found["digest_expected"] == found["digest_actual"] is not None for found in outcomes)
    assert trainer.state.global_step == 70
    final = [entry["loss"] for entry in logged(trainer) if "loss" in entry][-5:]
    assert float(np.mean(final)) < 3.2
    assert callback.certificate is not None
    assert not any(claim.status == "FAILED" for claim in callback.certificate.claims)
    assert replay(tmp_path / "_kalmanguard").identical


def broken() -> FaultInjector:
    """Something that never ends: all weights are tripled in every step."""
    injector = FaultInjector(seed=0)
    for step in range(41, 100):
        injector.at(step).weight_scale(3.0)
    return injector


def test_a_halt_stops_training_with_the_best_certified_state(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    injector = broken()
    callback, recorder = guard(rollback_budget=2), Recorder()
    trainer = trainer_of(tmp_path, [Faults(injector), callback, recorder], steps=100)
    with caplog.at_level(logging.WARNING, logger="kalmanguard"):
        trainer.train()
    injector.detach()
    last = callback.decisions[-1]
    assert (last.action, last.mode) == (Action.HALT, Mode.HALTED)
    assert trainer.state.global_step == last.step < 100
    assert last.restored_step is not None
    assert weights(trainer.model) == recorder.states[last.restored_step]
    assert f"training stops here; the model is that of step {last.restored_step}" in caplog.text


@pytest.mark.slow
def test_a_halt_is_an_exception_for_those_who_say_so(tmp_path: Path) -> None:
    injector = broken()
    callback = guard(rollback_budget=2, on_halt="raise")
    trainer = trainer_of(tmp_path, [Faults(injector), callback], steps=100)
    with pytest.raises(TrainingHalted):
        trainer.train()
    injector.detach()
    assert callback.decisions[-1].action is Action.HALT
    assert "training_step" not in vars(trainer)
    with JournalReader(tmp_path / "_kalmanguard") as reader:
        assert reader.complete


# -- stopping and going on ---------------------------------------------------------------------------------------------


def essence(decision: Decision) -> tuple[Any, ...]:
    """What was decided, and every number that the engine has decided it on but the drift test's wealth."""
    numbers = tuple(None if np.isnan(x) else x for i, x in enumerate(decision.statistics) if not 10 <= i < 14)
    return decision.step, decision.action, decision.proposed, decision.level, decision.mode, decision.reason, numbers


@pytest.mark.parametrize("mode", [SLOW("observe"), "protect"])
def test_a_resumed_run_decides_as_the_one_that_was_not_interrupted(mode: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "steps": 80,
        "save_strategy": "steps",
        "save_steps": 50,
        "gradient_accumulation_steps": 2,
    }
    whole = guard(mode=mode)
    uninterrupted = trainer_of(tmp_path / "run", [whole], **options)
    uninterrupted.train()
    again = guard(mode=mode)
    resumed = trainer_of(tmp_path / "run", [again], **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-50"))
    assert weights(resumed.model) == weights(uninterrupted.model)
    assert moments(resumed) == moments(uninterrupted)
    assert [essence(d) for d in again.decisions] == [essence(d) for d in whole.decisions[50:]]
    assert {d.level for d in again.decisions} <= {Level.NOMINAL, Level.SUSPECT}
    # A run of its own, that verifies and replays.
    assert not any(claim.status == "FAILED" for claim in verify(tmp_path / "run" / "_kalmanguard-2").claims)
    assert replay(tmp_path / "run" / "_kalmanguard-2").identical


@pytest.mark.slow
def test_a_resumed_run_is_protected(tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 70, "save_strategy": "steps", "save_steps": 40}
    trainer_of(tmp_path, [guard()], **options).train()
    injector = FaultInjector(seed=0)
    injector.at(57).bit_flip(match="wte")
    callback, recorder = guard(), Recorder()
    resumed = trainer_of(tmp_path, [Faults(injector, first_step=41), callback, recorder], **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-40"))
    injector.detach()
    undone = rolled_back(callback)
    assert undone
    first = undone[0]
    assert first.restored_step is not None
    assert 40 < first.restored_step < 57 <= first.step
    assert recorder.states[first.step - 40] == recorder.states[first.restored_step - 40]


def test_a_checkpoint_without_a_fitting_state_is_warned_about(tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 20, "save_strategy": "steps", "save_steps": 10}
    trainer_of(tmp_path, [], **options).train()
    callback = guard()
    resumed = trainer_of(tmp_path, [callback], **options)
    with pytest.warns(UserWarning, match="holds no state of a supervisor; supervision begins anew"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert [decision.step for decision in callback.decisions] == list(range(1, 11))
    (tmp_path / "checkpoint-10" / "kalmanguard.json").write_text("[")
    with pytest.raises(SnapshotError, match="cannot be read"):
        trainer_of(tmp_path, [guard(strict=True)], **options).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-10")
        )


def test_a_run_that_dies_says_so_and_the_next_one_is_another(tmp_path: Path) -> None:
    class Dies(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == 5:
                model.register_forward_pre_hook(self.die)

        def die(self, module: nn.Module, args: Any) -> None:
            raise ZeroDivisionError("of the user's own")

    callback = guard()
    trainer = trainer_of(tmp_path, [callback, Dies()], steps=10)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert "training_step" not in vars(trainer)
    with JournalReader(tmp_path / "_kalmanguard") as reader:
        assert not reader.complete
        assert reader.last.step == 5
    trainer_of(tmp_path, [callback], steps=10).train()
    assert [decision.step for decision in callback.decisions] == list(range(1, 11))
    with JournalReader(tmp_path / "_kalmanguard-2") as reader:
        assert reader.complete


# -- in company --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_early_stopping_and_the_best_model_are_as_without(tmp_path: Path) -> None:
    options = {
        "steps": 80, "eval_strategy": "steps", "eval_steps": 8, "save_strategy": "steps", "save_steps": 8,
        "load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
    }  # fmt: skip
    ends = []
    for name, callbacks in (("bare", []), ("watched", [guard(mode="observe")])):
        stopping = transformers.EarlyStoppingCallback(early_stopping_patience=1)
        trainer = trainer_of(tmp_path / name, [stopping, *callbacks], **options)
        trainer.train()
        best = Path(trainer.state.best_model_checkpoint).name
        ends.append((trainer.state.global_step, best, weights(trainer.model), logged(trainer), streams()))
    assert ends[0] == ends[1]
    assert ends[0][0] < 80


class LoRA(nn.Module):
    """A frozen linear map and a trained one of low rank beside it, as PEFT makes them (``Conv1D`` of GPT-2)."""

    def __init__(self, base: nn.Module, rank: int = 2) -> None:
        super().__init__()
        self.base = base
        inputs, outputs = base.weight.shape
        self.lora_A = nn.Parameter(torch.randn(inputs, rank) / 8)
        self.lora_B = nn.Parameter(torch.zeros(rank, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.lora_A @ self.lora_B  # type: ignore[no-any-return]


def adapted(folder: Path) -> nn.Module:
    """A model of the text, frozen, with adapters for another task: the same text in capitals."""
    base = trainer_of(folder, steps=60)
    base.train()
    model: nn.Module = base.model
    model.requires_grad_(False)
    for block in model.transformer.h:
        block.attn.c_attn, block.mlp.c_fc = LoRA(block.attn.c_attn), LoRA(block.mlp.c_fc)
        block.attn.c_proj, block.mlp.c_proj = LoRA(block.attn.c_proj), LoRA(block.mlp.c_proj)
    return model


def capitals(row: dict[str, Tensor]) -> dict[str, Tensor]:
    ids = row["input_ids"]
    ids = torch.where((ids >= ord("a")) & (ids <= ord("z")), ids - 32, ids)
    return {"input_ids": ids, "labels": ids}


@pytest.mark.slow
def test_a_frozen_base_is_kept_once_and_its_adapters_are_rolled_back(tmp_path: Path) -> None:
    model = adapted(tmp_path / "base")
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    callback, _, recorder = struck(
        tmp_path / "tuned", lambda injector: injector.at(81).lr_spike(100.0, steps=4),
        model=model, data=capitals, steps=110, learning_rate=3e-2, lr_scheduler_type="constant",
    )  # fmt: skip
    undone = rolled_back(callback)
    assert undone
    for decision in undone:
        assert decision.restored_step is not None
        assert recorder.states[decision.step] == recorder.states[decision.restored_step]
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    assert callback.supervisor is not None
    slot = callback.supervisor._loop.actuator.state.bytes_per_slot()
    assert 3 * trained <= slot < whole  # the adapters' weights and two moments
    assert callback.supervisor.statistics()["progress"] > 0.2  # the adapters do learn


# -- what cannot work --------------------------------------------------------------------------------------------------


def test_what_cannot_work_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be rewound in mid-epoch"):
        KalmanGuardCallback(settings={"replay": True})
    with pytest.raises(ConfigurationError, match="keep = 0"):
        KalmanGuardCallback(keep=0)
    with pytest.raises(ConfigurationError, match="there is no setting 'speed'"):
        KalmanGuardCallback(settings={"speed": 1})
    with pytest.raises(ConfigurationError, match="something else than a transformers Trainer"):
        KalmanGuardCallback().on_train_begin(None, None, None)
    trainer = trainer_of(tmp_path, [guard()])
    trainer.eval_dataset = None
    with pytest.raises(ConfigurationError, match="no held-out examples to probe: pass"):
        trainer.train()
    for dataset, message in (
        ([], "empty"),
        ([{"input_ids": torch.zeros(3), "labels": torch.zeros(3)}] * 4, "cannot be evaluated on the probe's examples"),
        ([{"input_ids": torch.zeros(n, dtype=torch.long)} for n in range(1, 9)], "cannot be read and collated"),
    ):
        callback = KalmanGuardCallback(probe_dataset=dataset, settings=FIXED)
        trainer = trainer_of(tmp_path, [callback])
        with pytest.raises(ConfigurationError, match=message):
            trainer.train()
        assert callback.supervisor is None
        assert "training_step" not in vars(trainer)


def test_decisions_are_kept_in_bounded_memory() -> None:
    log = DecisionLog(keep=5)
    for step in range(1, 101):
        level = Level.SUSPECT if step % 20 == 0 else Level.NOMINAL
        decision = Decision(step, Action.ACCEPT, Action.ACCEPT, level, Mode.WATCHING, "")
        log.add(decision)
        log.add(decision)  # nothing has happened since
    assert [decision.step for decision in log.all()] == [20, 40, 60, 80, 96, 97, 98, 99, 100]
