"""Checks a run's certificate from its journal alone: ``python verify.py RUN``.

This file needs Python >= 3.11 and numpy and nothing else, shares no code with the rest of the package, and can be
copied away and read on its own. It re-derives from the recorded numbers what the run claims:

======== =====================================================================================================
chain    every record carries the digest that follows from its content and from the record before it
head     the journal contains the head that was published outside the run, if one is given
run      the writer closed the journal; without that the run reads INCOMPLETE
C1       every accepted probe lies inside the envelope, ``y <= y_best + D``
C2       every state that was restored is bit for bit the one that was captured
C3       held-out loss at most reference + delta: betting on fresh examples
C3-reuse how far the fixed probe, used again and again, can be trusted
C4       the drift test was computed as stated, so its mean run length to a false alarm is the stated one
C5       the probe filter's innovations have the variance and the whiteness that it assumes; only reported
C6       recovery ends: rollbacks without a recovery between them stay within their budget
durable  which certified states were recorded after they were forced to the disk: what a kill leaves, if the disk does
======== =====================================================================================================

Each reads HOLDS, NOT CLAIMED (nothing to check, or nothing promised), VACUOUS (true but of no use), LAPSED (held once,
or broken openly), INCOMPLETE or FAILED (the journal contradicts itself). Exit code 0: nothing worse than VACUOUS;
3: something LAPSED or INCOMPLETE; 1: something FAILED; 2: the file cannot be read.

What it needs is described in the package's ``journal/schema.py`` (table and records) and ``journal/codec.py`` (steps).
Of a step's statistics, named in the header, it uses

``y, predicted, scale``
    the probe's mean, what the filter predicted, and the standard deviation of the difference;
``y0, y_best, allowance_se, allowance, bound, accepted``
    the envelope that the probe was judged by, ``allowance = max(give_back (y0 - y_best), standard_errors allowance_se,
    floor_frac |y_best|)`` and ``bound = y_best + allowance``, all known before the probe; nan without a probe;
``drift_x, drift_m, drift_alarm, drift_reset``
    the drift test's bet in [-1, 1] (nan: no bet), its value after it, whether that reached ``run_length``, and whether
    the test was restarted before the bet. Per rate ``M <- (1 + rate x)(M + 1)``; its value is the mean over the rates.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import sqlite3
import struct
import sys
import textwrap
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

HOLDS, LAPSED, VACUOUS = "HOLDS", "LAPSED", "VACUOUS"
FAILED, INCOMPLETE, NOT_CLAIMED = "FAILED", "INCOMPLETE", "NOT CLAIMED"

APPLICATION_ID, SCHEMA_VERSION, LAYOUT_VERSION, FORMAT = 0x4B476A31, 1, 1, 1
NEEDED = frozenset(
    {"y", "predicted", "scale", "y0", "y_best", "allowance_se", "allowance", "bound", "accepted"}
    | {"drift_x", "drift_m", "drift_alarm", "drift_reset"}
)
RATES = (0.05, 0.1, 0.2, 0.4)  # betting rates of the drift test
ACCEPT, VETO, ROLLBACK, HALT = range(4)
NOMINAL = 1  # level
WATCHING = 0  # mode
CERTIFICATES = (HOLDS, LAPSED, VACUOUS, FAILED, INCOMPLETE, NOT_CLAIMED)
DEFAULT_KINDS = 256  # kinds of intervention, where the header does not state their number
SHOWN = 12  # steps listed by number in a claim

NON_CLAIMS = (
    "No claim of convergence, or that the run ends better than it would have without supervision.",
    "Losses are clipped for C3: nothing is said about the tails beyond the clip.",
    "Steps between probes are not covered: the envelope speaks of probed states.",
    "Shift between the probe and the data of deployment is not covered.",
    "Standard errors, predictions and scales are taken as journaled; weights were not seen, so a digest proves only "
    "what whoever computed it knew.",
    "A chain alone shows neither a cut tail nor a rewrite of everything: compare the head with one published outside.",
)


class UnreadableJournalError(Exception):
    """The file is missing, foreign, damaged or of a newer version."""


@dataclass(frozen=True)
class Claim:
    """One claim with its status and the sentence that explains it."""

    name: str
    title: str
    status: str
    text: str
    steps: tuple[int, ...] = ()


@dataclass(frozen=True)
class Report:
    """What was found; ``str(report)`` is the printed form."""

    path: str
    records: int
    steps: int
    head: str
    claims: tuple[Claim, ...]

    @property
    def exit_code(self) -> int:
        """1 if something FAILED, 3 if something LAPSED or is INCOMPLETE, else 0."""
        found = {claim.status for claim in self.claims}
        return 1 if FAILED in found else 3 if found & {LAPSED, INCOMPLETE} else 0

    def __getitem__(self, name: str) -> Claim:
        return next(claim for claim in self.claims if claim.name == name)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {
            "path": self.path,
            "records": self.records,
            "steps": self.steps,
            "head": self.head,
            "exit_code": self.exit_code,
            "claims": [vars(claim) | {"steps": list(claim.steps)} for claim in self.claims],
            "non_claims": list(NON_CLAIMS),
        }

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.records:,} records, {self.steps:,} steps", f"head {self.head}", ""]
        for claim in self.claims:
            lines.append(f"  {claim.name:<9}{claim.status:<12}{claim.title}")
            lines += textwrap.wrap(claim.text, 112, initial_indent=" " * 23, subsequent_indent=" " * 23)
        lines += ["", "Not claimed:"]
        for text in NON_CLAIMS:
            lines += textwrap.wrap(text, 112, initial_indent="  - ", subsequent_indent="    ")
        return "\n".join(lines)


def verify(path: str | os.PathLike[str], head: str | None = None) -> Report:
    """Check a run's journal.

    Parameters
    ----------
    path
        Run folder, or the journal's file.
    head
        Head that was published outside the run, in hexadecimal; it may be that of an earlier record.

    Raises
    ------
    UnreadableJournalError
        When there is no journal that this version can read.

    Notes
    -----
    One pass over the rows, 7 to 12 us each; memory grows by 8 bytes a probe.
    """
    file = Path(path)
    file = file if file.suffix == ".sqlite" else file / "journal.sqlite"
    connection = _open(file)
    try:
        return _verify(file, connection, head)
    except (sqlite3.Error, struct.error, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise UnreadableJournalError(f"{file} is damaged: {type(error).__name__}: {error}.") from error
    finally:
        connection.close()


# --- reading ----------------------------------------------------------------------------------------------------------


class _Text(bytes):
    """A TEXT value as stored: tells text from BLOB without trusting that it is valid UTF-8."""


class Row(NamedTuple):
    """A row of the table."""

    seq: int
    kind: bytes
    step: int
    body: bytes
    blob: bytes
    digest: bytes


@dataclass(slots=True)
class Step:
    """What the checks need of a step's row."""

    seq: int
    step: int
    action: int
    level: int
    mode: int
    objective: int
    released: bool
    certificate: str
    losses: NDArray[np.float64] | None
    statistics: dict[str, float]


