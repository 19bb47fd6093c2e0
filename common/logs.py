"""How a program logs: one line an event, JSON unless a person is watching; nobody waits for a log.

Every JSON line has `timestamp`, `level`, `source` (the program) and `event`; what a library logs
comes in the same form, with its words under `message`. Own lines go from structlog to the stream
directly: through the standard library's loggers each would cost three times as much, and a gateway
writes one a request. How the launcher shows several programs' lines is in its `engine/terminal.py`.

Lines are put into a buffer, and a thread takes them to where they are kept. A disk may be full, the
reader of a pipe gone, or there and not reading: then lines are lost and counted, and nothing else.
"""

from __future__ import annotations

import atexit
import io
import json
import logging
import os
import select
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from queue import SimpleQueue
from types import TracebackType
from typing import TextIO, cast

import orjson
import structlog
from structlog.stdlib import ProcessorFormatter
from structlog.typing import EventDict, Processor, WrappedLogger

_BUFFER_CHARACTERS = 2**20  # two seconds of a busy gateway
# The first line after a silence is written at once, what follows together: each time the thread
# wakes up, the program's other threads stand still for it.
_PAUSE_S = 0.05
_LAST_WORDS_S = 2.0
_POLL_S = 0.005
_FULL_PIPE_POLL_MS = 1000

# Takes lines to where they are kept; returns how many of them are lost, and never raises.
Output = Callable[[Sequence[str]], int]


class LineWriter:
    """A bounded buffer before an output, which may block for as long as it likes; `tell` hears how
    many lines were lost, as soon as some get through again.
    """

    def __init__(
        self,
        name: str,
        output: Output,
        *,
        most_characters: int = _BUFFER_CHARACTERS,
        tell: Callable[[int], None] | None = None,
    ) -> None:
        self._output = output
        self._tell = tell
        self._told = 0
        self._most_characters = most_characters
        self._lines: list[str] = []
        self._held = 0  # characters that wait or are on their way
        self._is_idle = True
        self._is_closed = False
        # Re-entrant, as is a SimpleQueue: while one of these lines runs, garbage may be collected
        # whose end is worth a line in the log.
        self._lock = threading.RLock()
        self._bell = SimpleQueue[None]()
        self._hurry = threading.Event()
        self.dropped = 0
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def add(self, line: str) -> None:
        """From any thread; costs a microsecond, whatever the output does."""
        with self._lock:
            if self._held + len(line) > self._most_characters:
                self.dropped += max(1, line.count("\n"))
                return
            self._held += len(line)
            self._lines.append(line)
            was_idle, self._is_idle = self._is_idle, False
        if was_idle:
            self._bell.put(None)

    def flush(self, timeout_s: float = _LAST_WORDS_S) -> bool:
        """What is still here is written now, unless that takes longer."""
        self._hurry.set()
        deadline = time.monotonic() + timeout_s
        while not self._is_idle and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        self._hurry.clear()
        return self._is_idle

    def close(self) -> bool:
        """Ends the thread; False while the output still keeps it."""
        is_done = self.flush()
        self._is_closed = True
        self._bell.put(None)
        return is_done

    def _run(self) -> None:
        while not self._is_closed:
            self._bell.get()
            while lines := self._take():
                lost = self._output(lines)
                with self._lock:
                    self._held -= sum(map(len, lines))
                    self.dropped += lost
                untold = self.dropped - self._told
                if self._tell and untold and not lost:
                    self._told += untold
                    self._tell(untold)
                self._hurry.wait(_PAUSE_S)

    def _take(self) -> list[str]:
        with self._lock:
            lines, self._lines = self._lines, []
            self._is_idle = not lines
        return lines


class DescriptorOutput:
    """Writes lines to an open file, pipe or terminal."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._is_cut = False  # a disk that is full takes half a line
        self.error: OSError | None = None  # why the last lines were lost

    def write(self, lines: Sequence[str]) -> int:
        data = "".join(lines).encode("utf-8", "backslashreplace")
        begun = b"\n" if self._is_cut else b""
        rest = memoryview(begun + data)
        self.error = None
        try:
            while rest:
                rest = rest[self._write_some(rest) :]
        except OSError as error:
            self.error = error
        written = len(begun) + len(data) - len(rest)
        if written:
            # All of it may end within a line, too: `print` writes the line break by itself.
            self._is_cut = bool(rest) and (begun + data)[written - 1 : written] != b"\n"
        return bytes(rest[max(0, len(begun) - written) :]).count(b"\n")

    def _write_some(self, data: memoryview) -> int:
        while True:
            try:
                return os.write(self.fd, data)
            except BlockingIOError:  # somebody else with the same pipe wants it so
                poll = select.poll()
                poll.register(self.fd, select.POLLOUT)
                poll.poll(_FULL_PIPE_POLL_MS)


class LogStream(io.TextIOBase):
    """A standard stream that never blocks and never raises."""

    encoding = "utf-8"

    def __init__(self, fd: int) -> None:
        self._output = DescriptorOutput(fd)
        self._writer = LineWriter(f"log-{fd}", self._output.write, tell=_tell_dropped)
        atexit.register(self._writer.flush)

    @property
    def dropped(self) -> int:
        """Lines that were lost so far."""
        return self._writer.dropped

    def write(self, text: str) -> int:
        self._writer.add(text)
        return len(text)

    def flush(self) -> None:
        """Each line is on its way already; structlog asks after every one."""

    def finish(self) -> None:
        """The last words are written, for who ends without Python's own exit."""
        self._writer.flush()

    def fileno(self) -> int:
        return self._output.fd

    def isatty(self) -> bool:
        return os.isatty(self._output.fd)


