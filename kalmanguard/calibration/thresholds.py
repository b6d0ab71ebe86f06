"""A calibration: thresholds by channel and level with what stands behind each, as a JSON file."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self, final

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kalmanguard.calibration.conformal import hierarchical_threshold, pooled_threshold
from kalmanguard.calibration.corpus import Corpus
from kalmanguard.errors import ConfigurationError
from kalmanguard.records import Guarantee

#: Levels that are fitted where the corpus supports them; the last is one step in 6,667, the tail tests' rate.
LEVELS = (0.5, 0.8, 0.9, 0.95, 0.99, 0.995, 0.999, 0.99985)
#: The exact threshold takes the new run for infinite, and covers up to 1 / (K + 1) more than it should; it is fitted
#: where that is at most one part in so many of the share that may exceed.
_MARGIN = 2.0
_PACKAGE, _DEFAULT = "kalmanguard.models", ("calibration", "default.json")
_FROZEN = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Quantile(BaseModel):
    """The threshold of one channel at one level, and how it was found.

    ``effective_size`` is the number of runs for ``hierarchical``; for ``pooled`` it is the number of independent steps
    that the pooled ones are worth.
    """

    model_config = _FROZEN

    level: float = Field(gt=0, lt=1)
    threshold: float
    method: Literal["hierarchical", "pooled"]
    guarantee: Guarantee
    effective_size: float = Field(gt=0)


class Source(BaseModel):
    """Runs of one source in the corpus."""

    model_config = _FROZEN

    source: str
    runs: int = Field(ge=1)
    steps: int = Field(ge=0, description="steps with scores, all its runs together")
    seeds: tuple[int, ...]


@final
class Calibration(BaseModel):
    """Thresholds per channel and level, frozen; made by `fit`, read by `load`.

    Attributes
    ----------
    channels
        For each channel its thresholds, levels and thresholds rising.
    refused
        For each channel a sentence about each level that the corpus does not support.
    sources, runs, steps
        What was fitted on.
    corpus
        Digest of the scores.
    settings, version
        Digests of the settings that the runs were supervised with, and the package versions that recorded them.
    command
        What made it, where a command did.

    Examples
    --------
    >>> import numpy as np
    >>> from kalmanguard.calibration.corpus import RunScores
    >>> rng = np.random.default_rng(0)
    >>> runs = [RunScores("mlp", seed, 500, "", "0.1.0", "", rng.normal(size=(500, 1))) for seed in range(30)]
    >>> calibration = fit(Corpus(("loss",), tuple(runs)))
    >>> 1.2 < calibration.threshold("loss", 0.9) < 1.5
    True
    >>> [(q.level, q.method) for q in calibration.channels["loss"]][2:4]
    [(0.9, 'hierarchical'), (0.95, 'pooled')]
    """

    model_config = _FROZEN

    format: Literal[1] = 1
    channels: dict[str, tuple[Quantile, ...]]
    refused: dict[str, tuple[str, ...]] = {}
    sources: tuple[Source, ...]
    runs: int = Field(ge=1)
    steps: int = Field(ge=1)
    corpus: str
    settings: tuple[str, ...]
    version: tuple[str, ...]
    command: str = ""

    @model_validator(mode="after")
    def _rising(self) -> Self:
        for channel, quantiles in self.channels.items():
            levels, values = [q.level for q in quantiles], [q.threshold for q in quantiles]
            if levels != sorted(set(levels)) or values != sorted(values):
                raise ValueError(f"the levels and thresholds of {channel} do not rise")
        return self

    def quantile(self, channel: str, level: float) -> Quantile:
        """The threshold of the lowest fitted level that is at least ``level``, with what stands behind it.

        Raises
        ------
        ConfigurationError
            There is no such channel, or no such level was fitted.
        """
        if channel not in self.channels:
            known = ", ".join(self.channels) or "none"
            raise ConfigurationError(f"The calibration has no channel {channel!r}; its channels are {known}.")
        for quantile in self.channels[channel]:
            if quantile.level >= level - 1e-12:
                return quantile
        highest = max((q.level for q in self.channels[channel]), default=0.0)
        raise ConfigurationError(
            f"Channel {channel} is calibrated up to level {highest:g}, not {level:g}: calibrate on more runs."
        )

    def threshold(self, channel: str, level: float) -> float:
        """The threshold that scores of ``channel`` stay below at ``level`` or more; see `quantile`."""
        return self.quantile(channel, level).threshold

    def pairs(self) -> dict[str, list[list[float]]]:
        """Levels and thresholds by channel as plain numbers: what `Settings.calibration` and the journal hold."""
        return {channel: [[q.level, q.threshold] for q in quantiles] for channel, quantiles in self.channels.items()}

    def save(self, path: str | Path) -> None:
        """Write it as JSON, in one piece; equal calibrations are equal files."""
        path = Path(path)
        draft = path.with_name(path.name + ".part")
        draft.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")
        os.replace(draft, path)


def fit(corpus: Corpus, *, levels: Sequence[float] = LEVELS, command: str = "") -> Calibration:
    """Fit thresholds of all channels: hierarchical where there are runs enough, else of pooled steps.

    Enough are K runs with ``(K + 1) (1 - level) >= 2``; with fewer, `hierarchical_threshold` is close to the largest
    score that was ever seen. Levels that not even pooled steps support are left out, with a sentence in
    `Calibration.refused`. No threshold is below that of the level before.

    Parameters
    ----------
    corpus
        Healthy runs.
    levels
        Coverages that are wanted, each in (0, 1).
    command
        What is being run, for the record.

    Raises
    ------
    ConfigurationError
        A level is outside (0, 1), or there is no channel with scores.
    """
    channels: dict[str, tuple[Quantile, ...]] = {}
    refused: dict[str, tuple[str, ...]] = {}
    for name in corpus.channels:
        runs = corpus.channel(name)
        if not runs:
            refused[name] = ("no run of the corpus has such scores",)
            continue
        found: list[Quantile] = []
        missing: list[str] = []
        for level in sorted(set(levels)):
            exact = (len(runs) + 1) * (1.0 - level) >= _MARGIN
            try:
                if exact:
                    threshold, size = hierarchical_threshold(runs, level), float(len(runs))
                else:
                    threshold, size = pooled_threshold(runs, level)
            except ConfigurationError as error:
                if not 0.0 < level < 1.0:
                    raise
                missing.append(f"level {level:g}: {error}")
                continue
            if not math.isfinite(threshold):
                missing.append(f"level {level:g}: more scores are infinite than may exceed the threshold")
                continue
            found.append(
                Quantile(
                    level=level,
                    threshold=max([threshold, *(q.threshold for q in found)]),
                    method="hierarchical" if exact else "pooled",
                    guarantee=Guarantee.EXACT if exact else Guarantee.ASYMPTOTIC,
                    effective_size=round(size, 1),
                )
            )
        if found:
            channels[name] = tuple(found)
        if missing:
            refused[name] = tuple(missing)
    if not channels:
        raise ConfigurationError(
            "No channel of the corpus has scores that support any level: "
            + "; ".join(f"{name}: {texts[0]}" for name, texts in refused.items())
        )
    return Calibration(
        channels=channels,
        refused=refused,
        sources=_sources(corpus),
        runs=len(corpus.runs),
        steps=corpus.steps,
        corpus=corpus.digest,
        settings=tuple(sorted({run.settings for run in corpus.runs})),
        version=tuple(sorted({run.version for run in corpus.runs})),
        command=command,
    )


def load(path: str | Path = "default") -> Calibration:
    """Read a calibration: a JSON file, or ``"default"``, the one that is shipped with the reference plants.

    Raises
    ------
    ConfigurationError
        The file cannot be read or is no calibration; for ``"default"``, the reference plants are not installed.

    Examples
    --------
    >>> load("default").threshold("gradient", 0.9) > 1.0
    True
    """
    if path == "default":
        text = _default()
    else:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no text"
            raise ConfigurationError(f"The calibration {path} cannot be read: {reason}.") from None
    try:
        return Calibration.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigurationError(
            f"{path} is no calibration of this version: {where + ': ' if where else ''}{first['msg']}."
        ) from None


def thresholds(calibration: Calibration, rate: float) -> dict[str, float]:
    """Initial thresholds of the tail tests, so that each fires at about ``rate`` a step on runs like the calibrated.

    Parameters
    ----------
    calibration
        As loaded.
    rate
        Firings per step that are aimed at, in (0, 1).

    Returns
    -------
    dict
        By channel; a channel that is not calibrated to ``1 - rate`` is missing, and keeps its common threshold.

    Notes
    -----
    Guarantee: that of the level (`Calibration.quantile`), for a step drawn at random. The tail tests raise their
    thresholds further when they fire, and never go below these.

    Examples
    --------
    >>> sorted(thresholds(load("default"), 0.1))
    ['buffers', 'gain', 'gradient', 'loss', 'trajectory']
    """
    if not 0.0 < rate < 1.0:
        raise ConfigurationError(f"rate = {rate} is outside (0, 1).")
    found = {}
    for channel, quantiles in calibration.channels.items():
        if quantiles[-1].level >= 1.0 - rate - 1e-12:
            found[channel] = calibration.threshold(channel, 1.0 - rate)
    return found


def _default() -> str:
    # Found by name and never imported: the package of the plants needs torch, this does not.
    spec = importlib.util.find_spec(_PACKAGE)
    reader = getattr(getattr(spec, "loader", None), "get_resource_reader", lambda _: None)(_PACKAGE)
    try:
        if reader is None:
            raise FileNotFoundError
        text: str = reader.files().joinpath(*_DEFAULT).read_text(encoding="utf-8")
    except OSError:
        raise ConfigurationError(
            f"The default calibration is shipped with the reference plants, and {_PACKAGE} is not installed with it: "
            "install the whole package, or pass the path of a calibration of your own."
        ) from None
    return text


def _sources(corpus: Corpus) -> tuple[Source, ...]:
    names = dict.fromkeys(run.source for run in corpus.runs)
    found = []
    for name in names:
        runs = [run for run in corpus.runs if run.source == name]
        seeds = tuple(sorted(run.seed for run in runs if run.seed is not None))
        found.append(Source(source=name, runs=len(runs), steps=sum(len(run.scores) for run in runs), seeds=seeds))
    return tuple(found)
