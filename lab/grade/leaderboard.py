"""What the course published, for comparison: an RTX 5090, the course's own 358 questions.

Whether its "tokens" are tokens or characters is not certain; three entries believe the latter.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """One entry's published result; a score that was not published is None."""

    name: str
    tokens_per_s: float
    rouge_course: float | None


PUBLISHED = (
    Place("first place", 54_174, 0.3721),
    Place("seed entry", 41_923, 0.3663),
    Place("seed entry, 4B AWQ", 16_000, None),
)
