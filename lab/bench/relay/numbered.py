"""Does every answer go to whoever asked for it?

    python -m lab.bench.relay.numbered [--answers 200000] [--only chat,stream,predict]

One gateway before an engine's stand-in, in each layout: every request carries a number and must get
it back, in each of a stream's chunks and for each of a batch's prompts. Among those who wait for
their answers are callers who hang up, who read slowly, and whose first try the engine breaks off.

Exit codes: 0 no answer was wrong, 1 one was, 2 bad options.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import ExitStack

import uvloop

from common.ports import find_free_ports
from lab import options
from lab.bench.bench_figures import BenchFailed
from lab.bench.relay.peers import build_gateway_command
from lab.bench.relay.relay_arms import is_answering, start_command, start_program
from lab.bench.relay.relay_connection import RelayConnection
from lab.bench.relay.stand_in_engine import HOLD, LOSE, STREAM_CHUNKS
from lab.reports.console import ProgressLine

_PROMPTS = 358
_FEW_BYTES, _PAUSE_S = 512, 0.01
_LAYOUTS = ("chat", "stream", "predict")

Caller = Callable[["Run"], Coroutine[None, None, None]]
Connected = AsyncIterator[RelayConnection]


class SlowConnection(RelayConnection):
    """Takes a stream in small pieces, with a pause after each."""

    @classmethod
    async def connect(cls, port: int) -> SlowConnection:
        return cls(*await asyncio.open_connection("127.0.0.1", port, limit=_FEW_BYTES))

    async def read_stream(self) -> bytes:
        data = b""
        while not data.endswith(b"\r\n0\r\n\r\n"):
            piece = await self._reader.read(_FEW_BYTES)
            if not piece:
                raise BenchFailed(f"a stream broke off: {data[-300:]!r}")
            data += piece
            await asyncio.sleep(_PAUSE_S)
        return data


class Run:
    """One layout: how many right answers there were, by kind of caller, until there are enough."""

    def __init__(self, layout: str, port: int, most: int, progress: ProgressLine) -> None:
        self.layout, self.port = layout, port
        self._most, self._progress = most, progress
        self.counts: Counter[str] = Counter()
        self._last = 0

    def take_numbers(self) -> Iterator[int]:
        """Each once, until those who wait have got so many answers."""
        while self.counts["answered"] < self._most:
            self._last += 1
            yield self._last

    def note(self, kind: str, answers: int = 1) -> None:
        self.counts[kind] += answers
        if kind == "answered":
            self._progress.working(f"{self.layout}: {self.counts[kind]} of {self._most}")

    async def ask(self, connection: RelayConnection, number: int, extra: bytes = b"") -> int:
        """How many answers that were: a batch has one for each prompt."""
        if self.layout == "predict":
            await connection.ask_predict(number, _PROMPTS, extra=extra)
            return _PROMPTS
        if self.layout == "stream":
            await connection.ask_stream(number, extra=extra)
        else:
            await connection.ask(number, extra=extra)
        return 1


@contextlib.asynccontextmanager
async def connect(port: int, kind: type[RelayConnection] = RelayConnection) -> Connected:
    connection = await kind.connect(port)
    try:
        yield connection
    finally:
        await connection.close()


async def wait_for_answers(run: Run) -> None:
    async with connect(run.port) as connection:
        for number in run.take_numbers():
            run.note("answered", await run.ask(connection, number))


async def hang_up(run: Run) -> None:
    """In the middle of a stream, or while the engine still works."""
    for number in run.take_numbers():
        async with connect(run.port) as connection:
            if run.layout == "predict":
                connection.send_predict(number, _PROMPTS, extra=HOLD)
            else:
                connection.send(number, stream=run.layout == "stream", extra=HOLD)
            if run.layout == "stream":
                await connection.read_head()
            await asyncio.sleep(_PAUSE_S)
        run.note("hung up")


async def read_slowly(run: Run) -> None:
    async with connect(run.port, SlowConnection) as connection:
        for number in run.take_numbers():
            run.note("slowly read", await run.ask(connection, number))


async def lose_first_try(run: Run) -> None:
    """The engine ends the connection in place of its first answer, which the gateway asks for again
    where it cannot come out otherwise.
    """
    async with connect(run.port) as connection:
        connection.fields = b',"temperature":0'
        for number in run.take_numbers():
            run.note("after a lost try", await run.ask(connection, number, LOSE))


# How many of each are there at once; who sends a batch sends many.
_CALLERS: dict[Caller, int] = {wait_for_answers: 48, hang_up: 8, read_slowly: 4, lose_first_try: 4}
_SENDERS: dict[Caller, int] = {wait_for_answers: 4, hang_up: 1, lose_first_try: 1}


async def run_layout(layout: str, port: int, answers: int, progress: ProgressLine) -> Run:
    run = Run(layout, port, answers, progress)
    callers = _SENDERS if layout == "predict" else _CALLERS
    async with asyncio.TaskGroup() as tasks:
        for caller, count in callers.items():
            for _ in range(count):
                tasks.create_task(caller(run))
    return run


async def run_layouts(layouts: Sequence[str], answers: int) -> None:
    engine, gateway = find_free_ports(2)
    progress = ProgressLine()
    with ExitStack() as exits:
        exits.callback(progress.close)
        log = exits.enter_context(tempfile.TemporaryFile())
        words = ("lab.bench.relay.stand_in_engine", "engine", "--port", str(engine))
        stand_in = start_program(exits, log, 0, *words)
        command = build_gateway_command(f"http://127.0.0.1:{engine}", gateway)
        programs = [stand_in, start_command(exits, log, 1, command)]
        if not await is_answering(gateway, programs):
            raise BenchFailed("the gateway before the engine's stand-in did not start")
        for layout in layouts:
            run = await run_layout(layout, gateway, answers, progress)
            counted = ", ".join(f"{count:,} {kind}" for kind, count in sorted(run.counts.items()))
            chunks = f" (each of {STREAM_CHUNKS} chunks)" if layout == "stream" else ""
            progress.say(f"{layout}{chunks}: 0 wrong; {counted}")


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lab.bench.relay.numbered",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    help_ = "for those who wait, in each layout (default: 200000)"
    parser.add_argument("--answers", type=options.whole_number(1), default=200_000, help=help_)
    parser.add_argument("--only", default=",".join(_LAYOUTS), metavar="LAYOUT,…")
    arguments = parser.parse_args(words)
    layouts = arguments.only.split(",")
    if unknown := set(layouts) - set(_LAYOUTS):
        parser.error(f"--only: there is no {', '.join(unknown)}; there are {', '.join(_LAYOUTS)}")
    code = 0
    try:
        uvloop.run(run_layouts(layouts, arguments.answers))
    except* BenchFailed as failed:
        for error in failed.exceptions:
            print(f"WRONG: {error}", file=sys.stderr)
        code = 1
    return code


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main(sys.argv[1:]))
    sys.exit(130)
