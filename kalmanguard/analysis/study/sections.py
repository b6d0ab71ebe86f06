"""The tables of the page on damping, from the study's rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from kalmanguard.analysis.study import tables
from kalmanguard.analysis.study.curves import binomial_share
from kalmanguard.analysis.study.detectors import FAMILIES, RULES
from kalmanguard.analysis.study.tables import AT_EDGE, BELOW_EDGE, Row
from kalmanguard.detectors.damping import DRIFT, SNAP

Rows = Mapping[str, Sequence[Row]]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [[cell.replace("|", r"\|") for cell in line] for line in (head, *rows)]
    lines.insert(1, ["---", *["--:"] * (len(head) - 1)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _ratio(rows: Rows) -> str:
    """Where the jerk ratio of one mode lies between no learning rate and the limit."""
    found = tables.ratios()
    lines = []
    for momentum in dict.fromkeys(row["momentum"] for row in found):
        values = {row["share"]: row["ratio"] for row in found if row["momentum"] == momentum}
        least = min(values, key=lambda share: values[share])
        below = [sum(value < level for value in values.values()) / len(values) for level in (DRIFT, SNAP)]
        lines.append([
            f"{momentum:g}", f"{values[0.0]:.2f}", f"{values[least]:.2f} at {least:.3f}", f"{values[1.0]:.2f}",
            *(f"{100 * share:.0f} %" for share in below),
        ])  # fmt: skip
    head = ["momentum", "vanishing rate", "least, at share of limit", "at the limit", "below 0.707", "below 1.414"]
    return _table(head, lines)


def _rules_linear(rows: Rows) -> str:
    """Every proposed threshold on linear systems."""
    found = {(row["group"], row["rule"]): row for row in rows["rules-linear"]}
    groups = list(dict.fromkeys(group for group, _ in found))
    lines = []
    for rule in RULES:
        every = found["all", rule.name]
        shares = [_percent(found[group, rule.name]["condemned"]) for group in groups[1:]]
        lines.append([rule.name, *shares, _rate(every), *_seen(every)])
    head = ["alarm when", *(group.replace("momentum ", "β = ") for group in groups[1:]), "false alarms / 1,000 steps"]
    return _table([*head, *_SEEN], lines)


def _details_linear(rows: Rows) -> str:
    """Where the lower bound fails: windows condemned by spectrum and momentum, runs missed by scenario."""
    lines = []
    for row in rows["details-linear"]:
        if row["rule"] == _LOWER:
            seen = f"{row['seen']} of {row['unstable']}" if row["unstable"] else "–"
            lines.append([row["group"], _percent(row["condemned"]), seen])
    return _table(["systems", "stable windows condemned", "unstable runs seen"], lines)


def _rules_plants(rows: Rows) -> str:
    """The same thresholds on trained networks."""
    found = {(row["group"], row["rule"]): row for row in rows["rules-plants"]}
    groups = list(dict.fromkeys(group for group, _ in found))
    creeping = [run for run in rows["runs-plants"] if run["creeps"] and run["harm"] is not None]
    lines = []
    for rule in RULES:
        every = found["all", rule.name]
        shares = [_percent(found[group, rule.name]["condemned"]) for group in groups[1:]]
        spared = f"{every['spared_alarmed']} of {every['spared']}"
        in_time = sum(run["change"] < (run[rule.name] or math.inf) <= run["harm"] for run in creeping)
        slowly = f"{in_time} of {len(creeping)}"
        lines.append([rule.name, *shares, _rate(every), *_seen(every), slowly, spared])
    head = ["alarm when", *groups[1:], "false alarms / 1,000 steps"]
    return _table([*head, *_SEEN, "creeping, in time", "spared, alarmed"], lines)


def _matched(name: str, rows: Rows) -> str:
    """Families at one rate of false alarms."""
    found = {(row["group"], row["family"]): row for row in rows[name]}
    groups = list(dict.fromkeys(group for group, _ in found))
    lines = []
    for family in FAMILIES:
        every = found["all", family]
        rates = {group: found[group, family].get("per_1000", -math.inf) for group in groups[1:]}
        worst = max(rates, key=lambda group: rates[group])
        lines.append(
            [family, f"{every['threshold']:.3g}", _rate(every), f"{rates[worst]:.2g} ({worst})", *_seen(every)]
        )
    return _table(["family", "threshold", "false alarms / 1,000 steps", "worst group", *_SEEN], lines)


def _harm(rows: Rows) -> str:
    """How many runs each rise of the learning rate harmed, and how soon."""
    runs = rows["runs-plants"]
    rises = list(dict.fromkeys((row["factor"], row["creeps"]) for row in runs))
    lines = []
    for recipe in dict.fromkeys(row["recipe"] for row in runs):
        cells = []
        for rise in rises:
            mine = [row for row in runs if row["recipe"] == recipe and (row["factor"], row["creeps"]) == rise]
            after = [row["harm"] - (row["change"] or 0) for row in mine if row["harm"] is not None]
            cells.append(f"{len(after)} of {len(mine)}" + (f", {np.median(after):g}" if after else ""))
        lines.append([recipe, *cells])
    return _table(["recipe", *(f"×{factor:g}{', creeping' if creeps else ''}" for factor, creeps in rises)], lines)


def _edge(rows: Rows) -> str:
    """Readings below the edge of stability and at it, and what the thresholds say there."""
    shown = [rule for rule in RULES if rule.name in _AT_EDGE]
    lines = []
    for recipe in dict.fromkeys(row["recipe"] for row in rows["edge"]):
        for name, low, high in (("below", -math.inf, BELOW_EDGE), ("at", AT_EDGE, math.inf)):
            mine = [row for row in rows["edge"] if row["recipe"] == recipe and low <= row["sharpness"] < high]
            if not mine:
                continue
            ratio, modulus, alternation = (
                float(np.nanmedian([row[family] for row in mine]))
                for family in ("jerk ratio", "pole, estimate", "alternation")
            )
            alarms = [sum(row[rule.family] >= rule.threshold for row in mine) / len(mine) for rule in shown]
            readings = [f"{ratio:.2f}", f"{modulus:.3f}", f"{-alternation:.2f}"]
            lines.append([f"{recipe}, {name}", f"{len(mine)}", *readings, *map(_percent, alarms)])
    return _table(["training", "windows", "jerk ratio", "|z|", "cosine", *(rule.name for rule in shown)], lines)


def _estimators(rows: Rows) -> str:
    """Median and 10 to 90 % range of the estimated damping ratio."""
    found = {(row["zeta"], row["steps"], row["snr"], row["estimator"]): row for row in rows["estimators"]}
    names = list(dict.fromkeys(key[3] for key in found))
    lines = []
    for zeta, steps, snr in dict.fromkeys(key[:3] for key in found):
        cells = [found[zeta, steps, snr, name] for name in names]
        ranges = [f"{row['median']:.2f} ({row['low']:.2f} to {row['high']:.2f})" for row in cells]
        lines.append([f"{zeta:g}, {steps:,}", "∞" if math.isinf(snr) else f"{snr:g}", *ranges])
    return _table(["true ζ, steps", "SNR", *names], lines)


def _spacings(rows: Rows) -> str:
    """One system, read every so many steps."""
    lines = []
    for row in rows["spacings"]:
        readings = [f"{row['jerk_ratio']:.2f}", f"{row['cosine']:.2f}", f"{row['modulus']:.3f}", f"{row['zeta']:.2f}"]
        system = f"{row['momentum']:g}, {row['share']:g}"
        lines.append([system, f"{row['spacing']}", *readings, f"{row['critical']} of {row['runs']}"])
    head = [
        "momentum, share of limit",
        "read every",
        "jerk ratio",
        "cosine",
        "|z| a step",
        "ζ",
        "low |z| ≥ 1",
    ]
    return _table(head, lines)


_SEEN = ("early", "seen", "in time", "median delay")
_LOWER = "lower bound of |z| ≥ 1"
_AT_EDGE = {
    "jerk ratio > 1.414", "upper bound of |z| ≥ 1", "estimate of |z| ≥ 1", _LOWER,
    "estimate of ζ < 0.05", "mean cosine < -0.5",
}  # fmt: skip


def _rate(row: Mapping[str, Any]) -> str:
    return (
        f"{row['per_1000']:.2g} ({row['per_1000_low']:.2g} to {row['per_1000_high']:.2g})" if "per_1000" in row else "–"
    )


def _seen(row: Mapping[str, Any]) -> list[str]:
    delay = "never" if math.isinf(row["delay"]) else "–" if math.isnan(row["delay"]) else f"{row['delay']:g}"
    share = binomial_share(row["seen"], row["unstable"])
    seen = f"{share.hits} of {share.of} ({100 * share.low:.0f} to {100 * share.high:.0f} %)"
    return [f"{row['early']}", seen, f"{row['in_time']}", delay]


def _percent(share: float) -> str:
    return "–" if math.isnan(share) else f"{100 * share:.0f} %" if share >= 0.1 or not share else f"{100 * share:.1f} %"


#: Sections by the name of their markers.
SECTIONS: dict[str, Callable[[Rows], str]] = {
    "ratio": _ratio,
    "rules-linear": _rules_linear,
    "details-linear": _details_linear,
    "matched-linear": lambda rows: _matched("matched-linear", rows),
    "harm-plants": _harm,
    "rules-plants": _rules_plants,
    "matched-plants": lambda rows: _matched("matched-plants", rows),
    "edge": _edge,
    "estimators": _estimators,
    "spacings": _spacings,
}
