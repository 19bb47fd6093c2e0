"""What passing a /v1 call on costs: the gateway beside a plain relay and the engine itself.

An engine's stand-in that answers at once makes the gateway's own cost visible. Every request
carries a number and must get it back. The engine is asked twice, as the control.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

from common.ports import find_free_ports
from common.processes import read_cpu_s, read_resident_mb
from lab.bench.answer_book import MixedUp
from lab.bench.bench_figures import BenchFailed, Bound, Row, Series, Span, find_span
from lab.bench.relay.stand_in_engine import HOLD, STREAM_CHUNKS, find_number, find_numbers
from lab.bench.rounds import Budget, Say, take_rounds
from lab.paths import OUT

LATENCY, RATE, CHUNKS = "p50 at concurrency 1", "requests at 64", "stream chunks at 64"
CPU = "CPU a request at 64"
ARMS = ("direct", "control", "plain", "gateway")
_WORKLOAD = "relay"
_CONCURRENCY = 64
_HELD_STREAMS = 500
_CHUNK_FRAME = re.compile(rb"\r\n[0-9a-f]+\r\n")
_LENGTH = re.compile(rb"[Cc]ontent-[Ll]ength: (\d+)")
_READY_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Load:
    """How much is asked in one turn of an arm."""

    calls: int = 500
    seconds: float = 1.0
    held_streams: int = _HELD_STREAMS


@dataclass(frozen=True)
class Relayed:
    """The comparison: its series, and the gateway's memory with many streams open."""

    series: tuple[Series, ...]
    memory_mb: float
    held_streams: int

    def rows(self) -> list[Row]:
        by_measure = {one.measure: one for one in self.series}
        latency, rate = by_measure[LATENCY], by_measure[RATE]
        chunks, cpu = by_measure[CHUNKS], by_measure[CPU]
        memory = Span(self.memory_mb, self.memory_mb, self.memory_mb, 1)
        name = f"memory at {self.held_streams} open streams"
        return [
            _added(latency, "gateway", Bound("at most", 0.35)),
            _added(latency, "plain", None),
            _of_plain(rate, Bound("at least", 0.75), is_more_better=True),
            _of_plain(chunks, Bound("at least", 0.9), is_more_better=True),
            _of_plain(cpu, None, is_more_better=False),
            Row("relay", name, "MB", memory, bound=Bound("at most", 150.0)),
        ]


def _added(latency: Series, arm: str, bound: Bound | None) -> Row:
    name = "added p50 at concurrency 1" + (", plain relay" if arm == "plain" else "")
    span = find_span(latency.subtract(arm, "direct", "control"))
    control = find_span(latency.subtract("control", "direct"))
    return Row("relay", name, latency.unit, span, 0.0, control, bound)


def _of_plain(series: Series, bound: Bound | None, *, is_more_better: bool) -> Row:
    """The relays differ from each other in what they are; direct and control do not."""
    has_control = "control" in series.by_arm
    control = find_span(series.relate("control", "direct")) if has_control else None
    span = find_span(series.relate("gateway", "plain"))
    name = series.measure
    return Row("relay", name, "× plain relay", span, 1.0, control, bound, is_more_better)


class Caller:
    """One keep-alive connection that asks and checks."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def connect(cls, port: int) -> Caller:
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def close(self) -> None:
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    def send(self, number: int, *, stream: bool, extra: bytes = b"") -> None:
        body = b'{"model":"m","messages":[{"role":"user","content":"%snumber-%d."}]%s}'
        body %= (extra, number, b',"stream":true' if stream else b"")
        head = (
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        )
        self._writer.write(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)

    async def ask(self, number: int) -> None:
        self.send(number, stream=False)
        head = await self.read_head()
        length = _LENGTH.search(head)
        if length is None:
            raise BenchFailed(f"an answer of unknown length: {head!r}")
        body = await self._reader.readexactly(int(length[1]))
        if find_number(body) != number:
            raise MixedUp(f"asked {number}, answered {body[:300]!r}")

    async def ask_stream(self, number: int) -> int:
        self.send(number, stream=True)
        data = await self._reader.readuntil(b"\r\n0\r\n\r\n")
        # A relay frames anew what it read, and may cut an event in the middle of its number.
        numbers = find_numbers(_CHUNK_FRAME.sub(b"", data))
        if len(numbers) != STREAM_CHUNKS or set(numbers) != {number}:
            raise MixedUp(f"stream {number} came back wrong: {data[:300]!r}")
        return len(numbers)

    async def read_head(self) -> bytes:
        head = await self._reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200"):
            raise BenchFailed(f"a relay answered {head.splitlines()[0]!r}")
        return head


async def measure_latency_ms(port: int, calls: int) -> float:
    caller = await Caller.connect(port)
    times = []
    for number in range(calls):
        started = time.perf_counter()
        await caller.ask(number)
        times.append(time.perf_counter() - started)
    await caller.close()
    return statistics.median(times) * 1e3


async def measure_rate(
    port: int, seconds: float, ask: Callable[[Caller, int], Awaitable[int]]
) -> tuple[int, float]:
    """What 64 connections at once get in that time, and how long it took to the last."""

    async def work(caller: Caller, first: int) -> int:
        count = turn = 0
        while not turn or time.perf_counter() < deadline:
            count += await ask(caller, first + turn)
            turn += 1
        return count

    callers = [await Caller.connect(port) for _ in range(_CONCURRENCY)]
    started = time.perf_counter()
    deadline = started + seconds
    work_of_all = (work(caller, n * 1_000_000) for n, caller in enumerate(callers))
    count = sum(await asyncio.gather(*work_of_all))
    took_s = time.perf_counter() - started
    await asyncio.gather(*(caller.close() for caller in callers))
    return count, took_s


async def _ask_once(caller: Caller, number: int) -> int:
    await caller.ask(number)
    return 1


async def measure_memory_mb(port: int, pid: int, streams: int) -> float:
    callers = [await Caller.connect(port) for _ in range(streams)]
    for number, caller in enumerate(callers):
        caller.send(number, stream=True, extra=HOLD)
    for caller in callers:
        await caller.read_head()
    memory_mb = read_resident_mb(pid)
    await asyncio.gather(*(caller.close() for caller in callers))
    return memory_mb


@dataclass(frozen=True)
class Arms:
    """The ports by arm, and the relays' process ids."""

    ports: dict[str, int]
    pids: dict[str, int]