def _tell_dropped(count: int) -> None:
    structlog.get_logger("log").warning("log_lines_dropped", count=count)


def replace_stderr() -> LogStream:
    """For the whole process: warnings, last words and what a thread dies of must not block either.
    The second call gets what the first has made.
    """
    if not isinstance(sys.stderr, LogStream):
        sys.stderr = cast("TextIO", open_log_stream(sys.stderr))
    return cast("LogStream", sys.stderr)


def open_log_stream(stream: TextIO | None) -> LogStream:
    """Over the descriptor of a stream; Python has none where a program was started without it."""
    if stream is None:
        return LogStream(os.open(os.devnull, os.O_WRONLY))
    stream.flush()
    return LogStream(stream.fileno())


def is_for_people(log_format: str, stream: io.TextIOBase) -> bool:
    """The setting `log_format`: auto is readable on a terminal, JSON elsewhere."""
    return log_format == "console" or (log_format == "auto" and stream.isatty())


def configure_logging(
    program: str, log_format: str, level: str = "info", *, console: Processor | None = None
) -> LogStream:
    """For the whole process; `console` renders lines for people another way than structlog's."""
    stream = replace_stderr()
    processors: list[Processor] = []
    if is_for_people(log_format, stream):
        # By itself, where Rich is installed, it shows the variables of every frame: prompts, keys.
        plain = structlog.dev.plain_traceback
        renderer = console or structlog.dev.ConsoleRenderer(exception_formatter=plain)
        processors += [
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
        ]
    else:
        renderer = partial(_render_json, program)
    least = _find_level(level)
    structlog.configure(
        # A logger that has been used keeps its class, so it is no place for what may change.
        processors=[_LeastLevel(least), *processors, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG),
        logger_factory=structlog.WriteLoggerFactory(cast("TextIO", stream)),
        cache_logger_on_first_use=True,
    )
    libraries = logging.StreamHandler(stream)
    libraries.setFormatter(
        ProcessorFormatter(
            processors=[ProcessorFormatter.remove_processors_meta, renderer],
            foreign_pre_chain=[_name_library_line, *processors],
        )
    )
    logging.basicConfig(handlers=[libraries], force=True)
    logging.captureWarnings(True)
    change_log_level(level)
    sys.excepthook = partial(_log_crash, program)
    return stream


def change_log_level(level: str) -> None:
    """Of the whole process, from its next line on."""
    least = _find_level(level)
    for processor in structlog.get_config()["processors"]:
        if isinstance(processor, _LeastLevel):
            processor.least = least
    logging.getLogger().setLevel(max(least, logging.WARNING))


class _LeastLevel:
    """Drops what is less severe."""

    def __init__(self, least: int) -> None:
        self.least = least
        self._levels = {name.lower(): n for name, n in logging.getLevelNamesMapping().items()}

    def __call__(self, _logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
        if self._levels[method] < self.least:
            raise structlog.DropEvent
        return event


def _find_level(level: str) -> int:
    return logging.getLevelNamesMapping()[level.upper()]


def _name_library_line(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    return {
        **event,
        "event": "library_line",
        "logger": event["_record"].name,
        "message": event["event"],
    }


def _render_json(program: str, logger: WrappedLogger, method: str, event: EventDict) -> str:
    """What structlog has five processors for, one after the other: too dear once a request. The
    lines of several programs may stand in the same log.
    """
    event = structlog.processors.add_log_level(logger, method, event)
    event["timestamp"], event["source"] = datetime.now(UTC), program
    if "exc_info" in event:
        event = structlog.processors.format_exc_info(logger, method, event)
    try:
        return orjson.dumps(event, default=repr, option=orjson.OPT_UTC_Z).decode()
    except TypeError:  # half a character, a number of more than 64 bits
        event["timestamp"] = event["timestamp"].isoformat().replace("+00:00", "Z")
        return json.dumps(event, default=repr)


def _log_crash(
    program: str, kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """The process's last line, when nobody caught what ended it."""
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    logger = structlog.get_logger(program)
    logger.critical(f"{program}_crashed", exc_info=(kind, error, trace))
