"""An engine without a process: what is sent to it ends when a measured one would have ended it.

It stands behind `EngineClient.send`, so pool, attempt, warm-up and capacity are the gateway's own.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections import deque
from collections.abc import Mapping
from typing import Any, Literal, cast

import aiohttp
import orjson
from multidict import CIMultiDict, CIMultiDictProxy

from gateway.engines.client import EngineAnswer, EngineClient
from gateway.errors import EngineError, EngineUnreachable
from lab.scale.service_times import ServiceTimes

MODEL = "simulated"
WHOLE = b" whole"
_STREAM = CIMultiDictProxy(CIMultiDict({"Content-Type": "text/event-stream"}))
_WHOLE = CIMultiDictProxy(CIMultiDict({"Content-Type": "application/json"}))
_SOON = 1e-9


class Sequence:
    """One answer on its way: also the stream that its reader reads, and its connection."""

    transport = None

    def __init__(self, engine: SimulatedEngine, tokens: int) -> None:
        self.engine, self.tokens = engine, tokens
        self.has_left = False
        self._loop = asyncio.get_running_loop()
        self._told: deque[bytes] = deque()
        self._failure: BaseException | None = None
        self._reader: asyncio.Future[None] | None = None
        self._has_ended = False

    def tell(self, chunk: bytes) -> None:
        """An empty one is the end."""
        self._told.append(chunk)
        self._wake()

    def fail(self) -> None:
        self.has_left = True
        self._failure = aiohttp.ServerDisconnectedError()
        self._wake()

    async def readany(self) -> bytes:
        while not self._told:
            if self._failure is not None:
                raise self._failure
            self._reader = self._loop.create_future()
            await self._reader
        chunk = self._told.popleft()
        self._has_ended = not chunk
        return chunk

    def at_eof(self) -> bool:
        return self._has_ended

    def set_exception(self, error: BaseException) -> None:
        self._failure = error
        self._wake()

    def release(self) -> None:
        """All has been read."""

    def close(self) -> None:
        """Its reader has hung up."""
        if not self.has_left:
            self.engine.drop(self)

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


class SimulatedEngine:
    """Sequences that share its steps; those beyond `most` wait, in order of arrival."""

    def __init__(self, times: ServiceTimes, most: int) -> None:
        self.is_alive = True
        self.calls = 0  # since it was there last
        self.refused_at = 0.0  # when it last did not take a call, for it was away
        self._times, self._most = times, most
        self._loop = asyncio.get_running_loop()
        self._numbers = itertools.count()
        # In order of arrival: a set's order would be another one each time.
        self._running: dict[Sequence, None] = {}
        self._waiting: deque[Sequence] = deque()
        self._arriving: dict[Sequence, None] = {}
        self._front_free_at = 0.0
        # Steps so far, counted in parts; what ends at which step.
        self._steps, self._at = 0.0, self._loop.time()
        self._ends: list[tuple[float, int, Literal["first", "last"], Sequence]] = []
        self._timer: asyncio.TimerHandle | None = None

    def submit(self, tokens: int) -> Sequence:
        sequence = Sequence(self, tokens)
        now = self._loop.time()
        self.calls += 1
        self._front_free_at = max(now, self._front_free_at) + self._times.intake_s
        self._arriving[sequence] = None
        self._loop.call_at(self._front_free_at + self._times.first_s, self._arrive, sequence)
        return sequence

    def drop(self, sequence: Sequence) -> None:
        sequence.has_left = True
        self._arriving.pop(sequence, None)
        if sequence in self._running:
            self._advance()
            self._leave(sequence)
            self._schedule()

    def fail(self) -> None:
        """As a process that is killed."""
        self.is_alive, self.calls = False, 0
        for sequence in (*self._running, *self._waiting, *self._arriving):
            sequence.fail()
        self._running, self._arriving = {}, {}
        self._waiting.clear()
        self._ends.clear()
        self._schedule()

    def come_back(self) -> None:
        self.is_alive, self._front_free_at, self._at = True, 0.0, self._loop.time()

    def describe_load(self) -> bytes:
        """GET /metrics, as far as the gateway reads it."""
        waiting = len(self._waiting)
        return (
            f"vllm:num_requests_running {len(self._running)}\nvllm:num_requests_waiting {waiting}\n"
        ).encode()

    def _arrive(self, sequence: Sequence) -> None:
        if sequence not in self._arriving:
            return
        self._arriving.pop(sequence, None)
        self._advance()
        self._waiting.append(sequence)
        self._start_waiting()
        self._schedule()

    def _start_waiting(self) -> None:
        while self._waiting and len(self._running) < self._most:
            sequence = self._waiting.popleft()
            if not sequence.has_left:
                self._running[sequence] = None
                self._note_end(1, "first", sequence)
                self._note_end(sequence.tokens, "last", sequence)

    def _note_end(self, steps: int, which: Literal["first", "last"], sequence: Sequence) -> None:
        heapq.heappush(self._ends, (self._steps + steps, next(self._numbers), which, sequence))

    def _leave(self, sequence: Sequence) -> None:
        self._running.pop(sequence, None)
        self._start_waiting()

    def _advance(self) -> None:
        now = self._loop.time()
        if self._running:
            self._steps += (now - self._at) / self._times.time_step(len(self._running))
        self._at = now

    def _schedule(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._ends and self._ends[0][3].has_left:
            heapq.heappop(self._ends)
        if self._ends:
            missing = max(0.0, self._ends[0][0] - self._steps)
            step_s = self._times.time_step(len(self._running))
            self._timer = self._loop.call_at(self._at + missing * step_s + _SOON, self._fire)

    def _fire(self) -> None:
        self._timer = None
        self._advance()
        while self._ends and self._ends[0][0] <= self._steps:
            _, _, which, sequence = heapq.heappop(self._ends)
            if sequence.has_left:
                continue
            if which == "first":
                sequence.tell(b"first")
            else:
                sequence.has_left = True
                sequence.tell(b"")
                self._leave(sequence)
        self._schedule()


class SimulatedClient(EngineClient):
    """What the gateway sends through, of one simulated engine. A body is the number of tokens, and
    WHOLE behind it where the answer is no stream.
    """

    def __init__(self, engine: SimulatedEngine) -> None:
        self._engine = engine

    async def send(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
    ) -> EngineAnswer:
        engine = self._engine
        if not engine.is_alive:
            engine.refused_at = asyncio.get_running_loop().time()
            raise EngineUnreachable("the engine does not accept connections", retry_after_s=5)
        if method == "GET":
            return _answer_whole(self._answer_get(path))
        if path == "/v1/completions":  # the warm-up
            return _answer_whole(await self._complete(orjson.loads(body or b"{}")))
        body = body or b"1"
        sequence = engine.submit(int(body.removesuffix(WHOLE)))
        if body.endswith(WHOLE):
            await _read_all(sequence)
            return _answer_whole(b"{}")
        stream = cast("aiohttp.StreamReader", sequence)
        return EngineAnswer(cast("Any", sequence), 200, _STREAM, stream)

    def _answer_get(self, path: str) -> bytes:
        if path == "/v1/models":
            return orjson.dumps({"data": [{"id": MODEL, "max_model_len": 4096}]})
        return self._engine.describe_load() if path == "/metrics" else b""

    async def _complete(self, call: Mapping[str, Any]) -> bytes:
        prompts = call["prompt"]
        sequences = [self._engine.submit(call["max_tokens"]) for _ in prompts]
        for sequence in sequences:
            await _read_all(sequence)
        choices = [
            {"index": place, "text": "a", "finish_reason": "stop"} for place in range(len(prompts))
        ]
        return orjson.dumps({"choices": choices, "usage": {}})


async def _read_all(sequence: Sequence) -> None:
    try:
        while await sequence.readany():
            pass
    except aiohttp.ClientError:
        raise EngineError("the engine broke the connection off") from None
    finally:
        sequence.close()


def _answer_whole(body: bytes) -> EngineAnswer:
    answer = EngineAnswer(cast("Any", None), 200, _WHOLE, cast("Any", None))
    answer.body = body
    return answer
