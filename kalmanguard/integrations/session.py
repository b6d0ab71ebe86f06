"""One supervised run inside a framework's trainer: begun, judged step by step, resumed, ended or abandoned."""

from __future__ import annotations

import itertools
import json
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from torch import Tensor, nn

from kalmanguard.errors import ConfigurationError, Intervention, KalmanguardError, SnapshotError
from kalmanguard.integrations.decisions import DecisionLog
from kalmanguard.integrations.tracking import Log
from kalmanguard.journal.schema import locate
from kalmanguard.records import Action, Decision, Mode
from kalmanguard.settings import Settings
from kalmanguard.supervisor import Supervisor

if TYPE_CHECKING:
    from kalmanguard.certificate.verify import Report

_LOGGER = logging.getLogger(__name__)


def settings_for_trainers(settings: Settings | str | Path | dict[str, Any], framework: str) -> Settings:
    """Settings where a halt ends training as if it were at its end, unless they say otherwise.

    Raises
    ------
    ConfigurationError
        They ask for replay, which no trainer's loader can do in mid-epoch.
    """
    chosen = Settings.of(settings)
    if chosen.replay:
        raise ConfigurationError(
            f"settings.replay = True: a data loader of {framework} cannot be rewound in mid-epoch; leave replay off."
        )
    if "on_halt" not in chosen.model_fields_set:
        chosen = chosen.model_copy(update={"on_halt": "return"})
    return chosen


