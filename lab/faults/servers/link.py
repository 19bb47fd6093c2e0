"""A way to a server that can be made slow or cut: bytes pass, each piece some time later."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator

_PIECE_BYTES = 2**16
_MOST_LOOKS, _LOOK_EVERY_S = 50, 0.02


class Link:
    """`delay_s` holds for both directions; what comes meanwhile waits its turn. `tls`: what comes
    is encrypted as far as here.
    """

    def __init__(self, port: int, tls: ssl.SSLContext | None = None) -> None:
        self._there, self._tls = port, tls
        self.port = 0
        self.delay_s = 0.0
        self._open: set[asyncio.StreamWriter] = set()

    @contextlib.asynccontextmanager
    async def serve(self) -> AsyncIterator[Link]:
        server = await asyncio.start_server(self._connect, "127.0.0.1", 0, ssl=self._tls)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            for writer in self._open:
                writer.close()
            for _ in range(_MOST_LOOKS):
                if not self._open:
                    break
                await asyncio.sleep(_LOOK_EVERY_S)

    def cut(self) -> None:
        """Whoever is connected has to connect again."""
        for writer in self._open:
            writer.transport.abort()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self._there)
            self._open.add(there_writer)
            try:
                ways = (self._pass(reader, there_writer), self._pass(there_reader, writer))
                await asyncio.gather(*ways)
            finally:
                there_writer.close()
                self._open.discard(there_writer)
        except OSError:
            pass  # nobody is there, or one of both has gone
        finally:
            writer.close()
            self._open.discard(writer)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while piece := await reader.read(_PIECE_BYTES):
            if self.delay_s:
                await asyncio.sleep(self.delay_s)
            writer.write(piece)
            await writer.drain()
        writer.close()
