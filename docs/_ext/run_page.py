"""Run the Python blocks of one page in one namespace: ``run_page.py PAGE FOLDER``.

Writes ``result.json`` and the figures into the folder. The working directory is empty but for ``examples``, as a reader
has it who works in a checkout.
"""

from __future__ import annotations

import io
import json
import os
import sys
import tempfile
import time
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from page_blocks import blocks


def main(page: Path, folder: Path) -> None:
    """Run ``page``, and leave what it prints and draws in ``folder``."""
    started = time.perf_counter()
    warnings.simplefilter("error")
    # What libraries warn about among themselves is not the reader's business.
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    plt.rcParams |= {"figure.figsize": (8, 3.6), "figure.constrained_layout.use": True, "svg.fonttype": "path"}
    plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": page.stem}
    namespace: dict[str, Any] = {"__name__": "__main__"}
    outputs = []
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "examples").symlink_to(page.parents[2] / "examples")
        os.chdir(place)
        for number, block in enumerate(blocks(page.read_text(encoding="utf-8")), 1):
            with redirect_stdout(io.StringIO()) as printed:
                exec(compile(block, f"{page.name}, block {number}", "exec"), namespace)
            # Where the run lay on the machine that built the page is nobody's business.
            text = printed.getvalue().replace(f"{place}/", "").replace(tempfile.gettempdir(), "/tmp")
            outputs.append({"text": text, "figures": figures(folder, number, namespace)})
        namespace.clear()  # what is still open in the folder is closed before it goes
        os.chdir("/")
    result = {"outputs": outputs, "seconds": time.perf_counter() - started}
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


def figures(folder: Path, block: int, namespace: dict[str, Any]) -> list[dict[str, str]]:
    """Save the figures of a block; the title of a figure is its alternative text.

    They are those of pyplot, which are closed, and one under the name ``figure``, which is taken away.
    """
    found = []
    drawn = [plt.figure(number) for number in plt.get_fignums()]
    last = namespace.pop("figure", None)
    for number, figure in enumerate(drawn if last is None or last in drawn else [*drawn, last], 1):
        titles = [axes.get_title(loc) for axes in figure.axes for loc in ("left", "center", "right")]
        title = next(filter(None, [figure.get_suptitle(), *titles]), None)
        if title is None:
            raise ValueError(f"A figure of block {block} has no title, which is its alternative text: give it one.")
        name = f"block-{block}-{number}.svg"
        figure.savefig(folder / name, metadata={"Date": None})
        found.append({"file": name, "alt": title})
        plt.close(figure)
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())
