"""What the gateway leans on, away or ill: Redis, PostgreSQL, name servers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

import dns.rcode

from common.prometheus_text import sum_samples
from lab.faults.experiment import Experiment
from lab.faults.fault import Fault, Signs, Strike
from lab.faults.servers.link import Link
from lab.faults.servers.name_server import NameServer, run_name_server
from lab.faults.servers.postgres_server import Postgres
from lab.faults.servers.redis_server import RedisServer
from lab.faults.service import NotHere
from lab.faults.stores import POSTGRES, REDIS

_LASTS_S = 5.0
_MOMENT_S = 0.0
_SILENT_S = 12.0  # a look at a name is given up after five
_SLOW_S = 0.3
_NAME = "engines.test"
_NOBODYS_ADDRESS = "127.0.0.99"
Server = TypeVar("Server")


def lasting(
    find: Callable[[Experiment], Server],
    hurt: Callable[[Server], object],
    heal: Callable[[Server], object],
    lasts_s: float = _LASTS_S,
) -> Strike:
    async def strike(at: Experiment) -> None:
        server = find(at)
        hurt(server)
        try:
            await asyncio.sleep(lasts_s)
        finally:
            heal(server)
        at.lift()

    return strike


def find_redis(at: Experiment) -> RedisServer:
    if at.stores.redis is None:
        raise NotHere("the service has no Redis")
    return at.stores.redis


def find_postgres(at: Experiment) -> Postgres:
    if at.stores.postgres is None:
        raise NotHere("the service has no PostgreSQL")
    return at.stores.postgres


def find_redis_link(at: Experiment) -> Link:
    if at.stores.redis_link is None:
        raise NotHere("the service has no Redis")
    return at.stores.redis_link


def find_postgres_link(at: Experiment) -> Link:
    if at.stores.postgres_link is None:
        raise NotHere("the service has no PostgreSQL")
    return at.stores.postgres_link


def find_name_server(at: Experiment) -> NameServer:
    return at.get(NameServer)


async def is_redis_back(at: Experiment) -> bool:
    return not sum_samples(await at.read_samples(), "gateway_redis_away")


async def are_records_back(at: Experiment) -> bool:
    return not sum_samples(await at.read_samples(), "gateway_records_away")


async def start_refusing_gateway(at: Experiment) -> None:
    """One that limits nobody by itself."""
    redis = find_redis(at)
    variables = {"GATEWAY_REDIS_URL": redis.url, "GATEWAY_REDIS_AWAY": "refuse"}
    await at.start_beside(at.service.engine_url, variables=variables)


async def start_gateway_by_name(at: Experiment) -> None:
    """Its engine is found by a name, at the lab's own name server."""
    server = NameServer({(_NAME, "A"): ["127.0.0.1"]})
    await at.exits.enter_async_context(run_name_server(server))
    at.keep(server)
    port = at.service.engine_url.rpartition(":")[2]
    await at.start_beside(f"dns+http://{_NAME}:{port}", "--dns-server", server.address)


def fall_silent(server: NameServer) -> None:
    server.is_silent = True


def forget_name(server: NameServer) -> None:
    server.rcode = dns.rcode.NXDOMAIN


def mislead(server: NameServer) -> None:
    server.records[_NAME, "A"] = [_NOBODYS_ADDRESS]


def come_right(server: NameServer) -> None:
    server.is_silent, server.rcode = False, dns.rcode.NOERROR
    server.records[_NAME, "A"] = ["127.0.0.1"]


def slow_down(link: Link) -> None:
    link.delay_s = _SLOW_S


def speed_up(link: Link) -> None:
    link.delay_s = 0.0


_REDIS_AWAY = Signs("redis_away", "RedisAway")
_DATABASE_AWAY = Signs("records_away", "RecordsAway")
# Engines that were found stay, so nobody is harmed and nobody called.
_NAME_GONE = Signs("engines_not_found", "", "EngineDown", "overview: Engines ready")


