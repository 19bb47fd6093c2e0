"""How long an engine takes, by what was measured on a GPU.

A request passes the engine's front (HTTP, tokens, its prompt) one after another; then its sequence
gets a token with every step, and a step takes the longer the more sequences are in it.
"""

from __future__ import annotations

from dataclasses import dataclass


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


# Of the records gpu-streams and gpu-course in docs/results, as tests/test_service_times.py has it.
H200_TIMES = ServiceTimes(
    intake_s=0.0028406721490196727,
    first_s=0.00992996900794467,
    step_s=0.0023320374920645223,
    step_more_s=6.406720632346982e-06,
)
