"""The exceptions that kalmanguard raises: one small tree, every message a sentence with the way out."""

from __future__ import annotations


class KalmanguardError(Exception):
    """Base class: ``except KalmanguardError`` catches everything that this package raises on purpose."""


class ConfigurationError(KalmanguardError, ValueError):
    """An argument or a setting cannot work; raised at construction, never in mid-run."""


class BindError(ConfigurationError):
    """No optimizer that trains the supervised model could be found."""


class JournalError(KalmanguardError):
    """A journal is missing, foreign, corrupted, of a newer version, or already holds a run."""


class TrajectoryError(KalmanguardError):
    """A recorded run cannot be read: it is missing, foreign, damaged, ambiguous, or not safe to open."""


class SnapshotError(KalmanguardError):
    """A state could not be captured, stored or restored exactly."""


class RankError(KalmanguardError):
    """A rank of a distributed run has died, hangs, or is not where the others are; no rank can go on."""


class RestoreFailed(SnapshotError):  # noqa: N818 - said of a state, not of the program
    """The state that was decided on could not be restored; the next older one is tried at the next step."""


class Intervention(KalmanguardError):  # noqa: N818 - a control-flow signal that the user asked for, not an error
    """Base of what `Settings.raise_on` turns into exceptions; ``decision`` holds the decision behind it."""

    def __init__(self, message: str, decision: object = None) -> None:
        super().__init__(message)
        self.decision = decision


class VetoIntervention(Intervention):
    """A proposed optimizer step was dropped."""


class RollbackIntervention(Intervention):
    """The training state was restored to an earlier certified one."""


class PauseIntervention(Intervention):
    """Supervision was paused."""


class TrainingHalted(Intervention):
    """The recovery ladder is exhausted; the best certified state has been restored."""
