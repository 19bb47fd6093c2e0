"""Ports: how the gateway's own and the one for Prometheus are opened."""

from __future__ import annotations

import socket

from aiohttp import web

_BACKLOG = 1024
_EVERY_ADDRESS = "::"


async def listen(
    runner: web.BaseRunner, host: str, port: int, *, reuse_port: bool | None = None
) -> None:
    """`OSError` where that cannot be. `::` is every address of this machine, those of IPv4 too: an
    event loop's own server would leave them out.
    """
    site: web.BaseSite
    if host == _EVERY_ADDRESS:
        listener = socket.create_server(
            (host, port),
            family=socket.AF_INET6,
            backlog=_BACKLOG,
            reuse_port=bool(reuse_port),
            dualstack_ipv6=socket.has_dualstack_ipv6(),
        )
        listener.setblocking(False)
        site = web.SockSite(runner, listener, backlog=_BACKLOG)
    else:
        site = web.TCPSite(runner, host, port, backlog=_BACKLOG, reuse_port=reuse_port)
    await site.start()
