"""`x-ratelimit-*`: what a key's limits leave, on every answer that it gets."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Awaitable, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.admission.keys import make_key
from tests.gateway.conftest import Served, serve_gateway, until
from tests.redis_server import run_redis

_LIMITS = "requests_per_minute = 600\ntokens_per_minute = 60000\nmax_concurrency = 1000\n"
_FIELDS = ("limit", "remaining", "reset")
_DURATION = re.compile(r"(?:(\d+)m)?(?:([\d.]+)(ms|s))")


@asynccontextmanager
async def _serve(folder: Path, limits: str = _LIMITS, **settings: Any) -> AsyncIterator[Served]:
    key, entry = make_key("limited")
    path = folder / "keys.toml"
    path.write_text(entry + limits)
    async with serve_gateway(keys_file=path, **settings) as served:
        served.client.headers["Authorization"] = f"Bearer {key}"
        yield served


@pytest.fixture(params=["local", "redis"])
async def limited(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Served]:
    if request.param == "local":
        async with _serve(tmp_path) as served:
            yield served
        return
    with run_redis(tmp_path) as redis:
        async with _serve(tmp_path, redis_url=redis.url, redis_timeout_s=30) as served:
            yield served


def _read(headers: Mapping[str, str], what: str) -> tuple[int, int, float]:
    """The limit, what is left of it and the seconds until it is whole again."""
    limit, left, reset = (headers[f"x-ratelimit-{field}-{what}"] for field in _FIELDS)
    match = _DURATION.fullmatch(reset)
    assert match is not None
    seconds = float(match[2]) / (1000 if match[3] == "ms" else 1) + 60 * int(match[1] or 0)
    return int(limit), int(left), seconds


def _ask_in_all_ways(served: Served) -> Iterator[tuple[int, Awaitable[httpx.Response]]]:
    """Each with the status of its answer."""
    client = served.client
    yield 200, served.predict("a")
    yield 200, served.chat("hi")
    yield 200, served.chat("hi", stream=True)
    yield 200, client.get("/v1/models")
    yield 200, client.post("/tokenize", json={"prompt": "a b"})
    yield 400, served.chat("hi", max_tokens="many")
    yield 400, client.post("/predict", content=b"{")
    yield 403, client.get("/usage")
    yield 404, client.get("/v1/models/none")
    yield 415, client.post("/predict", content=b"x", headers={"Content-Type": "text/plain"})


async def test_rates_are_on_every_answer_of_a_limited_key(limited: Served) -> None:
    began = time.perf_counter()
    for number, (status, asking) in enumerate(_ask_in_all_ways(limited), start=1):
        answer = await asking

        assert answer.status_code == status
        minutes = (time.perf_counter() - began) / 60
        limit, left, reset_s = _read(answer.headers, "requests")
        assert limit == 600
        assert 600 - number <= left <= min(600, 600 - number + 1 + 600 * minutes)
        assert 0 <= reset_s <= number * 0.1
        assert _read(answer.headers, "tokens")[0] == 60_000


async def test_rates_are_on_refusals_by_the_limit_itself(tmp_path: Path) -> None:
    async with _serve(tmp_path, "requests_per_minute = 1\n") as served:
        assert (await served.predict("a")).status_code == 200
        refused = await served.predict("a")

        assert refused.status_code == 429
        limit, left, reset_s = _read(refused.headers, "requests")
        assert (limit, left) == (1, 0)
        assert int(refused.headers["Retry-After"]) - 1 <= reset_s <= 60
        assert not any(name.endswith("tokens") for name in refused.headers)


async def test_key_without_limits_gets_no_rates(tmp_path: Path) -> None:
    async with _serve(tmp_path, "max_concurrency = 5\n") as served:
        answer = await served.predict("a")
        assert answer.status_code == 200
        assert not any(name.startswith("x-ratelimit") for name in answer.headers)


async def test_rates_add_up_under_load(limited: Served) -> None:
    """What is left and what has been used are the limit, but for what came back by the minute."""
    began = time.perf_counter()
    assert (await limited.chat("hi", max_tokens=50)).status_code == 200  # 3 tokens in, 4 out
    limited.engine.delay_s = 60
    waiting = asyncio.create_task(limited.chat("hi", max_tokens=400))
    await until(lambda: limited.engine.running == 1)
    limited.engine.delay_s = 0
    answers = await asyncio.gather(*(limited.chat("hi", max_tokens=50) for _ in range(60)))

    for answer in answers:
        assert answer.status_code == 200
        for what in ("requests", "tokens"):
            limit, left, reset_s = _read(answer.headers, what)
            # All of it where the machine is so slow that a minute has given everything back.
            # `left` is rounded down.
            assert 0 <= left <= limit
            assert reset_s - 0.0011 <= (limit - left) * 60 / limit <= reset_s + 60 / limit
    last = await limited.chat("hi", max_tokens=50)
    minutes = (time.perf_counter() - began) / 60

    _, left, _ = _read(last.headers, "requests")
    assert 600 - 63 <= left <= 600 - 63 + 1 + 600 * minutes
    _, left, _ = _read(last.headers, "tokens")
    set_aside = 400 + 10  # for the one that waits: its prompt, and what it may come to
    used = 62 * 7
    assert 60_000 - used - set_aside - 62 * 70 <= left <= 60_000 - used - 400 + 60_000 * minutes
    waiting.cancel()


async def test_calls_inside_may_never_come_to_use_more_than_the_limit(limited: Served) -> None:
    limited.engine.delay_s = 60
    began, refused = time.perf_counter(), 0

    async def ask() -> None:
        nonlocal refused
        answer = await limited.chat("hi", max_tokens=500, n=2)
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "tokens_per_minute")
        refused += 1

    calls = [asyncio.create_task(ask()) for _ in range(80)]
    await until(lambda: refused + limited.engine.running == 80)
    minutes = (time.perf_counter() - began) / 60

    inside = limited.engine.running
    assert inside * 1000 <= 60_000 * (1 + minutes)
    assert inside >= 55  # of 60: what a prompt may be is set aside as well
    for call in calls:
        call.cancel()
