"""The part of Kubernetes' API that tells a service's endpoints: list and watch, over real HTTP."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson
from aiohttp import web

from tests.fake_engine import serve_app

TOKEN = "let-me-in"


@dataclass
class KubernetesApi:
    """Slices by name; every change has a version, and those who watch are told of it."""

    slices: dict[str, dict[str, Any]] = field(default_factory=dict)
    events: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    version: int = 1
    oldest: int = 0  # versions before it are gone
    lists: int = 0
    watches: int = 0
    refused: int = 0
    is_open: bool = True
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def put(self, name: str, port: int, ready: Sequence[str], ending: Sequence[str] = ()) -> None:
        kind = "MODIFIED" if name in self.slices else "ADDED"
        endpoints = [_describe(host, is_ready=True) for host in ready]
        endpoints += [_describe(host, is_ready=False) for host in ending]
        self.slices[name] = {
            "metadata": {"name": name, "labels": {"kubernetes.io/service-name": "vllm"}},
            "addressType": "IPv4",
            "ports": [{"name": "http", "port": port}],
            "endpoints": endpoints,
        }
        self._tell(kind, self.slices[name])

    def drop(self, name: str) -> None:
        self._tell("DELETED", self.slices.pop(name))

    def end_watches(self, *, forget: bool = False) -> None:
        """As the API does after a while; with `forget` what they knew is too old then."""
        if forget:
            self.oldest = self.version = self.version + 10
        self._wake()

    def _tell(self, kind: str, one: dict[str, Any]) -> None:
        self.version += 1
        one["metadata"]["resourceVersion"] = str(self.version)
        self.events.append(
            (self.version, orjson.loads(orjson.dumps({"type": kind, "object": one})))
        )
        self._wake()

    def _wake(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        if request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return _refuse(401, "Unauthorized")
        if not self.is_open:
            self.refused += 1
            return _refuse(403, "endpointslices is forbidden")
        if request.query.get("labelSelector") != "kubernetes.io/service-name=vllm":
            return _refuse(400, "another service")
        if request.query.get("watch") != "true":
            self.lists += 1
            body = {
                "metadata": {"resourceVersion": str(self.version)},
                "items": list(self.slices.values()),
            }
            return web.json_response(body)
        self.watches += 1
        return await self._watch(request, int(request.query["resourceVersion"]))

    async def _watch(self, request: web.Request, version: int) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        while True:
            if version < self.oldest:
                gone = {"type": "ERROR", "object": {"code": 410, "message": "too old"}}
                await response.write(orjson.dumps(gone) + b"\n")
                return response
            news = [event for at, event in self.events if at > version]
            for event in news:
                await response.write(orjson.dumps(event) + b"\n")
            version = self.version
            bookmark = {"metadata": {"resourceVersion": str(version)}}
            await response.write(orjson.dumps({"type": "BOOKMARK", "object": bookmark}) + b"\n")
            changed = self.changed
            await changed.wait()
            if version == self.version:  # nothing is new: the watch was told to end
                return response


def _describe(host: str, *, is_ready: bool) -> dict[str, Any]:
    conditions = {"ready": is_ready, "serving": True, "terminating": not is_ready}
    return {"addresses": [host], "conditions": conditions}


def _refuse(status: int, message: str) -> web.Response:
    return web.json_response({"kind": "Status", "code": status, "message": message}, status=status)


@contextlib.asynccontextmanager
async def run_kubernetes_api(api: KubernetesApi) -> AsyncIterator[str]:
    app = web.Application()
    path = "/apis/discovery.k8s.io/v1/namespaces/models/endpointslices"
    app.router.add_get(path, api.answer)
    async with serve_app(app) as url:
        yield url
