"""A corpus of healthy runs: what each channel's tail test saw at every step, run by run, with where it comes from."""

from __future__ import annotations

import hashlib
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np

from kalmanguard.errors import ConfigurationError
from kalmanguard.records import FloatArray

_FORMAT = 1


@final
@dataclass(frozen=True, slots=True, eq=False)
class RunScores:
    """The scores of one run, and its provenance.

    Attributes
    ----------
    source
        What was trained, such as ``"mlp:batch_size=8"``; runs of one source are repetitions of one another.
    seed
        Seed of the run; ``None`` when it is not known.
    steps
        Steps of the run, warm-up included.
    settings
        Digest of the settings that it was supervised with.
    version
        Version of the package that recorded it.
    journal
        Head of its journal. Timings are in the journal, so two equal runs have different heads.
    scores
        What each tail test compares with its threshold, shape ``(n, channels)``: the normalised innovation, its
        magnitude where the test is two-sided; nan where a channel saw nothing.
    """

    source: str
    seed: int | None
    steps: int
    settings: str
    version: str
    journal: str
    scores: FloatArray

    @property
    def digest(self) -> str:
        """SHA-256 of the scores and of all that a repetition of the run shares with it; not of the journal's head."""
        facts = json.dumps([self.source, self.seed, self.steps, self.settings, self.version, self.scores.shape])
        return hashlib.sha256(facts.encode() + np.ascontiguousarray(self.scores, dtype="<f8").tobytes()).hexdigest()


@final
@dataclass(frozen=True, slots=True, eq=False)
class Corpus:
    """Healthy runs whose scores thresholds are taken from.

    Parameters
    ----------
    channels
        Names of the columns of `RunScores.scores`.
    runs
        At least one run.

    Raises
    ------
    ConfigurationError
        There are no runs, or one whose scores have another number of columns.

    Examples
    --------
    >>> run = RunScores("mlp", 0, 40, "", "0.1.0", "", np.arange(10.0)[:, None])
    >>> corpus = Corpus(("loss",), (run, run))
    >>> corpus.steps, [len(scores) for scores in corpus.channel("loss")]
    (20, [10, 10])
    """

    channels: tuple[str, ...]
    runs: tuple[RunScores, ...]

    def __post_init__(self) -> None:
        if not self.runs:
            raise ConfigurationError("A corpus needs at least one healthy run.")
        for run in self.runs:
            if run.scores.ndim != 2 or run.scores.shape[1] != len(self.channels):
                raise ConfigurationError(
                    f"The scores of a run of {run.source} have shape {run.scores.shape}: one column for each of the "
                    f"{len(self.channels)} channels is needed."
                )

    @property
    def steps(self) -> int:
        """Steps with scores, all runs together."""
        return sum(len(run.scores) for run in self.runs)

    @property
    def digest(self) -> str:
        """SHA-256 over channels and runs, in their order; equal for repetitions with equal scores."""
        parts = [json.dumps(self.channels), *(run.digest for run in self.runs)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def channel(self, name: str) -> list[FloatArray]:
        """The scores of one channel, run by run, without nan; runs in which the channel saw nothing are left out."""
        if name not in self.channels:
            raise ConfigurationError(f"There is no channel {name!r}; choose one of {', '.join(self.channels)}.")
        columns = (run.scores[:, self.channels.index(name)] for run in self.runs)
        known = (column[~np.isnan(column)] for column in columns)
        return [scores for scores in known if scores.size]

    def save(self, path: str | Path) -> None:
        """Write the corpus as an npz file, in one piece and without pickle."""
        facts = [
            {name: getattr(run, name) for name in ("source", "seed", "steps", "settings", "version", "journal")}
            for run in self.runs
        ]
        head = json.dumps({"format": _FORMAT, "channels": self.channels, "runs": facts, "digest": self.digest})
        arrays = {f"scores_{index}": run.scores for index, run in enumerate(self.runs)}
        file = io.BytesIO()
        np.savez_compressed(file, head=np.frombuffer(head.encode(), dtype=np.uint8), **arrays)  # type: ignore[arg-type]
        path = Path(path)
        draft = path.with_name(path.name + ".part")
        draft.write_bytes(file.getvalue())
        os.replace(draft, path)

    @classmethod
    def load(cls, path: str | Path) -> Corpus:
        """Read what `save` wrote; a file that was changed since is refused.

        Raises
        ------
        ConfigurationError
            The file cannot be read, is no corpus of this version, or does not match its own digest.
        """
        try:
            with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
                head: dict[str, Any] = json.loads(bytes(file["head"]).decode())
                if head["format"] != _FORMAT:
                    raise ValueError(f"it has format {head['format']}, this version reads {_FORMAT}")
                runs = tuple(
                    RunScores(**facts, scores=np.asarray(file[f"scores_{index}"], dtype=np.float64))
                    for index, facts in enumerate(head["runs"])
                )
            corpus = cls(tuple(head["channels"]), runs)
        except OSError as error:
            raise ConfigurationError(f"The corpus {path} cannot be read: {error.strerror or error}.") from None
        except Exception as error:  # whatever a damaged archive makes zipfile, zlib, numpy or json raise
            raise ConfigurationError(f"{path} is no corpus of this version: {error}.") from None
        if corpus.digest != head["digest"]:
            raise ConfigurationError(f"The corpus {path} does not match its digest: it was changed or damaged.")
        return corpus
