"""What the launcher shows and keeps: its own events, and the lines of the programs it runs."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import structlog
from structlog.typing import EventDict, WrappedLogger

from common.logs import (
    DescriptorOutput,
    LineWriter,
    LogStream,
    configure_logging,
    is_for_people,
    open_log_stream,
    replace_stderr,
)
from launcher.engine import vllm_log

_COLOURS = {"launcher": "\x1b[1m", "engine": "\x1b[36m", "gateway": "\x1b[35m"}
_RESET = "\x1b[0m"
_RING_LINES = 400
_FILE_BYTES = 10 * 2**20
_OLD_FILES_KEPT = 3
_WAITING_CHARACTERS = 16 * 2**20  # of a program's lines, while the disk is busy
# A program that floods its log is kept in full in the file, not on the terminal.
_SHOWN_PER_S = 300


class Terminal:
    """Standard error, for all programs together: `engine   | …`, or one JSON object a line.

    A closed terminal must not end the engine, and one that takes nothing must not stop it.
    """

    def __init__(self, log_format: str, engine_log_mode: str) -> None:
        self._stream = replace_stderr()
        self.is_terminal = self._stream.isatty()
        self.is_json = not is_for_people(log_format, self._stream)
        self._engine_log_mode = engine_log_mode
        self._second = 0
        self._shown = 0
        self._hidden = 0

    @property
    def dropped(self) -> int:
        """Lines that could not be shown."""
        return self._stream.dropped

    def configure_logging(self, level: str = "info") -> None:
        """The launcher's own events, and what its libraries log."""
        log_format = "json" if self.is_json else "console"
        configure_logging("launcher", log_format, level, console=self._render_event)

    def announce(self, text: str) -> None:
        """The one line for who waits, on standard output."""
        head = {"timestamp": _now(), "source": "launcher", "level": "info", "event": "ready"}
        row = json.dumps({**head, "message": text}, ensure_ascii=False)
        self._find_standard_output().write(f"{row if self.is_json else text}\n")

    def finish(self) -> None:
        """Before an end without Python's own."""
        self._stream.finish()

    def _find_standard_output(self) -> LogStream:
        """`2>&1` makes both one; two threads would then write into each other's lines."""
        with contextlib.suppress(OSError, ValueError):
            one, other = os.fstat(sys.stdout.fileno()), os.fstat(self._stream.fileno())
            if os.path.samestat(one, other):
                return self._stream
        return open_log_stream(sys.stdout)

    def show_line(self, source: str, stream: str, line: str, *, label: str = "") -> None:
        """One line that a child program wrote; `label` tells several of one kind apart."""
        if source == "engine" and not self._wants(line):
            return
        if not self._may_show():
            return
        if not self.is_json:
            shown = line if self.is_terminal else vllm_log.clean(line)
            self._write(self._prefix(source, label) + shown)
            return
        head = {"timestamp": _now(), "source": source, "level": "info", "event": "line"}
        if label:
            head[source] = label
        row = _parse_object(line) or {"stream": stream, **vllm_log.split_line(line)}
        self._write(json.dumps(head | row, ensure_ascii=False, default=str))

    def _render_event(self, _logger: WrappedLogger, method: str, event: EventDict) -> str:
        """For people, whose terminal has room for no time."""
        event = structlog.processors.format_exc_info(None, method, event)
        level, name = event.pop("level"), event.pop("event")
        words = [f"{key}={value}" for key, value in event.items() if key != "timestamp"]
        loud = f"{level.upper()} " if level not in ("info", "debug") else ""
        return self._prefix("launcher") + " ".join([f"{loud}{name}", *words])

    def _wants(self, line: str) -> bool:
        if self._engine_log_mode == "requests" and vllm_log.is_request(line):
            return True
        if self._engine_log_mode in ("short", "requests"):
            return not vllm_log.is_noise(line)
        return self._engine_log_mode == "all"

    def _may_show(self) -> bool:
        second = int(time.monotonic())
        if second != self._second:
            hidden, self._hidden = self._hidden, 0
            self._second, self._shown = second, 0
            if hidden:
                structlog.get_logger("launcher").warning("lines_hidden", count=hidden)
        self._shown += 1
        self._hidden += self._shown > _SHOWN_PER_S
        return self._shown <= _SHOWN_PER_S

    def _prefix(self, source: str, label: str = "") -> str:
        head = f"{label or source:<8} | "
        return f"{_COLOURS.get(source, '')}{head}{_RESET}" if self.is_terminal else head

    def _write(self, text: str) -> None:
        self._stream.write(text + "\n")


