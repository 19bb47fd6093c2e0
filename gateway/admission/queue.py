"""The gate before the engines: whose turn it is, who waits how long.

There are as many places as the engines run sequences, and a few more that wait inside, so that
none runs dry. Two lanes, `interactive` and `batch`, share them by weight: each admission moves its
lane's clock forward by its size over the lane's weight, and the lane whose clock is furthest behind
goes next. A batch moves its clock far ahead, so it cannot starve chats. A share of what the engines
run is never the batch lane's: an engine takes what it is sent in order of arrival, and a chat would
wait there behind it.

A batch that may be cut comes in by pieces, each as soon as there is room for it, and gives places
back one by one. What cannot be cut counts for the lane's share at most. The first in a lane is
waited for even when it is large, so chats cannot starve a batch. But as long as requests older than
its turn alone keep it out, waiting helps nobody: whoever fits passes it. Once only those who passed
are in its way its places are kept free until it is in. Otherwise: within a lane, first come, first
served.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Self

from gateway.admission.limits import Limits
from gateway.admission.throughput import Throughput
from gateway.admission.tickets import LONGEST_RETRY_AFTER_S, Claims, LaneName, Ticket
from gateway.config import Settings
from gateway.engines.timeouts import Deadline
from gateway.errors import DeadlineUnreachable, Overloaded

# Of what the engines run: never the batch lane's; and let in besides, so that something waits there
# for each place that comes free.
_INTERACTIVE_SHARE = 1 / 16
_WAITING_INSIDE = 1 / 8
# What a batch asks for at a time, of its lane's share: less would be many small calls, more would
# leave places empty until so many are free.
_PIECES = 24
_CLOCK = attrgetter("clock")


@dataclass(slots=True, eq=False)
class _Waiter:
    """Wants as many places as there are, from `least` to `most`, in whole steps."""

    turn: asyncio.Future[tuple[int, int]]  # how many it got, and by which entry
    least: int
    most: int
    step: int


@dataclass(slots=True)
class _Lane:
    """What of a lane runs and waits; the queue in order of arrival."""

    name: LaneName
    weight: float
    most: int  # places that it may have
    running: int = 0
    waiting: int = 0
    rest: int = 0  # of batches that are inside, waiting for their next piece
    clock: float = 0.0
    queue: deque[_Waiter] = field(default_factory=deque)


@dataclass(slots=True)
class _Delay:
    """Who is next and does not fit; and the places that requests older than its turn still hold,
    of all and of its own lane.
    """

    lane: _Lane
    waiter: _Waiter
    last_older: int
    older: int
    older_own: int


class AdmissionQueue:
    """Counts what is inside; the only limit between a caller and the engines."""

    def __init__(self, settings: Settings, limits: Limits) -> None:
        self._most = self._capacity = settings.max_running
        self._largest = max(1, self._capacity // 2)
        self.is_feeding = False  # what may be cut comes in by pieces
        self._settings = settings
        self._interactive = _Lane("interactive", settings.interactive_weight, self._capacity)
        self._batch = _Lane("batch", settings.batch_weight, self._capacity)
        self._lanes = {"interactive": self._interactive, "batch": self._batch}
        self._claims = Claims(limits)
        self._clock = 0.0
        self._entries = 0
        self._delayed: _Delay | None = None
        self._kept = 0  # places kept free for the one who is delayed
        self._patient = 0  # of those who wait: however long, and bounded elsewhere
        self._throughput = Throughput()

    def change_capacity(self, sequences: int | None) -> None:
        """To what the engines run at once. Where nobody knows that, everything is let in, and no
        request counts for more than half.
        """
        self.is_feeding = sequences is not None
        if sequences is None:
            self._capacity = share = self._most
            self._largest = max(1, share // 2)
        else:
            runs = min(self._most, sequences)
            self._capacity = min(self._most, math.ceil(sequences * (1 + _WAITING_INSIDE)))
            self._largest = share = max(1, runs - max(1, round(runs * _INTERACTIVE_SHARE)))
        self._interactive.most, self._batch.most = self._capacity, share
        self._admit()

    def enter(self, ticket: Ticket) -> Admission:
        """Holds the ticket's places for as long as the block of `async with` runs."""
        return Admission(self, ticket, self._lanes[ticket.lane])

    async def take(self, ticket: Ticket) -> tuple[int, int]:
        """How many places the ticket got, and the number of this entry; `give_back` wants it."""
        if ticket.claim is not None:
            usual_wait_s = self._throughput.time_for(ticket.sequences)
            await self._claims.open(ticket, ticket.claim, usual_wait_s)
        lane = self._lanes[ticket.lane]
        least = most = min(ticket.sequences, self._largest)
        step = 1
        if ticket.is_divisible and self.is_feeding:
            step = ticket.step
            least = self._bound_piece(most, step)
        if self._may_pass(lane) and (granted := self._try_enter(lane, least, most, step)):
            return granted, self._number_entry()
        try:
            return await self._wait(ticket, lane, least, most, step)
        except BaseException:
            self.close_claim(ticket)
            raise

    async def take_more(self, ticket: Ticket, most: int) -> tuple[int, int]:
        """The same for the next piece of what is inside already: it waits its turn, however long,
        and is not turned away.
        """
        lane = self._lanes[ticket.lane]
        step = ticket.step
        least = self._bound_piece(most, step)
        if self._may_pass(lane) and (granted := self._try_enter(lane, least, most, step)):
            return granted, self._number_entry()
        lane.rest += most
        try:
            async with Deadline(ticket.deadline):
                return await self._queue(lane, least, most, step)
        finally:
            lane.rest -= most

    def give_back(self, lane: _Lane, places: int, entry: int) -> None:
        self._throughput.tick(is_busy=True)
        self._throughput.count(places)
        if self._delayed and entry <= self._delayed.last_older:
            self._delayed.older -= places
            if self._delayed.lane is lane:
                self._delayed.older_own -= places
        lane.running -= places
        if self._has_queue():
            self._admit()

    def close_claim(self, ticket: Ticket) -> None:
        if ticket.claim is not None:
            self._claims.close(ticket.claim)

    def count(self, lane: LaneName) -> tuple[int, int]:
        """Sequences of a lane that run and that wait."""
        one = self._lanes[lane]
        return one.running, one.waiting + one.rest

    @property
    def capacity(self) -> int:
        """Sequences that may be inside at once."""
        return self._capacity

    def is_alone(self, lane: _Lane, places: int) -> bool:
        """Whether nobody else of the lane is inside or waits."""
        return lane.running == places and not lane.queue

    @property
    def largest(self) -> int:
        """Places that a call counts for at most, however many sequences it has."""
        return self._largest

    @property
    def piece(self) -> int:
        """Places that what comes in by pieces gets at a time, at least."""
        return max(1, self._largest // _PIECES)

    def _bound_piece(self, most: int, step: int) -> int:
        return min(most, max(step, self.piece - self.piece % step))

    @property
    def _running(self) -> int:
        return self._interactive.running + self._batch.running

    @property
    def _waiting(self) -> int:
        return self._interactive.waiting + self._batch.waiting

    def _expected_wait_s(self, lane: _Lane, places: int) -> float:
        """How long until so many more places have become free, by what the engines did lately."""
        missing = max(
            self._running + self._waiting + places - self._capacity,
            lane.running + lane.waiting + places - lane.most,
        )
        return self._throughput.time_for(missing) if missing > 0 else 0.0

    async def _wait(
        self, ticket: Ticket, lane: _Lane, least: int, most: int, step: int
    ) -> tuple[int, int]:
        expected_s = self._expected_wait_s(lane, least)
        retry_after_s = min(max(1.0, expected_s), LONGEST_RETRY_AFTER_S)
        waiting, is_patient = self._waiting - self._patient, ticket.on_waiting is not None
        if not is_patient and waiting + most > self._settings.max_waiting:
            raise Overloaded(
                f"{waiting} sequences are waiting already; try again in {retry_after_s:.0f} s",
                retry_after_s=retry_after_s,
            )
        patience_s = self._settings.queue_timeout_s
        if ticket.deadline is not None:
            left_s = ticket.deadline - asyncio.get_running_loop().time()
            patience_s = min(patience_s, left_s)
            if expected_s > patience_s:
                raise DeadlineUnreachable(
                    f"about {expected_s:.1f} s of waiting lie before the deadline's "
                    f"{max(0.0, patience_s):.1f} s",
                    retry_after_s=retry_after_s,
                )
        lane.waiting += most
        self._patient += most * is_patient
        try:
            if ticket.on_waiting is not None:
                ticket.on_waiting()
            async with asyncio.timeout(None if ticket.on_waiting else patience_s):
                return await self._queue(lane, least, most, step)
        except TimeoutError:
            raise Overloaded(
                f"no place became free within {patience_s:.1f} s",
                code="queue_timeout",
                retry_after_s=retry_after_s,
            ) from None
        finally:
            lane.waiting -= most
            self._patient -= most * is_patient

    async def _queue(self, lane: _Lane, least: int, most: int, step: int) -> tuple[int, int]:
        if not lane.queue:
            # A lane that was idle starts now; time it did not use is not saved up.
            lane.clock = max(lane.clock, self._clock)
        waiter = _Waiter(asyncio.get_running_loop().create_future(), least, most, step)
        lane.queue.append(waiter)
        self._admit()
        try:
            return await waiter.turn
        except BaseException:
            self._leave(lane, waiter)
            raise

    def _has_queue(self) -> bool:
        return bool(self._interactive.queue or self._batch.queue)

    def _may_pass(self, lane: _Lane) -> bool:
        """Nobody waits, or only the one who would wait even if all others stood aside."""
        if not self._has_queue():
            return True
        if self._delayed is None or len(self._interactive.queue) + len(self._batch.queue) > 1:
            return False
        lane.clock = max(lane.clock, self._clock)
        return True

    def _try_enter(
        self, lane: _Lane, least: int, most: int, step: int, *, is_delayed: bool = False
    ) -> int:
        """How many places it got: none, or as many as there are from `least` to `most`."""
        running = self._running
        free, free_here = self._capacity - running, lane.most - lane.running
        if self._kept and not is_delayed and self._delayed is not None:
            free -= self._kept
            free_here -= self._kept if self._delayed.lane is lane else 0
        granted = min(most, free, free_here, self._largest)
        if step <= self._largest:
            granted -= granted % step
        if granted < min(least, self._largest):  # who came when there were more engines
            return 0
        lane.running += granted
        if is_delayed:
            self._kept = 0
        self._throughput.tick(is_busy=running > 0)
        return granted

    def _number_entry(self) -> int:
        self._entries += 1
        return self._entries

    def _leave(self, lane: _Lane, waiter: _Waiter) -> None:
        if waiter.turn.done() and not waiter.turn.cancelled():
            # Admitted in the very moment it gave up.
            self.give_back(lane, *waiter.turn.result())
            return
        waiter.turn.cancel()
        lane.queue.remove(waiter)
        if self._delayed and self._delayed.waiter is waiter:
            self._delayed = None
            self._kept = 0
        self._admit()

    def _admit(self) -> None:
        while lane := self._next_lane():
            waiter = lane.queue[0]
            if waiter.turn.cancelled():
                return  # it is about to leave, and calls again when it has
            is_delayed = self._delayed is not None
            granted = self._try_enter(
                lane, waiter.least, waiter.most, waiter.step, is_delayed=is_delayed
            )
            if not granted:
                if self._running < self._capacity:  # else there is nothing to pass for
                    self._delay(lane, waiter)
                    self._let_pass()
                return
            self._delayed = None
            self._clock = lane.clock
            self._start(lane, waiter, granted)

    def _next_lane(self) -> _Lane | None:
        if self._delayed:
            return self._delayed.lane
        queued = [lane for lane in self._lanes.values() if lane.queue]
        return min(queued, key=_CLOCK, default=None)

    def _start(self, lane: _Lane, waiter: _Waiter, granted: int) -> None:
        lane.queue.remove(waiter)
        lane.clock += granted / lane.weight
        waiter.turn.set_result((granted, self._number_entry()))

    def _delay(self, lane: _Lane, waiter: _Waiter) -> None:
        """Its turn has come and it does not fit. Who came in from now on will not keep it out."""
        if self._delayed is None:
            self._delayed = _Delay(lane, waiter, self._entries, self._running, lane.running)
        delayed, least = self._delayed, min(waiter.least, self._largest)
        fits = delayed.older + least <= self._capacity and delayed.older_own + least <= lane.most
        if not self._kept and fits:
            self._kept = least

    def _let_pass(self) -> None:
        """Those next after the one who is delayed, as long as they fit."""
        while any(self._let_one_pass(lane) for lane in sorted(self._lanes.values(), key=_CLOCK)):
            pass

    def _let_one_pass(self, lane: _Lane) -> bool:
        index = int(self._delayed is not None and self._delayed.lane is lane)
        if len(lane.queue) <= index:
            return False
        waiter = lane.queue[index]
        if waiter.turn.cancelled():
            return False
        granted = self._try_enter(lane, waiter.least, waiter.most, waiter.step)
        if granted:
            self._start(lane, waiter, granted)
        return granted > 0


class Places:
    """Some places inside; they are given back by the sequence or all at once."""

    __slots__ = ("_entry", "_lane", "_queue", "count")

    def __init__(self, queue: AdmissionQueue, lane: _Lane, count: int = 0, entry: int = 0) -> None:
        self._queue, self._lane = queue, lane
        self.count, self._entry = count, entry

    def give_back(self, count: int) -> None:
        count = min(count, self.count)  # all may have been given back already
        if count > 0:
            self.count -= count
            self._queue.give_back(self._lane, count, self._entry)


class Admission(Places):
    """A ticket's time inside: a plain object, for a generator would cost each request more."""

    __slots__ = ("_further", "_is_taken", "_ticket")

    def __init__(self, queue: AdmissionQueue, ticket: Ticket, lane: _Lane) -> None:
        super().__init__(queue, lane)
        self._ticket = ticket
        self._is_taken = False
        self._further: list[Places] | tuple[()] = ()  # most have no more than one piece

    async def __aenter__(self) -> Self:
        self.count, self._entry = await self._queue.take(self._ticket)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.give_all_back()
        self._queue.close_claim(self._ticket)

    @property
    def gate(self) -> Self | None:
        """For who comes in by pieces; `None` while nobody knows what the engines run at once."""
        return self if self._queue.is_feeding else None

    @property
    def piece(self) -> int:
        return self._queue.piece

    @property
    def is_alone(self) -> bool:
        """Whether nobody waits for what this one gives back early."""
        return self._queue.is_alone(self._lane, self.count)

    def give_all_back(self) -> None:
        """What is needed afterwards has to be taken anew."""
        self._is_taken = True
        for places in (self, *self._further):
            places.give_back(places.count)

    async def take(self, most: int) -> Places:
        """Places for the next piece of a batch, `most` at the most; at first what it entered with,
        then, when it is its turn again, what is free.
        """
        if not self._is_taken:
            self._is_taken = True
            self.give_back(self.count - most)
            return self
        places = Places(self._queue, self._lane, *await self._queue.take_more(self._ticket, most))
        if isinstance(self._further, list):
            self._further.append(places)
        else:
            self._further = [places]
        return places
