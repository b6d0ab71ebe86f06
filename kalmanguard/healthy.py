"""Run folders of healthy runs as material for a calibration: their scores, and how other settings would judge them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kalmanguard.calibration.corpus import Corpus, RunScores
from kalmanguard.errors import ConfigurationError, JournalError
from kalmanguard.estimators.bank import CHANNELS
from kalmanguard.journal.reader import JournalReader
from kalmanguard.records import Action, Decision, FloatArray, Level, Measurement, Mode
from kalmanguard.replay import replay
from kalmanguard.settings import Settings

#: Channels whose tail test looks at the magnitude (`kalmanguard.control.watch`).
TWO_SIDED = ("gain", "buffers")


class UnhealthyRun(ConfigurationError):  # noqa: N818 - said of a run, not of the program
    """A run that a calibration must not be fitted on, with the reason.

    ``alarm`` says whether the reason is what the supervisor said or did, which in a run that was healthy all the same
    is a false alarm; else the run is no healthy one, or shows nothing.
    """

    def __init__(self, message: str, *, alarm: bool = False) -> None:
        super().__init__(message)
        self.alarm = alarm


def read_run(path: str | Path, *, unhealthy: bool = False) -> RunScores:
    """Read the scores of one run from its journal, after its chain was checked.

    Scores are those of steps after warm-up; steps that only record a restored state have none.

    Parameters
    ----------
    path
        Run folder, or the journal's file.
    unhealthy
        Take the run also when it is not healthy.

    Raises
    ------
    UnhealthyRun
        The journal shows a veto, a confirmation, a rollback, a halt, a value that is not finite, or was not closed;
        faults were injected; or the run ended in its warm-up.
    JournalError
        There is no journal that can be read, its chain is broken, or it keeps no innovations.
    """
    with JournalReader(path) as reader:
        reader.check_chain()
        names = reader.statistic_names
        missing = [channel for channel in CHANNELS if f"z_{channel}" not in names]
        if missing:
            raise JournalError(f"The journal {reader.path} keeps no innovations of {', '.join(missing)}.")
        columns = [names.index(f"z_{channel}") for channel in CHANNELS]
        warmup = int(reader.header["settings"]["warmup_steps"])
        facts = _facts(Path(path))
        problems = [] if reader.complete else ["its journal was not closed"]
        if facts.get("faults"):
            problems.append("faults were injected")
        rows, steps = [], 0
        for m, decision in reader.steps():
            problem = _problem(m, decision)
            if problem is not None:
                problems.append(f"step {m.step}: {problem}")
            if m.outcome is not None or m.step < 1:
                continue
            steps = max(steps, m.step)
            if m.step > warmup and decision.statistics:
                rows.append([decision.statistics[column] for column in columns])
        if problems and not unhealthy:
            more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
            raise UnhealthyRun(
                f"The run {path} is no healthy one ({problems[0]}{more}): leave it out, or say that it is healthy "
                "nevertheless.",
                alarm=reader.complete and not facts.get("faults"),
            )
        if not rows:
            raise UnhealthyRun(f"The run {path} ended in its warm-up of {warmup} steps: there is nothing to learn.")
        source, seed = _provenance(facts, reader.header)
        version = str(reader.header.get("environment", {}).get("kalmanguard", "unknown"))
        return RunScores(source, seed, steps, settings_digest(reader.header), version, reader.head, _scores(rows))


class Reading(NamedTuple):
    """The corpus, the folder of each of its runs, and a sentence about each run that was left out.

    ``alarmed`` are those of the latter that were left out for what the supervisor said or did: a rate of false alarms
    must be counted with them.
    """

    corpus: Corpus
    paths: tuple[Path, ...]
    refused: tuple[str, ...]
    alarmed: tuple[Path, ...]


def read_runs(paths: Sequence[Path], *, unhealthy: bool = False) -> Reading:
    """Read many runs into a corpus; those that are not healthy, or are there already, are left out.

    Raises
    ------
    ConfigurationError
        No healthy run is left.
    JournalError
        A path holds no journal that can be read.
    """
    runs: dict[str, tuple[RunScores, Path]] = {}
    refused, alarmed = [], []
    for path in paths:
        try:
            run = read_run(path, unhealthy=unhealthy)
        except UnhealthyRun as error:
            refused.append(str(error))
            if error.alarm:
                alarmed.append(path)
            continue
        if run.journal in runs:
            refused.append(f"The run {path} is the same as {runs[run.journal][1]}, and counts once.")
        else:
            runs[run.journal] = run, path
    if not runs:
        raise ConfigurationError(" ".join(["No healthy run is left to calibrate on.", *refused[:3]]))
    return Reading(
        Corpus(CHANNELS, tuple(run for run, _ in runs.values())),
        tuple(path for _, path in runs.values()),
        tuple(refused),
        tuple(alarmed),
    )


@dataclass(frozen=True, slots=True)
class Alarms:
    """What settings would have said of one healthy run: every alarm is a false one.

    ``suspicions`` and ``rollbacks`` are steps (halts count as rollbacks); ``unseen`` are probes that these settings
    would have taken and the run did not, so that what they would have shown is not known.
    """

    steps: int
    suspicions: int
    rollbacks: int
    unseen: int


def false_alarms(path: str | Path, **changes: Any) -> Alarms:
    """Replay a healthy run under its own settings with ``changes``, and count.

    Raises
    ------
    JournalError
        There is no journal that can be read.
    ConfigurationError
        A setting does not exist or is out of range.
    """
    with JournalReader(path) as reader:
        settings = Settings(**{**reader.header["settings"], **changes})
    report = replay(path, settings)
    made = report.replayed
    return Alarms(
        report.decisions,
        made.get(Level.SUSPECT.value, 0) + made.get(Level.CONFIRMED.value, 0),
        made.get(Action.ROLLBACK.value, 0) + made.get(Action.HALT.value, 0),
        report.unseen_probes,
    )


def settings_digest(header: dict[str, Any]) -> str:
    """SHA-256 of the settings in a journal's header."""
    return hashlib.sha256(json.dumps(header["settings"], sort_keys=True).encode()).hexdigest()


