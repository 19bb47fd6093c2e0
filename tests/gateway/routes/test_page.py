"""The page at /ui: its files, what shields it, and the figures that it may show to whom."""

from __future__ import annotations

import asyncio
import contextlib
import html.parser
import json
import posixpath
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import pytest
import structlog
from aiohttp import web

from gateway.engines.pool import POOL
from gateway.errors import REFUSALS
from gateway.page import launchers
from gateway.page.launchers import hide_secrets
from lab.fuzz.raw_http import ask, build_request
from tests.fake_engine import Behaviour, serve_app
from tests.gateway.admission.test_keys import _bearer, _keys_file
from tests.gateway.conftest import Serve, Served, until

STATIC = Path(launchers.__file__).parent / "static"
FIGURES = """\
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m {odd} name"} 2.0
vllm:num_requests_running{engine="1",model_name="m"} 3.0
vllm:num_requests_waiting{engine="0"} 4.0
vllm:kv_cache_usage_perc{engine="0"} 0.25
vllm:kv_cache_usage_perc{engine="1"} 0.75
vllm:generation_tokens_total{engine="0"} 1.5e+03
vllm:generation_tokens_created{engine="0"} 1.7e+09
vllm:request_success_total{finished_reason="stop"} 7.0
vllm:request_success_total{finished_reason="length"} 1.0
vllm:time_to_first_token_seconds_bucket{le="0.1"} 8.0
vllm:time_to_first_token_seconds_sum{engine="0"} 0.5
vllm:time_to_first_token_seconds_count{engine="0"} 8.0
http_requests_total 99.0
"""


class FakeLauncher:
    """What a launcher's status port says, with all that must not be passed on."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.delay_s = 0.0
        self.status: dict[str, Any] = {
            "engine": {
                "state": "starting",
                "since_s": 3.2,
                "pid": 4242,
                "start_seconds": 20.1,
                "restarts": {"signal": 1},
            },
            "progress": {
                "stage": "loading_weights",
                "percent": 40,
                "detail": "token=hunter2hunter2",
            },
            "profile": "cpu",
            "model": "demo",
            "device": "CPU",
            "versions": {"vllm": "0.32.0", "system": "Linux-internal-host"},
            "argv": ["python", "--api-key", "sk-from-argv"],
            "last_crash": {"time": "2026-01-02T03:04:05+00:00"},
        }
        self.crash: dict[str, Any] = {
            "time": "2026-01-02T03:04:05+00:00",
            "reason": "signal",
            "exit_code": None,
            "signal": "SIGKILL",
            "cause": "ValueError: no room in /home/somebody",
            "uptime_s": 62.5,
            "was_ready": True,
            "restarts": 1,
            "last_lines": [f"line {n}" for n in range(100)] + ["Authorization: Bearer sk-in-log"],
            "argv": ["python", "--api-key", "sk-from-argv"],
            "environment": {"HF_TOKEN": "hf_from_environment"},
            "processes": ["4242 python"],
        }

    def build(self) -> web.Application:
        async def answer(request: web.Request) -> web.Response:
            self.calls.append(request.path)
            await asyncio.sleep(self.delay_s)
            data = self.status if request.path == "/status" else self.crash
            return web.json_response(data)

        app = web.Application()
        app.router.add_get("/status", answer)
        app.router.add_get("/crash", answer)
        return app


@contextlib.asynccontextmanager
async def serve_with_launcher(
    serve: Serve, launcher: FakeLauncher, engine: Behaviour | None = None, **settings: Any
) -> AsyncIterator[Served]:
    """Only the page asks it: what the engine runs at once is set."""
    settings = {"engine_sequences": 16} | settings
    async with (
        serve_app(launcher.build()) as url,
        serve(engine or Behaviour(), launchers=(url,), **settings) as served,
    ):
        yield served


async def read_status(served: Served, **headers: str) -> dict[str, Any]:
    answer = await served.client.get("/ui/status", headers=headers)
    assert answer.status_code == 200, answer.text
    status: dict[str, Any] = answer.json()
    return status


class _Links(html.parser.HTMLParser):
    """Addresses that a page loads, and anything inline that its policy would refuse."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.inline: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in {"src", "href"} and value and not value.startswith("#"):
                self.links.append(value)
            if name == "style" or name.startswith("on"):
                self.inline.append(f"{tag} {name}")
        if tag == "style" or (tag == "script" and "src" not in dict(attrs)):
            self.inline.append(tag)


