"""Every knob of the supervisor, validated once, at construction."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kalmanguard.errors import ConfigurationError

#: Everything that can raise a suspicion by statistics, and whether it does so by default: what the ablation in
#: ``docs/benchmarks.md`` shows to add nothing is off. What needs no statistics (finiteness, edits) is always on.
DETECTORS: dict[str, bool] = {
    "loss": True,
    "gradient": True,
    "gain": True,
    "buffers": True,
    "trajectory": True,
    "drift": True,
    "learning-rate": True,
    "onset": False,
    "fusion": False,
    "lyapunov": False,
    "oscillation": False,
    "period-two": False,
    "damping": False,
    "regimes": False,
}

Preset = Literal["conservative", "balanced", "aggressive"]

#: What a preset changes against the field defaults ("balanced").
PRESETS: dict[str, dict[str, object]] = {
    "conservative": {
        "give_back": 0.35,
        "suspicion": 8.0,
        "patience": 5,
        "gate_ratio": 30.0,
        "ladder": "conservative",
    },
    "balanced": {},
    "aggressive": {
        "give_back": 0.12,
        "suspicion": 5.0,
        "patience": 2,
        "gate_ratio": 6.0,
        "budget": 0.02,
        "ladder": "aggressive",
    },
}


class Settings(BaseModel):
    """All settings, frozen; `Settings.preset` and `Settings.load` are the usual ways to make one.

    The certificate's constants (``certificate_*``), the drift test's ``run_length`` and every threshold are written
    to the journal's first record, before any data is seen.

    Examples
    --------
    >>> Settings(mode="observe").mode
    'observe'
    >>> Settings.preset("aggressive", probe_every=7).probe_every
    7
    >>> Settings(give_back=2.0)
    Traceback (most recent call last):
    kalmanguard.errors.ConfigurationError: give_back = 2.0: input should be less than or equal to 1
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False)

    mode: Literal["protect", "observe"] = Field("protect", description="act, or report only")
    replicas: bool = Field(True, description="several processes train one model: they measure and decide together")
    rank_timeout_s: float = Field(
        120.0, gt=0, description="seconds after which a rank that does not answer is given up"
    )
    strict: bool = Field(False, description="raise on a fault inside the guard instead of degrading")
    on_halt: Literal["raise", "return"] = Field("raise", description="what a halt does in protect mode")
    raise_on: frozenset[Literal["veto", "rollback", "pause"]] = Field(
        frozenset(), description="interventions that are raised as exceptions after they were carried out"
    )
    on_decision: Callable[[Any], object] | None = Field(None, exclude=True, description="called with each decision")
    on_rollback: Callable[[Any], object] | None = Field(None, exclude=True, description="called after a rollback")
    on_pause: Callable[[str], object] | None = Field(None, exclude=True, description="called when supervision pauses")

    budget: float = Field(0.01, gt=0, le=0.5, description="share of compute for probes and snapshots together")
    probe_every: int | None = Field(None, ge=1, description="steps between probes; measured when None")
    snapshot_every: int | None = Field(None, ge=1, description="steps between snapshots; measured when None")
    snapshot_bytes: int | None = Field(None, gt=0, description="memory for the ring; a quarter of what is free if None")
    snapshots_on: Literal["host", "device", "disk"] = Field(
        "host", description="where the ring lives; disk needs a run_dir, which is also used when memory is short"
    )
    probe_examples: int = Field(128, ge=2, description="held-out examples that a probe evaluates")
    fresh_examples: int = Field(1024, ge=0, description="further held-out examples kept for the betting certificate")
    fault_rate: float = Field(2e-4, gt=0, lt=1, description="prior faults per step, for the Young-Daly interval")
    replay: bool = Field(False, description="rewind data, schedule and random state too, and run the steps again")

    sketch_size: int = Field(64, ge=8, le=4096, description="rows k of the sketch")
    seed: int = Field(0, ge=0, description="key of the sketch's signs; never touches the training's random state")

    detectors: tuple[str, ...] = Field(
        tuple(name for name, on in DETECTORS.items() if on), description="what may raise a suspicion, by name"
    )
    warmup_steps: int = Field(30, ge=5, description="steps before a finite value can be suspicious")
    suspicion: float = Field(6.5, gt=1, description="normalised innovation that is suspicious")
    calibration: Any = Field(
        None,
        description="thresholds from healthy runs: 'default', the path of a calibration file, or what one holds; "
        "None uses suspicion for every channel",
    )
    run_length: float = Field(20_000.0, gt=1, description="stated mean run length to a false drift alarm, in steps")
    give_back: float = Field(0.2, gt=0, le=1, description="largest fraction of the progress that may be lost")
    floor_frac: float = Field(0.01, gt=0, lt=1, description="envelope floor relative to the best probe's magnitude")
    standard_errors: float = Field(4.0, gt=0, description="envelope floor in standard errors of the probe")
    patience: int = Field(3, ge=1, description="probes for which unexplained harm may heal by itself")
    gate_ratio: float = Field(
        10.0, gt=1, description="gradient norms above this many times the recent maximum are skipped"
    )
    gate_skips: int = Field(3, ge=1, description="steps in a row that are skipped for size before clipping takes over")
    rollback_budget: int = Field(16, ge=1, description="rollbacks without a recovery between them before a halt")
    recovery_steps: int = Field(25, ge=1, description="healthy steps after which a rollback counts as recovered")
    ladder: Preset = Field("balanced", description="built-in recovery ladder, used when recovery is None")
    recovery: Any = Field(None, exclude=True, description="a recovery ladder of your own")

    certificate_alpha: float = Field(0.05, gt=0, lt=1, description="error probability of the betting certificate")
    certificate_delta: float = Field(0.05, gt=0, description="degradation that C3 certifies against, in loss units")
    certificate_clip: float = Field(4.0, gt=0, description="losses' differences are clipped to this for C3")
    checkpoint_share: float = Field(0.01, gt=0, le=0.5, description="share of wall time for durable checkpoints")

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise ConfigurationError(_sentence(error)) from None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _check_calibration(self.calibration)
        if len(set(self.detectors)) < len(self.detectors):
            raise ValueError(f"detectors = {self.detectors!r}: name each of them once")
        if "fusion" in self.detectors and self.calibration is None:
            raise ValueError("the detector fusion bets on calibrated thresholds: set calibration='default', or a path")
        if unknown := [name for name in self.detectors if name not in DETECTORS]:
            raise ValueError(f"detectors = {unknown!r}: choose from {', '.join(DETECTORS)}")
        if self.certificate_delta >= self.certificate_clip:
            raise ValueError(
                f"certificate_delta ({self.certificate_delta}) must be smaller than certificate_clip "
                f"({self.certificate_clip})"
            )
        return self

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Settings:
        """Make the settings of a preset (conservative, balanced, aggressive) with ``changes`` on top."""
        if name not in PRESETS:
            raise ConfigurationError(f"There is no preset {name!r}; choose one of {', '.join(PRESETS)}.")
        return cls(**{**PRESETS[name], **changes})

    @classmethod
    def load(cls, path: str | Path) -> Settings:
        """Read a TOML file; a top-level ``preset`` names what the file's keys are laid over."""
        try:
            with open(path, "rb") as file:
                data = tomllib.load(file)
        except OSError as error:
            raise ConfigurationError(f"The settings file {path} cannot be read: {error.strerror}.") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"The settings file {path} is not valid TOML: {error}.") from None
        return cls.preset(str(data.pop("preset", "balanced")), **data)

    @classmethod
    def of(cls, value: Settings | str | Path | dict[str, Any]) -> Settings:
        """Accept settings, a preset's name, a TOML path or a dict of changes."""
        if isinstance(value, Settings):
            return value
        if isinstance(value, dict):
            return cls.preset(str(value.get("preset", "balanced")), **{k: v for k, v in value.items() if k != "preset"})
        if isinstance(value, str) and value in PRESETS:
            return cls.preset(value)
        if isinstance(value, Path) or (isinstance(value, str) and value.endswith(".toml")):
            return cls.load(value)
        raise ConfigurationError(
            f"settings = {value!r} is neither a Settings, a dict, a TOML path nor one of {', '.join(PRESETS)}."
        )


def _check_calibration(calibration: object) -> None:
    if calibration is None or isinstance(calibration, str):
        return
    if not isinstance(calibration, dict):
        raise ValueError(f"calibration = {calibration!r}: give 'default', a path, or thresholds by channel")
    for channel, pairs in calibration.items():
        if DETECTORS.get(channel) is None:
            raise ValueError(f"calibration: there is no channel {channel!r}")
        try:
            sound = all(0.0 < level < 1.0 and math.isfinite(threshold) for level, threshold in pairs)
        except (TypeError, ValueError):
            sound = False
        if not sound:
            raise ValueError(
                f"calibration of {channel}: {pairs!r} are no pairs of a level in (0, 1) and a finite threshold"
            )


def _sentence(error: ValidationError) -> str:
    parts = []
    for problem in error.errors():
        name = ".".join(map(str, problem["loc"]))
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            parts.append(f"there is no setting {name!r}")
        elif name:
            parts.append(f"{name} = {problem['input']!r}: {message[0].lower()}{message[1:]}")
        else:
            parts.append(message)
    return "; ".join(parts)
