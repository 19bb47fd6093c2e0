"""The page before the real launcher, vLLM on the CPU and the demo model: one start for all."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

from common.ports import find_free_ports
from tests.page.conftest import LONGEST_START_MS, ROOT, Visitor, pick, shoot, width_of
from tests.patience import PROGRAM_S
from tests.plain_http import NO_TLS

pytestmark = [pytest.mark.browser, pytest.mark.engine, pytest.mark.timeout(600)]

QUESTION = "What is a warp in CUDA?"


@dataclass(frozen=True)
class Stack:
    """A launcher with engine and gateway; its status tells whom to kill."""

    url: str
    status_url: str
    log: Path

    def read_engine(self) -> dict[str, Any]:
        status: dict[str, dict[str, Any]] = httpx.get(
            f"{self.status_url}/status", verify=NO_TLS
        ).json()
        return status["engine"]


@pytest.fixture(scope="module")
def stack(chromium: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Not waited for: the page is there first and shows the start."""
    port, engine_port, status_port = find_free_ports(3)
    folder = tmp_path_factory.mktemp("page")
    command = [sys.executable, "-m", "launcher", "up", "--port", str(port)]
    command += ["--engine-port", str(engine_port), "--status-port", str(status_port)]
    environment = os.environ | {"XDG_STATE_HOME": str(folder)}
    log = folder / "up.log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, env=environment)
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_listening(url, process, log)
            yield Stack(url, f"http://127.0.0.1:{status_port}", log)
        finally:
            process.send_signal(signal.SIGTERM)
            code = process.wait(timeout=PROGRAM_S)
    assert code == 0, log.read_text()[-3000:]


def _wait_listening(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + PROGRAM_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            httpx.get(f"{url}/healthz", verify=NO_TLS)
        except httpx.TransportError:
            time.sleep(0.1)
        else:
            return
    pytest.fail(f"the gateway does not listen:\n{log.read_text()[-3000:]}")


@pytest.fixture(scope="module")
def pairs() -> list[dict[str, str]]:
    lines = (ROOT / "demo" / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def ask(page: Page, question: str) -> None:
    """Greedily: a chat's default is to sample, which now and then ends in other words."""
    page.locator("#ask-temperature").evaluate("(field) => (field.value = '0')")
    page.fill("#question", question)
    page.press("#question", "Enter")


def ask_and_watch(page: Page) -> list[int]:
    """How long the answer was whenever the page had changed."""
    page.evaluate(
        """() => {
          window.lengths = [];
          new MutationObserver(() => {
            const answer = document.querySelector(".turn > .answer");
            if (answer) window.lengths.push(answer.textContent.length);
          }).observe(document.getElementById("turns"), { childList: true, subtree: true });
        }"""
    )
    ask(page, QUESTION)
    expect(page.locator(".turn .figures")).to_contain_text("in all")
    lengths: list[int] = page.evaluate("window.lengths")
    return lengths


def test_page_opened_while_the_engine_loads_follows_it_to_ready(
    stack: Stack, visitor: Visitor
) -> None:
    page = visitor.open(stack.url, wait=False)
    expect(page.locator("#notice-title")).to_have_text("The engine is loading.")
    expect(page.locator("#engine .steps .now")).to_have_count(1)
    ask(page, QUESTION)
    expect(page.locator(".turn .note")).to_contain_text("sent when it is")
    shoot(page, "loading")

    page.wait_for_selector("#pill[data-state=ready]", timeout=LONGEST_START_MS)

    expect(page.locator("#notice")).to_be_hidden()
    expect(page.locator(".turn > .answer")).to_contain_text("32 threads")
    expect(page.locator("#engine .facts")).to_contain_text("demo")


def test_question_streams_and_its_speed_is_shown(
    stack: Stack, visitor: Visitor, pairs: list[dict[str, str]]
) -> None:
    lengths: list[int] = []
    for _ in range(5):  # a browser that gets no core draws several tokens at once, or all of them
        page = visitor.open(stack.url)
        lengths = ask_and_watch(page)
        if len(set(lengths)) > 5:
            break

    answer = next(pair["answer"] for pair in pairs if pair["question"] == QUESTION)
    assert page.locator(".turn > .answer").inner_text() == answer
    assert len(set(lengths)) > 5, "it came in one piece"
    assert lengths == sorted(lengths)
    figures = page.locator(".turn .figures").inner_text()
    for part in ("first token", "tokens/s", "ms"):
        assert part in figures
    shoot(page, "answer")


def test_batch_of_50_in_one_call_is_answered_and_downloaded(
    stack: Stack, visitor: Visitor, pairs: list[dict[str, str]]
) -> None:
    page = visitor.open(stack.url)
    calls: list[str] = []
    page.on("request", lambda request: calls.append(request.url.removeprefix(stack.url)))
    page.click("#tab-batch")
    page.fill("#paste", "\n".join(json.dumps(pair, ensure_ascii=False) for pair in pairs[:50]))
    expect(page.locator("#found")).to_contain_text("50 questions found (JSONL)")
    expect(page.locator("#found")).to_contain_text("50 with a reference answer")
    shoot(page, "batch-form")

    page.click("#run")
    expect(page.locator("#run-title")).to_have_text("50 questions answered")

    expect(page.locator("#run-facts")).to_contain_text("50 of 50")
    expect(page.locator("#run-facts")).to_contain_text("Tokens/s")
    assert calls.count("/predict") == 1
    expect(page.locator(".result")).to_have_count(25)
    shoot(page, "batch-done")
    page.click("#more")
    expect(page.locator(".result")).to_have_count(50)
    expected = [(pair["question"], pair["answer"]) for pair in pairs[:50]]
    for kind, read in (("json", _read_json), ("jsonl", _read_jsonl), ("csv", _read_csv)):
        with page.expect_download() as download:
            page.click(f"#downloads [data-format={kind}]")
        assert download.value.suggested_filename.endswith(f".{kind}")
        assert read(download.value.path().read_bytes()) == expected


def _read_json(data: bytes) -> list[tuple[str, str]]:
    run = json.loads(data)
    assert run["model"] == "demo"
    assert run["seconds"] > 0
    return [(row["question"], row["answer"]) for row in run["results"]]


def _read_jsonl(data: bytes) -> list[tuple[str, str]]:
    rows = map(json.loads, data.decode().splitlines())
    return [(row["question"], row["answer"]) for row in rows]


def _read_csv(data: bytes) -> list[tuple[str, str]]:
    rows = csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""))
    return [(row["question"], row["answer"]) for row in rows]


