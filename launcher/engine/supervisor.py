"""What to do next with one program: start it, wait until it answers, watch it, bring it back.

An exit that nobody asked for is a crash, whatever its code: vLLM exits 0 when its core dies. One
coroutine owns the state; others only ask it to stop.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import structlog

from common.errors import ProgramError, SettingsError
from launcher.engine.polling import poll
from launcher.engine.process import ChildProcess, forget_record, write_record
from launcher.engine.terminal import LineLog, Terminal, best_effort
from launcher.errors import CrashLoop, NeverReady

log = structlog.get_logger("launcher")
_POLL_S = 0.2
_ARGPARSE_EXIT = 2
Result = TypeVar("Result")
CRASH_REASONS = ("exit", "signal", "start_timeout", "hang", "host")


class Program(Protocol):
    """What a supervisor must know about the program it runs."""

    name: str
    start_timeout_s: float
    drain_timeout_s: float
    kill_timeout_s: float
    inherited: Sequence[int]  # open files, by their numbers

    def command(self) -> tuple[Sequence[str], Mapping[str, str]]: ...
    def read_line(self, line: str) -> None:
        """Sees every line, to learn how far the program has got."""

    def find_cause(self, lines: Sequence[str]) -> str:
        """The line that says why it died."""

    async def is_up(self) -> bool:
        """`TimeoutError` where it never will be."""

    async def warm(self) -> None:
        """Returns when the program has really answered."""

    async def watch(self, child: ChildProcess) -> str:
        """Returns, with the reason, only when the program hangs."""

    async def dump(self, child: ChildProcess) -> list[str]:
        """What a hung program is doing; it may not survive the question."""

    async def drain(self, timeout_s: float) -> None:
        """Returns when nothing is in flight, or the time is over."""

    def clean_up(self) -> None:
        """Called when none of its processes is left."""


class Sleepable(Protocol):
    """A program that can give up what it holds of a device, and come back to it."""

    async def fall_asleep(self) -> str:
        """Empty, or why it is still awake."""

    async def wake_up(self) -> str:
        """Empty when it has really answered, or why it does not."""


@dataclass(frozen=True)
class Loss:
    """Why the parts of a program that run elsewhere are no longer there."""

    reason: str  # "host", a crash reason; "released": the part here is not wanted any more
    detail: str = ""
    host: str = ""


class Peers(Protocol):
    """The parts of a program on other hosts: they start with it and end with it."""

    async def gather(self) -> None:
        """Returns when all of them may start."""

    async def watch(self) -> Loss:
        """Returns only when one is lost."""

    async def find_culprit(self, ended_at: float) -> Loss | None:
        """Whether one was lost before the program ended by itself, which it does for lack of it."""

    async def release(self) -> None:
        """Has those that can be reached end."""


@dataclass(frozen=True)
class RestartPolicy:
    """Exponential backoff with jitter, within a budget of crashes in a window."""

    limit: int
    window_s: float
    delay_s: float
    delay_max_s: float

    def delay_after(self, crashes: int, jitter: Callable[[], float] = random.random) -> float:
        # Jitter, because several launchers on one host would otherwise return in step.
        full = min(self.delay_max_s, self.delay_s * 2.0 ** (crashes - 1))
        return full * (0.75 + 0.5 * jitter())


@dataclass(frozen=True)
class ExitReport:
    """How one run of the program ended."""

    reason: str  # "asked", "parked", "released", or one of CRASH_REASONS
    returncode: int | None
    uptime_s: float
    was_ready: bool
    cause: str
    tail: list[str]
    dump: list[str] = field(default_factory=list)
    members: list[str] = field(default_factory=list)
    lost_host: str = ""


@dataclass
class ProgramStatus:
    """What the status endpoint shows; written by the supervisor alone."""

    state: str = (
        # starting > warming > ready > draining > stopped; waiting: for a restart; parked: until it
        # is wanted; sleeping: the same, with its processes there; joining: for its other hosts
        "stopped"
    )
    since: float = field(default_factory=time.monotonic)
    restarts: dict[str, int] = field(default_factory=dict)
    start_seconds: float | None = None
    pid: int | None = None


OnCrash = Callable[[ExitReport, ProgramStatus], Awaitable[None]]


class Supervisor:
    def __init__(
        self,
        program: Program,
        policy: RestartPolicy | None,
        terminal: Terminal,
        folder: Path,
        on_crash: OnCrash | None = None,
        *,
        label: str = "",
        peers: Peers | None = None,
        sleeper: Sleepable | None = None,
    ) -> None:
        """With a label its lines and events say which one of several it is. Without a policy its
        peers decide whether and when it is started again.
        """
        self._program = program
        self._label = label
        self._log = log.bind(**{program.name: label}) if label else log
        self._policy = policy
        self._terminal = terminal
        self._record = folder / f"{program.name}.json"
        self.lines = LineLog(folder / f"{program.name}.log")
        self._on_crash = on_crash
        self._crashes: deque[float] = deque()
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self.status = ProgramStatus()
        self.has_ended = False  # for good: asked to, or given up
        self.ready = asyncio.Event()
        self._parked = asyncio.Event()
        self._wanted = asyncio.Event()
        self._wanted.set()
        self._members: dict[int, str] = {}
        self._peers = peers
        self._sleeper = sleeper
        self._loss = Loss("")  # of a peer, or, of a hang, what was seen
        self._drain_until = 0.0

    def ask_to_stop(self) -> None:
        self._stop.set()

    def park(self) -> None:
        """It drains and sleeps, or stops, until it is wanted: no crash, no end."""
        self._wanted.clear()
        self._parked.set()

    def unpark(self) -> None:
        self._parked.clear()
        self._wanted.set()

    def hurry(self) -> None:
        self._stop.set()
        self._hurry.set()

    async def run(self) -> None:
        """Until asked to stop; an error says why it gave up. Nothing of the program is left."""
        try:
            while not self._stop.is_set():
                if self._parked.is_set():
                    await self._wait_wanted()
                    continue
                if self._peers and not await self._gather(self._peers):
                    break
                report = await self._run_once()
                if report.reason == "asked":
                    break
                if report.reason in ("parked", "released"):
                    continue
                await self._judge(report)
                await self._pause()
        finally:
            self.has_ended = True
            self._set_state("stopped")
            self.lines.close()

    async def _wait_wanted(self) -> None:
        self._set_state("parked")
        waits = [asyncio.create_task(one.wait()) for one in (self._wanted, self._stop)]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        await _cancel(*waits)

    async def _gather(self, peers: Peers) -> bool:
        """Whether they are all there, and not told to stop before."""
        self._set_state("joining")
        gathering = asyncio.create_task(peers.gather())
        stopping = asyncio.create_task(self._stop.wait())
        await asyncio.wait({gathering, stopping}, return_when=asyncio.FIRST_COMPLETED)
        await _cancel(stopping, *([] if gathering.done() else [gathering]))
        return not self._stop.is_set() and gathering.result() is None

    async def _run_once(self) -> ExitReport:
        self._members = {}
        child = ChildProcess(self._take_line)
        argv, environment = self._program.command()
        self._set_state("starting")
        began = time.monotonic()
        await child.start(argv, environment, self._program.inherited)
        self.status.pid = child.pid
        with best_effort(self._record):
            write_record(self._record, child.pid)
        dump: list[str] = []
        self._drain_until = 0.0
        try:
            reason = await self._live(child, began)
            if reason == "hang":
                dump = await self._program.dump(child)
        finally:
            was_ready = self.ready.is_set()
            self.ready.clear()
            await self._end(child, patience_s=self._patience_s())
            if self._peers:
                await self._peers.release()
        return self._report_exit(child, reason, began, was_ready, dump)

    async def _live(self, child: ChildProcess, began: float) -> str:
        """From start to end; returns why it ended. The first of these events decides."""
        exited = asyncio.create_task(child.wait())
        stopping = asyncio.create_task(self._stop.wait())
        parking = asyncio.create_task(self._parked.wait())
        step = asyncio.create_task(self._become_ready(began))
        tasks: set[asyncio.Task[Any]] = {exited, stopping, parking, step}
        members = asyncio.create_task(self._learn_members(child))
        lost = asyncio.create_task(self._peers.watch()) if self._peers else None
        tasks |= {lost} if lost else set()
        try:
            while True:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                if stopping in done or parking in done:
                    if self.ready.is_set():
                        await self._drain(exited)
                    if stopping in done or self._sleeper is None or not self.ready.is_set():
                        return "asked" if stopping in done else "parked"
                    await _cancel(step)
                    tasks -= {parking, step}
                    if verdict := await self._sleep(self._sleeper, exited, stopping):
                        return verdict
                    parking = asyncio.create_task(self._parked.wait())
                    step = asyncio.create_task(self._watch(child))
                    tasks |= {parking, step}
                    continue
                if exited in done:
                    return await self._explain_exit(exited.result())
                if lost and lost in done:
                    self._loss = lost.result()
                    return self._loss.reason
                if verdict := step.result():
                    return verdict
                self._note_members(child)
                tasks.discard(step)
                step = asyncio.create_task(self._watch(child))
                tasks.add(step)
        finally:
            await _cancel(*tasks, members)

    async def _sleep(
        self, sleeper: Sleepable, exited: asyncio.Task[int], stopping: asyncio.Task[bool]
    ) -> str:
        """Until it is awake again; or why this run of it ends."""
        if why := await _first(sleeper.fall_asleep(), exited, stopping):
            self._log.warning(f"{self._program.name}_not_asleep", why=why, note="it stops instead")
            return "parked"
        self.ready.clear()
        if not (stopping.done() or exited.done()):
            self._set_state("sleeping")
            await _first(self._wanted.wait(), exited, stopping)
        why = None
        if not (stopping.done() or exited.done()):
            self._set_state("warming")
            why = await _first(sleeper.wake_up(), exited, stopping)
        if stopping.done():
            return "asked"
        if exited.done():
            return await self._explain_exit(exited.result())
        if why:
            self._loss = Loss("hang", f"it does not wake up: {why}")
            return "hang"
        self._set_state("ready")
        self.ready.set()
        return ""

    async def _explain_exit(self, code: int) -> str:
        """One whose other hosts are gone may end by itself, before that is seen from here."""
        if self._peers:
            asking = asyncio.create_task(self._peers.find_culprit(time.monotonic()))
            stopping = asyncio.create_task(self._stop.wait())
            await asyncio.wait({asking, stopping}, return_when=asyncio.FIRST_COMPLETED)
            loss = asking.result() if asking.done() else None
            await _cancel(asking, stopping)
            if self._stop.is_set():
                return "asked"
            if loss:
                self._loss = loss
                return loss.reason
        return "exit" if code >= 0 else "signal"

    async def _become_ready(self, began: float) -> str:
        try:
            async with asyncio.timeout(self._program.start_timeout_s):
                await poll(self._program.is_up, pause_s=_POLL_S)
                self._set_state("warming")
                await self._program.warm()
        except TimeoutError:
            return "start_timeout"
        self.status.start_seconds = time.monotonic() - began
        self._set_state("ready")
        self.ready.set()
        return ""

    async def _watch(self, child: ChildProcess) -> str:
        detail = await self._program.watch(child)
        self._log.error(f"{self._program.name}_hung", detail=detail)
        self._loss = Loss("hang", detail)
        return "hang"

    async def _drain(self, exited: asyncio.Task[int]) -> None:
        self._set_state("draining")
        self._drain_until = time.monotonic() + self._program.drain_timeout_s
        drained = asyncio.create_task(self._program.drain(self._program.drain_timeout_s))
        hurried = asyncio.create_task(self._hurry.wait())
        await asyncio.wait({drained, hurried, exited}, return_when=asyncio.FIRST_COMPLETED)
        await _cancel(drained, hurried)

    def _patience_s(self) -> float:
        """From SIGTERM to SIGKILL: what is left for requests to finish, then for the rest."""
        if self._hurry.is_set():
            return 0.0
        return max(0.0, self._drain_until - time.monotonic()) + self._program.kill_timeout_s

    async def _end(self, child: ChildProcess, *, patience_s: float) -> None:
        """A second signal while this runs means: at once."""
        stopping = asyncio.create_task(child.stop(patience_s=patience_s))
        hurried = asyncio.create_task(self._hurry.wait())
        await asyncio.wait({stopping, hurried}, return_when=asyncio.FIRST_COMPLETED)
        if not stopping.done():
            await _cancel(stopping)
            await child.stop(patience_s=0)
        await _cancel(hurried)
        await stopping if not stopping.cancelled() else None
        self._program.clean_up()
        forget_record(self._record)
        self.status.pid = None

    async def _judge(self, report: ExitReport) -> None:
        """Raises when another start would be in vain."""
        name = self._program.name
        if self._on_crash:
            await self._on_crash(report, self.status)
        self._log.error(f"{name}_crashed", **_summary(report))
        if self._policy is None:
            self._count(report)
            return
        is_first = not report.was_ready and self.status.start_seconds is None
        if is_first and report.reason != "host":  # another start may well find it there
            raise _never_ready(name, report, self.lines.path)
        now = time.monotonic()
        self._crashes.append(now)
        while self._crashes and now - self._crashes[0] > self._policy.window_s:
            self._crashes.popleft()
        if len(self._crashes) > self._policy.limit:
            why, file = describe_exit(report), self.lines.path
            raise CrashLoop(
                f"the {name} crashed {len(self._crashes)} times within "
                f"{self._policy.window_s:.0f} s ({why}); its log: {file}"
            )
        self._count(report)

    def _count(self, report: ExitReport) -> None:
        self.status.restarts[report.reason] = self.status.restarts.get(report.reason, 0) + 1

    async def _pause(self) -> None:
        if self._policy is None:
            return
        delay = self._policy.delay_after(len(self._crashes))
        self._set_state("waiting")
        self._log.warning(f"{self._program.name}_restarting", delay_s=round(delay, 1))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stop.wait(), delay)

    async def _learn_members(self, child: ChildProcess) -> None:
        """Names of the workers, while they live: a signal's victim is known by pid alone later."""
        while True:
            self._note_members(child)
            await asyncio.sleep(1)

    def _note_members(self, child: ChildProcess) -> None:
        self._members |= {member.pid: member.name for member in child.members()}

    def _take_line(self, stream: str, line: str) -> None:
        self.lines.add(line)
        self._program.read_line(line)
        self._terminal.show_line(self._program.name, stream, line, label=self._label)

    def _set_state(self, state: str) -> None:
        if state != self.status.state:
            self.status.state, self.status.since = state, time.monotonic()
            took = self.status.start_seconds if state == "ready" else None
            extra = {"start_s": round(took, 1)} if took else {}
            self._log.info(f"{self._program.name}_{state}", **extra)

    def _report_exit(
        self, child: ChildProcess, reason: str, began: float, was_ready: bool, dump: list[str]
    ) -> ExitReport:
        tail = self.lines.tail(400, since=began)
        is_told = reason in ("hang", "host")
        return ExitReport(
            reason=reason,
            returncode=child.returncode,
            uptime_s=time.monotonic() - began,
            was_ready=was_ready,
            cause=self._loss.detail if is_told else self._program.find_cause(tail),
            tail=tail,
            dump=dump,
            members=[f"{pid} {name}" for pid, name in self._members.items()],
            lost_host=self._loss.host if reason == "host" else "",
        )


