"""How the gateway logs: one line an event, JSON unless a person is watching.

Every line has `timestamp`, `level`, `source` and `event`; what a library logs comes in the same
form, with its words under `message`.
"""

from __future__ import annotations

import logging
import sys
from types import TracebackType

import orjson
import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from gateway.config import Settings


def configure_logging(settings: Settings) -> None:
    level = getattr(logging, settings.log_level.upper())
    is_console = settings.log_format == "console" or (
        settings.log_format == "auto" and sys.stderr.isatty()
    )
    processors: list[Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if not is_console:
        processors += [add_source, structlog.processors.format_exc_info]
    structlog.configure(
        processors=[*processors, _renderer(is_console=is_console)],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr)
        if is_console
        else structlog.BytesLoggerFactory(sys.stderr.buffer),
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(handlers=[LibraryHandler()], level=logging.WARNING, force=True)
    sys.excepthook = log_crash


def _renderer(*, is_console: bool) -> Processor:
    if is_console:
        return structlog.dev.ConsoleRenderer()
    return structlog.processors.JSONRenderer(serializer=orjson.dumps)


def add_source(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Which program: the launcher's and the engine's lines may stand in the same log."""
    event["source"] = "gateway"
    return event


class LibraryHandler(logging.Handler):
    """What libraries log, in the same form as everything else."""

    def emit(self, record: logging.LogRecord) -> None:
        structlog.get_logger("gateway").log(
            min(record.levelno // 10 * 10, logging.CRITICAL),
            "library_line",
            logger=record.name,
            message=record.getMessage(),
            exc_info=record.exc_info,
        )


def log_crash(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """The process's last line, when nobody caught what ended it."""
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    structlog.get_logger("gateway").critical("gateway_crashed", exc_info=(kind, error, trace))
