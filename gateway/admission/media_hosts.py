"""From which hosts a caller may have an engine fetch media: from public ones, and those that a
setting lists. Anything else would let callers reach what only the engine can (SSRF).

A name is looked up here, and again by the engine when it fetches: one that changes its address in
between gets through. What closes that is the engine's own list (`LAUNCHER_MEDIA_DOMAINS`).
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor

from aiohttp import web

from common.web.foreign_pages import HostList
from gateway.config import PREFIX, Settings
from gateway.errors import InvalidRequest

_MOST_HOSTS = 16
_LOOK_UP_S = 5.0
_LOOK_UPS_AT_ONCE = 4  # threads of their own: names that nobody answers for must hold up nobody


class MediaHosts:
    def __init__(self, settings: Settings) -> None:
        self._allowed = HostList(settings.media_hosts)
        self._threads = ThreadPoolExecutor(_LOOK_UPS_AT_ONCE, thread_name_prefix="media-host")

    async def ensure_allowed(self, hosts: Collection[str]) -> None:
        if self._allowed.has_any:
            return
        asked = [host for host in hosts if host not in self._allowed]
        if len(asked) > _MOST_HOSTS:
            raise _refuse(f"media of {len(asked)} hosts in one call; at most {_MOST_HOSTS}")
        await asyncio.gather(*map(self._ensure_public, asked))

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _ensure_public(self, host: str) -> None:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_LOOK_UP_S):
                rows = await loop.run_in_executor(
                    self._threads, socket.getaddrinfo, host, None, 0, socket.SOCK_STREAM
                )
        except (OSError, UnicodeError, TimeoutError):
            raise _refuse(f"the media's host {host[:100]!r} is not known to the gateway") from None
        # An address with a zone, as link-local ones have, is not parsed by every Python.
        addresses = {str(row[4][0]).partition("%")[0] for row in rows}
        if not all(map(_is_public, addresses)):
            raise _refuse(f"the media's host {host[:100]!r} is not a public one")


MEDIA_HOSTS = web.AppKey("media_hosts", MediaHosts)


def _is_public(text: str) -> bool:
    address = ipaddress.ip_address(text)
    if isinstance(address, ipaddress.IPv6Address):
        # 64:ff9b::/96 and 2002::/16 lead to the IPv4 address inside them.
        inner = address.ipv4_mapped or address.sixtofour or _read_nat64(address)
        address = inner or address
    return address.is_global and not address.is_multicast


def _read_nat64(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    is_nat64 = address in ipaddress.IPv6Network("64:ff9b::/96")
    return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF) if is_nat64 else None


def _refuse(why: str) -> InvalidRequest:
    return InvalidRequest(
        f"{why}; send the media as data: URLs, or add the host to {PREFIX}MEDIA_HOSTS",
        code="media_refused",
    )