def _never_ready(name: str, report: ExitReport, file: Path) -> ProgramError:
    # argparse's own code: the flags were wrong, so the settings are to blame.
    is_refused = report.reason == "exit" and report.returncode == _ARGPARSE_EXIT
    kind = SettingsError if is_refused else NeverReady
    return kind(f"the {name} never became ready ({describe_exit(report)}); its log: {file}")


def describe_exit(report: ExitReport) -> str:
    ways = {
        "exit": f"it exited with code {report.returncode}",
        "signal": f"it was killed by signal {-(report.returncode or 0)}",
        "start_timeout": f"it did not answer within {report.uptime_s:.0f} s",
        "hang": "it hung",
        "host": "a host of it was lost",
    }
    return ways[report.reason] + (f": {report.cause}" if report.cause else "")


def _summary(report: ExitReport) -> dict[str, Any]:
    row = {"reason": report.reason, "returncode": report.returncode, "cause": report.cause}
    return {**row, "uptime_s": round(report.uptime_s, 1)}


async def _first(work: Coroutine[Any, Any, Result], *ends: asyncio.Task[Any]) -> Result | None:
    """What it returns, or None where one of the ends comes before."""
    working = asyncio.create_task(work)
    await asyncio.wait({working, *ends}, return_when=asyncio.FIRST_COMPLETED)
    if working.done():
        return working.result()
    await _cancel(working)
    return None


async def _cancel(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