def _list_redis() -> tuple[Fault, ...]:
    server, needs = RedisServer, (REDIS,)
    rows = (
        ("redis-killed", "Redis is killed, and back after 5 s", server.kill, server.start, 5.0),
        ("redis-restarted", "Redis is restarted, with nothing in it", server.kill, server.start, 0),
        ("redis-stopped", "Redis takes calls and answers none", server.freeze, server.thaw, 5.0),
        (
            "redis-read-only",
            "Redis is a replica that takes no writes",
            server.refuse_writes,
            server.take_writes,
            5.0,
        ),
    )
    faults = [
        Fault(
            name,
            what,
            lasting(find_redis, hurt, heal, lasts_s),
            _REDIS_AWAY if lasts_s else Signs("", "RedisAway"),
            is_over=is_redis_back,
            needs=needs,
        )
        for name, what, hurt, heal, lasts_s in rows
    ]
    slow = Fault(
        "redis-slow",
        "Redis is 0.6 s away, there and back (GATEWAY_REDIS_TIMEOUT_S=0.5)",
        lasting(find_redis_link, slow_down, speed_up),
        _REDIS_AWAY,
        is_over=is_redis_back,
        needs=needs,
    )
    refusing = Fault(
        "redis-killed-and-refused",
        "Redis is killed before a gateway that limits nobody by itself (GATEWAY_REDIS_AWAY=refuse)",
        lasting(find_redis, server.kill, server.start),
        _REDIS_AWAY,
        "beside",
        prepare=start_refusing_gateway,
        is_over=is_redis_back,
        needs=needs,
    )
    return (*faults, slow, refusing)


def _list_postgres() -> tuple[Fault, ...]:
    server = Postgres
    rows = (
        (
            "postgres-away",
            "PostgreSQL is stopped, and back after 5 s",
            (server.stop, server.start),
            _DATABASE_AWAY,
        ),
        (
            "postgres-stopped",
            "PostgreSQL stands still for 5 s",
            (server.freeze, server.thaw),
            Signs(),
        ),
        (
            "postgres-read-only",
            "PostgreSQL takes no writes for 5 s",
            (server.refuse_writes, server.take_writes),
            _DATABASE_AWAY,
        ),
    )
    needs = (POSTGRES,)
    faults = [
        Fault(
            name,
            what,
            lasting(find_postgres, *ways),
            signs,
            is_over=are_records_back,
            needs=needs,
        )
        for name, what, ways, signs in rows
    ]
    restarted = Fault(
        "postgres-restarted",
        "PostgreSQL is restarted",
        lasting(find_postgres, server.stop, server.start, _MOMENT_S),
        Signs("", "BatchStorageAway"),
        is_over=are_records_back,
        needs=needs,
    )
    slow = Fault(
        "postgres-slow",
        "PostgreSQL is 0.6 s away, there and back",
        lasting(find_postgres_link, slow_down, speed_up),
        Signs(),
        is_over=are_records_back,
        needs=needs,
    )
    return (*faults, restarted, slow)


def _list_names() -> tuple[Fault, ...]:
    rows = (
        ("dns-silent", "the name server answers nothing", fall_silent, _NAME_GONE, _SILENT_S),
        ("dns-gone", "the engines' name is gone", forget_name, _NAME_GONE, _LASTS_S),
        (
            "dns-wrong",
            "the engines' name leads to where nobody listens",
            mislead,
            Signs("engine_removed", "EngineDown"),
            _LASTS_S,
        ),
    )
    return tuple(
        Fault(
            name,
            what,
            lasting(find_name_server, hurt, come_right, lasts_s),
            signs,
            "beside",
            prepare=start_gateway_by_name,
        )
        for name, what, hurt, signs, lasts_s in rows
    )


FAULTS = (*_list_redis(), *_list_postgres(), *_list_names())
