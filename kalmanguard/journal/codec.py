"""A step as bytes and back, bit for bit: fixed head, float64 arrays, a JSON tail for what is rare.

Layout of version 1, little-endian throughout. ``body`` is

1. the head, 121 bytes, `HEAD`: version; codes of veto, action, proposed, level, mode, certificate; number of learning
   rates; flags; numbers of velocity, losses, float64 values in 2, bytes in 3 and 4; objective; rung; step, step of the
   decision, restored step, step to restore; loss, factor, gradient norm, rounding floor, buffer norm, gate;
2. float64: learning rates, then ``step_s, probe_s, snapshot_s`` when there are costs, then ``statistic, p, e`` for each
   piece of evidence and each finding;
3. the reason, UTF-8;
4. the tail, an ASCII JSON object, empty in an uneventful step: ``evidence`` (lists of detector, fired, guarantee,
   message, has p, has e), ``tampered``, ``veto``, ``certificate``, ``outcome``, ``slots``, ``certify``, ``evict``,
   ``adopt``, ``lasting``, ``findings`` (as ``evidence``).

``blob`` is float64: velocity, probe losses, and the decision's statistics in what is left.
"""

from __future__ import annotations

import json
import struct
import sys
from typing import Any

import numpy as np

from kalmanguard.errors import JournalError
from kalmanguard.records import (
    Action,
    Costs,
    Decision,
    Evidence,
    FloatArray,
    Guarantee,
    Level,
    Measurement,
    Mode,
    Orders,
    Outcome,
    ProbeReading,
)

VERSION = 1
HEAD = struct.Struct("<7BH8I4q6d")

LOSS, GRADIENT_NORM, VELOCITY, BUFFER_NORM, PARAMETERS_FINITE, SNAPSHOT_FAILED, PROBE = (1 << i for i in range(7))
COSTS, OUTCOME, RESTORED, RESTORE, SNAPSHOT, CERTIFIED, CLIP, RELEASE, BRACED = (1 << i for i in range(7, 16))

ACTIONS = (Action.ACCEPT, Action.VETO, Action.ROLLBACK, Action.HALT)
LEVELS = (Level.WARMUP, Level.NOMINAL, Level.SUSPECT, Level.CONFIRMED)
MODES = (Mode.WATCHING, Mode.RECOVERING, Mode.HALTED)
VETOES = (None, "nonfinite", "explosion", "clipped")
CERTIFICATES = ("HOLDS", "LAPSED", "VACUOUS", "FAILED", "INCOMPLETE", "NOT CLAIMED")
OTHER = 255  # the string itself stands in the tail

_ACTION = {value: code for code, value in enumerate(ACTIONS)}
_LEVEL = {value: code for code, value in enumerate(LEVELS)}
_MODE = {value: code for code, value in enumerate(MODES)}
_VETO = {value: code for code, value in enumerate(VETOES)}
_CERTIFICATE = {value: code for code, value in enumerate(CERTIFICATES)}
_FLOAT = np.dtype("<f8")
_NATIVE = sys.byteorder == "little"
_pack_head = HEAD.pack


def pack(measurement: Measurement, decision: Decision, statistics: bytes | None = None) -> tuple[bytes, bytes]:
    """Encode one step, with ``decision.statistics`` or, if given, ``statistics`` (float64, little-endian) instead.

    Returns
    -------
    body, blob
        As the module says.

    Raises
    ------
    JournalError
        When a value has the wrong type or does not fit its field.

    Notes
    -----
    About 2 us for a step without a probe and without evidence.
    """
    try:
        return _pack(measurement, decision, statistics)
    except (struct.error, TypeError, ValueError, AttributeError, KeyError, OverflowError) as error:
        raise JournalError(f"Step {measurement.step} cannot be written to the journal: {error}.") from error


