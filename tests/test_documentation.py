"""The Python that the documentation shows is run, and what it points at exists.

The tutorials are run by the build of the documentation (``docs/_ext``); of them only the runner is tested here.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [
    *("README.md", "CONTRIBUTING.md"),
    *sorted(str(page.relative_to(ROOT)) for page in DOCS.rglob("*.md") if not {"_build", "_api"} & set(page.parts)),
]
#: Pages of which every block runs.
RUNNABLE = (
    *("calibration", "decisions", "dynamics", "estimation", "forensics", "offline", "plants", "predictor", "spectrum"),
    *("stress", "testing", "trajectories", "troubleshooting"),
    *sorted(f"howto/{page.stem}" for page in (DOCS / "howto").glob("*.md")),
)
#: Pages with a test of their own, here or beside the tests of what they are about.
OTHERS = ("quickstart", "diagnostics", "distributed", "integrations", "sharded_checkpoints", "research/damping")
#: What they include is a page of the repository itself.
INCLUDING = ("docs/changelog.md", "docs/contributing.md")


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_examples_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = blocks(page)
    assert found
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for number, block in enumerate(found, 1):
        exec(compile(block, f"{page}, block {number}", "exec"), namespace)
    assert namespace["decision"].step == sum(1 for _ in namespace["train_loader"]) * (20 if "quickstart" in page else 1)


def test_the_page_on_diagnostics_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for number, block in enumerate(blocks("docs/diagnostics.md"), 1):
        exec(compile(block, f"docs/diagnostics.md, block {number}", "exec"), namespace)
    quality = namespace["quality"]
    assert 0.8 < quality.score < 0.95
    assert sum(suspect < 50 for suspect in quality.suspects) > 40
    assert namespace["found"].ratio < 1.0
    assert (tmp_path / "landscape.png").exists()


@pytest.mark.parametrize("page", RUNNABLE)
def test_every_block_of_the_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    found = blocks(f"docs/{page}.md")
    assert found
    for number, block in enumerate(found, 1):
        exec(compile(block, f"docs/{page}.md, block {number}", "exec"), namespace)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of transformers and accelerate themselves
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_page_on_integrations_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for number, block in enumerate(blocks("docs/integrations.md"), 1):
        exec(compile(block, f"docs/integrations.md, block {number}", "exec"), namespace)
    assert len(namespace["guard"].decisions) == 40
    assert not any(claim.status == "FAILED" for claim in namespace["guard"].certificate.claims)
    assert (tmp_path / "out" / "checkpoint-20" / "kalmanguard.json").exists()
    assert namespace["decision"].step == 10


def test_the_page_on_several_processes_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for number, block in enumerate(blocks("docs/distributed.md"), 1):
        exec(compile(block, f"docs/distributed.md, block {number}", "exec"), namespace)
    assert namespace["lives"] == [None, 30]


def test_no_block_is_left_out() -> None:
    with_blocks = {page.removeprefix("docs/").removesuffix(".md") for page in PAGES if blocks(page)}
    tutorials = {name for name in with_blocks if name.startswith("tutorials/")}
    assert with_blocks - tutorials - {"README"} == {*RUNNABLE, *OTHERS}


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs/") and page not in INCLUDING])
def test_a_page_says_first_whom_it_is_for(page: str) -> None:
    title, first = (ROOT / page).read_text(encoding="utf-8").split("\n\n")[:2]
    assert title.startswith("# ")
    assert first.startswith(("For those ", "For everybody "))


@pytest.mark.parametrize("page", PAGES)
def test_every_picture_has_an_alternative_text(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert re.findall(r"!\[\s*\]", text) == []
    assert all(":alt: " in block for block in re.findall(r"^```\{(?:image|figure)\}.*?^```", text, re.M | re.S))


def test_the_tutorials_are_numbered_and_lead_on() -> None:
    pages = sorted((DOCS / "tutorials").glob("*.md"))
    assert [page.name.split("-")[0] for page in pages] == [str(n) for n in range(1, len(pages) + 1)]
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert text.startswith(f"# {page.name.split('-')[0]}. ")
        assert "\n## What to read next\n" in text


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("sphinx")
    monkeypatch.syspath_prepend(DOCS / "_ext")
    import tutorials

    yield tutorials
    sys.modules.pop("tutorials")


TUTORIAL = """# 1. A page

```python
import matplotlib.pyplot as plt

a = 6
figure, axes = plt.subplots()
axes.set_title("A line", loc="left")
```

Then:

```python
print(7 * a)
```
"""


def test_a_tutorial_is_run_in_one_namespace_and_kept(runner: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "docs" / "tutorials" / "1-page.md"
    page.parent.mkdir(parents=True)
    page.write_text(TUTORIAL, encoding="utf-8")
    cache = tmp_path / "cache"
    outputs = runner.run(page, cache, "package")
    assert [output["text"] for output in outputs] == ["", "42\n"]
    assert outputs[0]["figures"] == [{"file": "block-1-1.svg", "alt": "A line"}]
    drawn = cache / "block-1-1.svg"
    assert "<svg" in drawn.read_text(encoding="utf-8")
    assert ":alt: A line" in runner.shown(TUTORIAL, outputs, "images")

    drawn.unlink()
    assert runner.run(page, cache, "package") == outputs
    assert not drawn.exists()  # as before: nothing was run
    runner.run(page, cache, "another package")
    assert drawn.exists()

    page.write_text(TUTORIAL.replace("7 * a", "7 / 0"), encoding="utf-8")
    with pytest.raises(runner.ExtensionError, match="ZeroDivisionError"):
        runner.run(page, cache, "package")


@pytest.mark.parametrize("page", PAGES)
def test_links_between_pages_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    missing = [target for target in targets if not ((ROOT / page).parent / target).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_exist(page: str) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    text = (ROOT / page).read_text(encoding="utf-8")
    commands = re.findall(r"`make ([a-z ]+)`|^make ([a-z ]+)", text, re.MULTILINE)
    named = {word for pair in commands for word in " ".join(pair).split()}
    assert named <= targets
