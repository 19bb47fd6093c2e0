"""CORS: which web pages of other origins may call this gateway, and what their browsers are told.

Without the setting nothing of this is there. Pages that nobody has listed are not refused here: a
browser shows them nothing of an answer, and what a page may make a gateway without keys do is
`common/web/foreign_pages.py`'s matter.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from aiohttp import web

ANY = "*"
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^\s/?#@,A-Z]+")
_USUAL_PORT = re.compile(r"http://.*:80|https://.*:443")
_REMEMBERED_S = 600
# A page's script sees no other of ours.
_EXPOSED = ", ".join(
    (
        "Retry-After",
        "Server-Timing",
        "X-Ignored-Fields",
        "X-Request-Id",
        *(
            f"x-ratelimit-{field}-{what}"
            for what in ("requests", "tokens", "tokens-day", "tokens-month")
            for field in ("limit", "remaining", "reset")
        ),
        "x-should-retry",
    )
)


def check_origins(entries: tuple[str, ...]) -> tuple[str, ...]:
    """A validator for settings: an origin as browsers send it, which is in lower case and without
    the port that its scheme has anyway; another one would let nobody in.
    """
    for entry in entries:
        if entry != ANY and (not _ORIGIN.fullmatch(entry) or _USUAL_PORT.fullmatch(entry)):
            raise ValueError(
                f"{entry!r} is no origin: give scheme, host and port as a browser sends them "
                "(`https://app.example.com`, `http://localhost:3000`), in lower case, without a "
                "path and without the scheme's usual port; `*` for any"
            )
    return entries


class CrossOrigin:
    """Whom the operator lets in."""

    def __init__(self, origins: Iterable[str]) -> None:
        self._origins = frozenset(origins)
        self._has_any = ANY in self._origins
        self._nobody = {} if self._has_any else {"Vary": "Origin"}

    def __contains__(self, origin: str) -> bool:
        return self._has_any or origin in self._origins

    def build_headers(self, origin: str | None) -> Mapping[str, str]:
        """For an answer to that origin, or to a program, which has none."""
        if origin is None or origin not in self:
            return self._nobody
        allowed = ANY if self._has_any else origin
        exposed = {"Access-Control-Expose-Headers": _EXPOSED}
        return {"Access-Control-Allow-Origin": allowed, **exposed, **self._nobody}

    async def answer_options(self, request: web.Request) -> web.Response:
        """What a browser asks before it sends what a page wants; no key comes with it."""
        problem = request.match_info.http_exception
        if not isinstance(problem, web.HTTPMethodNotAllowed):
            raise problem or web.HTTPNotFound
        methods = ", ".join(sorted(problem.allowed_methods))
        response = web.Response(status=204, headers={"Allow": methods})
        if request.headers.get("Origin", "") in self:
            asked = request.headers.get("Access-Control-Request-Headers", "")
            response.headers["Access-Control-Allow-Methods"] = methods
            response.headers["Access-Control-Allow-Headers"] = asked
            response.headers["Access-Control-Max-Age"] = str(_REMEMBERED_S)
        return response


# None where no origin is let in.
CORS: web.AppKey[CrossOrigin | None] = web.AppKey("cors")
