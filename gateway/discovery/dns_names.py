"""Engines by DNS: the addresses of a name, or the hosts and ports of its SRV records.

A headless service of Kubernetes has both, and so have Consul and Docker's networks. A name that has
no records at the moment counts as a failure: the resolvers of clusters say so for a moment, too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from urllib.parse import urlsplit

import dns.asyncresolver
import dns.exception
import dns.rdatatype
import dns.resolver
import structlog

from gateway.config import Settings
from gateway.discovery.sources import Tell

log = structlog.get_logger("gateway")

_SHORTEST_PAUSE_S = 1.0  # a time to live of 0 is no wish to be asked all the time
_LONGEST_ANSWER_S = 5.0


class DnsSource:
    """`dns+http://name:port` or `srv+http://_service._tcp.name`."""

    def __init__(self, entry: str, settings: Settings) -> None:
        self._entry = entry
        kind, _, address = entry.partition("+")
        parts = urlsplit(address)
        self._name, self._port, self._scheme = parts.hostname or "", parts.port or 80, parts.scheme
        self._path = parts.path.rstrip("/")
        self._is_srv = kind == "srv"
        self._longest_pause_s = settings.discovery_interval_s
        self._resolver = build_resolver(settings.dns_server)

    async def follow(self, tell: Tell) -> None:
        is_failing = False
        while True:
            pause_s = self._longest_pause_s
            try:
                urls, ttl_s = await self._look_up()
                await tell(urls)
                pause_s = min(pause_s, max(_SHORTEST_PAUSE_S, ttl_s))
                is_failing = False
            except (dns.exception.DNSException, OSError) as error:
                if not is_failing:  # said once, not at every look
                    reason = f"{type(error).__name__}: {error}"
                    log.warning("engines_not_found", source=self._entry, reason=reason)
                is_failing = True
            await asyncio.sleep(pause_s)

    async def _look_up(self) -> tuple[Sequence[str], float]:
        """In the order of the names, not of the answer: resolvers turn that around each time."""
        if self._is_srv:
            answer = await self._ask(self._name, dns.rdatatype.SRV)
            # The target `.` says that the service is not there (RFC 2782).
            told = [(str(one.target).rstrip("."), one.port) for one in answer]
            hosts = [(host, port) for host, port in told if host]
        else:
            try:
                answer = await self._ask(self._name, dns.rdatatype.A)
            except dns.resolver.NoAnswer:  # a pod with both would be found twice
                answer = await self._ask(self._name, dns.rdatatype.AAAA)
            hosts = [(one.address, self._port) for one in answer]
        ttl_s = float(answer.rrset.ttl if answer.rrset is not None else 0)
        return [self._build_url(host, port) for host, port in sorted(set(hosts))], ttl_s

    async def _ask(self, name: str, kind: dns.rdatatype.RdataType) -> dns.resolver.Answer:
        return await self._resolver.resolve(name, kind, search=True, lifetime=_LONGEST_ANSWER_S)

    def _build_url(self, host: str, port: int) -> str:
        host = f"[{host}]" if ":" in host else host
        return f"{self._scheme}://{host}:{port}{self._path}"


def build_resolver(server: str) -> dns.asyncresolver.Resolver:
    """This host's name servers, or the one that is set as `address:port`."""
    if not server:
        return dns.asyncresolver.Resolver()
    host, _, port = server.rpartition(":")
    resolver = dns.asyncresolver.Resolver(configure=False)
    resolver.nameservers, resolver.port = [host.strip("[]")], int(port)
    return resolver
