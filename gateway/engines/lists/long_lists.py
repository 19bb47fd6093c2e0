"""A list of prompts on /v1 that is longer than its lane's share: it comes in by pieces, as a batch
of /predict does, each of which is one call of an engine, and leaves as one answer or one stream.

To whoever passes it on it is what an attempt is: `async with LongListCall(…) as answer`. An
engine's refusal of one piece is the call's answer; then the others are not needed any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from functools import partial
from types import TracebackType

from multidict import CIMultiDict, CIMultiDictProxy

from gateway.engines.attempt import Attempt, EngineCall
from gateway.engines.client import EngineAnswer
from gateway.engines.engine import BUSY_STATUSES
from gateway.engines.lists.feeding import Gate, Piece, open_group, take_places
from gateway.engines.pool import ModelPool
from gateway.errors import EngineError, EngineTimeout
from gateway.request_context import CutPiece
from gateway.schemas.prompt_lists.answers import (
    PieceAnswer,
    parse_piece,
    put_together,
    read_counts,
)
from gateway.schemas.prompt_lists.bodies import PromptList
from gateway.schemas.prompt_lists.streams import (
    DONE,
    PieceStream,
    StreamHead,
    StreamRefused,
    build_refusal_event,
)

# A whole answer makes room only when its longest sequence has ended: so what comes in together is
# several calls. One for each prompt would cost the engine's front end more than that.
_CALLS_A_PIECE = 4
# Chunks that wait for a caller who takes them slowly; more wait in the engines.
_MOST_CHUNKS_AHEAD = 4
_BUSY_PAUSE_S = 1.0  # until an engine that had no room for a piece is asked again


class _Refused(Exception):
    """What an engine answered instead of what was asked for."""

    def __init__(self, answer: EngineAnswer) -> None:
        super().__init__()
        self.answer = answer


class _WholeAnswer(EngineAnswer):
    """Put together; no connection is held for it."""

    def __init__(self, headers: CIMultiDictProxy[str], body: bytes | None) -> None:
        self.status, self.headers, self.body = 200, headers, body
        self.value = self.is_at_fault = None

    def close(self) -> None:
        """There is nothing to be closed."""


class _MergedStream(_WholeAnswer):
    """What comes of all pieces, in the order in which it comes."""

    def __init__(self, headers: CIMultiDictProxy[str], fail: Callable[[EngineError], None]) -> None:
        super().__init__(headers, None)
        self._fail = fail
        self.calls: dict[int, EngineCall] = {}  # of pieces that have not ended
        self._chunks: asyncio.Queue[bytes | Exception] = asyncio.Queue(_MOST_CHUNKS_AHEAD)

    async def put(self, chunk: bytes | Exception) -> None:
        await self._chunks.put(chunk)

    async def read_chunk(self) -> bytes:
        chunk = await self._chunks.get()
        if isinstance(chunk, Exception):
            raise chunk
        return chunk

    @property
    def is_in_pieces(self) -> bool:
        return True

    def find_quiet_since(self, moved_at: float, now: float) -> float:
        """A list of which no engine has anything waits for its turn."""
        sent_at = min((call.sent_at for call in self.calls.values() if call.sent_at), default=now)
        return max(moved_at, sent_at)

    def fail(self, error: EngineError) -> None:
        self._fail(error)


class LongListCall:
    """One list, from its first piece to the end of its answer."""

    def __init__(
        self,
        pool: ModelPool,
        gate: Gate | None,
        prompts: PromptList,
        call: EngineCall,
        *,
        copies: int,
        hold: Callable[[int], None],
        release: Callable[[int], None],
        timeout_s: float,
    ) -> None:
        """`call` is what each piece is like; `hold` is told of the bytes that are copied for each,
        `release` of those that are let go.
        """
        self._pool, self._gate, self._prompts, self._call = pool, gate, prompts, call
        self._copies, self._timeout_s = copies, timeout_s
        self._hold, self._release = hold, release
        self._answers: dict[int, PieceAnswer] = {}
        self._headers: CIMultiDictProxy[str] = CIMultiDictProxy(CIMultiDict())
        self._head, self._merged = StreamHead(), _MergedStream(self._headers, self._fail)
        self._feeder: asyncio.Task[None] | None = None
        self._first: asyncio.Future[EngineAnswer] | None = None
        self._failure: EngineError | None = None
        self._engine_s = 0.0
        self.sent_bytes = 0  # of prompts that engines have run
        self.has_failed = False

    @property
    def cut_pieces(self) -> tuple[CutPiece, ...]:
        return self._call.context.cut_pieces

    async def __aenter__(self) -> EngineAnswer:
        began = time.perf_counter()
        try:
            return await (self._open() if self._call.is_stream else self._collect())
        except BaseException:
            self.has_failed = True
            await self._stop()
            raise
        finally:
            self._engine_s = self._call.context.record.engine_s = time.perf_counter() - began

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.has_failed = self.has_failed or error is not None
        await self._stop()
        self._call.context.record.engine_s = self._engine_s  # not that of the last piece

    async def _collect(self) -> EngineAnswer:
        try:
            async with open_group() as group:
                async for piece in self._cut():
                    group.create_task(self._ask(piece)).add_done_callback(piece.leave)
        except _Refused as refused:
            self.has_failed = True
            return refused.answer
        pieces = [self._answers[place] for place in sorted(self._answers)]
        return _WholeAnswer(self._headers, put_together(pieces))

    async def _cut(self) -> AsyncIterator[Piece]:
        total, copies = len(self._prompts.prompts), self._copies
        async for places, room in take_places(self._gate, total, copies):
            most = total
            if self._gate is not None:
                most = max(1, self._gate.piece // _CALLS_A_PIECE // copies)
            for start in range(places.start, places.stop, most):
                some = range(start, min(start + most, places.stop))
                yield Piece(some, room, len(some) * copies, self._call.is_stream)

    def _build_call(self, piece: Piece) -> tuple[EngineCall, int, int, int]:
        """Of this piece; the bytes of its prompts, and which choices will answer them."""
        first, stop = piece.places[0], piece.places[-1] + 1
        size = sum(map(len, self._prompts.prompts[first:stop]))
        self._hold(self._prompts.size_beside)
        call = replace(
            self._call,
            body=self._prompts.take(range(first, stop)),
            sequences=len(piece.places) * self._copies,
        )
        each = self._prompts.answers
        return call, size, first * each, len(piece.places) * each

    async def _ask(self, piece: Piece) -> None:
        call, size, first, count = self._build_call(piece)
        call.parse_large = partial(parse_piece, first=first, count=count)
        with self._watch(call, size):
            async with self._attempt(call) as (_, answer):
                call.body = None
                self._release(size + self._prompts.size_beside)
                if answer.status != 200:
                    raise _Refused(answer)
                told: PieceAnswer = answer.value
                self._answers[first] = told
                self._note_tokens(*read_counts(told.usage or {}))
                self._note_first(call, answer)

    @contextlib.asynccontextmanager
    async def _attempt(self, call: EngineCall) -> AsyncIterator[tuple[Attempt, EngineAnswer]]:
        """A list is not lost for a moment in which the engines have no room for one piece: that is
        asked again, as often as a call may be.
        """
        while True:
            attempt = self._pool.attempt(call)
            async with attempt as answer:
                is_busy = answer.status in BUSY_STATUSES and answer.body is not None
                if not is_busy or call.tries_left <= 0:
                    yield attempt, answer
                    return
            call.sent_at = 0.0
            await asyncio.sleep(_BUSY_PAUSE_S)

    @contextlib.contextmanager
    def _watch(
        self, call: EngineCall, size: int, stream: PieceStream | None = None
    ) -> Iterator[None]:
        """Notes what was running of this call where it is cut off."""
        self._merged.calls[id(call)] = call
        try:
            yield
        except _Refused:
            raise  # nothing of it has run
        except BaseException as error:
            if not call.sent_at:
                raise
            self.sent_bytes += size
            told = 0
            if stream is not None:
                told = stream.count_open_tokens()
                self._note_tokens(0, stream.ended_tokens)
            # An engine's own fault is not charged by the clock.
            is_lost = isinstance(error, EngineError) and not isinstance(error, EngineTimeout)
            seconds = 0.0 if is_lost else time.perf_counter() - call.sent_at
            call.context.cut_pieces += (CutPiece(told, seconds, call.sequences),)
            raise
        finally:
            del self._merged.calls[id(call)]
        self.sent_bytes += size

    def _note_first(self, call: EngineCall, answer: EngineAnswer) -> None:
        if self._call.asked is None:
            self._call.asked, self._headers = call.asked, answer.headers

    def _note_tokens(self, taken: int, given: int) -> None:
        context = self._call.context
        before = context.told_tokens
        context.told_tokens = before[0] + taken, before[1] + given

    async def _open(self) -> EngineAnswer:
        """The head of the first piece's stream, or what its engine answered instead."""
        self._first = asyncio.get_running_loop().create_future()
        self._feeder = asyncio.create_task(self._feed(self._first))
        return await self._first

    async def _feed(self, first: asyncio.Future[EngineAnswer]) -> None:
        """All pieces' streams, and their end, whatever it is."""
        end: bytes | Exception
        try:
            async with open_group() as group:
                async for piece in self._cut():
                    group.create_task(self._stream(piece)).add_done_callback(piece.leave)
            end = self._head.build_end()
        except _Refused as refused:
            self.has_failed = True
            if not first.done():
                first.set_result(refused.answer)
                return
            answer = refused.answer
            end = build_refusal_event(answer.status, answer.body or b"", self._call.path)
        except StreamRefused as refused:
            self.has_failed = True
            self._merged.is_at_fault = refused.is_fault
            end = refused.event + DONE
        except asyncio.CancelledError:
            if self._failure is None:
                raise
            end = self._failure
        except Exception as error:  # noqa: BLE001 — it is raised where the stream is read
            end = error
        if not first.done():
            assert isinstance(end, Exception)  # noqa: S101 — what is good has had a head
            first.set_exception(end)
            return
        await self._merged.put(end)
        await self._merged.put(b"")

    async def _stream(self, piece: Piece) -> None:
        call, size, first, count = self._build_call(piece)
        stream = PieceStream(self._head, first, count)
        with self._watch(call, size, stream):
            async with self._attempt(call) as (attempt, answer):
                call.body = None
                self._release(size + self._prompts.size_beside)
                if answer.body is not None and answer.status != 200:
                    raise _Refused(answer)
                if answer.body is not None or answer.status != 200:
                    raise EngineError("the engine answered with no stream", code="engine_garbled")
                self._begin(call, answer)
                await self._read_stream(piece, attempt, answer, stream)
            taken, given = read_counts(stream.usage)
            self._note_tokens(taken, given if stream.usage else stream.ended_tokens)

    async def _read_stream(
        self, piece: Piece, attempt: Attempt, answer: EngineAnswer, stream: PieceStream
    ) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                while chunk := await answer.read_chunk():
                    events, ended = stream.read(chunk)
                    attempt.note_ended(ended)
                    piece.give_back(ended)
                    if events:
                        await self._merged.put(events)
            stream.check_end()
        except TimeoutError:
            raise EngineTimeout("the engine's stream took too long") from None
        except EngineError:
            answer.is_at_fault = stream.is_at_fault or None
            raise
        except StreamRefused as refused:
            answer.is_at_fault = refused.is_fault
            raise

    def _begin(self, call: EngineCall, answer: EngineAnswer) -> None:
        self._note_first(call, answer)
        if self._first is not None and not self._first.done():
            self._merged.headers = answer.headers
            self._first.set_result(self._merged)

    def _fail(self, error: EngineError) -> None:
        """Whoever reads gets the error."""
        self._failure = error
        if self._feeder is not None:
            self._feeder.cancel()

    async def _stop(self) -> None:
        if self._feeder is not None:
            self._failure = None
            self._feeder.cancel()
            await asyncio.wait({self._feeder})
