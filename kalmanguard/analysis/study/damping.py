"""The sweep: which cases there are, and how they are run over a few processes and kept."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from kalmanguard.analysis.study.cases import MOMENTA, NOISES, SPECTRA, Case, EstimatorCase, Result, SpacingCase
from kalmanguard.analysis.study.cases import linear_cases as _linear
from kalmanguard.analysis.study.plants import EDGES, RECIPES, EdgeCase, PlantCase
from kalmanguard.errors import ConfigurationError

#: Seeds on which thresholds are chosen, and the first of those on which they are reported.
DESIGN, REPORTED = range(5), 100
#: File of results, one JSON line each.
FILE_NAME = "cases.jsonl"
_FACTORS = (1.0, 2.0, 5.0, 20.0, 50.0)


def cases(*, seeds: int, quick: bool = False) -> list[Case]:
    """All cases of the study, ``seeds`` reported ones of each; ``quick`` is a small part that touches every kind.

    Raises
    ------
    ConfigurationError
        There is no seed to report.
    """
    if seeds < 1:
        raise ConfigurationError(f"seeds = {seeds}: at least one is needed.")
    reported = range(REPORTED, REPORTED + seeds)
    if quick:
        both = (0, REPORTED)
        return [
            *_linear(seeds=both, momenta=(0.0, 0.9), spectra=tuple(SPECTRA)[:2], noises=("gradient noise",), steps=640),
            *_spacings(2),
            *_oscillators((0.2,), (256,), seeds=5),
            *_raised("mlp, SGD", both),
            EdgeCase(recipe="gradient descent at 0.2", seed=REPORTED, steps=320),
        ]
    everything: list[Case] = _linear(
        seeds=(*DESIGN, *reported), momenta=MOMENTA, spectra=tuple(SPECTRA), noises=tuple(NOISES), steps=2_048
    )
    everything += _spacings(40)
    everything += _oscillators((0.05, 0.2, 0.5), (256, 1_024), seeds=40)
    everything += [EdgeCase(recipe=recipe, seed=seed, steps=640) for recipe in EDGES for seed in reported[:3]]
    for recipe in RECIPES:
        # The transformer takes as long as all others together.
        slow = recipe.startswith("chartransformer")
        everything += _raised(recipe, (*DESIGN[:2], *reported[:3]) if slow else (*DESIGN, *reported))
    return everything


def sweep(
    wanted: Sequence[Case], *, folder: Path, processes: int, progress: Callable[[int, int], None]
) -> dict[Case, Result]:
    """Run what has no result yet, and return all results.

    Parameters
    ----------
    wanted
        The cases; equal ones run once.
    folder
        Where results are kept, each written as soon as it is there: an interrupted sweep goes on where it stopped.
        Results of other sources than the present ones are not used.
    processes
        Number of processes, each with one thread.
    progress
        Called with the number of cases that are done, and of all.

    Raises
    ------
    ConfigurationError
        Fewer than one process.
    """
    if processes < 1:
        raise ConfigurationError(f"processes = {processes}: at least one is needed.")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / FILE_NAME
    sources = {kind: _sources(kind) for kind in {type(case) for case in wanted}}
    by_name = {repr(case): case for case in wanted}
    found = {
        by_name[name]: result
        for name, made_with, result in _kept(file)
        if name in by_name and made_with == sources[type(by_name[name])]
    }
    todo = [case for case in by_name.values() if case not in found]
    progress(len(found), len(by_name))
    if todo:
        with _one_thread(), multiprocessing.get_context("spawn").Pool(processes) as pool, file.open("a") as kept:
            for case, result in pool.imap_unordered(_run, todo):
                found[case] = result
                kept.write(json.dumps([repr(case), sources[type(case)], result]) + "\n")
                kept.flush()
                progress(len(found), len(by_name))
    return found


def _spacings(seeds: int) -> list[Case]:
    return [
        SpacingCase(momentum=momentum, share=share, spacing=spacing, seeds=seeds)
        for momentum, share in ((0.0, 0.98), (0.9, 0.98), (0.0, 1.02))
        for spacing in range(1, 7)
    ]


def _oscillators(zetas: Sequence[float], lengths: Sequence[int], *, seeds: int) -> list[Case]:
    return [
        EstimatorCase(zeta=zeta, frequency=0.5, steps=steps, snr=snr, seeds=seeds)
        for zeta in zetas
        for steps in lengths
        for snr in (float("inf"), 100.0, 10.0, 3.0, 1.0)
    ]


def _raised(recipe: str, seeds: Sequence[int]) -> list[Case]:
    return [
        PlantCase(recipe=recipe, factor=factor, creeps=creeps, seed=seed, steps=640 if creeps or factor == 1.0 else 480)
        for factor, creeps in [*((factor, False) for factor in _FACTORS), (_FACTORS[-1], True)]
        for seed in seeds
    ]


def _run(case: Case) -> tuple[Case, Result]:
    return case, case.run()


def _kept(file: Path) -> Iterator[tuple[str, str, Result]]:
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            name, made_with, result = json.loads(line)
        except ValueError:
            continue  # the last line of a sweep that was killed while writing
        yield name, made_with, result


def _sources(kind: type) -> str:
    """Digest of the sources that results of this kind of case depend on."""
    here = Path(__file__).parent
    package = here.parent.parent
    used = [
        *(here / f"{name}.py" for name in ("cases", "detectors", "estimators", "linear")),
        here / f"{kind.__module__.rpartition('.')[2]}.py",
        *(package / "detectors" / f"{name}.py" for name in ("damping", "oscillation")),
        *(package / "estimators" / f"{name}.py" for name in ("autocovariance", "noise")),
    ]
    return hashlib.sha256(b"".join(path.read_bytes() for path in used)).hexdigest()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Have processes that are started inside use one thread each."""
    name, before = "OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS")
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
