"""One child program: started in a group of its own, read line by line, stopped as a group.

The group is the unit: a server's workers outlive it, so an end is only an end when the group is
empty. What to do next is `supervisor.py`'s matter.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import structlog

from common.files import read_file, write_file
from common.processes import find_session

log = structlog.get_logger("launcher")
_MAX_LINE_BYTES = 16_384
_POLL_S = 0.05
_EOF_PATIENCE_S = 2.0
_FORCED_PATIENCE_S = 10.0

_PARENT_DEATH = Path(__file__).parent / "parent_death.py"

OnLine = Callable[[str, str], None]  # stream ("stdout", "stderr"), text


@dataclass(frozen=True)
class GroupMember:
    """A process of a group, as /proc shows it."""

    pid: int
    name: str
    state: str
    start_ticks: int


def bind_to_parent(
    module: str, *arguments: str, kill_s: float, users: int | None = None
) -> list[str]:
    """The argv of `python -m module …` that outlives this process by `kill_s` at most, or its
    `users`, who hold a pipe open; `parent_death.py` says how.
    """
    head = [sys.executable, "-P", str(_PARENT_DEATH), str(os.getpid()), str(kill_s)]
    return [*head, "-" if users is None else str(users), module, *arguments]


class ChildProcess:
    """Start once, stop once; a restart is a new object."""

    def __init__(self, on_line: OnLine) -> None:
        self._on_line = on_line
        self._process: asyncio.subprocess.Process | None = None
        self._readers: list[_LineReader] = []
        self._exit: asyncio.Task[int] | None = None
        self.started_at = 0.0

    @property
    def pid(self) -> int:
        if self._process is None:
            raise RuntimeError("not started")
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """Negative for a signal; None while it runs."""
        return self._process.returncode if self._process else None

    async def start(
        self, argv: Sequence[str], environment: Mapping[str, str], fds: Sequence[int] = ()
    ) -> None:
        """It inherits `fds`, by their numbers."""
        # Pipes of our own: with asyncio's, `wait` waits for every grandchild that holds an end.
        out, out_end = os.pipe()
        err, err_end = os.pipe()
        try:
            self._process = await asyncio.create_subprocess_exec(
                *argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=out_end,
                stderr=err_end,
                env=dict(environment),
                pass_fds=fds,
                start_new_session=True,
            )
        finally:
            os.close(out_end)
            os.close(err_end)
            self._readers = [
                await _LineReader.open(fd, stream, self._on_line)
                for fd, stream in ((out, "stdout"), (err, "stderr"))
            ]
        self.started_at = time.monotonic()
        self._exit = asyncio.create_task(self._process.wait())

    async def wait(self) -> int:
        """Until the program itself ends; its group may live on."""
        if self._exit is None:
            raise RuntimeError("not started")
        return await asyncio.shield(self._exit)

    async def stop(self, *, patience_s: float) -> None:
        """SIGTERM to the program, then SIGKILL to its group, until nothing of it is left."""
        if self.returncode is None and patience_s > 0:
            self.signal(signal.SIGTERM)
            self.signal(signal.SIGCONT)  # a stopped one hears nothing
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.wait(), patience_s)
        await end_group(self.pid)
        await self.wait()
        reap_group(self.pid)
        await self.read_rest()

    def signal(self, number: signal.Signals) -> None:
        """To the program alone; it tells its workers itself."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def members(self) -> list[GroupMember]:
        return list_group(self.pid)

    async def read_rest(self) -> None:
        """The last words; bounded, because a stranger may hold the pipe's other end."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_EOF_PATIENCE_S):
                for reader in self._readers:
                    await reader.closed.wait()
        for reader in self._readers:
            reader.close()


class _LineReader(asyncio.Protocol):
    """Cuts a pipe into lines; a carriage return ends one too, as progress bars use it."""

    def __init__(self, stream: str, on_line: OnLine) -> None:
        self._stream = stream
        self._on_line = on_line
        self._rest = b""
        self._transport: asyncio.BaseTransport | None = None
        self.closed = asyncio.Event()

    @classmethod
    async def open(cls, fd: int, stream: str, on_line: OnLine) -> _LineReader:
        loop = asyncio.get_running_loop()
        pipe = os.fdopen(fd, "rb", buffering=0)
        _, reader = await loop.connect_read_pipe(lambda: cls(stream, on_line), pipe)
        return reader

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).replace(b"\r", b"\n").split(b"\n")
        if len(self._rest) > _MAX_LINE_BYTES:
            lines.append(self._rest)
            self._rest = b""
        for line in lines:
            self._emit(line)

    def connection_lost(self, exc: Exception | None) -> None:
        self._emit(self._rest)
        self._rest = b""
        self.closed.set()

    def close(self) -> None:
        if self._transport:
            self._transport.close()

    def _emit(self, line: bytes) -> None:
        text = line[:_MAX_LINE_BYTES].decode("utf-8", "replace").rstrip()
        if text:
            self._on_line(self._stream, text)


# --- groups, by /proc ---


def list_group(group: int) -> list[GroupMember]:
    """Everything alive in the session that `group` leads: workers may make groups of their own."""
    return [found for one in find_session(group) if (found := read_member(one.pid))]


async def end_group(group: int) -> None:
    """SIGKILL until nothing is left, zombies that became our children included. One look does not
    see a process whose parent forked it and ended in between; the next does.
    """
    deadline = time.monotonic() + _FORCED_PATIENCE_S
    was_empty = False
    while time.monotonic() < deadline:
        members = list_group(group)
        if was_empty and not members:
            return
        was_empty = not members
        for member in members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(member.pid, signal.SIGKILL)
        await asyncio.sleep(_POLL_S)


def reap_group(group: int) -> None:
    """As process 1 of a container the launcher inherits orphans; nobody else would bury them."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-group, os.WNOHANG)[0]:
            pass


