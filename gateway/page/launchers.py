"""The launchers behind the engines, over HTTP: how far a start is, and how the last run ended.

What leaves here is a list of fields, not a list of what to leave out: command lines, environments
and process ids stay with the launcher. Text that comes from an engine's log is searched for keys.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from typing import Any

import aiohttp
import orjson
from aiohttp import web

from gateway.engines.capacity import list_launchers
from gateway.engines.engine import Engine

_TIMEOUT_S = 2.0
_MOST_LINES = 60
_MOST_CHARACTERS = 400
_STATE = ("state", "since_s", "start_seconds", "restarts")
_FACTS = ("profile", "model", "device")
_VERSIONS = ("vllm", "torch", "python")
_PROGRESS = ("stage", "percent", "detail")
_CRASH = ("time", "reason", "exit_code", "signal", "uptime_s", "was_ready", "restarts")
_SECRETS = (
    re.compile(r"(?i)(://[^/\s:@]+:)[^/\s@]+(?=@)"),
    re.compile(r"(?i)(\bbearer\s+)\S+"),
    re.compile(
        r"(?i)((?:key|token|secret|password|passwd|credential)s?['\"]?\s*[:=]\s*[\[('\"]*)"
        r"(?!\d+\b)[^\s'\",)\]}]{8,}"
    ),
    re.compile(r"(?i)((?<!-)--[\w-]{0,60}?(?:key|token|secret|password)\s+)\S+"),
    re.compile(r"()\b(?:hf_|sk-|vg-|ghp_|AKIA)[\w-]{8,}"),
)


class LauncherClient:
    """One launcher's status port. It is only read, and never needed: without it less is known."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self._url = url
        self._session = session
        self._crashes: dict[object, dict[str, Any]] = {}  # the last one, by the engine's port

    async def read(self) -> list[dict[str, Any]]:
        """The status of each of its engines with the last crash, both cut down; none when it does
        not answer.
        """
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                status = await self._get("/status")
                engines = status.get("engines") or [status]
                return [cut_status(one) | {"crash": await self._find_crash(one)} for one in engines]
        except (aiohttp.ClientError, TimeoutError, ValueError, TypeError, AttributeError):
            return []

    async def _find_crash(self, status: Mapping[str, Any]) -> dict[str, Any] | None:
        """`None` when the card is not there (yet): asked for again at the next look."""
        port = status.get("engine_port")
        told = (status.get("last_crash") or {}).get("time")
        if told is None:
            self._crashes.pop(port, None)
        elif told != self._crashes.get(port, {}).get("time"):
            card = await self._get("/crash" if port is None else f"/crash?engine_port={int(port)}")
            if "time" not in card:
                return None
            self._crashes[port] = cut_crash(card)
        return self._crashes.get(port)

    async def _get(self, path: str) -> dict[str, Any]:
        async with self._session.get(self._url + path) as response:
            answer = orjson.loads(await response.read())
        if not isinstance(answer, dict):
            raise TypeError(f"{path} is no JSON object")
        return answer


class Launchers:
    """Each that the setting means, with what is known of it while it is there."""

    def __init__(self, entries: Sequence[str], session: aiohttp.ClientSession) -> None:
        self._entries = entries
        self._session = session
        self._clients: dict[str, LauncherClient] = {}

    async def read(self, engines: Sequence[Engine]) -> list[dict[str, Any]]:
        self._clients = {
            url: self._clients.get(url) or LauncherClient(url, self._session)
            for url in list_launchers(self._entries, engines)
        }
        told = await asyncio.gather(*(one.read() for one in self._clients.values()))
        return [one for several in told for one in several]


LAUNCHERS = web.AppKey("launchers", Launchers)


def cut_status(status: Mapping[str, Any]) -> dict[str, Any]:
    progress = _pick(status.get("progress"), _PROGRESS)
    return {
        **_pick(status.get("engine"), _STATE),
        **_pick(status, _FACTS),
        "versions": _pick(status.get("versions"), _VERSIONS),
        "progress": _clean(progress) if progress else None,
    }


def cut_crash(card: Mapping[str, Any]) -> dict[str, Any]:
    """`cause` and `last_lines` are log text: not for everybody, see `routes/page.py`."""
    return {
        **_pick(card, _CRASH),
        "cause": _clean(card.get("cause") or ""),
        "last_lines": _clean(list(card.get("last_lines") or ())[-_MOST_LINES:]),
    }


def _pick(data: object, names: Sequence[str]) -> dict[str, Any]:
    if not isinstance(data, Mapping):
        return {}
    return {name: data[name] for name in names if name in data}


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return hide_secrets(value[:_MOST_CHARACTERS])
    if isinstance(value, list):
        return [_clean(one) for one in value]
    if isinstance(value, dict):
        return {name: _clean(one) for name, one in value.items()}
    return value


def hide_secrets(text: str) -> str:
    for pattern in _SECRETS:
        text = pattern.sub(r"\1•••", text)
    return text
