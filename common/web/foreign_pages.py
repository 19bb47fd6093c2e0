"""Requests that a web page has a browser make: which of them a server without keys must refuse.

Such a server is open to whoever reaches it, and every page that somebody on this machine or network
opens can reach it, through their browser, in two ways:

- DNS rebinding: the page's own name is made to point here, and the browser takes the server for the
  page's. It still sends the name, as `Host`: one that nobody has given this server is refused.
- A request across sites, whose answer the page cannot read but which does its work. The browser
  says so itself, in headers that no script can forge: `Sec-Fetch-Site`, or an `Origin` that is not
  the `Host`. The rules are those of Go's `http.CrossOriginProtection`.

Programs (curl, SDKs, Prometheus) send neither `Origin` nor `Sec-Fetch-Site`.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

# Names that no stranger can have: they are in no public DNS. Those of the RFCs 6761, 6762 and 8375,
# ICANN's for private use, Kubernetes' for Services and what home routers give out.
_PRIVATE_DOMAINS = (".localhost", ".local", ".internal", ".home.arpa", ".svc", ".lan")
_LISTED = re.compile(r"\.?[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*\.?")
_MOST_REMEMBERED = 256
ANY = "*"


@dataclass(frozen=True)
class Refusal:
    """Why a request is not answered."""

    code: str
    message: str


class HostList:
    """Hosts as a setting lists them: names and addresses, `.example.com` with all names below it,
    `*` for any.
    """

    def __init__(self, entries: Iterable[str]) -> None:
        names = [entry.lower().rstrip(".") for entry in entries]
        self.has_any = ANY in names
        self._names = frozenset(name.lstrip(".") for name in names)
        self._domains = tuple(name for name in names if name.startswith("."))

    def __contains__(self, name: str) -> bool:
        return name in self._names or name.endswith(self._domains)


def check_hosts(entries: tuple[str, ...]) -> tuple[str, ...]:
    """A validator for settings: the port is no part of a host's name."""
    for entry in entries:
        if entry != ANY and not is_ip(entry) and not _LISTED.fullmatch(entry):
            raise ValueError(
                f"{entry!r} is no host: give names or addresses, without scheme and port, "
                "`.example.com` for all names below it, `*` for any"
            )
    return entries


class PageGuard:
    """Refuses what a foreign web page has a browser send to this server."""

    def __init__(
        self,
        own_host: str,
        allowed: Iterable[str],
        setting: str,
        *,
        only_browsers: bool = False,
        origins: Container[str] = (),
    ) -> None:
        """`setting` is what the refusals tell to change. With `only_browsers` a program may call
        this server by whatever name. Pages of the `origins` may call it.
        """
        self._origins = origins
        self._allowed = HostList(allowed)
        machine = socket.gethostname().lower()
        self._own = frozenset((own_host.lower(), machine))
        self._setting = setting
        self._only_browsers = only_browsers
        self._known: set[str] = set()

    def check(
        self, method: str, headers: Mapping[str, str], *, is_private: bool = False
    ) -> Refusal | None:
        """`is_private`: what somebody has stored. A page under a rebound name could read it with a
        plain GET, in which nothing tells a browser from a program: then all are held to the names.
        """
        host = headers.get("Host", "")
        origin, site = headers.get("Origin"), headers.get("Sec-Fetch-Site")
        is_browser = origin is not None or site is not None
        is_held = is_browser or is_private or not self._only_browsers
        if is_held and not self._knows(host):
            return Refusal(
                "host_not_allowed",
                f"this server is not known as {_cut(host)!r}; if it is right to call it so, "
                f"add the name to {self._setting}",
            )
        if is_private and method in {"GET", "HEAD"}:
            method = "POST"  # nor is a followed link any way to it
        if is_browser and self._is_foreign(method, headers, host, origin, site):
            return Refusal(
                "cross_site",
                f"a web page of another site ({_cut(origin or 'unknown')}) may not call this "
                f"server; if it may, add its host to {self._setting}",
            )
        return None

    def _knows(self, host: str) -> bool:
        if not host or host in self._known or self._allowed.has_any:
            return True  # browsers always say a host
        name = read_name(host)
        is_known = is_private_name(name) or name in self._own or name in self._allowed
        if is_known and len(self._known) < _MOST_REMEMBERED:
            self._known.add(host)
        return is_known

    def _is_foreign(
        self,
        method: str,
        headers: Mapping[str, str],
        host: str,
        origin: str | None,
        site: str | None,
    ) -> bool:
        if method == "OPTIONS":
            return False  # a browser's question whether a page may ask; nothing is done for it
        if origin is not None and origin in self._origins:
            return False
        if origin is not None and read_name(_strip_scheme(origin)) in self._allowed:
            return False
        if site is not None:
            # A link that somebody followed is theirs to follow; the page has nothing of it.
            is_link = method in {"GET", "HEAD"} and headers.get("Sec-Fetch-Mode") == "navigate"
            return site not in {"same-origin", "none"} and not is_link
        # Browsers send Sec-Fetch-Site to https and localhost only. Schemes are not compared: a
        # proxy may have taken the TLS off.
        return origin is not None and _strip_scheme(origin).lower() != host.lower()


def build_middleware(guard: PageGuard) -> Middleware:
    """For a port that is there to be looked at and has no other middleware."""

    @web.middleware
    async def refuse_foreign_pages(request: web.Request, handler: Handler) -> web.StreamResponse:
        refusal = guard.check(request.method, request.headers)
        if refusal is None:
            return await handler(request)
        return web.json_response({"error": refusal.message, "code": refusal.code}, status=403)

    return refuse_foreign_pages


def read_name(host: str) -> str:
    """Of a `Host` header: in lower case, without port and without the brackets of an IPv6."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].rstrip(".").lower()


def is_private_name(name: str) -> bool:
    """One that no stranger can make point here: an address, one word, or in a private domain."""
    if "." not in name or is_ip(name):
        return True
    last = name.rpartition(".")[2]
    is_short_address = last.isascii() and last.isdigit()  # `127.1`: no domain ends in a number
    return is_short_address or name.endswith(_PRIVATE_DOMAINS)


def is_ip(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _strip_scheme(origin: str) -> str:
    return origin.rpartition("://")[2]


def _cut(text: str) -> str:
    return text[:100]