def test_batch_in_pieces_shows_true_progress(
    stack: Stack, visitor: Visitor, pairs: list[dict[str, str]]
) -> None:
    page = visitor.open(stack.url)
    calls: list[str] = []
    page.on("request", lambda request: calls.append(request.url.removeprefix(stack.url)))
    page.click("#tab-batch")
    page.fill("#paste", "\n".join(pair["question"] for pair in pairs[:50]))
    page.fill("#piece", "5")
    page.click("#run")

    expect(page.locator("#run-detail")).to_contain_text("of 50 answered")
    expect(page.locator(".result").first).to_be_visible()
    shoot(page, "batch-pieces")
    expect(page.locator("#run-title")).to_have_text("50 questions answered")

    assert calls.count("/predict") == 10


def test_batch_in_one_call_shows_the_engines_count(
    stack: Stack, visitor: Visitor, pairs: list[dict[str, str]]
) -> None:
    page = visitor.open(stack.url)
    page.click("#tab-batch")
    questions = [f"{pair['question']} ({turn})" for turn in range(6) for pair in pairs]
    page.fill("#paste", "\n".join(questions))
    page.click("#run")

    expect(page.locator("#run-detail")).to_contain_text("by the engine's own count")
    expect(page.locator("#run-bar")).to_have_class("bar estimate")
    expect(page.locator("#run-bar")).to_have_attribute("aria-valuenow", re.compile(r"^[1-9]\d?$"))
    shoot(page, "batch-estimate")
    page.click("#batch-stop")
    expect(page.locator("#run-title")).to_have_text("Stopped: 0 of 1,098 answered")


