"""The dashboard in a real Chromium: it loads, follows a run, tells the reason of a rollback in two clicks.

Skipped where there is no Chromium, or no playwright to drive it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .test_dashboard import rescued, served, wait_for, written

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine"),
]
__all__ = ["rescued"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


def opened(browser: Any, port: int, **options: Any) -> tuple[Any, list[str]]:
    """The start page, and what its console says."""
    page = browser.new_context(**options).new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(f"http://127.0.0.1:{port}/")
    return page, said


def test_the_reason_of_a_rollback_is_two_clicks_away(browser: Any, rescued: Path) -> None:
    with served(rescued.parent) as (port, made):
        page, said = opened(browser, port)
        page.wait_for_selector("#told .event")
        page.click("#told .event:has-text('Rolled back')")  # the first click is enough
        page.wait_for_selector("#panel .proof[data-fired='true']")
        told = page.inner_text("#panel-body")
        event = next(e for e in made.library.entries()[0].course.events.latest(99) if e.word == "ROLLBACK")
        assert event.text in told
        assert "bit for bit" in told
        page.keyboard.press("Escape")
        page.wait_for_selector("#panel", state="hidden")
        page.keyboard.press("ArrowLeft")  # the last event, from the keyboard
        page.wait_for_selector("#panel-body .lead")
        page.keyboard.press("Escape")
        page.click("#marks .mark.deed >> nth=0")  # and from the time line
        page.wait_for_selector("#panel-body .lead")
        page.keyboard.press("Escape")
        page.keyboard.press("?")
        page.wait_for_selector("#help-panel")
        wait_for(lambda: page.locator("#claims .status").count(), lambda count: count > 5, 60.0)
        assert "No claim of convergence" in page.inner_text("#non-claims")
        assert said == []


def test_the_page_follows_a_run_while_it_is_written(browser: Any, tmp_path: Path) -> None:
    with written(tmp_path / "<img src=x onerror=alert(1)>", 500, 0.02), served(tmp_path) as (port, _):
        page, said = opened(browser, port)
        page.wait_for_selector("#chart-held-out canvas")

        def step() -> int:
            return int(page.inner_text("#figures dd >> nth=0").split()[0].replace(",", ""))

        first = step()
        wait_for(step, lambda now: now > first + 50)
        assert page.inner_text("#activity") == "live"
        wait_for(lambda: page.inner_text("#events-note"), lambda text: text == "Nothing was dropped or undone.")
        page.check("#all-events")
        wait_for(lambda: page.locator("#events .w-SUSPECT").count(), bool)
        wait_for(lambda: page.locator("#layers table tr").count(), lambda rows: rows == 1)
        assert "<img src=x" in page.inner_text("#facts")  # text, not markup
        assert page.locator("img").count() == 0
        assert said == []


@pytest.mark.parametrize(("scheme", "width"), [("light", 1400), ("dark", 1400), ("light", 400)])
def test_nothing_is_cut_off(browser: Any, rescued: Path, scheme: str, width: int) -> None:
    size = {"width": width, "height": 900}
    with served(rescued.parent) as (port, _):
        page, said = opened(browser, port, viewport=size, color_scheme=scheme, reduced_motion="reduce")
        page.wait_for_selector("#told .event")
        wait_for(lambda: page.locator(".plot canvas").count(), lambda count: count >= 5)
        assert page.evaluate("document.documentElement.dataset.theme") == scheme
        assert page.evaluate("document.documentElement.scrollWidth") == width
        beyond = page.evaluate(
            "[...document.querySelectorAll('main *')].filter((e) => e.getClientRects().length && "
            "e.getBoundingClientRect().right > innerWidth + 1 && !e.closest('.layers')).map((e) => e.className)"
        )
        assert beyond == []
        page.keyboard.press("t")
        assert page.evaluate("document.documentElement.dataset.theme") != scheme
        assert len(page.screenshot()) > 10_000
        assert said == []
