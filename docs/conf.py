"""Sphinx configuration; `make docs` builds with warnings as errors."""

from __future__ import annotations

import os
import re
import sys
from importlib.metadata import version as installed
from pathlib import Path

from sphinx.application import Sphinx

os.environ.setdefault("OMP_NUM_THREADS", "1")  # autodoc imports torch; the build shall not take the whole machine

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "kalmanguard"
author = "The kalmanguard developers"
copyright = author
release = version = installed("kalmanguard")

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "myst_parser",
    "tutorials",
]
exclude_patterns = ["_build", "_ext", "_templates", "_api/settings_table.md"]
templates_path = ["_templates"]
default_role = "code"
nitpicky = False
suppress_warnings = ["ref.python"]  # attributes of one name in several classes: a plain word is no cross-reference

html_theme = "furo"
html_title = f"kalmanguard {release}"
pygments_dark_style = "github-dark"
html_static_path = ["_static"]
html_css_files = ["pages.css"]

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autosummary_generate = True
autosummary_ignore_module_all = False
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "undoc-members": True}
napoleon_google_docstring = False
napoleon_numpy_docstring = True
napoleon_use_ivar = True
napoleon_use_rtype = False


def write_settings_table(app: Sphinx) -> None:
    """Write the table of settings from the code, so that the page cannot differ from it."""
    from kalmanguard.settings import PRESETS, Settings

    others = [name for name in PRESETS if name != "balanced"]
    lines = [f"| setting | {' | '.join(['balanced', *others])} | meaning |", f"|---|{'---|' * len(PRESETS)}---|"]
    for name, field in Settings.model_fields.items():
        default = field.get_default(call_default_factory=True)
        if isinstance(default, frozenset):
            default = sorted(default)
        values = [f"`{default!r}`", *(f"`{PRESETS[p][name]!r}`" if name in PRESETS[p] else "" for p in others)]
        lines.append(f"| `{name}` | {' | '.join(values)} | {field.description} |")
    target = Path(app.srcdir) / "_api" / "settings_table.md"
    target.parent.mkdir(exist_ok=True)
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")


def tidy_docstring(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Make ``literal``s end where they end, and drop the "Alias for field number 0" that named tuples bring along."""
    if lines and lines[0].startswith("Alias for field number"):
        lines.clear()
    lines[:] = [re.sub(r"(?<!`)(``[^`]+``)(?=\w)", r"\1\\ ", line) for line in lines]


def setup(app: Sphinx) -> None:
    app.connect("builder-inited", write_settings_table, priority=1)
    app.connect("autodoc-process-docstring", tidy_docstring)
