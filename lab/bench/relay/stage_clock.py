"""How much CPU time each stage of a request takes, measured inside the gateway's own process.

    python -m lab.bench.relay.stage_clock FILE …what `python -m gateway` takes

Some of the gateway's functions get a probe that reads the thread's CPU clock; what a probed one has
another one do is the other's time alone. The sums lie in a file that `stages.py`, which starts
this, reads as well. What a probe costs by itself is measured first and taken off.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import mmap
import sys
import time
import types
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What is in no probed function is the first one's: uvloop, and the kernel on its behalf.
PROBES: Mapping[str, str] = {
    "loop": "",
    "accept": "server:Connection.data_received server:Connection.start"
    " server:Connection._handle_request",
    "keys": "middleware:_admit middleware:_refuse_foreign_page",
    "parse": "routes.relay:_read_call routes.relay:check_call"
    " routes.predict:read_body routes.predict:_parse",
    "prompts": "routes.predict:_build_prompts",
    "admit": "routes.relay:build_ticket routes.predict:build_ticket"
    " admission.queue:Admission.__aenter__ admission.queue:Admission.__aexit__",
    "share": "engines.lists.deduplication:Deduplicator.generate",
    "choose": "engines.pool:ModelPool.acquire",
    "send": "engines.client:EngineClient._build_head engines.client:_write"
    " engines.connections:EngineConnector.connect engines.lists.batch:build_completion_call",
    "read": "engines.connections:_OneAnswerProtocol.data_received engines.client:_read_head"
    " engines.client:EngineAnswer.read_chunk engines.client:EngineAnswer.close"
    " engines.lists.batch:parse_completion_answer",
    "answer": "routes.relay:_Relay._answer_whole routes.predict:_build_answer"
    " middleware:_end_head server:Connection.finish_response"
    " streaming:EventStream.start streaming:EventStream.write",
    "metrics": "observability.metrics:Metrics.count_request routes.relay:_Relay._count"
    " observability.metrics:Metrics.count_answers routes.predict:_count",
    "log": "middleware:_finish",
    "rest": "middleware:surround",  # of the gateway's own code
}
STAGES = tuple(PROBES)
_TRIES = 20_000


@dataclass
class ProbeCost:
    """What one kind of probe adds by itself, in nanoseconds: to its own stage, and around it."""

    inside: int = 0
    around: int = 0


class StageClock:
    """Whose time it is, summed up by stage in nanoseconds. Belongs to one thread."""

    def __init__(self, sums: memoryview, read_ns: Callable[[], int] = time.thread_time_ns) -> None:
        self._sums, self._read_ns = sums, read_ns
        self._of_call, self._of_resumption = ProbeCost(), ProbeCost()
        self._stack = [0]
        self._since = read_ns()

    def probe(self, stage: int, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function on that stage's account; a coroutine is each time it is resumed."""

        def call(*args: Any, **options: Any) -> Any:
            self._enter(stage, self._of_call)
            try:
                return function(*args, **options)
            finally:
                self._leave()

        def drive(*args: Any, **options: Any) -> Any:
            return self._drive(stage, function(*args, **options))

        is_coroutine = inspect.iscoroutinefunction(function)
        return functools.wraps(function)(drive if is_coroutine else call)

    @types.coroutine
    def _drive(self, stage: int, work: Any) -> Generator[Any, Any, Any]:
        resume, given = work.send, None
        while True:
            self._enter(stage, self._of_resumption)
            try:
                awaited = resume(given)
            except StopIteration as done:
                return done.value
            finally:
                self._leave()
            try:
                resume, given = work.send, (yield awaited)
            except BaseException as error:  # noqa: BLE001 — the coroutine's to deal with
                resume, given = work.throw, error

    def _enter(self, stage: int, cost: ProbeCost) -> None:
        self._sums[self._stack[-1]] += self._read_ns() - self._since - cost.around
        self._sums[stage] -= cost.inside
        self._stack.append(stage)
        self._since = self._read_ns()  # what stands between the two is nobody's

    def _leave(self) -> None:
        self._sums[self._stack.pop()] += self._read_ns() - self._since
        self._since = self._read_ns()

    def learn_costs(self) -> None:
        """Of functions that do nothing; all sums are zero afterwards."""

        def nothing() -> None: ...

        async def rest() -> None: ...

        async def resume() -> None:
            for _ in range(_TRIES):
                await resting()

        calling, resting = self.probe(1, nothing), self.probe(1, rest)
        for _ in range(2):  # the first time all is slow
            self._of_call = self._learn(lambda: [calling() for _ in range(_TRIES)])
            self._of_resumption = self._learn(lambda: resume().send(None))

    def _learn(self, work: Callable[[], object]) -> ProbeCost:
        self._of_call, self._of_resumption = ProbeCost(), ProbeCost()
        self._since = self._read_ns()
        with contextlib.suppress(StopIteration):
            work()
        self._sums[0] += self._read_ns() - self._since
        cost = ProbeCost(self._sums[1] // _TRIES, self._sums[0] // _TRIES)
        for stage in range(len(STAGES)):
            self._sums[stage] = 0
        return cost


def find_probed() -> Iterator[tuple[int, Any, str]]:
    """Each stage's functions: whose they are, and their names there."""
    for stage, places in enumerate(PROBES.values()):
        for place in places.split():
            module, _, path = place.partition(":")
            owner: Any = importlib.import_module(f"gateway.{module}")
            *outer, name = path.split(".")
            for one in outer:
                owner = getattr(owner, one)
            yield stage, owner, name


def map_sums(path: Path) -> memoryview:
    """A number for each stage, in a file, for whoever maps it."""
    with path.open("r+b") as file:
        file.truncate(len(STAGES) * 8)
        return memoryview(mmap.mmap(file.fileno(), 0)).cast("q")


def main() -> int:
    clock = StageClock(map_sums(Path(sys.argv.pop(1))))
    clock.learn_costs()
    for stage, owner, name in list(find_probed()):
        setattr(owner, name, clock.probe(stage, getattr(owner, name)))
    # Late: what the probes stand before has to be looked up after them.
    from gateway.__main__ import main as serve  # noqa: PLC0415

    return serve()


if __name__ == "__main__":
    sys.exit(main())
