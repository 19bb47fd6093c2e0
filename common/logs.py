"""How a program logs: one line an event, JSON unless a person is watching.

Every JSON line has `timestamp`, `level`, `source` (the program) and `event`; what a library logs
comes in the same form, with its words under `message`. Own lines go from structlog to the stream
directly: through the standard library's loggers each would cost three times as much, and a gateway
writes one a request. How the launcher shows several programs' lines is in its `engine/output.py`.
"""

from __future__ import annotations

import logging
import sys
from functools import partial
from types import TracebackType
from typing import Any, TextIO

import orjson
import structlog
from structlog.stdlib import ProcessorFormatter
from structlog.typing import EventDict, Processor, WrappedLogger


def is_for_people(log_format: str, stream: TextIO) -> bool:
    """The setting `log_format`: auto is readable on a terminal, JSON elsewhere."""
    return log_format == "console" or (log_format == "auto" and stream.isatty())


def configure_logging(
    program: str,
    log_format: str,
    level: str = "info",
    *,
    stream: TextIO | None = None,
    console: Processor | None = None,
) -> None:
    """For the whole process; `console` renders lines for people another way than structlog's."""
    stream = stream or sys.stderr
    processors: list[Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if is_for_people(log_format, stream):
        renderer = console or structlog.dev.ConsoleRenderer()
    else:
        renderer = structlog.processors.JSONRenderer(serializer=_write_json)
        processors += [partial(_add_source, program), structlog.processors.format_exc_info]
    least = logging.getLevelNamesMapping()[level.upper()]
    structlog.configure(
        processors=[*processors, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(least),
        logger_factory=structlog.WriteLoggerFactory(stream),
        cache_logger_on_first_use=True,
    )
    libraries = logging.StreamHandler(stream)
    libraries.setFormatter(
        ProcessorFormatter(
            processors=[ProcessorFormatter.remove_processors_meta, renderer],
            foreign_pre_chain=[_name_library_line, *processors],
        )
    )
    logging.basicConfig(handlers=[libraries], level=max(least, logging.WARNING), force=True)
    sys.excepthook = partial(_log_crash, program)


def _name_library_line(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    return {
        **event,
        "event": "library_line",
        "logger": event["_record"].name,
        "message": event["event"],
    }


def _add_source(program: str, _logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """The lines of several programs may stand in the same log."""
    event["source"] = program
    return event


def _write_json(event: EventDict, **options: Any) -> str:
    return orjson.dumps(event, **options).decode()


def _log_crash(
    program: str, kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """The process's last line, when nobody caught what ended it."""
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    logger = structlog.get_logger(program)
    logger.critical(f"{program}_crashed", exc_info=(kind, error, trace))