def read_member(pid: int) -> GroupMember | None:
    """None when it has ended. By one read, so that name, state and start belong together; psutil's
    start time depends on the clock, which may be set between two launchers.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The name is in parentheses and may contain spaces and parentheses itself.
    head, _, tail = text.rpartition(")")
    fields = tail.split()
    # A killed server's first thread is a zombie while the others still hold its port.
    if fields[0] == "X" or (fields[0] == "Z" and int(fields[17]) <= 1):
        return None
    return GroupMember(pid, head.partition("(")[2], fields[0], int(fields[19]))


# --- the record of what runs: for the next launcher, should this one be killed ---


@dataclass(frozen=True)
class GroupRecord:
    """Names a group beyond doubt: a pid alone may have been given to somebody else since."""

    group: int
    start_ticks: int
    boot_id: str


def write_record(path: Path, group: int) -> None:
    leader = next((m for m in list_group(group) if m.pid == group), None)
    if leader:
        record = GroupRecord(group, leader.start_ticks, _boot_id())
        write_file(path, json.dumps(asdict(record)))


async def end_leftovers(path: Path) -> None:
    """Ends what an earlier launcher left behind, as its record says."""
    record = _read_record(path)
    if record is None:
        return
    members = list_group(record.group) if record.boot_id == _boot_id() else []
    leader = next((m for m in members if m.pid == record.group), None)
    if members and (leader is None or leader.start_ticks == record.start_ticks):
        for member in members:
            log.warning("leftover_ended", program=path.stem, pid=member.pid, name=member.name)
        await end_group(record.group)
    forget_record(path)


def forget_record(path: Path) -> None:
    with contextlib.suppress(OSError):  # one that stays names nobody who lives
        path.unlink()


def _read_record(path: Path) -> GroupRecord | None:
    try:
        return GroupRecord(**json.loads(read_file(path)))
    except (OSError, ValueError, TypeError):
        return None


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""
