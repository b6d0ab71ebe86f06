"""One fine-tuning by Unsloth's own backend for CPUs: ``python unsloth_run.py bare|observe|protect FOLDER``.

Needs unsloth, trl and datasets. Prints one JSON line: the digest of the weights after each step, what was decided, and
which methods of the trainer were not transformers' own.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {"UNSLOTH_FORCE_CPU": "1", "HF_HUB_OFFLINE": "1"}

from kalmanguard.integrations.unsloth import supervise  # isort: skip - it may stand before Unsloth
from unsloth import FastLanguageModel  # isort: skip - it wants to be before the others

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import SFTConfig, SFTTrainer

from kalmanguard.faults import FaultInjector

FIXED = {"probe_examples": 32, "fresh_examples": 32, "probe_every": 5, "snapshot_every": 10}


class Recorder(TrainerCallback):
    """The weights after each step, and a bit that flips in an adapter in step 41 of a protected run."""

    def __init__(self, injector: FaultInjector) -> None:
        self.states: list[str] = []
        self.injector = injector

    def on_train_begin(self, *args: Any, model: Any = None, optimizer: Any = None, **others: Any) -> None:
        self.injector.attach(model, optimizer.optimizer)
        self.on_step_end(model=model)

    def on_step_end(self, *args: Any, model: Any = None, **others: Any) -> None:
        data = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
        self.states.append(hashlib.sha256(data).hexdigest())


def local_model(folder: Path) -> Path:
    """A tiny Llama that reads bytes, saved as Unsloth loads its models."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"<0x{byte:02X}>": byte + 3 for byte in range(256)}}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[], byte_fallback=True, unk_token="<pad>"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder / "model")
    return folder / "model"


def main(mode: str, folder: Path) -> None:
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(local_model(folder)), max_seq_length=64, load_in_4bit=False, dtype=torch.float32
    )
    model = FastLanguageModel.get_peft_model(
        model, r=4, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"], lora_alpha=8, random_state=0
    )
    text = Path(argparse.__file__).read_text()[:20_000]
    rows = [{"text": text[start : start + 48]} for start in range(0, len(text) - 48, 48)]
    injector = FaultInjector(seed=0)
    if mode == "protect":
        injector.at(41).bit_flip(match="lora_A")
    recorder = Recorder(injector)
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows[:350]),
        eval_dataset=Dataset.from_list(rows[350:]),
        args=SFTConfig(
            output_dir=str(folder / "out"), max_steps=60, per_device_train_batch_size=4, learning_rate=1e-2,
            report_to="none", dataset_text_field="text", max_length=64, save_strategy="no", seed=0, disable_tqdm=True,
        ),
    )  # fmt: skip
    decisions: list[Any] = []
    if mode == "bare":
        trainer.add_callback(recorder)
        trainer.train()
    else:
        from kalmanguard.integrations.huggingface import KalmanGuardCallback

        guard = supervise(trainer, KalmanGuardCallback(settings={**FIXED, "mode": mode}))
        trainer.add_callback(recorder)
        trainer.train()
        decisions = [[d.step, d.action.value, d.restored_step] for d in guard.decisions]
    print(json.dumps({"states": recorder.states, "decisions": decisions}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
