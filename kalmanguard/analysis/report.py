"""The report: one HTML page with its pictures inside, which opens from disk and prints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kalmanguard.analysis.analysis import Analyses, Analysis
from kalmanguard.analysis.figures import draw, sparkline, svg
from kalmanguard.analysis.health import Health
from kalmanguard.analysis.judgement import STAND_IN
from kalmanguard.errors import ConfigurationError

#: Runs that are shown in full; of more, the ones in the worst state.
SHOWN = 6
#: Rows of the overview, and incidents of a run.
_OVERVIEW, _INCIDENTS = 1_000, 60


def write_report(what: Analysis | Analyses, path: str | Path) -> Path:
    """Write the page about one run or several.

    Raises
    ------
    ConfigurationError
        There is a file at ``path`` that is no report, or its folder does not exist.
    """
    path = Path(path)
    if path.exists() and not _is_report(path):
        raise ConfigurationError(f"{path} exists and is no report of this program: name another file.")
    text = render(what if isinstance(what, Analyses) else Analyses((what,)))
    new = path.with_name(f".{path.name}.new")
    try:
        # First beside it, so that a page that was there is never left half overwritten.
        new.write_text(text, encoding="utf-8", errors="replace")
        new.replace(path)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise ConfigurationError(f"The report {path} cannot be written: {error.strerror}.") from None
    return path


def render(analyses: Analyses) -> str:
    """Make the page's text."""
    from importlib.metadata import version

    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("kalmanguard.analysis", "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": _number, "count": lambda n: f"{n:,}"}
    shown = [run for run in analyses.runs if run.verdict.health is not Health.UNKNOWN][:SHOWN] or analyses.runs[:1]
    return environment.get_template("report.html.j2").render(
        analyses=analyses,
        runs=analyses.runs[:_OVERVIEW],
        left_out=max(0, len(analyses.runs) - _OVERVIEW),
        shown=[_run(run) for run in shown],
        version=version("kalmanguard"),
        sparkline=_spark,
    )


def _run(run: Analysis) -> dict[str, Any]:
    incidents: Sequence[Any] = run.incidents
    j = run.judgement
    facts = [
        ("Source", f"{run.path} ({run.format})"),
        ("Rows", f"{j.rows:,}, steps {j.first_step:,} to {j.last_step:,}"),
    ]
    if j.probes:
        facts.append(("Held-out readings", f"{j.probes:,}"))
    elif j.curves.get("probe"):
        facts.append(("Held-out readings", f"none: means of {STAND_IN} training losses stand in for them"))
    for name, label in (("loss", "Training loss"), ("probe", "Held-out loss"), ("gradient_norm", "Gradient norm")):
        curve = j.curves.get(name)
        if curve and curve.finite and (name != "probe" or j.probes):
            best = f"{_number(curve.best)} at best (step {curve.best_step:,.0f}), " if name != "gradient_norm" else ""
            lost = f"; not finite {curve.lost_count:,} times" if curve.lost_count else ""
            facts.append((label, f"{_number(curve.first)} at first, {best}{_number(curve.last)} last{lost}"))
    if not math.isnan(j.give_back):
        facts.append(("Progress lost at the end", f"{100 * j.give_back:.1f} %" if j.give_back < 1.0 else "all of it"))
    if j.restarts:
        facts.append(("Restarts", ", ".join(f"step {step:,}" for step in j.restarts[:10])))
    return {
        "run": run,
        "facts": facts,
        "figure": svg(draw(j)),
        "incidents": incidents[:_INCIDENTS],
        "incidents_left": max(0, len(incidents) - _INCIDENTS),
    }


def _spark(run: Analysis) -> str:
    j = run.judgement
    curve = (j.curves.get("probe") if j.probes else None) or j.curves.get("loss")
    return sparkline(curve) if curve else ""


def _number(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "–"
    return f"{value:,.4g}" if math.isfinite(value) else "not finite"


_MARK = '<meta name="generator" content="kalmanguard'


def _is_report(path: Path) -> bool:
    try:
        with path.open(encoding="utf-8") as file:
            return _MARK in file.read(2_000)
    except (OSError, UnicodeDecodeError):
        return False
