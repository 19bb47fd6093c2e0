"""The Gate: how many sequences may be inside the engines, whose turn it is, who waits how long.

Two lanes, `interactive` and `batch`, share the places by weight: each admission moves its lane's
clock forward by its size over the lane's weight, and the lane whose clock is furthest behind goes
next. The first in that lane is waited for even when it is large, so chats cannot starve a batch; a
batch moves its clock far ahead, so it cannot starve chats. Within a lane: first come, first served.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Literal, cast

from aiohttp import web

from gateway.config import Settings
from gateway.errors import DeadlineUnreachable, InvalidRequest, Overloaded
from gateway.keys import Caller
from gateway.metrics import Metrics

LaneName = Literal["interactive", "batch"]
# Completions older than a few of these no longer say how fast the engines are.
_RATE_HALF_LIFE_S = 10.0
_LONGEST_RETRY_AFTER_S = 120.0


@dataclass(frozen=True, slots=True)
class Visit:
    """Who wants in: how many sequences, in which lane, on whose account, until when."""

    sequences: int
    lane: LaneName = "interactive"
    account: str = ""
    account_limit: int = 0
    deadline: float | None = None

    def loop_deadline(self) -> float | None:
        """The deadline on the event loop's clock."""
        if self.deadline is None:
            return None
        return asyncio.get_running_loop().time() + self.deadline - time.monotonic()


def build_visit(
    headers: Mapping[str, str], caller: Caller, sequences: int, lane: LaneName
) -> Visit:
    """The key's lane, else the one asked for, else the usual one; X-Deadline-Ms from now."""
    asked = headers.get("X-Priority")
    if asked is not None and asked not in {"interactive", "batch"}:
        raise InvalidRequest("X-Priority is interactive or batch", param="X-Priority")
    return Visit(
        sequences=sequences,
        lane=caller.lane or cast("LaneName | None", asked) or lane,
        account=caller.name,
        account_limit=caller.max_concurrency,
        deadline=_parse_deadline(headers.get("X-Deadline-Ms")),
    )


def _parse_deadline(text: str | None) -> float | None:
    if text is None:
        return None
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise InvalidRequest("X-Deadline-Ms is a number of milliseconds", param="X-Deadline-Ms")
    return time.monotonic() + int(text) / 1000


@dataclass(slots=True, eq=False)
class _Waiter:
    turn: asyncio.Future[None]
    places: int


@dataclass(slots=True)
class _Lane:
    weight: float
    clock: float = 0.0
    running: int = 0
    waiting: int = 0
    queue: deque[_Waiter] = field(default_factory=deque)


