"""Many healthy runs of plants over a few processes, each in a folder of its own."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from kalmanguard.errors import ConfigurationError, JournalError

_T = TypeVar("_T")
_R = TypeVar("_R")
#: Fixed, since what is measured from timings would make the same run another one elsewhere.
_PROBE_EXAMPLES, _SNAPSHOT_EVERY = 128, 100


@dataclass(frozen=True, slots=True)
class Sortie:
    """One run to train: a plant with its options, a seed, a length, and where it goes."""

    plant: str
    options: tuple[tuple[str, Any], ...]
    seed: int
    steps: int
    probe_every: int
    folder: Path


def plan(plants: str, *, seeds: range, steps: int, probe_every: int, folder: Path) -> list[Sortie]:
    """Read ``PLANT[:NAME=VALUE]...,PLANT...`` and plan a run for every seed; ``steps=N`` overrides the length.

    Raises
    ------
    ConfigurationError
        The text does not follow the notation, or names no plant.
    """
    found = []
    for text in plants.split(","):
        name, *pairs = text.strip().split(":")
        options: dict[str, Any] = {}
        for pair in pairs:
            key, equals, value = pair.partition("=")
            if not key or not equals or not value:
                raise ConfigurationError(f"{pair!r} in {text!r} is not of the form NAME=VALUE.")
            options[key] = _value(value)
        length = options.pop("steps", steps)
        if not name or not isinstance(length, int) or length < 1:
            raise ConfigurationError(f"{text!r} is not of the form PLANT[:NAME=VALUE]... with a whole number of steps.")
        slug = "-".join([name, *(f"{key}={value}" for key, value in sorted(options.items())), str(length)])
        found += [
            Sortie(name, tuple(sorted(options.items())), seed, length, probe_every, folder / f"{slug}-{seed}")
            for seed in seeds
        ]
    return found


def parse_seeds(text: str) -> range:
    """Read ``"0:20"`` (0 to 19) or a number of seeds.

    >>> parse_seeds("5:8"), parse_seeds("3")
    (range(5, 8), range(0, 3))
    """
    try:
        first, _, last = text.rpartition(":")
        seeds = range(int(first or 0), int(last))
    except ValueError:
        seeds = range(0)
    if not seeds or seeds[0] < 0:
        raise ConfigurationError(f"seeds = {text!r} is neither FIRST:END nor a number of seeds.")
    return seeds


def fly(sortie: Sortie) -> Path:
    """Train one run in observe mode; a complete one that lies there already is kept."""
    import torch

    from kalmanguard.cli.folders import write_json
    from kalmanguard.cli.plants import make_plant
    from kalmanguard.cli.training import Lane
    from kalmanguard.journal.reader import JournalReader
    from kalmanguard.settings import Settings

    torch.set_num_threads(1)
    options = {"seed": sortie.seed, "steps": sortie.steps, **dict(sortie.options)}
    facts = {"plant": sortie.plant, "options": options, "faults": [], "probe_every": sortie.probe_every}
    note = sortie.folder / "run.json"
    if note.exists():
        try:
            with JournalReader(sortie.folder) as reader:
                if reader.complete and json.loads(note.read_text(encoding="utf-8")) == facts:
                    return sortie.folder
        except (JournalError, ValueError):
            pass
        raise ConfigurationError(f"{sortie.folder} holds another run, or an incomplete one: choose another folder.")
    settings = Settings(
        mode="observe",
        probe_examples=_PROBE_EXAMPLES,
        probe_every=sortie.probe_every,
        snapshot_every=_SNAPSHOT_EVERY,
    )
    plant = make_plant(sortie.plant, options)
    with Lane(sortie.plant, plant, seed=sortie.seed, settings=settings, run_dir=sortie.folder) as lane:
        for _ in range(sortie.steps):
            lane.advance()
    write_json(note, facts)
    return sortie.folder


@contextmanager
def pool(processes: int) -> Iterator[Callable[[Callable[[_T], _R], Sequence[_T]], Iterable[_R]]]:
    """A map over processes that yields results in the order of the jobs; with one process, over none at all."""
    if processes == 1:
        yield map
        return
    with multiprocessing.get_context("spawn").Pool(processes) as workers:
        yield workers.imap


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
