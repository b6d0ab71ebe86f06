"""A real training run, broken and rescued: the whole line from the optimizer's step to the certificate, in seconds."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from kalmanguard.cli.checkup.check import Check, Verdict
from kalmanguard.cli.plants import make_plant

if TYPE_CHECKING:
    from kalmanguard.cli.training import Lane

_GROUP = "Self-test"
_PLANT, _STEPS, _FAULT_AT, _SETTLED = "mlp", 120, 61, 20
_FAULT = f"lr_spike:50@{_FAULT_AT}:steps=5"


def self_test() -> Iterator[Check]:
    """Train a small network with a fault, check that it was undone exactly, and measure what supervision costs.

    A failure of whatever kind is a finding, never an exception.

    Notes
    -----
    Three runs of 120 steps: about 3 seconds on an idle core after PyTorch is loaded.
    """
    started = time.perf_counter()
    try:
        with warnings.catch_warnings(), tempfile.TemporaryDirectory() as made:
            warnings.simplefilter("ignore")
            yield from _rescued(Path(made) / "faulted")
            yield _cost(Path(made) / "clean")
    except Exception as error:  # whatever breaks here is what the doctor was called for
        yield Check(
            _GROUP, "training", Verdict.PROBLEM, f"it broke off: {type(error).__name__}: {_first_line(error)}",
            "Repair what is named above first; if nothing is, report this with what kalmanguard doctor --json prints.",
        )  # fmt: skip
    seconds = time.perf_counter() - started
    yield Check(_GROUP, "duration", Verdict.OK, f"{seconds:.1f} s", values={"seconds": seconds})


def _rescued(folder: Path) -> Iterator[Check]:
    from kalmanguard.certificate.verify import verify
    from kalmanguard.cli.training import Lane, read_settings
    from kalmanguard.replay import replay

    plant = make_plant(_PLANT, {"seed": 0, "steps": _STEPS})
    settings = read_settings("balanced", on_halt="return")
    with Lane(_PLANT, plant, faults=[_FAULT], settings=settings, run_dir=folder) as lane:
        for _ in range(_STEPS):
            lane.advance()
        assert lane.supervisor is not None
        rollbacks = int(lane.supervisor.statistics()["rollbacks"])
    report = verify(folder)
    statuses = {claim.name: claim.status for claim in report.claims}
    exact = rollbacks > 0 and statuses["C2"] == "HOLDS"
    text = f"{rollbacks} rollback after a learning rate 50 times too large at step {_FAULT_AT}"
    yield _found("rollback", exact, f"{text}, bit for bit" if exact else f"{text}; C2 {statuses['C2']}",
                 {"rollbacks": rollbacks, "C2": statuses["C2"]})  # fmt: skip
    sound = report.exit_code != 1 and statuses["chain"] == statuses["run"] == "HOLDS"
    held = sum(status == "HOLDS" for status in statuses.values())
    yield _found("certificate", sound, f"{report.records} records verified, {held} claims hold", {"claims": statuses})
    identical = replay(folder).identical
    yield _found("replay", identical, "every decision made again" + (", identical" if identical else ": some differ"),
                 {"identical": identical})  # fmt: skip


def _found(name: str, right: bool, text: str, values: dict[str, object]) -> Check:
    if right:
        return Check(_GROUP, name, Verdict.OK, text, values=values)
    advice = "This build computes something that the tests do not know: report it with kalmanguard doctor --json."
    return Check(_GROUP, name, Verdict.PROBLEM, text, advice, values)


def _cost(folder: Path) -> Check:
    from kalmanguard.cli.training import Lane, read_settings

    def lane(name: str, *, watched: bool) -> Lane:
        plant = make_plant(_PLANT, {"seed": 0, "steps": _STEPS})
        settings = read_settings("balanced") if watched else None
        return Lane(name, plant, settings=settings, run_dir=folder if watched else None)

    with lane("bare", watched=False) as bare, lane("watched", watched=True) as watched:
        for step in range(_STEPS):
            if step == _SETTLED:  # first steps allocate
                bare.seconds = watched.seconds = 0.0
            # In turns, so that whatever else the machine does slows both alike.
            bare.advance()
            watched.advance()
    steps = _STEPS - _SETTLED
    ratio = watched.seconds / bare.seconds
    added_s = (watched.seconds - bare.seconds) / steps
    text = (
        f"a step takes {ratio:.2f} times as long with supervision, {1e3 * added_s:.2f} ms more than the "
        f"{1e3 * bare.seconds / steps:.2f} ms of this very small network; the share falls as steps grow longer"
    )
    return Check(_GROUP, "overhead", Verdict.OK, text, values={"ratio": ratio, "added_s": added_s})


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else "no message"
