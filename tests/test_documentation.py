"""The Python that the README and the quick start show is run, and what they point at exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]
#: Pages of which every block runs.
RUNNABLE = (
    *("calibration", "dynamics", "estimation", "forensics", "offline", "plants", "predictor", "spectrum"),
    "trajectories",
)


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
    assert namespace["lives"] == [None, 30]


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
