"""The addresses that the gateway listens on."""

from __future__ import annotations

import asyncio
import socket

import pytest
from aiohttp import web

from common.ports import find_free_ports
from gateway.listening import listen


def _has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


async def _listen_and_call(host: str, *callers: str) -> None:
    (port,) = find_free_ports(1)
    runner = web.AppRunner(web.Application(), access_log=None)
    await runner.setup()
    try:
        await listen(runner, host, port)
        for caller in callers:
            _, writer = await asyncio.open_connection(caller, port)
            writer.close()
        with pytest.raises(OSError, match="in use"):
            await listen(runner, host, port)
    finally:
        await runner.cleanup()


@pytest.mark.skipif(not _has_ipv6(), reason="this machine has no IPv6")
async def test_listening_on_every_address_means_those_of_ipv4_too() -> None:
    await _listen_and_call("::", "127.0.0.1", "::1")


async def test_listening_on_one_address_is_on_that_one() -> None:
    await _listen_and_call("127.0.0.1", "127.0.0.1")
