"""The report: one file, nothing from outside, every text shown as a text."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

from lab.grade.grade_page import render
from lab.reports.plots import (
    CallBar,
    NamedBar,
    PlotSeries,
    draw_bars,
    draw_call_bars,
    draw_histogram,
)
from tests.lab.conftest import Examine
from tests.lab.judged import Judged

HOSTILE = "<script>alert(1)</script> & \"'"


class Page(HTMLParser):
    """Whatever a browser would fetch, run or leave open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.scripts = 0
        self.open: list[str] = []
        self.text: list[str] = []
        self.ids: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.links += [v for k, v in values.items() if k in ("src", "href", "action") and v]
        self.scripts += tag == "script"
        self.ids.add(values.get("id") or "")
        if tag not in ("meta", "link", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """An element of SVG that closes itself."""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def svgs(text: str) -> list[ET.Element]:
    return [ET.fromstring(one) for one in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]  # noqa: S314


@pytest.fixture
async def page(examine: Examine) -> str:
    def spoil(answers: list[str], call: int) -> list[str]:
        return [answers[1], "", HOSTILE, *answers[3:]] if call else answers

    return render(await examine(Judged(reply=spoil), "--runs", "2"))


async def test_report_asks_nobody_for_anything(page: str) -> None:
    links = [link for link in Page(page).links if not link.startswith("#")]

    assert links == ["data:,"]
    assert "default-src 'none'" in page
    assert not re.search(r"url\(|@import|https?://(?!127\.0\.0\.1)", page)


async def test_report_is_well_formed_and_its_jumps_lead_somewhere(page: str) -> None:
    read = Page(page)

    assert read.open == []
    assert {link[1:] for link in read.links if link.startswith("#")} <= read.ids
    assert len(svgs(page)) == 4


async def test_report_shows_answers_as_text(page: str) -> None:
    read = Page(page)

    assert read.scripts == 1
    assert "alert(1)" in "".join(read.text)
    assert "<script>alert" not in page


async def test_report_names_the_faults_and_shows_the_worst_first(page: str) -> None:
    text = "".join(Page(page).text)

    assert "1 fault found" in text
    assert "empty_answers" in text
    worst = text.index("Worst answers")
    assert text.index("an empty answer", worst) < text.index("All answers")


async def test_report_marks_chinese_as_chinese(page: str) -> None:
    assert 'lang="zh-Hans">CUDA' in page


async def test_report_of_a_server_that_said_nothing_is_drawn(examine: Examine) -> None:
    grade = await examine(Judged(body=lambda _: b"{}"))

    assert len(svgs(render(grade))) == 4


@pytest.mark.parametrize("values", [[], [0.0], [0.5] * 1000, [0.0, 1.0, 3.0]])
def test_histogram_counts_every_value_once(values: list[float]) -> None:
    drawn = draw_histogram([PlotSeries("one", values, "a")], x_label="x", x_max=1.0, bins=10)

    titles = re.findall(r"<title>one: (\d+) between", drawn)
    assert sum(map(int, titles)) == len(values)
    assert svgs(drawn)


def test_bars_are_as_long_as_their_figures() -> None:
    drawn = draw_bars([NamedBar("a", 100, "a"), NamedBar("b", 25, "b")], unit="/s", label="speed")

    long, short = (float(rect.get("width", 0)) for rect in svgs(drawn)[0].iter("rect"))
    assert long == pytest.approx(4 * short, rel=0.01)


def test_spans_at_the_same_time_lie_in_different_lanes() -> None:
    spans = [
        CallBar(0, 0, 2, "a", "one"),
        CallBar(0, 1, 3, "a", "two"),
        CallBar(0, 2.5, 3, "a", "three"),
    ]

    rects = list(svgs(draw_call_bars(spans, groups=1, x_label="s", limit=None))[0].iter("rect"))
    tops = [rect.get("y") for rect in rects]
    assert tops[0] == tops[2] != tops[1]


@pytest.mark.parametrize(("limit", "shown"), [(3.5, True), (360.0, False)])
def test_limit_is_drawn_when_it_was_near(limit: float, shown: bool) -> None:
    drawn = draw_call_bars([CallBar(0, 0, 3, "a", "one")], groups=1, x_label="s", limit=limit)

    assert (">limit<" in drawn) == shown