_HEAD = struct.Struct("<7BH8I4q6d")
_PREFIX = struct.Struct("<qqIII")
_PROBE_FLAG, _RELEASE_FLAG = 1 << 6, 1 << 14


def _open(file: Path) -> sqlite3.Connection:
    if not file.is_file():
        raise UnreadableJournalError(f"There is no journal at {file}.")
    try:
        connection = _connect(file, "mode=ro")
    except sqlite3.OperationalError:
        log = Path(f"{file}-wal")
        if log.exists() and log.stat().st_size:
            raise UnreadableJournalError(
                f"{file} cannot be opened where it is: copy the run folder to a place that can be written to."
            ) from None
        try:  # SQLite wants to make an index of the log beside the file; without a log there is nothing to index
            connection = _connect(file, "immutable=1")
        except sqlite3.Error as error:
            raise UnreadableJournalError(f"{file} cannot be opened: {error}.") from None
    except sqlite3.Error as error:
        raise UnreadableJournalError(f"{file} is not a journal: {error}.") from None
    return connection


def _connect(file: Path, mode: str) -> sqlite3.Connection:
    connection = sqlite3.connect(f"{file.absolute().as_uri()}?{mode}", uri=True, isolation_level=None)
    try:
        connection.text_factory = _Text
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if application != APPLICATION_ID:
            raise UnreadableJournalError(f"{file} is a database of another program, not a kalmanguard journal.")
        if version > SCHEMA_VERSION:
            raise UnreadableJournalError(
                f"{file} was written by a newer kalmanguard (journal version {version}; this verifier knows "
                f"{SCHEMA_VERSION}): use the verifier of that version."
            )
    except BaseException:
        connection.close()
        raise
    return connection


def _rows(connection: sqlite3.Connection) -> Iterator[Row]:
    for row in connection.execute("SELECT seq, kind, step, body, blob, digest FROM records ORDER BY seq"):
        yield Row(*row)


def _follows(row: Row, seq: int, previous: bytes) -> bool:
    """Whether the row is the next one and carries the digest that it must."""
    if row.seq != seq + 1 or not isinstance(row.kind, _Text) or type(row.blob) is not bytes:
        return False
    if type(row.body) is not (bytes if row.kind == b"step" else _Text) or type(row.step) is not int:
        return False
    prefix = _PREFIX.pack(row.seq, row.step, len(row.kind), len(row.body), len(row.blob))
    return hashlib.sha256(previous + prefix + row.kind + row.body + row.blob).digest() == row.digest