class Gate:
    """Counts what is inside; the only limit between a caller and the engines."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._capacity = settings.max_running
        self._max_waiting = settings.max_waiting
        self._queue_timeout_s = settings.queue_timeout_s
        self._lanes: dict[LaneName, _Lane] = {
            "interactive": _Lane(settings.interactive_weight),
            "batch": _Lane(settings.batch_weight),
        }
        self._accounts: Counter[str] = Counter()
        self._running = 0
        self._clock = 0.0
        self._rate = _Rate()
        for name, lane in self._lanes.items():
            metrics.running.labels(name).set_function(_reader(lane, "running"))
            metrics.waiting.labels(name).set_function(_reader(lane, "waiting"))
        self._refused = metrics.refused

    @asynccontextmanager
    async def enter(self, visit: Visit) -> AsyncIterator[None]:
        """Holds the visit's places for as long as the block runs."""
        lane = self._lanes[visit.lane]
        places = min(visit.sequences, self._capacity)
        self._open_account(visit, places)
        try:
            await self._take(visit, lane, places)
            try:
                yield
            finally:
                self._give_back(lane, places)
                self._rate.count(places)
        finally:
            self._close_account(visit, places)

    def expected_wait_s(self, places: int) -> float:
        """How long until so many more places have become free, by what the engines did lately."""
        waiting = sum(lane.waiting for lane in self._lanes.values())
        missing = self._running + waiting + places - self._capacity
        if missing <= 0:
            return 0.0
        return self._rate.time_for(missing)

    async def _take(self, visit: Visit, lane: _Lane, places: int) -> None:
        waiting = sum(other.waiting for other in self._lanes.values())
        if not waiting and self._running + places <= self._capacity:
            self._enter(lane, places)
            return
        expected_s = self.expected_wait_s(places)
        retry_after_s = min(max(1.0, expected_s), _LONGEST_RETRY_AFTER_S)
        if waiting + places > self._max_waiting:
            self._refused.labels("queue_full").inc()
            raise Overloaded(
                f"{waiting} sequences are waiting already; try again in {retry_after_s:.0f} s",
                retry_after_s=retry_after_s,
            )
        patience_s = self._queue_timeout_s
        if visit.deadline is not None:
            patience_s = min(patience_s, visit.deadline - time.monotonic())
            if expected_s > patience_s:
                self._refused.labels("deadline").inc()
                raise DeadlineUnreachable(
                    f"about {expected_s:.1f} s of waiting lie before the deadline's "
                    f"{max(0.0, patience_s):.1f} s",
                    retry_after_s=retry_after_s,
                )
        await self._queue(lane, places, patience_s, retry_after_s)

    async def _queue(
        self, lane: _Lane, places: int, patience_s: float, retry_after_s: float
    ) -> None:
        if not lane.queue:
            # A lane that was idle starts now; time it did not use is not saved up.
            lane.clock = max(lane.clock, self._clock)
        waiter = _Waiter(asyncio.get_running_loop().create_future(), places)
        lane.queue.append(waiter)
        lane.waiting += places
        try:
            async with asyncio.timeout(patience_s):
                await waiter.turn
        except BaseException as error:
            self._leave(lane, waiter)
            if isinstance(error, TimeoutError):
                self._refused.labels("queue_timeout").inc()
                raise Overloaded(
                    f"no place became free within {patience_s:.1f} s",
                    code="queue_timeout",
                    retry_after_s=retry_after_s,
                ) from None
            raise

    def _enter(self, lane: _Lane, places: int) -> None:
        self._rate.tick(is_busy=self._running > 0)
        lane.running += places
        self._running += places

    def _leave(self, lane: _Lane, waiter: _Waiter) -> None:
        if waiter.turn.done() and not waiter.turn.cancelled():
            self._give_back(lane, waiter.places)  # admitted in the very moment it gave up
            return
        waiter.turn.cancel()
        lane.queue.remove(waiter)
        lane.waiting -= waiter.places
        self._admit()

    def _give_back(self, lane: _Lane, places: int) -> None:
        self._rate.tick(is_busy=True)
        lane.running -= places
        self._running -= places
        self._admit()

    def _admit(self) -> None:
        while queued := [lane for lane in self._lanes.values() if lane.queue]:
            lane = min(queued, key=lambda one: one.clock)
            waiter = lane.queue[0]
            if waiter.turn.cancelled():
                return  # it is about to leave, and calls again when it has
            if self._running + waiter.places > self._capacity:
                return
            lane.queue.popleft()
            lane.waiting -= waiter.places
            self._clock = lane.clock
            lane.clock += waiter.places / lane.weight
            self._enter(lane, waiter.places)
            waiter.turn.set_result(None)

    def _open_account(self, visit: Visit, places: int) -> None:
        held = self._accounts[visit.account]
        # One request larger than the limit may still run, alone.
        if visit.account_limit and held and held + places > visit.account_limit:
            self._refused.labels("key_concurrency").inc()
            raise Overloaded(
                f"this key has {held} sequences running or waiting; its limit is "
                f"{visit.account_limit}",
                code="key_concurrency",
                retry_after_s=min(max(1.0, self._rate.time_for(places)), _LONGEST_RETRY_AFTER_S),
            )
        self._accounts[visit.account] += places

    def _close_account(self, visit: Visit, places: int) -> None:
        self._accounts[visit.account] -= places
        if not self._accounts[visit.account]:
            del self._accounts[visit.account]


def _reader(lane: _Lane, name: Literal["running", "waiting"]) -> Callable[[], float]:
    return lambda: float(getattr(lane, name))


class _Rate:
    """Sequences a second while there was work: counts that fade with busy time."""

    def __init__(self) -> None:
        self._count = 0.0
        self._span_s = 0.0
        self._last = time.monotonic()

    def tick(self, *, is_busy: bool) -> None:
        """Called before the number of running sequences changes."""
        now = time.monotonic()
        elapsed_s, self._last = now - self._last, now
        if is_busy:
            keep = 0.5 ** (elapsed_s / _RATE_HALF_LIFE_S)
            self._count *= keep
            self._span_s = self._span_s * keep + elapsed_s

    def count(self, sequences: int) -> None:
        self._count += sequences

    def time_for(self, sequences: int) -> float:
        if self._count < 1e-3:
            return 1.0  # nothing learnt yet
        return sequences * self._span_s / self._count


GATE = web.AppKey("gate", Gate)
