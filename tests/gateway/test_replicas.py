"""Several gateways behind one address: one process each, on one port of a host."""

from __future__ import annotations

import asyncio
import re
import signal
from pathlib import Path

import httpx
import pytest

from common.ports import find_free_ports
from tests.fake_engine import Behaviour, build_fake_engine, serve_app
from tests.gateway.conftest import until
from tests.gateway.process import GatewayProcess, serve_process
from tests.patience import PROGRAM_S
from tests.plain_http import NO_TLS

pytestmark = pytest.mark.programs


async def _ask(url: str, number: int) -> httpx.Response:
    """On a connection of its own, so that the kernel spreads the calls."""
    async with httpx.AsyncClient(timeout=60, verify=NO_TLS) as client:
        return await client.post(f"{url}/predict", json={"prompt": f"q{number}"})


def _count_served(gateway: GatewayProcess) -> int:
    return len(re.findall(r'"route":"/predict","status":200', gateway.read_log()))


async def test_replicas_share_a_port_and_one_may_leave(tmp_path: Path) -> None:
    (port,) = find_free_ports(1)
    flags = ("--port", str(port), "--reuse-port")
    first_folder, second_folder = tmp_path / "first", tmp_path / "second"
    first_folder.mkdir()
    second_folder.mkdir()
    async with (
        serve_app(build_fake_engine(Behaviour())) as engine_url,
        serve_process(first_folder, engine_url, *flags) as first,
        serve_process(second_folder, engine_url, *flags) as second,
    ):
        answers = await asyncio.gather(*(_ask(first.url, number) for number in range(60)))
        # Their lines are written beside the answers.
        await until(lambda: _count_served(first) + _count_served(second) == 60)
        served = [_count_served(gateway) for gateway in (first, second)]
        first.process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(first.process.wait(), PROGRAM_S) == 0
        later = await asyncio.gather(*(_ask(second.url, number) for number in range(60, 90)))

        assert [answer.json() for answer in (*answers, *later)] == [
            {"response": f"answer:q{number}"} for number in range(90)
        ]
        assert min(served) > 0
        await until(lambda: _count_served(second) == served[1] + 30)
