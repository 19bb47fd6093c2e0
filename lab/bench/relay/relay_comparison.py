"""What passing a /v1 call on costs: the gateway beside a plain relay and the engine itself.

An engine's stand-in that answers at once makes the gateway's own cost visible. Every request
carries a number and must get it back. The engine is asked twice, as the control.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from common.processes import read_cpu_s, read_resident_bytes
from lab.bench.bench_figures import BenchRow, Bound, RoundSeries, build_added
from lab.bench.relay.peers import Contender
from lab.bench.relay.relay_arms import RelayArms, start_arms
from lab.bench.relay.relay_connection import RelayConnection
from lab.bench.relay.stand_in_engine import HOLD
from lab.bench.rounds import RoundBudget, Say, take_rounds
from lab.intervals import Interval, find_interval

LATENCY, SLOWEST = "p50 at concurrency 1", "p99 at concurrency 1"
RATE, CHUNKS, CPU = "requests at 64", "stream chunks at 64", "CPU a request at 64"
PREDICT_CPU = "CPU a /predict of 358 prompts"
_WORKLOAD = "relay"
_CONCURRENCY = 64
_HELD_STREAMS = 500
_PROMPTS = 358  # as the course's judge asks
_PREDICTING = ("plain", "gateway")  # others have no /predict

Ask = Callable[[RelayConnection, int], Awaitable[int]]


@dataclass(frozen=True)
class RelayLoad:
    """How much is asked in one turn of an arm."""

    calls: int = 500
    seconds: float = 1.0
    held_streams: int = _HELD_STREAMS


@dataclass(frozen=True)
class RelayResult:
    """The comparison: its series, and each relay's memory with many streams open."""

    series: tuple[RoundSeries, ...]
    memory_mb: dict[str, float]
    held_streams: int

    @property
    def peers(self) -> list[str]:
        return [arm for arm in self.memory_mb if arm not in ("plain", "gateway")]

    def rows(self) -> list[BenchRow]:
        by_measure = {one.measure: one for one in self.series}
        latency, slowest = by_measure[LATENCY], by_measure[SLOWEST]
        rate, chunks, cpu = by_measure[RATE], by_measure[CHUNKS], by_measure[CPU]
        rows = [
            build_added("relay", latency, f"added {LATENCY}", Bound("at most", 0.35)),
            build_added("relay", slowest, f"added {SLOWEST}"),
            _over("plain", rate, Bound("at least", 0.75), is_more_better=True),
            _over("plain", chunks, Bound("at least", 0.9), is_more_better=True),
            _over("plain", cpu, None, is_more_better=False),
            _over("plain", by_measure[PREDICT_CPU], None, is_more_better=False),
            self._build_memory("gateway", Bound("at most", 80.0)),
        ]
        for arm in ("plain", *self.peers):
            label = "plain relay" if arm == "plain" else arm
            rows += [
                build_added("relay", one, f"added {one.measure}, {label}", arm=arm)
                for one in (latency, slowest)
            ]
        for arm in self.peers:
            rows += [_over(arm, one, None, is_more_better=True) for one in (rate, chunks)]
            rows += [_over(arm, cpu, None, is_more_better=False), self._build_memory(arm)]
        return rows

    def _build_memory(self, arm: str, bound: Bound | None = None) -> BenchRow:
        name = f"memory at {self.held_streams} open streams"
        name += "" if arm == "gateway" else f", {arm}"
        memory = self.memory_mb[arm]
        return BenchRow("relay", name, "MB", Interval(memory, memory, memory, 1), bound=bound)


def _over(arm: str, series: RoundSeries, bound: Bound | None, *, is_more_better: bool) -> BenchRow:
    """The relays differ from each other in what they are; direct and control do not."""
    has_control = "control" in series.by_arm
    control = find_interval(series.relate("control", "direct")) if has_control else None
    span = find_interval(series.relate("gateway", arm))
    name, unit = series.measure, "× plain relay"
    if arm != "plain":
        name, unit = f"{name}, over {arm}", f"× {arm}"
    return BenchRow("relay", name, unit, span, 1.0, control, bound, is_more_better)


