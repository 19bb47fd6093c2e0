"""Whoever reads the page: axe in every state, forced colours, small windows, the keyboard."""

from __future__ import annotations

import json
from typing import Any

import pytest
from playwright.sync_api import Error, Page, Route, expect

from tests.fake_engine import Behaviour
from tests.gateway.routes.test_page import FIGURES
from tests.page.conftest import Visitor, pick, running_gateway, shoot

pytestmark = pytest.mark.browser

CRASH: dict[str, Any] = {
    "time": "2026-01-02T03:04:05+00:00",
    "reason": "signal",
    "exit_code": None,
    "signal": "SIGKILL",
    "cause": "",
    "uptime_s": 62.5,
    "was_ready": True,
    "restarts": 1,
    "last_lines": [f"INFO line {number}" for number in range(60)],
}
LAUNCHER: dict[str, Any] = {
    "state": "ready",
    "since_s": 4000.0,
    "start_seconds": 20.1,
    "restarts": {"signal": 1},
    "profile": "balanced",
    "model": "Qwen/Qwen2.5-0.5B-Instruct",
    "device": "NVIDIA GeForce RTX 5090",
    "versions": {"vllm": "0.32.0"},
    "progress": {"stage": "loading_weights", "percent": 40, "detail": None},
    "crash": None,
}
STATES: dict[str, tuple[str, str, bool]] = {  # of gateway and launcher, and whether one has crashed
    "ready": ("ready", "ready", False),
    "starting": ("waiting", "starting", False),
    "restarting": ("waiting", "starting", True),
    "waiting": ("waiting", "waiting", True),
    "warming": ("waiting", "warming", False),
    "down": ("waiting", "ready", False),
    "stopped": ("waiting", "stopped", True),
    "stopping": ("stopping", "draining", False),
}


class Teller:
    """Puts a state that things may be in between /ui/status and the page."""

    def __init__(self, page: Page) -> None:
        self._page = page
        self._state = "ready"
        self._crash = CRASH
        page.route("**/ui/status", self._answer)

    def tell(self, state: str, **crash: str) -> None:
        self._state, self._crash = state, CRASH | crash
        self._page.wait_for_selector(f"#pill[data-state={state}]")

    def stop(self) -> None:
        self._page.unroute_all(behavior="wait")

    def _answer(self, route: Route) -> None:
        gateway, launcher, has_crashed = STATES[self._state]
        try:
            status = route.fetch().json()
        except Error:  # the page went away meanwhile
            return
        status["gateway"]["state"] = gateway
        crash = self._crash if has_crashed else None
        status["launchers"] = [LAUNCHER | {"state": launcher, "crash": crash}]
        status["engines"][0]["model"] = LAUNCHER["model"]
        if gateway == "waiting":
            status["engines"][0] |= {"state": "down", "reason": "it does not answer", "load": None}
        route.fulfill(body=json.dumps(status), content_type="application/json")


@pytest.mark.parametrize(
    ("language", "theme", "forced"),
    [("en", "light", "none"), ("zh", "dark", "none"), ("en", "dark", "active")],
)
def test_page_keeps_nobody_out_in_any_state_of_the_engine(
    visitor: Visitor, language: str, theme: str, forced: str
) -> None:
    with running_gateway(Behaviour(metrics=FIGURES)) as served:
        page = visitor.open(served.url, forced_colors=forced, color_scheme=theme)
        pick(page, language=language, theme=theme)
        name = f"{language}-{theme}" if forced == "none" else "forced"
        teller = Teller(page)
        for state in STATES:
            teller.tell(state)
            shoot(page, f"state-{state}-{name}")
        teller.tell("restarting")
        page.click(".crash summary")
        shoot(page, f"crash-{name}", whole=True)
        teller.stop()


