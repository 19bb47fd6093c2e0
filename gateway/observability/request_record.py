"""What was learnt about one request, for its log line, its headers, its metrics and its span."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass(slots=True)
class StreamTiming:
    """When a stream's chunks came."""

    chunks: int = 0
    first_chunk_at: float = 0.0
    last_chunk_at: float = 0.0
    longest_gap_s: float = 0.0
    held_s: float = 0.0  # while its caller took nothing

    def note_chunk(self) -> None:
        """For each chunk, so a few additions and nothing else."""
        now = time.perf_counter()
        if not self.chunks:
            self.first_chunk_at = now
        elif now - self.last_chunk_at > self.longest_gap_s:
            self.longest_gap_s = now - self.last_chunk_at
        self.chunks += 1
        self.last_chunk_at = now

    def note_written(self) -> None:
        """The chunk that was noted last has been taken; for each, too."""
        self.held_s += time.perf_counter() - self.last_chunk_at


@dataclass(slots=True)
class RequestRecord:
    """Facts, filled in by whoever learns them; nothing is decided by them."""

    route: str
    started: float = field(default_factory=time.perf_counter)
    queued_at: float | None = None
    has_entered: bool = False
    queue_s: float = 0.0
    engine_s: float = 0.0
    n_prompts: int | None = None
    shared: int = 0  # prompts answered by the answer to an identical one
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    error_code: str | None = None
    error_source: str | None = None
    stream: StreamTiming | None = None

    def elapsed_s(self) -> float:
        return time.perf_counter() - self.started

    def note_error(self, code: str, source: str) -> None:
        self.error_code, self.error_source = code, source

    def note_queued(self) -> None:
        """It asks to enter now."""
        self.queued_at = time.perf_counter()

    def note_entered(self) -> None:
        """It has asked, waited and entered."""
        self.has_entered = True
        self.queue_s = time.perf_counter() - (self.queued_at or self.started)

    def server_timing(self) -> str:
        """The `Server-Timing` header so far: where the time went, in milliseconds."""
        gateway_s = max(0.0, self.elapsed_s() - self.queue_s - self.engine_s)
        shared = f', dedup;desc="{self.shared} shared"' if self.shared else ""
        return (
            f"queue;dur={self.queue_s * 1e3:.2f}, engine;dur={self.engine_s * 1e3:.2f}, "
            f"gateway;dur={gateway_s * 1e3:.2f}{shared}"
        )

    def log_fields(self) -> dict[str, object]:
        known = {
            "n_prompts": self.n_prompts,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "error_code": self.error_code,
        }
        return {name: value for name, value in known.items() if value is not None}
