"""A gateway's first batch, as a real Prometheus with the shipped rules shows it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.deploy.expressions import Expression, list_expressions
from tests.deploy.live import run_prometheus
from tests.fake_engine import Behaviour
from tests.gateway.conftest import Served, serve_gateway, until
from tests.plain_http import NO_TLS

pytestmark = pytest.mark.slow  # Prometheus judges, not Python

# Of the course's board: what one batch of questions, one of them empty, must show.
SHOWN = (
    *("Questions", "Seconds", "Tokens a second", "Characters a second", "Characters an answer"),
    *("Answers shared", "Questions in a call", "Calls", "E2E latency of a call"),
    *("Speed while a call runs", "Tokens and characters, by the clock"),
    "Questions without an answer",
)
QUESTIONS = ["a", "a", *(f"question {number}" for number in range(30)), ""]


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GATEWAY_CONFIG", raising=False)


def list_course() -> Iterator[Expression]:
    for one in list_expressions():
        if one.board == "course" and one.panel in SHOWN:
            yield one


async def ask(client: httpx.AsyncClient, promql: str) -> list[float]:
    answer = await client.get("/api/v1/query", params={"query": promql})
    found: list[dict[str, Any]] = answer.json()["data"]["result"]
    return [float(row["value"][1]) for row in found]


async def scrape(client: httpx.AsyncClient, more: int = 1) -> None:
    """As many more scrapes as asked for."""
    count = 'sum(count_over_time(up{job="gateway"}[1h]))'
    wanted = sum(await ask(client, count)) + more

    async def is_done() -> bool:
        return sum(await ask(client, count)) >= wanted

    await until(is_done, 20)


async def read_panels(client: httpx.AsyncClient) -> dict[str, list[float]]:
    return {f"{one.panel}: {one.promql}": await ask(client, one.promql) for one in list_course()}


async def watch_first_batch(served: Served, prometheus: str) -> None:
    async with httpx.AsyncClient(
        base_url=prometheus, trust_env=False, timeout=20, verify=NO_TLS
    ) as client:
        await scrape(client)
        asked = {"model": "fake", "prompt": "a", "max_tokens": 3}
        (await served.client.post("/v1/completions", json=asked)).raise_for_status()
        await scrape(client, 2)
        before = await read_panels(client)
        (await served.predict(QUESTIONS)).raise_for_status()
        await scrape(client, 3)
        after = await read_panels(client)
        served.engine.status = 500
        assert (await served.client.post("/v1/completions", json=asked)).status_code == 500
        await scrape(client, 3)
        failing = await ask(client, "gateway:failures:ratio5m")
        requests = await ask(client, "sum(gateway:requests:rate1m)")

    # A stat of nothing is empty, not "NaN"; tokens of other routes are no speed without end.
    wrong = {name: found for name, found in before.items() if any(map(math.isinf, found))}
    assert wrong == {}
    figures = {name: found for name, found in before.items() if name.startswith("Tokens a second")}
    assert list(figures.values()) == [[]]
    empty = {
        name: found
        for name, found in after.items()
        if not any(math.isfinite(value) and value > 0 for value in found)
    }
    assert empty == {}
    assert failing == [pytest.approx(1 / 3, abs=0.1)]
    assert requests > [0.0]


async def test_first_batch_shows_in_every_panel_of_the_course(tmp_path: Path) -> None:
    assert {one.panel for one in list_course()} == set(SHOWN)
    async with serve_gateway(Behaviour()) as served:
        targets = {"gateway": served.url.removeprefix("http://")}
        running = run_prometheus(tmp_path, targets)
        prometheus = await asyncio.to_thread(running.__enter__)
        try:
            await watch_first_batch(served, prometheus)
        finally:
            await asyncio.to_thread(running.__exit__, None, None, None)
