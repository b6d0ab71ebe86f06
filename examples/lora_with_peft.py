# %% [markdown]
# # LoRA adapters with PEFT
#
# A small language model learns one module of the standard library. Its weights are then frozen, and adapters of low
# rank are trained on another module by the Hugging Face Trainer. Half-way the learning rate is fifty times too large
# for three steps; the adapters go back to what they were, bit for bit. Snapshots hold the adapters alone: the frozen
# base is kept once. Needs transformers and peft (the extra `peft`).

# %%
import argparse
import json
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from kalmanguard import FaultInjector
from kalmanguard.integrations.huggingface import KalmanGuardCallback

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 200
LENGTH = 32


def windows(*modules: ModuleType) -> list[dict[str, torch.Tensor]]:
    """Windows of the modules' own text, ASCII by ASCII, in any order."""
    text = b"".join(Path(str(module.__file__)).read_bytes() for module in modules)
    rows = torch.tensor([min(b, 127) for b in text[: len(text) // LENGTH * LENGTH]]).view(-1, LENGTH)
    return [{"input_ids": row, "labels": row.clone()} for row in rows[torch.randperm(len(rows))]]


def train(model: Any, examples: list[dict[str, torch.Tensor]], rate: float, *callbacks: TrainerCallback) -> None:
    """Train on nine windows of ten; the others are the probe's."""
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(), max_steps=STEPS, learning_rate=rate, per_device_train_batch_size=8,
        lr_scheduler_type="constant", report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
        logging_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    Trainer(
        model=model,
        args=arguments,
        train_dataset=[e for i, e in enumerate(examples) if i % 10],
        eval_dataset=examples[::10],
        callbacks=list(callbacks),
    ).train()


class Accident(TrainerCallback):
    """The learning rate is far too large for three steps."""

    def __init__(self) -> None:
        self.injector = FaultInjector(seed=0)
        self.injector.at(STEPS // 2).lr_spike(50.0, steps=3)

    def on_train_begin(self, *args: Any, model: Any = None, optimizer: Any = None, **others: Any) -> None:
        self.injector.attach(model, optimizer.optimizer)

    def on_train_end(self, *args: Any, **others: Any) -> None:
        self.injector.detach()


class Memory(TrainerCallback):
    """How many snapshots there are at the end, and what they take; put before the guard, which lets them go then."""

    def __init__(self, guard: KalmanGuardCallback) -> None:
        self.guard, self.snapshots, self.nbytes = guard, 0, 0

    def on_train_end(self, *args: Any, **others: Any) -> None:
        assert self.guard.supervisor is not None
        self.snapshots = len(self.guard.supervisor.statistics()["snapshots"])
        self.nbytes = self.guard.supervisor.diagnose()["snapshot_bytes"]


# %%
torch.manual_seed(0)
base = GPT2LMHeadModel(
    GPT2Config(
        vocab_size=128, n_positions=LENGTH, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    )
)  # fmt: skip
train(base, windows(argparse), 3e-3)

# %% [markdown]
# From here on it is what every fine-tuning with PEFT does, and one callback.

# %%
adapters = LoraConfig(
    r=4, lora_alpha=8, target_modules=["c_attn", "c_fc", "c_proj"], fan_in_fan_out=True, task_type=TaskType.CAUSAL_LM
)  # fmt: skip
model = get_peft_model(base, adapters)
guard = KalmanGuardCallback(settings={"probe_examples": 32})
memory = Memory(guard)
train(model, windows(json, json.decoder, json.encoder, json.scanner), 5e-3, Accident(), memory, guard)

for decision in guard.decisions:
    if decision.action != "ACCEPT":
        print(decision.reason)
print(guard.certificate)

# %% [markdown]
# A snapshot takes what the adapters and their two moments take. The frozen base is kept once for all of them. (What is
# held also counts buffers that wait for the next snapshot.)

# %%
trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
print(f"the model has {trained + frozen:,} bytes, its adapters {trained:,}")
print(f"{memory.snapshots} snapshots: {memory.nbytes:,} bytes, of which {frozen:,} are the base, once")
print(f"{memory.snapshots} copies of the model alone would be {memory.snapshots * (trained + frozen):,} bytes")
assert memory.nbytes < memory.snapshots * frozen