def test_figures_and_charts_show_the_work(stack: Stack, visitor: Visitor) -> None:
    page = visitor.open(stack.url)
    for _ in range(3):
        ask(page, QUESTION)
        expect(page.locator(".turn .figures").last).to_contain_text("in all")
        page.wait_for_timeout(1100)  # a reading is a second old at most

    expect(page.locator("[data-tile=first] .value")).to_have_text(re.compile(r"^[\d.,]+\s(ms|s)$"))
    for tile in ("rate", "running", "waiting", "kv", "first"):
        chart = page.locator(f"[data-tile={tile}] svg")
        assert "highest" in str(chart.get_attribute("aria-label")), tile
        assert str(chart.locator(".line").get_attribute("d")).startswith("M"), tile
    label = str(page.locator("[data-tile=rate] svg").get_attribute("aria-label"))
    assert "highest 0 " not in label


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("language", ["en", "zh"])
def test_page_fits_desktop_and_phone_in_both_languages(
    stack: Stack, visitor: Visitor, language: str, theme: str
) -> None:
    page = visitor.open(stack.url)
    pick(page, language=language, theme=theme)
    ask(page, QUESTION)
    page.wait_for_selector(".turn:not([aria-busy]) .figures")
    for width, height, name in ((1280, 860, "desktop"), (360, 740, "phone")):
        page.set_viewport_size({"width": width, "height": height})
        for tab in ("batch", "ask"):
            page.click(f"#tab-{tab}")
            assert width_of(page) <= width, f"{tab} at {width}"
            shoot(page, f"{name}-{language}-{theme}-{tab}", whole=name == "phone")

    assert page.get_attribute("html", "lang") == {"en": "en", "zh": "zh-CN"}[language]
    assert page.get_attribute("html", "data-theme") == theme


def test_keyboard_alone_asks_and_runs_a_batch(stack: Stack, visitor: Visitor) -> None:
    page = visitor.open(stack.url)
    focused = "document.activeElement.id"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate(focused) == "tab-ask"
    page.keyboard.press("Tab")
    assert page.evaluate(focused) == "question"
    page.keyboard.type(QUESTION)
    page.keyboard.press("Enter")
    expect(page.locator(".turn .figures")).to_contain_text("in all")
    expect(page.locator("#announce")).to_contain_text("The answer is complete")

    for _ in range(8):  # back past what the turn has for who wants to copy it
        if page.evaluate(focused) == "tab-ask":
            break
        page.keyboard.press("Shift+Tab")
    page.keyboard.press("ArrowRight")
    assert page.evaluate(focused) == "tab-batch"
    expect(page.locator("#panel-batch")).to_be_visible()
    page.keyboard.press("Tab")
    assert page.evaluate(focused) == "pick"
    page.keyboard.press("Tab")
    assert page.evaluate(focused) == "paste"
    page.keyboard.type("What is a warp in CUDA?")
    expect(page.locator("#run")).to_be_enabled()
    for _ in range(6):
        if page.evaluate(focused) == "run":
            break
        page.keyboard.press("Tab")
    shoot(page, "keyboard")
    page.keyboard.press("Enter")

    expect(page.locator("#run-title")).to_have_text("1 question answered")


def test_engine_killed_under_the_open_page_is_seen_to_recover(
    stack: Stack, visitor: Visitor
) -> None:
    page = visitor.open(stack.url)
    page.evaluate("window.isSamePage = true")
    os.killpg(stack.read_engine()["pid"], signal.SIGKILL)

    expect(page.locator("#notice-title")).to_have_text("The engine ended and is being restarted.")
    ask(page, QUESTION)
    expect(page.locator(".turn .note")).to_contain_text("sent when it is")
    share = re.compile(r"^[2-9]\d$")
    expect(page.locator("#notice-bar")).to_have_attribute("aria-valuenow", share, timeout=60_000)
    shoot(page, "restarting")
    page.wait_for_selector("#pill[data-state=ready]", timeout=LONGEST_START_MS)

    expect(page.locator("#notice")).to_be_hidden()
    expect(page.locator(".turn > .answer")).to_contain_text("32 threads")
    page.click(".crash summary")
    expect(page.locator(".crash")).to_contain_text("It was killed by SIGKILL.")
    expect(page.locator(".crash pre")).to_contain_text("INFO")
    page.wait_for_selector(".turn:not([aria-busy]) .figures")
    shoot(page, "recovered")
    assert page.evaluate("window.isSamePage")
    assert sum(stack.read_engine()["restarts"].values()) == 1
