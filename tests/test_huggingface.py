"""The supervisor in a Hugging Face Trainer: real training of tiny transformers on the standard library's own text.

Oracles: the bare run (bit for bit, while nothing is wrong or nothing may be done), the states that a second callback has
recorded after every step (a rollback is exact or it is none), the uninterrupted run (for one that resumes), and what the
Trainer itself logs (losses, gradient norms).
"""

from __future__ import annotations

import argparse
import copy
import logging
import random
from collections.abc import Callable
from functools import cache
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
    def __init__(self, injector: FaultInjector) -> None:
        self.injector = injector

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        self.injector.attach(model, optimizer.optimizer)


def weights(model: nn.Module) -> bytes:
    return b"".join(v.detach().cpu().view(torch.uint8).numpy().tobytes() for v in model.state_dict().values())


def trainer_of(
    folder: Path, callbacks: list[Any] | None = None, *, model: nn.Module | None = None, steps: int = 60, **options: Any
) -> Any:
    train, held_out = windows()
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
    return [torch.get_rng_state().tolist(), random.getstate(), [part.tolist() if hasattr(part, "tolist") else part for part in np.random.get_state()]]


def moments(trainer: Any) -> list[bytes]:
    state = trainer.optimizer.optimizer.state_dict()["state"]
    return [v.numpy().tobytes() for entry in state.values() for v in entry.values()]


def guard(**changes: Any) -> KalmanGuardCallback:
    return KalmanGuardCallback(settings=Settings(**{**FIXED, **changes}))


# -- nothing is wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("observe", {}),
        ("observe", {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2, "steps": 30}),
        ("protect", {"bf16": True, "steps": 30}),
    ],
)
def test_a_clean_run_is_the_bare_run(mode: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Weights, moments, logs, evaluations in between, checkpoints' worth of random state: all of it bit for bit."""
    options = {"eval_strategy": "steps", "eval_steps": 20, "max_grad_norm": 0.5, **options}
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
    trainer = trainer_of(
        tmp_path, [callback], steps=20, gradient_accumulation_steps=accumulation, max_grad_norm=0.1
    )
    trainer.train()
    folder = tmp_path / "_kalmanguard"
    with JournalReader(folder) as reader:
        rows = list(reader.rows())
        steps = [row.measurement() for row in rows if row.kind == "step"]
        facts = [row.data() for row in rows if row.kind == "note"]
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
        first = next(row.measurement() for row in reader.rows() if row.kind == "step")
    assert first.probe is not None
    assert first.probe.losses.tolist() == pytest.approx(expected, rel=1e-5)