def _pack(m: Measurement, d: Decision, statistics: bytes | None) -> tuple[bytes, bytes]:
    flags = 0
    if (loss := m.loss) is None:
        loss = 0.0
    else:
        flags |= LOSS
    if (gradient_norm := m.gradient_norm) is None:
        gradient_norm = 0.0
    else:
        flags |= GRADIENT_NORM
    if (buffer_norm := m.buffer_norm) is None:
        buffer_norm = 0.0
    else:
        flags |= BUFFER_NORM
    blob = b""
    n_velocity = n_losses = 0
    if (velocity := m.velocity) is not None:
        flags |= VELOCITY
        n_velocity = velocity.size
        blob = _bytes(velocity)
    if (probe := m.probe) is not None:
        flags |= PROBE
        n_losses = probe.losses.size
        blob += _bytes(probe.losses)
    if statistics is not None:
        blob += statistics
    elif numbers := d.statistics:
        blob += struct.pack(f"<{len(numbers)}d", *numbers)
    if m.parameters_finite:
        flags |= PARAMETERS_FINITE
    if m.snapshot_failed:
        flags |= SNAPSHOT_FAILED
    if m.braced:
        flags |= BRACED
    if (restored := d.restored_step) is None:
        restored = 0
    else:
        flags |= RESTORED
    veto = _VETO.get(m.veto, OTHER)
    certificate = _CERTIFICATE.get(d.certificate, OTHER)
    values: tuple[float, ...] = m.learning_rates
    n_rates = len(values)
    tail: dict[str, Any] | None = None
    restore = 0
    orders = d.orders
    if orders.snapshot or orders.certified or orders.clip or orders.release:
        flags |= SNAPSHOT * bool(orders.snapshot) | CERTIFIED * bool(orders.certified)
        flags |= CLIP * bool(orders.clip) | RELEASE * bool(orders.release)
    if orders.restore is not None:
        flags |= RESTORE
        restore = orders.restore
    if orders.certify or orders.evict:
        tail = {"certify": orders.certify, "evict": orders.evict}
    if orders.adopt:
        tail = {**(tail or {}), "adopt": True}
    if orders.lasting:
        tail = {**(tail or {}), "lasting": True}
    if d.evidence or m.tampered or m.findings or veto == OTHER or certificate == OTHER or m.outcome or m.costs:
        flags, values, rare = _rare(m, d, flags, veto, certificate)
        tail = rare if tail is None else tail | rare
    text = json.dumps(tail, separators=(",", ":")).encode() if tail else b""
    reason = d.reason.encode("utf-8", "surrogatepass")
    head = _pack_head(
        VERSION, veto, _ACTION[d.action], _ACTION[d.proposed], _LEVEL[d.level], _MODE[d.mode], certificate,
        n_rates, flags, n_velocity, n_losses, len(values), len(reason), len(text), m.objective, orders.rung,
        m.step, d.step, restored, restore,
        loss, m.lr_factor, gradient_norm, m.rounding_floor, buffer_norm, orders.gate,
    )  # fmt: skip
    return b"".join((head, struct.pack(f"<{len(values)}d", *values), reason, text)), blob


def _rare(
    m: Measurement, d: Decision, flags: int, veto: int, certificate: int
) -> tuple[int, tuple[float, ...], dict[str, Any]]:
    """What an uneventful step does not have: flags, float64 values and the JSON tail."""
    values = list(m.learning_rates)
    tail: dict[str, Any] = {}
    if (costs := m.costs) is not None:
        flags |= COSTS
        values += (costs.step_s, costs.probe_s, costs.snapshot_s)
        tail["slots"] = costs.slots
    if (o := m.outcome) is not None:
        flags |= OUTCOME
        tail["outcome"] = [
            o.action.value, o.restored_step, o.rung, o.digest_expected, o.digest_actual, bool(o.manual), o.error,
        ]  # fmt: skip
    if m.tampered:
        tail["tampered"] = m.tampered
    if veto == OTHER:
        tail["veto"] = m.veto
    if certificate == OTHER:
        tail["certificate"] = d.certificate
    for name, items in (("evidence", d.evidence), ("findings", m.findings)):
        if not items:
            continue
        listed = tail[name] = []
        for e in items:
            p, value = e.p_value, e.e_value
            values += (e.statistic, 0.0 if p is None else p, 0.0 if value is None else value)
            listed.append([e.detector, bool(e.fired), e.guarantee.value, e.message, p is not None, value is not None])
    return flags, tuple(values), tail


def _bytes(array: FloatArray) -> bytes:
    if _NATIVE and array.dtype == _FLOAT:
        return array.tobytes()
    return array.astype(_FLOAT).tobytes()


def unpack(body: bytes, blob: bytes) -> tuple[Measurement, Decision]:
    """Decode what `pack` encoded.

    Raises
    ------
    JournalError
        When the bytes are not a step of a version that this package knows.
    """
    try:
        return _unpack(body, blob)
    except (struct.error, TypeError, ValueError, IndexError, KeyError) as error:
        raise JournalError(f"A step of the journal is malformed ({error}).") from error


