"""What a command says on a terminal: how it goes, on standard error, and at its end the figures.

A bar on a terminal, now and then a line elsewhere; a stranger's text never moves the cursor.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import sys
from collections.abc import AsyncIterator, Callable
from typing import TextIO

RED, GREEN, BOLD = "\x1b[31m", "\x1b[32m", "\x1b[1m"
_RESET = "\x1b[0m"
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]+")
_BAR_CELLS = 28
_LINE_EVERY_S = 15.0
_FIRST_LINE_S = 3.0
_TICK_S = 0.2


class ProgressLine:
    """One line that changes. `limit_s` is what the bar's time is held against."""

    def __init__(self, limit_s: float = 0.0, runs: int = 1, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self.is_terminal = self._stream.isatty()
        self._limit_s = limit_s
        self._runs = runs
        self._run = 0
        self._next_line_s = _FIRST_LINE_S
        self._is_open = False

    def begin_run(self, number: int) -> None:
        self._run = number
        self._next_line_s = _FIRST_LINE_S

    def waiting(self, seconds: float, said: str) -> None:
        self._show(seconds, f"waiting for the server, {seconds:.0f} s: {said}")

    def asking(self, answered: int, asked: int, seconds: float) -> None:
        share = answered / asked if asked else 1.0
        filled = round(share * _BAR_CELLS)
        bar = "█" * filled + "░" * (_BAR_CELLS - filled)
        label = f"run {self._run} of {self._runs}  " if self._runs > 1 else ""
        time = f"{seconds:.0f} of {self._limit_s:g} s"
        if self.is_terminal:
            self._show(seconds, f"{label}{bar} {answered}/{asked}  {time}")
        else:
            self._show(seconds, f"{label}{answered}/{asked} answered, {time}")

    def working(self, text: str) -> None:
        """A step without a measure."""
        if self.is_terminal:
            self._write(text)

    def say(self, text: str) -> None:
        """A line that stays."""
        self.close()
        print(text, file=self._stream, flush=True)

    def close(self) -> None:
        if self._is_open:
            print("\r\033[K", end="", file=self._stream, flush=True)
            self._is_open = False

    def _show(self, seconds: float, text: str) -> None:
        if self.is_terminal:
            self._write(text)
        elif seconds >= self._next_line_s:
            self._next_line_s = seconds + _LINE_EVERY_S
            print(text, file=self._stream, flush=True)

    def _write(self, text: str) -> None:
        columns = shutil.get_terminal_size().columns
        shown = text.replace("\n", " ")[: columns - 1]
        print(f"\r\033[K{shown}", end="", file=self._stream, flush=True)
        self._is_open = True


@contextlib.asynccontextmanager
async def ticking(tell: Callable[[], None]) -> AsyncIterator[None]:
    """While inside, somebody is told how it goes."""

    async def tick() -> None:
        while True:
            tell()
            await asyncio.sleep(_TICK_S)

    task = asyncio.create_task(tick())
    try:
        yield
    finally:
        task.cancel()


def tame(text: str) -> str:
    """Of a stranger's text: one line that moves no cursor and colours nothing."""
    return _CONTROL.sub(" ", text)


def paint(text: str, colour: str, *, coloured: bool) -> str:
    return f"{colour}{text}{_RESET}" if coloured else text


def count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"
