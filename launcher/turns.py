"""Engines that do not fit together take turns: which runs, by what the gateway's callers wait for.

The gateway is told by its settings file, which it follows anyway: an engine that is to end is taken
off the list first, so that nothing new is sent to it, and drains. The launcher asks the gateway for
its figures; nobody orders the launcher.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence

import httpx
import structlog

from common.prometheus_text import parse_samples
from launcher.config import LauncherSettings
from launcher.engine.polling import poll
from launcher.engine_unit import EngineUnit
from launcher.gateway_process import find_engines_file, write_engines_file
from launcher.sections import meet

log = structlog.get_logger("launcher")

_PAUSE_S = 0.5
_LONGEST_LEAVE_S = 30.0
_BUSY = ("gateway_model_running_sequences", "gateway_model_waiting_sequences")
_HELD = "gateway_model_held_calls"
_LISTED = "gateway_engine_ready"
_WANTED = (*_BUSY, _HELD, _LISTED)


class Figures:
    """What the gateway counts, as far as turns go."""

    def __init__(self, text: str) -> None:
        lines = [line for line in text.splitlines() if line.startswith(_WANTED)]
        self.engines: set[str] = set()
        self._counts: dict[tuple[str, str], float] = {}
        for name, rows in parse_samples("\n".join(lines) + "\n").items():
            for labels, value in rows:
                if name == _LISTED:
                    self.engines.add(labels["engine"])
                else:
                    key = name, labels["model"]
                    self._counts[key] = self._counts.get(key, 0.0) + value

    def count_held(self, model: str) -> float:
        return self._counts.get((_HELD, model), 0.0)

    def is_idle(self, model: str) -> bool:
        return not any(self._counts.get((name, model)) for name in (*_BUSY, _HELD))


class Turns:
    """Owns who is awake; the supervisors start and stop."""

    def __init__(
        self, engines: Sequence[EngineUnit], settings: LauncherSettings, client: httpx.AsyncClient
    ) -> None:
        self._engines = engines
        self._url = settings.gateway_url
        self._shortest_turn_s = settings.shortest_turn_s
        self._client = client
        self._file = find_engines_file(settings)
        self._listed: Sequence[EngineUnit] = ()
        self._asleep: list[EngineUnit] = []
        for place, engine in enumerate(engines):
            if engine.takes_turns and self._find_rivals(engine, engines[:place]):
                engine.supervisor.park()
                self._asleep.append(engine)
        self._write_list(self._list_awake())

    def is_asleep(self, engine: EngineUnit) -> bool:
        return engine in self._asleep

    async def run(self) -> None:
        """Until cancelled."""
        told = None
        while True:
            try:
                self._write_list(self._list_awake())  # without those given up
                figures = await self._read_figures()
                if figures and (wanted := self._choose(figures)):
                    await self._give_turn(wanted)
                told = None
            except OSError as error:  # the disk is full: the list stays, and so does the turn
                if error.strerror != told:
                    told = error.strerror
                    log.warning("engines_file_not_written", file=str(self._file), why=told)
            await asyncio.sleep(_PAUSE_S)

    def _choose(self, figures: Figures) -> EngineUnit | None:
        """The one that most callers wait for, if those in its way have had their turn."""
        asleep = [one for one in self._asleep if not one.supervisor.has_ended]
        waiting = [one for one in asleep if figures.count_held(one.model) > 0]
        waiting.sort(key=lambda one: -figures.count_held(one.model))
        for engine in waiting:
            rivals = self._find_rivals(engine, self._list_awake())
            if all(self._may_end(rival, figures) for rival in rivals):
                return engine
        return None

    def _may_end(self, engine: EngineUnit, figures: Figures) -> bool:
        status = engine.supervisor.status
        if status.state != "ready":
            return False
        has_served = time.monotonic() - status.since >= self._shortest_turn_s
        return has_served or figures.is_idle(engine.model)

    async def _give_turn(self, engine: EngineUnit) -> None:
        rivals = self._find_rivals(engine, self._list_awake())
        staying = [one for one in self._list_awake() if one not in rivals]
        # With the wanted one, before it runs: an empty list would be refused by the gateway, which
        # would go on sending to those that leave.
        self._write_list([one for one in self._engines if one in staying or one is engine])
        names = ", ".join(one.label for one in rivals)
        log.info("engine_turn", engine=engine.label, instead_of=names)
        self._asleep += rivals
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LONGEST_LEAVE_S):
                await poll(lambda: self._have_left(rivals), pause_s=_PAUSE_S / 2)
        for rival in rivals:
            rival.supervisor.park()
        await poll(lambda: _have_ended(rivals), pause_s=_PAUSE_S / 2)
        self._asleep.remove(engine)
        engine.supervisor.unpark()

    async def _have_left(self, engines: Sequence[EngineUnit]) -> bool:
        figures = await self._read_figures()
        urls = {one.prepared.settings.engine_url for one in engines}
        return figures is not None and not urls & figures.engines

    async def _read_figures(self) -> Figures | None:
        try:
            response = await self._client.get(f"{self._url}/metrics")
            return Figures(response.text) if response.status_code == httpx.codes.OK else None
        except (httpx.HTTPError, ValueError):
            return None  # it restarts

    def _list_awake(self) -> list[EngineUnit]:
        """Without those given up, which need no device and serve nobody."""
        running = [one for one in self._engines if not one.supervisor.has_ended]
        return [one for one in running if one not in self._asleep]

    def _find_rivals(self, engine: EngineUnit, others: Sequence[EngineUnit]) -> list[EngineUnit]:
        own = engine.prepared.settings
        return [one for one in others if one.takes_turns and meet(own, one.prepared.settings)]

    def _write_list(self, listed: Sequence[EngineUnit]) -> None:
        if listed and listed != self._listed:
            write_engines_file(self._file, [one.prepared.settings for one in listed])
            self._listed = listed


async def _have_ended(engines: Sequence[EngineUnit]) -> bool:
    gone = {"parked", "sleeping", "stopped"}
    return all(one.supervisor.status.state in gone for one in engines)