def unpack_statistics(body: bytes, blob: bytes) -> FloatArray:
    """A step's statistics alone, in the order of the header's ``statistics``; empty when none were written."""
    used = sum(HEAD.unpack_from(body)[9:11])
    return _floats(blob, 8 * used, len(blob) // 8 - used)


def _unpack(body: bytes, blob: bytes) -> tuple[Measurement, Decision]:
    (
        version, veto, action, proposed, level, mode, certificate, n_rates, flags, n_velocity, n_losses, n_values,
        n_reason, n_tail, objective, rung, step, decision_step, restored, restore,
        loss, lr_factor, gradient_norm, rounding_floor, buffer_norm, gate,
    ) = HEAD.unpack_from(body)  # fmt: skip
    if version != VERSION:
        raise ValueError(f"layout version {version}; this kalmanguard knows {VERSION}")
    at = HEAD.size + 8 * n_values
    if len(body) != at + n_reason + n_tail or len(blob) < 8 * (n_velocity + n_losses) or len(blob) % 8:
        raise ValueError(f"body of {len(body)} and blob of {len(blob)} bytes do not match their counts")
    values = struct.unpack_from(f"<{n_values}d", body, HEAD.size)
    reason = body[at : at + n_reason].decode("utf-8", "surrogatepass")
    tail: dict[str, Any] = json.loads(body[at + n_reason :]) if n_tail else {}
    more = list(values[n_rates:])
    costs = Costs(more[0], more[1], more[2], tail["slots"]) if flags & COSTS else None
    numbers = more[3 if flags & COSTS else 0 :]
    listed, found = tail.get("evidence", []), tail.get("findings", [])
    evidence = _evidence(listed, numbers[: 3 * len(listed)])
    findings = _evidence(found, numbers[3 * len(listed) :])
    measurement = Measurement(
        step=step,
        loss=loss if flags & LOSS else None,
        learning_rates=values[:n_rates],
        lr_factor=lr_factor,
        gradient_norm=gradient_norm if flags & GRADIENT_NORM else None,
        velocity=_floats(blob, 0, n_velocity) if flags & VELOCITY else None,
        rounding_floor=rounding_floor,
        buffer_norm=buffer_norm if flags & BUFFER_NORM else None,
        veto=tail["veto"] if veto == OTHER else VETOES[veto],
        parameters_finite=bool(flags & PARAMETERS_FINITE),
        tampered=tuple(tail.get("tampered", ())),
        probe=ProbeReading(_floats(blob, 8 * n_velocity, n_losses)) if flags & PROBE else None,
        outcome=_outcome(*tail["outcome"]) if flags & OUTCOME else None,
        costs=costs,
        objective=objective,
        snapshot_failed=bool(flags & SNAPSHOT_FAILED),
        braced=bool(flags & BRACED),
        findings=findings,
    )
    decision = Decision(
        step=decision_step,
        action=ACTIONS[action],
        proposed=ACTIONS[proposed],
        level=LEVELS[level],
        mode=MODES[mode],
        reason=reason,
        evidence=evidence,
        restored_step=restored if flags & RESTORED else None,
        certificate=tail["certificate"] if certificate == OTHER else CERTIFICATES[certificate],
        orders=Orders(
            snapshot=bool(flags & SNAPSHOT),
            certified=bool(flags & CERTIFIED),
            certify=tuple(tail.get("certify", ())),
            evict=tuple(tail.get("evict", ())),
            restore=restore if flags & RESTORE else None,
            rung=rung,
            gate=gate,
            clip=bool(flags & CLIP),
            release=bool(flags & RELEASE),
            adopt=bool(tail.get("adopt", False)),
            lasting=bool(tail.get("lasting", False)),
        ),
        statistics=tuple(unpack_statistics(body, blob).tolist()),
    )
    return measurement, decision


def _outcome(action: str, *rest: Any) -> Outcome:
    return Outcome(Action(action), *rest)


def _evidence(listed: list[list[Any]], numbers: list[float]) -> tuple[Evidence, ...]:
    return tuple(
        Evidence(detector, statistic, fired, Guarantee(guarantee), message, p if has_p else None, e if has_e else None)
        for (detector, fired, guarantee, message, has_p, has_e), statistic, p, e in zip(
            listed, numbers[0::3], numbers[1::3], numbers[2::3], strict=True
        )
    )


def _floats(blob: bytes, offset: int, count: int) -> FloatArray:
    array = np.frombuffer(blob, _FLOAT, count, offset)
    return array if _NATIVE else array.astype(np.float64)
