"""What an injection may use: the service, what it keeps things in, the callers, the time."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import aiohttp

from common.project import DEMO_MODEL
from common.prometheus_text import Samples, parse_samples
from lab.faults.callers import ASKING, MixedLoad
from lab.faults.service import BesideGateway, NotStarted, Program, Service, poll_until
from lab.faults.stores import Stores

Part = TypeVar("Part")
_AT_WORK_S = 30.0
LOOK_TIMEOUT = aiohttp.ClientTimeout(total=5)


@dataclass
class Experiment:
    """One fault's. What is entered in `exits` ends with it, whatever happens."""

    service: Service
    stores: Stores
    load: MixedLoad
    folder: Path
    exits: AsyncExitStack
    beside: list[BesideGateway] = field(default_factory=list)
    began_at: float = 0.0
    lifted_at: float = 0.0
    exit_code: int | None = None
    in_flight: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    _kept: list[object] = field(default_factory=list)

    def keep(self, part: object) -> None:
        """What a preparation makes, for the injection to find by its kind."""
        self._kept.append(part)

    def get(self, kind: type[Part]) -> Part:
        return next(one for one in self._kept if isinstance(one, kind))

    async def start_beside(
        self,
        engines: str,
        *options: str,
        variables: Mapping[str, str] | None = None,
        clock: Path | None = None,
    ) -> BesideGateway:
        """A gateway of its own, which the callers turn to; several, if this is called again."""
        folder = self.folder / f"gateway-{len(self.beside) + 1}"
        tokenizer = ("--tokenizer", str(DEMO_MODEL), "--warmup-prompts", "4")
        environment = {**self.stores.key_environment(), **(variables or {})}
        words = (*tokenizer, *options)
        gateway = BesideGateway(folder, engines, environment, *words, clock=clock)
        self.exits.push_async_callback(gateway.close)
        gateway.start()
        await self.wait_ready(gateway, gateway.url)
        self.beside.append(gateway)
        self.load.urls = [one.url for one in self.beside]
        return gateway

    @property
    def programs(self) -> list[Program]:
        """That the fault is about: those beside the service, or it."""
        return list(self.beside) or [self.service]

    def lift(self) -> None:
        """Of a fault that lasts: from now on it is over, and time to recover is counted."""
        self.lifted_at = time.monotonic()

    async def wait_at_work(self) -> None:
        """All kinds of callers at once have something under way, after each has had an answer."""
        load = self.load

        async def are_at_work() -> bool:
            return all(load.got[one]["right"] for one in ASKING) and all(
                load.in_flight[one] for one in load.kinds
            )

        if not await poll_until(are_at_work, _AT_WORK_S, pause_s=0.01):
            raise TimeoutError(f"callers get nothing before any fault: {dict(load.got)}")
        self.note_in_flight()

    def note_in_flight(self) -> None:
        """The fault strikes now."""
        self.began_at = time.monotonic()
        self.in_flight = {kind: number for kind, number in self.load.in_flight.items() if number}

    async def wait(self, check: Callable[[], Awaitable[bool]], within_s: float = 60.0) -> None:
        if not await poll_until(check, within_s):
            raise TimeoutError(f"{check.__name__}: not within {within_s:.0f} s")

    async def read_samples(self, url: str = "") -> Samples:
        url = url or self.load.urls[0]
        async with self.load.session.get(f"{url}/metrics", timeout=LOOK_TIMEOUT) as answer:
            return parse_samples(await answer.text())

    async def read_state(self, program: str) -> str:
        """Of `engine` or `gateway`, as the launcher tells it; nothing where nobody answers."""
        with contextlib.suppress(aiohttp.ClientError, TimeoutError, LookupError, ValueError):
            url = f"{self.service.status_url}/status"
            async with self.load.session.get(url, timeout=LOOK_TIMEOUT) as answer:
                return str((await answer.json())[program]["state"])
        return ""

    async def wait_ready(self, program: Program, url: str, within_s: float = 150.0) -> None:
        await wait_ready(self.load.session, program, url, within_s)


async def wait_ready(
    session: aiohttp.ClientSession, program: Program, url: str, within_s: float
) -> None:
    async def is_ready() -> bool:
        if end := program.tell_end():
            raise NotStarted(end)
        return await read_status(session, f"{url}/readyz") == 200

    if not await poll_until(is_ready, within_s):
        raise NotStarted(f"{program.name}: not ready in {within_s:.0f} s:\n{program.read_tail()}")


async def read_status(session: aiohttp.ClientSession, url: str) -> int:
    """0 where nobody answers."""
    with contextlib.suppress(aiohttp.ClientError, TimeoutError):
        async with session.get(url, timeout=LOOK_TIMEOUT) as answer:
            return answer.status
    return 0
