"""The held-out batches of a Trainer, collated as it collates them, without touching its loaders."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from torch.utils.data import DataLoader

from kalmanguard.errors import ConfigurationError, KalmanguardError


def probe_batches(trainer: Any, dataset: Any = None) -> Iterator[Any]:
    """Batches of a held-out data set in its own order; of the Trainer's ``eval_dataset`` where none is given.

    The loader is one of our own: those of a Trainer register themselves with accelerate, may be kept for later
    evaluations, and draw from the run's random streams. Its collator is copied, since one may hold a generator.

    Parameters
    ----------
    trainer
        The Trainer whose collator, column filter and evaluation batch size are used.
    dataset
        A data set as a Trainer takes it, a dict of them (the first is used), or a ``DataLoader``.

    Raises
    ------
    ConfigurationError
        There is no data set, or its examples cannot be collated.
    """
    dataset = trainer.eval_dataset if dataset is None else dataset
    if isinstance(dataset, Mapping):
        dataset = next(iter(dataset.values()), None)
    if dataset is None:
        raise ConfigurationError(
            "There are no held-out examples to probe: pass KalmanGuardCallback(probe_dataset=...), or give the Trainer "
            "an eval_dataset."
        )
    return _read(dataset if isinstance(dataset, DataLoader) else _loader(trainer, dataset))


def _loader(trainer: Any, dataset: Any) -> DataLoader[Any]:
    collator = trainer.data_collator
    with suppress(Exception):  # it may hold what cannot be copied; the original collates just as well
        collator = copy.deepcopy(collator)
    collator = trainer._get_collator_with_removed_columns(collator, description="probe")
    return DataLoader(dataset, batch_size=trainer.args.eval_batch_size, collate_fn=collator)


def _read(loader: DataLoader[Any]) -> Iterator[Any]:
    try:
        yield from loader
    except KalmanguardError:
        raise
    except Exception as error:
        raise ConfigurationError(
            f"The probe's examples cannot be read and collated ({type(error).__name__}: {error}); pass a probe_dataset "
            "of the kind that the Trainer can evaluate."
        ) from error
