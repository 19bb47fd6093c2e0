"""What the launcher shows and keeps: its own events, and the lines of the programs it runs."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import logging.handlers
import sys
import time
from collections import deque
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO, cast

import structlog
from structlog.typing import EventDict, WrappedLogger

from common.logs import configure_logging, is_for_people
from launcher.engine import vllm_log

_COLOURS = {"launcher": "\x1b[1m", "engine": "\x1b[36m", "gateway": "\x1b[35m"}
_RESET = "\x1b[0m"
_RING_LINES = 400
_FILE_BYTES = 10 * 2**20
_OLD_FILES_KEPT = 3
# A program that floods its log is kept in full in the file, not on the terminal.
_SHOWN_PER_S = 300


class _LenientStream(io.TextIOBase):
    """A closed terminal must not end the engine."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            return self._stream.write(text)
        return 0

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def isatty(self) -> bool:
        return self._stream.isatty()


class Terminal:
    """Standard error, for all programs together: `engine   | …`, or one JSON object a line."""

    def __init__(self, log_format: str, engine_log_mode: str) -> None:
        self._stream = cast("TextIO", _LenientStream(sys.stderr))
        self.is_terminal = self._stream.isatty()
        self.is_json = not is_for_people(log_format, self._stream)
        self._engine_log_mode = engine_log_mode
        self._second = 0
        self._shown = 0
        self._hidden = 0

    def configure_logging(self, level: str = "info") -> None:
        """The launcher's own events, and what its libraries log."""
        log_format = "json" if self.is_json else "console"
        console = self._render_event
        configure_logging("launcher", log_format, level, stream=self._stream, console=console)

    def announce(self, text: str) -> None:
        """The one line for who waits, on standard output."""
        head = {"timestamp": _now(), "source": "launcher", "level": "info", "event": "ready"}
        row = json.dumps({**head, "message": text}, ensure_ascii=False)
        print(row if self.is_json else text, flush=True)  # noqa: T201

    def show_line(self, source: str, stream: str, line: str) -> None:
        """One line that a child program wrote."""
        if source == "engine" and not self._wants(line):
            return
        if not self._may_show():
            return
        if not self.is_json:
            shown = line if self.is_terminal else vllm_log.clean(line)
            self._write(self._prefix(source) + shown)
            return
        head = {"timestamp": _now(), "source": source, "level": "info", "event": "line"}
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

    def _prefix(self, source: str) -> str:
        label = f"{source:<8} | "
        return f"{_COLOURS.get(source, '')}{label}{_RESET}" if self.is_terminal else label

    def _write(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()


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
        self._file = _LineFile(path)

    def add(self, line: str) -> None:
        self._ring.append((time.monotonic(), line))
        self._file.handle(logging.makeLogRecord({"msg": f"{_now()} {line}"}))

    def tail(self, count: int, *, since: float = 0.0) -> list[str]:
        return [line for at, line in self._ring if at >= since][-count:]

    def close(self) -> None:
        self._file.close()


class _LineFile(logging.handlers.RotatingFileHandler):
    """A disk that is full is told once, and tried again with each line."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            path, maxBytes=_FILE_BYTES, backupCount=_OLD_FILES_KEPT, encoding="utf-8", delay=True
        )
        self._error: OSError | None = None

    def emit(self, record: logging.LogRecord) -> None:
        before, self._error = self._error, None
        super().emit(record)
        if self._error and not before:
            warn_not_kept(Path(self.baseFilename), self._error)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        error = sys.exception()
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        self._error = error
        file, self.stream = self.stream, None
        if file:
            with contextlib.suppress(OSError):  # what it has not written yet
                file.close()


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
