"""Engines by DNS: they join, take work and leave without a lost request, whatever the names do."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import dns.asyncresolver
import dns.rcode
import dns.resolver
import pytest
import structlog
from aiohttp import web

from common.ports import find_free_ports
from gateway.app import build_app
from gateway.config import Settings, SettingsError, load_settings
from gateway.discovery import dns_names
from gateway.engines.pool import POOL
from lab.faults.servers.name_server import NameServer, run_name_server
from tests.fake_engine import Behaviour, build_fake_engine, serve_app
from tests.gateway.conftest import Serve, until
from tests.gateway.discovery.conftest import list_ready, run_pods

NAME = "vllm.models.test"
A, B, C = "127.0.0.11", "127.0.0.12", "127.0.0.13"


def _settings(server: NameServer, entry: str, **fields: Any) -> dict[str, Any]:
    basic = {"engines": (entry,), "dns_server": server.address, "wait_ready": False}
    return basic | {"discovery_interval_s": 0.05} | fields


async def test_engine_that_joins_takes_work_and_leaves_without_a_lost_request(
    serve: Serve,
) -> None:
    server = NameServer({(NAME, "A"): [A, B]})
    async with (
        run_name_server(server),
        run_pods(A, B) as pods,
        serve(**_settings(server, f"dns+http://{NAME}:{pods.port}")) as served,
    ):
        await until(lambda: list_ready(served) == pods.list_urls(A, B))
        is_over = asyncio.Event()

        async def ask() -> list[int]:
            statuses = []
            while not is_over.is_set():
                statuses.append((await served.chat("hi")).status_code)
            return statuses

        # Where all engines are idle the first is asked: let these two have work.
        for busy in (A, B):
            pods.engines[busy].delay_s = 0.05
        callers = [asyncio.create_task(ask()) for _ in range(4)]
        await pods.start(C)
        server.records[NAME, "A"] = [C, B, A]
        third = pods.engines[C]
        await until(lambda: any("messages" in call for call in third.calls))
        third.slots = asyncio.Semaphore(0)
        await until(lambda: third.running > 0)

        server.records[NAME, "A"] = [B, A]
        await until(lambda: list_ready(served) == pods.list_urls(A, B))
        running = third.running
        assert running > 0  # what it has it may finish
        for _ in range(running):
            third.slots.release()
        is_over.set()
        statuses = [status for caller in callers for status in await caller]

    assert set(statuses) == {200}
    assert third.running == 0


async def test_launchers_are_asked_on_the_host_of_each_engine(serve: Serve) -> None:
    """`*` in GATEWAY_LAUNCHERS: for what an engine runs at once, and by the page."""
    server = NameServer({(NAME, "A"): [A, B]})

    def build_launcher(engine_port: int, sequences: int) -> web.Application:
        async def status(_request: web.Request) -> web.Response:
            facts = {"engine_port": engine_port, "max_num_seqs": sequences}
            return web.json_response({**facts, "model": f"of {sequences}"})

        launcher = web.Application()
        launcher.router.add_get("/status", status)
        return launcher

    (port,) = find_free_ports(1)
    async with run_name_server(server), run_pods(A, B) as pods, AsyncExitStack() as stack:
        for host, sequences in ((A, 48), (B, 80)):
            launcher = build_launcher(pods.port, sequences)
            await stack.enter_async_context(serve_app(launcher, port, host=host))
        settings = _settings(server, f"dns+http://{NAME}:{pods.port}")
        served = await stack.enter_async_context(serve(**settings, launchers=(f"http://*:{port}",)))
        await until(lambda: list_ready(served) == pods.list_urls(A, B))

        async def list_shown() -> list[str]:
            launchers = (await served.client.get("/ui/status")).json()["launchers"]
            return [one["model"] for one in launchers]

        async def is_only_one_shown() -> bool:
            return await list_shown() == ["of 80"]

        assert [one.sequences for one in served.app[POOL].engines] == [48, 80]
        assert await list_shown() == ["of 48", "of 80"]
        server.records[NAME, "A"] = [B]
        await until(is_only_one_shown)


async def test_srv_records_tell_host_and_port(serve: Serve) -> None:
    server = NameServer()
    (first, second) = find_free_ports(2)
    name = f"_http._tcp.{NAME}"
    async with run_name_server(server):
        server.records[name, "SRV"] = [f"0 0 {port} localhost." for port in (first, second)]
        async with (
            serve_app(build_fake_engine(Behaviour()), first),
            serve_app(build_fake_engine(Behaviour()), second),
            serve(**_settings(server, f"srv+http://{name}")) as served,
        ):
            expected = sorted(f"http://localhost:{port}" for port in (first, second))
            await until(lambda: sorted(list_ready(served)) == expected)

            assert (await served.chat("hi")).status_code == 200


async def test_srv_record_of_a_service_that_is_away_is_no_engine(serve: Serve) -> None:
    """Its target is the root (RFC 2782)."""
    server = NameServer()
    (port,) = find_free_ports(1)
    name = f"_http._tcp.{NAME}"
    server.records[name, "SRV"] = ["0 0 0 ."]
    async with (
        run_name_server(server),
        serve_app(build_fake_engine(Behaviour()), port),
        serve(**_settings(server, f"srv+http://{name}")) as served,
    ):
        await until(lambda: len(server.asked) > 1)
        assert served.app[POOL].engines == []

        server.records[name, "SRV"] = [f"0 0 {port} localhost."]
        await until(lambda: list_ready(served) == [f"http://localhost:{port}"])


async def test_source_that_cannot_be_built_is_told_and_tried_again(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a host without /etc/resolv.conf."""
    build, failures = dns_names.build_resolver, 0

    def fail(_server: str) -> dns.asyncresolver.Resolver:
        nonlocal failures
        failures += 1
        raise dns.resolver.NoResolverConfiguration

    monkeypatch.setattr(dns_names, "build_resolver", fail)
    server = NameServer({(NAME, "A"): [A]})
    async with run_name_server(server), run_pods(A) as pods:
        entry = f"dns+http://{NAME}:{pods.port}"
        with structlog.testing.capture_logs() as logs:
            async with serve(**_settings(server, entry)) as served:
                await until(lambda: failures > 1)
                monkeypatch.setattr(dns_names, "build_resolver", build)
                await until(lambda: list_ready(served) == pods.list_urls(A))

    told = [one for one in logs if one["event"] == "engines_not_found"]
    assert "Resolver configuration" in told[0]["reason"]