@contextlib.contextmanager
def best_effort(path: Path) -> Iterator[None]:
    """What is written for later only: a disk that is full or gone must not end the engine."""
    try:
        yield
    except OSError as error:
        warn_not_kept(path, error)


def warn_not_kept(path: Path, error: OSError) -> None:
    structlog.get_logger("launcher").warning("not_kept", path=str(path), why=error.strerror)


class LineLog:
    """A program's lines: the last ones in memory, all of them in a file that is rotated."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ring: deque[tuple[float, str]] = deque(maxlen=_RING_LINES)
        self._file = _RotatedFile(path)
        self._writer = LineWriter(path.name, self._file.write, most_characters=_WAITING_CHARACTERS)

    @property
    def dropped(self) -> int:
        """Lines that the file lacks."""
        return self._writer.dropped

    def add(self, line: str) -> None:
        self._ring.append((time.monotonic(), line))
        self._writer.add(f"{_now()} {line}\n")

    def tail(self, count: int, *, since: float = 0.0) -> list[str]:
        return [line for at, line in self._ring if at >= since][-count:]

    def close(self) -> None:
        if self._writer.close():
            self._file.close()


class _RotatedFile:
    """The file and its predecessors. A disk that is full is told once, and tried again each time;
    a file that somebody has deleted is made anew.

    Not the standard library's handler: it writes line by line, and at each of them the thread would
    wait for the event loop of a launcher that has much to read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._output: DescriptorOutput | None = None
        self._error: OSError | None = None

    def write(self, lines: Sequence[str]) -> int:
        lost = start = 0
        before, self._error = self._error, None
        while start < len(lines):
            try:
                output, room = self._open(len(lines[start]))
            except OSError as error:
                self._error = error
                lost += len(lines) - start
                break
            end = start + 1
            room -= len(lines[start])
            while end < len(lines) and len(lines[end]) <= room:
                room -= len(lines[end])
                end += 1
            lost += output.write(lines[start:end])
            self._error = output.error or self._error
            start = end
        if self._error and not before:
            warn_not_kept(self._path, self._error)
        return lost

    def close(self) -> None:
        if self._output:
            os.close(self._output.fd)
            self._output = None

    def _open(self, wanted: int) -> tuple[DescriptorOutput, int]:
        """The file to write to, and what still fits into it."""
        if self._output and not self._is_there(self._output.fd):
            self.close()
        output = self._output = self._output or self._open_file()
        size = os.fstat(output.fd).st_size
        if size and size + wanted > _FILE_BYTES:
            self.close()
            self._rotate()
            output = self._output = self._open_file()
            size = 0
        return output, _FILE_BYTES - size

    def _is_there(self, fd: int) -> bool:
        try:
            return os.path.samestat(self._path.stat(), os.fstat(fd))
        except FileNotFoundError:
            return False

    def _open_file(self) -> DescriptorOutput:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        return DescriptorOutput(os.open(self._path, flags, 0o666))

    def _rotate(self) -> None:
        names = [self._path.name, *(f"{self._path.name}.{n + 1}" for n in range(_OLD_FILES_KEPT))]
        for older, newer in itertools.pairwise(reversed(names)):
            with contextlib.suppress(FileNotFoundError):
                self._path.with_name(newer).replace(self._path.with_name(older))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _parse_object(line: str) -> dict[str, Any] | None:
    if not line.startswith("{"):
        return None
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
