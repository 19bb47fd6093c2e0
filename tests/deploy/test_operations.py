"""What docs/operations.md hands out: TLS, Alertmanager, systemd units; by the real programs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import pytest
from aiohttp import web
from yarl import URL

from common.ports import find_free_ports
from gateway.config import Settings
from launcher.config import ServeSettings
from tests.gateway.conftest import serve_gateway, until
from tests.patience import PROGRAM_S
from tests.plain_http import NO_TLS

pytestmark = pytest.mark.slow  # other programs judge, not Python

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"


def find_program(*names: str) -> str:
    for name in names:
        if found := shutil.which(name):
            return found
    pytest.skip(f"no {names[0]} here; `scripts/system.sh operations` gets it")


@contextlib.contextmanager
def run_program(words: list[str], log: Path, **environment: str) -> Iterator[None]:
    with log.open("wb") as out:
        process = subprocess.Popen(words, stdout=out, stderr=out, env={**os.environ, **environment})
    try:
        yield
    finally:
        process.terminate()
        process.wait(timeout=PROGRAM_S)


@contextlib.asynccontextmanager
async def serve_stream(released: asyncio.Event) -> AsyncIterator[str]:
    """A stream that goes on only once its first chunk has arrived at the other end."""

    async def stream(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await answer.prepare(request)
        await answer.write(b"data: first\n\n")
        await released.wait()
        await answer.write(b"data: [DONE]\n\n")
        return answer

    app = web.Application()
    app.router.add_post("/v1/chat/completions", stream)
    runner = web.AppRunner(app)
    await runner.setup()
    (port,) = find_free_ports(1)
    await web.TCPSite(runner, "127.0.0.1", port).start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await runner.cleanup()


async def test_caddy_passes_a_streams_chunks_on_as_they_come(tmp_path: Path) -> None:
    caddy = find_program("caddy")
    released = asyncio.Event()
    http_port, https_port = find_free_ports(2)
    words = [caddy, "run", "--config", str(DEPLOY / "caddy" / "Caddyfile")]
    words += ["--adapter", "caddyfile"]
    async with serve_stream(released) as upstream:
        with run_program(
            words,
            tmp_path / "caddy.log",
            DOMAIN="localhost",
            UPSTREAM=upstream,
            HTTP_PORT=str(http_port),
            HTTPS_PORT=str(https_port),
            XDG_DATA_HOME=str(tmp_path),
            XDG_CONFIG_HOME=str(tmp_path),
        ):
            url = f"https://localhost:{https_port}/v1/chat/completions"
            first, rest = await asyncio.wait_for(read_stream(url, tmp_path, released), PROGRAM_S)

    assert first == b"data: first\n\n"
    assert rest == b"data: [DONE]\n\n"


async def read_stream(url: str, folder: Path, released: asyncio.Event) -> tuple[bytes, bytes]:
    """By a certificate of Caddy's own authority, which it makes at its first start."""
    authority = folder / "caddy" / "pki" / "authorities" / "local" / "root.crt"
    await until(authority.is_file, PROGRAM_S)
    context = ssl.create_default_context(cafile=str(authority))

    async def is_served() -> bool:
        try:
            _, writer = await asyncio.open_connection("localhost", URL(url).port, ssl=context)
        except OSError:  # nobody listens yet, or has a certificate yet
            return False
        writer.close()
        return True

    await until(is_served, PROGRAM_S)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context)) as client:
        answer = await client.post(url, headers={"Accept-Encoding": "gzip"})
        first = await answer.content.readany()
        released.set()
        return first, await answer.content.read()