def _parse(row: Row, names: list[str]) -> Step:
    """Decode a step: a head of 121 bytes, float64 values, reason, JSON tail; velocity, losses, statistics."""
    head = _HEAD.unpack_from(row.body)
    version, _, action, _, level, mode, certificate, _, flags, n_velocity, n_losses, n_values, n_reason = head[:13]
    if version != LAYOUT_VERSION:
        raise ValueError(f"record {row.seq} has layout version {version}, this verifier knows {LAYOUT_VERSION}")
    if certificate < len(CERTIFICATES):
        status = CERTIFICATES[certificate]
    else:
        status = json.loads(row.body[_HEAD.size + 8 * n_values + n_reason :])["certificate"]
    floats = np.frombuffer(row.blob, "<f8")
    used = n_velocity + n_losses
    statistics = floats[used:].tolist()
    if statistics and len(statistics) != len(names):
        raise ValueError(f"record {row.seq} has {len(statistics)} statistics, the header names {len(names)}")
    losses = floats[n_velocity:used] if flags & _PROBE_FLAG else None
    released = bool(flags & _RELEASE_FLAG)
    return Step(
        row.seq, row.step, action, level, mode, head[14], released, status, losses,
        dict(zip(names, statistics, strict=True)) if statistics else {},
    )  # fmt: skip


# --- numbers ----------------------------------------------------------------------------------------------------------


def _mean(losses: NDArray[np.float64]) -> float:
    values = losses.tolist()
    return math.fsum(values) / len(values) if values and all(map(math.isfinite, values)) else math.nan


def _same(a: float, b: float, relative: float = 1e-12) -> bool:
    return math.isclose(a, b, rel_tol=relative, abs_tol=0.0) or (a != a and b != b)


def log_wealth_path(
    differences: NDArray[np.float64], *, delta: float, clip: float, c: float, weight: int
) -> NDArray[np.float64]:
    """``ln prod (1 + lambda_i (delta - X_i))`` after each example; the bet is past mean over past second moment."""
    gains, squares, wealth = weight * delta, weight * delta * (clip - delta), 0.0
    path = []
    for difference in differences.tolist():
        x = clip if difference != difference else min(max(difference, -clip), clip)
        gain = delta - x
        bet = min(max(gains / squares, 0.0), c / (clip - delta))
        wealth += math.log1p(bet * gain)
        gains += gain
        squares += gain * gain
        path.append(wealth)
    return np.array(path)


def transcript_bound(n: int, steps: int, interventions: int, kinds: int, loss_range: float, delta: float) -> float:
    """``B sqrt((ln sum_{j<=k} C(T,j) A^j + ln(2(T+1)/delta)) / 2n)``, the sum by a running log-sum-exp."""
    total = term = 0.0
    if interventions >= steps:
        total = steps * math.log1p(kinds)
    else:
        for j in range(1, interventions + 1):
            term += math.log((steps - j + 1) / j) + math.log(kinds)
            total = max(total, term) + math.log1p(math.exp(-abs(total - term)))
    return loss_range * math.sqrt((total + math.log(2 * (steps + 1) / delta)) / (2 * n))


def chi_square_cdf(x: float, freedom: int) -> float:
    """Regularised lower incomplete gamma function at ``(freedom/2, x/2)``: series below the mean, fraction above."""
    a, x = freedom / 2, x / 2
    if x <= 0:
        return 0.0
    front = math.exp(a * math.log(x) - x - math.lgamma(a))
    if x < a + 1:
        term = total = 1 / a
        k = a
        while term > total * 1e-16:
            k += 1
            term *= x / k
            total += term
        return min(1.0, front * total)
    # Lentz's continued fraction of the upper function.
    tiny = 1e-300
    b = x + 1 - a
    c, d = 1 / tiny, 1 / b
    h, i, change = d, 0, 0.0
    while abs(change - 1) > 1e-15 and i < 100_000:
        i += 1
        an = -i * (i - a)
        b += 2
        d = 1 / _away_from_zero(an * d + b, tiny)
        c = _away_from_zero(b + an / c, tiny)
        change = d * c
        h *= change
    return max(0.0, 1 - front * h)


def _away_from_zero(value: float, tiny: float) -> float:
    return value if abs(value) > tiny else tiny


def chi_square_quantile(p: float, freedom: int) -> float:
    """Inverse of `chi_square_cdf` by bisection."""
    low, high = 0.0, freedom + 20 * math.sqrt(2 * freedom) + 50
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if chi_square_cdf(middle, freedom) < p else (low, middle)
    return (low + high) / 2


# --- claims -----------------------------------------------------------------------------------------------------------


def _starts_anew(kind: str, data: dict[str, Any]) -> bool:
    """Whether the supervisor was reset by hand, or resumed from a checkpoint: its ledger does not continue."""
    return kind == "resume" or (kind == "note" and bool(data.get("reset")))


class _Check:
    """Sees every step and every rare record once, then states its claim; the hooks of the base see nothing."""

    def step(self, step: Step) -> None:
        """Take in one step."""

    def record(self, kind: str, row: Row, data: dict[str, Any]) -> None:
        """Take in one rare record."""

    def claim(self, complete: bool) -> Claim:
        """State what was found."""
        raise NotImplementedError


class _NotKept(_Check):
    """Stands for a check that needs statistics which the journal does not keep."""

    def __init__(self, name: str) -> None:
        self.name = name

    def claim(self, complete: bool) -> Claim:
        text = f"The journal does not keep all of {', '.join(sorted(NEEDED))}."
        return Claim(self.name, "cannot be recomputed", NOT_CLAIMED, text)


