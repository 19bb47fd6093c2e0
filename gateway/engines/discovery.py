"""Which engines there are, by the settings file as it is now; each is watched while listed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import structlog

from common.files import FileWatch
from gateway.config import Settings, SettingsError
from gateway.engines.engine import Engine, hide_password
from gateway.engines.pool import EnginePool
from gateway.engines.warmup import Warmup

log = structlog.get_logger("gateway")


class EngineDiscovery:
    """Keeps the pool's list of engines, and a watch over each of them."""

    def __init__(
        self,
        settings: Settings,
        pool: EnginePool,
        warmup: Warmup,
        build: Callable[[str], Engine],
        reload: Callable[[], Settings],
    ) -> None:
        self._pool = pool
        self._warmup = warmup
        self._build = build
        self._reload = reload
        self._interval_s = settings.reload_interval_s
        self._urls = settings.engines
        self._file = FileWatch(settings.config) if settings.config else None
        if self._file is not None:
            self._file.has_changed()  # what is in it has just been read
        self._watches: dict[str, asyncio.Task[None]] = {}

    def start(self) -> None:
        for engine in self._pool.engines:
            self._start_watch(engine)

    async def stop(self) -> None:
        for watch in self._watches.values():
            watch.cancel()
        await asyncio.gather(*self._watches.values(), return_exceptions=True)

    async def follow(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(self._interval_s)
            urls = self._read_if_changed()
            if urls is not None:
                await self._change_engines(urls)

    def _start_watch(self, engine: Engine) -> None:
        self._watches[engine.url] = asyncio.create_task(self._warmup.watch(engine))

    def _read_if_changed(self) -> tuple[str, ...] | None:
        """The engines, if they are others than before; a bad file changes nothing."""
        if self._file is None or not self._file.has_changed():
            return None
        try:
            urls = self._reload().engines
        except SettingsError as error:
            log.error("settings_not_reloaded", reason=str(error))  # noqa: TRY400
            return None
        log.info("settings_reloaded", note="engines take effect now, the rest at the next start")
        if urls == self._urls:
            return None
        self._urls = urls
        return urls

    async def _change_engines(self, urls: Sequence[str]) -> None:
        """Engines that are gone finish what they have: nothing new goes there."""
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
            if engine.url not in known:
                self._start_watch(engine)
                log.info("engine_added", engine=engine.url)
