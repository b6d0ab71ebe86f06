"""Run the tutorials when the documentation is built, and put their real output below each block.

Every page of ``docs/tutorials`` is run by `run_page.py` in a process and an empty folder of its own. A page whose text
and whose package are as before is not run again. An exception in a block fails the build.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from page_blocks import BLOCK
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.errors import ExtensionError
from sphinx.util import logging

FOLDER = "tutorials"
#: Pages that run at the same time.
PROCESSES = 2
_RUNNER = Path(__file__).with_name("run_page.py")
_LOGGER = logging.getLogger(__name__)


def sources(root: Path) -> str:
    """Digest of everything that a tutorial may run: the package, the plants, the examples, and the runner."""
    digest = hashlib.sha256()
    folders = [root / "kalmanguard", root / "models", root / "examples"]
    files = [path for folder in folders for path in folder.rglob("*.py") if "__pycache__" not in path.parts]
    for path in sorted([*files, *Path(__file__).parent.glob("*.py")]):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def run(page: Path, cache: Path, package: str) -> list[dict[str, Any]]:
    """Output and figures of every block of ``page``, from ``cache`` where neither it nor the package has changed.

    Raises
    ------
    ExtensionError
        A block raised; the message holds the traceback.
    """
    key = hashlib.sha256(page.read_bytes() + package.encode()).hexdigest()
    record = cache / "outputs.json"
    if record.exists():
        known = json.loads(record.read_text(encoding="utf-8"))
        if known["key"] == key:
            return list(known["outputs"])
    shutil.rmtree(cache, ignore_errors=True)
    cache.mkdir(parents=True)
    root = page.parents[2]
    # Buffered, so that a line of one process is written at once and not mixed with another's.
    buffered = {"PYTHONUNBUFFERED": ""}
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"} | buffered
    done = subprocess.run(
        [sys.executable, str(_RUNNER), str(page), str(cache)],
        env=environment, text=True, capture_output=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise ExtensionError(f"The tutorial {page.name} does not run.\n{done.stdout}\n{done.stderr}")
    result = json.loads((cache / "result.json").read_text(encoding="utf-8"))
    record.write_text(json.dumps({"key": key, "outputs": result["outputs"]}), encoding="utf-8")
    _LOGGER.info("ran %s in %.1f s", page.name, result["seconds"])
    return list(result["outputs"])


def shown(text: str, outputs: list[dict[str, Any]], images: str) -> str:
    """The page with what each block has printed and drawn below it."""
    left = iter(outputs)

    def with_output(block: re.Match[str]) -> str:
        output = next(left)
        parts = [block.group()]
        if output["text"]:
            parts.append(f"````{{code-block}} text\n:class: output\n\n{output['text'].rstrip()}\n````")
        parts += [
            f"```{{image}} {images}/{f['file']}\n:alt: {f['alt']}\n:class: figure\n```" for f in output["figures"]
        ]
        return "\n\n".join(parts)

    return BLOCK.sub(with_output, text)


def run_all(app: Sphinx) -> None:
    """Run what must be run, before anything is read."""
    source = Path(app.srcdir)
    package = sources(source.parent)
    pages = sorted((source / FOLDER).glob("*.md"))
    with ThreadPoolExecutor(PROCESSES) as pool:
        results = pool.map(lambda page: run(page, source / "_build" / FOLDER / page.stem, package), pages)
        app.tutorial_outputs = {f"{FOLDER}/{page.stem}": found for page, found in zip(pages, results, strict=True)}  # type: ignore[attr-defined]


def insert(app: Sphinx, name: str, content: list[str]) -> None:
    """Add the outputs to the source of a tutorial as Sphinx reads it."""
    outputs = app.tutorial_outputs.get(name)  # type: ignore[attr-defined]
    if outputs is not None:
        images = "/".join([*[".."] * name.count("/"), "_build", name])
        content[0] = shown(content[0], outputs, images)


def outdated(app: Sphinx, env: BuildEnvironment, added: set[str], changed: set[str], removed: set[str]) -> list[str]:
    """Have the tutorials read again: their outputs may be new where their text is not."""
    return [name for name in app.tutorial_outputs if name not in removed]  # type: ignore[attr-defined]


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect the extension."""
    app.connect("builder-inited", run_all)
    app.connect("source-read", insert)
    app.connect("env-get-outdated", outdated)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
