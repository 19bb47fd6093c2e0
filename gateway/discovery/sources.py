"""What a source of engines is, and which one an entry of GATEWAY_ENGINES means.

A source tells whenever the engines that it knows have changed. When it cannot find out, it says so
in the log and tells nothing: the engines of its last good answer stay.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from gateway.config import SOURCE

Tell = Callable[[Sequence[str]], Awaitable[None]]


class EngineSource(Protocol):
    """Follows one entry until it is cancelled."""

    async def follow(self, tell: Tell) -> None: ...


def is_source(entry: str) -> bool:
    """Whether it names a place to look for engines, and not an engine."""
    return SOURCE.match(entry) is not None
