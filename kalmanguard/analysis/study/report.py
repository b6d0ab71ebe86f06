"""The study as files: data, figures, and the tables of a page between its markers."""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from kalmanguard.analysis.study import plots, sections, tables
from kalmanguard.analysis.study.tables import Results, Row
from kalmanguard.errors import ConfigurationError

#: Significant digits of numbers in the files.
_DIGITS = 5


def rows_of(results: Results) -> dict[str, list[Row]]:
    """All that was found, by the name of the file that it goes to."""
    linear, plants = tables.linear_groups(results), tables.plant_groups(results)
    return {
        "curves-linear": tables.curves(linear),
        "curves-plants": tables.curves(plants),
        "rules-linear": tables.rules(linear),
        "rules-plants": tables.rules(plants),
        "details-linear": tables.rules(tables.detail_groups(results)),
        "matched-linear": tables.matched(linear, per_1000=tables.LINEAR_RATE),
        "matched-plants": tables.matched(plants, per_1000=tables.PLANT_RATE),
        "runs-plants": tables.runs(results),
        "edge": tables.edges(results),
        "estimators": tables.estimators(results),
        "spacings": tables.spacings(results),
    }


def write_files(rows: Mapping[str, Sequence[Row]], folder: Path) -> list[Path]:
    """Write ``study.json``, a CSV file for each kind of rows, and the figures; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    rounded = {name: [{key: _rounded(value) for key, value in row.items()} for row in of] for name, of in rows.items()}
    written = [folder / "study.json"]
    written[0].write_text(json.dumps({name: _plain(of) for name, of in rounded.items()}, indent=1), encoding="utf-8")
    for name, of in rounded.items():
        written.append(folder / f"{name}.csv")
        with written[-1].open("w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, list(dict.fromkeys(key for row in of for key in row)), lineterminator="\n")
            table.writeheader()
            table.writerows(of)
    for name, (size, fill) in _figures(rows).items():
        written.append(folder / f"{name}.png")
        plots.draw(written[-1], size, fill)
    return written


def write_page(rows: Mapping[str, Sequence[Row]], files: Sequence[Path], page: Path) -> None:
    """Put every table between its markers ``<!-- name -->`` and ``<!-- /name -->``, and the files beside the page.

    The JSON file, which says what the CSV files say, stays where it is.

    Raises
    ------
    ConfigurationError
        The page does not exist, or lacks a marker.
    """
    if not page.is_file():
        raise ConfigurationError(f"There is no page {page} to write into: name one with the markers of the study.")
    text = page.read_text(encoding="utf-8")
    for name, section in sections.SECTIONS.items():
        opening, closing = f"<!-- {name} -->", f"<!-- /{name} -->"
        start, end = text.find(opening), text.find(closing)
        if not 0 <= start < end:
            raise ConfigurationError(f"{page} has no lines {opening} and {closing}: put them where the table belongs.")
        text = f"{text[:start]}{opening}\n\n{section(rows).strip()}\n\n{text[end:]}"
    place = page.parent / page.stem
    place.mkdir(exist_ok=True)
    for file in files:
        if file.suffix != ".json" and file.parent.resolve() != place.resolve():
            shutil.copyfile(file, place / file.name)
    draft = page.with_suffix(".part")
    draft.write_text(text, encoding="utf-8")
    draft.replace(page)


def _figures(rows: Mapping[str, Sequence[Row]]) -> dict[str, tuple[tuple[float, float], Callable[[Any], None]]]:
    groups = {
        name: list(dict.fromkeys(row["group"] for row in rows[name])) for name in rows if name.startswith("curves")
    }
    by_momentum = groups["curves-linear"][1:]
    return {
        "ratio": ((7.0, 3.6), partial(plots.ratio, rows=tables.ratios())),
        "curves-linear": ((9.0, 6.6), partial(plots.delays, rows=rows["curves-linear"], groups=by_momentum)),
        "curves-plants": (
            (9.0, 6.6), partial(plots.warnings_in_time, rows=rows["curves-plants"], groups=groups["curves-plants"])
        ),
        "estimators": ((9.0, 3.6), partial(plots.estimators, rows=_shortest(rows["estimators"]))),
        "edge": ((9.0, 7.5), partial(plots.edge, rows=rows["edge"])),
    }  # fmt: skip


def _shortest(rows: Sequence[Row]) -> list[Row]:
    least = min(row["steps"] for row in rows)
    return [row for row in rows if row["steps"] == least]


def _rounded(value: Any) -> Any:
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) and math.isfinite(value) else value


def _plain(rows: Sequence[Row]) -> list[Row]:
    return [{k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()} for row in rows]
