"""What a column means, guessed from its name and confirmed by the user."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import NamedTuple

from kalmanguard.errors import TrajectoryError

#: Names of the channels that the engine reads.
CHANNELS = ("loss", "probe", "learning_rate", "gradient_norm", "buffer_norm")
#: Names by meaning, in groups of equal rank, the best first; compared by `squashed`.
NAMES: Mapping[str, Sequence[frozenset[str]]] = {
    "step": (
        frozenset(("global_step", "trainer_global_step", "train_global_step")),
        frozenset(("step",)),
        frozenset(
            ("iteration", "iter", "it", "num_updates", "update", "updates", "steps", "train_step", "optimizer_step")
        ),
        frozenset(("batch", "tick", "index")),
    ),
    "run": (frozenset(("run", "run_id", "run_name")), frozenset(("experiment", "trial"))),
    "loss": (
        frozenset(("loss",)),
        frozenset(("train_loss", "training_loss", "loss_train", "train_loss_step", "loss_step")),
        frozenset(("train_epoch_loss",)),
        frozenset(("total_loss", "train_total_loss", "lm_loss", "train_lm_loss", "nll", "train_nll", "train_ce_loss")),
        frozenset(("cross_entropy", "train_cross_entropy", "objective", "cost")),
    ),
    "probe": (
        frozenset(("probe",)),
        frozenset(("val_loss", "valid_loss", "validation_loss", "eval_loss", "loss_val", "loss_eval", "loss_valid")),
        frozenset(("held_out_loss", "heldout_loss", "dev_loss", "probe_loss")),
        frozenset(("val_epoch_loss", "validation_epoch_loss", "valid_epoch_loss", "eval_epoch_loss")),
        frozenset(("test_loss", "loss_test", "val_nll", "eval_nll", "valid_nll", "val_total_loss", "valid_total_loss")),
    ),
    "learning_rate": (
        frozenset(("learning_rate",)),
        frozenset(("lr", "train_learning_rate", "train_lr", "optim_lr", "optimizer_lr")),
        frozenset(("epoch_learning_rate", "train_epoch_learning_rate")),
        frozenset(("lr_adamw", "lr_adam", "lr_sgd", "lr_0", "lr_group_0", "optimizer_learning_rate")),
    ),
    "gradient_norm": (
        frozenset(("gradient_norm",)),
        frozenset(("grad_norm", "gradnorm", "gnorm", "train_grad_norm", "train_gradient_norm")),
        frozenset(("total_norm", "global_grad_norm", "grad_2_norm_total", "optim_total_grad_norm", "grad_norm_total")),
    ),
    "buffer_norm": (frozenset(("buffer_norm",)),),
}


class Meaning(NamedTuple):
    """Which column is the step, which names the run, what the others are called, and what was guessed, in sentences.

    ``channels`` maps a column's own name to the channel's; columns of words are left out of it.
    """

    step: str | None
    run: str | None
    channels: Mapping[str, str]
    notes: tuple[str, ...]


def squashed(name: str) -> str:
    """Letters and digits alone, in lower case: separators mean nothing.

    >>> squashed("Train/Grad-Norm"), squashed("trainLoss"), squashed("lr-AdamW")
    ('traingradnorm', 'trainloss', 'lradamw')
    """
    return re.sub(r"[^0-9a-z]+", "", name.lower())


def is_channel(name: str) -> bool:
    """Whether a column of this name would be taken to be the step or a channel of the engine."""
    wanted = squashed(name)
    return any(wanted in map(squashed, group) for channel in ("step", *CHANNELS) for group in NAMES[channel])


def assign(
    names: Iterable[str],
    given: Mapping[str, str] | None = None,
    *,
    words: Iterable[str] = (),
    rare: Container[str] = (),
    partial: bool = False,
) -> Meaning:
    """Say what columns mean.

    Parameters
    ----------
    names
        Columns of numbers.
    given
        Column by channel (``loss``, ``probe``, ``learning_rate``, ``gradient_norm``, ``step``, ``run``, or a name of
        your own), which goes before what would be guessed.
    words
        Columns of words; one may name the run.
    rare
        Columns with hardly any value, which are taken only where no other will do: a summary is no course.
    partial
        Columns are still to come: a given one may be among them.

    Raises
    ------
    TrajectoryError
        A given column does not exist, or two are equally good for a channel.

    Examples
    --------
    >>> meaning = assign(["it", "train/loss", "val/loss", "accuracy"])
    >>> meaning.step, dict(meaning.channels)
    ('it', {'train/loss': 'loss', 'val/loss': 'probe', 'accuracy': 'accuracy'})
    >>> assign(["step", "train/loss", "train_loss"])
    Traceback (most recent call last):
    kalmanguard.errors.TrajectoryError: 'train/loss' and 'train_loss' may both be the loss: say which, as in
    columns={'loss': 'train/loss'}.
    """
    numbers, texts = list(dict.fromkeys(names)), list(dict.fromkeys(words))
    chosen: dict[str, str] = {}
    notes: list[str] = []
    for channel, name in (given or {}).items():
        if name not in numbers and not (channel == "run" and name in texts) and not partial:
            raise TrajectoryError(
                f"There is no column of numbers {name!r} for {channel}; there are {_listed([*numbers, *texts])}."
            )
        chosen[channel] = name
    for channel, groups in NAMES.items():
        if channel in chosen:
            continue
        candidates = [*texts, *numbers] if channel == "run" else numbers
        usual = [name for name in candidates if name not in rare]
        found = _best(usual, groups, taken=chosen.values()) or _best(candidates, groups, taken=chosen.values())
        if found is None:
            continue
        if len(found) > 1:
            raise TrajectoryError(
                f"{found[0]!r} and {found[1]!r} may both be the {channel.replace('_', ' ')}: say which, as in "
                f"columns={{{channel!r}: {found[0]!r}}}."
            )
        chosen[channel] = found[0]
        if found[0] != channel:
            notes.append(f"Column {found[0]!r} is taken to be the {channel.replace('_', ' ')}.")
    for channel in CHANNELS:
        odd = None if channel in chosen else _best(texts, NAMES[channel], taken=())
        if odd is not None:
            raise TrajectoryError(
                f"Column {odd[0]!r} should be the {channel.replace('_', ' ')} and holds words: write numbers with a "
                "point, and nothing or null where there is none; or say which column it is."
            )
    meanings = list(chosen.values())
    twice = next((name for name in meanings if meanings.count(name) > 1), None)
    if twice is not None:
        raise TrajectoryError(f"Column {twice!r} is given twice: one column cannot be two things.")
    step, run = chosen.pop("step", None), chosen.pop("run", None)
    if step is None:
        notes.append("No column counts the steps: rows are taken to be steps from 1.")
    meant = {name: channel for channel, name in chosen.items()}
    channels = {}
    for name in numbers:
        if name not in (step, run):
            # A column that has a channel's name without being it must not hide it.
            channels[name] = meant.get(name, f"{name} (column)" if name in chosen else name)
    return Meaning(step, run, channels, tuple(notes))


def _best(names: Sequence[str], groups: Sequence[frozenset[str]], *, taken: Iterable[str]) -> list[str] | None:
    used = set(taken)
    for group in groups:
        wanted = {squashed(name) for name in group}
        found = [name for name in names if squashed(name) in wanted and name not in used]
        if found:
            return found
    return None


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:20]))
    return f"{shown} and {len(names) - 20} more" if len(names) > 20 else shown or "none"