@dataclass
class _Findings:
    """Counts what is wrong, keeping the first few steps by number and the first sentence."""

    count: int = 0
    steps: list[int] = field(default_factory=list)
    first: str = ""

    def add(self, step: int, text: str) -> None:
        self.count += 1
        self.first = self.first or f"step {step}: {text}"
        if len(self.steps) < SHOWN:
            self.steps.append(step)

    def __str__(self) -> str:
        listed = ", ".join(map(str, self.steps)) + (", ..." if self.count > len(self.steps) else "")
        return f"{self.count} (steps {listed})"


class _Envelope(_Check):
    """C1: recomputes mean, allowance and bound of every probe."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.phi, self.c, self.floor = (float(settings[k]) for k in ("give_back", "standard_errors", "floor_frac"))
        self.accepted = self.refused = self.before = self.lapsed = self.restarts = 0
        self.wrong, self.outside = _Findings(), _Findings()
        self.objective, self.in_force, self.y_best, self.y0 = -1, False, math.inf, math.nan

    def step(self, step: Step) -> None:
        if step.objective != self.objective:
            self._restart(step.objective)
        if step.losses is not None:
            self._probe(step, step.losses, step.statistics)
        elif step.statistics.get("accepted") == 1:
            self.wrong.add(step.step, "a probe was accepted that was not taken")
        # Warm-up is over at the first NOMINAL step; that step's own probe was still judged by warm-up's rule.
        self.in_force = self.in_force or step.level == NOMINAL
        self.lapsed += step.certificate.startswith(LAPSED)

    def record(self, kind: str, row: Row, data: dict[str, Any]) -> None:
        if _starts_anew(kind, data):
            self.restarts += 1
            self._restart(self.objective)

    def _restart(self, objective: int) -> None:
        self.objective, self.in_force, self.y_best, self.y0 = objective, False, math.inf, math.nan

    def _probe(self, step: Step, losses: NDArray[np.float64], s: dict[str, float]) -> None:
        if not s:
            self.wrong.add(step.step, "a probe has no statistics")
            return
        y, bound, mean = s["y"], s["bound"], _mean(losses)
        if not _same(y, mean, 0.0):
            self.wrong.add(step.step, f"y = {y!r} is not the mean of the probe's losses, {mean!r}")
        self._ledger(step, s)
        inside = y <= bound < math.inf
        marked = step.certificate.startswith(LAPSED)
        if s["accepted"] != 1:
            self.refused += 1
            # Neither undone nor inside: overfitting is let pass, and openly marked so.
            if marked and not inside and step.action not in (ROLLBACK, HALT):
                self.outside.add(step.step, f"y = {y:.6g} was let pass outside the bound {bound:.6g}")
        elif inside:
            self.accepted += 1
        elif not self.in_force and math.isfinite(y):
            self.before += 1
        elif marked:
            self.outside.add(step.step, f"y = {y:.6g} was accepted outside the bound {bound:.6g}")
        else:
            self.wrong.add(step.step, f"y = {y:.6g} was accepted outside the bound {bound:.6g}, and not marked so")

    def _ledger(self, step: Step, s: dict[str, float]) -> None:
        """The allowance follows its rule, the ratchet only tightens, progress is measured from one level."""
        y0, y_best, allowance, bound = s["y0"], s["y_best"], s["allowance"], s["bound"]
        if math.isfinite(bound):
            widest = max(self.phi * (y0 - y_best), self.c * s["allowance_se"], self.floor * abs(y_best))
            if not allowance <= widest * (1 + 1e-12):
                self.wrong.add(step.step, f"the allowance {allowance!r} is wider than the rule's {widest!r}")
            if not _same(bound, y_best + allowance):
                self.wrong.add(step.step, f"the bound {bound!r} is not y_best + D = {y_best + allowance!r}")
        if y_best > self.y_best:
            self.wrong.add(step.step, f"y_best rose from {self.y_best!r} to {y_best!r} under one objective")
        if self.in_force and math.isfinite(self.y0) and math.isfinite(y0) and y0 != self.y0:
            self.wrong.add(step.step, f"y0 changed from {self.y0!r} to {y0!r} under one objective")
        self.y_best = y_best if math.isfinite(y_best) else self.y_best
        self.y0 = y0 if math.isfinite(y0) else self.y0

    def claim(self, complete: bool) -> Claim:
        text = (
            f"Probes accepted inside the envelope: {self.accepted:,}, not accepted: {self.refused:,}, accepted outside "
            f"it during warm-up, when it is not in force: {self.before:,}."
        )
        if self.restarts:
            text += f" Times it was set up anew, by a resume or a reset: {self.restarts}."
        status, found = (HOLDS if self.accepted else NOT_CLAIMED), self.outside
        if self.wrong.count:
            status, found = FAILED, self.wrong
            text = f"Contradictions: {self.wrong}; {self.wrong.first}. {text}"
        elif self.outside.count:
            status, text = LAPSED, f"Outside, openly: {self.outside}; {self.outside.first}. {text}"
        elif self.lapsed:
            status, text = LAPSED, f"Steps that the run itself marked LAPSED: {self.lapsed:,}. {text}"
        return Claim("C1", "every accepted probe obeys y <= y_best + D", status, text, tuple(found.steps))


class _ExactRestore(_Check):
    """C2: digests of what was captured, ordered and restored."""

    def __init__(self) -> None:
        self.ordered = self.restored = self.exact = self.anchored = self.cut = 0
        self.captured: dict[int, set[str]] = {}
        self.wrong, self.open = _Findings(), _Findings()

    def step(self, step: Step) -> None:
        self.ordered += step.action == ROLLBACK

    def record(self, kind: str, row: Row, data: dict[str, Any]) -> None:
        if kind == "snapshot" and data.get("digest"):
            self.captured.setdefault(row.step, set()).add(str(data["digest"]))
        if kind == "resume" and self.ordered > self.restored:
            # The process died before it could record the outcome; what it was restoring died with it.
            self.cut += self.ordered - self.restored
            self.ordered = self.restored
        if kind != "outcome" or data.get("action") not in ("ROLLBACK", "HALT"):
            return
        source, expected, actual = data.get("restored_step"), data.get("digest_expected"), data.get("digest_actual")
        if data.get("error"):
            self.open.add(row.step, f"the restore failed: {data['error']}")
        elif source is None:
            if data["action"] == "ROLLBACK":
                self.open.add(row.step, "a rollback names no state that it restored")
        elif not expected or not actual:
            self.open.add(row.step, f"the restored state {source} has no digest to compare")
        elif expected != actual:
            self.wrong.add(row.step, f"state {source} was restored as {actual[:12]}, captured as {expected[:12]}")
        elif source in self.captured and expected not in self.captured[source]:
            self.wrong.add(row.step, f"the digest expected of state {source} is not one that was recorded for it")
        else:
            self.exact += 1
            self.anchored += source in self.captured
        self.restored += data["action"] == "ROLLBACK" and not data.get("manual")

    def claim(self, complete: bool) -> Claim:
        text = (
            f"Restored states with equal digests before and after: {self.exact:,}, of them recorded at capture: "
            f"{self.anchored:,}. That the digests are those of the weights only replay can show."
        )
        if self.cut:
            text = f"Rollbacks that the end of a process cut off, which a resume has made void: {self.cut}. {text}"
        missing = self.ordered - self.restored
        if self.wrong.count:
            status, text = FAILED, f"Restores that are not exact: {self.wrong}; {self.wrong.first}. {text}"
        elif self.open.count:
            status, text = LAPSED, f"Restores not shown exact: {self.open}; {self.open.first}. {text}"
        elif missing > 0:
            status, text = LAPSED if complete else INCOMPLETE, f"Rollbacks without an outcome: {missing}. {text}"
        else:
            status = HOLDS if self.exact else NOT_CLAIMED
            text = text if self.exact or self.cut else "Nothing was restored."
        return Claim("C2", "rollback is bit-exact", status, text, (*self.wrong.steps, *self.open.steps))


class _FreshBetting(_Check):
    """C3: recomputes the wealth of each betting test, and adds up what it may spend."""

    def __init__(self, constants: dict[str, Any]) -> None:
        self.constants = constants
        self.rule = str(constants.get("lambda_rule", ""))
        self.tests = self.certified = 0
        self.last: tuple[int, str, bool] | None = None
        self.wrong = _Findings()
        self.indices: set[int] = set()
        self.spent = 0.0
        self.next_example = 0

    def record(self, kind: str, row: Row, data: dict[str, Any]) -> None:
        if kind != "fresh":
            return
        self.tests += 1
        prefix, _, weight = self.rule.partition("-")
        if prefix != "kelly" or not weight.isdigit():
            return
        alpha, delta, clip, c = (float(self.constants[name]) for name in ("alpha", "delta", "clip", "c"))
        if not (0 < alpha < 1 and 0 < delta < clip and 0 < c < 1):
            self.wrong.add(row.step, f"alpha = {alpha}, delta = {delta}, clip = {clip}, c = {c} make no valid test")
            return
        index, level = int(data["index"]), float(data["alpha_t"])
        self.spent += level
        if index < 1 or index in self.indices or not 0 < level <= 6 * alpha / (math.pi * index) ** 2 * (1 + 1e-12):
            self.wrong.add(row.step, f"test {index} spends {level:.3g}, which the rule 6 alpha/(pi t)^2 does not allow")
        self.indices.add(index)
        differences = np.frombuffer(row.blob, "<f8") if row.blob else np.array(data["differences"], dtype=np.float64)
        first = data.get("first")
        if first is not None:
            if first < self.next_example:
                self.wrong.add(row.step, f"example {first} was used by an earlier test already")
            self.next_example = max(self.next_example, int(first) + differences.size)
        path = log_wealth_path(differences, delta=delta, clip=clip, c=c, weight=int(weight))
        final, highest = (float(path[-1]), float(path.max())) if path.size else (0.0, 0.0)
        rejects = highest >= -math.log(level)
        claimed = data.get("log_wealth")
        if claimed is not None and abs(claimed - final) > 1e-9 * max(1.0, abs(final)):
            self.wrong.add(row.step, f"the log wealth {claimed!r} is recomputed as {final!r}")
        if data.get("certified") not in (None, rejects):
            self.wrong.add(row.step, "the test's verdict is not the one that its differences give")
        self.certified += rejects
        best = f"K reached {math.exp(min(highest, 700.0)):.3g} of {1 / level:.3g} on {differences.size} examples"
        self.last = row.step, f"against step {data.get('reference_step')}: {best}", rejects

    def claim(self, complete: bool) -> Claim:
        constants = self.constants
        title = f"held-out loss <= reference + {constants.get('delta')} at level 1 - {constants.get('alpha')}"
        if self.wrong.count:
            status, text = FAILED, f"Contradictions: {self.wrong}; {self.wrong.first}."
        elif not self.tests:
            status, text = NOT_CLAIMED, "No test on fresh examples was made."
        elif self.last is None:
            status, text = NOT_CLAIMED, f"The betting rule {self.rule!r} is not one that this verifier can recompute."
        else:
            step, text, rejects = self.last
            status = HOLDS if rejects else LAPSED if self.certified else NOT_CLAIMED
            text = (
                f"Tests: {self.tests}, certified: {self.certified}, spent: {self.spent:.3g}. The last, of step {step}, "
                f"{'is' if rejects else 'is not'} certified {text}."
            )
        return Claim("C3", title, status, text, tuple(self.wrong.steps))


class _ReusedProbe(_Check):
    """C3-reuse: the transcript bound with the interventions that were counted."""

    def __init__(self, constants: dict[str, Any], probe: dict[str, Any]) -> None:
        self.constants, self.examples = constants, int(probe.get("n") or 0)
        self.steps = self.interventions = 0
        self.halted = False

    def step(self, step: Step) -> None:
        self.steps += 1
        # A halted run says HALT at every further step; it was stopped once.
        self.interventions += step.action != ACCEPT and not (self.halted and step.action == HALT)
        self.halted = step.action == HALT

    def record(self, kind: str, row: Row, data: dict[str, Any]) -> None:
        self.interventions += kind == "outcome" and bool(data.get("manual"))

    def claim(self, complete: bool) -> Claim:
        title = "distance of the reused probe's mean difference from the population's"
        try:
            alpha, delta, clip = (float(self.constants[name]) for name in ("alpha", "delta", "clip"))
        except KeyError:
            return Claim("C3-reuse", title, NOT_CLAIMED, "The header has no constants for it.")
        if not self.examples or not self.steps:
            return Claim("C3-reuse", title, NOT_CLAIMED, "There was no probe.")
        kinds = int(self.constants.get("kinds") or DEFAULT_KINDS)
        bound = transcript_bound(self.examples, self.steps, self.interventions, kinds, 2 * clip, alpha)
        text = (
            f"At most {bound:.3g} with probability {1 - alpha:g}, to compare with delta = {delta:g} (examples: "
            f"{self.examples}, steps: {self.steps:,}, interventions: {self.interventions}, kinds of them: {kinds}, "
            f"differences clipped to {clip:g}). It lapses if anyone but the supervisor acted on probe values."
        )
        return Claim("C3-reuse", title, HOLDS if bound <= delta else VACUOUS, text)


class _DriftTest(_Check):
    """C4: recomputes the Shiryaev-Roberts mixture and its alarms."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.limit = float(settings["run_length"])
        self.values = [0.0] * len(RATES)
        self.bets = self.alarms = 0
        self.largest = 0.0
        self.wrong = _Findings()

    def step(self, step: Step) -> None:
        s = step.statistics
        if not s:
            return
        if s["drift_reset"] == 1:
            self.values = [0.0] * len(RATES)
        x = s["drift_x"]
        if x != x:
            if s["drift_alarm"] == 1:
                self.wrong.add(step.step, "an alarm without a bet")
            return
        self.bets += 1
        if abs(x) > 1:
            self.wrong.add(step.step, f"the bet's outcome {x!r} lies outside [-1, 1]")
        self.values = [(1 + rate * x) * (value + 1) for rate, value in zip(RATES, self.values, strict=True)]
        mean = math.fsum(self.values) / len(RATES)
        self.largest = max(self.largest, mean)
        if not _same(mean, s["drift_m"]):
            self.wrong.add(step.step, f"M = {s['drift_m']!r} is recomputed as {mean!r}")
        # The writer's own rounding decides in the last bit, so its value is held against the limit.
        alarm = s["drift_m"] >= self.limit
        if alarm != (s["drift_alarm"] == 1):
            said = "raised" if s["drift_alarm"] == 1 else "not raised"
            self.wrong.add(step.step, f"M = {mean:.6g} against {self.limit:g}, but the alarm was {said}")
        if alarm:
            self.alarms += 1
            self.values = [0.0] * len(RATES)

    def record(self, kind: str, row: Row, data: dict[str, Any]) -> None:
        if _starts_anew(kind, data):
            self.values = [0.0] * len(RATES)

    def claim(self, complete: bool) -> Claim:
        title = f"mean run length to a false drift alarm >= {self.limit:g} steps"
        if self.wrong.count:
            text = f"Contradictions: {self.wrong}; {self.wrong.first}."
            return Claim("C4", title, FAILED, text, tuple(self.wrong.steps))
        text = (
            f"Bets recomputed: {self.bets:,}, alarms: {self.alarms}, largest M: {self.largest:.4g}. Under the null at "
            f"most {self.bets / self.limit:.2g} false alarms are expected: exact only if the bet's conditional mean is "
            "not above 0, else a heuristic."
        )
        return Claim("C4", title, HOLDS if self.bets else NOT_CLAIMED, text if self.bets else "The test made no bet.")


