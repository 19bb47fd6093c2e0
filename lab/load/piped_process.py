"""A process of its own at the other end of a pipe: what it does is no slowness of this one's."""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import Callable
from typing import Any

_JOIN_S = 10.0


class PipedProcess:
    """Serves `serve(pipe, *words)` until this end is closed or gone."""

    def __init__(self, serve: Callable[..., None], *words: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, *words), daemon=True)
        self._process.start()
        theirs.close()

    async def wait_ready(self) -> None:
        await self.receive()

    def send(self, word: Any) -> None:
        self._pipe.send(word)

    async def receive(self) -> Any:
        return await asyncio.to_thread(self._pipe.recv)

    def end(self) -> None:
        self._pipe.close()
        self._process.join(_JOIN_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
