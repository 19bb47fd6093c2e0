"""The grader's report in a real browser: light, dark, and on a phone."""

from __future__ import annotations

import asyncio
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page

from lab.grade.grade_page import write_report
from lab.grade.grade_result import GradeResult
from tests.fake_engine import serve_app
from tests.lab.conftest import grade_at
from tests.lab.judged import MODEL_FOLDER, Judged, build_judged
from tests.page.conftest import Visitor, shoot

pytestmark = pytest.mark.browser
_QUESTIONS = MODEL_FOLDER.parent / "questions.jsonl"
_SIDEWAYS = "document.documentElement.scrollWidth - innerWidth"
_DARKNESS = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]"


def spoil(answers: list[str], call: int) -> list[str]:
    """Of each call: some exact, some cut short, one empty, two at each other's place."""
    cut = [text if place % 3 else text[: 40 + call] for place, text in enumerate(answers)]
    return ["", cut[2], cut[1], *cut[3:]]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    async def examine() -> GradeResult:
        async with serve_app(build_judged(Judged(model="demo", reply=spoil))) as url:
            return await grade_at(url, _QUESTIONS, "--runs", "3", "--request_chunk_size", "60")

    path = tmp_path_factory.mktemp("report") / "grade.html"
    with ThreadPoolExecutor(1) as thread:  # the browser's driver holds this one's loop
        write_report(thread.submit(lambda: asyncio.run(examine())).result(), path)
    return path


def show(
    visitor: Visitor, report: Path, *, scheme: str = "light", width: int = 1280, **options: Any
) -> Page:
    size = {"width": width, "height": 860}
    url = report.as_uri()
    return visitor.open(url, wait=False, path="", color_scheme=scheme, viewport=size, **options)


@pytest.mark.parametrize(
    ("name", "scheme", "width"),
    [
        ("light", "light", 1280),
        ("dark", "dark", 1280),
        ("phone", "dark", 360),
        ("forced", "dark", 1280),
    ],
)
def test_report_fits_asks_nobody_and_keeps_nobody_out(
    visitor: Visitor, report: Path, name: str, scheme: str, width: int
) -> None:
    forced = "active" if name == "forced" else "none"
    page = show(visitor, report, scheme=scheme, width=width, forced_colors=forced)

    assert visitor.problems == []
    assert visitor.hosts == {""}
    assert page.evaluate(_SIDEWAYS) <= 0
    assert (page.evaluate(_DARKNESS) < 60) == (scheme == "dark")
    for plot in page.locator("figure svg").all():
        box = plot.bounding_box()
        assert box is not None
        assert box["width"] > 250
        assert box["height"] > 60
    shoot(page, f"report-{name}-top")
    page.fill("#filter", "below 0.6")
    for row in page.locator("#answers summary:visible").all()[:3]:
        row.click()
    page.locator("#filter").scroll_into_view_if_needed()
    shoot(page, f"report-{name}-answers")
    page.fill("#filter", "")
    shoot(page, f"report-{name}", whole=True)


def test_report_figures_say_what_they_are(visitor: Visitor, report: Path) -> None:
    page = show(visitor, report)
    tiles = page.locator(".tile").all_inner_texts()

    assert any(re.search(r"time for all answers\s+[\d.]+ s\s", text) for text in tiles), tiles
    assert all(not text.rstrip().endswith(";") for text in tiles)
    assert re.fullmatch(r"course \d\.\d\d · all \d\.\d\d", page.inner_text("#q2 summary i"))


def test_report_filter_finds_words_numbers_and_faults(visitor: Visitor, report: Path) -> None:
    page = show(visitor, report)

    for typed, least, most in (
        ("共享内存", 5, 100),
        ("#17", 1, 1),
        ("empty", 4, 4),
        ("below 0.6", 20, 90),
    ):
        page.fill("#filter", typed)
        shown = page.locator("#answers details:visible").count()
        assert least <= shown <= most, typed
        assert page.inner_text("#count").startswith(f"{shown} answer")
    page.fill("#filter", "")
    assert page.locator("#answers details:visible").count() == 183


def test_report_fault_leads_to_its_answer(visitor: Visitor, report: Path) -> None:
    page = show(visitor, report)
    assert "empty_answers" in page.inner_text(".findings")

    page.click(".findings li:has-text('empty_answers') a")

    answer = page.locator("#q1")
    assert answer.get_attribute("open") is not None
    assert "an empty answer" in answer.inner_text()
