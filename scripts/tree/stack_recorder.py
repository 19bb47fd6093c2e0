"""A gateway that notes its own stack whenever a caller's request reaches an engine's socket, and
whenever a chunk is written to a caller.

A program of its own, started in the folder of a tree as `python stack_recorder.py RECORDS`; a
record is a line of JSON. Warm-up and probes leave none: no request stands behind their tasks.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import runpy
import sys
from pathlib import Path
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

import uvloop
from aiohttp import web
from aiohttp.client_proto import ResponseHandler

_OWN = ("gateway", "common")
_SERVER = "aiohttp/web_protocol.py"  # what is called from here is called for a request
_REACHED = "set_response_params"  # the last that clients of aiohttp's connections call to write


class StackRecorder:
    """Joins the stacks of the tasks that one request made."""

    def __init__(self, root: Path, records: Path) -> None:
        self._root = root
        self._own = tuple(f"{root / name}/" for name in _OWN)
        self._records = records
        self._makers: WeakKeyDictionary[asyncio.Task[Any], list[str]] = WeakKeyDictionary()

    def note_task(self, loop: asyncio.AbstractEventLoop, task: asyncio.Task[Any]) -> None:
        stack = self._read_stack(loop)
        if stack is not None:
            self._makers[task] = stack

    def note(self, kind: str) -> None:
        stack = self._read_stack(asyncio.get_running_loop())
        if stack is not None:
            with self._records.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"kind": kind, "frames": stack}) + "\n")

    def _read_stack(self, loop: asyncio.AbstractEventLoop) -> list[str] | None:
        """The project's frames since aiohttp's server called one; `None` if it did not."""
        task = asyncio.current_task(loop)
        if task is None:
            return None
        frames = list_frames(task)
        for place, frame in enumerate(frames):
            if frame.f_code.co_filename.endswith(_SERVER):
                return self._name_own(frames[place:])
        before = self._makers.get(task)
        return None if before is None else before + self._name_own(frames)

    def _name_own(self, frames: list[FrameType]) -> list[str]:
        return [
            f"{Path(code.co_filename).relative_to(self._root)}:{code.co_qualname}"
            for code in (frame.f_code for frame in frames)
            # An own `set_response_params` is over before anything is written.
            if code.co_filename.startswith(self._own) and code.co_name != _REACHED
        ]


def list_frames(task: asyncio.Task[Any]) -> list[FrameType]:
    """From the task's own coroutine to here; below it lies the event loop, and what started it."""
    outermost = getattr(task.get_coro(), "cr_frame", None)
    frames = []
    frame = inspect.currentframe()
    while frame is not None:
        frames.append(frame)
        frame = None if frame is outermost else frame.f_back
    return frames[::-1]


def install(recorder: StackRecorder) -> None:
    watch_tasks(uvloop.Loop, recorder)
    watch_tasks(asyncio.BaseEventLoop, recorder)
    reached, written = ResponseHandler.set_response_params, web.StreamResponse.write

    def set_response_params(*args: Any, **options: Any) -> None:
        recorder.note("engine")
        reached(*args, **options)

    async def write(*args: Any, **options: Any) -> None:
        recorder.note("caller")
        await written(*args, **options)

    for owner, own in ((ResponseHandler, set_response_params), (web.StreamResponse, write)):
        setattr(owner, own.__name__, own)


def watch_tasks(loop_class: Any, recorder: StackRecorder) -> None:
    """`asyncio.create_task` and a task group both end there."""
    make = loop_class.create_task

    def create_task(loop: asyncio.AbstractEventLoop, *args: Any, **options: Any) -> Any:
        task = make(loop, *args, **options)
        recorder.note_task(loop, task)
        return task

    loop_class.create_task = create_task


if __name__ == "__main__":
    install(StackRecorder(Path.cwd(), Path(sys.argv[1])))
    sys.path[0] = str(Path.cwd())  # Python put this file's own folder there
    sys.argv[1:] = []
    runpy.run_module("gateway", run_name="__main__", alter_sys=True)
