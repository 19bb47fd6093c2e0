"""Engines on addresses of their own, with one port, as pods have them."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from common.ports import find_free_ports
from gateway.engines.engine import EngineState
from gateway.engines.pool import POOL
from tests.fake_engine import Behaviour, build_fake_engine, serve_app
from tests.gateway.conftest import Served


@dataclass
class Pods:
    """Engines by their address."""

    port: int
    stack: contextlib.AsyncExitStack
    engines: dict[str, Behaviour] = field(default_factory=dict)

    async def start(self, *hosts: str) -> None:
        for host in hosts:
            self.engines[host] = Behaviour()
            app = build_fake_engine(self.engines[host])
            await self.stack.enter_async_context(serve_app(app, self.port, host=host))

    def list_urls(self, *hosts: str) -> list[str]:
        return [f"http://{host}:{self.port}" for host in hosts]


@contextlib.asynccontextmanager
async def run_pods(*hosts: str) -> AsyncIterator[Pods]:
    async with contextlib.AsyncExitStack() as stack:
        pods = Pods(find_free_ports(1)[0], stack)
        await pods.start(*hosts)
        yield pods


def list_ready(served: Served) -> list[str]:
    """The engines that get calls, by address."""
    return [one.url for one in served.app[POOL].engines if one.state is EngineState.READY]