def test_watchdog_reaches_alertmanager_as_both_are_shipped(tmp_path: Path) -> None:
    alertmanager = find_program("alertmanager", "prometheus-alertmanager")
    prometheus = find_program("prometheus")
    port, alerts_port = find_free_ports(2)
    folder = tmp_path / "prometheus"
    shutil.copytree(DEPLOY / "prometheus", folder)
    there = (folder / "alerting" / "alertmanagers.yml").read_text(encoding="utf-8")
    here = there.replace("alertmanager:9093", f"127.0.0.1:{alerts_port}")
    assert here != there
    (folder / "alertmanagers" / "alertmanagers.yml").write_text(here, encoding="utf-8")
    config = folder / "prometheus.yml"
    text = config.read_text(encoding="utf-8")
    config.write_text(re.sub("evaluation_interval: .*", "evaluation_interval: 1s", text))

    am_words = [alertmanager, f"--config.file={DEPLOY / 'alertmanager' / 'alertmanager.yml'}"]
    am_words += [f"--storage.path={tmp_path / 'alerts'}", "--cluster.listen-address="]
    am_words += [f"--web.listen-address=127.0.0.1:{alerts_port}"]
    words = [prometheus, f"--config.file={config}", f"--web.listen-address=127.0.0.1:{port}"]
    words += [f"--storage.tsdb.path={tmp_path / 'data'}", "--rules.alert.resend-delay=1s"]
    with (
        run_program(am_words, tmp_path / "alertmanager.log"),
        run_program(words, tmp_path / "prometheus.log"),
    ):
        alerts = wait_alerts(f"http://127.0.0.1:{alerts_port}/api/v2/alerts")

    (watchdog,) = [one for one in alerts if one["labels"]["alertname"] == "Watchdog"]
    assert watchdog["receivers"] == [{"name": "watchdog"}]
    assert watchdog["annotations"]["runbook_url"] == "docs/runbook.md#watchdog"


def wait_alerts(url: str) -> list[dict[str, Any]]:
    deadline = time.monotonic() + PROGRAM_S
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):
            alerts: list[dict[str, Any]] = httpx.get(url, trust_env=False, verify=NO_TLS).json()
            if alerts:
                return alerts
        time.sleep(0.1)
    pytest.fail(f"no alert within {PROGRAM_S} s")


@pytest.mark.parametrize("path", sorted((DEPLOY / "systemd").iterdir()), ids=lambda p: p.name)
def test_unit_is_what_systemd_knows(path: Path, tmp_path: Path) -> None:
    verifier = shutil.which("systemd-analyze")
    if verifier is None:
        pytest.skip("no systemd here")
    # The program lies elsewhere here; everything else as it is.
    unit = tmp_path / path.name
    text = path.read_text(encoding="utf-8")
    unit.write_text(text.replace("/opt/vllm-gateway/bin/python", "/bin/true"), encoding="utf-8")

    done = subprocess.run([verifier, "verify", unit], capture_output=True, text=True, check=False)

    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize("name", ["engine", "gateway"])
def test_unit_gives_the_program_time_to_drain(name: str) -> None:
    text = (DEPLOY / "systemd" / f"vllm-{name}.service").read_text(encoding="utf-8")
    (stop_s,) = re.findall(r"^TimeoutStopSec=(\d+)$", text, re.MULTILINE)
    if name == "gateway":
        needed_s = Settings.model_fields["drain_timeout_s"].default
    else:
        fields = ServeSettings.model_fields
        needed_s = 2 * fields["drain_timeout_s"].default + fields["kill_timeout_s"].default
    assert int(stop_s) > needed_s


async def test_copy_of_a_database_is_whole_while_the_gateway_goes_on(tmp_path: Path) -> None:
    """By the command of the page."""
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    found = re.search(r'exec -T gateway python3 -c "(.*)"$', page, re.MULTILINE)
    assert found is not None
    places = [tmp_path / name for name in ("running", "restored")]
    for place in places:
        place.mkdir()
    command = found[1].replace("/responses/", f"{places[0]}/")
    body = {"model": "fake", "input": "kept"}
    async with serve_gateway(responses_database=str(places[0] / "responses.sqlite")) as served:
        stored = await served.client.post("/v1/responses", json=body)
        asking = [served.client.post("/v1/responses", json=body) for _ in range(20)]
        writing = asyncio.gather(*asking)
        shell = await asyncio.create_subprocess_exec(
            "sh", "-c", f'"$PYTHON" -c "{command}"', env={**os.environ, "PYTHON": sys.executable}
        )
        assert await shell.wait() == 0
        await writing
    copy = places[1] / "responses.sqlite"
    shutil.move(places[0] / "copy.sqlite", copy)
    async with serve_gateway(responses_database=str(copy)) as served:
        answer = await served.client.get(f"/v1/responses/{stored.json()['id']}")
        went_on = {**body, "previous_response_id": stored.json()["id"]}
        following = await served.client.post("/v1/responses", json=went_on)

    assert answer.json() == stored.json()
    assert following.status_code == 200