async def measure_relay(load: Load, budget: Budget, chance: random.Random, say: Say) -> Relayed:
    async with _start_arms() as arms:
        taken = await take_rounds(
            ARMS, lambda arm: _take_turn(arms, arm, load), budget, chance, say
        )
        say("memory")
        pid = arms.pids["gateway"]
        memory_mb = await measure_memory_mb(arms.ports["gateway"], pid, load.held_streams)
    units = {LATENCY: "ms", RATE: "/s", CHUNKS: "/s", CPU: "ms"}
    series = [Series(_WORKLOAD, name, units[name], by_arm) for name, by_arm in taken.items()]
    return Relayed(tuple(series), memory_mb, load.held_streams)


async def _take_turn(arms: Arms, arm: str, load: Load) -> dict[str, float]:
    port, pid = arms.ports[arm], arms.pids.get(arm)
    values = {LATENCY: await measure_latency_ms(port, load.calls)}
    cpu_s = read_cpu_s(pid) if pid else 0.0
    count, took_s = await measure_rate(port, load.seconds, _ask_once)
    values[RATE] = count / took_s
    if pid:
        values[CPU] = (read_cpu_s(pid) - cpu_s) * 1e3 / count
    chunks, took_s = await measure_rate(port, load.seconds, Caller.ask_stream)
    values[CHUNKS] = chunks / took_s
    return values


@contextlib.asynccontextmanager
async def _start_arms() -> AsyncIterator[Arms]:
    engine, plain, gateway = find_free_ports(3)
    url = f"http://127.0.0.1:{engine}"
    flags = ["--port", str(gateway), "--engines", url, "--prompt-style", "raw"]
    flags += ["--warmup-prompts", "1", "--log-format", "json"]
    with ExitStack() as stack:
        start = _Starter(stack)
        start("lab.bench.relay.stand_in_engine", 0, "engine", "--port", str(engine))
        plain_pid = start(
            "lab.bench.relay.stand_in_engine", 1, "plain", "--port", str(plain), "--url", url
        )
        gateway_pid = start("gateway", 1, *flags)
        stack.enter_context(_pinned(0))
        for port in (engine, plain, gateway):
            await start.wait_answering(port)
        ports = {"direct": engine, "control": engine, "plain": plain, "gateway": gateway}
        yield Arms(ports, {"plain": plain_pid, "gateway": gateway_pid})


class _Starter:
    """Starts programs, each on a core of its own where there are two."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._log = OUT / "bench-relay.log"
        self._log.parent.mkdir(exist_ok=True)
        self._file = stack.enter_context(self._log.open("wb"))
        self._processes: list[subprocess.Popen[bytes]] = []

    def __call__(self, module: str, core: int, *words: str) -> int:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("GATEWAY_")}
        process = subprocess.Popen(
            [sys.executable, "-m", module, *words],
            stdout=self._file,
            stderr=self._file,
            env=kept,
        )
        self._stack.callback(_end, process)
        self._processes.append(process)
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) > 1:
            os.sched_setaffinity(process.pid, {cores[core]})
        return process.pid

    async def wait_answering(self, port: int) -> None:
        deadline = time.monotonic() + _READY_TIMEOUT_S
        while time.monotonic() < deadline:
            if any(process.poll() is not None for process in self._processes):
                break
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, BenchFailed):
                caller = await Caller.connect(port)
                await caller.ask(1)
                await caller.close()
                return
            await asyncio.sleep(0.1)
        raise BenchFailed(f"the relay comparison did not start; see {self._log}")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextlib.contextmanager
def _pinned(core: int) -> Iterator[None]:
    """This process beside the stand-in, away from the relays."""
    before = os.sched_getaffinity(0)
    cores = sorted(before)
    os.sched_setaffinity(0, {cores[core]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def describe_relayed(relayed: Relayed) -> list[str]:
    """The medians by arm."""
    lines = [f"{'':30}" + "".join(f"{arm:>11}" for arm in ARMS)]
    for one in relayed.series:
        digits = 0 if one.unit == "/s" else 3
        cells = [
            f"{statistics.median(one.by_arm[arm]):>11,.{digits}f}"
            if arm in one.by_arm
            else " " * 11
            for arm in ARMS
        ]
        lines.append(f"{one.measure + ', ' + one.unit:30}{''.join(cells)}")
    return lines
