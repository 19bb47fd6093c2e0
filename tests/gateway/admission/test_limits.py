"""One protocol, two keepers: what a key's limits leave, in this process and in a real Redis."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from gateway.admission.limits import Claim, Limits, LocalLimits, Refusal, format_duration
from gateway.admission.redis_limits import RedisLimits
from gateway.observability.metrics import Metrics
from tests.gateway.conftest import make_settings, until
from tests.redis_server import RedisServer, run_redis

# What a busy machine must not overrun.
_PATIENCE_S = 30.0


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with run_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@asynccontextmanager
async def _open_redis(server: RedisServer, lease_s: float = 600.0) -> AsyncIterator[RedisLimits]:
    settings = make_settings(redis_url=server.url, redis_timeout_s=_PATIENCE_S)
    limits = RedisLimits(settings, Metrics(), lease_s=lease_s)
    running = limits.run(web.Application())
    await anext(running)
    try:
        yield limits
    finally:
        with pytest.raises(StopAsyncIteration):
            await anext(running)


@pytest.fixture(params=["local", "redis"])
async def limits(request: pytest.FixtureRequest) -> AsyncIterator[Limits]:
    if request.param == "local":
        yield LocalLimits()
        return
    async with _open_redis(request.getfixturevalue("redis")) as kept:
        yield kept


def _claim(account: str, requests: int = 0, tokens: int = 0, sequences: int = 0) -> Claim:
    return Claim(account, requests, tokens, sequences)


@pytest.fixture
def account(request: pytest.FixtureRequest) -> str:
    return str(request.node.name)


async def _wait(limits: Limits, claim: Claim) -> float:
    """The seconds after which the request would be let in."""
    refusal = await limits.count(claim)
    return refusal.wait_s if refusal else 0.0


async def _settle(limits: Limits, claim: Claim) -> None:
    """Until it can be seen: Redis is told beside the calls."""
    limits.settle(claim)
    if isinstance(limits, RedisLimits):
        await until(lambda: not limits._settlements)
        await limits._redis.ping()
    assert claim.is_settled


async def test_count_from_a_full_allowance_leaves_the_rest(limits: Limits, account: str) -> None:
    claims = [_claim(account, requests=2) for _ in range(3)]

    assert [await _wait(limits, claim) for claim in claims[:2]] == [0.0, 0.0]
    assert 20 < await _wait(limits, claims[2]) <= 30
    assert [int(claim.requests_left) for claim in claims] == [1, 0, 0]
    assert await _wait(limits, _claim(f"{account} of another", requests=2)) == 0.0


async def test_count_waits_until_overdrawn_tokens_are_paid(limits: Limits, account: str) -> None:
    claim = _claim(account, tokens=60)
    assert await _wait(limits, claim) == 0.0
    claim.used_tokens = 150

    await _settle(limits, claim)

    async def is_charged() -> bool:
        return 60 < await _wait(limits, _claim(account, tokens=60)) <= 91

    await until(is_charged)


async def test_what_was_set_aside_and_not_used_can_be_taken_again(
    limits: Limits, account: str
) -> None:
    first, second, third = (_claim(account, tokens=60) for _ in range(3))
    assert await limits.reserve(first, 60, 0) is None
    refusal = await limits.reserve(second, 30, 0)
    assert refusal is not None
    assert refusal.limit == "tokens_per_minute"
    assert refusal.wait_s <= 30
    assert await limits.reserve(second, 0, 0) is None

    await _settle(limits, first)

    async def is_free() -> bool:
        return await limits.reserve(third, 60, 0) is None

    await until(is_free)


async def test_settling_twice_gives_back_once(limits: Limits, account: str) -> None:
    claim = _claim(account, tokens=6000)
    await limits.reserve(claim, 6000, 0)
    claim.used_tokens = 5000

    for _ in range(3):
        await _settle(limits, claim)

    assert await limits.reserve(_claim(account, tokens=6000), 3000, 0) is not None


async def test_hold_more_than_the_limit_is_refused_unless_nothing_is_held(
    limits: Limits, account: str
) -> None:
    first, second, third = (_claim(account, sequences=4) for _ in range(3))
    assert await limits.reserve(first, 0, 5) is None
    assert await limits.reserve(second, 0, 1) == Refusal("key_concurrency", held=5)
    await _settle(limits, first)

    assert await limits.reserve(third, 0, 4) is None
    assert await limits.reserve(second, 0, 1) == Refusal("key_concurrency", held=4)


async def test_what_is_refused_holds_nothing_and_sets_nothing_aside(
    limits: Limits, account: str
) -> None:
    held = _claim(account, tokens=100, sequences=4)
    assert await limits.reserve(held, 60, 2) is None
    for tokens, sequences in ((10, 3), (90, 1), (90, 1)):
        refused = _claim(account, tokens=100, sequences=4)
        assert await limits.reserve(refused, tokens, sequences) is not None
        await _settle(limits, refused)

    assert await limits.reserve(_claim(account, tokens=100, sequences=4), 40, 2) is None


async def test_limit_that_is_lowered_holds_at_once(limits: Limits, account: str) -> None:
    assert await _wait(limits, _claim(account, requests=1000)) == 0.0
    low = [_claim(account, requests=1) for _ in range(2)]

    assert await _wait(limits, low[0]) == 0.0
    assert await _wait(limits, low[1]) > 30


async def test_gateways_share_what_a_key_has_left(redis: RedisServer, account: str) -> None:
    async with _open_redis(redis) as one, _open_redis(redis) as other:
        claims = [_claim(account, requests=4, tokens=100, sequences=2) for _ in range(4)]
        assert await _wait(one, claims[0]) == 0.0
        assert await _wait(other, claims[1]) == 0.0
        assert int(claims[1].requests_left) == 2
        assert await one.reserve(claims[0], 70, 1) is None
        refusal = await other.reserve(claims[1], 40, 1)
        assert refusal is not None
        assert refusal.limit == "tokens_per_minute"
        assert await other.reserve(claims[1], 10, 1) is None
        assert await one.reserve(claims[2], 0, 1) == Refusal("key_concurrency", held=2)

        await _settle(other, claims[1])

        async def is_free() -> bool:
            return await one.reserve(claims[2], 0, 1) is None

        await until(is_free)


async def test_what_a_gateway_held_that_has_died_is_free_after_its_lease(
    redis: RedisServer, account: str
) -> None:
    settings = make_settings(redis_url=redis.url, redis_timeout_s=_PATIENCE_S)
    dead = RedisLimits(settings, Metrics(), lease_s=0.5)  # nobody tells that it lives
    lasting = RedisLimits(settings, Metrics(), lease_s=600)
    async with _open_redis(redis) as alive:
        for name, limits in ((account, dead), (f"{account} lasting", lasting)):
            assert await limits.reserve(_claim(name, sequences=1), 0, 1) is None

        async def is_free(name: str) -> bool:
            return await alive.reserve(_claim(name, sequences=1), 0, 1) is None

        await until(lambda: is_free(account))
        assert not await is_free(f"{account} lasting")
    for limits in (dead, lasting):
        await limits._redis.aclose()


async def test_gateway_that_lives_tells_what_it_holds_again(
    redis: RedisServer, account: str
) -> None:
    async with _open_redis(redis, lease_s=1.0) as limits:
        assert await limits.reserve(_claim(account, sequences=1), 0, 1) is None

        async def read_orders() -> list[int]:
            told = await limits._redis.hgetall(f"vllm-gateway:limits:{account}")
            return [int(text.split()[1]) for text in told.values()]

        (first,) = await read_orders()
        await until(lambda: _is_later(read_orders, first))
        await limits._redis.flushall()
        await until(lambda: _is_later(read_orders, first))


async def _is_later(read_orders: object, first: int) -> bool:
    orders = await read_orders()  # type: ignore[operator]
    return bool(orders) and orders[0] > first


async def test_overdraft_is_remembered_until_it_is_paid(redis: RedisServer, account: str) -> None:
    """Also where a gateway tells meanwhile what else it holds."""
    async with _open_redis(redis, lease_s=1.0) as limits:
        running = _claim(account, tokens=60, sequences=9)
        assert await limits.reserve(running, 0, 1) is None
        claim = _claim(account, tokens=60)
        claim.used_tokens = 60 * 31
        await _settle(limits, claim)
        orders = []

        async def is_told_again() -> bool:
            told: Any = await limits._redis.hgetall(f"vllm-gateway:limits:{account}")
            orders.append(next(text for name, text in told.items() if name.startswith(b"held:")))
            return len(set(orders)) > 1

        await until(is_told_again)
        assert await limits._redis.ttl(f"vllm-gateway:limits:{account}") > 60 * 30


async def test_calls_that_overtake_each_other_leave_what_is_held(
    redis: RedisServer, account: str
) -> None:
    async with _open_redis(redis) as one, _open_redis(redis) as other:
        claims = [_claim(account, sequences=64) for _ in range(64)]
        assert set(await asyncio.gather(*(one.reserve(c, 0, 1) for c in claims))) == {None}
        refusal = await other.reserve(_claim(account, sequences=64), 0, 1)
        assert refusal == Refusal("key_concurrency", held=64)
        for claim in claims[:60]:
            one.settle(claim)
        await _settle(one, claims[60])

        async def count_held() -> int:
            refusal = await other.reserve(_claim(account, sequences=1), 0, 1)
            return refusal.held if refusal else 0

        async def is_told() -> bool:
            return await count_held() == 3

        await until(is_told)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((0, "0s"), (-1, "0s"), (0.0061, "7ms"), (1, "1s"), (1.5, "1.5s")),
        *((59.9999, "1m0s"), (360, "6m0s"), (61.25, "1m1.25s")),
    ],
)
def test_duration_is_written_as_openai_does(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
