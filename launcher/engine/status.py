"""The launcher's own face: /status, /crash, /readyz, /metrics. It takes no orders."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import platform
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from common.errors import SettingsError
from common.web.foreign_pages import PageGuard, build_middleware
from launcher.config import PREFIX, LauncherSettings
from launcher.engine.supervisor import CRASH_REASONS, ProgramStatus, RestartPolicy
from launcher.plan.fingerprint import read_version
from launcher.plan.hardware import query_gpus

_STATES = (
    *("joining", "starting", "warming", "ready", "draining"),
    *("waiting", "parked", "sleeping", "stopped"),
)
_WELL = {"ready", "parked", "sleeping"}  # nobody waits for it
_PROGRAMS = ("engine", "gateway")
_GPU_QUERY = (
    "index,name,utilization.gpu,memory.used,memory.total,power.draw,temperature.gpu,clocks.sm"
)
_GPU_FRESH_S = 5.0
_GPU_PATIENCE_S = 1.0  # of a scrape, which has five seconds for everything
_GPU_STALE_S = 30.0
_GPU_END_S = 2.0
_ONE_HOST = {"wanted": 1, "joined": 1, "lost": 0}
_MIB = 2**20
_MHZ = 1e6


@dataclass(frozen=True)
class MetricDeclaration:
    """One of /metrics, and a row of the table in docs/metrics.md."""

    name: str
    meaning: str
    labels: tuple[str, ...] = ()
    kind: str = "gauge"

    def build(self, rows: Iterable[tuple[Sequence[str], float]]) -> Metric:
        kind = CounterMetricFamily if self.kind == "counter" else GaugeMetricFamily
        family = kind(self.name, self.meaning, labels=self.labels)
        for values, number in rows:
            family.add_metric(values, number)
        return family


def _declare_metrics() -> Iterator[MetricDeclaration]:
    metric = MetricDeclaration
    yield metric("launcher_build_info", "1; the launcher itself.", ("version", "python"))
    began = "When the launcher started; an engine that never became ready ends it."
    yield metric("launcher_start_time_seconds", began)
    about = ("vllm", "model", "profile", "device", "fingerprint")
    yield metric("launcher_engine_info", "1; what the engine runs.", about)
    for name in _PROGRAMS:
        yield metric(f"launcher_{name}_up", f"1 while the {name} answers.")
        states = f"1 at the {name}'s present state: {', '.join(_STATES)}."
        yield metric(f"launcher_{name}_state", states, ("state",))
        why = f"Restarts of the {name}; reason is {', '.join(CRASH_REASONS)}."
        yield metric(f"launcher_{name}_restarts_total", why, ("reason",), "counter")
        took = f"From the {name}'s last start to its first answer; absent before that."
        yield metric(f"launcher_{name}_start_seconds", took)
    crash = "When the engine last crashed; absent if it never did."
    yield metric("launcher_engine_last_crash_timestamp_seconds", crash)
    own = "1 while the launcher's own scheduler plans the engine's steps, 0 while vLLM's does."
    yield metric("launcher_engine_own_scheduler", own)
    gave_up = (
        "Times that the launcher's own scheduler gave up, and vLLM's took over until a restart."
    )
    yield metric("launcher_engine_scheduler_fallbacks_total", gave_up, kind="counter")
    lost = (
        "Log lines that were lost, because the disk is full or nobody reads the pipe; log is shown "
        "(standard error) or the name of a file in the state folder."
    )
    yield metric("launcher_log_lines_dropped_total", lost, ("log",), "counter")
    yield metric(
        "launcher_engine_hosts",
        "Hosts of the engine, one for most: state is wanted, joined (the head among them) or lost, "
        "those that were there and are not.",
        ("state",),
    )
    limit = "Recent crashes after which the launcher gives up (LAUNCHER_RESTART_LIMIT)."
    yield metric("launcher_restart_limit", limit)
    window = (
        "How far back crashes count against launcher_restart_limit (LAUNCHER_RESTART_WINDOW_S)."
    )
    yield metric("launcher_restart_window_seconds", window)
    gpu = ("gpu", "name")
    busy = "Share of the time in which the GPU ran a kernel, 0 to 1, by nvidia-smi."
    yield metric("launcher_gpu_utilization_ratio", busy, gpu)
    yield metric("launcher_gpu_memory_used_bytes", "GPU memory in use.", gpu)
    yield metric("launcher_gpu_memory_bytes", "GPU memory there is.", gpu)
    yield metric("launcher_gpu_power_watts", "What the GPU draws.", gpu)
    yield metric("launcher_gpu_temperature_celsius", "How warm the GPU is.", gpu)
    yield metric("launcher_gpu_clock_hertz", "The clock of its multiprocessors.", gpu)


METRICS = {one.name: one for one in _declare_metrics()}


def list_metrics() -> list[MetricDeclaration]:
    """Every metric, in order: the table in docs/metrics.md."""
    return list(METRICS.values())


@dataclass(frozen=True)
class SchedulerStatus:
    """Whose scheduler the engine was given, and what that one said of itself since."""

    planned: str
    state: str = ""  # of the launcher's own: "on", "off", "gave up"
    reason: str = ""
    fallbacks: int = 0


@dataclass(frozen=True)
class StatusSource:
    """What the endpoint reads; nothing here is written by it."""

    programs: dict[str, ProgramStatus]
    facts: dict[str, Any]
    labels: dict[str, str]
    progress: Callable[[], dict[str, Any] | None]
    crash: Callable[[], dict[str, Any] | None]
    policy: RestartPolicy
    scheduler: Callable[[], SchedulerStatus]
    dropped: Callable[[], dict[str, int]]
    has_gpu: bool = False
    gpus: Sequence[str] = ()  # those of the host that are its own; none named: all
    engines: tuple[StatusSource, ...] = ()  # where there are several, each with its own
    hosts: Callable[[], list[dict[str, Any]]] | None = None  # of an engine that runs on several
    count_hosts: Callable[[], dict[str, int]] | None = None

    def describe(self) -> dict[str, Any]:
        programs = {name: describe_program(status) for name, status in self.programs.items()}
        if self.engines:
            return {"engines": [one.describe() for one in self.engines], **programs}
        crash = self.crash()
        keys = ("time", "reason", "exit_code", "signal", "cause", "lost_host")
        return {
            **programs,
            "progress": self.progress(),
            "scheduler": asdict(self.scheduler()),
            **self.facts,
            **({"hosts": self.hosts()} if self.hosts else {}),
            "last_crash": {key: crash.get(key) for key in keys} if crash else None,
        }

    def list_states(self) -> dict[str, str]:
        own = {name: status.state for name, status in self.programs.items()}
        for one in self.engines:
            own[f"engine {one.facts['engine_port']}"] = one.programs["engine"].state
        return own

    def find_crash(self, engine_port: str) -> dict[str, Any] | None:
        """The last one: of the only engine, of the one that is asked for, or of any."""
        if not self.engines:
            return self.crash()
        asked = [one for one in self.engines if engine_port in ("", str(one.facts["engine_port"]))]
        cards = [card for one in asked if (card := one.crash())]
        return max(cards, key=lambda card: str(card["time"]), default=None)


def describe_program(status: ProgramStatus) -> dict[str, Any]:
    return {
        "state": status.state,
        "since_s": round(time.monotonic() - status.since, 1),
        "pid": status.pid,
        "start_seconds": status.start_seconds and round(status.start_seconds, 2),
        "restarts": status.restarts,
    }


class StatusCollector(Collector):
    """Read at every scrape, so that nothing is counted twice."""

    def __init__(self, source: StatusSource, gpus: Gpus) -> None:
        self._source = source
        self._gpus = gpus
        self._began_at = time.time()
        self._build = (read_version("vllm-gateway"), platform.python_version())

    def collect(self) -> Iterator[Metric]:
        source = self._source
        yield METRICS["launcher_build_info"].build([(self._build, 1)])
        yield METRICS["launcher_start_time_seconds"].build([((), self._began_at)])
        if source.engines:
            yield from _collect_engines(source.engines)
        else:
            yield from _collect_engine(source)
        for name, status in source.programs.items():
            yield from _collect_program(name, status)
        dropped = METRICS["launcher_log_lines_dropped_total"]
        yield dropped.build(((log,), count) for log, count in source.dropped().items())
        yield METRICS["launcher_restart_limit"].build([((), source.policy.limit)])
        yield METRICS["launcher_restart_window_seconds"].build([((), source.policy.window_s)])
        yield from self._gpus.collect()


def _collect_engine(source: StatusSource) -> Iterator[Metric]:
    """What is told of an engine beside its process."""
    about, crash = METRICS["launcher_engine_info"], source.crash()
    yield about.build([([source.labels[label] for label in about.labels], 1)])
    if crash:
        at = datetime.fromisoformat(crash["time"]).timestamp()
        yield METRICS["launcher_engine_last_crash_timestamp_seconds"].build([((), at)])
    scheduler = source.scheduler()
    yield METRICS["launcher_engine_own_scheduler"].build([((), scheduler.state == "on")])
    fallbacks = METRICS["launcher_engine_scheduler_fallbacks_total"]
    yield fallbacks.build([((), scheduler.fallbacks)])
    hosts = source.count_hosts() if source.count_hosts else _ONE_HOST
    hosts_metric = METRICS["launcher_engine_hosts"]
    yield hosts_metric.build(((state,), number) for state, number in hosts.items())


def _collect_engines(sources: Iterable[StatusSource]) -> Iterator[Metric]:
    """Of several each series has a label more, `engine`: its port."""
    merged: dict[str, Metric] = {}
    for one in sources:
        port = str(one.facts["engine_port"])
        told = (*_collect_engine(one), *_collect_program("engine", one.programs["engine"]))
        for family in told:
            known = merged.setdefault(
                family.name, Metric(family.name, family.documentation, family.type)
            )
            for sample in family.samples:
                known.samples.append(sample._replace(labels=sample.labels | {"engine": port}))
    yield from merged.values()


def _collect_program(name: str, status: ProgramStatus) -> Iterator[Metric]:
    head = f"launcher_{name}"
    yield METRICS[f"{head}_up"].build([((), status.state == "ready")])
    states = [((known,), known == status.state) for known in _STATES]
    yield METRICS[f"{head}_state"].build(states)
    # From zero: a count that begins with its first crash hides that crash from `increase`.
    counts = dict.fromkeys(CRASH_REASONS, 0) | status.restarts
    yield METRICS[f"{head}_restarts_total"].build(((r,), n) for r, n in counts.items())
    if status.start_seconds is not None:
        yield METRICS[f"{head}_start_seconds"].build([((), status.start_seconds)])


class Gpus:
    """What nvidia-smi says, asked by a scrape and at most every few seconds; nothing without it.

    One that takes long, as it does when a GPU is ill, must not cost the scrape all other metrics.
    """

    def __init__(self, *, has_gpu: bool, own: Sequence[str]) -> None:
        self._has_gpu = has_gpu
        self._own = own
        self._rows: list[list[str]] = []
        self._read_at = -math.inf
        self._reading: asyncio.Task[None] | None = None

    async def refresh(self) -> None:
        if not self._has_gpu or time.monotonic() - self._read_at < _GPU_FRESH_S:
            return
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._read())
        await asyncio.wait({self._reading}, timeout=_GPU_PATIENCE_S)
        if time.monotonic() - self._read_at > _GPU_STALE_S:
            self._rows = []

    async def close(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait({self._reading}, timeout=_GPU_END_S)

    async def _read(self) -> None:
        rows = await query_gpus(_GPU_QUERY)
        self._rows = [row for row in rows if not self._own or row[0] in self._own]
        self._read_at = time.monotonic()

    def collect(self) -> Iterator[Metric]:
        columns = (
            ("utilization_ratio", 2, 0.01),
            ("memory_used_bytes", 3, _MIB),
            ("memory_bytes", 4, _MIB),
            ("power_watts", 5, 1),
            ("temperature_celsius", 6, 1),
            ("clock_hertz", 7, _MHZ),
        )
        for name, column, unit in columns:
            rows = [
                (row[:2], float(row[column]) * unit)
                for row in self._rows
                if _is_number(row[column])  # a GPU that cannot tell says [N/A]
            ]
            if rows:
                yield METRICS[f"launcher_gpu_{name}"].build(rows)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def build_page_guard(settings: LauncherSettings) -> PageGuard:
    """Nobody needs a key to the status port, which shows command lines."""
    allowed, variable = settings.status_allowed_hosts, f"{PREFIX}STATUS_ALLOWED_HOSTS"
    return PageGuard(settings.status_host, allowed, variable)


@contextlib.asynccontextmanager
async def serve_status(
    source: StatusSource, host: str, port: int, guard: PageGuard
) -> AsyncIterator[None]:
    """While inside; port 0 serves nothing."""
    if not port:
        yield
        return
    runner = web.AppRunner(build_status_app(source, guard), access_log=None)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            raise SettingsError(
                f"cannot listen on {host}:{port} ({error.strerror}); "
                "stop what uses it or set LAUNCHER_STATUS_PORT (0: none)"
            ) from None
        yield
    finally:
        await runner.cleanup()


def build_status_app(source: StatusSource, guard: PageGuard) -> web.Application:
    registry = CollectorRegistry()
    gpus = Gpus(has_gpu=source.has_gpu, own=source.gpus)
    registry.register(StatusCollector(source, gpus))

    async def status(_request: web.Request) -> web.Response:
        return _json(source.describe())

    async def crash(request: web.Request) -> web.Response:
        card = source.find_crash(request.query.get("engine_port", ""))
        return _json(card) if card else _json({"error": "no crash so far"}, status=404)

    async def readyz(_request: web.Request) -> web.Response:
        states = source.list_states()
        is_ready = all(state in _WELL for state in states.values())
        return _json(states, status=200 if is_ready else 503)

    async def metrics(request: web.Request) -> web.Response:
        await gpus.refresh()
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        return web.Response(body=encode(registry), headers={"Content-Type": content_type})

    async def close_gpus(_app: web.Application) -> None:
        await gpus.close()

    app = web.Application(middlewares=[build_middleware(guard)])
    app.on_cleanup.append(close_gpus)
    app.router.add_get("/status", status)
    app.router.add_get("/crash", crash)
    app.router.add_get("/readyz", readyz)
    app.router.add_get("/metrics", metrics)
    return app


def _json(data: Any, *, status: int = 200) -> web.Response:
    text = json.dumps(data, indent=2, ensure_ascii=False)
    return web.Response(text=text + "\n", status=status, content_type="application/json")
