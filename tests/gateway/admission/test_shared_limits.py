"""Several gateways on one real Redis: limits hold over all of them, and Redis may go and come."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from gateway.admission.keys import make_key
from gateway.admission.limits import LIMITS, Claim, Refusal
from gateway.admission.redis_limits import RedisLimits
from gateway.app import build_app
from gateway.config import SettingsError
from gateway.engines.pool import POOL
from tests.fake_engine import Behaviour, build_fake_engine, serve_app
from tests.gateway.conftest import Served, make_settings, serve_gateway, until
from tests.gateway.process import serve_process
from tests.patience import PROGRAM_S
from tests.plain_http import NO_TLS
from tests.redis_server import RedisServer, run_redis

# Redis and its client are the same on every Python; `test_limits.py` runs on each.
pytestmark = pytest.mark.slow

_PATIENCE_S = 30.0  # what a busy machine must not overrun
_TOLERANCE = 0.02
_HI = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    with run_redis(tmp_path) as server:
        yield server


@dataclass(frozen=True)
class Gateways:
    """All on one Redis, with keys by name."""

    all: list[Served]
    keys: dict[str, str]
    redis: Redis

    async def ask(self, number: int, key: str, **fields: object) -> httpx.Response:
        client = self.all[number % len(self.all)].client
        headers = {"Authorization": f"Bearer {self.keys[key]}"}
        return await client.post("/v1/chat/completions", json=_HI | fields, headers=headers)

    async def now(self) -> float:
        seconds, micros = await self.redis.time()
        return float(seconds + micros / 1e6)

    async def count_scripts(self) -> int:
        return int((await self.redis.info("commandstats"))["cmdstat_evalsha"]["calls"])

    @property
    def limits(self) -> RedisLimits:
        kept = self.all[0].app[LIMITS]
        assert isinstance(kept, RedisLimits)
        return kept


@asynccontextmanager
async def _serve_gateways(
    server: RedisServer, folder: Path, count: int, /, *, entries: dict[str, str], **settings: Any
) -> AsyncIterator[Gateways]:
    keys, text = {}, ""
    for name, limits in entries.items():
        keys[name], entry = make_key(name)
        text += f"{entry}{limits}\n\n"
    path = folder / "keys.toml"
    path.write_text(text)
    options: dict[str, Any] = {"redis_url": server.url}
    options |= {"redis_timeout_s": _PATIENCE_S, "keys_file": path}
    async with AsyncExitStack() as stack:
        served = [
            await stack.enter_async_context(serve_gateway(**(options | settings)))
            for _ in range(count)
        ]
        client = Redis.from_url(server.url, retry=Retry(NoBackoff(), 1))  # it may come back
        stack.push_async_callback(client.aclose)
        yield Gateways(served, keys, client)


async def _run_load(ask: Callable[[int], Awaitable[httpx.Response]], count: int) -> list[int]:
    """So many calls, forty at a time; their statuses."""
    numbers, statuses = itertools.count(), []

    async def work() -> None:
        while (number := next(numbers)) < count:
            statuses.append((await ask(number)).status_code)

    await asyncio.gather(*(work() for _ in range(40)))
    return statuses


async def _ask_until_refused(
    gateways: Gateways, ask: Callable[[int], Awaitable[httpx.Response]]
) -> tuple[float, list[int]]:
    """To the moment of a refusal, at which nothing was left: when the calls began of which one was
    refused, and all statuses. Many at once: one by one, a slow machine never asks for more than
    comes back by Redis's clock meanwhile.
    """
    statuses: list[int] = []
    while True:
        began = await gateways.now()
        answers = await asyncio.gather(*(ask(number) for number in range(20)))
        last = [answer.status_code for answer in answers]
        statuses += last
        if 429 in last:
            return began, statuses


async def test_requests_a_minute_hold_over_three_gateways_under_load(
    redis: RedisServer, tmp_path: Path
) -> None:
    per_minute = 100
    limits = f"requests_per_minute = {per_minute}\nmax_concurrency = 1000"
    async with _serve_gateways(redis, tmp_path, 3, entries={"a": limits}) as gateways:
        began = await gateways.now()
        statuses = [(await gateways.ask(0, "a")).status_code]
        first_passed = await gateways.now()
        statuses += await _run_load(lambda number: gateways.ask(number, "a"), 300)

        async def ask(number: int) -> httpx.Response:
            return await gateways.ask(number, "a")

        last_asked, last_statuses = await _ask_until_refused(gateways, ask)
        statuses += last_statuses
        ended = await gateways.now()

        assert set(statuses) == {200, 429}
        passed = statuses.count(200)
        least = per_minute * (1 + (last_asked - first_passed) / 60)
        most = per_minute * (1 + (ended - began) / 60)
        assert least * (1 - _TOLERANCE) <= passed <= most * (1 + _TOLERANCE)
        assert {bool(one.engine.calls) for one in gateways.all} == {True}
        assert sum(len(one.engine.calls) for one in gateways.all) == passed


async def test_tokens_a_minute_hold_over_three_gateways_under_load(
    redis: RedisServer, tmp_path: Path
) -> None:
    """Streams that use 105 tokens each, by the engine's count."""
    per_minute = 10_000
    limits = f"tokens_per_minute = {per_minute}"
    body = {
        "messages": [{"role": "user", "content": "x" * 93}],
        "max_tokens": 100,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    used = 0
    async with _serve_gateways(redis, tmp_path, 3, entries={"a": limits}) as gateways:

        async def ask(number: int, **changed: object) -> httpx.Response:
            nonlocal used
            answer = await gateways.ask(number, "a", **(body | changed))
            if answer.status_code == 200:
                last = answer.text.rpartition("\n\ndata: {")[2].partition("\n\n")[0]
                used += int(orjson.loads("{" + last)["usage"]["total_tokens"])
            return answer

        began = await gateways.now()
        await ask(0)
        first_passed = await gateways.now()
        statuses = await _run_load(ask, 150)
        # By calls that use just what is set aside for them: with many of them at once a refusal
        # says that nothing is left.
        exact = partial(ask, max_tokens=50)
        last_asked, _ = await _ask_until_refused(gateways, exact)
        ended = await gateways.now()

        assert set(statuses) == {200, 429}
        least = per_minute * (1 + (last_asked - first_passed) / 60)
        most = per_minute * (1 + (ended - began) / 60)
        assert least * (1 - _TOLERANCE) <= used <= most * (1 + _TOLERANCE)


async def test_key_concurrency_holds_over_gateways_and_is_given_back(
    redis: RedisServer, tmp_path: Path
) -> None:
    async with _serve_gateways(redis, tmp_path, 2, entries={"a": "max_concurrency = 3"}) as both:
        one, other = both.all
        one.engine.delay_s = other.engine.delay_s = 60
        running = [asyncio.create_task(both.ask(number, "a")) for number in (0, 1, 1)]
        await until(lambda: one.engine.running + other.engine.running == 3)

        for number in (0, 1):
            refused = await both.ask(number, "a")
            error = refused.json()["error"]
            assert (refused.status_code, error["code"]) == (429, "key_concurrency")
            assert "has 3 sequences" in error["message"]
        for task in running:
            task.cancel()
        one.engine.delay_s = other.engine.delay_s = 0

        async def is_free() -> bool:
            return (await both.ask(0, "a")).status_code == 200

        await until(is_free)


def _count_questions(limits: RedisLimits) -> list[str]:
    """The keys for which a call waits for Redis from now on."""
    ask, asked = limits._ask, []

    async def note(claim: Claim, *wanted: int, **named: int) -> list[Any] | None:
        asked.append(claim.account)
        return await ask(claim, *wanted, **named)

    limits._ask = note  # type: ignore[method-assign]
    return asked


async def test_limited_request_asks_redis_once_and_unlimited_never(
    redis: RedisServer, tmp_path: Path
) -> None:
    limits = "requests_per_minute = 100000\ntokens_per_minute = 10000000\nmax_concurrency = 100"
    entries = {"limited": limits, "held": "max_concurrency = 100", "free": ""}
    async with _serve_gateways(redis, tmp_path, 1, entries=entries) as gateways:
        assert (await gateways.ask(0, "limited")).status_code == 200  # nothing was known before
        asked = _count_questions(gateways.limits)
        for _ in range(20):
            assert (await gateways.ask(0, "limited")).status_code == 200
            assert (await gateways.ask(0, "held")).status_code == 200
        assert asked == ["limited", "held"] * 20

        await until(lambda: not gateways.limits._settlements)
        before = await gateways.count_scripts()
        for _ in range(20):
            assert (await gateways.ask(0, "free")).status_code == 200
        assert len(asked) == 40
        assert await gateways.count_scripts() <= before + 4  # looks whether Redis is there


async def test_hang_up_while_redis_is_asked_costs_the_key_nothing(
    redis: RedisServer, tmp_path: Path
) -> None:
    limits = "tokens_per_minute = 1000\nmax_concurrency = 5"
    async with _serve_gateways(redis, tmp_path, 1, entries={"a": limits}) as gateways:
        asked, began = _count_questions(gateways.limits), await gateways.now()

        def reserve(claim: Claim) -> asyncio.Task[Refusal | None]:
            return asyncio.create_task(gateways.limits.reserve(claim, 1000, 1))

        left = Claim("a", 0, 1000, 5)
        redis.freeze()
        try:
            call = reserve(left)
            await until(lambda: asked)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            gateways.limits.settle(left)
        finally:
            redis.thaw()

        async def is_whole() -> bool:
            return await reserve(Claim("a", 0, 1000, 5)) is None

        await until(is_whole, 30)
        assert await gateways.now() < began + 55  # by the minute it would be whole as well


async def test_gateway_that_is_killed_leaves_what_it_holds_for_seconds(
    redis: RedisServer, tmp_path: Path
) -> None:
    """A process of its own, as users run it."""
    key, entry = make_key("a")
    path = tmp_path / "keys.toml"
    path.write_text(f"{entry}requests_per_minute = 100\nmax_concurrency = 5\n")
    engine = Behaviour()
    flags = ("--keys-file", str(path), "--redis-url", redis.url, "--redis-timeout-s", "30")
    async with (
        serve_app(build_fake_engine(engine)) as engine_url,
        serve_process(tmp_path, engine_url, *flags) as gateway,
        httpx.AsyncClient(base_url=gateway.url, timeout=60, verify=NO_TLS) as client,
    ):
        client.headers["Authorization"] = f"Bearer {key}"
        answer = await client.post("/v1/chat/completions", json=_HI)
        assert answer.headers["x-ratelimit-remaining-requests"] == "99"
        engine.delay_s = 60
        running = asyncio.create_task(client.post("/v1/chat/completions", json=_HI))
        await until(lambda: engine.running == 1)
        gateway.process.kill()
        with pytest.raises(httpx.TransportError):
            await running

    async with Redis.from_url(redis.url) as client_of_redis:
        told: Any = await client_of_redis.hgetall("vllm-gateway:limits:a")
        now = (await client_of_redis.time())[0]
        (held,) = (text for name, text in told.items() if name.startswith(b"held:"))
        count, _, expires = held.split()
        assert int(count) == 1
        assert float(expires) <= now + 16


@pytest.mark.parametrize("is_told_late", [False, True])
async def test_refused_bodies_are_counted_though_nothing_is_reserved_for_them(
    redis: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_told_late: bool
) -> None:
    limits = "requests_per_minute = 5\nmax_concurrency = 100"
    async with _serve_gateways(redis, tmp_path, 1, entries={"a": limits}) as gateways:
        if is_told_late:
            # Redis hears of the ends of requests when the next one has to be asked for.
            shared = gateways.all[0].app[LIMITS]
            monkeypatch.setattr(shared, "_wake", asyncio.Event())
        began = await gateways.now()
        statuses = [(await gateways.ask(0, "a", max_tokens="many")).status_code for _ in range(12)]
        most = int(5 * (1 + (await gateways.now() - began) / 60))

        assert statuses[:5] == [400] * 5
        assert statuses.count(400) <= most
        assert statuses.count(400) + statuses.count(429) == 12


async def test_caller_who_hangs_up_takes_no_other_callers_ends_along(
    redis: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = "requests_per_minute = 100\ntokens_per_minute = 100000\nmax_concurrency = 9"
    async with _serve_gateways(redis, tmp_path, 1, entries={"a": limits}) as gateways:
        shared = gateways.all[0].app[LIMITS]
        assert isinstance(shared, RedisLimits)
        claim = Claim("a", 100, 100_000, 9)
        assert await shared.reserve(claim, 10, 1) is None
        monkeypatch.setattr(shared, "_wake", asyncio.Event())  # the worker tells nothing
        claim.used_tokens = 50_000
        shared.settle(claim)
        is_telling, may_tell, tell = asyncio.Event(), asyncio.Event(), shared._tell

        async def tell_late(settlements: Any) -> None:
            is_telling.set()
            await may_tell.wait()
            await tell(settlements)

        monkeypatch.setattr(shared, "_tell", tell_late)
        hung_up = asyncio.create_task(shared.count(Claim("a", 100, 100_000, 9)))
        await is_telling.wait()
        hung_up.cancel()
        await asyncio.gather(hung_up, return_exceptions=True)
        may_tell.set()
        another = Claim("a", 100, 100_000, 9)
        await shared.count(another)

        assert another.tokens_left < 60_000


async def test_answer_does_not_wait_until_redis_has_been_told_of_its_end(
    redis: RedisServer, tmp_path: Path
) -> None:
    limits = "requests_per_minute = 100\ntokens_per_minute = 10000"
    async with _serve_gateways(redis, tmp_path, 1, entries={"a": limits}) as gateways:
        engine = gateways.all[0].engine
        engine.slots = asyncio.Semaphore(0)
        call = asyncio.create_task(gateways.ask(0, "a"))
        await until(lambda: engine.running == 1)
        redis.freeze()
        try:
            engine.slots.release()
            assert (await call).status_code == 200
        finally:
            redis.thaw()


async def test_gateway_ends_though_the_client_of_redis_keeps_a_cancellation_to_itself(
    redis: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it does where Redis's answer comes in the same moment."""
    telling = asyncio.Event()

    async def keep_to_oneself(_: object) -> None:
        telling.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(3600)

    limits = "requests_per_minute = 100\ntokens_per_minute = 10000"
    async with asyncio.timeout(PROGRAM_S):
        async with _serve_gateways(redis, tmp_path, 1, entries={"a": limits}) as gateways:
            with monkeypatch.context() as patch:
                patch.setattr(gateways.limits, "_tell", keep_to_oneself)
                assert (await gateways.ask(0, "a")).status_code == 200
                await telling.wait()


async def _read_away(served: Served) -> float | None:
    metrics = (await served.client.get("/metrics")).text
    line = next(one for one in metrics.splitlines() if one.startswith("gateway_redis_away "))
    return float(line.split()[1])


async def test_redis_killed_and_back_is_told_and_limits_go_on_in_each_gateway(
    redis: RedisServer, tmp_path: Path
) -> None:
    entries = {"a": "requests_per_minute = 2\nmax_concurrency = 9", "free": ""}
    async with _serve_gateways(redis, tmp_path, 2, entries=entries) as gateways:
        first, second = gateways.all

        async def read_state(served: Served) -> str:
            return str((await served.client.get("/readyz")).json()["limits"])

        async def ask(number: int) -> int:
            return (await gateways.ask(number, "a")).status_code

        async def check_allowance() -> None:
            """A minute's is there, once."""
            began = await gateways.now()
            statuses = await asyncio.gather(*map(ask, range(4)))
            most = int(2 * (1 + (await gateways.now() - began) / 60))
            assert 2 <= statuses.count(200) <= most
            assert statuses.count(200) + statuses.count(429) == 4

        await check_allowance()
        assert await read_state(first) == "shared"
        assert await _read_away(first) == 0

        redis.kill()
        for number in (0, 1):  # each for itself, and the whole of the limit
            assert [await ask(number) for _ in range(3)] == [200, 200, 429]
            assert await read_state(gateways.all[number]) == "local"
            assert await _read_away(gateways.all[number]) == 1
        assert (await gateways.ask(0, "free")).status_code == 200

        redis.start()
        for served in (first, second):
            await until(lambda one=served: _is_shared(one), _PATIENCE_S)  # type: ignore[misc]
        await check_allowance()  # it remembers nothing


async def _is_shared(served: Served) -> bool:
    answer = await served.client.get("/readyz")
    return answer.status_code == 200 and answer.json()["limits"] == "shared"


async def test_redis_away_refuses_limited_keys_where_that_is_wanted(
    redis: RedisServer, tmp_path: Path
) -> None:
    entries = {"a": "requests_per_minute = 1000", "free": ""}
    options: dict[str, Any] = {"entries": entries, "redis_away": "refuse"}
    async with _serve_gateways(redis, tmp_path, 1, **options) as gateways:
        (served,) = gateways.all
        assert (await gateways.ask(0, "a")).status_code == 200

        redis.kill()
        refused, free = await gateways.ask(0, "a"), await gateways.ask(0, "free")
        ready = await served.client.get("/readyz")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "limits_away")
        assert refused.headers["Retry-After"] == "1"
        assert free.status_code == 200
        assert (ready.status_code, ready.json()["error"]["code"]) == (503, "limits_away")

        redis.start()
        await until(lambda: _is_shared(served), _PATIENCE_S)
        assert (await gateways.ask(0, "a")).status_code == 200


async def test_redis_that_answers_nothing_holds_no_request(
    redis: RedisServer, tmp_path: Path
) -> None:
    entries = {"a": "requests_per_minute = 1000\ntokens_per_minute = 100000"}
    options: dict[str, Any] = {"entries": entries, "redis_timeout_s": 0.2}
    async with _serve_gateways(redis, tmp_path, 1, **options) as gateways:
        redis.freeze()
        try:
            answers = await asyncio.gather(*(gateways.ask(0, "a") for _ in range(20)))
            asked = _count_questions(gateways.limits)
            answers += [await gateways.ask(0, "a") for _ in range(20)]
        finally:
            redis.thaw()
        assert {answer.status_code for answer in answers} == {200}
        assert asked == []  # those that came when it was known to be away
        await until(lambda: _is_shared(gateways.all[0]), _PATIENCE_S)


async def test_gateway_starts_while_redis_is_away(redis: RedisServer, tmp_path: Path) -> None:
    redis.kill()
    entries = {"a": "requests_per_minute = 1000"}
    async with _serve_gateways(redis, tmp_path, 1, entries=entries) as gateways:
        assert gateways.all[0].app[POOL].is_ready
        assert (await gateways.ask(0, "a")).status_code == 200
        redis.start()
        await until(lambda: _is_shared(gateways.all[0]), _PATIENCE_S)


@pytest.mark.parametrize("url", ["http://127.0.0.1:6379", "redis://127.0.0.1:6379/0?color=red"])
def test_redis_url_that_can_be_none_stops_the_start(url: str) -> None:
    with pytest.raises(SettingsError, match="GATEWAY_REDIS_URL"):
        build_app(make_settings(redis_url=url))


def test_redis_password_is_in_no_text_of_the_settings() -> None:
    assert "hush-hush" not in repr(make_settings(redis_url="redis://:hush-hush@127.0.0.1:6379/0"))