class _Consistency(_Check):
    """C5: normalised innovation squared and whiteness of the probe filter."""

    LAGS = 10

    def __init__(self) -> None:
        self.innovations = array("d")
        self.skipped = 0

    def step(self, step: Step) -> None:
        s = step.statistics
        if step.losses is None or not s:
            return
        if s["accepted"] != 1:  # the filter is to be consistent in flight, not in the faults that it is there to find
            self.skipped += 1
            return
        innovation = (s["y"] - s["predicted"]) / s["scale"] if s["scale"] > 0 else math.nan
        if math.isfinite(innovation):
            self.innovations.append(innovation)
        else:
            self.skipped += 1

    def claim(self, complete: bool) -> Claim:
        title = "the probe filter is consistent (reported; no other claim rests on it)"
        nu = np.frombuffer(self.innovations, dtype=np.float64)
        n = nu.size
        if n < 2 * self.LAGS:
            return Claim("C5", title, NOT_CLAIMED, f"{n} probe innovations are too few to judge by.")
        nis = float(nu @ nu)
        low, high = (chi_square_quantile(p, n) / n for p in (0.025, 0.975))
        centred = nu - nu.mean()
        power = float(centred @ centred)
        rho = [float(centred[lag:] @ centred[:-lag]) / power if power else 0.0 for lag in range(1, self.LAGS + 1)]
        box = n * (n + 2) * math.fsum(r * r / (n - lag) for lag, r in enumerate(rho, start=1))
        p_value = 1 - chi_square_cdf(box, self.LAGS)
        good = low <= nis / n <= high and p_value >= 0.01
        text = (
            f"Mean NIS {nis / n:.3f} on the innovations of {n:,} accepted probes (left out, as not accepted or without "
            f"a prediction: {self.skipped}), 95 % interval [{low:.3f}, {high:.3f}]; Ljung-Box p = {p_value:.3g} over "
            f"{self.LAGS} lags, first autocorrelation {rho[0]:+.3f} (+-{1.96 / math.sqrt(n):.3f})."
        )
        if good:
            return Claim("C5", title, HOLDS, text)
        return Claim("C5", title, NOT_CLAIMED, f"{text} It is not: the gate on the probe's innovation is a heuristic.")


