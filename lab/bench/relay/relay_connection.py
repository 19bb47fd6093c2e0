"""One keep-alive connection to a relay: every request carries a number and must get it back.

Raw HTTP, so that asking costs next to nothing beside what is measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import re

from lab.bench.answer_book import MixedUp
from lab.bench.bench_figures import BenchFailed
from lab.bench.relay.stand_in_engine import STREAM_CHUNKS, find_number, find_numbers

_CHUNK_FRAME = re.compile(rb"\r\n[0-9a-fA-F]+\r\n")
_LENGTH = re.compile(rb"[Cc]ontent-[Ll]ength: (\d+)")


class RelayConnection:
    """One keep-alive connection that asks and checks; `headers` are sent with each request, and
    `fields` stand in each body of a chat.
    """

    headers = fields = b""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def connect(cls, port: int) -> RelayConnection:
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def close(self) -> None:
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    def send(self, number: int, *, stream: bool, extra: bytes = b"") -> None:
        body = b'{"model":"m","messages":[{"role":"user","content":"%snumber-%d."}]%s%s}'
        streamed = b',"stream":true' if stream else b""
        self._post(b"/v1/chat/completions", body % (extra, number, self.fields, streamed))

    def _post(self, path: bytes, body: bytes) -> None:
        head = b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n" % path
        head += self.headers
        self._writer.write(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)

    async def ask(self, number: int, *, extra: bytes = b"") -> None:
        self.send(number, stream=False, extra=extra)
        body = await self._read_answer()
        if find_number(body) != number:
            raise MixedUp(f"asked {number}, answered {body[:300]!r}")

    def send_predict(self, number: int, prompts: int, *, extra: bytes = b"") -> None:
        """So many questions, of which no two are the same."""
        questions = b",".join(
            b'"What is the %sanswer to question %d of number-%d.?"' % (extra, place, number)
            for place in range(prompts)
        )
        self._post(b"/predict", b'{"prompt":[%s]}' % questions)

    async def ask_predict(self, number: int, prompts: int, *, extra: bytes = b"") -> None:
        self.send_predict(number, prompts, extra=extra)
        numbers = find_numbers(await self._read_answer())
        if numbers != [number] * prompts:
            raise MixedUp(f"asked {prompts} times {number}, answered {numbers[:300]}")

    async def _read_answer(self) -> bytes:
        head = await self.read_head()
        length = _LENGTH.search(head)
        if length is None:
            raise BenchFailed(f"an answer of unknown length: {head!r}")
        return await self._reader.readexactly(int(length[1]))

    async def ask_stream(self, number: int, *, extra: bytes = b"") -> int:
        self.send(number, stream=True, extra=extra)
        data = await self.read_stream()
        # A relay frames anew what it read, and may cut an event in the middle of its number.
        numbers = find_numbers(_CHUNK_FRAME.sub(b"", data))
        if len(numbers) != STREAM_CHUNKS or set(numbers) != {number}:
            raise MixedUp(f"stream {number} came back wrong: {data[:300]!r}")
        return len(numbers)

    async def read_stream(self) -> bytes:
        return await self._reader.readuntil(b"\r\n0\r\n\r\n")

    async def read_head(self) -> bytes:
        head = await self._reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200"):
            raise BenchFailed(f"a relay answered {head.splitlines()[0]!r}")
        return head
