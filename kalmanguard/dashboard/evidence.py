"""One event looked at closely: what was measured, what every detector said, what was decided and done."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

from kalmanguard.analysis.advice import ADVICE
from kalmanguard.dashboard.events import of_record, of_step, shown
from kalmanguard.errors import JournalError
from kalmanguard.journal.codec import unpack
from kalmanguard.journal.reader import JournalReader
from kalmanguard.journal.schema import Row
from kalmanguard.records import Decision, Evidence, Measurement

#: Records after a decision in which its outcome is looked for.
_AFTER = 8


def evidence(file: Path, seq: int) -> dict[str, Any] | None:
    """Read one record and what followed from it; ``None`` when there is no such record.

    Raises
    ------
    JournalError
        The journal is gone, or damaged there.
    """
    with JournalReader(file, traceless=True) as reader:
        rows = list(islice(reader.rows(start=seq), _AFTER))
        names = reader.statistic_names
    if not rows or rows[0].seq != seq:
        return None
    row = rows[0]
    found: dict[str, Any] = {"seq": seq, "step": row.step, "kind": row.kind}
    if row.kind != "step":
        event = of_record(row)
        facts = {} if row.kind == "header" else {str(key): shown(str(value)) for key, value in row.data().items()}
        return found | {"text": event.text if event else "", "word": event.word if event else "NOTE", "facts": facts}
    if not isinstance(row.body, bytes) or not isinstance(row.blob, bytes):
        raise JournalError(f"Record {row.seq} of the journal is no step that can be read.")
    m, d = unpack(row.body, row.blob)
    event = of_step(seq, m, d)
    told = [_plain(item) for item in d.evidence]
    return found | {
        "word": event.word if event else d.level.value,
        "text": event.text if event else shown(d.reason),
        "action": d.action.value,
        "proposed": d.proposed.value,
        "level": d.level.value,
        "mode": d.mode.value,
        "evidence": told,
        "findings": [_plain(item) for item in m.findings],
        "advice": [ADVICE[item["detector"]] for item in told if item["fired"] and item["detector"] in ADVICE],
        "measured": _measured(m, d, names),
        "outcome": next((_outcome(later) for later in rows[1:] if later.kind == "outcome"), None)
        if d.orders.restore is not None
        else None,
    }


def _plain(item: Evidence) -> dict[str, Any]:
    return {
        "detector": shown(item.detector),
        "statistic": item.statistic,
        "fired": item.fired,
        "guarantee": item.guarantee.value,
        "message": shown(item.message),
        "p_value": item.p_value,
        "e_value": item.e_value,
    }


def _measured(m: Measurement, d: Decision, names: tuple[str, ...]) -> dict[str, float | None]:
    statistics = dict(zip(names, d.statistics, strict=False))
    values: dict[str, float | None] = {
        "training loss": m.loss,
        "gradient norm": m.gradient_norm,
        "learning rate": max(m.learning_rates) * m.lr_factor if m.learning_rates else None,
        "held-out loss": m.probe.mean if m.probe is not None else None,
    }
    if m.probe is not None:
        values |= {
            "predicted": statistics.get("predicted"),
            "bound": statistics.get("bound"),
            "best so far": statistics.get("y_best"),
        }
    return {name: value for name, value in values.items() if value is not None}


def _outcome(row: Row) -> dict[str, Any]:
    data = row.data()
    expected, actual = data.get("digest_expected"), data.get("digest_actual")
    return {
        "restored_step": data.get("restored_step"),
        "exact": expected is not None and expected == actual,
        "digest": shown(str(actual)) if actual else None,
        "error": shown(str(data["error"])) if data.get("error") else None,
    }
