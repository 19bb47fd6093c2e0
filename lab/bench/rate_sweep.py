"""The knee: the highest rate of arrivals that a target serves in time, with no queue that grows.

Open loop: calls arrive by a Poisson process whether or not earlier ones were answered, and each
one's time counts from its arrival. First the rates climb until no target serves them; then every
round looks for each target's knee anew, in steps of a tenth, all targets in turn.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from lab.bench.bench_figures import BenchFailed, RoundSeries
from lab.bench.rounds import BenchSetup
from lab.bench.targets import BenchCall, BenchClient, CallFailed, Target, read_clock_s
from lab.intervals import find_value_at

WORKLOAD = "open loop"
MEASURE = "knee"
_CLIMB = (0.6, 0.8, 1.0, 1.25, 1.6, 2.0, 2.5, 3.2)
_DESCENT = 0.6
_BURST = 64
_MOST_DESCENTS = 5
_STEP = 1.1
_MOST_STEPS = 20
_MOST_GROWTH = 0.05
_LONGEST_WINDOW_S = 15.0
_OWN_LIMIT = 0.9
_GRACE_S = 1.0
_OVERLOADED = (429, 503)


@dataclass(frozen=True)
class SweepPoint:
    """One target at one rate. `growth` is the share of arrivals that the queue grew by."""

    arm: str
    rate: float
    sent: int
    answered: int
    p50_s: float
    p95_s: float
    growth: float
    client_share: float
    trouble: str = ""

    @property
    def is_served(self) -> bool:
        return not self.trouble


@dataclass
class Sweep:
    """Everything that was tried, and the knees round by round."""

    bound_s: float
    points: list[SweepPoint] = field(default_factory=list)
    knees: dict[str, list[float]] = field(default_factory=dict)

    def series(self) -> RoundSeries:
        return RoundSeries(WORKLOAD, MEASURE, "calls/s", self.knees)

    def was_client_the_limit(self) -> bool:
        """Whether targets failed while this program was busy itself."""
        failed = [point for point in self.points if not point.is_served]
        return any(point.client_share > _OWN_LIMIT for point in failed)


@dataclass(frozen=True)
class SweepPlan:
    """What is asked, and for how long: a window, or longer until enough calls have arrived."""

    questions: tuple[str, ...]
    max_tokens: int
    bound_s: float
    window_s: float
    fewest_arrivals: int
    seconds: float
    most_rounds: int


async def find_knees(site: BenchSetup, plan: SweepPlan) -> Sweep:
    sweep = Sweep(plan.bound_s, knees={target.name: [] for target in site.targets})
    began = read_clock_s()
    climber = _Climber(site, plan, sweep)
    known = await climber.climb()
    longest_s = 0.0
    for number in range(plan.most_rounds):
        started = read_clock_s()
        if number and started - began + longest_s > plan.seconds:
            break
        for arm, rate in (await climber.search(known, f"round {number + 1}")).items():
            sweep.knees[arm].append(rate)
        known = {arm: statistics.median(rates) for arm, rates in sweep.knees.items()}
        longest_s = max(longest_s, read_clock_s() - started)
    return sweep


class _Climber:
    """Walks rates; every target sees the same arrivals."""

    def __init__(self, setup: BenchSetup, plan: SweepPlan, sweep: Sweep) -> None:
        self._setup, self._plan, self._sweep = setup, plan, sweep
        self._calls = {target.name: self._cycle(target) for target in setup.targets}

    def _cycle(self, target: Target) -> Iterator[BenchCall]:
        tokens = self._plan.max_tokens
        return itertools.cycle([target.chat_call(one, tokens) for one in self._plan.questions])

    async def climb(self) -> dict[str, float]:
        """The highest rate that each target served on the way up, or the first on the way down."""
        capacity = {arm: await self._estimate(calls) for arm, calls in self._calls.items()}
        known: dict[str, float] = {}
        climbing = set(capacity)
        for factor in _CLIMB:
            tried = await self._try({arm: capacity[arm] * factor for arm in climbing}, "climbing")
            known |= {point.arm: point.rate for point in tried if point.is_served}
            climbing -= {point.arm for point in tried if not point.is_served}
        factor = _CLIMB[0]
        for _ in range(_MOST_DESCENTS):
            factor *= _DESCENT
            rates = {arm: rate * factor for arm, rate in capacity.items() if arm not in known}
            tried = await self._try(rates, "descending")
            known |= {point.arm: point.rate for point in tried if point.is_served}
        missing = [arm for arm in capacity if arm not in known]
        if missing:
            rate = min(capacity[arm] * factor for arm in missing)
            raise BenchFailed(
                f"{' and '.join(missing)} served no rate down to {rate:.2f} calls/s with 95 % "
                f"within {self._plan.bound_s:g} s; allow more with --p95-bound-s"
            )
        return known

    async def search(self, known: dict[str, float], title: str) -> dict[str, float]:
        """Up from a rate that is served to one that is not, or down until one is.

        Whoever begins lower is stopped lower by chance, and who comes from above higher: so all
        arms begin at the same rate, one that the weakest has served, and every round at another.
        """
        start = min(known.values()) / _STEP ** self._setup.chance.uniform(0.5, 1.5)
        rates: dict[str, float] = dict.fromkeys(known, start)
        served: dict[str, float] = {}
        failed: dict[str, float] = {}
        for _ in range(_MOST_STEPS):
            for arm, is_served in (await self._judge(rates, title)).items():
                (served if is_served else failed)[arm] = rates[arm]
                rates[arm] *= _STEP if is_served else 1 / _STEP
            rates = {arm: r for arm, r in rates.items() if arm not in served or arm not in failed}
        return {arm: served.get(arm, rates.get(arm, 0.0)) for arm in known}

    async def _judge(self, rates: dict[str, float], title: str) -> dict[str, bool]:
        """Fails who fails twice: by chance a queue grows within any short window."""
        first = {point.arm: point for point in await self._try(rates, title)}
        failed = {arm: rates[arm] for arm, point in first.items() if not point.is_served}
        again = {point.arm: point for point in await self._try(failed, f"{title}, again")}
        for arm, point in again.items():
            if point.is_served:
                self._sweep.points.remove(first[arm])
        return {arm: point.is_served for arm, point in (first | again).items()}

    async def _try(self, rates: dict[str, float], title: str) -> list[SweepPoint]:
        """In random order; the same gaps between arrivals for each, but for their length."""
        points = []
        seed = self._setup.chance.random()
        for arm in self._setup.chance.sample(sorted(rates), len(rates)):
            self._setup.say(f"{title}: {arm} at {rates[arm]:.0f} calls/s")
            calls = self._calls[arm]
            trial = Trial(self._setup.client, calls, self._plan, random.Random(seed))
            points.append(await trial.run(arm, rates[arm]))
            # What was given up may still be in the engine; the next rate begins behind it.
            await self._setup.client.send(next(self._calls[self._setup.targets[0].name]))
        self._sweep.points += points
        return points

    async def _estimate(self, calls: Iterator[BenchCall]) -> float:
        """Calls a second that the target serves 64 at a time, the first 64 not counted."""
        for _ in range(2):
            started = read_clock_s()
            sending = map(self._setup.client.send, itertools.islice(calls, _BURST))
            answers = await asyncio.gather(*sending, return_exceptions=True)
            took_s = read_clock_s() - started
        for answer in answers:
            if isinstance(answer, BaseException) and not _is_overload(answer):
                raise answer
        return max(1, sum(isinstance(answer, bytes) for answer in answers)) / took_s


def _is_overload(error: BaseException) -> bool:
    return isinstance(error, CallFailed) and error.status in _OVERLOADED


@dataclass
class _Arrivals:
    """When each call arrived and ended, in seconds since the window began; given up: never."""

    begun: list[float] = field(default_factory=list)
    ended: list[float] = field(default_factory=list)
    refused: int = 0
    done: int = 0

    def times(self) -> list[float]:
        """How long each took."""
        return [end - begin for begin, end in zip(self.begun, self.ended, strict=True)]

    def in_flight(self, start: float, stop: float) -> float:
        """Calls at work, on average between two times."""
        pairs = zip(self.begun, self.ended, strict=True)
        inside = (max(0.0, min(end, stop) - max(begin, start)) for begin, end in pairs)
        return sum(inside) / (stop - start)


@dataclass(frozen=True)
class Trial:
    """One target at one rate; `chance` decides when the calls arrive."""

    client: BenchClient
    calls: Iterator[BenchCall]
    plan: SweepPlan
    chance: random.Random
    seen: _Arrivals = field(default_factory=_Arrivals)

    async def run(self, arm: str, rate: float) -> SweepPoint:
        plan, seen = self.plan, self.seen
        window_s = min(_LONGEST_WINDOW_S, max(plan.window_s, plan.fewest_arrivals / rate))
        cpu, clock = time.process_time(), read_clock_s()
        tasks, is_flooded = await self._send_all(rate, window_s)
        # Of this program alone: its own load must not be what a target is blamed for.
        share = (time.process_time() - cpu) / (read_clock_s() - clock)
        await self._end(tasks)
        times = seen.times()
        early = seen.in_flight(window_s * 0.2, window_s * 0.4)
        grown = seen.in_flight(window_s * 0.8, window_s) - early
        point = SweepPoint(
            arm,
            rate,
            len(times),
            sum(math.isfinite(one) for one in times),
            find_value_at(times, 0.5),
            find_value_at(times, 0.95),
            grown / (rate * window_s * 0.6),
            share,
        )
        is_growing = point.growth > _MOST_GROWTH and grown > 2 * math.sqrt(early + 1)
        trouble = _find_trouble(point, plan.bound_s, seen.refused, is_flooded, is_growing)
        return replace(point, trouble=trouble)

    async def _send_all(
        self, rate: float, window_s: float
    ) -> tuple[list[asyncio.Task[None]], bool]:
        """Until the window is over, or so many are inside that the bound is out of reach."""
        most_inside = 4 * rate * self.plan.bound_s + 256
        tasks: list[asyncio.Task[None]] = []
        started = read_clock_s()
        due = self.chance.expovariate(1.0) / rate
        while due < window_s or not tasks:
            await asyncio.sleep(max(0.0, due - (read_clock_s() - started)))
            self.seen.begun.append(due)
            self.seen.ended.append(math.inf)
            tasks.append(asyncio.create_task(self._ask(len(tasks), next(self.calls), started)))
            if len(tasks) - self.seen.done > most_inside:
                return tasks, True
            due += self.chance.expovariate(1.0) / rate
        await asyncio.sleep(max(0.0, window_s - (read_clock_s() - started)))
        return tasks, False

    async def _ask(self, number: int, call: BenchCall, started: float) -> None:
        try:
            body = await self.client.send(call)
        except CallFailed as error:
            if not _is_overload(error):
                raise
            self.seen.refused += 1
            return
        finally:
            self.seen.done += 1
        self.seen.ended[number] = read_clock_s() - started
        self.client.check(call, body)

    async def _end(self, tasks: list[asyncio.Task[None]]) -> None:
        """What comes much later than the bound is given up."""
        _, late = await asyncio.wait(tasks, timeout=self.plan.bound_s + _GRACE_S)
        for task in late:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, Exception):
                raise result


def _find_trouble(
    point: SweepPoint, bound_s: float, refused: int, is_flooded: bool, is_growing: bool
) -> str:
    if refused:
        return f"{refused} calls refused"
    if is_flooded:
        return "flooded"
    if point.p95_s > bound_s:
        return f"95 % within {point.p95_s:.2f} s" if math.isfinite(point.p95_s) else "given up"
    if is_growing:
        return f"the queue grew by {point.growth:.0%} of the calls"
    return ""
