"""Whether another gateway still lives that has taken something: it shows so by raising a number in
the database, and whoever looks judges by how long that has stood still on a clock of their own.
What clocks say, and how they jump, decides nothing here.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Hashable
from dataclasses import dataclass


@dataclass(slots=True)
class _Seen:
    """How far its owner was, and since when, by our own clock."""

    mark: Hashable
    since: float


class LeaseWatch:
    """Of everything that somebody else runs, by its id."""

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._seen: dict[str, _Seen] = {}

    def has_ended(self, name: str, mark: Hashable) -> bool:
        """Whether the mark has been the same for a whole lease."""
        now = time.monotonic()
        seen = self._seen.get(name)
        if seen is None or seen.mark != mark:
            self._seen[name] = _Seen(mark, now)
            return False
        return now - seen.since >= self._lease_s

    def keep_only(self, names: Collection[str]) -> None:
        """Others are there no more; with none, all begins anew."""
        for gone in self._seen.keys() - set(names):
            del self._seen[gone]