@final
class Session:
    """What a framework's callback holds: the supervisor of the present or last run, its decisions, its certificate.

    Parameters
    ----------
    settings
        As of `Supervisor`.
    loss_fn
        For the probe.
    keep
        As of `DecisionLog`.
    logs
        Trackers that every decision is written to (`kalmanguard.integrations.tracking`).

    Notes
    -----
    After an end or a death `judge`, `state` and `end` do nothing, so that a callback need not ask.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        loss_fn: Callable[[Any, Any], Tensor] | None,
        keep: int,
        logs: Sequence[Log] = (),
    ) -> None:
        self._settings, self._loss_fn, self._keep, self._logs = settings, loss_fn, keep, tuple(logs)
        odd = next((log for log in self._logs if isinstance(log, type) or not isinstance(log, Log)), None)
        if odd is not None:
            raise ConfigurationError(f"logs hold a {type(odd).__name__} without add() and close(); see TensorBoardLog.")
        self._log = DecisionLog(keep=keep)
        self._open = False
        self.supervisor: Supervisor | None = None
        self.certificate: Report | None = None

    @property
    def is_open(self) -> bool:
        """Whether a run is being supervised now."""
        return self._open

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """As of `DecisionLog.all`."""
        return self._log.all()

    def begin(
        self, model: nn.Module, batches: Any, *, folder: Path, facts: Mapping[str, Any], **options: Any
    ) -> Supervisor:
        """Begin to supervise a run, in ``folder`` or the first numbered one beside it that holds none.

        Raises
        ------
        ConfigurationError, JournalError, SnapshotError
            As of `Supervisor`.
        """
        self.abandon(None)
        self._log, self.certificate = DecisionLog(keep=self._keep), None
        try:
            self.supervisor = Supervisor(
                model, batches, loss_fn=self._loss_fn, settings=self._settings, run_dir=_unused(folder), **options
            )
        except KalmanguardError:
            raise
        except Exception as error:
            raise ConfigurationError(
                f"The model cannot be evaluated on the probe's examples ({type(error).__name__}: {error}); pass "
                "held-out examples that it can, or loss_fn=..."
            ) from error
        self._open = True
        self.supervisor.note("training", facts)
        return self.supervisor

    def judge(self, loss: Tensor | float | None, *, batch: Any = None) -> Decision | None:
        """Judge the step that was just taken; ``None`` where no run is supervised. A HALT should end training."""
        if self.supervisor is None or not self._open:
            return None
        try:
            decision = self.supervisor.update(loss, batch=batch)
        except Intervention as intervention:
            if isinstance(intervention.decision, Decision):
                self._tell(intervention.decision)
            self.close()
            raise
        known = self._log.last
        self._tell(decision)
        if not self.supervisor.is_first_rank:
            return decision  # rank 0 says it
        if decision.action is not Action.ACCEPT and decision is not known:
            _LOGGER.warning("kalmanguard: %s (%s)", decision.reason.rstrip("."), decision.action.value)
        if decision.action is Action.HALT:
            restored = "no earlier state" if decision.restored_step is None else f"step {decision.restored_step}"
            _LOGGER.warning("kalmanguard: training stops here; the model is that of %s.", restored)
        return decision

    def _tell(self, decision: Decision) -> None:
        self._log.add(decision)
        if self.supervisor is not None and self.supervisor.is_first_rank:
            for log in self._logs:
                log.add(decision)

    def resume(self, state: Callable[[], Mapping[str, Any]]) -> None:
        """Go on with a saved state of supervision; one that cannot be read or does not fit is warned about."""
        if self.supervisor is None or not self._open:
            return
        try:
            self.supervisor.load_state_dict(dict(state()))
        except KalmanguardError as error:
            self.warn(f"{str(error).rstrip('.')}; supervision begins anew", error)
            return
        if self.supervisor.statistics()["mode"] == Mode.HALTED.value:
            # Whoever resumes a halted run wants it to go on.
            self.supervisor.reset()

    def state(self) -> dict[str, Any] | None:
        """The supervisor's state for a checkpoint; ``None`` where no run is supervised, or it cannot be had."""
        if self.supervisor is None or not self._open:
            return None
        try:
            return self.supervisor.state_dict()
        except KalmanguardError as error:
            self.warn(f"the checkpoint goes without the supervisor's state: {error}", error)
            return None

    def resume_text(self, saved: object) -> None:
        """The same from what `text` has written."""
        self.resume(lambda: _read(saved))

    def text(self) -> str | None:
        """As `state`, as one JSON text, which whoever loads a checkpoint need not unpickle."""
        state = self.state()
        return None if state is None else json.dumps(state)

    def end(self) -> None:
        """Issue the certificate and close the run."""
        if self.supervisor is None or not self._open:
            return
        try:
            self.certificate = self.supervisor.certificate()
        except Exception as error:
            self.warn(f"no certificate was issued: {type(error).__name__}: {error}", error)
        self.close()

    def close(self) -> None:
        """Close the run without a certificate."""
        self._open = False
        for log in self._logs:
            log.close()
        if self.supervisor is not None:
            self.supervisor.close()

    def abandon(self, error: BaseException | None) -> None:
        """The run has ended without its end being told, with ``error`` if it is known: its journal says so."""
        if self.supervisor is None or not self._open:
            return
        self._open = False
        error = error or RuntimeError("training has ended without a word")
        self.supervisor.__exit__(type(error), error, error.__traceback__)

    def warn(self, text: str, error: Exception) -> None:
        """Warn, or raise ``error`` where settings are strict."""
        if self._settings.strict:
            raise error
        warnings.warn(f"kalmanguard: {text.rstrip('.')}.", stacklevel=4)


class Supervised:
    """What a callback shows of its session."""

    _session: Session

    @property
    def supervisor(self) -> Supervisor | None:
        """The supervisor of the present or last run; ``None`` before training."""
        return self._session.supervisor

    @property
    def certificate(self) -> Report | None:
        """Issued at the end of training; ``None`` before, or when it could not be."""
        return self._session.certificate

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """What was decided in the present or last run: all that was not nominal, and the latest decisions."""
        return self._session.decisions


def _read(saved: object) -> Mapping[str, Any]:
    try:
        state = json.loads(str(saved))
    except ValueError as error:
        raise SnapshotError(f"The supervisor's state in the checkpoint cannot be read: {error}.") from None
    if not isinstance(state, dict):
        raise SnapshotError(f"The checkpoint holds a {type(state).__name__}, not the state of a supervisor.")
    return state


def _unused(base: Path) -> Path:
    """The folder, or the first of its numbered siblings, that holds no run yet."""
    names = itertools.chain([base.name], (f"{base.name}-{n}" for n in itertools.count(2)))
    return next(folder for name in names if not locate(folder := base.with_name(name)).exists())
