"""What is asked again and again: each workload, taken once through one door, gives its times."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from lab.bench.targets import Call, Client, Door

_SHARE_OF_CALLS = 0.95


class Workload(Protocol):
    """`measures` names what `run` returns, in milliseconds; `size` is its number of requests."""

    @property
    def title(self) -> str: ...

    @property
    def measures(self) -> tuple[str, ...]: ...

    @property
    def size(self) -> int: ...

    async def prepare(self, door: Door) -> Sequence[Call]: ...

    async def run(self, client: Client, calls: Sequence[Call]) -> dict[str, float]: ...


@dataclass(frozen=True)
class OneCall:
    """All questions in one call."""

    title: str
    questions: tuple[str, ...]
    max_tokens: int
    measures: tuple[str, ...] = ("time",)

    @property
    def size(self) -> int:
        return len(self.questions)

    async def prepare(self, door: Door) -> list[Call]:
        return [await door.list_call(self.questions, self.max_tokens)]

    async def run(self, client: Client, calls: Sequence[Call]) -> dict[str, float]:
        started = time.perf_counter()
        body = await client.send(calls[0])
        took_s = time.perf_counter() - started
        client.check(calls[0], body)
        return {"time": took_s * 1e3}


@dataclass(frozen=True)
class ManyCalls:
    """A call for each question, all at once."""

    title: str
    questions: tuple[str, ...]
    max_tokens: int
    measures: tuple[str, ...] = ("time for all", "95 % of the calls within")

    @property
    def size(self) -> int:
        return len(self.questions)

    async def prepare(self, door: Door) -> list[Call]:
        return [await door.list_call([one], self.max_tokens) for one in self.questions]

    async def run(self, client: Client, calls: Sequence[Call]) -> dict[str, float]:
        async def timed(call: Call) -> tuple[float, bytes]:
            body = await client.send(call)
            return time.perf_counter() - started, body

        started = time.perf_counter()
        done = await asyncio.gather(*(timed(call) for call in calls))
        took_s = time.perf_counter() - started
        for call, (_, body) in zip(calls, done, strict=True):
            client.check(call, body)
        within_s = find_quantile([seconds for seconds, _ in done], _SHARE_OF_CALLS)
        return {"time for all": took_s * 1e3, "95 % of the calls within": within_s * 1e3}


@dataclass(frozen=True)
class Streams:
    """Chat streams, so many at once."""

    title: str
    questions: tuple[str, ...]
    max_tokens: int
    measures: tuple[str, ...] = ("first chunk", "whole stream")

    @property
    def size(self) -> int:
        return len(self.questions)

    async def prepare(self, door: Door) -> list[Call]:
        return [door.chat_call(one, self.max_tokens, is_stream=True) for one in self.questions]

    async def run(self, client: Client, calls: Sequence[Call]) -> dict[str, float]:
        streams = await asyncio.gather(*(client.stream(call) for call in calls))
        for call, stream in zip(calls, streams, strict=True):
            client.check_stream(call, stream)
        return {
            "first chunk": statistics.median(stream.first_s for stream in streams) * 1e3,
            "whole stream": statistics.median(stream.total_s for stream in streams) * 1e3,
        }


def find_quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
