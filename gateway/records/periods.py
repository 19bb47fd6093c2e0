"""Days and months of UTC: by these usage is kept, and budgets are given."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta

DAY_S = 86_400


class Calendar:
    """What day it is, looked up once a day."""

    __slots__ = ("_begins", "_names")

    def __init__(self) -> None:
        self._begins = 0.0
        self._names = ("", "")

    def today(self) -> tuple[str, str]:
        """The day ("2026-11-29") and its month ("2026-11")."""
        now = time.time()
        if not self._begins <= now < self._begins + DAY_S:
            self._begins = now // DAY_S * DAY_S
            day = name_day(now)
            self._names = day, day[:7]
        return self._names


def name_day(timestamp: float) -> str:
    return datetime.fromtimestamp(timestamp, UTC).strftime("%Y-%m-%d")


def count_seconds_left(*, month: bool) -> float:
    """Until the next day begins, or the next month."""
    now = datetime.now(UTC)
    midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
    following = midnight + timedelta(days=1)
    if month:
        following = (midnight.replace(day=1) + timedelta(days=32)).replace(day=1)
    return (following - now).total_seconds()
