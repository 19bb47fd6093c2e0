"""GET /ui and what the page asks for: its files, and /ui/status, the figures it shows.

The page is public, as any page with a log-in is; its figures need a key where there are keys.
Looking is free: it takes nothing from a key's minute, and many open pages cost the engines one look
a second.
"""

from __future__ import annotations

import re
from typing import Any

import orjson
from aiohttp import HttpVersion11, web

from common.web.addresses import is_loopback
from gateway.admission.keys import KEYRING, Caller
from gateway.config import SETTINGS
from gateway.errors import NotFound
from gateway.page.assets import PAGE_ASSETS, PageAsset, read_assets
from gateway.page.figures import PAGE_FIGURES, PageFigures

_PAGE = "index.html"
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


def add_page(app: web.Application) -> None:
    """The routes, unless the setting says that there is no page."""
    if not app[SETTINGS].ui:
        return
    app[PAGE_ASSETS] = read_assets()
    app[PAGE_FIGURES] = PageFigures(app)

    async def close_figures(app: web.Application) -> None:
        await app[PAGE_FIGURES].close()

    app.on_shutdown.append(close_figures)
    app.router.add_get("/ui", handle_page)
    app.router.add_get("/ui/", handle_slash)
    app.router.add_get("/ui/status", handle_status)
    app.router.add_get("/ui/{file:.+}", handle_file)


async def handle_page(request: web.Request) -> web.Response:
    return _answer_file(request, request.app[PAGE_ASSETS][_PAGE])


async def handle_slash(_request: web.Request) -> web.Response:
    """The page's own addresses are relative, so that it works below a proxy's prefix."""
    return web.Response(status=308, headers={"Location": "../ui"})


async def handle_file(request: web.Request) -> web.Response:
    name = request.match_info["file"]
    if name == _PAGE:
        return await handle_slash(request)
    file = request.app[PAGE_ASSETS].get(name)
    if file is None:
        raise NotFound(f"there is no {request.path}")
    return _answer_file(request, file)


def _answer_file(request: web.Request, file: PageAsset) -> web.Response:
    headers = {**_HEADERS, "ETag": f'"{file.etag}"'}
    known = request.if_none_match or ()
    if any(tag.value in (file.etag, "*") for tag in known):
        return web.Response(status=304, headers=headers)
    return web.Response(
        body=file.body, headers=headers, content_type=file.content_type, charset="utf-8"
    )


async def handle_status(request: web.Request) -> web.Response:
    caller = request.app[KEYRING].identify(request.headers)
    caller.check_route(request.path)
    figures = dict(await request.app[PAGE_FIGURES].read())
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