def _scores(rows: list[list[float]]) -> FloatArray:
    scores = np.array(rows, dtype=np.float64)
    for channel in TWO_SIDED:
        column = CHANNELS.index(channel)
        scores[:, column] = np.abs(scores[:, column])
    return scores


def _problem(m: Measurement, decision: Decision) -> str | None:
    if m.veto is not None:
        return f"an update was {'clipped' if m.veto == 'clipped' else 'dropped'} ({m.veto})"
    if m.loss is not None and not math.isfinite(m.loss):
        return "the training loss is not finite"
    if not m.parameters_finite or (m.probe is not None and not math.isfinite(m.probe.mean)):
        return "parameters or probe are not finite"
    if decision.mode is Mode.HALTED:
        return "the run was halted"
    if decision.level is Level.CONFIRMED or decision.proposed in (Action.ROLLBACK, Action.HALT):
        return "harm was confirmed"
    return None


def _facts(path: Path) -> dict[str, Any]:
    """What `kalmanguard run` and `kalmanguard calibrate` note about a run; empty for others."""
    folder = path if path.is_dir() else path.parent
    try:
        facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _provenance(facts: dict[str, Any], header: dict[str, Any]) -> tuple[str, int | None]:
    """Name and seed of the run of a plant; else the model's type and size."""
    options = facts.get("options")
    if isinstance(options, dict) and "plant" in facts:
        given = {key: value for key, value in options.items() if value is not None and key not in ("seed", "steps")}
        source = ":".join([str(facts["plant"]), *(f"{key}={value}" for key, value in sorted(given.items()))])
        return source, options.get("seed")
    model = header.get("model", {})
    return f"{model.get('type', 'model')} with {model.get('parameters', 0):,} parameters", None