def _list_files() -> list[Path]:
    return [path for path in STATIC.rglob("*") if path.is_file()]


def _links_of(page: str) -> _Links:
    links = _Links()
    links.feed(page)
    return links


async def test_page_and_everything_it_loads_is_served_under_its_policy(served: Served) -> None:
    page = await served.client.get("/ui")
    links = _links_of(page.text)
    names = {link.removeprefix("ui/") for link in links.links}
    for script in STATIC.rglob("*.js"):
        folder = script.relative_to(STATIC).parent
        loaded = re.findall(r'from "(\.[\w./]+)"', script.read_text(encoding="utf-8"))
        names |= {posixpath.normpath(folder / name) for name in loaded}

    assert page.headers["Content-Type"] == "text/html; charset=utf-8"
    assert names == {path.relative_to(STATIC).as_posix() for path in _list_files()} - {"index.html"}
    for name in names:
        file = await served.client.get(f"/ui/{name}")
        assert file.status_code == 200, name
        assert file.content == (STATIC / name).read_bytes()
        for header in ("Content-Security-Policy", "X-Content-Type-Options", "Referrer-Policy"):
            assert file.headers[header] == page.headers[header]
    kinds = {
        name: (await served.client.head(f"/ui/{name}")).headers["Content-Type"] for name in names
    }
    assert kinds["page.js"].startswith("text/javascript")
    assert kinds["page.css"].startswith("text/css")
    assert kinds["icon.svg"].startswith("image/svg+xml")


async def test_page_policy_allows_its_own_files_and_nothing_else(served: Served) -> None:
    page = await served.client.get("/ui")
    policy = dict(
        part.strip().partition(" ")[::2]
        for part in page.headers["Content-Security-Policy"].split(";")
    )

    assert policy.pop("default-src") == "'none'"
    assert policy.pop("require-trusted-types-for") == "'script'"
    assert set(policy.values()) == {"'self'", "'none'"}
    assert {"frame-ancestors", "base-uri", "form-action", "connect-src"} <= policy.keys()
    assert page.headers["X-Frame-Options"] == "DENY"
    assert _links_of(page.text).inline == []


def test_page_files_name_no_other_host() -> None:
    for path in _list_files():
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert re.findall(r"(?:https?:)?//[\w-]+\.\w+", text) == [], path.name
        assert len(text) < 40_000


def _read_colours() -> dict[str, dict[str, str]]:
    """The variables of each theme; the dark one changes what it names."""
    css = (STATIC / "page.css").read_text(encoding="utf-8")
    blocks = dict(re.findall(r"^(:root[^{]*?) \{(.*?)^\}", css, re.MULTILINE | re.DOTALL))
    light = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", blocks[":root"]))
    dark = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", blocks[':root[data-theme="dark"]']))
    assert light.keys() == dark.keys()
    return {"light": light, "dark": dark}


def _luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize(
    ("front", "backs"),
    [
        ("ink", "paper card sunken wash busy-wash bad-wash"),
        ("soft", "paper card sunken busy-wash bad-wash"),
        ("accent", "paper card wash"),
        ("accent-ink", "accent"),
        ("bad", "card paper"),
    ],
)
def test_page_text_has_the_contrast_that_eyes_need(theme: str, front: str, backs: str) -> None:
    colours = _read_colours()[theme]
    for back in backs.split():
        pair = sorted((_luminance(colours[front]), _luminance(colours[back])))
        assert (pair[1] + 0.05) / (pair[0] + 0.05) >= 4.5, f"{front} on {back}"


async def test_page_asked_for_again_is_not_sent_again(served: Served) -> None:
    first = await served.client.get("/ui/page.js")
    again = await served.client.get("/ui/page.js", headers={"If-None-Match": first.headers["ETag"]})
    other = await served.client.get("/ui/page.js", headers={"If-None-Match": '"other"'})

    assert (again.status_code, again.content) == (304, b"")
    assert other.status_code == 200
    assert first.headers["Cache-Control"] == "no-cache"


@pytest.mark.parametrize("path", ["/ui/", "/ui/index.html"])
async def test_page_under_another_name_leads_to_it_below_any_prefix(
    served: Served, path: str
) -> None:
    answer = await served.client.get(path)

    assert (answer.status_code, answer.headers["Location"]) == (308, "../ui")


