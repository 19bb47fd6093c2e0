"""The grader's report in a real browser: light, dark, and on a phone."""

from __future__ import annotations

import asyncio
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page

from lab.course.sweep_result import SweepArm, SweepResult, SweptArm
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


def grade(judged: Judged, path: Path, *options: str) -> Path:
    async def examine() -> GradeResult:
        async with serve_app(build_judged(judged)) as url:
            return await grade_at(url, _QUESTIONS, *options)

    with ThreadPoolExecutor(1) as thread:  # the browser's driver holds this one's loop
        write_report(thread.submit(lambda: asyncio.run(examine())).result(), path)
    return path


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    judged = Judged(model="demo", reply=spoil)
    path = tmp_path_factory.mktemp("report") / "grade.html"
    return grade(judged, path, "--runs", "3", "--request_chunk_size", "60")


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


def test_report_of_a_grade_without_faults_keeps_nobody_out(
    visitor: Visitor, tmp_path: Path
) -> None:
    path = grade(Judged(model="demo"), tmp_path / "grade.html", "--count", "12")
    page = show(visitor, path)

    assert page.locator(".findings").count() == 0
    shoot(page, "report-clean", whole=True)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a sweep in which some ways of asking work and one does not."""
    result = SweepResult("a model, and questions")
    for place, style in enumerate(("qa", "chatml", "raw")):
        arm = SweepArm(style, "one-line" if place else "", 256, single_line=place == 1)
        score = 0.31 - place / 20
        result.add(SweptArm(arm, score, score + 0.1, 2.5 + place, 900.0, 358, 358))
    without = "prompt_style chat: /models/my-ft has no chat template; set GATEWAY_PROMPT_STYLE"
    result.add(SweptArm(SweepArm("chat", "", 256, single_line=False), failure=without))
    path = tmp_path_factory.mktemp("sweep") / "sweep.json"
    result.write(path)
    return path.with_suffix(".html")


@pytest.mark.parametrize(
    ("name", "scheme", "width"),
    [
        ("light", "light", 1280),
        ("dark", "dark", 1280),
        ("phone", "light", 360),
        ("forced", "dark", 1280),
    ],
)
def test_sweeps_report_fits_asks_nobody_and_keeps_nobody_out(
    visitor: Visitor, swept: Path, name: str, scheme: str, width: int
) -> None:
    forced = "active" if name == "forced" else "none"
    page = show(visitor, swept, scheme=scheme, width=width, forced_colors=forced)

    assert visitor.hosts == {""}
    assert page.evaluate(_SIDEWAYS) <= 0
    assert (page.evaluate(_DARKNESS) < 60) == (scheme == "dark")
    assert "qa, system none, 256 tokens" in page.inner_text("h1")
    assert "has no chat template" in page.inner_text("table")
    boxes = [one.bounding_box() for one in page.locator("figure svg text").all()]
    for left, right in zip(boxes[::2], boxes[1::2], strict=True):  # a way's name, and its figures
        assert left is not None
        assert right is not None
        assert left["x"] + left["width"] < right["x"]
    shoot(page, f"sweep-{name}", whole=True)


def test_sweeps_report_without_a_way_that_works_keeps_nobody_out(
    visitor: Visitor, tmp_path: Path
) -> None:
    result = SweepResult("a model, and questions")
    result.add(SweptArm(SweepArm("chat", "", 256, single_line=False), failure="no chat template"))
    result.write(tmp_path / "sweep.json")
    page = show(visitor, tmp_path / "sweep.html")

    assert "nothing works yet" in page.inner_text("h1")
    shoot(page, "sweep-nothing", whole=True)


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
