"""Faults one after another: callers at work, the fault, how long until all is well again."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import psutil

from common.processes import read_resident_bytes
from common.prometheus_text import Samples
from lab.faults.alerts import Scraper, Target, find_fired
from lab.faults.callers import MixedLoad
from lab.faults.experiment import Experiment, read_status, wait_ready
from lab.faults.fault import Fault, FaultResult, judge_result
from lab.faults.service import (
    GivenService,
    NotHere,
    NotStarted,
    Program,
    Service,
    describe_process,
    poll_until,
)
from lab.faults.signs import Signboard
from lab.faults.stores import Stores
from lab.load.answers import KnownModel
from lab.load.counter_sums import count_inside, find_mismatches

_MIB = 2**20
_START_S = 240.0
_AFTERMATH_S = 1.0
_SETTLE_S = 15.0
_FINISH_S = 150.0


@dataclass(frozen=True)
class Before:
    """How things were when the fault struck."""

    processes: Counter[str]
    gateway: int
    memory_mb: float
    samples: Samples
    log: dict[Path, list[int]]  # how far each program's had come


class ExperimentRunner:
    """What all faults of a run share: the service, started when it is first needed."""

    def __init__(
        self,
        folder: Path,
        session: aiohttp.ClientSession,
        stores: Stores,
        *,
        environment: Mapping[str, str],
        signboard: Signboard,
        learn: Callable[[str], Awaitable[KnownModel]],
        given: tuple[str, str] | None = None,
    ) -> None:
        """`given`: the addresses of gateway and launcher, of a service that runs."""
        self._folder, self._session, self._stores = folder, session, stores
        self._environment = dict(environment)
        own = folder / "service"
        self._service = (
            GivenService(own, *given)
            if given
            else Service(own, {**environment, **stores.environment()})
        )
        self._signboard, self._learn = signboard, learn
        self._model: KnownModel | None = None
        self._has_batches = False
        self._is_started = False
        self._number = 0

    async def __aenter__(self) -> ExperimentRunner:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._service.close()

    async def run(self, fault: Fault) -> FaultResult:
        result = FaultResult(fault.name, fault.what, signs=self._signboard.complete(fault.signs))
        if missing := self._stores.find_missing(fault.needs):
            result.not_here = missing
            return result
        self._number += 1
        await self._ensure_service()
        try:
            async with AsyncExitStack() as exits:
                await self._run_in(fault, result, exits)
        except NotHere as error:
            result.not_here = str(error)
            return result
        except (NotStarted, LookupError, OSError, TimeoutError, aiohttp.ClientError) as error:
            said = f"{type(error).__name__}: {error}"
            result.problems.append(f"it was not carried out to its end: {said}")
        result.problems += judge_result(fault, result)
        if fault.site == "shared" and (result.recovered_s is None or result.left_over):
            await self._service.close()  # what it left is not the next one's
            self._is_started = False
        return result

    async def _ensure_service(self) -> None:
        if not self._is_started:
            self._service.start()
            await wait_ready(self._session, self._service, self._service.url, _START_S)
            self._is_started = True
            batches = f"{self._service.url}/v1/batches"
            self._has_batches = await read_status(self._session, batches) == 200
        if self._model is None:
            self._model = await self._learn(self._service.url)

    async def _run_in(self, fault: Fault, result: FaultResult, exits: AsyncExitStack) -> None:
        at = self._build_experiment(fault, exits)
        exits.push_async_callback(at.load.cancel)
        try:
            if fault.site == "own":
                await self._run_own(fault, at, result)
            else:
                await self._run_under_load(fault, at, result)
        finally:
            result.got = {kind: dict(words) for kind, words in at.load.got.items()}
            notes = [*at.notes, *at.load.examples.values()]
            result.notes += [one.replace(str(self._folder), "…") for one in notes]
            result.problems += at.problems
            result.in_flight, result.exit_code = at.in_flight, at.exit_code

    def _build_experiment(self, fault: Fault, exits: AsyncExitStack) -> Experiment:
        if self._model is None:
            raise NotStarted("no service has been started yet")
        folder = self._folder / f"{self._number:02}-{fault.name}"
        folder.mkdir(parents=True, exist_ok=True)
        service = self._service
        if fault.site == "own":
            service = Service(folder, self._environment)
            exits.push_async_callback(service.close)
        has_jobs = fault.site == "shared" and self._has_batches
        load = MixedLoad(
            self._session, [service.url], self._model, has_jobs=has_jobs, seed=self._number
        )
        return Experiment(service, self._stores, load, folder, exits)

    async def _run_own(self, fault: Fault, at: Experiment, result: FaultResult) -> None:
        """A launcher that the injection starts, and has callers meet as it likes."""
        async with asyncio.timeout(fault.limit_s):
            await fault.strike(at)
        async with asyncio.timeout(_FINISH_S):
            await at.load.finish()
        result.left_over = await find_left_over([at.service], Counter())
        logged = at.service.read_events()
        result.problems += self._signboard.find_missing(result.signs, logged)

    async def _run_under_load(self, fault: Fault, at: Experiment, result: FaultResult) -> None:
        if fault.prepare:
            await fault.prepare(at)
        before = await self._look_before(at)
        at.load.start()
        scraper = Scraper(self._session, list_targets(at))
        scraping = asyncio.create_task(scraper.run())
        try:
            await self._strike(fault, at, result)
        finally:
            scraping.cancel()
        ended_at = at.lifted_at or at.began_at + (result.recovered_s or 0.0)
        result.fired = await find_fired(scraper.scrapes, at.began_at, ended_at)
        async with asyncio.timeout(_FINISH_S):
            await at.load.finish(are_jobs_kept=fault.ends_with is not None)
        logged = [
            event
            for one in at.programs
            for event in one.read_events(before.log.get(one.folder, ()))
        ]
        has_log = all(one.has_log for one in at.programs)
        result.problems += self._signboard.find_missing(result.signs, logged if has_log else None)
        await self._look_after(fault, at, result, before)

    async def _strike(self, fault: Fault, at: Experiment, result: FaultResult) -> None:
        await at.wait_at_work()
        async with asyncio.timeout(fault.limit_s):
            await fault.strike(at)
        since = at.lifted_at or at.began_at
        if fault.ends_with is None and await self._is_well_again(fault, at):
            result.recovered_s = time.monotonic() - since
            await asyncio.sleep(_AFTERMATH_S)

    async def _look_before(self, at: Experiment) -> Before:
        gateway = await self._find_gateway(at)
        return Before(
            count_processes(at.programs),
            gateway,
            read_resident_bytes(gateway) / _MIB,
            await at.read_samples(),
            {one.folder: one.count_log() for one in at.programs},
        )

    async def _find_gateway(self, at: Experiment) -> int:
        return at.beside[0].pid if at.beside else await at.service.find("gateway")

    async def _is_well_again(self, fault: Fault, at: Experiment) -> bool:
        async def is_well() -> bool:
            return await self._is_well(fault, at)

        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(fault.limit_s):
                return await poll_until(is_well, fault.limit_s)
        return False

    async def _is_well(self, fault: Fault, at: Experiment) -> bool:
        try:
            for url in at.load.urls:
                if await read_status(self._session, f"{url}/readyz") != 200:
                    return False
            if fault.is_over and not await fault.is_over(at):
                return False
        except (aiohttp.ClientError, TimeoutError, LookupError):
            return False
        return all([await at.load.try_each(url) for url in at.load.urls])

    async def _look_after(
        self, fault: Fault, at: Experiment, result: FaultResult, before: Before
    ) -> None:
        has_ended = fault.ends_with is not None
        result.left_over = await find_left_over(
            at.programs, Counter() if has_ended else before.processes
        )
        if has_ended:
            return
        with contextlib.suppress(psutil.Error, LookupError):
            gateway = await self._find_gateway(at)
            result.memory_mb = read_resident_bytes(gateway) / _MIB
            if gateway == before.gateway and len(at.load.urls) == 1:
                result.grown_mb = result.memory_mb - before.memory_mb
                result.problems += await self._add_up(at, before)

    async def _add_up(self, at: Experiment, before: Before) -> list[str]:
        """Nothing runs any more; then the gateway's counters must be what was sent."""
        samples = before.samples

        async def are_all_out() -> bool:
            nonlocal samples
            samples = await at.read_samples()
            return not count_inside(samples)

        if not await poll_until(are_all_out, _SETTLE_S):
            return [f"{count_inside(samples)} sequences are still counted as running or waiting"]
        return list(find_mismatches(at.load.tally, before.samples, samples))


def list_targets(at: Experiment) -> list[Target]:
    """As the stack's Prometheus knows them: an engine and its launcher have one name."""
    gateways = [Target("gateway", f"gateway-{n}", url) for n, url in enumerate(at.load.urls, 1)]
    engine, launcher = at.service.engine_url, at.service.status_url
    return [*gateways, Target("engine", "engine", engine), Target("launcher", "engine", launcher)]


def count_processes(programs: Sequence[Program]) -> Counter[str]:
    return Counter(describe_process(one) for each in programs for one in each.list_processes())


async def find_left_over(programs: Sequence[Program], expected: Counter[str]) -> list[str]:
    """Those that there were not before, once they have had time to end."""

    async def are_gone() -> bool:
        return not count_processes(programs) - expected

    await poll_until(are_gone, _SETTLE_S)
    return sorted((count_processes(programs) - expected).elements())
