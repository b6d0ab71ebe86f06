"""The card of a calibration, in Markdown: what it was fitted on, the thresholds, and what they mean."""

from __future__ import annotations

from collections.abc import Sequence

from kalmanguard.calibration.thresholds import Calibration
from kalmanguard.records import Guarantee

_MEANING = (
    "## What it means",
    "",
    "EXACT: if the runs and a new one are exchangeable (drawn in the same way from the same sources), a step of the "
    "new run that is drawn at random stays below the threshold with at least that probability. How the steps of a run "
    "depend on one another does not matter.",
    "",
    "ASYMPTOTIC: for levels that ask for more runs than there are, thresholds come from pooled steps: right in the "
    "limit of many runs.",
    "",
    "Neither holds for a given run or a given step, nor for training that is unlike these sources: calibrate on "
    "healthy runs of your own (`kalmanguard calibrate RUN...`).",
)


def card(calibration: Calibration) -> str:
    """A model card in Markdown: what it was fitted on, the thresholds, what is guaranteed and what is not."""
    lines = ["# Calibration of the tail tests", ""]
    if calibration.command:
        lines += ["Made by", "", "```console", calibration.command, "```", ""]
    lines += [
        f"Fitted on {calibration.runs:,} healthy runs, {calibration.steps:,} steps after warm-up (package "
        f"{', '.join(calibration.version)}; settings {', '.join(s[:12] for s in calibration.settings)}; scores "
        f"{calibration.corpus[:12]}).",
        "",
        "| source | runs | steps | seeds |",
        "| --- | --: | --: | --- |",
        *(f"| `{s.source}` | {s.runs} | {s.steps:,} | {_ranges(s.seeds)} |" for s in calibration.sources),
        "",
        "Thresholds, in standard deviations of the normalised innovation (its magnitude for `gain` and `buffers`); "
        "`*`: ASYMPTOTIC, from pooled steps, the others EXACT.",
        "",
    ]
    levels = sorted({q.level for quantiles in calibration.channels.values() for q in quantiles})
    lines += [
        "| level | " + " | ".join(calibration.channels) + " |",
        "| ---" + " | --:" * len(calibration.channels) + " |",
    ]
    for level in levels:
        found = [next((q for q in qs if q.level == level), None) for qs in calibration.channels.values()]
        cells = [
            "–" if q is None else f"{q.threshold:.2f}{'' if q.guarantee is Guarantee.EXACT else ' *'}" for q in found
        ]
        lines.append(f"| {level:g} | " + " | ".join(cells) + " |")
    lines += ["", *(f"- {channel}: {text}" for channel, texts in calibration.refused.items() for text in texts)]
    lines += ["", *_MEANING]
    return "\n".join(lines).replace("\n\n\n", "\n\n") + "\n"


def _ranges(seeds: Sequence[int]) -> str:
    parts: list[list[int]] = []
    for seed in seeds:
        if parts and seed == parts[-1][-1] + 1:
            parts[-1].append(seed)
        else:
            parts.append([seed])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]} to {p[-1]}" for p in parts) or "unknown"