class _Liveness(_Check):
    """C6: rollbacks between two recoveries, and what comes after a halt."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.budget = int(settings["rollback_budget"])
        self.run = self.longest = self.rollbacks = self.halts = 0
        self.halted = False
        self.wrong = _Findings()

    def step(self, step: Step) -> None:
        if step.action == HALT:
            self.halts += not self.halted
        elif step.action == ROLLBACK:
            self.rollbacks += 1
            self.run += 1
            self.longest = max(self.longest, self.run)
            if self.run > self.budget:
                self.wrong.add(step.step, f"rollback {self.run} without a recovery, the budget is {self.budget}")
        elif step.released or step.mode == WATCHING:
            self.run = 0
        self.halted = step.action == HALT

    def claim(self, complete: bool) -> Claim:
        text = (
            f"Rollbacks: {self.rollbacks}, most without a recovery between them: {self.longest}, budget: "
            f"{self.budget}; halts: {self.halts}."
        )
        if self.wrong.count:
            text = f"Beyond the budget: {self.wrong}; {self.wrong.first}. {text}"
        status = FAILED if self.wrong.count else HOLDS
        return Claim("C6", "recovery ends within its budget", status, text, tuple(self.wrong.steps))


class _Durable(_Check):
    """What was recorded as durable; a state in the memory of a process is not, certified or not."""

    def __init__(self) -> None:
        self.clean = self.found = 0
        self.newest: int | None = None
        self.digest = ""
        self.wrong = _Findings()

    def record(self, kind: str, row: Row, data: dict[str, Any]) -> None:
        if kind != "durable":
            return
        state = int(data["state"])
        if state > row.step:
            self.wrong.add(row.step, f"the state of step {state} was called durable before that step was taken")
        if data.get("clean"):
            self.clean += 1
            self.found += bool(data.get("found"))
            self.newest, self.digest = state, str(data["manifest_sha256"])

    def claim(self, complete: bool) -> Claim:
        title = "certified states that were recorded after they were forced to the disk"
        if self.wrong.count:
            text = f"Contradictions: {self.wrong}; {self.wrong.first}."
            return Claim("durable", title, FAILED, text, tuple(self.wrong.steps))
        if self.newest is None:
            text = "None was recorded: whatever was certified lived in the memory of processes, and dies with them."
            return Claim("durable", title, NOT_CLAIMED, text)
        text = (
            f"Recorded: {self.clean:,}, of them found again by a resume: {self.found:,}; the last is the state of step "
            f"{self.newest}, manifest {self.digest[:16]}... Any later state lived in the memory of processes and dies "
            "with them. The journal alone shows neither that the files are still there nor what is in them: loading "
            "checks every digest."
        )
        return Claim("durable", title, HOLDS, text)


# --- the pass ---------------------------------------------------------------------------------------------------------


def _verify(file: Path, connection: sqlite3.Connection, published: str | None) -> Report:
    wanted = published.strip().lower() if published else None
    names: list[str] = []
    checks: list[_Check] = []
    seq, steps, found, broken, row = 0, 0, 0, "", None
    previous = bytes(32)
    for row in _rows(connection):
        if broken or not _follows(row, seq, previous):
            # Nothing after a break can be trusted: the claims below speak of the records before it.
            broken = broken or f"Record {row.seq} does not follow from record {seq}: changed, damaged or missing there."
            continue
        seq, previous = row.seq, row.digest
        if previous.hex() == wanted:
            found = seq
        if row.kind == b"step":
            steps += 1
            step = _parse(row, names)
            for check in checks:
                check.step(step)
            continue
        data = json.loads(row.body)
        if seq == 1:
            names, checks = _begin(file, row, data)
        for check in checks:
            check.record(row.kind.decode(), row, data)
    if row is None:
        raise UnreadableJournalError(f"{file} holds no record yet.")
    complete = row.kind == b"close" and not broken
    if complete:
        ending = "Closed."
    elif broken:
        ending = f"Only the {seq:,} records before the break could be judged."
    else:
        ending = f"The last record is {row.kind.decode()!r} of step {row.step}: it goes on, was killed or cut short."
    claims = [
        Claim("chain", "every record follows from the one before", FAILED if broken else HOLDS,
              broken or f"{seq:,} records recomputed."),
        _head_claim(wanted, found, seq),
        Claim("run", "the journal was closed by its writer", HOLDS if complete else INCOMPLETE, ending),
        *(check.claim(complete) for check in checks),
    ]  # fmt: skip
    return Report(str(file), seq, steps, previous.hex(), tuple(claims))


def _begin(file: Path, row: Row, header: dict[str, Any]) -> tuple[list[str], list[_Check]]:
    """Names of the statistics and the checks that the header allows."""
    if row.kind != b"header" or header.get("format") != FORMAT:
        raise UnreadableJournalError(f"{file} has no header of format {FORMAT}: use the verifier of its version.")
    names = [str(name) for name in header.get("statistics", ())]
    settings, constants = header.get("settings", {}), header.get("certificate") or {}
    try:
        kept = set(names) >= NEEDED
        checks: list[_Check] = [
            _Envelope(settings) if kept else _NotKept("C1"),
            _ExactRestore(),
            _FreshBetting(constants),
            _ReusedProbe(constants, header.get("probe") or {}),
            _DriftTest(settings) if kept else _NotKept("C4"),
            _Consistency() if kept else _NotKept("C5"),
            _Liveness(settings),
            _Durable(),
        ]
    except KeyError as error:
        raise UnreadableJournalError(f"The header of {file} lacks the setting {error}.") from None
    return names, checks


def _head_claim(wanted: str | None, found: int, records: int) -> Claim:
    title = "the journal contains the head that was published"
    if wanted is None:
        text = "No published head was given (--head): a rewritten or shortened journal would not show."
        return Claim("head", title, NOT_CLAIMED, text)
    if found:
        text = f"It is record {found:,} of {records:,}: everything up to it is as it was when the head was published."
        return Claim("head", title, HOLDS, text)
    text = f"No record has the digest {wanted[:16]}...: the journal was shortened or rewritten, or is of another run."
    return Claim("head", title, FAILED, text)


def _read_head(value: str | None) -> str | None:
    """A digest as given, or the first word of a file that holds it."""
    if value and not (len(value) == 64 and all(c in "0123456789abcdefABCDEF" for c in value)):
        try:
            return Path(value).read_text(encoding="ascii").split()[0]
        except (OSError, UnicodeDecodeError, IndexError):
            raise UnreadableJournalError(f"--head {value}: neither 64 hexadecimal digits nor a file of them.") from None
    return value


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Check a kalmanguard run's certificate from its journal alone.")
    parser.add_argument("run", help="run folder, or the journal's file")
    parser.add_argument("--head", help="head that was published outside the run: 64 hexadecimal digits, or a file")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    try:
        report = verify(options.run, _read_head(options.head))
    except UnreadableJournalError as error:
        sys.stdout.write(json.dumps({"error": str(error), "exit_code": 2}) + "\n" if options.json else f"{error}\n")
        return 2
    sys.stdout.write((json.dumps(report.to_dict(), indent=2) if options.json else str(report)) + "\n")
    return report.exit_code


if __name__ == "__main__":
    sys.exit(main())
