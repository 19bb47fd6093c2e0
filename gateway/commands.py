"""The gateway's commands: serves until told to stop, or says what is asked of it."""

from __future__ import annotations

import asyncio
import gc
import json
import re
import resource
import signal
import sys
from collections.abc import Callable
from functools import partial

import structlog
import uvloop
from aiohttp import web

from common.command_line.help import format_example, format_help, wants_help
from common.command_line.output import show
from common.logs import configure_logging
from common.processes import map_large_blocks
from common.project import read_version
from common.settings import build_schema
from gateway.admission.keys import make_key
from gateway.app import build_app
from gateway.config import Settings, SettingsError, load_settings
from gateway.engines.warmup import read_warmup_questions
from gateway.forms import silence_form_warnings
from gateway.listening import listen
from gateway.observability.metrics import METRICS
from gateway.server import Runner

_ENOUGH_FILES = 2**20  # what Linux allows a process unless told otherwise
log = structlog.get_logger("gateway")


def run_command(arguments: list[str]) -> int:
    commands: dict[str, Callable[[list[str]], int]] = {
        "new-key": print_new_key,
        "roll": roll,
    }
    try:
        if arguments and arguments[0] in commands:
            return commands[arguments[0]](arguments[1:])
        if wants_help(arguments):
            show([format_help(Settings)])
            return 0
        if arguments[:1] in (["--version"], ["schema"], ["example"], ["completion"]):
            show([describe(arguments[0], arguments[1:])])
            return 0
        if arguments[:1] == ["check"]:
            return check(load_settings(arguments[1:]))
        settings = load_settings(arguments)
        stream = configure_logging("gateway", settings.log_format, settings.log_level)
        silence_form_warnings()
        raise_file_limit()
        map_large_blocks()
        app = build_app(settings, lambda: load_settings(arguments))
        app[METRICS].log_lines_dropped.read = lambda: [((), stream.dropped)]
        return uvloop.run(serve(app, settings))
    except SettingsError as error:
        print(f"gateway: {error}", file=sys.stderr)
        return 2


def roll(arguments: list[str]) -> int:
    from gateway.discovery import roll  # noqa: PLC0415 — it needs httpx, and who serves does not

    return roll.roll(arguments, say=partial(print, flush=True))


def raise_file_limit() -> None:
    """A stream takes two files. Shells and containers allow 1,024 where the kernel allows more."""
    few, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _ENOUGH_FILES if most == resource.RLIM_INFINITY else min(most, _ENOUGH_FILES)
    if few != resource.RLIM_INFINITY and few < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def check(settings: Settings) -> int:
    """Everything that could stop the start, without listening: for who has an engine to start."""
    build_app(settings)
    read_warmup_questions(settings)
    print("gateway: the settings are good")
    return 0


def describe(command: str, arguments: list[str]) -> str:
    """What the gateway says of itself."""
    if command == "--version":
        return f"vllm-gateway {read_version()}"
    if command == "schema":
        return json.dumps(build_schema(Settings), indent=2, ensure_ascii=False)
    if command == "example":
        return format_example(Settings).rstrip()
    # Imported late: its library is of no use to anything else.
    from common.command_line.completion import build_parser, complete  # noqa: PLC0415

    others = {
        "check": "Judges the settings and starts nothing.",
        "example": "Prints a settings file with every setting.",
        "new-key": "Makes an API key and its entry for the keys file.",
        "roll": "Puts new engines in the place of old ones, and loses no request.",
        "schema": "Prints the JSON schema of the settings file.",
    }
    return complete(arguments, build_parser("vllm-gateway", {}, others, settings=Settings))


def print_new_key(names: list[str]) -> int:
    """The key goes to its owner and is stored nowhere; the entry goes into the keys file."""
    if len(names) != 1 or not re.fullmatch(r"[\w.@-]{1,64}", names[0]):
        print("usage: python -m gateway new-key NAME", file=sys.stderr)
        return 2
    key, entry = make_key(names[0])
    print(f"key, shown once: {key}", file=sys.stderr)
    print(entry, end="")
    return 0


async def serve(app: web.Application, settings: Settings) -> int:
    """Listens until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    runner = Runner(app, settings)
    await runner.setup()
    try:
        await listen(runner, settings.host, settings.port, reuse_port=settings.reuse_port)
    except OSError as error:
        await runner.cleanup()
        raise SettingsError(
            f"cannot listen on {settings.host}:{settings.port} ({error.strerror}); "
            "stop what uses it or set GATEWAY_PORT"
        ) from None
    tame_garbage_collection()
    log.info("gateway_listening", host=settings.host, port=runner.addresses[0][1])
    await stop.wait()
    log.info("gateway_draining")
    await runner.cleanup()
    log.info("gateway_stopped")
    return 0


def tame_garbage_collection() -> None:
    """What has been made by now lives as long as the process, and a good request leaves no cycles:
    looking for some after every few hundred objects cost a tenth of the throughput. Hang-ups and
    errors leave some; ten times as many objects let ten megabytes of those pile up.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(5_000, 20, 20)