def test_page_has_words_for_every_error_of_the_gateway() -> None:
    """In both languages: what has none is told in the gateway's English."""
    source = "".join(path.read_text(encoding="utf-8") for path in STATIC.parents[1].rglob("*.py"))
    codes = set(re.findall(r'\bcode(?:: ClassVar\[str\])? ?= ?"(\w+)"', source))
    script = (STATIC / "common" / "errors.js").read_text(encoding="utf-8")
    known = set(re.findall(r'^  (\w+): "error\.\w+",$', script, re.MULTILINE))

    assert {"not_ready", "engine_refused", "too_many_prompts"} <= codes
    assert codes | set(REFUSALS) <= known


@pytest.mark.parametrize(
    "path",
    [
        "/ui/../ui.py",
        "/ui/..%2fui.py",
        "/ui/%2e%2e%2fui.py",
        "/ui/static%2fpage.js",
        "/ui/page.js%00",
        "/ui//etc/passwd",
        "/ui/ask",
        "/ui/ask/../../page.py",
        "/ui/ask/ask.py",
        "/ui/%2fetc%2fpasswd",
        "/ui/index.html/",
    ],
)
async def test_page_file_that_is_none_is_404(served: Served, path: str) -> None:
    answer = await ask(served.url, build_request("GET", path), "GET")

    assert answer.status in {400, 404}
    assert b"import" not in answer.body


async def test_page_turned_off_is_404_everywhere(serve: Serve) -> None:
    async with serve(ui=False) as served:
        codes = [
            (await served.client.get(path)).status_code
            for path in ("/ui", "/ui/", "/ui/status", "/ui/page.js")
        ]

        assert codes == [404] * 4
        assert (await served.predict("a")).status_code == 200


async def test_page_is_there_before_any_engine(serve: Serve) -> None:
    async with serve(Behaviour(is_healthy=False), wait_ready=False) as served:
        await until(lambda: "GET /health" in served.app[POOL].describe())
        status = await read_status(served)

        assert (await served.client.get("/ui")).status_code == 200
        assert status["gateway"]["state"] == "waiting"
        assert status["engines"] == [
            {
                "state": "down",
                "reason": "GET /health is answered with 503",
                "model": None,
                "max_model_len": None,
                "load": None,
            }
        ]


async def test_status_sums_the_engines_own_figures(serve: Serve) -> None:
    async with serve(Behaviour(metrics=FIGURES)) as served:
        await served.predict(["a", "b"])
        status = await read_status(served)
        load = status["engines"][0]["load"]

        assert (load["running"], load["waiting"], load["finished"]) == (5, 4, 8)
        assert (load["kv_usage"], load["completion_tokens"]) == (0.75, 1500)
        assert (load["first_token_sum_s"], load["first_token_count"]) == (0.5, 8)
        assert status["gateway"]["state"] == "ready"
        assert status["queue"] == {"running": 0, "waiting": 0}
        assert status["used"]["requests"] == 1
        assert status["limits"]["prompts"] == 10_000
        assert served.engine_url not in json.dumps(status)


@pytest.mark.parametrize("figures", ["", "nothing of use 1\n", "vllm:num_requests_running abc\n"])
async def test_status_engine_without_figures_has_none(serve: Serve, figures: str) -> None:
    async with serve(Behaviour(metrics=figures)) as served:
        assert (await read_status(served))["engines"][0]["load"] is None


async def test_status_many_pages_cost_the_engine_one_look(serve: Serve) -> None:
    async with serve(Behaviour(metrics=FIGURES)) as served:
        answers = await asyncio.gather(*(read_status(served) for _ in range(30)))

        assert (await read_status(served))["at"] == answers[0]["at"]
        assert served.engine.scrapes == 1
        assert len({answer["at"] for answer in answers}) == 1
        await asyncio.sleep(1.05)  # what is under test is that time
        assert (await read_status(served))["at"] > answers[0]["at"]


