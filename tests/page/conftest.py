"""A real browser before a real gateway: what each page test has, and what each must not do.

Plain `pytest` leaves these tests out: `make page-test`. Without a browser they are skipped, with
the reason, and never counted as passed.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import queue
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright

from tests.fake_engine import Behaviour
from tests.gateway.conftest import Served, serve_gateway
from tests.patience import PROGRAM_S

ROOT = Path(__file__).parent.parent.parent
SHOTS = ROOT / "out" / "page"
LONGEST_START_MS = 300_000
PATIENCE_MS = 60_000  # a page is as slow as the machine is busy
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# The browser notes every answer above 399 by itself; a test that provokes one says so.
_BROWSERS_NOTE = "Failed to load resource"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "browser" in config.option.markexpr:
        return
    left_out = [item for item in items if item.get_closest_marker("browser")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@contextlib.contextmanager
def open_chromium() -> Iterator[Browser]:
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip("no chromium here: `scripts/system.sh browser` installs it")
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    with open_chromium() as browser:
        yield browser


@dataclass
class Visitor:
    """Opens pages and remembers everything that a good page does not do."""

    browser: Browser
    problems: list[str] = field(default_factory=list)
    own_hosts: set[str] = field(default_factory=set)
    hosts: set[str] = field(default_factory=set)
    may_fail: bool = False
    _close: list[Callable[[], None]] = field(default_factory=list)

    def open(self, url: str, *, wait: bool = True, path: str = "/ui", **options: Any) -> Page:
        defaults = {"viewport": {"width": 1280, "height": 860}, "locale": "en-GB"}
        context = self.browser.new_context(**(defaults | options))
        self._close.append(context.close)
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.on("console", self._note)
        page.on("pageerror", lambda error: self.problems.append(f"exception: {error}"))
        page.on("request", lambda request: self.hosts.add(urlsplit(request.url).netloc))
        self.own_hosts.add(urlsplit(url).netloc)
        page.goto(url + path)
        if wait:
            page.wait_for_selector("#pill[data-state=ready]", timeout=LONGEST_START_MS)
        return page

    def leave(self) -> None:
        """Closes the pages and tells what they did wrong, whatever the test was about."""
        for close in self._close:
            close()
        assert self.problems == []
        assert self.hosts <= self.own_hosts | {""}, "a request to another host"

    def _note(self, message: ConsoleMessage) -> None:
        if message.type not in {"error", "warning"}:
            return
        if _BROWSERS_NOTE in message.text and (self.may_fail or _is_gone(message)):
            return
        self.problems.append(f"{message.type}: {message.text}")


def _is_gone(message: ConsoleMessage) -> bool:
    """A page looks on until it is closed, which is a moment after its gateway's end."""
    address = urlsplit(message.location["url"])
    try:
        socket.create_connection((address.hostname or "", address.port or 80), timeout=1).close()
    except OSError:
        return "net::ERR_" in message.text
    return False


@pytest.fixture
def visitor(chromium: Browser) -> Iterator[Visitor]:
    visitor = Visitor(chromium)
    yield visitor
    visitor.leave()


@contextlib.contextmanager
def running_gateway(
    engine: Behaviour | None = None, *others: Behaviour, **settings: Any
) -> Iterator[Served]:
    """A gateway and a stand-in engine in a thread: the browser's driver needs this one's loop."""
    answers: queue.SimpleQueue[tuple[Served, Callable[[], None]] | BaseException] = (
        queue.SimpleQueue()
    )

    async def serve() -> None:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        try:
            async with serve_gateway(engine, *others, **settings) as served:
                answers.put((served, lambda: _call(loop, stop.set)))
                await stop.wait()
        except BaseException as error:
            answers.put(error)
            raise

    thread = threading.Thread(target=asyncio.run, args=(serve(),), daemon=True)
    thread.start()
    answer = answers.get(timeout=PROGRAM_S)
    if isinstance(answer, BaseException):
        raise answer
    served, stop = answer
    try:
        yield served
    finally:
        stop()
        thread.join(timeout=PROGRAM_S)


def _call(loop: asyncio.AbstractEventLoop, act: Callable[[], object]) -> None:
    loop.call_soon_threadsafe(act)


def shoot(page: Page, name: str, *, whole: bool = False) -> None:
    """A screenshot for people to look at, of a state that keeps nobody from reading it."""
    SHOTS.mkdir(parents=True, exist_ok=True)
    size = page.viewport_size or {"width": 1280, "height": 860}
    if whole:  # in a window as high as it is, for what sticks to the window's edge
        height = page.evaluate("document.documentElement.scrollHeight")
        page.set_viewport_size({"width": size["width"], "height": max(height, size["height"])})
    page.screenshot(path=SHOTS / f"{name}.png", full_page=whole, animations="disabled")
    page.set_viewport_size(size)
    assert find_barriers(page) == [], name


@functools.cache
def _read_axe() -> str:
    return (files("axe_playwright_python") / "axe.min.js").read_text(encoding="utf-8")


def find_barriers(page: Page) -> list[str]:
    """What axe finds wrong with a page as it is now: the rule, and where."""
    if not page.evaluate("'axe' in window"):
        page.evaluate(_read_axe())
    found = page.evaluate("axe.run(document, { resultTypes: ['violations'] })")
    return [
        f"{rule['id']}: {node['html'][:160]} | {node['failureSummary']}"
        for rule in found["violations"]
        for node in rule["nodes"]
    ]


def width_of(page: Page) -> int:
    """Wider than its window, a page scrolls sideways."""
    return int(page.evaluate("document.documentElement.scrollWidth"))


def pick(page: Page, *, language: str, theme: str) -> None:
    page.select_option("#language", language)
    page.select_option("#theme", theme)
