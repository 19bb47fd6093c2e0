"""Engines by Kubernetes: the ready endpoints of a service, told by the API as they change.

Listed once, then watched. The pod's service account needs `list` and `watch` of `endpointslices`
in the service's namespace, and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
from collections.abc import AsyncIterator, Mapping
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import orjson
import structlog

from common.files import read_text
from gateway.config import Settings
from gateway.discovery.sources import Tell

log = structlog.get_logger("gateway")

_SERVICE_LABEL = "kubernetes.io/service-name"
# The API ends a watch by itself after about so long; silence beyond that is a lost connection.
_WATCH_S = 240
_SILENCE_S = _WATCH_S + 30
_LIST_TIMEOUT_S = 15
_LONGEST_EVENT_BYTES = 2**24
_LONGEST_PAUSE_S = 30  # after failures


class ApiRefusal(Exception):
    """The API's answer is no list and no watch; it says why."""


_FAILURES = (
    *(aiohttp.ClientError, ApiRefusal, OSError, TimeoutError),
    *(ValueError, LookupError, TypeError),  # an answer that makes no sense
)


class KubernetesSource:
    """`kubernetes+http://service.namespace:port`; without a namespace the gateway's own, without a
    port the service's first.
    """

    def __init__(self, entry: str, settings: Settings) -> None:
        self._entry = entry
        parts = urlsplit(entry.partition("+")[2])
        service, _, namespace = (parts.hostname or "").partition(".")
        self._scheme, self._port, self._path = parts.scheme, parts.port, parts.path.rstrip("/")
        self._account = settings.kubernetes_account
        self._api = (settings.kubernetes_api or _find_api()).rstrip("/")
        self._namespace, self._service = namespace, service
        self._slices: dict[str, Mapping[str, Any]] = {}

    async def follow(self, tell: Tell) -> None:
        version, failures = "", 0
        while True:
            try:
                async with self._open_session() as session:
                    if not version:
                        version = await self._list(session)
                        await tell(self._find_urls())
                    version = await self._watch(session, version, tell)
                failures = 0
            except _FAILURES as error:
                reason = str(error) or type(error).__name__
                log.warning("engines_not_found", source=self._entry, reason=reason)
                version, failures = "", failures + 1
            await asyncio.sleep(min(2**failures, _LONGEST_PAUSE_S))

    @contextlib.asynccontextmanager
    async def _open_session(self) -> AsyncIterator[aiohttp.ClientSession]:
        """With the token as it is now: the cluster replaces it every hour."""
        headers = {"Accept": "application/json"}
        context: ssl.SSLContext | bool = True
        token, authority = self._account / "token", self._account / "ca.crt"
        if token.is_file():
            headers["Authorization"] = f"Bearer {read_text(token).strip()}"
        if authority.is_file():
            context = ssl.create_default_context(cafile=authority)
        async with aiohttp.ClientSession(
            headers=headers,
            connector=aiohttp.TCPConnector(ssl=context),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_LIST_TIMEOUT_S),
            read_bufsize=_LONGEST_EVENT_BYTES,
            trust_env=False,
        ) as session:
            yield session

    @property
    def _url(self) -> str:
        namespace = self._namespace or read_text(self._account / "namespace").strip()
        return f"{self._api}/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices"

    async def _list(self, session: aiohttp.ClientSession) -> str:
        query = {"labelSelector": f"{_SERVICE_LABEL}={self._service}"}
        async with asyncio.timeout(_LIST_TIMEOUT_S), session.get(self._url, params=query) as answer:
            await _check(answer)
            listed = orjson.loads(await answer.read())
        self._slices = {_name(one): one for one in listed.get("items") or ()}
        return str(listed["metadata"]["resourceVersion"])

    async def _watch(self, session: aiohttp.ClientSession, version: str, tell: Tell) -> str:
        """Until the API ends it; the version to go on from, empty when all must be listed anew."""
        query = {
            "labelSelector": f"{_SERVICE_LABEL}={self._service}",
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": version,
            "timeoutSeconds": str(_WATCH_S),
        }
        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=_LIST_TIMEOUT_S, sock_read=_SILENCE_S
        )
        async with session.get(self._url, params=query, timeout=timeout) as answer:
            if answer.status == 410:
                return ""
            await _check(answer)
            while line := await answer.content.readline():
                event = orjson.loads(line)
                kind, one = event["type"], event["object"]
                if kind == "ERROR":
                    if one.get("code") == 410:
                        return ""
                    raise ApiRefusal(str(one.get("message")))
                version = str(one["metadata"]["resourceVersion"])
                if kind != "BOOKMARK":
                    self._take(kind, one)
                    await tell(self._find_urls())
        return version

    def _take(self, kind: str, one: Mapping[str, Any]) -> None:
        if kind == "DELETED":
            self._slices.pop(_name(one), None)
        else:
            self._slices[_name(one)] = one

    def _find_urls(self) -> list[str]:
        """Of a service with two kinds of addresses those of IPv4: the pods are the same."""
        found: dict[str, set[str]] = {"IPv4": set(), "IPv6": set()}
        for one in self._slices.values():
            port = self._port or next((row.get("port") for row in one.get("ports") or ()), None)
            if port is None or one.get("addressType") not in found:
                continue
            for endpoint in one.get("endpoints") or ():
                # One that ends is not ready any more; what says nothing of it is ready.
                if (endpoint.get("conditions") or {}).get("ready") in {True, None}:
                    for host in endpoint.get("addresses") or ():
                        name = f"[{host}]" if ":" in host else host
                        url = f"{self._scheme}://{name}:{port}{self._path}"
                        found[one["addressType"]].add(url)
        return sorted(found["IPv4"] or found["IPv6"])


def _find_api() -> str:
    host = os.environ.get("KUBERNETES_SERVICE_HOST", "kubernetes.default.svc")
    port = os.environ.get("KUBERNETES_SERVICE_PORT", "443")
    return f"https://{f'[{host}]' if ':' in host else host}:{port}"


def _name(one: Mapping[str, Any]) -> str:
    return str(one["metadata"]["name"])


async def _check(answer: aiohttp.ClientResponse) -> None:
    if answer.status == 200:
        return
    try:
        message = orjson.loads(await answer.read())["message"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        message = answer.reason
    hint = ""
    if answer.status in {401, 403}:
        hint = "; the service account needs a role with list and watch of endpointslices"
    raise ApiRefusal(f"the Kubernetes API answered {answer.status}: {message}{hint}")