async def test_status_page_that_goes_away_takes_nothing_from_the_others(serve: Serve) -> None:
    launcher = FakeLauncher()
    launcher.delay_s = 0.4
    async with serve_with_launcher(serve, launcher) as served:
        gone = asyncio.create_task(served.client.get("/ui/status", timeout=0.2))
        await until(lambda: launcher.calls)
        staying = asyncio.create_task(served.client.get("/ui/status"))
        with pytest.raises(httpx.TimeoutException):
            await gone

        assert (await staying).json()["launchers"][0]["state"] == "starting"
        assert launcher.calls == ["/status", "/crash"]


async def test_status_needs_a_key_and_takes_none_of_its_allowance(
    serve: Serve, tmp_path: Path
) -> None:
    path, keys = _keys_file(tmp_path, alice="requests_per_minute = 1")
    async with serve(keys_file=path) as served:
        missing = await served.client.get("/ui/status")
        wrong = await served.client.get("/ui/status", headers=_bearer("vg-nope"))
        for _ in range(5):
            await read_status(served, **_bearer(keys["alice"]))
        body = {"prompt": "a"}
        answer = await served.client.post("/predict", json=body, headers=_bearer(keys["alice"]))

        assert (await served.client.get("/ui")).status_code == 200
        assert (missing.status_code, missing.json()["error"]["code"]) == (401, "missing_key")
        assert (wrong.status_code, wrong.json()["error"]["code"]) == (401, "invalid_api_key")
        assert answer.status_code == 200


async def test_status_passes_on_a_launchers_progress_and_nothing_private(serve: Serve) -> None:
    launcher = FakeLauncher()
    async with serve_with_launcher(serve, launcher) as served:
        status = await read_status(served)
        shown = status["launchers"][0]

        assert (shown["state"], shown["since_s"], shown["start_seconds"]) == ("starting", 3.2, 20.1)
        assert shown["progress"]["stage"] == "loading_weights"
        assert shown["versions"] == {"vllm": "0.32.0"}
        assert shown["crash"]["signal"] == "SIGKILL"
        text = json.dumps(status)
        for secret in ("argv", "environment", "4242", "sk-", "hf_", "hunter2", "internal-host"):
            assert secret not in text, secret


async def test_status_asks_for_a_crash_once(serve: Serve) -> None:
    launcher = FakeLauncher()
    async with serve_with_launcher(serve, launcher) as served:
        await read_status(served)
        await asyncio.sleep(1.05)  # past the second for which figures are kept
        await read_status(served)
        assert launcher.calls == ["/status", "/crash", "/status"]

        launcher.status["last_crash"] = None
        await asyncio.sleep(1.05)
        assert (await read_status(served))["launchers"][0]["crash"] is None


@pytest.mark.parametrize("broken", [[], {"engine": 3, "progress": "x"}, {"last_crash": 5}])
async def test_status_odd_launcher_is_left_out_or_empty(serve: Serve, broken: Any) -> None:
    launcher = FakeLauncher()
    launcher.status = broken
    async with serve_with_launcher(serve, launcher) as served:
        status = await read_status(served)

        assert status["gateway"]["state"] == "ready"
        assert all("state" not in one for one in status["launchers"])


async def test_status_launcher_that_is_away_is_left_out(serve: Serve) -> None:
    async with serve(launchers=("http://127.0.0.1:9",)) as served:
        assert (await read_status(served))["launchers"] == []


async def test_crash_log_without_keys_is_for_this_machine_alone(serve: Serve) -> None:
    async with serve_with_launcher(serve, FakeLauncher(), allowed_hosts=("*",)) as served:

        async def read_crash(**headers: str) -> dict[str, Any]:
            crash: dict[str, Any] = (await read_status(served, **headers))["launchers"][0]["crash"]
            return crash

        here = await read_crash()
        assert here["last_lines"][-1] == "Authorization: Bearer •••"
        assert len(here["last_lines"]) == 60
        assert here["cause"] == "ValueError: no room in /home/somebody"
        for headers in (
            {"X-Forwarded-For": "192.0.2.7"},
            {"x-forwarded-host": "127.0.0.1"},
            {"X-Forwarded-Proto": "https"},
            {"Forwarded": "for=192.0.2.7"},
            {"Via": "1.1 proxy"},
            {"X-Real-IP": "127.0.0.1"},
            {"CF-Connecting-IP": "192.0.2.7"},
            {"Host": "pointed-here.example"},
            {"Host": "127.0.0.1.example"},
        ):
            elsewhere = await read_crash(**headers)
            assert elsewhere.keys() == here.keys() - {"last_lines", "cause"}, headers


