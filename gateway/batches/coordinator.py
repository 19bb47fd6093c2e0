"""Which batches this gateway runs: it takes what nobody runs, shows that it lives, notices what has
become of its own, and throws away what is too old.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import Counter, defaultdict, deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

import structlog

from gateway.batches.blobs import Blobs
from gateway.batches.ownership import Ownership, OwnershipLost
from gateway.batches.runner import JobRunner
from gateway.batches.shapes import JobRecord
from gateway.batches.store import Store
from gateway.config import Settings
from gateway.errors import Conflict, GatewayError, NotFound
from gateway.observability.metrics import Metrics
from gateway.storage.clock import SteadyClock
from gateway.storage.leases import LeaseWatch
from gateway.storage.rows import DAY_S

log = structlog.get_logger("gateway")

_MOST_AT_ONCE = 16  # batches that one gateway runs; further ones wait
_MOST_BESIDE = 64  # with the first ones of owners who have none running
_LONGEST_POLL_S = 1.0
_BEATS_A_LEASE = 5
_SWEEP_S = 600.0
_ORPHAN_AGE_S = 3600.0
_GIVE_BACK_S = 5.0  # a database that is away is not waited for: the lease ends as well


class Coordinator:
    """One task that looks, one that throws away, and one for each batch that runs."""

    def __init__(
        self,
        *,
        settings: Settings,
        ownership: Ownership,
        store: Store,
        blobs: Blobs,
        build_runner: Callable[[JobRecord], JobRunner],
        metrics: Metrics,
        clock: SteadyClock,
    ) -> None:
        self._ownership, self._store, self._blobs = ownership, store, blobs
        self._build_runner, self._metrics, self._clock = build_runner, metrics, clock
        lease_s = settings.batch_lease_s
        self._leases = LeaseWatch(lease_s)
        self._kept_s = settings.batch_retention_days * DAY_S
        self._poll_s = min(_LONGEST_POLL_S, lease_s / _BEATS_A_LEASE)
        self._running: dict[str, tuple[JobRunner, asyncio.Task[None]]] = {}
        self._orphans: frozenset[str] = frozenset()
        self._wake = asyncio.Event()
        self._is_stopping = False
        metrics.batch_jobs.read = lambda: [((), len(self._running))]

    def wake(self) -> None:
        """There is something to do."""
        self._wake.set()

    async def run(self) -> None:
        """What is thrown away may take long, and meanwhile others must see that we live."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._keep_looking())
            tasks.create_task(self._keep_sweeping())

    async def _keep_looking(self) -> None:
        while True:
            await self._try("batches_not_looked_at", self._look)
            self._wake.clear()
            try:
                async with asyncio.timeout(self._poll_s):
                    await self._wake.wait()
            except TimeoutError:
                continue

    async def _keep_sweeping(self) -> None:
        while True:
            await self._try("batches_not_swept", self._sweep)
            await asyncio.sleep(_SWEEP_S)

    async def _try(self, failure: str, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        except GatewayError as error:
            self._metrics.batch_storage_failures.inc()
            log.warning(failure, reason=error.message)
        except Exception:
            log.exception(failure)

    async def stop(self) -> None:
        """What runs is given up and given back: another gateway may go on at once."""
        self._is_stopping = True
        runners = list(self._running.values())
        for _, task in runners:
            task.cancel()
        await asyncio.gather(*(task for _, task in runners), return_exceptions=True)
        try:
            async with asyncio.timeout(_GIVE_BACK_S):
                await self._ownership.give_back()
        except (GatewayError, TimeoutError) as error:
            log.warning("batches_not_given_back", reason=str(error) or type(error).__name__)

    async def _look(self) -> None:
        if self._running:
            await self._ownership.beat(self._running)
        jobs = await self._ownership.list_open()
        self._leases.keep_only({job.id for job in jobs})
        free: list[JobRecord] = []
        for job in jobs:
            if job.id in self._running:
                self._tell(self._running[job.id][0], job)
            elif self._is_free(job):
                free.append(job)
        await self._take_in_turn(free)

    async def _take_in_turn(self, free: Sequence[JobRecord]) -> None:
        """Of those who have the fewest running first, so that nobody's many keep others' out; of
        one owner's as they come.
        """
        running = Counter(runner.job.owner for runner, _ in self._running.values())
        waiting: defaultdict[str, deque[tuple[int, JobRecord]]] = defaultdict(deque)
        for place, job in enumerate(free):
            # What only has to be ended costs little, and is waited for.
            if job.ending is not None or job.expires_at <= self._clock.now():
                await self._take(job)
            else:
                waiting[job.owner].append((place, job))
        owners = [(running[owner], jobs[0][0], owner) for owner, jobs in waiting.items()]
        heapq.heapify(owners)
        while owners:
            number, _, owner = heapq.heappop(owners)
            if len(self._running) >= (_MOST_AT_ONCE if number else _MOST_BESIDE):
                return
            await self._take(waiting[owner].popleft()[1])
            if jobs := waiting[owner]:
                heapq.heappush(owners, (number + 1, jobs[0][0], owner))

    def _tell(self, runner: JobRunner, job: JobRecord) -> None:
        """What its owner or its time has decided about a batch of ours."""
        if job.epoch != runner.job.epoch:
            self._running[job.id][1].cancel()
        elif job.status == "cancelling":
            runner.end("cancelled")
        elif job.expires_at <= self._clock.now():
            runner.end("expired")
        else:
            runner.check_owner()

    def _is_free(self, job: JobRecord) -> bool:
        """Nobody has it, or who has it has not moved for a whole lease."""
        return not job.worker or self._leases.has_ended(job.id, (job.epoch, job.beat))

    async def _take(self, job: JobRecord) -> None:
        claimed = await self._ownership.claim(job)
        if claimed is None:
            return
        if job.worker:
            self._metrics.batch_takeovers.inc()
            log.warning("batch_taken_over", batch=job.id, worker=job.worker)
        runner = self._build_runner(claimed)
        self._tell(runner, claimed)
        task = asyncio.create_task(self._run(runner))
        self._running[job.id] = runner, task

    async def _run(self, runner: JobRunner) -> None:
        try:
            await runner.run()
        except OwnershipLost:
            log.warning("batch_lost", batch=runner.job.id)
        except Exception:
            log.exception("batch_crashed", batch=runner.job.id)
        finally:
            if not self._is_stopping:
                self._running.pop(runner.job.id, None)
                self.wake()

    async def _sweep(self) -> None:
        """Files whose time is over, and bytes that no file has: of uploads and of files that were
        begun by a gateway that is no more. Those only when they were seen before, too: by a clock
        that jumps, what has just been written and is still to become a file is old as well.
        """
        for file in await self._store.list_expired_files():
            # Another gateway, or its owner, was first; or a batch has just been made of it.
            with suppress(NotFound, Conflict):
                await self._store.delete_file(file.owner, file.id)
                await self._blobs.delete(file.blob)
        old = await self._blobs.list_older_than(self._clock.now() - _ORPHAN_AGE_S)
        orphans = frozenset(await self._store.find_orphans(old))
        for name in orphans & self._orphans:
            await self._blobs.delete(name)
        self._orphans = orphans
        await self._store.delete_old_jobs(self._kept_s)
