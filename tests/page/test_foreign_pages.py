"""Pages of other sites in a real browser: they reach a gateway and get nothing done."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from playwright.sync_api import Browser

from tests.gateway.conftest import Served
from tests.page.conftest import NAMES, PATIENCE_MS, running_gateway

pytestmark = pytest.mark.browser

# As a page may ask without being asked back, and with JSON, for which the browser asks first.
SIMPLE = """async (url) => (await fetch(url, {
    method: "POST", mode: "no-cors", body: '{"prompt": "x"}',
    headers: {"Content-Type": "text/plain"},
})).type"""
UNNAMED = """async (url) => (await fetch(url, {
    method: "POST", mode: "no-cors", body: new Blob(['{"prompt": "x"}']),
})).type"""
WITH_JSON = """(url) => fetch(url, {
    method: "POST", body: '{"prompt": "x"}', headers: {"Content-Type": "application/json"},
}).then((answer) => String(answer.status), (error) => error.name)"""
FORM = """(url) => {
    document.body.innerHTML = "<form method=post enctype=text/plain><input></form>";
    const form = document.forms[0];
    form.action = url;
    form.elements[0].name = '{"prompt": "x", "a": "';
    form.elements[0].value = '"}';
    form.submit();
}"""


class _Page(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<!doctype html><title>elsewhere</title><body></body>")

    def log_message(self, *_: object) -> None:
        """Nobody reads it."""


@pytest.fixture
def elsewhere() -> Iterator[str]:
    """Another site, for to a browser 127.0.0.1 and localhost are two."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://localhost:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.fixture
def served() -> Iterator[Served]:
    with running_gateway() as running:
        yield running


def test_page_of_another_site_makes_nothing_generate(
    chromium: Browser, served: Served, elsewhere: str
) -> None:
    target = f"{served.url}/predict"
    page = chromium.new_page()
    page.set_default_timeout(PATIENCE_MS)
    try:
        page.goto(elsewhere)
        assert page.evaluate(SIMPLE, target) == "opaque"
        assert page.evaluate(UNNAMED, target) == "opaque"
        assert page.evaluate(WITH_JSON, target) == "TypeError"
        with page.expect_navigation():
            page.evaluate(FORM, target)
        assert "cross_site" in page.inner_text("body")
    finally:
        page.close()

    assert served.engine.calls == []


def test_name_that_was_made_to_point_here_makes_nothing_generate(
    chromium: Browser, served: Served
) -> None:
    rules = "--host-resolver-rules=MAP rebound.example 127.0.0.1"
    program = next(filter(None, map(shutil.which, NAMES)))
    browser = chromium.browser_type.launch(executable_path=program, args=[rules])
    try:
        page = browser.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.goto(f"http://rebound.example:{served.url.rpartition(':')[2]}/healthz")
        assert page.inner_text("body") == '{"status":"ok"}'
        for path in ("/predict", "/v1/chat/completions"):
            assert page.evaluate(WITH_JSON, path) == "403"
        page.goto(f"http://rebound.example:{served.url.rpartition(':')[2]}/ui")
        assert "host_not_allowed" in page.inner_text("body")
    finally:
        browser.close()

    assert served.engine.calls == []
