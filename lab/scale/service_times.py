"""How long an engine takes, by what was measured on a GPU (docs/results/).

A request passes the engine's front (HTTP, tokens, its prompt) one after another; then its sequence
gets a token with every step, and a step takes the longer the more sequences are in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lab.failures import BadFile
from lab.paths import ROOT
from lab.records.record import RunRecord, read_record

RESULTS = ROOT / "docs" / "results"
_STREAMS, _BATCHES = "gpu-streams.json", "gpu-course.json"
_MANY_STREAMS, _MANY_PROMPTS = 256, 358


@dataclass(frozen=True)
class ServiceTimes:
    """In seconds."""

    intake_s: float  # of each request at the front, one after another
    first_s: float  # from there to the first token, of one that is alone
    step_s: float  # of one sequence
    step_more_s: float  # and of each further one

    def time_step(self, sequences: int) -> float:
        return self.step_s + self.step_more_s * max(0, sequences - 1)

    def count_requests(self, sequences: int, tokens: float) -> float:
        """The most that one engine answers in a second."""
        return min(1 / self.intake_s, sequences / (tokens * self.time_step(sequences)))


def read_service_times(folder: Path = RESULTS) -> ServiceTimes:
    """Of the profile `course` with the model that those records tell of."""
    streams, batches = (read_record(folder / name) for name in (_STREAMS, _BATCHES))
    first_s, later_s = (
        _find(streams, f"course, ids, {word} x 64: first token") / 1000
        for word in ("1 stream", f"{_MANY_STREAMS} streams")
    )
    step_s = _find(streams, "course, ids, 1 stream x 64: between tokens") / 1000
    # What 128 tokens more of each took, so without the prompts.
    times = {
        tokens: _MANY_PROMPTS
        * tokens
        / _find(batches, f"course, ids, {_MANY_PROMPTS} prompts x {tokens}")
        for tokens in (128, 256)
    }
    full_step_s = (times[256] - times[128]) / 128
    return ServiceTimes(
        intake_s=(later_s - first_s) / (_MANY_STREAMS - 1),
        first_s=first_s - step_s,
        step_s=step_s,
        step_more_s=(full_step_s - step_s) / (_MANY_PROMPTS - 1),
    )


def _find(record: RunRecord, name: str) -> float:
    for figure in record.figures:
        if figure.name == name:
            return figure.value
    raise BadFile(f"the record {record.name!r} has no figure {name!r}")