async def test_crash_log_is_not_for_who_comes_as_a_proxy_does(serve: Serve) -> None:
    """nginx unless told otherwise: HTTP/1.0, the gateway's own address as Host, no header more."""
    async with serve_with_launcher(serve, FakeLauncher()) as served:
        host = served.url.removeprefix("http://")
        for version, is_here in ((b"1.1", True), (b"1.0", False)):
            head = f"Host: {host}\r\nConnection: close\r\n\r\n".encode()
            status = b"GET /ui/status HTTP/" + version + b"\r\n" + head
            answer = await ask(served.url, status, "GET")
            crash = json.loads(answer.body)["launchers"][0]["crash"]

            assert ("last_lines" in crash, "cause" in crash) == (is_here, is_here)


@pytest.mark.parametrize("host", [b"x:abc", b"x:99999", b"127.0.0.1:99999", b"\xff", b""])
async def test_status_for_a_host_that_is_none_keeps_the_crash_log(
    serve: Serve, host: bytes
) -> None:
    async with serve_with_launcher(serve, FakeLauncher()) as served:
        head = b"GET /ui/status HTTP/1.1\r\nConnection: close\r\nHost: " + host + b"\r\n\r\n"
        answer = await ask(served.url, head, "GET")

        if answer.status != 400:
            assert answer.status == 200
            assert "last_lines" not in json.loads(answer.body)["launchers"][0]["crash"]


async def test_launcher_whose_crash_card_is_missing_is_asked_again() -> None:
    launcher = FakeLauncher()
    card, launcher.crash = launcher.crash, {"error": "no crash is known"}
    async with serve_app(launcher.build()) as url, aiohttp.ClientSession() as session:
        reader = launchers.LauncherClient(url, session)
        for _ in range(2):
            (status,) = await reader.read()
            assert (status["state"], status["crash"]) == ("starting", None)

        launcher.crash = card
        (status,) = await reader.read()
        assert status["crash"]["signal"] == "SIGKILL"


async def test_crash_log_without_keys_stays_where_the_gateway_serves_others(serve: Serve) -> None:
    async with serve_with_launcher(
        serve, FakeLauncher(), host="0.0.0.0", allow_anonymous=True
    ) as served:
        crash = (await read_status(served))["launchers"][0]["crash"]

        assert not {"last_lines", "cause"} & crash.keys()


async def test_crash_log_with_keys_is_for_admins(serve: Serve, tmp_path: Path) -> None:
    path, keys = _keys_file(tmp_path, alice="", root="admin = true")
    async with serve_with_launcher(serve, FakeLauncher(), keys_file=path) as served:
        alice = (await read_status(served, **_bearer(keys["alice"])))["launchers"][0]["crash"]
        root = (await read_status(served, **_bearer(keys["root"])))["launchers"][0]["crash"]

        assert "last_lines" not in alice
        assert alice["cause"] == root["cause"]
        assert len(root["last_lines"]) == 60


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("'api_key': ['sk-abcdefgh'], 'port': 1", "'api_key': ['•••'], 'port': 1"),
        (
            "error: unrecognized arguments: --api-key abc",
            "error: unrecognized arguments: --api-key •••",
        ),
        ("HF_TOKEN=hf_abcdefghij", "HF_TOKEN=•••"),
        ("https://me:pass@host/x", "https://me:•••@host/x"),
        ("Authorization: Bearer abc", "Authorization: Bearer •••"),
        ("max_num_batched_tokens=2048", "max_num_batched_tokens=2048"),
        ("GPU KV cache size: 147,456 tokens", "GPU KV cache size: 147,456 tokens"),
        ("KeyError: 'model.embed_tokens.weight'", "KeyError: 'model.embed_tokens.weight'"),
    ],
)
def test_secrets_in_log_lines_are_hidden_and_nothing_else(text: str, shown: str) -> None:
    assert hide_secrets(text) == shown


async def test_page_is_quiet_in_the_log(served: Served) -> None:
    with structlog.testing.capture_logs() as lines:
        await served.client.get("/ui/page.js")
        await read_status(served)

    assert {(line["route"], line["log_level"]) for line in lines if "route" in line} == {
        ("/ui/{file}", "debug"),
        ("/ui/status", "debug"),
    }
