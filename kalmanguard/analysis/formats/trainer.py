"""``trainer_state.json`` of the Hugging Face Trainer, or the folder of a run or a checkpoint that holds one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kalmanguard.analysis.formats.records import RecordsReader

FILE_NAME = "trainer_state.json"


class TrainerReader(RecordsReader):
    """Its ``log_history``: loss, grad_norm, learning_rate, eval_loss."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, document=True, key="log_history")
        self.format = "Hugging Face trainer state"

    def _whole(self) -> Iterator[dict[str, Any]]:
        # The last record sums the run up: its train_loss is the mean over all steps, not the loss of one.
        return (record for record in super()._whole() if "train_runtime" not in record)


def state_in(folder: Path) -> Path | None:
    """The newest state in a folder: its own, or that of the last ``checkpoint-N`` in it."""
    own = folder / FILE_NAME
    if own.is_file():
        return own
    numbered = [
        (int(child.name.removeprefix("checkpoint-")), child / FILE_NAME)
        for child in folder.glob("checkpoint-*")
        if child.name.removeprefix("checkpoint-").isdigit() and not child.is_symlink() and (child / FILE_NAME).is_file()
    ]
    return max(numbered)[1] if numbered else None
