"""The settings file while the gateway runs: what may change at once is taken, all of it or nothing;
what else is different there is named in the log, and taken at the next start.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from common.files import FileWatch
from common.logs import change_log_level
from gateway.config import Settings, SettingsError, list_taken_at_once
from gateway.prompts.builders import PromptBuilders

log = structlog.get_logger("gateway")


class SettingsReload:
    """Looks at the file, if there is one."""

    def __init__(
        self,
        settings: Settings,
        prompts: PromptBuilders,
        *,
        read: Callable[[], Settings],
        build_prompts: Callable[[Settings], PromptBuilders],
        take_engines: Callable[[tuple[str, ...]], Awaitable[None]],
    ) -> None:
        self._settings, self._prompts = settings, prompts
        self._read, self._build_prompts = read, build_prompts
        self._take_engines = take_engines
        self._file = FileWatch(settings.config) if settings.config else None
        if self._file is not None:
            self._file.has_changed()  # what is in it has just been read

    async def follow(self) -> None:
        """Until cancelled."""
        while self._file is not None:
            await asyncio.sleep(self._settings.reload_interval_s)
            if self._file.has_changed():
                await self._reload()

    async def _reload(self) -> None:
        """A bad file changes nothing."""
        settings = self._settings
        try:
            read = self._read()
            prompts = self._build_prompts(settings.foresee(read))
        except SettingsError as error:
            log.error("settings_not_reloaded", reason=str(error))  # noqa: TRY400
            return
        different = [
            name for name in Settings.model_fields if getattr(read, name) != getattr(settings, name)
        ]
        taken = [name for name in list_taken_at_once() if name in different]
        settings.take(read)
        self._prompts.take(prompts)
        if "log_level" in taken:
            change_log_level(settings.log_level)
        if "engines" in taken:
            await self._take_engines(settings.engines)
        kept = [name for name in different if name not in taken]
        log.info("settings_reloaded", taken=taken, at_next_start=kept)