async def measure_latency_ms(port: int, calls: int) -> tuple[float, float]:
    """Of the middle one, and of the slowest but one in a hundred."""
    connection = await RelayConnection.connect(port)
    times = []
    for number in range(calls):
        started = time.perf_counter()
        await connection.ask(number)
        times.append(time.perf_counter() - started)
    await connection.close()
    times.sort()
    return statistics.median(times) * 1e3, times[-1 - len(times) // 100] * 1e3


async def measure_rate(
    port: int, seconds: float, ask: Ask, callers: int = _CONCURRENCY
) -> tuple[int, float]:
    """What so many connections at once get in that time, and how long it took to the last."""

    async def work(connection: RelayConnection, first: int) -> int:
        count = turn = 0
        while not turn or time.perf_counter() < deadline:
            count += await ask(connection, first + turn)
            turn += 1
        return count

    connections = [await RelayConnection.connect(port) for _ in range(callers)]
    started = time.perf_counter()
    deadline = started + seconds
    work_of_all = (work(connection, n * 1_000_000) for n, connection in enumerate(connections))
    count = sum(await asyncio.gather(*work_of_all))
    took_s = time.perf_counter() - started
    await asyncio.gather(*(connection.close() for connection in connections))
    return count, took_s


async def _ask_once(connection: RelayConnection, number: int) -> int:
    await connection.ask(number)
    return 1


async def _ask_stream_once(connection: RelayConnection, number: int) -> int:
    await connection.ask_stream(number)
    return 1


async def _ask_predict(connection: RelayConnection, number: int) -> int:
    await connection.ask_predict(number, _PROMPTS)
    return 1


# What is asked, and by how many at once: a batch comes alone.
KINDS: Mapping[str, tuple[Ask, int]] = {
    "chat": (_ask_once, _CONCURRENCY),
    "stream": (_ask_stream_once, _CONCURRENCY),
    "predict": (_ask_predict, 1),
}


async def measure_memory_mb(port: int, pid: int, streams: int) -> float:
    connections = [await RelayConnection.connect(port) for _ in range(streams)]
    for number, connection in enumerate(connections):
        connection.send(number, stream=True, extra=HOLD)
    for connection in connections:
        await connection.read_head()
    memory_mb = read_resident_bytes(pid) / 2**20
    await asyncio.gather(*(connection.close() for connection in connections))
    return memory_mb


async def measure_relay(
    load: RelayLoad,
    budget: RoundBudget,
    chance: random.Random,
    say: Say,
    contenders: Sequence[Contender] = (),
) -> RelayResult:
    async with start_arms(contenders) as arms:
        taken = await take_rounds(
            list(arms.ports), lambda arm: _take_turn(arms, arm, load), budget, chance, say
        )
        say("memory")
        memory_mb = {
            arm: await measure_memory_mb(arms.ports[arm], pid, load.held_streams)
            for arm, pid in arms.pids.items()
        }
    units = {LATENCY: "ms", SLOWEST: "ms", RATE: "/s", CHUNKS: "/s", CPU: "ms"}
    units[PREDICT_CPU] = "ms"
    series = [RoundSeries(_WORKLOAD, name, units[name], by_arm) for name, by_arm in taken.items()]
    return RelayResult(tuple(series), memory_mb, load.held_streams)


async def _take_turn(arms: RelayArms, arm: str, load: RelayLoad) -> dict[str, float]:
    port, pid = arms.ports[arm], arms.pids.get(arm)
    middle_ms, slowest_ms = await measure_latency_ms(port, load.calls)
    values = {LATENCY: middle_ms, SLOWEST: slowest_ms}
    cpu_s = read_cpu_s(pid) if pid else 0.0
    count, took_s = await measure_rate(port, load.seconds, _ask_once)
    values[RATE] = count / took_s
    if pid:
        values[CPU] = (read_cpu_s(pid) - cpu_s) * 1e3 / count
    chunks, took_s = await measure_rate(port, load.seconds, RelayConnection.ask_stream)
    values[CHUNKS] = chunks / took_s
    if pid and arm in _PREDICTING:
        cpu_s = read_cpu_s(pid)
        count, _ = await measure_rate(port, load.seconds, *KINDS["predict"])
        values[PREDICT_CPU] = (read_cpu_s(pid) - cpu_s) * 1e3 / count
    return values


def describe_relay(relayed: RelayResult) -> list[str]:
    """The medians by arm."""
    arms = list(relayed.series[0].by_arm)
    lines = [f"{'':30}" + "".join(f"{arm:>12}" for arm in arms)]
    for one in relayed.series:
        digits = 0 if one.unit == "/s" else 3
        cells = [
            f"{statistics.median(one.by_arm[arm]):>12,.{digits}f}"
            if arm in one.by_arm
            else " " * 12
            for arm in arms
        ]
        lines.append(f"{one.measure + ', ' + one.unit:30}{''.join(cells)}")
    return lines
