"""How many sequences an engine runs at once: set, told by its launcher, or learnt from its metrics.

vLLM tells its `max-num-seqs` nowhere. What it is sent beyond that waits inside it, in order of
arrival, where no lane and no deadline counts; so the gate lets in what the engine runs.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any
from weakref import WeakKeyDictionary

import orjson
from yarl import URL

from gateway.config import Settings
from gateway.engines.client import EngineClient
from gateway.engines.engine import Engine
from gateway.engines.pool import EnginePool
from gateway.errors import EngineError, OutOfFiles

# Fewer than this at once tell nothing about how many an engine could run.
_FEWEST = 16
# How much more it is given when it has been seen running all it was given, with none waiting.
_GROWTH = 1.5
# Batches alone never fill it, since a share is not theirs. From this on it may be that it could run
# more; so it is tried, though after many looks only: where it could not, some wait inside then.
_NEARLY = 7 / 8
_LOOKS_BEFORE_GROWTH = 30


def list_launchers(entries: Iterable[str], engines: Iterable[Engine]) -> list[str]:
    """Those that the setting names; `*` is the host of each engine."""
    hosts = [str(URL(engine.url).host) for engine in engines]
    urls: list[str] = []
    for entry in entries:
        url = URL(entry)
        urls += [str(url.with_host(host)) for host in hosts] if url.host == "*" else [entry]
    return list(dict.fromkeys(urls))


class EngineCapacity:
    """Keeps `engine.sequences` for each engine; the pool tells the gate."""

    def __init__(
        self, settings: Settings, pool: EnginePool, build_client: Callable[[str], EngineClient]
    ) -> None:
        self._settings = settings
        self._pool = pool
        self._build_client = build_client
        # What ran at the last look, with others waiting.
        self._before: MutableMapping[Engine, float] = WeakKeyDictionary()
        # At one nearly full, since others waited there.
        self._looks: MutableMapping[Engine, int] = WeakKeyDictionary()

    async def ask(self, engine: Engine) -> None:
        """Before an engine serves: it may be another one than before its restart."""
        told = self._settings.engine_sequences or await self._ask_launchers(engine)
        engine.is_capacity_told = told > 0
        engine.sequences = told or None

    async def look(self, engine: Engine) -> None:
        """Learns by what a full engine says: two looks in a row, since after a burst it has some
        waiting for a moment that it will run.
        """
        least = _FEWEST if engine.sequences is None else engine.sequences * _NEARLY
        if engine.is_capacity_told or engine.running < least:
            return
        load = await engine.read_load()
        if load is None:
            return
        if not load.waiting:
            self._before.pop(engine, None)
            if engine.sequences is not None and load.running >= least:
                self._grow(engine, engine.sequences, load.running)
            return
        self._looks.pop(engine, None)
        before = self._before.get(engine)
        self._before[engine] = load.running
        if before is not None:
            engine.sequences = max(_FEWEST, int(max(before, load.running)))
            self._pool.tell_capacity()

    def _grow(self, engine: Engine, sequences: int, running: float) -> None:
        looks = self._looks[engine] = self._looks.get(engine, 0) + 1
        if running >= sequences or looks > _LOOKS_BEFORE_GROWTH:
            engine.sequences = math.ceil(sequences * _GROWTH)
            self._pool.tell_capacity()

    async def _ask_launchers(self, engine: Engine) -> int:
        """Of the launcher on the engine's own host that says its engine listens on that port."""
        address = URL(engine.url)
        for url in list_launchers(self._settings.launchers, [engine]):
            if URL(url).host == address.host:
                status = await self._read_status(self._build_client(url))
                for one in status.get("engines") or [status]:  # of several it tells one by one
                    if one.get("engine_port") == address.port:
                        told = one.get("max_num_seqs")
                        return told if isinstance(told, int) and told > 0 else 0
        return 0

    async def _read_status(self, client: EngineClient) -> Mapping[str, Any]:
        try:
            async with asyncio.timeout(self._settings.probe_timeout_s):
                answer = await client.send("GET", "/status")
            status = orjson.loads(answer.body or b"")
        except (EngineError, OutOfFiles, TimeoutError, orjson.JSONDecodeError):
            return {}
        return status if isinstance(status, dict) else {}
