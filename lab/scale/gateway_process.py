"""What virtual time cannot show: one gateway process before so many engines, on real sockets.

The engines are stand-ins that answer at once, all in one process; the gateway has a core of its
own. Its CPU time is read, which a busy machine blurs less than the clock.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from common.ports import find_free_ports
from common.processes import read_cpu_s, read_resident_bytes
from gateway.admission.keys import make_key
from lab.bench.bench_figures import BenchFailed
from lab.bench.relay.relay_arms import start_program
from lab.bench.relay.relay_connection import RelayConnection
from lab.launched_server import stop_process
from lab.paths import OUT

_CONNECTIONS = 64
_WAIT_S = 120.0
_POLL_S = 0.25
_CHUNK_PAUSE_S = 0.02
_STOP_S = 20.0
_CALLERS, _CALLERS_EACH = 64, 2  # at least; and for each engine, so that each has work


@dataclass(frozen=True)
class ProcessLoad:
    """How long each thing is measured, and how often."""

    seconds: float = 2.0
    rounds: int = 3
    idle_s: float = 5.0
    settle_s: float = 2.0  # before the idle time, and before and while a tenth is away
    delay_s: float = 1.0  # of an answer while engines fail: else nothing would be under way


@dataclass(frozen=True)
class ProcessFigures:
    """Of one gateway before so many engines; of what was measured in rounds, each."""

    engines: int
    start_cpu_s: float
    idle_cores: float
    memory_mb: float
    files: int
    scrape_cpu_ms: float
    scrape_kib: float
    call_cpu_ms: list[float]
    affinity_cpu_ms: list[float]
    chunk_cpu_us: list[float]
    late_chunk_cpu_us: float  # of one that comes alone, as an engine's token does
    lost_calls: int
    lost_for_s: float
    back_after_s: float


@dataclass(frozen=True)
class RedisFigures:
    """A call of a key with limits: kept in this process, and in a Redis on this machine."""

    local_cpu_ms: list[float]
    redis_cpu_ms: list[float]
    server_cpu_ms: float


async def measure_process(engines: int, load: ProcessLoad) -> ProcessFigures:
    rounds, ask_stream = range(load.rounds), RelayConnection.ask_stream
    with ExitStack() as exits:
        async with start_gateway(exits, StandIns(exits, engines), "--routing", "least") as gateway:
            start_cpu_s = read_cpu_s(gateway.pid)
            await asyncio.sleep(load.settle_s)
            idle_cores = await measure_idle(gateway, load.idle_s)
            gateway.idle_cores = idle_cores
            memory_mb = read_resident_bytes(gateway.pid) / 2**20
            files = count_files(gateway.pid)
            scrape_cpu_ms, scrape_kib = await measure_scrape(gateway)
            calls = [await measure_calls(gateway, load.seconds) for _ in rounds]
            chunks = [await measure_calls(gateway, load.seconds, ask_stream) for _ in rounds]
    with ExitStack() as exits:
        async with start_gateway(exits, StandIns(exits, engines), "--routing", "prefix") as gateway:
            gateway.idle_cores = idle_cores
            affinities = [await measure_calls(gateway, load.seconds) for _ in rounds]
    with ExitStack() as exits:
        stand_ins = StandIns(exits, engines, load.delay_s, _CHUNK_PAUSE_S)
        async with start_gateway(exits, stand_ins, "--routing", "least") as gateway:
            gateway.idle_cores = idle_cores
            late_chunk_ms = await measure_calls(gateway, load.seconds, ask_stream)
            lost, lost_for_s, back_after_s = await measure_failure(gateway, stand_ins, load)
    return ProcessFigures(
        engines=engines,
        start_cpu_s=start_cpu_s,
        idle_cores=idle_cores,
        memory_mb=memory_mb,
        files=files,
        scrape_cpu_ms=scrape_cpu_ms,
        scrape_kib=scrape_kib,
        call_cpu_ms=calls,
        affinity_cpu_ms=affinities,
        chunk_cpu_us=[one * 1e3 for one in chunks],
        late_chunk_cpu_us=late_chunk_ms * 1e3,
        lost_calls=lost,
        lost_for_s=lost_for_s,
        back_after_s=back_after_s,
    )


class StandIns:
    """The process with all engines."""

    def __init__(
        self, exits: ExitStack, count: int, delay_s: float = 0.0, pause_s: float = 0.0
    ) -> None:
        words = ("--count", str(count), "--delay", str(delay_s), "--pause", str(pause_s))
        command = [sys.executable, "-m", "lab.scale.engine_ports", *words]
        # Entered, so that its pipe is closed, too.
        self.process = exits.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE))
        exits.callback(stop_process, self.process, _STOP_S)
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(self.process.pid, {cores[0]})
        self.ports = self.read_line().split(",")

    def read_line(self) -> str:
        if self.process.stdout is None:
            raise BenchFailed("the stand-in engines have no output")
        line = self.process.stdout.readline().decode().strip()
        if not line:
            raise BenchFailed("the stand-in engines did not start")
        return line

    async def order(self, number: int) -> None:
        """Done when this returns."""
        self.process.send_signal(number)
        await asyncio.to_thread(self.read_line)


@dataclass
class StartedGateway:
    """A gateway of ours whose engines are all ready."""

    port: int
    pid: int
    http: httpx.AsyncClient
    idle_cores: float = 0.0  # what it takes when nobody asks, and so is no call's

    async def count_ready(self) -> int:
        text = (await self.http.get("/metrics")).text
        lines = (line for line in text.splitlines() if line.startswith("gateway_engine_ready{"))
        return sum(line.endswith(" 1.0") for line in lines)


Ask = Callable[[RelayConnection, int], Awaitable[int]]


async def _ask_once(connection: RelayConnection, number: int) -> int:
    await connection.ask(number)
    return 1


@contextlib.asynccontextmanager
async def start_gateway(
    exits: ExitStack, engines: StandIns, *flags: str
) -> AsyncIterator[StartedGateway]:
    (port,) = find_free_ports(1)
    log_path = OUT / "scale-gateway.log"
    log_path.parent.mkdir(exist_ok=True)
    urls = ",".join(f"http://127.0.0.1:{one}" for one in engines.ports)
    usual = ("--prompt-style", "raw", "--warmup-prompts", "1", "--log-format", "json")
    log = exits.enter_context(log_path.open("wb"))
    words = ("--port", str(port), "--engines", urls, *usual, *flags)
    process = start_program(exits, log, 1, "gateway", *words)
    cores = os.sched_getaffinity(0)
    exits.callback(os.sched_setaffinity, 0, cores)
    os.sched_setaffinity(0, {min(cores)})
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=_WAIT_S) as http:
        gateway = StartedGateway(port, process.pid, http)
        if not await _is_up(gateway, (process, engines.process)):
            raise BenchFailed(f"the gateway did not start; see {log_path}")
        await wait_all_ready(gateway, len(engines.ports))
        yield gateway


async def _is_up(gateway: StartedGateway, processes: Sequence[subprocess.Popen[Any]]) -> bool:
    deadline = time.monotonic() + _WAIT_S
    while time.monotonic() < deadline and all(one.poll() is None for one in processes):
        with contextlib.suppress(httpx.HTTPError):
            if (await gateway.http.get("/healthz")).status_code == 200:
                return True
        await asyncio.sleep(_POLL_S)
    return False


async def wait_all_ready(gateway: StartedGateway, engines: int) -> None:
    deadline = time.monotonic() + _WAIT_S
    while await gateway.count_ready() < engines:
        if time.monotonic() > deadline:
            raise BenchFailed(f"not all of {engines} engines became ready")
        await asyncio.sleep(_POLL_S)


def count_files(pid: int) -> int:
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


async def measure_idle(gateway: StartedGateway, seconds: float) -> float:
    """Cores, while nobody asks."""
    began, cpu_s = time.monotonic(), read_cpu_s(gateway.pid)
    await asyncio.sleep(seconds)
    return (read_cpu_s(gateway.pid) - cpu_s) / (time.monotonic() - began)


async def measure_scrape(gateway: StartedGateway, times: int = 5) -> tuple[float, float]:
    """GET /metrics: CPU in milliseconds, and its size."""
    cpu_s, size = read_cpu_s(gateway.pid), 0
    for _ in range(times):
        size = len((await gateway.http.get("/metrics")).content)
    return (read_cpu_s(gateway.pid) - cpu_s) / times * 1e3, size / 1024


async def measure_calls(
    gateway: StartedGateway, seconds: float, ask: Ask = _ask_once, headers: bytes = b""
) -> float:
    """CPU milliseconds of one, asked over 64 connections, one after another on each."""
    connections = [await RelayConnection.connect(gateway.port) for _ in range(_CONNECTIONS)]
    began, cpu_s = time.monotonic(), read_cpu_s(gateway.pid)

    async def work(connection: RelayConnection, number: int) -> int:
        connection.headers = headers
        count = 0
        while not count or time.monotonic() - began < seconds:
            count += await ask(connection, number)
        return count

    counts = await asyncio.gather(*(work(one, n) for n, one in enumerate(connections)))
    took_s = time.monotonic() - began
    spent_s = read_cpu_s(gateway.pid) - cpu_s - gateway.idle_cores * took_s
    await asyncio.gather(*(connection.close() for connection in connections))
    return spent_s / sum(counts) * 1e3


async def measure_failure(
    gateway: StartedGateway, engines: StandIns, load: ProcessLoad
) -> tuple[int, float, float]:
    """Calls lost when a tenth of the engines is killed, for how long any were, and how long until
    each of those that come back has been asked again.
    """
    lost_at: list[float] = []
    count = max(_CALLERS, _CALLERS_EACH * len(engines.ports))
    callers = [asyncio.create_task(_call_on(gateway.port, n, lost_at)) for n in range(count)]
    try:
        await asyncio.sleep(load.settle_s)
        failed_at = time.monotonic()
        await engines.order(signal.SIGUSR1)
        await asyncio.sleep(load.settle_s)
        await engines.order(signal.SIGUSR2)
        returned_at = time.monotonic()
        async with asyncio.timeout(_WAIT_S):
            await asyncio.to_thread(engines.read_line)
        back_after_s = time.monotonic() - returned_at
    finally:
        for caller in callers:
            caller.cancel()
        await asyncio.gather(*callers, return_exceptions=True)
    return len(lost_at), max(lost_at, default=failed_at) - failed_at, back_after_s


async def _call_on(port: int, number: int, lost_at: list[float]) -> None:
    """Until cancelled; who is told of an error connects anew."""
    while True:
        connection = await RelayConnection.connect(port)
        try:
            while True:
                await connection.ask(number)
        except (BenchFailed, asyncio.IncompleteReadError):
            lost_at.append(time.monotonic())
        finally:
            await connection.close()


def start_redis(
    exits: ExitStack, program: str, folder: Path
) -> tuple[subprocess.Popen[bytes], str]:
    (port,) = find_free_ports(1)
    command = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
    server = subprocess.Popen([*command, "--dir", str(folder)], stdout=subprocess.DEVNULL)
    exits.callback(stop_process, server, _STOP_S)
    return server, f"redis://127.0.0.1:{port}/0"


async def measure_redis(load: ProcessLoad) -> RedisFigures | None:
    """`None` where there is no redis-server."""
    program = shutil.which("redis-server")
    if program is None:
        return None
    key, entry = make_key("limited")
    headers = f"Authorization: Bearer {key}\r\n".encode()
    rounds = range(load.rounds)
    with ExitStack() as exits:
        folder = Path(exits.enter_context(tempfile.TemporaryDirectory()))
        server, url = start_redis(exits, program, folder)
        keys = folder / "keys.toml"
        keys.write_text(f"{entry}\nrequests_per_minute = 100_000_000\n", encoding="utf-8")
        with_keys = ("--keys-file", str(keys))
        async with start_gateway(exits, StandIns(exits, 1), *with_keys) as gateway:
            local = [await measure_calls(gateway, load.seconds, headers=headers) for _ in rounds]
        with_redis = (*with_keys, "--redis-url", url)
        async with start_gateway(exits, StandIns(exits, 1), *with_redis) as gateway:
            server_s, gateway_s = read_cpu_s(server.pid), read_cpu_s(gateway.pid)
            shared = [await measure_calls(gateway, load.seconds, headers=headers) for _ in rounds]
            share = (read_cpu_s(server.pid) - server_s) / (read_cpu_s(gateway.pid) - gateway_s)
    return RedisFigures(local, shared, share * statistics.median(shared))
