"""What is asked again and again: each workload, taken once through one target, gives its times."""

from __future__ import annotations

import abc
import asyncio
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from lab.bench.targets import BenchCall, BenchClient, Target, read_clock_s
from lab.intervals import quantile

_SHARE_OF_CALLS = 0.95


@dataclass(frozen=True)
class BenchWorkload(abc.ABC):
    """A call or more for the questions; `run` gives milliseconds by name."""

    title: str
    questions: tuple[str, ...]
    max_tokens: int

    @abc.abstractmethod
    async def prepare(self, target: Target) -> list[BenchCall]: ...

    @abc.abstractmethod
    async def run(self, client: BenchClient, calls: Sequence[BenchCall]) -> dict[str, float]: ...


class OneCall(BenchWorkload):
    """All questions in one call."""

    async def prepare(self, target: Target) -> list[BenchCall]:
        return [await target.list_call(self.questions, self.max_tokens)]

    async def run(self, client: BenchClient, calls: Sequence[BenchCall]) -> dict[str, float]:
        started = read_clock_s()
        body = await client.send(calls[0])
        took_s = read_clock_s() - started
        client.check(calls[0], body)
        return {"time": took_s * 1e3}


class ManyCalls(BenchWorkload):
    """A call for each question, all at once."""

    async def prepare(self, target: Target) -> list[BenchCall]:
        return [await target.list_call([one], self.max_tokens) for one in self.questions]

    async def run(self, client: BenchClient, calls: Sequence[BenchCall]) -> dict[str, float]:
        async def timed(call: BenchCall) -> tuple[float, bytes]:
            body = await client.send(call)
            return read_clock_s() - started, body

        started = read_clock_s()
        done = await asyncio.gather(*map(timed, calls))
        took_s = read_clock_s() - started
        for call, (_, body) in zip(calls, done, strict=True):
            client.check(call, body)
        within_s = quantile([seconds for seconds, _ in done], _SHARE_OF_CALLS)
        return {"time for all": took_s * 1e3, "95 % of the calls within": within_s * 1e3}


class ManyStreams(BenchWorkload):
    """Chat streams, so many at once."""

    async def prepare(self, target: Target) -> list[BenchCall]:
        return [target.stream_call(one, self.max_tokens) for one in self.questions]

    async def run(self, client: BenchClient, calls: Sequence[BenchCall]) -> dict[str, float]:
        streams = await asyncio.gather(*map(client.stream, calls))
        for call, stream in zip(calls, streams, strict=True):
            client.check(call, stream.body)
        return {
            "first chunk": statistics.median(stream.first_s for stream in streams) * 1e3,
            "whole stream": statistics.median(stream.total_s for stream in streams) * 1e3,
        }
