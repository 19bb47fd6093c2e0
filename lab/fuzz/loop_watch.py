"""A gateway whose event loop is watched: what kept its thread busy, by the thread's own CPU time.

    python -m lab.fuzz.loop_watch FILE [the gateway's flags]

By CPU time, and not by the clock: a busy machine is no blocked loop. Where the machine is slower
than at its best, because others use its caches and the other half of a core, it counts as less:
a known piece of work tells, right after what took long. Work that holds the interpreter's lock in
another thread does not show here, so the gateway gives threads none that does for long.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import uvloop
from aiohttp.client_proto import ResponseHandler

from gateway import __main__ as gateway
from gateway.server import Connection

LONGEST_S = 0.050
_WORTH_A_LINE_S = 0.010
# Where the callback stands among their arguments.
_SCHEDULERS = {"call_soon": 0, "call_soon_threadsafe": 0, "call_at": 1, "call_later": 1}


def read_blocks(path: Path) -> list[tuple[float, str]]:
    """What kept the loop for longer than a moment; the start is left out."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [(row["cpu_s"], row["what"]) for row in map(json.loads, lines)]


def describe_blocks(path: Path) -> str:
    """What blocked the loop for longer than it may be, the longest first; else nothing."""
    blocks = sorted(read_blocks(path), reverse=True)
    if not blocks or blocks[0][0] <= LONGEST_S:
        return ""
    lines = [f"{cpu_s * 1e3:.0f} ms: {what}" for cpu_s, what in blocks[:5]]
    return "\n".join(["the event loop was blocked:", *lines])


class Watch:
    """Each step of a task, each callback and each piece of data that arrives, if it takes long, is
    a line in the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        path.touch()
        self._best_s = min(_take_reference_s() for _ in range(100))

    def run(self, callback: Callable[..., Any], *args: Any) -> Any:
        began = time.thread_time()
        try:
            return callback(*args)
        finally:
            cpu_s = time.thread_time() - began
            if cpu_s > _WORTH_A_LINE_S:
                reference_s = statistics.median(_take_reference_s() for _ in range(5))
                self._best_s = min(self._best_s, reference_s)
                cpu_s *= self._best_s / reference_s
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"cpu_s": cpu_s, "what": _describe(callback)}) + "\n")

    def watch_data(self, kind: type[Any]) -> None:
        take = kind.data_received

        def data_received(protocol: Any, data: bytes) -> None:
            self.run(take, protocol, data)

        kind.data_received = data_received

    def build_loop(self) -> Any:
        kind = type("WatchedLoop", (uvloop.Loop,), {})
        for name, place in _SCHEDULERS.items():
            setattr(kind, name, self._watch_scheduler(name, place))
        return kind()

    def _watch_scheduler(self, name: str, place: int) -> Callable[..., Any]:
        schedule = getattr(uvloop.Loop, name)

        def schedule_watched(loop: Any, *args: Any, context: Any = None) -> Any:
            return schedule(loop, *args[:place], self.run, *args[place:], context=context)

        return schedule_watched


def _take_reference_s() -> float:
    began = time.thread_time()
    sum(range(20_000))
    return time.thread_time() - began


def _describe(callback: Any) -> str:
    """Of a task where it stands now, for it has just taken the step."""
    task = getattr(callback, "__self__", None)
    if not isinstance(task, asyncio.Task):
        return repr(callback)
    frames: list[str] = []
    step: Any = task.get_coro()
    while step is not None and (frame := getattr(step, "cr_frame", None)):
        frames.append(f"{step.cr_code.co_qualname}:{frame.f_lineno}")
        step = step.cr_await
    return f"{task.get_name()} then at {' > '.join(frames[-5:]) or 'its end'}"


def main() -> int:
    watch = Watch(Path(sys.argv.pop(1)))
    watch.watch_data(Connection)
    watch.watch_data(ResponseHandler)

    def run(main: Coroutine[Any, Any, int]) -> int:
        with asyncio.Runner(loop_factory=watch.build_loop) as runner:
            return runner.run(main)

    uvloop.run = run  # type: ignore[assignment]
    return gateway.main()


if __name__ == "__main__":
    sys.exit(main())
