"""The page at /ui: its files, and /ui/status, the figures it shows.

The page is public, as any page with a log-in is; its figures need a key where there are keys.
Looking is free: it takes nothing from a key's minute, and many open pages cost the engines one look
a second.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson
from aiohttp import HttpVersion11, web

from gateway.admission.keys import KEYRING, Caller, is_loopback
from gateway.admission.queue import GATE, LANES
from gateway.config import SETTINGS
from gateway.engines.engine import Engine, EngineState
from gateway.engines.pool import POOL
from gateway.errors import NotFound
from gateway.page.launchers import LAUNCHERS

_FILES = Path(__file__).parents[1] / "page" / "static"
_PAGE = "index.html"
_TYPES = {
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
_FRESH_S = 1.0
# What proxies add, each its own; none of it comes from a browser or from curl.
_PROXY_HEADERS = re.compile(
    r"(x-)?forwarded(-.*)?|via|x-real-ip|x-original-.*|x-proxy.*|x-client-ip|x-cluster-client-ip|"
    r"true-client-ip|cf-.*|fastly-.*|x-envoy-.*|x-amzn-.*|x-azure-.*|cdn-loop|proxy-connection",
    re.IGNORECASE,
)
# Nothing but what lies here: no inline script or style, no other host, no frame around it.
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-cache",  # kept, but asked about: an update shows at the next visit
}


@dataclass(frozen=True)
class PageFile:
    """One file of the page, read once."""

    body: bytes
    content_type: str
    etag: str


def read_files() -> dict[str, PageFile]:
    """By name; what is not in here cannot be asked for, however the path is written."""
    return {path.name: _read_file(path) for path in _FILES.iterdir() if path.suffix in _TYPES}


def _read_file(path: Path) -> PageFile:
    body = path.read_bytes()
    return PageFile(body, _TYPES[path.suffix], hashlib.sha256(body).hexdigest()[:16])


FILES = web.AppKey("files", dict[str, PageFile])


class Figures:
    """What all pages show, read at most once a second, however many look."""

    def __init__(self, app: web.Application) -> None:
        self._app = app
        self._read_at = 0.0
        self._last: dict[str, Any] = {}
        self._reading: asyncio.Task[None] | None = None

    async def read(self) -> dict[str, Any]:
        if time.monotonic() - self._read_at >= _FRESH_S:
            if self._reading is None or self._reading.done():
                self._reading = asyncio.create_task(self._refresh())
            # Who hangs up must not take the reading away from the others.
            await asyncio.shield(self._reading)
        return self._last

    async def close(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)

    async def _refresh(self) -> None:
        engines = self._app[POOL].engines
        described = await asyncio.gather(*map(_describe_engine, engines))
        launchers = await asyncio.gather(*(one.read() for one in self._app[LAUNCHERS]))
        self._last = {
            "at": time.time(),
            "gateway": self._describe_gateway(),
            "gate": self._describe_gate(),
            "used": self._sum_usage(),
            "limits": self._describe_limits(),
            "engines": described,
            "launchers": [one for one in launchers if one is not None],
        }
        self._read_at = time.monotonic()

    def _describe_gateway(self) -> dict[str, Any]:
        pool = self._app[POOL]
        state = "stopping" if pool.draining else "ready" if pool.is_ready else "waiting"
        return {"state": state}

    def _describe_gate(self) -> dict[str, Any]:
        gate = self._app[GATE]
        lanes = {name: gate.count(name) for name in LANES}
        return {
            "running": sum(running for running, _ in lanes.values()),
            "waiting": sum(waiting for _, waiting in lanes.values()),
        }

    def _sum_usage(self) -> dict[str, int]:
        total = {"requests": 0, "prompt_tokens": 0, "completion_tokens": 0}
        for used in self._app[KEYRING].read_usage().values():
            for name in total:
                total[name] += used[name]
        return total

    def _describe_limits(self) -> dict[str, Any]:
        settings = self._app[SETTINGS]
        return {
            "prompts": settings.max_prompts,
            "body_bytes": settings.max_body_bytes,
            "max_tokens": settings.max_tokens,
            "temperature": settings.temperature,
            "shares_answers": settings.dedup,
        }


FIGURES = web.AppKey("figures", Figures)


async def _describe_engine(engine: Engine) -> dict[str, Any]:
    load = None if engine.state is EngineState.DOWN else await engine.read_load()
    return {
        "state": engine.state,
        "reason": engine.reason,
        "model": engine.card.name if engine.card else None,
        "max_model_len": engine.max_model_len,
        "load": asdict(load) if load else None,
    }


def add_page(app: web.Application) -> None:
    """The routes, unless the setting says that there is no page."""
    if not app[SETTINGS].ui:
        return
    app[FILES] = read_files()
    app[FIGURES] = Figures(app)

    async def close_figures(app: web.Application) -> None:
        await app[FIGURES].close()

    app.on_shutdown.append(close_figures)
    app.router.add_get("/ui", handle_page)
    app.router.add_get("/ui/", handle_slash)
    app.router.add_get("/ui/status", handle_status)
    app.router.add_get("/ui/{file}", handle_file)


async def handle_page(request: web.Request) -> web.Response:
    return _answer_file(request, request.app[FILES][_PAGE])


async def handle_slash(_request: web.Request) -> web.Response:
    """The page's own addresses are relative, so that it works below a proxy's prefix."""
    return web.Response(status=308, headers={"Location": "../ui"})


async def handle_file(request: web.Request) -> web.Response:
    name = request.match_info["file"]
    if name == _PAGE:
        return await handle_slash(request)
    file = request.app[FILES].get(name)
    if file is None:
        raise NotFound(f"there is no {request.path}")
    return _answer_file(request, file)


def _answer_file(request: web.Request, file: PageFile) -> web.Response:
    headers = {**_HEADERS, "ETag": f'"{file.etag}"'}
    known = request.if_none_match or ()
    if any(tag.value in (file.etag, "*") for tag in known):
        return web.Response(status=304, headers=headers)
    return web.Response(
        body=file.body, headers=headers, content_type=file.content_type, charset="utf-8"
    )


async def handle_status(request: web.Request) -> web.Response:
    caller = request.app[KEYRING].identify(request.headers)
    figures = dict(await request.app[FIGURES].read())
    figures["launchers"] = [_show(one, request, caller) for one in figures["launchers"]]
    return web.Response(
        body=orjson.dumps(figures),
        content_type="application/json",
        headers={"Cache-Control": "no-store"},
    )


def _show(launcher: dict[str, Any], request: web.Request, caller: Caller) -> dict[str, Any]:
    """A crash's log lines for those who could read the log anyway: an admin, or who sits here."""
    crash = launcher["crash"]
    if crash is None:
        return launcher
    is_open = request.app[KEYRING].is_open
    is_here = is_open and _is_local(request)
    hidden = set() if is_here or caller.admin else {"last_lines"}
    if is_open and not is_here:
        hidden.add("cause")
    return launcher | {"crash": {key: crash[key] for key in crash if key not in hidden}}


def _is_local(request: web.Request) -> bool:
    """From this machine, to a gateway that serves nobody else, under its own name, and without a
    sign of a proxy between: its headers, or HTTP/1.0, which nginx speaks to what is behind it.
    """
    if request.version < HttpVersion11 or any(map(_PROXY_HEADERS.fullmatch, request.headers)):
        return False
    try:
        name = request.url.host or ""
    except ValueError:  # a `Host` that is none
        return False
    return all(map(is_loopback, (request.app[SETTINGS].host, request.remote or "", name)))