@pytest.mark.parametrize("failure", ["refused", "unknown", "empty", "silent"])
async def test_failure_keeps_the_last_good_answer(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    monkeypatch.setattr(dns_names, "_LONGEST_ANSWER_S", 0.5)
    server = NameServer({(NAME, "A"): [A]})
    async with (
        run_name_server(server),
        run_pods(A, B) as pods,
        serve(**_settings(server, f"dns+http://{NAME}:{pods.port}")) as served,
    ):
        await until(lambda: list_ready(served) == pods.list_urls(A))

        server.records = {}
        server.is_silent = failure == "silent"
        codes = {"refused": dns.rcode.SERVFAIL, "unknown": dns.rcode.NXDOMAIN}
        server.rcode = codes.get(failure, dns.rcode.NOERROR)
        n_asked = len(server.asked)
        await until(lambda: len(server.asked) > n_asked + 2)
        assert list_ready(served) == pods.list_urls(A)
        assert (await served.chat("hi")).status_code == 200

        server.records, server.is_silent = {(NAME, "A"): [A, B]}, False
        server.rcode = dns.rcode.NOERROR
        await until(lambda: list_ready(served) == pods.list_urls(A, B))


async def test_short_time_to_live_is_followed(serve: Serve) -> None:
    server = NameServer({(NAME, "A"): [A]}, ttl_s=0)
    async with run_name_server(server):
        entry = f"dns+http://{NAME}:8001"
        async with serve(**_settings(server, entry, discovery_interval_s=3600)):
            await until(lambda: len(server.asked) > 1, 60)


async def test_name_of_version_6_addresses_alone_is_found(serve: Serve) -> None:
    server = NameServer({(NAME, "AAAA"): ["::1"]})
    (port,) = find_free_ports(1)
    async with (
        run_name_server(server),
        serve_app(build_fake_engine(Behaviour()), port, host="::1"),
        serve(**_settings(server, f"dns+http://{NAME}:{port}")) as served,
    ):
        await until(lambda: list_ready(served) == [f"http://[::1]:{port}"])


async def test_settings_file_changes_where_engines_are_found(tmp_path: Path) -> None:
    path = tmp_path / "gateway.toml"
    server = NameServer({(NAME, "A"): [A, B]})
    async with run_name_server(server), run_pods(A, B, C) as pods:

        def write(*entries: str) -> None:
            path.write_text(f'prompt_style = "raw"\nengines = {list(entries)}\n')

        def reload() -> Settings:
            arguments = ["--config", str(path), "--probe-interval-s", "0.05"]
            arguments += ["--warmup-prompts", "2", "--reload-interval-s", "0.05"]
            return load_settings([*arguments, "--dns-server", server.address])

        own = f"http://{C}:{pods.port}"
        write(own)
        app = build_app(reload(), reload)
        async with serve_app(app):
            pool = app[POOL]
            write(own, f"dns+http://{NAME}:{pods.port}")
            await until(lambda: [one.url for one in pool.engines] == pods.list_urls(C, A, B))
            write(own)
            await until(lambda: [one.url for one in pool.engines] == [own])


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ("dns+https://name:8001", "no certificate names an address"),
        ("srv+http://name:8001", "leave it out"),
        ("dns+http://me:secret@name:8001", "no user and password"),
        ("dns+ftp://name", "is not an http"),
        ("dns+http://name,dns+http://name:80", "is there twice"),
    ],
)
def test_entry_that_cannot_be_stops_the_start(entry: str, told: str) -> None:
    with pytest.raises(SettingsError, match=told) as caught:
        load_settings(["--prompt-style", "raw", "--engines", entry])
    assert "secret" not in str(caught.value)


def test_name_server_that_is_none_stops_the_start() -> None:
    with pytest.raises(SettingsError, match="is not address:port"):
        load_settings(["--prompt-style", "raw", "--dns-server", "somewhere"])
