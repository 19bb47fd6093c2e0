"""Many stand-in engines in one process, each on a port of its own.

It prints the ports in one line. SIGUSR1 takes a tenth of them away as a process that is killed goes
(no listener, every connection cut), SIGUSR2 has them back on the same ports; a line tells when that
is done, and another when each of those that came back has been asked by a caller.
"""

from __future__ import annotations

import argparse
import asyncio
import signal

import uvloop

from lab.bench.relay.stand_in_engine import EngineProtocol


class EnginePort(EngineProtocol):
    """A connection to one of them; whatever generates begins after `delay_s`, and a stream has a
    chunk every `pause_s`.
    """

    def __init__(self, engine: StandIn) -> None:
        super().__init__()
        self._engine = engine

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._engine.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._engine.connections.discard(self)

    def cut(self) -> None:
        self._transport.abort()

    def _answer(self, head: bytes, body: bytes) -> None:
        if head.startswith(b"POST /v1/chat"):
            self._engine.has_work.set()
        if self._engine.delay_s and head.startswith(b"POST"):
            loop = asyncio.get_running_loop()
            loop.call_later(self._engine.delay_s, self._answer_late, head, body)
        else:
            super()._answer(head, body)

    async def _stream(self, number: int, pause_s: float) -> None:
        await super()._stream(number, pause_s or self._engine.pause_s)

    def _answer_late(self, head: bytes, body: bytes) -> None:
        if not self._transport.is_closing():
            super()._answer(head, body)


class StandIn:
    """One engine: its port, and whoever is connected to it."""

    def __init__(self, delay_s: float, pause_s: float) -> None:
        self.delay_s, self.pause_s = delay_s, pause_s
        self.port = 0
        self.connections: set[EnginePort] = set()
        self.has_work = asyncio.Event()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(
            lambda: EnginePort(self), "127.0.0.1", self.port, backlog=1024
        )
        self._server, self.port = server, server.sockets[0].getsockname()[1]
        self.has_work.clear()

    def fail(self) -> None:
        if self._server is not None:
            self._server.close()
        for connection in list(self.connections):
            connection.cut()


async def serve(count: int, delay_s: float, pause_s: float) -> None:
    loop = asyncio.get_running_loop()
    orders: asyncio.Queue[bool] = asyncio.Queue()
    for number, fails in ((signal.SIGUSR1, True), (signal.SIGUSR2, False)):
        loop.add_signal_handler(number, orders.put_nowait, fails)
    engines = [StandIn(delay_s, pause_s) for _ in range(count)]
    for engine in engines:
        await engine.start()
    print(",".join(str(engine.port) for engine in engines), flush=True)
    tenth = engines[:: 10 if count >= 10 else 1]
    while True:
        fails = await orders.get()
        for engine in tenth:
            if fails:
                engine.fail()
            else:
                await engine.start()
        print("gone" if fails else "there", flush=True)
        if not fails:
            for engine in tenth:
                await engine.has_work.wait()
            print("all have work", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--delay", type=float, default=0.0, help="seconds that an answer takes")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds between two chunks")
    arguments = parser.parse_args()
    uvloop.run(serve(arguments.count, arguments.delay, arguments.pause))


if __name__ == "__main__":
    main()
