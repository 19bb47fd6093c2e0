"""Which engines there are: those that the setting lists, and those that are found where it says.
Each is watched while listed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import structlog

from gateway.config import Settings
from gateway.discovery.kubernetes import KubernetesSource
from gateway.discovery.sources import EngineSource, is_source
from gateway.engines.engine import Engine, hide_password
from gateway.engines.pool import EnginePool
from gateway.engines.warmup import Warmup

log = structlog.get_logger("gateway")


class EngineList:
    """Keeps the pool's list of engines, and a watch over each of them."""

    def __init__(
        self,
        settings: Settings,
        pool: EnginePool,
        warmup: Warmup,
        build: Callable[[str], Engine],
    ) -> None:
        self._settings = settings
        self._pool = pool
        self._warmup = warmup
        self._build = build
        self._entries = settings.engines
        self._found: dict[str, Sequence[str]] = {}  # by each source, at its last good answer
        self._watches: dict[str, asyncio.Task[None]] = {}
        self._sources: dict[str, asyncio.Task[None]] = {}
        self._changing = asyncio.Lock()

    async def start(self) -> None:
        await self.take_entries(self._entries)

    async def stop(self) -> None:
        tasks = [*self._sources.values(), *self._watches.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def take_entries(self, entries: tuple[str, ...]) -> None:
        """What the setting says now."""
        self._entries = entries
        sources = set(filter(is_source, entries))
        for gone in self._sources.keys() - sources:
            self._sources.pop(gone).cancel()
            self._found.pop(gone, None)
        for new in sources - self._sources.keys():
            self._sources[new] = asyncio.create_task(self._follow_source(new))
        await self._change_engines()

    async def _follow_source(self, entry: str) -> None:
        async def tell(urls: Sequence[str]) -> None:
            if self._found.get(entry) != urls:
                self._found[entry] = urls
                await self._change_engines()

        while True:
            try:
                await build_source(entry, self._settings).follow(tell)
            except Exception as error:  # noqa: BLE001 — it would never be looked at again
                reason = f"{type(error).__name__}: {error}"
                log.warning("engines_not_found", source=entry, reason=reason)
            await asyncio.sleep(self._settings.discovery_interval_s)

    def _list_urls(self) -> list[str]:
        """In the order of the entries; what two of them find is one engine."""
        urls: dict[str, str] = {}
        for entry in self._entries:
            for url in self._found.get(entry, ()) if is_source(entry) else (entry,):
                urls.setdefault(hide_password(url), url)
        return list(urls.values())

    async def _change_engines(self) -> None:
        """Engines that are gone finish what they have: nothing new goes there."""
        async with self._changing:
            urls = self._list_urls()
            known = {engine.url: engine for engine in self._pool.engines}
            engines = []
            for url in urls:
                engine = known.get(hide_password(url))
                if engine is None:
                    engine = self._build(url)
                else:
                    engine.change_password(url)
                engines.append(engine)
            await self._pool.set_engines(engines)
            for url in known.keys() - set(map(hide_password, urls)):
                self._watches.pop(url).cancel()
                log.info("engine_removed", engine=url)
            for engine in engines:
                if engine.url not in self._watches:
                    self._watches[engine.url] = asyncio.create_task(self._warmup.watch(engine))
                    log.info("engine_added", engine=engine.url)


def build_source(entry: str, settings: Settings) -> EngineSource:
    if entry.startswith("kubernetes+"):
        return KubernetesSource(entry, settings)
    # Only where it is wanted: it takes 2.5 MB, and 20 ms of each start.
    from gateway.discovery.dns_names import DnsSource  # noqa: PLC0415

    return DnsSource(entry, settings)
