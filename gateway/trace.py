"""What is known about one request while it is served; from it come its log line and its headers."""

from __future__ import annotations

import time
from collections.abc import MutableMapping
from dataclasses import dataclass, field

from aiohttp import web


@dataclass(slots=True)
class Trace:
    """Request-long facts, filled in by whoever learns them."""

    request_id: str
    route: str
    started: float = field(default_factory=time.perf_counter)
    queue_s: float = 0.0
    engine_s: float = 0.0
    n_prompts: int | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    error_code: str | None = None
    shared: int = 0
    deadline: float | None = None
    is_streaming: bool = False

    def elapsed_s(self) -> float:
        return time.perf_counter() - self.started

    def server_timing(self) -> str:
        """The `Server-Timing` header so far: where the time went, in milliseconds."""
        gateway_s = max(0.0, self.elapsed_s() - self.queue_s - self.engine_s)
        shared = f', dedup;desc="{self.shared} shared"' if self.shared else ""
        return (
            f"queue;dur={self.queue_s * 1e3:.2f}, engine;dur={self.engine_s * 1e3:.2f}, "
            f"gateway;dur={gateway_s * 1e3:.2f}{shared}"
        )

    def put_headers(self, headers: MutableMapping[str, str]) -> None:
        """On every answer, streams included, before its headers leave."""
        headers["X-Request-Id"] = self.request_id
        headers["Server"] = "vllm-gateway"
        headers["Server-Timing"] = self.server_timing()

    def log_fields(self) -> dict[str, object]:
        known = {
            "n_prompts": self.n_prompts,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "error_code": self.error_code,
        }
        return {name: value for name, value in known.items() if value is not None}


TRACE = web.RequestKey("trace", Trace)