@pytest.mark.parametrize(
    ("language", "theme", "forced"),
    [("en", "light", "none"), ("zh", "dark", "none"), ("en", "light", "active")],
)
def test_page_keeps_nobody_out_in_any_state_of_its_work(
    visitor: Visitor, language: str, theme: str, forced: str
) -> None:
    visitor.may_fail = True
    engine = Behaviour(refuses=lambda question: "bad" in question, fails=lambda text: text == "ill")
    name = f"{language}-{theme}" if forced == "none" else "forced"
    with running_gateway(engine) as served:
        page = visitor.open(served.url, forced_colors=forced, color_scheme=theme)
        pick(page, language=language, theme=theme)
        shoot(page, f"work-empty-{name}")
        page.click("#ask-form summary")
        for question in ("one", "## Two\n\n- `a`\n\n```\nb\n```\n" + "long " * 90, "ill"):
            page.fill("#question", question)
            page.press("#question", "Enter")
            expect(page.locator("#send")).to_be_enabled()
        expect(page.locator(".turn .error:visible")).to_have_count(1)
        page.click("#anew")
        shoot(page, f"work-asked-{name}", whole=True)
        page.click("#tab-batch")
        page.fill("#paste", '{"question": "')
        expect(page.locator("#found .error")).to_be_visible()
        shoot(page, f"work-bad-input-{name}")
        items = [{"question": "one", "answer": "answer:one"}, {"question": "bad", "answer": "x"}]
        items += [{"question": f"Why {number}?", "answer": "because"} for number in range(30)]
        page.fill("#paste", "\n".join(map(json.dumps, items)))
        expect(page.locator("#run")).to_be_enabled()
        page.click("#batch-form summary")
        shoot(page, f"work-batch-{name}")
        page.click("#run")
        expect(page.locator("#more")).to_be_visible()
        shoot(page, f"work-results-{name}", whole=True)


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("state", ["ready", "restarting", "down"])
def test_live_panel_is_whole_on_a_small_laptop(visitor: Visitor, language: str, state: str) -> None:
    whole = """() => {
      const [side, live] = [document.getElementById("side"), document.getElementById("live")];
      return [side.scrollHeight - side.clientHeight,
        Math.round(live.getBoundingClientRect().bottom) - innerHeight, scrollY];
    }"""
    with running_gateway(Behaviour(metrics=FIGURES)) as served:
        page = visitor.open(served.url, viewport={"width": 1280, "height": 720})
        pick(page, language=language, theme="light")
        teller = Teller(page)
        teller.tell(state)
        expect(page.locator("#live-note")).not_to_be_empty()
        shoot(page, f"small-{state}-{language}")

        hidden, below, scrolled = page.evaluate(whole)
        assert hidden <= 0
        assert below <= 0
        assert scrolled == 0
        teller.stop()


def test_crash_that_comes_keeps_the_keyboards_place(visitor: Visitor) -> None:
    with running_gateway() as served:
        page = visitor.open(served.url)
        teller = Teller(page)
        teller.tell("restarting")
        page.focus(".crash summary")
        page.keyboard.press("Enter")
        teller.tell("stopped", time="2026-01-02T04:04:05+00:00", signal="SIGSEGV")
        expect(page.locator(".crash")).to_contain_text("It was killed by SIGSEGV.")
        assert page.evaluate("document.activeElement.localName") == "summary"
        teller.stop()


def test_forced_colours_leave_what_only_colour_said(visitor: Visitor) -> None:
    """What a background alone would say has a border, or is drawn in the reader's own colours."""
    drawn = """(selector) => {
      const style = getComputedStyle(document.querySelector(selector));
      return [style.backgroundColor, style.borderBottomWidth];
    }"""
    with running_gateway() as served:
        page = visitor.open(served.url, forced_colors="active")
        canvas = page.evaluate("getComputedStyle(document.body).backgroundColor")
        background, _ = page.evaluate(drawn, "#pill .dot")
        assert background != canvas
        assert page.evaluate(drawn, "[aria-selected=true]")[1] == "3px"
        stroke = "getComputedStyle(document.querySelector('.chart .line')).stroke"
        assert page.evaluate(stroke) != canvas
