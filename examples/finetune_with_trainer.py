# %% [markdown]
# # Fine-tuning with the Hugging Face Trainer
#
# A small language model learns one module of the standard library, and is then fine-tuned on another one with its base
# frozen: only the last block and the head are trained, and only they are kept in snapshots. One callback supervises.
# Needs transformers (the extra `huggingface`).

# %%
import argparse
import json
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from kalmanguard.integrations.huggingface import KalmanGuardCallback

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 150
LENGTH = 32


def windows(module: ModuleType) -> list[dict[str, torch.Tensor]]:
    """Windows of a module's own text, ASCII by ASCII."""
    text = Path(str(module.__file__)).read_bytes()
    rows = torch.tensor([min(b, 127) for b in text[: len(text) // LENGTH * LENGTH]]).view(-1, LENGTH)
    return [{"input_ids": row, "labels": row.clone()} for row in rows]


def train(model: Any, examples: list[dict[str, torch.Tensor]], folder: Path, rate: float) -> KalmanGuardCallback:
    """Train on nine windows of ten, and probe the others."""
    guard = KalmanGuardCallback(settings={"probe_examples": 32})
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, learning_rate=rate, per_device_train_batch_size=8, report_to=[],
        save_strategy="no", use_cpu=True, disable_tqdm=True, logging_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    held_out = examples[::10]
    Trainer(
        model=model,
        args=arguments,
        train_dataset=[e for i, e in enumerate(examples) if i % 10],
        eval_dataset=held_out,
        callbacks=[guard],
    ).train()
    return guard


# %%
folder = Path(tempfile.mkdtemp())
torch.manual_seed(0)
model = GPT2LMHeadModel(
    GPT2Config(
        vocab_size=128, n_positions=LENGTH, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
)  # fmt: skip
guard = train(model, windows(argparse), folder / "pretrained", 1e-2)
print(f"pretraining: {guard.decisions[-1].reason}")

# %%
for name, parameter in model.named_parameters():
    parameter.requires_grad = name.startswith(("transformer.h.1", "transformer.ln_f", "lm_head"))
guard = train(model, windows(json) + windows(json.decoder), folder / "finetuned", 2e-3)
trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
print(f"fine-tuning {trained:,} of {model.num_parameters():,} parameters: {guard.decisions[-1].reason}")
print(guard.certificate)
